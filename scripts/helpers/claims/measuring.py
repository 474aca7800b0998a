"""Rows of the report, seconds and plots, as all claims need them."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_xlstm.commands.helpers.plots import plt
from hf_xlstm.files import replacing_file


def row(name: str, values: list[float], at_least: float | None = None, at_most: float | None = None) -> dict:
    """One line of a table: the median of `values` must not be below `at_least` nor above `at_most`."""
    median = statistics.median(values)
    holds = (at_least is None or median >= at_least) and (at_most is None or median <= at_most)
    return {"name": name, "values": values, "median": median, "at_least": at_least, "at_most": at_most, "holds": holds}


def median_seconds(function: Callable, repetitions: int = 5) -> float:
    function()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_turns(functions: dict, rounds: int) -> dict:
    """Median seconds of each, taken in turns so that all meet the same machine."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(x[rounds // 3 :]) for name, x in times.items()}


def plot(path: Path, curves: dict[str, dict[int, float]], x: str, y: str, title: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150, layout="constrained")
    for name, points in curves.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing_file(path) as partial:
        figure.savefig(partial)
    plt.close(figure)


def cell_inputs(length: int, heads: int = 4, K: int = 64, V: int = 128) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, length, heads, K)
    igate, fgate = torch.randn(2, 1, length, heads)
    return q, k, torch.randn(1, length, heads, V), igate, fgate + 4
