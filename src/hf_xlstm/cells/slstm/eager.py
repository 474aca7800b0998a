"""The sLSTM in PyTorch: a sequence with its own backward pass, and one step for decoding.

The equations are those of reference.py with another stabilizer, m_t = log(exp(log f_t + m_{t-1}) + exp(i_t))
instead of the maximum. Then n = 1 throughout, c is a running average and m the logarithm of its total weight:

    u_t = i_t - (log f_t + m_{t-1}),    m_t = logaddexp(log f_t + m_{t-1}, i_t)
    c_t = f' c_{t-1} + i' tanh(z_t),    h_t = sigmoid(o_t) c_t                  i' = sigmoid(u_t), f' = sigmoid(-u_t)

An empty state is m = -inf, no special case. m is float64 from step to step: next to an m of 1e5, float32 could not
tell tokens apart that compete. A final state has an m of the gate dtype, and in n what the rounding has left. A step
takes half the operations of the reference, and the backward pass needs u, log f, tanh(z), sigmoid(o) and c, nothing
else.

The loop over time is plain Python: each step waits for its matrix product, which takes longer than calling the dozen
operations around it. Traced by a compiler, the loop would be unrolled anew for every length, so forward and backward
passes are custom ops.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._higher_order_ops.scan import scan
from torch.utils.flop_counter import register_flop_formula

from .. import NAMESPACE
from ..numerics import first_derivatives_only, stored, without_autocast
from ..slots import step_in_slots
from .reference import SLSTMState, slstm_cell, zero_slstm_state


# Steps whose backward coefficients are computed at once: enough to amortise the calls, few enough to stay in cache.
TILE = 64


class Schedule(NamedTuple):
    """Which token each sequence reads at each step.

    A masked token leaves the whole state alone, as if it were absent. So a sequence consists of the unmasked tokens of
    a row, or of a document in a packed row. Sequences are ranked by length, the longest first, and tokens ordered by
    step, then rank: step t reads one contiguous block of tokens, and writes the states of the first sizes[t] ranks.
    Buffers of states have one more block in front, the N initial states.
    """

    order: torch.Tensor  # (B T,) tokens by step and rank; the masked ones at the end
    sizes: list[int]  # sequences that take step t
    sequence: torch.Tensor  # (N,) the sequence of each rank
    rank: torch.Tensor  # (N,) the rank of each sequence
    lengths: torch.Tensor  # (N,) steps of each sequence
    before: torch.Tensor  # (steps,) place of the state before each step, in a buffer of states
    last: torch.Tensor  # (N,) place of the final state of each sequence


def _schedule(x: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> Schedule:
    """The schedule of x (B, T, ...)."""
    B, T = x.shape[:2]
    token = torch.arange(B * T, device=x.device)
    if cu_seqlens is None:
        N, sequence = B, token // T
    else:
        N, sequence = cu_seqlens.shape[0] - 1, torch.repeat_interleave(cu_seqlens.diff())
    masked = token[:0]
    if mask is not None:
        keep = mask.flatten()
        token, masked, sequence = token[keep], token[~keep], sequence[keep]
    lengths = sequence.bincount(minlength=N)
    step = torch.arange(token.shape[0], device=x.device) - (lengths.cumsum(0) - lengths)[sequence]
    by_rank = lengths.argsort(descending=True)
    rank = by_rank.argsort()
    sizes = step.bincount()
    blocks = torch.cat([sizes.new_tensor([0, N]), sizes]).cumsum(0)  # where each block of states starts
    order = (step * N + rank[sequence]).argsort()
    before = (blocks[step] + rank[sequence])[order]
    order = torch.cat([token[order], masked])
    return Schedule(order, sizes.tolist(), by_rank, rank, lengths, before, last=blocks[lengths] + rank)


def _stacked(recurrent_weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(H, 4 D_out, D_in): one product per head serves the four gates."""
    return recurrent_weight.to(dtype).transpose(0, 1).flatten(1, 2)


@torch.library.custom_op(f"{NAMESPACE}::slstm_torch", mutates_args=())
def _forward(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    n0: torch.Tensor,
    m0: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, the final state h, c, n, m, and for the backward pass, in the order of the schedule: x (B T, 4, H, D) with u,
    log f, tanh(z), sigmoid(o), and c (N + B T, H, D)."""
    B, T, _, H, D = gates.shape
    N, dtype = h0.shape[0], h0.dtype
    schedule = _schedule(gates, mask, cu_seqlens)
    order, sizes, sequence = schedule.order, schedule.sizes, schedule.sequence
    steps, blocks = sum(sizes), [N, *sizes]
    weight = _stacked(recurrent_weight, dtype).mT

    x = gates.flatten(0, 1).index_select(0, order).to(dtype).add_(bias)
    x[:, 0].clamp_min_(torch.finfo(dtype).min)  # see slstm_cell
    h, c = (x.new_zeros(N + B * T, H, D) for _ in range(2))
    h[:N] = h0[sequence]
    c[:N] = torch.where(n0 == 0, 0, c0 / n0)[sequence]
    m = (m0.double() + n0.log())[sequence]

    h_blocks, c_blocks = (s[: N + steps].split(blocks) for s in (h, c))
    with without_autocast(gates.device):
        for t, x_t in enumerate(x[:steps].split(sizes)):
            size = sizes[t]
            recurrent = torch.bmm(h_blocks[t][:size].transpose(0, 1), weight)  # (H, size, 4 D)
            x_t.add_(recurrent.view(H, size, 4, D).permute(1, 2, 0, 3))
            i, f, z, o = x_t.unbind(1)
            m_t, c_t, h_t = m[:size], c_blocks[t + 1], h_blocks[t + 1]
            F.logsigmoid(f, out=f)  # type: ignore[call-arg]  # an argument that the declaration lacks
            kept = f + m_t
            torch.logaddexp(kept, i, out=m_t)
            u = i.sub_(kept)
            torch.lerp(c_blocks[t][:size], z.tanh_(), u.sigmoid(), out=c_t)
            torch.mul(o.sigmoid_(), c_t, out=h_t)

    output = torch.empty(B * T, H, D, dtype=gates.dtype, device=gates.device)
    output[order] = h[N:].to(gates.dtype)
    unchanged = (schedule.lengths == 0)[:, None, None]
    m = m[schedule.rank]
    m_final = torch.where(unchanged, m0, m.to(dtype))
    n_final = torch.where(unchanged, n0, torch.exp(m - m_final).to(dtype))
    final_state = h[schedule.last], torch.where(unchanged, c0, c[schedule.last] * n_final), n_final, m_final
    return output.view(B, T, H, D), *final_state, x, c


@_forward.register_fake
def _(gates, recurrent_weight, bias, h0, c0, n0, m0, mask, cu_seqlens):
    B, T, _, H, D = gates.shape
    saved = h0.new_empty(B * T, 4, H, D), h0.new_empty(h0.shape[0] + B * T, H, D)
    return gates.new_empty(B, T, H, D), *(torch.empty_like(s) for s in (h0, c0, n0, m0)), *saved


@torch.library.custom_op(f"{NAMESPACE}::slstm_torch_backward", mutates_args=())
def _backward(
    dh: torch.Tensor,
    dh_final: torch.Tensor,
    dc_final: torch.Tensor,
    dn_final: torch.Tensor,
    recurrent_weight: torch.Tensor,
    h0: torch.Tensor,
    n0: torch.Tensor,
    n_final: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    h: torch.Tensor,
    x: torch.Tensor,
    c: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of gates, recurrent weight, bias and the initial h, c, n. m is held constant: it cancels. With dh, dc,
    dn complete at step t, where n = 1,

        dc += dh o,                  dn -= dh h,                           do~ = dh h (1 - o)
        di~ = i' (z dc + dn),        df~ = f' (c_{t-1} dc + dn) (1 - f),   dz~ = i' (1 - z^2) dc
        dh_{t-1} += R^T dx,          dc_{t-1} = f' dc,                     dn_{t-1} = f' dn
    """
    B, T, H, D = h.shape
    N, dtype = h0.shape[0], h0.dtype
    schedule = _schedule(h, mask, cu_seqlens)
    order, sizes, sequence, rank = schedule.order, schedule.sizes, schedule.sequence, schedule.rank
    steps, blocks = sum(sizes), [N, *sizes]
    weight = _stacked(recurrent_weight, dtype)

    def in_order(y):  # (B, T, H, D) to (B T, H, D)
        return y.flatten(0, 1).index_select(0, order).to(dtype)

    h_before = torch.cat([h0[sequence], in_order(h)])[schedule.before]
    dh = torch.cat([torch.zeros_like(h0), in_order(dh)])
    dh.index_add_(0, schedule.last, dh_final)
    dh_blocks = dh[: N + steps].split(blocks)
    # the last c and n = 1 came out times n_final, except where no step was taken and c0, n0 themselves came out
    idle = (schedule.lengths == 0)[:, None, None]
    n_final = torch.where(idle, 1, n_final)
    dcn = torch.stack([dc_final * n_final, dn_final * n_final], dim=1)[sequence]  # (N, 2, H, D)
    dx = torch.zeros_like(x)

    with without_autocast(h.device):
        end = steps
        for first in reversed(range(0, len(sizes), TILE)):
            tile_sizes = sizes[first : first + TILE]
            tile = slice(end - sum(tile_sizes), end)
            u, log_f, z, o = x[tile].unbind(1)
            c_before, c_after = c[schedule.before[tile]], c[N:][tile]
            i, f = u.sigmoid(), u.neg().sigmoid()
            f_slope = f * log_f.expm1().neg_()
            tile_blocks = (
                dx[tile],
                f[:, None],
                o * (1 - o) * c_after,
                torch.stack([o, -o * c_after], dim=1),
                torch.stack([i * z, f_slope * c_before, i * (1 - z * z)], dim=1),
                torch.stack([i, f_slope], dim=1),
            )
            tile_blocks = zip(*(y.split(tile_sizes) for y in tile_blocks), strict=True)
            for t, (dx_t, f_t, o_slope, h_to_cn, c_to_ifz, n_to_if) in reversed(list(enumerate(tile_blocks, first))):
                size, dh_t = sizes[t], dh_blocks[t + 1]
                dcn_t = dcn[:size]
                dc_t, dn_t = dcn_t.split(1, dim=1)
                dcn_t.addcmul_(dh_t[:, None], h_to_cn)
                torch.mul(dc_t, c_to_ifz, out=dx_t[:, :3])
                dx_t[:, :2].addcmul_(dn_t, n_to_if)
                torch.mul(dh_t, o_slope, out=dx_t[:, 3])
                dcn_t.mul_(f_t)
                recurrent = torch.bmm(dx_t.permute(2, 0, 1, 3).reshape(H, size, 4 * D), weight)
                dh_blocks[t][:size].add_(recurrent.transpose(0, 1))
            end = tile.start
        d_weight = torch.einsum("tgho,thi->ghoi", dx[:steps], h_before).contiguous()  # as the fake kernel says

    d_bias = dx.sum(0)
    d_gates = torch.empty(x.shape, dtype=h.dtype, device=h.device)
    d_gates[order] = dx.to(h.dtype)
    # c0 / n0 went in
    scale = torch.where(idle, 1, torch.where(n0 == 0, 0, 1 / n0))
    dc0, dn0 = (d[rank] * scale for d in dcn.unbind(1))
    return d_gates.view(B, T, 4, H, D), d_weight, d_bias, dh[rank], dc0, dn0


@_backward.register_fake
def _(dh, dh_final, dc_final, dn_final, recurrent_weight, h0, n0, n_final, mask, cu_seqlens, h, x, c):
    B, T, H, D = h.shape
    d_parameters = h0.new_empty(4, H, D, D), h0.new_empty(4, H, D)
    return h.new_empty(B, T, 4, H, D), *d_parameters, *(torch.empty_like(h0) for _ in range(3))


class _SLSTM(torch.autograd.Function):
    """The operator with its gradient, for autograd and the transforms of `torch.func`."""

    @staticmethod
    def forward(gates, recurrent_weight, bias, h0, c0, n0, m0, mask, cu_seqlens):
        return _forward(gates, recurrent_weight, bias, h0, c0, n0, m0, mask, cu_seqlens)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, recurrent_weight, _, h0, _, n0, _, mask, cu_seqlens = inputs
        h, _, _, n_final, m, x, c = output
        ctx.save_for_backward(recurrent_weight, h0, n0, n_final, mask, cu_seqlens, h, x, c)
        ctx.mark_non_differentiable(m, x, c)
        ctx.set_materialize_grads(False)  # zeros as gradients of x and c would cost as much memory as x and c

    @staticmethod
    def backward(ctx, dh, dh_final, dc_final, dn_final, *_):
        saved = ctx.saved_tensors  # read once: checkpointing hands them out only once
        _, h0, _, _, _, _, h, _, _ = saved
        dh = torch.zeros_like(h) if dh is None else dh
        d_final = (torch.zeros_like(h0) if d is None else d for d in (dh_final, dc_final, dn_final))
        return *_SLSTMGradient.apply(dh, *d_final, *saved), None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(_SLSTM.apply, info, in_dims, inputs)


class _SLSTMGradient(torch.autograd.Function):
    """The gradient operator, whose own gradient is refused."""

    @staticmethod
    def forward(dh, dh_final, dc_final, dn_final, recurrent_weight, h0, n0, n_final, mask, cu_seqlens, h, x, c):
        final = dh_final, dc_final, dn_final
        return _backward(dh, *final, recurrent_weight, h0, n0, n_final, mask, cu_seqlens, h, x, c)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        first_derivatives_only("slstm", "torch")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _one_by_one(_SLSTMGradient.apply, info, in_dims, inputs)


def _one_by_one(apply: Callable, info, in_dims: tuple[int | None, ...], inputs: tuple):
    """`vmap` of the Functions above: its rows run one after another, since each may have a mask and weights of its
    own, and wants the gradient of its weights."""
    rows = [
        apply(*(x if dim is None else x.select(dim, row) for x, dim in zip(inputs, in_dims, strict=True)))
        for row in range(info.batch_size)
    ]
    return tuple(torch.stack(x) for x in zip(*rows, strict=True)), 0


@register_flop_formula(_forward._opoverload.overloadpacket)
def _flops(gates_shape, *_, out_shape=None, **kwargs) -> int:
    """Two for every number of the recurrent weights, token and row."""
    B, T, gates, H, D = gates_shape
    return 2 * B * T * gates * H * D * D


@register_flop_formula(_backward._opoverload.overloadpacket)
def _backward_flops(dh_shape, *_, out_shape=None, **kwargs) -> int:
    """Twice as many: the gradients of h and of the weight."""
    B, T, H, D = dh_shape
    return 4 * B * T * 4 * H * D * D


def slstm_torch(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    initial_state: SLSTMState | None = None,
    output_final_state: bool = False,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, SLSTMState | None]:
    """The sequence; shapes as in `hf_xlstm.ops.slstm`."""
    if initial_state is None:
        initial_state = zero_slstm_state(gates, gates.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    if torch.compiler.is_exporting():
        h, final_state = _exported(gates, recurrent_weight, bias, initial_state, mask, cu_seqlens)
        return h, final_state if output_final_state else None
    h, *final_state, _, _ = _SLSTM.apply(gates, recurrent_weight, bias, *initial_state, mask, cu_seqlens)
    return h, tuple(final_state) if output_final_state else None


def _exported(gates, recurrent_weight, bias, state: SLSTMState, mask, cu_seqlens) -> tuple[torch.Tensor, SLSTMState]:
    """The sequence as a loop that is part of the graph, `torch.scan`: what runs an exported graph knows no operator of
    ours. The length may be any from 1 on if the example has more than one token."""
    if cu_seqlens is not None:
        raise NotImplementedError("`slstm` cannot be exported with `cu_seqlens`: export rows of a batch instead.")
    keep = gates.new_ones(gates.shape[:2], dtype=torch.bool) if mask is None else mask
    gates_and_keep = gates.transpose(0, 1), keep.transpose(0, 1)[..., None, None]

    def step(state: SLSTMState, token: tuple[torch.Tensor, torch.Tensor]) -> tuple[SLSTMState, torch.Tensor]:
        gates, keep = token
        _, new = slstm_step_torch(gates, recurrent_weight, bias, state)
        new = tuple(torch.where(keep, x, y).contiguous() for x, y in zip(new, state, strict=True))  # strides as before
        return new, torch.where(keep, new[0], 0)

    # the zeros before the first token are parts of one tensor, but a loop's states must not share memory
    state = tuple(x.clone(memory_format=torch.contiguous_format) for x in state)
    final_state, h = scan(step, state, gates_and_keep, dim=0)
    return h.transpose(0, 1).to(gates.dtype), tuple(final_state)


def slstm_step_torch(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    state: SLSTMState,
    *,
    inplace: bool = False,
    state_indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, SLSTMState]:
    """One step; shapes as in `hf_xlstm.ops.slstm_step`.

    The weight is used as it is stored, one product per gate and head: rearranging it would cost more than the product.
    """
    if state_indices is not None:

        def step(gates, state, inplace=False):
            return slstm_step_torch(gates, recurrent_weight, bias, state, inplace=inplace)

        return step_in_slots(step, (gates,), state, state_indices)
    B, _, H, D = gates.shape
    h, dtype = state[0], state[0].dtype
    h_per_gate = h.transpose(0, 1).expand(4, H, B, D).flatten(0, 1)
    with without_autocast(gates.device):
        recurrent = torch.bmm(h_per_gate, recurrent_weight.to(dtype).flatten(0, 1).mT)
    x = recurrent.view(4, H, B, D).permute(2, 0, 1, 3) + gates.to(dtype) + bias.to(dtype)
    new_state = slstm_cell(x, state)
    return new_state[0].to(gates.dtype), stored(new_state, state, inplace)
