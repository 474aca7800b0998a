"""How the mLSTM kernels are launched: block sizes, chunk tables, scratch memory. Inputs are checked by the callers.

Tensors are (B, T, H, ...) as projections produce them, with any strides but the last; scratch is laid out as the
kernel files say.
"""

from typing import NamedTuple

import torch
import triton

from ..triton_common import dot_options
from . import triton_backward as backward_kernels
from . import triton_forward as kernels


class Blocks(NamedTuple):
    """Block sizes of K and V, warps and pipeline stages of one kernel."""

    BK: int
    BV: int
    num_warps: int
    num_stages: int


MAX_CHUNK = 128


class GPU(NamedTuple):
    hopper: bool
    processors: int

    @classmethod
    def of(cls, device: torch.device) -> "GPU":
        if device.type != "cuda":  # interpreted, or recorded by benchmarks/gpu/kernel_resources.py
            return cls(False, 132)
        properties = torch.cuda.get_device_properties(device)
        return cls(torch.version.hip is None and properties.major == 9, properties.multi_processor_count)


class Plan(NamedTuple):
    chunk_size: int
    state: Blocks  # C and dC
    score: Blocks  # the scores, and the gradients of scores, q and k
    output: Blocks  # h and dv
    full: int  # how many recurrences over a state (sequences x heads) keep the whole GPU busy
    fused: bool = False  # C and h in one kernel, with the blocks of `output`


def plan(q: torch.Tensor, v: torch.Tensor, gpu: GPU) -> Plan:
    """Long chunks halve the traffic of chunk states. Only Hopper holds their tiles without spilling registers, and
    that only for head dims whose rows it can load 16 bytes at a time.

    No block depends on B and T: one compilation serves all lengths. What each choice takes in registers and in shared
    memory is what benchmarks/gpu/kernel_resources.py reports.
    """
    K, V = q.shape[-1], v.shape[-1]
    aligned = K % 16 == V % 16 == 0
    if q.dtype != torch.bfloat16:
        # float32 products take no matrix instructions: their operands stand in registers too
        num_warps = 8 if q.dtype == torch.float32 else 4
        length, state, score, output = 64, (32, 64, 8, 2), (32, 32, num_warps, 2), (32, 64, num_warps, 2)
    elif gpu.hopper and K * V > 64 * 64 and aligned:
        length, state, score, output = MAX_CHUNK, (64, 128, 8, 3), (64, 64, 8, 3), (64, 128, 8, 3)
    else:
        # Blocks that are cut off at the edge of a head need masks, and these registers.
        num_warps = 4 if K % 64 == V % 64 == 0 else 8
        state, score = (64, 64, num_warps, 3 if aligned else 2), (64, 64, num_warps, 2)
        length, output = 64, (32, 128, 4, 3)

    state, score, output = (_fit(K, V, *blocks) for blocks in (state, score, output))
    tiles = triton.cdiv(K, state.BK) * triton.cdiv(V, state.BV)
    return Plan(length, state, score, output, gpu.processors // tiles)


def _fit(K: int, V: int, BK: int, BV: int, num_warps: int, num_stages: int) -> Blocks:
    widest_k, widest_v = (max(16, triton.next_power_of_2(dim)) for dim in (K, V))
    return Blocks(min(BK, widest_k), min(BV, widest_v), num_warps, num_stages)


def fused_plan(q: torch.Tensor, v: torch.Tensor, sequences: int, gpu: GPU) -> Plan | None:
    """The plan of a forward pass in which C stays in registers, or None where this cannot be or does not pay.

    At the head dims of a 7B model C would be written and read at every border, 2.1 GB for 65,536 tokens and half of
    all that is moved. In its stead every block of columns reads all of q and k, mostly from the L2 cache, where its
    neighbours have just brought them. A program walks its sequence alone, so there must be one for each processor.
    """
    K, V = q.shape[-1], v.shape[-1]
    if not gpu.hopper or q.dtype != torch.bfloat16 or K > 256 or K % 16 or V % 16:
        return None
    blocks = _fit(K, V, 256, 128 if K == 128 else 64, 8, 2)
    if sequences * q.shape[2] * triton.cdiv(V, blocks.BV) < gpu.processors:
        return None
    return Plan(64, blocks, _fit(K, V, 64, 64, 4, 2), blocks, full=0, fused=True)


# Segments walk the recurrence twice, so they must be many; and short ones are not worth the extra launches.
MIN_SEGMENTS = 4
MIN_CHUNKS_PER_SEGMENT = 8
BORDER_BLOCK = 128  # chunks whose m are computed at a time


class Chunks(NamedTuple):
    """Which tokens each chunk holds. Packed sequences have tables; their number of chunks is an upper bound that
    depends on shapes only, so that nothing waits for the GPU. Chunks beyond the real number come out empty."""

    sequences: int
    per_row: int
    total: int
    segments: int  # of each sequence, whose states are computed side by side
    per_segment: int
    bounds: torch.Tensor | None = None  # (sequences + 1,) tokens
    first: torch.Tensor | None = None  # (sequences + 1,) first chunk of each sequence
    sequence: torch.Tensor | None = None  # (total,)

    @property
    def tables(self) -> tuple[torch.Tensor | None, ...]:
        return self.bounds, self.first, self.sequence

    @classmethod
    def cut(cls, q: torch.Tensor, cu_seqlens: torch.Tensor | None, plan: Plan) -> "Chunks":
        batch, length, heads = q.shape[:3]
        chunk_size = plan.chunk_size
        if cu_seqlens is None:
            per_row = triton.cdiv(length, chunk_size)
            segments = min(plan.full // (batch * heads), per_row // MIN_CHUNKS_PER_SEGMENT)
            per_segment = triton.cdiv(per_row, segments) if segments >= MIN_SEGMENTS else per_row
            return cls(batch, per_row, batch * per_row, triton.cdiv(per_row, per_segment), per_segment)
        sequences = cu_seqlens.shape[0] - 1
        total = length // chunk_size + sequences
        bounds = cu_seqlens.to(torch.int32).contiguous()
        counts = (bounds.diff() + chunk_size - 1) // chunk_size
        first = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        chunk = torch.arange(total, dtype=torch.int32, device=q.device)
        sequence = torch.searchsorted(first[1:], chunk, right=True, out_int32=True).clamp_max_(sequences - 1)
        return cls(sequences, total, total, 1, total, bounds, first, sequence)


class Gates(NamedTuple):
    """What `gate_kernel` and `border_kernel` make of the gates: (B, H, T) and, per chunk, (chunks, H)."""

    coarse: torch.Tensor
    fine: torch.Tensor
    log_i: torch.Tensor
    m_local: torch.Tensor
    log_w: torch.Tensor
    segment: torch.Tensor
    chunk_decay: torch.Tensor
    chunk_m: torch.Tensor
    m: torch.Tensor
    m_next: torch.Tensor

    @property
    def per_pair(self) -> tuple[torch.Tensor, ...]:
        return self.coarse, self.fine, self.log_i, self.m_local, self.segment

    @property
    def borders(self) -> tuple[torch.Tensor, ...]:
        return self.chunk_decay, self.m, self.m_next


class Rows(NamedTuple):
    """What `row_kernel` makes, (B, H, T)."""

    m: torch.Tensor
    inverse: torch.Tensor
    read: torch.Tensor
    carried: torch.Tensor


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    """(batch, time, head) strides."""
    return x.stride()[:3]


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def forward(q, k, v, igate, fgate, mask, cu_seqlens, initial, final, scale, eps, plan: Plan):
    """h, s = n.q, and C, n at the chunk borders, or None where C stays on chip. `initial` and `final` are (c, n, m), a
    triple of None where there is none."""
    chunks = Chunks.cut(q, cu_seqlens, plan)
    gates = _run_gates(igate, fgate, mask, initial[2], final[2], chunks, plan)
    if plan.fused:
        n = _run_normalizers(k, gates, initial[1], final[1], chunks, plan)
        scores, read, s = _run_scores(q, k, gates, n, scale, eps, chunks, plan)
        return _run_fused(q, k, v, scores, read, gates, initial[0], final[0], chunks, plan), s, None
    states = _run_states(k, v, gates, initial[:2], final[:2], chunks, plan)
    scores, read, s = _run_scores(q, k, gates, states[1], scale, eps, chunks, plan)
    return _run_outputs(q, v, scores, read, gates, states[0], chunks, plan), s, states


def backward(
    dh, dfinal, q, k, v, igate, fgate, mask, cu_seqlens, initial, dinitial, states, s, scale, eps, plan: Plan
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv, digate, dfgate; those of the initial c and n go to `dinitial`. `states` are those of `forward`, or
    None to compute them again."""
    chunks = Chunks.cut(q, cu_seqlens, plan)
    gates = _run_gates(igate, fgate, mask, initial[2], None, chunks, plan)
    if states is None:
        states = _run_states(k, v, gates, initial[:2], (None, None), chunks, plan)
    rows = _run_rows(q, dh, s, states[0], gates, scale, eps, chunks, plan)
    x, scores, e, g_row, g_column = _run_score_gradients(q, k, v, dh, s, gates, rows, scale, chunks, plan)
    dstates = _run_state_gradients(q, dh, x, gates, rows, dfinal, dinitial, chunks, plan)
    dv = _run_value_gradients(k, dh, scores, gates, dstates[0], chunks, plan)
    dq, dk, partial = _run_query_key_gradients(q, k, v, dh, e, x, gates, rows, states, dstates, chunks, plan)
    return dq, dk, dv, *_run_gate_gradients(igate, fgate, gates, g_row, g_column, partial, chunks, plan)


def _run_gates(igate, fgate, mask, m_initial, m_final, chunks: Chunks, plan: Plan) -> Gates:
    B, T, H = igate.shape
    coarse, segment = (torch.empty(B, H, T, dtype=torch.int32, device=igate.device) for _ in range(2))
    floats = (torch.empty(B, H, T, dtype=torch.float32, device=igate.device) for _ in range(4))
    per_chunk = (torch.empty(chunks.total, H, dtype=torch.float32, device=igate.device) for _ in range(4))
    gates = Gates(coarse, *floats, segment, *per_chunk)
    kernels.gate_kernel[(chunks.total * H,)](
        igate,
        fgate,
        mask,
        *gates[:-2],
        *chunks.tables,
        T,
        chunks.per_row,
        *igate.stride(),
        *fgate.stride(),
        *((0, 0) if mask is None else mask.stride()),
        H=H,
        L=plan.chunk_size,
        num_warps=1,
    )
    kernels.border_kernel[(chunks.sequences * H,)](
        gates.chunk_decay,
        gates.chunk_m,
        m_initial,
        gates.m,
        gates.m_next,
        m_final,
        *chunks.tables[:2],
        T,
        chunks.per_row,
        H=H,
        L=plan.chunk_size,
        BLOCK=BORDER_BLOCK,
        num_warps=1,
    )
    return gates


def chunk_states(q, v, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for C and n, or their gradients, at every chunk border."""
    H, K, V = *q.shape[2:], v.shape[-1]
    c = q.new_empty(chunks, H, K, V, dtype=_state_dtype(q.dtype))
    return c, q.new_empty(chunks, H, K, dtype=torch.float32)


def _walk(kernel, inputs, strides, initial, final, chunks: Chunks, plan: Plan, backwards: bool):
    """The recurrence over the state from chunk to chunk, by `state_kernel` or `state_gradient_kernel`: the state at
    every border, and the one at the end in `final`. Segments of a sequence first run on their own, each from zero; put
    together, that is where the second run begins."""
    k, v = inputs[:2]  # or q and dh
    T, H, K, V = *k.shape[1:], v.shape[-1]
    blocks = plan.state
    parts = chunks.sequences * chunks.segments

    def run(start, borders, end, decay):
        kernel[(parts * H * triton.cdiv(K, blocks.BK) * triton.cdiv(V, blocks.BV),)](
            *inputs,
            *start,
            *borders,
            *end,
            decay,
            *chunks.tables[:2],
            T,
            chunks.per_row,
            chunks.segments,
            chunks.per_segment,
            *strides,
            H=H,
            K=K,
            V=V,
            L=plan.chunk_size,
            **blocks._asdict(),
            **dot_options(k.dtype),
        )

    borders = chunk_states(k, v, chunks.total)
    if chunks.segments > 1:
        shapes = (parts, H, K, V), (parts, H, K), (parts, H)
        *segments, decay = (torch.empty(shape, dtype=torch.float32, device=k.device) for shape in shapes)
        run((None, None), (None, None), segments, decay)
        for state, start, end, size in zip(segments, initial, final, (K * V, K)):
            block = min(1024, triton.next_power_of_2(size))
            kernels.combine_kernel[(chunks.sequences * H * triton.cdiv(size, block),)](
                state, decay, start, end, chunks.segments, H=H, N=size, BLOCK=block, BACKWARDS=backwards, num_warps=4
            )
        initial, final = segments, (None, None)
    run(initial, borders, final, None)
    return borders


def _run_states(k, v, gates: Gates, initial, final, chunks: Chunks, plan: Plan):
    """The state that enters each chunk; the last one goes to `final`."""
    inputs = (k, v, gates.log_w, *gates.borders)
    strides = (*_strides(k), *_strides(v))
    return _walk(kernels.state_kernel, inputs, strides, initial, final, chunks, plan, backwards=False)


def _run_scores(q, k, gates: Gates, n, scale, eps, chunks: Chunks, plan: Plan):
    B, T, H, K = q.shape
    L, (BK, _, num_warps, num_stages) = plan.chunk_size, plan.score
    scores = torch.empty(chunks.total, H, L, L, dtype=_state_dtype(q.dtype), device=q.device)
    read, s = (torch.empty(B, H, T, dtype=torch.float32, device=q.device) for _ in range(2))
    kernels.score_kernel[(chunks.total * H,)](
        q,
        k,
        *gates.per_pair,
        n,
        gates.m,
        scores,
        read,
        s,
        *chunks.tables,
        K,
        T,
        chunks.per_row,
        scale,
        eps,
        *_strides(q),
        *_strides(k),
        H=H,
        K=K,
        L=L,
        BK=BK,
        num_warps=num_warps,
        num_stages=num_stages,
        **dot_options(q.dtype),
    )
    return scores, read, s


def _run_outputs(q, v, scores, read, gates: Gates, c, chunks: Chunks, plan: Plan):
    B, T, H, K, V = *q.shape, v.shape[-1]
    h = torch.empty(B, T, H, V, dtype=v.dtype, device=v.device)
    kernels.output_kernel[(chunks.total * H * triton.cdiv(V, plan.output.BV),)](
        q,
        v,
        scores,
        read,
        gates.segment,
        c,
        h,
        *chunks.tables,
        K,
        T,
        chunks.per_row,
        *_strides(q),
        *_strides(v),
        H=H,
        K=K,
        V=V,
        L=plan.chunk_size,
        **plan.output._asdict(),
        **dot_options(q.dtype),
    )
    return h


def _run_normalizers(k, gates: Gates, initial, final, chunks: Chunks, plan: Plan):
    """n as it enters each chunk; the last one goes to `final`."""
    T, H, K = k.shape[1:]
    BK = plan.score.BK
    n = torch.empty(chunks.total, H, K, dtype=torch.float32, device=k.device)
    kernels.normalizer_kernel[(chunks.sequences * H * triton.cdiv(K, BK),)](
        k,
        gates.log_w,
        *gates.borders,
        initial,
        n,
        final,
        *chunks.tables[:2],
        T,
        chunks.per_row,
        *_strides(k),
        H=H,
        K=K,
        L=plan.chunk_size,
        BK=BK,
        num_warps=4,
    )
    return n


def _run_fused(q, k, v, scores, read, gates: Gates, initial, final, chunks: Chunks, plan: Plan):
    """h; the last C goes to `final`."""
    B, T, H, K, V = *q.shape, v.shape[-1]
    h = torch.empty(B, T, H, V, dtype=v.dtype, device=v.device)
    kernels.fused_kernel[(chunks.sequences * H * triton.cdiv(V, plan.output.BV),)](
        q,
        k,
        v,
        scores,
        read,
        gates.log_w,
        gates.segment,
        *gates.borders,
        initial,
        final,
        h,
        *chunks.tables[:2],
        T,
        chunks.per_row,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        H=H,
        K=K,
        V=V,
        L=plan.chunk_size,
        **plan.output._asdict(),
        **dot_options(q.dtype),
    )
    return h


def recurrent(q, k, v, igate, fgate, mask, initial, final, scale, eps):
    """h and s, like `forward`, step by step. C may be updated in place, n and m not."""
    B, T, H, K, V = *q.shape, v.shape[-1]
    h = torch.empty(B, T, H, V, dtype=v.dtype, device=v.device)
    s = torch.empty(B, H, T, dtype=torch.float32, device=v.device)
    BK = triton.next_power_of_2(K)
    BV = min(triton.next_power_of_2(V), max(16, min(32, 8192 // BK)))
    kernels.recurrent_kernel[(B * H * triton.cdiv(V, BV),)](
        q,
        k,
        v,
        igate,
        fgate,
        mask,
        *initial,
        *final,
        h,
        s,
        T,
        scale,
        eps,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        *igate.stride(),
        *fgate.stride(),
        *((0, 0) if mask is None else mask.stride()),
        H=H,
        K=K,
        V=V,
        BK=BK,
        BV=BV,
        num_warps=4,
    )
    return h, s


def _run_rows(q, dh, s, c, gates: Gates, scale, eps, chunks: Chunks, plan: Plan) -> Rows:
    B, T, H, K, V = *q.shape, dh.shape[-1]
    rows = Rows(*(torch.empty(B, H, T, dtype=torch.float32, device=q.device) for _ in range(4)))
    backward_kernels.row_kernel[(chunks.total * H,)](
        q,
        dh,
        s,
        gates.coarse,
        gates.fine,
        gates.m_local,
        gates.segment,
        gates.m,
        c,
        *rows,
        *chunks.tables,
        T,
        chunks.per_row,
        scale,
        eps,
        *_strides(q),
        H=H,
        K=K,
        V=V,
        L=plan.chunk_size,
        **plan.output._asdict(),
        **dot_options(q.dtype),
    )
    return rows


def _run_state_gradients(q, dh, x, gates: Gates, rows: Rows, dfinal, dinitial, chunks: Chunks, plan: Plan):
    """The gradient of the state that each chunk hands on; that of the initial state goes to `dinitial`."""
    inputs = (q, dh, rows.read, x, gates.segment, *gates.borders)
    kernel = backward_kernels.state_gradient_kernel
    return _walk(kernel, inputs, _strides(q), dfinal, dinitial, chunks, plan, backwards=True)


def _run_score_gradients(q, k, v, dh, s, gates: Gates, rows: Rows, scale, chunks: Chunks, plan: Plan):
    B, T, H, K, V = *q.shape, v.shape[-1]
    L = plan.chunk_size
    scores, e = (torch.empty(chunks.total, H, L, L, dtype=_state_dtype(q.dtype), device=q.device) for _ in range(2))
    x, g_row, g_column = (torch.empty(B, H, T, dtype=torch.float32, device=q.device) for _ in range(3))
    backward_kernels.score_gradient_kernel[(chunks.total * H,)](
        q,
        k,
        v,
        dh,
        gates.coarse,
        gates.fine,
        gates.log_i,
        gates.segment,
        rows.m,
        rows.inverse,
        rows.carried,
        s,
        x,
        scores,
        e,
        g_row,
        g_column,
        *chunks.tables,
        T,
        chunks.per_row,
        scale,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        H=H,
        K=K,
        V=V,
        L=L,
        **plan.score._asdict(),
        **dot_options(q.dtype),
    )
    return x, scores, e, g_row, g_column


def _run_query_key_gradients(q, k, v, dh, e, x, gates: Gates, rows: Rows, states, dstates, chunks: Chunks, plan: Plan):
    B, T, H, K, V = *q.shape, v.shape[-1]
    blocks = plan.score
    NK = triton.cdiv(K, blocks.BK)
    dq, dk = (torch.empty(B, T, H, K, dtype=q.dtype, device=q.device) for _ in range(2))
    q_dq, k_dk = (torch.empty(NK, B, H, T, dtype=torch.float32, device=q.device) for _ in range(2))
    cross = torch.empty(NK, chunks.total, H, dtype=torch.float32, device=q.device)
    backward_kernels.query_key_gradient_kernel[(chunks.total * H * NK,)](
        q,
        k,
        v,
        dh,
        e,
        rows.read,
        x,
        gates.log_w,
        gates.segment,
        *gates.borders,
        *states,
        *dstates,
        dq,
        dk,
        q_dq,
        k_dk,
        cross,
        *chunks.tables,
        T,
        chunks.per_row,
        B * H * T,
        chunks.total * H,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        H=H,
        K=K,
        V=V,
        L=plan.chunk_size,
        **blocks._asdict(),
        **dot_options(q.dtype),
    )
    return dq, dk, (q_dq, k_dk, cross)


def _run_value_gradients(k, dh, scores, gates: Gates, dc, chunks: Chunks, plan: Plan):
    T, H, K, V = *k.shape[1:], dh.shape[-1]
    dv = torch.empty_like(dh)
    backward_kernels.value_gradient_kernel[(chunks.total * H * triton.cdiv(V, plan.output.BV),)](
        k,
        dh,
        scores,
        gates.log_w,
        gates.segment,
        gates.m_next,
        dc,
        dv,
        *chunks.tables,
        T,
        chunks.per_row,
        *_strides(k),
        H=H,
        K=K,
        V=V,
        L=plan.chunk_size,
        **plan.output._asdict(),
        **dot_options(k.dtype),
    )
    return dv


def _run_gate_gradients(igate, fgate, gates: Gates, g_row, g_column, partial, chunks: Chunks, plan: Plan):
    B, T, H = igate.shape
    digate = torch.empty(B, T, H, dtype=igate.dtype, device=igate.device)
    dfgate = torch.empty(B, T, H, dtype=fgate.dtype, device=fgate.device)
    backward_kernels.gate_gradient_kernel[(chunks.total * H,)](
        fgate,
        gates.segment,
        g_row,
        g_column,
        *partial,
        digate,
        dfgate,
        *chunks.tables,
        T,
        chunks.per_row,
        B * H * T,
        chunks.total * H,
        *fgate.stride(),
        H=H,
        NK=partial[0].shape[0],
        L=plan.chunk_size,
        num_warps=1,
    )
    return digate, dfgate
