"""The mLSTM's inputs in every regime of its gates, and the float64 recurrence as the judge of all backends."""

import torch
from common import relative_error
from oracle import BF16, DEVICE, F16, F32, F64, double, state_dtype

from hf_xlstm.ops import mlstm


# mean and deviation of the input gate, then of the forget gate
GATES = {
    "unit": (0, 1, 0, 1),
    "closed": (-10, 1, -10, 1),
    "initial": (-10, 1, 4.5, 1),
    "loud": (5, 1, 5, 1),
    "capped": (0, 15, 0, 15),
    "wild": (0, 120, 0, 120),
}
FORWARD = ("h", "c", "n", "m")
INPUTS = ("q", "k", "v", "igate", "fgate")
GRADIENTS = ("dq", "dk", "dv", "digate", "dfgate", "dc0", "dn0")


def bounds(forward: float, gradient: float, **others: float) -> dict[str, float]:
    return dict.fromkeys(FORWARD, forward) | dict.fromkeys(GRADIENTS, gradient) | others


TOLERANCE = {
    ("torch", F64): bounds(1e-12, 1e-12),
    ("torch", F32): bounds(1e-5, 1e-4),
    ("torch", F16): bounds(1e-3, 1e-3),  # computes in float32
    ("torch", BF16): bounds(1e-2, 3e-2, dv=1.5e-2, dfgate=5e-2),
    ("triton", F32): bounds(1e-5, 1e-4),
    ("triton", F16): bounds(2e-3, 3e-3, dv=2e-3, dc0=2e-3, dfgate=5e-3, dn0=5e-3),
    ("triton", BF16): bounds(1e-2, 3e-2, dv=1.5e-2, dc0=1.5e-2, dfgate=5e-2),
}


def make_inputs(B=2, T=70, H=2, K=5, V=7, dtype=F64, gates="unit"):
    """q, k, v, igate, fgate as slices of one projection, so that no stride is the contiguous one."""
    i_mean, i_std, f_mean, f_std = GATES[gates]
    x = torch.randn(B, T, H, 2 * K + V + 2, dtype=F64).to(DEVICE, dtype)
    q, k, v, igate, fgate = x.split([K, K, V, 1, 1], dim=-1)
    igate, fgate = igate[..., 0] * i_std + i_mean, fgate[..., 0] * f_std + f_mean
    if gates == "capped":
        igate, fgate = 15 * torch.tanh(igate / 15), 15 * torch.tanh(fgate / 15)
    return q, k, v, igate, fgate


def make_state(rows=2, H=2, K=5, V=7, dtype=F64):
    shapes = (rows, H, K, V), (rows, H, K), (rows, H)
    return tuple(torch.randn(shape, dtype=F64).to(DEVICE, dtype) for shape in shapes)


def assert_same_states(actual, expected, tolerance):
    """c and n, brought to the same m."""
    shift = torch.exp(actual[2] - expected[2])
    assert relative_error(actual[0] * shift[..., None, None], expected[0]) < tolerance
    assert relative_error(actual[1] * shift[..., None], expected[1]) < tolerance


def state_for(inputs, cu_seqlens=None):
    q, _, v, *_ = inputs
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return make_state(rows, *q.shape[2:], v.shape[-1], dtype=state_dtype(q.dtype))


def evaluate(inputs, state, weights, gauge=None, **options):
    """h, the final state, and the gradients of sum(weights * (h, c, n)); what has no weight is left out of the sum.
    (c, n, m) is the same state as (c e^a, n e^a, m - a): it is brought to m = gauge first."""
    tensors = (*inputs, *(state or ()))
    before = [x.clone() for x in tensors]
    leaves = [x.detach().requires_grad_() for x in tensors]
    h, (c, n, m) = mlstm(
        *leaves[:5], initial_state=tuple(leaves[5:]) if state else None, output_final_state=True, **options
    )
    assert h.dtype == inputs[2].dtype
    assert c.dtype == n.dtype == m.dtype == state_dtype(inputs[0].dtype)
    factor = torch.exp(m - (m if gauge is None else gauge)).to(m.dtype).detach()  # m carries no gradient
    c, n = c * factor[..., None, None], n * factor[..., None]
    used = [(x, w.to(x)) for x, w in zip((h, c, n), weights, strict=True) if w is not None]
    gradients = torch.autograd.grad([x for x, _ in used], leaves[:7], [w for _, w in used], materialize_grads=True)
    assert all(d.dtype == x.dtype for d, x in zip(gradients, leaves[:7], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True)), "an argument was modified"
    return dict(zip(FORWARD, (h, c, n, m), strict=True)) | dict(zip(GRADIENTS, gradients, strict=False))


def assert_exact(inputs, backend, state="any", tolerance=None, weights=(1, 1, 1), ill_conditioned=False, **options):
    """A backend against the recurrence in float64. `state` None: there is none; `weights` are those of h, c and n in
    the loss; `tolerance` one number for all, or those that differ by name. Where inputs are `ill_conditioned`, an
    error may also be four times that of the recurrence in float32, brought to the precision of the dtype."""
    q, _, v, *_ = inputs
    final = state_for(inputs, options.get("cu_seqlens"))[:2]
    state = state_for(inputs, options.get("cu_seqlens")) if state == "any" else state
    weights = [w * torch.randn_like(x).to(q.dtype) if w else None for w, x in zip(weights, (v, *final), strict=True)]
    in_float64 = None if state is None else double(state)
    expected = evaluate(double(inputs), in_float64, weights, backend="reference", **options)
    actual = evaluate(inputs, state, weights, gauge=expected["m"], backend=backend, **options)
    limits = dict(TOLERANCE[backend, q.dtype])
    if tolerance is not None:
        limits |= tolerance if isinstance(tolerance, dict) else dict.fromkeys(limits, tolerance)
    if ill_conditioned:
        single = [None if x is None else tuple(y.float() for y in x) for x in (inputs, state)]
        exact = evaluate(*(None if x is None else double(x) for x in single), weights, backend="reference", **options)
        rounded = evaluate(*single, weights, gauge=exact["m"], backend="reference", **options)
        precision = torch.finfo(q.dtype).eps / torch.finfo(F32).eps
        for name in expected:
            limits[name] = max(limits[name], 4 * precision * relative_error(rounded[name], exact[name]))
    for name in expected:
        if backend == "triton" and name == "m":
            continue  # another one than the recurrence's, by which c and n were compared
        error = relative_error(actual[name], expected[name])
        assert error < limits[name], f"{name}: {error:.1e}"
    return actual
