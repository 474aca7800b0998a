"""What stands in front of `transformers serve`: a server that is given to others answers wrong requests with 4xx and
serves what it was started for, nothing else."""

import hmac
import json
import logging
import math
from collections.abc import Awaitable, Callable
from pathlib import PurePath
from typing import Any


MAX_BODY = 16 * 2**20  # bytes
MAX_NEW_TOKENS = 2**20
GENERATE = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
OPEN = ("/health",)  # needs no key
CONTROL = ("/load_model", "/reset")  # load another model, throw out the one that is served

logger = logging.getLogger(__name__)


class Refusal(Exception):
    """An answer with a status of 4xx."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Guard:
    """An ASGI application in front of another one.

    Args:
        model: the one that is served; None lets a request load any model and control the server.
        api_key: what requests must have as `Authorization: Bearer KEY`, if anything.
    """

    def __init__(self, app: Callable, model: str | None, api_key: str | None = None):
        self.app, self.model, self.api_key = app, model, api_key

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self.check_key(scope)
            path = scope["path"]
            if self.model is not None:
                if path in CONTROL:
                    raise Refusal(403, f"{path} is switched off: this server serves {PurePath(self.model).name}")
                if path == "/v1/models" and scope["method"] == "GET":
                    entry = {"id": self.model, "object": "model", "created": 0, "owned_by": "local"}
                    await answer(send, 200, {"object": "list", "data": [entry]})
                    return
                if path not in (*GENERATE, *OPEN, "/v1/models"):
                    raise Refusal(404, f"there is no {path}")
            if scope["method"] == "POST":
                body = await read_body(receive)
                if path in GENERATE:
                    check_request(body, path)
                receive = replay(body, receive)
        except Refusal as refusal:
            await answer(send, refusal.status, {"error": {"message": str(refusal), "type": "invalid_request_error"}})
            return
        await self.app(scope, receive, send)

    def check_key(self, scope: dict) -> None:
        if self.api_key is None or scope["path"] in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
            raise Refusal(401, "the API key is missing or wrong")


async def read_body(receive: Callable[[], Awaitable[dict]]) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            raise Refusal(413, f"the request has more than {MAX_BODY:,} bytes")
    return body


def replay(body: bytes, receive: Callable) -> Callable:
    """`receive` for an application that is to see what has been read."""
    read = False

    async def again() -> dict:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def answer(send: Callable, status: int, content: dict) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def is_text(value: object) -> bool:
    """A string that has a UTF-8 form: JSON can also write halves of characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_whole(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(low: float, high: float) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and low <= value <= high
        )

    return check


def is_stop(value: object) -> bool:
    texts = value if isinstance(value, list) else [value]
    return 0 < len(texts) <= 16 and all(is_text(text) and text for text in texts)


def is_message(value: object) -> bool:
    if not isinstance(value, dict) or not is_text(value.get("role")):
        return False
    content = value.get("content")
    if isinstance(content, list):
        return all(
            isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text")) for part in content
        )
    return is_text(content) or (content is None and isinstance(value.get("tool_calls"), list))


def is_json_object(value: object) -> bool:
    try:
        return isinstance(value, str) and isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


TOKENS = (is_whole(1, MAX_NEW_TOKENS), f"a whole number from 1 to {MAX_NEW_TOKENS:,}")
FIELDS = {
    "model": (is_text, "a string"),
    "prompt": (is_text, "a string"),
    "suffix": (is_text, "a string"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "max_tokens": TOKENS,
    "max_completion_tokens": TOKENS,
    "max_output_tokens": TOKENS,
    "temperature": (is_number(0, 100), "a number from 0 to 100"),
    "top_p": (is_number(1e-6, 1), "a number above 0, at most 1"),
    "frequency_penalty": (is_number(-0.99, 2), "a number above -1, at most 2"),
    "seed": (is_whole(0, 2**63 - 1), "a whole number from 0"),
    "stop": (is_stop, "a string or up to 16 strings, none of them empty"),
    "generation_config": (is_json_object, "a string with a JSON object"),
    "chat_template_kwargs": (lambda value: isinstance(value, dict), "an object"),
    "tools": (lambda value: isinstance(value, list) and all(isinstance(x, dict) for x in value), "a list of objects"),
    "messages": (
        lambda value: isinstance(value, list) and value != [] and all(map(is_message, value)),
        "a list of messages, each with a role and a text as content",
    ),
    # what the server would take and leave without effect
    "n": (is_whole(1, 1), "1"),
    "best_of": (is_whole(1, 1), "1"),
    "echo": (lambda value: value is False, "false"),
    "logprobs": (lambda value: value is False or value == 0, "left out"),
}
NEEDED = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/responses": "input"}


def check_request(body: bytes, path: str) -> None:
    """Raises Refusal naming the field that is wrong."""
    try:
        request = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the request is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise Refusal(400, "the request must be a JSON object")
    if request.get(NEEDED[path]) is None:
        raise Refusal(400, f"{NEEDED[path]} is missing")
    for name, value in request.items():
        check, expected = FIELDS.get(name, (lambda _: True, ""))
        if value is not None and not check(value):
            raise Refusal(400, f"{name} must be {expected}")


def protect(app, model: str | None, api_key: str | None):
    """Puts the guard in front of the server's FastAPI application, and lets what a request makes the model or its chat
    template raise be an answer."""
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError

    async def refuse(request, error):
        logger.warning("%s: %s: %s", request.url.path, type(error).__name__, error)
        message = f"this request cannot be answered: {error}"
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)

    for kind in (ValueError, TemplateError):
        app.add_exception_handler(kind, refuse)
    app.add_middleware(Guard, model=model, api_key=api_key)
    return app


def batch(directory: str | None, max_bytes: int) -> None:
    """Gives the models of this process a store of states, and lets the server's requests sample as each of them asks:
    Transformers would give all of them the settings of the first."""
    from transformers.cli.serving import utils

    from hf_xlstm import xLSTMForCausalLM
    from hf_xlstm.state_store import StateStore

    xLSTMForCausalLM.state_store = StateStore(max_bytes, directory)

    class Manager(utils.CBGenerateManager):
        _cb: Any  # a `RecurrentBatchingManager`

        def generate_streaming(self, model, processor, inputs, gen_config, request_id, *args, **kwargs):
            self._cb.expect(request_id, gen_config, processor)
            return super().generate_streaming(model, processor, inputs, gen_config, request_id, *args, **kwargs)

        async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id, *args, **kwargs):
            self._cb.expect(request_id, gen_config, processor)
            super_ = super().generate_non_streaming(model, processor, inputs, gen_config, request_id, *args, **kwargs)
            return await super_

    utils.CBGenerateManager = Manager  # type: ignore[misc]
