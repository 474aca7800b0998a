"""Training steps, forward and backward, on a CPU: against other models of Transformers of the same size.

training   one sequence of a given length
ragged     575 tokens against 576, a whole number of chunks
slstm      one block in eight an sLSTM, against none
memory     what a step, gradients included, adds to the resident set of a process
"""

import argparse
import sys
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.harness import (
    DTYPES,
    Measure,
    Turn,
    assert_as_exact_as_in_tree,
    build,
    compare,
    main,
    peak_memory,
    random_tokens,
)
from benchmarks.peers import HF_XLSTM, IN_TREE
from benchmarks.provenance import seconds


MIXED = f"{HF_XLSTM}, one sLSTM in eight"


def training_turn(peer: str, size: str, dtype: str, length: int) -> Turn:
    fields = {}
    if peer == MIXED:
        layers = int(size.split("x")[1])
        peer, fields = HF_XLSTM, {"layer_types": ["slstm" if i % 8 == 1 else "mlstm" for i in range(layers)]}
    model = build(peer, size, DTYPES[dtype], **fields).train()

    def turn(length: int = length) -> float:
        ids = random_tokens(1, length)
        model.zero_grad()
        return seconds(lambda: model(ids, labels=ids, use_cache=False).loss.backward())

    turn(128)
    model.zero_grad()
    return turn


def training(size: str, dtype: str, length: int, args: argparse.Namespace) -> dict:
    errors = assert_as_exact_as_in_tree(size)
    start = partial(training_turn, size=size, dtype=dtype, length=length)
    return {"errors": errors, "peers": compare(start, args.peers, length, args)}


def ragged_turn(length: str, peer: str, size: str, dtype: str) -> Turn:
    return training_turn(peer, size, dtype, int(length))


def ragged(size: str, dtype: str, length: int, args: argparse.Namespace) -> dict:
    """The peers here are two lengths of one model. They differ by one token, which the speeds neglect."""
    errors = assert_as_exact_as_in_tree(size)
    lengths = str(length + 1), str(length)
    models = (HF_XLSTM, IN_TREE) if dtype == "float32" else (HF_XLSTM,)  # the other cannot train in bfloat16
    starts = {peer: partial(ragged_turn, peer=peer, size=size, dtype=dtype) for peer in models}
    speeds = {peer: compare(starts[peer], lengths, length, args, baselines=lengths[:1]) for peer in models}
    return {"errors": errors, "lengths": speeds}


def slstm(size: str, dtype: str, length: int, args: argparse.Namespace) -> dict:
    errors = assert_as_exact_as_in_tree(size)
    start = partial(training_turn, size=size, dtype=dtype, length=length)
    return {"errors": errors, "peers": compare(start, [HF_XLSTM, MIXED], length, args, baselines=[HF_XLSTM])}


def memory(size: str, dtype: str, length: int, args: argparse.Namespace) -> dict:
    errors = assert_as_exact_as_in_tree(size)
    start = partial(training_turn, size=size, dtype=dtype, length=length)
    return {"errors": errors, "peers": {peer: peak_memory(start, peer) for peer in args.peers}}


def rows(quick: bool) -> dict[str, Measure]:
    sizes = ["128x2"] if quick else ["512x12", "768x8", "1024x9"]
    lengths = [192] if quick else [512, 2048]
    ragged_length = 127 if quick else 575
    table = {}
    for size in sizes:
        for dtype in DTYPES:
            for length in lengths:
                table[f"training/{size}/{dtype}/{length}"] = partial(training, size, dtype, length)
                table[f"slstm/{size}/{dtype}/{length}"] = partial(slstm, size, dtype, length)
            table[f"ragged/{size}/{dtype}/{ragged_length}"] = partial(ragged, size, dtype, ragged_length)
            table[f"memory/{size}/{dtype}/{lengths[-1]}"] = partial(memory, size, dtype, lengths[-1])
    return table


if __name__ == "__main__":
    main("training", __doc__, rows)
