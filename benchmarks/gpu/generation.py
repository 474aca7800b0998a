"""A 7B model with random weights on one GPU: decoding speed, time to the first token, memory.

Every model decodes through plain `generate`, with `cache_implementation="static"` where that compiles the step into a
CUDA graph: hf_xlstm and Llama; the in-tree xLSTM runs as it is, with the kernels of `xlstm` where that is installed.
hf_xlstm is checked first: one token after another must give the logits of one pass over the prompt.
"""

import functools
import statistics

import torch
from transformers import PreTrainedModel

from benchmarks import peers
from benchmarks.gpu import harness
from benchmarks.gpu.harness import Job, Jobs, Model, peak_gigabytes
from benchmarks.peers import HF_XLSTM, IN_TREE
from benchmarks.provenance import relative_error, seconds
from hf_xlstm import xLSTMCache


SIZE = {"vocab_size": 50_304, "hidden_size": 4096, "num_hidden_layers": 32, "num_heads": 8}
PROMPTS = [16_384, 2048, 65_536]
DECODE = [(1, 128), (8, 128), (1, 16_384), (64, 128)]  # batch, context
NEW_TOKENS = 64
CHECKED = (80, 8)  # tokens, and how many of them are read one after another
MODELS = (HF_XLSTM, IN_TREE, "llama")  # Llama has the sizes of Llama 2 7B within a percent, and this vocabulary
COMPILED = (HF_XLSTM, "llama")


def build(name: str) -> PreTrainedModel:
    return peers.build(name, **SIZE, dtype=torch.bfloat16, device=harness.DEVICE)


@torch.no_grad()
def check() -> dict:
    """Relative error of stepwise logits, of two layers as wide as the model's, in float32."""
    sizes = SIZE | {"num_hidden_layers": 2}
    model = peers.build(HF_XLSTM, **sizes, dtype=torch.float32, device=harness.DEVICE, backend="triton")
    length, last = CHECKED
    tokens = torch.randint(SIZE["vocab_size"], (2, length), device=harness.DEVICE)
    expected = model(tokens).logits[:, -last:]
    cache = xLSTMCache(model.config)
    model(tokens[:, :-last], cache=cache)
    steps = [model(tokens[:, t : t + 1], cache=cache).logits for t in range(length - last, length)]
    error = relative_error(torch.cat(steps, dim=1), expected)
    if not error < 1e-3:
        raise ValueError(f"wrong result: logits are off by {error:.1e}")
    return {"error": error}


def generate(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, static: bool) -> float:
    """Seconds for exactly `new_tokens` tokens."""
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": None, "cache_implementation": "static" if static else None}

    def run() -> None:
        model.generate(prompt, **options)
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return seconds(run)


def decode(model: PreTrainedModel, batch: int, context: int, static: bool) -> dict:
    """Seconds per token from the difference of a long and a short run, so that the prompt does not count."""
    prompt = torch.randint(model.config.vocab_size, (batch, context), device=harness.DEVICE)
    generate(model, prompt, 8 + NEW_TOKENS, static)  # compiles, for the longest cache
    short, long = (
        statistics.median(generate(model, prompt, n, static) for _ in range(3)) for n in (8, 8 + NEW_TOKENS)
    )
    step = (long - short) / NEW_TOKENS
    return {
        "ms_per_step": step * 1e3,
        "tokens_per_s": batch / step,
        "gb": peak_gigabytes(lambda: generate(model, prompt, 8, static)),
    }


def prefill(model: PreTrainedModel, length: int) -> dict:
    prompt = torch.randint(model.config.vocab_size, (1, length), device=harness.DEVICE)
    generate(model, prompt, 1, static=False)  # compiles
    first_token = statistics.median(generate(model, prompt, 1, static=False) for _ in range(3))
    return {
        "ms": first_token * 1e3,
        "tokens_per_s": length / first_token,
        "gb": peak_gigabytes(lambda: generate(model, prompt, 1, static=False)),
    }


def jobs() -> Jobs:
    """What needs no compilation first; every batch size compiles again, which takes longer than all the rest."""
    needs = ("smoke/mlstm/*/bfloat16/*", "smoke/model/*", "generation/hf_xlstm/check")
    yield Job({"model": HF_XLSTM, "measure": "check"}, check, needs[:2])
    for name in MODELS:
        model = Model(functools.partial(build, name))
        yield from jobs_of(name, model, needs if name == HF_XLSTM else ())


def jobs_of(name: str, model: Model, needs: tuple[str, ...]) -> Jobs:
    def decode_job(batch: int, context: int, static: bool) -> Job:
        row = {"model": name, "measure": "decode", "batch": batch, "context": context}
        row |= {"graph": "CUDA graph" if static else "no graph"}
        return Job(row, lambda: decode(model(), batch, context, static), needs)

    def prefill_job(length: int) -> Job:
        return Job(
            {"model": name, "measure": "first token", "context": length}, lambda: prefill(model(), length), needs
        )

    yield decode_job(*DECODE[0], False)
    yield prefill_job(PROMPTS[0])
    yield decode_job(*DECODE[1], False)
    if name in COMPILED:
        yield decode_job(*DECODE[0], True)
    yield from map(prefill_job, PROMPTS[1:])
    yield from (decode_job(*sizes, False) for sizes in DECODE[2:])
    if name in COMPILED:
        yield from (decode_job(*sizes, True) for sizes in DECODE[1:])
