"""The sLSTM cell as the paper writes it: one step after another, in plain PyTorch (Beck et al. 2024, eq. 8-18).

This is the definition. Every faster implementation in this folder has the signature of `slstm_recurrent` and is tested
against it in float64. Dimension letters: B batch, T time, H heads, D head dim. Gates are in the order i, f, z, o.
"""

import torch

from ..numerics import gate_dtype, log_forget_gate, one_after_another, stored, without_autocast
from ..slots import step_in_slots


SLSTMState = tuple[torch.Tensor, ...]  # h, c, n, m, each (B, H, D)


def zero_slstm_state(gates: torch.Tensor, batch_size: int) -> SLSTMState:
    """The state before the first token: h = c = n = m = 0. With n = 0 nothing is stored, and m has no meaning yet."""
    return gates.new_zeros(4, batch_size, *gates.shape[-2:], dtype=gate_dtype(gates.dtype)).unbind()


def slstm_cell(x: torch.Tensor, state: SLSTMState) -> SLSTMState:
    """The new state from the old one and the complete pre-activations x (B, 4, H, D).

        m_t = max(log f_t + m_{t-1}, i_t),  f' = exp(log f_t + m_{t-1} - m_t),  i' = exp(i_t - m_t)
        c_t = f' c_{t-1} + i' tanh(z_t),    n_t = f' n_{t-1} + i',              h_t = sigmoid(o_t) c_t / n_t

    and m_t = i_t where n = 0. m only keeps the exponents <= 0: (c e^a, n e^a, m - a) is the same state for every a. So
    it carries no gradient, and two states are equal when their h, c / n and m + log n are.
    """
    i, f, z, o = x.unbind(1)
    _, c, n, m = state
    i = i.clamp_min(torch.finfo(i.dtype).min)  # -inf may well be asked for, but -inf - -inf must not arise
    log_f = log_forget_gate(f)
    kept = log_f + m.detach().double()  # next to an m of 1e5, float32 would lose what the forget gate takes away
    empty = n == 0
    m_new = torch.where(empty, i, torch.maximum(kept, i)).detach().to(m.dtype)
    f = torch.exp((kept - m_new).to(m.dtype).masked_fill(empty, -torch.inf))
    i = torch.exp(i - m_new)
    c = f * c + i * torch.tanh(z)
    n = f * n + i
    return torch.sigmoid(o) * c / n, c, n, m_new


def slstm_recurrent_step(
    gates: torch.Tensor, recurrent_weight: torch.Tensor, bias: torch.Tensor, state: SLSTMState
) -> tuple[torch.Tensor, SLSTMState]:
    """One step. gates (B, 4, H, D); returns h (B, H, D) in the state's dtype and the new state.

    The pre-activations are those of the input plus R h_{t-1} + b, where R mixes the units of a head.
    """
    gates, recurrent_weight, bias = (x.to(state[0].dtype) for x in (gates, recurrent_weight, bias))
    with without_autocast(gates.device):
        recurrent = torch.einsum("ghoi,bhi->bgho", recurrent_weight, state[0])
    new_state = slstm_cell(gates + recurrent + bias, state)
    return new_state[0], new_state


def slstm_recurrent(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    initial_state: SLSTMState | None = None,
    output_final_state: bool = False,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, SLSTMState | None]:
    """The sequence, token by token; shapes as in `hf_xlstm.ops.slstm`."""
    if cu_seqlens is not None:
        states = zero_slstm_state(gates, cu_seqlens.shape[0] - 1) if initial_state is None else initial_state

        def run(gates, **options):
            return slstm_recurrent(gates, recurrent_weight, bias, **options)

        h, final_state = one_after_another(run, (gates,), states, mask, cu_seqlens)
        return h, final_state if output_final_state else None
    state = zero_slstm_state(gates, gates.shape[0]) if initial_state is None else initial_state
    outputs = []
    for t in range(gates.shape[1]):
        h, new_state = slstm_recurrent_step(gates[:, t], recurrent_weight, bias, state)
        if mask is not None:
            keep = mask[:, t, None, None]
            h = torch.where(keep, h, 0)
            new_state = tuple(torch.where(keep, new, old) for new, old in zip(new_state, state, strict=True))
        state = new_state
        outputs.append(h)
    return torch.stack(outputs, dim=1).to(gates.dtype), state if output_final_state else None


def slstm_step_reference(gates, recurrent_weight, bias, state, *, inplace=False, state_indices=None):
    """One step; shapes as in `hf_xlstm.ops.slstm_step`."""
    if state_indices is not None:

        def step(gates, state, inplace=False):
            return slstm_step_reference(gates, recurrent_weight, bias, state, inplace=inplace)

        return step_in_slots(step, (gates,), state, state_indices)
    h, new_state = slstm_recurrent_step(gates, recurrent_weight, bias, state)
    return h.to(gates.dtype), stored(new_state, state, inplace)
