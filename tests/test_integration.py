"""What depends on how Transformers names and calls things: nothing meant for the model may disappear."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from common import STACKS, assert_same_states, relative_error, tiny_model, tokens
from transformers import DynamicCache

import hf_xlstm
from hf_xlstm import (
    conversion,
    hub,
    xLSTMCache,
    xLSTMForQuestionAnswering,
    xLSTMForSequenceClassification,
    xLSTMForTokenClassification,
    xLSTMModel,
)
from hf_xlstm.integration import CACHE_NAMES


HEADS = [xLSTMForSequenceClassification, xLSTMForTokenClassification, xLSTMForQuestionAnswering]


@pytest.fixture(scope="module", params=STACKS)
def model(request):
    return tiny_model(**STACKS[request.param])


@torch.no_grad()
def stepwise(model, ids, count=6):
    """Greedy, without a cache and without `generate`."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@torch.no_grad()
def filled(model, ids):
    cache = xLSTMCache(model.config)
    model(ids, cache=cache)
    return cache


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_every_name_continues(model, name, recwarn):
    ids = tokens(2, 9)
    outputs = model(ids[:, 5:], **{name: filled(model, ids[:, :5])})
    assert relative_error(outputs.logits, model(ids).logits[:, 5:]) < 1e-5
    text = model.generate(ids, **{name: filled(model, ids[:, :5])}, max_new_tokens=6, do_sample=False)
    assert text.equal(stepwise(model, ids))
    assert not [w for w in recwarn if "hf_xlstm" in str(w.filename) or "deprecated" in str(w.message)]


def test_outputs_have_the_state_under_every_name(model):
    outputs = model(tokens(1, 4), use_cache=True)
    backbone = model.backbone(tokens(1, 4), use_cache=True)
    for output in (outputs, backbone):
        assert isinstance(output.cache, xLSTMCache)
        assert output.cache is output.past_key_values is output.cache_params is output["cache"]
    assert model(tokens(1, 4), use_cache=False).cache is None


@pytest.mark.parametrize("cls", HEADS)
def test_heads_continue_a_cache(cls):
    model = tiny_model(cls, layer_types=["mlstm", "slstm"], pad_token_id=0)
    ids = tokens(2, 9)
    for name in ("cache", "past_key_values"):
        cache = xLSTMCache(model.config)
        model(ids[:, :5], **{name: cache})
        assert cache.get_seq_length() == 5
        outputs = model(ids[:, 5:], **{name: cache})
        assert "cache" not in outputs or outputs.cache is cache
        expected = xLSTMCache(model.config)
        model(ids, cache=expected)
        assert_same_states(cache, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: xLSTMCache(model.config),
        lambda model: DynamicCache(),
        lambda model: (xLSTMCache(model.config),),
        lambda model: torch.ones(2, 5),
        lambda model: [0, 2, 5],
        lambda model: {"mask": torch.ones(2, 5)},
    ],
    ids=["cache", "another cache", "tuple", "mask", "bounds", "dict"],
)
@pytest.mark.parametrize("name", ["memory", "next_generation_state", "padding_mask", "cu_seqlens"])
def test_unknown_argument_is_a_type_error(model, make, name):
    for module in (model, model.backbone):
        with pytest.raises(TypeError, match=f"`{name}`"):
            module(tokens(2, 5), **{name: make(model)})
    with pytest.raises((TypeError, ValueError), match=name):
        model.generate(tokens(2, 5), **{name: make(model)}, max_new_tokens=2)


def test_next_rename_raises(model, monkeypatch):
    """A Transformers that hands over the cache under a name not yet known."""
    prepare = type(model).prepare_inputs_for_generation

    def renamed(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        return {"memory" if isinstance(x, xLSTMCache) else name: x for name, x in inputs.items()}

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", renamed)
    with pytest.raises(TypeError, match="`memory`"):
        model.generate(tokens(2, 5), max_new_tokens=3)


def test_what_transformers_passes_to_every_model_is_accepted(model):
    ids = tokens(2, 5)
    expected = model(ids, labels=ids)
    for kwargs in (
        {"token_type_ids": torch.zeros_like(ids)},
        {"cache_position": torch.arange(5)},
        {"num_items_in_batch": torch.tensor(8)},
        {"output_attentions": False, "return_dict": True},
        {"max_length_q": 5, "max_length_k": 5},
    ):
        assert torch.equal(model(ids, labels=ids, **kwargs).logits, expected.logits)


def test_own_cache_class_is_asked_for_by_its_module(model):
    from transformers.models.xlstm.modeling_xlstm import xLSTMCache as InTreeCache

    foreign = InTreeCache.__new__(InTreeCache)
    with pytest.raises(ValueError, match=r"hf_xlstm\.cache\.xLSTMCache, got a transformers\.models\.xlstm"):
        model(tokens(1, 3), cache_params=foreign)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 2}, {"num_beams": 2}], ids=str)
def test_cache_that_has_read_the_whole_prompt_is_refused(model, options):
    ids = tokens(2, 6)
    for longer in (ids, torch.cat([ids, tokens(2, 2)], dim=1)):
        cache = filled(model, longer)
        if options.get("num_beams"):
            cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match=r"`cache` has read \d tokens and the prompt has 6"):
            model.generate(ids, cache=cache, max_new_tokens=3, do_sample=False, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}],
    ids=str,
)
def test_prefix_in_every_mode(model, options):
    """The prompt's beginning is read once, and the text is that of the whole prompt."""
    ids = tokens(1, 4).repeat(1, 3)
    seen = []
    hook = model.backbone.embeddings.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    text = model.generate(ids, cache=filled(model, ids[:, :7]), max_new_tokens=6, do_sample=False, **options)
    hook.remove()
    assert sum(seen[: 1 + seen.index(7)]) == 7  # that of `filled`
    assert max(seen[1:]) <= 5 + 3
    assert text.equal(stepwise(model, ids))


def test_padded_prefix_continues(model):
    """Rows that were padded while they were read go on with the whole mask, or with new tokens and the whole mask."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        cache = xLSTMCache(model.config)
        model(ids[:, :6], attention_mask=mask[:, :6], cache=cache)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, **options)[:, 9:]
    for chunk in (None, 2):
        continued = {"attention_mask": mask, "prefill_chunk_size": chunk, **options}
        assert model.generate(ids, cache=copy.deepcopy(cache), **continued)[:, 9:].equal(expected)
        assert model.generate(ids[:, 6:], cache=copy.deepcopy(cache), **continued)[:, 3:].equal(expected)


def test_recording_ends_with_speculation(model):
    ids = tokens(1, 5).repeat(1, 4)
    turn = model.generate(
        ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3, return_dict_in_generate=True
    )
    assert not turn.cache.record_past
    assert not any(layer._records for layer in turn.cache.layers)
    own = xLSTMCache(model.config)
    own.activate_past_recording()  # asked for by the user, so it stays
    model.generate(ids, cache=own, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3)
    assert own.record_past
    own.deactivate_past_recording()
    assert not own.record_past and not any(layer._records for layer in own.layers)


def test_in_pieces_hidden_states_are_whole():
    model = tiny_model(xLSTMModel, max_inference_chunksize=8)
    whole = tiny_model(xLSTMModel)
    with torch.no_grad():
        states = model(tokens(1, 20), output_hidden_states=True).hidden_states
        expected = whole(tokens(1, 20), output_hidden_states=True).hidden_states
        assert relative_error(model(tokens(1, 20)).last_hidden_state, expected[-1]) < 1e-6
    assert len(states) == 3
    for state, other in zip(states, expected, strict=True):
        assert relative_error(state, other) < 1e-6


def test_classes_are_found_by_their_names():
    """As TRL, its reference models and `transformers serve` find the class of a checkpoint."""
    import transformers.models.xlstm.modeling_xlstm as in_tree

    for name in ("xLSTMConfig", "xLSTMForCausalLM", "xLSTMModel", "xLSTMForSequenceClassification"):
        assert getattr(transformers, name) is getattr(hf_xlstm, name)
        assert getattr(sys.modules["transformers"], name).__module__.startswith("hf_xlstm")
    assert in_tree.xLSTMForCausalLM is not hf_xlstm.xLSTMForCausalLM
    # in processes that import one or the other first
    for first in ("import hf_xlstm", "import transformers", "import transformers.modeling_layers"):
        code = f"{first}; import sys, transformers, hf_xlstm; held = transformers"
        code += "; print(*(m.xLSTMForCausalLM.__module__ for m in (held, sys.modules['transformers'])))"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.split() == ["hf_xlstm.modeling_xlstm"] * 2
    assert transformers.models.xlstm.modeling_xlstm.xLSTMForCausalLM is in_tree.xLSTMForCausalLM


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"sp_size": 2}], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_split_sequence_is_refused(model, sizes, compiled, monkeypatch):
    """What accelerate's `ParallelismConfig` says in a process that splits its sequences."""
    state = {"parallelism_config": SimpleNamespace(**({"cp_size": 1, "sp_size": 1} | sizes))}
    monkeypatch.setattr("hf_xlstm.integration.AcceleratorState", SimpleNamespace(_shared_state=state))
    forward = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(NotImplementedError, match="state would start anew on every rank"):
        forward(tokens(1, 4))


def test_sequence_split_by_torch_is_refused(model, monkeypatch):
    def ring_attention(*args, **kwargs):
        raise AssertionError

    ring_attention.__module__ = "torch.distributed.tensor.experimental._context_parallel._attention"
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", ring_attention)
    with pytest.raises(NotImplementedError, match="state would start anew on every rank"):
        model(tokens(1, 4))


# ---- batches with nothing in them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)], ids=str)
def test_nothing_to_learn_gives_zero_gradients(model, count):
    """Trainer counts the labels of a step itself, and passes 0."""
    ids = tokens(2, 8)
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=count).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


@pytest.mark.parametrize("cls", HEADS)
def test_losses_of_heads_are_those_of_transformers(cls):
    """But where nothing is to be learnt: no token has a class, no answer is in the text."""
    model, ids, ignored = tiny_model(cls, num_labels=2, layer_types=["slstm", "mlstm"]), tokens(2, 8), -100
    names = ["labels"]
    given = [torch.tensor([[0, 1, -100, 1, 1, 0, -100, 0], [1, 1, 0, 0, -100, -100, -100, -100]])]
    if cls is xLSTMForQuestionAnswering:
        names, given, ignored = ["start_positions", "end_positions"], [torch.tensor([2, 5]), torch.tensor([4, 9])], 99
    elif cls is xLSTMForSequenceClassification:
        given = [torch.tensor([1, -100])]
    loss = model(ids, **dict(zip(names, given, strict=True))).loss
    theirs = transformers.loss.loss_utils.LOSS_MAPPING[cls.__name__.removeprefix("xLSTM")]
    model.loss_function = lambda *args, num_items_in_batch=None, **kwargs: theirs(*args, **kwargs)
    assert relative_error(loss, model(ids, **dict(zip(names, given, strict=True))).loss) < 1e-6
    loss = tiny_model(cls)(ids, **{name: torch.full_like(x, ignored) for name, x in zip(names, given)}).loss
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"labels": tokens(2, 7)}, r"`labels` must have the shape \(2, 8\).*got \(2, 7\)"),
        ({"labels": tokens(1, 8)}, r"`labels` must have the shape \(2, 8\).*got \(1, 8\)"),
        ({"labels": tokens(2, 8), "shift_labels": tokens(2, 7)}, r"`shift_labels` must have the shape \(2, 8\)"),
        ({"labels": tokens(2, 8), "logits_to_keep": 3}, "`logits_to_keep`"),
        ({"cu_seq_lens_q": [0, 8, 16]}, "`cu_seq_lens_q` must be a tensor, got list"),
        ({"seq_idx": [[0] * 8] * 2}, "`seq_idx` must be a tensor, got list"),
    ],
    ids=str,
)
def test_unfitting_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(tokens(2, 8), **arguments)


# ---- caches that outlive their pass ---------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["no grad", "grad", "step", "generate"])
def test_cache_made_in_inference_mode_goes_on(model, then):
    ids = tokens(2, 9)
    with torch.inference_mode():
        cache = xLSTMCache(model.config)
        model(ids[:, :5], cache=cache)
        expected = model(ids).logits[:, 5:].clone()
    if then == "generate":
        assert model.generate(ids, cache=cache, max_new_tokens=3, do_sample=False).equal(stepwise(model, ids, 3))
        return
    pieces = [ids[:, 5:]] if then != "step" else ids[:, 5:].split(1, dim=1)
    with torch.set_grad_enabled(then == "grad"):
        logits = torch.cat([model(piece, cache=cache).logits for piece in pieces], dim=1)
    assert relative_error(logits, expected) < 1e-5
    if then == "grad":
        logits.sum().backward()
        model.zero_grad()


@pytest.mark.parametrize("use_cache", [True, False])
def test_cache_made_in_inference_mode_is_cropped_and_reset(model, use_cache):
    """Both write to its tensors, outside of the mode; the model makes the cache there, or the caller outside."""
    ids, cache = tokens(2, 9), xLSTMCache(model.config)
    with torch.inference_mode():
        if use_cache:
            cache = model(ids[:, :5], use_cache=True).cache
        else:
            model(ids[:, :5], cache=cache)
        cache.activate_past_recording()
        model(ids[:, 5:], cache=cache)
    cache.crop(-2)
    assert relative_error(model(ids[:, 7:], cache=cache).logits, model(ids).logits[:, 7:]) < 1e-5
    with torch.inference_mode():
        model(ids, cache=cache)
    cache.reset()
    assert relative_error(model(ids, cache=cache).logits, model(ids).logits) < 1e-6


def test_interrupted_pass_is_told(model):
    """Some layers have read the tokens and others have not: the cache says so instead of going on."""
    cache = filled(model, tokens(2, 5))

    def stop(*args):
        raise KeyboardInterrupt

    hook = model.backbone.blocks[1].register_forward_pre_hook(stop)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(tokens(2, 3), cache=cache)
    hook.remove()
    for use in (lambda: model(tokens(2, 3), cache=cache), lambda: cache.save_pretrained("never")):
        with torch.no_grad(), pytest.raises(RuntimeError, match="ended in the middle"):
            use()
    cache.reset()
    with torch.no_grad():
        model(tokens(2, 5), cache=cache)
    assert_same_states(cache, filled(model, tokens(2, 5)))


@pytest.mark.parametrize("change", ["repeat", "select", "reorder"])
@torch.no_grad()
def test_rows_change_while_recording(model, change):
    """What was recorded follows the rows, so that `crop` restores the present ones."""
    ids, rows = tokens(2, 9), torch.tensor([1, 1, 0])
    cache = filled(model, ids[:, :4])
    cache.activate_past_recording()
    model(ids[:, 4:], cache=cache)
    if change == "repeat":
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([0, 0, 1, 1])
    elif change == "select":
        cache.batch_select_indices(rows)
    else:
        cache.reorder_cache(rows)
    cache.crop(-3)
    assert cache.batch_size == len(rows)
    assert_same_states(cache, filled(model, ids[rows, :6]))


# ---- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask, compiled",
    [("none", False), ("ones", False), ("left", False), ("inside", False), ("right", False), ("none", True)],
)
@pytest.mark.parametrize("bounds", ["seq_idx", "cu_seq_lens_q", "position_ids"])
@torch.no_grad()
def test_packed_equals_separate(model, bounds, mask, compiled):
    """With any mask, eager and compiled, however the documents are told."""
    lengths = (5, 1, 7)
    ids = tokens(1, 13)
    kept = torch.ones(1, 13, dtype=torch.bool)
    kept[0, {"left": [0, 1, 5], "inside": [2, 3, 8, 9], "right": [4, 11, 12]}.get(mask, [])] = False
    told = {
        "seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
        "cu_seq_lens_q": torch.tensor([0, 5, 6, 13]),
        # positions as they are counted where padding is, over unmasked tokens
        "position_ids": torch.cat(
            [(part.cumsum(1) - 1).clamp_min(0).masked_fill(~part, 1) for part in kept.split(lengths, dim=1)], dim=1
        ),
    }[bounds]
    attention_mask = None if mask == "none" else kept.long()
    forward = torch.compile(model, backend="eager") if compiled else model
    logits = forward(ids, attention_mask=attention_mask, use_cache=False, **{bounds: told}).logits
    for part, document, keep in zip(*(x.split(lengths, dim=1) for x in (logits, ids, kept)), strict=True):
        if keep.any():
            alone = model(document[keep][None]).logits
            assert relative_error(part[keep], alone[0]) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_positions_of_a_padded_batch_are_no_packing(model, side):
    """`generate` and tokenizers count positions over unmasked tokens, and write anything at the others."""
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    expected = model(ids, attention_mask=mask).logits
    for fill in (0, 1):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
        assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_classifier_goes_by_the_mask(side):
    """Not by the id of the padding token, which may be that of a word."""
    model = tiny_model(xLSTMForSequenceClassification, num_labels=3, pad_token_id=1)
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    ids[:, -2:] = ids[:, 0] = 1
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    together = model(ids, attention_mask=mask).logits
    alone = torch.cat([model(row[keep.bool()][None]).logits for row, keep in zip(ids, mask)])
    assert relative_error(together, alone) < 1e-5


def test_surface():
    """What completion shows is what the package promises, and all of it is there."""
    assert set(dir(hf_xlstm)) == {*hf_xlstm.__all__, "__version__"}
    assert all(hasattr(hf_xlstm, name) for name in dir(hf_xlstm))
    assert hf_xlstm.convert_checkpoint is conversion.convert_checkpoint
    assert hf_xlstm.save_self_contained is hub.save_self_contained
    assert not hasattr(hf_xlstm, "xLSTM")
    assert {"mlstm", "mlstm_step", "slstm", "slstm_step"} < set(hf_xlstm.ops.__all__)


def test_rare_imports_wait():
    code = "import sys, hf_xlstm; print([name for name in ('conversion', 'hub', 'env', 'commands', 'vllm') "
    code += "if f'hf_xlstm.{name}' in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown == "[]\n"
