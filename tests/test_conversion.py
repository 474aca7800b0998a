"""Checkpoints of the `xlstm` package and what is built on it: opened as they are, converted, and converted back."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from common import MIXED, assert_same_states, relative_error, tiny_model, tokens
from paper_reference import logits_and_states, parameter_shapes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_xlstm import conversion, files, xLSTMCache, xLSTMConfig, xLSTMForCausalLM, xLSTMModel
from hf_xlstm.conversion import convert_checkpoint, native_shapes
from hf_xlstm.formats.configs import config_to_large
from hf_xlstm.formats.weights import Layout, weights_from_foreign, weights_to_foreign
from hf_xlstm_cli import run_verb


# in the terms of the reference
BASE = {
    "width": 32, "vocab": 61, "heads": 4, "slstm_heads": 4, "inner": 64, "ffn": 64, "block": 4, "taps": 4,
    "slstm_taps": 4, "bias": False, "post_norm": True, "group_norm": True, "blocks": "msm", "tied": False,
}  # fmt: skip
VARIANTS = {
    "mixed": {},
    "mlstm": {"blocks": "mm"},
    "slstm": {"blocks": "ss"},
    "tied": {"tied": True},
    "bias": {"bias": True},
    "bare": {"post_norm": False, "group_norm": False, "slstm_taps": 0},
    # 1.5 * 48 is rounded up to 128, 2.2 * 48 = 105.6 to 128
    "widths": {"width": 48, "heads": 2, "slstm_heads": 6, "inner": 128, "ffn": 128, "block": 8, "taps": 3},
}
FACTORS = {"widths": (1.5, 2.2)}  # of the two projections, where they are not the package's defaults


def package_config(variant: str) -> dict:
    """As the package and Helibrunna write it."""
    config = BASE | VARIANTS[variant]
    mlstm = {"num_heads": config["heads"], "conv1d_kernel_size": config["taps"], "qkv_proj_blocksize": config["block"]}
    slstm = {"num_heads": config["slstm_heads"], "conv1d_kernel_size": config["slstm_taps"], "backend": "vanilla"}
    slstm |= {"group_norm_weight": config["group_norm"]}
    feedforward = {}
    if variant in FACTORS:
        mlstm["proj_factor"], feedforward["proj_factor"] = FACTORS[variant]
    fields = {
        "num_blocks": len(config["blocks"]),
        "embedding_dim": config["width"],
        "vocab_size": config["vocab"],
        "context_length": 64,
        "slstm_at": [index for index, kind in enumerate(config["blocks"]) if kind == "s"],
        "bias": config["bias"],
        "add_post_blocks_norm": config["post_norm"],
        "tie_weights": config["tied"],
    }
    if "m" in config["blocks"]:
        fields["mlstm_block"] = {"mlstm": mlstm}
    if "s" in config["blocks"]:
        fields["slstm_block"] = {"slstm": slstm, "feedforward": feedforward}
    return fields


def package_weights(variant: str, seed: int = 0) -> dict[str, torch.Tensor]:
    config = BASE | VARIANTS[variant]
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(config)
    if config["tied"]:
        del shapes["lm_head.weight"]
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def as_cuda_backend(weights: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    """The sLSTM's parameters as the package's other backend keeps them: (N, d_in, 4 d_out), [head][gate][unit]."""
    changed = dict(weights)
    for name, x in weights.items():
        if name.endswith("_recurrent_kernel_"):
            changed[name] = x.transpose(1, 2).contiguous()
        elif name.endswith("_bias_"):
            changed[name] = x.view(4, heads, -1).transpose(0, 1).flatten().contiguous()
    return changed


def write_package(directory, variant: str, weights: dict[str, torch.Tensor] | None = None, kind: str = "yaml"):
    """Writes a checkpoint of the package (`kind="yaml"`), or one wrapped into a Transformers model with its
    configuration under the name `kind`."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = package_weights(variant) if weights is None else weights
    if kind == "yaml":
        (directory / "config.yaml").write_text(yaml.safe_dump(package_config(variant)))
    else:
        auto_map = {"AutoConfig": "configuration_xlstm.xLSTMConfig", "AutoModelForCausalLM": "modeling_xlstm.xLSTM"}
        fields = {"model_type": "xlstm", "auto_map": auto_map, kind: package_config(variant)}
        (directory / "config.json").write_text(
            json.dumps(fields | {"vocab_size": BASE["vocab"], "torch_dtype": "float32"})
        )
        weights = {name if name.startswith("lm_head") else f"model.{name}": x for name, x in weights.items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def large(directory, fused: bool = False, **fields):
    """A native model, and the same as `xLSTMLarge` writes it."""
    # with `use_bias` all norms of `xLSTMLarge` have one
    model = tiny_model(**fields, out_norm_bias=fields.get("use_bias", False) and fields.get("add_out_norm", True))
    weights = dict(model.state_dict())
    weights["embedding.weight"] = weights.pop("backbone.embeddings.weight")
    if fused:
        for index in range(2):
            layer = f"backbone.blocks.{index}."
            for whole, parts in {
                "mlstm_layer.qkv_opreact": ["q", "k", "v", "ogate_preact"],
                "mlstm_layer.ifgate_preact": ["igate_preact", "fgate_preact"],
                "ffn.proj_up_gate_z": ["proj_up_gate", "proj_up"],
            }.items():
                module = layer + whole.split(".")[0]
                for kind in ("weight", "bias"):
                    if f"{module}.{parts[0]}.{kind}" in weights:
                        joined = [weights.pop(f"{module}.{part}.{kind}") for part in parts]
                        weights[f"{layer}{whole}.{kind}"] = torch.cat(joined)
    directory.mkdir()
    save_file(weights, directory / "model.safetensors")
    config = {"embedding_dim": 32, "num_blocks": 2, "num_heads": 4, "vocab_size": 61, "ffn_proj_factor": 2.6667}
    config |= {"weight_mode": "fused" if fused else "single"} | fields
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return model, weights


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype and torch.equal(actual[name], x), name


# ---- numbers


@pytest.mark.parametrize("kind", ["yaml", "_xlstm_config", "xlstm_cfg"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_gradients_and_states(variant, kind, tmp_path):
    """Errors of the model opened as it is, in float64, against the paper's equations, which have no `eps` beside m."""
    config, weights = BASE | VARIANTS[variant], package_weights(variant)
    write_package(tmp_path / "foreign", variant, kind=kind)
    model = xLSTMForCausalLM.from_pretrained(tmp_path / "foreign", eps=1e-30).double()
    parameters = {name: x.double().requires_grad_() for name, x in weights.items()}
    ids = tokens(2, 11)
    expected, states = logits_and_states(parameters, config, ids)
    cache = xLSTMCache(model.config)
    actual = model(ids, cache=cache).logits
    assert relative_error(actual, expected) < 1e-10

    direction = torch.randn_like(expected)
    grads = dict(zip(parameters, torch.autograd.grad((expected * direction).sum(), parameters.values())))
    (actual * direction).sum().backward()
    native = {name: x.grad for name, x in model.named_parameters() if name != "lm_head.weight" or not config["tied"]}
    for rule in Layout.of(weights).rules(native, model.config):
        if rule.foreign:
            for name, x in zip(rule.native, rule.to_native(*(grads[name] for name in rule.foreign)), strict=True):
                assert (native[name] - x).norm() < 1e-9 * x.norm() + 1e-10, name

    for layer, state in zip(cache.layers, states, strict=True):
        x = layer.tensors()
        scale = torch.exp(x["m"])
        c, n = (x["c"], x["n"]) if layer.layer_type == "slstm" else (x["c"] * scale[..., None, None], x["n"])
        if layer.layer_type == "mlstm":
            assert relative_error(c, state["c"]) < 1e-10
            assert relative_error(n * scale[..., None], state["n"]) < 1e-10
        else:
            assert relative_error(c * scale, state["c"].view_as(c)) < 1e-10
            assert relative_error(n * scale, state["n"].view_as(n)) < 1e-10
            assert relative_error(x["h"], state["h"].view_as(c)) < 1e-10
        if "conv" in state:
            assert relative_error(x["conv"], state["conv"]) < 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_package(variant, tmp_path):
    """Logits and decode states of `xLSTMLMModel` itself, where it is installed."""
    package = pytest.importorskip("xlstm", reason="the xlstm package is not a dependency")
    dacite = pytest.importorskip("dacite", reason="the xlstm package needs it")
    ours = xLSTMForCausalLM.from_pretrained(write_package(tmp_path / "foreign", variant)).double()
    convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
    convert_checkpoint(tmp_path / "native", tmp_path / "back", to="xlstm")  # a config.yaml of our making, too
    fields = yaml.safe_load((tmp_path / "back" / "config.yaml").read_text())
    weights = load_file(tmp_path / "back" / "model.safetensors")
    theirs = package.xLSTMLMModel(dacite.from_dict(package.xLSTMLMModelConfig, fields)).double().eval()
    theirs.load_state_dict(weights)
    # its sequence form has a fixed length at most, and its steps are the plainest thing it has
    ids, cache, state, logits = tokens(2, 11), xLSTMCache(ours.config), None, []
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            step, state = theirs.step(token) if state is None else theirs.step(token, state)
            logits.append(step)
        assert relative_error(ours(ids, cache=cache).logits, torch.cat(logits, dim=1)) < 1e-6
        assert relative_error(ours(ids).logits, theirs(ids)) < 1e-5
        converted = conversion.cache_from_xlstm(state, ours.config, seen_tokens=11)
        assert_same_states(converted, cache)
        following = tokens(2, 1, seed=1)
        expected = theirs.step(following, state)[0]
        assert relative_error(ours(following, cache=converted).logits, expected) < 1e-6
        expected = theirs.step(following, conversion.cache_to_xlstm(cache, ours.config))[0]
        assert relative_error(ours(following, cache=cache).logits, expected) < 1e-6


# ---- there and back


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["vanilla", "cuda"])
def test_package_round_trip(variant, backend, tmp_path):
    weights = package_weights(variant)
    if backend == "cuda":
        weights = as_cuda_backend(weights, (BASE | VARIANTS[variant])["slstm_heads"])
    write_package(tmp_path / "foreign", variant, weights)
    report = convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
    assert report.verified and report.nbytes == sum(
        x.nbytes for x in load_file(tmp_path / "native/model.safetensors").values()
    )
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "native").state_dict()
    assert_same_tensors(xLSTMForCausalLM.from_pretrained(tmp_path / "foreign").state_dict(), converted)
    same = write_package(tmp_path / "same", variant)
    assert_same_tensors(xLSTMForCausalLM.from_pretrained(same).state_dict(), converted)
    convert_checkpoint(tmp_path / "native", tmp_path / "back", to="xlstm", slstm_backend=backend)
    back = load_file(tmp_path / "back/model.safetensors")
    if (BASE | VARIANTS[variant])["tied"]:  # the package's `load_state_dict` wants the head as well
        assert torch.equal(back.pop("lm_head.weight"), back["token_embedding.weight"])
    if not (BASE | VARIANTS[variant])["group_norm"]:  # a weight of zero is none
        for name in [name for name in back if name.endswith("group_norm.weight")]:
            assert not back.pop(name).any()
    assert_same_tensors(back, weights)


@pytest.mark.parametrize("tied", [False, True])
def test_wrapper_round_trip(tied, tmp_path):
    variant = "tied" if tied else "mixed"
    write_package(tmp_path / "foreign", variant, kind="_xlstm_config")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "foreign")
    assert type(model) is xLSTMForCausalLM
    convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
    convert_checkpoint(tmp_path / "native", tmp_path / "back", to="xlstm_wrapper")
    assert_same_tensors(
        load_file(tmp_path / "back/model.safetensors"), load_file(tmp_path / "foreign/model.safetensors")
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@pytest.mark.parametrize("kind", ["yaml", "_xlstm_config", "xlstm_cfg"])
def test_backbone_of_a_language_model(kind, tmp_path):
    write_package(tmp_path, "mixed", kind=kind)
    backbone, model = xLSTMModel.from_pretrained(tmp_path), xLSTMForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(backbone.state_dict(), model.backbone.state_dict())
    model.generate(tokens(1, 3), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(
    "fields", [{}, {"use_bias": True}, {"use_bias": True, "add_out_norm": False}, {"ffn_proj_factor": 3.3}], ids=str
)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_shard_size", [10**9, 5000])
def test_large_round_trip(fused, fields, max_shard_size, tmp_path):
    model, weights = large(tmp_path / "foreign", fused, **fields)
    convert_checkpoint(tmp_path / "foreign", tmp_path / "native", max_shard_size=max_shard_size)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert_same_tensors(converted.state_dict(), model.state_dict())
    assert_same_tensors(xLSTMForCausalLM.from_pretrained(tmp_path / "foreign").state_dict(), model.state_dict())
    options = {"fused": fused, "max_shard_size": max_shard_size}
    report = convert_checkpoint(tmp_path / "native", tmp_path / "back", to="xlstm_large", **options)
    assert report.files[0] == ("model.safetensors" if max_shard_size == 10**9 else "model_0.safetensors")
    back = {name: x for file in report.files for name, x in load_file(tmp_path / "back" / file).items()}
    assert_same_tensors(back, weights)
    config = yaml.safe_load((tmp_path / "back/config.yaml").read_text())
    assert config["weight_mode"] == ("fused" if fused else "single") and config["embedding_dim"] == 32
    assert_same_tensors(xLSTMForCausalLM.from_pretrained(tmp_path / "back").state_dict(), model.state_dict())
    convert_checkpoint(tmp_path / "back", tmp_path / "again")  # also from shards
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict(), model.state_dict())


def test_width_of_the_feed_forward_layer_is_that_of_the_tensors(tmp_path):
    """Implementations round the same factor to different widths: 384 * 2.6667 to 1024 or to 1088."""
    model = tiny_model(hidden_size=384, num_heads=4, ffn_proj_factor=2.8)
    assert model.config.ffn_dim == 1088
    model.save_pretrained(tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign/config.json").read_text())
    (tmp_path / "foreign/config.json").write_text(json.dumps(config | {"ffn_proj_factor": 2.6667}))
    with pytest.raises(ValueError, match=r"misshapen.*ffn\.proj_down"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "foreign")
    convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert_same_tensors(converted.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_companions_stay(dtype, tmp_path):
    weights = {name: x.to(dtype) for name, x in package_weights("mixed").items()}
    weights["lm_head.weight"][0, 0] = float("nan")  # not equal to itself, and yet what it should be
    write_package(tmp_path / "foreign", "mixed", weights)
    (tmp_path / "foreign/tokenizer.json").write_text("{}")
    (tmp_path / "foreign/tokenizer").mkdir()  # no file of a model
    (tmp_path / "foreign/generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')
    convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
    assert (tmp_path / "native/tokenizer.json").read_text() == "{}"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "native").generation_config.temperature == 0.3
    assert {x.dtype for x in load_file(tmp_path / "native/model.safetensors").values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "native").dtype == dtype


def test_pickle_of_tensors(tmp_path):
    write_package(tmp_path / "foreign", "mixed")
    (tmp_path / "foreign/model.safetensors").unlink()
    torch.save(package_weights("mixed"), tmp_path / "foreign/model.pt")
    convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
    expected = xLSTMForCausalLM.from_pretrained(write_package(tmp_path / "same", "mixed")).state_dict()
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "native").state_dict(), expected)


def test_tirex_layers():
    """The sLSTM layers of TiRex, whose norms have weights around zero."""
    model = tiny_model(layer_types=["slstm"] * 2, slstm_norm_eps=1e-5, slstm_recurrent_init="uniform")
    names = [name for name in model.state_dict() if name.startswith(("backbone.blocks", "backbone.out_norm"))]
    native = {name: model.state_dict()[name] for name in names}
    foreign = weights_to_foreign(native, Layout("tirex", prefix="block_stack."), model.config)
    layer = "block_stack.blocks.1.slstm_layer."
    assert torch.equal(foreign[f"{layer}fgate.weight"], native["backbone.blocks.1.slstm_layer.igate.weight"])
    kernel = foreign[f"{layer}slstm_cell._recurrent_kernel_"]  # (N, D_in, 4 D_out)
    weight = native["backbone.blocks.1.slstm_layer.recurrent_weight"]
    assert torch.equal(kernel.view(4, 8, 4, 8)[2, :, 3], weight[3, 2].mT)
    bias = foreign[f"{layer}slstm_cell._bias_"].view(4, 4, 8)
    assert torch.equal(bias[2, 3], native["backbone.blocks.1.slstm_layer.bias"][3, 2])
    norm = foreign[f"{layer}group_norm.weight"]
    torch.testing.assert_close(norm + 1, native["backbone.blocks.1.slstm_layer.multihead_norm.weight"])
    again = weights_from_foreign(foreign, names, model.config)
    for name, x in native.items():
        torch.testing.assert_close(again[name], x, rtol=0, atol=1e-6 if "multihead_norm" in name else 0)


def convert_command(*arguments: str) -> int:
    """The exit status of `hf-xlstm convert`."""
    with pytest.raises(SystemExit) as end:
        run_verb("convert", arguments, "hf-xlstm convert")
    return end.value.code or 0


def test_script(tmp_path, capsys):
    write_package(tmp_path / "foreign", "mixed")
    for source, target, *options in (
        ("foreign", "native"),
        ("native", "back", "--to", "xlstm", "--slstm-backend", "cuda"),
    ):
        arguments = [str(tmp_path / source), str(tmp_path / target), *options]
        assert convert_command(*arguments) == 0
        assert "equal to the source" in capsys.readouterr().out
    expected = as_cuda_backend(package_weights("mixed"), 4)
    assert_same_tensors(load_file(tmp_path / "back/model.safetensors"), expected)
    assert convert_command(*arguments) == 2
    assert capsys.readouterr().err.endswith("back exists.\n")


# ---- what goes wrong


NAME = "xlstm_block_stack.blocks.0.xlstm.proj_up.weight"
KERNEL = "xlstm_block_stack.blocks.1.xlstm.slstm_cell._recurrent_kernel_"


@pytest.mark.parametrize("how", ["convert", "open"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(NAME), r"lacks weights: xlstm_block_stack\.blocks\.0\.xlstm\.proj_up\.weight"),
        (lambda w: w.pop("lm_head.weight"), r"lacks weights: lm_head\.weight"),
        (lambda w: w.update(extra=torch.ones(1)), r"has unknown weights: extra"),
        (lambda w: w.update({NAME: w[NAME][1:].clone()}), r"misshapen.*blocks\.0\.mlstm_layer\.proj_up\.weight"),
        (lambda w: w.update({KERNEL: w[KERNEL][:, 1:].clone()}), r"misshapen.*_recurrent_kernel_ \(4, 31, 8\)"),
    ],
    ids=["missing", "no head", "extra", "misshapen", "recurrent kernel"],
)
def test_checkpoint_that_does_not_fit(change, message, how, tmp_path):
    weights = package_weights("mixed")
    change(weights)
    write_package(tmp_path / "foreign", "mixed", weights)
    with pytest.raises(ValueError, match=message):
        if how == "convert":
            convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
        else:
            xLSTMForCausalLM.from_pretrained(tmp_path / "foreign")
    assert os.listdir(tmp_path) == ["foreign"]


@pytest.mark.parametrize("how", ["convert", "open"])
def test_tied_head_that_is_not_the_embedding(how, tmp_path):
    weights = package_weights("tied")
    weights["lm_head.weight"] = weights["token_embedding.weight"].clone()
    write_package(tmp_path / "foreign", "tied", weights)
    xLSTMForCausalLM.from_pretrained(tmp_path / "foreign")
    weights["lm_head.weight"][3] += 1
    write_package(tmp_path / "foreign", "tied", weights)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*differ"):
        if how == "convert":
            convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
        else:
            xLSTMForCausalLM.from_pretrained(tmp_path / "foreign")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"slstm_block": {"feedforward": {"act_fn": "relu"}}}, "`act_fn`='relu' is not supported"),
        ({"slstm_block": {"feedforward": {"ff_type": "ffn"}}}, "`ff_type`='ffn' is not supported"),
        ({"slstm_block": {"slstm": {"function": "lstm"}}}, "`function`='lstm' is not supported"),
        ({"slstm_block": None}, "no `slstm_block`"),
        ({"slstm_block": None, "mlstm_block": None}, "neither `mlstm_block` nor `slstm_block`"),
    ],
    ids=str,
)
def test_variant_that_is_not_supported(change, message, tmp_path):
    write_package(tmp_path / "foreign", "mixed")
    (tmp_path / "foreign/config.yaml").write_text(yaml.safe_dump(package_config("mixed") | change))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "foreign", tmp_path / "native")


def test_field_of_xlstm_large_that_would_change_the_model(tmp_path):
    large(tmp_path / "foreign")
    fields = yaml.safe_load((tmp_path / "foreign/config.yaml").read_text())
    (tmp_path / "foreign/config.yaml").write_text(yaml.safe_dump(fields | {"add_qk_norm": True}))
    with pytest.raises(ValueError, match="`add_qk_norm`=True describes another model"):
        xLSTMForCausalLM.from_pretrained(tmp_path / "foreign")


def test_model_that_the_target_does_not_have(tmp_path):
    tiny_model(layer_types=MIXED).save_pretrained(tmp_path / "mixed")
    with pytest.raises(ValueError, match="`xlstm_large` has no model with `layer_types`"):
        convert_checkpoint(tmp_path / "mixed", tmp_path / "foreign", to="xlstm_large")
    with pytest.raises(ValueError, match="`xlstm` has no model with `block_family`='large'"):
        convert_checkpoint(tmp_path / "mixed", tmp_path / "foreign", to="xlstm")
    with pytest.raises(ValueError, match="`to` must be one of"):
        convert_checkpoint(tmp_path / "mixed", tmp_path / "foreign", to="gguf")
    write_package(tmp_path / "package", "mixed")
    with pytest.raises(ValueError, match="convert it to `hf_xlstm` first"):
        convert_checkpoint(tmp_path / "package", tmp_path / "foreign", to="xlstm_large")
    assert sorted(os.listdir(tmp_path)) == ["mixed", "package"]


def test_target_and_source(tmp_path):
    write_package(tmp_path / "foreign", "mixed")
    (tmp_path / "native").mkdir()
    convert_checkpoint(tmp_path / "foreign", tmp_path / "native")  # empty: not there
    before = sorted(os.listdir(tmp_path / "native"))
    with pytest.raises(FileExistsError):
        convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
    assert sorted(os.listdir(tmp_path / "native")) == before
    (tmp_path / "foreign/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        convert_checkpoint(tmp_path / "foreign", tmp_path / "more")


def test_damaged_file(tmp_path):
    file = write_package(tmp_path / "foreign", "mixed") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut off"):
        convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
    assert os.listdir(tmp_path) == ["foreign"]


def pickled(x) -> bytes:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, contents",
    [
        ("model.pt", b"xx"),
        ("model.pt", pickled({"weights": os.system})),  # with code
        ("model.bin", pickled([1, 2])),
        ("config.yaml", b"a: ["),
        ("config.yaml", b"[1, 2]"),
        ("config.yaml", b"a: 1"),
        ("config.yaml", b"\xff\xfe"),
        ("config.yaml", b"{num_blocks: many, embedding_dim: 32, vocab_size: 61}"),
        ("config.json", b"{"),
        ("config.json", b"[1]"),
        ("config.json", b'{"model_type": "xlstm", "hidden_size": "wide"}'),
        ("config.json", b'{"model_type": "xlstm", "_xlstm_config": {}}'),
        ("config.json", b'{"model_type": "llama", "hidden_size": 32}'),
        ("model.safetensors", b""),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:20]),
)
def test_damaged_source_is_named_in_one_line(name, contents, tmp_path, capsys):
    source = write_package(tmp_path / "foreign", "mixed")
    if name.startswith("config"):
        (source / "config.yaml").unlink()
    else:
        (source / "model.safetensors").unlink()
    (source / name).write_bytes(contents)
    assert convert_command(str(source), str(tmp_path / "native")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(source / name) in line
    assert os.listdir(tmp_path) == ["foreign"]


def test_a_cache_that_has_read_nothing_is_no_state_of_the_package():
    config = tiny_model(layer_types=MIXED).config
    with pytest.raises(ValueError, match="has read no token"):
        conversion.cache_to_xlstm(xLSTMCache(config), config)


def test_source_that_is_no_directory(tmp_path):
    """And no name of a repository on the Hub."""
    with pytest.raises(NotADirectoryError, match="some/name is not a directory"):
        convert_checkpoint("some/name", tmp_path / "native")


def test_two_conversions_to_one_target(tmp_path, monkeypatch):
    """The second is refused, at whatever moment of the first it comes, and the first is whole."""
    write_package(tmp_path / "foreign", "mixed")
    convert_checkpoint(tmp_path / "foreign", tmp_path / "expected")
    write, refused = conversion.write_configuration, []

    def come_between(directory, *args):
        if not refused:  # another thread has a lock of its own, as another process has
            with pytest.raises(FileExistsError, match="native is being written by another process") as error:
                convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
            refused.append(error)
        write(directory, *args)

    monkeypatch.setattr(conversion, "write_configuration", come_between)
    convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
    assert refused and sorted(os.listdir(tmp_path)) == ["expected", "foreign", "native"]
    assert sorted(os.listdir(tmp_path / "native")) == sorted(os.listdir(tmp_path / "expected"))
    with pytest.raises(FileExistsError, match="native exists"):
        convert_checkpoint(tmp_path / "foreign", tmp_path / "native")


@pytest.mark.parametrize("when", ["known before", "while writing"])
def test_full_disk(when, tmp_path, monkeypatch):
    write_package(tmp_path / "foreign", "mixed")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if when == "known before":
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    else:  # as for a quota, the kernel refuses
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="disk has 5 left" if when == "known before" else "too large"):
            convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["foreign"]


def test_what_was_written_is_compared(tmp_path, monkeypatch):
    """A disk that returns something else than was written."""
    write_package(tmp_path / "foreign", "mixed")
    write = conversion.write_safetensors

    def write_badly(path, *args):
        write(path, *args)
        contents = bytearray(path.read_bytes())
        contents[-1] ^= 1
        path.write_bytes(contents)

    monkeypatch.setattr(conversion, "write_safetensors", write_badly)
    with pytest.raises(OSError, match="was not written as it should be"):
        convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
    assert os.listdir(tmp_path) == ["foreign"]


KILLED = """
import sys, time
from hf_xlstm import conversion
read = conversion.TensorFiles.read
def slow(self, name):
    if "partial" in str(self.paths[name]) or "ffn" in name:
        print("half way", flush=True)
        time.sleep(60)
    return read(self, name)
conversion.TensorFiles.read_meta = lambda self, name: read(self, name).to("meta")
conversion.TensorFiles.read = slow
conversion.convert_checkpoint("foreign", "native")
"""


def test_killed_half_way(tmp_path):
    write_package(tmp_path / "foreign", "mixed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=tmp_path, env=environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"half way\n"
        process.send_signal(signal.SIGKILL)
    source, partial = sorted(os.listdir(tmp_path))
    assert partial.startswith("native.partial-") and source == "foreign"
    convert_checkpoint(tmp_path / "foreign", tmp_path / "native")
    assert sorted(os.listdir(tmp_path)) == ["foreign", "native"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "native").config.block_family == "paper"


# ---- large checkpoints on small machines

MEASURED = """
import json, sys, torch
from pathlib import Path
from hf_xlstm import xLSTMForCausalLM
from hf_xlstm.conversion import convert_checkpoint

def peak():  # bytes, file pages in use included
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
if sys.argv[1] == "convert":
    convert_checkpoint("foreign", "native", max_shard_size=4 * 10**8)
else:
    options = {}
    if sys.argv[1] == "offload":
        blocks = {f"backbone.blocks.{index}": "disk" for index in range(8)}
        rest = dict.fromkeys(["backbone.embeddings", "backbone.out_norm", "lm_head"], "cpu")
        options = {"device_map": blocks | rest, "offload_folder": "offload"}
    directory = "foreign" if sys.argv[1] == "foreign" else "native"
    model = xLSTMForCausalLM.from_pretrained(directory, **options)
    assert model.dtype == torch.bfloat16
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        torch.save(model(ids).logits, f"{sys.argv[1]}.pt")
    if options:
        assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 8)
print(json.dumps([before, peak()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
def test_peak_memory(tmp_path):
    """The shape of xLSTM-7B, half as wide and a quarter as deep, in bfloat16: 1.2 GB."""
    config = xLSTMConfig(hidden_size=2048, num_hidden_layers=8, num_heads=8)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in native_shapes(config).items()
    }
    tensors = weights_to_foreign(tensors, Layout("xlstm_large", joined=True), config)
    size, largest = (f(x.nbytes for x in tensors.values()) for f in (sum, max))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.yaml").write_text(yaml.safe_dump(config_to_large(config, "fused")))
    pattern = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = (pattern.repeat(-(-x.numel() // 2**20))[: x.numel()].view(x.shape) for x in tensors.values())
    conversion.write_safetensors(tmp_path / "foreign/model.safetensors", tensors, values, lambda nbytes: None)

    def measure(what: str) -> tuple[int, int]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", MEASURED, what]
        return json.loads(
            subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True).stdout
        )

    assert measure("foreign")[1] < 1.4 * size  # converted one by one while they are read
    before, peak = measure("convert")
    assert peak - before < 2.5 * largest  # what is written, and the same read again
    shutil.rmtree(tmp_path / "foreign")
    assert len(list((tmp_path / "native").glob("*.safetensors"))) > 2
    assert measure("load")[1] < 1.3 * size  # 0.4 GB of them Python's and torch's own
    before, peak = measure("offload")
    assert peak - before < 0.6 * size  # embedding and head are a third of it
    torch.testing.assert_close(*(torch.load(tmp_path / f"{what}.pt") for what in ("offload", "load")))
