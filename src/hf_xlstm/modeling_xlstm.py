"""xLSTM (Beck et al. 2024): stacks of mLSTM and sLSTM blocks in the residual frame of xLSTM-7B.

    x = x + cell(norm(x));   x = x + ffn(norm(x))

The parameters of mLSTM blocks have the names of Transformers' own xLSTM and of NX-AI/xLSTM-7b.
Shapes: B batch, T time, D model width, H heads, K query/key and V value head dim.
"""

import math
import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from .cache_xlstm import xLSTMCache, xLSTMCacheLayer
from .configuration_xlstm import xLSTMConfig
from .linear import decoding, joint_linear, linear_of
from .ops import mlstm, mlstm_step, slstm, slstm_step
from .ops.mlstm_reference import gate_dtype
from .ops.pointwise import cross_entropy, gated_head_norm, head_norm, rms_norm, soft_cap, swiglu


logger = logging.get_logger(__name__)

# for peft's LoraConfig(target_modules=...): the large maps of every block, not the gates of the cells
LORA_TARGET_MODULES = ["q", "k", "v", "ogate_preact", "out_proj", "proj_up_gate", "proj_up", "proj_down"]


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


class xLSTMFeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: xLSTMConfig):
        super().__init__()
        self.proj_up_gate = nn.Linear(config.hidden_size, config.ffn_dim, bias=config.use_bias)
        self.proj_up = nn.Linear(config.hidden_size, config.ffn_dim, bias=config.use_bias)
        self.proj_down = nn.Linear(config.ffn_dim, config.hidden_size, bias=config.use_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = joint_linear(x, self.proj_up_gate, self.proj_up)
        return linear_of(swiglu, self.proj_down, gate, up)


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
    """One linear map per head, without bias: (B, T, H, D) to (B, T, H, D)."""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))  # (H, D_out, D_in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...hi,hoi->...ho", x, self.weight)


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


class xLSTMsLSTMLayer(nn.Module):
    """The sLSTM with its gate maps, block-diagonal over heads, and head norm. The paper's layer has no output map."""

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
        self.multihead_norm = xLSTMMultiHeadNorm(config.hidden_size, eps=config.norm_eps, bias=config.use_bias)

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

        return self.multihead_norm(run_cell(sequence, step, (gates,), cache, mask, cu_seqlens))


class xLSTMBlock(GradientCheckpointingLayer):
    def __init__(self, config: xLSTMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.layer_type = config.layers_block_type[layer_idx]
        norm = partial(xLSTMRMSNorm, config.hidden_size, eps=config.norm_eps, bias=config.use_bias)
        if self.layer_type == "mlstm":
            self.norm_mlstm = norm()
            self.mlstm_layer = xLSTMmLSTMLayer(config)
        else:
            self.norm_slstm = norm()
            self.slstm_layer = xLSTMsLSTMLayer(config)
        self.norm_ffn = norm()
        self.ffn = xLSTMFeedForward(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: xLSTMCache | None = None,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        norm, layer = (
            (self.norm_mlstm, self.mlstm_layer) if self.layer_type == "mlstm" else (self.norm_slstm, self.slstm_layer)
        )
        x = norm(hidden_states)
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if cache is not None and cache.record_past:
            cache.record(layer, x, attention_mask)
        hidden_states = hidden_states + layer(x, cache=cache, mask=attention_mask, cu_seqlens=cu_seqlens)
        return hidden_states + self.ffn(self.norm_ffn(hidden_states))


def split_fused_weights(files: list[str], config: xLSTMConfig) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint with `weight_mode="fused"`, under the names of the separate ones."""
    sizes = {
        "qkv_opreact": ([config.qk_dim] * 2 + [config.v_dim] * 2, ["q", "k", "v", "ogate_preact"]),
        "ifgate_preact": ([config.num_heads] * 2, ["igate_preact", "fgate_preact"]),
        "proj_up_gate_z": ([config.ffn_dim] * 2, ["proj_up_gate", "proj_up"]),
    }
    weights = {}
    for file in files:
        for name, weight in load_file(file).items():
            module, _, kind = name.rpartition(".")
            parent, _, leaf = module.rpartition(".")
            if leaf in sizes:
                lengths, leaves = sizes[leaf]
                weights |= {f"{parent}.{x}.{kind}": w for x, w in zip(leaves, weight.split(lengths), strict=True)}
            else:
                weights[name] = weight
    return weights


class xLSTMPreTrainedModel(PreTrainedModel):
    config: xLSTMConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["xLSTMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": xLSTMBlock}

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        kwargs.setdefault("use_safetensors", True)  # never a pickle, unless asked for
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        if self._auto_class is None:  # else this is code that came with a checkpoint, which Transformers copies itself
            from .hub import save_code

            save_code(self, save_directory)
        super().save_pretrained(save_directory, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Splits fused weights, and refuses a checkpoint that does not fit: nothing starts at random unseen."""
        if checkpoint_files and model.config.weight_mode == "fused":
            state_dict = split_fused_weights(checkpoint_files, model.config)
            model.config.weight_mode = "single"
        load = PreTrainedModel._load_pretrained_model
        try:
            result = load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"The checkpoint cannot be read, a file is damaged or cut off: {error}.") from error
        if checkpoint_files:
            info = result[0]
            mismatched = [] if load_config.ignore_mismatched_sizes else [name for name, *_ in info.mismatched_keys]
            problems = {
                "lacks": info.missing_keys,
                # what one stage of a pipeline does not know belongs to another
                "has unknown": [] if hasattr(model, "_pp_stage") else info.unexpected_keys,
                "has misshapen": mismatched,
            }
            for problem, names in problems.items():
                # heads may come and go: a backbone can be loaded with a new one, or without the one it has
                body = sorted(n for n in names if re.match(r"(backbone\.)?(embeddings|blocks|out_norm)\.", n))
                if body:
                    raise ValueError(f"The checkpoint {problem} weights of {type(model).__name__}: {', '.join(body)}.")
        return result

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside Transformers it would pass over modules that hold no parameter themselves; ours initialise
        # those of their children, through functions that leave loaded parameters alone.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The initialisation xLSTM-7B was trained from; called for every module after its children."""
        config = self.config
        small = math.sqrt(2 / (5 * config.hidden_size))
        residual = 2 / (config.num_hidden_layers * math.sqrt(config.hidden_size))
        if isinstance(module, xLSTMCausalConv):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding, xLSTMHeadwiseLinear)):
            init.normal_(module.weight, std=small)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (xLSTMRMSNorm, xLSTMMultiHeadNorm)):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, xLSTMFeedForward):
            init.normal_(module.proj_down.weight, std=residual)
        elif isinstance(module, xLSTMmLSTMLayer):
            init.normal_(module.out_proj.weight, std=residual)
            init.zeros_(module.ogate_preact.weight)
            init.zeros_(module.igate_preact.weight)
            init.constant_(module.igate_preact.bias, -10.0)
            init.zeros_(module.fgate_preact.weight)
            init.copy_(module.fgate_preact.bias, torch.linspace(3.0, 6.0, module.fgate_preact.bias.shape[0]))
        elif isinstance(module, xLSTMBlock) and module.layer_type == "slstm":
            layer = module.slstm_layer
            if config.slstm_recurrent_init == "zeros":
                init.zeros_(layer.recurrent_weight)
            else:
                bound = 1 / math.sqrt(config.hidden_size)
                init.uniform_(layer.recurrent_weight, -bound, bound)
            # forget gates from +5 to -7 along each head: power-law time scales, longer in deeper blocks
            depth = module.layer_idx / max(config.num_hidden_layers - 1, 1)
            unit = torch.arange(layer.head_dim) / max(layer.head_dim - 1, 1)
            bias = torch.zeros(layer.bias.shape)
            bias[1] = 5 - 12 * unit ** (0.3 + 1.3 * depth)
            init.copy_(layer.bias, bias)


class xLSTMModel(xLSTMPreTrainedModel):
    def __init__(self, config: xLSTMConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([xLSTMBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.out_norm = xLSTMRMSNorm(config.hidden_size, eps=config.norm_eps) if config.add_out_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    @property
    def layers(self) -> nn.ModuleList:
        return self.blocks

    def __setattr__(self, name: str, value) -> None:
        # Pipeline parallelism replaces the parts that other ranks own, by the names they have in most models.
        super().__setattr__({"embed_tokens": "embeddings", "norm": "out_norm"}.get(name, name), value)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: xLSTMCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache_params: xLSTMCache | None = None,
        seq_idx: torch.IntTensor | None = None,
        cu_seq_lens_q: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (B, T) or inputs_embeds (B, T, D): exactly one of them.
            attention_mask (B, T): 0 for padding, left, right or anywhere: such a step leaves the state untouched. With
                `past_key_values` also (B, T_past + T).
            past_key_values: the state to continue from; it is updated in place. `cache_params` is an alias.
            use_cache: return the state after the last token. By default `config.use_cache`, and `False` in training.
            seq_idx (B, T), cu_seq_lens_q (N + 1,), position_ids (B, T): packed documents, told by the document number
                of every token, by the bounds in the flattened batch, or by positions that start anew. They do not see
                each other. Positions are not used otherwise.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `input_ids` and `inputs_embeds`.")
        if past_key_values is not None and cache_params is not None:
            raise ValueError("`cache_params` is an alias of `past_key_values`: pass only one of them.")
        past_key_values = cache_params if past_key_values is None else past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            if use_cache:
                logger.warning_once("`use_cache=True` is incompatible with gradient checkpointing: it is off.")
            use_cache = False
            if past_key_values is not None:
                raise ValueError("Gradient checkpointing cannot continue `past_key_values`: switch one of them off.")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings(input_ids)
        batch_size, length = inputs_embeds.shape[:2]
        if length == 0:
            raise ValueError("The input has no tokens.")

        cu_seqlens = packed_bounds(seq_idx, cu_seq_lens_q, position_ids, attention_mask, inputs_embeds)
        if cu_seqlens is not None:
            if past_key_values is not None:
                raise ValueError("Packed sequences start anew: they cannot continue `past_key_values`.")
            use_cache = False
            attention_mask = None if attention_mask is None else attention_mask.reshape(1, -1)
            inputs_embeds = inputs_embeds.reshape(1, batch_size * length, -1)
        if past_key_values is not None:
            if not isinstance(past_key_values, xLSTMCache):
                raise ValueError(f"`past_key_values` must be an xLSTMCache, got {type(past_key_values).__name__}.")
            if not torch.compiler.is_compiling():
                past_key_values.check(self.config, batch_size)
        elif use_cache:
            past_key_values = xLSTMCache(self.config)

        mask = padding_mask(attention_mask, *inputs_embeds.shape[:2])
        hidden_states = self.out_norm(self._run_blocks(inputs_embeds, past_key_values, mask, cu_seqlens))
        if past_key_values is not None:
            past_key_values.advance(length, hidden_states.device)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states.reshape(batch_size, length, -1), past_key_values=past_key_values
        )

    def _run_blocks(
        self,
        hidden_states: torch.Tensor,
        past_key_values: xLSTMCache | None,
        mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        """All blocks over all tokens; without gradients over a piece of a long sequence at a time, to bound memory."""
        length, size = hidden_states.shape[1], self.config.max_inference_chunksize
        if length > size and cu_seqlens is None and not torch.is_grad_enabled():
            cache = xLSTMCache(self.config) if past_key_values is None else past_key_values
            pieces = [
                self._run_blocks(
                    hidden_states[:, i : i + size], cache, None if mask is None else mask[:, i : i + size], None
                )
                for i in range(0, length, size)
            ]
            return torch.cat(pieces, dim=1)
        for block in self.blocks:
            hidden_states = block(
                hidden_states, past_key_values=past_key_values, attention_mask=mask, cu_seqlens=cu_seqlens
            )
        return hidden_states


def padding_mask(attention_mask: torch.Tensor | None, batch_size: int, length: int) -> torch.Tensor | None:
    """The mask (B, T) bool of the new tokens, from one that may include past ones; None if none of them is padding."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < length:
        raise ValueError(
            f"`attention_mask` must have shape (B, T) = {(batch_size, length)}, or more columns for past tokens, got "
            f"{tuple(attention_mask.shape)}."
        )
    mask = attention_mask[:, attention_mask.shape[1] - length :].bool()
    return None if not torch.compiler.is_compiling() and mask.all() else mask


def packed_bounds(
    seq_idx: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
) -> torch.Tensor | None:
    """The bounds (N + 1,) of packed documents in the flattened batch, or None if nothing is packed."""
    batch_size, length = inputs_embeds.shape[:2]
    for name, x in (("seq_idx", seq_idx), ("position_ids", position_ids)):
        if x is not None and tuple(x.shape) not in ((batch_size, length), (1, length)):
            raise ValueError(f"`{name}` must have shape (B, T) = {(batch_size, length)}, got {tuple(x.shape)}.")
    if cu_seq_lens is not None:
        return cu_seq_lens
    if seq_idx is not None:
        starts = seq_idx[:, 1:] != seq_idx[:, :-1]
    elif position_ids is not None and attention_mask is None and length > 1 and not torch.compiler.is_compiling():
        starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if not starts.any():
            return None
    else:
        return None
    starts = F.pad(starts.expand(batch_size, -1), (1, 0), value=True).flatten()
    return F.pad(starts.nonzero().squeeze(1), (0, 1), value=starts.shape[0])


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.LongTensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.LongTensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Transformers' `ForCausalLMLoss` in less memory."""
    if shift_labels is None:
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    shift_labels = shift_labels.flatten().to(logits.device)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return cross_entropy(logits.view(-1, vocab_size), shift_labels, ignore_index) / num_items_in_batch


class xLSTMForCausalLM(xLSTMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: xLSTMConfig):
        super().__init__(config)
        self.backbone = xLSTMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: xLSTMCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels (B, T): tokens to predict, usually `input_ids`; they are shifted inside, and -100 is ignored.
            logits_to_keep: compute logits (float32, in a float64 model float64) only for that many last tokens, or for
                these positions; 0 for all.

        The other arguments, also `cache_params`, `seq_idx` and `cu_seq_lens_q`, are those of `xLSTMModel`.
        """
        with decoding(self, kwargs.get("cache_params") if past_key_values is None else past_key_values):
            outputs = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            (logits,) = joint_linear(outputs.last_hidden_state[:, keep], self.lm_head)
        logits = soft_cap(logits.to(gate_dtype(logits.dtype)), self.config.output_logit_soft_cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, *args) -> None:
        """The cache is always the recurrent one; `cache_implementation` decides whether to compile for it."""
        if model_kwargs.get("past_key_values") is not None or not generation_config.use_cache:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, *args)
            return
        cache = model_kwargs["past_key_values"] = xLSTMCache(self.config)
        cache.is_compileable = "static" in (generation_config.cache_implementation or "")
        if generation_config.is_assistant:
            cache.activate_past_recording()
        compiles_prefill = generation_config.prefill_chunk_size and self._valid_auto_compile_criteria(
            model_kwargs, generation_config
        )
        if compiles_prefill:
            # a masked token allocates the states of every layer and leaves them empty, so that the first chunk finds
            # a state like the later ones and needs no graph of its own
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            masked = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
            self.backbone(masked, attention_mask=masked, past_key_values=cache)
            cache.advance(-1, self.device)

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs) -> dict:
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        inputs.pop("position_ids", None)  # of no use to a recurrent model, and reason to recompile
        return inputs

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs) -> torch.Tensor | None:
        # outside of compiled code, so that an unpadded step gets no mask there
        return padding_mask(attention_mask, *inputs_embeds.shape[:2])


# The mixins take their backbone from AutoModel: where this file came with a checkpoint, that of Transformers. Hence
# these classes skip the `__init__` of their mixin.


class xLSTMForSequenceClassification(GenericForSequenceClassification, xLSTMPreTrainedModel):
    base_model_prefix = "backbone"

    def __init__(self, config: xLSTMConfig):
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.backbone = xLSTMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class xLSTMForTokenClassification(GenericForTokenClassification, xLSTMPreTrainedModel):
    base_model_prefix = "backbone"

    def __init__(self, config: xLSTMConfig):
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.backbone = xLSTMModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class xLSTMForQuestionAnswering(GenericForQuestionAnswering, xLSTMPreTrainedModel):
    base_model_prefix = "backbone"

    def __init__(self, config: xLSTMConfig):
        super(GenericForQuestionAnswering, self).__init__(config)
        self.backbone = xLSTMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)


__all__ = [
    "LORA_TARGET_MODULES",
    "xLSTMForCausalLM",
    "xLSTMForQuestionAnswering",
    "xLSTMForSequenceClassification",
    "xLSTMForTokenClassification",
    "xLSTMModel",
    "xLSTMPreTrainedModel",
]
