"""xLSTM for Hugging Face Transformers. Importing this package puts its classes in place of Transformers' own xLSTM,
for the Auto classes and under their names in `transformers`."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from . import ops
from .cache import xLSTMCache
from .configuration_xlstm import xLSTMConfig
from .modeling_xlstm import (
    LORA_TARGET_MODULES,
    xLSTMForCausalLM,
    xLSTMForQuestionAnswering,
    xLSTMForSequenceClassification,
    xLSTMForTokenClassification,
    xLSTMModel,
    xLSTMPreTrainedModel,
)
from .optim import weight_decay_groups


if TYPE_CHECKING:
    from .conversion import convert_checkpoint
    from .hub import save_self_contained


__version__ = "0.1.0"

__all__ = [
    "LORA_TARGET_MODULES",
    "convert_checkpoint",
    "ops",
    "save_self_contained",
    "weight_decay_groups",
    "xLSTMCache",
    "xLSTMConfig",
    "xLSTMForCausalLM",
    "xLSTMForQuestionAnswering",
    "xLSTMForSequenceClassification",
    "xLSTMForTokenClassification",
    "xLSTMModel",
    "xLSTMPreTrainedModel",
]

# Transformers has classes of its own for this model type, which lack most of what these do. They stay reachable in
# `transformers.models.xlstm`; what resolves a checkpoint by its type or by its architecture's name gets ours.
AutoConfig.register(xLSTMConfig.model_type, xLSTMConfig, exist_ok=True)
AutoModel.register(xLSTMConfig, xLSTMModel, exist_ok=True)
AutoModelForCausalLM.register(xLSTMConfig, xLSTMForCausalLM, exist_ok=True)
AutoModelForQuestionAnswering.register(xLSTMConfig, xLSTMForQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(xLSTMConfig, xLSTMForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(xLSTMConfig, xLSTMForTokenClassification, exist_ok=True)
_CLASSES = (
    xLSTMConfig,
    xLSTMForCausalLM,
    xLSTMForQuestionAnswering,
    xLSTMForSequenceClassification,
    xLSTMForTokenClassification,
    xLSTMModel,
    xLSTMPreTrainedModel,
)
# TRL and `transformers serve` look there. While parts of it are imported, Transformers may put another module object
# in its own place; who imported it before us has the old one.
for _module in (transformers, sys.modules["transformers"]):
    for _class in _CLASSES:
        setattr(_module, _class.__name__, _class)

# imported at their first use
_LAZY = {"convert_checkpoint": ".conversion", "save_self_contained": ".hub"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
