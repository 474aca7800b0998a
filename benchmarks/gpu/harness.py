"""What the GPU benchmarks share: what a measurement is, timing, memory, and where it all ran. prove.py runs them."""

import gc
import statistics
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from benchmarks import provenance


DEVICE = "cuda"  # "cpu" in a rehearsal, "meta" where launches are only recorded


class Job(NamedTuple):
    """A measurement: what it is called, the function that gives its numbers or raises, and patterns of the ids of the
    rows without which it makes no sense."""

    name: dict[str, str | int]
    run: Callable[[], dict]
    needs: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return "/".join(str(x) if isinstance(x, str) else f"{key}={x}" for key, x in self.name.items())


Jobs = Iterator[Job]


class Model:
    """A model that is built when a measurement asks for it, and makes place for the next: there is one at a time."""

    current: "Model | None" = None

    def __init__(self, build: Callable[[], PreTrainedModel]):
        self.build, self.model, self.error = build, None, None

    def __call__(self) -> PreTrainedModel:
        if Model.current is not self:
            Model.release()
        Model.current = self
        if self.error is not None:
            raise RuntimeError(f"The model could not be built: {self.error}")
        if self.model is None:
            try:
                self.model = self.build()
            except Exception as error:
                self.error = str(error)
                raise
        return self.model

    @classmethod
    def release(cls) -> None:
        """Gives the memory of the current model back."""
        if cls.current is not None:
            cls.current.model = None
            cls.current = None
            torch.compiler.reset()  # what is compiled keeps its model alive
            gc.collect()
            torch.cuda.empty_cache()


def environment() -> dict[str, str]:
    """Everything needed to run the same thing again."""
    packages = ("torch", "triton", "transformers", "xlstm", "mlstm-kernels", "flash-linear-attention")
    device = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", "driver": driver()}
    return device | provenance.versions(*packages) | {"commit": provenance.commit()}


def driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def milliseconds(function: Callable[[], object], leaves: list[torch.Tensor] | None = None) -> float:
    """Median with a warm allocator, the L2 cache flushed and the gradients of `leaves` cleared before every call."""
    return triton.testing.do_bench(function, warmup=50, rep=200, grad_to_none=leaves, return_mode="median")


def milliseconds_cold_allocator(function: Callable[[], object], repetitions: int = 5) -> float:
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


def kernel_milliseconds(function: Callable[[], object], calls: int = 3) -> dict[str, float]:
    """Time on the GPU in one call, by the name of the kernel, the longest first."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    times = {event.key[:80]: event.self_device_time_total / calls / 1e3 for event in profiler.key_averages()}
    longest = sorted((name for name, time in times.items() if time > 0), key=times.get, reverse=True)
    return {name: round(times[name], 4) for name in longest}


def peak_gigabytes(function: Callable[[], object]) -> float:
    """Memory that a call takes at its peak, on top of what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9
