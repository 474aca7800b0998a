"""xLSTM configuration: fields, the widths that follow from them, and one table of rules."""

import copy
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .cells import BACKENDS
from .formats.configs import config_from_wrapper, config_from_yaml, is_wrapper, refuse_other_models


LAYER_TYPES = ("mlstm", "slstm")
BLOCK_FAMILIES = ("large", "paper")

# The fields in which the paper's models differ from the defaults here.
PAPER_FIELDS: dict[str, Any] = {
    "block_family": "paper",
    "norm_eps": 1e-5,
    "gate_soft_cap": None,
    "output_logit_soft_cap": None,
    "slstm_conv_kernel_size": 4,
    "ffn_proj_factor": 1.3,
}
PAPER_ONLY = ("block_family", "mlstm_inner_dim", "mlstm_conv_kernel_size", "qkv_block_size", "dropout")

# Names of fields in other implementations, which are understood when a configuration is made.
FOREIGN_NAMES = {
    "bias": "use_bias",
    "tie_weights": "tie_word_embeddings",
    "add_post_blocks_norm": "add_out_norm",
    "logits_soft_cap": "output_logit_soft_cap",
    "qkv_proj_blocksize": "qkv_block_size",
}


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
            Number of blocks. `num_blocks` and `num_layers` are aliases.
        num_heads (`int`, *optional*, defaults to 8):
            Number of mLSTM heads H.
        qk_dim_factor, v_dim_factor (`float`, *optional*, defaults to 0.5 and 1.0):
            Widths of query/key and value, all heads together, as a fraction of `hidden_size`, rounded down.
        layer_types (`list[str]`, *optional*):
            `"mlstm"` or `"slstm"` for each block, all mLSTM by default. The field is `None`, and absent from
            `config.json`, for models that Transformers' own class has as well; the list in the file of any other model
            makes that class refuse it. `layers_block_type` is the list in either case.
        slstm_at (`list[int]` or `"all"`, *optional*):
            The indices of the sLSTM blocks, another way to give `layer_types`.
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
            Epsilon of the norm over the sLSTM's heads, `norm_eps` by default. In TiRex the two differ.
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
        out_norm_bias (`bool`, *optional*, defaults to `False`):
            A bias in that norm, as models of `xLSTMLarge` with `use_bias` have it.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*, default to 1, 0 and 2):
            Special tokens, as in Transformers' own class. `generate` takes no token for padding on account of them:
            what is padding is said by `attention_mask`.
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

    Other fields of other implementations are refused if they describe another model than the one made here.

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
        "num_layers": "num_hidden_layers",
        "num_attention_heads": "num_heads",
        "final_logit_softcapping": "output_logit_soft_cap",  # TRL computes logits by itself and looks for this name
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

    # attributes of a configuration that belongs to certain files, not fields of a model
    save_id = None  # type: str | None  # see `TensorFiles.check_save`
    transformers_weights = None  # Transformers' name for the first file of the weights

    vocab_size: int = 50304
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_heads: int = 8
    qk_dim_factor: float | int = 0.5
    v_dim_factor: float | int = 1.0
    layer_types: list[str] | None = None
    block_family: str = "large"

    slstm_num_heads: int | None = None
    slstm_conv_kernel_size: int = 0
    slstm_recurrent_init: str = "zeros"
    slstm_norm_eps: float | None = None

    ffn_proj_factor: float | int = 2.667
    ffn_round_up_to_multiple_of: int = 64
    gate_soft_cap: float | int | None = 15.0
    output_logit_soft_cap: float | int | None = 30.0
    norm_eps: float | int = 1e-6
    eps: float | int = 1e-6
    use_bias: bool = False
    add_out_norm: bool = True
    out_norm_bias: bool = False
    tie_word_embeddings: bool = False

    mlstm_inner_dim: int | None = None
    mlstm_conv_kernel_size: int = 4
    qkv_block_size: int = 4
    dropout: float | int = 0.0

    backend: str = "auto"
    chunk_size: int = 64
    max_inference_chunksize: int = 16384
    weight_mode: str = "single"
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    # without effect
    norm_reduction_force_float32: bool = True
    chunkwise_kernel: str = "chunkwise--native_autograd"
    sequence_kernel: str = "native_sequence__native"
    step_kernel: str = "native"
    mode: str = "inference"
    return_last_states: bool = True
    autocast_kernel_dtype: str = "bfloat16"
    inference_state_dtype: str = "float32"

    if TYPE_CHECKING:  # which knows of the fields above only, not of other names for them such as `slstm_at`

        def __init__(self, **fields: Any) -> None: ...

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
        try:
            fields = yaml.safe_load(Path(json_file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{json_file} is not valid YAML: {' '.join(str(error).split())}") from error
        try:
            return config_from_yaml(fields)
        except ValueError as error:
            raise ValueError(f"{json_file}: {error}") from error

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "xLSTMConfig":
        if is_wrapper(config_dict):
            config_dict = config_from_wrapper(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        self._resolve_aliases(kwargs)
        if self.block_family == "paper" and self.mlstm_inner_dim is None:
            self.mlstm_inner_dim = -(-2 * self.hidden_size // 64) * 64
        if "slstm_at" in kwargs:
            self._resolve_slstm_at(kwargs.pop("slstm_at"))
        # before Transformers' part, which wraps what its validation catches into an error that is no ValueError
        self.validate_layer_type()
        self.validate_fields()
        refuse_other_models(self, kwargs)
        self.layer_types = None if self.has_in_tree_class else self.layers_block_type
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig") -> None:
        """Nothing to do here: `register_for_auto_class` of a model class covers the configuration."""
        try:
            from .hub import AUTO_MAP  # noqa: F401  not there in a copy beside a checkpoint
        except ImportError:
            super().register_for_auto_class(auto_class)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As in Transformers, but `auto_map` is written only where the code that it names is."""
        written = copy.deepcopy(self)
        if written._auto_class is None and getattr(self, "auto_map", None):
            classes = [name for name in self.auto_map.values() if isinstance(name, str) and "--" not in name]
            files = [f"{name.partition('.')[0]}.py" for name in classes]  # those with "--" are on the Hub
            if not all(os.path.exists(os.path.join(save_directory, file)) for file in files):
                del written.auto_map
        super(xLSTMConfig, written).save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict:
        output = super().to_dict()
        for name in ("save_id", "transformers_weights", "out_norm_bias"):
            if not output.get(name):
                output.pop(name, None)
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
        """Moves values from aliases to their fields. An alias may stand beside its field, as in files written by
        others, but not contradict it."""
        for alias, name in (self.attribute_map | FOREIGN_NAMES).items():
            value = kwargs.pop(alias, None)
            if value is None:
                continue
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) not in (default, value):
                raise ValueError(
                    f"`{name}`={getattr(self, name)} and its alias `{alias}`={value} contradict each other."
                )
            setattr(self, name, value)

    def _resolve_slstm_at(self, slstm_at: list[int] | str | None) -> None:
        """Makes `layer_types` of the indices of sLSTM blocks, the form they have in the `xlstm` package."""
        if slstm_at is None:
            return
        depth = self.num_hidden_layers
        indices = range(depth) if slstm_at == "all" else slstm_at
        if not isinstance(indices, Sequence) or not all(index in range(depth) for index in indices):
            raise ValueError(f'`slstm_at` must be "all" or a list of indices from 0 to {depth - 1}, got {slstm_at!r}.')
        layer_types = ["slstm" if index in indices else "mlstm" for index in range(depth)]
        if self.layer_types not in (None, layer_types):
            raise ValueError(f"`slstm_at`={slstm_at} and `layer_types`={self.layer_types} contradict each other.")
        self.layer_types = layer_types

    @property
    def slstm_at(self) -> list[int]:
        """The indices of the sLSTM blocks."""
        return [index for index, kind in enumerate(self.layers_block_type) if kind == "slstm"]

    @slstm_at.setter
    def slstm_at(self, value: list[int] | str) -> None:
        self.layer_types = None
        self._resolve_slstm_at(value)
        self.layer_types = None if self.has_in_tree_class else self.layers_block_type

    @property
    def has_in_tree_class(self) -> bool:
        """Whether Transformers' own xLSTM is the same model."""
        return self.block_family == "large" and not self.out_norm_bias and "slstm" not in self.layers_block_type

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """What tensor parallelism splits: the mLSTM by heads, with the slice of the head norm's weight that belongs to
        them, and the feed-forward layers. sLSTM layers, which are small, and the paper's blocks are on every rank."""
        plan = {"embeddings": "embedding_rowwise"}
        if self.block_family == "paper":
            return plan
        if "mlstm" in self.layers_block_type:  # rules for layers that do not exist are errors
            columns = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact", "multihead_norm.weight")
            plan |= {f"blocks.*.mlstm_layer.{name}": "colwise" for name in columns}
            plan["blocks.*.mlstm_layer.out_proj"] = "rowwise"
            if self.use_bias:
                plan["blocks.*.mlstm_layer.multihead_norm.bias"] = "colwise"
        return plan | {
            "blocks.*.ffn.proj_up_gate": "colwise",
            "blocks.*.ffn.proj_up": "colwise",
            "blocks.*.ffn.proj_down": "rowwise",
        }

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, value: dict[str, str]) -> None:
        """Nothing to do: Transformers 5.19 adds the embedding of tied models, under a name it does not have here. The
        plan always has it."""

    @property
    def layers_block_type(self) -> list[str]:
        """The type of every block, `"mlstm"` or `"slstm"`."""
        return self.layer_types or ["mlstm"] * self.num_hidden_layers  # see `layer_types` in the class's docstring

    @property
    def qk_dim(self) -> int:
        """Query/key width H K of all mLSTM heads."""
        if self.block_family == "paper":
            assert self.mlstm_inner_dim is not None  # `__post_init__` gives it a value
            return self.mlstm_inner_dim
        return int(self.hidden_size * self.qk_dim_factor)

    @property
    def v_dim(self) -> int:
        """Value width H V of all mLSTM heads."""
        return self.qk_dim if self.block_family == "paper" else int(self.hidden_size * self.v_dim_factor)

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

    def validate_fields(self) -> None:
        """Raises ValueError naming field, rule and value for the first of RULES that does not hold."""
        for names, holds, rule in RULES:
            if not holds(self):
                values = " and ".join(repr(getattr(self, name)) for name in names)
                raise ValueError(f"`{names[0]}` {rule}, got {values}.")


def _positive(name: str) -> "Rule":
    return (name,), lambda config: getattr(config, name) > 0, "must be positive"


def _one_of(name: str, choices: tuple[str, ...]) -> "Rule":
    return (name,), lambda config: getattr(config, name) in choices, f"must be one of {', '.join(choices)}"


def _divisible(width: str, number: str, applies: Callable[[xLSTMConfig], bool]) -> "Rule":
    def holds(config: xLSTMConfig) -> bool:
        return not applies(config) or getattr(config, width) % getattr(config, number) == 0

    return (width, number), holds, f"must be divisible by `{number}`"


def _has_large_mlstm(config: xLSTMConfig) -> bool:
    return "mlstm" in config.layers_block_type and config.block_family == "large"


def _has_paper_mlstm(config: xLSTMConfig) -> bool:
    return "mlstm" in config.layers_block_type and config.block_family == "paper"


def _has_slstm(config: xLSTMConfig) -> bool:
    return "slstm" in config.layers_block_type


# The fields whose values an error shows, whether the rule holds, and the rule. The first that does not hold is told.
Rule = tuple[tuple[str, ...], Callable[[xLSTMConfig], Any], str]
RULES: tuple[Rule, ...] = (
    _one_of("block_family", BLOCK_FAMILIES),
    _one_of("backend", BACKENDS),
    _one_of("slstm_recurrent_init", ("zeros", "uniform")),
    _one_of("weight_mode", ("single", "fused")),
    _positive("vocab_size"),
    _positive("hidden_size"),
    _positive("num_hidden_layers"),
    _positive("num_heads"),
    _positive("qk_dim_factor"),
    _positive("v_dim_factor"),
    _positive("ffn_proj_factor"),
    _positive("ffn_round_up_to_multiple_of"),
    _positive("chunk_size"),
    _positive("max_inference_chunksize"),
    _positive("qk_dim"),
    _positive("v_dim"),
    _positive("mlstm_conv_kernel_size"),
    _positive("qkv_block_size"),
    (("slstm_num_heads",), lambda c: c.slstm_num_heads is None or c.slstm_num_heads > 0, "must be positive"),
    (("slstm_conv_kernel_size",), lambda c: c.slstm_conv_kernel_size >= 0, "must be 0 or more"),
    (("dropout",), lambda c: 0 <= c.dropout < 1, "must be at least 0 and below 1"),
    (("dropout",), lambda c: c.block_family == "paper" or not c.dropout, 'needs `block_family="paper"`'),
    (
        ("gate_soft_cap",),
        lambda c: c.block_family == "large" or c.gate_soft_cap is None,
        "must be None in the paper's blocks (`xLSTMConfig.paper` has the other defaults of that family as well)",
    ),
    (
        ("out_norm_bias",),
        lambda c: not c.out_norm_bias or (c.block_family == "large" and c.add_out_norm),
        'needs `block_family="large"` and `add_out_norm`',
    ),
    _divisible("hidden_size", "num_heads", _has_large_mlstm),
    _divisible("qk_dim", "num_heads", _has_large_mlstm),
    _divisible("v_dim", "num_heads", _has_large_mlstm),
    _divisible("mlstm_inner_dim", "num_heads", _has_paper_mlstm),
    _divisible("mlstm_inner_dim", "qkv_block_size", _has_paper_mlstm),
    _divisible("hidden_size", "slstm_num_heads", lambda c: _has_slstm(c) and c.slstm_num_heads is not None),
    _divisible("hidden_size", "num_heads", lambda c: _has_slstm(c) and c.slstm_num_heads is None),
)


__all__ = ["xLSTMConfig"]
