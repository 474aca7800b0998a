"""What training for days comes to, by the command `hf-xlstm train` on the text of the quickstart.

stateful/SEED    held-out bits per byte after equal steps: windows from zero, and the state carried on (--stateful)
tokenise         megabytes of text per second on one core, from the text to the tokens on disk
checkpoint/SIZE  seconds that a checkpoint takes, and the part of the time that is one every ten minutes
resume/SIZE      seconds from the command to the first new step, when it goes on and when it begins

The first row is the same on an idle and on a busy machine; it takes some 15 minutes a seed.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.harness import Measure, main, significant
from benchmarks.provenance import ROOT, seconds
from hf_xlstm.commands.helpers.corpus import state_of_the_union
from hf_xlstm.commands.helpers.tokens import tokenise, train_tokenizer


STEPS = 500
EVERY = 600  # seconds between two checkpoints, as `train` has them by default
WAYS = {"windows": [], "stateful": ["--stateful"]}
COMMAND = [sys.executable, "-m", "hf_xlstm_cli", "train"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}


def train(folder: Path, *options: str) -> dict:
    """The metrics of a whole run."""
    command = [*COMMAND, "--output", str(folder), "--no-bf16", *options]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads((folder / "metrics.json").read_text())


def stateful(seed: int, steps: int, options: list[str], args: argparse.Namespace) -> dict:
    row = {}
    for way, flags in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            budget = ["--steps", str(steps), "--seed", str(seed), "--evaluations", "4"]
            metrics = train(Path(folder) / "run", *budget, *flags, *options)
        row[way] = {
            "bits_per_byte": round(metrics["bits_per_byte"], 4),
            "heldout_curve": [round(bits, 4) for _, bits in metrics["heldout_curve"]],
            "tokens_seen": metrics["tokens_seen"],
        }
    return row


def tokenising(args: argparse.Namespace) -> dict:
    corpus = state_of_the_union()
    tokenizer = train_tokenizer(corpus.train[:50], vocab_size=2048)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
    times = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            times.append(seconds(lambda: tokenise(corpus.train, tokenizer, Path(folder) / "tokens")))
    del os.environ["TOKENIZERS_PARALLELISM"]
    assert corpus.nbytes is not None
    return {"megabytes": corpus.nbytes / 1e6, "megabytes_per_second": corpus.nbytes / 1e6 / statistics.median(times)}


def checkpoint(options: list[str], args: argparse.Namespace) -> dict:
    """From runs with a checkpoint after every step, and after the first and the last alone, on a little text: what is
    held out of all of it takes a large model minutes."""
    times, steps = {"often": [], "seldom": []}, 6
    text = "\n".join(state_of_the_union().train[:50])
    for _ in range(args.rounds):
        for way, minutes in (("often", "1e-9"), ("seldom", "1e9")):
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "text.txt").write_text(text, encoding="utf-8")
                Path(folder, "heldout.txt").write_text(text[:2000], encoding="utf-8")
                data = ["--data", f"{folder}/text.txt", "--heldout", f"{folder}/heldout.txt"]
                budget = ["--steps", str(steps), "--evaluations", "1", "--checkpoint-minutes", minutes]
                times[way].append(train(Path(folder) / "run", *data, *budget, *options)["training_seconds"])
    often, seldom = (statistics.median(times[way]) for way in ("often", "seldom"))
    each = (often - seldom) / (steps - 2)
    return {"seconds": significant(each, 3), "part_of_ten_minutes": significant(each / EVERY, 2)}


def first_step(folder: Path, options: list[str]) -> tuple[float, int]:
    """Seconds from the command to its first step, and which one that is. The run is then interrupted, which saves."""
    command = [*COMMAND, "--output", str(folder), "--no-bf16", "--steps", "1000000", "--evaluations", "1", *options]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    text, step, took = "", 0, 0.0
    while not took and (piece := process.stderr.read1()):
        text += piece.decode(errors="replace")
        if found := re.search(r"step (\d+), .*tokens/s", text):
            step, took = int(found[1]), time.perf_counter() - start
    process.send_signal(signal.SIGTERM)
    rest = process.communicate()[1]
    if not took:
        raise SystemExit(text + rest.decode())
    return took, step


def resume(options: list[str], args: argparse.Namespace) -> dict:
    times = {"begins": [], "goes_on": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            began, first = first_step(Path(folder) / "run", options)
            went_on, next_step = first_step(Path(folder) / "run", options)
            assert next_step > first
        times["begins"].append(began)
        times["goes_on"].append(went_on)
    return {way: {"seconds": significant(statistics.median(x), 3)} for way, x in times.items()}


def rows(quick: bool) -> dict[str, Measure]:
    tiny = ["--hidden-size", "32", "--num-layers", "2", "--num-heads", "2", "--vocab-size", "300", "--batch-size", "2"]
    sizes = {"tiny": tiny} if quick else {size: ["--size", size, "--batch-size", "2"] for size in ("10m", "50m")}
    found: dict[str, Measure] = {
        f"stateful/{seed}": partial(stateful, seed, 2 if quick else STEPS, tiny if quick else [])
        for seed in ((0,) if quick else (0, 1))
    }
    found["tokenise"] = tokenising
    for name, measure in (("checkpoint", checkpoint), ("resume", resume)):
        found |= {f"{name}/{size}": partial(measure, options) for size, options in sizes.items()}
    return found


if __name__ == "__main__":
    main("long-training", __doc__, rows)
