"""Linear layers, nearly all of an xLSTM's work on a CPU, by the faster of PyTorch's two libraries there.

PyTorch multiplies float32 matrices with MKL and bfloat16 ones with oneDNN. On x86 processors oneDNN is the faster for
both (measured on an AMD EPYC: twice as fast in training, four times when decoding), so float32 goes there too. Its own
blocked layout of the weights, which PyTorch makes anew for every bfloat16 product, doubles the speed of products of a
few rows once more (not of a single row in float32). It is a copy of the weights, so it lives only as long as the cache
it helps to decode from.
"""

import contextlib
import os
import platform
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import Cache


ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
# Numbers in a float32 weight below which the call takes longer than the product, and MKL is as good.
MIN_SIZE = 2**16
# Products of more rows gain little from blocked weights, and generating a token or two does not repay them.
MAX_DECODING_ROWS = 64
BLOCK_FROM_STEP = 9


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias by oneDNN, without autograd. `weight` may be blocked."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy, weight.t())
        x, dy = x.flatten(0, -2), dy.flatten(0, -2)
        if ctx.needs_input_grad[1]:  # faster with the longer side of the result in its rows
            wide = weight.shape[0] > weight.shape[1]
            dweight = _product(x.t(), dy.t()).t().contiguous() if wide else _product(dy.t(), x.t())
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias


class xLSTMLinear(nn.Linear):
    """`nn.Linear`, in float32 on an x86 CPU computed by oneDNN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _is_plain(self) or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return F.linear(x, self.weight, self.bias)
        if x.dtype != torch.float32 or self.weight.dtype != torch.float32 or self.weight.numel() < MIN_SIZE:
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _Linear.apply(x, self.weight, self.bias)
        return _product(x, self.weight, self.bias)


class _Blocked(NamedTuple):
    """The weights of one or more layers of the same input, one below the other, in oneDNN's blocked layout."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    sizes: list[int]
    sources: list[tuple[dict, str, torch.Tensor, int, int]]  # what the layers held, its version and address

    def is_current(self) -> bool:
        """Whether the layers still hold what was copied."""
        return all(
            parameters[name] is x and x._version == version and x.data_ptr() == address
            for parameters, name, x, version, address in self.sources
        )


class _Decoding:
    """What belongs to one cache: how often it was continued, and blocked weights by the id of their first layer."""

    def __init__(self, model: nn.Module):
        size = sum(x.nbytes for x in model.parameters())
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        self.affordable = 4 * size < memory
        self.steps = 0
        self.blocked: dict[int, _Blocked | None] = {}


_decodings: WeakKeyDictionary[Cache, _Decoding] = WeakKeyDictionary()
_current: ContextVar[_Decoding | None] = ContextVar("decoding", default=None)


@contextlib.contextmanager
def decoding(model: nn.Module, cache: Cache | None) -> Iterator[None]:
    """Around a forward pass that may continue from `cache`. From the ninth on, `joint_linear` computes products of a
    few rows from blocked copies of the weights, which repay themselves in about ten steps and live as long as the
    cache. A model that takes more than a quarter of the machine's memory does without."""
    if not ONEDNN or torch.compiler.is_compiling() or not isinstance(cache, Cache):
        yield
        return
    state = _decodings.get(cache)
    if state is None:
        state = _decodings[cache] = _Decoding(model)
    state.steps += 1
    token = _current.set(state if state.affordable and state.steps >= BLOCK_FROM_STEP else None)
    try:
        yield
    finally:
        _current.reset(token)


def joint_linear(x: torch.Tensor, *linears: nn.Module) -> Sequence[torch.Tensor]:
    """What each of the linear layers makes of x (..., D): one product for all of them while decoding on a CPU."""
    if torch.compiler.is_compiling():
        return [linear(x) for linear in linears]
    state, rows = _current.get(), x.numel() // x.shape[-1]
    if state is None or rows > MAX_DECODING_ROWS or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return [linear(x) for linear in linears]
    key = id(linears[0])
    if key not in state.blocked:
        state.blocked[key] = _block(linears, rows)
    blocked = state.blocked[key]
    if blocked is None or blocked.weight.dtype != x.dtype or not blocked.is_current():
        return [linear(x) for linear in linears]
    return _product(x, blocked.weight, blocked.bias).split_with_sizes(blocked.sizes, dim=-1)


def _block(linears: Sequence[nn.Module], rows: int) -> _Blocked | None:
    """None if one of the layers is not as this module made it: adapted, quantized, sharded, offloaded or hooked."""
    if not all(type(x) is xLSTMLinear and _is_plain(x) and not _has_hooks(x) for x in linears):
        return None
    dtypes = {x.weight.dtype for x in linears}
    if dtypes != {torch.bfloat16} and (dtypes != {torch.float32} or rows == 1):
        return None
    weight, bias = torch.cat([x.weight for x in linears]), None
    if any(x.bias is not None for x in linears):
        bias = torch.cat([weight.new_zeros(len(x.weight)) if x.bias is None else x.bias for x in linears])
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    sources = [
        (layer._parameters, name, x, x._version, x.data_ptr())
        for layer in linears
        for name, x in layer._parameters.items()
        if x is not None
    ]
    return _Blocked(weight, bias, [len(x.weight) for x in linears], sources)


def _is_plain(linear: nn.Linear) -> bool:
    return ONEDNN and type(linear.weight) is nn.Parameter and linear.weight.is_cpu


def _has_hooks(linear: nn.Linear) -> bool:
    return bool(linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))
