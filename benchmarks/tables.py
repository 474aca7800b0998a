"""Writes the results between the two comments that mark their place: the tables into benchmarks/README.md, what they
come to into README.md.

One group of tables for each processor, from all files generation-cpu*.json and training-cpu*.json, a table of exported
and quantised models for each exported-cpu*.json, and tables for each GPU, from all gpu-*.json. Of a row that several
runs on a GPU have, the last one that passed counts.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.harness import BASELINES, COMPILED, DTYPES, LINEAR_FLOOR
from benchmarks.gpu import report
from benchmarks.peers import HF_XLSTM, PEERS
from benchmarks.provenance import RESULTS, ROOT, processor


MARKED = re.compile(r"(<!-- results\b[^>]*-->\n).*?(<!-- (?:results:end|end of results) -->)", re.DOTALL)
MARKED_GPU = re.compile(r"(<!-- GPU results\b[^>]*-->\n).*?(<!-- end of GPU results -->)", re.DOTALL)
IMAGE = ROOT / "docs" / "images" / "context-cpu.png"
SIZES = {"768x8": "768 wide, 8 layers", "512x12": "512 wide, 12 layers", "1024x9": "1,024 wide, 9 layers"}
COLUMNS = PEERS | {LINEAR_FLOOR: "floor"}
RUNTIMES = {"eager": "PyTorch, not compiled", "openvino": "OpenVINO", "onnx": "ONNX Runtime"}
SPEED, MEMORY = "tokens_per_second", "peak_megabytes"
LINES = [  # what it is, the file and the row it is in, and the quantity
    ("decode, batch 1", "generation", "decode/{size}/{dtype}/batch-1", SPEED),
    ("decode, batch 8", "generation", "decode/{size}/{dtype}/batch-8", SPEED),
    ("decode, batch 1, compiled", "generation", "compile/{size}/{dtype}", SPEED),
    ("decode, context 16,384", "generation", "context/{size}/{dtype}", SPEED),
    ("prefill 512", "generation", "prefill/{size}/{dtype}/512", SPEED),
    ("prefill 2,048", "generation", "prefill/{size}/{dtype}/2048", SPEED),
    ("prefill 8,192", "generation", "prefill/{size}/{dtype}/8192", SPEED),
    ("training 512", "training", "training/{size}/{dtype}/512", SPEED),
    ("training 2,048", "training", "training/{size}/{dtype}/2048", SPEED),
    ("peak memory, prefill 8,192, MB", "generation", "memory/{size}/{dtype}/8192", MEMORY),
    ("peak memory, training 2,048, MB", "training", "memory/{size}/{dtype}/2048", MEMORY),
]
# the lines of the front page, and how they are called there
HEADLINE = {
    "decode, batch 1": "decoding",
    "decode, batch 1, compiled": "decoding, both compiled,",
    "prefill 2,048": "reading a prompt of 2,048 tokens",
    "training 2,048": "training on sequences of 2,048 tokens",
}


def peers_of(row: dict | None) -> dict[str, dict]:
    """What was measured; of a row about many contexts, that at the longest; of one about compiled peers, these."""
    if row is None:
        return {}
    peers = row["peers"] if "peers" in row else list(row["contexts"].values())[-1]
    if not any(name.endswith(COMPILED) for name in peers):
        return peers
    return {
        name.removesuffix(COMPILED): x
        | {"ratio": {y.removesuffix(COMPILED): z for y, z in x.get("ratio", {}).items() if y.endswith(COMPILED)}}
        for name, x in peers.items()
        if name.endswith(COMPILED) or name == LINEAR_FLOOR
    }


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
        native, foreign = row.get(HF_XLSTM, {}), row.get(baseline, {})
        if quantity not in native or quantity not in foreign:
            values.append("–")
        elif quantity == MEMORY:
            values.append(f"{native[quantity] / foreign[quantity]:.2f}x")
        else:
            values.append(f"{native['ratio'][baseline]:.2f}x")
    return " / ".join(values)


def table(results: dict[str, dict], size: str) -> list[str]:
    """The lines that were measured. The floor has a column where it was, which older files do not have."""
    lines = []
    for label, file, name, quantity in LINES:
        rows = [peers_of(results[file].get(name.format(size=size, dtype=dtype))) for dtype in DTYPES]
        if any(rows):
            cells = {peer: absolute(rows, peer, quantity) for peer in COLUMNS if any(peer in row for row in rows)}
            lines.append((label, cells, [relative(rows, baseline, quantity) for baseline in BASELINES]))
    measured = {peer for _, cells, _ in lines for peer in cells}
    columns = {peer: title for peer, title in COLUMNS.items() if peer in PEERS or peer in measured}
    header = ["float32 / bfloat16", *columns.values(), *(f"to {PEERS[x]}" for x in BASELINES)]
    text = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for label, cells, ratios in lines:
        text.append("| " + " | ".join([label, *(cells.get(peer, "") for peer in columns), *ratios]) + " |")
    return text if lines else []


def measured_with(results: dict) -> tuple[str, str]:
    """The machine and the versions of a result file."""
    machine, versions = results["machine"], results["versions"]
    return (
        f"{machine['threads']} threads of {processor(machine)} ({machine['capability']})",
        f"torch {versions['torch']}, transformers {versions['transformers']}",
    )


def by_processor(folder: Path) -> dict[tuple[str, ...], dict[str, dict]]:
    """Rows of `generation` and `training` for every machine and set of versions that measured any."""
    groups: dict[tuple[str, ...], dict[str, dict]] = {}
    for file in ("generation", "training"):
        for path in sorted(folder.glob(f"{file}-cpu*.json")):
            results = json.loads(path.read_text())
            rows = groups.setdefault(measured_with(results), {"generation": {}, "training": {}})[file]
            if twice := rows.keys() & results["rows"].keys():
                raise SystemExit(f"{path.name} has rows that another file of that machine has: {min(twice)}.")
            rows |= results["rows"]
    return groups


def exported_table(rows: dict[str, dict], size: str) -> list[str]:
    """A line for each route: tokens per second of hf_xlstm and of Llama, and what a model of hf_xlstm takes."""
    speeds = {
        label: rows[name]["peers"]
        for label, name in (
            ("decode, batch 1", f"decode/{size}/batch-1"),
            ("decode, batch 8", f"decode/{size}/batch-8"),
            ("prefill 2,048", f"prefill/{size}/2048"),
        )
        if name in rows
    }
    start, loss = rows.get(f"start/{size}", {}).get("peers", {}), rows.get("loss", {}).get("routes", {})
    header = ["weights, runtime", *(f"{label}: hf_xlstm / Llama" for label in speeds)]
    header += ["MB of files", "s to start", "MB of memory", "bits per byte lost"]
    text = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for name in dict.fromkeys(name for peers in speeds.values() for name in peers):
        peer, _, route = name.partition("+")
        if peer != HF_XLSTM:
            continue
        runtime, weights = route.split("-")
        cells = [
            " / ".join(number(x[SPEED]) if (x := peers.get(f"{y}+{route}")) else "–" for y in (HF_XLSTM, "llama"))
            for peers in speeds.values()
        ]
        taken = start.get(name, {})
        cells += [number(taken["bytes"] / 1e6), f"{taken['start_up_seconds']:.2g}"] if taken else ["", ""]
        cells += [number(taken[MEMORY]) if MEMORY in taken else ""]
        cells += [f"{loss[route]['lost']:.2g}" if route in loss else ""]
        text.append("| " + " | ".join([f"{weights}, {RUNTIMES[runtime]}", *cells]) + " |")
    return text if speeds else []


def exported_text(folder: Path) -> list[str]:
    text = []
    for path in sorted(folder.glob("exported-cpu*.json")):
        results = json.loads(path.read_text())
        where = ", ".join(measured_with(results))
        text += [f"Tokens per second of models by other runtimes and with fewer bits, beside Llama: {where}."]
        if loss := results["rows"].get("loss"):
            text[-1] += f" Bits per byte are lost by a trained model, `{loss['model']}`."
        text.append("")
        for size, title in SIZES.items():
            if lines := exported_table(results["rows"], size):
                text += [f"**{title}, vocabulary 16,384**", "", *lines, ""]
    return text


def results_text(folder: Path) -> str:
    text = []
    for (machine, versions), results in by_processor(folder).items():
        text += [
            f"Tokens per second on a CPU: {machine}, {versions}. "
            "The last columns are the speed, or memory, of hf_xlstm relative to another model.",
            "",
        ]
        for size, title in SIZES.items():
            if lines := table(results, size):
                text += [f"**{title}, vocabulary 16,384**", "", *lines, ""]
    text += exported_text(folder)
    if IMAGE.exists():
        text += [f"![Time per token and cache against the context](../{IMAGE.relative_to(ROOT).as_posix()})", ""]
    return "\n".join(text)


def headline(folder: Path) -> str:
    """A sentence for each processor: the range of the ratios to Transformers' xLSTM, over sizes and dtypes."""
    text = []
    for (machine, _), results in by_processor(folder).items():
        parts = []
        for label, file, name, quantity in LINES:
            if label not in HEADLINE:
                continue
            rows = [
                peers_of(results[file].get(name.format(size=size, dtype=dtype))) for size in SIZES for dtype in DTYPES
            ]
            ratios = [row[HF_XLSTM]["ratio"]["in_tree"] for row in rows if quantity in row.get("in_tree", {})]
            if ratios:
                fails = (
                    " (in bfloat16 the other fails)" if any("error" in row.get("in_tree", {}) for row in rows) else ""
                )
                parts.append(f"{HEADLINE[label]} {span(ratios)} times{fails}")
        if parts:
            text.append(f"On {machine}, relative to the xLSTM of Transformers: {', '.join(parts)} as fast.\n")
    return "".join(text + exported_headline(folder))


def exported_headline(folder: Path) -> list[str]:
    """A sentence for each processor: one sequence by OpenVINO, relative to PyTorch in float32 and to Llama."""
    text = []
    for path in sorted(folder.glob("exported-cpu*.json")):
        results = json.loads(path.read_text())
        decode = [row["peers"] for name, row in results["rows"].items() if re.fullmatch("decode/.*/batch-1", name)]
        if not decode:
            continue
        parts = []
        for weights in ("float32", "int8", "int4"):
            ours = [peers[f"{HF_XLSTM}+openvino-{weights}"]["ratio"] for peers in decode]
            to_eager, to_llama = (
                span([ratio[baseline] for ratio in ours])
                for baseline in (f"{HF_XLSTM}+eager-float32", f"llama+openvino-{weights}")
            )
            parts.append(f"{weights} {to_eager} and {to_llama}")
        text.append(
            f"On {measured_with(results)[0]}, decoding one sequence by OpenVINO, relative to PyTorch in float32, not "
            f"compiled, and to Llama by OpenVINO: {', '.join(parts)} times as fast.\n"
        )
    return text


def span(ratios: list[float]) -> str:
    return " to ".join(sorted({f"{min(ratios):.1f}", f"{max(ratios):.1f}"}, key=float))


def by_gpu(folder: Path) -> dict[str, dict[str, dict]]:
    """The rows that passed, for every GPU and set of versions."""
    groups: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.glob("gpu-*.json")):
        results = json.loads(path.read_text())
        names = ("driver", "torch", "triton", "transformers")
        versions = ", ".join(f"{name} {results['environment'][name]}" for name in names)
        rows = groups.setdefault(f"{results['environment']['device']}, {versions}", {})
        rows |= {row["id"]: row for row in results["rows"] if "result" in row}
    return groups


def gpu_text(folder: Path, lines: Callable[[dict[str, dict]], list[str]], last: int = 0) -> str:
    """Of all GPUs, or of the last ones."""
    text = []
    for gpu, rows in [*by_gpu(folder).items()][-last:]:
        text += [f"On one {gpu}, in bfloat16:", "", *lines(rows)]
    return "\n".join(text)


def write(path: Path, marked: re.Pattern, text: str) -> None:
    """Puts `text` into the marked place of a page."""
    page = path.read_text(encoding="utf-8")
    if not marked.search(page):
        raise SystemExit(f"{path} has no place marked for results")
    path.write_text(marked.sub(lambda match: match[1] + text + match[2], page), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the JSON files")
    parser.add_argument(
        "--readme", type=Path, default=ROOT / "benchmarks" / "README.md", help="the page of the tables"
    )
    parser.add_argument("--front", type=Path, default=ROOT / "README.md", help="the page of what they come to")
    args = parser.parse_args()
    write(args.readme, MARKED, results_text(args.results))
    write(args.front, MARKED, headline(args.results))
    write(args.readme, MARKED_GPU, gpu_text(args.results, report.tables))
    write(args.front, MARKED_GPU, gpu_text(args.results, report.targets, last=1))


if __name__ == "__main__":
    main()
