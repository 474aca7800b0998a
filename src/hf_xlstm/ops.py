"""The two cells of xLSTM as functions: `mlstm`, `mlstm_step`, `slstm`, `slstm_step`.

Each checks its arguments and hands them to one of three implementations with the same signature: the reference (the
definition, slow), torch (fast on every device) or triton (CUDA). Models call these and never know which one runs.
"""

import torch

from .cells.checks import (
    check_inplace,
    check_mlstm,
    check_sequence,
    check_slstm,
    check_state,
    check_state_indices,
    mlstm_state_shapes,
    slstm_state_shapes,
)
from .cells.dispatch import BACKENDS, backend_and_reason, implementation
from .cells.mlstm.reference import MLSTMState
from .cells.numerics import stored
from .cells.slstm.reference import SLSTMState


__all__ = ["BACKENDS", "backend_and_reason", "mlstm", "mlstm_step", "slstm", "slstm_step"]


def mlstm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    *,
    initial_state: MLSTMState | None = None,
    output_final_state: bool = False,
    inplace: bool = False,
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
        initial_state: c (B, H, K, V), n (B, H, K), m (B, H) in float32 (float64 for float64 input), left alone unless
            `inplace`; absent means zeros. The scale is on q: c and n are unscaled.
        output_final_state: also return the state after the last token.
        inplace: writes the final state into the tensors of `initial_state`, which must then be given; for inference.
        mask: (B, T) bool. At False the state stays as it is and the output is 0.
        cu_seqlens: (N + 1,) int, the bounds of N packed sequences, B = 1; states then have N rows.
        scale: factor on q, default K ** -0.5.
        chunk_size: tokens per chunk on the torch backend, chosen from the shape by default. No effect on results.
        backend: "auto" | "triton" | "torch" | "reference".

    One token that continues a state takes the step that is made for it.

    Returns:
        h (B, T, H, V) in v's dtype, and the final state or None. Gradients reach all floating inputs and c, n of the
        initial state, from h and from c, n of the final one. m only fixes the scale in which c and n are stored (c e^m
        and n e^m are what they mean), so no gradient passes through it.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    check_mlstm(q, k, v, igate, fgate, sequence=True)
    heads, key_dim = q.shape[2:]
    rows = check_sequence(q, mask, cu_seqlens)
    if initial_state is not None:
        check_state(initial_state, mlstm_state_shapes(rows, heads, key_dim, v.shape[-1]), "initial_state", q)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    check_inplace(inplace, initial_state)
    scale = key_dim**-0.5 if scale is None else scale
    if _is_one_step(q, initial_state, mask, cu_seqlens):
        step = implementation("mlstm_step", backend, q, v)
        inputs = (x.squeeze(1) for x in (q, k, v, igate, fgate))
        h, state = step(*inputs, initial_state, scale=scale, eps=eps, inplace=inplace)
        return h.unsqueeze(1), state if output_final_state else None
    h, state = implementation("mlstm", backend, q, v)(
        q,
        k,
        v,
        igate,
        fgate,
        initial_state=initial_state,
        output_final_state=output_final_state or inplace,
        mask=mask,
        cu_seqlens=cu_seqlens,
        scale=scale,
        eps=eps,
        chunk_size=chunk_size,
    )
    state = stored(state, initial_state, inplace)  # type: ignore[arg-type]
    return h, state if output_final_state else None


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
    state_indices: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, MLSTMState]:
    """One step of `mlstm`.

    Args:
        q, k, v, igate, fgate, scale, eps, backend: as for `mlstm`, without T.
        state: c, n, m as for `mlstm`.
        inplace: writes the new state into the given tensors.
        state_indices: (B,) int, all different. The state tensors are then pools with any number of slots as first
            dimension, at any distance in memory, and row b reads and writes slot state_indices[b] in place. A negative
            index is padding: no slot is read or written for that row, and its output is 0.

    Returns:
        h (B, H, V) in v's dtype, and the new state.

    Raises:
        ValueError: as for `mlstm`; `state_indices` without `inplace`.
    """
    check_mlstm(q, k, v, igate, fgate, sequence=False)
    batch, heads, key_dim = q.shape
    rows = check_state_indices(state_indices, batch, state, inplace, q)
    check_state(state, mlstm_state_shapes(rows, heads, key_dim, v.shape[-1]), "state", q)
    scale = key_dim**-0.5 if scale is None else scale
    step = implementation("mlstm_step", backend, q, v)
    return step(q, k, v, igate, fgate, state, scale=scale, eps=eps, inplace=inplace, state_indices=state_indices)


def slstm(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    initial_state: SLSTMState | None = None,
    output_final_state: bool = False,
    inplace: bool = False,
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
        output_final_state, inplace, mask, cu_seqlens, backend: as for `mlstm`.

    Returns:
        h (B, T, H, D) in the dtype of `gates`, and the final state or None. Gradients reach gates, recurrent_weight,
        bias and h, c, n of the initial state.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    check_slstm(gates, recurrent_weight, bias, sequence=True)
    rows = check_sequence(gates, mask, cu_seqlens)
    if initial_state is not None:
        check_state(initial_state, slstm_state_shapes(rows, *gates.shape[3:]), "initial_state", gates)
    check_inplace(inplace, initial_state)
    if _is_one_step(gates, initial_state, mask, cu_seqlens):
        step = implementation("slstm_step", backend, gates)
        h, state = step(gates.squeeze(1), recurrent_weight, bias, initial_state, inplace=inplace)
        return h.unsqueeze(1), state if output_final_state else None
    h, state = implementation("slstm", backend, gates)(
        gates,
        recurrent_weight,
        bias,
        initial_state=initial_state,
        output_final_state=output_final_state or inplace,
        mask=mask,
        cu_seqlens=cu_seqlens,
    )
    state = stored(state, initial_state, inplace)  # type: ignore[arg-type]
    return h, state if output_final_state else None


def slstm_step(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    state: SLSTMState,
    *,
    inplace: bool = False,
    state_indices: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, SLSTMState]:
    """One step of `slstm`: gates (B, 4, H, D), h (B, H, D); `inplace` and `state_indices` as for `mlstm_step`."""
    check_slstm(gates, recurrent_weight, bias, sequence=False)
    rows = check_state_indices(state_indices, gates.shape[0], state, inplace, gates)
    check_state(state, slstm_state_shapes(rows, *gates.shape[2:]), "state", gates)
    step = implementation("slstm_step", backend, gates)
    return step(gates, recurrent_weight, bias, state, inplace=inplace, state_indices=state_indices)


def _is_one_step(x: torch.Tensor, state: tuple | None, mask, cu_seqlens) -> bool:
    """Whether x (B, T, ...) is one token that continues a state. A symbolic length is not: one graph serves all."""
    length = x.shape[1]
    return isinstance(length, int) and length == 1 and state is not None and mask is None and cu_seqlens is None
