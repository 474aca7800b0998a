"""The two cells of xLSTM as functions: `mlstm`, `mlstm_step`, `slstm`, `slstm_step`.

Each checks its arguments and hands them to one of three implementations with the same signature: the reference (the
definition, slow), torch (fast on every device) or triton (CUDA). Models call these and never know which one runs.
"""

import torch

from .cells.checks import (
    check_mlstm,
    check_sequence,
    check_slstm,
    check_state,
    mlstm_state_shapes,
    slstm_state_shapes,
)
from .cells.dispatch import BACKENDS, backend_and_reason, implementation
from .cells.mlstm.reference import MLSTMState
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
    check_mlstm(q, k, v, igate, fgate, sequence=True)
    if initial_state is not None and q.shape[1] == 1 and mask is None and cu_seqlens is None and output_final_state:
        inputs = (x.squeeze(1) for x in (q, k, v, igate, fgate))
        h, state = mlstm_step(*inputs, initial_state, scale=scale, eps=eps, inplace=inplace, backend=backend)
        return h.unsqueeze(1), state
    heads, key_dim = q.shape[2:]
    rows = check_sequence(q, mask, cu_seqlens)
    if initial_state is not None:
        check_state(initial_state, mlstm_state_shapes(rows, heads, key_dim, v.shape[-1]), "initial_state", q)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    return implementation("mlstm", backend, q, v)(
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
    check_mlstm(q, k, v, igate, fgate, sequence=False)
    batch, heads, key_dim = q.shape
    check_state(state, mlstm_state_shapes(batch, heads, key_dim, v.shape[-1]), "state", q)
    scale = key_dim**-0.5 if scale is None else scale
    step = implementation("mlstm_step", backend, q, v)
    return step(q, k, v, igate, fgate, state, scale=scale, eps=eps, inplace=inplace)


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
        output_final_state, mask, cu_seqlens, backend: as for `mlstm`.

    Returns:
        h (B, T, H, D) in the dtype of `gates`, and the final state or None. Gradients reach gates, recurrent_weight,
        bias and h, c, n of the initial state.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the argument.
    """
    check_slstm(gates, recurrent_weight, bias, sequence=True)
    if (
        initial_state is not None
        and gates.shape[1] == 1
        and mask is None
        and cu_seqlens is None
        and output_final_state
    ):
        h, state = slstm_step(
            gates.squeeze(1), recurrent_weight, bias, initial_state, inplace=inplace, backend=backend
        )
        return h.unsqueeze(1), state
    rows = check_sequence(gates, mask, cu_seqlens)
    if initial_state is not None:
        check_state(initial_state, slstm_state_shapes(rows, *gates.shape[3:]), "initial_state", gates)
    return implementation("slstm", backend, gates)(
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
    check_slstm(gates, recurrent_weight, bias, sequence=False)
    check_state(state, slstm_state_shapes(gates.shape[0], *gates.shape[2:]), "state", gates)
    return implementation("slstm_step", backend, gates)(gates, recurrent_weight, bias, state, inplace=inplace)
