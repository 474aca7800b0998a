"""Triton kernels of the mLSTM: the sequence in chunks. triton_backward.py has the gradients, triton_recurrent.py the
sequence step by step.

A sequence is cut into chunks of L tokens. With C, n, m the state that enters a chunk, b_t the sum of log f from the
chunk's first token to t, and i_t the log input gate, token t of the chunk reads

    m_t = max(b_t + m, max_{j<=t} (b_t - b_j + i_j))     P_tj = exp(b_t - b_j + i_j - m_t)     a_t = exp(b_t + m - m_t)
    s_t = sum_j P_tj S_tj + a_t n.q_t                    h_t = (sum_j P_tj S_tj v_j + a_t C^T q_t) / D_t

with S = q k^T, D_t = max(|s_t|, exp(-m_t)) + eps and the scale on q. The chunk hands on

    m' = max(g + m, max_j (g - b_j + i_j))     A = exp(g + m - m')     w_j = exp(g - b_j + i_j - m')     g = b_L
    C' = A C + sum_j w_j k_j v_j^T             n' = A n + sum_j w_j k_j

m depends on the gates alone, so it is known before any product is formed and every exponent is <= 0 from the start.
Five kernels, in order: gates (b, the maxima), boundaries (m between chunks), states (C, n between chunks), scores
(P S / D, once per chunk), outputs (two products per chunk and tile of V). With m known, C and n are linear in what
enters: where sequences are few and long, the states of their spans are computed side by side and then combined.
Where they are many and C fits on chip, it stays there: of the states only n is written, and after the scores one
kernel makes C and the outputs.

Any m serves that keeps the exponents from overflowing, so m may be rounded, and is; the exponents may not. They are
differences of sums that can be a million times larger: b_t - b_j loses the digits of a mild decay behind a strong one,
and so does i_j - m_t next to 1e5. So log f, i and m are split into coarse * UNIT + fine. Coarse parts are integers,
whose sums and differences are exact; fine parts and their sums stay small. Each exponent is formed from both.

A forget gate of log f < RESET is a reset: it counts as 0 in b, so that no infinity enters a difference, and a pair of
tokens with a reset between them has weight 0. A token that is masked out, or lies behind the end of its sequence, is
dead: it has a last reset of -1, i = -inf and log f = 0, so weight 0 as a key, output 0, nothing forgotten.

Names: p_ pointers, b_ values of a tile, o_ offsets, in_t, in_k, in_v what lies inside the data along that dimension,
live the tokens that are not dead. Dimension letters: H heads, K query/key head dim, V value head dim, L chunk length,
BK and BV tiles of K and V; shapes [L, K] at the end of lines are those of tiles. Gate arrays are (B, H, T), arrays of
chunks (chunks, H, ...), states (sequences, H, ...). T and the number of chunks are run-time values: one compilation
serves all lengths.
"""

import triton
import triton.language as tl

from ..triton_common import log_sigmoid
from .triton_tiles import (
    GATE_STRIDES,
    LOWEST,
    PER_CALL,
    RESET,
    chunk_tokens,
    features,
    join,
    load_key_weights,
    load_live,
    load_stabilizer,
    load_state_weights,
    load_tile,
    load_transposed,
    max_plus,
    maximum,
    normalizer,
    pair_weights,
    sequence_chunks,
    split,
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
    p_log_w,  # (B, H, T) log of w_j, were chunk_m the m' of the chunk
    p_last_reset,  # (B, H, T) int32: where in the chunk the latest reset up to t is, from 1; 0 none, -1 t is dead
    p_g_coarse,  # (chunks, H) int32
    p_g_fine,  # (chunks, H) -inf with a reset
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

    reset = log_f < RESET  # [L]
    last_reset = tl.associative_scan(tl.where(reset, o_l + 1, 0), 0, maximum)
    last_of_chunk = tl.max(last_reset, 0)
    f_coarse, f_fine = split(tl.where(reset, 0.0, log_f))
    i_coarse, i_fine = split(log_i)
    coarse = tl.cumsum(f_coarse, 0)
    fine = tl.cumsum(f_fine, 0)
    g_coarse = tl.sum(f_coarse, 0)
    g_fine = tl.sum(f_fine, 0)
    _, m_in_chunk = tl.associative_scan((tl.where(reset, float("-inf"), log_f), log_i), 0, max_plus)

    w_coarse = g_coarse - coarse + i_coarse  # [L]
    w_fine = g_fine - fine + i_fine
    handed_on = o_l + 1 >= last_of_chunk
    chunk_m = tl.maximum(tl.max(tl.where(handed_on, join(w_coarse, w_fine), float("-inf")), 0), LOWEST)
    m_coarse, m_fine = split(chunk_m)
    log_w = tl.where(handed_on, join(w_coarse - m_coarse, w_fine - m_fine), float("-inf"))

    o_gate = (row * H + h) * T + start + o_l
    tl.store(p_coarse + o_gate, coarse, mask=in_t)
    tl.store(p_fine + o_gate, fine, mask=in_t)
    tl.store(p_log_i + o_gate, log_i, mask=in_t)
    tl.store(p_m_in_chunk + o_gate, m_in_chunk, mask=in_t)
    tl.store(p_log_w + o_gate, log_w, mask=in_t)
    tl.store(p_last_reset + o_gate, tl.where(live, last_reset, -1), mask=in_t)
    tl.store(p_g_coarse + pid, g_coarse)
    tl.store(p_g_fine + pid, tl.where(last_of_chunk > 0, float("-inf"), g_fine))
    tl.store(p_chunk_m + pid, chunk_m)


@triton.jit(do_not_specialize=PER_CALL)
def boundary_kernel(
    p_g_coarse,
    p_g_fine,
    p_chunk_m,
    p_m_initial,
    p_m_last,  # (sequences, H) m behind the last chunk if it is settled, as in a backward pass
    p_m,  # (chunks, H) as it enters each chunk
    p_log_decay,  # (chunks, H) log A
    p_w_shift,  # (chunks, H) what log w lacks: chunk_m - m'
    p_m_final,
    p_cu_seqlens,
    p_first_chunk,
    T,
    chunks_per_row,
    H: tl.constexpr,
    L: tl.constexpr,
    TILE: tl.constexpr,
):
    """m from chunk to chunk, one program for each sequence and head, and what A and w owe to it."""
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
        in_c = chunk + o_tile < last  # [TILE]
        o_chunk = tl.cast(chunk + o_tile, tl.int64) * H + h
        g_coarse = tl.load(p_g_coarse + o_chunk, mask=in_c, other=0)
        g_fine = tl.load(p_g_fine + o_chunk, mask=in_c, other=0.0)
        chunk_m = tl.load(p_chunk_m + o_chunk, mask=in_c, other=float("-inf"))
        decay, m_in_tile = tl.associative_scan((join(g_coarse, g_fine), chunk_m), 0, max_plus)
        m_next = stabilizer(decay + m, m_in_tile)
        if p_m_last is not None:
            m_next = tl.where(chunk + o_tile == last - 1, tl.load(p_m_last + pid), m_next)
        tl.store(p_m + o_chunk + H, m_next, mask=chunk + o_tile + 1 < last)
        tl.debug_barrier()  # each chunk now reads the m that its neighbour has stored
        m_coarse, m_fine = split(tl.load(p_m + o_chunk, mask=in_c, other=0.0))
        next_coarse, next_fine = split(m_next)
        log_a = join(g_coarse + m_coarse - next_coarse, g_fine + (m_fine - next_fine))
        tl.store(p_log_decay + o_chunk, log_a, mask=in_c)
        tl.store(p_w_shift + o_chunk, chunk_m - m_next, mask=in_c)
        m = tl.sum(tl.where(o_tile == TILE - 1, m_next, 0.0), 0)
    if p_m_final is not None:
        tl.store(p_m_final + pid, m)


@triton.jit(do_not_specialize=PER_CALL)
def state_kernel(
    p_k,
    p_v,
    p_log_w,
    p_log_decay,
    p_w_shift,
    p_c_start,  # (sequences, H, K, V) the state before the first chunk, or None for zero
    p_n_start,  # (sequences, H, K)
    p_c,  # (chunks, H, K, V) the state that enters each chunk, or None
    p_n,  # (chunks, H, K)
    p_c_end,  # (sequences, H, K, V) the state after the last chunk, or None
    p_n_end,  # (sequences, H, K)
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
    WEIGH_RIGHT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C and n from chunk to chunk, one program for each tile of C. The weights w go onto k, which has fewer elements
    here, or to the right, onto v: on Hopper a left operand must come from memory as it is (docs/kernels.md). Where
    sequences are cut into spans, the states at start and end are those of spans."""
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
        log_w = tl.load(p_log_w + start + o_l, mask=start + o_l < end, other=float("-inf"))  # [L]
        live = log_w > float("-inf")
        w = tl.exp(log_w + tl.load(p_w_shift + o_chunk))
        decay = tl.exp(tl.load(p_log_decay + o_chunk))
        p_k_chunk = features(p_k, row, start, h, stride_kb, stride_kt, stride_kh)
        p_v_chunk = features(p_v, row, start, h, stride_vb, stride_vt, stride_vh)
        b_k = load_transposed(p_k_chunk, o_l, o_k, stride_kt, live, in_k)  # [BK, L]
        b_v = load_tile(p_v_chunk, o_l, o_v, stride_vt, live, in_v)  # [L, BV]
        if WEIGH_RIGHT:
            b_v = b_v.to(tl.float32) * w[:, None]
            b_c = tl.dot(b_k.to(DOT), b_v.to(DOT), acc=decay * b_c, input_precision=PRECISION)  # [BK, BV]
            b_n = decay * b_n + tl.sum(b_k.to(tl.float32) * w[None, :], 1)  # [BK]
        else:
            b_k = b_k.to(tl.float32) * w[None, :]
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
    p_last_reset,
    p_n,
    p_m,
    p_scores,  # (chunks, H, L, L) P_tj S_tj / D_t
    p_read_weight,  # (B, H, T) scale a_t / D_t: the weight of C^T q_t in h_t
    p_s,  # (B, H, T)
    p_m_tokens,  # (B, H, T) m_t, inf for dead tokens
    p_cu_seqlens,
    p_first_chunk,
    p_sequence,
    width,  # K, at run time: were it known, the compiler would unroll short loops over its tiles, and spill
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
    live = load_live(p_last_reset, o_gate, in_t)

    p_q = features(p_q, row, start, h, stride_qb, stride_qt, stride_qh)
    p_k = features(p_k, row, start, h, stride_kb, stride_kt, stride_kh)
    b_s = tl.zeros((L, L), tl.float32)
    for k in range(0, width, BK):
        o_k = k + tl.arange(0, BK)
        b_q = load_tile(p_q, o_l, o_k, stride_qt, live, o_k < K)  # [L, BK]
        b_k = load_transposed(p_k, o_l, o_k, stride_kt, live, o_k < K)  # [BK, L]
        b_s = tl.dot(b_q.to(DOT), b_k.to(DOT), acc=b_s, input_precision=PRECISION)  # [L, L]
    qn = tl.zeros((L,), tl.float32)
    for k in tl.range(0, width, BK, num_stages=3):  # by itself: no tile of a product may have another use
        o_k = k + tl.arange(0, BK)
        b_q = load_tile(p_q, o_l, o_k, stride_qt, live, o_k < K)  # [L, BK]
        b_n = tl.load(p_n + o_chunk * K + o_k, mask=o_k < K, other=0.0)  # [BK]
        qn += tl.sum(b_q.to(tl.float32) * b_n[None, :], 1)  # [L]

    m = load_stabilizer(p_coarse, p_fine, p_m_in_chunk, p_last_reset, p_m, o_gate, o_chunk, in_t)  # [L]
    b_s *= pair_weights(p_coarse, p_fine, p_log_i, p_last_reset, o_gate, in_t, m, L) * scale  # [L, L]
    a = load_state_weights(p_coarse, p_fine, p_last_reset, p_m, m, o_gate, o_chunk, in_t) * scale
    s = tl.sum(b_s, 1) + a * qn
    inverse = 1.0 / normalizer(s, m, eps)
    p_scores += o_chunk * (L * L) + o_l[:, None] * L + o_l[None, :]
    tl.store(p_scores, (b_s * inverse[:, None]).to(p_scores.dtype.element_ty))
    tl.store(p_read_weight + o_gate, a * inverse, mask=in_t)
    tl.store(p_s + o_gate, s, mask=in_t)
    tl.store(p_m_tokens + o_gate, m, mask=in_t)


@triton.jit(do_not_specialize=PER_CALL)
def output_kernel(
    p_q,
    p_v,
    p_scores,
    p_read_weight,
    p_last_reset,
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
    """h of one chunk, for one tile of V."""
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
    read_weight = tl.load(p_read_weight + o_gate, mask=in_t, other=0.0)

    p_q = features(p_q, row, start, h, stride_qb, stride_qt, stride_qh)
    p_c += o_chunk * (K * V)
    b_h = tl.zeros((L, BV), tl.float32)
    for k in range(0, width, BK):
        o_k = k + tl.arange(0, BK)
        b_q = load_tile(p_q, o_l, o_k, stride_qt, live, o_k < K)  # [L, BK]
        b_c = load_tile(p_c, o_k, o_v, V, o_k < K, in_v)  # [BK, BV]
        b_h = tl.dot(b_q.to(DOT), b_c.to(DOT), acc=b_h, input_precision=PRECISION)  # [L, BV]
    b_v = load_tile(features(p_v, row, start, h, stride_vb, stride_vt, stride_vh), o_l, o_v, stride_vt, live, in_v)
    b_scores = tl.load(p_scores + o_chunk * (L * L) + o_l[:, None] * L + o_l[None, :])  # [L, L]
    b_h = tl.dot(b_scores.to(DOT), b_v.to(DOT), acc=read_weight[:, None] * b_h, input_precision=PRECISION)
    store_tile(p_h + ((row * T + start) * H + h) * V, b_h, o_l, o_v, H * V, in_t, in_v)


@triton.jit(do_not_specialize=PER_CALL)
def normalizer_kernel(
    p_k,
    p_log_w,
    p_log_decay,
    p_w_shift,
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
    # Triton pipelines a loop without a product only when it is told how many stages to have.
    for chunk in tl.range(first, last, num_stages=3):
        o_chunk = tl.cast(chunk, tl.int64) * H + h
        tl.store(p_n + o_chunk * K + o_k, b_n, mask=in_k)
        log_w = tl.load(p_log_w + start + o_l, mask=start + o_l < end, other=float("-inf"))  # [L]
        live = log_w > float("-inf")
        w = tl.exp(log_w + tl.load(p_w_shift + o_chunk))
        decay = tl.exp(tl.load(p_log_decay + o_chunk))
        p_k_chunk = features(p_k, row, start, h, stride_kb, stride_kt, stride_kh)
        b_k = load_tile(p_k_chunk, o_l, o_k, stride_kt, live, in_k)  # [L, BK]
        b_n = decay * b_n + tl.sum(b_k.to(tl.float32) * w[:, None], 0)  # [BK]
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
    p_last_reset,
    p_log_decay,
    p_w_shift,
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
    """C from chunk to chunk and h of each chunk, one program for each tile of V: it keeps all rows of its columns of
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
    # Otherwise the compiler hoists the address arithmetic of a chunk out of the loop, and the registers spill.
    for chunk in tl.range(first, last, disable_licm=True):
        o_chunk = tl.cast(chunk, tl.int64) * H + h
        in_t = start + o_l < end
        o_gate = (row * H + h) * T + start + o_l
        live = load_live(p_last_reset, o_gate, in_t)
        p_q_chunk = features(p_q, row, start, h, stride_qb, stride_qt, stride_qh)
        p_k_chunk = features(p_k, row, start, h, stride_kb, stride_kt, stride_kh)
        p_v_chunk = features(p_v, row, start, h, stride_vb, stride_vt, stride_vh)
        b_q = load_tile(p_q_chunk, o_l, o_k, stride_qt, live, in_k)  # [L, BK]
        b_k = load_transposed(p_k_chunk, o_l, o_k, stride_kt, live, in_k)  # [BK, L]
        b_v = load_tile(p_v_chunk, o_l, o_v, stride_vt, live, in_v)  # [L, BV]
        b_scores = tl.load(p_scores + o_chunk * (L * L) + o_l[:, None] * L + o_l[None, :])  # [L, L]
        read_weight = tl.load(p_read_weight + o_gate, mask=in_t, other=0.0)
        w = load_key_weights(p_log_w, p_w_shift, o_gate, o_chunk, in_t)  # [L]
        decay = tl.exp(tl.load(p_log_decay + o_chunk))

        # Neither product is the accumulator of the other: the compiler would take that for a chain of products, as
        # in attention, and have every warp group compute all of the first one.
        b_h = tl.dot(b_q.to(DOT), b_c.to(DOT), input_precision=PRECISION)  # [L, BV]
        b_own = tl.dot(b_scores.to(DOT), b_v.to(DOT), input_precision=PRECISION)  # [L, BV]
        b_h = tl.fma(b_h, tl.broadcast_to(read_weight[:, None], (L, BV)), b_own)
        store_tile(p_h + ((row * T + start) * H + h) * V, b_h, o_l, o_v, H * V, in_t, in_v)
        b_v = b_v.to(tl.float32) * w[:, None]
        b_c = tl.dot(b_k.to(DOT), b_v.to(DOT), acc=decay * b_c, input_precision=PRECISION)  # [BK, BV]
        start += L

    if p_c_final is not None:
        store_tile(p_c_final + o_state, b_c, o_k, o_v, V, in_k, in_v)
