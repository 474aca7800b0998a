"""What the GPU benchmarks share: the loop over measurements, timing, memory, and the header of a results file."""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import triton
from transformers import PreTrainedModel
from transformers.utils import is_xlstm_available


DEVICE = "cuda"
OURS = "hf_xlstm"
# The in-tree xLSTM runs plain PyTorch by itself, and these kernels where the `xlstm` package is installed.
IN_TREE_KERNELS = {
    "chunkwise_kernel": "chunkwise--triton_xl_chunk",
    "sequence_kernel": "native_sequence__triton",
    "step_kernel": "triton",
}


def in_tree_kernels() -> dict[str, str]:
    return IN_TREE_KERNELS if is_xlstm_available() else {}


def environment() -> dict[str, str]:
    """Everything needed to run the same thing again."""
    packages = ("torch", "triton", "transformers", "xlstm", "mlstm-kernels", "flash-linear-attention")
    return {
        "device": torch.cuda.get_device_name(),
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "python": platform.python_version(),
    } | {name: _version(name) for name in packages}


def _commit() -> str:
    """COMMIT says it where the sources have come without their history."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:
        return os.environ.get("COMMIT", "unknown")
    return git.stdout.strip() or os.environ.get("COMMIT", "unknown")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# A measurement: what it is called, and the function that gives its numbers.
Job = tuple[dict, Callable[[], dict]]


def argument_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--minutes", type=float, default=8, help="start no measurement after this long (%(default)s)")
    return parser


def measure(jobs: Iterable[Job], args: argparse.Namespace) -> int:
    """Prints and writes row by row. A failure is a row too and stops nothing; returns 1 if one of ours failed."""
    rows, deadline = [], time.monotonic() + args.minutes * 60
    for name, job in jobs:
        if time.monotonic() > deadline:
            row = name | {"skipped": "out of time"}
        else:
            try:
                row = name | job()
            except Exception as error:
                row = name | {"failed": f"{type(error).__name__}: {error}"[:300]}
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        rows.append(row)
        write_results(args.json, rows)  # what was measured survives an interruption
    return int(any("failed" in row and any(str(x).startswith(OURS) for x in row.values()) for row in rows))


def model_jobs(name: dict, build: Callable[[], PreTrainedModel], jobs: Callable[[PreTrainedModel], Iterator[Job]]):
    """Loading a model is a measurement too; the others follow only if it could be built."""
    models = []

    def load() -> dict:
        torch.compiler.reset()  # what is compiled keeps its model alive
        gc.collect()
        torch.cuda.empty_cache()
        models.append(build())
        return {"parameters": sum(p.numel() for p in models[0].parameters())}

    yield name | {"measure": "load"}, load
    if models:
        for row, job in jobs(models.pop()):
            yield name | row, job


def write_results(path: Path | None, rows: list[dict]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


def milliseconds(function: Callable[[], object], leaves: list[torch.Tensor] | None = None) -> float:
    """Median with a warm allocator, the L2 cache flushed and the gradients of `leaves` cleared before every call."""
    return triton.testing.do_bench(function, warmup=50, rep=200, grad_to_none=leaves, return_mode="median")


def milliseconds_cold_allocator(function: Callable[[], object], repetitions: int = 20) -> float:
    """Median under the protocol of the published numbers: the allocator's cache emptied before every call, gradients
    accumulated, the L2 cache left alone."""
    times = []
    for _ in range(repetitions):
        torch.cuda.empty_cache()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_gigabytes(function: Callable[[], object]) -> float:
    """Memory that a call takes at its peak, on top of what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9
