"""hf_xlstm.decoding: a step without modules says what the modules say, and the modules are called whenever somebody
could tell the difference."""

import contextlib
import copy

import pytest
import torch
from common import MLSTM, STACKS, assert_same_states, relative_error, tiny_model, tokens
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from hf_xlstm import decoding, linear, modeling_xlstm, xLSTMCache
from hf_xlstm.layers import FeedForward, RMSNorm


pytestmark = pytest.mark.skipif(not linear.ONEDNN, reason="weights are prepacked on x86 processors only")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """Whether each block that could take a step without its modules did so."""
    record, step = [], modeling_xlstm.block_step

    def recording(*args):
        output = step(*args)
        record.append(output is not None)
        return output

    monkeypatch.setattr(modeling_xlstm, "block_step", recording)
    return record


def after_prompt(model, rows: int) -> xLSTMCache:
    cache = xLSTMCache(model.config)
    with torch.no_grad():
        model(tokens(rows, 5), cache=cache)
    return cache


def compare(model, expected_model, rows: int = 2, steps: int = 3, context=torch.no_grad, caches=None) -> None:
    """Steps of a model against those of another one, which has no prepacked weights, after the same prompt."""
    cache, expected_cache = caches or (after_prompt(expected_model, rows), after_prompt(expected_model, rows))
    tolerance = TOLERANCE[model.dtype]
    for step in range(steps):
        ids = tokens(rows, 1, seed=step)
        with context():
            logits = model(ids, cache=cache).logits
        with torch.no_grad():
            expected = expected_model(ids, cache=expected_cache).logits
        assert relative_error(logits, expected) < tolerance
    assert_same_states(cache, expected_cache, tolerance=tolerance)


def packed_copy(model, **options):
    other = copy.deepcopy(model)
    other.pack_for_decoding(**options)
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("stack", STACKS)
def test_a_step_is_that_of_the_modules(stack, rows, dtype, taken):
    model = tiny_model(**STACKS[stack]).to(dtype)
    other = packed_copy(model)
    taken.clear()
    compare(other, model, rows)
    assert sum(taken) == (0 if stack == "paper" else 3 * len(model.backbone.blocks))


@pytest.mark.parametrize("fields", [{"gate_soft_cap": None}, {"eps": 0.0}, {"num_heads": 2, "backend": "reference"}])
def test_settings(fields, taken):
    model = tiny_model(layer_types=MLSTM, **fields)
    compare(packed_copy(model), model)
    assert any(taken)


def test_generate_takes_it(taken):
    model, ids = tiny_model(layer_types=MLSTM), tokens(2, 5)
    assert model.generate(ids, max_new_tokens=6, do_sample=False).shape == (2, 11)
    assert taken == [False] * 2 + [True] * 10  # the prompt, and five steps of two blocks
    model.pack_in_generate = False
    taken.clear()
    model.generate(ids, max_new_tokens=6, do_sample=False)
    assert not any(taken)


# ---- the modules are called


class Doubled(FeedForward):
    def forward(self, x):
        return 2 * super().forward(x)


def hook(module):
    module.register_forward_hook(lambda module, args, output: 2 * output)


def pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return 2 * self.inner(*args, **kwargs)


def own_forward(module):
    forward = module.forward
    module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


MODULES = [
    *[("mlstm", x) for x in ("norm_mlstm", "mlstm_layer", "mlstm_layer.multihead_norm", "norm_ffn", "ffn")],
    *[("slstm", x) for x in ("norm_slstm", "slstm_layer", "slstm_layer.multihead_norm", "slstm_layer.zgate")],
    ("slstm", "slstm_layer.dropout"),
    ("conv", "slstm_layer.conv"),
]
STACK_OF_ONE_CELL = STACKS | {"conv": STACKS["conv"] | {"layer_types": STACKS["slstm"]["layer_types"]}}


@pytest.mark.parametrize("change", [hook, pre_hook, own_forward])
@pytest.mark.parametrize(("stack", "name"), MODULES)
def test_a_changed_module_is_called(stack, name, change, taken):
    model = tiny_model(**STACK_OF_ONE_CELL[stack])
    other = packed_copy(model)
    for changed in (model, other):
        change(changed.backbone.blocks[0].get_submodule(name))
    taken.clear()
    compare(other, model)
    assert not any(taken[::2]) and any(taken[1::2])  # the other block has not been changed


@pytest.mark.parametrize(("stack", "name"), [("mlstm", "mlstm_layer"), ("slstm", "slstm_layer"), ("mlstm", "ffn")])
def test_a_wrapped_module_is_called(stack, name, taken):
    model = tiny_model(**STACKS[stack])
    other = packed_copy(model)
    for changed in (model, other):
        block = changed.backbone.blocks[0]
        setattr(block, name, Wrapper(getattr(block, name)))
    taken.clear()
    compare(other, model)
    assert not any(taken[::2]) and any(taken[1::2])


def test_a_class_that_was_changed_is_called(monkeypatch, taken):
    forward = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: 2 * forward(self, x))
    model = tiny_model(layer_types=MLSTM)
    compare(packed_copy(model), model)
    assert not any(taken)


def test_another_class_is_called(taken):
    model = tiny_model(layer_types=MLSTM)
    model.backbone.blocks[0].ffn.__class__ = Doubled
    compare(packed_copy(model), model)
    assert not any(taken[::2]) and any(taken[1::2])


@pytest.mark.parametrize(
    "name", ["mlstm_layer.q", "mlstm_layer.fgate_preact", "mlstm_layer.out_proj", "ffn.proj_down"]
)
def test_a_replaced_linear_layer_is_called(name, taken):
    model = tiny_model(layer_types=MLSTM)
    other = packed_copy(model)
    compare(other, model)
    for changed in (model, other):
        parent, _, child = name.rpartition(".")
        parent = changed.backbone.blocks[0].get_submodule(parent)
        setattr(parent, child, nn.Sequential(getattr(parent, child), nn.Tanh()))
    taken.clear()
    compare(other, model)
    assert not any(taken[::2]) and any(taken[1::2])


def test_biases(taken):
    model = tiny_model(layer_types=MLSTM, use_bias=True)
    compare(packed_copy(model), model)
    assert not any(taken)


@contextlib.contextmanager
def watched():
    with torch.no_grad(), FlopCounterMode(display=False):
        yield


@pytest.mark.parametrize("context", [torch.enable_grad, watched])
def test_gradients_and_modes(context, taken):
    model = tiny_model(layer_types=MLSTM)
    other = packed_copy(model)
    compare(other, model)
    taken.clear()
    compare(other, model, context=context)
    assert taken and not any(taken)


def test_masks_and_records(taken):
    model, ids = tiny_model(layer_types=MLSTM), tokens(2, 1)
    other = packed_copy(model)
    compare(other, model)
    for mask, record in ((torch.tensor([[1], [0]]), False), (None, True)):
        caches = [after_prompt(model, 2) for _ in range(2)]
        if record:
            for cache in caches:
                cache.activate_past_recording()
        taken.clear()
        with torch.no_grad():
            logits, expected = (
                m(ids, attention_mask=mask, cache=c).logits for m, c in zip((other, model), caches, strict=True)
            )
        assert not any(taken)
        assert relative_error(logits[:1], expected[:1]) < 1e-5
        assert_same_states(*caches)


def test_a_hook_that_writes_weights_in_the_middle_of_a_step_is_followed(taken):
    model = tiny_model(layer_types=MLSTM)
    other = packed_copy(model)
    compare(other, model)
    caches = after_prompt(model, 2), after_prompt(model, 2)
    for changed in (model, other):
        last = changed.backbone.blocks[1]

        def write(module, args, last=last):
            with torch.no_grad():
                last.ffn.proj_down.weight.mul_(-0.5)
                last.mlstm_layer.k.weight = nn.Parameter(last.mlstm_layer.k.weight.flip(0))

        changed.backbone.blocks[0].register_forward_pre_hook(write)
    taken.clear()
    compare(other, model, caches=caches)
    assert sum(taken) == 6  # with a new copy each time


def test_a_state_that_does_not_fit_is_told():
    model = packed_copy(tiny_model(layer_types=MLSTM))
    cache = after_prompt(model, 2)
    layer = cache.layers[0]
    layer.state = tuple(x.bfloat16() for x in layer.state)
    with torch.no_grad(), pytest.raises(ValueError, match="dtype"):
        model(tokens(2, 1), cache=cache)


# ---- compiled steps


@pytest.fixture
def graphs():
    """A function that says how many graphs were compiled since the test began."""
    torch.compiler.reset()
    decoding._compiled_stack.cache_clear()
    before = counters["stats"]["unique_graphs"]
    yield lambda: counters["stats"]["unique_graphs"] - before
    torch.compiler.reset()


@pytest.mark.parametrize(
    "stack", ["conv", *(pytest.param(x, marks=pytest.mark.slow) for x in ("mlstm", "slstm", "mixed"))]
)
def test_a_compiled_step_is_that_of_the_modules(stack, graphs, taken):
    model = tiny_model(**STACKS[stack])
    other = packed_copy(model, compile=True)
    compare(other, model, rows=1)
    assert graphs() == 1
    compare(other, model, rows=3)
    compare(other, model, rows=1)
    compare(other, model, rows=2)
    compare(other, model, rows=5)
    assert graphs() <= 3  # one row, three, any number
    assert not any(taken)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["mlstm", "conv"])
@torch.no_grad()
def test_a_compiled_step_in_bfloat16_is_nearly_as_exact_as_the_modules(stack, graphs):
    """Compiled code does not round between the operations that it joins, so that the two differ."""
    model = tiny_model(**STACKS[stack]).bfloat16()
    models = {"compiled": packed_copy(model, compile=True), "modules": model, "exact": copy.deepcopy(model).float()}
    for rows in (1, 3):
        caches = {name: after_prompt(x, rows) for name, x in models.items()}
        outputs = {name: [] for name in models}
        for step in range(4):
            ids = tokens(rows, 1, seed=step)
            for name, x in models.items():
                outputs[name].append(x(ids, cache=caches[name]).logits.float())
        joint = {name: torch.cat(x) for name, x in outputs.items()}
        error, bound = (relative_error(joint[name], joint["exact"]) for name in ("compiled", "modules"))
        assert error < 2 * bound  # both are rounded, each in its way
    assert graphs() == 2


def test_generate_by_compiled_steps(graphs, monkeypatch):
    stack, steps = decoding._compiled_stack, []
    monkeypatch.setattr(decoding, "_compiled_stack", lambda: steps.append(1) or stack())
    model, ids = tiny_model(layer_types=MLSTM), tokens(2, 5)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.pack_for_decoding(compile=True)
    assert model.generate(ids, max_new_tokens=8, do_sample=False).equal(expected)
    assert graphs() == 1
    recorded = model.generate(
        ids, max_new_tokens=8, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
    )
    assert recorded.sequences.equal(expected)
    assert [len(step) for step in recorded.hidden_states] == [3] * 8  # what goes into the blocks, and what comes out
    assert len(steps) == 7
    assert model.generate(ids, max_new_tokens=8, do_sample=False).equal(expected)
    assert len(steps) == 14 and graphs() == 1


@pytest.mark.parametrize("name", ["backbone.blocks.0", "backbone.blocks.1.ffn", "backbone.blocks.0.ffn.proj_up"])
def test_a_block_that_was_changed_is_not_compiled(name, graphs, caplog):
    model = tiny_model(layer_types=MLSTM)
    other = packed_copy(model, compile=True)
    for changed in (model, other):
        block, _, child = name.rpartition(".")
        if child == "proj_up":  # as an adapter is put there
            setattr(changed.get_submodule(block), child, nn.Sequential(changed.get_submodule(name)))
        else:
            hook(changed.get_submodule(name))
    decoding.logger.warning_once.cache_clear()
    compare(other, model)
    assert graphs() == 0
    assert caplog.text.count("A step of decoding is not compiled") == 1


def test_unpacked_steps_are_not_compiled(graphs):
    model = tiny_model(layer_types=MLSTM)
    for drop in (type(model).unpack, type(model).pack_for_decoding, lambda model: model.train().eval()):
        other = packed_copy(model, compile=True)
        drop(other)
        compare(other, model)
    assert graphs() == 0


@pytest.mark.parametrize("fields", [STACKS["paper"], {"layer_types": MLSTM, "use_bias": True}])
def test_what_cannot_be_compiled_is_refused(fields):
    for model in (tiny_model(**fields), tiny_model(layer_types=MLSTM).double()):
        with pytest.raises(NotImplementedError, match="block_family='large'"):
            model.pack_for_decoding(compile=True)
