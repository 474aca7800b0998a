"""The sLSTM's inputs in every regime of its gates, and the float64 recurrence as the judge of all backends."""

import torch
from common import relative_error
from oracle import BF16, DEVICE, F16, F32, F64, double, state_dtype

from hf_xlstm.ops import slstm


# means of i, f, z, o and deviation of all
GATES = {
    "unit": ((0, 0, 0, 0), 1),
    "closed": ((-10, -10, -10, -10), 1),
    "open": ((5, 5, 5, 5), 1),
    "initial": ((0, 4.5, 0, 0), 1),
    "forgetful": ((5, -10, 0, 0), 1),
    "capped": ((0, 0, 0, 0), 15),
    "wide": ((0, 0, 0, 0), 15),  # as capped, without the cap
}
# (c, n, m) and (c e^a, n e^a, m - a) are the same state: r = c / n and l = m + log n are what it means
FORWARD = ("h", "state h", "state r", "state l")
GRADIENTS = ("dgates", "dweight", "dbias", "dh0", "dc0", "dn0")
TOLERANCE = {  # outputs, gradients
    ("torch", F64): (1e-12, 1e-12),
    ("torch", F32): (1e-5, 1e-4),
    ("torch", F16): (1e-3, 1e-3),  # computes in float32
    ("torch", BF16): (1e-2, 3e-2),
    ("triton", F32): (1e-5, 1e-4),
    ("triton", F16): (2e-3, 5e-3),
    ("triton", BF16): (1e-2, 3e-2),
}


def make_inputs(B=2, T=6, H=2, D=20, dtype=F64, gates="unit"):
    """gates, recurrent weight, bias; gates as a projection and a transposition leave them, not contiguous."""
    mean, std = GATES[gates]
    x = torch.tensor(mean, dtype=F64)[:, None] + std * torch.randn(T, B, 4, H * D + 3, dtype=F64)
    if gates == "capped":
        x = 15 * torch.tanh(x / 15)
    x = x.to(DEVICE, dtype)[..., 3:].unflatten(-1, (H, D)).transpose(0, 1)
    assert not x.is_contiguous()
    weight, bias = torch.randn(4, H, D, D, dtype=F64) / D**0.5, torch.randn(4, H, D, dtype=F64)
    return x, weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)


def make_state(rows=2, H=2, D=20, dtype=F64):
    h, c, n, m = torch.randn(4, rows, H, D, dtype=F64).to(DEVICE, dtype)
    return h.tanh(), c, n.abs() + 0.1, m


def state_for(inputs, cu_seqlens=None):
    gates = inputs[0]
    rows = gates.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return make_state(rows, *gates.shape[3:], dtype=state_dtype(gates.dtype))


def meaning(state):
    h, c, n, m = state
    return h, c / n, m + n.log()


def assert_same_states(actual, expected, tolerance):
    assert all(relative_error(x, y) < tolerance for x, y in zip(meaning(actual), meaning(expected), strict=True))


def evaluate(inputs, state, weights, **options):
    """h, the final state, and the gradients of sum(weights * (h, what the state means)); what has no weight is left
    out of the sum."""
    tensors = (*inputs, *(state or ()))
    before = [x.clone() for x in tensors]
    leaves = [x.detach().requires_grad_() for x in tensors]
    initial = tuple(leaves[3:]) if state else None
    h, final = slstm(*leaves[:3], initial_state=initial, output_final_state=True, **options)
    assert h.dtype == inputs[0].dtype
    assert all(x.dtype == state_dtype(h.dtype) for x in final)
    assert not final[3].requires_grad
    outputs = (h, *meaning(final))
    loss = sum((w * x.to(w.dtype)).sum() for w, x in zip(weights, outputs, strict=True) if w is not None)
    gradients = torch.autograd.grad(loss, leaves[:6], materialize_grads=True)
    assert all(d.dtype == x.dtype for d, x in zip(gradients, leaves[:6], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True)), "an argument was modified"
    return dict(zip(FORWARD, outputs, strict=True)) | dict(zip(GRADIENTS, gradients, strict=False))


def assert_exact(inputs, backend, state="any", tolerance=None, weights=(1, 1, 1, 1), **options):
    """A backend against the recurrence in float64. `state` None: there is none; `weights` are those of h and of what
    the final state means in the loss; `tolerance` that of outputs and of gradients."""
    gates = inputs[0]
    final = state_for(inputs, options.get("cu_seqlens"))[:3]
    state = state_for(inputs, options.get("cu_seqlens")) if state == "any" else state
    shapes = (gates[:, :, 0], *final)
    weights = [w * torch.randn_like(x, dtype=F64) if w else None for w, x in zip(weights, shapes, strict=True)]
    in_float64 = None if state is None else double(state)
    expected = evaluate(double(inputs), in_float64, weights, backend="reference", **options)
    actual = evaluate(inputs, state, weights, backend=backend, **options)
    outputs, gradients = tolerance or TOLERANCE[backend, gates.dtype]
    for name in expected:
        error = relative_error(actual[name], expected[name])
        assert error < (outputs if name in FORWARD else gradients), f"{name}: {error:.1e}"
    return actual
