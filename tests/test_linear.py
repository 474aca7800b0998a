"""Linear layers on the CPU: oneDNN's products, and blocked weights while decoding from a cache."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from common import relative_error, tiny_model, tokens
from torch import nn

from hf_xlstm import linear, xLSTMCache
from hf_xlstm.linear import BLOCK_FROM_STEP, decoding, joint_linear, linear_of
from hf_xlstm.pointwise import swiglu


needs_onednn = pytest.mark.skipif(not linear.ONEDNN, reason="oneDNN is used on x86 processors only")


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(linear, "MIN_SIZE", 0)


@pytest.fixture
def products(monkeypatch) -> list[torch.Tensor]:
    """The weights of all products that oneDNN was asked for, in order."""
    weights, product = [], linear._product

    def spy(x, weight, bias=None):
        weights.append(weight)
        return product(x, weight, bias)

    monkeypatch.setattr(linear, "_product", spy)
    return weights


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (2, 1, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("out_features", [7, 40])
def test_forward_and_gradients(shape, out_features, bias):
    layer, x = nn.Linear(24, out_features, bias=bias), inputs(*shape).requires_grad_()
    dy = inputs(*shape[:-1], out_features)
    parameters = [x, *layer.parameters()]
    exact = [p.detach().double().requires_grad_() for p in parameters]
    expected = F.linear(*exact)
    expected_grads = torch.autograd.grad(expected, exact, dy.double())
    y = linear.linear(x, layer)
    grads = torch.autograd.grad(y, parameters, dy)
    with torch.no_grad():
        assert torch.equal(linear.linear(x, layer), y)
    for actual, wanted in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert actual.shape == wanted.shape and actual.is_contiguous()
        assert relative_error(actual, wanted) < 1e-6


@needs_onednn
def test_frozen_weights_and_strided_inputs(products):
    layer, x = nn.Linear(24, 7).requires_grad_(False), inputs(24, 10).t().requires_grad_()
    (dx,) = torch.autograd.grad(linear.linear(x, layer).sum(), x)
    assert len(products) == 2  # forward and dx, no gradient of the weight
    assert relative_error(dx, layer.weight.sum(0).expand(10, -1)) < 1e-6


def test_second_derivatives_are_refused_rather_than_wrong():
    layer, x = nn.Linear(4, 3), inputs(2, 4).requires_grad_()
    (dx,) = torch.autograd.grad(linear.linear(x, layer).square().sum(), x, create_graph=True)
    if linear.ONEDNN:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@pytest.mark.parametrize("frozen", ["nothing", "weight", "input"])
def test_result_of_a_function_is_not_kept(frozen):
    layer, (gate, up) = nn.Linear(24, 7, bias=False), inputs(2, 3, 5, 24)
    layer.requires_grad_(frozen != "weight")
    gate.requires_grad_(frozen != "input")
    up.requires_grad_(frozen != "input")
    leaves = [x for x in (gate, up, layer.weight) if x.requires_grad]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        y = linear_of(swiglu, layer, gate, up)
    assert set(kept) == {x.data_ptr() for x in (gate, up, layer.weight)}
    dy = inputs(3, 5, 7)
    expected = torch.autograd.grad(F.linear(F.silu(gate) * up, layer.weight), leaves, dy)
    for actual, wanted in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-6


def test_function_of_an_adapted_layer():
    layer, (gate, up) = nn.Linear(24, 7), inputs(2, 3, 24).requires_grad_()
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    assert (
        relative_error(linear_of(swiglu, layer, gate, up), 2 * F.linear(F.silu(gate) * up, layer.weight, layer.bias))
        < 1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_usual_way(dtype, products):
    layer, x = nn.Linear(24, 7).to(dtype), inputs(3, 24, dtype=dtype)
    assert torch.equal(linear.linear(x, layer), F.linear(x, layer.weight, layer.bias)) and not products
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.linear(x.float(), layer.float()).dtype == torch.bfloat16 and not products


# ---- blocked weights


def warm(model: nn.Module, cache: xLSTMCache) -> None:
    for _ in range(BLOCK_FROM_STEP - 1):
        with decoding(model, cache):
            pass


@torch.no_grad()
@needs_onednn
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_product_of_blocked_weights(dtype, rows, products):
    layers = nn.ModuleList([nn.Linear(24, 7), nn.Linear(24, 40, bias=False), nn.Linear(24, 1)]).to(dtype)
    cache, x = xLSTMCache(tiny_model().config), inputs(rows, 1, 24, dtype=dtype)
    expected = [F.linear(x.double(), y.weight.double(), None if y.bias is None else y.bias.double()) for y in layers]
    warm(layers, cache)
    products.clear()
    with decoding(layers, cache):
        for _ in range(2):
            for y, wanted in zip(joint_linear(x, *layers), expected, strict=True):
                assert y.dtype == dtype and relative_error(y, wanted) < (1e-6 if dtype == torch.float32 else 5e-3)
    blocked = [weight for weight in products if weight.is_mkldnn]
    assert len(blocked) == 2


@torch.no_grad()
@needs_onednn
def test_blocked_only_when_it_pays_and_only_while_the_cache_lives(products):
    model, ids = tiny_model().to(torch.bfloat16), tokens(1, 2 * BLOCK_FROM_STEP)
    cache = xLSTMCache(model.config)
    model(ids[:, :4], cache=cache)  # a step like the others
    for step in range(2, 2 * BLOCK_FROM_STEP):
        products.clear()
        model(ids[:, step : step + 1], cache=cache)
        assert bool(products) == (step >= BLOCK_FROM_STEP)
    products.clear()
    assert torch.equal(model(ids, cache=xLSTMCache(model.config)).logits.isfinite().all(), torch.tensor(True))
    assert not products  # another cache
    blocked = weakref.ref(linear._decodings[cache])
    assert blocked() is not None
    del cache
    gc.collect()
    assert blocked() is None


@torch.no_grad()
@needs_onednn
def test_blocked_weights_follow_the_weights():
    model, ids = tiny_model().to(torch.bfloat16), tokens(1, 3 * BLOCK_FROM_STEP)
    cache = xLSTMCache(model.config)
    for step in range(2 * BLOCK_FROM_STEP):
        model(ids[:, step : step + 1], cache=cache)
    fresh = copy.deepcopy(cache)  # the state only
    for parameter in model.parameters():
        parameter.mul_(0.5)
    expected = model(ids[:, -1:], cache=fresh).logits
    assert torch.equal(model(ids[:, -1:], cache=cache).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_with_and_without(dtype, batch_size, monkeypatch):
    model, ids = tiny_model(layer_types=["mlstm", "slstm"]).to(dtype), tokens(batch_size, 5)
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    blocked = model.generate(ids, **options)
    monkeypatch.setattr(linear, "ONEDNN", False)
    plain = model.generate(ids, **options)
    assert torch.equal(blocked.sequences, plain.sequences)
    logits = (torch.stack(x.logits) for x in (blocked, plain))
    assert relative_error(*logits) < (1e-5 if dtype == torch.float32 else 3e-2)


@torch.no_grad()
@needs_onednn
def test_changed_layers_are_called_as_they_are(products):
    layer, x = nn.Linear(24, 7).to(torch.bfloat16), inputs(1, 24, dtype=torch.bfloat16)
    cache = xLSTMCache(tiny_model().config)
    warm(layer, cache)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    with decoding(layer, cache):
        (y,) = joint_linear(x, layer)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias) + 1) and not products


class Doubled(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


@torch.no_grad()
@needs_onednn
@pytest.mark.parametrize("change", ["adapter", "hook", "weight", "data"])
def test_changes_while_decoding(change, products):
    layers = nn.ModuleList([nn.Linear(24, 7), nn.Linear(24, 5)]).to(torch.bfloat16)
    x, cache = inputs(1, 24, dtype=torch.bfloat16), xLSTMCache(tiny_model().config)
    warm(layers, cache)
    with decoding(layers, cache):
        joint_linear(x, *layers)
        assert products
        if change == "adapter":
            layers[1] = Doubled(layers[1])
        elif change == "hook":
            layers[1].register_forward_hook(lambda module, args, output: 2 * output)
        elif change == "weight":
            layers[1].weight.mul_(2)
        else:
            layers[1].weight.data = 2 * layers[1].weight.data
        products.clear()
        for actual, layer in zip(joint_linear(x, *layers), layers, strict=True):
            assert torch.equal(actual, layer(x))
    assert not products
