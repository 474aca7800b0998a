"""What the CPU benchmarks share: models of one size, peers that take turns, and result files that grow row by row."""

import argparse
import copy
import functools
import gc
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from benchmarks import peers, provenance
from benchmarks.peers import HF_XLSTM, IN_TREE, PEERS
from benchmarks.provenance import RESULTS, relative_error, significant, timed


BASELINES = (IN_TREE, "llama")  # speeds are given relative to these
COMPILED = "+compile"  # after the name of a peer
LINEAR_FLOOR = "linear_floor"
VOCAB_SIZE, NUM_HEADS = 16384, 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Turn = Callable[[], float]  # does the work once and returns the seconds it took
Start = Callable[[str], Turn]  # prepares the work of one peer and warms it up
Measure = Callable[[argparse.Namespace], dict]


# Models


def build(peer: str, size: str, dtype: torch.dtype, **fields) -> PreTrainedModel:
    """A peer; `size` is "<hidden size>x<layers>" of the xLSTM. `fields` go to its configuration."""
    hidden_size, layers = map(int, size.split("x"))
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": hidden_size, "num_hidden_layers": layers}
    return peers.build(peer, **sizes, num_heads=NUM_HEADS, dtype=dtype, **fields)


def random_tokens(batch_size: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(0))


@functools.cache
def assert_as_exact_as_in_tree(size: str) -> dict[str, dict[str, float]]:
    """Relative errors of hf_xlstm and of the xLSTM of Transformers in float32, with the same weights, against float64:
    logits of a ragged prompt, logits of `generate`, and the gradient. No number is written before they compare.

    A random model now and then divides by a normalizer close to zero, which multiplies rounding errors by anything up
    to 1e5, in either implementation, so a bound can only be relative to the other's. In 19 draws hf_xlstm's error of
    the gradient was 0.3 to 3.1 times that of Transformers; a wrong term in it is another matter than a factor of ten.
    """
    foreign = build(IN_TREE, size, torch.float32)
    native = build(HF_XLSTM, size, torch.float32)
    native.load_state_dict(foreign.state_dict())
    exact = copy.deepcopy(native).double()
    ids = random_tokens(2, 200)

    def outputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        generated = torch.stack(model.generate(ids, **options).logits)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for _, parameter in sorted(model.named_parameters())])
        return {"logits": logits, "generate": generated, "gradient": gradient}

    expected, actual = outputs(exact), {HF_XLSTM: outputs(native), IN_TREE: outputs(foreign)}
    errors = {
        name: {peer: significant(relative_error(x[name], expected[name]), 2) for peer, x in actual.items()}
        for name in expected
    }
    if not all(error[HF_XLSTM] < 10 * error[IN_TREE] < 0.5 for error in errors.values()):
        raise AssertionError(f"hf_xlstm is less exact than the xLSTM of Transformers at {size}: {errors}.")
    return errors


# Measurements


def take_turns(turns: dict[str, Turn], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Every peer once per round, so that they meet the same machine; one that has used up `seconds` sits out."""
    times: dict[str, list[float]] = {peer: [] for peer in turns}
    for _ in range(rounds):
        for peer, turn in turns.items():
            if sum(times[peer]) < seconds:
                times[peer].append(turn())
    return times


def summarize(times: dict[str, list[float]], tokens: int, baselines: Iterable[str] = BASELINES) -> dict[str, dict]:
    """Tokens per second of each peer, and its speed relative to the baselines: medians over the rounds."""

    def ratio(peer: str, baseline: str) -> float:
        return significant(statistics.median(b / s for b, s in zip(times[baseline], times[peer], strict=False)))

    return {
        peer: {
            "tokens_per_second": significant(tokens / statistics.median(seconds)),
            "ratio": {baseline: ratio(peer, baseline) for baseline in baselines if baseline in times},
            "rounds": len(seconds),
        }
        for peer, seconds in times.items()
    }


def compare(
    start: Start,
    peers: Iterable[str],
    tokens: int,
    args: argparse.Namespace,
    floor: dict[str, Turn] | None = None,
    baselines: Iterable[str] = BASELINES,
) -> dict[str, dict]:
    """Speed of each peer at work that comes to `tokens` per turn. Where in-tree xLSTM cannot do it, its error. The
    libraries of `floor` take their turns with the peers, and the fastest is an entry of its own."""
    turns, failed = {}, {}
    for peer in peers:
        try:
            turns[peer] = start(peer)
        except RuntimeError as error:
            if peer != IN_TREE:
                raise
            failed[peer] = {"error": str(error).splitlines()[0]}
    results = summarize(take_turns(turns | (floor or {}), args.rounds, args.seconds), tokens, baselines)
    speeds = {library: results.pop(library) for library in floor or {}}
    if speeds:
        fastest = max(speeds, key=lambda library: speeds[library]["tokens_per_second"])
        others = {library: result["tokens_per_second"] for library, result in speeds.items()}
        results[LINEAR_FLOOR] = speeds[fastest] | {"library": fastest, "libraries": others}
    return results | failed


def libraries(weight: torch.Tensor, rows: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Every way to a product with `weight` that PyTorch ships: its default, which is MKL for float32 on x86 and oneDNN
    for bfloat16; oneDNN; oneDNN with the weight laid out for it beforehand; and a bfloat16 product in float32, which
    processors without bfloat16 compute sooner."""
    functions = {"default": lambda x: F.linear(x, weight)}
    if torch.backends.mkldnn.is_available():
        prepacked = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        for name, operand in (("onednn", weight), ("onednn_prepacked", prepacked)):
            functions[name] = functools.partial(_onednn, weight=operand)
        if weight.dtype == torch.bfloat16:
            wide = torch.ops.mkldnn._reorder_linear_weight(weight.float(), rows)
            functions["onednn_float32"] = lambda x: _onednn(x.float(), wide).bfloat16()
    return functions


def _onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def linear_floor(size: str, dtype: torch.dtype, rows: int, head_rows: int) -> dict[str, Turn]:
    """Lower bounds for the seconds of a step or a prompt: products of `rows` tokens with every weight, each read once,
    in the model's order, and nothing else. Neighbours with inputs of one width are one product, so no model makes
    fewer calls. One turn for each library; the floor is the fastest of them in the same process, since which it is
    depends on the processor."""
    model = build(HF_XLSTM, size, dtype)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    products: dict[str, list[Callable[[], torch.Tensor]]] = {}
    for (width, is_head), neighbours in groupby(layers, lambda layer: (layer.in_features, layer is model.lm_head)):
        weight = torch.cat([layer.weight.detach() for layer in neighbours])
        x = torch.randn(head_rows if is_head else rows, width, dtype=dtype)
        for name, function in libraries(weight, len(x)).items():
            products.setdefault(name, []).append(functools.partial(function, x))
    return {name: timed(functools.partial(_call_all, calls), least_seconds=0.1) for name, calls in products.items()}


def _call_all(functions: list[Callable[[], torch.Tensor]]) -> None:
    for function in functions:
        function()


@functools.cache
def copy_bandwidth(megabytes: int = 256) -> float:
    """Gigabytes per second, read and written, of a copy much larger than the caches."""
    source = torch.ones(megabytes * 2**20 // 4)
    copy = timed(functools.partial(torch.empty_like(source).copy_, source))
    return 2 * source.nbytes / statistics.median(copy() for _ in range(5)) / 1e9


def peak_memory(start: Start, peer: str) -> dict[str, float]:
    """Megabytes by which one turn raises the resident set of a process of its own (Linux)."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_peak_memory, start, peer).result()


def _peak_memory(start: Start, peer: str) -> dict[str, float | str]:
    def resident(field: str) -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0]) / 1024

    try:
        turn = start(peer)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = resident("VmRSS")
        turn()
    except RuntimeError as error:
        if peer != IN_TREE:
            raise
        return {"error": str(error).splitlines()[0]}
    return {"peak_megabytes": round(resident("VmHWM") - before)}


# The command line and the result file


def main(
    name: str,
    description: str,
    rows: Callable[[bool], dict[str, Measure]],
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Measures the rows of a benchmark that `--only` selects, and merges them into its result file one by one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="rows to measure, e.g. 'prefill/*'"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="models to compare")
    parser.add_argument("--rounds", type=int, default=5, help="turns per peer and row (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=12, help="a peer that used these sits out the other rounds")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: tiny models, one round, no file by default"
    )
    parser.add_argument("--output", type=Path, help=f"default: results/{name}-cpu.json; another machine: another file")
    add_options(parser)
    args = parser.parse_args()
    selected = select(rows(args.quick), args.only)
    if not selected:
        parser.error(f"no row matches {' '.join(args.only)}; --list shows them")
    if args.list:
        print("\n".join(selected))
        return
    if args.quick:
        args.rounds = 1
    output = args.output or (None if args.quick else RESULTS / f"{name}-cpu.json")
    for row, measure in selected.items():
        result = measure(args) | origin()
        print(f"{row}: {json.dumps(result)}", flush=True)
        if output:
            merge(output, row, result)
        gc.collect()


def select(rows: dict[str, Measure], patterns: list[str]) -> dict[str, Measure]:
    return {row: measure for row, measure in rows.items() if any(fnmatch(row, pattern) for pattern in patterns)}


def merge(path: Path, row: str, result: dict) -> None:
    """Puts a row into the result file. A file holds the results of one machine and one set of versions."""
    header = {"machine": provenance.machine(), "versions": provenance.versions("torch", "transformers")}
    results = json.loads(path.read_text()) if path.exists() else header | {"rows": {}}
    for key, value in header.items():
        if results.get(key) != value:
            message = f"{path.name} has the {key} {results.get(key)}, here it is {value}: start a new file (--output)."
            raise SystemExit(message)
    results["rows"][row] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


def origin() -> dict[str, str | float]:
    """Where a row comes from: code, command, day, processor, and how fast memory was in that process."""
    return provenance.origin() | {
        "processor": provenance.processor(provenance.machine()),
        "copy_gigabytes_per_second": significant(copy_bandwidth(), 3),
    }
