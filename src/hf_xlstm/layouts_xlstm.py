"""How other implementations name and shape the parameters of an xLSTM, and what they call its dimensions.

| layout | written by |
|---|---|
| `hf_xlstm` | this package; for models of plain mLSTM blocks also Transformers' own xLSTM, and so NX-AI/xLSTM-7b |
| `xlstm_large` | `xLSTMLarge` of the `xlstm` package |
| `xlstm` | `xLSTMLMModel` of the `xlstm` package and what is built on it: our `block_family="paper"` |
| `tirex` | TiRex, sLSTM layers in the residual frame of xLSTM-7B |
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


Tensors = tuple[torch.Tensor, ...]

# Our modules, inside of a block or outside, and theirs. The maps that feed the sLSTM's input and forget gate go by
# each other's name in the `xlstm` package and in TiRex.
SLSTM_MODULES = {
    "slstm_layer.igate": "slstm_layer.fgate",
    "slstm_layer.fgate": "slstm_layer.igate",
    "slstm_layer.multihead_norm": "slstm_layer.group_norm",
}
MODULES = {
    "hf_xlstm": {},
    "xlstm_large": {"backbone.embeddings": "embedding"},
    "xlstm": {
        "backbone.embeddings": "token_embedding",
        "backbone.blocks": "xlstm_block_stack.blocks",
        "backbone.out_norm": "xlstm_block_stack.post_blocks_norm",
        "norm_mlstm": "xlstm_norm",
        "norm_slstm": "xlstm_norm",
        "norm_ffn": "ffn_norm",
        "mlstm_layer": "xlstm",  # `learnable_skip`
        "mlstm_layer.proj_up": "xlstm.proj_up",
        "mlstm_layer.conv": "xlstm.conv1d.conv",
        "mlstm_layer.q_proj": "xlstm.q_proj",
        "mlstm_layer.k_proj": "xlstm.k_proj",
        "mlstm_layer.v_proj": "xlstm.v_proj",
        "mlstm_layer.igate_preact": "xlstm.mlstm_cell.igate",
        "mlstm_layer.fgate_preact": "xlstm.mlstm_cell.fgate",
        "mlstm_layer.multihead_norm": "xlstm.mlstm_cell.outnorm",
        "mlstm_layer.out_proj": "xlstm.proj_down",
        "slstm_layer": "xlstm",  # the cell's own parameters
        "slstm_layer.conv": "xlstm.conv1d.conv",
        "slstm_layer.zgate": "xlstm.zgate",
        "slstm_layer.ogate": "xlstm.ogate",
        **{ours: theirs.replace("slstm_layer", "xlstm") for ours, theirs in SLSTM_MODULES.items()},
    },
    "tirex": SLSTM_MODULES | {"backbone.blocks": "blocks", "backbone.out_norm": "out_norm"},
}
SLSTM_CELL = {"recurrent_weight": "slstm_cell._recurrent_kernel_", "bias": "slstm_cell._bias_"}
# the parts of a fused weight, one below the other
FUSED = {
    "mlstm_layer.qkv_opreact": ["mlstm_layer.q", "mlstm_layer.k", "mlstm_layer.v", "mlstm_layer.ogate_preact"],
    "mlstm_layer.ifgate_preact": ["mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"],
    "ffn.proj_up_gate_z": ["ffn.proj_up_gate", "ffn.proj_up"],
}


@dataclass(frozen=True)
class Rule:
    """Tensors of another layout and our parameters that hold the same numbers, with the way there and back."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[..., Tensors] = lambda *x: x
    to_theirs: Callable[..., Tensors] = lambda *x: x


@dataclass(frozen=True)
class Layout:
    """
    Args:
        name: a key of MODULES.
        prefix: in front of all names but that of the head.
        fused: q, k, v and output gate, the two gates of the mLSTM, and the two maps into the feed-forward layer are
            one matrix each (`hf_xlstm` and `xlstm_large`).
        slstm_backend: `"vanilla"` or `"cuda"`, which arrange the weights of the sLSTM cell differently. This is for
            writing; their shapes tell them apart.
        group_norm_weight: the norm of the sLSTM layer has a weight (`xlstm`).
    """

    name: str
    prefix: str = ""
    fused: bool = False
    slstm_backend: str = "vanilla"
    group_norm_weight: bool = True

    @classmethod
    def of(cls, names: Iterable[str]) -> "Layout":
        """The layout of a checkpoint with tensors of these names."""
        names = list(names)
        if any(".slstm_layer.slstm_cell." in name for name in names):
            return cls("tirex", "block_stack." if any(name.startswith("block_stack.") for name in names) else "")
        if any("xlstm_block_stack." in name for name in names):
            prefix = "model." if any(name.startswith("model.") for name in names) else ""
            group_norm_weight = any(name.endswith(".group_norm.weight") for name in names)
            return cls("xlstm", prefix, group_norm_weight=group_norm_weight)
        fused = any(f".{module}." in name for name in names for module in FUSED)
        return cls("xlstm_large" if "embedding.weight" in names else "hf_xlstm", fused=fused)

    def their_name(self, name: str) -> str:
        """What our parameter is called there."""
        modules = MODULES[self.name]
        stack, index, inner = re.fullmatch(r"(?:(backbone\.blocks)(\.\d+\.))?(.+)", name).groups()
        module, _, kind = inner.rpartition(".")
        if module == "slstm_layer" and self.name in ("xlstm", "tirex"):
            kind = SLSTM_CELL[kind]
        name = f"{modules.get(module, module)}.{kind}"
        if stack is not None:
            name = modules.get(stack, stack) + index + name
        return name if module == "lm_head" else self.prefix + name

    def rules(self, names: Iterable[str], config) -> list[Rule]:
        """A rule for each of our parameters, named as in `xLSTMForCausalLM`, or for several that are one there."""
        return [rule for name in names for rule in self._rules(name, config)]

    def _rules(self, name: str, config) -> list[Rule]:
        module, _, kind = name.rpartition(".")
        block, inner = re.fullmatch(r"((?:backbone\.blocks\.\d+\.)?)(.+)", module).groups()
        for whole, parts in FUSED.items() if self.fused else ():
            if inner in parts:
                theirs, ours = self.their_name(f"{block}{whole}.{kind}"), [f"{block}{part}.{kind}" for part in parts]
                rule = Rule((theirs,), tuple(ours), partial(split_rows, fused_sizes(config)[whole]), join_rows)
                return [rule] if inner == parts[0] else []
        theirs = (self.their_name(name),)
        if inner == "slstm_layer" and self.name in ("xlstm", "tirex"):
            if kind == "bias":  # with the recurrent weight, whose shape says how it is arranged
                return []
            ours = (name, f"{module}.bias")
            theirs = tuple(self.their_name(x) for x in ours)
            cuda = self.name == "tirex" or self.slstm_backend == "cuda"
            return [Rule(theirs, ours, slstm_from_theirs, slstm_to_cuda if cuda else slstm_to_vanilla)]
        if inner == "slstm_layer.multihead_norm" and self.name == "tirex":
            return [Rule(theirs, (name,), lambda w: (1 + w,), lambda w: (w - 1,))]
        if inner == "slstm_layer.multihead_norm" and not self.group_norm_weight:
            return [Rule((), (name,), lambda: (torch.zeros(config.hidden_size),), lambda w: ())]
        if kind == "bias" and inner.endswith(("q_proj", "k_proj", "v_proj")):
            return [Rule(theirs, (name,), lambda b: (b.view(-1, config.qkv_block_size),), lambda b: (b.flatten(),))]
        return [Rule(theirs, (name,))]


def fused_sizes(config) -> dict[str, list[int]]:
    return {
        "mlstm_layer.qkv_opreact": [config.qk_dim] * 2 + [config.v_dim] * 2,
        "mlstm_layer.ifgate_preact": [config.num_heads] * 2,
        "ffn.proj_up_gate_z": [config.ffn_dim] * 2,
    }


def split_rows(sizes: list[int], whole: torch.Tensor) -> Tensors:
    return whole.split(sizes)


def join_rows(*parts: torch.Tensor) -> Tensors:
    return (torch.cat(parts),)


def slstm_from_theirs(kernel: torch.Tensor, bias: torch.Tensor) -> Tensors:
    """Recurrent weight (4, H, D_out, D_in) and bias (4, H, D): from (H, 4 D_out, D_in) and [gate][head][unit], or from
    (H, D_in, 4 D_out) and [head][gate][unit]."""
    heads, rows, columns = kernel.shape
    if rows == 4 * columns:
        return kernel.unflatten(1, (4, columns)).transpose(0, 1), bias.view(4, heads, columns)
    return kernel.unflatten(2, (4, rows)).permute(2, 0, 3, 1), bias.view(heads, 4, rows).transpose(0, 1)


def slstm_to_vanilla(weight: torch.Tensor, bias: torch.Tensor) -> Tensors:
    return weight.transpose(0, 1).flatten(1, 2), bias.flatten()


def slstm_to_cuda(weight: torch.Tensor, bias: torch.Tensor) -> Tensors:
    return weight.permute(1, 3, 0, 2).flatten(2, 3), bias.transpose(0, 1).flatten()


def check_names(expected: Iterable[str], found: Iterable[str]) -> None:
    """Raises ValueError naming what a checkpoint lacks and what in it is unknown."""
    lacks, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    problems = []
    for problem, names in (("lacks", lacks), ("has unknown", unknown)):
        if names:
            rest = f" and {len(names) - 20} more" if len(names) > 20 else ""
            problems.append(f"{problem} weights: {', '.join(names[:20])}{rest}")
    if problems:
        raise ValueError(f"The checkpoint {' and '.join(problems)}.")


def apply(function: Callable[..., Tensors], names: tuple[str, ...], tensors: Iterable[torch.Tensor]) -> Tensors:
    """`function` of a rule; raises ValueError naming the tensors if it is not made for their shapes."""
    tensors = list(tensors)
    try:
        return function(*tensors)
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, tensors))
        raise ValueError(f"The checkpoint has misshapen weights: {shapes}.") from error


def drop_tied_head(names: Iterable[str], read: Callable[[str], torch.Tensor], layout: Layout) -> list[str]:
    """Their names without the head of a tied model, which may be stored twice. Raises ValueError if the head is not
    the embedding after all."""
    embedding = layout.their_name("backbone.embeddings.weight")
    if {"lm_head.weight", embedding} <= set(names) and not torch.equal(read("lm_head.weight"), read(embedding)):
        raise ValueError(f"The configuration ties lm_head.weight to {embedding}, but they differ.")
    return [name for name in names if name != "lm_head.weight"]


def weights_from_theirs(weights: dict[str, torch.Tensor], names: Iterable[str], config) -> dict[str, torch.Tensor]:
    """A checkpoint in another layout, as the parameters `names` of an `xLSTMForCausalLM`."""
    layout = Layout.of(weights)
    theirs = weights.keys()
    if config.tie_word_embeddings:
        names = [name for name in names if name != "lm_head.weight"]
        theirs = drop_tied_head(theirs, weights.__getitem__, layout)
    rules = layout.rules(names, config)
    check_names([name for rule in rules for name in rule.theirs], theirs)
    converted = {}
    for rule in rules:
        tensors = apply(rule.to_ours, rule.theirs, [weights[name] for name in rule.theirs])
        converted |= zip(rule.ours, (x.contiguous() for x in tensors), strict=True)
    return converted


def weights_to_theirs(weights: dict[str, torch.Tensor], layout: Layout, config) -> dict[str, torch.Tensor]:
    """Parameters of an `xLSTMForCausalLM`, or some of them, in another layout."""
    converted = {}
    for rule in layout.rules(weights, config):
        tensors = apply(rule.to_theirs, rule.ours, [weights[name] for name in rule.ours])
        converted |= zip(rule.theirs, (x.contiguous() for x in tensors), strict=True)
    return converted


# ---- configurations


def config_from_yaml(config: dict[str, Any]) -> dict[str, Any]:
    """Our fields from a `config.yaml` of the `xlstm` package, for either of its models."""
    is_large = not {"model", "mlstm_block", "slstm_block"} & config.keys()
    return config_from_large(config) if is_large else config_from_xlstm(config)


def config_from_xlstm(config: dict[str, Any]) -> dict[str, Any]:
    """Our fields from those of `xLSTMLMModelConfig`, as the `config.yaml` of Helibrunna has them. What is not given
    has the default of the `xlstm` package.

    Raises:
        ValueError: it is a variant that this package does not have.
    """
    config = config.get("model", config)
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
    for fields, name, value in ((ffn, "act_fn", "gelu"), (slstm, "function", "slstm"), (ffn, "bias", False)):
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
    """The fields of `xLSTMLMModelConfig` from our configuration.

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


# fields of `xLSTMLargeConfig` that have the same name and meaning here
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
    """Our fields from those of `xLSTMLargeConfig`."""
    defaults = {"ffn_proj_factor": 2.6667}
    fields = {name: config[name] for name in LARGE_FIELDS if name in config}
    sizes = {"model_type": "xlstm", "hidden_size": config["embedding_dim"], "num_hidden_layers": config["num_blocks"]}
    return defaults | fields | sizes


def config_to_large(config, weight_mode: str = "single") -> dict[str, Any]:
    """The fields of `xLSTMLargeConfig` from our configuration. Raises ValueError if it does not have such a model."""
    _require(config, {"block_family": "large", "layer_types": None, "tie_word_embeddings": False}, "xlstm_large")
    if config.use_bias:  # its last norm has one too, then
        _require(config, {"add_out_norm": False}, "xlstm_large")
    sizes = {"embedding_dim": config.hidden_size, "num_blocks": config.num_hidden_layers}
    return sizes | {name: getattr(config, name) for name in LARGE_FIELDS} | {"weight_mode": weight_mode}


def config_from_wrapper(config: dict[str, Any]) -> dict[str, Any]:
    """Our fields from a `config.json` for the `xlstm` package wrapped into a Transformers model. Unless it says
    otherwise its head is tied, as Transformers 4 did by default."""
    fields = config_from_xlstm({"tie_weights": True, "vocab_size": config.get("vocab_size")} | config["_xlstm_config"])
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


def _require(config, fields: dict[str, Any], layout: str) -> None:
    for name, value in fields.items():
        if getattr(config, name) != value:
            raise ValueError(f"`{layout}` has no model with `{name}`={getattr(config, name)!r}, only with {value!r}.")
