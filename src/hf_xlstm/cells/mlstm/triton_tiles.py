"""What the mLSTM's Triton kernels share: where chunks begin, how tiles are loaded, which weights the gates give.

Notation as in mlstm_triton_kernels.py.
"""

import triton
import triton.language as tl


# exp(-1000) is 0 in every format: a state this far down is gone.
RESET = tl.constexpr(-1000.0)
UNITS = tl.constexpr(64.0)
BARRIER = tl.constexpr(1 << 23)  # below the lowest sum of a chunk: 128 tokens, 1000 * UNITS each
# The floor of m: what is stored on a scale of exp(-1e4) is gone too, and x - m must not become -inf - -inf.
LOWEST = tl.constexpr(-1e4)
TINY = tl.constexpr(1e-37)  # 1 / TINY is finite
# Run-time values that change with T, which no kernel is specialised on. The strides of q, k and v may too, but are
# left to Triton: known to be multiples of 16, as they are where H K and H V are, they keep loads wide.
PER_CALL = ["T", "width", "chunks_per_row", "spans", "chunks_per_span"]
GATE_STRIDES = [f"stride_{name}" for name in ("ib", "it", "ih", "fb", "ft", "fh", "mb", "mt")]


@triton.jit
def max_plus(decay_a, m_a, decay_b, m_b):
    """m after interval a and then b, given the decay and the m that each has by itself. Adds only: -inf is safe."""
    return decay_a + decay_b, tl.maximum(m_a + decay_b, m_b)


@triton.jit
def stabilizer(from_state, local):
    return tl.maximum(tl.maximum(from_state, local), LOWEST)


@triton.jit
def normalizer(s, m, eps):
    """D_t, never 0: not for a dead token, whose m is inf, nor where eps is 0 and all underflows."""
    return tl.maximum(tl.maximum(tl.abs(s), tl.exp(-m)), TINY) + eps


@triton.jit
def chunk_tokens(chunk, T, chunks_per_row, p_cu_seqlens, p_first_chunk, p_sequence, L: tl.constexpr):
    """Row of the batch, first token of a chunk, end of its sequence. Chunks never straddle two packed sequences."""
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
    """Row of the batch, first token and end of a sequence, its first chunk and the one after its last. Sequences that
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
def load_boundary(p_chunk_decay, p_m, p_m_next, o_chunk):
    """A and m' of a chunk. m' - m is exact where they are close: A makes up for the rounding of m'."""
    m_next = tl.load(p_m_next + o_chunk)
    return tl.exp(tl.load(p_chunk_decay + o_chunk) - (m_next - tl.load(p_m + o_chunk))), m_next


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
def store_tile(p, block, o_row, o_column, stride, in_row, in_column):
    mask = in_row[:, None] & in_column[None, :]
    tl.store(p + o_row[:, None] * stride + o_column[None, :], block.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_live(p_reset_count, o_gate, in_t):
    """Tokens that exist and are not masked out. The others are never read: what stands there may be anything."""
    return tl.load(p_reset_count + o_gate, mask=in_t, other=-1) >= 0


@triton.jit
def load_stabilizer(p_coarse, p_fine, p_m_in_chunk, p_reset_count, o_gate, in_t, m):
    """m_t and b_t + m as it reaches token t: -inf behind a reset. A dead token has m_t = inf: it weighs nothing."""
    reset_count = tl.load(p_reset_count + o_gate, mask=in_t, other=-1)
    b = tl.load(p_coarse + o_gate, mask=in_t, other=0) / UNITS + tl.load(p_fine + o_gate, mask=in_t, other=0.0)
    from_state = tl.where(reset_count == 0, b + m, float("-inf"))
    m_t = stabilizer(from_state, tl.load(p_m_in_chunk + o_gate, mask=in_t, other=0.0))
    return tl.where(reset_count < 0, float("inf"), m_t), from_state


@triton.jit
def pair_weights(p_coarse, p_fine, p_log_i, o_gate, in_t, m, L: tl.constexpr):
    """P [L, L]: b_t - b_j + i_j - m_t, summed so that what is exact stays exact."""
    coarse = tl.load(p_coarse + o_gate, mask=in_t, other=0)
    fine = tl.load(p_fine + o_gate, mask=in_t, other=0.0)
    log_i = tl.load(p_log_i + o_gate, mask=in_t, other=float("-inf"))
    log_p = (coarse[:, None] - coarse[None, :]) / UNITS + ((fine - m)[:, None] + (log_i - fine)[None, :])
    o_l = tl.arange(0, L)
    return tl.exp(tl.where(o_l[:, None] >= o_l[None, :], log_p, float("-inf")))
