"""xLSTM (Beck et al. 2024): stacks of mLSTM and sLSTM blocks in the residual frame of xLSTM-7B.

    x = x + cell(norm(x));   x = x + ffn(norm(x))

and, with `block_family="paper"`, the blocks of the xLSTM paper, where those of the mLSTM have no ffn. The parameters
of the former's mLSTM blocks have the names of Transformers' own xLSTM and of NX-AI/xLSTM-7b.
Shapes: B batch, T time, D model width, H heads, K query/key and V value head dim.
"""

import math
import re
from functools import partial

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
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

from .cache import xLSTMCache
from .cells.numerics import gate_dtype, is_readable
from .configuration_xlstm import xLSTMConfig
from .formats.weights import Layout, weights_from_theirs
from .layers import (
    xLSTMCausalConv,
    xLSTMFeedForward,
    xLSTMHeadwiseLinear,
    xLSTMmLSTMLayer,
    xLSTMMultiHeadNorm,
    xLSTMPaperFeedForward,
    xLSTMPaperLayerNorm,
    xLSTMPapermLSTMLayer,
    xLSTMRMSNorm,
    xLSTMsLSTMLayer,
)
from .linear import decoding, joint_linear
from .pointwise import cross_entropy, soft_cap


logger = logging.get_logger(__name__)

# for peft's LoraConfig(target_modules=...): the large maps of every block, not the gates of the cells
LORA_TARGET_MODULES = ["q", "k", "v", "ogate_preact", "out_proj", "proj_up_gate", "proj_up", "proj_down"]


def make_norm(config: xLSTMConfig, bias: bool = False) -> nn.Module:
    """A norm of the residual stream."""
    if config.block_family == "paper":
        return xLSTMPaperLayerNorm(config.hidden_size, eps=config.norm_eps)
    return xLSTMRMSNorm(config.hidden_size, eps=config.norm_eps, bias=bias)


class xLSTMBlock(GradientCheckpointingLayer):
    def __init__(self, config: xLSTMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.layer_type = config.layers_block_type[layer_idx]
        paper = config.block_family == "paper"
        norm = partial(make_norm, config, bias=config.use_bias)
        if self.layer_type == "mlstm":
            self.norm_mlstm = norm()
            self.mlstm_layer = xLSTMPapermLSTMLayer(config) if paper else xLSTMmLSTMLayer(config)
        else:
            self.norm_slstm = norm()
            self.slstm_layer = xLSTMsLSTMLayer(config)
        self.ffn = None
        if self.layer_type == "slstm" or not paper:
            self.norm_ffn = norm()
            self.ffn = xLSTMPaperFeedForward(config) if paper else xLSTMFeedForward(config)

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
        return hidden_states if self.ffn is None else hidden_states + self.ffn(self.norm_ffn(hidden_states))


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
        """Converts the layouts of other implementations, and refuses a checkpoint that does not fit: nothing starts at
        random unseen."""
        load = PreTrainedModel._load_pretrained_model
        model.config.weight_mode = "single"
        try:
            if state_dict is None and checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
                state_dict = model._weights_from_theirs(checkpoint_files)
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

    def _weights_from_theirs(self, checkpoint_files: list[str]) -> dict[str, torch.Tensor] | None:
        """The checkpoint under our names, or None if these are the names it has."""
        names = []
        for path in checkpoint_files:
            with safe_open(path, framework="pt") as file:
                names += file.keys()
        if Layout.of(names) == Layout("hf_xlstm"):
            return None
        weights = {name: x for path in checkpoint_files for name, x in load_file(path).items()}
        names = list(self.state_dict()) if hasattr(self, "backbone") else [f"backbone.{x}" for x in self.state_dict()]
        names = {name for name in names if name.startswith(("backbone.", "lm_head.")) or name in weights}
        if "lm_head.weight" in weights:  # also for a model without it, which drops it afterwards
            names.add("lm_head.weight")
        return weights_from_theirs(weights, names, self.config)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside Transformers it would pass over modules that hold no parameter themselves; ours initialise
        # those of their children, through functions that leave loaded parameters alone.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The initialisation xLSTM-7B, or the paper's models, were trained from; called for every module after its
        children."""
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
        elif isinstance(module, xLSTMPaperLayerNorm):
            init.zeros_(module.weight)
        elif isinstance(module, (xLSTMFeedForward, xLSTMPaperFeedForward)):
            init.normal_(module.proj_down.weight, std=residual)
        elif isinstance(module, xLSTMPapermLSTMLayer):
            init.normal_(module.out_proj.weight, std=residual)
            init.ones_(module.learnable_skip)
            init.zeros_(module.igate_preact.weight)
            init.normal_(module.igate_preact.bias, std=0.1)
            init.zeros_(module.fgate_preact.weight)
            init.copy_(module.fgate_preact.bias, torch.linspace(3.0, 6.0, config.num_heads))
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
        self.out_norm = make_norm(config) if config.add_out_norm else nn.Identity()
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
    return None if is_readable(mask) and mask.all() else mask


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

    def adjust_generation_fn(self, *args, **kwargs) -> None:
        try:
            super().adjust_generation_fn(*args, **kwargs)
        except (OSError, TypeError):
            # Of a checkpoint with `config.yaml` Transformers finds neither generation_config.json nor config.json; the
            # model already has what follows from its configuration.
            logger.info("There is no generation configuration.")

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
