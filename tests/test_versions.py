"""The tested range is stated once, and what is said elsewhere follows it."""

import re
import shlex
from pathlib import Path

import pytest
import tomllib

import hf_xlstm
from hf_xlstm import env, versions
from hf_xlstm_cli.env import parse


ROOT = Path(__file__).parents[1]


def test_pyproject_and_makefile_follow_the_tested_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest, newest = versions.TESTED["transformers"]
    major, minor = versions.minor(newest)
    assert f"transformers>={oldest},<{major}.{minor + 1}" in project["dependencies"]
    assert f"torch>={versions.TESTED['torch'][0]}" in project["dependencies"]
    pairs = re.search(r"^MATRIX := (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    for index, name in enumerate(("transformers", "torch")):
        tested = sorted(versions.minor(pair.split("/")[index]) for pair in pairs)
        assert (tested[0], tested[-1]) == tuple(map(versions.minor, versions.TESTED[name]))
    pinned = re.search(r"^transformers==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    assert versions.minor(pinned) == versions.minor(newest)


def test_citation_has_the_version():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M).group(1)
    assert cited == hf_xlstm.__version__


def test_hooks_lint_as_make_does():
    pinned = re.search(r"^ruff==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_site_is_made_by_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = re.search(r"^DOCS := (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1)
    assert shlex.split(packages) == extras["docs"]


def test_readme_names_the_tested_range():
    names = {"transformers": "Transformers", "torch": "torch", "triton": "Triton"}
    ranges = ", ".join(f"{name} {' to '.join(versions.TESTED[key])}" for key, name in names.items())
    assert f"Tested with {ranges}." in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("version, warns", [("5.24.9", False), ("5.25.0.dev0", True), ("6.0.1", True)])
def test_untested_version_warns_once(monkeypatch, version, warns, recwarn):
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda name: version)
    versions.warn_if_untested.cache_clear()
    for _ in range(2):
        versions.warn_if_untested()
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == warns
    if warns:
        assert version in messages[0] and "5.15 to 5.24" in messages[0] and "--check" in messages[0]
    versions.warn_if_untested.cache_clear()


def test_check_passes_here(capsys):
    assert env.run(parse(["--check"], "env")) == 0
    out = capsys.readouterr().out
    assert out.count("\nok ") >= 14 and "FAILED" not in out


def test_check_finds_a_forgotten_state(monkeypatch):
    """What happened with 5.24: the cache arrives under another name and is ignored."""
    prepare = env.xLSTMForCausalLM.prepare_inputs_for_generation

    def forgetful(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        return {name: x for name, x in inputs.items() if "cache" not in name and name != "past_key_values"}

    monkeypatch.setattr(env.xLSTMForCausalLM, "prepare_inputs_for_generation", forgetful)
    failed = {name.split(",")[0] for name, holds, _ in env.check() if not holds}
    assert "generate equals stepwise" in failed and "saved and continued" in failed
