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
    in_tree, ours = transformers.xLSTMConfig().to_dict(), xLSTMConfig().to_dict()
    aliases = {"embedding_dim": "hidden_size", "num_blocks": "num_hidden_layers"}
    for name, value in in_tree.items():
        if name != "transformers_version":
            assert ours[aliases.get(name, name)] == value, name


def test_auto_classes_take_ours(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is xLSTMConfig
    assert type(AutoModel.from_config(config)) is xLSTMModel
    assert type(AutoModelForCausalLM.from_config(config)) is xLSTMForCausalLM


@pytest.mark.parametrize(
    "names",
    [("hidden_size", "num_hidden_layers"), ("embedding_dim", "num_blocks"), ("embedding_dim", "num_layers")],
    ids=str,
)
def test_aliases(names, tmp_path):
    width, depth = names
    first = xLSTMConfig(**{width: 96, depth: 3}, num_heads=3)
    for config in (first, xLSTMConfig.from_dict(saved(first, tmp_path)), xLSTMConfig.from_pretrained(tmp_path)):
        assert config.hidden_size == config.embedding_dim == 96
        assert config.num_hidden_layers == config.num_blocks == config.num_layers == 3
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


@pytest.mark.parametrize("slstm_at, layer_types", [([1], MIXED), ([], None), ("all", SLSTM), ((0, 1), SLSTM)], ids=str)
def test_slstm_at(slstm_at, layer_types, tmp_path):
    """The `xlstm` package's way to say where the sLSTM blocks are."""
    config = tiny_config(slstm_at=slstm_at)
    assert config.layer_types == layer_types
    assert config.slstm_at == [index for index, kind in enumerate(config.layers_block_type) if kind == "slstm"]
    assert "slstm_at" not in saved(config, tmp_path)
    read = xLSTMConfig.from_pretrained(tmp_path, slstm_at=[0])
    assert read.layers_block_type == ["slstm", "mlstm"]


@pytest.mark.parametrize(
    "alias, name, value",
    [
        ("bias", "use_bias", True),
        ("tie_weights", "tie_word_embeddings", True),
        ("add_post_blocks_norm", "add_out_norm", False),
        ("logits_soft_cap", "output_logit_soft_cap", 7.0),
        ("qkv_proj_blocksize", "qkv_block_size", 8),
    ],
)
def test_names_of_other_implementations(alias, name, value):
    assert getattr(tiny_config(**{alias: value}), name) == value


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"slstm_at": [2]}, r'`slstm_at` must be "all" or a list of indices from 0 to 1, got \[2\]'),
        ({"slstm_at": [-1]}, r"`slstm_at` must be"),
        ({"slstm_at": "some"}, r"`slstm_at` must be.*got 'some'"),
        ({"slstm_at": 1}, r"`slstm_at` must be.*got 1"),
        ({"slstm_at": [0], "layer_types": MIXED}, r"`slstm_at`.*`layer_types`.*contradict"),
        ({"num_layers": 3, "num_blocks": 2}, r"`num_layers`=3 contradict"),
        ({"mlstm_block": {"mlstm": {}}}, r"`mlstm_block`.*`config_from_xlstm`"),
        ({"conv1d_kernel_size": 4}, r"`conv1d_kernel_size`.*use `mlstm_conv_kernel_size`"),
        ({"proj_factor": 2.0}, r"`proj_factor`.*use `mlstm_inner_dim`"),
        ({"recurrent_weight_init": "standard"}, r"`recurrent_weight_init`.*use `slstm_recurrent_init`"),
        ({"act_fn": "relu"}, r"`act_fn`='relu' describes another model.*'silu'"),
        ({"norm_type": "layernorm"}, r"`norm_type`='layernorm' describes another model.*'rmsnorm'"),
        ({"add_qk_norm": True}, r"`add_qk_norm`=True describes another model"),
        ({"add_embedding_dropout": True}, r"`add_embedding_dropout`=True"),
        ({"cell_norm_eps": 1e-5}, r"`cell_norm_eps`=1e-05"),
        ({"head_dim": 9}, r"`head_dim`=9 describes another model.*8"),
        ({"intermediate_size": 100}, r"`intermediate_size`=100 describes another model.*128"),
        ({"mlstm_round_up_to_multiple_of": 64}, r"`mlstm_round_up_to_multiple_of`=64.*16 and 32"),
    ],
    ids=str,
)
def test_fields_that_describe_another_model_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_fields_that_describe_this_model_are_accepted():
    """What NX-AI/xLSTM-7b's file says beyond the fields of Transformers' own class, and what Transformers passes."""
    others = {"head_dim": 8, "add_qk_norm": False, "add_post_norm": False, "add_post_blocks_norm": True}
    others |= {"cell_norm_eps": 1e-6, "norm_type": "rmsnorm", "mlstm_round_up_to_multiple_of": 16, "act_fn": "swish"}
    others |= {"igate_bias_init_range": -10.0, "force_bos_token_insert": True, "forward_backend_name": "chunkwise"}
    transformers_own = {"torch_dtype": "float32", "id2label": {0: "a", 1: "b", 2: "c"}, "output_attentions": False}
    config = tiny_config(**others, **transformers_own, context_length=2048, my_own_note="kept")
    assert config.my_own_note == "kept" and config.num_labels == 3


def test_bias_in_the_last_norm_keeps_other_classes_away(tmp_path):
    config = tiny_config(use_bias=True, out_norm_bias=True)
    fields = saved(config, tmp_path)
    assert fields["out_norm_bias"] is True and fields["layer_types"] == ["mlstm"] * 2
    assert xLSTMConfig.from_pretrained(tmp_path).out_norm_bias
    assert "out_norm_bias" not in saved(tiny_config(use_bias=True), tmp_path)
    with pytest.raises(ValueError, match="`out_norm_bias` needs"):
        tiny_config(out_norm_bias=True, add_out_norm=False)


def test_code_that_is_not_there_is_not_pointed_to(tmp_path):
    config = tiny_config(auto_map={"AutoConfig": "configuration_xlstm.xLSTMConfig"})
    assert "auto_map" not in saved(config, tmp_path)
    (tmp_path / "configuration_xlstm.py").write_text("")
    assert saved(config, tmp_path)["auto_map"] == config.auto_map
    config = tiny_config(auto_map={"AutoConfig": "me/repository--configuration_xlstm.xLSTMConfig"})
    (tmp_path / "configuration_xlstm.py").unlink()
    assert saved(config, tmp_path)["auto_map"] == config.auto_map


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
