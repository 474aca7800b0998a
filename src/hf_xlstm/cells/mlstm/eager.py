"""The mLSTM in PyTorch: chunkwise-parallel over a sequence with its own backward pass, and one step for decoding.

A sequence is cut into N chunks of L tokens. Inside a chunk every pair of tokens j <= t has the log weight
D_jt = i_j + log f_{j+1} + ... + log f_t: with its maximum as stabilizer, the chunk is one masked attention. The
states between chunks obey the same formula one level up: chunk j contributes to the state after chunk t with the log
weight r_j + g_{j+1} + ... + g_t, where g is a chunk's summed log f and r the stabilizer of its own contribution. So
all states come from one small matrix product, and no loop runs over chunks or tokens.

Every sum of log f over an interval is formed as such, never as a difference of two longer sums: that keeps the digits
that matter, and an exactly closed forget gate (log f = -inf) is a reset, not a NaN.

Products run in the input dtype, except the scores q k^T: they also make up the normalizer, where they cancel. Gates,
states, sums and denominators are float32, or float64 for float64 input.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..numerics import gate_dtype, log_forget_gate
from .reference import MLSTMState, stabilizer


# Work and memory per token grow with L inside chunks and with the number of chunks between them.
DEFAULT_CHUNK_SIZE = 64
# Longer sequences run piece by piece.
MAX_CHUNKS = 256
# q, k, v, log f and igate of a step that leaves the state as it is.
NO_STEP = (0.0, 0.0, 0.0, 0.0, -torch.inf)


class ChunkOrder(NamedTuple):
    """Where initial states and chunks stand in the sequence of E state contributions, and whom they end in.

    Unpacked, one initial state is followed by all chunks; packed, each document's initial state by its own chunks.
    """

    initial: torch.Tensor  # (S,) places of the S initial states
    chunk: torch.Tensor  # (N,) places of the chunks; the state a chunk starts from is that of the place before
    final: torch.Tensor  # (S,) places of the final states

    @classmethod
    def unpacked(cls, num_chunks: int, device: torch.device) -> "ChunkOrder":
        place = torch.arange(num_chunks + 1, device=device)
        return cls(place[:1], place[1:], place[-1:])


def _interval_weights(log_f: torch.Tensor, igate: torch.Tensor) -> torch.Tensor:
    """(..., L), (..., L) to (..., L, L): entry (j, t) is igate_j + log_f_{j+1} + ... + log_f_t; -inf for j > t."""
    length = log_f.shape[-1]
    terms = log_f[..., None, :].expand(*log_f.shape, length).triu(1)
    terms.diagonal(dim1=-2, dim2=-1).copy_(igate)
    below = torch.ones(length, length, dtype=torch.bool, device=log_f.device).tril_(-1)
    return terms.cumsum(-1).masked_fill_(below, -torch.inf)


def _finite(m: torch.Tensor) -> torch.Tensor:
    return m.clamp_min(torch.finfo(m.dtype).min / 4)


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


class _Chunkwise(torch.autograd.Function):
    """T a multiple of L. Shapes: q, k (B, T, H, K), v (B, T, H, V), log_f, igate (B, T, H), c0 (B, H, S, K, V),
    n0 (B, H, S, K), m0 (B, H, S) with S = 1 unpacked, B = 1 packed. Returns h (B, T, H, V) and the final c, n, m."""

    @staticmethod
    def forward(ctx, q, k, v, log_f, igate, c0, n0, m0, order, scale, eps, chunk_size):
        with torch.autocast(q.device.type, enabled=False):
            x = _Chunks(q, k, v, log_f, igate, c0, n0, m0, order, scale, chunk_size)
            inner, carry, m = x.read_out_weights()
            weights = (x.k @ x.q.mT).mul_(inner)  # [L_j, L_t]
            s = weights.sum(-2).add_(carry * (x.q @ x.n_before[..., None]).squeeze(-1))
            # divided before the products, which then need no second pass
            denominator = torch.maximum(s.abs(), torch.exp(-m)).add_(eps)
            weights.div_(denominator[..., None, :])
            q_carry = x.q * (carry / denominator)[..., None]
            h = _bmm_add(weights.mT, x.v, q_carry, x.c_before, x.dtype).view_as(x.v)
            h = _from_chunks(h, v.dtype)
            c, n, m_final = x.final_state()
        ctx.save_for_backward(q, k, v, log_f, igate, c0, n0, m0, *order, h, s, m)
        ctx.scale, ctx.eps, ctx.chunk_size = scale, eps, chunk_size
        ctx.mark_non_differentiable(m_final)
        return h, c, n, m_final

    @staticmethod
    def backward(ctx, dh, dc_final, dn_final, _):
        """With the stabilizers held constant (they cancel), and P, S the weights and scores of the forward pass:

            g_t = dh_t / den_t,  ds_t = -sign(s_t) h_t g_t where |s_t| is the larger,  E_jt = (v_j g_t + ds_t) P_jt

        ds is the normalizer's gradient: n_t acts like one more column of the state, with g = ds.
        """
        q, k, v, log_f, igate, c0, n0, m0, *order, h, s, m = ctx.saved_tensors
        order = ChunkOrder(*order)
        with torch.autocast(q.device.type, enabled=False):
            x = _Chunks(q, k, v, log_f, igate, c0, n0, m0, order, ctx.scale, ctx.chunk_size)
            bmm = lambda a, b: _bmm(a, b, x.dtype)  # noqa: E731
            inner, carry, _ = x.read_out_weights(m)
            floor = torch.exp(-m)
            h, g = (_to_chunks(y, ctx.chunk_size).to(s.dtype) for y in (h, dh))
            g = g / torch.maximum(s.abs(), floor).add_(ctx.eps)[..., None]
            ds = torch.where(s.abs() > floor, -s.sign() * (h * g).sum(-1), 0)

            # inside chunks; gate gradients are row and column sums of the gradient by the log weights. The diagonal,
            # where no forget gate lies between, would cancel in their difference and bury the rest: it is kept apart.
            scores = bmm(x.k, x.q.mT)
            error = bmm(x.v, g.mT).add_(ds[..., None, :]).mul_(inner)
            dv = bmm(scores * inner, g)
            dq, dk = bmm(error.mT, x.k), bmm(error, x.q)
            dlog = error.mul_(scores)
            diagonal = dlog.diagonal(dim1=-2, dim2=-1)
            by_itself = diagonal.clone()
            diagonal.zero_()
            by_query, by_key = dlog.sum(-2), dlog.sum(-1)

            # from the state before each chunk
            q_carry = x.q * carry[..., None]
            dq_carry = (bmm(g, x.c_before.mT) + ds[..., None] * x.n_before[..., None, :]) * carry[..., None]
            dq += dq_carry
            dc_before = bmm(q_carry.mT, g)
            dn_before = (q_carry.mT @ ds[..., None]).squeeze(-1)

            # into the states after each chunk
            dc0, dc_chunk, dn0, dn_chunk, dg = x.scan_backward(dc_before, dn_before, dc_final, dn_final)
            dk_carry = (bmm(x.v, dc_chunk.mT) + dn_chunk[..., None, :]) * x.into[..., None]
            dk += dk_carry
            dv += bmm(x.k * x.into[..., None], dc_chunk)

            # log f_t lies between all pairs j < t <= s: token to token, state to token, token to state, state to state
            from_state, to_state = (x.q * dq_carry).sum(-1), (x.k * dk_carry).sum(-1)
            later = (by_query - by_key + from_state).flip(-1).cumsum(-1).flip(-1)
            earlier = F.pad(to_state.cumsum(-1)[..., :-1], (1, 0))
            dlog_f = later + earlier + dg[..., None]
            digate = by_key + by_itself + to_state

        grads = [_from_chunks(d, y.dtype) for d, y in ((dq.mul_(ctx.scale), q), (dk, k), (dv, v))]
        gates = [_from_chunks(d, y.dtype) for d, y in ((dlog_f, log_f), (digate, igate))]
        return *grads, *gates, dc0, dn0, None, None, None, None, None


class _Chunks:
    """The inputs in chunk layout (B, H, N, L, ...) and the state before every chunk."""

    def __init__(self, q, k, v, log_f, igate, c0, n0, m0, order: ChunkOrder, scale: float, chunk_size: int):
        self.dtype, gates = q.dtype, gate_dtype(q.dtype)
        q, k, v, log_f, igate = (_to_chunks(x, chunk_size) for x in (q, k, v, log_f, igate))
        self.q = torch.mul(q.to(gates), scale).contiguous()
        self.k, self.v = k.to(gates).contiguous(), v.contiguous()
        self.c0, self.n0, self.order = c0, n0, order

        # weights inside each chunk; its last column leads to the state after the chunk
        self.log_weights = _interval_weights(log_f, igate)  # [L_j, L_t]
        self.log_decay = log_f.cumsum(-1)  # from the chunk's start
        self.log_max = _finite(self.log_weights.amax(-2))
        self.into = torch.exp(self.log_weights[..., -1] - self.log_max[..., -1:])
        k_into = self.k * self.into[..., None]
        self.c_chunk = _bmm(k_into.mT, self.v, self.dtype)
        self.n_chunk = k_into.sum(-2)

        # the same one level up: E contributions, initial states and chunks, to the states after each of them
        places = order.initial.shape[0] + order.chunk.shape[0]
        g = log_f.new_full((*m0.shape[:2], places), -torch.inf)  # an initial state starts afresh
        g[..., order.chunk] = self.log_decay[..., -1]
        r = torch.empty_like(g)
        r[..., order.initial], r[..., order.chunk] = m0, self.log_max[..., -1]
        log_weights = _interval_weights(g, r)
        self.m = _finite(log_weights.amax(-2))
        self.scan = torch.exp(log_weights - self.m[..., None, :])  # [E_j, E_t]
        self.c_before, self.n_before = self._states(order.chunk - 1)

    def _scan_block(self, sources: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.scan.index_select(-2, sources).index_select(-1, targets)

    def _states(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c (B, H, P, K, V) and n (B, H, P, K) after the given places."""
        from_chunk = self._scan_block(self.order.chunk, places).mT
        c, n = from_chunk @ self.c_chunk.flatten(-2), from_chunk @ self.n_chunk
        if self.c0 is not None:
            from_initial = self._scan_block(self.order.initial, places).mT
            c, n = c + from_initial @ self.c0.flatten(-2), n + from_initial @ self.n0
        return c.unflatten(-1, self.c_chunk.shape[-2:]), n

    def final_state(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return *self._states(self.order.final), self.m[..., self.order.final]

    def read_out_weights(self, m: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weights of earlier tokens [L_j, L_t] and of the state before the chunk [L_t], and their stabilizer m."""
        log_carry = self.log_decay + self.m[..., self.order.chunk - 1, None]
        if m is None:
            m = torch.maximum(log_carry, self.log_max)
        return self.log_weights.sub_(m[..., None, :]).exp_(), torch.exp(log_carry - m), m

    def scan_backward(self, dc_before, dn_before, dc_final, dn_final):
        """Gradients of the initial states, of the chunks' contributions, and of each chunk's summed log f."""
        order, before = self.order, self.order.chunk - 1
        dc_before, dc_final = dc_before.flatten(-2), dc_final.flatten(-2)
        dlog = torch.zeros_like(self.scan)

        def back(sources, c, n):
            c = c.flatten(-2)
            to_before, to_final = self._scan_block(sources, before), self._scan_block(sources, order.final)
            dlog[..., sources[:, None], before] = to_before * (c @ dc_before.mT + n @ dn_before.mT)
            dlog[..., sources[:, None], order.final] = to_final * (c @ dc_final.mT + n @ dn_final.mT)
            dc = to_before @ dc_before + to_final @ dc_final
            return dc.unflatten(-1, self.c_chunk.shape[-2:]), to_before @ dn_before + to_final @ dn_final

        dc_chunk, dn_chunk = back(order.chunk, self.c_chunk, self.n_chunk)
        dc0, dn0 = (None, None) if self.c0 is None else back(order.initial, self.c0, self.n0)
        # g_e lies between the places j < e <= t
        crossing = dlog.flip(-1).cumsum(-1).flip(-1).triu(1).sum(-2)
        return dc0, dc_chunk, dn0, dn_chunk, crossing[..., order.chunk]


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
    batch, length = q.shape[:2]
    chunk_size = chunk_size or DEFAULT_CHUNK_SIZE
    if not torch.compiler.is_compiling():  # there, one graph for all lengths
        chunk_size = min(chunk_size, length)
    if cu_seqlens is None and length > MAX_CHUNKS * chunk_size:
        return _piecewise(
            q, k, v, igate, fgate, initial_state, output_final_state, mask, scale=scale, eps=eps, chunk_size=chunk_size
        )
    out_dtype = v.dtype
    if q.dtype == torch.float16:  # too narrow for the states, and very slow on CPUs
        q, k, v = q.float(), k.float(), v.float()
    igate, log_f = igate.to(gate_dtype(q.dtype)), log_forget_gate(fgate.to(gate_dtype(q.dtype)))
    if mask is not None:  # a masked step adds nothing to the state and keeps all of it
        igate = torch.where(mask[..., None], igate, -torch.inf)
        log_f = torch.where(mask[..., None], log_f, 0.0)

    inputs = (q, k, v, log_f, igate)
    if cu_seqlens is None:
        chunks = (length + chunk_size - 1) // chunk_size
        padding = chunks * chunk_size - length
        order = ChunkOrder.unpacked(chunks, q.device)
        # a slice instead would make compiled code depend on whether T is a multiple of the chunk
        slots = torch.arange(length, device=q.device) if torch.compiler.is_compiling() else None
        if torch.compiler.is_compiling() or padding:
            inputs = tuple(
                F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding), value=fill) for x, fill in zip(inputs, NO_STEP)
            )
        states = None if initial_state is None else tuple(x.unsqueeze(2) for x in initial_state)
    else:
        order, slots = _packed_order(cu_seqlens, length, chunk_size)
        size = order.chunk.shape[0] * chunk_size
        inputs = tuple(
            x.new_full((batch, size, *x.shape[2:]), fill).index_copy(1, slots, x) for x, fill in zip(inputs, NO_STEP)
        )
        states = None if initial_state is None else tuple(x.transpose(0, 1).unsqueeze(0) for x in initial_state)
    c0, n0, m0 = states or (None, None, log_f.new_zeros(batch, q.shape[2], order.initial.shape[0]))

    h, c, n, m = _Chunkwise.apply(*inputs, c0, n0, m0, order, scale, eps, chunk_size)
    h = (h[:, :length] if slots is None else h.index_select(1, slots)).to(out_dtype)
    if mask is not None:
        h = torch.where(mask[..., None, None], h, 0)
    if not output_final_state:
        return h, None
    if cu_seqlens is None:
        return h, (c.squeeze(2), n.squeeze(2), m.squeeze(2))
    return h, tuple(x.squeeze(0).transpose(0, 1) for x in (c, n, m))


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


def _packed_order(cu_seqlens: torch.Tensor, length: int, chunk_size: int) -> tuple[ChunkOrder, torch.Tensor]:
    """Cut every document into chunks of its own; the last one is filled up with empty steps.

    Returns the order of the chunks, and each token's place (T,) among all steps. The number of chunks is an upper
    bound that depends on shapes alone; the surplus follows the last document and carries its state on.
    """
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    documents = starts.shape[0]
    count = (ends - starts + chunk_size - 1) // chunk_size
    chunks_before = count.cumsum(0) - count
    token = torch.arange(length, device=starts.device)
    document = torch.searchsorted(ends, token, right=True)
    slots = chunks_before[document] * chunk_size + token - starts[document]

    row = torch.arange(documents, device=starts.device)
    number = torch.arange(length // chunk_size + documents, device=starts.device)
    document = torch.searchsorted(chunks_before + count, number, right=True).clamp_max(documents - 1)
    initial = chunks_before + row
    final = torch.cat([initial[1:], initial.new_full((1,), number.shape[0] + documents)]) - 1
    return ChunkOrder(initial, number + document + 1, final), slots


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
) -> tuple[torch.Tensor, MLSTMState]:
    """One step; shapes as in `hf_xlstm.ops.mlstm_step`. The equations stand at `mlstm_recurrent_step`."""
    c, n, m = state
    igate, kept = igate.to(m.dtype), log_forget_gate(fgate.to(m.dtype)) + m.detach()
    m_new = stabilizer(kept, igate)
    forget = torch.exp(kept - m_new)[..., None]
    k = k * torch.exp(igate - m_new)[..., None]
    if inplace:
        n.mul_(forget).add_(k)
        c.mul_(forget[..., None]).addcmul_(k[..., None], v[..., None, :])
        m.copy_(m_new)
    else:
        n = torch.addcmul(k, n, forget)
        c = torch.addcmul(k[..., None] * v[..., None, :], c, forget[..., None])
        m = m_new
    q = q.to(m.dtype) * scale
    denominator = torch.maximum((q * n).sum(-1).abs_(), torch.exp(-m_new)).add_(eps)
    h = (q[..., None, :] @ c).squeeze(-2) / denominator[..., None]
    return h.to(v.dtype), (c, n, m)
