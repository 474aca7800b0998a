"""What depends on how Transformers names and calls things: nothing meant for the model may disappear."""

import copy

import pytest
import torch
from common import STACKS, assert_same_states, relative_error, tiny_model, tokens
from transformers import DynamicCache

from hf_xlstm import (
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
