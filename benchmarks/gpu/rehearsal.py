"""The GPU benchmarks without a GPU: tiny sizes in Triton's interpreter, and kernels broken on purpose.

Shows whether everything runs and every failure becomes a row, not how fast anything is: no number that depends on a
clock leaves a rehearsal.
"""

import contextlib
import os
import signal
import time
import types
from collections.abc import Iterator
from unittest import mock

import torch
import triton
from triton.runtime.interpreter import GridExecutor

from benchmarks.gpu import breakdown, generation, harness, ops, smoke, training
from hf_xlstm.cells import selfcheck


FAULTS = ("fail", "hang", "wrong", "crash")
MODEL = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 1}
SIZES = {
    selfcheck: {"TOKENS": 20, "SHORT": 2, "SLSTM_TOKENS": 2},
    smoke: {"MLSTM_SHAPES": [(1, 20, 1, 16, 32)], "SLSTM_SHAPES": [(1, 3, 1, 16)], "MODEL": MODEL, "LENGTH": 6},
    ops: {
        "TOKENS": 18,
        "LENGTHS": [18],
        "TILE_LENGTHS": [18],
        "LONG_LENGTHS": [18],
        "SHORT_LENGTHS": [16],
        "SHAPES": [(1, 16, 16)],
        "STEP_BATCHES": [1],
        "L2_BYTES": 1e3,
        "ATTENTION_SHAPE": (1, 16),
        "SLSTM_HEADS": 1,
        "SLSTM_SHAPES": [(1, 3, 16), (1, 2, 72)],  # the head dims take different kernels
        "SLSTM_VARIANT_SHAPES": [(1, 2, 72)],
        "SLSTM_STEP_SHAPES": [(1, 16)],
        "SLSTM_LAYERS": 1,
    },
    generation: {
        "SIZE": MODEL | {"hidden_size": 128},
        "PROMPTS": [5],
        "DECODE": [(1, 4), (2, 4)],
        "NEW_TOKENS": 2,
        "CHECKED": (8, 2),
    },
    breakdown: {"LENGTHS": [18], "SLSTM_SHAPES": [(1, 2, 16)], "TRAINED": 64},
    training: {"VOCAB": 32, "TOKENS": 64, "LENGTHS": [64], "SIZES": {"tiny": (64, 2, 1)}, "CHECKED": (32, 6)},
}


def begin() -> None:
    """Lets the CPU be the GPU, makes everything tiny and times nothing. The process stays so: it must do nothing
    else."""
    event = types.SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 1.0)
    for name, function in {
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 0,
        "reset_peak_memory_stats": lambda: None,
        "Event": lambda **_: event,
    }.items():
        setattr(torch.cuda, name, function)
    for name in ("do_bench", "do_bench_cudagraph"):
        setattr(triton.testing, name, once)
    harness.DEVICE = "cpu"
    ops.milliseconds_cold_allocator = once
    harness.kernel_milliseconds = ops.kernel_milliseconds = lambda function: (function(), {})[1]
    for module, sizes in SIZES.items():
        for name, value in sizes.items():
            assert hasattr(module, name)
            setattr(module, name, value)


def once(function, *_, **__) -> float:
    """One call in place of a measurement."""
    function()
    return 1.0


def without_times(result: dict) -> dict:
    """Errors are real in a rehearsal. Every other number that is no count would be a measurement of nothing."""
    return {name: None if isinstance(x, float) and name != "error" else x for name, x in result.items()}


@contextlib.contextmanager
def fault(kind: str) -> Iterator[None]:
    """Kernels fail, hang, compute nothing, or take the process with them."""

    def launch(executor: GridExecutor, *_, **__) -> None:
        name = executor.fn.__name__
        if kind == "fail":
            raise RuntimeError(f"{name} was broken on purpose")
        if kind == "hang":
            time.sleep(1e6)
        if kind == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)

    if kind not in FAULTS:
        raise ValueError(f"Unknown fault {kind!r}; there are {', '.join(FAULTS)}.")
    with mock.patch.object(GridExecutor, "__call__", launch):
        yield
