"""The sLSTM on GPUs: shapes, launches, custom operators and autograd around the kernels of slstm_triton_kernels.py.

They are registered as three operators that torch.compile sees as black boxes: `hf_xlstm::slstm_forward`,
`hf_xlstm::slstm_backward` and the in-place `hf_xlstm::slstm_step`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import triton_common as common
from . import triton_kernels as kernels
from .reference import SLSTMState, zero_slstm_state


BB = 16  # sequences per program, the least a matrix product takes


# --- launches --------------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Sizes of the blocks of units, made and summed over, warps and pipeline stages. BK = None: R stays on chip."""

    BD: int
    BK: int | None
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Of a launch."""
        options = {"BB": BB} | {name: value for name, value in self._asdict().items() if value is not None}
        if torch.version.hip:
            options.pop("maxnreg", None)  # Triton knows it for NVIDIA only
        return options


def generation(device: torch.device) -> int:
    """Of NVIDIA's GPUs the major compute capability, else 0."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and torch.version.hip is None else 0


def plan(D: int, dtype: torch.dtype, generation: int) -> Blocks:
    """Nothing depends on T or on the batch size. What each choice takes in registers and in shared memory is what
    benchmarks/gpu/kernel_resources.py reports. Of the GPUs whose shared memory holds a head of 128, only Hopper computes
    it without spilling.

    A multiprocessor has one program at most, which may take all registers. Left to itself, NVIDIA's compiler saves
    half of them for a second one, and spills; float32, without matrix instructions, it unrolls to use them up. For
    Blackwell it spills even so, unless float32 has more warps; for the others, then.
    """
    bf16 = dtype == torch.bfloat16
    maxnreg = None if dtype == torch.float32 else 255
    large = bf16 and generation == 9 and D == 128
    if large or (64 if bf16 else 32) >= D:
        num_warps = 8 if large or dtype == torch.float32 else 4
        return Blocks(max(16, triton.next_power_of_2(D)), None, num_warps, num_stages=1, maxnreg=maxnreg)
    num_warps = 16 if dtype == torch.float32 and generation >= 10 else 8
    return Blocks(32, 64 if bf16 else 32, num_warps, num_stages=2, maxnreg=maxnreg)


def _mask_strides(mask: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else mask.stride()


def _dense(gates: torch.Tensor) -> torch.Tensor:
    """The gates of one token must lie within 2^31 elements."""
    far = max(4 * gates.stride(2), gates.shape[3] * gates.stride(3)) >= 2**31
    return gates.contiguous() if far else common.dense(gates)


def _contiguous(cu_seqlens: torch.Tensor | None) -> torch.Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.contiguous()


def _exchange_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which products are formed."""
    return torch.bfloat16 if common.dot_options(dtype)["DOT"] == tl.bfloat16 else torch.float32


def run_forward(gates, recurrent_weight, bias, state, final, mask, cu_seqlens, save: bool, blocks: Blocks):
    """h, and for the backward pass u, sigmoid(-f), tanh(z), sigmoid(o), and c. The final state goes into `final`,
    which may be `state` itself where every sequence takes a step."""
    B, T, _, H, D = gates.shape
    N = state[0].shape[0]
    gates = _dense(gates)
    h = torch.empty(B, T, H, D, dtype=gates.dtype, device=gates.device)
    saved = gates.new_empty(B, T, 4, H, D, dtype=torch.float32) if save else None
    c = gates.new_empty(B, T, H, D, dtype=torch.float32) if save else None
    kernel, exchange = kernels.forward_resident_kernel, ()
    if blocks.BK is not None:
        kernel = kernels.forward_streamed_kernel
        exchange = (gates.new_empty(2, N, H, D, dtype=_exchange_dtype(gates.dtype)), D)
    with common.on_device(gates):
        kernel[(triton.cdiv(N, BB) * H,)](
            gates,
            recurrent_weight.contiguous(),
            bias.contiguous(),
            mask,
            _contiguous(cu_seqlens),
            *state,
            *final,
            h,
            saved,
            c,
            *exchange,
            T,
            N,
            *gates.stride()[:4],
            *_mask_strides(mask),
            H=H,
            D=D,
            **blocks.options,
            **common.dot_options(gates.dtype),
        )
    return h, saved, c


def run_backward(dh, dfinal, recurrent_weight, initial_c, mask, cu_seqlens, saved, c, blocks: Blocks):
    """Gradients of the gates and of the initial h, c, n, those of n = 1."""
    B, T, H, D = dh.shape
    N = initial_c.shape[0]
    dgates = torch.empty(B, T, 4, H, D, dtype=dh.dtype, device=dh.device)
    dinitial = tuple(torch.empty_like(initial_c) for _ in range(3))
    kernel, exchange = kernels.backward_resident_kernel, ()
    if blocks.BK is not None:
        kernel = kernels.backward_streamed_kernel
        exchange = (dh.new_zeros(2, N, 4, H, D, dtype=_exchange_dtype(dh.dtype)), D)
    with common.on_device(dh):
        kernel[(triton.cdiv(N, BB) * H,)](
            recurrent_weight.contiguous(),
            mask,
            _contiguous(cu_seqlens),
            saved,
            c,
            initial_c,
            dh.contiguous(),
            *(d.contiguous() for d in dfinal),
            dgates,
            *dinitial,
            *exchange,
            T,
            N,
            *_mask_strides(mask),
            H=H,
            D=D,
            **blocks.options,
            **common.dot_options(dh.dtype),
        )
    return dgates, *dinitial


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
    state = tuple(x.contiguous() for x in (h0, c0, n0, m0))
    final = tuple(torch.empty_like(x) for x in state)
    blocks = plan(gates.shape[-1], gates.dtype, generation(gates.device))
    h, saved, c = run_forward(gates, recurrent_weight, bias, state, final, mask, cu_seqlens, save, blocks)
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
    dfinal = (dh_final, dc_final, dn_final)
    initial_c = torch.where(n0 == 0, 0, c0 / n0).contiguous()
    blocks = plan(dh.shape[-1], dh.dtype, generation(dh.device))
    dgates, dh0, dc0, dn0 = run_backward(dh, dfinal, recurrent_weight, initial_c, mask, cu_seqlens, saved, c, blocks)
    before, touched = _history(h, mask, cu_seqlens)
    h_before = torch.cat([h0.to(h.dtype), h.flatten(0, 1)])[before]
    d_weight = torch.einsum("tgho,thi->ghoi", dgates.flatten(0, 1), h_before).contiguous()
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
    return h.new_empty(B, T, 4, H, D), *d_parameters, *(h0.new_empty(h0.shape) for _ in range(3))


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
    """h; the new state replaces the old one."""
    given = (h, c, n, m)
    state = tuple(x.contiguous() for x in given)
    gates = gates[:, None]
    blocks = plan(gates.shape[-1], gates.dtype, generation(gates.device))
    output, _, _ = run_forward(gates, recurrent_weight, bias, state, state, None, None, False, blocks)
    for old, new in zip(given, state, strict=True):
        if old is not new:
            old.copy_(new)
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
