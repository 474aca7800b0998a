"""A running batch of requests that join and leave: their states are the rows of one cache.

A pass of the engine takes one step of every request that writes, in place on the rows of that cache, then reads a
piece of the prompts that wait. Prompts are read side by side, each from where it stands: padding to their left leaves
the states untouched. A prompt whose beginning is in the store of snapshots is read from there.
"""

import copy
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StopStringCriteria
from transformers.generation import (
    EpsilonLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import logging

from .cache import STATE_NAMES, xLSTMCache, xLSTMCacheLayer
from .state_store import StateStore, TextKeys, fingerprint, token_list


logger = logging.get_logger(__name__)

# Warpers that look at one row of scores and at nothing else, so that rows with equal ones can share a call.
ROW_WISE = (
    EpsilonLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
PREFILL_TOKENS = 512  # read in one pass of the engine, padding included: what a step of the others may wait for
MAX_ROWS = 64


class Output(GenerationOutput):
    """What is told of a request: Transformers' class."""

    def is_finished(self) -> bool:
        """Whether it has ended, by failure too: before 5.17 that would not count, and be waited for forever."""
        return self.status >= RequestStatus.FINISHED


@dataclass(eq=False)
class Request:
    """One text to continue.

    Args:
        prompt: its tokens.
        config: how, as `generate` would have it after `prepare`.
        limit: number of new tokens.
    """

    id: str
    prompt: list[int]
    config: GenerationConfig
    limit: int
    processors: LogitsProcessorList
    stop: StopStringCriteria | None = None
    copies: int = 0  # that go on from the same prompt
    streaming: bool = False
    record_timestamps: bool = False

    new: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    timestamps: list[float] = field(default_factory=list)
    status: RequestStatus = RequestStatus.PENDING
    error: str | None = None
    created: float = field(default_factory=time.perf_counter)
    started: float = -1
    ended: float = -1

    read: int = 0  # tokens of prompt and reply that its state has read
    read_here: int = 0  # those of them that were no part of a snapshot
    cache: xLSTMCache | None = None  # one row, until the prompt is read
    logits: torch.Tensor | None = None  # (1, V) after the prompt, for a copy
    borders: list[int] = field(default_factory=list)  # tokens of the prompt after which reading stops
    keys: TextKeys | None = None  # of its snapshots; None: it leaves none
    versions: tuple[int, ...] = ()  # of the weights that it began with

    def __post_init__(self):
        eos = self.config.eos_token_id
        self.eos = {int(token) for token in (eos if isinstance(eos, (list, tuple)) else [eos]) if token is not None}
        self.group: int | str = id(self)
        if all(type(processor) in ROW_WISE for processor in self.processors):
            settings = [(type(p).__name__, sorted(vars(p).items())) for p in self.processors]
            self.group = repr((self.config.do_sample, settings))

    def take_copies(self) -> list["Request"]:
        """The further replies to the same prompt, once: they go on from what this request has read."""
        names = [f"{self.id}__child#{index}" for index in range(self.copies)]
        self.copies = 0
        return [
            replace(
                self,
                id=name,
                keys=None if self.keys is None else TextKeys(self.keys.weights),  # their texts part from here
                new=[],
                logprobs=[],
                timestamps=[],
                created=time.perf_counter(),
                started=-1,
            )
            for name in names
        ]

    @property
    def own_cache(self) -> xLSTMCache:
        """The cache of one row, which is there while the prompt is read."""
        assert self.cache is not None
        return self.cache

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.new

    def append(self, token: int, logprob: float | None) -> None:
        """Takes the next token, and ends with it where `generate` would."""
        self.new.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if self.record_timestamps:
            self.timestamps.append(time.perf_counter())
        out_of_time = self.config.max_time is not None and time.perf_counter() - self.started > self.config.max_time
        if (
            token in self.eos
            or len(self.new) >= self.limit
            or out_of_time
            or (self.stop is not None and bool(self.stop(torch.tensor([self.tokens]), None).all()))
        ):
            self.end(RequestStatus.FINISHED)

    def end(self, status: RequestStatus, error: str | None = None) -> None:
        self.status, self.error, self.ended = status, error, time.perf_counter()
        self.cache = self.logits = None

    def output(self) -> Output:
        return Output(
            request_id=self.id,
            prompt_ids=self.prompt,
            generated_tokens=self.new[:],
            logprobs=self.logprobs[:],
            error=self.error,
            status=self.status,
            created_time=self.created,
            lifespan=(self.started, self.ended),
            timestamps=self.timestamps[:] if self.record_timestamps else None,
        )


@torch.no_grad()
def prepare(model, id: str, prompt: list[int], generation_config: GenerationConfig | None, **options) -> Request:
    """A request as `model.generate` would understand its prompt and configuration.

    Args:
        options: `tokenizer` for stop strings; fields of `Request`; others are parameters of the configuration.

    Raises:
        ValueError: there is nothing to read, a token is none, or something is asked for that a batch cannot do.
    """
    own = {name: options.pop(name) for name in ("streaming", "record_timestamps") if name in options}
    tokenizer = options.pop("tokenizer", None)
    given = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
    unknown = given.update(**options)
    if unknown:
        raise ValueError(f"These are no parameters of generation: {', '.join(unknown)}.")
    config, _ = model._prepare_generation_config(given)
    # a tensor by way of an array: each look at a list of many tokens takes as long as a reply's first token
    ids = torch.frombuffer(array("q", prompt), dtype=torch.long) if prompt else torch.tensor([-1])
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        raise ValueError(f"A prompt is at least one token from 0 to {model.config.vocab_size - 1}.")
    ids = ids.unsqueeze(0).to(model.device)
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"A batch knows greedy search and sampling, not {mode.value}: use `generate`.")
    for name, value in (("guidance_scale", 1), ("token_healing", False)):
        if getattr(config, name, None) not in (None, value):
            raise ValueError(f"A batch cannot do `{name}`: use `generate`.")
    if config.pad_token_id is None and config.eos_token_id is not None:  # which Transformers would say every time
        config.pad_token_id = token_list(torch.tensor(config.eos_token_id).reshape(-1))[0]
    model._prepare_special_tokens(config, device=model.device)
    config = model._prepare_generated_length(
        generation_config=config,
        has_default_max_length=given.max_length is None,
        has_default_min_length=given.min_length is None,
        model_input_name="input_ids",
        input_ids_length=len(prompt),
        inputs_tensor=ids,
    )
    limit = config.max_length - len(prompt)
    if limit < 1:
        raise ValueError(f"The prompt has {len(prompt)} tokens, and `max_length` is {config.max_length}.")
    stop = None
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("`stop_strings` need the `tokenizer`.")
        stop = StopStringCriteria(tokenizer=tokenizer, stop_strings=config.stop_strings)
    processors = model._get_logits_processor(
        generation_config=config, input_ids_seq_length=len(prompt), encoder_input_ids=ids, device=model.device
    )
    copies = (config.num_return_sequences or 1) - 1
    return Request(id, prompt, config, limit, processors, stop, copies, **own)


class Rows:
    """The states of the requests that write: the first rows of tensors with room for more."""

    def __init__(self, config):
        self.cache: xLSTMCache | None = None  # of all rows, if there are any
        self.config, self.count = config, 0
        self._room: list[dict[str, torch.Tensor]] = []

    def append(self, cache: xLSTMCache) -> None:
        """Copies a cache of one row behind the others."""
        states = [layer.tensors() for layer in cache.layers]
        if not self._room or self.count == len(next(iter(self._room[0].values()))):
            size = max(1, 2 * self.count)
            room = [{name: x.new_empty(size, *x.shape[1:]) for name, x in layer.items()} for layer in states]
            for old, new in zip(self._room, room):
                for name, x in old.items():
                    new[name][: self.count] = x[: self.count]
            self._room = room
        for layer, state in zip(self._room, states):
            for name, x in state.items():
                layer[name][self.count] = x[0]
        self._resize(self.count + 1)

    def remove(self, index: int) -> None:
        """The last row takes the place of this one."""
        last = self.count - 1
        if index != last:
            for layer in self._room:
                for x in layer.values():
                    x[index] = x[last]
        self._resize(last)

    def copy(self, index: int, seen_tokens: int) -> xLSTMCache:
        """A cache of its own with one row."""
        layers = [{name: x[index : index + 1].clone() for name, x in layer.items()} for layer in self._room]
        return cache_of(self.config, layers, seen_tokens)

    def _resize(self, count: int) -> None:
        self.count = count
        layers = [{name: x[:count] for name, x in layer.items()} for layer in self._room]
        self.cache = cache_of(self.config, layers, 0) if count else None


def cache_of(config, layers: list[dict[str, torch.Tensor]], seen_tokens: int) -> xLSTMCache:
    """A cache with these very tensors, by layer and name."""
    cache = xLSTMCache(config)
    for layer, tensors in zip(cache.layers, layers):
        _set(layer, tensors)
    cache.seen_tokens.fill_(seen_tokens)
    return cache


def _set(layer: xLSTMCacheLayer, tensors: dict[str, torch.Tensor]) -> None:
    layer.state = tuple(tensors[name] for name in STATE_NAMES[layer.layer_type])
    if "conv" in tensors:
        layer.conv_states[0] = tensors["conv"]
        layer.is_conv_states_initialized[0] = True
    layer.device, layer.dtype = layer.recurrent_states[0].device, layer.recurrent_states[0].dtype


class BatchEngine:
    """What a thread runs: requests are added, cancelled, and taken a pass further together.

    Args:
        deliver: called with each request that has an output: at its end, and after each token of one that streams.
        max_rows: requests that write at the same time; the others wait.
        prefill_tokens: read in one pass, padding included.
        logprobs: keep the log probabilities of new tokens, after processing.
        seed: of the numbers that sampling draws, by default those of the global generator.
    """

    def __init__(
        self,
        model,
        deliver: Callable[[Request], None],
        store: StateStore | None = None,
        max_rows: int | None = None,
        prefill_tokens: int | None = None,
        logprobs: bool = False,
        seed: int | None = None,
    ):
        self.model, self.deliver, self.store, self.logprobs = model, deliver, store, logprobs
        self.max_rows, self.prefill_tokens = max_rows or MAX_ROWS, prefill_tokens or PREFILL_TOKENS
        self.generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
        self.waiting: deque[Request] = deque()
        self.reading: list[Request] = []
        self.writing: list[Request] = []  # in the order of their rows
        self.rows = Rows(model.config)
        self.tokens_read = 0  # by the model, padding left out
        self._blank: list[dict[str, torch.Tensor]] | None = None

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self.waiting) + len(self.reading) + len(self.writing)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def cancel(self, id: str) -> None:
        """Ends a request, if it has not ended."""
        for request in (*self.waiting, *self.reading, *self.writing):
            if request.id == id:
                self._end(request, RequestStatus.FAILED, "The request was cancelled.")

    def fail_all(self, error: str) -> None:
        for request in (*self.waiting, *self.reading, *self.writing):
            self._end(request, RequestStatus.FAILED, error)

    def forget_weights(self) -> None:
        """Called when the weights may have changed: what is on its way leaves no snapshots."""
        for request in (*self.waiting, *self.reading, *self.writing):
            request.keys = None

    @torch.no_grad()
    def run(self) -> None:
        """One pass. What goes wrong ends the requests it concerns; the others go on."""
        if self.writing:
            self._write()
        self._admit()
        if self.reading:
            self._read()

    # ---- writing

    def _write(self) -> None:
        requests = self.writing[:]
        assert self.rows.cache is not None
        try:
            logits = self._forward([[request.new[-1]] for request in requests], self.rows.cache)
        except Exception as error:  # in the middle of the pass: layers are at different tokens
            for request in requests:
                self._end(request, RequestStatus.FAILED, f"{type(error).__name__}: {error}")
            self.rows = Rows(self.model.config)
            return
        for index, request in enumerate(requests):
            request.read += 1
            if self.store is not None and request.read % self.store.every == 0 and self._may_keep(request):
                self._keep(request, self.rows.copy(index, request.read))
        self._continue(requests, logits)

    def _forward(self, tokens: list[list[int]], cache: xLSTMCache) -> torch.Tensor:
        """The logits (B, V) after the last token of each row, in which tokens stand to the right."""
        length = max(map(len, tokens))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in tokens], device=self.model.device)
        mask = None
        if min(map(len, tokens)) < length:
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in tokens], device=ids.device)
        logits = self.model(input_ids=ids, attention_mask=mask, cache=cache, logits_to_keep=1).logits[:, -1].float()
        self.tokens_read += sum(map(len, tokens))
        return logits

    def _continue(self, requests: list[Request], logits: torch.Tensor) -> None:
        """The next token of each request, from its row of logits (B, V)."""
        groups: dict[object, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.group, []).append(index)
        for indices in groups.values():
            members = [requests[index] for index in indices]
            try:
                chosen, logprobs = self._choose(members, logits[indices])
            except Exception as error:
                for request in members:
                    self._end(request, RequestStatus.FAILED, f"{type(error).__name__}: {error}")
                continue
            for request, token, logprob in zip(members, chosen, logprobs):
                try:
                    if token is None:
                        raise ValueError("No token has a probability: the logits are not finite.")
                    request.append(token, logprob)
                except Exception as error:
                    self._end(request, RequestStatus.FAILED, f"{type(error).__name__}: {error}")
                    continue
                if request.status == RequestStatus.FINISHED:
                    self._end(request, RequestStatus.FINISHED)
                else:
                    request.status = RequestStatus.DECODING
                    if request.streaming:
                        self.deliver(request)

    def _choose(self, requests: list[Request], scores: torch.Tensor) -> tuple[list[int | None], list[float | None]]:
        """Tokens and their log probabilities, of requests that share their processors. None for a row of which none
        can be drawn."""
        if requests[0].processors:
            row_wise = isinstance(requests[0].group, str)  # which do not look at the text
            text = [request.tokens[-1:] if row_wise else request.tokens for request in requests]
            ids: Any = torch.tensor(text, device=scores.device)
            scores = requests[0].processors(ids, scores)
        drawn = torch.ones(len(requests), dtype=torch.bool, device=scores.device)
        if requests[0].config.do_sample:
            probabilities = scores.softmax(-1)
            drawn = probabilities.isfinite().all(-1)
            probabilities = probabilities.where(drawn[:, None], torch.ones_like(probabilities))
            tokens = torch.multinomial(probabilities, 1, generator=self.generator)
        else:
            tokens = scores.argmax(-1, keepdim=True)
        logprobs: list[float | None] = [None] * len(requests)
        if self.logprobs:
            logprobs = scores.log_softmax(-1).gather(1, tokens)[:, 0].tolist()
        drawn = drawn.tolist()
        return [token if ok else None for token, ok in zip(tokens[:, 0].tolist(), drawn)], logprobs

    # ---- reading

    def _admit(self) -> None:
        """Lets requests in, each with the longest beginning of its text that the store knows."""
        weights = None
        while self.waiting and len(self.writing) + len(self.reading) < self.max_rows:
            request = self.waiting.popleft()
            request.started = time.perf_counter()
            if request.cache is not None and request.logits is not None:  # a copy, whose prompt has been read
                self._begin_writing([request], request.logits)
                continue
            request.status = RequestStatus.PREFILLING
            self.reading.append(request)
            length = len(request.prompt)
            request.borders = [length]
            try:
                if self.store is not None:
                    if weights is None:
                        weights = fingerprint(self.model), counted_versions(self.model)
                    request.keys, request.versions = TextKeys(weights[0]), weights[1]
                    # beside the end of the prompt, that of its last turn: what a chat template writes after it may be
                    # another text next time
                    backwards = request.prompt[::-1]
                    turns = [length - backwards.index(token) for token in request.eos if token in backwards]
                    every = range(self.store.every, length, self.store.every)
                    request.borders = sorted({length, max(turns, default=length), *every})
                    found = self.store.longest(request.keys, request.prompt)
                    if found is not None:
                        request.cache, request.read = found.to(self.model.device), found.get_seq_length()
                if request.cache is None:
                    request.cache = self._empty()
            except Exception as error:
                self._end(request, RequestStatus.FAILED, f"{type(error).__name__}: {error}")

    def _empty(self) -> xLSTMCache:
        """One row that has read nothing. A masked token allocates the states and leaves them empty."""
        if self._blank is None:
            cache = xLSTMCache(self.model.config)
            masked = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            self.model(masked, attention_mask=masked, cache=cache)
            self._blank = [layer.tensors() for layer in cache.layers]
        return cache_of(self.model.config, [{n: x.clone() for n, x in layer.items()} for layer in self._blank], 0)

    def _read(self) -> None:
        """A piece of as many prompts as fit side by side. Those that are not at their end queue again, so that a long
        prompt does not keep the short ones waiting."""
        requests: list[Request] = []
        pieces: list[list[int]] = []
        for request in self.reading:
            border = next(border for border in request.borders if border > request.read)
            piece = request.prompt[request.read : min(border, request.read + self.prefill_tokens)]
            longest = max(len(piece), *map(len, pieces), 0)
            if requests and longest * (len(requests) + 1) > self.prefill_tokens:
                break
            requests.append(request)
            pieces.append(piece)
        self.reading = self.reading[len(requests) :] + requests
        self._read_pieces(requests, pieces)

    def _read_pieces(self, requests: list[Request], pieces: list[list[int]]) -> None:
        alone = len(requests) == 1
        try:
            caches = [request.own_cache for request in requests]
            joint = caches[0] if alone else side_by_side(self.model.config, caches)
            logits = self._forward(pieces, joint)
        except Exception as error:
            if alone:
                self._end(requests[0], RequestStatus.FAILED, f"{type(error).__name__}: {error}")
            else:  # each from its own state, which stands where it stood, so that only the cause fails
                for request, piece in zip(requests, pieces):
                    self._read_pieces([request], [piece])
            return
        for index, (request, piece) in enumerate(zip(requests, pieces)):
            request.read += len(piece)
            request.read_here += len(piece)
            if not alone:
                for layer, whole in zip(request.own_cache.layers, joint.layers):
                    _set(layer, {name: x[index : index + 1].clone() for name, x in whole.tensors().items()})
            request.own_cache.seen_tokens.fill_(request.read)
            if request.read in request.borders and self._may_keep(request):
                self._keep(request, request.own_cache)
        complete = [index for index, request in enumerate(requests) if request.read == len(request.prompt)]
        self._begin_writing([requests[index] for index in complete], logits[complete])

    def _begin_writing(self, requests: list[Request], logits: torch.Tensor) -> None:
        begun = []
        for index, request in enumerate(requests):
            try:
                self.rows.append(request.own_cache)
            except Exception as error:  # no memory for one more row
                self._end(request, RequestStatus.FAILED, f"{type(error).__name__}: {error}")
                continue
            if request in self.reading:  # else it is a copy
                self.reading.remove(request)
            request.logits = logits[index : index + 1]
            self.waiting.extendleft(reversed(request.take_copies()))
            self.writing.append(request)
            request.cache = request.logits = None
            begun.append(index)
        if begun:
            self._continue([requests[index] for index in begun], logits[begun])

    # ---- ends

    def _may_keep(self, request: Request) -> bool:
        """Whether the weights are those that the request began with: by what PyTorch counts, since checksums of all
        weights at every snapshot would take too long."""
        return request.keys is not None and counted_versions(self.model) == request.versions

    def _keep(self, request: Request, cache: xLSTMCache) -> None:
        """Keeps a snapshot. A request goes on without where that fails, as on a full disk."""
        tokens = request.tokens[: request.read]
        assert self.store is not None and request.keys is not None
        try:
            layers = [{name: x.cpu().clone() for name, x in layer.tensors().items()} for layer in cache.layers]
            self.store.add(request.keys, tokens, cache_of(self.model.config, layers, request.read))
        except Exception as error:
            logger.warning(f"A state was not kept: {type(error).__name__}: {error}")
            request.keys = None

    def _end(self, request: Request, status: RequestStatus, error: str | None = None) -> None:
        """Takes a request out, wherever it is, and delivers its last output."""
        if request in self.writing:
            index = self.writing.index(request)
            if status == RequestStatus.FINISHED and self._may_keep(request):
                self._keep(request, self.rows.copy(index, request.read))
            last = self.writing.pop()
            if last is not request:
                self.writing[index] = last
            self.rows.remove(index)
        elif request in self.reading:
            self.reading.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        copies = request.take_copies()  # of a prompt that was not read to its end
        for ended in (request, *copies):
            ended.end(status, error)
            self.deliver(ended)


def side_by_side(config, caches: list[xLSTMCache]) -> xLSTMCache:
    """One cache with the rows of all."""
    rows = [[layer.tensors() for layer in cache.layers] for cache in caches]
    layers = [{name: torch.cat([x[name] for x in layer]) for name in layer[0]} for layer in zip(*rows)]
    return cache_of(config, layers, 0)


def counted_versions(model) -> tuple[int, ...]:
    """What changes with every operation on a parameter that PyTorch counts, and with its replacement."""
    return tuple(x for p in model.parameters() for x in (p.data_ptr(), 0 if p.is_inference() else p._version))


__all__ = ["BatchEngine", "Output", "Request", "prepare"]
