"""The process that measures for prove.py: reads orders, a line of JSON each, and answers with rows.

Messages out: {"environment"} once, {"begin": row} and {"row": row}, and {"finished": step} after each order.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import triton


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.gpu import breakdown, generation, harness, ops, smoke, training
from benchmarks.gpu.steps import POISONED
from benchmarks.provenance import ROOT


def work(args: argparse.Namespace) -> int:
    """Answers orders, one step each, with rows."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whoever prints writes to the log

    def send(**message) -> None:
        print(json.dumps(message), file=channel, flush=True)

    if args.dry_run:
        from benchmarks.gpu import rehearsal

        rehearsal.begin()
    environment = harness.environment()
    if args.dry_run:
        environment["device"] = "none: a rehearsal in Triton's interpreter"
    elif not torch.cuda.is_available():
        raise SystemExit("There is no GPU. --dry-run rehearses without one.")
    send(environment=environment)
    jobs = {
        "prefill": lambda: [harness.Job({"op": "unpack"}, functools.partial(unpack, args.out / "kernels.tar.xz"))],
        "smoke": smoke.jobs,
        "ops": ops.jobs,
        "generation": generation.jobs,
        "training": training.jobs,
        "breakdown": breakdown.jobs,
        "variants": ops.variant_jobs,
    }
    found, missing = [], []

    def listen(*, src, cache_hit, **_) -> None:
        (found if cache_hit else missing).append(src.name)

    triton.knobs.compilation.listener = listen
    for line in sys.stdin:
        order = json.loads(line)
        step, deadline = order["step"], time.monotonic() + order["seconds"]
        known, failed = set(order["known"]), set(order["failed"])
        if step == "tests":
            test_kernels(order, args.dry_run, send)
            send(finished=step)
            continue
        harness.Model.release()
        torch.manual_seed(0)
        for job in jobs[step]():
            id = f"{step}/{job.id}"
            if id in known or not any(fnmatchcase(id, pattern) for pattern in order["only"]):
                continue
            row = {"id": id, "step": step, "name": job.name}
            if blocked := sorted(x for x in failed if any(fnmatchcase(x, pattern) for pattern in job.needs)):
                send(row=row | {"skipped": f"needs {blocked[0]}, which failed"})
                continue
            if time.monotonic() > deadline:
                send(row=row | {"skipped": "out of time"})
                continue
            send(begin=row)
            start = time.monotonic()
            try:
                with fault_of(id, args.fault):
                    result = job.run()
                row |= {"result": rehearsal.without_times(result) if args.dry_run else result}
            except ModuleNotFoundError as error:
                row |= {"skipped": f"{error.name} is not installed"}
            except Exception as error:
                failed.add(id)
                row |= failure(error)
            row |= {"seconds": round(time.monotonic() - start, 2), "found": len(found), "compiled": [*missing]}
            found.clear()
            missing.clear()
            send(row=row)
            if "failed" in row:
                try:
                    torch.cuda.synchronize()
                except RuntimeError:  # after an illegal access nothing works any more in this process
                    return POISONED
        send(finished=step)
    return 0


def unpack(archive: Path) -> dict[str, int]:
    """Kernels compiled beforehand, into the cache. What it lacks is compiled on the spot."""
    if not archive.exists():
        return {"kernels": 0}
    from benchmarks.gpu import prefill

    if different := [fact for fact, expected in prefill.facts().items() if not expected]:
        raise ValueError(f"{archive.name} is for another Triton: {'; '.join(different)}")
    return prefill.unpack(archive, Path(os.environ["TRITON_CACHE_DIR"]))


def fault_of(id: str, faults: list[str]) -> contextlib.AbstractContextManager:
    for pattern, _, kind in (fault.rpartition("=") for fault in faults):
        if fnmatchcase(id, pattern):
            from benchmarks.gpu import rehearsal

            return rehearsal.fault(kind)
    return contextlib.nullcontext()


def failure(error: Exception) -> dict[str, str]:
    """The message, the kernel if it was being compiled or launched, and the last line of hf_xlstm on the way there."""
    row = {"failed": f"{type(error).__name__}: {error}"[:1000]}
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "src" / "hf_xlstm"):
            row["at"] = f"{path.name}:{line}"
        launched = frame.f_locals.get("self")
        if hasattr(launched, "arg_names") and hasattr(launched, "fn"):
            row["kernel"] = launched.fn.__name__
    return row


# --- the kernels' tests


class Reporter:
    """A pytest plugin: tells of every test when it begins and when its outcome is known."""

    def __init__(self, send: Callable):
        self.send, self.reports = send, {}

    def row(self, test: str) -> dict:
        return {"id": f"tests/{test}", "step": "tests", "name": {"test": test}}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.send(begin=self.row(nodeid))

    def pytest_runtest_logreport(self, report) -> None:
        self.reports.setdefault(report.nodeid, []).append(report)
        if report.when == "teardown":
            reports = self.reports.pop(report.nodeid)
            row = self.row(report.nodeid) | {"seconds": round(sum(x.duration for x in reports), 2)}
            if bad := [x for x in reports if x.failed]:
                message = getattr(getattr(bad[0].longrepr, "reprcrash", None), "message", str(bad[0].longrepr))
                row |= {"failed": message[:1000]}
            else:
                row |= {"result": {"outcome": "skipped" if any(x.skipped for x in reports) else "passed"}}
            self.send(row=row)


def test_kernels(order: dict, dry_run: bool, send: Callable) -> None:
    """In as many processes as there are cores, since most of it is compilation. Tests that are known are left out."""
    if not any(pattern.startswith(("*", "tests")) for pattern in order["only"]):
        return
    if importlib.util.find_spec("pytest") is None:
        send(row={"id": "tests/pytest", "step": "tests", "name": {}, "skipped": "pytest is not installed"})
        return
    import pytest

    class FirstTwo:
        @pytest.hookimpl(trylast=True)  # of those that -k and --deselect leave
        def pytest_collection_modifyitems(self, items: list) -> None:
            del items[2:]

    tests = ROOT / "tests"
    files = sorted(x for x in tests.rglob("test_*.py") if "triton" in x.name or x.parent.name == "cells")
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k", "triton and not kernel_resources"]
    if importlib.util.find_spec("xdist") is not None and not dry_run:
        arguments += ["-n", str(os.cpu_count())]
    arguments += [f"--deselect={id.removeprefix('tests/')}" for id in order["known"] if id.startswith("tests/")]
    pytest.main([*arguments, *map(str, files)], plugins=[Reporter(send), *([FirstTwo()] if dry_run else [])])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--fault", action="append", default=[])
    sys.exit(work(parser.parse_args()))
