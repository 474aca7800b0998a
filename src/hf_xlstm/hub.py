"""Checkpoints that load without this package: a folder with weights, configuration and the code itself.

Transformers runs code that lies next to a checkpoint (`trust_remote_code=True`) if it is one folder of modules that
import each other by `from .module import name`. So the package is flattened: `cells/mlstm/eager.py` becomes
`cells_mlstm_eager.py`. A module that is imported only inside functions (the Triton kernels, this module) stays behind,
and the import raises ImportError there: the functions with such imports expect it.
"""

import ast
import functools
import importlib.util
import os
import re
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["AUTO_MAP", "default_card", "describe", "flat_modules", "save_code", "save_self_contained"]

AUTO_MAP = {
    "AutoConfig": "configuration_xlstm.xLSTMConfig",
    "AutoModel": "modeling_xlstm.xLSTMModel",
    "AutoModelForCausalLM": "modeling_xlstm.xLSTMForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_xlstm.xLSTMForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_xlstm.xLSTMForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_xlstm.xLSTMForTokenClassification",
}

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [xlstm]
---

# {name}

{description}
"""
DESCRIPTION = """\
An [xLSTM](https://arxiv.org/abs/2405.04517) of {parameters:,} parameters: {layers}. Its memory and its time per token
do not grow with the length of the context.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)

inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(inputs.input_ids, max_new_tokens=100, do_sample=True, top_p=0.9)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

The code in this repository is a copy of hf-xlstm without its Triton kernels. With the package installed,
`import hf_xlstm` takes the place of `trust_remote_code=True`."""
PURE = " All blocks are mLSTM blocks, so that Transformers' own xLSTM class opens this checkpoint as well."


def save_self_contained(
    model: PreTrainedModel,
    directory: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
) -> None:
    """Saves what a stranger with nothing but Transformers needs to use `model`: weights, configuration, code and card,
    ready to upload as a repository.

    Args:
        tokenizer: saved along.
        card: the text of README.md; a short one by default.
    """
    model.save_pretrained(directory, with_code=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    Path(directory, "README.md").write_text(card or default_card(model, Path(directory).name), encoding="utf-8")


def default_card(model: PreTrainedModel, name: str) -> str:
    return CARD.format(name=name, description=describe(model, name))


def describe(model: PreTrainedModel, repo_id: str) -> str:
    """The part of a card that follows from the model itself: what it is and how to use it."""
    types = model.config.layers_block_type
    layers = ", ".join(f"{types.count(kind)} {kind} blocks" for kind in dict.fromkeys(types))
    text = DESCRIPTION.format(parameters=model.num_parameters(), layers=layers, repo_id=repo_id)
    return text + PURE if model.config.has_in_tree_class else text


def save_code(directory: str | os.PathLike) -> dict[str, str]:
    """Writes the flattened package into `directory`, and returns the `auto_map` of a configuration beside it."""
    os.makedirs(directory, exist_ok=True)
    for name, source in flat_modules().items():
        Path(directory, name).write_text(source, encoding="utf-8")
    return dict(AUTO_MAP)


@functools.cache
def flat_modules() -> dict[str, str]:
    """File name to source, for each module that the classes in AUTO_MAP import while they are loaded.

    The package is parsed once per process.
    """
    files = {}
    pending = {f"{__package__}.{reference.split('.')[0]}" for reference in AUTO_MAP.values()}
    while pending:
        module = pending.pop()
        source, imported = _flatten(module)
        files[f"{_flat_name(module)}.py"] = source
        pending |= {name for name in imported if f"{_flat_name(name)}.py" not in files}
    return files


def _flatten(module: str) -> tuple[str, list[str]]:
    """The source of `module` with its relative imports rewritten, and the full names of the modules it needs."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    package = module if spec.submodule_search_locations else spec.parent
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines, imported = source.splitlines(keepends=True), []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        if node not in tree.body:  # inside a function
            indent = " " * node.col_offset
            lines[first] = f'{indent}raise ImportError("this needs the hf-xlstm package")\n'
            lines[first + 1 : last] = [""] * (last - first - 1)
            continue
        target = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        lines[first] = re.sub(r"from \.+[\w.]*", f"from .{_flat_name(target)}", lines[first])
        imported.append(target)
    return "".join(lines), imported


def _flat_name(module: str) -> str:
    return module.removeprefix(f"{__package__}.").replace(".", "_")
