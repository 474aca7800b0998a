"""Where the time of a token, or of a prompt, goes: matrix products, other tensor operations, Python in between.

The time is that of a run without the profiler, the shares of the operations come from one with it. Writes
results/profile-cpu.json.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from common import DTYPES, OURS, RESULTS, build, machine, provenance, random_tokens, significant, versions
from torch.profiler import ProfilerActivity, profile

from hf_xlstm import xLSTMCache


PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
STEPS = 32  # enough for blocked weights to be in use afterwards


@torch.no_grad()
def measure(size: str, dtype: str, length: int) -> dict[str, float]:
    """Milliseconds of a decoding step (length 1) or of a prompt."""
    model = build(OURS, size, DTYPES[dtype])
    cache = xLSTMCache(model.config)
    ids = random_tokens(1, length)

    def run() -> None:
        model(ids, cache=cache if length == 1 else xLSTMCache(model.config), logits_to_keep=1)

    for _ in range(STEPS if length == 1 else 2):
        run()
    repeats = STEPS if length == 1 else 3
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        times.append((time.perf_counter() - start) / repeats)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            run()
    seconds = {event.key: event.self_cpu_time_total / 1e6 / repeats for event in profiler.key_averages()}
    products = sum(seconds.get(name, 0) for name in PRODUCTS)
    total, operations = sorted(times)[2], sum(seconds.values()) - products
    rest = max(total - products - operations, 0)
    parts = {"total": total, "products": products, "other_operations": operations, "python_in_between": rest}
    return {name: significant(1e3 * value, 3) for name, value in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["512x12"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1, 2048], help="1 is a decoding step")
    parser.add_argument("--output", type=Path, default=RESULTS / "profile-cpu.json")
    args = parser.parse_args()
    rows = {
        f"{size}/{dtype}/{length}": measure(size, dtype, length)
        for size in args.sizes
        for length in args.lengths
        for dtype in DTYPES
    }
    result = {"machine": machine(), "versions": versions(), "milliseconds": rows} | provenance()
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
