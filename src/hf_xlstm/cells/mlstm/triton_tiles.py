"""What the mLSTM's Triton kernels share: where chunks begin, how tiles are loaded, which weights the gates give.

Notation as in triton_forward.py.
"""

import triton
import triton.language as tl


# Logarithms of weights are kept as coarse * UNIT + fine, an int32 and a float32. With these numbers the coarse parts
# of a chunk of 128 tokens stay below 2^31: 128 log f down to RESET, and one i and one m of RANGE each.
UNIT = tl.constexpr(0.125)
RANGE = tl.constexpr(2.0**22)
# A forget gate of log f < RESET closes for good, as -inf does.
RESET = tl.constexpr(-(2.0**20))
# The floor of m: what is stored on a scale of exp(-2^22) is gone, and x - m must not become -inf - -inf.
LOWEST = tl.constexpr(-(2.0**22))
TINY = tl.constexpr(1e-37)  # 1 / TINY is finite
# Run-time values that change with T, which no kernel is specialised on. The strides of q, k and v may too, but are
# left to Triton: known to be multiples of 16, as they are where H K and H V are, they keep loads wide.
PER_CALL = ["T", "width", "chunks_per_row", "spans", "chunks_per_span"]
GATE_STRIDES = [f"stride_{name}" for name in ("ib", "it", "ih", "fb", "ft", "fh", "mb", "mt")]


@triton.jit
def split(x):
    """x as coarse * UNIT + fine, without rounding. Fine is at most UNIT / 2 up to RANGE; beyond, it holds the rest."""
    units = tl.minimum(tl.maximum(x, -RANGE), RANGE) / UNIT
    coarse = tl.floor(units + 0.5).to(tl.int32)
    return coarse, x - coarse.to(tl.float32) * UNIT


@triton.jit
def join(coarse, fine):
    return coarse.to(tl.float32) * UNIT + fine


@triton.jit
def log_decay(log_f, m, m_new):
    """log f + m - m', where m' may be log f + m, rounded: what large numbers leave is not."""
    f_coarse, f_fine = split(log_f)
    m_coarse, m_fine = split(m)
    new_coarse, new_fine = split(m_new)
    return join(f_coarse + m_coarse - new_coarse, f_fine + (m_fine - new_fine))


@triton.jit
def max_plus(decay_a, m_a, decay_b, m_b):
    """m after interval a and then b, given the decay and the m that each has by itself. Adds only: -inf is safe."""
    return decay_a + decay_b, tl.maximum(m_a + decay_b, m_b)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def stabilizer(from_state, in_chunk):
    return tl.maximum(tl.maximum(from_state, in_chunk), LOWEST)


@triton.jit
def normalizer(s, m, eps):
    """D_t, never 0: not for a dead token, whose m is inf, nor where eps is 0 and all underflows."""
    return tl.maximum(tl.maximum(tl.abs(s), tl.exp(-m)), TINY) + eps


@triton.jit
def chunk_tokens(chunk, T, chunks_per_row, p_cu_seqlens, p_first_chunk, p_sequence, L: tl.constexpr):
    """The batch row and the first token of a chunk, and the end of its sequence. Chunks never straddle two packed
    sequences."""
    if p_cu_seqlens is not None:
        row = chunk * 0
        sequence = tl.load(p_sequence + chunk)
        start = tl.load(p_cu_seqlens + sequence) + (chunk - tl.load(p_first_chunk + sequence)) * L
        end = tl.load(p_cu_seqlens + sequence + 1)
    else:
        row = chunk // chunks_per_row
        start = (chunk % chunks_per_row) * L
        end = T
    return tl.cast(row, tl.int64), start, end


@triton.jit
def sequence_chunks(sequence, T, chunks_per_row, spans, chunks_per_span, p_cu_seqlens, p_first_chunk, L: tl.constexpr):
    """The batch row, first token and end of a sequence, its first chunk and the one after its last. Sequences that
    are not packed may be cut into spans, numbered sequence by sequence."""
    if p_cu_seqlens is not None:
        row = sequence * 0
        start = tl.load(p_cu_seqlens + sequence)
        end = tl.load(p_cu_seqlens + sequence + 1)
        first = tl.load(p_first_chunk + sequence)
        last = tl.load(p_first_chunk + sequence + 1)
    else:
        row = sequence // spans
        chunk = sequence % spans * chunks_per_span
        start = chunk * L
        end = T
        first = row * chunks_per_row + chunk
        last = row * chunks_per_row + tl.minimum(chunk + chunks_per_span, chunks_per_row)
    return tl.cast(row, tl.int64), start, end, first, last


@triton.jit
def features(p, row, start, h, stride_b, stride_t, stride_h):
    """Where the features of token `start` begin, for head h."""
    return p + row * stride_b + tl.cast(start, tl.int64) * stride_t + tl.cast(h, tl.int64) * stride_h


@triton.jit
def load_tile(p, o_row, o_column, stride, in_row, in_column):
    """[rows, columns], 0 outside."""
    mask = in_row[:, None] & in_column[None, :]
    return tl.load(p + o_row[:, None] * stride + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def load_transposed(p, o_row, o_column, stride, in_row, in_column):
    """[columns, rows], 0 outside."""
    mask = in_row[None, :] & in_column[:, None]
    return tl.load(p + o_row[None, :] * stride + o_column[:, None], mask=mask, other=0.0)


@triton.jit
def store_tile(p, b_x, o_row, o_column, stride, in_row, in_column):
    mask = in_row[:, None] & in_column[None, :]
    tl.store(p + o_row[:, None] * stride + o_column[None, :], b_x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_live(p_last_reset, o_gate, in_t):
    """Tokens [L] that exist and are not masked out. The others are never read: what stands there may be anything."""
    return tl.load(p_last_reset + o_gate, mask=in_t, other=-1) >= 0


@triton.jit
def load_key_weights(p_log_w, p_w_shift, o_gate, o_chunk, in_t):
    """w_j [L], 0 for dead tokens."""
    log_w = tl.load(p_log_w + o_gate, mask=in_t, other=float("-inf"))
    return tl.exp(log_w + tl.load(p_w_shift + o_chunk))


@triton.jit
def load_stabilizer(p_coarse, p_fine, p_m_in_chunk, p_last_reset, p_m, o_gate, o_chunk, in_t):
    """m_t [L]. A dead token has m_t = inf: it weighs nothing."""
    last_reset = tl.load(p_last_reset + o_gate, mask=in_t, other=-1)
    coarse = tl.load(p_coarse + o_gate, mask=in_t, other=0)
    fine = tl.load(p_fine + o_gate, mask=in_t, other=0.0)
    from_state = tl.where(last_reset == 0, join(coarse, fine) + tl.load(p_m + o_chunk), float("-inf"))
    m_t = stabilizer(from_state, tl.load(p_m_in_chunk + o_gate, mask=in_t, other=0.0))
    return tl.where(last_reset < 0, float("inf"), m_t)


@triton.jit
def load_state_weights(p_coarse, p_fine, p_last_reset, p_m, m_t, o_gate, o_chunk, in_t):
    """a_t [L], 0 behind a reset and for dead tokens."""
    last_reset = tl.load(p_last_reset + o_gate, mask=in_t, other=-1)
    coarse = tl.load(p_coarse + o_gate, mask=in_t, other=0)
    fine = tl.load(p_fine + o_gate, mask=in_t, other=0.0)
    m_in_coarse, m_in_fine = split(tl.load(p_m + o_chunk))
    m_t_coarse, m_t_fine = split(m_t)
    log_a = join(coarse + m_in_coarse - m_t_coarse, fine + (m_in_fine - m_t_fine))
    return tl.exp(tl.where(last_reset == 0, log_a, float("-inf")))


@triton.jit
def pair_weights(p_coarse, p_fine, p_log_i, p_last_reset, o_gate, in_t, m, L: tl.constexpr):
    """P [L, L]: of b_t - b_j + i_j - m_t the coarse and the fine parts by themselves, so that nothing large is
    rounded. A pair costs an integer sum, a conversion, a fused product and sum, and a sum, whatever the gates are."""
    coarse = tl.load(p_coarse + o_gate, mask=in_t, other=0)
    fine = tl.load(p_fine + o_gate, mask=in_t, other=0.0)
    i_coarse, i_fine = split(tl.load(p_log_i + o_gate, mask=in_t, other=float("-inf")))
    m_coarse, m_fine = split(m)
    last_reset = tl.load(p_last_reset + o_gate, mask=in_t, other=-1)
    log_p = join(
        (coarse - m_coarse)[:, None] + (i_coarse - coarse)[None, :],
        (fine - m_fine)[:, None] + (i_fine - fine)[None, :],
    )
    o_l = tl.arange(0, L)
    visible = (o_l[:, None] >= o_l[None, :]) & (last_reset[:, None] <= o_l[None, :] + 1)
    return tl.exp(tl.where(visible, log_p, float("-inf")))
