"""xLSTMConfig: the fields of Transformers' own class, true aliases, the widths of the layers."""

import json
import re

import pytest
import transformers
from common import MIXED, SLSTM, tiny_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_xlstm import xLSTMConfig, xLSTMForCausalLM, xLSTMModel


def saved(config: xLSTMConfig, directory) -> dict:
    config.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


def test_defaults_are_those_of_transformers():
    theirs, ours = transformers.xLSTMConfig().to_dict(), xLSTMConfig().to_dict()
    aliases = {"embedding_dim": "hidden_size", "num_blocks": "num_hidden_layers"}
    for name, value in theirs.items():
        if name != "transformers_version":
            assert ours[aliases.get(name, name)] == value, name


def test_auto_classes_take_ours(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is xLSTMConfig
    assert type(AutoModel.from_config(config)) is xLSTMModel
    assert type(AutoModelForCausalLM.from_config(config)) is xLSTMForCausalLM


@pytest.mark.parametrize("names", [("hidden_size", "num_hidden_layers"), ("embedding_dim", "num_blocks")], ids=str)
def test_aliases(names, tmp_path):
    width, depth = names
    first = xLSTMConfig(**{width: 96, depth: 3}, num_heads=3)
    for config in (first, xLSTMConfig.from_dict(saved(first, tmp_path)), xLSTMConfig.from_pretrained(tmp_path)):
        assert config.hidden_size == config.embedding_dim == 96
        assert config.num_hidden_layers == config.num_blocks == 3
    setattr(config, width, 192)
    assert config.hidden_size == config.embedding_dim == 192


def test_aliases_may_repeat_but_not_contradict():
    assert xLSTMConfig(hidden_size=96, embedding_dim=96, num_heads=3).hidden_size == 96
    with pytest.raises(ValueError, match=r"`hidden_size`.*96.*`embedding_dim`.*128"):
        xLSTMConfig(hidden_size=96, embedding_dim=128)


@pytest.mark.parametrize(
    "fields", [{}, {"layer_types": MIXED}, {"gate_soft_cap": None, "output_logit_soft_cap": None}]
)
def test_round_trip(fields, tmp_path):
    config = tiny_config(**fields)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}


@pytest.mark.parametrize("layer_types", [None, ["mlstm"] * 2])
def test_all_mlstm_is_written_without_layer_types(layer_types, tmp_path):
    """So that Transformers' own class can read it."""
    config = tiny_config(layer_types=layer_types)
    assert config.layer_types is None
    assert config.layers_block_type == ["mlstm"] * 2
    assert "layer_types" not in saved(config, tmp_path)


def test_mixed_is_written_with_layer_types(tmp_path):
    assert saved(tiny_config(layer_types=MIXED), tmp_path)["layer_types"] == MIXED


@pytest.mark.parametrize(
    "hidden_size, factor, multiple, width",
    [
        (768, 2.667, 64, 2048),
        (1024, 2.667, 64, 2752),
        (3072, 2.667, 64, 8256),
        (4096, 2.667, 64, 10944),
        (32, 2.1, 1, 67),
    ],
)
def test_feed_forward_width(hidden_size, factor, multiple, width):
    """Rounded in floating point, which sometimes rounds down: as other implementations do."""
    config = xLSTMConfig(hidden_size=hidden_size, ffn_proj_factor=factor, ffn_round_up_to_multiple_of=multiple)
    assert config.ffn_dim == width


@pytest.mark.parametrize(
    "fields, widths",
    [
        ({"hidden_size": 4096}, (2048, 4096, 256, 512)),
        ({"hidden_size": 96, "num_heads": 3}, (48, 96, 16, 32)),
        ({"hidden_size": 30, "num_heads": 3, "qk_dim_factor": 0.31, "v_dim_factor": 1.1}, (9, 33, 3, 11)),
    ],
)
def test_cell_widths(fields, widths):
    config = xLSTMConfig(**fields)
    assert (config.qk_dim, config.v_dim, config.qk_head_dim, config.v_head_dim) == widths


def test_kernel_choices_of_others_are_accepted():
    """As NX-AI's README tells users to set them."""
    config = xLSTMConfig(
        chunkwise_kernel="chunkwise--triton_xl_chunk",
        sequence_kernel="native_sequence__triton",
        step_kernel="triton",
        mode="train_with_padding",
        return_last_states=False,
        autocast_kernel_dtype="float32",
        inference_state_dtype="bfloat16",
    )
    assert config.chunkwise_kernel == "chunkwise--triton_xl_chunk"


@pytest.mark.parametrize("layer_types", [None, MIXED, SLSTM], ids=str)
def test_tensor_parallel_plan_names_what_is_there(layer_types):
    model = xLSTMModel(tiny_config(layer_types=layer_types, use_bias=True))
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()]]
    assert model.config.base_model_tp_plan.keys() <= {re.sub(r"\.\d+", ".*", name) for name in names}
