"""benchmarks/gpu/prove.py rehearsed without a GPU: every step, kernels that fail, hang, compute nothing or take the
process with them, and the run after that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import prove, report
from benchmarks.gpu.steps import STEPS


pytest.importorskip("triton")
SCRIPT = Path(prove.__file__)


def rehearse(out: Path, *arguments: str) -> tuple[int, dict[str, dict]]:
    """Exit code, and the rows by id."""
    command = [
        sys.executable,
        SCRIPT,
        "--dry-run",
        "--out",
        out,
        "--minutes",
        "20",
        "--row-seconds",
        "240",
        *arguments,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not result.stderr, result.stderr
    return result.returncode, {row["id"]: row for row in json.loads((out / "prove.json").read_text())["rows"]}


def test_every_step(tmp_path):
    """All of it passes but torch's attention by cuDNN, which has no CPU. No number in it comes from a clock."""
    code, rows = rehearse(tmp_path)
    assert {row["step"] for row in rows.values()} == set(STEPS)
    failed = {id: row["failed"] for id, row in rows.items() if "failed" in row}
    assert code == 1 and all("cudnn_attention" in id for id in failed), failed
    skipped = {row["skipped"] for row in rows.values() if "skipped" in row}
    assert all(reason.endswith("is not installed") for reason in skipped), skipped
    assert sum(id.startswith("variants/") for id in rows) == 26
    assert sum(id.startswith("smoke/model/") for id in rows) == sum(id.endswith("/selfcheck") for id in rows) == 4
    assert [row["result"]["outcome"] for id, row in rows.items() if id.startswith("tests/")] == 2 * ["passed"]
    numbers = {name: x for row in rows.values() for name, x in row.get("result", {}).items() if isinstance(x, float)}
    assert numbers.keys() == {"error"}
    summary = (tmp_path / "summary.md").read_text()
    assert "a rehearsal in Triton's interpreter" in summary
    assert all(line.endswith("| – | – |") for line in summary.splitlines() if line.startswith("| mLSTM forward"))
    results = json.loads((tmp_path / "prove.json").read_text())
    assert results["source"] == prove.source_of_kernels() and results["environment"]["triton"]
    assert {row["source"] for row in rows.values()} == {results["source"]}


@pytest.mark.slow
def test_broken_kernels_and_the_run_after(tmp_path):
    """Each is a row of its own and stops only what depends on it; the next run goes on where this one stopped."""
    mlstm, slstm = "1x20x1x16x32", "1x3x1x16"
    faults = {
        f"smoke/mlstm/forward/bfloat16/{mlstm}": "fail",
        f"smoke/mlstm/step/bfloat16/{mlstm}": "hang",
        f"smoke/slstm/forward/bfloat16/{slstm}": "crash",
        f"smoke/slstm/step/bfloat16/{slstm}": "wrong",
    }
    arguments = ["--steps", "smoke", "ops", "--only", "smoke/*/bfloat16/*", "ops/*step/hf_xlstm/*", "ops/copy/*"]
    broken = [flag for id, kind in faults.items() for flag in ("--fault", f"{id}={kind}")]
    code, rows = rehearse(tmp_path, *arguments, *broken, "--row-seconds", "60")
    assert code == 1
    assert {id for id, row in rows.items() if "failed" in row} == faults.keys()
    failed = [rows[id]["failed"] for id in faults]
    broken_row = rows[f"smoke/mlstm/forward/bfloat16/{mlstm}"]
    assert failed[0] == f"RuntimeError: {broken_row['kernel']} was broken on purpose"
    assert broken_row["at"].startswith("triton_launch.py:") and broken_row["name"]["shape"] == mlstm
    assert failed[1].startswith("no result after 60 s")
    assert failed[2] == "the process died, twice: SIGSEGV"
    assert failed[3].startswith("ValueError: wrong result")
    for id in (f"smoke/mlstm/backward/bfloat16/{mlstm}", f"smoke/slstm/backward/bfloat16/{slstm}", "ops/copy/torch"):
        assert "result" in rows[id], id
    assert rows["ops/step/hf_xlstm/B=1"]["skipped"] == f"needs smoke/mlstm/step/bfloat16/{mlstm}, which failed"
    assert (
        rows["ops/slstm_step/hf_xlstm/B=1/D=16"]["skipped"] == f"needs smoke/slstm/step/bfloat16/{slstm}, which failed"
    )
    summary = (tmp_path / "summary.md").read_text()
    assert summary.index("smoke/mlstm/step/bfloat16") < summary.index("## Targets")

    measured = {id: row for id, row in rows.items() if "result" in row}
    code, rows = rehearse(tmp_path, *arguments)  # what failed is known, and still stops what depends on it
    assert code == 1 and {id for id, row in rows.items() if "failed" in row} == faults.keys()
    code, rows = rehearse(tmp_path, *arguments, "--retry")
    assert code == 0 and all("result" in row for row in rows.values())
    assert {id: rows[id] for id in measured} == measured
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    counts = {id: sum(line.get("id") == id and "result" in line for line in lines) for id in rows}
    assert set(counts.values()) == {1}, counts


def test_another_source_is_measured_again(tmp_path, monkeypatch):
    """Rows hold for one source of the kernels, one GPU and one set of versions. A line cut short is no row."""

    def ledger(source: str, device: str = "H100") -> prove.Ledger:
        monkeypatch.setattr(prove, "source_of_kernels", lambda: source)
        ledger = prove.Ledger(tmp_path / "rows.jsonl")
        ledger.enter({"device": device, "commit": "c"})
        return ledger

    first = ledger("a")
    first.add({"id": "ops/x", "step": "ops", "name": {}, "result": {}})
    first.add({"id": "ops/y", "step": "ops", "name": {}, "failed": "it did"})
    first.add({"id": "ops/z", "step": "ops", "name": {}, "skipped": "out of time"})
    first.add({"id": "prefill/unpack", "step": "prefill", "name": {}, "result": {}})
    with first.path.open("a") as file:
        file.write('{"id": "ops/u", "st')
    assert ledger("a").known(retry=False) == ["ops/x", "ops/y"]
    assert ledger("a").known(retry=True) == ["ops/x"] and ledger("a").failed() == ["ops/y"]
    assert ledger("b").known(retry=False) == ledger("a", "H200").known(retry=False) == []
    assert first.known(retry=True) == ["ops/x", "ops/y"]  # this run has tried it
    ledger("a").add({"id": "ops/u", "step": "ops", "name": {}, "result": {}})
    assert ledger("a").known(retry=True) == ["ops/x", "ops/u"]


def test_source_of_kernels(tmp_path, monkeypatch):
    package = tmp_path / "src" / "hf_xlstm"
    (package / "cells" / "mlstm").mkdir(parents=True)
    (package / "ops.py").write_text("")
    (package / "modeling_xlstm.py").write_text("")
    (package / "cells" / "mlstm" / "kernels.py").write_text("")
    monkeypatch.setattr(prove, "ROOT", tmp_path)
    before = prove.source_of_kernels()
    (package / "modeling_xlstm.py").write_text("changed")
    assert prove.source_of_kernels() == before
    (package / "cells" / "mlstm" / "kernels.py").write_text("changed")
    assert prove.source_of_kernels() != before


def row(**result) -> dict:
    return {"name": {"B": 16, "T": 1024, "D": 64, "size": "400M", "S": 2048}, "result": result}


@pytest.mark.parametrize(
    "rows, title, value, met",
    [
        ({"ops/sequence/hf_xlstm/H=8/K=256/V=512/S=512": row(forward_ms=2.0)}, "mLSTM forward, 8", "2 ms", "yes"),
        (
            {f"ops/sequence/hf_xlstm/H=8/K=256/V=512/S={S}": row(forward_ms=S / 1024) for S in (2048, 3072, 65_536)},
            "mLSTM forward, 8 heads of 256/512, sequences",
            "3 ms",
            "no",
        ),
        (
            {f"ops/sequence/hf_xlstm/H=8/K=256/V=512/S={S}": row(training_ms=S / 8192) for S in (2048, 65_536)},
            "mLSTM with backward, 8 heads of 256/512, one",
            "8 ms",
            "yes",
        ),
        ({"ops/step/hf_xlstm/B=1": row(us=9.0)}, "mLSTM step, batch 1", "9 us", "yes"),
        (
            {"ops/copy/torch": row(tb_per_s=3.0)}
            | {f"ops/step/hf_xlstm/B={B}": row(tb_per_s=speed) for B, speed in ((1, 0.1), (8, 2.0), (1024, 1.2))},
            "mLSTM step from batch 8",
            "2.5 times",
            "no",
        ),
        (
            {
                f"generation/hf_xlstm/decode/batch=1/context={n}/CUDA graph": row(tokens_per_s=n)
                for n in (250.0, 300.0)
            },
            "7B decoding",
            "250 tokens/s",
            "yes",
        ),
        (
            {
                "ops/slstm_sequence/hf_xlstm/B=16/T=1024/D=64": row(training_ms=3.0),
                "ops/slstm_sequence/cudnn_lstm/B=16/T=1024/D=64": row(training_ms=1.5),
                "ops/slstm_sequence/hf_xlstm/B=16/T=1024/D=256": row(training_ms=99.0),
            },
            "sLSTM forward and backward",
            "2 times",
            "no",
        ),
        (
            {
                f"training/{report.MIXED}/step/400M/S=2048": row(ms=11.0),
                "training/hf_xlstm/step/400M/S=2048": row(ms=10.0),
            },
            "400M training step",
            "1.1 times",
            "yes",
        ),
        ({}, "mLSTM forward, 8", "–", "–"),
    ],
)
def test_targets(rows, title, value, met):
    line = next(line for line in report.summary("source", {}, rows_with_steps(rows)).splitlines() if title in line)
    assert [cell.strip() for cell in line.split("|")][3:5] == [value, met]


def rows_with_steps(rows: dict[str, dict]) -> dict[str, dict]:
    return {id: row | {"step": id.partition("/")[0], "id": id} for id, row in rows.items()}
