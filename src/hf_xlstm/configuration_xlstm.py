"""xLSTM configuration."""

import math
import os
from functools import partial
from pathlib import Path

import yaml
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .formats.configs import config_from_wrapper, config_from_yaml


LAYER_TYPES = ("mlstm", "slstm")
BLOCK_FAMILIES = ("large", "paper")
BACKENDS = ("auto", "triton", "torch", "reference")


# what sets the paper's models apart from the defaults here
PAPER_FIELDS = {
    "block_family": "paper",
    "norm_eps": 1e-5,
    "gate_soft_cap": None,
    "output_logit_soft_cap": None,
    "slstm_conv_kernel_size": 4,
    "ffn_proj_factor": 1.3,
}
PAPER_ONLY = ("block_family", "mlstm_inner_dim", "mlstm_conv_kernel_size", "qkv_block_size", "dropout")


@strict
class xLSTMConfig(PreTrainedConfig):
    r"""
    Configuration of xLSTM models. The fields of Transformers' own xLSTM have its names, defaults and meaning, so that
    a pure-mLSTM `config.json` serves both; the defaults are those of NX-AI/xLSTM-7b.

    Args:
        vocab_size (`int`, *optional*, defaults to 50304):
            Number of tokens.
        hidden_size (`int`, *optional*, defaults to 4096):
            Width D of the residual stream. `embedding_dim` is an alias.
        num_hidden_layers (`int`, *optional*, defaults to 32):
            Number of blocks. `num_blocks` is an alias.
        num_heads (`int`, *optional*, defaults to 8):
            Number of mLSTM heads H.
        qk_dim_factor, v_dim_factor (`float`, *optional*, defaults to 0.5 and 1.0):
            Widths of query/key and value, all heads together, as a fraction of `hidden_size`, rounded down.
        layer_types (`list[str]`, *optional*):
            `"mlstm"` or `"slstm"` for each block. `None` means all mLSTM, and is what an all-mLSTM list becomes: the
            field appears in `config.json` only for models that Transformers' own class cannot represent.
        block_family (`str`, *optional*, defaults to `"large"`):
            The blocks of xLSTM-7B, or `"paper"` for those of the xLSTM paper and of the `xlstm` package, which differ
            in other fields as well: `xLSTMConfig.paper` sets them all.
        slstm_num_heads (`int`, *optional*):
            Number of sLSTM heads, `num_heads` by default.
        slstm_conv_kernel_size (`int`, *optional*, defaults to 0):
            Taps of the causal convolution in front of the sLSTM's input and forget gate, 0 for none.
        slstm_recurrent_init (`str`, *optional*, defaults to `"zeros"`):
            Initialisation of the sLSTM's recurrent weights: `"zeros"`, or `"uniform"` in ±1/√D.
        slstm_norm_eps (`float`, *optional*):
            Epsilon of the norm over the sLSTM's heads, `norm_eps` by default. TiRex has another one than elsewhere.
        ffn_proj_factor, ffn_round_up_to_multiple_of (*optional*, defaults to 2.667 and 64):
            Width of the feed-forward layer, as a factor of `hidden_size`, rounded up.
        gate_soft_cap, output_logit_soft_cap (`float`, *optional*, defaults to 15.0 and 30.0):
            `cap * tanh(x / cap)` on the mLSTM's gate pre-activations and on the logits; `None` for no cap.
        norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of all norms.
        eps (`float`, *optional*, defaults to 1e-6):
            Epsilon in the mLSTM's denominator.
        use_bias (`bool`, *optional*, defaults to `False`):
            Biases in the linear layers and norms of the blocks (the mLSTM's gates always have one). In the paper's
            blocks, in the linear layers around the mLSTM.
        mlstm_inner_dim (`int`, *optional*):
            Width I of the paper's mLSTM, `2 * hidden_size` rounded up to a multiple of 64 by default. `qk_dim_factor`
            and `v_dim_factor` have no effect there.
        mlstm_conv_kernel_size, qkv_block_size (`int`, *optional*, defaults to 4 and 4):
            Taps of the convolution of the paper's mLSTM, and the size of the blocks of its query, key and value maps.
        dropout (`float`, *optional*, defaults to 0.0):
            In the paper's blocks, on the output of the mLSTM layer and on that of the sLSTM before its norm.
        add_out_norm (`bool`, *optional*, defaults to `True`):
            Norm after the last block.
        backend (`str`, *optional*, defaults to `"auto"`):
            Implementation of the cells: `"auto"`, `"triton"`, `"torch"` or `"reference"`.
        chunk_size (`int`, *optional*, defaults to 64):
            Tokens per chunk of the mLSTM's parallel form. Has no effect on results.
        max_inference_chunksize (`int`, *optional*, defaults to 16384):
            Longer inputs run in pieces of this length when no gradients are needed, which bounds memory.
        weight_mode (`str`, *optional*, defaults to `"single"`):
            `"fused"` checkpoints are converted on load.
        chunkwise_kernel, sequence_kernel, step_kernel, mode, return_last_states, autocast_kernel_dtype,
        inference_state_dtype, norm_reduction_force_float32:
            Accepted for configurations written for other implementations, without effect: `backend` chooses kernels,
            states and norms are always computed in float32, and every mode is available at any time.

    ```python
    >>> from hf_xlstm import xLSTMConfig, xLSTMForCausalLM

    >>> config = xLSTMConfig(hidden_size=512, num_hidden_layers=6, num_heads=4, layer_types=["mlstm", "slstm"] * 3)
    >>> model = xLSTMForCausalLM(config)
    ```
    """

    model_type = "xlstm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "embedding_dim": "hidden_size",
        "num_blocks": "num_hidden_layers",
        "num_attention_heads": "num_heads",
        "final_logit_softcapping": "output_logit_soft_cap",  # TRL computes logits by itself and looks for this name
    }
    # by heads; each rank has its slice of the head norm's weight, and sLSTM layers, which are small, are on every rank
    base_model_tp_plan = {
        "embeddings": "embedding_rowwise",
        "blocks.*.mlstm_layer.q": "colwise",
        "blocks.*.mlstm_layer.k": "colwise",
        "blocks.*.mlstm_layer.v": "colwise",
        "blocks.*.mlstm_layer.ogate_preact": "colwise",
        "blocks.*.mlstm_layer.igate_preact": "colwise",
        "blocks.*.mlstm_layer.fgate_preact": "colwise",
        "blocks.*.mlstm_layer.multihead_norm.weight": "colwise",
        "blocks.*.mlstm_layer.out_proj": "rowwise",
        "blocks.*.ffn.proj_up_gate": "colwise",
        "blocks.*.ffn.proj_up": "colwise",
        "blocks.*.ffn.proj_down": "rowwise",
    }
    base_model_fsdp_plan = {
        "embeddings": "free_full_weight",
        "blocks.*": "free_full_weight",
        "out_norm": "keep_full_weight",
    }
    base_model_pp_plan = {
        "embeddings": (["input_ids"], ["inputs_embeds"]),
        "blocks": (["hidden_states", "mask"], ["hidden_states"]),
        "out_norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_heads: int = 8
    use_bias: bool = False
    norm_reduction_force_float32: bool = True
    tie_word_embeddings: bool = False
    add_out_norm: bool = True
    norm_eps: float | int = 1e-6
    qk_dim_factor: float | int = 0.5
    v_dim_factor: float | int = 1.0
    chunkwise_kernel: str = "chunkwise--native_autograd"
    sequence_kernel: str = "native_sequence__native"
    step_kernel: str = "native"
    mode: str = "inference"
    chunk_size: int = 64
    return_last_states: bool = True
    autocast_kernel_dtype: str = "bfloat16"
    eps: float | int = 1e-6
    inference_state_dtype: str = "float32"
    ffn_proj_factor: float | int = 2.667
    ffn_round_up_to_multiple_of: int = 64
    gate_soft_cap: float | int | None = 15.0
    output_logit_soft_cap: float | int | None = 30.0
    weight_mode: str = "single"
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    max_inference_chunksize: int = 16384

    layer_types: list[str] | None = None
    slstm_num_heads: int | None = None
    slstm_conv_kernel_size: int = 0
    slstm_recurrent_init: str = "zeros"
    slstm_norm_eps: float | None = None
    block_family: str = "large"
    mlstm_inner_dim: int | None = None
    mlstm_conv_kernel_size: int = 4
    qkv_block_size: int = 4
    dropout: float | int = 0.0
    backend: str = "auto"

    @classmethod
    def paper(cls, **fields) -> "xLSTMConfig":
        """The architecture of the xLSTM paper, with the defaults of the `xlstm` package for what is not given."""
        return cls(**(PAPER_FIELDS | fields))

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Where there is no `config.json`, reads the `config.yaml` of models written with the `xlstm` package."""
        get_config_dict = partial(super().get_config_dict, pretrained_model_name_or_path, **kwargs)
        failure = None
        try:
            found = get_config_dict()
            if found[0]:
                return found
        except OSError as error:
            failure = error
        try:
            return get_config_dict(_configuration_file="config.yaml")
        except OSError as error:
            neither = OSError(f"{pretrained_model_name_or_path} has neither config.json nor config.yaml.")
            raise failure or neither from error

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        if not str(json_file).endswith(".yaml"):
            return super()._dict_from_json_file(json_file)
        return config_from_yaml(yaml.safe_load(Path(json_file).read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "xLSTMConfig":
        if "_xlstm_config" in config_dict:
            config_dict = config_from_wrapper(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        self._resolve_aliases(kwargs)
        if self.block_family == "paper":
            if self.mlstm_inner_dim is None:
                self.mlstm_inner_dim = -(-2 * self.hidden_size // 64) * 64
            if self.layer_types is None:
                self.layer_types = ["mlstm"] * self.num_hidden_layers
            self.base_model_tp_plan = {"embeddings": "embedding_rowwise"}  # the blocks are on every rank
        super().__post_init__(**kwargs)
        # here as well, since Transformers wraps what its validation catches into an error that is no ValueError
        self.validate_layer_type()
        self.validate_dimensions()
        self.validate_choices()
        if self.use_bias and self.block_family == "large":
            rule = {"blocks.*.mlstm_layer.multihead_norm.bias": "colwise"}
            self.base_model_tp_plan = self.base_model_tp_plan | rule
        if "mlstm" not in self.layers_block_type:  # rules for layers that do not exist are errors
            plan = self.base_model_tp_plan.items()
            self.base_model_tp_plan = {name: rule for name, rule in plan if ".mlstm_layer." not in name}
        # a list in the file keeps Transformers' own class away from models that are not its own
        if self.block_family == "large" and self.layer_types is not None and set(self.layer_types) == {"mlstm"}:
            self.layer_types = None

    def to_dict(self) -> dict:
        output = super().to_dict()
        if self.block_family == "large":
            for name in PAPER_ONLY:
                output.pop(name, None)
        if output.get("layer_types") is None:
            output.pop("layer_types", None)
        elif "num_hidden_layers" in output:
            # Trainer also reads the file as a bare PreTrainedConfig, which refuses our layer types beside this field
            output["num_blocks"] = output.pop("num_hidden_layers")
        return output

    def _resolve_aliases(self, kwargs: dict) -> None:
        """An alias given next to its field may repeat it, as files written by others do, but not contradict it."""
        for alias, name in self.attribute_map.items():
            value = kwargs.pop(alias, None)
            if value is None:
                continue
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) not in (default, value):
                raise ValueError(
                    f"`{name}`={getattr(self, name)} and its alias `{alias}`={value} contradict each other."
                )
            setattr(self, name, value)

    @property
    def layers_block_type(self) -> list[str]:
        """The type of every block, `"mlstm"` or `"slstm"`."""
        return self.layer_types or ["mlstm"] * self.num_hidden_layers

    @property
    def qk_dim(self) -> int:
        """Query/key width H K of all mLSTM heads."""
        return self.mlstm_inner_dim if self.block_family == "paper" else int(self.hidden_size * self.qk_dim_factor)

    @property
    def v_dim(self) -> int:
        """Value width H V of all mLSTM heads."""
        return self.mlstm_inner_dim if self.block_family == "paper" else int(self.hidden_size * self.v_dim_factor)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_dim // self.num_heads

    @property
    def v_head_dim(self) -> int:
        return self.v_dim // self.num_heads

    @property
    def slstm_head_dim(self) -> int:
        return self.hidden_size // (self.slstm_num_heads or self.num_heads)

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer, rounded in floating point as other implementations of each family do."""
        width, multiple = self.hidden_size * self.ffn_proj_factor, self.ffn_round_up_to_multiple_of
        if self.block_family == "paper":
            return math.ceil(width / multiple) * multiple
        return int((width + multiple - 1) // multiple * multiple)

    def validate_layer_type(self) -> None:
        """Blocks are of types that Transformers' own table does not have."""
        if self.layer_types is None:
            return
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` must have one entry per block: `num_hidden_layers` is {self.num_hidden_layers}, "
                f"got {len(self.layer_types)}."
            )
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"`layer_types` must consist of {', '.join(LAYER_TYPES)}, got {', '.join(unknown)}.")

    def validate_dimensions(self) -> None:
        positive = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_heads",
            "qk_dim_factor",
            "v_dim_factor",
            "ffn_proj_factor",
            "ffn_round_up_to_multiple_of",
            "chunk_size",
            "max_inference_chunksize",
            "qk_dim",
            "v_dim",
            "mlstm_conv_kernel_size",
            "qkv_block_size",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.slstm_num_heads is not None and self.slstm_num_heads < 1:
            raise ValueError(f"`slstm_num_heads` must be positive, got {self.slstm_num_heads}.")
        if self.slstm_conv_kernel_size < 0:
            raise ValueError(f"`slstm_conv_kernel_size` must be 0 or more, got {self.slstm_conv_kernel_size}.")
        widths = []
        if "mlstm" in self.layers_block_type and self.block_family == "paper":
            widths += [("mlstm_inner_dim", self.mlstm_inner_dim, "num_heads", self.num_heads)]
            widths += [("mlstm_inner_dim", self.mlstm_inner_dim, "qkv_block_size", self.qkv_block_size)]
        elif "mlstm" in self.layers_block_type:
            names = ("hidden_size", "qk_dim", "v_dim")
            widths += [(name, getattr(self, name), "num_heads", self.num_heads) for name in names]
        if "slstm" in self.layers_block_type:
            heads = "num_heads" if self.slstm_num_heads is None else "slstm_num_heads"
            widths.append(("hidden_size", self.hidden_size, heads, getattr(self, heads)))
        for name, width, heads, number in widths:
            if width % number:
                raise ValueError(f"`{name}` must be divisible by `{heads}`, got {width} and {number}.")

    def validate_choices(self) -> None:
        choices = {
            "block_family": BLOCK_FAMILIES,
            "backend": BACKENDS,
            "slstm_recurrent_init": ("zeros", "uniform"),
            "weight_mode": ("single", "fused"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and below 1, got {self.dropout}.")
        if self.block_family == "paper" and self.gate_soft_cap is not None:
            raise ValueError(
                f"`gate_soft_cap` must be None in the paper's blocks, got {self.gate_soft_cap}: `xLSTMConfig.paper` "
                "has the other defaults of that family as well."
            )
        if self.block_family == "large" and self.dropout:
            raise ValueError(f'`dropout` needs `block_family="paper"`, got {self.dropout}.')


__all__ = ["xLSTMConfig"]
