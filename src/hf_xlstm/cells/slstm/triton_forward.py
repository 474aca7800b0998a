"""Triton kernels of the sLSTM's forward pass: R on chip, R read in tiles, and a head spread over several programs.
Names and notation as in triton_cell.py."""

import triton
import triton.language as tl

from .triton_cell import (
    PER_CALL,
    arrive,
    cell,
    final_state,
    is_live,
    load_exchanged,
    load_four,
    load_state,
    load_weights,
    multiply_four,
    places,
    state_rows,
    store_four,
    wait,
    with_bias,
    work,
)


@triton.jit(do_not_specialize=PER_CALL)
def forward_resident_kernel(
    p_gates,
    p_recurrent_weight,  # (4, H, D_out, D_in)
    p_bias,
    p_mask,
    p_cu_seqlens,
    p_state_indices,  # (N,) the row of the states that each sequence has, negative for none; None: its own
    p_h_initial,  # (rows, H, D), like all states
    p_c_initial,
    p_n_initial,
    p_m_initial,
    p_h_final,
    p_c_final,
    p_n_final,
    p_m_final,
    p_h,  # (B, T, H, D)
    p_saved,  # (B, T, 4, H, D)
    p_c,  # (B, T, H, D)
    T,
    N,
    stride_gb,
    stride_gt,
    stride_gg,
    stride_gh,
    stride_mb,
    stride_mt,
    stride_state_row,
    H: tl.constexpr,
    D: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h, o_n, in_n, row, start, length = work(tl.program_id(0), N, T, p_cu_seqlens, H, BB)
    state_row, has_state = state_rows(p_state_indices, o_n, in_n)
    o_d = tl.arange(0, BD)
    in_d = o_d < D
    inside = has_state[:, None] & in_d[None, :]  # [BB, BD]
    w_i, w_f, w_z, w_o = load_weights(p_recurrent_weight, h, o_d, o_d, 1, D, H, D, DOT)  # [BD_in, BD_out]
    o_state = (state_row * stride_state_row + h * D)[:, None] + o_d[None, :]
    b_h, b_c, b_m, b_rest = load_state(p_h_initial, p_c_initial, p_n_initial, p_m_initial, o_state, inside)  # [BB, BD]

    p_gates += h * stride_gh
    o_gates = row * stride_gb + start * stride_gt
    o_token = (row * T + start) * (H * D) + h * D
    o_saved = (row * T + start) * (4 * H * D) + h * D
    touched = tl.zeros_like(length) != 0
    # The gates of a step are loaded while the step before is computed.
    live = is_live(p_mask, 0, row, start, length, stride_mb, stride_mt)
    x_i, x_f, x_z, x_o = load_four(p_gates, places(o_gates, 0, stride_gt, o_d), stride_gg, live[:, None] & inside)
    for t in range(0, tl.max(length, 0)):
        next_live = is_live(p_mask, t + 1, row, start, length, stride_mb, stride_mt)
        o_next = places(o_gates, t + 1, stride_gt, o_d)
        next_i, next_f, next_z, next_o = load_four(p_gates, o_next, stride_gg, next_live[:, None] & inside)

        # The bias is loaded at every step: kept, it would take registers that the products need.
        bias_i, bias_f, bias_z, bias_o = load_four(p_bias, h * D + o_d, H * D, o_d < D)
        b_h_before = b_h.to(DOT)  # [BB, BD_in]
        b_i, b_f, b_z, b_o = with_bias(x_i, x_f, x_z, x_o, bias_i, bias_f, bias_z, bias_o)
        b_i, b_f, b_z, b_o = multiply_four(b_h_before, w_i, w_f, w_z, w_o, b_i, b_f, b_z, b_o, PRECISION)
        new_c, new_m, new_rest, b_u, b_shut, b_z, b_o = cell(b_i, b_f, b_z, b_o, b_c, b_m, b_rest)  # [BB, BD]
        b_live = live[:, None] & inside
        b_c = tl.where(b_live, new_c, b_c)
        b_m = tl.where(b_live, new_m, b_m)
        b_rest = tl.where(b_live, new_rest, b_rest)
        b_h = tl.where(b_live, b_o * new_c, b_h)
        touched |= live

        in_t = (t < length)[:, None] & in_d[None, :]
        o_token_t = places(o_token, t, H * D, o_d)
        tl.store(p_h + o_token_t, tl.where(b_live, b_h, 0.0).to(p_h.dtype.element_ty), mask=in_t)
        if p_saved is not None:
            store_four(p_saved, places(o_saved, t, 4 * H * D, o_d), H * D, b_u, b_shut, b_z, b_o, in_t)
            tl.store(p_c + o_token_t, b_c, mask=in_t)
        live = next_live
        x_i, x_f, x_z, x_o = next_i, next_f, next_z, next_o

    untouched = inside & (touched == 0)[:, None]
    b_c, b_n, b_m = final_state(b_c, b_m, b_rest, p_c_initial, p_n_initial, p_m_initial, o_state, untouched)
    tl.store(p_h_final + o_state, b_h, mask=inside)
    tl.store(p_c_final + o_state, b_c, mask=inside)
    tl.store(p_n_final + o_state, b_n, mask=inside)
    tl.store(p_m_final + o_state, b_m, mask=inside)


@triton.jit(do_not_specialize=PER_CALL)
def forward_streamed_kernel(
    p_gates,
    p_recurrent_weight,  # (4, H, D_out, D_in)
    p_bias,
    p_mask,
    p_cu_seqlens,
    p_state_indices,  # (N,) the row of the states that each sequence has, negative for none; None: its own
    p_h_initial,  # (rows, H, D), like all states
    p_c_initial,
    p_n_initial,
    p_m_initial,
    p_h_final,  # from step to step h, c and m of n = 1, and in p_n_final the rest of m
    p_c_final,
    p_n_final,
    p_m_final,
    p_h,  # (B, T, H, D)
    p_saved,  # (B, T, 4, H, D)
    p_c,  # (B, T, H, D)
    p_h_before,  # (2, N, H, D): h_{t-1} in half t % 2
    units,  # D, at run time: were it known, the compiler would unroll the loops over tiles, and spill
    T,
    N,
    stride_gb,
    stride_gt,
    stride_gg,
    stride_gh,
    stride_mb,
    stride_mt,
    stride_state_row,
    H: tl.constexpr,
    D: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h, o_n, in_n, row, start, length = work(tl.program_id(0), N, T, p_cu_seqlens, H, BB)
    p_gates += h * stride_gh
    o_gates = row * stride_gb + start * stride_gt
    o_token = (row * T + start) * (H * D) + h * D
    o_saved = (row * T + start) * (4 * H * D) + h * D
    state_row, has_state = state_rows(p_state_indices, o_n, in_n)
    o_head = (o_n * H + h) * D
    o_state_head = state_row * stride_state_row + h * D
    half = tl.cast(N, tl.int64) * H * D

    for first in range(0, D, BD):
        o_d = first + tl.arange(0, BD)
        inside = has_state[:, None] & (o_d < D)[None, :]
        o_state = o_state_head[:, None] + o_d[None, :]
        b_h, b_c, b_m, b_rest = load_state(p_h_initial, p_c_initial, p_n_initial, p_m_initial, o_state, inside)
        tl.store(p_h_final + o_state, b_h, mask=inside)
        tl.store(p_c_final + o_state, b_c, mask=inside)
        tl.store(p_n_final + o_state, b_rest, mask=inside)
        tl.store(p_m_final + o_state, b_m, mask=inside)
        tl.store(p_h_before + o_head[:, None] + o_d[None, :], b_h.to(p_h_before.dtype.element_ty), mask=inside)
    tl.debug_barrier()

    touched = tl.zeros_like(length) != 0
    for t in range(0, tl.max(length, 0)):
        live = is_live(p_mask, t, row, start, length, stride_mb, stride_mt)
        touched |= live
        p_read = p_h_before + t % 2 * half
        p_write = p_h_before + (t + 1) % 2 * half
        # Otherwise the compiler hoists the address arithmetic out of the loop over steps, and the registers spill.
        for first in tl.range(0, units, BD, disable_licm=True):
            o_d = first + tl.arange(0, BD)
            in_d = o_d < D
            inside = has_state[:, None] & in_d[None, :]  # [BB, BD]
            b_live = live[:, None] & inside
            x_i, x_f, x_z, x_o = load_four(p_gates, places(o_gates, t, stride_gt, o_d), stride_gg, b_live)
            bias_i, bias_f, bias_z, bias_o = load_four(p_bias, h * D + o_d, H * D, o_d < D)
            b_i, b_f, b_z, b_o = with_bias(x_i, x_f, x_z, x_o, bias_i, bias_f, bias_z, bias_o)
            for first_k in range(0, units, BK):
                o_k = first_k + tl.arange(0, BK)
                o_before = o_head[:, None] + o_k[None, :]
                in_before = has_state[:, None] & (o_k < D)[None, :]
                b_h_before = tl.load(p_read + o_before, mask=in_before, other=0.0).to(DOT)  # [BB, BK]
                w_i, w_f, w_z, w_o = load_weights(p_recurrent_weight, h, o_k, o_d, 1, D, H, D, DOT)  # [BK, BD]
                b_i, b_f, b_z, b_o = multiply_four(b_h_before, w_i, w_f, w_z, w_o, b_i, b_f, b_z, b_o, PRECISION)

            o_state = o_state_head[:, None] + o_d[None, :]
            b_h = tl.load(p_h_final + o_state, mask=inside, other=0.0)
            b_c = tl.load(p_c_final + o_state, mask=inside, other=0.0)
            b_m = tl.load(p_m_final + o_state, mask=inside, other=0.0)
            b_rest = tl.load(p_n_final + o_state, mask=inside, other=0.0)
            new_c, new_m, new_rest, b_u, b_shut, b_z, b_o = cell(b_i, b_f, b_z, b_o, b_c, b_m, b_rest)  # [BB, BD]
            b_c = tl.where(b_live, new_c, b_c)
            b_h = tl.where(b_live, b_o * new_c, b_h)
            tl.store(p_h_final + o_state, b_h, mask=b_live)
            tl.store(p_c_final + o_state, b_c, mask=b_live)
            tl.store(p_n_final + o_state, new_rest, mask=b_live)
            tl.store(p_m_final + o_state, new_m, mask=b_live)
            tl.store(p_write + o_head[:, None] + o_d[None, :], b_h.to(p_h_before.dtype.element_ty), mask=inside)

            in_t = (t < length)[:, None] & in_d[None, :]
            o_token_t = places(o_token, t, H * D, o_d)
            tl.store(p_h + o_token_t, tl.where(b_live, b_h, 0.0).to(p_h.dtype.element_ty), mask=in_t)
            if p_saved is not None:
                store_four(p_saved, places(o_saved, t, 4 * H * D, o_d), H * D, b_u, b_shut, b_z, b_o, in_t)
                tl.store(p_c + o_token_t, b_c, mask=in_t)
        tl.debug_barrier()

    for first in range(0, D, BD):
        o_d = first + tl.arange(0, BD)
        inside = has_state[:, None] & (o_d < D)[None, :]
        untouched = inside & (touched == 0)[:, None]
        o_state = o_state_head[:, None] + o_d[None, :]
        b_c = tl.load(p_c_final + o_state, mask=inside, other=0.0)
        b_m = tl.load(p_m_final + o_state, mask=inside, other=0.0)
        b_rest = tl.load(p_n_final + o_state, mask=inside, other=0.0)
        b_c, b_n, b_m = final_state(b_c, b_m, b_rest, p_c_initial, p_n_initial, p_m_initial, o_state, untouched)
        tl.store(p_n_final + o_state, b_n, mask=inside)
        tl.store(p_c_final + o_state, b_c, mask=inside)
        tl.store(p_m_final + o_state, b_m, mask=inside)


@triton.jit(do_not_specialize=PER_CALL)
def forward_spread_kernel(
    p_gates,
    p_recurrent_weight,  # (4, H, D_out, D_in)
    p_bias,
    p_mask,
    p_cu_seqlens,
    p_state_indices,  # (N,) the row of the states that each sequence has, negative for none; None: its own
    p_h_initial,  # (rows, H, D), like all states
    p_c_initial,
    p_n_initial,
    p_m_initial,
    p_h_final,  # between launches h, c and m of n = 1, and in p_n_final the rest of m
    p_c_final,
    p_n_final,
    p_m_final,
    p_h,  # (B, T, H, D)
    p_saved,  # (B, T, 4, H, D)
    p_c,  # (B, T, H, D)
    p_h_before,  # (2, N, H, D): h_{t-1} in half t % 2, the initial one comes there
    p_touched,  # (N,) whether a sequence has taken a step, between launches
    p_arrived,  # (tiles of sequences * H,) programs that have finished a step, all steps counted; comes as 0
    units,  # D, at run time: were it known, the compiler would unroll the loops over tiles, and spill
    first_step,
    end_step,
    T,
    N,
    stride_gb,
    stride_gt,
    stride_gg,
    stride_gh,
    stride_mb,
    stride_mt,
    stride_state_row,
    H: tl.constexpr,
    D: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Steps first_step to end_step."""
    NS: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    h, o_n, in_n, row, start, length = work(pid // NS, N, T, p_cu_seqlens, H, BB)
    state_row, has_state = state_rows(p_state_indices, o_n, in_n)
    o_d = pid % NS * BD + tl.arange(0, BD)
    in_d = o_d < D
    inside = has_state[:, None] & in_d[None, :]  # [BB, BD]
    o_state = (state_row * stride_state_row + h * D)[:, None] + o_d[None, :]
    if first_step == 0:
        b_h, b_c, b_m, b_rest = load_state(p_h_initial, p_c_initial, p_n_initial, p_m_initial, o_state, inside)
        touched = tl.zeros_like(length) != 0
    else:
        b_h = tl.load(p_h_final + o_state, mask=inside, other=0.0)
        b_c = tl.load(p_c_final + o_state, mask=inside, other=0.0)
        b_m = tl.load(p_m_final + o_state, mask=inside, other=0.0)
        b_rest = tl.load(p_n_final + o_state, mask=inside, other=0.0)
        touched = tl.load(p_touched + o_n, mask=in_n, other=0) != 0

    p_gates += h * stride_gh
    o_gates = row * stride_gb + start * stride_gt
    o_token = (row * T + start) * (H * D) + h * D
    o_saved = (row * T + start) * (4 * H * D) + h * D
    o_head = ((o_n * H + h) * D)[:, None]
    half = tl.cast(N, tl.int64) * H * D
    o_k = tl.arange(0, BK)
    if BK >= D:
        w_i, w_f, w_z, w_o = load_weights(p_recurrent_weight, h, o_k, o_d, 1, D, H, D, DOT)  # [BK, BD]
    bias_i, bias_f, bias_z, bias_o = load_four(p_bias, h * D + o_d, H * D, in_d)
    p_arrived += pid // NS
    steps = tl.max(length, 0)
    live = is_live(p_mask, first_step, row, start, length, stride_mb, stride_mt)
    o_first = places(o_gates, first_step, stride_gt, o_d)
    x_i, x_f, x_z, x_o = load_four(p_gates, o_first, stride_gg, live[:, None] & inside)
    for t in range(first_step, tl.minimum(steps, end_step)):
        # The gates of a step are loaded while the step before is computed.
        next_live = is_live(p_mask, t + 1, row, start, length, stride_mb, stride_mt)
        o_next = places(o_gates, t + 1, stride_gt, o_d)
        next_i, next_f, next_z, next_o = load_four(p_gates, o_next, stride_gg, next_live[:, None] & inside)

        p_read = p_h_before + t % 2 * half
        b_i, b_f, b_z, b_o = with_bias(x_i, x_f, x_z, x_o, bias_i, bias_f, bias_z, bias_o)
        if BK >= D:
            b_h_before = load_exchanged(p_read + o_head, o_k, in_n, D).to(DOT)  # [BB, BK]
            b_i, b_f, b_z, b_o = multiply_four(b_h_before, w_i, w_f, w_z, w_o, b_i, b_f, b_z, b_o, PRECISION)
        else:
            for first_k in range(0, units, BK):
                b_h_before = load_exchanged(p_read + o_head, first_k + o_k, in_n, D).to(DOT)
                w_i, w_f, w_z, w_o = load_weights(p_recurrent_weight, h, first_k + o_k, o_d, 1, D, H, D, DOT)
                b_i, b_f, b_z, b_o = multiply_four(b_h_before, w_i, w_f, w_z, w_o, b_i, b_f, b_z, b_o, PRECISION)
        new_c, new_m, new_rest, b_u, b_shut, b_z, b_o = cell(b_i, b_f, b_z, b_o, b_c, b_m, b_rest)  # [BB, BD]
        b_live = live[:, None] & inside
        b_c = tl.where(b_live, new_c, b_c)
        b_m = tl.where(b_live, new_m, b_m)
        b_rest = tl.where(b_live, new_rest, b_rest)
        b_h = tl.where(b_live, b_o * new_c, b_h)
        touched |= live
        p_write = p_h_before + (t + 1) % 2 * half
        tl.store(p_write + o_head + o_d[None, :], b_h.to(p_h_before.dtype.element_ty), mask=inside)
        arrive(p_arrived)

        in_t = (t < length)[:, None] & in_d[None, :]
        o_token_t = places(o_token, t, H * D, o_d)
        tl.store(p_h + o_token_t, tl.where(b_live, b_h, 0.0).to(p_h.dtype.element_ty), mask=in_t)
        if p_saved is not None:
            store_four(p_saved, places(o_saved, t, 4 * H * D, o_d), H * D, b_u, b_shut, b_z, b_o, in_t)
            tl.store(p_c + o_token_t, b_c, mask=in_t)
        live = next_live
        x_i, x_f, x_z, x_o = next_i, next_f, next_z, next_o
        if t + 1 < tl.minimum(steps, end_step):
            b_c += wait(p_arrived, (t + 1 - first_step) * NS)

    if end_step >= T:
        untouched = inside & (touched == 0)[:, None]
        b_c, b_rest, b_m = final_state(b_c, b_m, b_rest, p_c_initial, p_n_initial, p_m_initial, o_state, untouched)
    else:
        tl.store(p_touched + o_n, touched.to(tl.int32), mask=in_n)
    tl.store(p_h_final + o_state, b_h, mask=inside)
    tl.store(p_c_final + o_state, b_c, mask=inside)
    tl.store(p_n_final + o_state, b_rest, mask=inside)
    tl.store(p_m_final + o_state, b_m, mask=inside)
