"""Many requests at once on a CPU, through the engine behind `generate_batch`.

steps        steps of 8 and 32 requests that came one by one, against a static batch of as many, and against Llama of
             the same size (a static batch with a cache of keys and values), each after 2,048 tokens
requests     whole requests of mixed lengths through `generate_batch`, against `generate` in static batches
second_turn  the time to the first token of a conversation's next turn, after a short and a long history
"""

import argparse
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.generation import NEW_TOKENS, Decoder
from benchmarks.cpu.harness import Measure, Turn, build, main, random_tokens, summarize, take_turns
from benchmarks.peers import HF_XLSTM
from benchmarks.provenance import significant
from hf_xlstm.batch_engine import BatchEngine, Request, prepare
from hf_xlstm.state_store import StateStore


FULL, QUICK = "512x12", "64x2"
STATIC, LLAMA = "static batch", "llama"
ENDLESS = GenerationConfig(do_sample=False, max_new_tokens=10**9)
NEW_IN_TURN = 32  # tokens of a user's message


def engine_turn(size: str, requests: int, context: int) -> Turn:
    """Requests that are read one after the other and step together."""
    model = build(HF_XLSTM, size, torch.float32)
    model.pack_for_decoding()
    engine = BatchEngine(model, lambda request: None, max_rows=requests)
    for index, ids in enumerate(random_tokens(requests, context).tolist()):
        engine.add(prepare(model, str(index), ids, ENDLESS))
    while len(engine.writing) < requests:
        engine.run()

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(NEW_TOKENS):
            engine.run()
        return time.perf_counter() - start

    turn()
    return turn


def static_turn(peer: str, size: str, requests: int, context: int) -> Turn:
    decoder = Decoder(peer, build(peer, size, torch.float32), random_tokens(requests, context))
    decoder.decode(4)
    return decoder.decode


def steps(size: str, requests: int, context: int, args: argparse.Namespace) -> dict:
    turns = {
        HF_XLSTM: engine_turn(size, requests, context),
        STATIC: static_turn(HF_XLSTM, size, requests, context),
        LLAMA: static_turn(LLAMA, size, requests, context),
    }
    times = take_turns(turns, args.rounds, args.seconds)
    return {"context": context, "peers": summarize(times, NEW_TOKENS * requests, (STATIC, LLAMA))}


def requests(size: str, number: int, rows: int, longest: int, args: argparse.Namespace) -> dict:
    """Prompts of 8 to `longest` tokens, replies of 16 to `longest`; the static batches wait for their longest row."""
    model, rng = build(HF_XLSTM, size, torch.float32), random.Random(0)
    prompts = [random_tokens(1, rng.randint(8, longest))[0].tolist() for _ in range(number)]
    limits = [rng.randint(16, longest) for _ in range(number)]
    config = GenerationConfig(do_sample=False, max_new_tokens=longest)

    def batched() -> float:
        start = time.perf_counter()
        options = ContinuousBatchingConfig(max_requests_per_batch=rows)
        with model.continuous_batching_context_manager(config, continuous_batching_config=options) as manager:
            ids = [manager.add_request(p, max_new_tokens=limit) for p, limit in zip(prompts, limits, strict=True)]
            outputs = [manager.get_result(id) for id in ids]
        assert all(len(x.generated_tokens) == limit for x, limit in zip(outputs, limits, strict=True))
        return time.perf_counter() - start

    def static() -> float:
        start = time.perf_counter()
        for first in range(0, number, rows):
            batch, most = prompts[first : first + rows], max(limits[first : first + rows])
            length = max(map(len, batch))
            ids = torch.tensor([[0] * (length - len(x)) + x for x in batch])
            mask = torch.tensor([[0] * (length - len(x)) + [1] * len(x) for x in batch])
            model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=most)
        return time.perf_counter() - start

    times = take_turns({HF_XLSTM: batched, STATIC: static}, args.rounds, 10 * args.seconds)
    return {"requests": number, "at_once": rows, "peers": summarize(times, sum(limits), (STATIC,))}


def first_token(model: PreTrainedModel, store: StateStore, ids: list[int]) -> tuple[float, Request]:
    """Seconds from the arrival of a text to its first new token."""
    ended: list[Request] = []
    engine = BatchEngine(model, ended.append, store)
    start = time.perf_counter()
    engine.add(prepare(model, "0", ids, GenerationConfig(do_sample=False, max_new_tokens=1)))
    while not ended:
        engine.run()
    return time.perf_counter() - start, ended[0]


def second_turn(size: str, lengths: tuple[int, int], args: argparse.Namespace) -> dict:
    """With a state of the history in the store, so that the turn's own tokens are read and no others."""
    model, times = build(HF_XLSTM, size, torch.float32), {length: [] for length in lengths}
    histories = {length: random_tokens(1, length)[0].tolist() for length in lengths}
    reading = {length: first_token(model, StateStore(), history)[0] for length, history in histories.items()}
    store = StateStore(every=10**9)
    for history in histories.values():
        first_token(model, store, history)
    for turn in range(3 * args.rounds):
        for length, history in histories.items():
            new = [(turn * NEW_IN_TURN + index) % 1000 for index in range(NEW_IN_TURN)]  # that nothing has read
            seconds, request = first_token(model, store, history + new)
            assert request.read_here == NEW_IN_TURN
            times[length].append(seconds)
    short, long = lengths
    return {
        "new_tokens": NEW_IN_TURN,
        "seconds": {length: significant(statistics.median(x), 3) for length, x in times.items()},
        "seconds_without_store": {length: significant(x, 3) for length, x in reading.items()},
        "ratio": significant(statistics.median(b / a for a, b in zip(times[short], times[long], strict=True)), 3),
    }


def rows(quick: bool) -> dict[str, Measure]:
    size = QUICK if quick else FULL
    counts, context = ((2, 4), 64) if quick else ((8, 32), 2048)
    return {
        **{f"steps/{count}": partial(steps, size, count, context) for count in counts},
        "requests": partial(requests, size, 6, 4, 32) if quick else partial(requests, size, 64, 8, 200),
        "second_turn": partial(second_turn, size, (64, 256) if quick else (1024, 65536)),
    }


if __name__ == "__main__":
    main("serving", __doc__, rows)
