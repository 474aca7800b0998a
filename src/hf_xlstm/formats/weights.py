"""Names and shapes of an xLSTM's parameters in other implementations.

A checkpoint in the layout of this package is native, every other one is foreign.

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

import torch


__all__ = [
    "Layout",
    "Rule",
    "check_names",
    "convert",
    "drop_tied_head",
    "rules_from_foreign",
    "weights_from_foreign",
    "weights_to_foreign",
]

Tensors = tuple[torch.Tensor, ...]

# Native module names, inside of a block or outside, and foreign ones. The `xlstm` package and TiRex call the map that
# feeds the sLSTM's input gate `fgate` and the one that feeds the forget gate `igate`.
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
        **{native: foreign.replace("slstm_layer", "xlstm") for native, foreign in SLSTM_MODULES.items()},
    },
    "tirex": SLSTM_MODULES | {"backbone.blocks": "blocks", "backbone.out_norm": "out_norm"},
}
SLSTM_CELL = {"recurrent_weight": "slstm_cell._recurrent_kernel_", "bias": "slstm_cell._bias_"}
# Joined weights (`weight_mode="fused"` in the configuration), and their parts, one below the other.
JOINED = {
    "mlstm_layer.qkv_opreact": ["mlstm_layer.q", "mlstm_layer.k", "mlstm_layer.v", "mlstm_layer.ogate_preact"],
    "mlstm_layer.ifgate_preact": ["mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"],
    "ffn.proj_up_gate_z": ["ffn.proj_up_gate", "ffn.proj_up"],
}


@dataclass(frozen=True)
class Rule:
    """Foreign tensors and the native parameters that hold the same numbers, with the way there and back.

    Args:
        foreign, native: names of the tensors on either side.
        to_native, to_foreign: functions from the tensors of one side to those of the other.
    """

    foreign: tuple[str, ...]
    native: tuple[str, ...]
    to_native: Callable[..., Tensors] = lambda *x: x
    to_foreign: Callable[..., Tensors] = lambda *x: x


@dataclass(frozen=True)
class Layout:
    """Names and arrangement of the tensors of one implementation.

    Args:
        name: a key of MODULES.
        prefix: in front of all names but that of the head.
        joined: q, k, v and output gate, the two gates of the mLSTM, and the two maps into the feed-forward layer are
            one matrix each (`hf_xlstm` and `xlstm_large`).
        slstm_backend: `"vanilla"` or `"cuda"`, the backend of the `xlstm` package to write sLSTM cells for, which
            arrange their weights differently. Reading does not look at it: the shapes say which one wrote them.
        group_norm_weight: the norm of the sLSTM layer has a weight (`xlstm`).
    """

    name: str
    prefix: str = ""
    joined: bool = False
    slstm_backend: str = "vanilla"
    group_norm_weight: bool = True

    @classmethod
    def of(cls, names: Iterable[str]) -> "Layout":
        """The layout of a checkpoint with tensors of these names."""
        names = list(names)
        if any(".slstm_layer.slstm_cell." in name for name in names):
            return cls("tirex", "block_stack." if any(name.startswith("block_stack.") for name in names) else "")
        stack = next((name for name in names if "xlstm_block_stack." in name), None)
        if stack is not None:
            group_norm_weight = any(name.endswith(".group_norm.weight") for name in names)
            return cls("xlstm", stack.partition("xlstm_block_stack.")[0], group_norm_weight=group_norm_weight)
        joined = any(f".{module}." in name for name in names for module in JOINED)
        return cls("xlstm_large" if "embedding.weight" in names else "hf_xlstm", joined=joined)

    def foreign_name(self, name: str) -> str:
        """The name of a native parameter in this layout."""
        modules = MODULES[self.name]
        match = re.fullmatch(r"(?:(backbone\.blocks)(\.\d+\.))?(.+)", name)
        assert match is not None, name
        stack, index, inner = match.groups()
        module, _, kind = inner.rpartition(".")
        if module == "slstm_layer" and self.name in ("xlstm", "tirex"):
            kind = SLSTM_CELL[kind]
        name = f"{modules.get(module, module)}.{kind}"
        if stack is not None:
            name = modules.get(stack, stack) + index + name
        return name if module == "lm_head" else self.prefix + name

    def rules(self, names: Iterable[str], config) -> list[Rule]:
        """Rules that cover the native parameters `names`, named as in `xLSTMForCausalLM`.

        Several parameters that depend on the same foreign tensors share a rule: it stands where the first one is.
        """
        rules: dict[tuple[str, ...], Rule] = {}
        for name in names:
            rule = self._rule(name, config)
            rules.setdefault(rule.native, rule)
        return list(rules.values())

    def _rule(self, name: str, config) -> Rule:
        """The rule that has `name` among its native parameters."""
        match = re.fullmatch(r"(backbone\.blocks\.\d+\.)?(.+)\.(\w+)", name)
        assert match is not None, name
        block, module, kind = match.groups(default="")
        joined = next((whole for whole, parts in JOINED.items() if self.joined and module in parts), None)
        if joined is not None:
            return self._joined_rule(block, joined, kind, config)
        if module == "slstm_layer" and self.name in ("xlstm", "tirex"):
            return self._slstm_cell_rule(block)
        foreign, native = (self.foreign_name(name),), (name,)
        if module == "slstm_layer.multihead_norm" and self.name == "tirex":  # its factor is 1 + weight
            return Rule(foreign, native, lambda weight: (1 + weight,), lambda weight: (weight - 1,))
        if module == "slstm_layer.multihead_norm" and not self.group_norm_weight:  # its factor is 1
            return Rule((), native, lambda: (torch.zeros(config.hidden_size),), lambda weight: ())
        if kind == "bias" and module.endswith(("q_proj", "k_proj", "v_proj")):  # here a row per block of the map
            size = config.qkv_block_size
            return Rule(foreign, native, lambda bias: (bias.view(-1, size),), lambda bias: (bias.flatten(),))
        return Rule(foreign, native)

    def _joined_rule(self, block: str, module: str, kind: str, config) -> Rule:
        """The rule for a joined weight or bias, which is split by rows."""
        sizes = {
            "mlstm_layer.qkv_opreact": [config.qk_dim] * 2 + [config.v_dim] * 2,
            "mlstm_layer.ifgate_preact": [config.num_heads] * 2,
            "ffn.proj_up_gate_z": [config.ffn_dim] * 2,
        }[module]
        foreign = self.foreign_name(f"{block}{module}.{kind}")
        native = tuple(f"{block}{part}.{kind}" for part in JOINED[module])
        return Rule((foreign,), native, lambda x: x.split(sizes), lambda *parts: (torch.cat(parts),))

    def _slstm_cell_rule(self, block: str) -> Rule:
        """The rule for recurrent weight and bias together: the shape of the former says how both are arranged."""
        native = (f"{block}slstm_layer.recurrent_weight", f"{block}slstm_layer.bias")
        foreign = tuple(self.foreign_name(name) for name in native)
        to_foreign = slstm_to_cuda if self.name == "tirex" or self.slstm_backend == "cuda" else slstm_to_vanilla
        return Rule(foreign, native, slstm_from_foreign, to_foreign)


def slstm_from_foreign(kernel: torch.Tensor, bias: torch.Tensor) -> Tensors:
    """Recurrent weight (4, H, D_out, D_in) and bias (4, H, D) of an sLSTM cell of the `xlstm` package.

    Args:
        kernel, bias: of the backend `vanilla` (H, 4 D_out, D_in) and [gate][head][unit], or of the backend `cuda`
            (H, D_in, 4 D_out) and [head][gate][unit].
    """
    heads, rows, columns = kernel.shape
    if rows == 4 * columns:
        return kernel.unflatten(1, (4, columns)).transpose(0, 1), bias.view(4, heads, columns)
    return kernel.unflatten(2, (4, rows)).permute(2, 0, 3, 1), bias.view(heads, 4, rows).transpose(0, 1)


def slstm_to_vanilla(weight: torch.Tensor, bias: torch.Tensor) -> Tensors:
    """The kernel (H, 4 D_out, D_in) and the bias, [gate][head][unit], for the backend `vanilla`."""
    return weight.transpose(0, 1).flatten(1, 2), bias.flatten()


def slstm_to_cuda(weight: torch.Tensor, bias: torch.Tensor) -> Tensors:
    """The kernel (H, D_in, 4 D_out) and the bias, [head][gate][unit], for the backend `cuda`."""
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


def convert(function: Callable[..., Tensors], names: tuple[str, ...], tensors: Iterable[torch.Tensor]) -> Tensors:
    """The tensors that a function of a rule makes. Raises ValueError naming the tensors if their shapes do not fit."""
    tensors = list(tensors)
    try:
        return function(*tensors)
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, tensors))
        raise ValueError(f"The checkpoint has misshapen weights: {shapes}.") from error


def drop_tied_head(names: Iterable[str], read: Callable[[str], torch.Tensor], layout: Layout) -> list[str]:
    """The foreign names without the head of a tied model, which may be stored twice.

    Raises:
        ValueError: the head is not equal to the embedding.
    """
    embedding = layout.foreign_name("backbone.embeddings.weight")
    if {"lm_head.weight", embedding} <= set(names) and not torch.equal(read("lm_head.weight"), read(embedding)):
        raise ValueError(f"The configuration ties lm_head.weight to {embedding}, but they differ.")
    return [name for name in names if name != "lm_head.weight"]


def rules_from_foreign(
    found: Iterable[str], read: Callable[[str], torch.Tensor], names: Iterable[str], config
) -> list[Rule]:
    """The rules that make the native parameters `names` from a foreign checkpoint.

    Args:
        found: names of the tensors in the checkpoint.
        read: gives one of them.

    Raises:
        ValueError: the checkpoint lacks tensors or has unknown ones (the message names them).
    """
    layout = Layout.of(found)
    if config.tie_word_embeddings:
        names = [name for name in names if name != "lm_head.weight"]
        found = drop_tied_head(found, read, layout)
    rules = layout.rules(names, config)
    check_names([name for rule in rules for name in rule.foreign], found)
    return rules


def weights_from_foreign(weights: dict[str, torch.Tensor], names: Iterable[str], config) -> dict[str, torch.Tensor]:
    """The native parameters `names`, named as in `xLSTMForCausalLM`, from the tensors of a foreign checkpoint."""
    converted: dict[str, torch.Tensor] = {}
    for rule in rules_from_foreign(weights.keys(), weights.__getitem__, names, config):
        tensors = convert(rule.to_native, rule.foreign, [weights[name] for name in rule.foreign])
        converted |= zip(rule.native, (x.contiguous() for x in tensors), strict=True)
    return converted


def weights_to_foreign(weights: dict[str, torch.Tensor], layout: Layout, config) -> dict[str, torch.Tensor]:
    """The tensors of a foreign layout from native parameters, named as in `xLSTMForCausalLM`, or some of them."""
    converted: dict[str, torch.Tensor] = {}
    for rule in layout.rules(weights, config):
        tensors = convert(rule.to_foreign, rule.native, [weights[name] for name in rule.native])
        converted |= zip(rule.foreign, (x.contiguous() for x in tensors), strict=True)
    return converted
