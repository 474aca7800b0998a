"""Faster generation: speculative decoding, by a cache that takes tokens back, and compiled graphs."""

import pytest
import torch
from common import STACKS, assert_same_states, relative_error, tiny_model, tokens
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from hf_xlstm import xLSTMCache


stacks = pytest.mark.parametrize("stack", STACKS)
PROMPT = tokens(1, 7).repeat(1, 4)  # repeats itself, so that there is something to look up


def drafts(stack: str) -> dict[str, dict]:
    """Ways to guess tokens, by what they pass to `generate`."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, bos_token_id=None, eos_token_id=None)).eval()
    return {
        "prompt_lookup": {"prompt_lookup_num_tokens": 5},
        "itself": {"assistant_model": tiny_model(**STACKS[stack])},  # all guesses are right
        "another": {"assistant_model": tiny_model(seed=1, **STACKS[stack])},  # hardly any is
        "attention": {"assistant_model": llama},
    }


@stacks
@pytest.mark.parametrize("draft", ["prompt_lookup", "itself", "another", "attention"])
def test_greedy_is_exact(draft, stack):
    model = tiny_model(**STACKS[stack])
    expected = model.generate(PROMPT, max_new_tokens=25, do_sample=False)
    passes = []
    model.backbone.register_forward_hook(lambda *args: passes.append(args))
    actual = model.generate(PROMPT, max_new_tokens=25, do_sample=False, **drafts(stack)[draft])
    assert actual.equal(expected)
    if draft == "itself":
        assert len(passes) < 15


@stacks
@pytest.mark.parametrize("draft", ["prompt_lookup", "itself", "another", "attention"])
def test_sampling_follows_the_model(draft, stack):
    """Accepting and rejecting preserves the distribution if the model's logits are right at every position."""
    model = tiny_model(**STACKS[stack])
    options = {"max_new_tokens": 25, "do_sample": True, "output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(0)
    outputs = model.generate(PROMPT, **options, **drafts(stack)[draft])
    logits = torch.stack(outputs.logits, dim=1)
    expected = model(outputs.sequences[:, :-1]).logits[:, PROMPT.shape[1] - 1 :]
    assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("draft", ["prompt_lookup", "another"])
def test_end_of_text_and_continuation(draft):
    """The cache that `generate` returns holds the tokens it returns, also where a guess runs past the end."""
    model = tiny_model(**STACKS["conv"])
    plain = model.generate(PROMPT, max_new_tokens=25, do_sample=False)
    eos = plain[0, PROMPT.shape[1] + 6].item()
    options = {"do_sample": False, "eos_token_id": eos, "return_dict_in_generate": True}
    outputs = model.generate(PROMPT, max_new_tokens=25, **options, **drafts("conv")[draft])
    expected = model.generate(PROMPT, max_new_tokens=25, **options)
    assert outputs.sequences.equal(expected.sequences) and outputs.sequences.shape[1] < plain.shape[1]
    seen = outputs.cache.get_seq_length()
    assert seen in (outputs.sequences.shape[1], outputs.sequences.shape[1] - 1)
    cache = xLSTMCache(model.config)
    model(outputs.sequences[:, :seen], cache=cache)
    assert_same_states(outputs.cache, cache)
    longer = torch.cat([outputs.sequences, tokens(1, 3)], dim=1)
    assert model.generate(longer, max_new_tokens=5, do_sample=False, cache=outputs.cache).equal(
        model.generate(longer, max_new_tokens=5, do_sample=False)
    )


@pytest.mark.parametrize("stack", ["mlstm", "conv"])
@pytest.mark.parametrize(
    "options, graphs",
    [({}, 1), ({"prefill_chunk_size": 8}, 2), ({"prefill_chunk_size": 8, "num_beams": 3}, 2)],
    ids=["decode", "chunks", "beams"],
)
def test_compiled(options, graphs, stack):
    """Decoding is one graph after prompts of any length, and prefill in chunks another one."""
    model = tiny_model(**STACKS[stack])
    modes = {"max_new_tokens": 10, "do_sample": False, "num_beams": options.get("num_beams", 1)}
    compile_config = CompileConfig(fullgraph=True, backend="eager")
    compile_config._compile_all_devices = True
    options = options | {"cache_implementation": "static", "compile_config": compile_config}
    torch.compiler.reset()
    counters.clear()
    for length in (8, 16, 24, 32):
        prompt = tokens(2, length)
        expected = model.generate(prompt, **modes)
        assert model.generate(prompt, **(modes | options)).equal(expected)
    assert 1 <= counters["stats"]["unique_graphs"] <= graphs
