"""Draws time per token and size of the cache against the context, from the results of cpu/generation.py."""

import argparse
import json
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # files only, no display needed
import matplotlib.pyplot as plt


sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.harness import DTYPES
from benchmarks.peers import IN_TREE, PEERS
from benchmarks.provenance import RESULTS, ROOT, processor


COLORS = {"hf_xlstm": "#08519c", "in_tree": "#6baed6", "llama": "#d94801"}


def plot(contexts: dict[str, dict[str, dict]], title: str, path: Path) -> None:
    lengths = [int(length) for length in contexts]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.8), dpi=150, layout="constrained")
    for peer, color in COLORS.items():
        entries = [row[peer] for row in contexts.values()]
        style = {"color": color, "marker": "o", "markersize": 4, "label": PEERS[peer]}
        style["linestyle"] = "--" if peer == IN_TREE else "-"  # its cache is as large as hf_xlstm's
        time.plot(lengths, [1000 / x["tokens_per_second"] for x in entries], **style)
        memory.plot(lengths, [x["cache_bytes"] / 2**20 for x in entries], **style)
    time.set(ylabel="milliseconds per token", ylim=(0, None))
    memory.set(ylabel="cache, MB", yscale="log")
    memory.yaxis.set_major_formatter("{x:g}")
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
        axes.set_xlabel("context, tokens")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    time.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "generation-cpu.json")
    parser.add_argument("--size", default="512x12")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "context-cpu.png")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    contexts = results["rows"][f"context/{args.size}/{args.dtype}"]["contexts"]
    machine = f"{results['machine']['threads']} threads of {processor(results['machine'])}"
    plot(contexts, f"Decoding one token, {args.size}, {args.dtype}, {machine}", args.output)


if __name__ == "__main__":
    main()
