"""Configurations of other implementations, and the native fields that say the same."""

import math
from typing import Any


__all__ = [
    "config_from_large",
    "config_from_wrapper",
    "config_from_xlstm",
    "config_from_yaml",
    "config_to_large",
    "config_to_wrapper",
    "config_to_xlstm",
    "ffn_fields",
    "is_wrapper",
    "refuse_other_models",
]

# Where a Transformers model keeps the configuration of the model of the `xlstm` package that it wraps.
WRAPPED = ("_xlstm_config", "xlstm_cfg")

# Fields of the `xlstm` package that a flat configuration cannot have, and what to use.
INSTEAD = {
    "mlstm_block": "`config_from_xlstm` of hf_xlstm.formats.configs reads nested configurations",
    "slstm_block": "`config_from_xlstm` of hf_xlstm.formats.configs reads nested configurations",
    "conv1d_kernel_size": "use `mlstm_conv_kernel_size` and `slstm_conv_kernel_size`",
    "proj_factor": "use `mlstm_inner_dim` and `ffn_proj_factor`",
    "round_proj_up_to_multiple_of": "use `mlstm_inner_dim` and `ffn_round_up_to_multiple_of`",
    "recurrent_weight_init": "use `slstm_recurrent_init`",
}


def config_from_yaml(config: dict[str, Any]) -> dict[str, Any]:
    """Native fields from a `config.yaml` of the `xlstm` package, for either of its models.

    Raises:
        ValueError: it is no configuration, lacks a field, or is of a variant that this package does not have.
    """
    if not isinstance(config, dict):
        raise ValueError(f"The configuration must be a mapping of fields, got {type(config).__name__}.")
    is_large = not {"model", "mlstm_block", "slstm_block"} & config.keys()
    return config_from_large(config) if is_large else config_from_xlstm(config)


def config_from_xlstm(config: dict[str, Any]) -> dict[str, Any]:
    """Native fields from those of `xLSTMLMModelConfig`, as the `config.yaml` of Helibrunna has them. What is not given
    has the default of the `xlstm` package.

    Raises:
        ValueError: a field is missing, or it is a variant that this package does not have.
    """
    config = config.get("model", config)
    _require_fields(config, ("num_blocks", "embedding_dim", "vocab_size"))
    mlstm_block, slstm_block = config.get("mlstm_block"), config.get("slstm_block")
    depth, width, slstm_at = config["num_blocks"], config["embedding_dim"], config.get("slstm_at", [])
    if mlstm_block is None and slstm_block is None:
        raise ValueError("The configuration has neither `mlstm_block` nor `slstm_block`.")
    if mlstm_block is None or slstm_at == "all":
        slstm_at = range(depth)
    if slstm_at and slstm_block is None:
        raise ValueError(f"`slstm_at` is {list(slstm_at)}, but there is no `slstm_block`.")
    mlstm, slstm = (mlstm_block or {}).get("mlstm") or {}, (slstm_block or {}).get("slstm") or {}
    ffn = (slstm_block or {}).get("feedforward") or {}
    supported = (
        (ffn, "act_fn", "gelu"),
        (ffn, "bias", False),
        (ffn, "ff_type", "ffn_gated"),
        (slstm, "function", "slstm"),
    )
    for fields, name, value in supported:
        if fields.get(name, value) != value:
            raise ValueError(f"`{name}`={fields[name]!r} is not supported, only {value!r}.")
    return {
        "model_type": "xlstm",
        "block_family": "paper",
        "vocab_size": config["vocab_size"],
        "hidden_size": width,
        "num_hidden_layers": depth,
        "layer_types": ["slstm" if index in slstm_at else "mlstm" for index in range(depth)],
        "num_heads": mlstm.get("num_heads", 4),
        "slstm_num_heads": slstm.get("num_heads", 4),
        "mlstm_inner_dim": _projected_width(width, 2.0, mlstm),
        "mlstm_conv_kernel_size": mlstm.get("conv1d_kernel_size", 4),
        "qkv_block_size": mlstm.get("qkv_proj_blocksize", 4),
        "slstm_conv_kernel_size": slstm.get("conv1d_kernel_size", 4),
        "slstm_recurrent_init": "zeros" if slstm.get("recurrent_weight_init", "zeros") == "zeros" else "uniform",
        "use_bias": config.get("bias", False),
        "dropout": config.get("dropout", 0.0),
        "add_out_norm": config.get("add_post_blocks_norm", True),
        "tie_word_embeddings": config.get("tie_weights", False),
        "norm_eps": 1e-5,
        "gate_soft_cap": None,
        "output_logit_soft_cap": None,
        **ffn_fields(width, _projected_width(width, 1.3, ffn), "paper"),
        # the package knows of no special tokens
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def config_to_xlstm(config, slstm_backend: str = "vanilla") -> dict[str, Any]:
    """The fields of `xLSTMLMModelConfig` from a native configuration.

    Raises:
        ValueError: the package does not have such a model.
    """
    fixed = {"block_family": "paper", "norm_eps": 1e-5, "eps": 1e-6, "output_logit_soft_cap": None}
    _require(config, fixed, "xlstm")
    types = config.layers_block_type
    multiple = 64 if config.mlstm_inner_dim % 64 == 0 else 1
    blocks = {
        "mlstm_block": {
            "mlstm": {
                "num_heads": config.num_heads,
                "conv1d_kernel_size": config.mlstm_conv_kernel_size,
                "qkv_proj_blocksize": config.qkv_block_size,
                "proj_factor": (config.mlstm_inner_dim - 0.5) / config.hidden_size,
                "round_proj_up_to_multiple_of": multiple,
            }
        },
        "slstm_block": {
            "slstm": {
                "num_heads": config.slstm_num_heads or config.num_heads,
                "conv1d_kernel_size": config.slstm_conv_kernel_size,
                "recurrent_weight_init": "zeros" if config.slstm_recurrent_init == "zeros" else "standard",
                "backend": slstm_backend,
            },
            "feedforward": {
                "proj_factor": config.ffn_proj_factor,
                "round_proj_up_to_multiple_of": config.ffn_round_up_to_multiple_of,
            },
        },
    }
    return {
        "num_blocks": config.num_hidden_layers,
        "embedding_dim": config.hidden_size,
        "vocab_size": config.vocab_size,
        "context_length": 2048,  # of the package's mask; it has no influence on the weights
        **{f"{kind}_block": blocks[f"{kind}_block"] for kind in ("mlstm", "slstm") if kind in types},
        "slstm_at": [index for index, kind in enumerate(types) if kind == "slstm"],
        "bias": config.use_bias,
        "dropout": config.dropout,
        "add_post_blocks_norm": config.add_out_norm,
        "tie_weights": config.tie_word_embeddings,
    }


# The fields of `xLSTMLargeConfig`, which have the same names and meanings here, without the sizes.
LARGE_FIELDS = (
    "num_heads",
    "vocab_size",
    "use_bias",
    "norm_eps",
    "norm_reduction_force_float32",
    "add_out_norm",
    "qk_dim_factor",
    "v_dim_factor",
    "eps",
    "ffn_proj_factor",
    "ffn_round_up_to_multiple_of",
    "gate_soft_cap",
    "output_logit_soft_cap",
    "weight_mode",
    "chunk_size",
    "chunkwise_kernel",
    "sequence_kernel",
    "step_kernel",
    "mode",
    "return_last_states",
    "autocast_kernel_dtype",
    "inference_state_dtype",
)


def config_from_large(config: dict[str, Any]) -> dict[str, Any]:
    """Native fields from those of `xLSTMLargeConfig`. Raises ValueError if one is missing."""
    _require_fields(config, ("num_blocks", "embedding_dim", "vocab_size"))
    fields = {"ffn_proj_factor": 2.6667} | config
    # with `use_bias`, all its norms have one
    fields["out_norm_bias"] = bool(config.get("use_bias", False) and config.get("add_out_norm", True))
    return fields | {"model_type": "xlstm"}


def config_to_large(config, weight_mode: str = "single") -> dict[str, Any]:
    """The fields of `xLSTMLargeConfig` from a native configuration.

    Raises:
        ValueError: `xLSTMLarge` has no such model.
    """
    bias = config.use_bias and config.add_out_norm
    fixed = {"block_family": "large", "tie_word_embeddings": False, "out_norm_bias": bias}
    _require(config, fixed, "xlstm_large")
    if "slstm" in config.layers_block_type:
        raise ValueError(f"`xlstm_large` has no model with `layer_types`={config.layer_types}, only mLSTM blocks.")
    sizes = {"embedding_dim": config.hidden_size, "num_blocks": config.num_hidden_layers}
    return sizes | {name: getattr(config, name) for name in LARGE_FIELDS} | {"weight_mode": weight_mode}


def is_wrapper(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of the `xlstm` package wrapped into a Transformers model."""
    return any(isinstance(config.get(name), dict) for name in WRAPPED)


def config_from_wrapper(config: dict[str, Any]) -> dict[str, Any]:
    """Native fields from a `config.json` for the `xlstm` package wrapped into a Transformers model. Unless it says
    otherwise its head is tied, as Transformers 4 did by default."""
    wrapped = next(config[name] for name in WRAPPED if isinstance(config.get(name), dict))
    fields = config_from_xlstm({"tie_weights": True, "vocab_size": config.get("vocab_size")} | wrapped)
    names = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
    return fields | {name: config[name] for name in names if config.get(name) is not None}


def config_to_wrapper(config, slstm_backend: str = "vanilla") -> dict[str, Any]:
    """A `config.json` for the `xlstm` package wrapped into a Transformers model."""
    names = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    fields = {"model_type": "xlstm", "embedding_dim": config.hidden_size} | {x: getattr(config, x) for x in names}
    return fields | {"_xlstm_config": config_to_xlstm(config, slstm_backend)}


def ffn_fields(hidden_size: int, width: int, block_family: str) -> dict[str, float | int]:
    """The two fields of a configuration that give a feed-forward layer of this width, which others give as a factor
    and round in their own ways."""
    multiple = 64 if width % 64 == 0 else 1
    margin = -0.5 if block_family == "paper" else 0.25  # what rounding up, or down after adding multiple - 1, undoes
    return {"ffn_proj_factor": (width + margin) / hidden_size, "ffn_round_up_to_multiple_of": multiple}


def _projected_width(hidden_size: int, factor: float, fields: dict[str, Any]) -> int:
    """The width that the `xlstm` package derives from the fields of an up-projection."""
    multiple = fields.get("round_proj_up_to_multiple_of", 64)
    rounded = math.ceil if fields.get("round_proj_up_dim_up", True) else math.floor
    return rounded(fields.get("proj_factor", factor) * hidden_size / multiple) * multiple


def refuse_other_models(config, fields: dict[str, Any]) -> None:
    """Checks fields of other implementations that are not fields here: they must describe the model that `config`
    describes without them.

    Raises:
        ValueError: a field describes another model (the message names it).
    """
    for name, instead in INSTEAD.items():
        if fields.get(name) is not None:
            raise ValueError(f"`{name}` is a field of the `xlstm` package and has no effect here: {instead}.")
    paper = config.block_family == "paper"
    activations = ("gelu",) if paper else ("silu", "swish")
    implied = {
        "act_fn": activations,
        "hidden_act": activations,
        "ff_type": ("ffn_gated",),
        "function": ("slstm",),
        "norm_type": ("layernorm",) if paper else ("rmsnorm",),
        "cell_norm_eps": (config.norm_eps,),
        "add_qk_norm": (False,),
        "add_post_norm": (False,),
        "add_embedding_dropout": (False,),
        "gate_linear_headwise": (False,),
        "group_norm_weight": (True,),
        "gradient_recurrent_cut": (False,),
        "head_dim": (config.v_head_dim, config.slstm_head_dim),
        "intermediate_size": (config.ffn_dim,),
    }
    for name, values in implied.items():
        value = fields.get(name)
        if value is not None and value not in values:
            rest = " or ".join(repr(x) for x in dict.fromkeys(values))
            raise ValueError(f"`{name}`={value!r} describes another model than this one, in which it is {rest}.")
    multiple = fields.get("mlstm_round_up_to_multiple_of") or 1
    if not paper and (config.qk_dim % multiple or config.v_dim % multiple):
        widths = f"{config.qk_dim} and {config.v_dim}"
        raise ValueError(f"`mlstm_round_up_to_multiple_of`={multiple} does not divide `qk_dim` and `v_dim`, {widths}.")


def _require_fields(config: dict[str, Any], names: tuple[str, ...]) -> None:
    lacks = [name for name in names if config.get(name) is None]
    if lacks:
        raise ValueError(f"The configuration lacks {', '.join(f'`{name}`' for name in lacks)}.")


def _require(config, fields: dict[str, Any], layout: str) -> None:
    for name, value in fields.items():
        if getattr(config, name) != value:
            raise ValueError(f"`{layout}` has no model with `{name}`={getattr(config, name)!r}, only with {value!r}.")
