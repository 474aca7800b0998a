"""scripts/serve.py: an OpenAI-compatible server on localhost answers with the model's own words."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from common import MIXED, VOCAB_SIZE, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


SERVE = Path(__file__).parents[1] / "scripts" / "serve.py"
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    words = {"<unk>": 0} | {f"w{index}": index for index in range(1, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<unk>", chat_template=TEMPLATE)
    directory = tmp_path_factory.mktemp("model")
    # only ours can represent it: the server must not take Transformers' own class
    tiny_model(layer_types=MIXED).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def server(model_directory):
    pytest.importorskip("fastapi", reason="the server needs fastapi")
    pytest.importorskip("uvicorn", reason="the server needs uvicorn")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SERVE, model_directory, "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://localhost:{port}"
    try:
        for _ in range(480):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, TimeoutError):
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.25)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def post(address: str, body: dict):
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def answer(model_directory: Path, prompt: str, chat: bool) -> str:
    """What the model says to it, without a server."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    if chat:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    ids = AutoModelForCausalLM.from_pretrained(model_directory).generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_streamed_chat(server, model_directory):
    body = {"model": str(model_directory), "temperature": 0, "max_tokens": 12, "stream": True}
    text, chunks = "", 0
    with post(
        f"{server}/v1/chat/completions", body | {"messages": [{"role": "user", "content": "w3 w7 w12"}]}
    ) as lines:
        for line in lines:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                    text += choice["delta"].get("content") or ""
                    chunks += 1
    assert chunks > 2
    assert text == answer(model_directory, "w3 w7 w12", chat=True)


@pytest.mark.slow
def test_completion(server, model_directory):
    body = {"model": str(model_directory), "temperature": 0, "max_tokens": 12, "prompt": "w8 w2 w40"}
    with post(f"{server}/v1/completions", body) as reply:
        text = json.load(reply)["choices"][0]["text"]
    assert text == answer(model_directory, "w8 w2 w40", chat=False)
