"""The mLSTM on GPUs: the functions behind `backend="triton"`, and their gradients.

The kernels are registered as three operators that torch.compile sees as black boxes: `hf_xlstm::mlstm_forward`,
`hf_xlstm::mlstm_backward` and the in-place `hf_xlstm::mlstm_step`.
"""

import torch

from .. import environment
from .. import triton_common as common
from ..numerics import first_derivatives_only, no_transforms
from . import triton_launch as launch
from . import triton_launch_recurrent as launch_recurrent
from .reference import MLSTMState


# Up to this length one pass of the recurrence over the state costs no more than the chunkwise kernels.
MAX_RECURRENT = 16


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The tokens of one chunk must lie within 2^31 elements."""
    return common.dense(x) if x.stride(1) < 2**31 // launch.MAX_CHUNK else x.contiguous()


def _plan(q: torch.Tensor, v: torch.Tensor) -> launch.Plan:
    return launch.plan(q.dtype, q.shape[-1], v.shape[-1], common.GPU.of(q.device))


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
    save_states: bool,
    scale: float,
    eps: float,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """h, the final c, n, m, and for the backward pass s (the normalizer n.q) and m of each token and c, n at every
    chunk boundary. Those that are not asked for are empty."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    initial = tuple(common.contiguous(x) for x in (c, n, m))
    new_state = _empty_state(q, v, cu_seqlens, final_state)
    final = new_state if final_state else (None, None, None)
    with common.on_device(q):
        if cu_seqlens is None and q.shape[1] <= MAX_RECURRENT and not save_states:
            h, sums = launch_recurrent.recurrent(q, k, v, igate, fgate, mask, initial, final, scale, eps)
        else:
            plan = _plan(q, v)
            if not save_states:
                sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
                recurrences, gpu = sequences * q.shape[2], common.GPU.of(q.device)
                plan = launch.on_chip_plan(q.dtype, q.shape[-1], v.shape[-1], recurrences, gpu) or plan
            h, sums, saved = launch.forward(q, k, v, igate, fgate, mask, cu_seqlens, initial, final, scale, eps, plan)
    if not save_states:
        saved = [q.new_empty(0), q.new_empty(0)]
    return h, *new_state, *sums, *saved


@mlstm_forward.register_fake
def _(q, k, v, igate, fgate, c, n, m, mask, cu_seqlens, final_state, save_states, scale, eps):
    B, T, H, V = v.shape
    h = v.new_empty(B, T, H, V)
    sums = [v.new_empty(B, H, T, dtype=torch.float32) for _ in range(2)]
    saved = [q.new_empty(0), q.new_empty(0)]
    if save_states:
        length = _plan(q, v).chunk_size
        rows = B * ((T + length - 1) // length) if cu_seqlens is None else T // length + cu_seqlens.shape[0] - 1
        saved = launch.chunk_states(q, v, rows)
    return h, *_empty_state(q, v, cu_seqlens, final_state), *sums, *saved


def _empty_state(q, v, cu_seqlens, wanted: bool) -> MLSTMState:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    (H, K), V = q.shape[2:], v.shape[-1]
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
    m_final: torch.Tensor,
    s: torch.Tensor,
    m_tokens: torch.Tensor,
    c_boundaries: torch.Tensor,
    n_boundaries: torch.Tensor,
    scale: float,
    eps: float,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, igate, fgate and, if there is one, of the initial c and n."""
    q, k, v, dh = _dense(q), _dense(k), _dense(v), dh.contiguous()
    initial = tuple(common.contiguous(x) for x in (c, n, m))
    dfinal = tuple(common.contiguous(x) for x in (dc_final, dn_final))
    dinitial = tuple(None if x is None else torch.empty_like(x) for x in initial[:2])
    states = (c_boundaries, n_boundaries) if n_boundaries.numel() else None
    plan = _plan(q, v)
    with common.on_device(q):
        gradients = launch.backward(
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
            m_final if m_final.numel() else None,
            (s, m_tokens),
            states,
            scale,
            eps,
            plan,
        )
    return [*gradients, *(x for x in dinitial if x is not None)]


@mlstm_backward.register_fake
def _(dh, dc_final, dn_final, q, k, v, igate, fgate, c, n, *_):
    like = [q, k, v, igate, fgate] + [x for x in (c, n) if x is not None]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.final_state, _, ctx.scale, ctx.eps = inputs
    _, _, _, *saved = output  # from the final m on
    ctx.save_for_backward(*tensors, *saved)
    ctx.mark_non_differentiable(*saved)


def _backward(ctx, dh, dc, dn, *_):
    no_transforms("mlstm", "triton", dh, dc, dn)
    dfinal = (dc, dn) if ctx.final_state else (None, None)
    dq, dk, dv, digate, dfgate, *dinitial = mlstm_backward(dh, *dfinal, *ctx.saved_tensors, ctx.scale, ctx.eps)
    return dq, dk, dv, digate, dfgate, *(dinitial or (None, None)), *[None] * 7


mlstm_backward.register_autograd(lambda *_: first_derivatives_only("mlstm", "triton"))
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
    no_transforms("mlstm", "triton")
    h, c, n, m, *_ = mlstm_forward(
        q,
        k,
        v,
        igate,
        fgate,
        *(initial_state or (None, None, None)),
        mask,
        cu_seqlens,
        output_final_state,
        environment.saves_states() and torch.is_grad_enabled(),
        scale,
        eps,
    )
    return h, (c, n, m) if output_final_state else None


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
    state_indices: torch.Tensor | None,
    scale: float,
    eps: float,
) -> torch.Tensor:
    """h; the new state replaces the old one. Safe under CUDA graphs: nothing is allocated that outlives the call, and
    nothing is read back from the GPU."""
    q, k, v, igate, fgate = (x.unsqueeze(1) for x in (_dense(q), _dense(k), _dense(v), igate, fgate))
    state = common.state_rows((c, n, m), state_indices)
    with common.on_device(q):
        h = launch_recurrent.step(q, k, v, igate, fgate, state, common.contiguous(state_indices), scale, eps)
    for old, new in zip((c, n, m), state, strict=True):
        if old is not new:
            old.copy_(new)
    return h.squeeze(1)


@mlstm_step_inplace.register_fake
def _(q, k, v, igate, fgate, c, n, m, state_indices, scale, eps):
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
    state_indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, MLSTMState]:
    """One step; shapes as in `hf_xlstm.ops.mlstm_step`. In place it is for inference and takes no gradient.

    With `state_indices` (B,), int32 or int64, the state is a pool (slots, H, ...), and token b reads and writes slot
    state_indices[b]. A negative index is padding: h is 0 there, and no slot is read or written. No slot may be named
    twice. Raises ValueError unless `inplace`.
    """
    if inplace:
        return mlstm_step_inplace(q, k, v, igate, fgate, *state, state_indices, scale, eps), state
    if state_indices is not None:
        raise ValueError("`state_indices` needs inplace=True: a pool of states is updated, not copied.")
    sequence = (x.unsqueeze(1) for x in (q, k, v, igate, fgate))
    h, new_state = mlstm_triton(*sequence, initial_state=state, output_final_state=True, scale=scale, eps=eps)
    assert new_state is not None
    return h.squeeze(1), new_state
