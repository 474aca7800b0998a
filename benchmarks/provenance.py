"""What every number needs to be believed: machine, versions, code, a clock, and the distance from the right result."""

import datetime
import importlib.metadata
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import hf_xlstm


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, str | int]:
    """Processor, with the family and model that tell generations of one name apart; instruction set; threads."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {
        "cpu": facts.get("model name", platform.processor()),
        "family": facts.get("cpu family", "unknown"),
        "model": facts.get("model", "unknown"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def processor(machine: dict[str, str | int]) -> str:
    """One line that names a processor. Results from before family and model were recorded have its name alone."""
    if "family" not in machine:
        return str(machine["cpu"])
    return f"{machine['cpu']}, family {machine['family']} model {machine['model']}"


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, hf_xlstm and installed packages; "not installed" is one, too."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    fixed = {"python": platform.python_version(), "hf_xlstm": hf_xlstm.__version__}
    return fixed | {package: version(package) for package in packages}


def commit() -> str:
    """The commit, "+changes" where src or the benchmarks differ from it. COMMIT says it where the sources have come
    without their history, or with that of another commit."""

    def git(*arguments: str) -> str:
        try:
            command = ["git", "-C", ROOT, *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            return ""

    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    if not (name := git("rev-parse", "--short=12", "HEAD")):
        return "unknown"
    return name + ("+changes" if git("status", "--porcelain", "--", "src", ":(glob)benchmarks/**/*.py") else "")


def origin() -> dict[str, str]:
    """Code, command and day of a row."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return {
        "commit": commit(),
        "command": shlex.join(["python", str(name), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm, computed in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm()).item()


def significant(x: float, digits: int = 4) -> float:
    return float(f"{x:.{digits}g}")


def seconds(function: Callable[[], object], calls: int = 1) -> float:
    """Wall clock time of one call, the mean of `calls` in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def timed(function: Callable[[], object], least_seconds: float = 0.02) -> Callable[[], float]:
    """A function warmed up and made ready to be timed again and again: each call of what is returned runs it so often
    that the clock's resolution does not count, and returns the seconds per run."""
    if seconds(function) > 1:
        return partial(seconds, function)
    return partial(seconds, function, math.ceil(least_seconds / seconds(function)))
