"""Checkpoints for vLLM's engine, the engine, and the comparison of what it says with this package's own model."""

import contextlib
import gc
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from common import STACKS, VOCAB_SIZE, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm import LLM, SamplingParams

from hf_xlstm import xLSTMForCausalLM


# Float32: what the order of additions may change.
TOLERANCE = 1e-4
# ASCII, so that any tokens make a text; space and newline under their names in byte-level vocabularies
CHARACTERS = ["<pad>", "<s>", "</s>", "Ġ", "Ċ", *map(chr, range(33, 127))]


def saved_model(directory: Path, stack: str, **fields) -> tuple[str, xLSTMForCausalLM]:
    """A tiny model whose gates are open, and the directory it was saved to."""
    model = tiny_model(**(STACKS[stack] | fields))
    model.save_pretrained(directory)
    return str(directory), model


def saved_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """One token per character, with a chat template."""
    vocabulary = {token: i for i, token in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    tokenizer.save_pretrained(directory)
    return tokenizer


@contextlib.contextmanager
def engine(directory: str, **options) -> Iterator[LLM]:
    defaults = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": 2**23,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
    }
    llm = LLM(directory, **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def ragged_prompts(number: int, shared: int = 0, longest: int = 100, seed: int = 0) -> list[list[int]]:
    """Prompts of 1, 2, 5 and then of all lengths, in no order, behind `shared` tokens that all have."""
    rng = random.Random(seed)
    lengths = [1, 2, 5, *(rng.randint(3, longest) for _ in range(number - 3))]
    rng.shuffle(lengths)
    prefix = [rng.randrange(VOCAB_SIZE) for _ in range(shared)]
    return [prefix + [rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in lengths]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0)


def complete(llm: LLM, prompts: list[list[int]], tokens: int = 16, **options) -> list:
    return llm.generate([{"prompt_token_ids": x} for x in prompts], greedy(tokens), use_tqdm=False, **options)


@torch.no_grad()
def log_probabilities(model: xLSTMForCausalLM, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """(reply, V), from one pass over the whole text."""
    return model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


def errors(model: xLSTMForCausalLM, output) -> torch.Tensor:
    """How far the log probability of each token of a reply is from the model's."""
    reply = list(output.outputs[0].token_ids)
    expected = log_probabilities(model, list(output.prompt_token_ids), reply)
    actual = torch.tensor([x[token].logprob for x, token in zip(output.outputs[0].logprobs, reply)])
    return (actual - expected.gather(1, torch.tensor(reply)[:, None]).squeeze(1)).abs()


def assert_same(model: xLSTMForCausalLM, outputs: list, tolerance: float = TOLERANCE) -> None:
    """Every reply is the model's greedy one, with its log probabilities. A token that is the most probable one after
    the text before it is the one that `generate` takes."""
    assert outputs
    for output in outputs:
        prompt, reply = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        assert reply == log_probabilities(model, prompt, reply).argmax(-1).tolist(), f"prompt of {len(prompt)}"
        error = errors(model, output)
        assert error.max() < tolerance, f"prompt of {len(prompt)}: {error}"


def metric(llm: LLM, name: str) -> int:
    """A counter of the engine."""
    values = [x.value for x in llm.get_metrics() if x.name == f"vllm:{name}"]
    assert values, sorted({x.name for x in llm.get_metrics()})
    return sum(values)


def stateful_layers(llm: LLM) -> dict:
    return llm.llm_engine.vllm_config.compilation_config.static_forward_context
