"""Two processes, each with a part of the model."""

import pytest
from common import tiny_config
from engine import assert_same, complete, engine, ragged_prompts, saved_model

from hf_xlstm import xLSTMConfig
from hf_xlstm.vllm.states import block_shape, state_shapes


def two_ranks(monkeypatch) -> dict:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    return {"distributed_executor_backend": "mp", "max_num_batched_tokens": 64, "max_num_seqs": 4}


@pytest.mark.parametrize("stack", ["conv", "paper"])
def test_tensor_parallel(stack, tmp_path, monkeypatch):
    """Heads over ranks, in both cells and both families."""
    directory, model = saved_model(tmp_path, stack, **({"mlstm_inner_dim": 64} if stack == "paper" else {}))
    with engine(directory, tensor_parallel_size=2, **two_ranks(monkeypatch)) as llm:
        assert_same(model, complete(llm, ragged_prompts(6)))


@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_parallel(tied, tmp_path, monkeypatch):
    """What vLLM passes between stages on a CPU it allocates while it warms up, which `enforce_eager` leaves out."""
    directory, model = saved_model(tmp_path, "conv", tie_word_embeddings=tied)
    with engine(directory, pipeline_parallel_size=2, enforce_eager=False, **two_ranks(monkeypatch)) as llm:
        assert_same(model, complete(llm, ragged_prompts(6)))


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_states_of_xlstm_7b_go_by_heads(ranks):
    """A rank's block has C, n and m of its heads, nothing else."""
    heads, key_dim, value_dim = 8 // ranks, 256, 512
    assert block_shape(xLSTMConfig(), ranks) == (heads * (key_dim * value_dim + key_dim + 1),)


@pytest.mark.parametrize("layer_type", ["mlstm", "slstm"])
def test_heads_that_cannot_be_split_are_refused(layer_type):
    with pytest.raises(ValueError, match="tensor_parallel_size must divide"):
        state_shapes(tiny_config(layer_types=["mlstm", "slstm"]), layer_type, 3)
