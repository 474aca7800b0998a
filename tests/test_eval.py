"""`hf-xlstm evaluate`: bits per byte and tasks of the lm-evaluation-harness, against sums done by hand."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import MIXED, tiny_model
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_xlstm.commands.helpers.bits_per_byte import bits_per_byte
from hf_xlstm.commands.helpers.report import results_table
from hf_xlstm.commands.helpers.tokens import train_tokenizer


EVAL = Path(__file__).parents[1] / "scripts" / "eval.py"
TEXT = "My fellow Americans, tonight the state of our Union is strong: größer, 大きい.\n"
QUESTIONS = [
    {"text": "My fellow", "choices": [" Americans", " Union", " tonight"], "label": 0},
    {"text": "the state of our", "choices": [" Union", " strong"], "label": 1},
    {"text": "tonight", "choices": [" the state", " is"], "label": 1},
    {"text": "Mr. Speaker", "choices": [", members", " of"], "label": 0},
]


@pytest.fixture(scope="module")
def byte_tokenizer():
    return train_tokenizer([TEXT], vocab_size=259)  # three special tokens and the bytes, no merges


@pytest.fixture
def directory(tmp_path, byte_tokenizer):
    folder = tmp_path / "model"
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    tiny_model(vocab_size=259, layer_types=MIXED, **ids).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(byte_tokenizer):
    model = tiny_model(vocab_size=259)
    torch.nn.init.zeros_(model.lm_head.weight)
    texts = [TEXT, "a", TEXT * 3]
    size = sum(len(text.encode()) for text in texts)
    tokens = size + len(texts)  # every byte, and the end of every text
    assert bits_per_byte(model, byte_tokenizer, texts) == pytest.approx(tokens * math.log2(259) / size, rel=1e-6)


class Bigram(torch.nn.Module):
    """Gives the right next token, by the last one, probability 1/2."""

    device = torch.device("cpu")

    def __init__(self, sequence: list[int], vocab_size: int):
        super().__init__()
        self.logits = torch.full((vocab_size, vocab_size), -math.inf)
        self.logits[:, -1] = 0  # the other half, on a token that does not occur
        for token, following in zip(sequence, sequence[1:]):
            self.logits[token, following] = 0

    def forward(self, ids, **_):
        return CausalLMOutputWithPast(logits=self.logits[ids])


@pytest.mark.parametrize("window", [1, 2, 512])
def test_one_bit_for_each_byte_and_one_for_the_end(byte_tokenizer, window):
    sequence = [0, *byte_tokenizer("abc", add_special_tokens=False).input_ids, 1]
    model = Bigram(sequence, vocab_size=259)
    assert bits_per_byte(model, byte_tokenizer, ["abc"], window) == pytest.approx((3 + 1) / 3, rel=1e-6)


def test_texts(directory, byte_tokenizer, tmp_path, monkeypatch):
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for count, file in enumerate(files, start=1):
        file.write_text(TEXT * count, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["eval.py", str(directory), "--texts", *map(str, files)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EVAL), run_name="__main__")
    assert not end.value.code
    results = json.loads((directory / "evaluation.json").read_text())
    model = tiny_model(vocab_size=259, layer_types=MIXED)
    for count, (file, result) in enumerate(zip(files, results, strict=True), start=1):
        text = TEXT * count
        ids = torch.tensor([[0, *byte_tokenizer(text, add_special_tokens=False).input_ids, 1]])
        log_probabilities = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
        size = len(text.encode())
        assert (result["task"], result["metric"], result["bytes"]) == (file.name, "bits_per_byte", size)
        assert result["value"] == pytest.approx(-log_probabilities.sum().item() / math.log(2) / size, rel=1e-5)
    assert f"| two.txt | bits_per_byte | {results[1]['value']:.4f} |" in results_table(results)


def write_task(folder: Path, name: str, rows: list[dict], **fields) -> None:
    """A task on local data, in the harness's format, with a function that needs Hugging Face's `evaluate`."""
    (folder / "helper.py").write_text("from evaluate import load\n\n\ndef same(documents):\n    return documents\n")
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    text = json.dumps(task | {"test_split": "test"} | fields).removesuffix("}")  # JSON is YAML
    (folder / f"{name}.yaml").write_text(f"{text}, process_docs: !function helper.same}}", encoding="utf-8")


@pytest.mark.slow
@torch.no_grad()
def test_tasks_of_the_harness(directory, byte_tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the packages of '.[eval]'")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    model = tiny_model(vocab_size=259, layer_types=MIXED)

    def encode(text: str) -> list[int]:
        return byte_tokenizer(text, add_special_tokens=False).input_ids

    def log_likelihood(context: str, continuation: str) -> float:
        ids = torch.tensor([[0, *encode(context), *encode(continuation)]])
        logs = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
        return logs[:, -len(encode(continuation)) :].sum().item()

    def continuation(text: str, count: int) -> str:
        ids = torch.tensor([[0, *encode(text)]])
        output = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
        return byte_tokenizer.decode(output[0, ids.shape[1] :])

    scores = [[log_likelihood(q["text"], choice) for choice in q["choices"]] for q in QUESTIONS]
    accuracy = sum(max(s) == s[q["label"]] for s, q in zip(scores, QUESTIONS)) / len(QUESTIONS)
    assert 0 < accuracy < 1
    answers = [{"text": q["text"], "answer": continuation(q["text"], 4)} for q in QUESTIONS]
    answers[0]["answer"] = "something else"
    size = len(TEXT.encode())  # the harness puts a BOS before what the tokenizer gives, which begins with BOS already

    write_task(
        tmp_path,
        "choose",
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="{{text}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{label}}",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    write_task(
        tmp_path,
        "read",
        [{"text": TEXT}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    write_task(
        tmp_path,
        "write",
        answers,
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n\n\n"], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    output = tmp_path / "results.json"
    options = [
        "--tasks",
        "choose",
        "read",
        "write",
        "--include-path",
        tmp_path,
        "--batch-size",
        "2",
        "--output",
        output,
    ]
    subprocess.run([sys.executable, EVAL, directory, *options], check=True)
    results = json.loads(output.read_text())
    values = {(result["task"], result["metric"]): result["value"] for result in results}
    expected = {
        ("choose", "acc"): accuracy,
        ("read", "bits_per_byte"): -log_likelihood("", "<|bos|>" + TEXT) / math.log(2) / size,
        ("write", "exact_match"): 0.75,
    }
    assert values == pytest.approx(expected, rel=1e-5)
    assert all(result["shots"] == 0 for result in results)
