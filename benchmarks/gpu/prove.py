"""Proves and measures every kernel on a real GPU, in one command, and goes on where the last run stopped.

    python benchmarks/gpu/prove.py --minutes 9 --out DIR
    python benchmarks/gpu/prove.py --minutes 9 --out DIR --dry-run    # a rehearsal in Triton's interpreter, no GPU

The steps go from what must be known first to what is good to know: STEPS has them and their limits. Every row is
written to DIR/rows.jsonl when it is known. A failure is a row, with the kernel and the error, and stops only what
depends on it. A measurement that hangs is ended, and the rest goes on in a new process, which also tries once more
what the old one died of. Rows that are there already,
for the same source of the kernels, the same GPU and versions, are not measured again; --retry does so with those
that failed. The result is DIR/prove.json and, to be read, DIR/summary.md.

DIR/kernels.tar.xz, if it is there, has the kernels compiled beforehand (prefill.py); what it lacked is counted.
This process only supervises, and does without torch; worker.py does the measuring.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.gpu.report import outcome, summary
from benchmarks.gpu.steps import POISONED, STEPS


ROOT = Path(__file__).resolve().parents[2]
GRACE = 10  # seconds for what runs when its step is over
START = 120  # seconds for a worker to import what it needs


# --- the supervisor: rows, limits, and processes that may die


def source_of_kernels() -> str:
    """Hash of everything that decides what a kernel computes, and how it is launched."""
    package = ROOT / "src" / "hf_xlstm"
    digest = hashlib.sha256()
    for path in sorted([*package.glob("cells/**/*.py"), package / "ops.py"]):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Ledger:
    """The rows in a file to which they are only ever added. A later row of an id replaces the earlier one."""

    def __init__(self, path: Path):
        self.path, self.rows, self.environments, self.added = path, {}, {}, set()
        self.source, self.environment = source_of_kernels(), None
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut short when the machine went away
                self.take(json.loads(line))
        if text and not text.endswith("\n"):
            path.write_text(text + "\n")

    def take(self, record: dict) -> None:
        if "values" in record:
            self.environments[record["environment"]] = record["values"]
        elif record["source"] == self.source:
            self.rows[record["environment"], record["id"]] = record

    def write(self, record: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.take(record)

    def enter(self, values: dict[str, str]) -> None:
        """Rows that follow are of this GPU and these versions."""
        identity = {name: value for name, value in values.items() if name != "commit"}
        self.environment = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
        if self.environments.get(self.environment) != values:
            self.write({"environment": self.environment, "values": values})

    def add(self, row: dict) -> None:
        self.added.add(row["id"])
        where = {
            "source": self.source,
            "environment": self.environment,
            "commit": self.environments[self.environment]["commit"],
        }
        self.write(row | where | {"date": datetime.date.today().isoformat()})

    def current(self) -> dict[str, dict]:
        return {id: row for (environment, id), row in self.rows.items() if environment == self.environment}

    def contents(self) -> tuple[str, dict[str, str], dict[str, dict]]:
        """Source of the kernels, where they ran, and the rows by id."""
        return self.source, self.environments.get(self.environment, {}), self.current()

    def known(self, retry: bool) -> list[str]:
        """Ids that need no measurement. What was skipped for want of time or of another row is not known, nor is, to
        `retry`, what failed in an earlier run."""
        known = {id: row for id, row in self.current().items() if "skipped" not in row and row["step"] != "prefill"}
        return [id for id, row in known.items() if id in self.added or not (retry and "failed" in row)]

    def failed(self) -> list[str]:
        return [id for id, row in self.current().items() if "failed" in row]


class Worker:
    """The process that does the measuring, in a group of its own. Its messages are lines of JSON."""

    def __init__(self, args: argparse.Namespace):
        flags = ["--dry-run"] if args.dry_run else []
        flags += [flag for fault in args.fault for flag in ("--fault", fault)]
        wheels = args.out.resolve() / "wheels"
        environment = os.environ | {
            "TRITON_CACHE_DIR": str(args.out.resolve() / "triton"),
            "PYTHONPATH": os.pathsep.join(map(str, [ROOT / "src", ROOT, wheels, os.environ.get("PYTHONPATH", "")])),
            "TRITON_INTERPRET": "1" if args.dry_run else "0",
            "HF_HUB_OFFLINE": "1",
        }
        if not args.dry_run:  # whatever the check of backend="auto" says, which would compile kernels of its own
            environment["HF_XLSTM_BACKEND"] = "triton"
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(args.out), *flags]
        with (args.out / "worker.log").open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )
        self.messages: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        for line in self.process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # cut short by its death
                self.messages.put(json.loads(line))
        self.messages.put(None)

    def send(self, order: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is dead, and its messages end here
            print(json.dumps(order), file=self.process.stdin, flush=True)

    def end(self, patience: float = 0) -> int | None:
        """Ends it and all its children, however they hang. Returns the exit code if it ends by itself in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        code = self.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process in a driver's call may outlive this
            self.process.wait(5)
        return code


class Supervisor:
    def __init__(self, args: argparse.Namespace):
        self.args, self.ledger = args, Ledger(args.out / "rows.jsonl")
        self.end = time.monotonic() + 60 * args.minutes
        self.worker: Worker | None = None
        self.died_once: set[str] = set()

    def run(self) -> None:
        for name in self.args.steps:
            limit = math.inf if self.args.dry_run else STEPS[name].seconds
            deadline = min(time.monotonic() + limit, self.end)
            print(f"--- {name}, {deadline - time.monotonic():.0f} s", flush=True)
            while time.monotonic() < deadline and not self.attempt(name, deadline):
                pass
            if name == "tests":
                self.drop()  # pytest leaves its marks on a process
        self.drop()

    def drop(self, patience: float = 0) -> int | None:
        worker, self.worker = self.worker, None
        return worker.end(patience) if worker else None

    def attempt(self, step: str, deadline: float) -> bool:
        """Orders what is not known yet of a step. False if a new process should go on with it."""
        if self.worker is None:
            self.worker = Worker(self.args)
            try:
                message = self.worker.messages.get(timeout=START)
            except queue.Empty:
                message = None
            if message is None:
                self.drop()
                self.fail_step(step, "the worker did not start: DIR/worker.log says why")
                return True
            self.ledger.enter(message["environment"])
        order = {"step": step, "seconds": deadline - time.monotonic(), "only": self.args.only}
        self.worker.send(order | {"known": self.ledger.known(self.args.retry), "failed": self.ledger.failed()})
        running: dict[str, tuple[dict, float]] = {}  # a row as far as it is known, and when it began
        progress = False
        while True:
            now, last = time.monotonic(), min(deadline + GRACE, self.end + GRACE)
            limits = [last, *(begun + self.row_seconds(step) for _, begun in running.values())]
            try:
                message = self.worker.messages.get(timeout=max(min(limits) - now, 0.01))
            except queue.Empty:
                self.drop()
                return self.too_long(step, running, last)
            if message is None:
                code = self.drop(patience=10)  # it has closed its channel, and may still be freeing memory
                return self.died(step, running, code, progress)
            if "finished" in message:
                if "failed" in self.ledger.current().get(step, {}) and step not in self.ledger.added:
                    self.add({"id": step, "step": step, "name": {}, "result": {"outcome": "finished"}})
                return True
            if "begin" in message:
                progress = True
                running[message["begin"]["id"]] = (message["begin"], time.monotonic())
            else:
                running.pop(message["row"]["id"], None)
                self.add(message["row"])

    def row_seconds(self, step: str) -> float:
        return self.args.row_seconds or STEPS[step].row_seconds

    def too_long(self, step: str, running: dict, last: float) -> bool:
        now, limit = time.monotonic(), self.row_seconds(step)
        for row, begun in running.values():
            if now - begun >= limit:
                self.add(row | {"failed": f"no result after {limit:g} s: it hangs, or takes too long"})
            elif now >= last:
                self.add(row | {"skipped": "out of time"})
        return now >= last

    def died(self, step: str, running: dict, code: int | None, progress: bool) -> bool:
        reason = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        for id, (row, _) in running.items():
            if id in self.died_once:
                self.add(row | {"failed": f"the process died, twice: {reason}"})
            else:  # a fresh machine's first process died of SIGBUS, and its second did the same without a fault
                self.died_once.add(id)
                print(f"{id}: the process died: {reason}; once more", flush=True)
        if not running and code != POISONED:
            self.fail_step(step, f"the process died between two rows: {reason}")
            return not progress
        return False

    def fail_step(self, step: str, reason: str) -> None:
        if self.ledger.environment is None:
            self.ledger.enter({"device": "unknown", "commit": "unknown"})
        self.add({"id": step, "step": step, "name": {}, "failed": reason})

    def add(self, row: dict) -> None:
        self.ledger.add(row)
        print(f"{row['id']}: {outcome(row)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder to keep from run to run")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=[*STEPS], help="default: all of them")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="rows, e.g. 'ops/*/hf_xlstm/*'")
    parser.add_argument("--retry", action="store_true", help="measure again what has failed")
    parser.add_argument("--row-seconds", type=float, help="the limit of a row, instead of its step's")
    parser.add_argument("--wheels", type=Path, help="a folder of pure Python wheels, for the baselines")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter; needs no GPU")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="PATTERN=KIND", help="in rehearsal: fail, hang, wrong or crash"
    )
    args = parser.parse_args()
    if args.fault and not args.dry_run:
        parser.error("--fault is for --dry-run")
    args.out.mkdir(parents=True, exist_ok=True)
    for wheel in args.wheels.glob("*.whl") if args.wheels else ():
        zipfile.ZipFile(wheel).extractall(args.out / "wheels")
    supervisor = Supervisor(args)
    try:
        supervisor.run()
    finally:
        supervisor.drop()
        source, environment, rows = supervisor.ledger.contents()
        results = {"source": source, "environment": environment, "rows": [*rows.values()]}
        (args.out / "prove.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "summary.md").write_text(summary(source, environment, rows))
        print((args.out / "summary.md").read_text())
    return int(any("failed" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
