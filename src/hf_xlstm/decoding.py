"""A step of decoding by a block of the family of xLSTM-7B, without its modules.

On a CPU one token of a small model takes less time in matrix products than between them, in operations on small
tensors and in Python: the calls, attributes and checks of a block's modules. `block_step` does what these do for one
token of each sequence, by the same functions in the same order. As in linear.py it stands for the calls only where
nobody can tell the difference.

It gathers the tensors that a step computes with, and gives them to `mlstm_step` or `slstm_step`. These know no
modules, so that after `pack_for_decoding(compile=True)` they can be compiled: once, for all blocks with the same cell.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .cache import xLSTMCache, xLSTMCacheLayer
from .cells.dispatch import implementation
from .cells.numerics import gate_dtype
from .layers import (
    CausalConv,
    FeedForward,
    HeadwiseLinear,
    MLSTMLayer,
    MultiHeadNorm,
    RMSNorm,
    SLSTMLayer,
    causal_conv,
    headwise_linear,
)
from .linear import PackedWeights, is_unhooked, packed_product
from .pointwise import gated_head_norm, head_norm, rms_norm, soft_cap, swiglu
from .versions import minor


logger = logging.get_logger(__name__)

# The modules of a block, and what each call of one does unless someone replaces it.
FORWARD: dict[type[nn.Module], Callable] = {
    module: module.forward
    for module in (CausalConv, FeedForward, HeadwiseLinear, MLSTMLayer, MultiHeadNorm, RMSNorm, SLSTMLayer, nn.Dropout)
}
# Where the hooks come from by which Transformers records hidden states. They stay when they are not needed any more.
RECORDER = "transformers.utils.output_capturing"

# Those whose bias the steps leave out.
BIASED = HeadwiseLinear, MultiHeadNorm, RMSNorm

Product = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias, of layers with the same input
Norm = tuple[torch.Tensor, float]  # weight and epsilon


def block_step(block: Any, x: torch.Tensor, cache: xLSTMCacheLayer) -> torch.Tensor | None:
    """The output (B, 1, D) of a block for x (B, 1, D), which continues the state in `cache` and updates it in place;
    None where the modules must be called."""
    gathered = _gather(block, x, cache)
    if gathered is None:
        return None
    step, inputs = gathered
    return step(x, *inputs)


def compiled_step(model: Any, x: torch.Tensor, cache: xLSTMCache, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The output (B, 1, D) of all blocks of an `xLSTMModel` by compiled code, after `pack_for_decoding(compile=True)`;
    None without, or where the blocks must be called."""
    packed: PackedWeights | None = vars(model).get("packed_weights")
    if packed is None or not packed.compiled or not packed.is_in_step(x) or cache.layers[0].state is None:
        return None
    gathered = []
    for block in model.blocks:
        inputs = _gather(block, x, cache.layers[block.layer_idx]) if mask is None and _is_bare_block(block) else None
        if inputs is None:
            logger.warning_once(
                "A step of decoding is not compiled: gradients, a mask, a hook, a replaced or quantised layer, "
                "more than 64 sequences or speculation forbid it."
            )
            return None
        gathered.append(inputs)
    return _compiled_stack()(x, gathered)


@functools.cache
def _compiled_stack() -> Callable:
    """A function of x and of what `_gather` returns for every block. TorchInductor compiles the code of each kind of
    block once. It looks at no sizes and strides, since a prepacked weight has none."""
    # before PyTorch 2.13 a region forgets what is written by `out=`: there every block is compiled
    nested = torch.compiler.nested_compile_region if minor(torch.__version__) >= (2, 13) else lambda step: step
    regions = {step: nested(step) for step in (mlstm_step, slstm_step)}

    def stack(x: torch.Tensor, gathered: list[tuple[Callable, tuple]]) -> torch.Tensor:
        for step, inputs in gathered:
            x = regions[step](x, *inputs)
        return x

    return torch.compile(stack, options={"size_asserts": False})


def mlstm_step(
    x: torch.Tensor,
    state: tuple[torch.Tensor, ...],
    norm: Norm,
    inputs: Product,
    cap: float | None,
    cell: Callable,
    eps: float,
    heads: Norm,
    out: Product,
    ffn: tuple[Norm, Product, Product],
) -> torch.Tensor:
    """As the modules of an mLSTM block, with W_q, W_k, W_v, W_o, W_i and W_f one below the other in `inputs`."""
    B, H, K, V = state[0].shape
    y = packed_product(rms_norm(x, *norm), *inputs)
    q, k, v, ogate, gates = y.split_with_sizes([H * K, H * K, H * V, H * V, 2 * H], dim=-1)
    igate, fgate = soft_cap(gates.to(gate_dtype(x.dtype)), cap).view(B, 2, H).unbind(1)
    q, k, v = q.view(B, H, K), k.view(B, H, K), v.view(B, H, V)
    h, _ = cell(q, k, v, igate, fgate, state, scale=K**-0.5, eps=eps, inplace=True)
    return _feed_forward(x + packed_product(gated_head_norm(h.unsqueeze(1), ogate, *heads), *out), *ffn)


def slstm_step(
    x: torch.Tensor,
    state: tuple[torch.Tensor, ...],
    norm: Norm,
    conv: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    inputs: tuple[torch.Tensor, ...],
    recurrent: tuple[torch.Tensor, torch.Tensor],
    cell: Callable,
    heads: Norm,
    ffn: tuple[Norm, Product, Product],
) -> torch.Tensor:
    """As the modules of an sLSTM block, with W_i, W_f, W_z and W_o in `inputs`. `conv` has the last inputs of the
    convolution, which are updated in place, its weight and bias."""
    B, H, D = state[0].shape
    y = gate_y = rms_norm(x, *norm)
    if conv is not None:
        history, weight, bias = conv
        window = torch.cat([history, y], dim=1)
        gate_y = causal_conv(window, weight, bias)
        history.copy_(window[:, 1:])
    y, gate_y = y.view(B, H, D), gate_y.view(B, H, D)
    gates = torch.stack([headwise_linear(a, w) for a, w in zip((gate_y, gate_y, y, y), inputs, strict=True)], dim=1)
    h, _ = cell(gates, *recurrent, state, inplace=True)
    weight, eps = heads
    return _feed_forward(x + head_norm(h.unsqueeze(1), eps) * weight, *ffn)


def _feed_forward(x: torch.Tensor, norm: Norm, up: Product, down: Product) -> torch.Tensor:
    gate, value = packed_product(rms_norm(x, *norm), *up).chunk(2, dim=-1)
    return x + packed_product(swiglu(gate, value), *down)


def _gather(block: Any, x: torch.Tensor, cache: xLSTMCacheLayer) -> tuple[Callable, tuple] | None:
    """The step of a block and its inputs beside x; None where the modules must be called."""
    ffn = block.ffn
    if type(ffn) is not FeedForward or x.shape[1] != 1 or not cache.writes_in_place:
        return None
    packed: PackedWeights | None = vars(ffn.proj_up).get("packed_weights")
    if packed is None or not packed.is_in_step(x) or not _are_bare(ffn, block.norm_ffn):
        return None
    gathered = (
        _gather_mlstm(block, x, cache, packed) if block.layer_type == "mlstm" else _gather_slstm(block, x, cache)
    )
    if gathered is None:
        return None
    up, down = packed.find(x, (ffn.proj_up_gate, ffn.proj_up)), packed.find(x, (ffn.proj_down,))
    if up is None or down is None:
        return None
    step, *inputs = gathered
    return step, (*inputs, (_norm(block.norm_ffn), up[:2], down[:2]))


# Each of these two returns a step and its inputs without those of the feed-forward layer.


def _gather_mlstm(block: Any, x: torch.Tensor, cache: xLSTMCacheLayer, packed: PackedWeights) -> tuple | None:
    layer, norm = block.mlstm_layer, block.norm_mlstm
    if not _are_bare(layer, norm) or not _are_bare(heads := layer.multihead_norm):
        return None
    B, H, K, V = len(x), len(heads.weight) // layer.v_head_dim, layer.qk_head_dim, layer.v_head_dim
    state = _state(cache, x, (B, H, K, V), (B, H, K), (B, H))
    inputs = packed.find(x, (layer.q, layer.k, layer.v, layer.ogate_preact, layer.igate_preact, layer.fgate_preact))
    out = packed.find(x, (layer.out_proj,))
    if state is None or inputs is None or out is None:
        return None
    c, n, _ = state
    cell = implementation("mlstm_step", layer.backend, n, c)
    gates = inputs[:2], layer.gate_soft_cap
    return mlstm_step, state, _norm(norm), *gates, cell, layer.eps, _norm(heads), out[:2]


def _gather_slstm(block: Any, x: torch.Tensor, cache: xLSTMCacheLayer) -> tuple | None:
    layer, norm, conv = block.slstm_layer, block.norm_slstm, None
    if not _are_bare(layer, norm):
        return None
    heads, gates = layer.multihead_norm, (layer.igate, layer.fgate, layer.zgate, layer.ogate)
    if not _are_bare(heads, *gates, layer.dropout) or layer.dropout.training:
        return None
    state = _state(cache, x, *[(len(x), *layer.bias.shape[1:])] * 4)
    if state is None:
        return None
    if layer.conv is not None:
        history = cache.conv_state
        if not _are_bare(layer.conv) or history is None or history.dtype != x.dtype or len(history) != len(x):
            return None
        conv = history, layer.conv.weight, layer.conv.bias
    recurrent = layer.recurrent_weight, layer.bias
    cell = implementation("slstm_step", layer.backend, state[0])
    return slstm_step, state, _norm(norm), conv, tuple(gate.weight for gate in gates), recurrent, cell, _norm(heads)


def _state(cache: xLSTMCacheLayer, x: torch.Tensor, *sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...] | None:
    """The state if it is one that continues with x; the modules say what is wrong with another one."""
    state, dtype = cache.state, gate_dtype(x.dtype)
    if state is None or any(s.shape != size or s.dtype != dtype for s, size in zip(state, sizes, strict=True)):
        return None
    return state


def _is_bare_block(block: nn.Module) -> bool:
    """`_are_bare` of a block whose hidden states nobody wants."""
    own = block.__dict__
    if own["_forward_hooks"] and all(hook.__module__ == RECORDER for hook in own["_forward_hooks"].values()):
        own = own | {"_forward_hooks": {}}
    return FORWARD.get(type(block)) is type(block).forward and is_unhooked(own)


def _norm(norm: Any) -> Norm:
    return norm.weight, norm.eps


def _are_bare(*modules: nn.Module) -> bool:
    """Whether a call of each of these modules of a block does what its class does, and nothing else. A norm or a map
    with a bias does more than the steps do."""
    for module in modules:
        kind, own = type(module), module.__dict__
        if FORWARD.get(kind) is not kind.forward or not is_unhooked(own):
            return False
        if kind in BIASED and not own.get("bias") is own["_parameters"].get("bias") is None:
            return False
    return True
