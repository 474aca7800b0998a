"""The layers of xLSTM blocks: norms, the mLSTM and the sLSTM with their projections, the feed-forward layer.

Shapes: B batch, T time, D model width, H heads, K query/key and V value head dim.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from .cache import xLSTMCacheLayer
from .cells.numerics import gate_dtype
from .configuration_xlstm import xLSTMConfig
from .linear import joint_linear, recompute_linear
from .ops import mlstm, mlstm_step, slstm, slstm_step
from .pointwise import gated_head_norm, head_norm, rms_norm, soft_cap, swiglu


class xLSTMRMSNorm(nn.Module):
    """RMS norm, computed in float32 and cast back before the weight is applied."""

    def __init__(self, hidden_size: int, eps: float, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = rms_norm(x, self.weight, self.eps)
        return x if self.bias is None else x + self.bias


def local_slice(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """What tensor parallelism, which handles linear layers itself, leaves this process of another parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class xLSTMMultiHeadNorm(nn.Module):
    """Layer norm over each head, with one weight for all channels, and the output gate where there is one:
    (B, T, H, V) to (B, T, H V)."""

    def __init__(self, hidden_size: int, eps: float, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        self.eps = eps

    def forward(self, x: torch.Tensor, ogate: torch.Tensor | None = None) -> torch.Tensor:
        weight, bias = local_slice(self.weight), local_slice(self.bias)
        if ogate is not None and bias is None:
            return gated_head_norm(x, ogate, weight, self.eps)
        x = head_norm(x, self.eps) * weight
        x = x if bias is None else x + bias
        return x if ogate is None else torch.sigmoid(ogate) * x


class xLSTMPaperLayerNorm(nn.LayerNorm):
    """Layer norm with the factor 1 + weight and no bias. As an `nn.LayerNorm` it is spared Trainer's weight decay."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps=eps, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], 1 + self.weight, eps=self.eps)


class xLSTMPaperMultiHeadNorm(xLSTMPaperLayerNorm):
    """The same over each head, with one weight for all channels: (B, T, H, V) to (B, T, H V)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * (1 + self.weight)


class xLSTMFeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: xLSTMConfig):
        super().__init__()
        self.proj_up_gate = nn.Linear(config.hidden_size, config.ffn_dim, bias=config.use_bias)
        self.proj_up = nn.Linear(config.hidden_size, config.ffn_dim, bias=config.use_bias)
        self.proj_down = nn.Linear(config.ffn_dim, config.hidden_size, bias=config.use_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = joint_linear(x, self.proj_up_gate, self.proj_up)
        return recompute_linear(swiglu, self.proj_down, gate, up)


class xLSTMPaperFeedForward(nn.Module):
    """The paper's gated GELU; the activated half comes first in `proj_up`."""

    def __init__(self, config: xLSTMConfig):
        super().__init__()
        self.proj_up = nn.Linear(config.hidden_size, 2 * config.ffn_dim, bias=False)
        self.proj_down = nn.Linear(config.ffn_dim, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = joint_linear(x, self.proj_up)[0].chunk(2, dim=-1)
        return joint_linear(F.gelu(gate) * up, self.proj_down)[0]


def run_cell(
    sequence: Callable,
    step: Callable,
    inputs: tuple[torch.Tensor, ...],
    cache: xLSTMCacheLayer | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """Runs a cell over the new tokens, inputs (B, T, ...), from the cached state and back into it."""
    if cache is None:
        return sequence(*inputs, mask=mask, cu_seqlens=cu_seqlens)[0]
    state = cache.state
    if state is not None and mask is None and inputs[0].shape[1] == 1:
        inplace = not (torch.is_grad_enabled() or cache.record_past)
        h, state = step(*(x.squeeze(1) for x in inputs), state, inplace=inplace)
        h = h.unsqueeze(1)
    else:
        h, state = sequence(*inputs, initial_state=state, output_final_state=True, mask=mask, cu_seqlens=cu_seqlens)
    cache.update(state if cu_seqlens is None else tuple(x[-1:] for x in state))
    return h


class xLSTMmLSTMLayer(nn.Module):
    """The mLSTM with its projections, gates, head norm and output gate."""

    def __init__(self, config: xLSTMConfig):
        super().__init__()
        self.gate_soft_cap = config.gate_soft_cap
        self.qk_head_dim, self.v_head_dim = config.qk_head_dim, config.v_head_dim
        options = {"eps": config.eps, "backend": config.backend}
        self.sequence = partial(mlstm, chunk_size=config.chunk_size, **options)
        self.step = partial(mlstm_step, **options)

        hidden_size, bias = config.hidden_size, config.use_bias
        self.q = nn.Linear(hidden_size, config.qk_dim, bias=bias)
        self.k = nn.Linear(hidden_size, config.qk_dim, bias=bias)
        self.v = nn.Linear(hidden_size, config.v_dim, bias=bias)
        self.ogate_preact = nn.Linear(hidden_size, config.v_dim, bias=bias)
        self.igate_preact = nn.Linear(hidden_size, config.num_heads, bias=True)
        self.fgate_preact = nn.Linear(hidden_size, config.num_heads, bias=True)
        self.multihead_norm = xLSTMMultiHeadNorm(config.v_dim, eps=config.norm_eps, bias=bias)
        self.out_proj = nn.Linear(config.v_dim, hidden_size, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        cache: xLSTMCacheLayer | None = None,
        mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q, k, v, ogate, igate, fgate = joint_linear(
            x, self.q, self.k, self.v, self.ogate_preact, self.igate_preact, self.fgate_preact
        )
        gates = gate_dtype(q.dtype)
        inputs = (
            q.unflatten(-1, (-1, self.qk_head_dim)),
            k.unflatten(-1, (-1, self.qk_head_dim)),
            v.unflatten(-1, (-1, self.v_head_dim)),
            soft_cap(igate.to(gates), self.gate_soft_cap),
            soft_cap(fgate.to(gates), self.gate_soft_cap),
        )
        h = run_cell(self.sequence, self.step, inputs, cache, mask, cu_seqlens)
        return joint_linear(self.multihead_norm(h, ogate), self.out_proj)[0]


class xLSTMHeadwiseLinear(nn.Module):
    """One linear map per head: (B, T, H, D) to (B, T, H, D)."""

    def __init__(self, num_heads: int, head_dim: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))  # (H, D_out, D_in)
        self.bias = nn.Parameter(torch.empty(num_heads, head_dim)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("...hi,hoi->...ho", x, self.weight)
        return x if self.bias is None else x + self.bias


class xLSTMCausalConv(nn.Conv1d):
    """Depthwise causal convolution over time followed by SiLU, (B, T, D) to (B, T, D), inside packed documents and
    over the unmasked tokens only."""

    def __init__(self, hidden_size: int, kernel_size: int):
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        cache: xLSTMCacheLayer | None = None,
        mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch, length, past = *x.shape[:2], self.kernel_size[0] - 1
        if mask is not None:  # unmasked tokens first
            order = mask.logical_not().argsort(dim=1, stable=True)[..., None]
            x = x.gather(1, order.expand_as(x))
        state = None if cache is None else cache.conv_state
        history = x.new_zeros(batch, past, x.shape[-1]) if state is None else state.to(x.dtype)
        window = torch.cat([history, x], dim=1)
        document = None
        if cu_seqlens is not None:  # tap i of token t is token t + i - past, of the same document only
            document = torch.searchsorted(cu_seqlens[1:], torch.arange(length, device=x.device), right=True)
            document = F.pad(document, (past, 0), value=-1)
        out = 0 if self.bias is None else self.bias
        for i in range(past + 1):
            tap = window[:, i : i + length] * self.weight[:, 0, i]
            if document is not None:
                tap = tap * (document[i : i + length] == document[past:])[:, None]
            out = out + tap
        if cache is not None:
            last = torch.full((batch,), length, device=x.device) if mask is None else mask.sum(1)
            index = last[:, None] + torch.arange(past, device=x.device)
            tail = window.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
            if document is not None:
                tail = tail * (document[length:] == document[-1])[:, None]
            cache.update_conv_state(tail)
        if mask is not None:
            out = torch.zeros_like(out).scatter(1, order.expand_as(out), out)
        return F.silu(out)


class xLSTMPapermLSTMLayer(nn.Module):
    """The paper's mLSTM with projection before the cell (Beck et al. 2024, figure 11), in the inner width I:

    u, g = W_up x;   a = silu(conv(u))
    q, k = block-diagonal maps of a,   v = one of u;   gates = linear maps of [q; k; v]
    y = W_out((norm(mlstm(q, k, v, gates)) + skip * a) * silu(g))
    """

    def __init__(self, config: xLSTMConfig):
        super().__init__()
        inner, heads, bias = config.mlstm_inner_dim, config.num_heads, config.use_bias
        self.num_heads = heads
        self.block_size = config.qkv_block_size
        options = {"eps": config.eps, "backend": config.backend}
        self.sequence = partial(mlstm, chunk_size=config.chunk_size, **options)
        self.step = partial(mlstm_step, **options)

        self.proj_up = nn.Linear(config.hidden_size, 2 * inner, bias=bias)
        self.conv = xLSTMCausalConv(inner, config.mlstm_conv_kernel_size)
        self.q_proj = xLSTMHeadwiseLinear(inner // self.block_size, self.block_size, bias=bias)
        self.k_proj = xLSTMHeadwiseLinear(inner // self.block_size, self.block_size, bias=bias)
        self.v_proj = xLSTMHeadwiseLinear(inner // self.block_size, self.block_size, bias=bias)
        self.igate_preact = nn.Linear(3 * inner, heads, bias=True)
        self.fgate_preact = nn.Linear(3 * inner, heads, bias=True)
        self.multihead_norm = xLSTMPaperMultiHeadNorm(inner, eps=config.norm_eps)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        cache: xLSTMCacheLayer | None = None,
        mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        u, gate = joint_linear(x, self.proj_up)[0].chunk(2, dim=-1)
        conv = self.conv(u, cache, mask, cu_seqlens)
        u_blocks, conv_blocks = (y.unflatten(-1, (-1, self.block_size)) for y in (u, conv))
        qkv = [self.q_proj(conv_blocks), self.k_proj(conv_blocks), self.v_proj(u_blocks)]
        qkv = [y.flatten(-2) for y in qkv]
        gates = joint_linear(torch.cat(qkv, dim=-1), self.igate_preact, self.fgate_preact)
        inputs = (*(y.unflatten(-1, (self.num_heads, -1)) for y in qkv), *gates)
        h = self.multihead_norm(run_cell(self.sequence, self.step, inputs, cache, mask, cu_seqlens))
        return self.dropout(recompute_linear(swiglu, self.out_proj, gate, h + self.learnable_skip * conv))


class xLSTMsLSTMLayer(nn.Module):
    """The sLSTM with its gate maps, block-diagonal over heads, and head norm, in blocks of both families. The paper's
    layer has no output map either."""

    def __init__(self, config: xLSTMConfig):
        super().__init__()
        heads, head_dim = config.slstm_num_heads or config.num_heads, config.slstm_head_dim
        self.head_dim = head_dim
        self.backend = config.backend
        kernel_size = config.slstm_conv_kernel_size
        self.conv = xLSTMCausalConv(config.hidden_size, kernel_size) if kernel_size > 0 else None
        self.igate = xLSTMHeadwiseLinear(heads, head_dim)
        self.fgate = xLSTMHeadwiseLinear(heads, head_dim)
        self.zgate = xLSTMHeadwiseLinear(heads, head_dim)
        self.ogate = xLSTMHeadwiseLinear(heads, head_dim)
        self.recurrent_weight = nn.Parameter(torch.empty(4, heads, head_dim, head_dim))  # gates i, f, z, o
        self.bias = nn.Parameter(torch.empty(4, heads, head_dim))
        self.dropout = nn.Dropout(config.dropout)
        if config.block_family == "paper":
            self.multihead_norm = xLSTMPaperMultiHeadNorm(config.hidden_size, eps=config.norm_eps)
        else:
            eps = config.norm_eps if config.slstm_norm_eps is None else config.slstm_norm_eps
            self.multihead_norm = xLSTMMultiHeadNorm(config.hidden_size, eps=eps, bias=config.use_bias)

    def forward(
        self,
        x: torch.Tensor,
        cache: xLSTMCacheLayer | None = None,
        mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        gate_x = x if self.conv is None else self.conv(x, cache, mask, cu_seqlens)
        x, gate_x = (y.unflatten(-1, (-1, self.head_dim)) for y in (x, gate_x))
        gates = torch.stack([self.igate(gate_x), self.fgate(gate_x), self.zgate(x), self.ogate(x)], dim=2)

        def sequence(gates: torch.Tensor, **kwargs):
            return slstm(gates, self.recurrent_weight, self.bias, backend=self.backend, **kwargs)

        def step(gates: torch.Tensor, state: tuple[torch.Tensor, ...], inplace: bool):
            return slstm_step(gates, self.recurrent_weight, self.bias, state, inplace=inplace, backend=self.backend)

        return self.multihead_norm(self.dropout(run_cell(sequence, step, (gates,), cache, mask, cu_seqlens)))
