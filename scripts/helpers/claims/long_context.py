"""Long context on CPU: chunkwise mLSTM against causal scaled-dot-product attention."""

from pathlib import Path

import torch
from torch.nn import functional as F

from hf_xlstm.ops import mlstm

from .measuring import cell_inputs, median_seconds, plot, row


TITLE = "Long context on CPU: chunkwise mLSTM against causal scaled-dot-product attention"


@torch.no_grad()
def measure(seeds: int, output: Path) -> list[dict]:
    seconds = {"mLSTM": {}, "attention": {}}
    for length in (512, 1024, 2048, 4096, 8192, 16384):
        inputs = cell_inputs(length, K=64, V=128)
        q, k, v = (torch.randn(1, 4, length, 128) for _ in range(3))
        seconds["mLSTM"][length] = median_seconds(lambda inputs=inputs: mlstm(*inputs), 3)
        attend = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
        seconds["attention"][length] = median_seconds(attend, 3)
    plot(output / "long_context.png", seconds, "length, tokens", "seconds", "4 heads of width 128, one sequence")
    ratio = {length: seconds["attention"][length] / s for length, s in seconds["mLSTM"].items()}
    crossover = next((length for length, r in ratio.items() if r > 1), 2 * 16384)
    return [
        row("first length at which mLSTM is faster", [crossover], at_most=8192),
        row("times faster at 16,384", [ratio[16384]], at_least=2),
    ]
