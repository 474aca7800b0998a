"""OpenAI's API over HTTP, from a server in a process of its own."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine import CHARACTERS, saved_model, saved_tokenizer


TEXTS = [
    "The state",
    "A",
    "An xLSTM remembers a text in a state of constant size " * 4,
    "make test",
    "cache it",
    "x y",
]
STARTUP_SECONDS = 600


class Server:
    def __init__(self, directory: str, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = "--dtype float32 --enforce-eager --max-model-len 512 --max-num-seqs 4 --max-num-batched-tokens 64"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--kv-cache-memory-bytes", str(2**23)]
        self.process = subprocess.Popen(
            command + options.split(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + STARTUP_SECONDS
        while not self.is_up():
            assert self.process.poll() is None, "the server stopped"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(1)

    def is_up(self) -> bool:
        with contextlib.suppress(OSError):
            return self.request("GET", "/health")[0] == 200
        return False

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        with contextlib.closing(self.connection()) as connection:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()

    def post(self, path: str, **fields) -> tuple[int, dict]:
        status, body = self.request("POST", path, json.dumps(fields).encode())
        return status, json.loads(body)

    def complete(self, text: str) -> str:
        status, reply = self.post("/v1/completions", **options(text))
        assert status == 200, reply
        return reply["choices"][0]["text"]

    def stream(self, text: str) -> tuple[str, int]:
        """The text, and in how many pieces it came."""
        pieces = []
        with contextlib.closing(self.connection()) as connection:
            body = json.dumps(options(text) | {"stream": True})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
        return "".join(pieces), len(pieces)

    def disconnect(self, text: str) -> None:
        """Asks for a long reply and leaves after its first bytes."""
        with contextlib.closing(self.connection()) as connection:
            body = json.dumps(options(text) | {"stream": True, "max_tokens": 400})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            assert connection.getresponse().read(10)

    def running(self) -> float:
        """Requests in the engine, from its metrics."""
        lines = self.request("GET", "/metrics")[1].decode().splitlines()
        values = [x for x in lines if x.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))]
        return sum(float(x.split()[-1]) for x in values)

    def kill(self) -> None:
        """All its processes, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def options(text: str) -> dict:
    return {"prompt": text, "max_tokens": 24, "temperature": 0, "ignore_eos": True}


@contextlib.contextmanager
def serving(directory: str, log_path) -> Iterator[Server]:
    with open(log_path, "a") as log:
        server = Server(directory, log)
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    path, model = saved_model(directory, "conv", vocab_size=len(CHARACTERS))
    tokenizer = saved_tokenizer(directory)

    def reply(text: str) -> str:
        inputs = tokenizer(text, return_tensors="pt").input_ids
        output = model.generate(inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        return tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)

    with torch.no_grad():
        return path, {text: reply(text) for text in TEXTS}


def test_clients_come_go_and_fail_and_the_server_is_killed(checkpoint, tmp_path):
    directory, replies = checkpoint
    with serving(directory, tmp_path / "log") as server:
        # several clients, whole replies and streams
        with ThreadPoolExecutor(len(TEXTS)) as pool:
            whole, streams = pool.map(server.complete, TEXTS), pool.map(server.stream, TEXTS)
            assert dict(zip(TEXTS, whole)) == replies
            for text, (streamed, pieces) in zip(TEXTS, streams):
                assert streamed == replies[text]
                assert pieces > 1

        # requests that make no sense
        path = "/v1/completions"
        assert server.request("POST", path, b"{ no JSON")[0] in (400, 422)
        for fields in ({"prompt": 3.5}, {"max_tokens": -1}, {"temperature": "hot"}, {"model": "nobody"}, {"n": 0}):
            status, body = server.post(path, **(options("A") | fields))
            assert 400 <= status < 500, (fields, body)
        assert server.post(path, **(options("A" * 600)))[0] == 400  # longer than the model's length
        assert server.request("GET", "/v1/nothing")[0] == 404

        # clients that leave in the middle, beside one that stays
        with ThreadPoolExecutor(4) as pool:
            gone = [pool.submit(server.disconnect, text) for text in TEXTS[:3]]
            assert pool.submit(server.complete, TEXTS[3]).result() == replies[TEXTS[3]]
            for request in gone:
                request.result()
        for _ in range(100):
            if server.running() == 0:
                break
            time.sleep(0.2)
        assert server.running() == 0

        status, chat = server.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=5, temperature=0
        )
        assert status == 200 and chat["choices"][0]["message"]["content"]
        server.kill()
        assert not server.is_up()
    with serving(directory, tmp_path / "log") as server:
        assert {text: server.complete(text) for text in TEXTS} == replies
