"""The mLSTM in PyTorch: chunkwise-parallel over a sequence with its own backward pass, and one step for decoding.

`chunkwise.py` shows the algorithm by itself, in 40 lines; here it runs without a loop, and with masks and packing.

A sequence is cut into N chunks of L tokens. Inside a chunk every pair of tokens j <= t has the log weight
D_jt = i_j + log f_{j+1} + ... + log f_t: with its maximum as stabilizer, the chunk is one masked attention. The
states at the boundaries of chunks obey the same formula one level up: chunk j contributes to the state after chunk t
with the log weight r_j + g_{j+1} + ... + g_t, where g is a chunk's summed log f and r the stabilizer of its own
contribution. So all states come from one small matrix product, and no loop runs over chunks or tokens.

Sums of log f and of input gates are kept in two parts, of which one is a whole number: next to a gate of 1e5, float32
could not tell tokens apart that compete. An exactly closed forget gate (log f = -inf) is a reset, not a NaN.

Products run in the input dtype (float32 on processors without bfloat16), except the scores q k^T: they also make up
the normalizer, where they cancel. Gates, states, sums and denominators are float32, or float64 for float64 input.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..numerics import (
    first_derivatives_only,
    gate_dtype,
    is_legacy_batched,
    is_readable,
    log_forget_gate,
    product_dtype,
    without_autocast,
)
from ..slots import step_in_slots
from .reference import MLSTMState, stabilizer


# Work and memory per token grow with L inside chunks and with the number of chunks between them.
DEFAULT_CHUNK_SIZE = 64
# Longer sequences run piece by piece.
MAX_CHUNKS = 256
# A forget gate of log f < RESET closes for good, as -inf does.
RESET = -(2.0**32)
# q, k, v, log f and igate of a step that leaves the state as it is.
NO_STEP = (0.0, 0.0, 0.0, 0.0, -torch.inf)


class ChunkOrder(NamedTuple):
    """Places of the initial states and the chunks among the E = S + N contributions to the states at boundaries.

    Unpacked, one initial state is followed by all chunks; packed, each document's initial state by its own chunks.
    """

    initial: torch.Tensor  # (S,) places of the initial states
    chunk: torch.Tensor  # (N,) places of the chunks; a chunk starts from the state after the place before
    final: torch.Tensor  # (S,) places after which the final states are read

    @classmethod
    def unpacked(cls, num_chunks: int, device: torch.device) -> "ChunkOrder":
        place = torch.arange(num_chunks + 1, device=device)
        return cls(place[:1], place[1:], place[-1:])


class LogWeights(NamedTuple):
    """Logarithms of the weights that elements j have in the places t >= j of a sequence, relative to its start:

        log w_jt + log f_1 + ... + log f_j = b_t + u_j,    b_t = log f_1 + ... + log f_t,    u_j = i_j - b_j

    Both are far larger than what is left of them, so each is kept in two parts, float64 where there are few of them.
    """

    u: torch.Tensor  # (..., L_j, L_t) u_j rounded, -inf where j comes later or has been forgotten
    u_rest: torch.Tensor  # (..., L_j) what the rounding has left
    b_whole: torch.Tensor  # (..., L) b_t as the sum of whole numbers, which is exact,
    b_rest: torch.Tensor  # (..., L) and of what they leave
    kept: torch.Tensor  # (..., L) whether nothing was forgotten for good up to t

    @classmethod
    def of(cls, log_f: torch.Tensor, igate: torch.Tensor, dtype: torch.dtype) -> "LogWeights":
        """log_f, igate (..., L); u is rounded to `dtype`."""
        length = log_f.shape[-1]
        reset = log_f < RESET
        log_f, igate = log_f.double().masked_fill(reset, 0.0), igate.double()
        whole, i_whole = log_f.round(), igate.round()
        b_whole, b_rest, reset_count = whole.cumsum(-1), (log_f - whole).cumsum(-1), reset.cumsum(-1)
        u_whole = i_whole - b_whole
        u_rest = (igate - i_whole).nan_to_num(0.0, 0.0, 0.0) - b_rest  # -inf - -inf is no rest
        u = (u_whole + u_rest).to(dtype)
        u_rest = ((u_whole - u).nan_to_num(0.0, 0.0, 0.0) + u_rest).to(dtype)
        earlier = torch.ones(length, length, dtype=torch.bool, device=log_f.device).triu_()
        visible = (reset_count[..., None] == reset_count[..., None, :]).logical_and_(earlier)
        return cls(torch.where(visible, u[..., None], -torch.inf), u_rest, b_whole, b_rest, reset_count == 0)

    def to(self, peak: torch.Tensor) -> torch.Tensor:
        """The weights relative to the stabilizers b_t + peak_t. Overwrites u."""
        return self.u.sub_(peak[..., None, :]).add_(self.u_rest[..., None]).exp_()

    def stabilizer(self, peak: torch.Tensor) -> torch.Tensor:
        """b_t + peak_t in float64."""
        return (self.b_whole + peak) + self.b_rest


class Weights(NamedTuple):
    """All weights of the chunkwise form, which the gates alone decide, and the stabilizers they are relative to."""

    in_chunk: torch.Tensor  # (B, H, N, L_j, L_t) of token j for the output of token t
    from_state: torch.Tensor  # (B, H, N, L) of the state before the chunk for the output of token t
    into_state: torch.Tensor  # (B, H, N, L) of token j in what its chunk contributes to the state
    between: torch.Tensor  # (B, H, E_j, E_t) of contribution j in the state after place t
    peak: torch.Tensor  # (B, H, N, L) m without the chunk's log f so far
    m: torch.Tensor  # (B, H, N, L) stabilizer of each output
    m_state: torch.Tensor  # (B, H, E) stabilizer of the state after each place

    @classmethod
    def of(cls, log_f, igate, m0, order: ChunkOrder, peak: torch.Tensor | None = None) -> "Weights":
        """log_f, igate (B, H, N, L), m0 (B, H, S). The backward pass gives the peak it remembers."""
        dtype = m0.dtype
        inside = LogWeights.of(log_f, igate, dtype)
        inside_peak = _finite(inside.u.amax(-2))
        last = inside_peak[..., -1:]  # the last column leads to the state after the chunk
        into_state = torch.exp(inside.u[..., -1] - last + inside.u_rest)

        places = order.initial.shape[0] + order.chunk.shape[0]
        decay = (inside.b_whole + inside.b_rest).masked_fill(~inside.kept, -torch.inf)[..., -1]
        g = decay.new_full((*m0.shape[:2], places), -torch.inf)  # an initial state starts afresh
        g = g.index_copy(-1, order.chunk, decay)
        r = torch.zeros_like(g).index_copy(-1, order.initial, m0.double())
        r = r.index_copy(-1, order.chunk, inside.stabilizer(inside_peak)[..., -1])
        across = LogWeights.of(g, r, g.dtype)
        across_peak = across.u.amax(-2)
        exact = across.stabilizer(across_peak)
        m_state = _finite(exact.to(dtype))
        between = (across.to(across_peak) * torch.exp(exact - m_state)[..., None, :]).to(dtype)

        m_before = m_state.index_select(-1, order.chunk - 1)[..., None].masked_fill(~inside.kept, -torch.inf)
        if peak is None:
            peak = torch.maximum(m_before, inside_peak)
        from_state, m = torch.exp(m_before - peak), inside.stabilizer(peak).to(dtype)
        return cls(inside.to(peak), from_state, into_state, between, peak, m, m_state)

    def crossing(self, sources: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The weights `between` of some places in the states after others, (B, H, sources, targets)."""
        return self.between.index_select(-2, sources).index_select(-1, targets)


def _finite(m: torch.Tensor) -> torch.Tensor:
    return m.clamp_min(torch.finfo(m.dtype).min / 4)


def _denominator(s: torch.Tensor, m: torch.Tensor, eps: float) -> torch.Tensor:
    """What h is divided by. Where it underflows, as it can without eps, it is infinite, and h and its gradients are
    0."""
    denominator = torch.maximum(s.abs(), torch.exp(-m)).add_(eps)
    tiny = torch.finfo(s.dtype).tiny
    return denominator if eps >= tiny else denominator.masked_fill_(denominator < tiny, torch.inf)


def _to_chunks(x: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """(B, N L, H, ...) to (B, H, N, L, ...), a view."""
    return x.unflatten(1, (-1, chunk_size)).movedim(3, 1)


def _from_chunks(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, N, L, ...) to (B, N L, H, ...), contiguous."""
    x = x.movedim(1, 3)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(1, 2)


def _bmm(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b in `dtype`, accumulated in float32 by the hardware and returned in the gate dtype."""
    return (a.to(dtype) @ b.to(dtype)).to(gate_dtype(dtype))


def _bmm_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b + c @ d in `dtype`, accumulated in float32 by the hardware; a and c (..., L, ·)."""
    a, b, c, d = (x.to(dtype).flatten(0, -3) for x in (a, b, c, d))
    return torch.baddbmm(torch.bmm(c, d), a, b)


class _Chunks(NamedTuple):
    """The inputs of the chunkwise form in chunk layout, the weights, and the states at the boundaries."""

    q: torch.Tensor  # (B, H, N, L, K) in the gate dtype, scaled
    k: torch.Tensor  # (B, H, N, L, K) in the gate dtype
    v: torch.Tensor  # (B, H, N, L, V)
    weights: Weights
    c_chunk: torch.Tensor  # (B, H, N, K, V) what each chunk contributes to the state
    n_chunk: torch.Tensor  # (B, H, N, K)
    c_before: torch.Tensor  # (B, H, N, K, V) the state before each chunk
    n_before: torch.Tensor  # (B, H, N, K)

    @classmethod
    def of(cls, q, k, v, log_f, igate, c0, n0, m0, order, scale: float, chunk_size: int, peak=None) -> "_Chunks":
        dtype, gates = product_dtype(q), gate_dtype(q.dtype)
        q, k, v, log_f, igate = (_to_chunks(x, chunk_size) for x in (q, k, v, log_f, igate))
        q, k, v = torch.mul(q.to(gates), scale).contiguous(), k.to(gates).contiguous(), v.contiguous()
        weights = Weights.of(log_f, igate, m0, order, peak)
        k_into = k * weights.into_state[..., None]
        c_chunk, n_chunk = _bmm(k_into.mT, v, dtype), k_into.sum(-2)
        before = _scan_states(weights, order, order.chunk - 1, c_chunk, n_chunk, c0, n0)
        return cls(q, k, v, weights, c_chunk, n_chunk, *before)


def _scan_states(weights: Weights, order: ChunkOrder, places: torch.Tensor, c_chunk, n_chunk, c0, n0):
    """States c (B, H, P, K, V) and n (B, H, P, K) after the given places: weighted sums of all contributions."""
    from_chunk = weights.crossing(order.chunk, places).mT
    c, n = from_chunk @ c_chunk.flatten(-2), from_chunk @ n_chunk
    if c0 is not None:
        from_initial = weights.crossing(order.initial, places).mT
        c, n = c + from_initial @ c0.flatten(-2), n + from_initial @ n0
    return c.unflatten(-1, c_chunk.shape[-2:]), n


def _scan_states_backward(
    weights: Weights, order: ChunkOrder, c_chunk, n_chunk, c0, n0, dc_before, dn_before, dc_final, dn_final
):
    """Gradients of the initial states, of the chunks' contributions, and of each chunk's summed log f, from those of
    the states before the chunks and of the final states."""
    before = order.chunk - 1
    dc_before, dc_final = dc_before.flatten(-2), dc_final.flatten(-2)
    dlog = torch.zeros_like(weights.between)

    def back(sources, c, n):
        to_before, to_final = weights.crossing(sources, before), weights.crossing(sources, order.final)
        flat = c.flatten(-2)
        dlog[..., sources[:, None], before] = to_before * (flat @ dc_before.mT + n @ dn_before.mT)
        dlog[..., sources[:, None], order.final] = to_final * (flat @ dc_final.mT + n @ dn_final.mT)
        dc = to_before @ dc_before + to_final @ dc_final
        return dc.unflatten(-1, c.shape[-2:]), to_before @ dn_before + to_final @ dn_final

    dc_chunk, dn_chunk = back(order.chunk, c_chunk, n_chunk)
    dc0, dn0 = (None, None) if c0 is None else back(order.initial, c0, n0)
    # g_e lies between the places j < e <= t
    dg = dlog.flip(-1).cumsum(-1).flip(-1).triu(1).sum(-2)
    return dc0, dn0, dc_chunk, dn_chunk, dg[..., order.chunk]


def _join_rows(apply: Callable, rows: int, in_dims: Sequence[int | None], tensors: Sequence, order_dims, *options):
    """`vmap` of the Functions below: the rows it runs over are further rows of the batch.

    `tensors` have the batch as first dimension; `options` are the order and numbers. Returns the outputs and the
    dimension in which the rows stand in them."""
    if any(dim is not None for dim in order_dims):
        raise NotImplementedError("`mlstm` cannot run under vmap over `cu_seqlens`: rows would have other shapes.")
    tensors = [
        x if x is None else x.expand(rows, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]
    outputs = apply(*(x if x is None else x.flatten(0, 1) for x in tensors), *options)
    return tuple(x if x is None else x.unflatten(0, (rows, -1)) for x in outputs), 0


def _join_legacy_rows(apply: Callable, tensors: Sequence, *options):
    """As `_join_rows`, for `torch.autograd.grad(is_grads_batched=True)`: its tensors, of an older kind, call no `vmap`
    and know few operations. They are taken apart here, and put together again."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    dims = [0 if x is not None and is_legacy_batched(x) else None for x in tensors]
    tensors = [
        x if dim is None else torch._remove_batch_dim(x, level, 1, dim) for x, dim in zip(tensors, dims, strict=True)
    ]
    rows = next(len(x) for x, dim in zip(tensors, dims, strict=True) if dim == 0)
    outputs, dim = _join_rows(apply, rows, dims, tensors, (), *options)
    return tuple(x if x is None else torch._add_batch_dim(x, dim, level) for x in outputs)


class _Chunkwise(torch.autograd.Function):
    """The chunkwise form for T = N L.

    Shapes: q, k (B, T, H, K), v (B, T, H, V), log_f, igate (B, T, H), c0 (B, H, S, K, V), n0 (B, H, S, K),
    m0 (B, H, S), with S = 1 unpacked, B = 1 packed. Returns h (B, T, H, V), the final c, n, m, and for the backward
    pass the normalizer s of each output and the peak of its weights, (B, H, N, L)."""

    @staticmethod
    def forward(q, k, v, log_f, igate, c0, n0, m0, order, scale, eps, chunk_size):
        with without_autocast(q.device):
            x = _Chunks.of(q, k, v, log_f, igate, c0, n0, m0, order, scale, chunk_size)
            in_chunk, from_state = x.weights.in_chunk, x.weights.from_state
            scores = (x.k @ x.q.mT).mul_(in_chunk)  # [L_j, L_t]
            s = scores.sum(-2).add_(from_state * (x.q @ x.n_before[..., None]).squeeze(-1))
            # divided before the products, which then need no second pass
            denominator = _denominator(s, x.weights.m, eps)
            scores.div_(denominator[..., None, :])
            q_state = x.q * (from_state / denominator)[..., None]
            h = _bmm_add(scores.mT, x.v, q_state, x.c_before, product_dtype(q)).view_as(x.v)
            c, n = _scan_states(x.weights, order, order.final, x.c_chunk, x.n_chunk, c0, n0)
            m_final = x.weights.m_state.index_select(-1, order.final)
        return _from_chunks(h, v.dtype), c, n, m_final, s, x.weights.peak

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.order, ctx.scale, ctx.eps, ctx.chunk_size = inputs
        h, _, _, m_final, s, peak = output
        ctx.save_for_backward(*tensors, h, s, peak)
        ctx.mark_non_differentiable(m_final, s, peak)

    @staticmethod
    def backward(ctx, dh, dc_final, dn_final, *_):
        inputs = (dh, dc_final, dn_final, *ctx.saved_tensors)
        options = ctx.order, ctx.scale, ctx.eps, ctx.chunk_size
        if torch.compiler.is_compiling():  # there, PyTorch itself refuses second derivatives
            grads = _ChunkwiseGradient.forward(*inputs, *options)  # type: ignore[call-arg]
        elif any(map(is_legacy_batched, inputs[:3])):
            grads = _join_legacy_rows(_ChunkwiseGradient.apply, inputs, *options)
        else:
            grads = _ChunkwiseGradient.apply(*inputs, *options)
        return *grads, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _join_rows(_Chunkwise.apply, info.batch_size, in_dims[:8], inputs[:8], in_dims[8], *inputs[8:])


class _ChunkwiseGradient(torch.autograd.Function):
    """The backward pass of `_Chunkwise`: gradients of q, k, v, log_f, igate, c0, n0.

    With the stabilizers held constant (they cancel), and P, S the weights and scores of the forward pass:

        g_t = dh_t / den_t,  ds_t = -sign(s_t) h_t g_t where |s_t| is the larger,  E_jt = (v_j g_t + ds_t) P_jt

    ds is the normalizer's gradient: n_t acts like one more column of the state, with g = ds.
    """

    @staticmethod
    def forward(dh, dc_final, dn_final, q, k, v, log_f, igate, c0, n0, m0, h, s, peak, order, scale, eps, chunk_size):
        with without_autocast(q.device):
            x = _Chunks.of(q, k, v, log_f, igate, c0, n0, m0, order, scale, chunk_size, peak)
            bmm = lambda a, b: _bmm(a, b, product_dtype(q))  # noqa: E731
            in_chunk, from_state, into_state = (
                x.weights.in_chunk,
                x.weights.from_state[..., None],
                x.weights.into_state[..., None],
            )
            h, g = (_to_chunks(y, chunk_size).to(s.dtype) for y in (h, dh))
            g = g / _denominator(s, x.weights.m, eps)[..., None]
            ds = torch.where(s.abs() > torch.exp(-x.weights.m), -s.sign() * (h * g).sum(-1), 0)

            # inside chunks; gate gradients are row and column sums of the gradient by the log weights. The diagonal,
            # where no forget gate lies between, would cancel in their difference and bury the rest: it is kept apart.
            scores = bmm(x.k, x.q.mT)
            error = bmm(x.v, g.mT).add_(ds[..., None, :]).mul_(in_chunk)
            dv = bmm(scores * in_chunk, g)
            dq, dk = bmm(error.mT, x.k), bmm(error, x.q)
            dlog = error.mul_(scores)
            diagonal = dlog.diagonal(dim1=-2, dim2=-1)
            by_itself = diagonal.clone()
            diagonal.zero_()
            by_query, by_key = dlog.sum(-2), dlog.sum(-1)

            # from the state before each chunk
            q_state = x.q * from_state
            dq_state = (bmm(g, x.c_before.mT) + ds[..., None] * x.n_before[..., None, :]) * from_state
            dq += dq_state
            dc_before = bmm(q_state.mT, g)
            dn_before = (q_state.mT @ ds[..., None]).squeeze(-1)

            # into the states after each chunk
            dc0, dn0, dc_chunk, dn_chunk, dg = _scan_states_backward(
                x.weights, order, x.c_chunk, x.n_chunk, c0, n0, dc_before, dn_before, dc_final, dn_final
            )
            dk_state = (bmm(x.v, dc_chunk.mT) + dn_chunk[..., None, :]) * into_state
            dk += dk_state
            dv += bmm(x.k * into_state, dc_chunk)

            # log f_t lies between all pairs j < t <= s: token to token, state to token, token to state, state to state
            from_before, to_after = (x.q * dq_state).sum(-1), (x.k * dk_state).sum(-1)
            later = (by_query - by_key + from_before).flip(-1).cumsum(-1).flip(-1)
            earlier = F.pad(to_after.cumsum(-1)[..., :-1], (1, 0))
            dlog_f = later + earlier + dg[..., None]
            digate = by_key + by_itself + to_after

        grads = [_from_chunks(d, y.dtype) for d, y in ((dq.mul_(scale), q), (dk, k), (dv, v))]
        gates = [_from_chunks(d, y.dtype) for d, y in ((dlog_f, log_f), (digate, igate))]
        return *grads, *gates, dc0, dn0

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        first_derivatives_only("mlstm", "torch")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        apply, rows = _ChunkwiseGradient.apply, info.batch_size
        return _join_rows(apply, rows, in_dims[:14], inputs[:14], in_dims[14], *inputs[14:])


def mlstm_chunkwise(
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
    """The sequence, all chunks at once; shapes as in `hf_xlstm.ops.mlstm`."""
    length, exporting = q.shape[1], torch.compiler.is_exporting()
    chunk_size = chunk_size or DEFAULT_CHUNK_SIZE
    if not torch.compiler.is_compiling():  # there, one graph for all lengths
        chunk_size = min(chunk_size, length)
    if cu_seqlens is None and not exporting and length > MAX_CHUNKS * chunk_size:
        return _piecewise(
            q, k, v, igate, fgate, initial_state, output_final_state, mask, scale=scale, eps=eps, chunk_size=chunk_size
        )

    inputs = _prepare(q, k, v, igate, fgate, mask)
    if cu_seqlens is not None:
        inputs, order, slots = _cut_packed(inputs, cu_seqlens, chunk_size)
    elif torch.compiler.is_compiling():
        inputs, order, slots = _cut_traced(inputs, chunk_size)
    else:
        inputs, order, slots = _cut(inputs, chunk_size)
    if initial_state is None:
        state = None, None, inputs[3].new_zeros(q.shape[0], q.shape[2], order.initial.shape[0])
    elif cu_seqlens is None:
        state = (x.unsqueeze(2) for x in initial_state)
    else:
        state = (x.transpose(0, 1).unsqueeze(0) for x in initial_state)

    # an exported graph holds plain operations only
    chunkwise = _Chunkwise.forward if exporting else _Chunkwise.apply
    h, *final_state, _, _ = chunkwise(*inputs, *state, order, scale, eps, chunk_size)  # type: ignore[call-arg]
    h = _take(h, slots).to(v.dtype)
    if mask is not None:
        h = torch.where(mask[..., None, None], h, 0)
    if not output_final_state:
        return h, None
    if cu_seqlens is None:
        return h, tuple(x.squeeze(2) for x in final_state)
    final_state = tuple(x.squeeze(0).transpose(0, 1) for x in final_state)
    if initial_state is not None:  # an empty sequence passes its state on, to the last digit
        unchanged = cu_seqlens.diff() == 0
        final_state = tuple(
            torch.where(unchanged.view(-1, *[1] * (old.ndim - 1)), old, new)
            for old, new in zip(initial_state, final_state, strict=True)
        )
    return h, final_state


def _prepare(q, k, v, igate, fgate, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """q, k, v, log_f and igate in the dtypes they are computed in. A masked step adds nothing to the state and keeps
    all of it."""
    if q.dtype == torch.float16:  # too narrow for the states, and very slow on CPUs
        q, k, v = q.float(), k.float(), v.float()
    igate, log_f = igate.to(gate_dtype(q.dtype)), log_forget_gate(fgate.to(gate_dtype(q.dtype)))
    if mask is not None:
        igate = torch.where(mask[..., None], igate, -torch.inf)
        log_f = torch.where(mask[..., None], log_f, 0.0)
    return q, k, v, log_f, igate


# Each of the three ways to cut returns the inputs as whole chunks, the order of the chunks, and where the tokens now
# are: a slice or an index, or None if there are no other steps.
Cut = tuple[tuple[torch.Tensor, ...], ChunkOrder, slice | torch.Tensor | None]


def _cut(inputs: tuple[torch.Tensor, ...], chunk_size: int) -> Cut:
    """The last chunk is filled up with empty steps where necessary."""
    length, device = inputs[0].shape[1], inputs[0].device
    chunks = -(-length // chunk_size)
    padding = chunks * chunk_size - length
    order = ChunkOrder.unpacked(chunks, device)
    return (_pad(inputs, padding), order, slice(0, length)) if padding else (inputs, order, None)


def _cut_traced(inputs: tuple[torch.Tensor, ...], chunk_size: int) -> Cut:
    """As `_cut`, for one graph that serves all lengths: always padded, and read by an index, since a slice would make
    the graph depend on whether T is a multiple of the chunk. An exported graph has one more, empty chunk: symbolic
    shapes treat one chunk as a case of its own."""
    length, device = inputs[0].shape[1], inputs[0].device
    chunks = (length + chunk_size - 1) // chunk_size + torch.compiler.is_exporting()
    inputs = _pad(inputs, chunks * chunk_size - length)
    return inputs, ChunkOrder.unpacked(chunks, device), torch.arange(length, device=device)


def _cut_packed(inputs: tuple[torch.Tensor, ...], cu_seqlens: torch.Tensor, chunk_size: int) -> Cut:
    """Every document is cut into chunks of its own; the last one is filled up with empty steps.

    Where the bounds cannot be read without waiting for the device, the number of chunks is an upper bound that
    depends on shapes alone; the surplus follows the last document and carries its state on.
    """
    length = inputs[0].shape[1]
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    documents = starts.shape[0]
    count = (ends - starts + chunk_size - 1) // chunk_size
    chunks_before = count.cumsum(0) - count
    token = torch.arange(length, device=starts.device)
    document = torch.searchsorted(ends, token, right=True)
    slots = chunks_before[document] * chunk_size + token - starts[document]

    chunks = int(count.sum()) if count.is_cpu and is_readable(count) else length // chunk_size + documents
    number = torch.arange(chunks, device=starts.device)
    document = torch.searchsorted(chunks_before + count, number, right=True).clamp_max(documents - 1)
    initial = chunks_before + torch.arange(documents, device=starts.device)
    final = torch.cat([initial[1:], initial.new_full((1,), chunks + documents)]) - 1
    inputs = tuple(
        x.new_full((x.shape[0], chunks * chunk_size, *x.shape[2:]), fill).index_copy(1, slots, x)
        for x, fill in zip(inputs, NO_STEP, strict=True)
    )
    return inputs, ChunkOrder(initial, number + document + 1, final), slots


def _pad(inputs: tuple[torch.Tensor, ...], padding: int) -> tuple[torch.Tensor, ...]:
    """The inputs followed by empty steps."""
    return tuple(
        F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding), value=fill) for x, fill in zip(inputs, NO_STEP, strict=True)
    )


def _take(h: torch.Tensor, slots: slice | torch.Tensor | None) -> torch.Tensor:
    """The outputs (B, T, H, V) of the tokens among those of all steps."""
    if slots is None:
        return h
    return h[:, slots] if isinstance(slots, slice) else h.index_select(1, slots)


def _piecewise(q, k, v, igate, fgate, state, output_final_state, mask, chunk_size, **options):
    """A very long sequence, MAX_CHUNKS chunks at a time."""
    outputs, size = [], MAX_CHUNKS * chunk_size
    for start in range(0, q.shape[1], size):
        piece = slice(start, start + size)
        h, state = mlstm_chunkwise(
            *(x[:, piece] for x in (q, k, v, igate, fgate)),
            initial_state=state,
            output_final_state=True,
            mask=None if mask is None else mask[:, piece],
            chunk_size=chunk_size,
            **options,
        )
        outputs.append(h)
    return torch.cat(outputs, dim=1), state if output_final_state else None


def mlstm_step_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    state: MLSTMState,
    *,
    scale: float,
    eps: float,
    inplace: bool = False,
    state_indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, MLSTMState]:
    """One step; shapes as in `hf_xlstm.ops.mlstm_step`. The equations stand at `mlstm_recurrent_step`."""
    if state_indices is not None:
        step = functools.partial(mlstm_step_torch, scale=scale, eps=eps)
        return step_in_slots(step, (q, k, v, igate, fgate), state, state_indices)
    c, n, m = state
    igate = igate.to(m.dtype)
    # float64: next to an m of 1e5, float32 would lose what the forget gate takes away
    kept = log_forget_gate(fgate.to(m.dtype)).double() + m.detach()
    m_new = stabilizer(kept, igate)
    forget = (kept - m_new).clamp_max_(1).to(m.dtype).exp_().unsqueeze(-1)
    k = k * (igate - m_new).exp_().unsqueeze(-1)
    if inplace:
        torch.addcmul(k, n, forget, out=n)
        c.mul_(forget.unsqueeze(-1)).addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
        m.copy_(m_new)
    else:
        n = torch.addcmul(k, n, forget)
        c = torch.addcmul(k.unsqueeze(-1) * v.unsqueeze(-2), c, forget.unsqueeze(-1))
        m = m_new
    q = q.to(m.dtype) * scale
    denominator = _denominator((q * n).sum(-1), m_new, eps)
    with without_autocast(q.device):
        h = torch.bmm(q.flatten(0, 1).unsqueeze(1), c.flatten(0, 1)).view_as(v)
    return (h / denominator.unsqueeze(-1)).to(v.dtype), (c, n, m)
