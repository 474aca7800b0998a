"""Gates of 300 to 1e5 and infinite ones, and what both cells make of them."""

import torch
from oracle import DEVICE, INF


SCALES = [300.0, 1e5]
# Where a gate closes so hard that it holds back more than the next tokens bring, what came before it still counts.
KINDS = ("random", "level", "closing", "infinite")


def make_gates(kind: str, scale: float, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """igate and fgate (B, T, ...)."""
    igate, fgate = torch.randn(2, *shape, device=DEVICE)
    token = torch.arange(shape[1], device=DEVICE).view(1, -1, *[1] * (len(shape) - 2))
    if kind in ("random", "infinite"):
        igate, fgate = scale * igate, scale * fgate
    if kind == "level":  # all input gates high, and of one height: tokens compete
        igate, fgate = igate + scale, fgate + 4
    if kind == "closing":  # every sixth token closes the forget gate, and brings less than that holds back
        igate = igate - 1.5 * scale * (token // 6)
        fgate = torch.where(token % 6 == 5, fgate - scale, fgate + 4)
    if kind == "infinite":
        igate = torch.where(token % 7 == 3, -INF, igate)
        fgate = torch.where(token % 5 == 4, INF, torch.where(token % 31 == 20, -INF, fgate))
    return igate, fgate


def make_inputs(kind: str, scale: float, B: int, T: int, dtype: torch.dtype):
    """q and k of one sign: n.q must not cancel, or no float32 would do."""
    q, k, v = torch.randn(B, T, 1, 3 * 16, device=DEVICE).to(dtype).split(16, dim=-1)
    return q.abs(), k.abs(), v, *make_gates(kind, scale, B, T, 1)


def make_state(rows: int, level: float = 0.0):
    c, n, m = (torch.randn(shape, device=DEVICE) for shape in ((rows, 1, 16, 16), (rows, 1, 16), (rows, 1)))
    return c, n.abs(), m + level


def double(x):
    if isinstance(x, torch.Tensor):
        return x.detach().double() if x.is_floating_point() else x
    return None if x is None else tuple(map(double, x))


def evaluate(function, inputs, state, dh, dstate, gauge=None, **options):
    """Outputs and gradients by name, of a loss on h and on the final c and n, and the final m. c and n are brought to
    the m called `gauge`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    initial = None if state is None else (*(x.detach().requires_grad_() for x in state[:2]), state[2])
    h, (c, n, m) = function(*leaves, initial_state=initial, output_final_state=True, scale=0.25, eps=0.0, **options)
    shift = torch.exp(m - (m if gauge is None else gauge.to(m.dtype))).detach()
    outputs = {"h": h, "c": c * shift[..., None, None], "n": n * shift[..., None]}
    loss = sum((x * d).sum() for x, d in zip(outputs.values(), (dh, *dstate), strict=True))
    leaves += [] if initial is None else initial[:2]
    gradients = torch.autograd.grad(loss, leaves)
    names = [f"d{name}" for name in ("q", "k", "v", "igate", "fgate", "c", "n")]
    return outputs | dict(zip(names, gradients, strict=False)), m


def error(actual: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    assert actual.isfinite().all()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(floor)).item()


def make_slstm_inputs(kind: str, scale: float, T: int, D: int):
    gates = torch.randn(2, T, 4, 2, D, device=DEVICE)
    gates[:, :, 0], gates[:, :, 1] = make_gates(kind, scale, 2, T, 2, D)
    return gates, torch.randn(4, 2, D, D, device=DEVICE) / D**0.5, torch.randn(4, 2, D, device=DEVICE)


def without_recurrence(inputs):
    """A sum of an input gate of 1e5 with R h and b has two digits left for what tells tokens apart, in float32."""
    gates, weight, bias = inputs
    return gates, torch.zeros_like(weight), torch.zeros_like(bias)


def evaluate_slstm(function, inputs, dh, **options):
    """h, what the final state means (its output, c / n, the log of all weight) and the gradients of a loss on them."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    h, (h_final, c, n, m) = function(*leaves, output_final_state=True, **options)
    loss = (h * dh).sum() + (c / n * dh[:, 0]).sum() + (n.log() * dh[:, 1]).sum()
    gradients = torch.autograd.grad(loss, leaves)
    names = ("h", "final h", "c / n", "m + log n", "dgates", "dweight", "dbias")
    return dict(zip(names, (h, h_final, c / n, m + n.log(), *gradients), strict=True))
