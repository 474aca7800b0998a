"""Parallel training: the chunkwise form computes what the recurrence computes, in a fraction of the time."""

from pathlib import Path

import torch

from hf_xlstm.ops import mlstm, mlstm_step

from .measuring import cell_inputs, median_seconds, row


TITLE = "Parallel training: the chunkwise form computes what the recurrence computes, in a fraction of the time"


@torch.no_grad()
def measure(seeds: int, output: Path) -> list[dict]:
    inputs = cell_inputs(2048)
    state = tuple(torch.zeros(shape) for shape in ((1, 4, 64, 128), (1, 4, 64), (1, 4)))
    outputs = []

    def stepwise():
        outputs.clear()
        for s in state:
            s.zero_()
        for step in zip(*(x.unbind(1) for x in inputs), strict=True):
            outputs.append(mlstm_step(*step, state, inplace=True)[0])

    times = median_seconds(stepwise, 3), median_seconds(lambda: mlstm(*inputs), 3)
    h, stepped = mlstm(*inputs)[0], torch.stack(outputs, dim=1)
    return [
        row("2,048 steps one by one, seconds", [times[0]]),
        row("2,048 steps chunkwise, seconds", [times[1]]),
        row("times faster", [times[0] / times[1]], at_least=3),
        row("relative difference", [((h - stepped).norm() / stepped.norm()).item()], at_most=1e-5),
    ]
