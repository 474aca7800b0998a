"""What the Triton kernels of the sLSTM share (triton_forward.py, triton_backward.py): the cell, and how its tiles are
loaded, exchanged and stored. A kernel walks a whole sequence in one launch.

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
def final_state(b_c, b_m, b_rest, p_c_initial, p_n_initial, p_m_initial, places, untouched):
    """c, n, m as they are stored. A sequence without a step keeps its state as it is, even its n."""
    b_m, b_rest = add(b_m, b_rest)
    b_n = tl.where(untouched, tl.load(p_n_initial + places, mask=untouched, other=0.0), tl.exp(b_rest))
    b_c = tl.where(untouched, tl.load(p_c_initial + places, mask=untouched, other=0.0), b_c * b_n)
    b_m = tl.where(untouched, tl.load(p_m_initial + places, mask=untouched, other=0.0), b_m)
    return b_c, b_n, b_m


@triton.jit
def with_bias(x_i, x_f, x_z, x_o, bias_i, bias_f, bias_z, bias_o):
    """The gates [BB, BD] without R h, in float32."""
    return (
        x_i.to(tl.float32) + bias_i[None, :],
        x_f.to(tl.float32) + bias_f[None, :],
        x_z.to(tl.float32) + bias_z[None, :],
        x_o.to(tl.float32) + bias_o[None, :],
    )


@triton.jit
def multiply_four(b_h, w_i, w_f, w_z, w_o, b_i, b_f, b_z, b_o, PRECISION: tl.constexpr):
    """The gates with R h of one tile."""
    return (
        tl.dot(b_h, w_i, acc=b_i, input_precision=PRECISION),
        tl.dot(b_h, w_f, acc=b_f, input_precision=PRECISION),
        tl.dot(b_h, w_z, acc=b_z, input_precision=PRECISION),
        tl.dot(b_h, w_o, acc=b_o, input_precision=PRECISION),
    )


@triton.jit
def multiply_together(d_i, d_f, d_z, d_o, w_i, w_f, w_z, w_o, b_dh, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """dh with R^T dx of one tile."""
    b_dh = tl.dot(d_i.to(DOT), w_i, acc=b_dh, input_precision=PRECISION)
    b_dh = tl.dot(d_f.to(DOT), w_f, acc=b_dh, input_precision=PRECISION)
    b_dh = tl.dot(d_z.to(DOT), w_z, acc=b_dh, input_precision=PRECISION)
    return tl.dot(d_o.to(DOT), w_o, acc=b_dh, input_precision=PRECISION)


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
