"""How threads of OpenMP wait for each other: decoding on an idle machine, and with three busy processes beside it.

default     as libgomp does by itself: it spins for milliseconds before it sleeps
spin_10000  GOMP_SPINCOUNT=10000, which `hf-xlstm` sets
passive     OMP_WAIT_POLICY=PASSIVE
one_thread  OMP_NUM_THREADS=1

Each way is a process of its own, since libgomp reads these variables once; the processes take turns.
"""

import argparse
import contextlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.generation import NEW_TOKENS, decode_turn
from benchmarks.cpu.harness import Measure, Turn, main, summarize, take_turns
from benchmarks.peers import HF_XLSTM


DEFAULT = "default"
WAYS = {
    DEFAULT: {},
    "spin_10000": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one_thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = 3  # processes


def answer(connection: Connection, size: str) -> None:
    """What a process of a way does: its number of threads, then the seconds of a turn as often as one is asked for."""
    turn = decode_turn(HF_XLSTM, size, "float32", batch_size=1)
    connection.send(torch.get_num_threads())
    while connection.recv():
        connection.send(turn())


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Of processes that start here: these variables, and none of the other ways'."""
    before = dict(os.environ)
    for name in {name for way in WAYS.values() for name in way}:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def process_of(way: str, size: str) -> Iterator[tuple[Turn, int]]:
    """A turn in a process of its own, and the threads it has there."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=answer, args=(theirs, size), daemon=True)
    with environment(WAYS[way]):
        process.start()
    theirs.close()

    def turn() -> float:
        ours.send(True)
        return ours.recv()

    try:
        yield turn, ours.recv()
        ours.send(False)
        process.join()
    finally:
        process.kill()


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def decode(size: str, busy: int, args: argparse.Namespace) -> dict:
    with contextlib.ExitStack() as stack:
        started = {way: stack.enter_context(process_of(way, size)) for way in WAYS}
        stack.enter_context(busy_processes(busy))
        times = take_turns({way: turn for way, (turn, _) in started.items()}, args.rounds, args.seconds)
        results = summarize(times, NEW_TOKENS, baselines=[DEFAULT])
        return {"ways": {way: {"threads": started[way][1]} | result for way, result in results.items()}}


def rows(quick: bool) -> dict[str, Measure]:
    sizes = ["32x1"] if quick else ["192x4", "768x8"]
    return {
        f"waiting/{size}/{name}": partial(decode, size, busy)
        for size in sizes
        for name, busy in (("idle", 0), ("busy", BUSY))
    }


if __name__ == "__main__":
    main("waiting", __doc__, rows)
