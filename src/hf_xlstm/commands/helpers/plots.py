"""The loss curve of a training run."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # files only, no display needed
import matplotlib.pyplot as plt


Curve = Sequence[tuple[float, float]]  # (minutes, bits per byte)


def plot_loss_curve(path: Path, train: Curve, heldout: Curve, yardsticks: dict[str, float], title: str) -> None:
    """Training and held-out bits per byte against time; every yardstick is a horizontal line."""
    figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    axes.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1.2, label="training text")
    axes.plot(
        *zip(*heldout, strict=True), color="#08519c", linewidth=2, marker="o", markersize=4, label="held-out text"
    )
    end = train[-1][0]
    for name, value in yardsticks.items():
        above = value > min(yardsticks.values())  # the lowest line has its label below, clear of its neighbour's
        axes.axhline(value, color="#737373", linewidth=1, linestyle="--")
        axes.annotate(
            f"{name}: {value:.2f}",
            (end, value),
            xytext=(0, 3 if above else -3),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
            color="#525252",
        )
    axes.set(xlim=(0, end), xlabel="minutes of training", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)
