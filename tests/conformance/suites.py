"""Hugging Face's mixins on our classes. Run by `python -m tests.conformance`, which puts the mixins on the path."""

import unittest

import torch
from mixins import Suite

import hf_xlstm


class XLSTMSuite(Suite):
    all_model_classes = (
        hf_xlstm.xLSTMModel,
        hf_xlstm.xLSTMForCausalLM,
        hf_xlstm.xLSTMForSequenceClassification,
        hf_xlstm.xLSTMForTokenClassification,
    )
    # chunks shorter than the sequence, so that one forward pass crosses chunk borders
    fields = {"num_heads": 4, "chunk_size": 8}
    test_can_init_all_missing_weights_before_2023 = True  # upstream reads the age of a model from a copyright line
    _torch_compile_train_cls = hf_xlstm.xLSTMForCausalLM

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Upstream gives labels to the classes that its own tables name, which lack our heads."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is hf_xlstm.xLSTMForSequenceClassification:
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
        elif return_labels and model_class is hf_xlstm.xLSTMForTokenClassification:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def test_model_weights_reload_no_missing_tied_weights(self):
        self.skipTest("Wants a checkpoint without weights to load, at random; ours refuses it and names the weights")


class MLSTMTest(XLSTMSuite, unittest.TestCase):
    pass


class WithLayerTypes(XLSTMSuite):
    def setUp(self):
        super().setUp()
        # in the file, next to layer types of ours, the number of layers has its other name: see xLSTMConfig.to_dict
        inputs = self.config_tester.inputs_dict
        inputs["num_blocks"] = inputs.pop("num_hidden_layers")


class MixedTest(WithLayerTypes, unittest.TestCase):
    fields = XLSTMSuite.fields | {"layer_types": ["mlstm", "slstm"]}


class SLSTMTest(WithLayerTypes, unittest.TestCase):
    fields = XLSTMSuite.fields | {"layer_types": ["slstm", "slstm"]}
