"""Triton kernels of the sLSTM: a whole sequence in one launch, forward and backward.

The equations are those of slstm_torch.py, with the stabilizer m_t = log(exp(log f_t + m_{t-1}) + exp(i_t)) and n = 1:

    u_t = i_t - (log f_t + m_{t-1})                i' = sigmoid(u_t), f' = sigmoid(-u_t)
    c_t = f' c_{t-1} + i' tanh(z_t)                h_t = sigmoid(o_t) c_t

Every step needs all of h_{t-1}, so time is a loop inside the kernel, and what counts is how long one round takes. A
program owns BB sequences, one head and BD of its D units: their slice of R, (4, D, BD), is loaded once and stays on
chip (in registers as far as they go: what can be loaded again, like the bias, is), and so do their c and m. Where BD =
D, so does h. A larger head is shared by a group of ND = D / BD programs, which exchange h, or in the backward pass the
gradients of the gates, through memory: two buffers, taken in turn, and a counter that each program raises when it has
written. One barrier per step is enough, since a buffer is written again only behind the barrier that follows its last
reading. All programs of a group must be running at the same time; the launcher sees to that.

The forward pass keeps u, sigmoid(-f), tanh(z), sigmoid(o) and c for the backward pass.

Names: p_ pointers, b_ blocks [BB, BD], o_ offsets. Dimension letters: N sequences, H heads, D head dim, P its next
power of two, BB and BD blocks of sequences and units. States are (N, H, D), all other tensors (B, T, ...). A sequence
is a row, or a document of a packed row between two bounds. T and N are run-time values: one compilation serves all.
"""

import triton
import triton.language as tl

from .mlstm_triton_kernels import log_sigmoid


# An input gate of -inf counts as this: -inf - -inf must not arise.
LOWEST = tl.constexpr(-3e38)
# Loads that bypass the first-level cache, which does not see what other programs write.
SHARED = tl.constexpr(".cg")
PER_CALL = ["T", "N", "first_group", "first_step", "last_step"]


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """As (1 - y) / (1 + y), y = exp(-2 |x|); near 0, where 1 - y loses its digits, as a series."""
    s = x * x
    series = x * (1.0 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835)))))
    y = tl.exp(-2.0 * tl.abs(x))
    return tl.where(s < 0.04, series, tl.where(x < 0, y - 1.0, 1.0 - y) / (1.0 + y))


@triton.jit
def work(first_group, N, T, p_bounds, H: tl.constexpr, D: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr):
    """The program's group (the programs that share a head of some sequences), head, sequences and units; for each
    sequence whether it exists, its row, its first token and its length."""
    ND: tl.constexpr = (D + BD - 1) // BD
    group = first_group + tl.program_id(0) // ND
    o_n = tl.cast(group // H * BB + tl.arange(0, BB), tl.int64)
    o_d = tl.program_id(0) % ND * BD + tl.arange(0, BD)
    exists = o_n < N
    if p_bounds is not None:
        row = tl.zeros_like(o_n)
        start = tl.load(p_bounds + o_n, mask=exists, other=0).to(tl.int64)
        length = tl.load(p_bounds + o_n + 1, mask=exists, other=0).to(tl.int64) - start
    else:
        row = tl.where(exists, o_n, 0)
        start = tl.zeros_like(o_n)
        length = tl.where(exists, tl.zeros_like(o_n) + T, 0)
    return group, group % H, o_n, o_d, exists, row, start, length


@triton.jit
def is_live(p_mask, t, row, start, length, stride_b, stride_t):
    """Whether each sequence has a token at step t that is not masked out."""
    live = (t >= 0) & (t < length)
    if p_mask is not None:
        live &= tl.load(p_mask + row * stride_b + (start + t) * stride_t, mask=live, other=0) != 0
    return live


@triton.jit
def load_four(p, offsets, stride, mask, cache: tl.constexpr = ""):
    """The same places of each of the four gates."""
    return (
        tl.load(p + offsets, mask=mask, other=0.0, cache_modifier=cache),
        tl.load(p + offsets + stride, mask=mask, other=0.0, cache_modifier=cache),
        tl.load(p + offsets + 2 * stride, mask=mask, other=0.0, cache_modifier=cache),
        tl.load(p + offsets + 3 * stride, mask=mask, other=0.0, cache_modifier=cache),
    )


@triton.jit
def places(o_row, t, stride, o_d):
    """Of step t [BB, BD]."""
    return (o_row + t * stride)[:, None] + o_d[None, :]


@triton.jit
def load_weights(
    p_weight,
    h,
    o_row,
    o_column,
    stride_row,
    stride_column,
    H: tl.constexpr,
    D: tl.constexpr,
    DOT: tl.constexpr,
):
    """[rows, columns] of each gate's R, 0 outside."""
    mask = (o_row < D)[:, None] & (o_column < D)[None, :]
    offsets = h * (D * D) + o_row[:, None] * stride_row + o_column[None, :] * stride_column
    w_i, w_f, w_z, w_o = load_four(p_weight, offsets, H * D * D, mask)
    return w_i.to(DOT), w_f.to(DOT), w_z.to(DOT), w_o.to(DOT)


@triton.jit
def store_four(p, offsets, stride, b_0, b_1, b_2, b_3, mask):
    tl.store(p + offsets, b_0.to(p.dtype.element_ty), mask=mask)
    tl.store(p + offsets + stride, b_1.to(p.dtype.element_ty), mask=mask)
    tl.store(p + offsets + 2 * stride, b_2.to(p.dtype.element_ty), mask=mask)
    tl.store(p + offsets + 3 * stride, b_3.to(p.dtype.element_ty), mask=mask)


@triton.jit
def wait_for_all(p_counter, target):
    """Until all programs of the group have come here: what they wrote before can be read afterwards."""
    tl.debug_barrier()
    tl.atomic_add(p_counter, 1, sem="release")
    while tl.atomic_add(p_counter, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=PER_CALL)
def forward_kernel(
    p_gates,
    p_weight,  # (4, H, D_out, D_in)
    p_bias,
    p_mask,
    p_bounds,
    p_h_initial,
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
    p_exchange,  # (2, N, H, D): h_{t-1} in half t % 2
    p_counter,  # (groups,)
    T,
    N,
    first_group,
    first_step,
    last_step,
    stride_gb,
    stride_gt,
    stride_gg,
    stride_gh,
    stride_mb,
    stride_mt,
    H: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ND: tl.constexpr = (D + BD - 1) // BD
    group, h, o_n, o_d, exists, row, start, length = work(first_group, N, T, p_bounds, H, D, BB, BD)
    inside = exists[:, None] & (o_d < D)[None, :]
    o_k = tl.arange(0, P)
    w_i, w_f, w_z, w_o = load_weights(p_weight, h, o_k, o_d, 1, D, H, D, DOT)

    o_state = (o_n[:, None] * H + h) * D + o_d[None, :]
    b_h = tl.load(p_h_initial + o_state, mask=inside, other=0.0)
    b_n = tl.load(p_n_initial + o_state, mask=inside, other=0.0)
    empty = b_n == 0.0
    b_n = tl.where(empty, 1.0, b_n)
    b_c = tl.where(empty, 0.0, tl.load(p_c_initial + o_state, mask=inside, other=0.0) / b_n)
    b_m = tl.where(empty, float("-inf"), tl.load(p_m_initial + o_state, mask=inside, other=0.0) + tl.log(b_n))

    p_gates += h * stride_gh
    o_gates = row * stride_gb + start * stride_gt
    o_token = (row * T + start) * (H * D) + h * D
    o_saved = (row * T + start) * (4 * H * D) + h * D
    o_exchange = (o_n[:, None] * H + h) * D + o_k[None, :]
    in_exchange = exists[:, None] & (o_k < D)[None, :]
    half = tl.cast(N, tl.int64) * H * D

    touched = tl.zeros_like(length) != 0
    last_step = tl.minimum(last_step, tl.max(length, 0))
    # The gates of the next step are on their way while this one is computed.
    live = is_live(p_mask, first_step, row, start, length, stride_mb, stride_mt)
    o_next = places(o_gates, first_step, stride_gt, o_d)
    x_i, x_f, x_z, x_o = load_four(p_gates, o_next, stride_gg, live[:, None] & inside)
    for t in range(first_step, last_step):
        next_live = is_live(p_mask, t + 1, row, start, length, stride_mb, stride_mt)
        next_live &= t + 1 < last_step
        o_next = places(o_gates, t + 1, stride_gt, o_d)
        next_i, next_f, next_z, next_o = load_four(p_gates, o_next, stride_gg, next_live[:, None] & inside)

        bias_i, bias_f, bias_z, bias_o = load_four(p_bias, h * D + o_d, H * D, o_d < D)
        if ND == 1:
            b_h_before = b_h.to(DOT)
        else:
            p_read = p_exchange + t % 2 * half + o_exchange
            b_h_before = tl.load(p_read, mask=in_exchange, other=0.0, cache_modifier=SHARED).to(DOT)
        b_i = tl.dot(b_h_before, w_i, acc=x_i.to(tl.float32) + bias_i[None, :], input_precision=PRECISION)
        b_f = tl.dot(b_h_before, w_f, acc=x_f.to(tl.float32) + bias_f[None, :], input_precision=PRECISION)
        b_z = tl.dot(b_h_before, w_z, acc=x_z.to(tl.float32) + bias_z[None, :], input_precision=PRECISION)
        b_o = tl.dot(b_h_before, w_o, acc=x_o.to(tl.float32) + bias_o[None, :], input_precision=PRECISION)

        kept = log_sigmoid(b_f) + b_m
        b_i = tl.maximum(b_i, LOWEST)
        b_u = b_i - kept
        b_z = tanh(b_z)
        b_o = sigmoid(b_o)
        alive = live[:, None] & inside
        b_m = tl.where(alive, tl.maximum(kept, b_i) + tl.log(1.0 + tl.exp(-tl.abs(b_u))), b_m)
        b_c = tl.where(alive, b_c + sigmoid(b_u) * (b_z - b_c), b_c)
        b_h = tl.where(alive, b_o * b_c, b_h)
        touched |= live

        here = (t < length)[:, None] & inside
        o_here = places(o_token, t, H * D, o_d)
        tl.store(p_h + o_here, tl.where(alive, b_h, 0.0).to(p_h.dtype.element_ty), mask=here)
        if p_saved is not None:
            store_four(p_saved, places(o_saved, t, 4 * H * D, o_d), H * D, b_u, sigmoid(-b_f), b_z, b_o, here)
            tl.store(p_c + o_here, b_c, mask=here)
        if ND > 1:
            p_write = p_exchange + (t + 1) % 2 * half
            tl.store(p_write + o_state, b_h.to(p_exchange.dtype.element_ty), mask=inside)
            if t + 1 < last_step:
                wait_for_all(p_counter + group, (t + 1 - first_step) * ND)
        live = next_live
        x_i, x_f, x_z, x_o = next_i, next_f, next_z, next_o

    # Without a step the state is not even brought to n = 1.
    touched = touched[:, None] & inside
    untouched = inside & (touched == 0)
    b_c = tl.where(touched, b_c, tl.load(p_c_initial + o_state, mask=untouched, other=0.0))
    b_n = tl.where(touched, 1.0, tl.load(p_n_initial + o_state, mask=untouched, other=0.0))
    b_m = tl.where(touched, b_m, tl.load(p_m_initial + o_state, mask=untouched, other=0.0))
    tl.store(p_h_final + o_state, b_h, mask=inside)
    tl.store(p_c_final + o_state, b_c, mask=inside)
    tl.store(p_n_final + o_state, b_n, mask=inside)
    tl.store(p_m_final + o_state, b_m, mask=inside)


@triton.jit(do_not_specialize=PER_CALL)
def backward_kernel(
    p_weight,  # (4, H, D_out, D_in)
    p_mask,
    p_bounds,
    p_saved,  # (B, T, 4, H, D)
    p_c,  # (B, T, H, D)
    p_c_initial,  # that of n = 1
    p_dh,  # (B, T, H, D)
    p_dh_final,
    p_dc_final,
    p_dn_final,
    p_dgates,  # (B, T, 4, H, D)
    p_dh_initial,  # but for what comes from dx_0
    p_dc_initial,  # that of n = 1, like dn
    p_dn_initial,
    p_exchange,  # (2, N, 4, H, D): dx_t in half t % 2; 0 behind the end, dx_0 when all is done
    p_counter,  # (groups,)
    T,
    N,
    first_group,
    first_step,
    last_step,
    stride_mb,
    stride_mt,
    H: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """With m held constant (it cancels) and dh, dc, dn complete at step t:

    dc += dh o,                  dn -= dh h,                           do~ = dh h (1 - o)
    di~ = i' (z dc + dn),        df~ = f' (c_{t-1} dc + dn) (1 - f),   dz~ = i' (1 - z^2) dc
    dh_{t-1} += R^T dx,          dc_{t-1} = f' dc,                     dn_{t-1} = f' dn
    """
    ND: tl.constexpr = (D + BD - 1) // BD
    group, h, o_n, o_d, exists, row, start, length = work(first_group, N, T, p_bounds, H, D, BB, BD)
    inside = exists[:, None] & (o_d < D)[None, :]
    o_k = tl.arange(0, P)
    w_i, w_f, w_z, w_o = load_weights(p_weight, h, o_k, o_d, D, 1, H, D, DOT)

    o_state = (o_n[:, None] * H + h) * D + o_d[None, :]
    b_dh = tl.load(p_dh_final + o_state, mask=inside, other=0.0)
    b_dc = tl.load(p_dc_final + o_state, mask=inside, other=0.0)
    b_dn = tl.load(p_dn_final + o_state, mask=inside, other=0.0)

    o_token = (row * T + start) * (H * D) + h * D
    o_saved = (row * T + start) * (4 * H * D) + h * D
    o_exchange = (o_n[:, None] * 4 * H + h) * D + o_k[None, :]
    o_own = (o_n[:, None] * 4 * H + h) * D + o_d[None, :]
    in_exchange = exists[:, None] & (o_k < D)[None, :]
    half = tl.cast(N, tl.int64) * 4 * H * D

    last_step = tl.minimum(last_step, tl.max(length, 0))
    live = is_live(p_mask, last_step - 1, row, start, length, stride_mb, stride_mt)
    here = live[:, None] & inside
    b_u, b_shut, b_z, b_o = load_four(p_saved, places(o_saved, last_step - 1, 4 * H * D, o_d), H * D, here)
    o_here = places(o_token, last_step - 1, H * D, o_d)
    b_c = tl.load(p_c + o_here, mask=here, other=0.0)
    b_out = tl.load(p_dh + o_here, mask=here, other=0.0)
    d_i, d_f, d_z, d_o = load_four(p_exchange + last_step % 2 * half, o_exchange, H * D, in_exchange)
    d_i, d_f, d_z, d_o = d_i.to(DOT), d_f.to(DOT), d_z.to(DOT), d_o.to(DOT)
    for step in range(0, last_step - first_step):
        t = last_step - 1 - step
        # What the step before needs is on its way while this one is computed.
        next_live = is_live(p_mask, t - 1, row, start, length, stride_mb, stride_mt)
        next_here = next_live[:, None] & inside
        reached = (t <= length)[:, None] & inside
        o_before = places(o_token, t - 1, H * D, o_d)
        o_saved_before = places(o_saved, t - 1, 4 * H * D, o_d)
        b_c_before = tl.load(p_c + o_before, mask=reached & (t > 0), other=0.0)
        b_c_before += tl.load(p_c_initial + o_state, mask=inside & (t == 0), other=0.0)
        next_u, next_shut, next_z, next_o = load_four(p_saved, o_saved_before, H * D, next_here)
        next_out = tl.load(p_dh + o_before, mask=next_here, other=0.0)

        b_dh = tl.dot(d_i, w_i, acc=b_dh, input_precision=PRECISION)
        b_dh = tl.dot(d_f, w_f, acc=b_dh, input_precision=PRECISION)
        b_dh = tl.dot(d_z, w_z, acc=b_dh, input_precision=PRECISION)
        b_dh = tl.dot(d_o, w_o, acc=b_dh, input_precision=PRECISION)

        alive = live[:, None] & inside
        dh = b_dh + b_out.to(tl.float32)
        dc = b_dc + dh * b_o
        dn = b_dn - dh * b_o * b_c
        b_i = sigmoid(b_u)
        b_f = sigmoid(-b_u)
        b_di = tl.where(alive, b_i * (b_z * dc + dn), 0.0)
        b_df = tl.where(alive, b_f * b_shut * (b_c_before * dc + dn), 0.0)
        b_dz = tl.where(alive, b_i * (1.0 - b_z * b_z) * dc, 0.0)
        b_do = tl.where(alive, dh * b_c * b_o * (1.0 - b_o), 0.0)
        b_dh = tl.where(alive, 0.0, b_dh)
        b_dc = tl.where(alive, b_f * dc, b_dc)
        b_dn = tl.where(alive, b_f * dn, b_dn)
        here = (t < length)[:, None] & inside
        store_four(p_dgates, places(o_saved, t, 4 * H * D, o_d), H * D, b_di, b_df, b_dz, b_do, here)

        if ND == 1:
            d_i, d_f, d_z, d_o = b_di.to(DOT), b_df.to(DOT), b_dz.to(DOT), b_do.to(DOT)
        else:
            p_turn = p_exchange + t % 2 * half
            store_four(p_turn, o_own, H * D, b_di, b_df, b_dz, b_do, inside)
            if t > first_step:
                wait_for_all(p_counter + group, (step + 1) * ND)
                d_i, d_f, d_z, d_o = load_four(p_turn, o_exchange, H * D, in_exchange, SHARED)
                d_i, d_f, d_z, d_o = d_i.to(DOT), d_f.to(DOT), d_z.to(DOT), d_o.to(DOT)
        live = next_live
        b_u, b_shut, b_z, b_o = next_u, next_shut, next_z, next_o
        b_c, b_out = b_c_before, next_out

    if ND == 1:
        store_four(p_exchange, o_own, H * D, d_i, d_f, d_z, d_o, inside)
    tl.store(p_dh_initial + o_state, b_dh, mask=inside)
    tl.store(p_dc_initial + o_state, b_dc, mask=inside)
    tl.store(p_dn_initial + o_state, b_dn, mask=inside)
