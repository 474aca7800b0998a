"""The sLSTM on GPUs: the functions behind `backend="triton"`, and their gradients.

The kernels are registered as three operators that torch.compile sees as black boxes: `hf_xlstm::slstm_forward`,
`hf_xlstm::slstm_backward` and the in-place `hf_xlstm::slstm_step`.
"""

import torch

from .. import triton_common as common
from ..numerics import first_derivatives_only, no_transforms, without_autocast
from . import triton_launch as launch
from .reference import SLSTMState, zero_slstm_state


def _plan(x: torch.Tensor, sequences: int, steps: int) -> launch.Plan:
    gpu, (heads, D) = common.GPU.of(x.device), x.shape[-2:]
    return launch.spread_plan(x.dtype, D, sequences, heads, steps, gpu) or launch.plan(x.dtype, D, gpu)


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
    plan = _plan(gates, c0.shape[0], gates.shape[1])
    h, saved, c = launch.run_forward(gates, recurrent_weight, bias, state, final, mask, cu_seqlens, save, plan)
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
    n_final: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    h: torch.Tensor,
    saved: torch.Tensor,
    c: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of gates, recurrent weight, bias and the initial h, c, n."""
    h_before, touched = _history(h, h0, mask, cu_seqlens)
    # the last c and n = 1 came out times n_final, except where no step was taken and c0, n0 themselves came out
    n_final = torch.where(touched[:, None, None], n_final, 1)
    dfinal = (dh_final, dc_final * n_final, dn_final * n_final)
    initial_c = torch.where(n0 == 0, 0, c0 / n0).contiguous()
    dgates, dh0, dc0, dn0 = launch.run_backward(
        dh, dfinal, recurrent_weight, initial_c, mask, cu_seqlens, saved, c, _plan(dh, c0.shape[0], dh.shape[1] + 1)
    )
    with without_autocast(h.device):  # gate by gate: each product takes its operands as they lie in memory
        products = [torch.bmm(d.permute(1, 2, 0), h_before.transpose(0, 1)) for d in dgates.flatten(0, 1).unbind(1)]
    # c0 / n0 went in
    scale = torch.where(touched[:, None, None], torch.where(n0 == 0, 0, 1 / n0), 1)
    return dgates, torch.stack(products), dgates.sum((0, 1), dtype=torch.float32), dh0, dc0 * scale, dn0 * scale


def _history(h: torch.Tensor, h0: torch.Tensor, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None):
    """For each token the h before it (B T, H, D), and for each sequence (N,) whether it takes a step at all. Waits for
    nothing on the GPU."""
    B, T = h.shape[:2]
    if mask is None and cu_seqlens is None and T > 0:
        h_before = torch.cat([h0[:, None].to(h.dtype), h[:, :-1]], dim=1)
        return h_before.flatten(0, 1), torch.ones(B, dtype=torch.bool, device=h.device)
    token = torch.arange(B * T, device=h.device)
    bounds = torch.arange(0, B * T + 1, T, device=h.device) if cu_seqlens is None else cu_seqlens.long()
    sequences = bounds.shape[0] - 1
    sequence = torch.bucketize(token, bounds[1:], right=True)
    live = token if mask is None else torch.where(mask.flatten(), token, -1)
    latest = torch.cat([live.new_full((1,), -1), live]).cummax(0).values  # up to and without each token
    before = torch.where(latest[:-1] >= bounds[sequence], latest[:-1] + sequences, sequence)
    return torch.cat([h0.to(h.dtype), h.flatten(0, 1)])[before], latest[bounds[1:]] >= bounds[:-1]


@slstm_backward.register_fake
def _(dh, dh_final, dc_final, dn_final, recurrent_weight, h0, c0, n0, n_final, mask, cu_seqlens, h, saved, c):
    B, T, H, D = h.shape
    d_parameters = h.new_empty(4, H, D, D), h0.new_empty(4, H, D)
    return h.new_empty(B, T, 4, H, D), *d_parameters, *(h0.new_empty(h0.shape) for _ in range(3))


def _save(ctx, inputs, output):
    _, recurrent_weight, _, h0, c0, n0, _, mask, cu_seqlens, _ = inputs
    h, _, _, n_final, m, saved, c = output
    ctx.save_for_backward(recurrent_weight, h0, c0, n0, n_final, mask, cu_seqlens, h, saved, c)
    ctx.mark_non_differentiable(m, saved, c)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dh, dh_final, dc_final, dn_final, *_):
    no_transforms("slstm", "triton", dh, dh_final, dc_final, dn_final)
    h0, h = ctx.saved_tensors[1], ctx.saved_tensors[7]
    dh = torch.zeros_like(h) if dh is None else dh
    d_final = (torch.zeros_like(h0) if d is None else d for d in (dh_final, dc_final, dn_final))
    return *slstm_backward(dh, *d_final, *ctx.saved_tensors), None, None, None, None


slstm_backward.register_autograd(lambda *_: first_derivatives_only("slstm", "triton"))
slstm_forward.register_autograd(_differentiate, setup_context=_save)


def _known_dtypes(*parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The kernels know no float64."""
    return tuple(x.float() if x.dtype == torch.float64 else x for x in parameters)


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
    no_transforms("slstm", "triton")
    if initial_state is None:
        initial_state = zero_slstm_state(gates, gates.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    inputs = (gates, *_known_dtypes(recurrent_weight, bias), *initial_state)
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
    state_indices: torch.Tensor | None,
) -> torch.Tensor:
    """h; the new state replaces the old one. Safe under CUDA graphs, like `mlstm_step_inplace`."""
    given = (h, c, n, m)
    state = common.state_rows(given, state_indices, same_stride=True)
    gates = gates[:, None]
    output, _, _ = launch.run_forward(
        gates, recurrent_weight, bias, state, state, None, None, False, _plan(gates, gates.shape[0], 1), state_indices
    )
    for old, new in zip(given, state, strict=True):
        if old is not new:
            old.copy_(new)
    return output[:, 0]


@slstm_step_inplace.register_fake
def _(gates, recurrent_weight, bias, h, c, n, m, state_indices):
    return gates.new_empty(gates.shape[0], *gates.shape[2:])


def slstm_step_triton(
    gates: torch.Tensor,
    recurrent_weight: torch.Tensor,
    bias: torch.Tensor,
    state: SLSTMState,
    *,
    inplace: bool = False,
    state_indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, SLSTMState]:
    """One step; shapes as in `hf_xlstm.ops.slstm_step`.

    With `state_indices` (B,), int32 or int64, the state is a pool (slots, H, D), and row b reads and writes slot
    state_indices[b]. A negative index is padding: h is 0 there, and no slot is read or written. No slot may be named
    twice. Raises ValueError unless `inplace`.
    """
    if inplace:
        return slstm_step_inplace(gates, *_known_dtypes(recurrent_weight, bias), *state, state_indices), state
    if state_indices is not None:
        raise ValueError("`state_indices` needs inplace=True: a pool of states is updated, not copied.")
    h, new_state = slstm_triton(gates[:, None], recurrent_weight, bias, initial_state=state, output_final_state=True)
    assert new_state is not None
    return h[:, 0], new_state
