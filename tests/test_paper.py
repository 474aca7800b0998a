"""What is special about `block_family="paper"`; STACKS["paper"] takes it through the tests of everything else."""

import json
import math

import pytest
import torch
import transformers.models.xlstm.modeling_xlstm as in_tree
from common import MIXED, MLSTM, STACKS, assert_same_states, relative_error, tiny_config, tiny_model, tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_xlstm import xLSTMCache, xLSTMConfig, xLSTMForCausalLM
from hf_xlstm.configuration_xlstm import PAPER_FIELDS


def test_defaults_are_those_of_the_package():
    config = xLSTMConfig.paper(hidden_size=768, num_hidden_layers=24, num_heads=4, slstm_num_heads=8)
    assert (config.norm_eps, config.gate_soft_cap, config.output_logit_soft_cap) == (1e-5, None, None)
    assert (config.mlstm_conv_kernel_size, config.slstm_conv_kernel_size, config.qkv_block_size) == (4, 4, 4)
    assert (config.mlstm_inner_dim, config.ffn_dim, config.qk_head_dim, config.v_head_dim) == (1536, 1024, 384, 384)
    assert config.layers_block_type == ["mlstm"] * 24
    # rounded up, where the other family rounds down: 246 * 2.086 = 513.156
    assert xLSTMConfig.paper(hidden_size=246, num_heads=2, ffn_proj_factor=2.086).ffn_dim == 576


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"gate_soft_cap": 15.0}, r"`gate_soft_cap` must be None.*`xLSTMConfig.paper`"),
        ({"block_family": "small"}, r"`block_family` must be one of large, paper, got 'small'"),
        ({"mlstm_inner_dim": 66}, r"`mlstm_inner_dim` must be divisible by `num_heads`, got 66 and 4"),
        ({"mlstm_inner_dim": 72, "qkv_block_size": 16}, r"`mlstm_inner_dim` must be divisible by `qkv_block_size`"),
        ({"mlstm_conv_kernel_size": 0}, r"`mlstm_conv_kernel_size` must be positive, got 0"),
        ({"qkv_block_size": -4}, r"`qkv_block_size` must be positive, got -4"),
        ({"dropout": 1.0}, r"`dropout` must be at least 0 and below 1, got 1.0"),
        ({"block_family": "large", "dropout": 0.1}, r"`dropout` needs `block_family=\"paper\"`, got 0.1"),
    ],
    ids=str,
)
def test_configuration_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**PAPER_FIELDS | fields)


@pytest.mark.parametrize("layer_types", [MLSTM, MIXED], ids=str)
def test_checkpoint(layer_types, tmp_path):
    """Reads as it was written, and is refused by Transformers' own class, which would start it at random."""
    model = tiny_model(**PAPER_FIELDS, layer_types=layer_types, use_bias=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    with pytest.raises(Exception, match=r"gate_soft_cap|layer_types"):
        in_tree.xLSTMForCausalLM.from_pretrained(tmp_path)


def test_large_models_are_written_without_fields_of_the_paper(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (
        not {"block_family", "mlstm_inner_dim", "mlstm_conv_kernel_size", "qkv_block_size", "dropout"} & fields.keys()
    )


def test_initialisation():
    """As the package's `reset_parameters`."""
    torch.manual_seed(0)
    config = xLSTMConfig.paper(
        hidden_size=128, num_hidden_layers=4, num_heads=4, vocab_size=500, layer_types=MIXED * 2
    )
    small, residual = math.sqrt(2 / (5 * 128)), 2 / (4 * math.sqrt(128))
    normal = dict.fromkeys(("out_proj", "proj_down"), residual) | dict.fromkeys(
        ("embeddings", "lm_head", "proj_up", "q_proj", "k_proj", "v_proj", "igate", "fgate", "zgate", "ogate"), small
    )
    for name, value in xLSTMForCausalLM(config).named_parameters():
        module, kind = name.split(".")[-2:]
        if kind == "weight" and module in normal:
            assert abs(value.std() / normal[module] - 1) < 0.06, name
        elif module == "conv":  # torch's own: uniform
            assert 0.4 < value.abs().max() <= 0.5, name
        elif kind == "learnable_skip":
            assert (value == 1).all(), name
        elif name.endswith("igate_preact.bias"):
            assert 0 < value.abs().max() < 0.5, name
        elif name.endswith("fgate_preact.bias"):
            assert torch.equal(value, torch.linspace(3, 6, 4)), name
        elif not name.endswith("slstm_layer.bias"):  # norms, maps into the mLSTM's gates, recurrent weights
            assert (value == 0).all(), name


def test_norms_are_spared_weight_decay(tmp_path):
    model = tiny_model(**STACKS["paper"])
    names = Trainer(model, TrainingArguments(tmp_path)).get_decay_parameter_names(model)
    assert not [name for name in names if "norm" in name or name.endswith("bias")]
    assert "backbone.blocks.0.mlstm_layer.proj_up.weight" in names


def test_dropout():
    """Dropout acts in training only, on the output of the mLSTM layer and on that of the sLSTM before its norm."""
    model = tiny_model(**STACKS["paper"], dropout=0.5)
    same = tiny_model(**STACKS["paper"])
    ids = tokens(2, 9)
    assert torch.equal(model(ids).logits, same(ids).logits)
    x = torch.randn(2, 50, 32)
    mlstm, slstm = model.backbone.blocks[0].mlstm_layer, model.backbone.blocks[1].slstm_layer
    expected, y = mlstm(x), mlstm.train()(x)
    assert 0.45 < (y == 0).float().mean() < 0.55
    assert torch.allclose(y[y != 0], 2 * expected[y != 0])
    with torch.no_grad():
        slstm.multihead_norm.weight.zero_()
    expected, y = slstm(x), slstm.train()(x)
    assert relative_error(y, expected) > 0.1
    heads = y.unflatten(-1, (4, 8))
    assert heads.mean(-1).abs().max() < 1e-5  # normed after the dropout
    # what was dropped is the same number all over a head
    assert (
        sum((head == value).sum() for head in heads.flatten(0, -2) for value in [head.mode().values]) > 0.4 * y.numel()
    )


def test_convolution_of_the_mlstm_reaches_across_a_cache():
    """Token by token, and in pieces shorter than its taps."""
    model = tiny_model(**PAPER_FIELDS, mlstm_conv_kernel_size=5)
    ids = tokens(2, 9)
    cache = xLSTMCache(model.config)
    with torch.no_grad():
        whole = model(ids)
        pieces = [model(piece, cache=cache).logits for piece in ids.split([2, 1, 3, 1, 2], dim=1)]
    assert cache.layers[0].conv_state.shape == (2, 4, 64)
    assert relative_error(torch.cat(pieces, dim=1), whole.logits) < 1e-5
    assert_same_states(cache, whole.cache)


def test_cache_of_another_convolution():
    """Its inputs would not fit."""
    cache = tiny_model(**PAPER_FIELDS)(tokens(2, 5)).cache
    with pytest.raises(ValueError, match=r"layer 0 is mlstm \(4, 16, 16, 4\), the model's is mlstm \(4, 16, 16, 3\)"):
        tiny_model(**PAPER_FIELDS, mlstm_conv_kernel_size=3)(tokens(2, 1), cache=cache)
