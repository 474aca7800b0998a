"""Triton kernels of the mLSTM: the sequence in chunks, and step by step. mlstm_triton_backward.py has the gradients.

A sequence is cut into chunks of L tokens. With C, n, m the state that enters a chunk, b_t the sum of log f from the
chunk's first token to t, and i_t the log input gate, token t of the chunk reads

    m_t = max(b_t + m, max_{j<=t} (b_t - b_j + i_j))     P_tj = exp(b_t - b_j + i_j - m_t)     a_t = exp(b_t + m - m_t)
    s_t = sum_j P_tj S_tj + a_t n.q_t                    h_t = (sum_j P_tj S_tj v_j + a_t C^T q_t) / D_t

with S = q k^T, D_t = max(|s_t|, exp(-m_t)) + eps and the scale on q. The chunk hands on

    m' = max(g + m, max_j (g - b_j + i_j))     A = exp(g + m - m')     w_j = exp(g - b_j + i_j - m')     g = b_L
    C' = A C + sum_j w_j k_j v_j^T             n' = A n + sum_j w_j k_j

m depends on the gates alone, so it is known before any product is formed and every exponent is <= 0 from the start.
Five kernels, in order: gates (b, the maxima), borders (m between chunks), states (C, n between chunks), scores
(P S / D, once per chunk), outputs (two products per chunk and block of V). With m known, C and n are linear in what
enters: where sequences are few and long, the states of their spans are computed side by side and then combined.
Where they are many and C fits on chip, it stays there: of the states only n is written, and after the scores one
kernel makes C and the outputs.

b_t - b_j loses the digits of a mild decay behind a strong one. So b is kept as coarse / UNITS + fine: log f in whole
units, whose sums and differences are exact integers, and the rest, whose sums stay small. A forget gate of
log f < RESET is a reset: it counts as 0 in b, so that no infinity enters a difference, and lowers coarse by
BARRIER, whose exponential is 0. A token that is masked out, or lies behind the end of its sequence, has a reset count
of -1, i = -inf and log f = 0: weight 0 as a key, output 0, nothing forgotten.

Names: p_ pointers, b_ blocks, o_ offsets. Dimension letters: H heads, K query/key head dim, V value head dim, L chunk
length, BK and BV blocks of K and V. Gate arrays are (B, H, T), arrays of chunks (chunks, H, ...), states
(sequences, H, ...). T and the number of chunks are run-time values: one compilation serves all lengths.
"""

import triton
import triton.language as tl

from ..triton_common import log_sigmoid
from .triton_tiles import (
    BARRIER,
    GATE_STRIDES,
    PER_CALL,
    RESET,
    UNITS,
    chunk_tokens,
    features,
    load_boundary,
    load_live,
    load_stabilizer,
    load_tile,
    load_transposed,
    max_plus,
    normalizer,
    pair_weights,
    sequence_chunks,
    stabilizer,
    store_tile,
)


@triton.jit(do_not_specialize=[*PER_CALL, *GATE_STRIDES])
def gate_kernel(
    p_igate,
    p_fgate,
    p_mask,
    p_coarse,  # (B, H, T) int32
    p_fine,  # (B, H, T)
    p_log_i,  # (B, H, T)
    p_m_in_chunk,  # (B, H, T) m_t without what enters the chunk
    p_log_w,  # (B, H, T) log of w_j, up to m'
    p_reset_count,  # (B, H, T) number of resets in the chunk up to t
    p_chunk_decay,  # (chunks, H) g, -inf with a reset
    p_chunk_m,  # (chunks, H) m' without what enters the chunk
    p_cu_seqlens,
    p_first_chunk,
    p_sequence,
    T,
    chunks_per_row,
    stride_ib,
    stride_it,
    stride_ih,
    stride_fb,
    stride_ft,
    stride_fh,
    stride_mb,
    stride_mt,
    H: tl.constexpr,
    L: tl.constexpr,
):
    pid = tl.program_id(0)
    h = pid % H
    row, start, end = chunk_tokens(pid // H, T, chunks_per_row, p_cu_seqlens, p_first_chunk, p_sequence, L)
    o_l = tl.arange(0, L)
    in_t = start + o_l < end
    live = in_t
    token = tl.cast(start + o_l, tl.int64)
    if p_mask is not None:
        live &= tl.load(p_mask + row * stride_mb + token * stride_mt, mask=in_t, other=0) != 0
    p_igate = features(p_igate, row, 0, h, stride_ib, stride_it, stride_ih)
    p_fgate = features(p_fgate, row, 0, h, stride_fb, stride_ft, stride_fh)
    log_i = tl.load(p_igate + token * stride_it, mask=live, other=float("-inf")).to(tl.float32)
    log_f = log_sigmoid(tl.load(p_fgate + token * stride_ft, mask=live, other=float("inf")).to(tl.float32))

    reset = (log_f < RESET).to(tl.int32)
    reset_count = tl.cumsum(reset, 0)
    resets = tl.sum(reset, 0)
    summand = tl.where(reset != 0, 0.0, log_f)
    units = tl.floor(summand * UNITS + 0.5).to(tl.int32)
    rest = summand - units / UNITS
    coarse = tl.cumsum(units, 0)
    fine = tl.cumsum(rest, 0)
    g_coarse = tl.sum(units, 0)
    g_fine = tl.sum(rest, 0)
    log_w = tl.where(reset_count == resets, (g_coarse - coarse) / UNITS + (g_fine - fine) + log_i, float("-inf"))
    _, m_in_chunk = tl.associative_scan((tl.where(reset != 0, float("-inf"), log_f), log_i), 0, max_plus)

    o_gate = (row * H + h) * T + start + o_l
    tl.store(p_coarse + o_gate, coarse - reset_count * BARRIER, mask=in_t)
    tl.store(p_fine + o_gate, fine, mask=in_t)
    tl.store(p_log_i + o_gate, log_i, mask=in_t)
    tl.store(p_m_in_chunk + o_gate, m_in_chunk, mask=in_t)
    tl.store(p_log_w + o_gate, log_w, mask=in_t)
    tl.store(p_reset_count + o_gate, tl.where(live, reset_count, -1), mask=in_t)
    tl.store(p_chunk_decay + pid, tl.where(resets > 0, float("-inf"), g_coarse / UNITS + g_fine))
    tl.store(p_chunk_m + pid, tl.max(log_w, 0))


@triton.jit(do_not_specialize=PER_CALL)
def boundary_kernel(
    p_chunk_decay,
    p_chunk_m,
    p_m_initial,
    p_m,  # (chunks, H) as it enters each chunk
    p_m_next,  # (chunks, H) as it leaves
    p_m_final,
    p_cu_seqlens,
    p_first_chunk,
    T,
    chunks_per_row,
    H: tl.constexpr,
    L: tl.constexpr,
    TILE: tl.constexpr,
):
    """m from chunk to chunk, one program for each sequence and head."""
    pid = tl.program_id(0)
    h = pid % H
    _, _, _, first, last = sequence_chunks(
        pid // H, T, chunks_per_row, 1, chunks_per_row, p_cu_seqlens, p_first_chunk, L
    )
    o_tile = tl.arange(0, TILE)
    m = 0.0
    if p_m_initial is not None:
        m += tl.load(p_m_initial + pid)
    tl.store(p_m + tl.cast(first, tl.int64) * H + h, m, mask=first < last)
    for chunk in range(first, last, TILE):
        in_t = chunk + o_tile < last
        o_chunk = tl.cast(chunk + o_tile, tl.int64) * H + h
        g = tl.load(p_chunk_decay + o_chunk, mask=in_t, other=0.0)
        decay, m_in_chunk = tl.associative_scan(
            (g, tl.load(p_chunk_m + o_chunk, mask=in_t, other=float("-inf"))), 0, max_plus
        )
        m_next = stabilizer(decay + m, m_in_chunk)
        tl.store(p_m_next + o_chunk, m_next, mask=in_t)
        tl.store(p_m + o_chunk + H, m_next, mask=chunk + o_tile + 1 < last)
        m = tl.sum(tl.where(o_tile == TILE - 1, m_next, 0.0), 0)
    if p_m_final is not None:
        tl.store(p_m_final + pid, m)


@triton.jit(do_not_specialize=PER_CALL)
def state_kernel(
    p_k,
    p_v,
    p_log_w,
    p_chunk_decay,
    p_m,
    p_m_next,
    p_c_start,
    p_n_start,
    p_c,  # (chunks, H, K, V) the state that enters each chunk, or None
    p_n,  # (chunks, H, K)
    p_c_end,
    p_n_end,
    p_decay_product,  # (sequences, H) the product of all A, or None
    p_cu_seqlens,
    p_first_chunk,
    T,
    chunks_per_row,
    spans,
    chunks_per_span,
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
    """C and n from chunk to chunk, one program for each block of C. Initial and final states are those of spans
    where sequences are cut into spans."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    tile_v = pid % NV
    tile_k = pid // NV % NK
    h = pid // (NV * NK) % H
    sequence = pid // (NV * NK * H)
    row, start, end, first, last = sequence_chunks(
        sequence, T, chunks_per_row, spans, chunks_per_span, p_cu_seqlens, p_first_chunk, L
    )

    o_k = tile_k * BK + tl.arange(0, BK)
    o_v = tile_v * BV + tl.arange(0, BV)
    in_k = o_k < K
    in_v = o_v < V
    owns_n = o_k < tl.where(tile_v == 0, K, 0)
    o_state = tl.cast(sequence, tl.int64) * H + h
    b_c = tl.zeros((BK, BV), tl.float32)
    b_n = tl.zeros((BK,), tl.float32)
    decay_product = 1.0
    if p_c_start is not None:
        b_c += load_tile(p_c_start + o_state * (K * V), o_k, o_v, V, in_k, in_v)
        b_n += tl.load(p_n_start + o_state * K + o_k, mask=in_k, other=0.0)

    o_l = tl.arange(0, L)
    p_log_w += (row * H + h) * T
    for chunk in range(first, last):
        o_chunk = tl.cast(chunk, tl.int64) * H + h
        if p_c is not None:
            store_tile(p_c + o_chunk * (K * V), b_c, o_k, o_v, V, in_k, in_v)
            tl.store(p_n + o_chunk * K + o_k, b_n, mask=owns_n)
        log_w = tl.load(p_log_w + start + o_l, mask=start + o_l < end, other=float("-inf"))
        live = log_w > float("-inf")
        p_k_chunk = features(p_k, row, start, h, stride_kb, stride_kt, stride_kh)
        p_v_chunk = features(p_v, row, start, h, stride_vb, stride_vt, stride_vh)
        b_k = load_transposed(p_k_chunk, o_l, o_k, stride_kt, live, in_k)
        b_v = load_tile(p_v_chunk, o_l, o_v, stride_vt, live, in_v)
        decay, m_next = load_boundary(p_chunk_decay, p_m, p_m_next, o_chunk)
        b_k = b_k.to(tl.float32) * tl.exp(log_w - m_next)[None, :]
        b_c = tl.dot(b_k.to(DOT), b_v.to(DOT), acc=decay * b_c, input_precision=PRECISION)
        b_n = decay * b_n + tl.sum(b_k, 1)
        decay_product *= decay
        start += L

    if p_c_end is not None:
        store_tile(p_c_end + o_state * (K * V), b_c, o_k, o_v, V, in_k, in_v)
        tl.store(p_n_end + o_state * K + o_k, b_n, mask=owns_n)
    if p_decay_product is not None:
        tl.store(p_decay_product + o_state, decay_product, mask=pid % (NV * NK) == 0)


@triton.jit(do_not_specialize=PER_CALL)
def combine_kernel(
    p_state,  # (sequences * spans, H, N) what each span adds; becomes what enters it
    p_decay,  # (sequences * spans, H) what it keeps
    p_start,
    p_end,
    spans,
    H: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    """A state from span to span, in place; for gradients from the last one to the first."""
    TILES: tl.constexpr = (N + TILE - 1) // TILE
    pid = tl.program_id(0)
    o_tile = pid % TILES * TILE + tl.arange(0, TILE)
    in_t = o_tile < N
    h = pid // TILES % H
    sequence = tl.cast(pid // (TILES * H), tl.int64)
    b_state = tl.zeros((TILE,), tl.float32)
    if p_start is not None:
        b_state += tl.load(p_start + (sequence * H + h) * N + o_tile, mask=in_t, other=0.0)
    for i in range(spans):
        span = sequence * spans + (spans - 1 - i if BACKWARDS else i)
        p_span = p_state + (span * H + h) * N + o_tile
        b_added = tl.load(p_span, mask=in_t, other=0.0)
        tl.store(p_span, b_state, mask=in_t)
        b_state = tl.load(p_decay + span * H + h) * b_state + b_added
    if p_end is not None:
        tl.store(p_end + (sequence * H + h) * N + o_tile, b_state, mask=in_t)


@triton.jit(do_not_specialize=PER_CALL)
def score_kernel(
    p_q,
    p_k,
    p_coarse,
    p_fine,
    p_log_i,
    p_m_in_chunk,
    p_reset_count,
    p_n,
    p_m,
    p_scores,  # (chunks, H, L, L) P_tj S_tj / D_t
    p_read_weight,  # (B, H, T) scale a_t / D_t: the weight of C^T q_t in h_t
    p_s,  # (B, H, T)
    p_cu_seqlens,
    p_first_chunk,
    p_sequence,
    width,  # K, at run time: were it known, the compiler would unroll short loops over its blocks, and spill
    T,
    chunks_per_row,
    scale,
    eps,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    H: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The weights with which h reads the values of its chunk and the state that enters it. n.q stays in float32: where
    its terms cancel, h is large."""
    pid = tl.program_id(0)
    h = pid % H
    row, start, end = chunk_tokens(pid // H, T, chunks_per_row, p_cu_seqlens, p_first_chunk, p_sequence, L)
    o_l = tl.arange(0, L)
    in_t = start + o_l < end
    o_gate = (row * H + h) * T + start + o_l
    o_chunk = tl.cast(pid, tl.int64)
    live = load_live(p_reset_count, o_gate, in_t)

    p_q = features(p_q, row, start, h, stride_qb, stride_qt, stride_qh)
    p_k = features(p_k, row, start, h, stride_kb, stride_kt, stride_kh)
    b_s = tl.zeros((L, L), tl.float32)
    qn = tl.zeros((L,), tl.float32)
    for k in range(0, width, BK):
        o_k = k + tl.arange(0, BK)
        b_q = load_tile(p_q, o_l, o_k, stride_qt, live, o_k < K)
        b_k = load_transposed(p_k, o_l, o_k, stride_kt, live, o_k < K)
        b_n = tl.load(p_n + o_chunk * K + o_k, mask=o_k < K, other=0.0)
        b_s = tl.dot(b_q.to(DOT), b_k.to(DOT), acc=b_s, input_precision=PRECISION)
        qn += tl.sum(b_q.to(tl.float32) * b_n[None, :], 1)

    m_in = tl.load(p_m + o_chunk)
    m, from_state = load_stabilizer(p_coarse, p_fine, p_m_in_chunk, p_reset_count, o_gate, in_t, m_in)
    b_s *= pair_weights(p_coarse, p_fine, p_log_i, o_gate, in_t, m, L) * scale
    a = tl.exp(from_state - m) * scale
    s = tl.sum(b_s, 1) + a * qn
    inverse = 1.0 / normalizer(s, m, eps)
    p_scores += o_chunk * (L * L) + o_l[:, None] * L + o_l[None, :]
    tl.store(p_scores, (b_s * inverse[:, None]).to(p_scores.dtype.element_ty))
    tl.store(p_read_weight + o_gate, a * inverse, mask=in_t)
    tl.store(p_s + o_gate, s, mask=in_t)


@triton.jit(do_not_specialize=PER_CALL)
def output_kernel(
    p_q,
    p_v,
    p_scores,
    p_read_weight,
    p_reset_count,
    p_c,
    p_h,  # (B, T, H, V)
    p_cu_seqlens,
    p_first_chunk,
    p_sequence,
    width,  # K, at run time, as for score_kernel
    T,
    chunks_per_row,
    stride_qb,
    stride_qt,
    stride_qh,
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
    """h of one chunk, for one block of V."""
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
    live = load_live(p_reset_count, o_gate, in_t)
    read_weight = tl.load(p_read_weight + o_gate, mask=in_t, other=0.0)

    b_v = load_tile(features(p_v, row, start, h, stride_vb, stride_vt, stride_vh), o_l, o_v, stride_vt, live, in_v)
    b_scores = tl.load(p_scores + o_chunk * (L * L) + o_l[:, None] * L + o_l[None, :])
    b_h = tl.dot(b_scores.to(DOT), b_v.to(DOT), input_precision=PRECISION)
    p_q = features(p_q, row, start, h, stride_qb, stride_qt, stride_qh)
    p_c += o_chunk * (K * V)
    for k in range(0, width, BK):
        o_k = k + tl.arange(0, BK)
        b_q = load_tile(p_q, o_l, o_k, stride_qt, live, o_k < K).to(tl.float32) * read_weight[:, None]
        b_c = load_tile(p_c, o_k, o_v, V, o_k < K, in_v)
        b_h = tl.dot(b_q.to(DOT), b_c.to(DOT), acc=b_h, input_precision=PRECISION)
    store_tile(p_h + ((row * T + start) * H + h) * V, b_h, o_l, o_v, H * V, in_t, in_v)


@triton.jit(do_not_specialize=PER_CALL)
def normalizer_kernel(
    p_k,
    p_log_w,
    p_chunk_decay,
    p_m,
    p_m_next,
    p_n_initial,
    p_n,  # (chunks, H, K) the state that enters each chunk
    p_n_final,
    p_cu_seqlens,
    p_first_chunk,
    T,
    chunks_per_row,
    stride_kb,
    stride_kt,
    stride_kh,
    H: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
):
    """n alone from chunk to chunk: what the scores need of the state, where C is left to `on_chip_kernel`."""
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    h = pid // NK % H
    sequence = pid // (NK * H)
    row, start, end, first, last = sequence_chunks(
        sequence, T, chunks_per_row, 1, chunks_per_row, p_cu_seqlens, p_first_chunk, L
    )
    o_k = pid % NK * BK + tl.arange(0, BK)
    in_k = o_k < K
    o_state = tl.cast(sequence, tl.int64) * H + h
    b_n = tl.zeros((BK,), tl.float32)
    if p_n_initial is not None:
        b_n += tl.load(p_n_initial + o_state * K + o_k, mask=in_k, other=0.0)
    o_l = tl.arange(0, L)
    p_log_w += (row * H + h) * T
    # Loops without a product are pipelined on demand only.
    for chunk in tl.range(first, last, num_stages=3):
        o_chunk = tl.cast(chunk, tl.int64) * H + h
        tl.store(p_n + o_chunk * K + o_k, b_n, mask=in_k)
        log_w = tl.load(p_log_w + start + o_l, mask=start + o_l < end, other=float("-inf"))
        p_k_chunk = features(p_k, row, start, h, stride_kb, stride_kt, stride_kh)
        b_k = load_tile(p_k_chunk, o_l, o_k, stride_kt, log_w > float("-inf"), in_k)
        decay, m_next = load_boundary(p_chunk_decay, p_m, p_m_next, o_chunk)
        b_n = decay * b_n + tl.sum(b_k.to(tl.float32) * tl.exp(log_w - m_next)[:, None], 0)
        start += L
    if p_n_final is not None:
        tl.store(p_n_final + o_state * K + o_k, b_n, mask=in_k)


@triton.jit(do_not_specialize=PER_CALL)
def on_chip_kernel(
    p_q,
    p_k,
    p_v,
    p_scores,
    p_read_weight,
    p_log_w,
    p_reset_count,
    p_chunk_decay,
    p_m,
    p_m_next,
    p_c_initial,
    p_c_final,
    p_h,  # (B, T, H, V)
    p_cu_seqlens,
    p_first_chunk,
    T,
    chunks_per_row,
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
    """C from chunk to chunk and h of each chunk, one program for each block of V: it keeps all rows of its columns of
    C, so that C never goes through memory. BK holds all of K. The weights w are put on v, which has fewer columns
    here than k."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    h = pid // NV % H
    sequence = pid // (NV * H)
    row, start, end, first, last = sequence_chunks(
        sequence, T, chunks_per_row, 1, chunks_per_row, p_cu_seqlens, p_first_chunk, L
    )
    o_k = tl.arange(0, BK)
    o_v = pid % NV * BV + tl.arange(0, BV)
    in_k = o_k < K
    in_v = o_v < V
    o_state = (tl.cast(sequence, tl.int64) * H + h) * (K * V)
    b_c = tl.zeros((BK, BV), tl.float32)
    if p_c_initial is not None:
        b_c += load_tile(p_c_initial + o_state, o_k, o_v, V, in_k, in_v)

    o_l = tl.arange(0, L)
    # All addresses of a chunk, kept in registers from chunk to chunk, would fill these.
    for chunk in tl.range(first, last, disable_licm=True):
        o_chunk = tl.cast(chunk, tl.int64) * H + h
        in_t = start + o_l < end
        o_gate = (row * H + h) * T + start + o_l
        live = load_live(p_reset_count, o_gate, in_t)
        p_q_chunk = features(p_q, row, start, h, stride_qb, stride_qt, stride_qh)
        p_k_chunk = features(p_k, row, start, h, stride_kb, stride_kt, stride_kh)
        p_v_chunk = features(p_v, row, start, h, stride_vb, stride_vt, stride_vh)
        b_q = load_tile(p_q_chunk, o_l, o_k, stride_qt, live, in_k)
        b_k = load_transposed(p_k_chunk, o_l, o_k, stride_kt, live, in_k)
        b_v = load_tile(p_v_chunk, o_l, o_v, stride_vt, live, in_v)
        b_scores = tl.load(p_scores + o_chunk * (L * L) + o_l[:, None] * L + o_l[None, :])
        read_weight = tl.load(p_read_weight + o_gate, mask=in_t, other=0.0)
        log_w = tl.load(p_log_w + o_gate, mask=in_t, other=float("-inf"))
        decay, m_next = load_boundary(p_chunk_decay, p_m, p_m_next, o_chunk)

        # Not one as the accumulator of the other: the compiler takes that for a chain of products, as in attention,
        # and has every warp group compute all of the first.
        b_h = tl.dot(b_q.to(DOT), b_c.to(DOT), input_precision=PRECISION)
        b_own = tl.dot(b_scores.to(DOT), b_v.to(DOT), input_precision=PRECISION)
        b_h = tl.fma(b_h, tl.broadcast_to(read_weight[:, None], (L, BV)), b_own)
        store_tile(p_h + ((row * T + start) * H + h) * V, b_h, o_l, o_v, H * V, in_t, in_v)
        b_v = b_v.to(tl.float32) * tl.exp(log_w - m_next)[:, None]
        b_c = tl.dot(b_k.to(DOT), b_v.to(DOT), acc=decay * b_c, input_precision=PRECISION)
        start += L

    if p_c_final is not None:
        store_tile(p_c_final + o_state, b_c, o_k, o_v, V, in_k, in_v)


@triton.jit(do_not_specialize=["T", *GATE_STRIDES])
def recurrent_kernel(
    p_q,
    p_k,
    p_v,
    p_igate,
    p_fgate,
    p_mask,
    p_c_initial,
    p_n_initial,
    p_m_initial,
    p_c_final,  # may be p_c_initial: each program reads its block before it writes it
    p_n_final,  # must not be p_n_initial, nor p_m_final p_m_initial: all programs of a head read them
    p_m_final,
    p_h,  # (B, T, H, V)
    p_s,  # (B, H, T)
    T,
    scale,
    eps,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ib,
    stride_it,
    stride_ih,
    stride_fb,
    stride_ft,
    stride_fh,
    stride_mb,
    stride_mt,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """The cell step by step, for decoding and short sequences: all of K and one block of V stay in registers."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    tile_v = pid % NV
    h = pid // NV % H
    row = tl.cast(pid // (NV * H), tl.int64)
    o_k = tl.arange(0, BK)
    o_v = tile_v * BV + tl.arange(0, BV)
    in_k = o_k < K
    in_v = o_v < V
    o_state = row * H + h
    b_c = tl.zeros((BK, BV), tl.float32)
    b_n = tl.zeros((BK,), tl.float32)
    m = 0.0
    if p_c_initial is not None:
        b_c += load_tile(p_c_initial + o_state * (K * V), o_k, o_v, V, in_k, in_v)
        b_n += tl.load(p_n_initial + o_state * K + o_k, mask=in_k, other=0.0)
        m += tl.load(p_m_initial + o_state)

    p_q = features(p_q, row, 0, h, stride_qb, stride_qt, stride_qh) + o_k
    p_k = features(p_k, row, 0, h, stride_kb, stride_kt, stride_kh) + o_k
    p_v = features(p_v, row, 0, h, stride_vb, stride_vt, stride_vh) + o_v
    p_igate = features(p_igate, row, 0, h, stride_ib, stride_it, stride_ih)
    p_fgate = features(p_fgate, row, 0, h, stride_fb, stride_ft, stride_fh)
    p_h += (row * T * H + h) * V + o_v
    for t in range(T):
        live = True
        if p_mask is not None:
            live = tl.load(p_mask + row * stride_mb + t * stride_mt) != 0
        live_k = o_k < tl.where(live, K, 0)
        live_v = o_v < tl.where(live, V, 0)
        b_q = tl.load(p_q + t * stride_qt, mask=live_k, other=0.0).to(tl.float32) * scale
        b_k = tl.load(p_k + t * stride_kt, mask=live_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + t * stride_vt, mask=live_v, other=0.0).to(tl.float32)
        log_i = tl.load(p_igate + t * stride_it, mask=live, other=float("-inf")).to(tl.float32)
        log_f = log_sigmoid(tl.load(p_fgate + t * stride_ft, mask=live, other=float("inf")).to(tl.float32))

        m_new = stabilizer(log_f + m, log_i)
        decay = tl.exp(log_f + m - m_new)
        b_k *= tl.exp(log_i - m_new)
        b_c = decay * b_c + b_k[:, None] * b_v[None, :]
        b_n = decay * b_n + b_k
        m = m_new
        s = tl.sum(b_n * b_q, 0)
        b_h = tl.sum(b_c * b_q[:, None], 0) / normalizer(s, m, eps)
        tl.store(p_h + t * (H * V), b_h.to(p_h.dtype.element_ty), mask=in_v)
        tl.store(p_s + o_state * T + t, s, mask=tile_v == 0)

    if p_c_final is not None:
        store_tile(p_c_final + o_state * (K * V), b_c, o_k, o_v, V, in_k, in_v)
        tl.store(p_n_final + o_state * K + o_k, b_n, mask=o_k < tl.where(tile_v == 0, K, 0))
        tl.store(p_m_final + o_state, m, mask=tile_v == 0)
