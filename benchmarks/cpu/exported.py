"""Models exported to OpenVINO and ONNX Runtime, beside the same models in PyTorch and Llama by the same routes.

decode     single-token steps, from a prompt of 64 tokens on
prefill    reading a prompt, for the logits of its last token
start      bytes of the files, seconds until a model can be called, and what loading and using one adds to the resident
           set of a process
loss       bits per byte of a trained model (--model, --text), and what each route loses

A route is "eager-" or the name of a runtime, and the weights: eager int8 and int4 are bfloat16 models that torchao
quantises while they are loaded. Llama takes keys and values as arguments and returns them, as the xLSTM does its
state; at a prompt of 64 tokens that costs next to nothing.
"""

import argparse
import copy
import functools
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM, PreTrainedModel, TorchAoConfig


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.generation import NEW_TOKENS, PROMPT_LENGTH
from benchmarks.cpu.harness import Measure, Turn, build, main, peak_memory, random_tokens, summarize, take_turns
from benchmarks.peers import HF_XLSTM, cache_argument, cache_of
from benchmarks.provenance import commit, relative_error, seconds, significant
from hf_xlstm import xLSTMForCausalLM
from hf_xlstm.commands.helpers.bits_per_byte import bits_per_byte
from hf_xlstm.export import (
    PROGRAMS,
    RUNTIMES,
    export_onnx,
    share_weights,
    write_programs,
    xLSTMExportedForCausalLM,
)
from hf_xlstm.files import appearing


LLAMA = "llama"
EAGER = "eager-float32"
EXPORTED = ("openvino-float32", "openvino-int8", "openvino-int4", "onnx-float32", "onnx-int8")
TEXT_BYTES = 100_000

_scratch = tempfile.TemporaryDirectory()


def routes(quick: bool) -> tuple[str, ...]:
    if quick:
        return EAGER, "openvino-float32"
    torchao = ["eager-int8", "eager-int4"] if importlib.util.find_spec("torchao") else []
    return EAGER, "eager-bfloat16", *torchao, *EXPORTED


# ---- Llama, exported


class LlamaStep(nn.Module):
    """Logits of the last token, and the keys and values of all of them."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, state: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = DynamicCache(config=self.model.config)
        for layer in range(len(state) // 2):
            cache.update(state[2 * layer], state[2 * layer + 1], layer)
        past = state[0].shape[2] if state else 0
        positions = torch.arange(input_ids.shape[1])[None] + past
        options = {cache_argument(LLAMA): cache, "position_ids": positions, "logits_to_keep": 1}
        outputs = self.model(input_ids, use_cache=True, **options)
        return outputs.logits, [x for layer in cache_of(outputs).layers for x in (layer.keys, layer.values)]


@torch.no_grad()
def llama_onnx(model: PreTrainedModel, directory: Path) -> dict[str, Path]:
    """As `hf_xlstm.export.export_onnx`."""
    step, auto = LlamaStep(model).eval(), torch.export.Dim.AUTO
    ids = random_tokens(2, 9)
    _, state = step(ids, [])
    names = [f"state.{i}" for i in range(len(state))]
    paths = {}
    for program, arguments, dynamic, inputs in (
        ("prefill", (ids, []), ({0: auto, 1: auto}, []), []),
        ("decode", (ids[:, :1], state), ({0: auto}, [{0: auto, 2: auto}] * len(state)), names),
    ):
        path = paths[program] = directory / f"{program}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(step, arguments, dynamic_shapes=dynamic, strict=False)
            inputs, outputs = ["input_ids", *inputs], ["logits", *(f"new_{name}" for name in names)]
            torch.onnx.export(exported, f=path, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    return paths


def write_llama(
    model: PreTrainedModel, onnx_files: dict[str, Path], directory: Path, format: str, weights: str
) -> None:
    """As `hf_xlstm.export.write_programs`."""
    for program, path in onnx_files.items():
        RUNTIMES[format].save(path, directory / program, weights, "")
    if format == "openvino":
        share_weights(directory)


class ExportedLlama:
    """Called as the model is."""

    def __init__(self, directory: Path, format: str):
        suffix = RUNTIMES[format].suffix
        self.prefill, self.decode = (RUNTIMES[format](directory / f"{program}{suffix}") for program in PROGRAMS)
        self.states = sum(name.startswith("state.") for name in self.decode.inputs)  # keys and values of every layer

    def __call__(self, input_ids: torch.Tensor, cache: dict | None = None, **options) -> SimpleNamespace:
        """The cache is a dictionary of arrays, which is updated."""
        inputs = {"input_ids": input_ids.numpy()}
        if cache:
            results = self.decode(inputs | {f"state.{i}": x for i, x in cache.items()})
        else:
            cache, results = {}, self.prefill(inputs)
        # copies, because the next call overwrites the results
        cache |= {i: results[f"new_state.{i}"].copy() for i in range(self.states)}
        return SimpleNamespace(logits=torch.from_numpy(results["logits"].copy()), cache=cache)


# ---- models by a route


class Models:
    """Models of one name, which `build(peer)` makes, in a directory for each peer and route. What `exports` has is
    taken from there; a directory without commit.txt, which is written last, is incomplete."""

    def __init__(self, name: str, build: Callable[[str], PreTrainedModel], exports: Path):
        self.name, self.build, self.exports = name, functools.cache(build), exports

    def directory(self, peer: str, route: str) -> Path:
        kind, weights = route.split("-")
        if kind == "eager":
            weights = "float32" if weights == "float32" else "bfloat16"
        path = self.exports / f"{peer}-{self.name}-{kind}-{weights}"
        if (path / "commit.txt").exists():
            return path
        path.mkdir(parents=True, exist_ok=True)
        if kind == "eager":
            copy.deepcopy(self.build(peer)).to(getattr(torch, weights)).save_pretrained(path)
        else:
            write = write_llama if peer == LLAMA else write_programs
            write(self.build(peer), self._onnx(peer), path, kind, weights)
        (path / "commit.txt").write_text(commit())
        return path

    def _onnx(self, peer: str) -> dict[str, Path]:
        """Both programs, from which those of all runtimes are made."""
        path = self.exports / f"{peer}-{self.name}-source"
        if not path.exists():
            with appearing(path) as target:
                (llama_onnx if peer == LLAMA else export_onnx)(self.build(peer), target)
        return {program: path / f"{program}.onnx" for program in PROGRAMS}


def load(peer: str, directory: Path, route: str):
    """The model in a directory, ready to be called."""
    kind, weights = route.split("-")
    if kind != "eager":
        exported = peer == HF_XLSTM
        return xLSTMExportedForCausalLM.from_pretrained(directory) if exported else ExportedLlama(directory, kind)
    options = {"dtype": torch.float32 if weights == "float32" else torch.bfloat16}
    if weights in ("int8", "int4"):
        options["quantization_config"] = torchao_config(weights)
    model_class = LlamaForCausalLM if peer == LLAMA else xLSTMForCausalLM
    model = model_class.from_pretrained(directory, **options).eval()
    if peer == HF_XLSTM:
        model.pack_for_decoding()
    return model


def torchao_config(weights: str) -> TorchAoConfig:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig

    int4 = PrototypeInt4WeightOnlyConfig(group_size=64, set_inductor_config=False)
    return TorchAoConfig(int4 if weights == "int4" else Int8WeightOnlyConfig())


@functools.cache
@torch.no_grad()
def models(size: str, peers: tuple[str, ...], routes: tuple[str, ...], exports: Path) -> dict[str, Path]:
    """Directories of all models of a size, by "<peer>+<route>". None is measured before the float32 routes compute
    what PyTorch does."""
    made = Models(size, partial(build, size=size, dtype=torch.float32), exports)
    directories, ids = {}, random_tokens(2, 100)
    for peer in peers:
        for route in routes:
            directory = directories[f"{peer}+{route}"] = made.directory(peer, route)
            if route.endswith("float32"):
                logits = [
                    model(ids, logits_to_keep=1).logits for model in (load(peer, directory, route), made.build(peer))
                ]
                error = relative_error(*logits)
                if error > 1e-4:
                    raise AssertionError(f"{peer} by {route} is off by {error:.2g}.")
    return directories


def selected(size: str, args: argparse.Namespace) -> dict[str, Path]:
    peers = tuple(peer for peer in (HF_XLSTM, LLAMA) if peer in args.peers)
    return models(size, peers, routes(args.quick), args.exports)


# ---- measurements


def decode_turn(peer: str, model, batch_size: int) -> Turn:
    argument = cache_argument(peer)
    outputs = model(random_tokens(batch_size, PROMPT_LENGTH), use_cache=True, logits_to_keep=1)
    cache, token = cache_of(outputs), outputs.logits[:, -1:].argmax(-1)

    def step() -> None:
        nonlocal token
        token = model(token, use_cache=True, **{argument: cache}).logits[:, -1:].argmax(-1)

    step()
    return lambda: NEW_TOKENS * seconds(step, NEW_TOKENS)


def prefill_turn(peer: str, model, length: int) -> Turn:
    ids = random_tokens(1, length)
    model(ids[:, :128], use_cache=True, logits_to_keep=1)
    return partial(seconds, lambda: model(ids, use_cache=True, logits_to_keep=1))


@torch.no_grad()
def speed(size: str, start, tokens: int, args: argparse.Namespace) -> dict:
    """Speeds relative to PyTorch, and to Llama by the same route. `start(peer, model)` prepares a turn."""
    turns = {}
    for name, directory in selected(size, args).items():
        peer, _, route = name.partition("+")
        turns[name] = start(peer, load(peer, directory, route))
    times = take_turns(turns, args.rounds, args.seconds)
    results = {}
    for name in times:
        peer, _, route = name.partition("+")
        baselines = [f"{peer}+{EAGER}", f"{peer}+eager-bfloat16", f"{LLAMA}+{route}"]
        results[name] = summarize(times, tokens, baselines)[name]
    return {"peers": results}


def start_up(size: str, args: argparse.Namespace) -> dict:
    results = {}
    for name, directory in selected(size, args).items():
        peer, _, route = name.partition("+")
        results[name] = {
            "start_up_seconds": significant(seconds(lambda: load(peer, directory, route))),  # noqa: B023
            "bytes": sum(path.stat().st_size for path in directory.iterdir()),
            "exported_at": (directory / "commit.txt").read_text(),
        }
        results[name] |= peak_memory(partial(first_reply, directory=directory, route=route), peer)
    return {"peers": results}


def first_reply(peer: str, directory: Path, route: str) -> Turn:
    """Loading a model, reading 512 tokens, and a few steps."""

    def turn() -> float:
        model = load(peer, directory, route)
        with torch.no_grad():
            prefill_turn(peer, model, 512)()
            return decode_turn(peer, model, 1)()

    return turn


def loss(args: argparse.Namespace) -> dict:
    if args.model is None or args.text is None:
        raise SystemExit("The row `loss` needs a trained model and a text: --model and --text.")
    text = args.text.read_bytes()[:TEXT_BYTES].decode(errors="ignore")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trained = xLSTMForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    made, bits = Models(args.model.name, lambda peer: trained, args.exports), {}
    for route in routes(args.quick):
        bits[route] = bits_per_byte(load(HF_XLSTM, made.directory(HF_XLSTM, route), route), tokenizer, [text])
    results = {route: {"bits_per_byte": x, "lost": significant(x - bits[EAGER], 2)} for route, x in bits.items()}
    return {"model": str(args.model), "bytes": len(text.encode()), "routes": results}


def rows(quick: bool) -> dict[str, Measure]:
    sizes, batch_sizes, length = (["128x2"], [2], 192) if quick else (["768x8", "512x12", "1024x9"], [1, 8], 2048)
    table = {}
    for size in sizes:
        for batch_size in batch_sizes:
            start = partial(decode_turn, batch_size=batch_size)
            table[f"decode/{size}/batch-{batch_size}"] = partial(speed, size, start, NEW_TOKENS * batch_size)
        table[f"prefill/{size}/{length}"] = partial(speed, size, partial(prefill_turn, length=length), length)
        table[f"start/{size}"] = partial(start_up, size)
    return table | {"loss": loss}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--exports", type=Path, default=Path(_scratch.name), help="keep models here, and use those that are there"
    )
    parser.add_argument("--model", type=Path, help="a trained model, for the row `loss`")
    parser.add_argument("--text", type=Path, help="what it is measured on, the first 100 kB")


if __name__ == "__main__":
    with _scratch:
        main("exported", __doc__, rows, add_options)
