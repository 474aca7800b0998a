"""torch.compile and torch.export: one graph without breaks, for every length, with the numbers of eager mode."""

import pytest
import torch
from common import assert_same_states, relative_error, tiny_model, tokens
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from hf_xlstm import xLSTMCache
from hf_xlstm.ops import mlstm, mlstm_step, slstm, slstm_step


LENGTHS = [5, 8, 9, 16, 17, 30, 33, 64, 65, 100]
STACKS = {
    "mlstm": {"num_hidden_layers": 1},
    "slstm": {"num_hidden_layers": 1, "layer_types": ["slstm"], "slstm_conv_kernel_size": 4},
}
stacks = pytest.mark.parametrize("stack", STACKS)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def at_most(graphs: int):
    """More graphs than these are an error; so is, under `fullgraph`, a break in one."""
    return torch._dynamo.config.patch(recompile_limit=graphs, fail_on_recompile_limit_hit=True)


def compiled(function, backend="eager", **options):
    """`eager` traces without compiling what it has traced, `aot_eager` traces the backward pass too."""
    return torch.compile(function, backend=backend, fullgraph=True, **options)


@torch.no_grad()
@stacks
def test_forward(stack):
    """Ten lengths, at most two graphs."""
    model = tiny_model(**STACKS[stack])
    forward = compiled(lambda ids: model(ids, use_cache=False).logits, dynamic=True)
    with at_most(2):
        for length in LENGTHS:
            ids = tokens(2, length)
            assert relative_error(forward(ids), model(ids).logits) < 1e-5


@pytest.mark.slow
@stacks
def test_backward(stack):
    model = tiny_model(**STACKS[stack]).double().train()  # gradients of gate biases are sums that nearly cancel
    loss = compiled(lambda ids: model(ids, labels=ids).loss, "aot_eager", dynamic=True)
    with at_most(2):
        for length in LENGTHS:
            ids = tokens(2, length)
            expected = torch.autograd.grad(model(ids, labels=ids).loss, model.parameters())
            actual = torch.autograd.grad(loss(ids), model.parameters())
            for x, y in zip(actual, expected, strict=True):
                assert relative_error(x, y) < 1e-6  # Transformers computes the loss in float32


@torch.no_grad()
@stacks
def test_decode_step(stack):
    """One graph for all steps, which writes the states where they are."""
    model, ids = tiny_model(**STACKS[stack]), tokens(2, 20)
    expected = model(ids, use_cache=True)
    cache = model(ids[:, :10], use_cache=True).cache
    addresses = [x.data_ptr() for layer in cache.layers for x in layer.tensors().values()]
    step = compiled(lambda ids, cache: model(ids, cache=cache).logits)
    with at_most(1):
        logits = [step(token, cache) for token in ids[:, 10:].split(1, dim=1)]
    assert relative_error(torch.cat(logits, dim=1), expected.logits[:, 10:]) < 1e-5
    assert [x.data_ptr() for layer in cache.layers for x in layer.tensors().values()] == addresses
    assert cache.get_seq_length() == 20
    assert_same_states(cache, expected.cache)


@torch.no_grad()
@torch._inductor.config.patch(force_disable_caches=True)  # what comes from a cache does not pass through here
@stacks
def test_decode_step_may_become_a_cuda_graph(stack):
    """It does not if it writes to an input that torch.compile does not know to stay where it is."""
    model = tiny_model(**STACKS[stack])
    cache = model(tokens(2, 10), use_cache=True).cache
    mutated = {}

    def inner_compile(module, example_inputs, static_input_idxs=(), **options):
        result = compile_fx_inner(module, example_inputs, static_input_idxs=static_input_idxs, **options)
        mutated.update({index: index in static_input_idxs for index in result.mutated_input_idxs})
        return result

    step = compiled(
        lambda ids, cache: model(ids, cache=cache).logits,
        lambda module, inputs: compile_fx(module, inputs, inner_compile=inner_compile),
    )
    step(tokens(2, 1), cache)
    assert len(mutated) == 1 + sum(len(layer.tensors()) for layer in cache.layers)
    assert all(mutated.values())


@pytest.mark.slow
@torch.no_grad()
@stacks
def test_masked_and_packed(stack):
    model, ids = tiny_model(**STACKS[stack]), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    forward = compiled(lambda ids, **kwargs: model(ids, use_cache=False, **kwargs).logits)
    for inputs in ({"attention_mask": mask}, {"cu_seq_lens_q": torch.tensor([0, 3, 20, 40])}):
        assert relative_error(forward(ids, **inputs), model(ids, **inputs).logits) < 1e-5


def op_calls() -> dict:
    B, T, H, K, V = 1, 20, 2, 4, 5
    state = (torch.randn(B, H, K, V), torch.randn(B, H, K), torch.randn(B, H))
    sequence = [torch.randn(B, T, H, size) for size in (K, K, V)] + [torch.randn(B, T, H) for _ in range(2)]
    weights = (torch.randn(4, H, K, K), torch.randn(4, H, K))
    gates, slstm_state = torch.randn(B, T, 4, H, K), tuple(torch.rand(4, B, H, K) + 1)
    options = {"output_final_state": True}
    return {
        "mlstm": (mlstm, sequence, options),
        "mlstm from a state": (mlstm, sequence, {"initial_state": state, **options}),
        "mlstm packed": (mlstm, sequence, {"cu_seqlens": torch.tensor([0, 7, 20]), **options}),
        "mlstm step": (mlstm_step, [*(x[:, 0] for x in sequence), state], {}),
        "slstm": (slstm, [gates, *weights], options),
        "slstm from a state": (slstm, [gates, *weights], {"initial_state": slstm_state, **options}),
        "slstm packed": (slstm, [gates, *weights], {"cu_seqlens": torch.tensor([0, 7, 20]), **options}),
        "slstm step": (slstm_step, [gates[:, 0], *weights, slstm_state], {}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("call", op_calls())
def test_ops(call):
    torch.manual_seed(0)
    function, arguments, options = op_calls()[call]
    leaves = [x.requires_grad_() for x in arguments if isinstance(x, torch.Tensor)]

    def loss(*arguments):
        h, state = function(*arguments, **options)
        return h.square().sum() + state[0].sum()

    expected, actual = loss(*arguments), compiled(loss, "aot_eager")(*arguments)
    assert relative_error(actual, expected) < 1e-5
    for x, y in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert relative_error(x, y) < 1e-4


@pytest.mark.slow
@stacks
def test_inductor_training(stack):
    """With the real compiler."""
    model = tiny_model(**STACKS[stack]).train()
    loss = compiled(lambda ids: model(ids, labels=ids).loss, "inductor", dynamic=True)
    for length in (20, 13):
        ids = tokens(2, length)
        expected = torch.autograd.grad(model(ids, labels=ids).loss, model.parameters())
        for x, y in zip(torch.autograd.grad(loss(ids), model.parameters()), expected, strict=True):
            assert relative_error(x, y) < 1e-4


@pytest.mark.slow
@torch.no_grad()
@stacks
def test_inductor_decoding(stack):
    model, ids = tiny_model(**STACKS[stack]), tokens(2, 20)
    cache = model(ids[:, :10], use_cache=True).cache
    step = compiled(lambda ids, cache: model(ids, cache=cache).logits, "inductor")
    logits = [step(token, cache) for token in ids[:, 10:].split(1, dim=1)]
    assert relative_error(torch.cat(logits, dim=1), model(ids).logits[:, 10:]) < 1e-5


class Prefill(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        outputs = self.model(ids, use_cache=True)
        return outputs.logits, [layer.tensors() for layer in outputs.cache.layers]


class Step(torch.nn.Module):
    """One token, with the state as plain tensors in and out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, states):
        cache = xLSTMCache(self.model.config)
        for layer, tensors in zip(cache.layers, states, strict=True):
            tensors = dict(tensors)
            if "conv" in tensors:
                layer.update_conv_state(tensors.pop("conv"))
            layer.update(tuple(tensors.values()))
        logits = self.model(ids, cache=cache).logits
        return logits, [layer.tensors() for layer in cache.layers]


@pytest.mark.slow
@torch.no_grad()
@stacks
def test_export(stack):
    """Prefill of any length above a chunk, and a decode step, as two programs without Python."""
    model, ids = tiny_model(**STACKS[stack]), tokens(2, 30)
    length = torch.export.Dim.AUTO(min=9, max=2048)
    prefill = torch.export.export(Prefill(model), (ids,), dynamic_shapes={"ids": {1: length}}, strict=False).module()
    expected = model(ids).logits
    for count in (20, 16, 9):
        logits, states = prefill(ids[:, :count])
        assert relative_error(logits, expected[:, :count]) < 1e-5
    step = torch.export.export(Step(model), (ids[:, :1], states), strict=False).module()
    for t in range(9, 30):
        logits, states = step(ids[:, t : t + 1], states)
        assert relative_error(logits, expected[:, t : t + 1]) < 1e-5
