"""Weights of 8 and 4 bits: what is quantised, what is saved, and the products that decode from them on a CPU."""

import copy
import re
from pathlib import Path

import pytest
import torch
from common import relative_error, tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from hf_xlstm import linear, quantized, xLSTMForCausalLM
from hf_xlstm.commands.helpers.tokens import train_tokenizer
from hf_xlstm.integration import with_unquantized_modules
from hf_xlstm.linear import joint_linear


needs_kernel = pytest.mark.skipif(not quantized.HAS_KERNEL, reason="8-bit products have kernels on x86 only")
# a product in bfloat16 against float64: of the scales and of the result
ROUNDING = 2 * torch.finfo(torch.bfloat16).eps


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights need torchao")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def torchao_int4():
    prototype = pytest.importorskip("torchao.prototype.quantization.int4", reason="int4 weights on a CPU need torchao")
    return TorchAoConfig(prototype.PrototypeInt4WeightOnlyConfig(group_size=64, set_inductor_config=False))


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes", reason="8-bit and NF4 weights need bitsandbytes")
    return BitsAndBytesConfig(**options)


QUANTIZATIONS = {
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def dequantized(layer: nn.Linear) -> torch.Tensor:
    """The weight (D_out, D_in) that a layer stands for, in float64."""
    weight, kind = layer.weight, type(layer.weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).double()
    if kind == "Int8Params":
        quantized, scale = (weight.CB, weight.SCB) if weight.CB is not None else (layer.state.CB, layer.state.SCB)
        return quantized.double() * scale.double()[:, None] / 127
    if kind == "Int4OpaqueTensor":  # in an order that depends on the processor, and that its own product knows
        eye = torch.eye(weight.shape[1])
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return product(eye, weight.qdata, weight.block_size[1], weight.scale_and_zero.float()).double().t()
    if kind == "Int8Tensor":
        return weight.qdata.double() * weight.scale.double()
    return weight.double()


def exact(model: xLSTMForCausalLM) -> xLSTMForCausalLM:
    """The model in float64, with the weights that the quantised ones stand for."""
    copied = xLSTMForCausalLM(model.config).double().eval()
    parameters, modules = dict(copied.named_parameters()), dict(model.named_modules())
    for name, parameter in parameters.items():
        layer = modules[name.rpartition(".")[0]]
        is_weight = isinstance(layer, nn.Linear) and name.endswith(".weight")
        parameter.data.copy_(dequantized(layer) if is_weight else model.get_parameter(name))
    return copied


@pytest.fixture
def saved(tmp_path):
    tiny_model(hidden_size=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(directory, quantization: str, dtype: torch.dtype = torch.float32) -> xLSTMForCausalLM:
    config = QUANTIZATIONS[quantization]()
    return xLSTMForCausalLM.from_pretrained(directory, quantization_config=config, dtype=dtype, device_map={"": "cpu"})


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_gates_and_heads_are_not_quantised(quantization, saved):
    """On processors with AVX512-BF16, bitsandbytes refuses 4-bit weights of fewer than 32 outputs, such as gates."""
    model = load(saved, quantization)
    weights = xLSTMForCausalLM.from_pretrained(saved).state_dict()
    for name, module in model.named_modules():
        if name == "lm_head" or name.endswith(("igate_preact", "fgate_preact")):
            assert type(module) is nn.Linear and torch.equal(module.weight.float(), weights[f"{name}.weight"])
        elif isinstance(module, nn.Linear):
            assert type(module) is not nn.Linear or type(module.weight) is not nn.Parameter
    generated = model.generate(tokens(2, 5), max_new_tokens=4)
    assert generated.shape == (2, 9)


def test_named_modules_are_kept_instead(saved):
    for config in (BitsAndBytesConfig(load_in_8bit=True), {"load_in_8bit": True, "quant_method": "bitsandbytes"}):
        assert "igate_preact" in with_unquantized_modules(config).llm_int8_skip_modules
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    assert with_unquantized_modules(config).llm_int8_skip_modules == ["lm_head"]
    assert with_unquantized_modules(BitsAndBytesConfig(load_in_8bit=True)) is not config


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@torch.no_grad()
def test_steps_are_those_of_the_dequantised_model(quantization, saved):
    """In bfloat16, for which there are packed products. The weights before quantisation are far from the bound."""
    model, ids = load(saved, quantization, torch.bfloat16), tokens(2, 9)
    unquantised = exact(xLSTMForCausalLM.from_pretrained(saved, dtype=torch.bfloat16))
    expected, cache, logits = exact(model)(ids).logits, None, []
    for token in ids.split(1, dim=1):
        outputs = model(token, cache=cache, use_cache=True)
        cache = outputs.cache
        logits.append(outputs.logits)
    # bitsandbytes rounds the inputs of 8-bit layers to 8 bits, too
    bound = 0.1 if quantization == "bitsandbytes int8" else 0.03
    assert relative_error(torch.cat(logits, 1), expected) < bound
    if quantization in ("torchao int4", "bitsandbytes nf4"):
        assert relative_error(unquantised(ids).logits, expected) > 2 * bound


@pytest.mark.parametrize("quantization", [name for name in QUANTIZATIONS if name != "torchao int4"])
@torch.no_grad()
def test_a_quantised_model_is_saved_and_loaded(quantization, saved, tmp_path):
    model, ids = load(saved, quantization, torch.bfloat16), tokens(2, 9)
    model.save_pretrained(tmp_path / "quantised")
    loaded = xLSTMForCausalLM.from_pretrained(tmp_path / "quantised", device_map={"": "cpu"})
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_weights_in_the_order_of_one_processor_are_not_saved(saved, tmp_path):
    with pytest.raises(ValueError, match="Int4OpaqueTensor"):
        load(saved, "torchao int4", torch.bfloat16).save_pretrained(tmp_path / "quantised")


def test_a_weight_that_cannot_be_quantised_is_not_called_missing(saved):
    """torchao's other int4 weights want a GPU."""
    quantization = pytest.importorskip("torchao.quantization", reason="int4 weights need torchao")
    config = TorchAoConfig(quantization.Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d"))
    with pytest.raises(RuntimeError, match="conversion"):
        xLSTMForCausalLM.from_pretrained(saved, quantization_config=config, device_map={"": "cpu"})


RECIPES = {"torchao": 2, "bitsandbytes": 1}  # packages, and how many blocks of the page use them
PAGE = Path(__file__).parents[1] / "docs" / "xlstm-7b.md"


@pytest.mark.parametrize("package", RECIPES)
def test_recipes_for_the_7b(package, tmp_path, monkeypatch):
    """The console blocks of its page, on a small model in its place."""
    section = PAGE.read_text(encoding="utf-8").partition("## On a laptop")[2].partition("\n## ")[0]
    recipes = [code for code in re.findall(r"```console\n(.*?)```", section, re.S) if package in code.lower()]
    assert len(recipes) == RECIPES[package]
    pytest.importorskip(package, reason=f"the recipe needs {package}")
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["the capital of France is Paris"], vocab_size=300)
    tiny_model(hidden_size=64, vocab_size=len(tokenizer)).save_pretrained("model")
    for code in recipes:
        lines = re.findall(r"^(?:>>>|\.\.\.) ?(.*)$", code, re.M)
        names = {"AutoModelForCausalLM": AutoModelForCausalLM, "torch": torch, "name": "model"}
        exec("\n".join(lines), names | {"tokenizer": tokenizer, "ids": tokens(1, 5)})


# ---- the product with 8-bit weights


@pytest.fixture
def products(monkeypatch):
    """The calls of the 8-bit product so far."""
    calls = []

    def count(*args):
        calls.append(args)
        return quantized.int8_product(*args)

    monkeypatch.setattr(linear, "int8_product", count)
    return calls


def int8_layer(inputs: int = 96, outputs: int = 37, bias: bool = True, dtype: torch.dtype = torch.bfloat16):
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights need torchao")
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


@needs_kernel
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_int8_product(bias, products):
    layer = int8_layer(bias=bias)
    for shape in ((1, 1, 96), (3, 1, 96), (2, 7, 96), (64, 96)):
        x = torch.randn(shape).bfloat16()
        expected = x.double() @ dequantized(layer).t() + (layer.bias.double() if bias else 0)
        for inputs in (x, x.mT.contiguous().mT):
            (y,) = joint_linear(inputs, layer)
            assert y.dtype == torch.bfloat16 and relative_error(y, expected) < ROUNDING
    assert len(products) == 8


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, from an address that only their own size divides."""
    copied = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert copied.data_ptr() % 64 == x.element_size()
    return copied


@needs_kernel
@torch.no_grad()
def test_int8_product_of_tensors_that_start_anywhere(products):
    """PyTorch's kernel ends the process on addresses that are not aligned, such as those in a file."""
    layer, x = int8_layer(), torch.randn(1, 1, 96).bfloat16()
    (expected,) = joint_linear(x, layer)
    layer.weight.qdata = misaligned(layer.weight.qdata)
    for inputs in (x, misaligned(x)):
        assert torch.equal(joint_linear(inputs, layer)[0], expected)
    assert len(products) == 3


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass(layer):
    layer.__class__ = Doubled


@needs_kernel
@pytest.mark.parametrize(
    "change",
    [
        subclass,
        lambda layer: layer.register_forward_hook(lambda layer, args, y: 2 * y),
        lambda layer: layer.register_forward_pre_hook(lambda layer, args: (2 * args[0],)),
        lambda layer: setattr(layer, "forward", lambda x: 2 * x[..., :37]),
    ],
    ids=["subclass", "hook", "pre-hook", "other forward"],
)
@torch.no_grad()
def test_a_layer_that_does_more_is_called(change, products):
    layer, x = int8_layer(), torch.randn(2, 1, 96).bfloat16()
    plain = layer(x)
    change(layer)
    (y,) = joint_linear(x, layer)
    assert torch.equal(y, layer(x)) and not torch.equal(y, plain)
    assert not products


@needs_kernel
@torch.no_grad()
def test_what_the_int8_product_is_not_for(products):
    x = torch.randn(2, 1, 96).bfloat16()
    for layer, inputs in (
        (int8_layer(inputs=40), x[..., :40]),  # the kernel would read past the scales
        (int8_layer(dtype=torch.float32), x.float()),
        (int8_layer(), torch.randn(65, 96).bfloat16()),
        (int8_layer(), x[:0]),
    ):
        (y,) = joint_linear(inputs, layer)
        assert torch.equal(y, layer(inputs))
    with torch.enable_grad():
        inputs = x.clone().requires_grad_()
        joint_linear(inputs, int8_layer())[0].sum().backward()
    assert inputs.grad.abs().sum() > 0
    assert not products


@needs_kernel
def test_generation_uses_the_int8_product(saved, products):
    model = load(saved, "torchao int8", torch.bfloat16)
    model.generate(tokens(1, 5), max_new_tokens=2, do_sample=False)
    layers = sum(type(layer.weight) is not nn.Parameter for layer in model.modules() if isinstance(layer, nn.Linear))
    assert len(products) >= layers > 0
    assert copy.deepcopy(model).generate(tokens(1, 5), max_new_tokens=2).shape == (1, 7)
