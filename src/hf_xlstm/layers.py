"""The layers of xLSTM blocks: norms, the mLSTM and the sLSTM with their projections, the feed-forward layer.

Every layer maps x (B, T, D) to (B, T, D). `initialize` sets the weights that training starts from; for linear maps
that a layer does not name there, `xLSTMPreTrainedModel._init_weights` has the rule.

Shapes: B batch, T time, D model width, H heads, K query/key and V value head dim.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import initialization as init

from .cache import xLSTMCacheLayer
from .cells.numerics import gate_dtype
from .configuration_xlstm import xLSTMConfig
from .linear import joint_linear, recompute_linear
from .ops import mlstm, slstm
from .pointwise import gated_head_norm, head_norm, rms_norm, soft_cap, swiglu


class RMSNorm(nn.LayerNorm):
    """RMS norm, computed in float32 and cast back before the weight is applied. As an `nn.LayerNorm` it is spared
    Trainer's weight decay."""

    def __init__(self, hidden_size: int, eps: float, bias: bool = False):
        super().__init__(hidden_size, eps=eps, bias=bias)

    def initialize(self, config: xLSTMConfig) -> None:
        init_norm(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = rms_norm(x, self.weight, self.eps)
        return x if self.bias is None else x + self.bias


def init_norm(norm: nn.Module) -> None:
    """Weight 1 and bias 0."""
    init.ones_(norm.weight)
    if norm.bias is not None:
        init.zeros_(norm.bias)


def residual_std(config: xLSTMConfig) -> float:
    """Standard deviation of the maps that add to the residual stream, 2 / (blocks sqrt(D)) (Beck et al. 2025, xLSTM
    7B, from Wang and Komatsuzaki 2021)."""
    return 2 / (config.num_hidden_layers * math.sqrt(config.hidden_size))


def local_slice(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """What tensor parallelism, which handles linear layers itself, leaves this process of another parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class MultiHeadNorm(nn.Module):
    """Layer norm over each head, with one weight for all channels, and the output gate where there is one:
    (B, T, H, V) to (B, T, H V)."""

    def __init__(self, hidden_size: int, eps: float, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        self.eps = eps

    def initialize(self, config: xLSTMConfig) -> None:
        init_norm(self)

    def forward(self, x: torch.Tensor, ogate: torch.Tensor | None = None) -> torch.Tensor:
        weight, bias = local_slice(self.weight), local_slice(self.bias)
        if ogate is not None and bias is None:
            return gated_head_norm(x, ogate, weight, self.eps)
        x = head_norm(x, self.eps) * weight
        x = x if bias is None else x + bias
        return x if ogate is None else torch.sigmoid(ogate) * x


class FeedForward(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, config: xLSTMConfig):
        super().__init__()
        self.proj_up_gate = nn.Linear(config.hidden_size, config.ffn_dim, bias=config.use_bias)
        self.proj_up = nn.Linear(config.hidden_size, config.ffn_dim, bias=config.use_bias)
        self.proj_down = nn.Linear(config.ffn_dim, config.hidden_size, bias=config.use_bias)

    def initialize(self, config: xLSTMConfig) -> None:
        init.normal_(self.proj_down.weight, std=residual_std(config))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = joint_linear(x, self.proj_up_gate, self.proj_up)
        return recompute_linear(swiglu, self.proj_down, gate, up)


def cell_options(
    cache: xLSTMCacheLayer | None, mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> dict[str, Any]:
    """What the operators of both cells take of the cached state, padding and packing."""
    if cache is None:
        return {"mask": mask, "cu_seqlens": cu_seqlens}
    state = cache.state
    inplace = state is not None and cache.writes_in_place
    return {"mask": mask, "initial_state": state, "output_final_state": True, "inplace": inplace}


class MLSTMLayer(nn.Module):
    """The mLSTM of xLSTM-7B with its projections, gates, head norm and output gate:

    q, k, v = W_q x, W_k x, W_v x;   i, f = cap(W_i x + b_i), cap(W_f x + b_f);   o = sigmoid(W_o x)
    y = W_out (o * norm(mlstm(q, k, v, i, f)))         with cap(a) = c tanh(a / c), c = `gate_soft_cap`
    """

    def __init__(self, config: xLSTMConfig):
        super().__init__()
        self.gate_soft_cap = config.gate_soft_cap
        self.qk_head_dim, self.v_head_dim = config.qk_head_dim, config.v_head_dim
        self.eps, self.chunk_size, self.backend = config.eps, config.chunk_size, config.backend

        hidden_size, bias = config.hidden_size, config.use_bias
        self.q = nn.Linear(hidden_size, config.qk_dim, bias=bias)
        self.k = nn.Linear(hidden_size, config.qk_dim, bias=bias)
        self.v = nn.Linear(hidden_size, config.v_dim, bias=bias)
        self.ogate_preact = nn.Linear(hidden_size, config.v_dim, bias=bias)
        self.igate_preact = nn.Linear(hidden_size, config.num_heads, bias=True)
        self.fgate_preact = nn.Linear(hidden_size, config.num_heads, bias=True)
        self.multihead_norm = MultiHeadNorm(config.v_dim, eps=config.norm_eps, bias=bias)
        self.out_proj = nn.Linear(config.v_dim, hidden_size, bias=bias)

    def initialize(self, config: xLSTMConfig) -> None:
        """Gates start independent of the input: input gates nearly closed, forget gates from sigmoid(3) to sigmoid(6)
        over the heads (Beck et al. 2025, xLSTM 7B)."""
        init.normal_(self.out_proj.weight, std=residual_std(config))
        for gate in (self.ogate_preact, self.igate_preact, self.fgate_preact):
            init.zeros_(gate.weight)
        init.constant_(self.igate_preact.bias, -10.0)
        init.copy_(self.fgate_preact.bias, torch.linspace(3.0, 6.0, self.fgate_preact.bias.shape[0]))

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
        h, state = mlstm(
            torch.unflatten(q, -1, (-1, self.qk_head_dim)),  # (B, T, H, K)
            torch.unflatten(k, -1, (-1, self.qk_head_dim)),
            torch.unflatten(v, -1, (-1, self.v_head_dim)),  # (B, T, H, V)
            soft_cap(igate.to(gates), self.gate_soft_cap),  # (B, T, H)
            soft_cap(fgate.to(gates), self.gate_soft_cap),
            **cell_options(cache, mask, cu_seqlens),
            eps=self.eps,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        if cache is not None:
            cache.update(state)
        norm = self.multihead_norm
        # whoever hooks a layer, as Opacus does for the gradients of each row, expects that it has one input
        h = torch.sigmoid(ogate) * norm(h) if norm._forward_hooks else norm(h, ogate)
        return joint_linear(h, self.out_proj)[0]


class HeadwiseLinear(nn.Module):
    """One linear map per head: (B, T, H, D) to (B, T, H, D)."""

    def __init__(self, num_heads: int, head_dim: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))  # (H, D_out, D_in)
        self.bias = nn.Parameter(torch.empty(num_heads, head_dim)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = headwise_linear(x, self.weight)
        return x if self.bias is None else x + self.bias


def headwise_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., H, D_in) and weight (H, D_out, D_in) to (..., H, D_out)."""
    return torch.einsum("...hi,hoi->...ho", x, weight)


class CausalConv(nn.Conv1d):
    """Depthwise causal convolution over time followed by SiLU, (B, T, D) to (B, T, D):

    y_t = silu(b + sum_i w_i x_{t + i - (k - 1)})

    over the unmasked tokens of a row, or of a packed document, as if the others were absent. What the
    cache holds stands before the first, else zeros. The output at a masked token has no meaning.
    """

    def __init__(self, hidden_size: int, kernel_size: int):
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size)

    def initialize(self, config: xLSTMConfig) -> None:
        self.reset_parameters()

    def forward(
        self,
        x: torch.Tensor,
        cache: xLSTMCacheLayer | None = None,
        mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        place = None
        if mask is not None:  # unmasked tokens first; no sort, which not everything that runs an exported graph knows
            kept, others = mask.long(), (~mask).long()
            place = torch.where(mask, kept.cumsum(1), kept.sum(1, keepdim=True) + others.cumsum(1)) - 1  # (B, T)
            x = torch.zeros_like(x).scatter(1, place[..., None].expand_as(x), x)
        state = None if cache is None else cache.conv_state
        history = x.new_zeros(x.shape[0], self.kernel_size[0] - 1, x.shape[-1]) if state is None else state.to(x.dtype)
        window = torch.cat([history, x], dim=1)  # (B, k - 1 + T, D)
        documents = None if cu_seqlens is None else documents_of_tokens(cu_seqlens, place, x)
        y = causal_conv(window, self.weight, self.bias, documents)
        if cache is not None:
            cache.update_conv_state(self._last_inputs(window, mask))
        return y if place is None else y.gather(1, place[..., None].expand_as(y))

    def _last_inputs(self, window: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The last k - 1 unmasked inputs (B, k - 1, D), which the next token still needs."""
        past = self.kernel_size[0] - 1
        if mask is None:
            return window[:, window.shape[1] - past :]
        index = mask.sum(1)[:, None] + torch.arange(past, device=window.device)
        return window.gather(1, index[..., None].expand(-1, -1, window.shape[-1]))


def causal_conv(
    window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """y (B, T, D) of `CausalConv` from window (B, k - 1 + T, D); `documents` (T,) keeps the taps inside a document."""
    past = weight.shape[-1] - 1
    length = window.shape[1] - past
    if documents is not None:
        before = F.pad(documents, (past, 0), value=-1)
    y = 0 if bias is None else bias
    for i in range(past + 1):
        tap = window[:, i : i + length] * weight[:, 0, i]
        if documents is not None:
            tap = tap * (before[i : i + length] == documents)[:, None]
        y = y + tap
    return F.silu(y)


def documents_of_tokens(cu_seqlens: torch.Tensor, place: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The number (T,) of the packed document of each token of the one row x (1, T, D), whose tokens have been moved to
    `place` (1, T)."""
    documents = torch.searchsorted(cu_seqlens[1:], torch.arange(x.shape[1], device=x.device), right=True)
    return documents if place is None else torch.zeros_like(documents).scatter(0, place[0], documents)


class SLSTMLayer(nn.Module):
    """The sLSTM with its gate maps, block-diagonal over heads, and head norm, in blocks of both families:

    a = silu(conv(x)), or x where there is no convolution;   i, f = W_i a, W_f a;   z, o = W_z x, W_o x
    y = norm(slstm([i, f, z, o], R, b))

    R and b, the recurrent weights and biases of the gates, belong to the cell. There is no output map.

    Args:
        layer_idx: number of the block, on which the initial forget gates depend.
        multihead_norm: the norm over heads, that of the block's family.
    """

    def __init__(self, config: xLSTMConfig, layer_idx: int, multihead_norm: nn.Module):
        super().__init__()
        heads, head_dim = config.slstm_num_heads or config.num_heads, config.slstm_head_dim
        self.layer_idx = layer_idx
        self.head_dim = head_dim
        self.backend = config.backend
        kernel_size = config.slstm_conv_kernel_size
        self.conv = CausalConv(config.hidden_size, kernel_size) if kernel_size > 0 else None
        self.igate = HeadwiseLinear(heads, head_dim)
        self.fgate = HeadwiseLinear(heads, head_dim)
        self.zgate = HeadwiseLinear(heads, head_dim)
        self.ogate = HeadwiseLinear(heads, head_dim)
        self.recurrent_weight = nn.Parameter(torch.empty(4, heads, head_dim, head_dim))  # gates i, f, z, o
        self.bias = nn.Parameter(torch.empty(4, heads, head_dim))
        self.dropout = nn.Dropout(config.dropout)
        self.multihead_norm = multihead_norm

    def initialize(self, config: xLSTMConfig) -> None:
        """Forget gates from +5 to -7 along each head, which makes power-law time scales, longer in deeper blocks (as
        in the `xlstm` package)."""
        if config.slstm_recurrent_init == "zeros":
            init.zeros_(self.recurrent_weight)
        else:
            bound = 1 / math.sqrt(config.hidden_size)
            init.uniform_(self.recurrent_weight, -bound, bound)
        depth = self.layer_idx / max(config.num_hidden_layers - 1, 1)
        unit = torch.arange(self.head_dim) / max(self.head_dim - 1, 1)
        bias = torch.zeros(self.bias.shape)
        bias[1] = 5 - 12 * unit ** (0.3 + 1.3 * depth)
        init.copy_(self.bias, bias)

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
        h, state = slstm(
            gates,  # (B, T, 4, H, D)
            self.recurrent_weight,
            self.bias,
            **cell_options(cache, mask, cu_seqlens),
            backend=self.backend,
        )
        if cache is not None:
            cache.update(state)
        return self.multihead_norm(self.dropout(h))
