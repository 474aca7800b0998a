"""Triton kernels of the sLSTM's backward pass, one for each of triton_forward.py. Names and notation as in
triton_cell.py."""

import triton
import triton.language as tl

from .triton_cell import (
    PER_CALL,
    arrive,
    cell_backward,
    is_live,
    load_exchanged,
    load_four,
    load_weights,
    multiply_together,
    places,
    store_four,
    wait,
    work,
)


@triton.jit(do_not_specialize=PER_CALL)
def backward_resident_kernel(
    p_recurrent_weight,  # (4, H, D_out, D_in)
    p_mask,
    p_cu_seqlens,
    p_saved,  # (B, T, 4, H, D)
    p_c,  # (B, T, H, D)
    p_c_initial,  # that of n = 1
    p_dh,  # (B, T, H, D)
    p_dh_final,
    p_dc_final,
    p_dn_final,
    p_dgates,  # (B, T, 4, H, D)
    p_dh_initial,
    p_dc_initial,  # that of n = 1, like dn
    p_dn_initial,
    T,
    N,
    stride_mb,
    stride_mt,
    H: tl.constexpr,
    D: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each round adds R^T dx of the step behind to dh; the last one, t = -1, does nothing else."""
    h, o_n, in_n, row, start, length = work(tl.program_id(0), N, T, p_cu_seqlens, H, BB)
    o_d = tl.arange(0, BD)
    inside = in_n[:, None] & (o_d < D)[None, :]
    w_i, w_f, w_z, w_o = load_weights(p_recurrent_weight, h, o_d, o_d, D, 1, H, D, DOT)  # [BD_out, BD_in]
    o_state = (o_n[:, None] * H + h) * D + o_d[None, :]
    b_dh = tl.load(p_dh_final + o_state, mask=inside, other=0.0)
    b_dc = tl.load(p_dc_final + o_state, mask=inside, other=0.0)
    b_dn = tl.load(p_dn_final + o_state, mask=inside, other=0.0)

    o_token = (row * T + start) * (H * D) + h * D
    o_saved = (row * T + start) * (4 * H * D) + h * D
    steps = tl.max(length, 0)
    live = is_live(p_mask, steps - 1, row, start, length, stride_mb, stride_mt)
    b_live = live[:, None] & inside
    b_u, b_shut, b_z, b_o = load_four(p_saved, places(o_saved, steps - 1, 4 * H * D, o_d), H * D, b_live)
    o_token_t = places(o_token, steps - 1, H * D, o_d)
    b_c = tl.load(p_c + o_token_t, mask=b_live, other=0.0)
    b_out = tl.load(p_dh + o_token_t, mask=b_live, other=0.0)
    d_i = tl.zeros((BB, BD), DOT)
    d_f, d_z, d_o = d_i, d_i, d_i
    for step in range(0, steps + 1):
        t = tl.zeros_like(length) + (steps - 1 - step)
        # What the step before needs is loaded while this one is computed.
        next_live = is_live(p_mask, t - 1, row, start, length, stride_mb, stride_mt)
        b_next_live = next_live[:, None] & inside
        o_before = places(o_token, t - 1, H * D, o_d)
        b_c_before = tl.load(p_c + o_before, mask=((t > 0) & (t <= length))[:, None] & inside, other=0.0)
        b_c_before += tl.load(p_c_initial + o_state, mask=(t == 0)[:, None] & inside, other=0.0)
        o_saved_before = places(o_saved, t - 1, 4 * H * D, o_d)
        next_u, next_shut, next_z, next_o = load_four(p_saved, o_saved_before, H * D, b_next_live)
        next_out = tl.load(p_dh + o_before, mask=b_next_live, other=0.0)

        b_dh = multiply_together(d_i, d_f, d_z, d_o, w_i, w_f, w_z, w_o, b_dh, DOT, PRECISION)
        dh = b_dh + b_out.to(tl.float32)  # [BB, BD]
        b_di, b_df, b_dz, b_do, dc, dn = cell_backward(dh, b_dc, b_dn, b_u, b_shut, b_z, b_o, b_c, b_c_before)
        b_live = live[:, None] & inside
        b_di = tl.where(b_live, b_di, 0.0)
        b_df = tl.where(b_live, b_df, 0.0)
        b_dz = tl.where(b_live, b_dz, 0.0)
        b_do = tl.where(b_live, b_do, 0.0)
        b_dh = tl.where(b_live, 0.0, b_dh)
        b_dc = tl.where(b_live, dc, b_dc)
        b_dn = tl.where(b_live, dn, b_dn)
        in_t = ((t >= 0) & (t < length))[:, None] & inside
        store_four(p_dgates, places(o_saved, t, 4 * H * D, o_d), H * D, b_di, b_df, b_dz, b_do, in_t)
        d_i, d_f, d_z, d_o = b_di.to(DOT), b_df.to(DOT), b_dz.to(DOT), b_do.to(DOT)
        live = next_live
        b_u, b_shut, b_z, b_o = next_u, next_shut, next_z, next_o
        b_c, b_out = b_c_before, next_out

    tl.store(p_dh_initial + o_state, b_dh, mask=inside)
    tl.store(p_dc_initial + o_state, b_dc, mask=inside)
    tl.store(p_dn_initial + o_state, b_dn, mask=inside)


@triton.jit(do_not_specialize=PER_CALL)
def backward_streamed_kernel(
    p_recurrent_weight,  # (4, H, D_out, D_in)
    p_mask,
    p_cu_seqlens,
    p_saved,  # (B, T, 4, H, D)
    p_c,  # (B, T, H, D)
    p_c_initial,  # that of n = 1
    p_dh,  # (B, T, H, D)
    p_dh_final,
    p_dc_final,
    p_dn_final,
    p_dgates,  # (B, T, 4, H, D)
    p_dh_initial,  # dh, dc and dn of n = 1 from step to step
    p_dc_initial,
    p_dn_initial,
    p_dx,  # (2, N, 4, H, D): the gates' gradients of the step behind and of this one; the first half comes as 0
    units,  # D, at run time: were it known, the compiler would unroll the loops over tiles, and spill
    T,
    N,
    stride_mb,
    stride_mt,
    H: tl.constexpr,
    D: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each round adds R^T dx of the step behind to dh; the last one, t = -1, does nothing else."""
    h, o_n, in_n, row, start, length = work(tl.program_id(0), N, T, p_cu_seqlens, H, BB)
    o_token = (row * T + start) * (H * D) + h * D
    o_saved = (row * T + start) * (4 * H * D) + h * D
    o_head = (o_n * H + h) * D
    o_dx = (o_n * 4 * H + h) * D
    half = tl.cast(N, tl.int64) * 4 * H * D

    for first in range(0, D, BD):
        o_d = first + tl.arange(0, BD)
        inside = in_n[:, None] & (o_d < D)[None, :]
        o_state = o_head[:, None] + o_d[None, :]
        tl.store(p_dh_initial + o_state, tl.load(p_dh_final + o_state, mask=inside), mask=inside)
        tl.store(p_dc_initial + o_state, tl.load(p_dc_final + o_state, mask=inside), mask=inside)
        tl.store(p_dn_initial + o_state, tl.load(p_dn_final + o_state, mask=inside), mask=inside)
    tl.debug_barrier()

    steps = tl.max(length, 0)
    for step in range(0, steps + 1):
        t = tl.zeros_like(length) + (steps - 1 - step)
        live = is_live(p_mask, t, row, start, length, stride_mb, stride_mt)
        p_read = p_dx + step % 2 * half
        p_write = p_dx + (step + 1) % 2 * half
        # Otherwise the compiler hoists the address arithmetic out of the loop over steps, and the registers spill.
        for first in tl.range(0, units, BD, disable_licm=True):
            o_d = first + tl.arange(0, BD)
            inside = in_n[:, None] & (o_d < D)[None, :]
            o_state = o_head[:, None] + o_d[None, :]
            b_dh = tl.load(p_dh_initial + o_state, mask=inside, other=0.0)
            for first_k in range(0, units, BK):
                o_k = first_k + tl.arange(0, BK)
                o_behind = o_dx[:, None] + o_k[None, :]
                d_i, d_f, d_z, d_o = load_four(p_read, o_behind, H * D, in_n[:, None] & (o_k < D)[None, :])
                w_i, w_f, w_z, w_o = load_weights(p_recurrent_weight, h, o_k, o_d, D, 1, H, D, DOT)  # [BK, BD]
                b_dh = multiply_together(d_i, d_f, d_z, d_o, w_i, w_f, w_z, w_o, b_dh, DOT, PRECISION)

            b_live = live[:, None] & inside
            o_token_t = places(o_token, t, H * D, o_d)
            b_u, b_shut, b_z, b_o = load_four(p_saved, places(o_saved, t, 4 * H * D, o_d), H * D, b_live)
            b_c = tl.load(p_c + o_token_t, mask=b_live, other=0.0)
            b_c_before = tl.load(p_c + places(o_token, t - 1, H * D, o_d), mask=(t > 0)[:, None] & b_live, other=0.0)
            b_c_before += tl.load(p_c_initial + o_state, mask=(t == 0)[:, None] & b_live, other=0.0)
            dh = b_dh + tl.load(p_dh + o_token_t, mask=b_live, other=0.0).to(tl.float32)
            dc = tl.load(p_dc_initial + o_state, mask=b_live, other=0.0)
            dn = tl.load(p_dn_initial + o_state, mask=b_live, other=0.0)
            b_di, b_df, b_dz, b_do, dc, dn = cell_backward(dh, dc, dn, b_u, b_shut, b_z, b_o, b_c, b_c_before)
            b_di = tl.where(b_live, b_di, 0.0)
            b_df = tl.where(b_live, b_df, 0.0)
            b_dz = tl.where(b_live, b_dz, 0.0)
            b_do = tl.where(b_live, b_do, 0.0)
            tl.store(p_dh_initial + o_state, tl.where(b_live, 0.0, b_dh), mask=inside)
            tl.store(p_dc_initial + o_state, dc, mask=b_live)
            tl.store(p_dn_initial + o_state, dn, mask=b_live)
            store_four(p_write, o_dx[:, None] + o_d[None, :], H * D, b_di, b_df, b_dz, b_do, inside)
            in_t = ((t >= 0) & (t < length))[:, None] & inside
            store_four(p_dgates, places(o_saved, t, 4 * H * D, o_d), H * D, b_di, b_df, b_dz, b_do, in_t)
        tl.debug_barrier()


@triton.jit(do_not_specialize=PER_CALL)
def backward_spread_kernel(
    p_recurrent_weight,  # (4, H, D_out, D_in)
    p_mask,
    p_cu_seqlens,
    p_saved,  # (B, T, 4, H, D)
    p_c,  # (B, T, H, D)
    p_c_initial,  # that of n = 1
    p_dh,  # (B, T, H, D)
    p_dh_final,
    p_dc_final,
    p_dn_final,
    p_dgates,  # (B, T, 4, H, D)
    p_dh_initial,  # dh, dc and dn of n = 1 between launches
    p_dc_initial,
    p_dn_initial,
    p_dx,  # (2, N, 4, H, D): the gates' gradients of the step behind and of this one; the first half comes as 0
    p_arrived,  # (tiles of sequences * H,) programs that have finished a step, all steps counted; comes as 0
    units,  # D, at run time: were it known, the compiler would unroll the loops over tiles, and spill
    first_step,
    end_step,
    T,
    N,
    stride_mb,
    stride_mt,
    H: tl.constexpr,
    D: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rounds first_step to end_step. Each adds R^T dx of the step behind to dh; the last one, t = -1, does nothing
    else."""
    NS: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    h, o_n, in_n, row, start, length = work(pid // NS, N, T, p_cu_seqlens, H, BB)
    o_d = pid % NS * BD + tl.arange(0, BD)
    inside = in_n[:, None] & (o_d < D)[None, :]  # [BB, BD]
    o_state = ((o_n * H + h) * D)[:, None] + o_d[None, :]
    if first_step == 0:
        b_dh = tl.load(p_dh_final + o_state, mask=inside, other=0.0)
        b_dc = tl.load(p_dc_final + o_state, mask=inside, other=0.0)
        b_dn = tl.load(p_dn_final + o_state, mask=inside, other=0.0)
    else:
        b_dh = tl.load(p_dh_initial + o_state, mask=inside, other=0.0)
        b_dc = tl.load(p_dc_initial + o_state, mask=inside, other=0.0)
        b_dn = tl.load(p_dn_initial + o_state, mask=inside, other=0.0)

    o_token = (row * T + start) * (H * D) + h * D
    o_saved = (row * T + start) * (4 * H * D) + h * D
    o_dx = ((o_n * 4 * H + h) * D)[:, None]
    half = tl.cast(N, tl.int64) * 4 * H * D
    o_k = tl.arange(0, BK)
    if BK >= D:
        w_i, w_f, w_z, w_o = load_weights(p_recurrent_weight, h, o_k, o_d, D, 1, H, D, DOT)  # [BK, BD]
    p_arrived += pid // NS
    steps = tl.max(length, 0)
    rounds = tl.minimum(steps + 1, end_step)
    last = steps - 1 - first_step
    live = is_live(p_mask, last, row, start, length, stride_mb, stride_mt)
    b_live = live[:, None] & inside
    b_u, b_shut, b_z, b_o = load_four(p_saved, places(o_saved, last, 4 * H * D, o_d), H * D, b_live)
    o_token_t = places(o_token, last, H * D, o_d)
    b_c = tl.load(p_c + o_token_t, mask=b_live, other=0.0)
    b_out = tl.load(p_dh + o_token_t, mask=b_live, other=0.0)
    for step in range(first_step, rounds):
        t = tl.zeros_like(length) + (steps - 1 - step)
        # What the step before needs is loaded while this one is computed.
        next_live = is_live(p_mask, t - 1, row, start, length, stride_mb, stride_mt)
        b_next_live = next_live[:, None] & inside
        o_before = places(o_token, t - 1, H * D, o_d)
        b_c_before = tl.load(p_c + o_before, mask=((t > 0) & (t <= length))[:, None] & inside, other=0.0)
        b_c_before += tl.load(p_c_initial + o_state, mask=(t == 0)[:, None] & inside, other=0.0)
        o_saved_before = places(o_saved, t - 1, 4 * H * D, o_d)
        next_u, next_shut, next_z, next_o = load_four(p_saved, o_saved_before, H * D, b_next_live)
        next_out = tl.load(p_dh + o_before, mask=b_next_live, other=0.0)

        p_read = p_dx + step % 2 * half + o_dx
        if BK >= D:
            b_dh = tl.dot(load_exchanged(p_read, o_k, in_n, D).to(DOT), w_i, acc=b_dh, input_precision=PRECISION)
            p_read += H * D
            b_dh = tl.dot(load_exchanged(p_read, o_k, in_n, D).to(DOT), w_f, acc=b_dh, input_precision=PRECISION)
            p_read += H * D
            b_dh = tl.dot(load_exchanged(p_read, o_k, in_n, D).to(DOT), w_z, acc=b_dh, input_precision=PRECISION)
            p_read += H * D
            b_dh = tl.dot(load_exchanged(p_read, o_k, in_n, D).to(DOT), w_o, acc=b_dh, input_precision=PRECISION)
        else:
            for first_k in range(0, units, BK):
                o_tile = first_k + o_k
                d_i = load_exchanged(p_read, o_tile, in_n, D).to(DOT)  # [BB, BK]
                d_f = load_exchanged(p_read + H * D, o_tile, in_n, D).to(DOT)
                d_z = load_exchanged(p_read + 2 * H * D, o_tile, in_n, D).to(DOT)
                d_o = load_exchanged(p_read + 3 * H * D, o_tile, in_n, D).to(DOT)
                w_i, w_f, w_z, w_o = load_weights(p_recurrent_weight, h, o_tile, o_d, D, 1, H, D, DOT)
                b_dh = multiply_together(d_i, d_f, d_z, d_o, w_i, w_f, w_z, w_o, b_dh, DOT, PRECISION)
        dh = b_dh + b_out.to(tl.float32)  # [BB, BD]
        b_di, b_df, b_dz, b_do, dc, dn = cell_backward(dh, b_dc, b_dn, b_u, b_shut, b_z, b_o, b_c, b_c_before)
        b_live = live[:, None] & inside
        b_di = tl.where(b_live, b_di, 0.0)
        b_df = tl.where(b_live, b_df, 0.0)
        b_dz = tl.where(b_live, b_dz, 0.0)
        b_do = tl.where(b_live, b_do, 0.0)
        b_dh = tl.where(b_live, 0.0, b_dh)
        b_dc = tl.where(b_live, dc, b_dc)
        b_dn = tl.where(b_live, dn, b_dn)
        p_write = p_dx + (step + 1) % 2 * half + o_dx
        store_four(p_write, o_d[None, :], H * D, b_di, b_df, b_dz, b_do, inside)
        arrive(p_arrived)

        in_t = ((t >= 0) & (t < length))[:, None] & inside
        store_four(p_dgates, places(o_saved, t, 4 * H * D, o_d), H * D, b_di, b_df, b_dz, b_do, in_t)
        live = next_live
        b_u, b_shut, b_z, b_o = next_u, next_shut, next_z, next_o
        b_c, b_out = b_c_before, next_out
        if step + 1 < rounds:
            b_dh += wait(p_arrived, (step + 1 - first_step) * NS)

    tl.store(p_dh_initial + o_state, b_dh, mask=inside)
    tl.store(p_dc_initial + o_state, b_dc, mask=inside)
    tl.store(p_dn_initial + o_state, b_dn, mask=inside)
