"""The mLSTM cell as the paper writes it: one step after another, in plain PyTorch (Beck et al. 2024, eq. 19-27).

This is the definition. Every faster implementation in this folder has the signature of `mlstm_recurrent` and is tested
against it in float64. Dimension letters: B batch, T time, H heads, K query/key head dim, V value head dim.
"""

from functools import partial

import torch

from ..numerics import gate_dtype, log_forget_gate, one_after_another, stored
from ..slots import step_in_slots


MLSTMState = tuple[torch.Tensor, ...]  # c (B, H, K, V), n (B, H, K), m (B, H)


def zero_mlstm_state(q: torch.Tensor, v: torch.Tensor, batch_size: int) -> MLSTMState:
    """The state before the first token: c = n = m = 0. The 0 of m is a real one, it enters the maximum."""
    dtype = gate_dtype(q.dtype)
    heads, key_dim, value_dim = q.shape[-2], q.shape[-1], v.shape[-1]
    return (
        q.new_zeros(batch_size, heads, key_dim, value_dim, dtype=dtype),
        q.new_zeros(batch_size, heads, key_dim, dtype=dtype),
        q.new_zeros(batch_size, heads, dtype=dtype),
    )


def stabilizer(kept: torch.Tensor, igate: torch.Tensor) -> torch.Tensor:
    """m_t = max(log f_t + m_{t-1}, i_t): any value serves that keeps exponents <= 0, so it carries no gradient.

    Kept finite: with both gates at -inf the state is empty, and -inf - -inf must not arise. Of the dtype of igate.
    """
    return torch.maximum(kept, igate).detach().to(igate.dtype).clamp_min(torch.finfo(igate.dtype).min / 4)


def mlstm_recurrent_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    state: MLSTMState,
    *,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, MLSTMState]:
    """One step. q, k (B, H, K), v (B, H, V), gates (B, H); returns h (B, H, V) in the state's dtype and the new state.

    m_t = max(log f_t + m_{t-1}, i_t),  f' = exp(log f_t + m_{t-1} - m_t),  i' = exp(i_t - m_t)
    C_t = f' C_{t-1} + i' k_t v_t^T,    n_t = f' n_{t-1} + i' k_t
    h_t = C_t^T q_t / (max(|n_t^T q_t|, exp(-m_t)) + eps)         with q_t = scale * q
    """
    c, n, m = state
    q, k, v, igate, fgate = (x.to(c.dtype) for x in (q, k, v, igate, fgate))
    kept = log_forget_gate(fgate) + m.detach().double()  # next to an m of 1e5, float32 would lose log f
    m_new = stabilizer(kept, igate)
    # above 0 by what m_new was rounded by; far beyond the range of gates that may be more than exp can hold
    f = torch.exp((kept - m_new).clamp_max(1).to(m.dtype))
    i = torch.exp(igate - m_new)
    c = f[..., None, None] * c + (i[..., None] * k)[..., None] * v[..., None, :]
    n = f[..., None] * n + i[..., None] * k
    q = q * scale
    denominator = torch.maximum((n * q).sum(-1).abs(), torch.exp(-m_new)) + eps
    h = torch.einsum("bhk,bhkv->bhv", q, c) / denominator[..., None]
    return h, (c, n, m_new)


def mlstm_recurrent(
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
    scale: float,
    eps: float,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, MLSTMState | None]:
    """The sequence, token by token; shapes as in `hf_xlstm.ops.mlstm`. `chunk_size` has no meaning here."""
    if cu_seqlens is not None:
        run = partial(mlstm_recurrent, scale=scale, eps=eps)
        states = zero_mlstm_state(q, v, cu_seqlens.shape[0] - 1) if initial_state is None else initial_state
        h, final_state = one_after_another(run, (q, k, v, igate, fgate), states, mask, cu_seqlens)
        return h, final_state if output_final_state else None
    state = zero_mlstm_state(q, v, q.shape[0]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        h, new_state = mlstm_recurrent_step(
            q[:, t], k[:, t], v[:, t], igate[:, t], fgate[:, t], state, scale=scale, eps=eps
        )
        if mask is not None:
            keep = mask[:, t, None]
            h = torch.where(keep[..., None], h, 0)
            new_state = tuple(
                torch.where(keep.view(*keep.shape, *[1] * (new.ndim - 2)), new, old)
                for new, old in zip(new_state, state)
            )
        state = new_state
        outputs.append(h)
    return torch.stack(outputs, dim=1).to(v.dtype), state if output_final_state else None


def mlstm_step_reference(q, k, v, igate, fgate, state, *, scale, eps, inplace=False, state_indices=None):
    """One step; shapes as in `hf_xlstm.ops.mlstm_step`."""
    if state_indices is not None:
        step = partial(mlstm_step_reference, scale=scale, eps=eps)
        return step_in_slots(step, (q, k, v, igate, fgate), state, state_indices)
    h, new_state = mlstm_recurrent_step(q, k, v, igate, fgate, state, scale=scale, eps=eps)
    return h.to(v.dtype), stored(new_state, state, inplace)
