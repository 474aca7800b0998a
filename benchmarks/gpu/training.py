"""Training throughput on one GPU: models of 400M and 1.3B parameters, bf16, sequences of 2k to 32k tokens.

    python benchmarks/gpu_training.py --json results/gpu_training.json

One step is forward, loss, backward and AdamW, with 32,768 tokens. Ours runs without sLSTM blocks, and with one in
eight. The in-tree xLSTM runs with the kernels of `xlstm` and `mlstm-kernels` where they are installed, in plain
PyTorch otherwise; Llama with the FlashAttention in torch. Ours is checked first, with both cells: its gradients
against those of the torch backend in float32.
"""

import functools
import sys
from collections.abc import Iterator

import torch
import transformers
from gpu_common import (
    DEVICE,
    OURS,
    Job,
    argument_parser,
    in_tree_kernels,
    measure,
    milliseconds,
    model_jobs,
    peak_gigabytes,
)

from hf_xlstm import xLSTMConfig, xLSTMForCausalLM


TOKENS = 32_768
LENGTHS = [2048, 8192, 32_768]
VOCAB = 50_304
SIZES = {"400M": (1024, 24, 4), "1.3B": (2048, 24, 4)}  # width, blocks, heads of the xLSTM; Llama: heads of 64 and 128
CHECKED = (512, 500)  # width of the model whose gradients are checked, tokens
MIXED = f"{OURS}, one sLSTM block in eight"
MODELS = (OURS, MIXED, "in_tree", "llama")


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
        cells = ["slstm" if name == MIXED and i % 8 == 1 else "mlstm" for i in range(blocks)]
        config = xLSTMConfig(**common, num_heads=heads, layer_types=cells)
        model_class = xLSTMForCausalLM
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return model_class(config).to(torch.bfloat16)


def check() -> dict:
    """Relative error of all gradients of a small model, Triton in bf16 against PyTorch in float32."""
    gradients = []
    width, length = CHECKED
    tokens = torch.randint(VOCAB, (2, length), device=DEVICE)
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.float32)):
        torch.manual_seed(0)
        config = xLSTMConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            num_hidden_layers=2,
            num_heads=2,
            layer_types=["mlstm", "slstm"],
            backend=backend,
            use_cache=False,
        )
        with torch.device(DEVICE):
            model = xLSTMForCausalLM(config).to(torch.bfloat16).to(dtype)  # the same rounded weights
        model(tokens, labels=tokens).loss.backward()
        gradients.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    error = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    if not error < 5e-2:
        raise ValueError(f"wrong result: gradients are off by {error:.1e}")
    return {"error": error}


def train(model: transformers.PreTrainedModel, length: int) -> dict:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(VOCAB, (TOKENS // length, length), device=DEVICE)

    def step():
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # compiles, and allocates the optimizer's state
    ms = milliseconds(step)
    return {"ms": ms, "tokens_per_s": TOKENS / ms * 1e3, "activations_gb": peak_gigabytes(step)}


def jobs() -> Iterator[Job]:
    yield {"model": OURS, "measure": "check"}, check
    for name in MODELS:
        for size in SIZES:
            yield from model_jobs({"model": name, "size": size}, functools.partial(build, name, size), jobs_of)


def jobs_of(model: transformers.PreTrainedModel) -> Iterator[Job]:
    for length in LENGTHS:
        yield {"measure": "step", "S": length}, functools.partial(train, model, length)


def main() -> int:
    return measure(jobs(), argument_parser(__doc__).parse_args())


if __name__ == "__main__":
    sys.exit(main())
