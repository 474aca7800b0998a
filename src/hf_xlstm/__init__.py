"""xLSTM for Hugging Face Transformers. Importing this package registers its classes with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

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


__version__ = "0.1.0.dev0"

__all__ = [
    "LORA_TARGET_MODULES",
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

# Transformers has a class of its own for this model type; after `import hf_xlstm` the Auto classes take ours.
AutoConfig.register(xLSTMConfig.model_type, xLSTMConfig, exist_ok=True)
AutoModel.register(xLSTMConfig, xLSTMModel, exist_ok=True)
AutoModelForCausalLM.register(xLSTMConfig, xLSTMForCausalLM, exist_ok=True)
AutoModelForQuestionAnswering.register(xLSTMConfig, xLSTMForQuestionAnswering, exist_ok=True)
AutoModelForSequenceClassification.register(xLSTMConfig, xLSTMForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(xLSTMConfig, xLSTMForTokenClassification, exist_ok=True)
