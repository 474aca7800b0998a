"""Quantised weights in PyTorch: products for one token, and the memory that a 7B model takes.

product    one token times one matrix of 4,096 x 4,096, milliseconds by each kind of weight
memory     a random checkpoint of the shape of xLSTM-7b (13.7 GB, written to --checkpoint, or found there) is quantised
           while it is loaded, saved where that is possible, and generates a few tokens; each in a process of its own.
           Gigabytes at most of memory of the process (anonymous) and of its resident set, which also counts pages of
           mapped files (Linux)

Needs torchao and bitsandbytes.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BitsAndBytesConfig


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.exported import torchao_config
from benchmarks.cpu.harness import Measure, libraries, main, take_turns
from benchmarks.provenance import significant, timed
from hf_xlstm import xLSTMConfig, xLSTMForCausalLM
from hf_xlstm.linear import joint_linear


SEVEN_BILLION = {"vocab_size": 50304, "hidden_size": 4096, "num_hidden_layers": 32, "num_heads": 8}
TINY = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2}
TOKENS = 3


# ---- products


@torch.no_grad()
def product(width: int, args: argparse.Namespace) -> dict:
    from bitsandbytes.nn import Linear4bit
    from torchao.quantization import quantize_

    torch.manual_seed(0)
    x = torch.randn(1, 1, width, dtype=torch.bfloat16)
    layers = {"bfloat16": nn.Linear(width, width, bias=False, dtype=torch.bfloat16)}
    for bits in ("int8", "int4"):
        layers[bits] = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)
        quantize_(layers[bits], torchao_config(bits).quant_type)
    layers["nf4"] = Linear4bit(width, width, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    calls = {f"{name}, the layer itself": partial(layer, x) for name, layer in layers.items()}
    calls["int8, hf_xlstm"] = partial(joint_linear, x, layers["int8"])
    prepacked = libraries(layers["bfloat16"].weight, 1)["onednn_prepacked"]
    calls["bfloat16, prepacked"] = partial(prepacked, x)
    turns = {name: timed(call, least_seconds=0.05) for name, call in calls.items()}
    times = take_turns(turns, args.rounds, args.seconds)
    return {"milliseconds": {name: significant(1e3 * statistics.median(x), 3) for name, x in times.items()}}


# ---- memory


def write_checkpoint(sizes: dict[str, int], directory: Path) -> None:
    """Random bfloat16 weights, a file for each block, which all hold the same numbers."""
    config = xLSTMConfig(**sizes, tie_word_embeddings=False, architectures=["xLSTMForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in xLSTMForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    numbers = torch.randn(2**22 + 7).mul_(0.02).bfloat16()

    def tensor(name: str) -> torch.Tensor:
        shape = shapes[name]
        if len(shape) == 1:  # weights of norms, and biases of gates at which the state neither grows nor empties
            return torch.full(shape, {"i": -10.0, "f": 4.0}.get(name.partition("gate_preact")[0][-1], 1.0)).bfloat16()
        return numbers.repeat(-(-shape.numel() // len(numbers)))[: shape.numel()].view(shape)

    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".")[2] if ".blocks." in name else name, []).append(name)
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, names in enumerate(groups.values(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: tensor(name) for name in names}, directory / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(2 * x.numel() for x in shapes.values())}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(directory)  # last: says that the checkpoint is whole


class PeakMemory(threading.Thread):
    """Looks every 20 ms. The kernel keeps a high-water mark of the resident set only."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = {"RssAnon": 0.0, "VmRSS": 0.0}
        self.start()

    def run(self) -> None:
        while True:
            for name, value in self.now().items():
                self.peak[name] = max(self.peak[name], value)
            time.sleep(0.02)

    def now(self) -> dict[str, float]:
        lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
        return {name: int(value.split()[0]) / 1e6 for name, _, value in lines if name in self.peak}

    def gigabytes(self) -> dict[str, float]:
        return {
            "peak_anonymous": significant(self.peak["RssAnon"], 3),
            "peak_resident": significant(self.peak["VmRSS"], 3),
            "anonymous": significant(self.now()["RssAnon"], 3),
        }


def load_and_use(checkpoint: Path, kind: str | None, saved: Path | None) -> dict:
    memory, options = PeakMemory(), {}
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    elif kind is not None:
        options["quantization_config"] = torchao_config(kind)
    model = xLSTMForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map={"": "cpu"}, **options)
    results = {"loaded": memory.gigabytes()}
    if saved is not None:
        model.save_pretrained(saved)
        size = sum(path.stat().st_size for path in saved.iterdir())
        return results | {"saved": memory.gigabytes() | {"on_disk": significant(size / 1e9, 3)}}
    tokens = model.generate(torch.arange(5)[None], max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    return results | {"generated": memory.gigabytes() | {"tokens": tokens.shape[1] - 5}}


def alone(*arguments) -> dict:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(load_and_use, *arguments).result()


def memory(sizes: dict[str, int], kind: str, args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = args.checkpoint or Path(scratch) / "checkpoint"
        if not (checkpoint / "config.json").exists():
            write_checkpoint(sizes, checkpoint)
        if kind == "int4":  # torchao refuses to save these
            return {"gigabytes": {"quantised": alone(checkpoint, kind, None)}}
        saved = Path(scratch) / "saved"
        return {"gigabytes": {"quantised": alone(checkpoint, kind, saved), "reloaded": alone(saved, None, None)}}


def rows(quick: bool) -> dict[str, Measure]:
    sizes, name, width = (TINY, "tiny", 128) if quick else (SEVEN_BILLION, "7b", 4096)
    table: dict[str, Measure] = {f"product/{width}": partial(product, width)}
    return table | {f"memory/{name}/{kind}": partial(memory, sizes, kind) for kind in ("int4", "nf4")}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, help="write the random checkpoint here, or take it from here")


if __name__ == "__main__":
    main("quantized", __doc__, rows, add_options)
