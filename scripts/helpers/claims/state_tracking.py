"""State tracking: parity of a bit string, trained up to length 40, asked at length 256."""

from pathlib import Path

import torch
from torch import nn

from .learning import Batch, Learner, cross_entropy, freeze_recurrence, learn, xlstm
from .measuring import row


TITLE = "State tracking: parity of a bit string, trained up to length 40, asked at length 256"


def measure(seeds: int, output: Path) -> list[dict]:
    def draw(batch: int = 64, length: int | None = None) -> Batch:
        length = length or int(torch.randint(3, 41, ()))
        bits = torch.randint(0, 2, (batch, length))
        return bits, bits.cumsum(1) % 2

    def accuracy(layer_types: list[str], frozen: bool, seed: int) -> float:
        torch.manual_seed(seed)
        model = Learner(nn.Embedding(2, 32), xlstm(layer_types, width=32, heads=2), width=32, outputs=2)
        if frozen:
            freeze_recurrence(model.body)
        learn(model, draw, cross_entropy, steps=300, lr=1e-2)
        bits, parity = draw(1000, 256)
        with torch.no_grad():
            return (model(bits)[:, -1].argmax(-1) == parity[:, -1]).float().mean().item()

    models = {
        "sLSTM": (["slstm"], False, {"at_least": 0.99}),
        "mLSTM and sLSTM": (["mlstm", "slstm"], False, {"at_least": 0.99}),
        "mLSTM": (["mlstm", "mlstm"], False, {"at_most": 0.60}),
        "sLSTM, recurrent weights frozen at zero": (["slstm"], True, {"at_most": 0.60}),
    }
    return [
        row(name, [accuracy(layers, frozen, seed) for seed in range(seeds)], **threshold)
        for name, (layers, frozen, threshold) in models.items()
    ]
