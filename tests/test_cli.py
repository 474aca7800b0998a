"""The command `hf-xlstm`: it answers without torch, and a wrong call ends with status 2 and one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import hf_xlstm_cli
from hf_xlstm import conversion
from hf_xlstm_cli import convert
from hf_xlstm_cli.presets import SIZES


ROOT = Path(__file__).parents[1]
SCRIPTS = {"evaluate": "eval", "convert": "convert_checkpoint", "share": "push_to_hub"}


def hf_xlstm(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process that cannot import torch."""
    code = "import sys; sys.modules['torch'] = None; from hf_xlstm_cli import main; main()"
    path = os.pathsep.join([str(ROOT / "src"), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in hf_xlstm_cli.VERBS)], ids=" ".join)
def test_help_needs_no_torch(arguments):
    shown = hf_xlstm(*arguments)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: hf-xlstm") and not shown.stderr


WRONG = {
    "verb": ["trian"],
    "option": ["train", "--outptu", "runs/x"],
    "no output": ["train", "--data", __file__],
    "size": ["train", "--output", "x", "--size", "8b"],
    "steps": ["train", "--output", "x", "--steps", "inf"],
    "vocabulary": ["train", "--output", "x", "--vocab-size", "10"],
    "decay": ["train", "--output", "x", "--weight-decay", "nan"],
    "minutes": ["train", "--output", "x", "--minutes", "ten"],
    "no model": ["generate"],
    "temperature": ["generate", "runs/x", "--temperature", "nan"],
    "tokens": ["generate", "runs/x", "--max-new-tokens", "many"],
    "format": ["convert", "a", "b", "--to", "gguf"],
    "nothing": ["evaluate", "runs/x"],
    "run": ["share", "nowhere", "me/x"],
    "what to serve": ["serve"],
    "check": ["env", "--chek"],
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_call_is_one_line_without_torch(case):
    ended = hf_xlstm(*WRONG[case])
    assert ended.returncode == 2 and not ended.stdout
    (line,) = ended.stderr.splitlines()
    assert re.match(r"hf-xlstm( \w+)?: error: ", line)


def test_no_verb_shows_the_help():
    shown = hf_xlstm()
    assert shown.returncode == 2 and "evaluate" in shown.stdout


def test_scripts_are_the_commands():
    """Every verb but `env`, which is `python -m hf_xlstm.env`, has its script in a checkout."""
    for verb in hf_xlstm_cli.VERBS.keys() - {"env"}:
        name = SCRIPTS.get(verb, verb)
        assert f'run_verb("{verb}", sys.argv[1:], "{name}.py")' in (ROOT / "scripts" / f"{name}.py").read_text()


def test_what_is_said_twice_is_the_same():
    assert convert.FORMATS == conversion.FORMATS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"hf-xlstm": "hf_xlstm_cli:main"}
    extras = project["project"]["optional-dependencies"]
    for path in (ROOT / "src" / "hf_xlstm" / "commands").rglob("*.py"):
        for extra in re.findall(r'need\("[\w.]+", "(\w+)"\)', path.read_text(encoding="utf-8")):
            assert extra in extras, path
    assert "7b" in SIZES


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=["default", "count", "policy"],
)
def test_threads_spin_shortly_unless_told(given, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    hf_xlstm_cli.spin_shortly()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
