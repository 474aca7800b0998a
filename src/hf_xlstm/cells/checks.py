"""Checks of the arguments of the operators: every message names the argument, what is expected and what was given."""

import torch

from .numerics import gate_dtype, is_readable


def mlstm_state_shapes(rows: int, heads: int, key_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
    return {"c": (rows, heads, key_dim, value_dim), "n": (rows, heads, key_dim), "m": (rows, heads)}


def slstm_state_shapes(rows: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("h", "c", "n", "m"), (rows, heads, head_dim))


def _check(name: str, x: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if x.shape != shape:
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


def check_mlstm(q, k, v, igate, fgate, sequence: bool) -> None:
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


def check_slstm(gates, recurrent_weight, bias, sequence: bool) -> None:
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


def check_sequence(x: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> int:
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
    check_bounds(cu_seqlens, length)
    return cu_seqlens.shape[0] - 1


def check_bounds(cu_seqlens: torch.Tensor, length: int) -> None:
    """Checks the values of `cu_seqlens`. Reading them from a GPU in every layer would mean to wait for it every time:
    there the device checks them itself, and ends the program if they are wrong, while Python goes on."""
    if not is_readable(cu_seqlens):
        return
    message = f"`cu_seqlens` must rise from 0 to T = {length}"
    if not cu_seqlens.is_cpu:
        rising = (cu_seqlens.diff() >= 0).all()
        torch._assert_async((cu_seqlens[0] == 0) & (cu_seqlens[-1] == length) & rising, message)
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"{message}, got {bounds}.")


def check_state(state, shapes: dict[str, tuple[int, ...]], name: str, x: torch.Tensor) -> None:
    if not isinstance(state, tuple) or len(state) != len(shapes):
        raise ValueError(f"`{name}` must be a tuple ({', '.join(shapes)}), got {type(state).__name__}.")
    for (part, shape), tensor in zip(shapes.items(), state):
        _check(f"{name} {part}", tensor, shape, x.device)
        if tensor.dtype != gate_dtype(x.dtype):
            raise ValueError(f"`{name} {part}` must have dtype {gate_dtype(x.dtype)}, got {tensor.dtype}.")


def check_inplace(inplace: bool, initial_state: tuple | None) -> None:
    if inplace and initial_state is None:
        raise ValueError("`inplace` writes into the tensors of `initial_state`, which must be given.")


def check_state_indices(
    state_indices: torch.Tensor | None, batch: int, state: tuple, inplace: bool, x: torch.Tensor
) -> int:
    """Checks the slots of a step; returns the number of state rows. Their values are looked at on a CPU only."""
    if state_indices is None:
        return batch
    if not inplace:
        raise ValueError("`state_indices` names slots that are written to: it needs `inplace=True`.")
    _check("state_indices", state_indices, (batch,), x.device)
    if state_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`state_indices` must have dtype torch.int32 or torch.int64, got {state_indices.dtype}.")
    slots = state[0].shape[0] if isinstance(state, tuple) and state else 0
    if state_indices.is_cpu and is_readable(state_indices):
        used = [index for index in state_indices.tolist() if index >= 0]
        if len(used) != len(set(used)) or any(index >= slots for index in used):
            raise ValueError(f"`state_indices` must be different and less than {slots} slots, got {state_indices}.")
    return slots
