"""benchmarks/cpu/serving_vllm.py runs, and both engines say the same."""

import json
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cpu" / "serving_vllm.py"


def test_quick_run():
    run = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("requests: "))
    row = json.loads(line.removeprefix("requests: "))
    assert row["equal_replies"] == row["requests"] == 4
    assert all(peer["tokens_per_second"] > 0 for peer in row["peers"].values())
