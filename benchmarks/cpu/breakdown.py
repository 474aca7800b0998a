"""Where the time of a token, or of a prompt, goes: matrix products, other tensor operations, Python in between.

Milliseconds of a decoding step (length 1) or of a prompt. The total is that of a run without the profiler, the shares
of the operations come from one with it.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hf_xlstm import xLSTMCache


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.harness import DTYPES, Measure, build, main, random_tokens
from benchmarks.peers import HF_XLSTM
from benchmarks.provenance import seconds, significant


PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
STEPS = 32


@torch.no_grad()
def measure(size: str, dtype: str, length: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    model = build(HF_XLSTM, size, DTYPES[dtype])
    model.pack_for_decoding()
    cache = xLSTMCache(model.config)
    ids = random_tokens(1, length)

    def run() -> None:
        state = cache if length == 1 else xLSTMCache(model.config)
        model(ids, cache=state, logits_to_keep=1)

    seconds(run, STEPS if length == 1 else 2)
    calls = STEPS if length == 1 else 3
    total = statistics.median(seconds(run, calls) for _ in range(args.rounds))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds(run, calls)
    times = {event.key: event.self_cpu_time_total / 1e6 / calls for event in profiler.key_averages()}
    products = sum(times.get(name, 0) for name in PRODUCTS)
    operations = sum(times.values()) - products
    rest = max(total - products - operations, 0)
    parts = {"total": total, "products": products, "other_operations": operations, "python_in_between": rest}
    return {"milliseconds": {name: significant(1e3 * value, 3) for name, value in parts.items()}}


def rows(quick: bool) -> dict[str, Measure]:
    size, lengths = ("128x2", (1, 64)) if quick else ("512x12", (1, 2048))
    return {
        f"{size}/{dtype}/{length}": partial(measure, size, dtype, length) for length in lengths for dtype in DTYPES
    }


if __name__ == "__main__":
    main("profile", __doc__, rows)
