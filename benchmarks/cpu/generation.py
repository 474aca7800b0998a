"""Inference on a CPU, against other models of Transformers of the same size.

decode     single-token steps: `forward` in a loop, with the cache as `generate` has prepared it
generate   the same steps taken by `generate`
compile    the same steps, compiled: ours by `pack_for_decoding(compile=True)`, the others' `forward` as a whole
context    the same steps after ever longer contexts, and the size of the cache there
prefill    reading a prompt, for the logits of its last token
memory     what reading a prompt adds to the resident set of a process
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.harness import (
    BASELINES,
    COMPILED,
    DTYPES,
    Measure,
    Turn,
    assert_as_exact_as_in_tree,
    build,
    compare,
    linear_floor,
    main,
    peak_memory,
    random_tokens,
    summarize,
    take_turns,
)
from benchmarks.peers import HF_XLSTM, cache_argument, cache_of
from benchmarks.provenance import seconds


PROMPT_LENGTH, NEW_TOKENS = 64, 32


class Decoder:
    """Greedy decoding in a loop over `forward`, from a cache."""

    def __init__(self, peer: str, model: PreTrainedModel, prompt: torch.Tensor, compiled: bool = False):
        self.model = model
        self.argument = cache_argument(peer)
        if peer == HF_XLSTM:
            model.pack_for_decoding(compile=compiled)  # as `generate` does while it runs, but for compiling
        # two tokens, so that `generate` has prepared whatever it prepares for decoding
        outputs = model.generate(prompt, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        self.cache = cache_of(outputs)
        self.token = outputs.sequences[:, -1:]
        if compiled and peer != HF_XLSTM:
            model.forward = torch.compile(model.forward)

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> None:
        outputs = self.model(ids, use_cache=True, logits_to_keep=1, **{self.argument: self.cache})
        self.token = outputs.logits[:, -1:].argmax(-1)

    def decode(self, tokens: int = NEW_TOKENS) -> float:
        return tokens * seconds(lambda: self.read(self.token), tokens)

    @property
    def cache_bytes(self) -> int:
        if hasattr(self.cache, "nbytes"):
            return self.cache.nbytes
        if hasattr(self.cache, "rnn_state"):
            return sum(x.nbytes for state in self.cache.rnn_state.values() for x in state)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Clock(BaseStreamer):
    """The time at which `generate` hands over the prompt, and then each token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode_turn(peer: str, size: str, dtype: str, batch_size: int) -> Turn:
    peer, _, compiled = peer.partition("+")
    model, prompt = build(peer, size, DTYPES[dtype]), random_tokens(batch_size, PROMPT_LENGTH)
    decoder = Decoder(peer, model, prompt, compiled=bool(compiled))
    decoder.decode(4)
    return decoder.decode


def generate_turn(peer: str, size: str, dtype: str, batch_size: int) -> Turn:
    model, prompt = build(peer, size, DTYPES[dtype]), random_tokens(batch_size, PROMPT_LENGTH)

    def turn(steps: int = NEW_TOKENS) -> float:
        clock = Clock()
        model.generate(prompt, max_new_tokens=steps + 1, do_sample=False, streamer=clock)
        return clock.times[-1] - clock.times[1]  # from the first token, which the prefill gives, to the last

    turn(2)
    return turn


def prefill_turn(peer: str, size: str, dtype: str, length: int) -> Turn:
    """With `logits_to_keep`, as in `generate`; the xLSTM of Transformers has no such thing and computes all logits."""
    model = build(peer, size, DTYPES[dtype])

    ids = random_tokens(1, length)
    model.generate(random_tokens(1, 128), max_new_tokens=2, do_sample=False)  # prepares whatever it prepares
    return partial(seconds, torch.no_grad()(lambda: model(ids, use_cache=True, logits_to_keep=1)))


def decode(size: str, dtype: str, batch_size: int, args: argparse.Namespace) -> dict:
    errors = assert_as_exact_as_in_tree(size)
    start = partial(decode_turn, size=size, dtype=dtype, batch_size=batch_size)
    floor = {
        library: lambda step=step: NEW_TOKENS * step()
        for library, step in linear_floor(size, DTYPES[dtype], batch_size, batch_size).items()
    }
    return {"errors": errors, "peers": compare(start, args.peers, NEW_TOKENS * batch_size, args, floor)}


def generate(size: str, dtype: str, batch_size: int, args: argparse.Namespace) -> dict:
    errors = assert_as_exact_as_in_tree(size)
    start = partial(generate_turn, size=size, dtype=dtype, batch_size=batch_size)
    return {"errors": errors, "peers": compare(start, args.peers, NEW_TOKENS * batch_size, args)}


def compiled(size: str, dtype: str, args: argparse.Namespace) -> dict:
    errors = assert_as_exact_as_in_tree(size)
    start = partial(decode_turn, size=size, dtype=dtype, batch_size=1)
    peers = [peer + how for peer in (HF_XLSTM, *BASELINES) if peer in args.peers for how in ("", COMPILED)]
    baselines = [peer + how for peer in BASELINES for how in ("", COMPILED)]
    floor = {
        library: lambda step=step: NEW_TOKENS * step()
        for library, step in linear_floor(size, DTYPES[dtype], 1, 1).items()
    }
    return {"errors": errors, "peers": compare(start, peers, NEW_TOKENS, args, floor, baselines)}


def prefill(size: str, dtype: str, length: int, args: argparse.Namespace) -> dict:
    errors = assert_as_exact_as_in_tree(size)
    start = partial(prefill_turn, size=size, dtype=dtype, length=length)
    floor = linear_floor(size, DTYPES[dtype], length, head_rows=1)
    return {"errors": errors, "peers": compare(start, args.peers, length, args, floor)}


def context(size: str, dtype: str, lengths: list[int], args: argparse.Namespace) -> dict:
    """The peers read on, a piece at a time, and decode where the context has each of the lengths."""
    errors = assert_as_exact_as_in_tree(size)
    peers = [peer for peer in (HF_XLSTM, *BASELINES) if peer in args.peers]
    prompt = random_tokens(1, PROMPT_LENGTH)
    decoders = {peer: Decoder(peer, build(peer, size, DTYPES[dtype]), prompt) for peer in peers}
    contexts, seen = {}, PROMPT_LENGTH
    for length in lengths:
        for decoder in decoders.values():
            for piece in random_tokens(1, length - seen).split(1024, dim=1):
                decoder.read(piece)
        turns = {peer: decoder.decode for peer, decoder in decoders.items()}
        contexts[str(length)] = summarize(take_turns(turns, args.rounds, args.seconds), NEW_TOKENS)
        for peer, decoder in decoders.items():
            contexts[str(length)][peer]["cache_bytes"] = decoder.cache_bytes
        seen = length
    return {"errors": errors, "contexts": contexts}


def memory(size: str, dtype: str, length: int, args: argparse.Namespace) -> dict:
    errors = assert_as_exact_as_in_tree(size)
    start = partial(prefill_turn, size=size, dtype=dtype, length=length)
    peers = {peer: peak_memory(start, peer) for peer in args.peers}
    return {"errors": errors, "packed_megabytes": packed_megabytes(size, dtype), "peers": peers}


def packed_megabytes(size: str, dtype: str) -> int:
    """The prepacked copy of the weights that a model of ours decodes from; in memory before the measured turn."""
    decoder = Decoder(HF_XLSTM, build(HF_XLSTM, size, DTYPES[dtype]), random_tokens(1, PROMPT_LENGTH))
    return round(decoder.model.packed_nbytes / 1e6)


def rows(quick: bool) -> dict[str, Measure]:
    sizes = ["128x2"] if quick else ["768x8", "512x12", "1024x9"]
    batch_sizes = [2] if quick else [1, 8]
    lengths = [192] if quick else [512, 2048, 8192]
    contexts = [128, 192] if quick else [128, 1024, 2048, 4096, 8192, 16384]
    table = {}
    for size in sizes:
        for dtype in DTYPES:
            for batch_size in batch_sizes:
                table[f"decode/{size}/{dtype}/batch-{batch_size}"] = partial(decode, size, dtype, batch_size)
                table[f"generate/{size}/{dtype}/batch-{batch_size}"] = partial(generate, size, dtype, batch_size)
            for length in lengths:
                table[f"prefill/{size}/{dtype}/{length}"] = partial(prefill, size, dtype, length)
            table[f"memory/{size}/{dtype}/{lengths[-1]}"] = partial(memory, size, dtype, lengths[-1])
            table[f"context/{size}/{dtype}"] = partial(context, size, dtype, contexts)
            table[f"compile/{size}/{dtype}"] = partial(compiled, size, dtype)
    return table


if __name__ == "__main__":
    main("generation", __doc__, rows)
