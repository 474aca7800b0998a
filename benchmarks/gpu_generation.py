"""A 7B model with random weights on one GPU: decoding speed, time to the first token, memory.

    python benchmarks/gpu_generation.py --json results/gpu_generation.json

Every model decodes through plain `generate`, with `cache_implementation="static"` where that compiles the step into a
CUDA graph: ours and Llama's; the in-tree xLSTM runs as it is, with the kernels of `xlstm` where that is installed.
Ours is checked first: one token after another must give the logits of one pass over the prompt.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from gpu_common import in_tree_kernels, peak_gigabytes, print_row, write_results

from hf_xlstm import xLSTMCache, xLSTMConfig, xLSTMForCausalLM


PROMPTS = [2048, 16_384, 65_536]
BATCHES = [1, 8, 64]
NEW_TOKENS = 128


def build(model_class: type, config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return model_class(config).to(torch.bfloat16).eval()


def ours() -> transformers.PreTrainedModel:
    return build(xLSTMForCausalLM, xLSTMConfig())


def in_tree() -> transformers.PreTrainedModel:
    return build(transformers.xLSTMForCausalLM, transformers.xLSTMConfig(**in_tree_kernels()))


def llama() -> transformers.PreTrainedModel:
    """Llama 2 7B, its vocabulary as large as the others'."""
    config = transformers.LlamaConfig(vocab_size=50_304, max_position_embeddings=PROMPTS[-1] + NEW_TOKENS + 1)
    return build(transformers.LlamaForCausalLM, config)


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "hf_xlstm": ours,
    "in_tree": in_tree,
    "llama": llama,
}
COMPILED = ("hf_xlstm", "llama")


@torch.no_grad()
def check(model: transformers.PreTrainedModel) -> float:
    """Relative error of stepwise logits; the random model's own bf16 rounding is what the bound leaves room for."""
    tokens = torch.randint(model.config.vocab_size, (2, 80), device="cuda")
    expected = model(tokens).logits[:, -8:].float()
    cache = xLSTMCache(model.config)
    model(tokens[:, :-8], past_key_values=cache)
    steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(72, 80)]
    error = ((torch.cat(steps, dim=1).float() - expected).norm() / expected.norm()).item()
    if not error < 5e-2:
        sys.exit(f"wrong result, nothing timed: logits are off by {error:.1e}")
    return error


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


def decode_row(model: transformers.PreTrainedModel, batch: int, context: int, static: bool) -> dict:
    """Seconds per token from the difference of a long and a short run, so that the prompt does not count."""
    prompt = torch.randint(model.config.vocab_size, (batch, context), device="cuda")
    generate(model, prompt, 8, static)  # compiles
    short, long = (
        statistics.median(generate(model, prompt, n, static) for _ in range(3)) for n in (8, 8 + NEW_TOKENS)
    )
    seconds = (long - short) / NEW_TOKENS
    return {
        "measure": "decode",
        "batch": batch,
        "context": context,
        "ms_per_step": seconds * 1e3,
        "tokens_per_s": batch / seconds,
        "gb": peak_gigabytes(lambda: generate(model, prompt, 8, static)),
    }


def prefill_row(model: transformers.PreTrainedModel, length: int) -> dict:
    prompt = torch.randint(model.config.vocab_size, (1, length), device="cuda")
    generate(model, prompt, 1, static=False)  # compiles
    seconds = statistics.median(generate(model, prompt, 1, static=False) for _ in range(3))
    return {
        "measure": "first token",
        "context": length,
        "ms": seconds * 1e3,
        "tokens_per_s": length / seconds,
        "gb": peak_gigabytes(lambda: generate(model, prompt, 1, static=False)),
    }


def rows_of(name: str) -> Iterator[dict]:
    model = MODELS[name]()
    row = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
    if name == "hf_xlstm":
        yield row | {"measure": "check", "error": check(model)}
    work = [lambda n=n: prefill_row(model, n) for n in PROMPTS]
    work += [lambda b=b: decode_row(model, b, 128, name in COMPILED) for b in BATCHES]
    work += [lambda: decode_row(model, 1, 16_384, name in COMPILED)]
    for measure in work:
        try:
            yield row | measure()
        except Exception as error:  # out of memory at 64 x ..., or not supported: a result as well
            if name == "hf_xlstm":
                raise
            yield row | {"failed": f"{type(error).__name__}: {error}"[:200]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="default: all of them")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    for name in args.models:
        for row in rows_of(name):
            print_row(row)
            rows.append(row)
            write_results(args.json, rows)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
