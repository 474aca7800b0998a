"""`hf-xlstm train`: what it reads, when it stops, and that nothing is lost."""

import importlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from common import MIXED, relative_error, tiny_model
from hub_server import USER, HubServer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerControl, TrainerState

from hf_xlstm import xLSTMConfig, xLSTMForCausalLM
from hf_xlstm.commands import train
from hf_xlstm.commands.helpers.corpus import (
    HELDOUT_SHARE,
    Records,
    TextFile,
    cut_position,
    every_20th,
    files,
    hub_dataset,
    num_bytes,
)
from hf_xlstm.commands.helpers.tokens import Streams, Tokens, Windows, tokenise, train_tokenizer
from hf_xlstm.commands.helpers.training import Budget, Run, RunTrainer, learning_rate_factor
from hf_xlstm_cli import run_verb
from hf_xlstm_cli.errors import UserError
from hf_xlstm_cli.presets import SCHEDULES, SIZES, slstm_positions
from hf_xlstm_cli.train import parse


VERSE = """'Twas brillig, and the slithy toves
Did gyre and gimble in the wabe;
All mimsy were the borogoves,
And the mome raths outgrabe.

"""
SIZE = "--vocab-size 280 --hidden-size 32 --num-layers 2 --num-heads 2 --sequence-length 32 --batch-size 4 --no-bf16"
slow = pytest.mark.slow
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


# ---- text


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", ["a" * 40, "no line break " * 20, VERSE * 20, "one line\n" + "x" * 200, "größ" * 99])
def test_text_file_is_cut_at_a_line_or_at_least_between_characters(tmp_path, text):
    path = write(tmp_path / "a.txt", text)
    size = path.stat().st_size
    for near in range(1, size, 7):
        cut = cut_position(path, near)
        assert 0 <= cut <= near
        head, tail = str(TextFile(path, 0, cut)), str(TextFile(path, cut, size))
        assert head + tail == text
        assert "\n" not in text[: len(head)] or head.endswith("\n")


def test_pieces_of_a_long_file_are_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_xlstm.commands.helpers.corpus.PIECE", 37)  # bytes, so that characters are cut
    text = "größer 大きい\n" * 50 + "x" * 200
    path = write(tmp_path / "a.txt", text)
    pieces = list(TextFile(path, 0, path.stat().st_size).pieces())
    assert "".join(pieces) == text and len(pieces) > 10
    assert all(piece.endswith("\n") for piece in pieces[:10])


def test_held_out_text(tmp_path):
    texts = {"a.txt": VERSE * 20, "b.txt": "Größe\n" * 100}
    paths = [write(tmp_path / name, text) for name, text in texts.items()]
    corpus = files(paths)
    joined = [str(head) + tail for head, tail in zip(corpus.train, corpus.heldout, strict=True)]
    assert joined == list(texts.values())
    assert num_bytes(corpus.heldout) >= HELDOUT_SHARE * sum(len(text.encode()) for text in texts.values())
    given = files(paths[:1], heldout_paths=paths[1:])
    assert ([str(x) for x in given.train], given.heldout) == ([VERSE * 20], ["Größe\n" * 100])
    assert num_bytes(files(paths, heldout_bytes=100).heldout) < 200


def test_json_lines_and_parquet(tmp_path):
    texts = [f"record {i}: größer" for i in range(100)]
    lines = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"id": 1, "body": text}) for text in texts) + "\n\n")
    corpus = files([lines], field="body")
    assert corpus.heldout == texts[19::20][: len(corpus.heldout)] and corpus.heldout
    assert list(corpus.train) == [text for text in texts if text not in corpus.heldout] == list(corpus.train)
    with pytest.raises(UserError, match=r"a\.jsonl, line 1, has no text in the field 'text'.*--text-field"):
        files([lines])
    broken = write(tmp_path / "b.jsonl", '{"text": "a"}\n{"text": ')
    with pytest.raises(UserError, match=r"b\.jsonl, line 2, is not JSON"):
        list(Records(broken, "text"))
    pyarrow = pytest.importorskip("pyarrow", reason="needs the packages of '.[data]'")
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet")
    corpus = files([tmp_path / "a.parquet"], field="body")
    assert list(corpus.train) + corpus.heldout == [t for t in texts if t not in corpus.heldout] + corpus.heldout
    with pytest.raises(UserError, match="has no field 'text', only body"):
        files([tmp_path / "a.parquet"])
    with pytest.raises(UserError, match=r"c\.parquet is not a Parquet file"):
        files([write(tmp_path / "c.parquet", "PAR")])
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    damaged[4:60] = bytes(56)
    (tmp_path / "d.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match=r"d\.parquet is not a Parquet file, or damaged"):
        files([tmp_path / "d.parquet"], field="body")


def test_empty_and_unwritable_documents(tmp_path):
    texts = ["a text", "", ""] * 20
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    corpus = files([path])
    assert (
        corpus.heldout == ["a text"] and list(corpus.train).count("") == 38
    )  # one of the held-out three is not empty
    empty = write(tmp_path / "b.jsonl", '{"text": ""}\n' * 40)
    with pytest.raises(UserError, match=r"b\.jsonl: too short to hold some of it out"):
        files([empty])
    with pytest.raises(UserError, match=r"b\.jsonl: too short"):
        files([path], heldout_paths=[empty])
    half = write(tmp_path / "c.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}')
    with pytest.raises(UserError, match=r"c\.jsonl, line 2, has no text that UTF-8 can write"):
        list(Records(half, "text"))


def test_data_set_of_the_library(tmp_path, monkeypatch):
    """A local folder stands for a data set of the Hub: it is streamed in the same way."""
    pytest.importorskip("datasets", reason="needs the packages of '.[data]'")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    texts = [f"record {i}" for i in range(50)]
    write(tmp_path / "set" / "train.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    corpus = hub_dataset(str(tmp_path / "set"), None, "train", "text")
    assert corpus.heldout == texts[19::20]
    assert list(corpus.train) == [text for text in texts if text not in corpus.heldout]
    with pytest.raises(UserError, match=r"set \(split nothing\)"):
        hub_dataset(str(tmp_path / "set"), None, "nothing", "text")


PUSH = """
import sys
from huggingface_hub import HfApi
for folder in sys.argv[1:]:
    HfApi().create_repo(f"tester/{folder}", repo_type="dataset")
    HfApi().upload_folder(repo_id=f"tester/{folder}", folder_path=folder, repo_type="dataset")
"""


@pytest.fixture
def hub(tmp_path):
    """A Hub with the data sets tester/lines (JSON lines) and tester/columns (Parquet), pushed from these folders."""
    pytest.importorskip("datasets", reason="needs the packages of '.[data]'")
    pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    texts = [f"{i}. größer\n{VERSE}" for i in range(24)]
    (tmp_path / "lines").mkdir()
    write(tmp_path / "lines" / "train.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "columns" / "data").mkdir(parents=True)
    parquet.write_table(
        pyarrow.table({"text": texts}),
        tmp_path / "columns" / "data" / "train-00000-of-00001.parquet",
        row_group_size=8,
    )
    with HubServer() as server:
        client(server, tmp_path, [sys.executable, "-c", PUSH, "lines", "columns"], check=True)
        yield server


def client(hub, folder, command, **options) -> subprocess.CompletedProcess:
    """Runs a command that has never seen this Hub, and that takes no breath before it tries again."""
    (folder / "site").mkdir(exist_ok=True)
    write(folder / "site" / "sitecustomize.py", "import time\ntime.sleep = lambda seconds: None\n")
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    path = {"PYTHONPATH": os.pathsep.join([str(folder / "site"), *sys.path])}
    environment = {**os.environ, **hub.environment, **home, **path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", **options)


def train_on(*text: str) -> list[str]:
    """Two steps that see every token of the data sets in `hub`."""
    command = [sys.executable, "-m", "hf_xlstm_cli", "train", *text, "--steps", "2", "--trainer", "logging_steps=1"]
    return [*command, *SIZE.replace("--batch-size 4", "--batch-size 44").split()]


def test_streamed_data_set_is_what_its_files_are(hub, tmp_path):
    sources = {
        "files": ["--data", "lines/train.jsonl"],
        "lines": ["--dataset", f"{USER}/lines"],
        "columns": ["--dataset", f"{USER}/columns"],
    }
    for output, source in sources.items():
        done = client(hub, tmp_path, train_on(*source, "--output", f"run-{output}"))
        assert done.returncode == 0, done.stderr
    expected = json.loads((tmp_path / "run-files" / "metrics.json").read_text())
    assert expected["tokens_seen"] >= expected["train_tokens"]
    weights = load_file(tmp_path / "run-files" / "model.safetensors")
    for name in ("lines", "columns"):
        output = tmp_path / f"run-{name}"
        metrics = json.loads((output / "metrics.json").read_text())
        for field in ("train_bytes", "train_tokens", "heldout_bytes", "bits_per_byte"):
            assert metrics[field] == expected[field]
        assert losses(output) == losses(tmp_path / "run-files")
        assert (output / "tokenizer.json").read_bytes() == (tmp_path / "run-files" / "tokenizer.json").read_bytes()
        streamed = load_file(output / "model.safetensors")
        assert all(torch.equal(streamed.pop(key), x) for key, x in weights.items()) and not streamed


@pytest.mark.parametrize(
    ("options", "downloads", "expected"),
    [
        pytest.param(["lines", "--dataset-config", "xx"], math.inf, "BuilderConfig 'xx' not found", marks=slow),
        pytest.param(["lines", "--text-field", "body"], math.inf, "no text in the field 'body'", marks=slow),
        (["nothing"], math.inf, "nothing' doesn't exist on the Hub"),
        (["lines", "--split", "nothing"], math.inf, "lines (split nothing): Bad split: nothing"),
        # held-out text, tokenizer and tokens are read one after the other; `datasets` downloads twice for each
        (["lines"], 0.5, "lines (split train): "),
        pytest.param(["columns"], 2.5, "columns (split train): ", marks=slow),
        (["lines"], 4.5, "lines (split train): "),
    ],
    ids=["configuration", "field", "data set", "split", "gone at once", "gone for tokenizer", "gone for tokens"],
)
def test_what_the_hub_does_not_have_is_one_line(options, downloads, expected, hub, tmp_path):
    name, *more = options
    command = train_on("--dataset", f"{USER}/{name}", *more, "--output", "run")
    if goes_away := downloads < math.inf:
        hub.dies_after = downloads * sum(map(len, hub.files(f"datasets/{USER}/{name}").values()))
    done = client(hub, tmp_path, command)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    *before, last = done.stderr.splitlines()
    assert last.startswith("hf-xlstm train: error: ") and expected in last
    assert not [line for line in before if "error: " in line]
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name or path.name == "tokens"]
    if goes_away:
        hub.dies_after = math.inf  # it is back
        assert client(hub, tmp_path, command).returncode == 0
    else:
        assert not (tmp_path / "run").exists()


def test_every_20th_until_there_are_enough():
    records = [str(i).zfill(10) for i in range(1000)]
    rest, heldout = every_20th(records, max_bytes=35)
    assert heldout == [records[i] for i in (19, 39, 59)]
    assert list(rest) == [x for x in records if x not in heldout]


# ---- tokens


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([VERSE * 5], vocab_size=300)


def test_tokens_are_the_documents(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_xlstm.commands.helpers.tokens.BATCH_BYTES", 100)
    monkeypatch.setattr("hf_xlstm.commands.helpers.corpus.PIECE", 64)
    path = write(tmp_path / "long.txt", VERSE * 5)
    documents = ["second 大きい", "", TextFile(path, 0, path.stat().st_size), VERSE]
    tokenise(documents, tokenizer, tmp_path / "tokens")
    tokens = Tokens(tmp_path / "tokens")
    assert tokens.ids.dtype == np.uint16 and tokens.nbytes == num_bytes(documents)
    assert tokenizer.decode(tokens.ids) == "".join(f"<|bos|>{document}<|eos|>" for document in documents)
    assert [tokens.ids[i] for i in tokens.starts] == [tokenizer.bos_token_id] * len(documents)
    unseen = "  Ünïcödé, 你好 🙂\tand\r\n\x00 spaces  "
    ids = tokenizer(unseen).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == unseen


@pytest.fixture
def stream(tokenizer, tmp_path):
    tokenise([VERSE, "slithy", "toves", VERSE * 2], tokenizer, tmp_path / "tokens")
    return Tokens(tmp_path / "tokens")


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_windows_ask_for_every_token_once_but_not_across_documents(stream, length):
    windows = Windows(stream, length)
    targets = torch.cat([windows[i]["labels"] for i in range(len(windows))])
    expected = torch.from_numpy(stream.ids[1 : len(targets) + 1].astype(np.int64))
    expected[[i - 1 for i in stream.starts[1:] if i <= len(targets)]] = -100
    assert torch.equal(targets, expected) and len(targets) > len(stream) - 1 - length


@torch.no_grad()
def test_documents_in_a_window_do_not_see_each_other(stream):
    model = tiny_model(vocab_size=300, layer_types=MIXED)
    item = Windows(stream, len(stream) - 1)[0]
    loss = model(**{name: x[None] for name, x in item.items()}).loss
    nats = tokens = 0
    for start, stop in zip(stream.starts, [*stream.starts[1:], len(stream)]):
        ids = torch.from_numpy(stream.ids[start:stop].astype(np.int64))[None]
        nats += model(ids, labels=ids).loss * (stop - start - 1)
        tokens += stop - start - 1
    assert relative_error(loss, nats / tokens) < 1e-5


def test_streams_go_on_from_batch_to_batch(stream):
    rows, length = 3, 8
    streams = Streams(stream, length, rows)
    batches = [[streams[i + row] for row in range(rows)] for i in range(0, len(streams), rows)]
    for row in range(rows):
        ids = torch.cat([batch[row]["input_ids"] for batch in batches])
        start = row * len(ids)
        assert torch.equal(ids, torch.from_numpy(stream.ids[start : start + len(ids)].astype(np.int64)))
        assert [bool(batch[row]["first"]) for batch in batches] == [True] + [False] * (len(batches) - 1)


# ---- budget and model


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    factors = [learning_rate_factor(i / 1000, schedule) for i in range(1001)]
    assert factors[0] == 0 and factors[-1] == pytest.approx(0, abs=1e-9) and max(factors) <= 1
    peak = factors.index(max(factors))
    assert factors[peak] > 0.99 and 40 <= peak <= 60
    assert factors[: peak + 1] == sorted(factors[: peak + 1]) and factors[peak:] == sorted(
        factors[peak:], reverse=True
    )
    assert factors[500] == pytest.approx(0.5 if schedule == "cosine" else 1)


def test_budget():
    assert Budget(60.0, 0).done(30.0, 10**6) == 0.5 and Budget(60.0, 0).done(90.0, 0) == 1
    assert Budget(None, 10).done(1e9, 0) == 0.05 and Budget(None, 10).done(0.0, 9) == 0.95


@pytest.mark.parametrize(
    ("layers", "ratio", "expected"),
    [(16, "7:1", [1, 9]), (4, "1:1", [1, 3]), (4, "1:0", []), (3, "0:1", [0, 1, 2]), (6, "1:2", [1, 2, 4, 5])],
)
def test_ratio(layers, ratio, expected):
    assert slstm_positions(layers, ratio) == expected


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_what_they_say(size):
    preset = SIZES[size]
    config = xLSTMConfig(
        vocab_size=preset.vocab_size,
        hidden_size=preset.hidden_size,
        num_hidden_layers=preset.num_layers,
        num_heads=preset.num_heads,
    )
    with torch.device("meta"):
        parameters = xLSTMForCausalLM(config).num_parameters()
    said = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
    assert abs(parameters / said - 1) < 0.1, parameters


# ---- the script


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "verse.txt", VERSE * 40)


@pytest.fixture
def script(capsys):
    """Runs `hf-xlstm train`: its exit status and its error message."""

    def run(*arguments) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_verb("train", [*map(str, arguments), *SIZE.split()], "train")
        return end.value.code or 0, capsys.readouterr().err

    return run


def in_child(function, *args) -> int:
    """The exit status of `function` in a process of its own; minus the signal if one ended it."""
    if (child := os.fork()) == 0:
        try:
            torch.set_num_threads(1)  # threads do not survive a fork
            function(*args)
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def losses(output: Path) -> list[float]:
    return [bits for _, bits in json.loads((output / "metrics.json").read_text())["train_curve"]]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@needs_fork
@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGKILL, []),
        (signal.SIGTERM, ["--stateful"]),
        pytest.param(signal.SIGKILL, ["--stateful"], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, [], marks=pytest.mark.slow),
    ],
    ids=lambda x: getattr(x, "name", "".join(x) if isinstance(x, list) else None) or "windows",
)
def test_ended_run_goes_on_to_the_identical_losses(number, options, data, script, tmp_path, monkeypatch):
    command_line = ["--data", data, "--steps", "8", *options, "--checkpoint-minutes", "1e-9"]
    command_line += ["--trainer", "logging_steps=1"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert script("--output", tmp_path / "whole", *command_line)[0] == 0

    step, count = RunTrainer.training_step, [0]

    def cut(self, *args, **kwargs):
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    output = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", cut)
        status = in_child(script, "--output", output, *command_line)
    # pytest.raises takes the child's SystemExit, so that an interrupted run ends with 0 here; what it saved tells
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    saved = max(int(p.parent.name.rpartition("-")[2]) for p in output.glob("checkpoints/*/progress.json"))
    assert saved == (4 if number == signal.SIGKILL else 5)
    assert not (output / "config.json").exists()
    half = output / "checkpoints" / "checkpoint-7"  # what a killed process may leave
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert script("--output", output, *command_line)[0] == 0
    torch.set_num_threads(threads)
    assert len(losses(output)) == 8 and losses(output) == losses(tmp_path / "whole")
    weights, expected = (load_file(folder / "model.safetensors") for folder in (output, tmp_path / "whole"))
    assert all(torch.equal(weights.pop(name), x) for name, x in expected.items()) and not weights
    assert not (output / "checkpoints").exists()


def test_a_wrong_call_is_not_in_the_way_of_the_next(data, script, tmp_path):
    wrong, options = tmp_path / "wrong.txt", ["--output", tmp_path / "run", "--steps", "1"]
    wrong.write_bytes(b"\xff\xfe and so on " * 99)
    status, message = script("--data", wrong, *options)
    assert status == 2 and "not UTF-8" in message
    assert script("--data", data, *options)[0] == 0


@needs_fork
def test_one_directory_one_run(data, script, tmp_path, monkeypatch):
    output = tmp_path / "run"
    base = ["--data", data, "--output", output]
    output.mkdir()
    mine = [output / name for name in ("notes.md", "book.txt", "records.json", "adapter.safetensors", "load.py")]
    for path in mine:
        path.write_text("mine")
    assert script(*base, "--steps", "2")[0] == 0
    complete = contents(output)
    assert complete["notes.md"] == b"mine"
    AutoTokenizer.from_pretrained(output)
    assert AutoModelForCausalLM.from_pretrained(output).config.layer_types == MIXED
    assert script(*base, "--steps", "2") == (0, "")  # nothing to do
    status, message = script(*base, "--steps", "3")
    assert status == 2 and "steps 2 instead of 3" in message and "--overwrite" in message
    assert contents(output) == complete

    # killed while the new results are written, and on a full disk: the old ones are whole
    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_report", die)
        assert in_child(script, *base, "--steps", "3", "--overwrite") == -signal.SIGKILL
    left = contents(output)
    assert {name: x for name, x in left.items() if not name.startswith("checkpoints/")} == complete
    assert [p.name for p in tmp_path.glob("run.partial-*")] != []
    assert script(*base, "--steps", "3", "--overwrite")[0] == 0
    assert json.loads((output / "metrics.json").read_text())["steps"] == 3
    assert all(path.read_text() == "mine" for path in mine) and not (output / "checkpoints").exists()
    assert [p.name for p in tmp_path.glob("run.*")] == []


@needs_fork
def test_full_disk(data, script, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    output = tmp_path / "run"

    def on_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        status, message = script("--data", data, "--output", output, "--steps", "50")
        assert status == 2 and len(message.splitlines()[-1]) > 10 and "Traceback" not in message
        os._exit(7)

    assert in_child(on_a_full_disk) == 7
    assert not (output / "config.json").exists() and train.last_checkpoint(output / "checkpoints") is None


def test_room_is_looked_at_before(data, script, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "BYTES_PER_PARAMETER", 10**15)
    status, message = script("--data", data, "--output", tmp_path / "run", "--steps", "2")
    assert status == 2 and "and the disk has" in message


@needs_fork
def test_second_process_is_refused(data, script, tmp_path, monkeypatch):
    output = tmp_path / "run"
    arguments = ["--data", data, "--output", output, "--steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "start_work", lambda *args: os._exit(5))
        assert in_child(script, *arguments) == 5  # the lock goes with its process
    with train.locked(output / "checkpoints") as mine:
        assert mine
        status, message = script(*arguments)
    assert status == 2 and "another process is training there" in message


BAD = {
    "missing": (["--data", "nothing.txt"], "nothing.txt does not exist"),
    "empty": (["--data", "empty.txt"], "empty.txt is empty"),
    "not UTF-8": (["--data", "latin.txt"], "latin.txt is not UTF-8"),
    "directory": (["--data", "."], "is a directory"),
    "too short": (["--data", "short.txt", "--heldout", "ok.txt"], "fewer than one window of --sequence-length"),
    "no time": (["--data", "ok.txt", "--minutes", "0"], "--minutes: must be above 0"),
    "two lengths": (["--data", "ok.txt", "--minutes", "1", "--steps", "1"], "not allowed with argument"),
    "no steps": (["--data", "ok.txt", "--steps", "0"], "--steps: must be a whole number above 0"),
    "no learning": (["--data", "ok.txt", "--learning-rate", "nan"], "--learning-rate: must be above 0"),
    "layer": (["--data", "ok.txt", "--slstm-at", "2"], "--slstm-at names layers from 0 to 1"),
    "ratio": (["--data", "ok.txt", "--ratio", "7"], "a ratio is written like 7:1"),
    "heldout alone": (["--heldout", "ok.txt"], "--heldout needs --data"),
    "not JSON": (["--data", "latin.jsonl"], "latin.jsonl, line 1, is not JSON"),
    "no model": (["--data", "ok.txt", "--model", "."], "--model excludes"),
    "trainer field": (["--data", "ok.txt", "--trainer", "nonsense=1"], "nonsense"),
    "trainer form": (["--data", "ok.txt", "--trainer", "nonsense"], "must be NAME=VALUE"),
    "shards": (["--data", "ok.txt", "--trainer", "fsdp=true"], "shared by several processes that have a GPU each"),
    "no split": (["--data", "ok.txt", "--dataset", "x"], "exclude each other"),
    "reporter": (["--data", "ok.txt", "--report-to", "nobody"], "nobody"),
    "no text": (["--data", "blank.jsonl", "--heldout", "ok.txt"], "there is no text to train on"),
    "epochs": (["--data", "ok.txt", "--trainer", "num_train_epochs=2"], "give --steps or --tokens instead"),
    "warm-up": (["--data", "ok.txt", "--trainer", "warmup_steps=2"], "warmup_steps needs lr_scheduler_type"),
    "clock": (["--data", "ok.txt", "--minutes", "1", "--trainer", "lr_scheduler_type=linear"], "needs --steps"),
    "schedule": (["--data", "ok.txt", "--trainer", "lr_scheduler_type=up"], "up is not a valid SchedulerType"),
    "schedule's end": (["--data", "ok.txt", "--trainer", "lr_scheduler_type=cosine_with_min_lr"], "min_lr"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_work_starts(case, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ok.txt", VERSE * 40)
    write(tmp_path / "short.txt", "short")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "blank.jsonl", '{"text": ""}\n' * 40)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n' * 50)
    arguments, expected = BAD[case]
    length = [] if {"--minutes", "--steps"} & set(arguments) else ["--steps", "1"]
    status, message = script("--output", tmp_path / "run", *arguments, *length)
    assert status == 2 and "Traceback" not in message
    assert expected in message.splitlines()[-1]
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_reporter_that_is_missing_is_named_first(name, data, script, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.integrations.integration_utils, f"is_{name}_available", lambda: False)
    monkeypatch.setattr(train, "read_corpus", None)
    status, message = script("--data", data, "--output", tmp_path / "run", "--steps", "1", "--report-to", name)
    assert status == 2 and f"pip install {name}" in message and len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_reporter_that_refuses_is_one_line(data, script, tmp_path, monkeypatch):
    class Refusal(Exception):
        __module__ = "wandb.errors"

    def refuse(*args, **kwargs):
        raise Refusal("No API key")

    callback = type("Callback", (TrainerCallback,), {"on_train_begin": refuse})
    monkeypatch.setitem(transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK, "wandb", callback)
    command = ["--data", data, "--output", tmp_path / "run", "--steps", "1", "--report-to", "wandb"]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=refuse))
    status, message = script(*command)
    assert status == 2 and message.splitlines() == ["train: error: --report-to: No API key"]
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=lambda: True))
    status, message = script(*command)
    assert status == 2 and message.splitlines()[-1] == "train: error: --report-to wandb: No API key"


def test_reporters_get_the_curves(data, script, tmp_path, monkeypatch):
    logged = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            logged.append({"step": state.global_step, **logs})

    monkeypatch.setitem(transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK, "mine", Reporter)
    output = tmp_path / "run"
    options = ["--steps", "4", "--evaluations", "4", "--trainer", "logging_steps=1", "--report-to", "mine"]
    assert script("--data", data, "--output", output, *options)[0] == 0
    metrics = json.loads((output / "metrics.json").read_text())
    heldout = [(logs["step"], logs["eval_bits_per_byte"]) for logs in logged if "eval_bits_per_byte" in logs]
    assert heldout == list(enumerate(bits for _, bits in metrics["heldout_curve"])) and len(heldout) == 5
    steps = [(logs["step"], logs["learning_rate"]) for logs in logged if "loss" in logs]
    assert [step for step, _ in steps] == [1, 2, 3, 4] and all(rate >= 0 for _, rate in steps)


def test_tensorboard_shows_the_curves(data, script, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="shows the curves of --report-to tensorboard")
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    output = tmp_path / "run"
    options = ["--steps", "4", "--trainer", "logging_steps=1", "--report-to", "tensorboard"]
    assert script("--data", data, "--output", output, *options)[0] == 0
    shown = events.EventAccumulator(str(output / "tensorboard")).Reload()
    metrics = json.loads((output / "metrics.json").read_text())
    curve = [event.value for event in shown.Scalars("eval/bits_per_byte")]
    assert curve == pytest.approx([bits for _, bits in metrics["heldout_curve"]])
    for name in ("train/loss", "train/learning_rate"):
        assert [event.step for event in shown.Scalars(name)] == [1, 2, 3, 4]


def test_published_recipe_is_set_by_fields_of_the_trainer(data, script, tmp_path, monkeypatch):
    trainers = []

    class Seen(RunTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(train, "RunTrainer", Seen)
    fields = ["adam_beta1=0.99", "adam_beta2=0.95", "adam_epsilon=1e-5", "max_grad_norm=0.5", "warmup_steps=2"]
    fields += ["lr_scheduler_type=cosine_with_min_lr", 'lr_scheduler_kwargs={"min_lr_rate": 0.1}', "logging_steps=1"]
    options = ["--steps", "4", "--learning-rate", "3e-3", "--trainer", *fields]
    assert script("--data", data, "--output", tmp_path / "run", *options)[0] == 0
    (trainer,) = trainers
    for group in trainer.optimizer.optimizer.param_groups:
        assert group["betas"] == (0.99, 0.95) and group["eps"] == 1e-5
    assert trainer.args.max_grad_norm == 0.5
    (factor,) = set(trainer.lr_scheduler.lr_lambdas)
    assert [factor(step) for step in (0, 1, 2, 4)] == pytest.approx([0, 0.5, 1, 0.1])


def test_nothing_that_is_nan_is_saved(data, script, tmp_path, monkeypatch):
    step = RunTrainer.training_step
    monkeypatch.setattr(RunTrainer, "training_step", lambda *args, **kwargs: step(*args, **kwargs) * math.nan)
    status, message = script("--data", data, "--output", tmp_path / "run", "--steps", "3")
    assert status == 2 and "the loss is nan at step 1" in message
    assert not list(tmp_path.rglob("*.safetensors"))


def test_learns_and_stops_in_time(data, script, tmp_path, monkeypatch):
    start, reads = time.monotonic(), [0]

    def clock():
        reads[0] += 1
        return start + reads[0]

    monkeypatch.setattr(train.Run.__init__, "__defaults__", (*train.Run.__init__.__defaults__[:-1], clock))
    status, _ = script("--data", data, "--output", tmp_path / "run", "--minutes", "1")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert status == 0 and 30 <= metrics["steps"] <= 60  # the clock goes on by a second whenever it is read
    assert metrics["training_seconds"] == 60
    curve = [bits for _, bits in metrics["heldout_curve"]]
    assert len(curve) == 11 and curve[-1] < 0.8 * curve[0]
    assert metrics["bits_per_byte"] == pytest.approx(curve[-1])


def test_goes_on_with_a_model(data, script, tmp_path, monkeypatch):
    assert script("--data", data, "--output", tmp_path / "first", "--steps", "20")[0] == 0
    first = json.loads((tmp_path / "first" / "metrics.json").read_text())
    monkeypatch.setattr(sys.modules[__name__], "SIZE", "--sequence-length 32 --batch-size 4 --no-bf16 --schedule wsd")
    model = ["--model", tmp_path / "first", "--output", tmp_path / "second"]
    assert script("--data", data, *model, "--tokens", "1e3")[0] == 0
    second = json.loads((tmp_path / "second" / "metrics.json").read_text())
    assert second["steps"] == 8  # of 128 tokens
    assert second["heldout_curve"][0][1] == pytest.approx(first["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ""),
        ({"bits_per_byte": 2.6}, "warning: 2.60 bits per byte, worse than lzma (2.50): train for longer"),
        ({"steps": 4}, "warning: 2.20 bits per byte: 4 steps in 180 s are few: the machine is busy"),
        ({"steps": 4, "bits_per_byte": 3.0}, "worse than lzma (2.50): 4 steps in 180 s are few"),
        ({"steps": 4, "arguments": {"minutes": None}}, ""),
    ],
    ids=["well", "worse", "few steps", "both", "steps as told"],
)
def test_a_disappointing_result_is_explained(fields, expected, capsys):
    metrics = {"bits_per_byte": 2.2, "steps": 700, "training_seconds": 180.0, "yardsticks": {"lzma": 2.5}}
    train.warn(metrics | {"arguments": {"minutes": 3.0}} | fields)
    warning = capsys.readouterr().err
    assert expected in warning and bool(expected) == bool(warning)


@pytest.mark.parametrize(("step_seconds", "warns"), [(1.0, False), (10.0, True)])
def test_few_steps_are_foretold_once(step_seconds, warns, capsys):
    now = itertools.count(0.0, step_seconds)
    run = Run(Budget(180.0, 0), evaluate=lambda model: 2.0, clock=lambda: next(now))
    state, control = TrainerState(), TrainerControl()
    try:
        run.on_train_begin(None, state, control)
        for state.global_step in range(1, 1 + int(180 / step_seconds)):
            run.on_step_end(None, state, control, model=None)
        assert control.should_training_stop
    finally:
        run.on_train_end(None, state, control)
    assert capsys.readouterr().err.count("warning: 2 steps in 20 s are few: the machine is busy") == warns


# ---- docs/training.md


def documented() -> list[list[str]]:
    """The commands of the page, without `torchrun` and what stands before the options."""
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    commands = [shlex.split(block.replace("\\\n", " ")) for block in blocks]
    return [command[command.index("train") + 1 :] for command in commands]


@pytest.mark.slow
def test_documented_commands_at_small_size(tmp_path, monkeypatch):
    """Every command as it stands, but for the sizes, the number of steps and the data set of the Hub."""
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "notes.txt", "law.txt"):
        write(tmp_path / name, VERSE * 40)
    for name, field in {"pages.jsonl": "body", "crawl.jsonl": "text"}.items():
        write(tmp_path / name, "\n".join(json.dumps({field: VERSE}) for _ in range(40)))
    write(tmp_path / "law.txt", VERSE * 40)
    for arguments in documented():
        args = parse(arguments, "train")
        if args.size:
            args.size, args.hidden_size, args.num_layers, args.num_heads = None, 32, 2, 2
        args.minutes, args.tokens, args.steps = None, None, 2
        args.sequence_length, args.batch_size, args.bf16, args.report_to = 16, 2, False, []
        args.vocab_size = None if args.tokenizer or args.model else 280
        if args.dataset:
            args.dataset, args.data = None, [Path("book.txt")]
        args.trainer.pop("fsdp", None)  # for several processes
        assert train.run(args) == 0, arguments
        assert (args.output / "model.safetensors").exists()


def test_documented_options_are_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "notes.txt", "law.txt", "pages.jsonl", "crawl.jsonl"):
        write(tmp_path / name, "x")
    commands = documented()
    assert len(commands) >= 6
    for arguments in commands:
        assert parse(arguments, "train").output.parts[0] == "runs"


@pytest.mark.slow
def test_two_processes_train_and_go_on(data, tmp_path):
    """DDP: both agree on when to save and to stop, and the same command goes on to the identical losses."""
    script = Path(__file__).parents[1] / "scripts" / "train.py"
    command_line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    command_line += [script, "--data", data, "--steps", "6", "--checkpoint-minutes", "1e-9", *SIZE.split()]
    command_line += ["--trainer", "logging_steps=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command_line, "--output", whole], check=True, env=environment)
    with subprocess.Popen([*command_line, "--output", cut], env=environment) as process:
        while not list(cut.glob("checkpoints/checkpoint-3/progress.json")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    assert process.returncode != 0 and not (cut / "config.json").exists()
    subprocess.run([*command_line, "--output", cut], check=True, env=environment)
    assert losses(cut) == losses(whole) and len(losses(cut)) == 6
    # what the first process is refused, the second one does not begin either
    complete = contents(cut)
    again = subprocess.run(
        [*command_line, "--seed", "1", "--output", cut], env=environment, capture_output=True, text=True
    )
    assert again.returncode != 0 and again.stderr.count("has another run (seed 0 instead of 1)") == 1
    assert contents(cut) == complete and not (cut / "checkpoints").exists()
