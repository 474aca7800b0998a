"""Hugging Face's mixins in one suite, for any model with a causal language model among its heads."""

import transformers_tests.test_fsdp_mixin as fsdp_mixin
import transformers_tests.test_modeling_common as modeling_common
import transformers_tests.test_tensor_parallel_mixin as tensor_parallel_mixin
from transformers import PreTrainedConfig, PreTrainedModel
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_training_mixin import TrainingTesterMixin


# upstream runs the parallel tests for a list of its own models only; None, by its own comment, lifts that
fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
# upstream wants one CPU per process; the processes of these tiny models share one gladly
fsdp_mixin._get_available_fsdp_workers = lambda: 8


class ModelTester:
    """A tiny model and a batch for it, in the attributes that the mixins read."""

    is_training = True
    batch_size, seq_length = 4, 13

    def __init__(self, config_class: type[PreTrainedConfig], causal_lm_class: type[PreTrainedModel], fields: dict):
        sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        self.config_class, self.causal_lm_class = config_class, causal_lm_class
        self.fields = sizes | tokens | fields
        vars(self).update(self.fields)

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        input_ids = modeling_common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": input_ids.new_ones(input_ids.shape)}


class Suite(
    modeling_common.ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    fsdp_mixin.FSDPTesterMixin,
    tensor_parallel_mixin.TensorParallelTesterMixin,
):
    """The base model first, then the causal language model, then other heads."""

    all_model_classes: tuple[type[PreTrainedModel], ...]
    fields: dict  # of the configuration
    has_attentions = False
    model_tester = None

    def setUp(self):
        base, causal_lm = self.all_model_classes[:2]
        self.model_tester = ModelTester(base.config_class, causal_lm, self.fields)
        self.config_tester = ConfigTester(self, config_class=base.config_class, **self.model_tester.fields)

    def test_config(self):
        self.config_tester.run_common_tests()
