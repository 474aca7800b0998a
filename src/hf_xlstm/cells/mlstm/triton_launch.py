"""How the chunkwise mLSTM kernels are launched: tile sizes, chunk tables, scratch memory. The callers check inputs.

Tensors are (B, T, H, ...) as projections produce them, with any strides but the last; scratch is laid out as the
kernel files say.
"""

from typing import NamedTuple

import torch
import triton

from ..triton_common import GPU, Tiles, dot_options, strides
from . import triton_backward as backward_kernels
from . import triton_forward as kernels


MAX_CHUNK = 128
# A span is walked twice, so there must be many of them; and short ones are not worth the extra launches.
MIN_SPANS = 4
MIN_CHUNKS_PER_SPAN = 8
BOUNDARY_TILE = 128  # chunks whose m are computed at a time


class Plan(NamedTuple):
    """How a sequence is cut and which tiles each kind of kernel has."""

    chunk_size: int
    state: Tiles  # C and dC
    state_alone: Tiles  # the same where every program has a processor to itself
    score: Tiles  # the scores, and the gradients of scores, q and k
    output: Tiles  # h and dv
    processors: int
    programs_to_fill: int  # how many recurrences over a state (sequences x heads) keep the whole GPU busy
    on_chip: bool = False  # C and h in one kernel, with the tiles of `output`


def plan(dtype: torch.dtype, K: int, V: int, gpu: GPU) -> Plan:
    """The plan of a forward pass with C in memory, and of every backward pass.

    Long chunks halve the traffic of chunk states. Only Hopper holds their tiles without spilling registers, and that
    only for head dims whose tokens it can load 16 bytes at a time. No tile depends on T: one compilation serves all
    lengths. benchmarks/gpu/kernel_resources.py reports the registers and the shared memory of each choice; what
    docs/kernels.md says of an H100 chose among them.
    """
    aligned = K % 16 == V % 16 == 0
    if dtype != torch.bfloat16:
        # float32 products take no matrix instructions: their operands stand in registers too
        num_warps = 8 if dtype == torch.float32 else 4
        # float16 goes through tf32, with left operands in registers: on Hopper each product must be waited for at once
        stages = 1 if dtype == torch.float16 and gpu.hopper else 2
        state, score, output = (32, 64, 8, stages), (32, 32, num_warps, stages), (32, 64, num_warps, stages)
        length = 64
        warps_alone, per_processor = 8, 1
    elif gpu.hopper and K * V > 64 * 64 and aligned:
        length, state, score, output = MAX_CHUNK, (64, 128, 4, 3), (64, 64, 8, 4), (64, 64, 8, 3)
        warps_alone, per_processor = 8, 2
    else:
        # Tiles that are cut off at the edge of a head need masks, and masks need these registers.
        num_warps = 4 if K % 64 == V % 64 == 0 else 8
        state, score = (64, 64, num_warps, 3 if aligned else 2), (64, 64, num_warps, 2)
        length, output = 64, (32, 128, 4, 3)
        warps_alone, per_processor = num_warps, 1

    state, score, output = (_fit(K, V, *tiles) for tiles in (state, score, output))
    tiles = triton.cdiv(K, state.BK) * triton.cdiv(V, state.BV)
    alone = state._replace(num_warps=warps_alone)
    return Plan(length, state, alone, score, output, gpu.processors, per_processor * gpu.processors // tiles)


def _fit(K: int, V: int, BK: int, BV: int, num_warps: int, num_stages: int) -> Tiles:
    """Tiles no wider than the head."""
    widest_k, widest_v = (max(16, triton.next_power_of_2(dim)) for dim in (K, V))
    return Tiles(num_warps, num_stages, BK=min(BK, widest_k), BV=min(BV, widest_v))


def on_chip_plan(dtype: torch.dtype, K: int, V: int, recurrences: int, gpu: GPU) -> Plan | None:
    """The plan of a forward pass in which C stays in registers, or None where this cannot be or does not pay.

    At the head dims of a 7B model C would be written and read at every chunk boundary, 2.1 GB for 65,536 tokens and
    half of all that is moved. On chip, every tile of columns reads all of q and k instead, mostly from the L2 cache,
    where its neighbours have just brought them. A program walks its sequence alone, so the `recurrences` (sequences x
    heads) must give every processor one.
    """
    if not gpu.hopper or dtype != torch.bfloat16 or K > 256 or K % 16 or V % 16:
        return None
    for BV in (128, 64):
        tiles = _fit(K, V, 256, BV, 8, 2)
        if recurrences * triton.cdiv(V, tiles.BV) >= gpu.processors:
            score = _fit(K, V, 64, 64, 4, 2)
            return Plan(64, tiles, tiles, score, tiles, gpu.processors, programs_to_fill=0, on_chip=True)
    return None


class Chunks(NamedTuple):
    """Which tokens each chunk holds. Packed sequences have tables; their number of chunks is an upper bound that
    depends on shapes only, so that nothing waits for the GPU. Chunks beyond the real number come out empty."""

    sequences: int
    length: int  # T
    per_row: int
    total: int
    spans: int  # parts of each sequence, whose states are computed side by side
    per_span: int
    cu_seqlens: torch.Tensor | None = None  # (sequences + 1,) first token of each sequence
    first: torch.Tensor | None = None  # (sequences + 1,) first chunk of each sequence
    sequence: torch.Tensor | None = None  # (total,) the sequence of each chunk

    @classmethod
    def cut(cls, q: torch.Tensor, cu_seqlens: torch.Tensor | None, plan: Plan) -> "Chunks":
        batch, length, heads = q.shape[:3]
        chunk_size = plan.chunk_size
        if cu_seqlens is None:
            per_row = triton.cdiv(length, chunk_size)
            spans = min(plan.programs_to_fill // (batch * heads), per_row // MIN_CHUNKS_PER_SPAN)
            per_span = triton.cdiv(per_row, spans) if spans >= MIN_SPANS else per_row
            return cls(batch, length, per_row, batch * per_row, triton.cdiv(per_row, per_span), per_span)
        sequences = cu_seqlens.shape[0] - 1
        total = length // chunk_size + sequences
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
        counts = (cu_seqlens.diff() + chunk_size - 1) // chunk_size
        first = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        chunk = torch.arange(total, dtype=torch.int32, device=q.device)
        sequence = torch.searchsorted(first[1:], chunk, right=True, out_int32=True).clamp_max_(sequences - 1)
        return cls(sequences, length, total, total, 1, total, cu_seqlens, first, sequence)

    @property
    def by_sequence(self) -> dict[str, object]:
        """What a kernel is told that walks a sequence chunk by chunk, by the names of its arguments."""
        return {
            "p_cu_seqlens": self.cu_seqlens,
            "p_first_chunk": self.first,
            "T": self.length,
            "chunks_per_row": self.per_row,
        }

    @property
    def by_chunk(self) -> dict[str, object]:
        """What a kernel is told whose programs each have a chunk."""
        return self.by_sequence | {"p_sequence": self.sequence}


class Gates(NamedTuple):
    """What `gate_kernel` and `boundary_kernel` make of the gates: (B, H, T) and, per chunk, (chunks, H)."""

    coarse: torch.Tensor
    fine: torch.Tensor
    log_i: torch.Tensor
    m_in_chunk: torch.Tensor
    log_w: torch.Tensor
    last_reset: torch.Tensor
    g_coarse: torch.Tensor
    g_fine: torch.Tensor
    chunk_m: torch.Tensor
    m: torch.Tensor
    log_decay: torch.Tensor
    w_shift: torch.Tensor


class Tokens(NamedTuple):
    """What `token_kernel` makes, (B, H, T)."""

    inverse: torch.Tensor
    read_weight: torch.Tensor
    from_state: torch.Tensor


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def forward(q, k, v, igate, fgate, mask, cu_seqlens, initial, final, scale, eps, plan: Plan):
    """h, of each token (s, m) with s = n.q, and C, n at the chunk boundaries, or None where C stays on chip. `initial`
    and `final` are (c, n, m), a triple of None where there is none."""
    chunks = Chunks.cut(q, cu_seqlens, plan)
    gates = _run_gates(igate, fgate, mask, initial[2], None, final[2], chunks, plan)
    if plan.on_chip:
        n = _run_normalizers(k, gates, initial[1], final[1], chunks, plan)
        scores, read_weight, sums = _run_scores(q, k, gates, n, scale, eps, chunks, plan)
        return _run_on_chip(q, k, v, scores, read_weight, gates, initial[0], final[0], chunks, plan), sums, None
    states = _run_states(k, v, gates, initial[:2], final[:2], chunks, plan)
    scores, read_weight, sums = _run_scores(q, k, gates, states[1], scale, eps, chunks, plan)
    return _run_outputs(q, v, scores, read_weight, gates, states[0], chunks, plan), sums, states


def backward(
    dh,
    dfinal,
    q,
    k,
    v,
    igate,
    fgate,
    mask,
    cu_seqlens,
    initial,
    dinitial,
    m_final,
    sums,
    states,
    scale,
    eps,
    plan: Plan,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv, digate, dfgate; those of the initial c and n go to `dinitial`. `sums` and `m_final` are those of
    `forward`, as are `states`, or None to compute them again."""
    chunks = Chunks.cut(q, cu_seqlens, plan)
    gates = _run_gates(igate, fgate, mask, initial[2], m_final, None, chunks, plan)
    if states is None:
        states = _run_states(k, v, gates, initial[:2], (None, None), chunks, plan)
    tokens = _run_tokens(q, dh, sums, states[0], gates, scale, eps, chunks, plan)
    x, scores, e, g = _run_score_gradients(q, k, v, dh, sums, gates, tokens, scale, chunks, plan)
    dstates = _run_state_gradients(q, dh, x, gates, tokens, dfinal, dinitial, chunks, plan)
    dv = _run_value_gradients(k, dh, scores, gates, dstates[0], chunks, plan)
    dq, dk, partial = _run_query_key_gradients(q, k, v, dh, e, x, gates, tokens, states, dstates, chunks, plan)
    return dq, dk, dv, *_run_gate_gradients(igate, fgate, gates, g, partial, chunks, plan)


def _run_gates(igate, fgate, mask, m_initial, m_last, m_final, chunks: Chunks, plan: Plan) -> Gates:
    B, T, H = igate.shape
    integers, floats = ({"dtype": dtype, "device": igate.device} for dtype in (torch.int32, torch.float32))
    gates = Gates(
        coarse=torch.empty(B, H, T, **integers),
        fine=torch.empty(B, H, T, **floats),
        log_i=torch.empty(B, H, T, **floats),
        m_in_chunk=torch.empty(B, H, T, **floats),
        log_w=torch.empty(B, H, T, **floats),
        last_reset=torch.empty(B, H, T, **integers),
        g_coarse=torch.empty(chunks.total, H, **integers),
        g_fine=torch.empty(chunks.total, H, **floats),
        chunk_m=torch.empty(chunks.total, H, **floats),
        m=torch.empty(chunks.total, H, **floats),
        log_decay=torch.empty(chunks.total, H, **floats),
        w_shift=torch.empty(chunks.total, H, **floats),
    )
    kernels.gate_kernel[(chunks.total * H,)](
        p_igate=igate,
        p_fgate=fgate,
        p_mask=mask,
        p_coarse=gates.coarse,
        p_fine=gates.fine,
        p_log_i=gates.log_i,
        p_m_in_chunk=gates.m_in_chunk,
        p_log_w=gates.log_w,
        p_last_reset=gates.last_reset,
        p_g_coarse=gates.g_coarse,
        p_g_fine=gates.g_fine,
        p_chunk_m=gates.chunk_m,
        **chunks.by_chunk,
        **strides(i=igate, f=fgate, m=mask),
        H=H,
        L=plan.chunk_size,
        num_warps=1,
    )
    kernels.boundary_kernel[(chunks.sequences * H,)](
        p_g_coarse=gates.g_coarse,
        p_g_fine=gates.g_fine,
        p_chunk_m=gates.chunk_m,
        p_m_initial=m_initial,
        p_m_last=m_last,
        p_m=gates.m,
        p_log_decay=gates.log_decay,
        p_w_shift=gates.w_shift,
        p_m_final=m_final,
        **chunks.by_sequence,
        H=H,
        L=plan.chunk_size,
        TILE=BOUNDARY_TILE,
        num_warps=1,
    )
    return gates


def chunk_states(q, v, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for C and n, or their gradients, at every chunk boundary."""
    (H, K), V = q.shape[2:], v.shape[-1]
    c = q.new_empty(chunks, H, K, V, dtype=_state_dtype(q.dtype))
    return c, q.new_empty(chunks, H, K, dtype=torch.float32)


def _scan_states(kernel, inputs: dict, q, v, start, end, chunks: Chunks, plan: Plan, backwards: bool):
    """The recurrence over the state from chunk to chunk, by `state_kernel` or `state_gradient_kernel`: the state at
    every boundary, and the one it ends with in `end`. The spans of a sequence first run on their own, each from zero;
    put together, their ends say where the second run begins."""
    (H, K), V = q.shape[2:], v.shape[-1]
    parts = chunks.sequences * chunks.spans
    programs = parts * H * triton.cdiv(K, plan.state.BK) * triton.cdiv(V, plan.state.BV)
    tiles = plan.state if programs > plan.processors else plan.state_alone

    def run(start, boundaries, end, decay_product):
        kernel[(programs,)](
            **inputs,
            p_c_start=start[0],
            p_n_start=start[1],
            p_c=boundaries[0],
            p_n=boundaries[1],
            p_c_end=end[0],
            p_n_end=end[1],
            p_decay_product=decay_product,
            **chunks.by_sequence,
            spans=chunks.spans,
            chunks_per_span=chunks.per_span,
            H=H,
            K=K,
            V=V,
            L=plan.chunk_size,
            WEIGH_RIGHT=q.dtype == torch.bfloat16,
            **tiles.options,
            **dot_options(q.dtype),
        )

    boundaries = chunk_states(q, v, chunks.total)
    if chunks.spans > 1:
        shapes = (parts, H, K, V), (parts, H, K), (parts, H)
        c, n, decay = (torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes)
        run((None, None), (None, None), (c, n), decay)
        for state, first, last, size in zip((c, n), start, end, (K * V, K)):
            tile = min(1024, triton.next_power_of_2(size))
            kernels.combine_kernel[(chunks.sequences * H * triton.cdiv(size, tile),)](
                p_state=state,
                p_decay=decay,
                p_start=first,
                p_end=last,
                spans=chunks.spans,
                H=H,
                N=size,
                TILE=tile,
                BACKWARDS=backwards,
                num_warps=4,
            )
        start, end = (c, n), (None, None)
    run(start, boundaries, end, None)
    return boundaries


def _run_states(k, v, gates: Gates, initial, final, chunks: Chunks, plan: Plan):
    """The state that enters each chunk; the last one goes to `final`."""
    inputs = {"p_k": k, "p_v": v, "p_log_w": gates.log_w, "p_log_decay": gates.log_decay, "p_w_shift": gates.w_shift}
    inputs |= strides(k=k, v=v)
    return _scan_states(kernels.state_kernel, inputs, k, v, initial, final, chunks, plan, backwards=False)


def _run_scores(q, k, gates: Gates, n, scale, eps, chunks: Chunks, plan: Plan):
    B, T, H, K = q.shape
    L, tiles = plan.chunk_size, plan.score
    scores = torch.empty(chunks.total, H, L, L, dtype=_state_dtype(q.dtype), device=q.device)
    read_weight, s, m_tokens = (torch.empty(B, H, T, dtype=torch.float32, device=q.device) for _ in range(3))
    kernels.score_kernel[(chunks.total * H,)](
        p_q=q,
        p_k=k,
        p_coarse=gates.coarse,
        p_fine=gates.fine,
        p_log_i=gates.log_i,
        p_m_in_chunk=gates.m_in_chunk,
        p_last_reset=gates.last_reset,
        p_n=n,
        p_m=gates.m,
        p_scores=scores,
        p_read_weight=read_weight,
        p_s=s,
        p_m_tokens=m_tokens,
        width=K,
        scale=scale,
        eps=eps,
        **chunks.by_chunk,
        **strides(q=q, k=k),
        H=H,
        K=K,
        L=L,
        BK=tiles.BK,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **dot_options(q.dtype),
    )
    return scores, read_weight, (s, m_tokens)


def _run_outputs(q, v, scores, read_weight, gates: Gates, c, chunks: Chunks, plan: Plan):
    (B, T, H, K), V = q.shape, v.shape[-1]
    h = torch.empty(B, T, H, V, dtype=v.dtype, device=v.device)
    kernels.output_kernel[(chunks.total * H * triton.cdiv(V, plan.output.BV),)](
        p_q=q,
        p_v=v,
        p_scores=scores,
        p_read_weight=read_weight,
        p_last_reset=gates.last_reset,
        p_c=c,
        p_h=h,
        width=K,
        **chunks.by_chunk,
        **strides(q=q, v=v),
        H=H,
        K=K,
        V=V,
        L=plan.chunk_size,
        **plan.output.options,
        **dot_options(q.dtype),
    )
    return h


def _run_normalizers(k, gates: Gates, initial, final, chunks: Chunks, plan: Plan):
    """n as it enters each chunk; the last one goes to `final`."""
    H, K = k.shape[2:]
    BK = plan.score.BK
    n = torch.empty(chunks.total, H, K, dtype=torch.float32, device=k.device)
    kernels.normalizer_kernel[(chunks.sequences * H * triton.cdiv(K, BK),)](
        p_k=k,
        p_log_w=gates.log_w,
        p_n_initial=initial,
        p_n=n,
        p_n_final=final,
        p_log_decay=gates.log_decay,
        p_w_shift=gates.w_shift,
        **chunks.by_sequence,
        **strides(k=k),
        H=H,
        K=K,
        L=plan.chunk_size,
        BK=BK,
        num_warps=4,
    )
    return n


def _run_on_chip(q, k, v, scores, read_weight, gates: Gates, initial, final, chunks: Chunks, plan: Plan):
    """h; the last C goes to `final`."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    h = torch.empty(B, T, H, V, dtype=v.dtype, device=v.device)
    kernels.on_chip_kernel[(chunks.sequences * H * triton.cdiv(V, plan.output.BV),)](
        p_q=q,
        p_k=k,
        p_v=v,
        p_scores=scores,
        p_read_weight=read_weight,
        p_log_w=gates.log_w,
        p_last_reset=gates.last_reset,
        p_c_initial=initial,
        p_c_final=final,
        p_h=h,
        p_log_decay=gates.log_decay,
        p_w_shift=gates.w_shift,
        **chunks.by_sequence,
        **strides(q=q, k=k, v=v),
        H=H,
        K=K,
        V=V,
        L=plan.chunk_size,
        **plan.output.options,
        **dot_options(q.dtype),
    )
    return h


def _run_tokens(q, dh, sums, c, gates: Gates, scale, eps, chunks: Chunks, plan: Plan) -> Tokens:
    (B, T, H, K), V = q.shape, dh.shape[-1]
    tokens = Tokens(*(torch.empty(B, H, T, dtype=torch.float32, device=q.device) for _ in range(3)))
    backward_kernels.token_kernel[(chunks.total * H,)](
        p_q=q,
        p_dh=dh,
        p_s=sums[0],
        p_m_tokens=sums[1],
        p_coarse=gates.coarse,
        p_fine=gates.fine,
        p_last_reset=gates.last_reset,
        p_m=gates.m,
        p_c=c,
        p_inverse=tokens.inverse,
        p_read_weight=tokens.read_weight,
        p_from_state=tokens.from_state,
        scale=scale,
        eps=eps,
        **chunks.by_chunk,
        **strides(q=q),
        H=H,
        K=K,
        V=V,
        L=plan.chunk_size,
        **plan.output.options,
        **dot_options(q.dtype),
    )
    return tokens


def _run_state_gradients(q, dh, x, gates: Gates, tokens: Tokens, dfinal, dinitial, chunks: Chunks, plan: Plan):
    """The gradient of the state that each chunk hands on; that of the initial state goes to `dinitial`."""
    inputs = {"p_q": q, "p_dh": dh, "p_read_weight": tokens.read_weight, "p_x": x}
    inputs |= {"p_last_reset": gates.last_reset, "p_log_decay": gates.log_decay} | strides(q=q)
    kernel = backward_kernels.state_gradient_kernel
    return _scan_states(kernel, inputs, q, dh, dfinal, dinitial, chunks, plan, backwards=True)


def _run_score_gradients(q, k, v, dh, sums, gates: Gates, tokens: Tokens, scale, chunks: Chunks, plan: Plan):
    (B, T, H, K), V = q.shape, v.shape[-1]
    L = plan.chunk_size
    scores, e = (torch.empty(chunks.total, H, L, L, dtype=_state_dtype(q.dtype), device=q.device) for _ in range(2))
    x, *g = (torch.empty(B, H, T, dtype=torch.float32, device=q.device) for _ in range(4))
    backward_kernels.score_gradient_kernel[(chunks.total * H,)](
        p_q=q,
        p_k=k,
        p_v=v,
        p_dh=dh,
        p_coarse=gates.coarse,
        p_fine=gates.fine,
        p_log_i=gates.log_i,
        p_last_reset=gates.last_reset,
        p_m_tokens=sums[1],
        p_inverse=tokens.inverse,
        p_from_state=tokens.from_state,
        p_s=sums[0],
        p_x=x,
        p_scores=scores,
        p_e=e,
        **dict(zip(("p_g_key", "p_g_row", "p_g_column"), g, strict=True)),
        scale=scale,
        **chunks.by_chunk,
        **strides(q=q, k=k, v=v),
        H=H,
        K=K,
        V=V,
        L=L,
        **plan.score.options,
        **dot_options(q.dtype),
    )
    return x, scores, e, g


def _run_query_key_gradients(
    q, k, v, dh, e, x, gates: Gates, tokens: Tokens, states, dstates, chunks: Chunks, plan: Plan
):
    (B, T, H, K), V = q.shape, v.shape[-1]
    tiles = plan.score
    NK = triton.cdiv(K, tiles.BK)
    dq, dk = (torch.empty(B, T, H, K, dtype=q.dtype, device=q.device) for _ in range(2))
    q_dq, k_dk = (torch.empty(NK, B, H, T, dtype=torch.float32, device=q.device) for _ in range(2))
    cross = torch.empty(NK, chunks.total, H, dtype=torch.float32, device=q.device)
    backward_kernels.query_key_gradient_kernel[(chunks.total * H * NK,)](
        p_q=q,
        p_k=k,
        p_v=v,
        p_dh=dh,
        p_e=e,
        p_read_weight=tokens.read_weight,
        p_x=x,
        p_log_w=gates.log_w,
        p_last_reset=gates.last_reset,
        p_c=states[0],
        p_n=states[1],
        p_dc=dstates[0],
        p_dn=dstates[1],
        p_dq=dq,
        p_dk=dk,
        p_q_dq=q_dq,
        p_k_dk=k_dk,
        p_cross=cross,
        tokens=B * H * T,
        chunk_heads=chunks.total * H,
        p_log_decay=gates.log_decay,
        p_w_shift=gates.w_shift,
        **chunks.by_chunk,
        **strides(q=q, k=k, v=v),
        H=H,
        K=K,
        V=V,
        L=plan.chunk_size,
        **tiles.options,
        **dot_options(q.dtype),
    )
    return dq, dk, (q_dq, k_dk, cross)


def _run_value_gradients(k, dh, scores, gates: Gates, dc, chunks: Chunks, plan: Plan):
    (H, K), V = k.shape[2:], dh.shape[-1]
    dv = torch.empty_like(dh)
    backward_kernels.value_gradient_kernel[(chunks.total * H * triton.cdiv(V, plan.output.BV),)](
        p_k=k,
        p_dh=dh,
        p_scores=scores,
        p_log_w=gates.log_w,
        p_last_reset=gates.last_reset,
        p_w_shift=gates.w_shift,
        p_dc=dc,
        p_dv=dv,
        **chunks.by_chunk,
        **strides(k=k),
        H=H,
        K=K,
        V=V,
        L=plan.chunk_size,
        **plan.output.options,
        **dot_options(k.dtype),
    )
    return dv


def _run_gate_gradients(igate, fgate, gates: Gates, g, partial, chunks: Chunks, plan: Plan):
    B, T, H = igate.shape
    q_dq, k_dk, cross = partial
    digate = torch.empty(B, T, H, dtype=igate.dtype, device=igate.device)
    dfgate = torch.empty(B, T, H, dtype=fgate.dtype, device=fgate.device)
    backward_kernels.gate_gradient_kernel[(chunks.total * H,)](
        p_fgate=fgate,
        p_last_reset=gates.last_reset,
        **dict(zip(("p_g_key", "p_g_row", "p_g_column"), g, strict=True)),
        p_q_dq=q_dq,
        p_k_dk=k_dk,
        p_cross=cross,
        p_digate=digate,
        p_dfgate=dfgate,
        tokens=B * H * T,
        chunk_heads=chunks.total * H,
        **chunks.by_chunk,
        **strides(f=fgate),
        H=H,
        NK=q_dq.shape[0],
        L=plan.chunk_size,
        num_warps=1,
    )
    return digate, dfgate
