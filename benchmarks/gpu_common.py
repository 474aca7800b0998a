"""What the GPU benchmarks share: timing, memory, and the header of a results file."""

import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from transformers.utils import is_xlstm_available


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
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "python": platform.python_version(),
    } | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


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


def print_row(row: dict) -> None:
    print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
