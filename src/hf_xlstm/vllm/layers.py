"""The layers of xLSTM blocks on vLLM's linear layers; norms and cells are those of this package.

Shapes: T tokens of the whole batch, D model width, I inner width, H heads of this rank, K query/key and V value head
dim, R requests that decode, N that prefill.
"""

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from .. import layers as native
from ..cells.numerics import gate_dtype
from ..layers import MultiHeadNorm
from ..ops import mlstm, mlstm_step, slstm, slstm_step
from ..paper import PaperMultiHeadNorm
from ..pointwise import soft_cap, swiglu
from .states import StatefulLayer, Tensors, sharded


class CausalConv(native.CausalConv):
    """The depthwise convolution and SiLU on tokens of many requests, (T, D) to (T, D). Its state are the last inputs,
    (..., taps - 1, D)."""

    def __init__(self, width: int, taps: int):
        super().__init__(width, taps)
        sharded(self.weight)
        sharded(self.bias)
        self.past = taps - 1

    def over_window(self, window: torch.Tensor) -> torch.Tensor:
        """(..., taps - 1 + L, D) to (..., L, D)"""
        length = window.shape[-2] - self.past
        out = self.bias
        for i in range(self.past + 1):
            out = out + window[..., i : i + length, :] * self.weight[:, 0, i]
        return F.silu(out)

    def sequence(self, inputs: Tensors, state: Tensors | None, bounds: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """All requests in one window, each behind the last inputs of its own past."""
        (x,), (requests, past) = inputs, (len(bounds) - 1, self.past)
        history = x.new_zeros(requests, past, x.shape[-1]) if state is None else state[0].to(x.dtype)
        bounds, number = bounds.long(), torch.arange(requests, device=x.device)
        token, tap = (torch.arange(n, device=x.device) for n in (len(x), past))
        place = token + (torch.searchsorted(bounds[1:], token, right=True) + 1) * past
        window = x.new_empty(len(x) + requests * past, x.shape[-1])
        window[place] = x
        window[(bounds[:-1] + number * past)[:, None] + tap] = history
        # The outputs between two requests, of windows that lie in both, are left out.
        return self.over_window(window)[place - past], (window[(bounds[1:] + number * past)[:, None] + tap],)

    def step(self, inputs: Tensors, pools: Tensors, slots: torch.Tensor) -> torch.Tensor:
        (x,), (pool,) = inputs, pools
        slots = slots.clamp_min(0)  # padding: vLLM's null block, which nobody reads
        window = torch.cat([pool[slots].to(x.dtype), x[:, None]], dim=1)
        pool[slots] = window[:, 1:].to(pool.dtype)
        return self.over_window(window).squeeze(1)


class HeadwiseLinear(native.HeadwiseLinear):
    """One linear map per head, or per block of another size, this rank's heads."""

    def __init__(self, num_heads: int, head_dim: int, bias: bool = False):
        super().__init__(num_heads // get_tensor_model_parallel_world_size(), head_dim, bias)
        for parameter in self.parameters():
            sharded(parameter)


class MLSTMCell(StatefulLayer):
    """What the mLSTM layers of both block families have in common."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__(vllm_config, "mlstm", prefix)
        config = vllm_config.model_config.hf_config
        self.options = {"eps": config.eps, "backend": config.backend}
        self.chunk_size = config.chunk_size

    def sequence(self, inputs: Tensors, state: Tensors | None, bounds: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        h, state = mlstm(
            *(x[None] for x in inputs),
            initial_state=state,
            output_final_state=True,
            cu_seqlens=bounds,
            chunk_size=self.chunk_size,
            **self.options,
        )
        return h[0], state

    def step(self, inputs: Tensors, pools: Tensors, slots: torch.Tensor) -> torch.Tensor:
        return mlstm_step(*inputs, pools, inplace=True, state_indices=slots, **self.options)[0]


class MLSTMLayer(MLSTMCell):
    """The mLSTM of xLSTM-7B's blocks, heads over ranks."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__(vllm_config, prefix)
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        width, bias = config.hidden_size, config.use_bias
        self.gate_soft_cap = config.gate_soft_cap
        self.head_dims = (config.qk_head_dim, config.qk_head_dim, config.v_head_dim)
        widths = [config.qk_dim, config.qk_dim, config.v_dim, config.v_dim]
        self.widths = [n // self.tp_size for n in widths]
        self.qkvo = MergedColumnParallelLinear(
            width, widths, bias=bias, quant_config=quant_config, prefix=f"{prefix}.qkvo"
        )
        self.gates = MergedColumnParallelLinear(width, [config.num_heads] * 2, bias=True, prefix=f"{prefix}.gates")
        self.multihead_norm = MultiHeadNorm(self.widths[-1], eps=config.norm_eps, bias=bias)
        for parameter in self.multihead_norm.parameters():
            sharded(parameter)
        self.out_proj = RowParallelLinear(
            config.v_dim, width, bias=bias, quant_config=quant_config, prefix=f"{prefix}.out_proj"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *qkv, ogate = self.qkvo(x)[0].split(self.widths, dim=-1)
        gates = self.gates(x)[0]
        gates = soft_cap(gates.to(gate_dtype(gates.dtype)), self.gate_soft_cap).chunk(2, dim=-1)
        qkv = (y.unflatten(-1, (-1, dim)) for y, dim in zip(qkv, self.head_dims))
        h = self.over_batch(self, (*qkv, *gates), self.cell_state)
        return self.out_proj(self.multihead_norm(h, ogate))[0]


class QKVGate(nn.Module):
    """A gate of the paper's mLSTM, one linear map of [q; k; v] to a number per head. Each rank has the columns of its
    heads, and the sum over ranks is still to be taken."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, 3, width // get_tensor_model_parallel_world_size()))
        self.bias = nn.Parameter(torch.empty(heads))
        sharded(self.weight, dim=2)
        load = self.weight.weight_loader
        self.weight.weight_loader = lambda parameter, weight: load(parameter, weight.unflatten(1, (3, -1)))

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        return F.linear(qkv, self.weight.flatten(1))


class PaperMLSTMLayer(MLSTMCell):
    """The paper's mLSTM, heads over ranks. The convolution and the maps to q, k and v stay within a head's channels;
    only the gates, linear maps of all of q, k and v, need a sum over ranks."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__(vllm_config, prefix)
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        inner, bias, size = config.mlstm_inner_dim, config.use_bias, config.qkv_block_size
        if inner // self.tp_size % size:
            raise ValueError(
                f"tensor_parallel_size must leave every rank whole blocks of the query, key and value maps: "
                f"mlstm_inner_dim is {inner}, qkv_block_size {size}, got {self.tp_size}."
            )
        self.block_size = size
        self.heads = config.num_heads // self.tp_size
        self.proj_up = MergedColumnParallelLinear(
            config.hidden_size, [inner] * 2, bias=bias, quant_config=quant_config, prefix=f"{prefix}.proj_up"
        )
        self.conv = CausalConv(inner // self.tp_size, config.mlstm_conv_kernel_size)
        self.q_proj, self.k_proj, self.v_proj = (HeadwiseLinear(inner // size, size, bias) for _ in range(3))
        self.igate_preact, self.fgate_preact = (QKVGate(inner, config.num_heads) for _ in range(2))
        self.multihead_norm = PaperMultiHeadNorm(inner // self.tp_size, eps=config.norm_eps)
        sharded(self.multihead_norm.weight)
        self.learnable_skip = nn.Parameter(torch.empty(inner // self.tp_size))
        sharded(self.learnable_skip)
        self.out_proj = RowParallelLinear(
            inner, config.hidden_size, bias=bias, quant_config=quant_config, prefix=f"{prefix}.out_proj"
        )
        self.rank = get_tensor_model_parallel_rank()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, gate = self.proj_up(x)[0].chunk(2, dim=-1)
        conv = self.convolve(u)
        u_blocks, conv_blocks = (y.unflatten(-1, (-1, self.block_size)) for y in (u, conv))
        qkv = [self.q_proj(conv_blocks), self.k_proj(conv_blocks), self.v_proj(u_blocks)]
        qkv = [y.flatten(-2) for y in qkv]
        inputs = (*(y.unflatten(-1, (self.heads, -1)) for y in qkv), *self.gates(torch.cat(qkv, dim=-1)))
        h = self.over_batch(self, inputs, self.cell_state)
        return self.out_proj(swiglu(gate, self.multihead_norm(h) + self.learnable_skip * conv))[0]

    def gates(self, qkv: torch.Tensor) -> Tensors:
        """igate, fgate (T, H) of this rank's heads."""
        gates = torch.cat([self.igate_preact(qkv), self.fgate_preact(qkv)], dim=-1)
        if self.tp_size > 1:
            gates = tensor_model_parallel_all_reduce(gates)
        gates = gates + torch.cat([self.igate_preact.bias, self.fgate_preact.bias])
        return tuple(y.chunk(self.tp_size, dim=-1)[self.rank] for y in gates.chunk(2, dim=-1))


class SLSTMLayer(StatefulLayer):
    """The sLSTM in blocks of both families, heads over ranks. It has no output map, so what it returns is gathered."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__(vllm_config, "slstm", prefix)
        config = vllm_config.model_config.hf_config
        heads, dim = config.slstm_num_heads or config.num_heads, config.slstm_head_dim
        width, taps = config.hidden_size // self.tp_size, config.slstm_conv_kernel_size
        self.dim, self.backend = dim, config.backend
        self.conv = CausalConv(width, taps) if taps else None
        self.igate, self.fgate, self.zgate, self.ogate = (HeadwiseLinear(heads, dim) for _ in range(4))
        self.recurrent_weight = nn.Parameter(torch.empty(4, heads // self.tp_size, dim, dim))
        self.bias = nn.Parameter(torch.empty(4, heads // self.tp_size, dim))
        sharded(self.recurrent_weight, dim=1)
        sharded(self.bias, dim=1)
        if config.block_family == "paper":
            self.multihead_norm = PaperMultiHeadNorm(width, eps=config.norm_eps)
        else:
            eps = config.norm_eps if config.slstm_norm_eps is None else config.slstm_norm_eps
            self.multihead_norm = MultiHeadNorm(width, eps=eps, bias=config.use_bias)
        for parameter in self.multihead_norm.parameters():
            sharded(parameter)
        self.rank = get_tensor_model_parallel_rank()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.chunk(self.tp_size, dim=-1)[self.rank]
        gate_x = x if self.conv is None else self.convolve(x)
        x, gate_x = (y.unflatten(-1, (-1, self.dim)) for y in (x, gate_x))
        gates = torch.stack([self.igate(gate_x), self.fgate(gate_x), self.zgate(x), self.ogate(x)], dim=1)
        x = self.multihead_norm(self.over_batch(self, (gates,), self.cell_state))
        return tensor_model_parallel_all_gather(x) if self.tp_size > 1 else x

    def sequence(self, inputs: Tensors, state: Tensors | None, bounds: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        h, state = slstm(
            inputs[0][None],
            self.recurrent_weight,
            self.bias,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=bounds,
            backend=self.backend,
        )
        return h[0], state

    def step(self, inputs: Tensors, pools: Tensors, slots: torch.Tensor) -> torch.Tensor:
        weights, options = (self.recurrent_weight, self.bias), {"inplace": True, "state_indices": slots}
        return slstm_step(*inputs, *weights, pools, backend=self.backend, **options)[0]


class FeedForward(nn.Module):
    """SwiGLU, in the blocks of xLSTM-7B."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        options = {"bias": config.use_bias, "quant_config": vllm_config.quant_config}
        self.gate_up = MergedColumnParallelLinear(
            config.hidden_size, [config.ffn_dim] * 2, prefix=f"{prefix}.gate_up", **options
        )
        self.proj_down = RowParallelLinear(config.ffn_dim, config.hidden_size, prefix=f"{prefix}.proj_down", **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x)[0].chunk(2, dim=-1)
        return self.proj_down(swiglu(gate, up))[0]


class PaperFeedForward(nn.Module):
    """The paper's gated GELU; the activated half comes first in `proj_up`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        options = {"bias": False, "quant_config": vllm_config.quant_config}
        self.proj_up = MergedColumnParallelLinear(
            config.hidden_size, [config.ffn_dim] * 2, prefix=f"{prefix}.proj_up", **options
        )
        self.proj_down = RowParallelLinear(config.ffn_dim, config.hidden_size, prefix=f"{prefix}.proj_down", **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.proj_up(x)[0].chunk(2, dim=-1)
        return self.proj_down(F.gelu(gate) * up)[0]
