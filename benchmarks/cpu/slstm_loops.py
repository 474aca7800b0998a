"""Other ways to run the sLSTM's loop over time on a CPU, forward: hf_xlstm's, TorchScript, a compiled tile of steps.

Microseconds per step, medians in turns; every loop must agree with that of hf_xlstm first.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from hf_xlstm.ops import slstm


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.harness import Measure, main, take_turns
from benchmarks.peers import HF_XLSTM
from benchmarks.provenance import relative_error, seconds, significant


HEADS, HEAD_DIM, TILE = 4, 192, 16


def steps(x: torch.Tensor, weight: torch.Tensor, h: torch.Tensor, c: torch.Tensor, m: torch.Tensor):
    """x (T, B, 4, H, D) with bias, weight (H, D, 4 D); the equations of cells/slstm/eager.py."""
    outputs = []
    for t in range(x.shape[0]):
        recurrent = torch.bmm(h.transpose(0, 1), weight).unflatten(-1, (4, -1)).permute(1, 2, 0, 3)
        i, f, z, o = (x[t] + recurrent).unbind(1)
        kept = F.logsigmoid(f) + m
        m = torch.logaddexp(kept, i)
        c = torch.lerp(c, torch.tanh(z), torch.sigmoid(i - kept))
        h = torch.sigmoid(o) * c
        outputs.append(h)
    return torch.stack(outputs), h, c, m


@torch.no_grad()
def measure(batch_size: int, length: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    gates = torch.randn(batch_size, length, 4, HEADS, HEAD_DIM)
    recurrent_weight = torch.randn(4, HEADS, HEAD_DIM, HEAD_DIM) * HEAD_DIM**-0.5
    bias = torch.randn(4, HEADS, HEAD_DIM)
    weight = recurrent_weight.transpose(0, 1).flatten(1, 2).mT.contiguous()
    zeros = torch.zeros(batch_size, HEADS, HEAD_DIM)
    scripted, tile = torch.jit.script(steps), torch.compile(steps, fullgraph=True)

    def run_tiles() -> torch.Tensor:
        state, outputs = (zeros, zeros, zeros - 1e30), []
        for x in (gates + bias).transpose(0, 1).contiguous().split(TILE):
            h, *state = tile(x, weight, *state)
            outputs.append(h)
        return torch.cat(outputs)

    loops = {
        HF_XLSTM: lambda: slstm(gates, recurrent_weight, bias)[0].transpose(0, 1),
        "torchscript": lambda: scripted(
            (gates + bias).transpose(0, 1).contiguous(), weight, zeros, zeros, zeros - 1e30
        )[0],
        "compiled_tile": run_tiles,
    }
    expected = loops[HF_XLSTM]()
    for name, loop in loops.items():
        for _ in range(3):  # TorchScript optimises in its second call
            if not relative_error(loop(), expected) < 1e-5:
                raise AssertionError(f"{name} differs.")
    times = take_turns({name: partial(seconds, loop) for name, loop in loops.items()}, args.rounds, args.seconds)
    microseconds = {name: significant(1e6 * statistics.median(x) / length, 3) for name, x in times.items()}
    return {"microseconds_per_step": microseconds}


def rows(quick: bool) -> dict[str, Measure]:
    batch_sizes, length = ([2], 2 * TILE) if quick else ([1, 8], 1024)
    return {f"batch-{batch_size}": partial(measure, batch_size, length) for batch_size in batch_sizes}


if __name__ == "__main__":
    main("slstm-loops", __doc__, rows)
