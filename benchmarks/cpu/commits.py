"""Speed of this commit over that of other checkouts: training, prompts, steps, generate.

    git worktree add ../before COMMIT
    python benchmarks/cpu/commits.py --only '*' --before ../before

Every checkout has a process of its own, with the same packages otherwise; they take turns, a turn of each after the
other, and the ratio is the median over the rounds. What is measured calls nothing that an older commit lacks.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.harness import DTYPES, main
from benchmarks.provenance import ROOT, significant
from hf_xlstm import xLSTMCache, xLSTMConfig, xLSTMForCausalLM


PROMPT, NEW_TOKENS = 64, 32
TASKS = ("decode-1", "decode-8", "generate", "prefill", "training")


class Answers:
    """What the process of a checkout does. It knows that checkout's `hf_xlstm` and this file."""

    def __init__(self, width: int, blocks: int, length: int):
        torch.manual_seed(0)
        ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        self.config = xLSTMConfig(vocab_size=16384, hidden_size=width, num_hidden_layers=blocks, num_heads=4, **ids)
        self.models = {
            dtype: xLSTMForCausalLM(self.config).to(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")
        }
        self.ids, self.caches = torch.randint(0, 16384, (8, length)), {}

    def seconds(self, task: str, dtype: str) -> float:
        model = self.models[dtype].train(task == "training")
        if task == "training":
            ids = self.ids[:1, : self.ids.shape[1] // 4]
            work = lambda: model(ids, labels=ids).loss.backward()  # noqa: E731
        elif task == "prefill":
            work = lambda: model(self.ids[:1], logits_to_keep=1, use_cache=True)  # noqa: E731
        elif task == "generate":
            options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
            work = lambda: model.generate(self.ids[:1, :PROMPT], **options)  # noqa: E731
        else:
            work = self.steps(model, task, dtype)
        with torch.set_grad_enabled(task == "training"):
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
        return seconds

    def steps(self, model, task: str, dtype: str):
        """Steps that continue a cache, from prepacked weights if the checkout has them."""
        rows = int(task.rpartition("-")[2])
        if hasattr(model, "pack_for_decoding"):
            model.pack_for_decoding()
        cache, new = self.caches.get((dtype, rows)), self.ids[:rows, :1]

        def work(steps: int = NEW_TOKENS) -> None:
            for _ in range(steps):
                model(new, past_key_values=cache)

        if cache is None:
            cache = self.caches[dtype, rows] = xLSTMCache(self.config)
            with torch.no_grad():
                model(self.ids[:rows, :PROMPT], past_key_values=cache)
        with torch.no_grad():
            work(4)  # makes what the last task has dropped
        return work


def serve(width: str, blocks: str, length: str) -> None:
    """Prints the seconds of each task that comes in, a line each."""
    answers = Answers(int(width), int(blocks), int(length))
    print("ready", flush=True)
    for line in sys.stdin:
        print(answers.seconds(*line.split()), flush=True)


class Checkout:
    def __init__(self, root: Path, sizes: tuple[int, int, int]):
        command = [sys.executable, "-W", "ignore", __file__, "serve", *map(str, sizes)]
        environment = os.environ | {"PYTHONPATH": str(root.resolve() / "src")}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{root} has no src/hf_xlstm that can be imported here.")

    def seconds(self, task: str) -> float:
        self.process.stdin.write(task + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def measure(task: str, dtype: str, sizes: tuple[int, int, int], args: argparse.Namespace) -> dict:
    if args.before is None:
        raise SystemExit("Another checkout is needed: --before DIRECTORY.")
    checkouts = [Checkout(root, sizes) for root in (args.before, ROOT)]
    try:
        times = []
        for _ in range(args.rounds + 1):  # the first warms up
            times.append([checkout.seconds(f"{task} {dtype}") for checkout in checkouts])
    finally:
        for checkout in checkouts:
            checkout.process.kill()
            checkout.process.wait()
    head = ["git", "-C", str(args.before), "rev-parse", "--short=12", "HEAD"]
    ratios = [old / new for old, new in times[1:]]
    return {
        "before": subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip(),
        "seconds": [significant(statistics.median(column)) for column in zip(*times[1:], strict=True)],
        "speed": significant(statistics.median(ratios), 3),
        "range": [significant(min(ratios), 3), significant(max(ratios), 3)],
    }


def rows(quick: bool) -> dict:
    sizes, name = ((64, 2, 256), "64x2") if quick else ((512, 12, 2048), "512x12")
    return {f"{task}/{name}/{dtype}": partial(measure, task, dtype, sizes) for task in TASKS for dtype in DTYPES}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=Path, help="the root of another checkout")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
    else:
        main("commits", __doc__, rows, add_options)
