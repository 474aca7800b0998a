"""What the xLSTM architecture promises, shown with small models in minutes on two CPU cores.

    python scripts/claims.py [--only NAME ...] [--output runs/claims] [--seeds 3]

Every claim (`helpers/claims/`) is measured through the package's public functions, judged against a threshold that
stands beside it, and written to the output directory: results.json, a table in README.md, and plots. The committed
results are in docs/claims; `--output docs/claims` replaces them. The exit status is 1 if a claim fails.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from helpers.claims import CLAIMS
from hf_xlstm.commands.helpers.report import markdown_table
from hf_xlstm.files import write_text
from hf_xlstm_cli.errors import command


def write_report(results: dict, output: Path) -> None:
    def number(x: float | None) -> str:
        return "" if x is None else f"{x:.3g}"

    sections = []
    for name in (name for name in CLAIMS if name in results):
        result = results[name]
        rows = []
        for line in result["rows"]:
            spread = f"{number(min(line['values']))} … {number(max(line['values']))}"
            limit = [f"{sign} {number(line[key])}" for key, sign in (("at_least", "≥"), ("at_most", "≤")) if line[key]]
            verdict = "" if not limit else "holds" if line["holds"] else "**fails**"
            rows.append([line["name"], number(line["median"]), spread, " ".join(limit), verdict])
        table = markdown_table(["", "median", "spread", "threshold", ""], rows)
        plots = "".join(f"\n![{path.stem}]({path.name})" for path in sorted(output.glob(f"{name}*.png")))
        sections.append(
            f"## {result['title']}\n\n{table}\n{plots}\n\n{result['seconds']:.0f} s, {result['machine']}\n"
        )
    text = "# Claims\n\nWritten by `python scripts/claims.py`.\n\n" + "\n".join(sections)
    write_text(output / "README.md", text)


def run(names: list[str], seeds: int, output: Path) -> bool:
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    machine = f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    for name in names:
        start = time.perf_counter()
        rows = CLAIMS[name].measure(seeds, output)
        seconds = round(time.perf_counter() - start, 1)
        results[name] = {"title": CLAIMS[name].TITLE, "rows": rows, "seconds": seconds, "machine": machine}
        for line in rows:
            print(f"{name}: {line['name']}: {line['median']:.4g} {'holds' if line['holds'] else 'FAILS'}", flush=True)
        write_text(path, json.dumps(results, indent=1))
        write_report(results, output)
    return all(line["holds"] for name in names for line in results[name]["rows"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CLAIMS, default=[*CLAIMS], help="these claims; all by default")
    parser.add_argument("--output", type=Path, metavar="DIR", default=Path("runs/claims"), help="%(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="models per claim (%(default)s); their median counts")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    return not run(arguments.only, arguments.seeds, arguments.output)


if __name__ == "__main__":
    command(main)
