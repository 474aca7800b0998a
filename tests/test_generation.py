"""`generate` in all its modes, against the plainest way to do the same."""

import copy

import pytest
import torch
from common import STACKS, VOCAB_SIZE, tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer

from hf_xlstm import integration, xLSTMCache


NEW = 12
PROMPTS = {"batch": tokens(3, 10), "one token": tokens(2, 1, seed=1)}


@pytest.fixture(scope="module", params=STACKS)
def model(request):
    return tiny_model(**STACKS[request.param])


def generate(model, ids=None, **options):
    options = {"do_sample": False, "max_new_tokens": NEW} | options
    return model.generate(ids, **options)


@torch.no_grad()
def greedy(model, ids: torch.Tensor, count: int = NEW) -> torch.Tensor:
    """Without a cache and without `generate`."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy(model, prompt):
    expected = greedy(model, PROMPTS[prompt])
    assert torch.equal(generate(model, PROMPTS[prompt]), expected)
    assert torch.equal(generate(model, PROMPTS[prompt], use_cache=False), expected)
    # a model that remembers nothing would say the same after equal last tokens; this one does not
    continuations = expected[:, PROMPTS[prompt].shape[1] :]
    assert len(set(continuations.flatten().tolist())) > 3


def test_memory_decides_the_output(model):
    """The same last token after different beginnings: what follows differs, so the tests here test the state."""
    ids = tokens(8, 10)
    ids[:, -1] = 5
    assert len({tuple(row.tolist()) for row in greedy(model, ids)[:, 10:]}) > 4


def test_sampling(model):
    def sample(seed):
        torch.manual_seed(seed)
        return generate(model, PROMPTS["batch"], do_sample=True, top_k=20, num_return_sequences=2)

    first = sample(0)
    assert first.shape == (6, 10 + NEW)
    assert torch.equal(first, sample(0))
    assert not torch.equal(first, sample(1))
    assert torch.equal(first[::2, :10], PROMPTS["batch"])
    assert not torch.equal(first[::2], first[1::2])


def test_scores_are_those_of_the_whole_sequence(model):
    outputs = generate(model, PROMPTS["batch"], return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        expected = model(outputs.sequences).logits[:, 9:-1]
    torch.testing.assert_close(torch.stack(outputs.logits, dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 2, "do_sample": True}],
    ids=str,
)
def test_beams_equal_beams_without_cache(model, options):
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(generate(model, PROMPTS["batch"], use_cache=use_cache, **options))
    assert torch.equal(*results)


def test_inputs_embeds(model):
    embeds = model.get_input_embeddings()(PROMPTS["batch"])
    assert torch.equal(generate(model, inputs_embeds=embeds), greedy(model, PROMPTS["batch"])[:, 10:])


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}, {"num_beams": 3}], ids=str)
def test_left_padded_batch_equals_single_prompts(model, options):
    lengths, ids = (10, 4, 1), PROMPTS["batch"].clone()
    mask = torch.stack([torch.arange(10) >= 10 - length for length in lengths])
    together = generate(model, ids.masked_fill(~mask, 0), attention_mask=mask.long(), **options)
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, 10 - length :], **options)
        assert torch.equal(together[row, 10:], alone[0, length:])


@pytest.mark.parametrize("size", [1, 3, 5, 9, 10, 50])
def test_prefill_in_chunks(model, size):
    assert torch.equal(generate(model, PROMPTS["batch"], prefill_chunk_size=size), greedy(model, PROMPTS["batch"]))


@pytest.mark.parametrize("saved", [False, True])
def test_continuing_from_a_cache(model, saved, tmp_path):
    """Each turn feeds only what the cache has not seen; `generate` finds out what that is."""
    first = generate(model, PROMPTS["batch"], max_new_tokens=5, return_dict_in_generate=True)
    cache = first.cache
    assert isinstance(cache, xLSTMCache)
    assert cache.get_seq_length() == 14  # the last token was said but not yet read
    if saved:
        cache.save_pretrained(tmp_path)
        cache = xLSTMCache.from_pretrained(tmp_path)
    turn = torch.cat([first.sequences, tokens(3, 4, seed=2)], dim=1)
    assert torch.equal(generate(model, turn, cache=cache), greedy(model, turn))


def test_continuing_one_prompt_many_times(model):
    """A prompt read once serves any number of continuations."""
    prompt = tokens(1, 10)
    cache = xLSTMCache(model.config)
    with torch.no_grad():
        model(prompt, cache=cache)
    for seed in (1, 2):
        ids = torch.cat([prompt, tokens(1, 3, seed=seed)], dim=1)
        assert torch.equal(generate(model, ids, cache=copy.deepcopy(cache)), greedy(model, ids))
    cache.batch_repeat_interleave(4)
    ids = torch.cat([prompt.expand(4, -1), tokens(4, 3)], dim=1)
    assert torch.equal(generate(model, ids, cache=cache), greedy(model, ids))


class Collector(BaseStreamer):
    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, value):
        self.chunks.append(value.flatten())

    def end(self):
        self.ended = True


def test_streamer(model):
    streamer, prompt = Collector(), tokens(1, 10)
    expected = generate(model, prompt, streamer=streamer)
    assert torch.equal(torch.cat(streamer.chunks), expected[0])
    assert streamer.ended
    assert len(streamer.chunks) == 1 + NEW  # the prompt, then token by token


@pytest.mark.parametrize("prompt_length", [1, 30])
def test_prompt_lookup(model, prompt_length):
    prompt = tokens(1, 5).repeat(1, 6)[:, :prompt_length]  # repetitive: there is something to look up
    assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=3), greedy(model, prompt))


@pytest.mark.parametrize("layer_types", [None, ["mlstm"], ["slstm", "mlstm"]], ids=str)
def test_assisted_decoding(model, layer_types):
    """Whether the assistant is the model itself and always right, or guesses wrong: the same text."""
    assistant = model
    if layer_types is not None:
        assistant = tiny_model(seed=1, num_hidden_layers=len(layer_types), layer_types=layer_types)
    prompt = tokens(1, 10)
    assert torch.equal(generate(model, prompt, assistant_model=assistant), greedy(model, prompt))


def test_static_cache(model):
    actual = generate(model, PROMPTS["batch"], cache_implementation="static")
    assert torch.equal(actual, greedy(model, PROMPTS["batch"]))


def test_end_of_sequence(model):
    """A row that has ended is filled up with padding and leaves the others alone."""
    expected = greedy(model, PROMPTS["batch"])
    end = expected[0, 13].item()
    actual = generate(model, PROMPTS["batch"], eos_token_id=end, pad_token_id=0)
    for row in range(3):
        new = expected[row, 10:].tolist()
        stop = new.index(end) + 1 if end in new else NEW
        assert actual[row, 10 : 10 + stop].tolist() == new[:stop]
        assert not actual[row, 10 + stop :].any()


def test_pipeline(model):
    words = {"<pad>": 0} | {f"w{index}": index for index in range(1, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["w3 w7 w12 w5 w9", "w4", "w8 w2"]
    options = {"max_new_tokens": NEW, "do_sample": False}
    batched = generator(prompts, batch_size=3, **options)
    assert batched == [generator(prompt, **options) for prompt in prompts]
    ids = generator(prompts[0], return_tensors=True, **options)[0]["generated_token_ids"]
    assert ids == greedy(model, torch.tensor([[3, 7, 12, 5, 9]]))[0].tolist()


@pytest.mark.parametrize("name", ["offloaded", "quantized"])
def test_cache_implementation_without_effect_is_told(name, monkeypatch):
    told = []
    monkeypatch.setattr(integration.logger, "warning_once", told.append)
    tiny_model().generate(tokens(1, 4), max_new_tokens=2, cache_implementation=name)
    assert any(f"cache_implementation={name!r} has no effect" in text for text in told)
