"""The same mixins on models of Transformers, to compare with: run by `python -m tests.conformance --references`."""

import unittest

import transformers
from mixins import Suite


class InTreeXLSTMTest(Suite, unittest.TestCase):
    all_model_classes = (transformers.xLSTMModel, transformers.xLSTMForCausalLM)
    fields = {"hidden_size": 128, "num_heads": 2, "chunk_size": 8, "ffn_proj_factor": 1.0}


class Mamba2Test(Suite, unittest.TestCase):
    all_model_classes = (transformers.Mamba2Model, transformers.Mamba2ForCausalLM)
    fields = {"num_heads": 8, "n_groups": 8, "state_size": 2, "head_dim": 8, "chunk_size": 8}


class LlamaTest(Suite, unittest.TestCase):
    has_attentions = True
    all_model_classes = (
        transformers.LlamaModel,
        transformers.LlamaForCausalLM,
        transformers.LlamaForSequenceClassification,
        transformers.LlamaForTokenClassification,
    )
    fields = {"num_attention_heads": 2, "intermediate_size": 32}
