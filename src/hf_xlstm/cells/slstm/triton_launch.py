"""How the sLSTM kernels are launched: tile sizes, scratch memory. Inputs are checked by the callers.

Gates are (B, T, 4, H, D) as projections produce them, with any strides but the last; states and scratch are
contiguous.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..triton_common import GPU, INTERPRETED, Tiles, contiguous, dense, dot_options, on_device, strides
from . import triton_backward as backward_kernels
from . import triton_forward as kernels


BB = 16  # sequences per program, the least a matrix product takes
AT_ONCE: list[dict[str, int]] = [{}]  # one launch, whose kernel knows no other


class Plan(NamedTuple):
    """The tiles of all kernels: BD units made and BK summed over, or R whole and on chip where BK is None. `spread`:
    several programs share a head."""

    tiles: Tiles
    spread: bool = False


def plan(dtype: torch.dtype, D: int, gpu: GPU) -> Plan:
    """The plan of one program per head.

    Nothing depends on T or on the batch size. benchmarks/gpu/kernel_resources.py reports the registers and the shared
    memory of each choice. Of the GPUs whose shared memory holds a head of 128, only Hopper computes it with
    hardly a spill (24 bytes, in training).

    A multiprocessor has one program at most, which may take all registers. Left to itself, NVIDIA's compiler saves
    half of them for a second one, and spills; float32, without matrix instructions, it unrolls to use them up. On
    Blackwell float32 spills far more unless it has 16 warps, so there it gets 16.
    """
    bf16 = dtype == torch.bfloat16
    maxnreg = None if dtype == torch.float32 else 255
    large = bf16 and gpu.hopper and D == 128
    if large or (64 if bf16 else 32) >= D:
        num_warps = 8 if large or dtype == torch.float32 else 4
        BD = max(16, triton.next_power_of_2(D))
        return Plan(Tiles(num_warps, num_stages=1, BB=BB, BD=BD, maxnreg=maxnreg))
    num_warps = 16 if dtype == torch.float32 and gpu.major >= 10 else 8
    return Plan(Tiles(num_warps, num_stages=2, BB=BB, BD=32, BK=64 if bf16 else 32, maxnreg=maxnreg))


def spread_plan(dtype: torch.dtype, D: int, sequences: int, heads: int, steps: int, gpu: GPU) -> Plan | None:
    """The plan of several programs per head, each with BD of its units, or None where one program has the head.

    From step to step the programs of a head exchange h and wait for each other, so all of them must run at once: a
    cooperative launch, which NVIDIA's GPUs know, and no more programs than there are processors. A single step waits
    for nothing. BK is all of D where a program can keep its part of R on chip.
    """
    if gpu.major < 8 or plan(dtype, D, gpu).tiles.BK is None:
        return None
    bf16 = dtype == torch.bfloat16
    BK = triton.next_power_of_2(D) if bf16 and D <= 256 else 64 if bf16 else 32
    tiles = Tiles(num_warps=8 if BK >= D else 4, num_stages=1, BB=BB, BD=32, BK=BK)
    programs = triton.cdiv(sequences, BB) * heads * triton.cdiv(D, tiles.BD)
    return Plan(tiles, spread=True) if steps == 1 or programs <= gpu.processors else None


def _launches(steps: int) -> list[dict[str, int]]:
    """The steps of each launch: all of them. Triton's interpreter runs one program after the other, so that none can
    wait for the others to finish a step; there every step is a launch."""
    if not INTERPRETED:
        return [{"first_step": 0, "end_step": steps}]
    return [{"first_step": step, "end_step": step + 1} for step in range(max(steps, 1))]


def _dense(gates: torch.Tensor) -> torch.Tensor:
    """The gates of one token must lie within 2^31 elements."""
    far = max(4 * gates.stride(2), gates.shape[3] * gates.stride(3)) >= 2**31
    return gates.contiguous() if far else dense(gates)


def _exchange_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which products are formed."""
    return torch.bfloat16 if dot_options(dtype)["DOT"] == tl.bfloat16 else torch.float32


def run_forward(
    gates, recurrent_weight, bias, initial, final, mask, cu_seqlens, save: bool, plan: Plan, state_indices=None
):
    """h, and for the backward pass u, sigmoid(-f), tanh(z), sigmoid(o), and c. The final state (h, c, n, m) goes into
    `final`, which may be `initial` itself where every sequence takes a step.

    With `state_indices` (B,), row b starts from row state_indices[b] of `initial` and ends in the same row of `final`;
    where the index is negative, h is 0 and no state is read or written. The rows of all states are equally far apart.
    """
    B, T, _, H, D = gates.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gates = _dense(gates)
    h = torch.empty(B, T, H, D, dtype=gates.dtype, device=gates.device)
    saved = gates.new_empty(B, T, 4, H, D, dtype=torch.float32) if save else None
    c = gates.new_empty(B, T, H, D, dtype=torch.float32) if save else None
    tiles, programs = plan.tiles, triton.cdiv(N, BB) * H
    kernel, exchange, launches = kernels.forward_resident_kernel, {}, AT_ONCE
    if tiles.BK is not None:
        kernel = kernels.forward_streamed_kernel
        exchange = {"p_h_before": gates.new_empty(2, N, H, D, dtype=_exchange_dtype(gates.dtype)), "units": D}
    if plan.spread:
        kernel, launches = kernels.forward_spread_kernel, _launches(T)
        h_initial = initial[0] if state_indices is None else initial[0][state_indices.clamp(min=0)]
        exchange["p_h_before"][0].copy_(h_initial)
        exchange |= {"p_touched": gates.new_empty(N, dtype=torch.int32)}
        exchange |= {"p_arrived": gates.new_zeros(programs, dtype=torch.int32), "launch_cooperative_grid": T > 1}
        programs *= triton.cdiv(D, tiles.BD)
    with on_device(gates):
        for steps in launches:
            kernel[(programs,)](
                p_gates=gates,
                p_recurrent_weight=recurrent_weight.contiguous(),
                p_bias=bias.contiguous(),
                p_mask=mask,
                p_cu_seqlens=contiguous(cu_seqlens),
                p_state_indices=contiguous(state_indices),
                p_h_initial=initial[0],
                p_c_initial=initial[1],
                p_n_initial=initial[2],
                p_m_initial=initial[3],
                p_h_final=final[0],
                p_c_final=final[1],
                p_n_final=final[2],
                p_m_final=final[3],
                p_h=h,
                p_saved=saved,
                p_c=c,
                **exchange,
                T=T,
                N=N,
                stride_gb=gates.stride(0),
                stride_gt=gates.stride(1),
                stride_gg=gates.stride(2),
                stride_gh=gates.stride(3),
                **strides(m=mask),
                stride_state_row=initial[0].stride(0),
                H=H,
                D=D,
                **steps,
                **tiles.options,
                **dot_options(gates.dtype),
            )
    return h, saved, c


def run_backward(dh, dfinal, recurrent_weight, initial_c, mask, cu_seqlens, saved, c, plan: Plan):
    """Gradients of the gates and of the initial h, c, n, those of n = 1."""
    B, T, H, D = dh.shape
    N = initial_c.shape[0]
    dgates = torch.empty(B, T, 4, H, D, dtype=dh.dtype, device=dh.device)
    dinitial = tuple(torch.empty_like(initial_c) for _ in range(3))
    tiles, programs = plan.tiles, triton.cdiv(N, BB) * H
    kernel, exchange, launches = backward_kernels.backward_resident_kernel, {}, AT_ONCE
    if tiles.BK is not None:
        kernel = backward_kernels.backward_streamed_kernel
        exchange = {"p_dx": dh.new_zeros(2, N, 4, H, D, dtype=_exchange_dtype(dh.dtype)), "units": D}
    if plan.spread:
        kernel, launches = backward_kernels.backward_spread_kernel, _launches(T + 1)
        exchange |= {"p_arrived": dh.new_zeros(programs, dtype=torch.int32), "launch_cooperative_grid": True}
        programs *= triton.cdiv(D, tiles.BD)
    with on_device(dh):
        for steps in launches:
            kernel[(programs,)](
                p_recurrent_weight=recurrent_weight.contiguous(),
                p_mask=mask,
                p_cu_seqlens=contiguous(cu_seqlens),
                p_saved=saved,
                p_c=c,
                p_c_initial=initial_c,
                p_dh=dh.contiguous(),
                p_dh_final=dfinal[0].contiguous(),
                p_dc_final=dfinal[1].contiguous(),
                p_dn_final=dfinal[2].contiguous(),
                p_dgates=dgates,
                p_dh_initial=dinitial[0],
                p_dc_initial=dinitial[1],
                p_dn_initial=dinitial[2],
                **exchange,
                T=T,
                N=N,
                **strides(m=mask),
                H=H,
                D=D,
                **steps,
                **tiles.options,
                **dot_options(dh.dtype),
            )
    return dgates, *dinitial
