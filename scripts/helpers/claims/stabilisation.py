"""Stabilisation: float32 with and without m against float64, gates of standard deviation 10 to 120."""

from collections.abc import Callable
from pathlib import Path

import torch

from hf_xlstm.ops import mlstm

from .measuring import row


TITLE = "Stabilisation: float32 with and without m against float64, gates of standard deviation 10 to 120"


def unstabilised_mlstm(q, k, v, igate, fgate) -> torch.Tensor:
    """The definition with exp(i~) as it stands: the mLSTM without m."""
    B, T, H, K = q.shape
    c, n = q.new_zeros(B, H, K, v.shape[-1]), q.new_zeros(B, H, K)
    outputs = []
    for t in range(T):
        i, f = igate[:, t].exp(), fgate[:, t].sigmoid()
        c = f[..., None, None] * c + i[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        n = f[..., None] * n + i[..., None] * k[:, t]
        x = q[:, t] * K**-0.5
        outputs.append(torch.einsum("bhk,bhkv->bhv", x, c) / (x * n).sum(-1).abs().clamp_min(1)[..., None])
    return torch.stack(outputs, dim=1)


def measure(seeds: int, output: Path) -> list[dict]:
    """Errors are medians over h and the gradients of q, k, v, of those values that float32 can hold: a gate of -1e3
    makes others vanish altogether, and a few are ill-conditioned by themselves."""

    def measure(scale: float, seed: int) -> tuple[float, ...]:
        torch.manual_seed(seed)
        inputs = (*torch.randn(3, 2, 64, 2, 16), *(scale * torch.randn(2, 2, 64, 2)))
        exact = _with_gradients(
            lambda *x: mlstm(*x, eps=0.0, backend="reference")[0], tuple(x.double() for x in inputs)
        )
        stabilised = _with_gradients(lambda *x: mlstm(*x, eps=0.0)[0], inputs)
        plain = _with_gradients(unstabilised_mlstm, inputs)
        held = exact.abs() > torch.finfo(torch.float32).tiny

        def error(actual: torch.Tensor, where: torch.Tensor) -> float:
            return ((actual.double() - exact).abs() / exact.abs())[where].median().item()

        both = held & stabilised.isfinite() & plain.isfinite()
        finite = (x.isfinite().double().mean().item() for x in (stabilised, plain))
        return *finite, error(stabilised, held), error(stabilised, both) / error(plain, both)

    rows = []
    for scale in (10, 20, 40, 80, 120):
        columns = zip(*(measure(scale, seed) for seed in range(seeds)), strict=True)
        finite, finite_without, errors, ratios = map(list, columns)
        rows += [
            row(f"scale {scale}: share of finite results with m", finite, at_least=1),
            row(f"scale {scale}: share of finite results without m", finite_without),
            row(f"scale {scale}: relative error with m", errors, at_most=1e-5),
            row(f"scale {scale}: error with m over error without, where both are finite", ratios, at_most=2),
        ]
    return rows


def _with_gradients(function: Callable, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """h and the gradients of q, k, v, all in one row."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    h = function(*leaves)
    return torch.cat([x.detach().flatten() for x in (h, *torch.autograd.grad(h.sum(), leaves[:3]))])
