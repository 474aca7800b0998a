"""Linear layers on the CPU: oneDNN's products, the prepacked copy of the weights, and everything that wants to see a
layer called."""

import contextlib
import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from common import STACKS, relative_error, tiny_model, tokens
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hf_xlstm import linear, xLSTMModel
from hf_xlstm.linear import PackedWeightsMixin, is_plain, is_watched, joint_linear, recompute_linear
from hf_xlstm.pointwise import swiglu


needs_onednn = pytest.mark.skipif(not linear.ONEDNN, reason="oneDNN is used on x86 processors only")
DTYPES = [torch.float32, torch.bfloat16]


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


class Layers(PackedWeightsMixin, nn.Module):
    """Two layers of the same input, and one of what both make of it."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype = torch.float32, sizes: tuple[int, int, int] = (24, 40, 7)):
        super().__init__()
        torch.manual_seed(0)
        width, inner, out = sizes
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, out)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = joint_linear(x, self.gate, self.up)
        return recompute_linear(gated_silu, self.down, gate, up)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(gated_silu(self.gate(x), self.up(x)))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small products, on a processor that has instructions for bfloat16 and is not Intel's, whatever it is."""
    monkeypatch.setattr(linear, "MIN_SIZE", 0)
    monkeypatch.setattr(linear, "NO_BFLOAT16", False)
    monkeypatch.setattr(linear, "INTEL", False)


@pytest.fixture
def products(monkeypatch) -> list[torch.Tensor]:
    """The weights of all products that oneDNN was asked for, in order."""
    weights, product = [], linear._onednn

    def spy(x, weight, bias=None):
        weights.append(weight)
        return product(x, weight, bias)

    monkeypatch.setattr(linear, "_onednn", spy)
    return weights


# ---- products


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (2, 1, 24), (2, 3, 5, 24), (24,), (0, 24)])
@pytest.mark.parametrize("out_features", [7, 40])
def test_forward_and_gradients(shape, out_features, bias):
    layer, x = nn.Linear(24, out_features, bias=bias), inputs(*shape).requires_grad_()
    dy = inputs(*shape[:-1], out_features)
    parameters = [x, *layer.parameters()]
    exact = [p.detach().double().requires_grad_() for p in parameters]
    expected = F.linear(*exact)
    expected_grads = torch.autograd.grad(expected, exact, dy.double())
    (y,) = joint_linear(x, layer)
    grads = torch.autograd.grad(y, parameters, dy)
    with torch.no_grad():
        assert torch.equal(joint_linear(x, layer)[0], y)
    for actual, wanted in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert actual.shape == wanted.shape and actual.is_contiguous()
        assert relative_error(actual, wanted) < 1e-6


@needs_onednn
def test_frozen_weights_and_strided_inputs(products):
    layer, x = nn.Linear(24, 7).requires_grad_(False), inputs(24, 10).t().requires_grad_()
    (dx,) = torch.autograd.grad(joint_linear(x, layer)[0].sum(), x)
    assert len(products) == 2  # forward and dx, no gradient of the weight
    assert relative_error(dx, layer.weight.sum(0).expand(10, -1)) < 1e-6


@pytest.mark.parametrize("frozen", ["nothing", "weight", "input"])
def test_result_of_a_function_is_not_kept(frozen):
    layer, (gate, up) = nn.Linear(24, 7, bias=False), inputs(2, 3, 5, 24)
    layer.requires_grad_(frozen != "weight")
    gate.requires_grad_(frozen != "input")
    up.requires_grad_(frozen != "input")
    leaves = [x for x in (gate, up, layer.weight) if x.requires_grad]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        y = recompute_linear(swiglu, layer, gate, up)
    assert set(kept) == {x.data_ptr() for x in (gate, up, layer.weight)}
    dy = inputs(3, 5, 7)
    expected = torch.autograd.grad(F.linear(F.silu(gate) * up, layer.weight), leaves, dy)
    for actual, wanted in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_usual_way(dtype, products):
    layer, x = nn.Linear(24, 7).to(dtype), inputs(3, 24, dtype=dtype)
    assert torch.equal(joint_linear(x, layer)[0], F.linear(x, layer.weight, layer.bias)) and not products
    with torch.autocast("cpu", torch.bfloat16):
        assert joint_linear(x.float(), layer.float())[0].dtype == torch.bfloat16 and not products


# ---- derivatives of every kind


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [linear.MIN_WIDENED_ROWS - 1, linear.MIN_WIDENED_ROWS])
@pytest.mark.parametrize("instructions", [False, True])
def test_bfloat16_of_processors_without_it(instructions, rows, bias, products, monkeypatch):
    """Many rows are multiplied in float32; results and gradients are bfloat16, and as exact as PyTorch's."""
    monkeypatch.setattr(linear, "NO_BFLOAT16", not instructions)
    layer = nn.Linear(24, 7, bias=bias).bfloat16()
    x, dy = inputs(rows, 24, dtype=torch.bfloat16).requires_grad_(), inputs(rows, 7, dtype=torch.bfloat16, seed=1)
    parameters = [x, *layer.parameters()]
    exact = [p.detach().double().requires_grad_() for p in parameters]
    expected = F.linear(*exact)
    (y,) = joint_linear(x, layer)
    assert [weight.dtype for weight in products] == [torch.float32] * (
        rows >= linear.MIN_WIDENED_ROWS and not instructions
    )
    grads = torch.autograd.grad(y, parameters, dy)
    for actual, wanted in zip(
        (y, *grads), (expected, *torch.autograd.grad(expected, exact, dy.double())), strict=True
    ):
        assert actual.dtype == torch.bfloat16 and actual.shape == wanted.shape
        assert relative_error(actual, wanted) < 2**-8
    with torch.no_grad():
        assert torch.equal(joint_linear(x, layer)[0], y)


def test_second_derivatives():
    model, x = Layers(torch.float64, (3, 4, 2)), inputs(2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *model.parameters()))
    assert torch.autograd.gradgradcheck(lambda x, *_: model(x), (x, *model.parameters()))


def test_one_tensor_for_two_arguments():
    layer, x = nn.Linear(24, 7), inputs(3, 24).requires_grad_()
    for create_graph in (False, True):
        actual, expected = (
            torch.autograd.grad(y.square().sum(), x, create_graph=create_graph)[0]
            for y in (recompute_linear(gated_silu, layer, x, x), layer(gated_silu(x, x)))
        )
        assert relative_error(actual, expected) < 1e-6


def test_transforms_of_functions():
    model, x, dx = Layers(), inputs(3, 24), inputs(3, 24, seed=1)
    parameters = dict(model.named_parameters())

    def loss(parameters, x, model=model):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    class Plain(Layers):
        forward = Layers.plain

    plain = Plain()
    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))):
        expected = transform(lambda p, x: loss(p, x, plain))(parameters, x)
        for name, actual in transform(loss)(parameters, x).items():
            assert relative_error(actual, expected[name]) < 1e-5, name
    expected = torch.func.jvp(plain, (x,), (dx,))[1]
    assert relative_error(torch.func.jvp(model, (x,), (dx,))[1], expected) < 1e-5
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = model(torch.autograd.forward_ad.make_dual(x, dx))
        assert relative_error(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected) < 1e-5
    x.requires_grad_()
    directions = inputs(4, 3, 7)
    actual, expected = (
        torch.autograd.grad(y, x, directions, is_grads_batched=True)[0] for y in (model(x), model.plain(x))
    )
    assert relative_error(actual, expected) < 1e-5


def test_meta_device():
    model = Layers().to("meta")
    assert model(torch.empty(3, 24, device="meta")).shape == (3, 7)


# ---- whoever wants to see a layer called


class Doubled(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)


class SubclassedLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def replace_class(layer):
    layer.__class__ = SubclassedLinear


def replace_forward(layer):  # as accelerate does where weights are offloaded
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def forward_hook(layer):
    layer.register_forward_hook(lambda module, args, output: 2 * output)


def kwargs_hook(layer):
    layer.register_forward_hook(lambda module, args, kwargs, output: 2 * output, with_kwargs=True)


def pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def kwargs_pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True)


def weight_as_attribute(layer):  # as in replicas of nn.DataParallel and FSDP's flattened parameters
    weight = layer.weight
    del layer.weight
    layer.weight = 2 * weight.detach()


def bias_as_attribute(layer):
    bias = layer.bias
    del layer.bias
    layer.bias = None if bias is None else 2 * bias.detach()


CHANGES = [
    replace_class,
    replace_forward,
    forward_hook,
    kwargs_hook,
    pre_hook,
    kwargs_pre_hook,
    weight_as_attribute,
    bias_as_attribute,
    parametrizations.weight_norm,
    weight_norm,
    lambda layer: prune.random_unstructured(layer, "weight", 0.5),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["gate", "down"])
def test_changed_layers_are_called_as_they_are(name, change):
    x = inputs(2, 1, 24)
    for packed in (False, True):
        model = Layers()
        if packed:
            model.pack_for_decoding()
            with torch.no_grad():
                model(x)
        change(getattr(model, name))
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                assert relative_error(model(x), model.plain(x)) < 1e-6
        assert not is_plain(getattr(model, name), x)


def test_replaced_layers_are_called():
    model, x = Layers(), inputs(2, 1, 24)
    model.pack_for_decoding()
    with torch.no_grad():
        model(x)
        model.up = Doubled(model.up)
        model.down = nn.Linear(40, 5)
        assert relative_error(model(x), model.plain(x)) < 1e-6


@pytest.mark.parametrize("name", ["gate", "down"])
@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_backward_hooks_of_a_layer_fire(kind, name):
    model, seen = Layers(), []
    getattr(getattr(model, name), f"register_{kind}")(lambda module, *grads: seen.append(module))
    model(inputs(2, 1, 24).requires_grad_()).sum().backward()
    assert seen == [getattr(model, name)]


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_global_hooks_fire(kind):
    model, seen = Layers(), []
    register = getattr(nn.modules.module, f"register_module_{kind}")
    handle = register(lambda module, *args: seen.append(module))
    try:
        model(inputs(2, 1, 24).requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert {model.gate, model.up, model.down} <= set(seen)


class DispatchSpy(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.append(func)
        return func(*args, **(kwargs or {}))


class FunctionSpy(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        seen.append(func)
        return func(*args, **(kwargs or {}))


seen: list = []


@pytest.mark.parametrize("packed", [False, True])
def test_modes_see_pytorchs_operators(packed):
    model, x = Layers(), inputs(2, 1, 24)
    if packed:
        model.pack_for_decoding()
        with torch.no_grad():
            model(x)
    seen.clear()
    with FunctionSpy():
        model(x)
    assert seen.count(F.linear) == 3
    seen.clear()
    with torch.no_grad(), DispatchSpy():
        model(x)
    assert {str(func).split(".")[0] for func in seen} <= {"aten"} and len(seen) >= 3


@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_flops_are_counted(backward):
    model, x = Layers(), inputs(2, 1, 24).requires_grad_()
    expected = 2 * 2 * (2 * 24 * 40 + 40 * 7)  # rows, multiplication and addition, weights
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() == expected
    loss = None
    with FlopCounterMode(display=False) as counter:
        if backward == "inside":
            loss = model(x).sum()
            loss.backward()
    assert counter.get_total_flops() == (3 * expected if backward == "inside" else 0)
    if backward == "outside":
        loss = model(x).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        recomputed = 2 * 2 * 40 * 7  # F.linear once more, through which PyTorch differentiates
        assert counter.get_total_flops() in (2 * expected, 2 * expected + recomputed, 3 * expected)


def test_replaced_functions_are_called(monkeypatch):
    """DeepSpeed's and other profilers replace F.linear."""
    calls, function = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(args) or function(*args))
    Layers()(inputs(2, 1, 24))
    assert len(calls) == 3


def test_traces_and_graphs_hold_linear_operators():
    model, x = Layers().requires_grad_(False), inputs(2, 1, 24)
    kinds = [node.kind() for node in torch.jit.trace(model, x).inlined_graph.nodes()]
    assert kinds.count("aten::linear") == 3
    graph = torch.export.export(model, (x,)).graph
    assert sum(node.target == torch.ops.aten.linear.default for node in graph.nodes) == 3


def test_nobody_watches_in_a_plain_forward_pass():
    assert not is_watched(inputs(2, 1, 24)) and is_plain(nn.Linear(24, 7), inputs(2, 1, 24))
    assert is_watched(nn.Parameter(inputs(2, 1, 24)))


def test_replica_of_data_parallel():
    """The layout of torch.nn.parallel.replicate, which needs several GPUs: weights are plain attributes."""
    model, x = tiny_model().train(), tokens(2, 8)
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            if child is not None:
                setattr(replica, name, copies[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.view_as(parameter))
    loss = copies[model](x, labels=x).loss
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = model(x, labels=x).loss
    expected.backward()
    assert torch.allclose(loss, expected)
    for actual, parameter in zip(grads, model.parameters(), strict=True):
        assert relative_error(actual, parameter.grad) < 1e-5


# ---- the prepacked copy


def is_one_copy(model: nn.Module) -> bool:
    """Whether all linear weights were copied once. Layers without a bias get zeros where one beside them has one."""
    return 1 <= model.packed_nbytes / weight_bytes(model) < 1.02


def weight_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for layer in model.modules() if isinstance(layer, nn.Linear) for p in layer.parameters())


@torch.no_grad()
@needs_onednn
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_product_of_prepacked_weights(dtype, rows, products):
    model, x = Layers(dtype), inputs(rows, 1, 24, dtype=dtype)
    expected = copy.deepcopy(model).double().plain(x.double())
    model.pack_for_decoding()
    assert model.packed_nbytes == 0
    for _ in range(2):
        products.clear()
        y = model(x)
        assert y.dtype == dtype and relative_error(y, expected) < (1e-6 if dtype == torch.float32 else 1e-2)
        single = dtype == torch.float32 and rows == 1  # a row times one float32 matrix gains nothing
        assert [weight.is_mkldnn for weight in products] == [True, not single]
    packed = weight_bytes(model) if not single else weight_bytes(model) - weight_bytes(model.down)
    zeros = 40 * x.element_size()  # for the bias that `up` does not have
    assert model.packed_nbytes == packed + zeros
    model.unpack()
    products.clear()
    assert model.packed_nbytes == 0
    model(x)
    assert not any(weight.is_mkldnn for weight in products)


@torch.no_grad()
@needs_onednn
def test_prepacked_bfloat16_of_processors_without_it(monkeypatch):
    """Several rows are multiplied by a copy in float32, one row by one in bfloat16. The first step of a call decides,
    so that requests that come and go do not have it made again and again."""
    monkeypatch.setattr(linear, "NO_BFLOAT16", True)
    model = Layers(torch.bfloat16)
    exact, narrow = copy.deepcopy(model).double(), weight_bytes(model) + 80

    def packed_after(*shape):
        x = inputs(*shape, 24, dtype=torch.bfloat16)
        assert relative_error(model(x), exact.plain(x.double())) < 1e-2
        return model.packed_nbytes

    model.pack_for_decoding()
    assert packed_after(1, 1) == narrow
    assert packed_after(1, 5) == narrow  # a prompt
    assert packed_after(3, 1) == 2 * narrow
    assert packed_after(1, 5) == packed_after(1, 1) == 2 * narrow
    model.pack_for_decoding()
    assert packed_after(1, 1) == narrow
    for layer in model.children():  # not `to`, which drops the copy
        layer.float()
    assert model(inputs(1, 1, 24)).dtype == torch.float32


@torch.no_grad()
@needs_onednn
def test_single_rows_on_processors_of_intel(monkeypatch, products):
    """MKL multiplies a row of float32, by joined weights where there are several; oneDNN everything else."""
    monkeypatch.setattr(linear, "INTEL", True)
    model = Layers()
    exact = copy.deepcopy(model).double()
    for pack in (model.unpack, model.pack_for_decoding):
        pack()
        for rows in (1, 3):
            products.clear()
            x = inputs(rows, 1, 24)
            assert relative_error(model(x), exact.plain(x.double())) < 1e-6
            assert bool(products) == (rows > 1)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_not_packed(dtype):
    model = Layers(dtype)
    model.pack_for_decoding()
    with torch.no_grad():
        model(inputs(2, 1, 24, dtype=dtype))
    assert model.packed_nbytes == 0


@torch.no_grad()
@needs_onednn
def test_many_rows_are_not_multiplied_by_it(products):
    model = Layers()
    model.pack_for_decoding()
    model(inputs(linear.MAX_DECODING_ROWS + 1, 1, 24))
    model(inputs(2, 5, 24))  # a prompt
    assert model.packed_nbytes == 0
    with torch.enable_grad():
        model(inputs(2, 1, 24))
    assert model.packed_nbytes == 0 and not any(weight.is_mkldnn for weight in products)


def by_operation(p):
    p.mul_(2)


def by_inference_mode(p):
    with torch.inference_mode():
        p.mul_(2)


def by_data(p):
    p.data = 2 * p.data


def by_swapping(p):
    torch.utils.swap_tensors(p, nn.Parameter(2 * p.detach()))


def by_optimizer(p):
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.5).step()


def by_fused_optimizer(p):
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], lr=0.5, fused=True).step()


UNCOUNTED_WRITES = {
    "data.mul_": lambda p: p.data.mul_(2),
    "data of a number": lambda p: p.data.view(-1)[-1:].add_(1),
    "data negated": lambda p: p.data.neg_(),
    "data in another order": lambda p: p.data.copy_(p.data.flip(0)),
    "data in another order of columns": lambda p: p.data.copy_(p.data.flip(-1)),
    "storage": lambda p: torch.empty(0, dtype=p.dtype).set_(p.untyped_storage(), 0, p.shape).mul_(2),
    "fused optimizer": by_fused_optimizer,
}


@needs_onednn
@pytest.mark.parametrize("name", ["gate.weight", "gate.bias", "up.weight", "down.weight"])
@pytest.mark.parametrize("change", [by_operation, by_inference_mode, by_data, by_swapping, by_optimizer])
def test_counted_writes_are_noticed_at_once(change, name, products):
    model, x = Layers(), inputs(2, 1, 24)
    model.pack_for_decoding()
    with torch.no_grad():
        before = model(x)
        change(model.get_parameter(name))
        products.clear()
        after = model(x)
        assert relative_error(after, model.plain(x)) < 1e-6 and relative_error(after, before) > 1e-2
        assert [weight.is_mkldnn for weight in products] == [True, True]  # made anew
    assert model.packed_nbytes == weight_bytes(model) + 40 * 4


@torch.no_grad()
@needs_onednn
def test_bias_comes_and_goes():
    model, x = Layers(), inputs(2, 1, 24)
    model.pack_for_decoding()
    model(x)
    for layer in (model.gate, model.up, model.down):
        layer.bias = nn.Parameter(torch.ones(layer.out_features)) if layer.bias is None else None
    assert relative_error(model(x), model.plain(x)) < 1e-6


@torch.no_grad()
@needs_onednn
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", UNCOUNTED_WRITES)
@pytest.mark.parametrize("name", ["gate.weight", "gate.bias", "up.weight", "down.weight"])
def test_other_writes_are_noticed_when_the_next_call_begins(name, change, dtype):
    model, x = Layers(dtype), inputs(2, 1, 24, dtype=dtype)
    for begin in (model.pack_for_decoding, model._packed_during_generate):
        with begin() or contextlib.nullcontext():
            before = model(x)
        UNCOUNTED_WRITES[change](model.get_parameter(name))
        with begin() or contextlib.nullcontext():
            after = model(x)
        assert relative_error(after, model.plain(x)) < (1e-6 if dtype == torch.float32 else 1e-2)
        assert not torch.equal(after, before)
        model.unpack()


@needs_onednn
def test_fused_optimizers_are_noticed_after_a_pass_with_gradients():
    model, x = Layers(), inputs(2, 1, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)
    model.pack_for_decoding()
    for _ in range(2):
        with torch.no_grad():
            assert relative_error(model(x), model.plain(x)) < 1e-6
        model(x).sum().backward()
        optimizer.step()


@needs_onednn
@pytest.mark.parametrize("change", ["train", "to", "load_state_dict"])
def test_changes_of_the_whole_model(change):
    model, other, x = Layers(), Layers(), inputs(2, 1, 24)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    model.pack_for_decoding()
    with torch.no_grad():
        model(x)
    assert model.packed_nbytes
    if change == "train":
        model.train()
    elif change == "to":
        model.bfloat16().float()
    else:
        model.load_state_dict(other.state_dict())
    if change != "load_state_dict":
        assert model.packed_nbytes == 0
    with torch.no_grad():
        assert relative_error(model(x), model.plain(x)) < 1e-6


@needs_onednn
def test_copies_and_files_do_not_hold_it():
    model, x = Layers(), inputs(2, 1, 24)
    names, size = list(model.state_dict()), len(pickle.dumps(model))
    model.pack_for_decoding()
    with torch.no_grad():
        model(x)
    assert model.packed_nbytes and list(model.state_dict()) == names
    assert len(pickle.dumps(model)) < size + 500
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            clone.gate.weight.zero_()
            assert relative_error(clone(x), clone.plain(x)) < 1e-6
        assert clone.packed_nbytes == 0 and not clone.packed_weights.in_use
        assert clone.packed_weights is not model.packed_weights


@torch.no_grad()
@needs_onednn
def test_weights_under_inference_mode_are_not_packed():
    with torch.inference_mode():
        model, x = Layers(), inputs(2, 1, 24)
        model.pack_for_decoding()
        before = model(x)
        model.gate.weight.mul_(2)
        assert relative_error(model(x), model.plain(x)) < 1e-6 and not torch.equal(model(x), before)
    assert model.packed_nbytes == 0


@needs_onednn
def test_model_is_freed_with_its_copy():
    model = Layers()
    model.pack_for_decoding()
    with torch.no_grad():
        model(inputs(2, 1, 24))
    references = [weakref.ref(x) for x in (model, model.gate.weight, model.packed_weights)]
    gc.disable()  # what dies now is held by no cycle
    try:
        del model
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()


# ---- whole models


@torch.no_grad()
@pytest.mark.parametrize("stack", ["mixed", "paper"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_generation_with_and_without(dtype, batch_size, stack):
    model, ids = tiny_model(**STACKS[stack]).to(dtype), tokens(batch_size, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    packed = model.generate(ids, **options)
    assert bool(model.packed_nbytes) == linear.ONEDNN
    model.unpack()
    model.pack_in_generate = False
    plain = model.generate(ids, **options)
    assert model.packed_nbytes == 0
    assert torch.equal(packed.sequences, plain.sequences)
    logits = (torch.stack(x.logits) for x in (packed, plain))
    assert relative_error(*logits) < (1e-5 if dtype == torch.float32 else 3e-2)


@torch.no_grad()
@needs_onednn
def test_one_copy_for_all_caches(products):
    model, ids = tiny_model().to(torch.bfloat16), tokens(1, 5)
    caches = []
    for _ in range(5):
        caches.append(model.generate(ids, max_new_tokens=4, return_dict_in_generate=True))
        assert is_one_copy(model)
    assert len({id(weight) for weight in products if weight.is_mkldnn}) == len(model.packed_weights.joint)
    assert len(caches) == 5


@torch.no_grad()
@needs_onednn
def test_copy_is_used_inside_generate_only(products):
    """Outside, nothing would notice a write through `.data`."""
    model, ids = tiny_model().to(torch.bfloat16), tokens(1, 5)
    model.generate(ids, max_new_tokens=1)
    assert 0 < model.packed_nbytes <= model.lm_head.weight.nbytes  # no step but that of the head
    model.generate(ids, max_new_tokens=3)
    assert is_one_copy(model) and not model.packed_weights.in_use
    products.clear()
    model(ids[:, :1])
    assert not products
    model.pack_for_decoding()
    model(ids[:, :1])
    assert products and all(weight.is_mkldnn for weight in products)


@torch.no_grad()
@needs_onednn
def test_generate_after_any_change_of_the_weights():
    model, ids = tiny_model().to(torch.bfloat16), tokens(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for change in (
        lambda: [p.data.mul_(0.9) for p in model.parameters()],
        lambda: model.lm_head.weight.data[5].add_(3),
        lambda: setattr(model, "lm_head", nn.Linear(32, 61, bias=False, dtype=torch.bfloat16)),
        lambda: model.load_state_dict(tiny_model(seed=1).state_dict()),
        lambda: model.resize_token_embeddings(70),
    ):
        model.generate(ids, **options)
        assert model.packed_nbytes
        change()
        logits = torch.stack(model.generate(ids, **options).logits)
        assert is_one_copy(model)  # what is of no use any more is gone
        plain = torch.stack(copy.deepcopy(model).generate(ids, **options).logits)
        model.pack_in_generate = False
        expected = torch.stack(model.generate(ids, **options).logits)
        model.pack_in_generate = True
        assert relative_error(logits, expected) < 3e-2 and relative_error(plain, expected) < 3e-2


@torch.no_grad()
@needs_onednn
def test_large_models_are_not_packed_by_themselves(monkeypatch):
    model, ids = tiny_model().to(torch.bfloat16), tokens(1, 5)
    size = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(linear, "_memory", lambda: 4 * size - 1)
    model.generate(ids, max_new_tokens=3)
    assert model.packed_nbytes == 0
    monkeypatch.setattr(linear, "_memory", lambda: 4 * size)
    model.generate(ids, max_new_tokens=3)
    assert model.packed_nbytes


@torch.no_grad()
@needs_onednn
def test_backbone_alone():
    model, ids = tiny_model(xLSTMModel).to(torch.bfloat16), tokens(1, 5)
    expected = model(ids[:, :1]).last_hidden_state
    model.pack_for_decoding()
    assert relative_error(model(ids[:, :1]).last_hidden_state, expected) < 3e-2
    assert is_one_copy(model)


@needs_onednn
def test_adapters_are_not_bypassed():
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(), tokens(1, 5)
    model.generate(ids, max_new_tokens=3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q", "proj_down"], init_lora_weights=False))
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def logits(pack: bool) -> torch.Tensor:
        model.pack_in_generate = pack
        return torch.stack(adapted.generate(ids, **options).logits)

    assert relative_error(logits(True), logits(False)) < 1e-5
    adapted.merge_adapter()  # writes through .data
    assert relative_error(logits(True), logits(False)) < 1e-5
    adapted.unmerge_adapter()
    assert relative_error(logits(True), logits(False)) < 1e-5


# ---- other processors


AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@needs_onednn
def test_bfloat16_without_avx512():
    """oneDNN has no products of bfloat16 numbers there."""
    program = """
from common import MIXED, tiny_model, tokens
from hf_xlstm import linear
model = tiny_model(layer_types=MIXED, hidden_size=128).bfloat16()
assert not linear.ONEDNN_HAS_BFLOAT16
for rows in (1, 2):
    assert model.generate(tokens(rows, 4), max_new_tokens=4).shape == (rows, 8)
    assert model.packed_nbytes > 0
"""
    environment = os.environ | AVX2 | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
