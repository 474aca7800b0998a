"""Calls of `nn.Linear` layers, nearly all of an xLSTM's work on a CPU, by the faster of PyTorch's two libraries there.

PyTorch multiplies float32 matrices with MKL and bfloat16 ones with oneDNN. On x86 processors oneDNN is the faster for
both (measured on an AMD EPYC: twice as fast in training, four times when decoding), so float32 goes there too. Its own
blocked layout of the weights, which PyTorch makes anew for every bfloat16 product, doubles the speed of products of a
few rows once more; for a single row in float32 it only saves calls. It is a copy of the weights, so it lives only as
long as the cache it helps to decode from.
"""

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Sequence
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
BLOCK_FROM_STEP = 17


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias by oneDNN, without autograd. `weight` may be blocked."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_is_faster(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return ONEDNN and x.is_cpu and x.dtype == torch.float32 and weight.numel() >= MIN_SIZE


class _Linear(torch.autograd.Function):
    """A linear layer of `function(*inputs)`, which is computed again for the backward pass and not kept."""

    @staticmethod
    def forward(ctx, function, weight, bias, *inputs):
        ctx.function = function
        ctx.product = _product if _onednn_is_faster(inputs[0], weight) else F.linear
        ctx.save_for_backward(weight, *inputs)
        return ctx.product(function(*inputs), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, *inputs = ctx.saved_tensors
        _, need_weight, need_bias, *need_inputs = ctx.needs_input_grad
        dweight = dbias = None
        dinputs = [None] * len(inputs)
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, need_inputs)]
            x = ctx.function(*inputs)
        if any(need_inputs):
            dx = ctx.product(dy, weight.t())
            grads = iter(torch.autograd.grad(x, [y for y in inputs if y.requires_grad], dx))
            dinputs = [next(grads) if need else None for need in need_inputs]
        x, dy = x.detach().flatten(0, -2), dy.flatten(0, -2)
        if need_weight:  # faster with the longer side of the result in its rows
            wide = weight.shape[0] > weight.shape[1]
            dweight = ctx.product(x.t(), dy.t()).t().contiguous() if wide else ctx.product(dy.t(), x.t())
        if need_bias:
            dbias = dy.sum(0)
        return None, dweight, dbias, *dinputs


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def linear(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """layer(x), of a plain float32 `nn.Linear` on an x86 CPU by oneDNN."""
    if not _is_plain(layer, x) or not _onednn_is_faster(x, layer.weight):
        return layer(x)
    if torch.is_grad_enabled():
        return _Linear.apply(_identity, layer.weight, layer.bias, x)
    return _product(x, layer.weight, layer.bias)


def linear_of(function: Callable[..., torch.Tensor], layer: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """layer(function(*inputs)), in training without keeping what the function returned. It must be cheap and depend
    on nothing else that wants a gradient."""
    if not torch.is_grad_enabled() or not _is_plain(layer, inputs[0]):
        return joint_linear(function(*inputs), layer)[0]
    return _Linear.apply(function, layer.weight, layer.bias, *inputs)


class _Blocked(NamedTuple):
    """The weights of one or more layers of the same input, one below the other, in oneDNN's blocked layout."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    sizes: list[int]
    sources: list[tuple[nn.Module, str, torch.Tensor, int, int]]  # what the layers held, its version and address

    def is_current(self) -> bool:
        """Whether the layers still hold what was copied, and nothing wants to see them called."""
        return all(
            layer._parameters[name] is x
            and x._version == version
            and x.data_ptr() == address
            and not (layer._forward_hooks or layer._forward_pre_hooks)
            for layer, name, x, version, address in self.sources
        )


class _Decoding:
    """What belongs to one cache: how often it was continued, and blocked weights by the ids of their layers."""

    def __init__(self, model: nn.Module):
        size = sum(x.nbytes for x in model.parameters())
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        self.affordable = 4 * size < memory
        self.steps = 0
        self.blocked: dict[tuple[int, ...], _Blocked | None] = {}


_decodings: WeakKeyDictionary[Cache, _Decoding] = WeakKeyDictionary()
_current: ContextVar[_Decoding | None] = ContextVar("decoding", default=None)


@contextlib.contextmanager
def decoding(model: nn.Module, cache: Cache | None) -> Iterator[None]:
    """Around a forward pass that may continue from `cache`. From the 17th on, `joint_linear` computes products of a
    few rows from blocked copies of the weights, which repay themselves in 10 to 40 steps and live as long as the
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


def joint_linear(x: torch.Tensor, *layers: nn.Module) -> Sequence[torch.Tensor]:
    """What each of the linear layers makes of x (..., D): one product for all of them while decoding on a CPU."""
    if torch.compiler.is_compiling():
        return [layer(x) for layer in layers]
    state, rows = _current.get(), x.numel() // x.shape[-1]
    if state is None or rows > MAX_DECODING_ROWS or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return [linear(x, layer) for layer in layers]
    key = tuple(map(id, layers))
    if key not in state.blocked:
        state.blocked[key] = _block(x, layers, rows)
    blocked = state.blocked[key]
    if blocked is None or blocked.weight.dtype != x.dtype or not blocked.is_current():
        return [linear(x, layer) for layer in layers]
    return _product(x, blocked.weight, blocked.bias).split_with_sizes(blocked.sizes, dim=-1)


def _block(x: torch.Tensor, layers: Sequence[nn.Module], rows: int) -> _Blocked | None:
    """None if one of the layers is no plain one: adapted, quantized, sharded, offloaded or hooked."""
    if not x.is_cpu or not all(_is_plain(layer, x) for layer in layers):
        return None
    if x.dtype != torch.bfloat16 and (x.dtype != torch.float32 or (rows == 1 and len(layers) == 1)):
        return None
    weight, bias = torch.cat([layer.weight for layer in layers]), None
    if any(layer.bias is not None for layer in layers):
        bias = [weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
        bias = torch.cat(bias)
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    sources = [
        (layer, name, p, p._version, p.data_ptr())
        for layer in layers
        for name, p in layer._parameters.items()
        if p is not None
    ]
    return _Blocked(weight, bias, [len(layer.weight) for layer in layers], sources)


def _is_plain(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether a product with the layer's weight may stand for a call of the layer: it is no other class, has no hooks
    and no sharded or quantized weight, and neither autocast nor the compiler wants to see it."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return False
    weight = layer._parameters["weight"]
    return (
        type(weight) is nn.Parameter
        and weight.dtype == x.dtype
        and weight.device == x.device
        and "forward" not in vars(layer)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )
