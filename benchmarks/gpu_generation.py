"""A 7B model with random weights on one GPU: decoding speed, time to the first token, memory.

    python benchmarks/gpu_generation.py --json results/gpu_generation.json

Every model decodes through plain `generate`, with `cache_implementation="static"` where that compiles the step into a
CUDA graph: ours and Llama's; the in-tree xLSTM runs as it is, with the kernels of `xlstm` where that is installed.
Ours is checked first: one token after another must give the logits of one pass over the prompt.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import transformers
from gpu_common import DEVICE, OURS, Job, argument_parser, in_tree_kernels, measure, model_jobs, peak_gigabytes

from hf_xlstm import xLSTMCache, xLSTMConfig, xLSTMForCausalLM


SIZE = {"vocab_size": 50_304, "hidden_size": 4096, "num_hidden_layers": 32}
PROMPTS = [2048, 16_384, 65_536]
DECODE = [(1, 128), (8, 128), (64, 128), (1, 16_384)]  # batch, context
NEW_TOKENS = 128


def build(model_class: type, config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return model_class(config).to(torch.bfloat16).eval()


def ours() -> transformers.PreTrainedModel:
    return build(xLSTMForCausalLM, xLSTMConfig(**SIZE))


def in_tree() -> transformers.PreTrainedModel:
    return build(transformers.xLSTMForCausalLM, transformers.xLSTMConfig(**SIZE, **in_tree_kernels()))


def llama() -> transformers.PreTrainedModel:
    """Llama 2 7B, its vocabulary as large as the others'."""
    config = transformers.LlamaConfig(
        **SIZE, intermediate_size=11_008, max_position_embeddings=PROMPTS[-1] + NEW_TOKENS + 1
    )
    return build(transformers.LlamaForCausalLM, config)


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    OURS: ours,
    "in_tree": in_tree,
    "llama": llama,
}
COMPILED = (OURS, "llama")


@torch.no_grad()
def check() -> dict:
    """Relative error of stepwise logits, of two layers as wide as the model's, in float32."""
    torch.manual_seed(0)
    config = xLSTMConfig(**SIZE | {"num_hidden_layers": 2}, backend="triton")
    with torch.device(DEVICE):
        model = xLSTMForCausalLM(config).eval()
        tokens = torch.randint(config.vocab_size, (2, 80))
    expected = model(tokens).logits[:, -8:]
    cache = xLSTMCache(config)
    model(tokens[:, :-8], cache=cache)
    steps = [model(tokens[:, t : t + 1], cache=cache).logits for t in range(72, 80)]
    error = ((torch.cat(steps, dim=1) - expected).norm() / expected.norm()).item()
    if not error < 1e-3:
        raise ValueError(f"wrong result: logits are off by {error:.1e}")
    return {"error": error}


def generate(model: transformers.PreTrainedModel, prompt: torch.Tensor, new_tokens: int, static: bool) -> float:
    """Seconds for exactly `new_tokens` tokens."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(
        prompt,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        cache_implementation="static" if static else None,
    )
    torch.cuda.synchronize()
    return time.perf_counter() - start


def decode(model: transformers.PreTrainedModel, batch: int, context: int, static: bool) -> dict:
    """Seconds per token from the difference of a long and a short run, so that the prompt does not count."""
    prompt = torch.randint(model.config.vocab_size, (batch, context), device=DEVICE)
    generate(model, prompt, 8 + NEW_TOKENS, static)  # compiles, for the longest cache
    short, long = (
        statistics.median(generate(model, prompt, n, static) for _ in range(3)) for n in (8, 8 + NEW_TOKENS)
    )
    seconds = (long - short) / NEW_TOKENS
    return {
        "ms_per_step": seconds * 1e3,
        "tokens_per_s": batch / seconds,
        "gb": peak_gigabytes(lambda: generate(model, prompt, 8, static)),
    }


def prefill(model: transformers.PreTrainedModel, length: int) -> dict:
    prompt = torch.randint(model.config.vocab_size, (1, length), device=DEVICE)
    generate(model, prompt, 1, static=False)  # compiles
    seconds = statistics.median(generate(model, prompt, 1, static=False) for _ in range(3))
    return {
        "ms": seconds * 1e3,
        "tokens_per_s": length / seconds,
        "gb": peak_gigabytes(lambda: generate(model, prompt, 1, static=False)),
    }


def jobs(names: list[str]) -> Iterator[Job]:
    if OURS in names:
        yield {"model": OURS, "measure": "check"}, check
    for name in names:
        yield from model_jobs({"model": name}, MODELS[name], functools.partial(jobs_of, name in COMPILED))


def jobs_of(compiles: bool, model: transformers.PreTrainedModel) -> Iterator[Job]:
    def decode_jobs(batch: int, context: int) -> Iterator[Job]:
        for static in (True, False) if compiles else (False,):
            row = {"measure": "decode", "batch": batch, "context": context, "static": static}
            yield row, functools.partial(decode, model, batch, context, static)

    yield from decode_jobs(*DECODE[0])
    for length in PROMPTS:
        yield {"measure": "first token", "context": length}, functools.partial(prefill, model, length)
    for batch, context in DECODE[1:]:  # every batch size compiles again, which takes longer than all the rest
        yield from decode_jobs(batch, context)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="default: all of them")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    return measure(jobs(args.models), args)


if __name__ == "__main__":
    sys.exit(main())
