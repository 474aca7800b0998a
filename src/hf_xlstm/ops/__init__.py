"""The two cells of xLSTM as functions: `mlstm`, `mlstm_step`, `slstm`, `slstm_step`.

Each checks its arguments and hands them to one of three implementations with the same signature: the reference (the
definition, slow), torch (fast on every device) or triton (CUDA). Models call these and never know which one runs.
"""

import functools
import os
import warnings

import torch

from .mlstm_reference import MLSTMState, gate_dtype, mlstm_recurrent
from .mlstm_torch import mlstm_chunkwise, mlstm_step_torch
from .slstm_reference import SLSTMState, slstm_recurrent
from .slstm_torch import slstm_step_torch, slstm_torch


__all__ = ["BACKENDS", "backend_and_reason", "mlstm", "mlstm_step", "slstm", "slstm_step"]

BACKENDS = ("auto", "triton", "torch", "reference")


def mlstm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    *,
    initial_state: MLSTMState | None = None,
    output_final_state: bool = False,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, MLSTMState | None]:
    """mLSTM over a sequence (Beck et al. 2024, eq. 19-27).

    Args:
        q, k: (B, T, H, K), any strides; float32, bfloat16, float16 or float64.
        v: (B, T, H, V), same dtype.
        igate, fgate: (B, T, H) gate pre-activations, any float dtype; computed in float32 (float64 if q is).
            `igate` may be -inf, `fgate` +-inf.
        initial_state: c (B, H, K, V), n (B, H, K), m (B, H) in float32 (float64 for float64 input), never modified;
            absent means zeros. The scale is on q: c and n are unscaled.
        output_final_state: also return the state after the last token.
        mask: (B, T) bool. At False the state stays as it is and the output is 0.
        cu_seqlens: (N + 1,) int, the bounds of N packed sequences, B = 1; states then have N rows.
        scale: factor on q, default K ** -0.5.
        chunk_size: tokens per chunk on the torch backend, chosen from the shape by default. No effect on results.
        backend: "auto" | "triton" | "torch" | "reference".

    Returns:
        h (B, T, H, V) in v's dtype, and the final state or None. Gradients reach all floating inputs and c, n of the
        initial state, from h and from c, n of the final one. m only fixes the scale in which c and n are stored (c e^m
        and n e^m are what they mean), so no gradient passes through it.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    _check_mlstm(q, k, v, igate, fgate, sequence=True)
    heads, key_dim = q.shape[2:]
    rows = _check_sequence(q, mask, cu_seqlens)
    if initial_state is not None:
        _check_state(initial_state, _mlstm_state_shapes(rows, heads, key_dim, v.shape[-1]), "initial_state", q)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    return _implementation("mlstm", backend, q, v)(
        q,
        k,
        v,
        igate,
        fgate,
        initial_state=initial_state,
        output_final_state=output_final_state,
        mask=mask,
        cu_seqlens=cu_seqlens,
        scale=key_dim**-0.5 if scale is None else scale,
        eps=eps,
        chunk_size=chunk_size,
    )


def mlstm_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    state: MLSTMState,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, MLSTMState]:
    """One step of `mlstm`: its arguments without T. `inplace=True` writes the new state into the given tensors."""
    _check_mlstm(q, k, v, igate, fgate, sequence=False)
    batch, heads, key_dim = q.shape
    _check_state(state, _mlstm_state_shapes(batch, heads, key_dim, v.shape[-1]), "state", q)
    scale = key_dim**-0.5 if scale is None else scale
    step = _implementation("mlstm_step", backend, q, v)
    return step(q, k, v, igate, fgate, state, scale=scale, eps=eps, inplace=inplace)


def slstm(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    initial_state: SLSTMState | None = None,
    output_final_state: bool = False,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, SLSTMState | None]:
    """sLSTM over a sequence (Beck et al. 2024, eq. 8-18), log-sigmoid forget gate.

    Args:
        gates: (B, T, 4, H, D) what the input contributes to the pre-activations, in the order i, f, z, o.
        recurrent_weight: (4, H, D_out, D_in), one matrix per gate and head.
        bias: (4, H, D).
        initial_state: h, c, n, m, each (B, H, D), float32 (float64 for float64 input); absent means zeros, and where
            n = 0 the stabilizer m starts at the first input gate.
        output_final_state, mask, cu_seqlens, backend: as for `mlstm`.

    Returns:
        h (B, T, H, D) in the dtype of `gates`, and the final state or None. Gradients reach gates, recurrent_weight,
        bias and h, c, n of the initial state.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    _check_slstm(gates, recurrent_weight, bias, sequence=True)
    rows = _check_sequence(gates, mask, cu_seqlens)
    if initial_state is not None:
        _check_state(initial_state, _slstm_state_shapes(rows, *gates.shape[3:]), "initial_state", gates)
    return _implementation("slstm", backend, gates, gates)(
        gates,
        recurrent_weight,
        bias,
        initial_state=initial_state,
        output_final_state=output_final_state,
        mask=mask,
        cu_seqlens=cu_seqlens,
    )


def slstm_step(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    state: SLSTMState,
    *,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, SLSTMState]:
    """One step of `slstm`: gates (B, 4, H, D). `inplace=True` writes the new state into the given tensors."""
    _check_slstm(gates, recurrent_weight, bias, sequence=False)
    _check_state(state, _slstm_state_shapes(gates.shape[0], *gates.shape[2:]), "state", gates)
    return _implementation("slstm_step", backend, gates, gates)(gates, recurrent_weight, bias, state, inplace=inplace)


def backend_and_reason(op: str, backend: str, q: torch.Tensor, v: torch.Tensor) -> tuple[str, str]:
    """The implementation that runs, and why: "triton" for CUDA tensors it supports, else "torch", with a warning.

    `HF_XLSTM_BACKEND` overrides "auto". Raises ValueError for an unknown backend and RuntimeError for one that cannot
    do what it is asked to.
    """
    asked = "asked for by `backend`"
    if backend == "auto" and "HF_XLSTM_BACKEND" in os.environ:
        backend, asked = os.environ["HF_XLSTM_BACKEND"], "asked for by HF_XLSTM_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend in ("torch", "reference"):
        return backend, asked
    if backend == "auto" and q.device.type != "cuda":
        return "torch", f"the fastest on {q.device.type}"
    reason = _triton_unsupported(op, q, v)
    if reason is None:
        return "triton", "the fastest on cuda"
    if backend == "triton":
        raise RuntimeError(f"The triton backend cannot run {op}: {reason}.")
    _warn_once(f"{op} runs on the torch backend: {reason}.")
    return "torch", reason


def _implementation(op: str, backend: str, q: torch.Tensor, v: torch.Tensor):
    backend, _ = backend_and_reason(op, backend, q, v)
    if backend == "triton":
        return getattr(_triton_module(op), f"{op}_triton")
    return _IMPLEMENTATIONS[op, backend]


def _triton_unsupported(op: str, q: torch.Tensor, v: torch.Tensor) -> str | None:
    module = _triton_module(op)
    if isinstance(module, ImportError):
        return f"its Triton kernels cannot be imported ({module}); pip install hf-xlstm[cuda]"
    return module.unsupported_reason(q, v)


@functools.cache
def _triton_module(op: str):
    """The launchers, imported when first needed, or the error that says why they cannot be."""
    try:
        if op.startswith("mlstm"):
            from . import mlstm_triton as module
        else:
            from . import slstm_triton as module
    except ImportError as error:
        return error
    return module


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _mlstm_step_reference(q, k, v, igate, fgate, state, *, inplace, **options):
    inputs = (x.unsqueeze(1) for x in (q, k, v, igate, fgate))
    h, new_state = mlstm_recurrent(*inputs, initial_state=state, output_final_state=True, **options)
    return h.squeeze(1), _stored(new_state, state, inplace)


def _slstm_step_reference(gates, recurrent_weight, bias, state, *, inplace):
    h, new_state = slstm_recurrent(
        gates.unsqueeze(1), recurrent_weight, bias, initial_state=state, output_final_state=True
    )
    return h.squeeze(1), _stored(new_state, state, inplace)


def _stored(new_state, state, inplace: bool):
    if not inplace:
        return new_state
    for old, new in zip(state, new_state, strict=True):
        old.copy_(new)
    return state


_IMPLEMENTATIONS = {
    ("mlstm", "reference"): mlstm_recurrent,
    ("mlstm", "torch"): mlstm_chunkwise,
    ("mlstm_step", "reference"): _mlstm_step_reference,
    ("mlstm_step", "torch"): mlstm_step_torch,
    ("slstm", "reference"): slstm_recurrent,
    ("slstm", "torch"): slstm_torch,
    ("slstm_step", "reference"): _slstm_step_reference,
    ("slstm_step", "torch"): slstm_step_torch,
}


def _mlstm_state_shapes(rows: int, heads: int, key_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
    return {"c": (rows, heads, key_dim, value_dim), "n": (rows, heads, key_dim), "m": (rows, heads)}


def _slstm_state_shapes(rows: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("h", "c", "n", "m"), (rows, heads, head_dim))


def _check(name: str, x: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(x.shape)}.")
    if x.device != device:
        raise ValueError(f"`{name}` must be on {device} like the other inputs, got {x.device}.")


def _check_floating(name: str, x: torch.Tensor, dims: int, layout: str) -> None:
    if x.ndim != dims:
        raise ValueError(f"`{name}` must have shape {layout}, got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise ValueError(f"`{name}` must have a floating dtype, got {x.dtype}.")
    if 0 in x.shape:
        raise ValueError(f"`{name}` must have no empty dimension, got {tuple(x.shape)}.")


def _check_mlstm(q, k, v, igate, fgate, sequence: bool) -> None:
    time = ", T" if sequence else ""
    _check_floating("q", q, 3 + sequence, f"(B{time}, H, K)")
    _check_floating("v", v, 3 + sequence, f"(B{time}, H, V)")
    _check("k", k, q.shape, q.device)
    _check("v", v, (*q.shape[:-1], v.shape[-1]), q.device)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"`{name}` must have the dtype of `q`, {q.dtype}, got {x.dtype}.")
    for name, x in (("igate", igate), ("fgate", fgate)):
        _check(name, x, q.shape[:-1], q.device)
        if not x.is_floating_point():
            raise ValueError(f"`{name}` must have a floating dtype, got {x.dtype}.")


def _check_slstm(gates, recurrent_weight, bias, sequence: bool) -> None:
    _check_floating("gates", gates, 4 + sequence, f"(B{', T' if sequence else ''}, 4, H, D)")
    if gates.shape[-3] != 4:
        raise ValueError(f"`gates` must hold the 4 gates i, f, z, o in dimension -3, got {tuple(gates.shape)}.")
    heads, head_dim = gates.shape[-2:]
    for name, x, shape in (
        ("recurrent_weight", recurrent_weight, (4, heads, head_dim, head_dim)),
        ("bias", bias, (4, heads, head_dim)),
    ):
        _check(name, x, shape, gates.device)
        if not x.is_floating_point():
            raise ValueError(f"`{name}` must have a floating dtype, got {x.dtype}.")


def _check_sequence(x: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> int:
    """Checks mask and bounds; returns the number of state rows."""
    batch, length = x.shape[:2]
    if mask is not None:
        _check("mask", mask, (batch, length), x.device)
        if mask.dtype != torch.bool:
            raise ValueError(f"`mask` must have dtype torch.bool, got {mask.dtype}.")
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(f"`cu_seqlens` packs sequences into one row: B must be 1, got {batch}.")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"`cu_seqlens` must be an int tensor of shape (N + 1,), got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}."
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"`cu_seqlens` must be on {x.device} like the other inputs, got {cu_seqlens.device}.")
    if not torch.compiler.is_compiling():  # the values cannot be looked at while tracing
        _check_bounds(cu_seqlens, length)
    return cu_seqlens.shape[0] - 1


def _check_bounds(cu_seqlens: torch.Tensor, length: int) -> None:
    """Looks at the values once, not in every layer that gets the same tensor: on a GPU that means to wait for it."""
    seen = (length, 0 if cu_seqlens.is_inference() else cu_seqlens._version)
    if getattr(cu_seqlens, "_bounds_seen", None) == seen:
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"`cu_seqlens` must rise from 0 to T = {length}, got {bounds}.")
    cu_seqlens._bounds_seen = seen


def _check_state(state, shapes: dict[str, tuple[int, ...]], name: str, x: torch.Tensor) -> None:
    if not isinstance(state, tuple) or len(state) != len(shapes):
        raise ValueError(f"`{name}` must be a tuple ({', '.join(shapes)}), got {type(state).__name__}.")
    for (part, shape), tensor in zip(shapes.items(), state):
        _check(f"{name} {part}", tensor, shape, x.device)
        if tensor.dtype != gate_dtype(x.dtype):
            raise ValueError(f"`{name} {part}` must have dtype {gate_dtype(x.dtype)}, got {tensor.dtype}.")
