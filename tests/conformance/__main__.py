"""Hugging Face's own model tests on our classes.

Prints, for each configuration, how many tests passed, failed and were skipped, and why; writes the same to
`build/conformance/report-VERSION.md`. Arguments it does not know go to pytest, such as `-n 2` or `-k training`.
"""

import argparse
import os
import sys
from collections import Counter, defaultdict

import pytest
import transformers

from .sources import CACHE, HERE, search_path


class Tally:
    """A pytest plugin that keeps one outcome per test: the worst of its phases."""

    def __init__(self):
        self.outcomes: dict[str, str] = {}
        self.skips: dict[str, set[str]] = defaultdict(set)
        self.failures: dict[str, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report):
        suite, test = report.nodeid.split("::")[-2:]
        if report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.skips[reason].add(test)
        elif report.failed:
            self.failures[f"{suite}::{test}"].add(report.longreprtext.strip().splitlines()[-1])
        elif report.when != "call":
            return
        worst = max(
            self.outcomes.get(report.nodeid, ""), report.outcome, key=["", "passed", "skipped", "failed"].index
        )
        self.outcomes[report.nodeid] = worst

    def markdown(self) -> str:
        counts = defaultdict(Counter)
        for nodeid, outcome in self.outcomes.items():
            counts[nodeid.split("::")[-2]][outcome] += 1
        lines = [f"# Model tests of Transformers {transformers.__version__}", ""]
        lines += ["| configuration | passed | failed | skipped |", "|---|---|---|---|"]
        for suite, count in sorted(counts.items()):
            lines.append(f"| {suite} | {count['passed']} | {count['failed']} | {count['skipped']} |")
        lines += ["", "## Failures", ""]
        lines += [f"- `{test}`: {'; '.join(errors)}" for test, errors in sorted(self.failures.items())] or ["none"]
        lines += ["", "## Skips, by reason", ""]
        for reason, tests in sorted(self.skips.items(), key=lambda item: -len(item[1])):
            lines.append(f"- {reason} ({len(tests)}): {', '.join(f'`{test}`' for test in sorted(tests))}")
        return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument(
        "--references", action="store_true", help="run them on Mamba-2, Llama and Transformers' own xLSTM instead"
    )
    args, pytest_arguments = parser.parse_known_args()
    path = search_path(transformers.__version__)
    sys.path[:0] = path
    # for the processes that the parallel tests and pytest-xdist start
    os.environ["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])
    tally = Tally()
    # upstream's markers are not ours: without our `--strict-markers`
    options = ["--quiet", "--tb=short", "-W", "ignore", "-o", "addopts="]
    suites = HERE / ("references.py" if args.references else "suites.py")
    status = pytest.main([*options, str(suites), *pytest_arguments], [tally])
    report = tally.markdown()
    name = f"report-{transformers.__version__}{'-references' if args.references else ''}.md"
    (CACHE / name).write_text(report, encoding="utf-8")
    print(report)
    return status


sys.exit(main())
