"""Two processes, each with a part of the model."""

import pytest
from engine import assert_same, complete, engine, ragged_prompts, saved_model


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


def test_heads_that_cannot_be_split_are_refused(tmp_path):
    from hf_xlstm.vllm.states import state_shapes

    _, model = saved_model(tmp_path, "mixed")
    with pytest.raises(ValueError, match="tensor_parallel_size must divide num_heads"):
        state_shapes(model.config, "mlstm", 3)
