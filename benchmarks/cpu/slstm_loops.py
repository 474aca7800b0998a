"""Other ways to run the sLSTM's loop over time on a CPU, forward only: ours, TorchScript, a compiled tile of steps.

Microseconds per step, medians in turns; every loop must agree with ours first. Writes results/slstm-loops-cpu.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, machine, provenance, relative_error, significant, versions

from hf_xlstm.ops import slstm


HEADS, HEAD_DIM, LENGTH, TILE, ROUNDS = 4, 192, 1024, 16, 9


def steps(x: torch.Tensor, weight: torch.Tensor, h: torch.Tensor, c: torch.Tensor, m: torch.Tensor):
    """x (T, B, 4, H, D) with bias, weight (H, D, 4 D); the equations of ops/slstm_torch.py."""
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
def measure(batch_size: int) -> dict[str, float]:
    torch.manual_seed(0)
    gates = torch.randn(batch_size, LENGTH, 4, HEADS, HEAD_DIM)
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
        "ours": lambda: slstm(gates, recurrent_weight, bias)[0].transpose(0, 1),
        "torchscript": lambda: scripted(
            (gates + bias).transpose(0, 1).contiguous(), weight, zeros, zeros, zeros - 1e30
        )[0],
        "compiled_tile": run_tiles,
    }
    expected, times = loops["ours"](), {name: [] for name in loops}
    for name, loop in loops.items():
        for _ in range(3):  # TorchScript optimises in its second call
            if not relative_error(loop(), expected) < 1e-5:
                raise AssertionError(f"{name} differs.")
    for _ in range(ROUNDS):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            times[name].append(time.perf_counter() - start)
    return {name: significant(1e6 * statistics.median(x) / LENGTH, 3) for name, x in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "slstm-loops-cpu.json")
    args = parser.parse_args()
    rows = {f"batch-{batch_size}": measure(batch_size) for batch_size in (1, 8)}
    result = {"machine": machine(), "versions": versions(), "microseconds_per_step": rows} | provenance()
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
