"""Memory capacity: recalling the values of 8 and of 16 keys."""

from pathlib import Path

import torch
from torch import nn

from .learning import Batch, Learner, cross_entropy, learn, xlstm
from .measuring import row


TITLE = "Memory capacity: recalling the values of 8 and of 16 keys"


def measure(seeds: int, output: Path) -> list[dict]:
    """Pairs come one per step, then all keys again in another order, each asking for its value."""
    symbols, width = 64, 64

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.value = nn.Embedding(symbols, width), nn.Embedding(symbols + 1, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.key(x[..., 0]) + self.value(x[..., 1])

    def draw(pairs: int, batch: int = 64) -> Batch:
        keys, order = torch.rand(batch, symbols).argsort(1)[:, :pairs], torch.rand(batch, pairs).argsort(1)
        values, unknown = torch.randint(0, symbols, (batch, pairs)), torch.full((batch, pairs), symbols)
        stored, asked = torch.stack([keys, values], dim=-1), torch.stack([keys.gather(1, order), unknown], dim=-1)
        nothing = torch.full_like(values, -100)
        return torch.cat([stored, asked], dim=1), torch.cat([nothing, values.gather(1, order)], dim=1)

    bodies = {
        "mLSTM": lambda: xlstm(["mlstm"] * 2, width, heads=1, qk_dim_factor=1.0),
        "sLSTM": lambda: xlstm(["slstm"] * 2, width, heads=4),
        "LSTM": lambda: nn.LSTM(width, width, num_layers=2, batch_first=True),
    }

    def accuracy(kind: str, pairs: int, seed: int) -> float:
        torch.manual_seed(seed)
        model = Learner(Pair(), bodies[kind](), width, outputs=symbols)
        learn(model, lambda: draw(pairs), cross_entropy, steps=600, lr=3e-3)
        inputs, targets = draw(pairs, 500)
        with torch.no_grad():
            right = model(inputs).argmax(-1) == targets
        return right[targets >= 0].float().mean().item()

    return [
        row(f"{kind}, {pairs} pairs", [accuracy(kind, pairs, seed) for seed in range(seeds)], **threshold)
        for pairs in (8, 16)
        for kind, threshold in {
            "mLSTM": {"at_least": 0.99},
            "sLSTM": {"at_most": 0.9},
            "LSTM": {"at_most": 0.9},
        }.items()
    ]
