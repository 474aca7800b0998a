"""scripts/serve.py: an OpenAI-compatible server on localhost answers with the model's own words."""

import asyncio
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

from hf_xlstm.commands.helpers.serving import Guard


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


def status(address: str, body: object = None, key: str | None = None) -> int:
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


HOSTILE = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b"null",
    b"[]",
    b'{"prompt": "w1", "temperature": NaN}',
    b'{"prompt": "\\ud800"}',
    {},
    {"prompt": 3},
    {"prompt": ["w1"]},
    {"prompt": None},
    *({"prompt": "w1", "max_tokens": x} for x in ("x", 0, -1, 1.5, True, [], 10**30)),
    *({"prompt": "w1", "temperature": x} for x in ("hot", -1, 1e400, {}, True)),
    *({"prompt": "w1", "top_p": x} for x in (0, -1, 2, "x")),
    *({"prompt": "w1", "stop": x} for x in ("", [], 3, [3], [""], ["x"] * 100)),
    *({"prompt": "w1", "seed": x} for x in (-1, "x", 0.5, 2**70)),
    *({"prompt": "w1", "frequency_penalty": x} for x in (-1, "x", 9)),
    *({"prompt": "w1", "stream": x} for x in ("yes", 1)),
    *({"prompt": "w1", "generation_config": x} for x in ({}, "x", "[]", 3)),
    *({"prompt": "w1", "model": x} for x in (3, [], "another/model", "/etc")),
    *(
        {"prompt": "w1", name: x}
        for name, x in {"n": 2, "best_of": 3, "echo": True, "logprobs": 5, "nonsense": 1}.items()
    ),
]
HOSTILE_CHATS = [
    {},
    *({"messages": x} for x in ([], "hello", 3, {}, [3], [{}], [{"role": "user"}], [{"content": "w1"}])),
    *({"messages": [{"role": "user", "content": x}]} for x in (3, {}, [3], [{"type": "image_url"}], ["\ud800"])),
    {"messages": [{"role": 3, "content": "w1"}]},
    {"messages": [{"role": "user", "content": "w1"}], "chat_template_kwargs": 3},
    {"messages": [{"role": "user", "content": "w1"}], "tools": "x"},
]


@pytest.mark.slow
def test_wrong_requests_get_4xx(server, model_directory):
    for path, bodies in {"completions": HOSTILE, "chat/completions": HOSTILE_CHATS}.items():
        found = {repr(body)[:80]: status(f"{server}/v1/{path}", body) for body in bodies}
        assert {body: code for body, code in found.items() if not 400 <= code < 500} == {}
    assert status(f"{server}/v1/completions", b" " * (16 * 2**20 + 1)) == 413
    assert status(f"{server}/v1/completions", {"prompt": "w1", "max_tokens": 1}) == 200  # it still serves


@pytest.mark.slow
def test_only_the_model_it_was_started_for(server, model_directory):
    other = {"model": str(model_directory.parent)}
    assert status(f"{server}/load_model", other) == 403 and status(f"{server}/reset", {}) == 403
    assert status(f"{server}/v1/audio/transcriptions", {}) == 404
    with urllib.request.urlopen(f"{server}/v1/models", timeout=60) as reply:
        assert [entry["id"] for entry in json.load(reply)["data"]] == [str(model_directory)]
    assert status(f"{server}/v1/completions", {"prompt": "w1", "max_tokens": 1}) == 200


def call(guard: Guard, path: str, method: str = "GET", headers=(), body: bytes = b"") -> int:
    """The status that a guard in front of an application that always says 204 answers with."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": list(headers)}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"]


async def application(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 204, "headers": []})


def test_guard():
    guard = Guard(application, model="mine", api_key="secret")
    key = [(b"authorization", b"Bearer secret")]
    assert call(guard, "/v1/models") == call(guard, "/v1/models", headers=[(b"authorization", b"Bearer x")]) == 401
    assert call(guard, "/health") == 204 and call(guard, "/v1/models", headers=key) == 200
    assert call(guard, "/reset", "POST", key) == call(guard, "/load_model", "POST", key, b"{}") == 403
    assert call(guard, "/v1/completions", "POST", key, b'{"prompt": "x"}') == 204
    assert call(guard, "/v1/completions", "POST", key, b'{"prompt": 3}') == 400
    everything = Guard(application, model=None)
    assert call(everything, "/reset", "POST") == call(everything, "/load_model", "POST", body=b"{}") == 204


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
