"""Triton kernels of the sLSTM: a whole sequence in one launch, forward and backward.

The equations are those of eager.py, with the stabilizer m_t = log(exp(log f_t + m_{t-1}) + exp(i_t)) and n = 1:

    u_t = i_t - (log f_t + m_{t-1})                i' = sigmoid(u_t), f' = sigmoid(-u_t)
    c_t = f' c_{t-1} + i' tanh(z_t)                h_t = sigmoid(o_t) c_t

Every step needs all of h_{t-1}, so time is a loop inside the kernel, and what counts is how long one round takes. A
program owns BB sequences and one head. Where the head's R, (4, D, D), fits on chip, a resident kernel loads it once
and keeps it there, and c, m, h with it. A streamed kernel reads R of a wider head again at every step, BK x BD at a
time, from the caches. Its state stays in memory: c and m where the final state goes, and h, which every tile of the
next step reads, in two buffers, taken in turn, so that one barrier per step is enough. Where there are few sequences,
a wide head is spread over several programs, each with BD of its units and the state of these in registers. They write
h into two such buffers, and at every step each waits until all have: this is the only kind that waits for others.
The backward pass does likewise, with the gradients of the gates in the place of h.

m is the sum of two floats, m and its rest: next to an m of 1e5, one float32 could not tell tokens apart that compete,
nor keep what an open forget gate takes away. n = 1 while the kernel runs; a final state has the rest, as n = e^rest.

The forward pass keeps u, sigmoid(-f), tanh(z), sigmoid(o) and c for the backward pass.

Names: p_ pointers, b_ values of a tile, o_ offsets. Masks: in_n sequences that exist [BB], in_d units that exist [BD],
inside both, with a state [BB, BD]; in_t tokens that exist, b_live those that are not masked out [BB, BD]. Dimension
letters: N sequences, H heads, D head dim, BB tile of sequences, BD and BK tiles of units, those a product makes and
those it sums over; shapes [BB, BD] at the end of lines are those of tiles. States are (N, H, D), all other tensors
(B, T, ...). A sequence is a row, or a document of a packed row between two entries of cu_seqlens. T and N are run-time
values: one compilation serves all.
"""

import triton
import triton.language as tl

from ..triton_common import log_sigmoid


# An input gate of -inf counts as this: -inf - -inf must not arise.
LOWEST = tl.constexpr(-3e38)
MAX_POLLS = tl.constexpr(2**20)  # about a second, where a step takes microseconds
PER_CALL = ["T", "N", "units", "first_step", "end_step", "stride_mb", "stride_mt"]


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
def work(pid, N, T, p_cu_seqlens, H: tl.constexpr, BB: tl.constexpr):
    """The program's head and sequences; for each sequence whether it in_n, its row, first token and length."""
    o_n = tl.cast(pid // H * BB + tl.arange(0, BB), tl.int64)
    in_n = o_n < N
    if p_cu_seqlens is not None:
        row = tl.zeros_like(o_n)
        start = tl.load(p_cu_seqlens + o_n, mask=in_n, other=0).to(tl.int64)
        length = tl.load(p_cu_seqlens + o_n + 1, mask=in_n, other=0).to(tl.int64) - start
    else:
        row = tl.where(in_n, o_n, 0)
        start = tl.zeros_like(o_n)
        length = tl.where(in_n, tl.zeros_like(o_n) + T, 0)
    return pid % H, o_n, in_n, row, start, length


@triton.jit
def state_rows(p_state_indices, o_n, in_n):
    """The row of the states that each sequence has [BB], its own unless a table says which, and whether it has one."""
    if p_state_indices is not None:
        state_row = tl.load(p_state_indices + o_n, mask=in_n, other=-1).to(tl.int64)
        has_state = state_row >= 0
    else:
        state_row = o_n
        has_state = in_n
    return state_row, has_state


@triton.jit
def is_live(p_mask, t, row, start, length, stride_b, stride_t):
    """Whether each sequence has a token at step t that is not masked out."""
    t += tl.zeros_like(length)  # Triton 3.9 does not interpret the conjunction of a scalar and a block
    live = (t >= 0) & (t < length)
    if p_mask is not None:
        live &= tl.load(p_mask + row * stride_b + (start + t) * stride_t, mask=live, other=0) != 0
    return live


@triton.jit
def places(o_row, t, stride, o_d):
    """The offsets of step t [BB, BD]."""
    return (o_row + tl.cast(t, tl.int64) * stride)[:, None] + o_d[None, :]


@triton.jit
def load_four(p, offsets, stride, mask):
    """The values of each of the four gates at the same places."""
    return (
        tl.load(p + offsets, mask=mask, other=0.0),
        tl.load(p + offsets + stride, mask=mask, other=0.0),
        tl.load(p + offsets + 2 * stride, mask=mask, other=0.0),
        tl.load(p + offsets + 3 * stride, mask=mask, other=0.0),
    )


@triton.jit
def store_four(p, offsets, stride, b_0, b_1, b_2, b_3, mask):
    tl.store(p + offsets, b_0.to(p.dtype.element_ty), mask=mask)
    tl.store(p + offsets + stride, b_1.to(p.dtype.element_ty), mask=mask)
    tl.store(p + offsets + 2 * stride, b_2.to(p.dtype.element_ty), mask=mask)
    tl.store(p + offsets + 3 * stride, b_3.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_weights(
    p_recurrent_weight,
    h,
    o_row,
    o_column,
    stride_row,
    stride_column,
    H: tl.constexpr,
    D: tl.constexpr,
    DOT: tl.constexpr,
):
    """The tile [rows, columns] of each gate's R, 0 outside."""
    mask = (o_row < D)[:, None] & (o_column < D)[None, :]
    offsets = h * (D * D) + o_row[:, None] * stride_row + o_column[None, :] * stride_column
    w_i, w_f, w_z, w_o = load_four(p_recurrent_weight, offsets, H * D * D, mask)
    return w_i.to(DOT), w_f.to(DOT), w_z.to(DOT), w_o.to(DOT)


@triton.jit
def load_state(p_h, p_c, p_n, p_m, places, inside):
    """h, c, m and its rest of a state, brought to n = 1. Where nothing is stored, m = -inf."""
    b_n = tl.load(p_n + places, mask=inside, other=0.0)
    empty = b_n == 0.0
    b_n = tl.where(empty, 1.0, b_n)
    b_c = tl.where(empty, 0.0, tl.load(p_c + places, mask=inside, other=0.0) / b_n)
    b_m = tl.where(empty, float("-inf"), tl.load(p_m + places, mask=inside, other=0.0))
    return tl.load(p_h + places, mask=inside, other=0.0), b_c, b_m, tl.log(b_n)


@triton.jit
def add(a, b):
    """a + b, rounded, and what the rounding left (Knuth's sum of two): nothing of an infinite sum, nor of LOWEST."""
    total = a + b
    b_in_total = total - a
    rest = (a - (total - b_in_total)) + (b - b_in_total)
    return total, tl.where(tl.abs(total) < -LOWEST, rest, 0.0)


@triton.jit
def cell(b_i, b_f, b_z, b_o, b_c, b_m, b_rest):
    """c, m and its rest, and what the backward pass needs: u, sigmoid(-f), tanh(z), sigmoid(o)."""
    kept, rest = add(b_m, log_sigmoid(b_f))
    rest += b_rest
    b_i = tl.maximum(b_i, LOWEST)
    b_u = (b_i - kept) - rest
    b_z = tanh(b_z)
    b_m, b_rest = add(tl.where(b_u > 0.0, b_i, kept), tl.log(1.0 + tl.exp(-tl.abs(b_u))))
    b_rest += tl.where(b_u > 0.0, 0.0, rest)
    return b_c + sigmoid(b_u) * (b_z - b_c), b_m, b_rest, b_u, sigmoid(-b_f), b_z, sigmoid(b_o)


@triton.jit
def cell_backward(dh, dc, dn, b_u, b_shut, b_z, b_o, b_c, b_c_before):
    """Gradients of the gates, and dc and dn of the step before. With m held constant (it cancels),

    dc += dh o,                  dn -= dh h,                           do~ = dh h (1 - o)
    di~ = i' (z dc + dn),        df~ = f' (c_{t-1} dc + dn) (1 - f),   dz~ = i' (1 - z^2) dc
    dc_{t-1} = f' dc,            dn_{t-1} = f' dn
    """
    b_h = b_o * b_c
    dc += dh * b_o
    dn -= dh * b_h
    b_i = sigmoid(b_u)
    b_f = sigmoid(-b_u)
    d_i = b_i * (b_z * dc + dn)
    d_f = b_f * b_shut * (b_c_before * dc + dn)
    d_z = b_i * (1.0 - b_z * b_z) * dc
    return d_i, d_f, d_z, dh * b_h * (1.0 - b_o), b_f * dc, b_f * dn


@triton.jit
def load_exchanged(p, o_k, in_n, D: tl.constexpr):
    """What other programs have written, from the L2 cache: the one of a processor may hold it as it was before."""
    return tl.load(p + o_k[None, :], mask=in_n[:, None] & (o_k < D)[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def arrive(p_arrived):
    """Tells the programs of the same head and sequences that what this one has written can be read."""
    tl.debug_barrier()
    tl.atomic_add(p_arrived, 1, sem="release")


@triton.jit
def wait(p_arrived, programs):
    """Until so many have arrived; all of them run, since they were launched together. 0, or NaN if they do not come:
    whatever is wrong then must show, and the GPU must not hang."""
    polls = 0
    while (polls < MAX_POLLS) & (tl.atomic_add(p_arrived, 0, sem="acquire") < programs):
        polls += 1
    return tl.where(polls < MAX_POLLS, 0.0, float("nan"))


# --- forward ---------------------------------------------------------------------------------------------------------


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
        b_i = tl.dot(b_h_before, w_i, acc=x_i.to(tl.float32) + bias_i[None, :], input_precision=PRECISION)
        b_f = tl.dot(b_h_before, w_f, acc=x_f.to(tl.float32) + bias_f[None, :], input_precision=PRECISION)
        b_z = tl.dot(b_h_before, w_z, acc=x_z.to(tl.float32) + bias_z[None, :], input_precision=PRECISION)
        b_o = tl.dot(b_h_before, w_o, acc=x_o.to(tl.float32) + bias_o[None, :], input_precision=PRECISION)
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

    # A sequence without a step keeps its state as it is, even its n.
    untouched = inside & (touched == 0)[:, None]
    b_m, b_rest = add(b_m, b_rest)
    b_n = tl.where(untouched, tl.load(p_n_initial + o_state, mask=untouched, other=0.0), tl.exp(b_rest))
    b_c = tl.where(untouched, tl.load(p_c_initial + o_state, mask=untouched, other=0.0), b_c * b_n)
    b_m = tl.where(untouched, tl.load(p_m_initial + o_state, mask=untouched, other=0.0), b_m)
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
            b_i = x_i.to(tl.float32) + bias_i[None, :]
            b_f = x_f.to(tl.float32) + bias_f[None, :]
            b_z = x_z.to(tl.float32) + bias_z[None, :]
            b_o = x_o.to(tl.float32) + bias_o[None, :]
            for first_k in range(0, units, BK):
                o_k = first_k + tl.arange(0, BK)
                o_before = o_head[:, None] + o_k[None, :]
                in_before = has_state[:, None] & (o_k < D)[None, :]
                b_h_before = tl.load(p_read + o_before, mask=in_before, other=0.0).to(DOT)  # [BB, BK]
                w_i, w_f, w_z, w_o = load_weights(p_recurrent_weight, h, o_k, o_d, 1, D, H, D, DOT)  # [BK, BD]
                b_i = tl.dot(b_h_before, w_i, acc=b_i, input_precision=PRECISION)
                b_f = tl.dot(b_h_before, w_f, acc=b_f, input_precision=PRECISION)
                b_z = tl.dot(b_h_before, w_z, acc=b_z, input_precision=PRECISION)
                b_o = tl.dot(b_h_before, w_o, acc=b_o, input_precision=PRECISION)

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

    # A sequence without a step keeps its state as it is, even its n.
    for first in range(0, D, BD):
        o_d = first + tl.arange(0, BD)
        inside = has_state[:, None] & (o_d < D)[None, :]
        untouched = inside & (touched == 0)[:, None]
        o_state = o_state_head[:, None] + o_d[None, :]
        b_c = tl.load(p_c_final + o_state, mask=inside, other=0.0)
        b_m = tl.load(p_m_final + o_state, mask=inside, other=0.0)
        b_m, b_rest = add(b_m, tl.load(p_n_final + o_state, mask=inside, other=0.0))
        b_n = tl.where(untouched, tl.load(p_n_initial + o_state, mask=untouched, other=0.0), tl.exp(b_rest))
        b_c = tl.where(untouched, tl.load(p_c_initial + o_state, mask=untouched, other=0.0), b_c * b_n)
        b_m = tl.where(untouched, tl.load(p_m_initial + o_state, mask=untouched, other=0.0), b_m)
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
        b_i = x_i.to(tl.float32) + bias_i[None, :]
        b_f = x_f.to(tl.float32) + bias_f[None, :]
        b_z = x_z.to(tl.float32) + bias_z[None, :]
        b_o = x_o.to(tl.float32) + bias_o[None, :]
        if BK >= D:
            b_h_before = load_exchanged(p_read + o_head, o_k, in_n, D).to(DOT)  # [BB, BK]
            b_i = tl.dot(b_h_before, w_i, acc=b_i, input_precision=PRECISION)
            b_f = tl.dot(b_h_before, w_f, acc=b_f, input_precision=PRECISION)
            b_z = tl.dot(b_h_before, w_z, acc=b_z, input_precision=PRECISION)
            b_o = tl.dot(b_h_before, w_o, acc=b_o, input_precision=PRECISION)
        else:
            for first_k in range(0, units, BK):
                b_h_before = load_exchanged(p_read + o_head, first_k + o_k, in_n, D).to(DOT)
                w_i, w_f, w_z, w_o = load_weights(p_recurrent_weight, h, first_k + o_k, o_d, 1, D, H, D, DOT)
                b_i = tl.dot(b_h_before, w_i, acc=b_i, input_precision=PRECISION)
                b_f = tl.dot(b_h_before, w_f, acc=b_f, input_precision=PRECISION)
                b_z = tl.dot(b_h_before, w_z, acc=b_z, input_precision=PRECISION)
                b_o = tl.dot(b_h_before, w_o, acc=b_o, input_precision=PRECISION)
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
        # A sequence without a step keeps its state as it is, even its n.
        untouched = inside & (touched == 0)[:, None]
        b_m, b_rest = add(b_m, b_rest)
        b_n = tl.where(untouched, tl.load(p_n_initial + o_state, mask=untouched, other=0.0), tl.exp(b_rest))
        b_c = tl.where(untouched, tl.load(p_c_initial + o_state, mask=untouched, other=0.0), b_c * b_n)
        b_m = tl.where(untouched, tl.load(p_m_initial + o_state, mask=untouched, other=0.0), b_m)
        b_rest = b_n
    else:
        tl.store(p_touched + o_n, touched.to(tl.int32), mask=in_n)
    tl.store(p_h_final + o_state, b_h, mask=inside)
    tl.store(p_c_final + o_state, b_c, mask=inside)
    tl.store(p_n_final + o_state, b_rest, mask=inside)
    tl.store(p_m_final + o_state, b_m, mask=inside)


# --- backward --------------------------------------------------------------------------------------------------------


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

        b_dh = tl.dot(d_i, w_i, acc=b_dh, input_precision=PRECISION)
        b_dh = tl.dot(d_f, w_f, acc=b_dh, input_precision=PRECISION)
        b_dh = tl.dot(d_z, w_z, acc=b_dh, input_precision=PRECISION)
        b_dh = tl.dot(d_o, w_o, acc=b_dh, input_precision=PRECISION)
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
                b_dh = tl.dot(d_i.to(DOT), w_i, acc=b_dh, input_precision=PRECISION)
                b_dh = tl.dot(d_f.to(DOT), w_f, acc=b_dh, input_precision=PRECISION)
                b_dh = tl.dot(d_z.to(DOT), w_z, acc=b_dh, input_precision=PRECISION)
                b_dh = tl.dot(d_o.to(DOT), w_o, acc=b_dh, input_precision=PRECISION)

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
                b_dh = tl.dot(d_i, w_i, acc=b_dh, input_precision=PRECISION)
                b_dh = tl.dot(d_f, w_f, acc=b_dh, input_precision=PRECISION)
                b_dh = tl.dot(d_z, w_z, acc=b_dh, input_precision=PRECISION)
                b_dh = tl.dot(d_o, w_o, acc=b_dh, input_precision=PRECISION)
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
