"""The mLSTM on GPUs: the functions behind `backend="triton"`, and their gradients.

The kernels are registered as three operators that torch.compile sees as black boxes: `hf_xlstm::mlstm_forward`,
`hf_xlstm::mlstm_backward` and the in-place `hf_xlstm::mlstm_step`.
"""

import contextlib

import torch

from . import mlstm_triton_launch as launch
from .mlstm_reference import MLSTMState


MAX_HEAD_DIM = 512
# Up to this length one pass of the recurrence over the state costs no more than the chunkwise kernels.
MAX_RECURRENT = 16


def unsupported_reason(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why these tensors cannot run here, or None."""
    if q.device.type != "cuda" and not launch.INTERPRETED:
        return f"it needs a GPU, the tensors are on {q.device}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, bfloat16 and float16, not {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return f"head dims go up to {MAX_HEAD_DIM}, got {q.shape[-1]} and {v.shape[-1]}"
    return None


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Kernels take any strides but the last: a head's features must lie side by side, as projections produce them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _on_device(x: torch.Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@torch.library.custom_op("hf_xlstm::mlstm_forward", mutates_args=())
def mlstm_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    c: torch.Tensor | None,
    n: torch.Tensor | None,
    m: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    final_state: bool,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, s (the normalizer n.q, for the backward pass) and the final c, n, m: empty tensors without `final_state`."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    initial = tuple(None if x is None else x.contiguous() for x in (c, n, m))
    new_state = _empty_state(q, v, cu_seqlens, final_state)
    final = new_state if final_state else (None, None, None)
    with _on_device(q):
        if cu_seqlens is None and q.shape[1] <= MAX_RECURRENT:
            h, s = launch.recurrent(q, k, v, igate, fgate, mask, initial, final, scale, eps)
        else:
            plan = launch.plan(q, v, _is_hopper(q.device))
            h, s = launch.forward(q, k, v, igate, fgate, mask, cu_seqlens, initial, final, scale, eps, plan)
    return h, s, *new_state


@mlstm_forward.register_fake
def _(q, k, v, igate, fgate, c, n, m, mask, cu_seqlens, final_state, scale, eps):
    B, T, H, V = v.shape
    h = v.new_empty(B, T, H, V)
    return h, v.new_empty(B, H, T, dtype=torch.float32), *_empty_state(q, v, cu_seqlens, final_state)


def _empty_state(q, v, cu_seqlens, wanted: bool) -> MLSTMState:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    H, K, V = *q.shape[2:], v.shape[-1]
    shapes = ((rows, H, K, V), (rows, H, K), (rows, H)) if wanted else ((0,),) * 3
    return tuple(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("hf_xlstm::mlstm_backward", mutates_args=())
def mlstm_backward(
    dh: torch.Tensor,
    dc_final: torch.Tensor | None,
    dn_final: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    c: torch.Tensor | None,
    n: torch.Tensor | None,
    m: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    h: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    eps: float,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, igate, fgate and, if there is one, of the initial c and n.

    The chunk states are computed again: kept from the forward pass they would outweigh all other activations.
    """
    q, k, v, dh = _dense(q), _dense(k), _dense(v), dh.contiguous()
    initial = tuple(None if x is None else x.contiguous() for x in (c, n, m))
    dfinal = tuple(None if x is None else x.contiguous() for x in (dc_final, dn_final))
    dinitial = tuple(None if x is None else torch.empty_like(x) for x in initial[:2])
    plan = launch.plan(q, v, _is_hopper(q.device))
    with _on_device(q):
        gradients = launch.backward(
            dh, dfinal, q, k, v, igate, fgate, mask, cu_seqlens, initial, dinitial, h, s, scale, eps, plan
        )
    return [*gradients, *(x for x in dinitial if x is not None)]


@mlstm_backward.register_fake
def _(dh, dc_final, dn_final, q, k, v, igate, fgate, c, n, m, mask, cu_seqlens, h, s, scale, eps):
    like = [q, k, v, igate, fgate] + [x for x in (c, n) if x is not None]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, final_state, ctx.scale, ctx.eps = inputs
    h, s, *new_state = output
    ctx.final_state = final_state
    ctx.save_for_backward(*tensors, h, s)
    ctx.mark_non_differentiable(s, new_state[2])


def _backward(ctx, dh, ds, dc, dn, dm):
    dfinal = (dc, dn) if ctx.final_state else (None, None)
    dq, dk, dv, digate, dfgate, *dinitial = mlstm_backward(dh, *dfinal, *ctx.saved_tensors, ctx.scale, ctx.eps)
    return dq, dk, dv, digate, dfgate, *(dinitial or (None, None)), *[None] * 6


mlstm_forward.register_autograd(_backward, setup_context=_setup_context)


def mlstm_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    *,
    initial_state: MLSTMState | None = None,
    output_final_state: bool = False,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float,
    eps: float,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, MLSTMState | None]:
    """The sequence; shapes as in `hf_xlstm.ops.mlstm`. `chunk_size` has no effect: the registers of the GPU decide."""
    h, _, *state = mlstm_forward(
        q,
        k,
        v,
        igate,
        fgate,
        *(initial_state or (None, None, None)),
        mask,
        cu_seqlens,
        output_final_state,
        scale,
        eps,
    )
    return h, tuple(state) if output_final_state else None


@torch.library.custom_op("hf_xlstm::mlstm_step", mutates_args=("c", "n", "m"))
def mlstm_step_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    c: torch.Tensor,
    n: torch.Tensor,
    m: torch.Tensor,
    scale: float,
    eps: float,
) -> torch.Tensor:
    """h; the new state replaces the old one. Safe under CUDA graphs: nothing is allocated that outlives the call."""
    sequence = [x.unsqueeze(1) for x in (_dense(q), _dense(k), _dense(v), igate, fgate)]
    state = tuple(x.contiguous() for x in (c, n, m))
    new_state = (state[0], torch.empty_like(state[1]), torch.empty_like(state[2]))
    with _on_device(q):
        h, _ = launch.recurrent(*sequence, None, state, new_state, scale, eps)
    # n and m are read by several programs and so cannot be written by one of them
    torch._foreach_copy_([n, m], new_state[1:])
    if state[0] is not c:
        c.copy_(state[0])
    return h.squeeze(1)


@mlstm_step_inplace.register_fake
def _(q, k, v, igate, fgate, c, n, m, scale, eps):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def mlstm_step_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    state: MLSTMState,
    *,
    scale: float,
    eps: float,
    inplace: bool,
) -> tuple[torch.Tensor, MLSTMState]:
    """One step; shapes as in `hf_xlstm.ops.mlstm_step`. In place it is for inference and takes no gradient."""
    if inplace:
        return mlstm_step_inplace(q, k, v, igate, fgate, *state, scale, eps), state
    sequence = (x.unsqueeze(1) for x in (q, k, v, igate, fgate))
    h, state = mlstm_triton(*sequence, initial_state=state, output_final_state=True, scale=scale, eps=eps)
    return h.squeeze(1), state
