"""vLLM's engine says what this package's own model says, whatever a batch is made of."""

import json

import pytest
import torch
from common import STACKS
from engine import (
    assert_same,
    complete,
    engine,
    errors,
    greedy,
    log_probabilities,
    metric,
    ragged_prompts,
    saved_model,
    stateful_layers,
)

from hf_xlstm.vllm import DEFAULT_MAX_MODEL_LEN
from hf_xlstm.vllm.backend import XLSTMMetadata
from hf_xlstm.vllm.states import StatefulLayer


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
# each family, convolutions included
BOTH = pytest.mark.parametrize("stack", ["conv", "paper"])


@pytest.mark.parametrize("stack", STACKS)
def test_twenty_ragged_prompts_at_once(stack, tmp_path):
    directory, model = saved_model(tmp_path, stack)
    prompts = ragged_prompts(20)
    with engine(directory) as llm:
        outputs = complete(llm, prompts)
    assert_same(model, outputs)
    for prompt, output in zip(prompts, outputs):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
        assert list(output.outputs[0].token_ids) == expected.tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": True, "use_bias": True, "slstm_num_heads": 2, "slstm_norm_eps": 1e-2},
        {"gate_soft_cap": None, "output_logit_soft_cap": None, "add_out_norm": False, "slstm_conv_kernel_size": 1},
        {"qk_dim_factor": 1.0, "v_dim_factor": 2.0, "output_logit_soft_cap": 2.0, "num_heads": 2},
    ],
)
def test_options_of_the_large_family(fields, tmp_path):
    directory, model = saved_model(tmp_path, "conv", **fields)
    with engine(directory) as llm:
        assert_same(model, complete(llm, ragged_prompts(6)))


@BOTH
def test_chunks_of_64_tokens_and_few_requests_at_once(stack, tmp_path, monkeypatch):
    """Prompts are read in pieces, beside requests that decode."""
    mixed = []
    over_batch = StatefulLayer.over_batch

    def spy(self, *args):
        if self.metadata is not None:
            mixed.append(self.metadata.num_decodes > 0 and bool(self.metadata.num_prefills))
        return over_batch(self, *args)

    monkeypatch.setattr(StatefulLayer, "over_batch", spy)
    directory, model = saved_model(tmp_path, stack)
    with engine(directory, max_num_batched_tokens=64, max_num_seqs=4) as llm:
        assert_same(model, complete(llm, ragged_prompts(8, longest=300), tokens=24))
    assert any(mixed) and not all(mixed)


@BOTH
def test_preempted_requests_resume(stack, tmp_path):
    directory, model = saved_model(tmp_path, stack)
    with engine(directory, num_gpu_blocks_override=12, block_size=16, max_model_len=192) as llm:
        assert_same(model, complete(llm, ragged_prompts(8), tokens=60))
        assert metric(llm, "num_preemptions") > 0


@BOTH
def test_three_states_for_eight_requests(stack, tmp_path):
    directory, model = saved_model(tmp_path, stack)
    with engine(directory, num_gpu_blocks_override=4, enable_prefix_caching=False) as llm:
        assert_same(model, complete(llm, ragged_prompts(8)))


@BOTH
def test_shared_prefixes_are_read_once(stack, tmp_path):
    directory, model = saved_model(tmp_path, stack)
    prompts = ragged_prompts(8, shared=40)
    with engine(directory, block_size=16, max_num_batched_tokens=48) as llm:
        assert_same(model, complete(llm, prompts))
        hits = metric(llm, "prefix_cache_hits")
        again = complete(llm, prompts)
        assert_same(model, again)
        assert all(output.num_cached_tokens >= 32 for output in again)
        assert metric(llm, "prefix_cache_hits") >= hits + 8 * 32


@BOTH
def test_what_blocks_held_before_does_not_matter(stack, tmp_path):
    directory, model = saved_model(tmp_path, stack)
    with engine(directory, enable_prefix_caching=False, max_num_batched_tokens=64) as llm:
        for seed in range(2):
            for layer in stateful_layers(llm).values():
                layer.kv_cache[0].fill_(torch.nan)
            assert_same(model, complete(llm, ragged_prompts(6, seed=seed)))


def test_aborted_requests_leave_the_others_alone(tmp_path):
    directory, model = saved_model(tmp_path, "conv")
    with engine(directory, max_num_batched_tokens=64, max_num_seqs=4) as llm:
        core, finished = llm.llm_engine, {}
        for i, prompt in enumerate(ragged_prompts(12)):
            core.add_request(str(i), {"prompt_token_ids": prompt}, greedy(24))
        for step in range(200):
            if step in (2, 5, 9):  # some wait, some prefill, some decode
                core.abort_request([str(step), str(step + 1)])
            finished |= {x.request_id: x for x in core.step() if x.finished}
            if not core.has_unfinished_requests():
                break
        assert not core.has_unfinished_requests()
        complete_ones = [x for x in finished.values() if len(x.outputs[0].token_ids) == 24]
        assert len(complete_ones) >= 6
        assert_same(model, complete_ones)
        assert_same(model, complete(llm, ragged_prompts(4, seed=1)))


def model_that_repeats_itself(directory, stack: str):
    """The next token depends on the last one most, and on the state a little."""
    path, model = saved_model(directory, stack)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "out_proj.weight" in name or "proj_down.weight" in name:
                parameter *= 0.5
            elif name.endswith("slstm_layer.multihead_norm.weight"):
                parameter.fill_(-0.8 if stack == "paper" else 0.2)
    model.save_pretrained(directory)
    return path, model


@BOTH
def test_guesses_that_are_accepted_and_some_that_are_not(stack, tmp_path, monkeypatch):
    """At once; and prompts of one token, which vLLM pads with guesses, beside one that decodes."""
    # a process of its own: in one where guesses were made before, through numba, vLLM 0.32 starts no second engine
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    directory, model = model_that_repeats_itself(tmp_path, stack)
    with engine(directory, speculative_config=NGRAM, enable_prefix_caching=False) as llm:
        assert_same(model, complete(llm, ragged_prompts(8), tokens=64))
        guessed, accepted = (metric(llm, f"spec_decode_num_{x}_tokens") for x in ("draft", "accepted"))
        core, finished, late = llm.llm_engine, [], [[token] for token in range(8)]
        core.add_request("long", {"prompt_token_ids": [1, 2, 3]}, greedy(400))
        while core.has_unfinished_requests():
            finished += [x for x in core.step() if x.finished]
            if late and "long" not in {x.request_id for x in finished}:
                core.add_request(f"{len(late)}", {"prompt_token_ids": late.pop()}, greedy(16))
        assert len(finished) == 9
        assert_same(model, finished)
    assert 10 < accepted < guessed


@BOTH
def test_guesses_in_batches_that_are_too_small_for_all(stack, tmp_path, monkeypatch):
    """Requests sit out steps, and go on from the state after their last accepted token all the same."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    directory, model = model_that_repeats_itself(tmp_path, stack)
    small = {"max_num_batched_tokens": 16, "max_num_seqs": 12}
    with engine(directory, speculative_config=NGRAM, enable_prefix_caching=False, **small) as llm:
        assert_same(model, complete(llm, ragged_prompts(12), tokens=48))


# name in the metadata, and what it is instead
BUGS = {
    "the state of the neighbour": ("decode_slots", lambda metadata: metadata.decode_blocks[:, 0].roll(1)),
    "the state of a block further on": ("decode_slots", lambda metadata: metadata.decode_blocks[:, 0] + 1),
    "written to the neighbour": ("prefill_blocks", lambda metadata: metadata.state_indices_tensor_p.long().roll(1)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_state_index_is_caught(bug, tmp_path, monkeypatch):
    name, value = BUGS[bug]
    directory, model = saved_model(tmp_path, "conv")
    monkeypatch.setattr(XLSTMMetadata, name, property(value))
    with engine(directory, enable_prefix_caching=False) as llm:
        outputs = complete(llm, ragged_prompts(6))
    with pytest.raises(AssertionError, match="prompt of"):
        assert_same(model, outputs)


@BOTH
def test_bfloat16_weights_with_float32_states(stack, tmp_path):
    """As far from float32 as this package's own bfloat16 model, not further."""
    directory, model = saved_model(tmp_path, stack)
    with engine(directory, dtype="bfloat16") as llm:
        assert {x.kv_cache[0].dtype for x in stateful_layers(llm).values()} == {torch.float32}
        outputs = complete(llm, ragged_prompts(8))
    narrow = type(model).from_pretrained(directory, dtype=torch.bfloat16).eval()
    error, own_error = 0.0, 0.0
    for output in outputs:
        prompt, reply = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        difference = log_probabilities(narrow, prompt, reply) - log_probabilities(model, prompt, reply)
        own_error += difference.gather(1, torch.tensor(reply)[:, None]).square().mean().item()
        error += errors(model, output).square().mean().item()
    assert 0 < error < 4 * own_error


def test_length_is_free(tmp_path):
    directory, model = saved_model(tmp_path, "mixed")
    with engine(directory, max_model_len=None) as llm:
        assert llm.llm_engine.vllm_config.model_config.max_model_len == DEFAULT_MAX_MODEL_LEN
    with engine(directory, max_model_len=300_000, max_num_seqs=2) as llm:
        assert_same(model, complete(llm, ragged_prompts(3)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    with engine(directory, max_model_len=None) as llm:
        assert llm.llm_engine.vllm_config.model_config.max_model_len == 128


def test_what_a_cpu_cannot_do_is_refused(tmp_path):
    directory, _ = saved_model(tmp_path, "mixed")
    with pytest.raises(ValueError, match="no-enable-prefix-caching"), engine(directory, speculative_config=NGRAM):
        pass
