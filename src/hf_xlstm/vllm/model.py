"""The xLSTM language model for vLLM: blocks, stack, head, and the loading of checkpoints of every layout."""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsHybrid,
    SupportsLoRA,
    SupportsMambaPrefixCaching,
    SupportsPP,
)
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from ..cells.numerics import gate_dtype
from ..configuration_xlstm import xLSTMConfig
from ..formats.weights import Layout, check_names, drop_tied_head, weights_from_foreign
from ..layers import RMSNorm
from ..modeling_xlstm import xLSTMForCausalLM
from ..paper import PaperLayerNorm
from ..pointwise import soft_cap
from .layers import FeedForward, MLSTMLayer, PaperFeedForward, PaperMLSTMLayer, SLSTMLayer
from .states import block_shape


def norm_of(config: xLSTMConfig, bias: bool) -> nn.Module:
    """The norm over D before a layer, or the last one, of the block family."""
    if config.block_family == "paper":
        return PaperLayerNorm(config.hidden_size, eps=config.norm_eps)
    return RMSNorm(config.hidden_size, eps=config.norm_eps, bias=bias)


class Block(nn.Module):
    """A residual block of either family, with the names it has in `xLSTMForCausalLM`."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        paper, bias = config.block_family == "paper", config.use_bias
        if config.layers_block_type[int(prefix.rsplit(".", 1)[1])] == "mlstm":
            self.norm_mlstm = norm_of(config, bias)
            layer = PaperMLSTMLayer if paper else MLSTMLayer
            self.mlstm_layer = layer(vllm_config, f"{prefix}.mlstm_layer")
        else:
            self.norm_slstm = norm_of(config, bias)
            self.slstm_layer = SLSTMLayer(vllm_config, f"{prefix}.slstm_layer")
        self.is_mlstm, self.ffn = hasattr(self, "mlstm_layer"), None
        if not (paper and self.is_mlstm):
            self.norm_ffn = norm_of(config, bias)
            self.ffn = (PaperFeedForward if paper else FeedForward)(vllm_config, f"{prefix}.ffn")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + (self.mlstm_layer(self.norm_mlstm(x)) if self.is_mlstm else self.slstm_layer(self.norm_slstm(x)))
        return x if self.ffn is None else x + self.ffn(self.norm_ffn(x))


class Backbone(nn.Module):
    """Embedding, blocks and last norm, or the part of them that this stage of a pipeline has."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config, stage = vllm_config.model_config.hf_config, get_pp_group()
        needs_embedding = stage.is_first_rank or (config.tie_word_embeddings and stage.is_last_rank)
        self.embeddings = (
            VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=f"{prefix}.embeddings")
            if needs_embedding
            else PPMissingLayer()
        )
        self.start, self.end, self.blocks = make_layers(
            config.num_hidden_layers, lambda prefix: Block(vllm_config, prefix), prefix=f"{prefix}.blocks"
        )
        has_norm = config.add_out_norm and stage.is_last_rank
        self.out_norm = norm_of(config, config.out_norm_bias) if has_norm else PPMissingLayer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[self.start : self.end]:
            x = block(x)
        return self.out_norm(x)


class XLSTMForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsLoRA, SupportsMambaPrefixCaching, SupportsPP):
    """The architecture "xLSTMForCausalLM" in vLLM.

    It is `IsHybrid`, although no layer is attention: for `IsAttentionFree` models the settings of Mamba models would
    have to be entered into a private table.
    """

    packed_modules_mapping = {
        "qkvo": ["q", "k", "v", "ogate_preact"],
        "gates": ["igate_preact", "fgate_preact"],
        "gate_up": ["proj_up_gate", "proj_up"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        refuse_unsupported(vllm_config)
        self.is_quantized = vllm_config.quant_config is not None
        # where the checkpoint has a head, vLLM unties it and would serve another one with a warning
        self.is_tied = config.tie_word_embeddings or vllm_config.model_config.word_embeddings_untied_by_checkpoint
        self.backbone = Backbone(vllm_config, maybe_prefix(prefix, "backbone"))
        if get_pp_group().is_last_rank:
            head_prefix = maybe_prefix(prefix, "lm_head")
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=head_prefix)
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.backbone.embeddings)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        if self.is_quantized:
            refuse_idle_quantization(self, vllm_config.model_config.quantization)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        tp_size = vllm_config.parallel_config.tensor_parallel_size
        return (block_shape(vllm_config.model_config.hf_config, tp_size),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls):
        return (get_temporal_copy_spec,)  # a whole row, from the block of the last accepted token

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.backbone.embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | IntermediateTensors:
        if not get_pp_group().is_first_rank:
            x = intermediate_tensors["hidden_states"]
        else:
            x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.backbone(x)
        return x if get_pp_group().is_last_rank else IntermediateTensors({"hidden_states": x})

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is None:  # another rank has them
            return None
        return soft_cap(logits.to(gate_dtype(logits.dtype)), self.config.output_logit_soft_cap)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads a checkpoint of any layout that this package reads; returns the names of the parameters loaded.

        Raises:
            ValueError: the checkpoint lacks weights or has unknown ones; the message names them. Or it has a head that
                the configuration ties to the embedding, and it is another one.
        """
        weights = dict(weights)  # their files are mapped, not read
        layout = Layout.of(weights)
        if self.is_tied:
            names = drop_tied_head(weights, weights.__getitem__, layout)
            if self.config.tie_word_embeddings:
                weights = {name: weights[name] for name in names}
        if layout != Layout("hf_xlstm"):
            with torch.device("meta"):
                names = list(xLSTMForCausalLM(self.config).state_dict())
            weights = weights_from_foreign(weights, names, self.config)
        weights = {name: x for name, x in weights.items() if not is_pp_missing_parameter(name, self)}
        parameters = dict(self.named_parameters())
        if not self.is_quantized:  # else the checkpoint has scales and such, which vLLM's layers know
            check_names([part for name in parameters for part, *_ in self.parts_of(name)], weights)
        targets = {part: target for name in parameters for part, *target in self.parts_of(name)}
        for name, x in weights.items():
            target, *shard = targets[name]
            parameter = parameters[target]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, x, *shard)
        return {target for target, *_ in (targets[name] for name in weights)}

    def parts_of(self, name: str) -> list[tuple]:
        """The weights of a checkpoint that make up a parameter: (their name, `name`), or where several are joined
        (their name, `name`, place)."""
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        parts = self.packed_modules_mapping.get(last)
        if parts is None:
            return [(name, name)]
        return [(f"{parent}.{part}.{kind}", name, place) for place, part in enumerate(parts)]


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raises ValueError for what would fail inside vLLM later, with less to go by."""
    if vllm_config.speculative_config is not None and vllm_config.cache_config.enable_prefix_caching:
        raise ValueError(
            "Speculative decoding of recurrent models works without prefix caching only: pass "
            "--no-enable-prefix-caching, or enable_prefix_caching=False."
        )


def refuse_idle_quantization(model: nn.Module, name: str) -> None:
    """Raises ValueError for a method that is for other kinds of layers than a dense model has."""
    methods = [layer.quant_method for layer in model.modules() if isinstance(layer, LinearBase)]
    if all(isinstance(method, UnquantizedLinearMethod) for method in methods):
        raise ValueError(f"quantization={name!r} leaves all layers of an xLSTM as they are.")
