"""Training throughput on one GPU: models of 400M and 1.3B parameters, bf16, sequences of 2k to 32k tokens.

    python benchmarks/gpu_training.py --json results/gpu_training.json

One step is forward, loss, backward and AdamW, with 32,768 tokens. The in-tree xLSTM runs with the kernels of `xlstm`
and `mlstm-kernels` where they are installed, in plain PyTorch otherwise; Llama with the FlashAttention in torch. Ours
is checked first: its gradients against those of the torch backend in float32.
"""

import argparse
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from gpu_common import in_tree_kernels, milliseconds, peak_gigabytes, print_row, write_results

from hf_xlstm import xLSTMConfig, xLSTMForCausalLM


TOKENS = 32_768
LENGTHS = [2048, 8192, 32_768]
VOCAB = 50_304
SIZES = {"400M": (1024, 24, 4), "1.3B": (2048, 24, 4)}  # width, blocks, heads of the xLSTM; Llama: heads of 64 and 128
MODELS = ("hf_xlstm", "in_tree", "llama")


def build(name: str, size: str) -> transformers.PreTrainedModel:
    width, blocks, heads = SIZES[size]
    common = {"vocab_size": VOCAB, "hidden_size": width, "num_hidden_layers": blocks}
    if name == "llama":
        config = transformers.LlamaConfig(
            **common,
            num_attention_heads=16,
            intermediate_size=xLSTMConfig(**common, num_heads=heads).ffn_dim,
            max_position_embeddings=LENGTHS[-1],
        )
        model_class = transformers.LlamaForCausalLM
    elif name == "in_tree":
        config = transformers.xLSTMConfig(**common, num_heads=heads, mode="train", **in_tree_kernels())
        model_class = transformers.xLSTMForCausalLM
    else:
        config = xLSTMConfig(**common, num_heads=heads)
        model_class = xLSTMForCausalLM
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device("cuda"):
        return model_class(config).to(torch.bfloat16)


def check() -> float:
    """Relative error of all gradients of a small model, Triton in bf16 against PyTorch in float32."""
    gradients = []
    tokens = torch.randint(VOCAB, (2, 500), device="cuda")
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.float32)):
        torch.manual_seed(0)
        config = xLSTMConfig(
            vocab_size=VOCAB, hidden_size=512, num_hidden_layers=2, num_heads=2, backend=backend, use_cache=False
        )
        with torch.device("cuda"):
            model = xLSTMForCausalLM(config).to(torch.bfloat16).to(dtype)  # the same rounded weights
        model(tokens, labels=tokens).loss.backward()
        gradients.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    error = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    if not error < 5e-2:
        sys.exit(f"wrong result, nothing timed: gradients are off by {error:.1e}")
    return error


def training_row(model: transformers.PreTrainedModel, length: int) -> dict:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(VOCAB, (TOKENS // length, length), device="cuda")

    def step():
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # compiles, and allocates the optimizer's state
    ms = milliseconds(step)
    return {"S": length, "ms": ms, "tokens_per_s": TOKENS / ms * 1e3, "activations_gb": peak_gigabytes(step)}


def rows() -> Iterator[dict]:
    yield {"model": "hf_xlstm", "measure": "check", "error": check()}
    for size in SIZES:
        for name in MODELS:
            model = build(name, size)
            row = {"model": name, "size": size, "parameters": sum(p.numel() for p in model.parameters())}
            for length in LENGTHS:
                try:
                    yield row | training_row(model, length)
                except Exception as error:  # out of memory is a result as well
                    if name == "hf_xlstm":
                        raise
                    yield row | {"S": length, "failed": f"{type(error).__name__}: {error}"[:200]}
            del model
            gc.collect()
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    measured = []
    for row in rows():
        print_row(row)
        measured.append(row)
        write_results(args.json, measured)


if __name__ == "__main__":
    main()
