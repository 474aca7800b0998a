"""The CPU benchmarks at tiny sizes, and what is made of their results: whether they run, not how fast anything is."""

import json
import sys

import pytest
import torch
from common import tiny_model

from benchmarks import provenance, tables
from benchmarks.cpu import (
    breakdown,
    commits,
    exported,
    generation,
    harness,
    long_training,
    ops,
    quantized,
    serving,
    slstm_loops,
    speculative,
    training,
    waiting,
)
from benchmarks.gpu import report
from benchmarks.peers import HF_XLSTM, IN_TREE, PEERS, cache_argument
from hf_xlstm import xLSTMForCausalLM
from hf_xlstm.commands.helpers.tokens import train_tokenizer


slow = pytest.mark.slow
GPU_PLACE = "<!-- GPU results -->\n<!-- end of GPU results -->\n"
# Rows of each script: one of each kind. What compiles or starts processes is slow.
SCRIPTS = [
    (generation, ["decode/*/float32/*", "prefill/*/bfloat16/*", "generate/*/bfloat16/*", "context/*/float32"]),
    (training, ["training/*/float32/*", "ragged/*/float32/*", "slstm/*/bfloat16/*"]),
    (ops, ["mlstm/*/float32/*/forward", "mlstm/*/bfloat16/*/backward", "mlstm_step/*/float32/*", "slstm/*float32*"]),
    (breakdown, ["*/float32/1", "*/bfloat16/64"]),
    (speculative, ["records"]),
    (serving, ["steps/*", "requests", "second_turn"]),
    pytest.param(slstm_loops, ["*"], marks=slow),
    pytest.param(waiting, ["*/busy"], marks=slow),
    pytest.param(long_training, ["*"], marks=slow),
    pytest.param(generation, ["compile/*/float32"], marks=slow),
    pytest.param(generation, ["memory/*/float32/*"], marks=slow),
    pytest.param(training, ["memory/*/float32/*"], marks=slow),
]


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch):
    """The copy that every row measures takes longer than all the rest."""
    monkeypatch.setattr(harness, "copy_bandwidth", lambda: 1.0)


def run(monkeypatch, script, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    if hasattr(script, "rows"):
        harness.main("test", script.__doc__, script.rows, getattr(script, "add_options", lambda parser: None))
    else:
        script.main()


@pytest.mark.parametrize("script, patterns", SCRIPTS)
def test_quick_rows(script, patterns, monkeypatch, tmp_path):
    path = tmp_path / "results.json"
    run(monkeypatch, script, "--quick", "--seconds", "0.1", "--output", str(path), "--only", *patterns)
    results = json.loads(path.read_text())
    names = harness.select(script.rows(True), patterns)
    assert results["rows"].keys() == names.keys() and len(names) >= len(patterns)
    assert {"family", "model", "cpu", "threads"} <= results["machine"].keys()
    for name, row in results["rows"].items():
        assert row["processor"] == provenance.processor(provenance.machine())
        assert row["command"].startswith(f"python benchmarks/cpu/{script.__name__.rpartition('.')[2]}.py --quick")
        if name.startswith(("decode", "prefill")):
            assert row["peers"].keys() == {*PEERS, harness.LINEAR_FLOOR}
            assert not any("error" in row["peers"][peer] for peer in PEERS if peer != IN_TREE)
        if name.startswith(("memory", "training")):
            assert row["peers"].keys() == PEERS.keys()


@slow
def test_commits(monkeypatch, tmp_path):
    path = tmp_path / "results.json"
    options = ["--before", str(provenance.ROOT), "--only", "*/float32", "--output", str(path)]
    run(monkeypatch, commits, "--quick", "--rounds", "1", *options)
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(commits.TASKS) and all(len(row["seconds"]) == 2 for row in rows.values())


@slow
def test_memory_of_quantised_models(monkeypatch, tmp_path):
    for package in ("bitsandbytes", "torchao"):
        pytest.importorskip(package)
    path = tmp_path / "results.json"
    run(monkeypatch, quantized, "--quick", "--output", str(path))
    results = json.loads(path.read_text())["rows"]
    assert results.keys() == quantized.rows(True).keys()
    assert results["memory/tiny/nf4"]["gigabytes"]["reloaded"]["generated"]["tokens"] == quantized.TOKENS


@slow
def test_exported_models(monkeypatch, tmp_path):
    """All rows, the trained model and its text replaced by small ones."""
    for package in ("onnxscript", "openvino"):
        pytest.importorskip(package, reason="exports need hf-xlstm[export]")
    text = "the state of our Union is strong"
    tokenizer = train_tokenizer([text], vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text)
    options = ["--exports", tmp_path / "exports", "--model", tmp_path / "model", "--text", tmp_path / "text.txt"]
    path = tmp_path / "results.json"
    run(monkeypatch, exported, "--quick", "--seconds", "0.1", "--output", str(path), *map(str, options))
    results = json.loads(path.read_text())["rows"]
    assert results.keys() == exported.rows(True).keys()
    names = {f"{peer}+{route}" for peer in (HF_XLSTM, "llama") for route in exported.routes(True)}
    for row in results.values():
        assert "routes" in row or row["peers"].keys() == names
    ratios = results["decode/128x2/batch-2"]["peers"]["hf_xlstm+openvino-float32"]["ratio"]
    assert ratios.keys() == {"hf_xlstm+eager-float32", "llama+openvino-float32"}
    assert abs(results["loss"]["routes"]["openvino-float32"]["lost"]) < 1e-4


def test_a_file_holds_one_machine(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    harness.merge(path, "row", {})
    monkeypatch.setattr(provenance, "machine", lambda: {"cpu": "another"})
    with pytest.raises(SystemExit, match="start a new file"):
        harness.merge(path, "row", {})


@pytest.mark.parametrize("dtype", harness.DTYPES.values(), ids=str)
def test_floor(dtype):
    """Every library computes the product; together the products have every weight of the model's linear layers."""
    weight, x = torch.randn(40, 24).to(dtype), torch.randn(3, 24).to(dtype)
    functions = harness.libraries(weight, 3)
    assert "onednn_prepacked" in functions or not torch.backends.mkldnn.is_available()
    for function in functions.values():
        assert provenance.relative_error(function(x), x.double() @ weight.double().T) < (
            1e-6 if dtype == torch.float32 else 1e-2
        )


def test_floor_reads_every_weight_once(monkeypatch):
    read = []

    def libraries(weight, rows):
        read.append((weight.numel(), rows))
        return {"default": lambda x: x}

    monkeypatch.setattr(harness, "libraries", libraries)
    monkeypatch.setattr(harness, "timed", lambda function, **_: function)
    harness.linear_floor("128x2", torch.float32, rows=5, head_rows=1)
    model = harness.build(HF_XLSTM, "128x2", torch.float32)
    assert sum(size for size, _ in read) == sum(
        layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear)
    )
    assert read[-1] == (model.lm_head.weight.numel(), 1) and {rows for _, rows in read[:-1]} == {5}


def test_floor_is_the_fastest_library():
    args = type("Arguments", (), {"rounds": 3, "seconds": 9})
    floor = {"slow": lambda: 2.0, "fast": lambda: 0.5}
    peers = harness.compare(lambda peer: lambda: 1.0, [HF_XLSTM, "llama"], 1, args, floor)
    assert peers.keys() == {HF_XLSTM, "llama", harness.LINEAR_FLOOR}
    assert peers[harness.LINEAR_FLOOR]["library"] == "fast"
    assert peers[harness.LINEAR_FLOOR]["tokens_per_second"] == 2.0
    assert peers[harness.LINEAR_FLOOR]["libraries"] == {"slow": 0.5, "fast": 2.0}


def test_cache_argument():
    """Every peer decodes from the cache under the name it is given: two halves give the logits of the whole."""
    ids = harness.random_tokens(1, 20)
    for peer in PEERS:
        model = harness.build(peer, "128x2", torch.float32)
        decoder = generation.Decoder(peer, model, ids[:, :10])
        assert decoder.argument == cache_argument(peer)
        generated = model.generate(ids[:, :10], max_new_tokens=2, do_sample=False)
        with torch.no_grad():
            whole = torch.cat([generated, ids[:, 10:]], dim=1)
            expected = model(whole, use_cache=False).logits[:, -1:].argmax(-1)
        decoder.read(whole[:, 11:])
        assert torch.equal(decoder.token, expected), peer


def results(machine: dict, rows: dict) -> str:
    versions = {"torch": "2.13.0", "transformers": "5.24.0"}
    return json.dumps({"machine": {"threads": 2, "capability": "AVX2"} | machine, "versions": versions, "rows": rows})


def speed(native: float, foreign: float, **others: dict) -> dict:
    ratio = {"in_tree": native / foreign}
    return {
        "peers": {HF_XLSTM: {"tokens_per_second": native, "ratio": ratio}, IN_TREE: {"tokens_per_second": foreign}}
        | others
    }


def test_tables(monkeypatch, tmp_path):
    """A group for each processor; files from before families and floors were recorded stay readable."""
    old, new = {"cpu": "AMD EPYC"}, {"cpu": "AMD EPYC", "family": "26", "model": "2"}
    floor = {harness.LINEAR_FLOOR: {"tokens_per_second": 321.0}}
    row = "decode/768x8/float32/batch-1"
    (tmp_path / "generation-cpu.json").write_text(results(old, {row: speed(80, 40, products={})}))
    (tmp_path / "generation-cpu-zen5.json").write_text(results(new, {row: speed(90, 30, **floor)}))
    (tmp_path / "training-cpu.json").write_text(results(old, {"training/768x8/float32/512": speed(50, 40)}))
    readme = tmp_path / "README.md"
    front = tmp_path / "front.md"
    for page in (readme, front):
        page.write_text("a\n<!-- results -->\n<!-- results:end -->\n" + GPU_PLACE + "b\n")
    run(monkeypatch, tables, "--results", str(tmp_path), "--readme", str(readme), "--front", str(front))
    assert "AMD EPYC (AVX2), relative to the xLSTM of Transformers: decoding 2.0 times as fast." in front.read_text()
    groups = readme.read_text().split("Tokens per second on a CPU: ")[1:]
    assert [group.split(" (AVX2)")[0] for group in groups] == [
        "2 threads of AMD EPYC, family 26 model 2",
        "2 threads of AMD EPYC",
    ]
    assert "| floor |" in groups[0] and "321" in groups[0] and "3.00x / –" in groups[0] and "training" not in groups[0]
    assert "floor" not in groups[1] and "2.00x / –" in groups[1] and "training 512" in groups[1]
    assert readme.read_text().startswith("a\n") and readme.read_text().endswith("b\n")


def test_table_of_exported_models(tmp_path):
    peers = {"hf_xlstm+eager-float32": 40.0, "hf_xlstm+onnx-int8": 81.0, "llama+eager-float32": 44.0}
    peers = {name: {"tokens_per_second": x, "ratio": {}} for name, x in peers.items()}
    taken = {"start_up_seconds": 1.25, "bytes": 56_000_000, "peak_megabytes": 210}
    rows = {
        "decode/512x12/batch-1": {"peers": peers},
        "start/512x12": {"peers": {"hf_xlstm+onnx-int8": taken}},
        "loss": {"model": "runs/quickstart", "routes": {"onnx-int8": {"bits_per_byte": 2.201, "lost": 0.0012}}},
    }
    file = json.loads(results({"cpu": "AMD EPYC"}, {}))
    (tmp_path / "exported-cpu.json").write_text(json.dumps(file | {"rows": rows}))
    title, *_, header, _, eager, int8, _ = tables.exported_text(tmp_path)
    assert "AMD EPYC" in title and "`runs/quickstart`" in title
    assert header.startswith("| weights, runtime | decode, batch 1: hf_xlstm / Llama | MB of files")
    assert eager == "| float32, PyTorch, not compiled | 40 / 44 |  |  |  |  |"
    assert int8 == "| int8, ONNX Runtime | 81 / – | 56 | 1.2 | 210 | 0.0012 |"
    baselines = {"hf_xlstm+eager-float32": 2.04}
    rows["decode/512x12/batch-1"]["peers"] = {
        f"hf_xlstm+openvino-{weights}": {"ratio": baselines | {f"llama+openvino-{weights}": 1.51}}
        for weights in ("float32", "int8", "int4")
    }
    (tmp_path / "exported-cpu.json").write_text(json.dumps(file | {"rows": rows}))
    (sentence,) = tables.exported_headline(tmp_path)
    assert sentence.endswith("float32 2.0 and 1.5, int8 2.0 and 1.5, int4 2.0 and 1.5 times as fast.\n")


def test_gpu_tables(monkeypatch, tmp_path):
    """Of a row that two runs have, the later counts, unless it failed; what nothing was measured of is left out."""
    environment = dict.fromkeys(("driver", "torch", "triton", "transformers"), "1") | {"device": "H100"}
    step, sequence = "ops/step/hf_xlstm/B=1", "ops/sequence/hf_xlstm/H=8/K=256/V=512/S=512"
    runs = [
        [{"id": step, "name": {}, "result": {"us": 7.0}}, {"id": sequence, "name": {}, "result": {"forward_ms": 9.0}}],
        [{"id": step, "name": {}, "failed": "it did"}, {"id": sequence, "name": {}, "result": {"forward_ms": 3.0}}],
    ]
    for i, rows in enumerate(runs):
        (tmp_path / f"gpu-{i}.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    text = tables.gpu_text(tmp_path, report.tables)
    assert text.startswith("On one H100, driver 1, torch 1") and "| 1 | 7.0 |" in text and "| 512 | 3 |" in text
    assert (
        "backward" not in text and "sLSTM" not in text and "9" not in text.split("bfloat16:")[1].replace("65,536", "")
    )
    targets = tables.gpu_text(tmp_path, report.targets)
    assert "| <= 2.5 ms | 3 ms | no |" in targets and "| <= 10 us | 7 us | yes |" in targets
    assert len(targets.splitlines()) == 6


def test_pages_have_the_committed_results(monkeypatch, tmp_path):
    pages = {"--readme": provenance.ROOT / "benchmarks" / "README.md", "--front": provenance.ROOT / "README.md"}
    copies = {option: tmp_path / option.strip("-") for option in pages}
    for option, page in pages.items():
        copies[option].write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    run(monkeypatch, tables, *(str(x) for pair in copies.items() for x in pair))
    for option, page in pages.items():
        assert copies[option].read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_plot(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    contexts = {length: {peer: {"tokens_per_second": 5, "cache_bytes": 9} for peer in plot.COLORS} for length in "48"}
    path = tmp_path / "results.json"
    path.write_text(results({"cpu": "AMD EPYC"}, {"context/512x12/float32": {"contexts": contexts}}))
    run(monkeypatch, plot, "--results", str(path), "--output", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_prompt_lookup_must_write_the_same_text(monkeypatch):
    texts = iter([[[1]], [[1]], [[2]]])
    monkeypatch.setattr(speculative, "decode", lambda *_: ({"tokens_per_second": 1.0}, next(texts)))
    monkeypatch.setattr(speculative, "learn", lambda *_: 0.0)
    args = type("Arguments", (), {"rounds": 1})
    with pytest.raises(AssertionError, match="another text"):
        speculative.measure(0, 1, [3], args)


def test_peers_have_about_one_size():
    models = {peer: harness.build(peer, "512x12", torch.float32, device="meta") for peer in PEERS}
    assert type(models[HF_XLSTM]) is xLSTMForCausalLM
    sizes = {peer: model.num_parameters() for peer, model in models.items()}
    assert max(sizes.values()) < 1.2 * min(sizes.values()), sizes
