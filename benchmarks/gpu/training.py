"""Training throughput on one GPU: models of 400M and 1.3B parameters, bf16, sequences of 2k to 32k tokens.

One step is forward, loss, backward and AdamW, with 32,768 tokens. hf_xlstm runs without sLSTM blocks, and with one in
eight. The in-tree xLSTM runs with the kernels of `xlstm` and `mlstm-kernels` where they are installed, in plain
PyTorch otherwise; Llama with the FlashAttention in torch. hf_xlstm is checked first, with both cells: its gradients
against those of the torch backend in float32.
"""

import functools

import torch
from transformers import PreTrainedModel

from benchmarks import peers
from benchmarks.gpu import harness
from benchmarks.gpu.harness import Job, Jobs, Model, milliseconds, peak_gigabytes
from benchmarks.peers import HF_XLSTM, IN_TREE
from benchmarks.provenance import relative_error
from hf_xlstm import xLSTMConfig, xLSTMForCausalLM


TOKENS = 32_768
LENGTHS = [2048, 8192, 32_768]
VOCAB = 50_304
SIZES = {"400M": (1024, 24, 4), "1.3B": (2048, 24, 4)}  # width, blocks, heads of the xLSTM
CHECKED = (512, 500)  # width of the model whose gradients are checked, tokens
MIXED = f"{HF_XLSTM}, one sLSTM block in eight"
MODELS = (HF_XLSTM, MIXED, IN_TREE, "llama")


def build(name: str, size: str) -> PreTrainedModel:
    width, blocks, heads = SIZES[size]
    sizes = {"vocab_size": VOCAB, "hidden_size": width, "num_hidden_layers": blocks, "num_heads": heads}
    fields = {"use_cache": False}
    if name == IN_TREE:
        fields["mode"] = "train"
    if name == MIXED:
        name, fields["layer_types"] = HF_XLSTM, ["slstm" if i % 8 == 1 else "mlstm" for i in range(blocks)]
    return peers.build(name, **sizes, dtype=torch.bfloat16, device=harness.DEVICE, **fields).train()


def check() -> dict:
    """Relative error of all gradients of a small model, Triton in bf16 against PyTorch in float32."""
    gradients = []
    width, length = CHECKED
    tokens = torch.randint(VOCAB, (2, length), device=harness.DEVICE)
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
        with torch.device(harness.DEVICE):
            model = xLSTMForCausalLM(config).to(torch.bfloat16).to(dtype)  # the same rounded weights
        model(tokens, labels=tokens).loss.backward()
        gradients.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    error = relative_error(*gradients)
    if not error < 5e-2:
        raise ValueError(f"wrong result: gradients are off by {error:.1e}")
    return {"error": error}


def train(model: PreTrainedModel, length: int) -> dict:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(VOCAB, (TOKENS // length, length), device=harness.DEVICE)

    def step():
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # compiles, and allocates the optimizer's state
    ms = milliseconds(step)
    return {"ms": ms, "tokens_per_s": TOKENS / ms * 1e3, "activations_gb": peak_gigabytes(step)}


def jobs() -> Jobs:
    """Rows of all models of one size, then of the next, so that the smaller one has its peers when time ends."""
    needs = ("smoke/mlstm/*ward/bfloat16/*", "smoke/model/*", "training/hf_xlstm/check")
    yield Job({"model": HF_XLSTM, "measure": "check"}, check, (*needs[:2], "smoke/slstm/*ward/bfloat16/*"))
    for size in SIZES:
        for name in MODELS:
            native = needs if name in (HF_XLSTM, MIXED) else ()
            if name == MIXED:
                native += ("smoke/slstm/*ward/bfloat16/*",)
            model = Model(functools.partial(build, name, size))
            for length in LENGTHS:
                row = {"model": name, "measure": "step", "size": size, "S": length}
                yield Job(row, functools.partial(train_on, model, length), native)


def train_on(model: Model, length: int) -> dict:
    return train(model(), length)
