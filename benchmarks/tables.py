"""Writes the tables of the CPU results into README.md, between the two comments that mark their place."""

import argparse
import json
import re
from pathlib import Path

from common import BASELINES, DTYPES, OURS, PEERS, RESULTS, ROOT


MARKED = re.compile(r"(<!-- results\b[^>]*-->\n).*?(<!-- (?:results:end|end of results) -->)", re.DOTALL)
IMAGE = ROOT / "docs" / "images" / "context-cpu.png"
SIZES = {"768x8": "768 wide, 8 layers", "512x12": "512 wide, 12 layers", "1024x9": "1,024 wide, 9 layers"}
SPEED, MEMORY = "tokens_per_second", "peak_megabytes"
LINES = [  # what it is, the file and the row it is in, and the quantity
    ("decode, batch 1", "generation", "decode/{size}/{dtype}/batch-1", SPEED),
    ("decode, batch 8", "generation", "decode/{size}/{dtype}/batch-8", SPEED),
    ("decode, context 16,384", "generation", "context/{size}/{dtype}", SPEED),
    ("prefill 512", "generation", "prefill/{size}/{dtype}/512", SPEED),
    ("prefill 2,048", "generation", "prefill/{size}/{dtype}/2048", SPEED),
    ("prefill 8,192", "generation", "prefill/{size}/{dtype}/8192", SPEED),
    ("training 512", "training", "training/{size}/{dtype}/512", SPEED),
    ("training 2,048", "training", "training/{size}/{dtype}/2048", SPEED),
    ("peak memory, prefill 8,192, MB", "generation", "memory/{size}/{dtype}/8192", MEMORY),
    ("peak memory, training 2,048, MB", "training", "memory/{size}/{dtype}/2048", MEMORY),
]


def peers_of(row: dict | None) -> dict[str, dict]:
    """What was measured; of a row about many contexts, that at the longest."""
    if row is None:
        return {}
    return row["peers"] if "peers" in row else list(row["contexts"].values())[-1]


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.1f}"


def absolute(rows: list[dict[str, dict]], peer: str, quantity: str) -> str:
    entries = [row.get(peer, {}) for row in rows]
    values = [number(x[quantity]) if quantity in x else "fails" if "error" in x else "–" for x in entries]
    return " / ".join(values) if any(entries) else ""


def relative(rows: list[dict[str, dict]], baseline: str, quantity: str) -> str:
    """How many times as fast as the baseline hf_xlstm is, or as much memory it takes."""
    values = []
    for row in rows:
        ours, theirs = row.get(OURS, {}), row.get(baseline, {})
        if quantity not in ours or quantity not in theirs:
            values.append("–")
        elif quantity == MEMORY:
            values.append(f"{ours[quantity] / theirs[quantity]:.2f}x")
        else:
            values.append(f"{ours['ratio'][baseline]:.2f}x")
    return " / ".join(values)


def table(results: dict[str, dict], size: str) -> list[str]:
    header = ["float32 / bfloat16", *PEERS.values(), *(f"to {PEERS[x]}" for x in BASELINES)]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for label, file, name, quantity in LINES:
        rows = [peers_of(results[file].get(name.format(size=size, dtype=dtype))) for dtype in DTYPES]
        if any(rows):
            cells = [absolute(rows, peer, quantity) for peer in PEERS]
            cells += [relative(rows, baseline, quantity) for baseline in BASELINES]
            lines.append("| " + " | ".join([label, *cells]) + " |")
    return lines if len(lines) > 2 else []


def results_text(generation: dict, training: dict) -> str:
    machine, versions = generation["machine"], generation["versions"]
    results = {"generation": generation["rows"], "training": training["rows"]}
    text = [
        f"Tokens per second on a CPU: {machine['threads']} threads of {machine['cpu']} ({machine['capability']}), "
        f"torch {versions['torch']}, transformers {versions['transformers']}. "
        "The last columns are the speed, or memory, of hf_xlstm relative to another model. "
        "[How it is measured](benchmarks/README.md).",
        "",
    ]
    for size, title in SIZES.items():
        if lines := table(results, size):
            text += [f"**{title}, vocabulary 16,384**", "", *lines, ""]
    if IMAGE.exists():
        text += [f"![Time per token and cache against the context]({IMAGE.relative_to(ROOT).as_posix()})", ""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the JSON files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file to write")
    args = parser.parse_args()
    files = [json.loads((args.results / f"{name}-cpu.json").read_text()) for name in ("generation", "training")]
    readme = args.readme.read_text(encoding="utf-8")
    if not MARKED.search(readme):
        parser.error(f"{args.readme.name} has no place marked for results")
    text = MARKED.sub(lambda match: match[1] + results_text(*files) + match[2], readme)
    args.readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
