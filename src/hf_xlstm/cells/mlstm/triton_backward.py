"""Triton kernels of the mLSTM's backward pass. Notation as in triton_forward.py; m is a constant,
and the one of the forward pass: s, the final state and its gradients are on the scale of exp(-m), rounded as it was.

Through D_t = max(|s_t|, exp(-m_t)) + eps, the gradient of s_t is x_t / D_t with x_t = -sign(s_t) h_t.dh_t where |s_t|
is the larger one, else 0. It acts like one more value column: dh gains the entry x_t, v_j the entry 1, C the column n.
With r_t = scale a_t / D_t and dC', dn' the gradients of the state that a chunk hands on,

    E_tj = scale P_tj (dh_t.v_j + x_t) / D_t
    dq_t = sum_j E_tj k_j + r_t (C dh_t + x_t n)               dv_j = sum_t scores_tj dh_t + w_j dC'^T k_j
    dk_j = sum_t E_tj q_t + w_j (dC' v_j + dn')                dC = A dC' + sum_t r_t q_t dh_t^T
    di_j = k_j.dk_j                                            dn = A dn' + sum_t r_t x_t q_t

The gradient of log f_t is the sum over all that it decays, G_sj = E_sj q_s.k_j being one pair's part of the loss:

    sum_{s>=t>j} G_sj + sum_{s>=t} q_s.dq_s (part from C, n) + sum_{j<t} k_j.dk_j (part from dC', dn')
    + A (<C, dC'> + <n, dn'>)

Chunk by chunk, because over a whole sequence the rounding errors of such sums outgrow a short memory's gradient.
Five kernels: tokens (r, 1/D), scores (x, scores, E, G), states (dC', dn'), then dq and dk, dv, and last the gates.
"""

import triton
import triton.language as tl

from ..triton_common import log_sigmoid
from .triton_tiles import (
    GATE_STRIDES,
    PER_CALL,
    RESET,
    chunk_tokens,
    features,
    load_key_weights,
    load_live,
    load_state_weights,
    load_tile,
    load_transposed,
    normalizer,
    pair_weights,
    sequence_chunks,
    store_tile,
)


@triton.jit(do_not_specialize=PER_CALL)
def token_kernel(
    p_q,
    p_dh,
    p_s,
    p_m_tokens,
    p_coarse,
    p_fine,
    p_last_reset,
    p_m,
    p_c,
    p_inverse,  # (B, H, T) 1 / D_t
    p_read_weight,  # (B, H, T) r_t
    p_from_state,  # (B, H, T) the part of h_t.dh_t that comes from C
    p_cu_seqlens,
    p_first_chunk,
    p_sequence,
    T,
    chunks_per_row,
    scale,
    eps,
    stride_qb,
    stride_qt,
    stride_qh,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What single tokens need: D, r, and the part of h.dh that C contributes, r dh.C^T q, in float32."""
    pid = tl.program_id(0)
    h = pid % H
    row, start, end = chunk_tokens(pid // H, T, chunks_per_row, p_cu_seqlens, p_first_chunk, p_sequence, L)
    o_l = tl.arange(0, L)
    in_t = start + o_l < end
    o_gate = (row * H + h) * T + start + o_l
    live = load_live(p_last_reset, o_gate, in_t)

    p_dh += ((row * T + start) * H + h) * V
    p_q = features(p_q, row, start, h, stride_qb, stride_qt, stride_qh)
    p_c += tl.cast(pid, tl.int64) * (K * V)
    from_state_dh = tl.zeros((L,), tl.float32)
    for v in range(0, V, BV):
        o_v = v + tl.arange(0, BV)
        b_h = tl.zeros((L, BV), tl.float32)
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)
            b_q = load_tile(p_q, o_l, o_k, stride_qt, live, o_k < K)  # [L, BK]
            b_c = load_tile(p_c, o_k, o_v, V, o_k < K, o_v < V)  # [BK, BV]
            b_h = tl.dot(b_q.to(DOT), b_c.to(DOT), acc=b_h, input_precision=PRECISION)  # [L, BV]
        from_state_dh += tl.sum(b_h * load_tile(p_dh, o_l, o_v, H * V, live, o_v < V).to(tl.float32), 1)

    m = tl.load(p_m_tokens + o_gate, mask=in_t, other=float("inf"))
    s = tl.load(p_s + o_gate, mask=in_t, other=0.0)
    inverse = 1.0 / normalizer(s, m, eps)
    a = load_state_weights(p_coarse, p_fine, p_last_reset, p_m, m, o_gate, pid, in_t)  # [L]
    read_weight = scale * a * inverse
    tl.store(p_inverse + o_gate, inverse, mask=in_t)
    tl.store(p_read_weight + o_gate, read_weight, mask=in_t)
    tl.store(p_from_state + o_gate, read_weight * from_state_dh, mask=in_t)


@triton.jit(do_not_specialize=PER_CALL)
def state_gradient_kernel(
    p_q,
    p_dh,
    p_read_weight,
    p_x,
    p_last_reset,
    p_log_decay,
    p_c_start,  # (sequences, H, K, V) gradient of the state after the last chunk, or None for zero
    p_n_start,  # (sequences, H, K)
    p_c,  # (chunks, H, K, V) gradient of the state that each chunk hands on, or None
    p_n,  # (chunks, H, K)
    p_c_end,  # (sequences, H, K, V) gradient of the state before the first chunk, or None
    p_n_end,  # (sequences, H, K)
    p_decay_product,  # (sequences, H) the product of all A, or None
    p_cu_seqlens,
    p_first_chunk,
    T,
    chunks_per_row,
    spans,
    chunks_per_span,
    stride_qb,
    stride_qt,
    stride_qh,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WEIGH_RIGHT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The recurrence of state_kernel backwards, from the last chunk to the first. The arguments have the names that
    they have there, so that one launcher serves both; what they hold are the gradients of C and n."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    tile_v = pid % NV
    h = pid // (NV * NK) % H
    sequence = pid // (NV * NK * H)
    row, start, end, first, last = sequence_chunks(
        sequence, T, chunks_per_row, spans, chunks_per_span, p_cu_seqlens, p_first_chunk, L
    )

    o_k = (pid // NV % NK) * BK + tl.arange(0, BK)
    o_v = tile_v * BV + tl.arange(0, BV)
    in_k = o_k < K
    in_v = o_v < V
    owns_n = o_k < tl.where(tile_v == 0, K, 0)
    o_state = tl.cast(sequence, tl.int64) * H + h
    b_dc = tl.zeros((BK, BV), tl.float32)
    b_dn = tl.zeros((BK,), tl.float32)
    decay_product = 1.0
    if p_c_start is not None:
        b_dc += load_tile(p_c_start + o_state * (K * V), o_k, o_v, V, in_k, in_v)
        b_dn += tl.load(p_n_start + o_state * K + o_k, mask=in_k, other=0.0)

    o_l = tl.arange(0, L)
    start += (last - first) * L
    for i in range(last - first):
        start -= L
        o_chunk = tl.cast(last - 1 - i, tl.int64) * H + h
        if p_c is not None:
            store_tile(p_c + o_chunk * (K * V), b_dc, o_k, o_v, V, in_k, in_v)
            tl.store(p_n + o_chunk * K + o_k, b_dn, mask=owns_n)
        in_t = start + o_l < end
        o_gate = (row * H + h) * T + start + o_l
        live = load_live(p_last_reset, o_gate, in_t)
        read_weight = tl.load(p_read_weight + o_gate, mask=in_t, other=0.0)
        x = tl.load(p_x + o_gate, mask=in_t, other=0.0)
        p_q_chunk = features(p_q, row, start, h, stride_qb, stride_qt, stride_qh)
        b_q = load_transposed(p_q_chunk, o_l, o_k, stride_qt, live, in_k)  # [BK, L]
        b_dh = load_tile(p_dh + ((row * T + start) * H + h) * V, o_l, o_v, H * V, live, in_v)  # [L, BV]
        decay = tl.exp(tl.load(p_log_decay + o_chunk))
        if WEIGH_RIGHT:
            b_dh = b_dh.to(tl.float32) * read_weight[:, None]
            b_dc = tl.dot(b_q.to(DOT), b_dh.to(DOT), acc=decay * b_dc, input_precision=PRECISION)  # [BK, BV]
            b_dn = decay * b_dn + tl.sum(b_q.to(tl.float32) * (read_weight * x)[None, :], 1)  # [BK]
        else:
            b_q = b_q.to(tl.float32) * read_weight[None, :]
            b_dc = tl.dot(b_q.to(DOT), b_dh.to(DOT), acc=decay * b_dc, input_precision=PRECISION)
            b_dn = decay * b_dn + tl.sum(b_q * x[None, :], 1)
        decay_product *= decay

    if p_c_end is not None:
        store_tile(p_c_end + o_state * (K * V), b_dc, o_k, o_v, V, in_k, in_v)
        tl.store(p_n_end + o_state * K + o_k, b_dn, mask=owns_n)
    if p_decay_product is not None:
        tl.store(p_decay_product + o_state, decay_product, mask=pid % (NV * NK) == 0)


@triton.jit(do_not_specialize=PER_CALL)
def score_gradient_kernel(
    p_q,
    p_k,
    p_v,
    p_dh,
    p_coarse,
    p_fine,
    p_log_i,
    p_last_reset,
    p_m_tokens,
    p_inverse,
    p_from_state,
    p_s,
    p_x,  # (B, H, T)
    p_scores,  # (chunks, H, L, L)
    p_e,  # (chunks, H, L, L)
    p_g_key,  # (B, H, T) sum_{t>=j} G_tj
    p_g_row,  # (B, H, T) sum_{j<t} G_tj
    p_g_column,  # (B, H, T) sum_{t>j} G_tj
    p_cu_seqlens,
    p_first_chunk,
    p_sequence,
    T,
    chunks_per_row,
    scale,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What belongs to the pairs of tokens of one chunk: the scores once more, E, and the sums of G, in float32. x is
    formed here and not from the rounded h: where one pair outweighs all others, it cancels dh.v."""
    pid = tl.program_id(0)
    h = pid % H
    row, start, end = chunk_tokens(pid // H, T, chunks_per_row, p_cu_seqlens, p_first_chunk, p_sequence, L)
    o_l = tl.arange(0, L)
    in_t = start + o_l < end
    o_gate = (row * H + h) * T + start + o_l
    live = load_live(p_last_reset, o_gate, in_t)

    p_dh += ((row * T + start) * H + h) * V
    p_v = features(p_v, row, start, h, stride_vb, stride_vt, stride_vh)
    b_e = tl.zeros((L, L), tl.float32)
    for v in range(0, V, BV):
        o_v = v + tl.arange(0, BV)
        b_dh = load_tile(p_dh, o_l, o_v, H * V, live, o_v < V)  # [L, BV]
        b_v = load_transposed(p_v, o_l, o_v, stride_vt, live, o_v < V)  # [BV, L]
        b_e = tl.dot(b_dh.to(DOT), b_v.to(DOT), acc=b_e, input_precision=PRECISION)  # [L, L]
    p_q = features(p_q, row, start, h, stride_qb, stride_qt, stride_qh)
    p_k = features(p_k, row, start, h, stride_kb, stride_kt, stride_kh)
    b_s = tl.zeros((L, L), tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        b_q = load_tile(p_q, o_l, o_k, stride_qt, live, o_k < K)  # [L, BK]
        b_k = load_transposed(p_k, o_l, o_k, stride_kt, live, o_k < K)  # [BK, L]
        b_s = tl.dot(b_q.to(DOT), b_k.to(DOT), acc=b_s, input_precision=PRECISION)  # [L, L]

    m = tl.load(p_m_tokens + o_gate, mask=in_t, other=float("inf"))
    weight = scale * tl.load(p_inverse + o_gate, mask=in_t, other=0.0)
    b_p = pair_weights(p_coarse, p_fine, p_log_i, p_last_reset, o_gate, in_t, m, L) * weight[:, None]
    b_s *= b_p
    o_pair = tl.cast(pid, tl.int64) * (L * L) + o_l[:, None] * L + o_l[None, :]
    tl.store(p_scores + o_pair, b_s.to(p_scores.dtype.element_ty))
    s = tl.load(p_s + o_gate, mask=in_t, other=0.0)
    h_dh = tl.sum(b_s * b_e, 1) + tl.load(p_from_state + o_gate, mask=in_t, other=0.0)
    x = tl.where(tl.abs(s) > tl.exp(-m), tl.where(s > 0, -h_dh, h_dh), 0.0)
    tl.store(p_x + o_gate, x, mask=in_t)
    b_e += x[:, None]
    tl.store(p_e + o_pair, (b_p * b_e).to(p_e.dtype.element_ty))
    b_e *= b_s
    tl.store(p_g_key + o_gate, tl.sum(b_e, 0), mask=in_t)
    # No forget gate lies on the diagonal: in the difference of row and column it would cancel, and bury the rest.
    b_e = tl.where(o_l[:, None] == o_l[None, :], 0.0, b_e)
    tl.store(p_g_row + o_gate, tl.sum(b_e, 1), mask=in_t)
    tl.store(p_g_column + o_gate, tl.sum(b_e, 0), mask=in_t)


@triton.jit(do_not_specialize=[*PER_CALL, "tokens", "chunk_heads"])
def query_key_gradient_kernel(
    p_q,
    p_k,
    p_v,
    p_dh,
    p_e,
    p_read_weight,
    p_x,
    p_log_w,
    p_last_reset,
    p_log_decay,
    p_w_shift,
    p_c,
    p_n,
    p_dc,
    p_dn,
    p_dq,  # (B, T, H, K)
    p_dk,  # (B, T, H, K)
    p_q_dq,  # (tiles of K, B, H, T) q.dq, the part from C and n
    p_k_dk,  # (tiles of K, B, H, T) k.dk, the part from dC' and dn'
    p_cross,  # (tiles of K, chunks, H) A (<C, dC'> + <n, dn'>)
    p_cu_seqlens,
    p_first_chunk,
    p_sequence,
    T,
    chunks_per_row,
    tokens,  # B H T
    chunk_heads,  # chunks H
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq and dk of one chunk, for one tile of K."""
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    tile_k = tl.cast(pid % NK, tl.int64)
    h = pid // NK % H
    chunk = pid // (NK * H)
    row, start, end = chunk_tokens(chunk, T, chunks_per_row, p_cu_seqlens, p_first_chunk, p_sequence, L)
    o_l = tl.arange(0, L)
    o_k = (pid % NK) * BK + tl.arange(0, BK)
    in_k = o_k < K
    in_t = start + o_l < end
    o_gate = (row * H + h) * T + start + o_l
    o_chunk = tl.cast(chunk, tl.int64) * H + h
    live = load_live(p_last_reset, o_gate, in_t)

    p_dh += ((row * T + start) * H + h) * V
    p_v = features(p_v, row, start, h, stride_vb, stride_vt, stride_vh)
    b_dq = tl.zeros((L, BK), tl.float32)
    b_dk = tl.zeros((L, BK), tl.float32)
    for v in range(0, V, BV):
        o_v = v + tl.arange(0, BV)
        in_v = o_v < V
        b_c = load_transposed(p_c + o_chunk * (K * V), o_k, o_v, V, in_k, in_v)  # [BV, BK]
        b_dc = load_transposed(p_dc + o_chunk * (K * V), o_k, o_v, V, in_k, in_v)  # [BV, BK]
        b_dh = load_tile(p_dh, o_l, o_v, H * V, live, in_v)  # [L, BV]
        b_v = load_tile(p_v, o_l, o_v, stride_vt, live, in_v)  # [L, BV]
        b_dq = tl.dot(b_dh.to(DOT), b_c.to(DOT), acc=b_dq, input_precision=PRECISION)  # [L, BK]
        b_dk = tl.dot(b_v.to(DOT), b_dc.to(DOT), acc=b_dk, input_precision=PRECISION)  # [L, BK]
    cross = 0.0
    for v in tl.range(0, V, BV, num_stages=3):  # by itself: no tile of a product may have another use
        o_v = v + tl.arange(0, BV)
        b_c = load_tile(p_c + o_chunk * (K * V), o_k, o_v, V, in_k, o_v < V)  # [BK, BV]
        b_dc = load_tile(p_dc + o_chunk * (K * V), o_k, o_v, V, in_k, o_v < V)
        cross += tl.sum(b_c.to(tl.float32) * b_dc.to(tl.float32))

    b_q = load_tile(features(p_q, row, start, h, stride_qb, stride_qt, stride_qh), o_l, o_k, stride_qt, live, in_k)
    b_k = load_tile(features(p_k, row, start, h, stride_kb, stride_kt, stride_kh), o_l, o_k, stride_kt, live, in_k)
    b_n = tl.load(p_n + o_chunk * K + o_k, mask=in_k, other=0.0)
    b_dn = tl.load(p_dn + o_chunk * K + o_k, mask=in_k, other=0.0)
    read_weight = tl.load(p_read_weight + o_gate, mask=in_t, other=0.0)
    x = tl.load(p_x + o_gate, mask=in_t, other=0.0)
    decay = tl.exp(tl.load(p_log_decay + o_chunk))
    w = load_key_weights(p_log_w, p_w_shift, o_gate, o_chunk, in_t)
    b_dq = read_weight[:, None] * (b_dq + x[:, None] * b_n[None, :])
    b_dk = w[:, None] * (b_dk + b_dn[None, :])
    o_partial = tile_k * tokens + o_gate
    tl.store(p_q_dq + o_partial, tl.sum(b_q.to(tl.float32) * b_dq, 1), mask=in_t)
    tl.store(p_k_dk + o_partial, tl.sum(b_k.to(tl.float32) * b_dk, 1), mask=in_t)
    tl.store(p_cross + tile_k * chunk_heads + o_chunk, decay * (cross + tl.sum(b_n * b_dn)))

    p_e += o_chunk * (L * L)
    b_e = tl.load(p_e + o_l[:, None] * L + o_l[None, :])  # [L_t, L_j]
    b_dq = tl.dot(b_e.to(DOT), b_k.to(DOT), acc=b_dq, input_precision=PRECISION)
    store_tile(p_dq + ((row * T + start) * H + h) * K, b_dq, o_l, o_k, H * K, in_t, in_k)
    b_e = tl.load(p_e + o_l[None, :] * L + o_l[:, None])  # [L_j, L_t]
    b_dk = tl.dot(b_e.to(DOT), b_q.to(DOT), acc=b_dk, input_precision=PRECISION)
    store_tile(p_dk + ((row * T + start) * H + h) * K, b_dk, o_l, o_k, H * K, in_t, in_k)


@triton.jit(do_not_specialize=PER_CALL)
def value_gradient_kernel(
    p_k,
    p_dh,
    p_scores,
    p_log_w,
    p_last_reset,
    p_w_shift,
    p_dc,
    p_dv,  # (B, T, H, V)
    p_cu_seqlens,
    p_first_chunk,
    p_sequence,
    T,
    chunks_per_row,
    stride_kb,
    stride_kt,
    stride_kh,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dv of one chunk, for one tile of V: output_kernel with the roles of q and k, C and dC' exchanged."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    h = pid // NV % H
    chunk = pid // (NV * H)
    row, start, end = chunk_tokens(chunk, T, chunks_per_row, p_cu_seqlens, p_first_chunk, p_sequence, L)
    o_l = tl.arange(0, L)
    o_v = (pid % NV) * BV + tl.arange(0, BV)
    in_v = o_v < V
    in_t = start + o_l < end
    o_gate = (row * H + h) * T + start + o_l
    o_chunk = tl.cast(chunk, tl.int64) * H + h
    live = load_live(p_last_reset, o_gate, in_t)
    w = load_key_weights(p_log_w, p_w_shift, o_gate, o_chunk, in_t)  # [L]

    p_k = features(p_k, row, start, h, stride_kb, stride_kt, stride_kh)
    p_dc += o_chunk * (K * V)
    b_dv = tl.zeros((L, BV), tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        b_k = load_tile(p_k, o_l, o_k, stride_kt, live, o_k < K)  # [L, BK]
        b_dc = load_tile(p_dc, o_k, o_v, V, o_k < K, in_v)  # [BK, BV]
        b_dv = tl.dot(b_k.to(DOT), b_dc.to(DOT), acc=b_dv, input_precision=PRECISION)  # [L, BV]
    o_head = ((row * T + start) * H + h) * V
    b_dh = load_tile(p_dh + o_head, o_l, o_v, H * V, live, in_v)
    b_scores = tl.load(p_scores + o_chunk * (L * L) + o_l[None, :] * L + o_l[:, None])  # [L_j, L_t]
    b_dv = tl.dot(b_scores.to(DOT), b_dh.to(DOT), acc=w[:, None] * b_dv, input_precision=PRECISION)
    store_tile(p_dv + o_head, b_dv, o_l, o_v, H * V, in_t, in_v)


@triton.jit(do_not_specialize=[*PER_CALL, *GATE_STRIDES, "tokens", "chunk_heads"])
def gate_gradient_kernel(
    p_fgate,
    p_last_reset,
    p_g_key,
    p_g_row,
    p_g_column,
    p_q_dq,
    p_k_dk,
    p_cross,
    p_digate,  # (B, T, H)
    p_dfgate,  # (B, T, H)
    p_cu_seqlens,
    p_first_chunk,
    p_sequence,
    T,
    chunks_per_row,
    tokens,
    chunk_heads,
    stride_fb,
    stride_ft,
    stride_fh,
    H: tl.constexpr,
    NK: tl.constexpr,
    L: tl.constexpr,
):
    pid = tl.program_id(0)
    h = pid % H
    row, start, end = chunk_tokens(pid // H, T, chunks_per_row, p_cu_seqlens, p_first_chunk, p_sequence, L)
    o_l = tl.arange(0, L)
    in_t = start + o_l < end
    o_gate = (row * H + h) * T + start + o_l
    live = load_live(p_last_reset, o_gate, in_t)
    q_dq = tl.zeros((L,), tl.float32)
    k_dk = tl.zeros((L,), tl.float32)
    k_dk_before = tl.zeros((L,), tl.float32)  # that of the token before: a sum without the last token, not less it
    cross = 0.0
    for i in range(NK):
        o_partial = tl.cast(i, tl.int64) * tokens + o_gate
        q_dq += tl.load(p_q_dq + o_partial, mask=in_t, other=0.0)
        k_dk += tl.load(p_k_dk + o_partial, mask=in_t, other=0.0)
        k_dk_before += tl.load(p_k_dk + o_partial - 1, mask=in_t & (o_l > 0), other=0.0)
        cross += tl.load(p_cross + tl.cast(i, tl.int64) * chunk_heads + pid)
    g_key = tl.load(p_g_key + o_gate, mask=in_t, other=0.0)
    g_row = tl.load(p_g_row + o_gate, mask=in_t, other=0.0)
    g_column = tl.load(p_g_column + o_gate, mask=in_t, other=0.0)

    # log f_t decays what was written before t (strictly) for everyone who reads at t or later
    dlog_f = tl.cumsum(g_row - g_column + q_dq, 0, reverse=True) + tl.cumsum(k_dk_before, 0) + cross
    p_fgate = features(p_fgate, row, 0, h, stride_fb, stride_ft, stride_fh)
    token = tl.cast(start + o_l, tl.int64)
    fgate = tl.load(p_fgate + token * stride_ft, mask=live, other=float("inf")).to(tl.float32)
    decays = live & (log_sigmoid(fgate) >= RESET)
    dfgate = tl.where(decays, dlog_f / (1.0 + tl.exp(fgate)), 0.0)
    o_out = (row * T + start) * H + h + o_l * H
    tl.store(p_digate + o_out, (g_key + k_dk).to(p_digate.dtype.element_ty), mask=in_t)
    tl.store(p_dfgate + o_out, dfgate.to(p_dfgate.dtype.element_ty), mask=in_t)
