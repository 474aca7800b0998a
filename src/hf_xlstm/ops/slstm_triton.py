"""The sLSTM on GPUs: shapes, launches, custom operators and autograd around the kernels of slstm_triton_kernels.py.

They are registered as three operators that torch.compile sees as black boxes: `hf_xlstm::slstm_forward`,
`hf_xlstm::slstm_backward` and the in-place `hf_xlstm::slstm_step`.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import slstm_triton_kernels as kernels
from . import triton_common as common
from .slstm_reference import SLSTMState, zero_slstm_state
from .triton_common import INTERPRETED, dense, dot_options, on_device


# The slice of R that a program keeps on chip. Without matrix units for float32 its registers hold many copies.
WEIGHT_BYTES = {torch.bfloat16: 128 * 1024, torch.float16: 64 * 1024, torch.float32: 64 * 1024}


def unsupported_reason(gates: torch.Tensor, _: torch.Tensor) -> str | None:
    """Why these tensors cannot run here, or None."""
    return common.unsupported_reason(gates, gates.shape[-1])


# --- how the work is cut ---------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Block sizes: P the padded head dim, BD units and BB sequences per program. Nothing depends on T."""

    P: int
    BD: int
    BB: int
    num_warps: int


def plan(rows: int, H: int, D: int, dtype: torch.dtype, programs: int) -> Plan:
    """`programs` is how many can run side by side. 16 sequences are the least a matrix product takes; more of them
    only where the GPU is full already."""
    P = max(16, triton.next_power_of_2(D))
    bytes_per_unit = 4 * P * (2 if dtype == torch.bfloat16 else 4)
    BD = max(16, min(P, WEIGHT_BYTES[dtype] // bytes_per_unit))
    BB = 16
    while min(64, rows) > BB and triton.cdiv(rows, BB) * H * triton.cdiv(D, BD) > programs:
        BB *= 2
    num_warps = 4 if bytes_per_unit * BD <= 32 * 1024 else 8 if dtype == torch.bfloat16 else 16
    return Plan(P, BD, BB, num_warps)


def shares_heads(gates: torch.Tensor) -> bool:
    """Whether several programs work on one head and have to wait for each other at every step."""
    D = gates.shape[-1]
    return plan(1, 1, D, gates.dtype, 1).BD < D


@functools.cache
def _programs(device: torch.device) -> int:
    """How many programs run side by side for certain: one on each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _Launcher:
    """Launches a kernel over all sequences, heads and units.

    Where several programs share a head, only as many as can run side by side are launched at a time: a cooperative
    launch, which fails rather than waits for ever. The interpreter runs programs one after another, so there each step
    is a launch of its own.
    """

    def __init__(self, gates: torch.Tensor, rows: int):
        self.T, self.H, self.D = gates.shape[1], *gates.shape[3:]
        self.rows = rows
        programs = _programs(gates.device)
        self.plan = plan(rows, self.H, self.D, gates.dtype, programs)
        self.shared_by = triton.cdiv(self.D, self.plan.BD)
        self.groups = triton.cdiv(rows, self.plan.BB) * self.H
        self.at_once = self.groups if self.shared_by == 1 else max(1, programs // self.shared_by)
        self.dot = dot_options(gates.dtype)
        self.exchange_dtype = torch.bfloat16 if self.dot["DOT"] == tl.bfloat16 else torch.float32

    @property
    def steps(self) -> list[tuple[int, int]]:
        """First and last step of each launch."""
        if INTERPRETED and self.shared_by > 1:
            return [(t, t + 1) for t in range(self.T)]
        return [(0, self.T)]

    def __call__(self, kernel, *args, steps: tuple[int, int], strides: tuple[int, ...]):
        counter = torch.zeros(self.groups, dtype=torch.int32, device=args[0].device)
        for first_group in range(0, self.groups, self.at_once):
            groups = min(self.at_once, self.groups - first_group)
            kernel[(groups * self.shared_by,)](
                *args,
                counter,
                self.T,
                self.rows,
                first_group,
                *steps,
                *strides,
                H=self.H,
                D=self.D,
                **self.plan._asdict(),
                **self.dot,
                **({} if self.shared_by == 1 else {"launch_cooperative_grid": True}),
            )


def _mask_strides(mask: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else mask.stride()


def _run_forward(gates, recurrent_weight, bias, state, mask, cu_seqlens, save: bool):
    """h, the final state, and for the backward pass u, sigmoid(-f), tanh(z), sigmoid(o), and c."""
    B, T, _, H, D = gates.shape
    gates = dense(gates)
    launch = _Launcher(gates, state[0].shape[0])
    final = tuple(torch.empty_like(s, memory_format=torch.contiguous_format) for s in state)
    h = torch.empty(B, T, H, D, dtype=gates.dtype, device=gates.device)
    saved = gates.new_empty(B, T, 4, H, D, dtype=torch.float32) if save else None
    c = gates.new_empty(B, T, H, D, dtype=torch.float32) if save else None
    state = tuple(s.contiguous() for s in state)
    exchange = torch.stack([state[0]] * 2).to(launch.exchange_dtype) if launch.shared_by > 1 else None
    with on_device(gates):
        for steps in launch.steps:
            launch(
                kernels.forward_kernel,
                gates,
                recurrent_weight.contiguous(),
                bias.contiguous(),
                mask,
                cu_seqlens,
                *state,
                *final,
                h,
                saved,
                c,
                exchange,
                steps=steps,
                strides=(*gates.stride()[:4], *_mask_strides(mask)),
            )
            state = final
    return h, final, saved, c


# --- operators -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("hf_xlstm::slstm_forward", mutates_args=())
def slstm_forward(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    n0: torch.Tensor,
    m0: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, the final state, and what the backward pass needs: empty tensors without `save`."""
    state = (h0, c0, n0, m0)
    h, final, saved, c = _run_forward(gates, recurrent_weight, bias, state, mask, cu_seqlens, save)
    return h, *final, *((saved, c) if save else (h0.new_empty(0), h0.new_empty(0)))


@slstm_forward.register_fake
def _(gates, recurrent_weight, bias, h0, c0, n0, m0, mask, cu_seqlens, save):
    B, T, _, H, D = gates.shape
    final = (torch.empty_like(s, memory_format=torch.contiguous_format) for s in (h0, c0, n0, m0))
    saved = (h0.new_empty(B, T, 4, H, D), h0.new_empty(B, T, H, D)) if save else (h0.new_empty(0), h0.new_empty(0))
    return gates.new_empty(B, T, H, D), *final, *saved


@torch.library.custom_op("hf_xlstm::slstm_backward", mutates_args=())
def slstm_backward(
    dh: torch.Tensor,
    dh_final: torch.Tensor,
    dc_final: torch.Tensor,
    dn_final: torch.Tensor,
    recurrent_weight: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    n0: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    h: torch.Tensor,
    saved: torch.Tensor,
    c: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of gates, recurrent weight, bias and the initial h, c, n."""
    B, T, H, D = h.shape
    dgates = torch.empty(B, T, 4, H, D, dtype=h.dtype, device=h.device)
    launch = _Launcher(dgates, h0.shape[0])
    initial_c = torch.where(n0 == 0, 0, c0 / n0)
    exchange = h0.new_zeros(2, launch.rows, 4, H, D, dtype=launch.exchange_dtype)
    dstate = tuple(d.contiguous() for d in (dh_final, dc_final, dn_final))
    dinitial = tuple(torch.empty_like(d) for d in dstate)
    with on_device(h):
        for steps in reversed(launch.steps):
            launch(
                kernels.backward_kernel,
                recurrent_weight.contiguous(),
                mask,
                cu_seqlens,
                saved,
                c,
                initial_c,
                dh.contiguous(),
                *dstate,
                dgates,
                *dinitial,
                exchange,
                steps=steps,
                strides=_mask_strides(mask),
            )
            dstate = dinitial
    dh0, dc0, dn0 = dinitial
    product_dtype = torch.float32 if INTERPRETED else launch.exchange_dtype
    dx0 = exchange[0].to(product_dtype)
    dh0 = dh0 + torch.einsum("ngho,ghoi->nhi", dx0, recurrent_weight.to(product_dtype))
    before, touched = _history(h, mask, cu_seqlens)
    h_before = torch.cat([h0.to(h.dtype), h.flatten(0, 1)])[before]
    d_weight = torch.einsum("tgho,thi->ghoi", dgates.flatten(0, 1), h_before)
    # c0 / n0 went in, except where no step was taken and c0, n0 themselves came out
    scale = torch.where(touched[:, None, None], torch.where(n0 == 0, 0, 1 / n0), 1)
    return dgates, d_weight, dgates.sum((0, 1), dtype=torch.float32), dh0, dc0 * scale, dn0 * scale


def _history(h: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None):
    """For each token (B T,) the place of the state before it among N initial states and B T tokens, and for each
    sequence (N,) whether it takes a step at all. Waits for nothing on the GPU."""
    B, T = h.shape[:2]
    token = torch.arange(B * T, device=h.device)
    bounds = torch.arange(0, B * T + 1, T, device=h.device) if cu_seqlens is None else cu_seqlens.long()
    sequences = bounds.shape[0] - 1
    sequence = torch.bucketize(token, bounds[1:], right=True)
    live = token if mask is None else torch.where(mask.flatten(), token, -1)
    latest = torch.cat([live.new_full((1,), -1), live]).cummax(0).values  # up to and without each token
    before = torch.where(latest[:-1] >= bounds[sequence], latest[:-1] + sequences, sequence)
    return before, latest[bounds[1:]] >= bounds[:-1]


@slstm_backward.register_fake
def _(dh, dh_final, dc_final, dn_final, recurrent_weight, h0, c0, n0, mask, cu_seqlens, h, saved, c):
    B, T, H, D = h.shape
    d_parameters = h.new_empty(4, H, D, D), h0.new_empty(4, H, D)
    return h.new_empty(B, T, 4, H, D), *d_parameters, *(torch.empty_like(h0) for _ in range(3))


def _save(ctx, inputs, output):
    _, recurrent_weight, _, h0, c0, n0, _, mask, cu_seqlens, _ = inputs
    h, _, _, _, m, saved, c = output
    ctx.save_for_backward(recurrent_weight, h0, c0, n0, mask, cu_seqlens, h, saved, c)
    ctx.mark_non_differentiable(m, saved, c)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dh, dh_final, dc_final, dn_final, *_):
    h0, h = ctx.saved_tensors[1], ctx.saved_tensors[6]
    dh = torch.zeros_like(h) if dh is None else dh
    d_final = (torch.zeros_like(h0) if d is None else d for d in (dh_final, dc_final, dn_final))
    return *slstm_backward(dh, *d_final, *ctx.saved_tensors), None, None, None, None


slstm_forward.register_autograd(_differentiate, setup_context=_save)


def slstm_triton(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    initial_state: SLSTMState | None = None,
    output_final_state: bool = False,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, SLSTMState | None]:
    """The sequence; shapes as in `hf_xlstm.ops.slstm`."""
    if initial_state is None:
        initial_state = zero_slstm_state(gates, gates.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    inputs = (gates, recurrent_weight, bias, *initial_state)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    h, *final_state, _, _ = slstm_forward(*inputs, mask, cu_seqlens, save)
    return h, tuple(final_state) if output_final_state else None


@torch.library.custom_op("hf_xlstm::slstm_step", mutates_args=("h", "c", "n", "m"))
def slstm_step_inplace(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
) -> torch.Tensor:
    output, final, _, _ = _run_forward(gates[:, None], recurrent_weight, bias, (h, c, n, m), None, None, save=False)
    torch._foreach_copy_([h, c, n, m], final)
    return output[:, 0]


@slstm_step_inplace.register_fake
def _(gates, recurrent_weight, bias, h, c, n, m):
    return gates.new_empty(gates.shape[0], *gates.shape[2:])


def slstm_step_triton(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    state: SLSTMState,
    *,
    inplace: bool = False,
) -> tuple[torch.Tensor, SLSTMState]:
    """One step; shapes as in `hf_xlstm.ops.slstm_step`."""
    if inplace:
        return slstm_step_inplace(gates, recurrent_weight, bias, *state), state
    h, state = slstm_triton(gates[:, None], recurrent_weight, bias, initial_state=state, output_final_state=True)
    return h[:, 0], state
