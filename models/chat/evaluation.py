"""Measures the packed chat model on the held-out conversations, and draws its curve and that of the Llama beside it.

    python models/chat/evaluation.py --run runs/chat --peer runs/chat-llama --text runs/chat-text --seconds 5279

It writes results.json and curve.png beside itself.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_xlstm.commands.helpers.bits_per_byte import bits_per_byte
from hf_xlstm.commands.helpers.corpus import Records
from hf_xlstm_chat import path


HERE = Path(__file__).parent
LENGTH = 512  # tokens of a window, in training and for a model whose context is that
SMOOTH = 10  # points of a training curve that one point of the picture is the mean of


@torch.inference_mode()
def windowed_bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int = LENGTH
) -> float:
    """Cost of all tokens from BOS to EOS per UTF-8 byte, each given at least `length / 2` and fewer than `length`
    tokens before it, or all there are. A window begins every `length / 2` tokens, without a state."""
    was_training = model.training
    model.eval()
    nats = nbytes = 0.0
    for text in documents:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        known = 1  # tokens whose cost is counted, or that have none
        for start in range(0, len(ids), length // 2):
            if known == len(ids):
                break
            window = torch.tensor([ids[start : start + length + 1]])
            logits = model(window[:, :-1], use_cache=False).logits[0, known - start - 1 :].float()
            nats += torch.nn.functional.cross_entropy(logits, window[0, known - start :], reduction="sum").item()
            known = start + window.shape[1]
        nbytes += len(text.encode())
    model.train(was_training)
    return nats / math.log(2) / nbytes


def plot(file: Path, curves: dict[str, tuple[list[float], float, float]], yardstick: tuple[str, float]) -> None:
    """Bits per byte against processor minutes.

    Args:
        curves: for each model those of the training text, the minutes in all, and the bits per held-out byte.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    for (name, (curve, minutes, heldout)), color in zip(curves.items(), ("#08519c", "#e6550d"), strict=True):
        means = [sum(curve[i : i + SMOOTH]) / SMOOTH for i in range(0, len(curve) - SMOOTH + 1, SMOOTH)]
        times = [minutes * (i + 0.5) * SMOOTH / len(curve) for i in range(len(means))]
        axes.plot(times, means, color=color, linewidth=1.8, label=f"{name}, training text")
        axes.plot(
            minutes, heldout, color=color, marker="o", linestyle="", label=f"{name}, held-out text: {heldout:.3f}"
        )
    axes.axhline(yardstick[1], color="#737373", linewidth=1, linestyle="--")
    end = max(minutes for _, minutes, _ in curves.values())
    text = "{}: {:.2f}".format(*yardstick)
    axes.annotate(text, (end, yardstick[1]), (0, 3), textcoords="offset points", ha="right", color="#525252")
    axes.set(xlabel="processor minutes of training", ylabel="bits per byte", ylim=(None, 2.5))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="directory that `hf-xlstm train` wrote")
    parser.add_argument("--peer", type=Path, required=True, help="directory that peer.py wrote")
    parser.add_argument("--text", type=Path, required=True, help="directory that corpus.py wrote")
    parser.add_argument(
        "--seconds", type=float, required=True, help="processor time of the training of the chat model"
    )
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(path)
    heldout = list(Records(args.text / "heldout.jsonl", "text"))
    excerpt = list(Records(HERE / "excerpt.jsonl", "text"))
    chat = AutoModelForCausalLM.from_pretrained(path)
    run, peer = (json.loads((folder / "metrics.json").read_text("utf-8")) for folder in (args.run, args.peer))
    results = {
        "text": {name: run[name] for name in ("train_bytes", "train_tokens", "heldout_bytes")},
        "xLSTM": {
            "parameters": run["parameters"],
            "steps": run["steps"],
            "tokens_seen": run["tokens_seen"],
            "processor_seconds": args.seconds,
            "bits_per_byte": bits_per_byte(chat, tokenizer, heldout),
            "bits_per_byte_windowed": windowed_bits_per_byte(chat, tokenizer, heldout),
            "bits_per_byte_excerpt": bits_per_byte(chat, tokenizer, excerpt),
        },
        "Llama": {
            "parameters": peer["parameters"],
            "steps": peer["steps"],
            "tokens_seen": peer["steps"] * run["tokens_seen"] // run["steps"],
            "processor_seconds": peer["processor_seconds"],
            "bits_per_byte_windowed": peer["bits_per_byte"],
        },
        "yardsticks": run["yardsticks"],
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))
    curves = {
        "xLSTM": ([bits for _, bits in run["train_curve"]], args.seconds / 60, results["xLSTM"]["bits_per_byte"]),
        "Llama": (peer["train_curve"], peer["processor_seconds"] / 60, results["Llama"]["bits_per_byte_windowed"]),
    }
    plot(HERE / "curve.png", curves, ("5-gram of bytes", run["yardsticks"]["5-gram of bytes"]))


if __name__ == "__main__":
    main()
