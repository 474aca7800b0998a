"""How other implementations name and shape the parameters of an xLSTM, and what they call its dimensions.

| layout | written by |
|---|---|
| `hf_xlstm` | this package; for models of plain mLSTM blocks also Transformers' own xLSTM, and so NX-AI/xLSTM-7b |
| `xlstm_large` | `xLSTMLarge` of the `xlstm` package |
| `xlstm` | `xLSTMLMModel` of the `xlstm` package and what is built on it: our `block_family="paper"` |
| `tirex` | TiRex, sLSTM layers in the residual frame of xLSTM-7B |
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

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
