"""Triton kernels of the mLSTM step by step, for decoding and short sequences. Notation as in triton_forward.py.

m_t = max(log f_t + m_{t-1}, i_t)          C_t = exp(log f_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T
h_t = C_t^T q_t / D_t                      n_t = exp(log f_t + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t) k_t
"""

import triton
import triton.language as tl

from ..triton_common import log_sigmoid
from .triton_tiles import (
    GATE_STRIDES,
    features,
    load_tile,
    log_decay,
    normalizer,
    stabilizer,
    store_tile,
)


@triton.jit(do_not_specialize=["T", *GATE_STRIDES])
def recurrent_kernel(
    p_q,
    p_k,
    p_v,
    p_igate,
    p_fgate,
    p_mask,
    p_state_indices,  # (B,) the row of the states that each sequence has, negative for none; None: its own
    p_c_initial,  # (rows, H, K, V)
    p_n_initial,  # (rows, H, K)
    p_m_initial,  # (rows, H)
    p_c_final,  # (rows, H, K, V), may be p_c_initial: each program reads its tile before it writes it
    p_n_final,  # (B, H, K), must not be p_n_initial, nor p_m_final p_m_initial: all programs of a head read them
    p_m_final,  # (B, H)
    p_h,  # (B, T, H, V)
    p_s,  # (B, H, T)
    p_m_tokens,  # (B, H, T) m_t, inf for dead tokens
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
    stride_c_row,  # left to Triton, like those of q: known to be a multiple of 16, it keeps loads wide
    stride_n_row,
    stride_m_row,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """The cell step by step, for decoding and short sequences: all of K and one tile of V stay in registers."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    tile_v = pid % NV
    h = pid // NV % H
    row = tl.cast(pid // (NV * H), tl.int64)
    o_k = tl.arange(0, BK)
    o_v = tile_v * BV + tl.arange(0, BV)
    in_k = o_k < K
    in_v = o_v < V
    state_row = row
    present = True
    if p_state_indices is not None:
        state_row = tl.load(p_state_indices + row).to(tl.int64)
        present = state_row >= 0
        in_k = o_k < tl.where(present, K, 0)
    o_c = state_row * stride_c_row + h * (K * V)
    b_c = tl.zeros((BK, BV), tl.float32)
    b_n = tl.zeros((BK,), tl.float32)
    m = 0.0
    if p_c_initial is not None:
        b_c += load_tile(p_c_initial + o_c, o_k, o_v, V, in_k, in_v)
        b_n += tl.load(p_n_initial + state_row * stride_n_row + h * K + o_k, mask=in_k, other=0.0)
        m += tl.load(p_m_initial + state_row * stride_m_row + h, mask=present, other=0.0)

    p_q = features(p_q, row, 0, h, stride_qb, stride_qt, stride_qh) + o_k
    p_k = features(p_k, row, 0, h, stride_kb, stride_kt, stride_kh) + o_k
    p_v = features(p_v, row, 0, h, stride_vb, stride_vt, stride_vh) + o_v
    p_igate = features(p_igate, row, 0, h, stride_ib, stride_it, stride_ih)
    p_fgate = features(p_fgate, row, 0, h, stride_fb, stride_ft, stride_fh)
    p_h += (row * T * H + h) * V + o_v
    for t in range(T):
        live = present
        if p_mask is not None:
            live &= tl.load(p_mask + row * stride_mb + t * stride_mt) != 0
        live_k = o_k < tl.where(live, K, 0)
        live_v = o_v < tl.where(live, V, 0)
        b_q = tl.load(p_q + t * stride_qt, mask=live_k, other=0.0).to(tl.float32) * scale
        b_k = tl.load(p_k + t * stride_kt, mask=live_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + t * stride_vt, mask=live_v, other=0.0).to(tl.float32)
        log_i = tl.load(p_igate + t * stride_it, mask=live, other=float("-inf")).to(tl.float32)
        log_f = log_sigmoid(tl.load(p_fgate + t * stride_ft, mask=live, other=float("inf")).to(tl.float32))

        m_new = stabilizer(log_f + m, log_i)
        decay = tl.exp(log_decay(log_f, m, m_new))
        b_k *= tl.exp(log_i - m_new)
        b_c = decay * b_c + b_k[:, None] * b_v[None, :]  # [BK, BV]
        b_n = decay * b_n + b_k  # [BK]
        m = m_new
        s = tl.sum(b_n * b_q, 0)
        b_h = tl.sum(b_c * b_q[:, None], 0) / normalizer(s, m, eps)  # [BV]
        tl.store(p_h + t * (H * V), b_h.to(p_h.dtype.element_ty), mask=in_v)
        tl.store(p_s + (row * H + h) * T + t, s, mask=tile_v == 0)
        tl.store(p_m_tokens + (row * H + h) * T + t, tl.where(live, m, float("inf")), mask=tile_v == 0)

    if p_c_final is not None:
        store_tile(p_c_final + o_c, b_c, o_k, o_v, V, in_k, in_v)
        tl.store(p_n_final + (row * H + h) * K + o_k, b_n, mask=o_k < tl.where(tile_v == 0, K, 0))
        tl.store(p_m_final + row * H + h, m, mask=tile_v == 0)


@triton.jit
def keep_kernel(
    p_n_new,  # (B, H, K)
    p_m_new,  # (B, H)
    p_state_indices,
    p_n,  # (rows, H, K)
    p_m,  # (rows, H)
    stride_n_row,
    stride_m_row,
    H: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
):
    """n and m of a step in place, once no program of the step reads the old ones any more."""
    pid = tl.cast(tl.program_id(0), tl.int64)
    h = pid % H
    state_row = pid // H
    if p_state_indices is not None:
        state_row = tl.load(p_state_indices + state_row).to(tl.int64)
    present = state_row >= 0
    o_k = tl.arange(0, BK)
    b_n = tl.load(p_n_new + pid * K + o_k, mask=o_k < K, other=0.0)  # [BK]
    tl.store(p_n + state_row * stride_n_row + h * K + o_k, b_n, mask=o_k < tl.where(present, K, 0))
    tl.store(p_m + state_row * stride_m_row + h, tl.load(p_m_new + pid), mask=present)
