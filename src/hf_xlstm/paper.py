"""The blocks of the xLSTM paper and of the `xlstm` package (`block_family="paper"`): an mLSTM with projection before
the cell and no feed-forward layer, and an sLSTM followed by a gated GELU (Beck et al. 2024, figures 10 and 11).

Shapes: B batch, T time, D model width, I inner width of the mLSTM, H heads, V value head dim.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .cache import xLSTMCacheLayer
from .configuration_xlstm import xLSTMConfig
from .layers import CausalConv, HeadwiseLinear, SLSTMLayer, cell_options, residual_std
from .linear import joint_linear, recompute_linear
from .ops import mlstm
from .pointwise import swiglu


class PaperLayerNorm(nn.LayerNorm):
    """Layer norm with the factor 1 + weight and no bias. As an `nn.LayerNorm` it is spared Trainer's weight decay."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps=eps, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def initialize(self, config: xLSTMConfig) -> None:
        init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], 1 + self.weight, eps=self.eps)


class PaperMultiHeadNorm(PaperLayerNorm):
    """`PaperLayerNorm` over each head, with one weight for all channels: (B, T, H, V) to (B, T, H V)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * (1 + self.weight)


class PaperFeedForward(nn.Module):
    """The paper's gated GELU, W_down (gelu(g) * u) with [g; u] = W_up x."""

    def __init__(self, config: xLSTMConfig):
        super().__init__()
        self.proj_up = nn.Linear(config.hidden_size, 2 * config.ffn_dim, bias=False)
        self.proj_down = nn.Linear(config.ffn_dim, config.hidden_size, bias=False)

    def initialize(self, config: xLSTMConfig) -> None:
        init.normal_(self.proj_down.weight, std=residual_std(config))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = joint_linear(x, self.proj_up)[0].chunk(2, dim=-1)
        return joint_linear(F.gelu(gate) * up, self.proj_down)[0]


class PaperMLSTMLayer(nn.Module):
    """The paper's mLSTM with projection before the cell (Beck et al. 2024, figure 11), in the inner width I:

    u, g = W_up x;   a = silu(conv(u))
    q, k = block-diagonal maps of a,   v = one of u;   gates = linear maps of [q; k; v]
    y = W_out((norm(mlstm(q, k, v, gates)) + skip * a) * silu(g))
    """

    def __init__(self, config: xLSTMConfig):
        super().__init__()
        inner, heads, bias = config.v_dim, config.num_heads, config.use_bias
        self.num_heads = heads
        self.block_size = config.qkv_block_size
        self.eps, self.chunk_size, self.backend = config.eps, config.chunk_size, config.backend

        self.proj_up = nn.Linear(config.hidden_size, 2 * inner, bias=bias)
        self.conv = CausalConv(inner, config.mlstm_conv_kernel_size)
        self.q_proj = HeadwiseLinear(inner // self.block_size, self.block_size, bias=bias)
        self.k_proj = HeadwiseLinear(inner // self.block_size, self.block_size, bias=bias)
        self.v_proj = HeadwiseLinear(inner // self.block_size, self.block_size, bias=bias)
        self.igate_preact = nn.Linear(3 * inner, heads, bias=True)
        self.fgate_preact = nn.Linear(3 * inner, heads, bias=True)
        self.multihead_norm = PaperMultiHeadNorm(inner, eps=config.norm_eps)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def initialize(self, config: xLSTMConfig) -> None:
        """Gates start independent of the input, forget gates from sigmoid(3) to sigmoid(6) over the heads (as in the
        `xlstm` package)."""
        init.normal_(self.out_proj.weight, std=residual_std(config))
        init.ones_(self.learnable_skip)
        init.zeros_(self.igate_preact.weight)
        init.normal_(self.igate_preact.bias, std=0.1)
        init.zeros_(self.fgate_preact.weight)
        init.copy_(self.fgate_preact.bias, torch.linspace(3.0, 6.0, config.num_heads))

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
        h, state = mlstm(
            *(y.unflatten(-1, (self.num_heads, -1)) for y in qkv),  # (B, T, H, V)
            *gates,  # (B, T, H)
            **cell_options(cache, mask, cu_seqlens),
            eps=self.eps,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        if cache is not None:
            cache.update(state)
        return self.dropout(
            recompute_linear(swiglu, self.out_proj, gate, self.multihead_norm(h) + self.learnable_skip * conv)
        )


def add_paper_layers(block: nn.Module, config: xLSTMConfig) -> None:
    """Gives a residual block its norms and layers: an mLSTM alone, or an sLSTM and a feed-forward layer."""
    if block.layer_type == "mlstm":
        block.norm_mlstm = PaperLayerNorm(config.hidden_size, eps=config.norm_eps)
        block.mlstm_layer = PaperMLSTMLayer(config)
        block.ffn = None
    else:
        block.norm_slstm = PaperLayerNorm(config.hidden_size, eps=config.norm_eps)
        head_norm = PaperMultiHeadNorm(config.hidden_size, eps=config.norm_eps)
        block.slstm_layer = SLSTMLayer(config, block.layer_idx, head_norm)
        block.norm_ffn = PaperLayerNorm(config.hidden_size, eps=config.norm_eps)
        block.ffn = PaperFeedForward(config)
