"""Which implementation of an operator runs: one table, and the choice of `backend="auto"`."""

import functools
import warnings
from collections.abc import Callable

import torch

from . import BACKENDS
from .environment import backend_override
from .mlstm.eager import mlstm_chunkwise, mlstm_step_torch
from .mlstm.reference import mlstm_recurrent, mlstm_step_reference
from .slstm.eager import slstm_step_torch, slstm_torch
from .slstm.reference import slstm_recurrent, slstm_step_reference


GPU = "cuda"  # the type of devices on which "auto" takes the Triton kernels; ROCm calls its devices so, too

_IMPLEMENTATIONS: dict[tuple[str, str], Callable] = {
    ("mlstm", "reference"): mlstm_recurrent,
    ("mlstm", "torch"): mlstm_chunkwise,
    ("mlstm_step", "reference"): mlstm_step_reference,
    ("mlstm_step", "torch"): mlstm_step_torch,
    ("slstm", "reference"): slstm_recurrent,
    ("slstm", "torch"): slstm_torch,
    ("slstm_step", "reference"): slstm_step_reference,
    ("slstm_step", "torch"): slstm_step_torch,
}

_warned: set[str] = set()


@functools.cache
def _add_triton() -> str | None:
    """Fills in the Triton rows of the table when they are first asked for; returns why that cannot be done, or None.

    In the copy of this package beside a checkpoint the kernels are left out and these imports raise ImportError.
    """
    try:
        from .mlstm.triton_ops import mlstm_step_triton, mlstm_triton
        from .slstm.triton_ops import slstm_step_triton, slstm_triton
    except ImportError as error:
        return f"its Triton kernels cannot be imported ({error}); pip install hf-xlstm[cuda]"
    _IMPLEMENTATIONS["mlstm", "triton"] = mlstm_triton
    _IMPLEMENTATIONS["mlstm_step", "triton"] = mlstm_step_triton
    _IMPLEMENTATIONS["slstm", "triton"] = slstm_triton
    _IMPLEMENTATIONS["slstm_step", "triton"] = slstm_step_triton
    return None


def _triton_unsupported(*inputs: torch.Tensor) -> str | None:
    reason = _add_triton()
    if reason is not None:
        return reason
    from .triton_common import unsupported_reason

    return unsupported_reason(inputs[0], *(x.shape[-1] for x in inputs))


def _found_wrong(op: str, *inputs: torch.Tensor) -> str | None:
    """Asked where there are kernels, so never in the copy of this package beside a checkpoint."""
    from .selfcheck import fault

    return fault(op, *inputs)


def backend_and_reason(op: str, backend: str, *inputs: torch.Tensor) -> tuple[str, str]:
    """The implementation of `op` that runs, and why: "triton" for CUDA tensors it supports, on a GPU where it passes
    the check of selfcheck.py; else "torch", with a warning. `inputs` are tensors whose last dimensions are head dims:
    q and v, or the gates of the sLSTM.

    `HF_XLSTM_BACKEND` overrides "auto". Raises ValueError for an unknown backend and RuntimeError for one that cannot
    do what it is asked to.
    """
    asked = "asked for by `backend`"
    override = backend_override() if backend == "auto" else None
    if override is not None:
        backend, asked = override, "asked for by HF_XLSTM_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend in ("torch", "reference"):
        return backend, asked
    device = inputs[0].device.type
    if backend == "auto" and device != GPU:
        return "torch", f"the fastest on {device}"
    reason = _triton_unsupported(*inputs)
    if backend == "triton":
        if reason is not None:
            raise RuntimeError(f"The triton backend cannot run {op}: {reason}.")
        return backend, asked
    reason = reason or _found_wrong(op, *inputs)
    if reason is None:
        return "triton", f"the fastest on {device}"
    _warn_once(f"{op} runs on the torch backend: {reason}.")
    return "torch", reason


def implementation(op: str, backend: str, *inputs: torch.Tensor) -> Callable:
    """The function that runs `op` on these inputs (see `backend_and_reason`)."""
    return _IMPLEMENTATIONS[op, backend_and_reason(op, backend, *inputs)[0]]


@torch.compiler.assume_constant_result  # warns while a graph is traced, and stays out of it
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=5)
