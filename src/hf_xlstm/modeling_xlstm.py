"""xLSTM (Beck et al. 2024): stacks of mLSTM and sLSTM blocks in the residual frame of xLSTM-7B,

    x = x + cell(norm(x));   x = x + ffn(norm(x))

or, with `block_family="paper"`, the blocks of the xLSTM paper (paper.py), where mLSTM blocks have no ffn. Those of
the first frame name their parameters as Transformers' own xLSTM and NX-AI/xLSTM-7b do.
Shapes: B batch, T time, D model width, H heads, K query/key and V value head dim.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from .cache import xLSTMCache
from .cells.numerics import gate_dtype, is_readable
from .configuration_xlstm import xLSTMConfig
from .decoding import FORWARD, block_step, compiled_step
from .integration import (
    CACHE_NAME,
    CausalLMOutput,
    LoadingMixin,
    ModelOutput,
    RecurrentGenerationMixin,
    SequenceClassifierOutput,
    one_cache,
    refuse_split_sequence,
    refuse_unknown,
    refuse_with_opacus,
    with_cache_name,
)
from .layers import FeedForward, HeadwiseLinear, MLSTMLayer, MultiHeadNorm, RMSNorm, SLSTMLayer
from .linear import PackedWeightsMixin, joint_linear
from .paper import PaperLayerNorm, add_paper_layers
from .pointwise import mean_cross_entropy, soft_cap


logger = logging.get_logger(__name__)

# for peft's LoraConfig(target_modules=...): the large maps of every block, not the gates of the cells
LORA_TARGET_MODULES = ["q", "k", "v", "ogate_preact", "out_proj", "proj_up_gate", "proj_up", "proj_down"]


class xLSTMBlock(GradientCheckpointingLayer):
    """A residual block around a cell: x = x + cell(norm(x)), then x = x + ffn(norm(x)) where it has an ffn.

    Args:
        config: the configuration; `config.layers_block_type[layer_idx]` says which cell.
        layer_idx: number of the block.
    """

    def __init__(self, config: xLSTMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.layer_type = config.layers_block_type[layer_idx]
        if config.block_family == "paper":
            add_paper_layers(self, config)
            return
        hidden_size, bias = config.hidden_size, config.use_bias
        if self.layer_type == "mlstm":
            self.norm_mlstm = RMSNorm(hidden_size, eps=config.norm_eps, bias=bias)
            self.mlstm_layer = MLSTMLayer(config)
        else:
            self.norm_slstm = RMSNorm(hidden_size, eps=config.norm_eps, bias=bias)
            eps = config.norm_eps if config.slstm_norm_eps is None else config.slstm_norm_eps
            self.slstm_layer = SLSTMLayer(config, layer_idx, MultiHeadNorm(hidden_size, eps=eps, bias=bias))
        self.norm_ffn = RMSNorm(hidden_size, eps=config.norm_eps, bias=bias)
        self.ffn = FeedForward(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: xLSTMCache | None = None,
        mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, T, D), mask (B, T) bool; returns (B, T, D). Bounds cu_seqlens (N + 1,) are those of the
        flattened batch, and so is then the mask (1, B T)."""
        layer_cache = None if cache is None else cache.layers[self.layer_idx]
        if layer_cache is not None and mask is None and not torch.compiler.is_compiling():
            output = block_step(self, hidden_states, layer_cache)
            if output is not None:
                return output
        if self.layer_type == "mlstm":
            norm, layer = self.norm_mlstm, self.mlstm_layer
        else:
            norm, layer = self.norm_slstm, self.slstm_layer
        if hasattr(layer, "ft_compute_sample_grad"):
            refuse_with_opacus(mask, cu_seqlens)
        x = norm(hidden_states)
        if layer_cache is not None and layer_cache.record_past:
            layer_cache.record(layer, x, mask)
        if cu_seqlens is not None:
            x = x.flatten(0, 1).unsqueeze(0)
        x = layer(x, cache=layer_cache, mask=mask, cu_seqlens=cu_seqlens)
        hidden_states = hidden_states + x.reshape(hidden_states.shape)
        return hidden_states if self.ffn is None else hidden_states + self.ffn(self.norm_ffn(hidden_states))


FORWARD[xLSTMBlock] = xLSTMBlock.forward


class xLSTMPreTrainedModel(LoadingMixin, PackedWeightsMixin, PreTrainedModel):
    """What all xLSTM models share: configuration class, initialisation, how they are loaded and split."""

    config: xLSTMConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["xLSTMBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values", "cache_params"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": xLSTMBlock}

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """The weights that xLSTM-7B, or the paper's models, started from; called for every module after its children.
        Linear maps have standard deviation sqrt(2 / (5 D)) (Nguyen and Salazar 2019, "small init"); what a layer
        changes of that is in its `initialize`."""
        if isinstance(module, (nn.Linear, nn.Embedding, HeadwiseLinear)):
            init.normal_(module.weight, std=math.sqrt(2 / (5 * self.config.hidden_size)))
            bias = getattr(module, "bias", None)
            if bias is not None:
                init.zeros_(bias)
        elif hasattr(module, "initialize"):
            module.initialize(self.config)


class xLSTMModel(xLSTMPreTrainedModel):
    """The stack of blocks between embedding and head. Called with tokens, it returns `last_hidden_state` (B, T, D) and
    with `use_cache=True` the state after the last token, as `cache`.

    ```python
    >>> model = xLSTMModel(xLSTMConfig(hidden_size=256, num_hidden_layers=4, num_heads=4))
    >>> outputs = model(torch.tensor([[1, 2, 3]]), use_cache=True)
    >>> outputs = model(torch.tensor([[4]]), cache=outputs.cache)  # goes on from there
    ```
    """

    embeddings: nn.Module
    out_norm: nn.Module

    def __init__(self, config: xLSTMConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([xLSTMBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        if not config.add_out_norm:
            self.out_norm = nn.Identity()
        elif config.block_family == "paper":
            self.out_norm = PaperLayerNorm(config.hidden_size, eps=config.norm_eps)
        else:
            self.out_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, bias=config.out_norm_bias)
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
        cache: xLSTMCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: xLSTMCache | None = None,
        cache_params: xLSTMCache | None = None,
        seq_idx: torch.IntTensor | None = None,
        cu_seq_lens_q: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        r"""
        Args:
            input_ids (B, T) or inputs_embeds (B, T, D): exactly one of them.
            attention_mask (B, T): 0 for padding, left, right or anywhere: such a step leaves the state untouched. With
                `cache` also (B, T_past + T).
            cache: the state to continue from; it is updated in place. `past_key_values` and `cache_params`, its names
                before Transformers 5.24, are aliases.
            use_cache: return the state after the last token. By default `config.use_cache`, and `False` in training.
            seq_idx (B, T), cu_seq_lens_q (N + 1,), position_ids (B, T): packed documents, told by the document number
                of every token, by the bounds in the flattened batch, or by positions that start anew. They do not see
                each other. Positions are not used otherwise.

        Raises:
            ValueError: an argument contradicts another one, or its shape does not fit.
            TypeError: an unknown argument, such as a cache under another name, would have to be ignored.
            NotImplementedError: the sequence is split over ranks.
        """
        refuse_unknown(kwargs)
        refuse_split_sequence()
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of `input_ids` and `inputs_embeds`.")
        cache = one_cache(cache=cache, past_key_values=past_key_values, cache_params=cache_params)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            if use_cache:
                logger.warning_once("`use_cache=True` is incompatible with gradient checkpointing: it is off.")
            use_cache = False
            if cache is not None:
                raise ValueError("Gradient checkpointing cannot continue a `cache`: switch one of them off.")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings(input_ids)
        batch_size, length = input_size(input_ids, inputs_embeds)
        mask = padding_mask(attention_mask, batch_size, length)
        check_mask_columns(attention_mask, length, cache)
        cu_seqlens = packed_bounds(seq_idx, cu_seq_lens_q, position_ids, mask, inputs_embeds)
        if cu_seqlens is None:
            check_mask_values(attention_mask)
        else:
            if cache is not None:
                raise ValueError("Packed sequences start anew: they cannot continue a `cache`.")
            use_cache = False
            mask = None if mask is None else mask.reshape(1, -1)
        if cache is None and use_cache:
            cache = xLSTMCache(self.config)
        if cache is not None and not torch.compiler.is_compiling():
            cache.prepare(self.config, batch_size)

        captures = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        with self._step(inputs_embeds):
            hidden_states = self._run_blocks(inputs_embeds, cache, mask, cu_seqlens, whole=bool(captures))
        hidden_states = self.out_norm(hidden_states)
        if cache is not None:
            cache.advance(length, hidden_states.device)
        named: dict[str, Any] = {CACHE_NAME: cache}
        return ModelOutput(last_hidden_state=hidden_states, **named)

    def _run_blocks(
        self,
        hidden_states: torch.Tensor,
        cache: xLSTMCache | None,
        mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        whole: bool,
    ) -> torch.Tensor:
        """All blocks over all tokens; without gradients over a piece of a long sequence at a time, to bound memory,
        unless the blocks' outputs are wanted `whole`."""
        length, size = hidden_states.shape[1], self.config.max_inference_chunksize
        whole = whole or torch.compiler.is_exporting()  # one graph serves all lengths
        if not whole and length > size and cu_seqlens is None and not torch.is_grad_enabled():
            cache = xLSTMCache(self.config) if cache is None else cache
            pieces = []
            for start in range(0, length, size):
                piece_mask = None if mask is None else mask[:, start : start + size]
                piece = hidden_states[:, start : start + size]
                pieces.append(self._run_blocks(piece, cache, piece_mask, None, whole))
            return torch.cat(pieces, dim=1)
        if length == 1 and cache is not None and not whole and not torch.compiler.is_compiling():
            output = compiled_step(self, hidden_states, cache, mask)
            if output is not None:
                return output
        for block in self.blocks:
            hidden_states = block(hidden_states, cache=cache, mask=mask, cu_seqlens=cu_seqlens)
        return hidden_states


def input_size(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> tuple[int, int]:
    """B and T, of `inputs_embeds` that may come from `input_ids`."""
    name, x, layout = "inputs_embeds", inputs_embeds, "(B, T, D)"
    if input_ids is not None:
        name, x, layout = "input_ids", input_ids, "(B, T)"
    if inputs_embeds.ndim != 3:
        raise ValueError(f"`{name}` must have shape {layout}, got {tuple(x.shape)}.")
    if 0 in inputs_embeds.shape[:2]:
        raise ValueError(f"The input has no tokens: `{name}` has shape {tuple(x.shape)}.")
    batch_size, length = inputs_embeds.shape[:2]
    return batch_size, length


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


def check_mask_columns(attention_mask: torch.Tensor | None, length: int, cache: xLSTMCache | None) -> None:
    """Raises ValueError for a mask of past tokens where nothing has read any."""
    if cache is None and attention_mask is not None and attention_mask.shape[1] > length:
        raise ValueError(
            f"`attention_mask` has {attention_mask.shape[1]} columns for {length} tokens: more are for the tokens "
            "that a `cache` has read, and there is none."
        )


def check_mask_values(attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError for a mask of more than 0 and 1 where nothing else tells documents apart: some packers number
    them there, and attention knows masks of 0 and -inf. Read as a mask, both would be wrong in silence."""
    if attention_mask is None or attention_mask.dtype == torch.bool or not is_readable(attention_mask):
        return
    if (attention_mask != attention_mask.bool()).any():
        raise ValueError(
            "`attention_mask` must hold 1 for tokens and 0 for padding. Packed documents are told by `seq_idx`, "
            "`cu_seq_lens_q` or `position_ids`."
        )


def packed_bounds(
    seq_idx: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
) -> torch.Tensor | None:
    """The bounds (N + 1,) of packed documents in the flattened batch, or None if nothing is packed."""
    batch_size, length = inputs_embeds.shape[:2]
    for name, x in (("seq_idx", seq_idx), ("cu_seq_lens_q", cu_seq_lens_q), ("position_ids", position_ids)):
        if x is not None and not isinstance(x, torch.Tensor):
            raise ValueError(f"`{name}` must be a tensor, got {type(x).__name__}.")
    for name, x in (("seq_idx", seq_idx), ("position_ids", position_ids)):
        if x is not None and tuple(x.shape) not in ((batch_size, length), (1, length)):
            raise ValueError(f"`{name}` must have shape (B, T) = {(batch_size, length)}, got {tuple(x.shape)}.")
    if cu_seq_lens_q is not None:
        return cu_seq_lens_q
    if seq_idx is not None:
        return _bounds_of_numbers(seq_idx.expand(batch_size, -1))
    if position_ids is not None and length > 1 and not position_ids.is_meta:
        return _bounds_of_positions(position_ids.expand(batch_size, -1), mask)
    return None


# How many documents there are decides the shape of the bounds, so both functions stay outside of compiled code: there
# they break the graph, and where that is not allowed (fullgraph=True, torch.export) the compiler says so.


@torch.compiler.disable
def _bounds_of_numbers(numbers: torch.Tensor) -> torch.Tensor:
    """The bounds of documents told by their numbers (B, T)."""
    return _bounds(numbers[:, 1:] != numbers[:, :-1])


@torch.compiler.disable
def _bounds_of_positions(position_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The bounds of documents told by positions (B, T) that do not go on from those of the unmasked token before; None
    if they go on everywhere. What stands at masked tokens has no meaning."""
    if mask is None:
        starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    else:
        token = torch.arange(position_ids.shape[1], device=mask.device)
        latest = torch.where(mask, token, -1).cummax(dim=1).values[:, :-1]  # unmasked token up to the one before
        previous = position_ids.gather(1, latest.clamp_min(0))
        starts = mask[:, 1:] & (latest >= 0) & (position_ids[:, 1:] != previous + 1)
    return _bounds(starts) if starts.any() else None


def _bounds(starts: torch.Tensor) -> torch.Tensor:
    """The bounds (N + 1,) in the flattened batch from whether a document starts at tokens 1, 2, ... (B, T - 1); one
    starts at the first token of each row."""
    starts = F.pad(starts, (1, 0), value=True).flatten()
    return F.pad(starts.nonzero().squeeze(1), (0, 1), value=starts.shape[0])


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.LongTensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.LongTensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """The cross entropy of the next tokens, as Transformers' `ForCausalLMLoss` but in less memory.

    Args:
        logits: (B, T, vocabulary).
        labels: (B, T), shifted inside; `shift_labels` (B, T), which take their place, are not.
        num_items_in_batch: what the sum is divided by; by default the number of labels that are not `ignore_index`.
    """
    for name, x in (("labels", labels), ("shift_labels", shift_labels)):
        if x is not None and x.shape != logits.shape[:-1]:
            raise ValueError(
                f"`{name}` must have the shape {tuple(logits.shape[:-1])} of the logits' tokens, got {tuple(x.shape)}."
            )
    targets = shift_labels
    if targets is None:
        assert labels is not None
        targets = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    return mean_cross_entropy(logits.view(-1, vocab_size), targets.flatten(), num_items_in_batch, ignore_index)


def token_classification_loss(logits: torch.Tensor, labels: torch.LongTensor, config, **kwargs) -> torch.Tensor:
    """The mean cross entropy of the classes of tokens, logits (B, T, classes), labels (B, T), -100 left out."""
    return causal_lm_loss(logits.to(gate_dtype(logits.dtype)), None, config.num_labels, shift_labels=labels)


def question_answering_loss(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    start_positions: torch.LongTensor,
    end_positions: torch.LongTensor,
    **kwargs,
) -> torch.Tensor:
    """The mean cross entropy of first and last token of the answer, logits (B, T), positions (B,). Positions from T
    on, answers that have been cut off, are left out."""
    length, dtype = start_logits.shape[1], gate_dtype(start_logits.dtype)
    start, end = (
        mean_cross_entropy(logits.to(dtype), positions.flatten().clamp(0, length), ignore_index=length)
        for logits, positions in ((start_logits, start_positions), (end_logits, end_positions))
    )
    return (start + end) / 2


class xLSTMForCausalLM(xLSTMPreTrainedModel, RecurrentGenerationMixin):
    """An xLSTM language model.

    ```python
    >>> import hf_xlstm  # the Auto classes, and `transformers.xLSTMForCausalLM`, are ours from here on
    >>> model = AutoModelForCausalLM.from_pretrained("NX-AI/xLSTM-7b", dtype="bfloat16")
    >>> ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    >>> model.generate(ids, max_new_tokens=50)

    >>> loss = model(ids, labels=ids).loss  # training, or `Trainer`

    >>> outputs = model(ids, use_cache=True)  # `outputs.cache` is all that it remembers, of constant size
    >>> outputs = model(next_ids, cache=outputs.cache)
    ```

    A new model: `xLSTMForCausalLM(xLSTMConfig(hidden_size=512, num_hidden_layers=6, num_heads=4))`.
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan: dict[str, Any] = {"lm_head": (["hidden_states"], ["logits"])}
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
        cache: xLSTMCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: xLSTMCache | None = None,
        cache_params: xLSTMCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutput:
        r"""
        Args:
            labels (B, T): tokens to predict, usually `input_ids`; they are shifted inside, and -100 is ignored.
            logits_to_keep: compute logits (float32, in a float64 model float64) only for that many last tokens, or for
                these positions; 0 for all.

        The other arguments, also `seq_idx` and `cu_seq_lens_q`, are those of `xLSTMModel`.
        """
        cache = one_cache(cache=cache, past_key_values=past_key_values, cache_params=cache_params)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("`labels` need the logits of all tokens: leave out `logits_to_keep`.")
        with self._step(inputs_embeds if input_ids is None else input_ids):
            outputs = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            (logits,) = joint_linear(outputs.last_hidden_state[:, keep], self.lm_head)
        logits = soft_cap(logits.to(gate_dtype(logits.dtype)), self.config.output_logit_soft_cap)
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE_NAME: outputs.cache}
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs) -> torch.Tensor | None:
        """The mask of the new tokens in place of Transformers' attention masks, whose table lacks our layer types."""
        return padding_mask(attention_mask, *inputs_embeds.shape[:2])


# The mixins take their backbone from AutoModel: where this file came with a checkpoint, that of Transformers. Hence
# these classes skip the `__init__` of their mixin.


class xLSTMForSequenceClassification(GenericForSequenceClassification, xLSTMPreTrainedModel):
    """An xLSTM with a linear classifier on the last token of each row that `attention_mask` does not call padding:
    logits (B, num_labels)."""

    base_model_prefix = "backbone"
    accepts_loss_kwargs = False  # Trainer divides the mean of each batch by the batches of a step itself

    def __init__(self, config: xLSTMConfig):
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.backbone = xLSTMModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: xLSTMCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            labels (B,) or (B, num_labels): classes, or numbers to regress on, as `config.problem_type` says.

        The other arguments are those of `xLSTMModel`. Transformers' own classifiers take for padding what has the id
        `pad_token_id`, which has a default here and may be the id of a word.
        """
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if attention_mask is None:
            last = hidden_states[:, -1]
        else:
            mask = attention_mask[:, -hidden_states.shape[1] :].to(hidden_states.device).bool()
            token = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            index = torch.where(mask, token, 0).amax(dim=1)
            last = hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), index]
        logits = self.score(last)
        loss = None
        if labels is not None:
            count = (labels != -100).sum().clamp_min(1)  # of classes: nothing to learn gives a loss of 0, not 0 / 0
            options = {"pooled_logits": logits, "config": self.config, "num_items_in_batch": count}
            loss = self.loss_function(logits=logits, labels=labels, **options)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE_NAME: outputs.cache}
        )


class xLSTMForTokenClassification(GenericForTokenClassification, xLSTMPreTrainedModel):
    """An xLSTM with a linear classifier on every token: logits (B, T, num_labels)."""

    base_model_prefix = "backbone"
    accepts_loss_kwargs = False
    forward = with_cache_name(GenericForTokenClassification.forward)

    def __init__(self, config: xLSTMConfig):
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.backbone = xLSTMModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.loss_function = token_classification_loss
        self.post_init()


class xLSTMForQuestionAnswering(GenericForQuestionAnswering, xLSTMPreTrainedModel):
    """An xLSTM that marks a span of its input: start_logits and end_logits (B, T)."""

    base_model_prefix = "backbone"
    accepts_loss_kwargs = False
    forward = with_cache_name(GenericForQuestionAnswering.forward)

    def __init__(self, config: xLSTMConfig):
        super(GenericForQuestionAnswering, self).__init__(config)
        self.backbone = xLSTMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.loss_function = question_answering_loss
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
