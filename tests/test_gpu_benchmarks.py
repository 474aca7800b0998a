"""The GPU benchmarks with tiny sizes in Triton's interpreter: whether they run, not how fast anything is."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch


triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there the benchmarks themselves can run"),
]

TINY = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
LENGTHS = [17, 34]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """Runs a script with some of its constants replaced; returns the exit code and the rows it wrote."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    cuda = types.SimpleNamespace(
        get_device_name=lambda: "no GPU",
        synchronize=lambda: None,
        empty_cache=lambda: None,
        memory_allocated=lambda: 0,
        max_memory_allocated=lambda: 0,
        reset_peak_memory_stats=lambda: None,
        Event=lambda **_: types.SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 1.0),
    )
    for name, function in vars(cuda).items():
        monkeypatch.setattr(torch.cuda, name, function)
    once = lambda function, **_: (function(), 1.0)[1]  # noqa: E731
    for name in ("do_bench", "do_bench_cudagraph"):
        monkeypatch.setattr(triton.testing, name, once)
    monkeypatch.setattr(importlib.import_module("gpu_common"), "milliseconds_cold_allocator", once)

    def run(name, *arguments, **constants):
        module = importlib.import_module(name)
        for constant, value in ({"DEVICE": "cpu"} | constants).items():
            monkeypatch.setattr(module, constant, value)
        results = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", [name, "--json", str(results), *arguments])
        return module.main(), json.loads(results.read_text())["rows"]

    yield run
    torch.set_default_device(None)


def failures(rows) -> list[dict]:
    """Of ours: the others may be missing, and some take no tiny shapes."""
    return [row for row in rows if "failed" in row and any(str(x).startswith("hf_xlstm") for x in row.values())]


@pytest.mark.parametrize("arguments", [(), ("--variants",)])
def test_ops(benchmark, arguments):
    code, rows = benchmark(
        "gpu_ops",
        *arguments,
        "--cells",
        "mlstm",
        TOKENS=68,
        LENGTHS=LENGTHS,
        SHAPES=[(2, 16, 32), (1, 32, 16)],
        STEP_BATCHES=[2],
        L2_BYTES=1e4,
        ATTENTION_SHAPE=(2, 16),
    )
    assert code == 0 and not failures(rows), failures(rows)
    assert {row["op"] for row in rows} == {"sequence", "step"}
    assert len(rows) == 1 + len(LENGTHS) * (2 * 7 if arguments else 2 * 3 + 2)


def test_slstm_ops(benchmark):
    """One head dim is resident, the other streamed."""
    shapes = {"SLSTM_SHAPES": [(2, 9, 16), (1, 5, 72)], "SLSTM_STEP_SHAPES": [(2, 16), (1, 72)], "SLSTM_LAYERS": 2}
    code, rows = benchmark("gpu_ops", "--cells", "slstm", **shapes)
    assert code == 0 and not failures(rows), failures(rows)
    assert [row["kernel"] for row in rows] == 4 * ["hf_xlstm"] + 4 * ["pytorch", "cudnn_lstm"]
    assert not any("failed" in row for row in rows if row["kernel"] == "pytorch")


def test_a_wrong_result_is_not_timed(benchmark, monkeypatch):
    exact = dict.fromkeys(("h", "q", "k", "v", "igate", "fgate"), 0.0)
    constants = {"TOKENS": 34, "LENGTHS": [17], "SHAPES": [(1, 16, 16)], "STEP_BATCHES": [], "ATTENTION_SHAPE": (1, 8)}
    code, rows = benchmark("gpu_ops", "--cells", "mlstm", **constants, BOUNDS=exact)
    assert code == 1
    assert rows[0]["failed"].startswith("ValueError: wrong result") and "forward_ms" not in rows[0]


def test_generation(benchmark):
    code, rows = benchmark("gpu_generation", SIZE=TINY, PROMPTS=LENGTHS, DECODE=[(1, 8), (2, 8)], NEW_TOKENS=4)
    assert code == 0 and not failures(rows), failures(rows)
    assert sum(row["measure"] == "decode" for row in rows) == 2 * (2 + 1 + 2)
    assert rows[0]["error"] < 1e-3


def test_training(benchmark):
    code, rows = benchmark(
        "gpu_training", VOCAB=64, TOKENS=68, LENGTHS=LENGTHS, SIZES={"tiny": (64, 2, 2)}, CHECKED=(64, 65)
    )
    assert code == 0 and not failures(rows), failures(rows)
    assert sum(row["measure"] == "step" for row in rows) == 4 * len(LENGTHS)
