"""A step of decoding by a block, without its modules.

On a CPU one token of a small model takes less time in matrix products than between them, in operations on small
tensors and in Python: the calls, attributes and checks of a block's modules. `mlstm_block_step` does what these do for
one token of each sequence, by the same functions in the same order. As in linear.py it stands for the calls only where
nobody can tell the difference.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .cache import xLSTMCacheLayer
from .cells.dispatch import implementation
from .cells.numerics import gate_dtype
from .layers import FeedForward, MLSTMLayer, MultiHeadNorm, RMSNorm
from .linear import PackedWeights
from .pointwise import gated_head_norm, rms_norm, soft_cap, swiglu


# The modules of a block, and what each call of one does unless someone replaces it.
FORWARD: dict[type[nn.Module], Callable] = {
    module: module.forward for module in (FeedForward, MLSTMLayer, MultiHeadNorm, RMSNorm)
}


def mlstm_block_step(block: Any, x: torch.Tensor, cache: xLSTMCacheLayer) -> torch.Tensor | None:
    """The output (B, 1, D) of an mLSTM block of xLSTM-7B for x (B, 1, D), which continues the state in `cache` and
    updates it in place; None where the modules must be called."""
    layer, ffn = getattr(block, "mlstm_layer", None), block.ffn
    if type(layer) is not MLSTMLayer or x.shape[1] != 1 or not cache.writes_in_place:
        return None
    packed: PackedWeights | None = vars(layer.q).get("packed_weights")
    norm, norm_ffn, head_norm, state = block.norm_mlstm, block.norm_ffn, layer.multihead_norm, cache.state
    if packed is None or not packed.is_in_step(x) or not norm.bias is norm_ffn.bias is head_norm.bias is None:
        return None
    if not all(map(_is_bare, (layer, ffn, norm, norm_ffn, head_norm))):
        return None
    B, K, V = x.shape[0], layer.qk_head_dim, layer.v_head_dim
    H = head_norm.weight.shape[0] // V
    sizes, dtype = ((B, H, K, V), (B, H, K), (B, H)), gate_dtype(x.dtype)
    if state is None or any(s.shape != size or s.dtype != dtype for s, size in zip(state, sizes)):
        return None
    inputs = layer.q, layer.k, layer.v, layer.ogate_preact, layer.igate_preact, layer.fgate_preact
    joint, out = packed.find(x, inputs), packed.find(x, (layer.out_proj,))
    up, down = packed.find(x, (ffn.proj_up_gate, ffn.proj_up)), packed.find(x, (ffn.proj_down,))
    if joint is None or out is None or up is None or down is None:
        return None

    y = joint.product(rms_norm(x, norm.weight, norm.eps))
    q, k, v, ogate, gates = y.split_with_sizes([H * K, H * K, H * V, H * V, 2 * H], dim=-1)
    gates = soft_cap(gates.to(dtype), layer.gate_soft_cap)
    q, k, v = q.view(B, H, K), k.view(B, H, K), v.view(B, H, V)
    igate, fgate = gates.view(B, 2, H).unbind(1)
    step = implementation("mlstm_step", layer.backend, q, v)
    h, _ = step(q, k, v, igate, fgate, state, scale=K**-0.5, eps=layer.eps, inplace=True)
    x = x + out.product(gated_head_norm(h.unsqueeze(1), ogate, head_norm.weight, head_norm.eps))
    gate, value = up.product(rms_norm(x, norm_ffn.weight, norm_ffn.eps)).split_with_sizes(up.sizes, dim=-1)
    return x + down.product(swiglu(gate, value))


def _is_bare(module: nn.Module) -> bool:
    """Whether a call of this module of a block does what its class does, and nothing else."""
    kind, own = type(module), module.__dict__
    return FORWARD.get(kind) is kind.forward and not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
