"""Transforms of autograd: second derivatives, `torch.func` (grad, vmap, jacrev, jvp), batched gradients, and the
device "meta". Every operator either gives what plain PyTorch gives or says that it does not."""

from functools import partial

import pytest
import torch
from common import relative_error, tiny_config, tiny_model, tokens
from oracle import DEVICE
from torch.utils.flop_counter import FlopCounterMode

from hf_xlstm import xLSTMForCausalLM
from hf_xlstm.ops import mlstm, mlstm_step, slstm, slstm_step
from hf_xlstm.pointwise import cross_entropy, gated_head_norm, rms_norm, soft_cap, swiglu


B, T, H, K, V = 2, 10, 2, 3, 4
MASK = torch.tensor([[True] * 7 + [False] * 3, [False] + [True] * 9])
BOUNDS = torch.tensor([0, 4, 10])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlstm_inputs(batch=B):
    shapes = ((batch, T, H, K), (batch, T, H, K), (batch, T, H, V), (batch, T, H), (batch, T, H))
    return tuple(normal(*shape, seed=seed) for seed, shape in enumerate(shapes))


def slstm_inputs(batch=B):
    return normal(batch, T, 4, H, K), normal(4, H, K, K, seed=1), normal(4, H, K, seed=2)


MLSTM_STATE = normal(B, H, K, V, seed=5), normal(B, H, K, seed=6)
SLSTM_STATE = normal(B, H, K, seed=5), normal(B, H, K, seed=6), normal(B, H, K, seed=7).abs() + 1


def run_mlstm(*inputs, backend="torch", step=False, **options):
    """h and the true final state c e^m, n e^m, from an initial state if one is among the inputs. The stabilizer is
    neither input nor output: it is a constant to autograd, and eps would make h depend on it."""
    inputs, state = inputs[:5], inputs[5:]
    state = (*state, state[1].new_zeros(state[1].shape[:-1])) if state else None
    if step:
        h, (c, n, m) = mlstm_step(*(x[:, 0] for x in inputs), state, eps=0.0, backend=backend)
    else:
        options = {"chunk_size": 4, "output_final_state": True, "eps": 0.0} | options
        h, (c, n, m) = mlstm(*inputs, initial_state=state, backend=backend, **options)
    return h, c * m.exp()[..., None, None], n * m.exp()[..., None]


def run_slstm(*inputs, backend="torch", step=False, **options):
    """h, and the final h and c / n, which do not depend on the stabilizer."""
    (gates, *weights), state = inputs[:3], inputs[3:]
    state = (*state, torch.zeros_like(state[0])) if state else None
    if step:
        h, (h_final, c, n, _) = slstm_step(gates[:, 0], *weights, state, backend=backend)
    else:
        options = {"output_final_state": True} | options
        h, (h_final, c, n, _) = slstm(gates, *weights, initial_state=state, backend=backend, **options)
    return h, h_final, c / n


CELLS = {
    "mlstm": (run_mlstm, mlstm_inputs()),
    "mlstm masked from a state": (partial(run_mlstm, mask=MASK), (*mlstm_inputs(), *MLSTM_STATE)),
    "mlstm packed": (partial(run_mlstm, cu_seqlens=BOUNDS), mlstm_inputs(1)),
    "slstm": (run_slstm, slstm_inputs()),
    "slstm masked from a state": (partial(run_slstm, mask=MASK), (*slstm_inputs(), *SLSTM_STATE)),
    "slstm packed": (partial(run_slstm, cu_seqlens=BOUNDS), slstm_inputs(1)),
}
STEPS = {
    "mlstm step": (partial(run_mlstm, step=True), (*mlstm_inputs(), *MLSTM_STATE)),
    "slstm step": (partial(run_slstm, step=True), (*slstm_inputs(), *SLSTM_STATE)),
}
POINTWISE = {
    "rms_norm": (partial(rms_norm, eps=1e-6), (normal(2, 3, 4), normal(4, seed=1))),
    "swiglu": (swiglu, (normal(2, 3, 4), normal(2, 3, 4, seed=1))),
    "soft_cap": (partial(soft_cap, cap=3.0), (normal(2, 3, 4),)),
    "gated_head_norm": (partial(gated_head_norm, eps=1e-6), (normal(1, 2, 2, 3), normal(1, 2, 6, seed=1), normal(6))),
    "cross_entropy": (lambda logits: cross_entropy(logits, torch.tensor([1, -100, 0])), (normal(3, 5),)),
}
OPS = CELLS | STEPS | POINTWISE
ops = pytest.mark.parametrize("op", OPS)


def loss_of(op, **options):
    """A scalar that depends on all outputs, each number with a weight of its own."""
    function, inputs = OPS[op]

    def loss(*inputs):
        outputs = function(*inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [
            torch.linspace(-1, 2, x.numel(), dtype=torch.float64, device=x.device).view(x.shape) for x in outputs
        ]
        return sum((weight * x + x * x).sum() for x, weight in zip(outputs, weights))

    return loss, inputs


def gradients(loss, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)


def assert_equal(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert relative_error(x, y) < 1e-9


def gradient_penalty(loss, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)


@pytest.mark.parametrize("op", STEPS)
def test_second_derivatives_of_steps(op):
    (loss, inputs), (reference, _) = loss_of(op), loss_of(op, backend="reference")
    assert_equal(gradient_penalty(loss, inputs), gradient_penalty(reference, inputs))


@pytest.mark.parametrize("op", POINTWISE)
def test_second_derivatives_of_pointwise_functions(op):
    function, inputs = POINTWISE[op]
    assert torch.autograd.gradgradcheck(function, [x.clone().requires_grad_() for x in inputs])


@pytest.mark.parametrize("op", CELLS)
def test_second_derivatives_of_cells_are_refused(op):
    name = op.split()[0]
    with pytest.raises(NotImplementedError, match=f"`{name}` has first derivatives only.*backend='reference'"):
        gradient_penalty(*loss_of(op))
    # the way out that the message names: differences of first derivatives are the measure
    loss, inputs = loss_of(op, backend="reference")
    step = 1e-5
    penalty = [sum(x.square().sum() for x in gradients(loss, [x + s * step for x in inputs])) for s in (1, -1)]
    expected = (penalty[0] - penalty[1]) / (2 * step)
    assert relative_error(sum(x.sum() for x in gradient_penalty(loss, inputs)), expected) < 1e-4


@ops
def test_func_grad(op):
    loss, inputs = loss_of(op)
    assert_equal(torch.func.grad(loss, tuple(range(len(inputs))))(*inputs), gradients(loss, inputs))


@pytest.mark.parametrize("over", ["all", "first", "last"])
@ops
def test_vmap_of_grad(op, over):
    """Over rows of all inputs, of the activations alone (per-sample gradients), or of the last input alone."""
    loss, inputs = loss_of(op)
    dims = [0 if over == "all" or index == {"first": 0, "last": len(inputs) - 1}[over] else None
            for index in range(len(inputs))]  # fmt: skip
    rows = [[x * factor for x in inputs] for factor in (1.0, 0.7)]
    arguments = [torch.stack(xs) if dim == 0 else xs[0] for dim, xs in zip(dims, zip(*rows))]
    grad = torch.func.grad(loss, tuple(range(len(inputs))))
    actual = torch.func.vmap(grad, in_dims=tuple(dims))(*arguments)
    outputs = torch.func.vmap(loss, in_dims=tuple(dims))(*arguments)
    for row in range(2):
        own = [x[row] if dim == 0 else x for dim, x in zip(dims, arguments)]
        assert_equal([x[row] for x in actual], gradients(loss, own))
        assert relative_error(outputs[row], loss(*own)) < 1e-12


@ops
def test_batched_gradients(op):
    """What `torch.autograd.functional.jacobian(vectorize=True)` asks for."""
    loss, inputs = loss_of(op)
    leaves = [x.clone().requires_grad_() for x in inputs]
    factors = torch.tensor([1.0, -2.0], dtype=torch.float64)
    actual = torch.autograd.grad(loss(*leaves).expand(1), leaves, factors[:, None], is_grads_batched=True)
    for row, factor in enumerate(factors):
        assert_equal([x[row] for x in actual], [factor * x for x in gradients(loss, inputs)])


@ops
def test_jacrev(op):
    function, inputs = OPS[op]

    def first(x):
        output = function(x, *inputs[1:])
        return output[0] if isinstance(output, tuple) else output

    jacobian, output = torch.func.jacrev(first)(inputs[0]), first(inputs[0])
    weights = normal(*output.shape, seed=3)
    expected = gradients(lambda x: (weights * first(x)).sum(), inputs[:1])[0]
    dims = tuple(range(output.ndim))
    assert relative_error(torch.tensordot(weights, jacobian, (dims, dims)), expected) < 1e-9


@ops
def test_forward_mode_is_exact_or_refused(op):
    loss, inputs = loss_of(op)
    if op in STEPS:
        _, actual = torch.func.jvp(loss, inputs, inputs)
        assert relative_error(actual, sum((x * y).sum() for x, y in zip(gradients(loss, inputs), inputs))) < 1e-9
    else:
        with pytest.raises(NotImplementedError, match="forward mode"):
            torch.func.jvp(loss, inputs, inputs)


@pytest.mark.parametrize("op", ["mlstm", "slstm"])
def test_transforms_are_refused_on_triton(op):
    pytest.importorskip("triton")
    loss, inputs = loss_of(op, backend="triton")
    inputs = [x.to(DEVICE, torch.float32) for x in inputs]
    with pytest.raises(NotImplementedError, match=f"`{op}` has first derivatives only"):
        gradient_penalty(loss, inputs)
    refused = pytest.raises(NotImplementedError, match=f"`{op}` cannot run under the transforms of torch.func")
    with refused:
        torch.func.grad(loss)(*inputs)
    with refused:
        torch.func.vmap(loss)(*(torch.stack([x, x]) for x in inputs))
    with refused:
        torch.func.jvp(loss, tuple(inputs), tuple(inputs))
    with refused, torch.autograd.forward_ad.dual_level():
        loss(*(torch.autograd.forward_ad.make_dual(x, x) for x in inputs))
    leaves = [x.requires_grad_() for x in inputs]
    with refused:
        torch.autograd.grad(loss(*leaves).expand(1), leaves, torch.ones(2, 1, device=DEVICE), is_grads_batched=True)


def test_vmap_over_bounds_is_refused():
    inputs, bounds = mlstm_inputs(1), torch.tensor([[0, 4, 10], [0, 5, 10]])
    with pytest.raises(NotImplementedError, match="cu_seqlens"):
        torch.func.vmap(lambda bounds: mlstm(*inputs, cu_seqlens=bounds)[0])(bounds)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layer_types", [["mlstm", "mlstm"], ["mlstm", "slstm"]], ids=["mlstm", "mixed"])
def test_per_sample_gradients_of_a_model(layer_types, padded):
    model, ids = tiny_model(layer_types=layer_types).double(), tokens(3, 8)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = mask[2, :1] = 0

    def loss(parameters, row, mask):
        inputs = {"attention_mask": mask[None], "labels": row[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, (row[None],), inputs).loss

    actual = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, ids, mask)
    for row in range(3):
        model.zero_grad()
        loss(dict(model.named_parameters()), ids[row], mask[row]).backward()
        for name, parameter in model.named_parameters():
            assert relative_error(actual[name][row], parameter.grad) < 1e-5, name  # the loss is float32


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layer_types", [["mlstm", "mlstm"], ["mlstm", "slstm"]], ids=["mlstm", "mixed"])
def test_model_on_meta(layer_types, padded):
    """Shapes and numbers of operations without memory: those of a real run, forward and backward."""
    model, ids = tiny_model(layer_types=layer_types), tokens(2, 20)
    with torch.device("meta"):
        meta = xLSTMForCausalLM(tiny_config(layer_types=layer_types))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def run(model, device):
        counter = FlopCounterMode(display=False)
        with counter:
            inputs = {"attention_mask": mask.to(device)} if padded else {}
            output = model(ids.to(device), labels=ids.to(device), **inputs)
            output.loss.backward()
        return counter.get_total_flops(), output.logits.shape

    assert run(meta, "meta") == run(model, "cpu")
    assert all(p.grad.shape == p.shape for p in meta.parameters())


def test_operations_of_the_slstm_are_counted():
    inputs = [x.float().requires_grad_() for x in slstm_inputs()]
    with FlopCounterMode(display=False) as counter:
        slstm(*inputs)[0].sum().backward()
    products = B * T * 4 * H * K * K
    assert counter.get_total_flops() == 2 * products + 4 * products
