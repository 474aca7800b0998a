"""Tables, and the written report of a training run."""

from collections.abc import Sequence
from pathlib import Path

from hf_xlstm.files import write_text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results_table(results: Sequence[dict]) -> str:
    """What `evaluate` measured."""
    rows = []
    for result in results:
        conditions = [f"{result[name]} {name}" for name in ("bytes", "shots") if name in result]
        conditions += [f"the first {result['limit']}"] if "limit" in result else []
        conditions += [result["filter"]] if "filter" in result else []
        error = f" ± {result['stderr']:.4f}" if "stderr" in result else ""
        rows.append([result["task"], result["metric"], f"{result['value']:.4f}{error}", ", ".join(conditions)])
    return markdown_table(["text or task", "metric", "value", ""], rows)


def write_report(path: Path, metrics: dict) -> None:
    bits = {"xLSTM": metrics["bits_per_byte"], **metrics["yardsticks"]}
    facts = {
        "parameters": f"{metrics['parameters']:,}",
        "layers": ", ".join(metrics["layer_types"]),
        "training text": f"{metrics['train_bytes']:,} bytes, {metrics['train_tokens']:,} tokens",
        "held-out text": f"{metrics['heldout_bytes']:,} bytes",
        "tokens seen": f"{metrics['tokens_seen']:,} in {metrics['steps']:,} steps",
        "training time": f"{metrics['training_seconds']:.0f} s, evaluation included",
        "device": metrics["device"],
    }
    text = f"""# Training report

Text: {metrics["corpus"]}.

{markdown_table(["held-out text", "bits per byte"], [[name, f"{value:.3f}"] for name, value in bits.items()])}

Lower is better. xLSTM pays for every token of every held-out document, the end included, with the whole document up to
there as context. The 5-gram model (interpolated Kneser-Ney) is estimated on the same training text; lzma sees only the
held-out text, or has compressed the training text before.

![loss curve](loss_curve.png)

{markdown_table(["run", ""], list(facts.items()))}
"""
    write_text(path, text)
