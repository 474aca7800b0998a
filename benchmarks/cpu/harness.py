"""What the CPU benchmarks share: models of one size, peers that take turns, and result files that grow row by row."""

import argparse
import copy
import datetime
import functools
import gc
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import hf_xlstm


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

OURS, IN_TREE = "hf_xlstm", "in_tree"
PEERS = {
    OURS: "hf_xlstm",
    IN_TREE: "xLSTM of Transformers",
    "llama": "Llama",
    "mamba2": "Mamba-2",
    "deltanet": "gated DeltaNet",
}
BASELINES = (IN_TREE, "llama")  # speeds are given relative to these
VOCAB_SIZE, NUM_HEADS = 16384, 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

transformers.logging.set_verbosity_error()  # which optional packages peers would like is not the question here

Turn = Callable[[], float]  # does the work once and returns the seconds it took
Start = Callable[[str], Turn]  # prepares the work of one peer and warms it up
Measure = Callable[[argparse.Namespace], dict]


# Models


def build(peer: str, size: str, dtype: torch.dtype, **fields) -> PreTrainedModel:
    """A random model in eval mode; `size` is "<hidden size>x<layers>" of the xLSTM, and the others have about as many
    parameters. `fields` go to the config of hf_xlstm."""
    hidden_size, layers = map(int, size.split("x"))
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": hidden_size, "num_hidden_layers": layers}
    sizes |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # generation never ends early
    xlstm = hf_xlstm.xLSTMConfig(**sizes, num_heads=NUM_HEADS, **fields)
    torch.manual_seed(0)
    if peer == OURS:
        model = open_gates(hf_xlstm.xLSTMForCausalLM(xlstm))
    elif peer == IN_TREE:
        model = open_gates(transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**sizes, num_heads=NUM_HEADS)))
    elif peer == "llama":
        attention = {"num_attention_heads": hidden_size // 64, "attn_implementation": "sdpa"}
        config = transformers.LlamaConfig(**sizes, intermediate_size=xlstm.ffn_dim, **attention)
        model = transformers.LlamaForCausalLM(config)
    elif peer == "mamba2":
        sizes["num_hidden_layers"] *= 2  # a block has no feed-forward layer
        config = transformers.Mamba2Config(**sizes, num_heads=hidden_size // 32, head_dim=64, n_groups=1)
        model = transformers.Mamba2ForCausalLM(config)
    elif peer == "deltanet":
        # Qwen3.5 with the heads of the xLSTM. Its cache needs one layer of attention, which is the last one.
        config = Qwen3_5TextConfig(
            **sizes,
            intermediate_size=xlstm.ffn_dim,
            layer_types=["linear_attention"] * (layers - 1) + ["full_attention"],
            num_attention_heads=hidden_size // 64,
            num_key_value_heads=hidden_size // 64,
            head_dim=64,
            linear_num_key_heads=NUM_HEADS,
            linear_num_value_heads=NUM_HEADS,
            linear_key_head_dim=xlstm.qk_head_dim,
            linear_value_head_dim=xlstm.v_head_dim,
        )
        model = Qwen3_5ForCausalLM(config)
    else:
        raise ValueError(f"Unknown peer {peer!r}.")
    return model.to(dtype).eval()


@torch.no_grad()
def open_gates(model: PreTrainedModel) -> PreTrainedModel:
    """An mLSTM as initialised stores next to nothing: here the gates depend on the input and let it in."""
    for name, parameter in model.named_parameters():
        if name.endswith("igate_preact.bias"):
            parameter.zero_()
        elif parameter.ndim == 2:
            parameter.normal_(std=0.02)
    return model


def random_tokens(batch_size: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(0))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@functools.cache
def assert_as_exact_as_in_tree(size: str) -> dict[str, dict[str, float]]:
    """Relative errors of hf_xlstm and of the xLSTM of Transformers in float32, with the same weights, against float64:
    logits of a ragged prompt, logits of `generate`, and the gradient. No number is written before they compare.

    A random model now and then divides by a normalizer close to zero, which multiplies rounding errors by anything up
    to 1e5, theirs and ours alike, so a bound can only be relative to theirs. In 19 draws our error of the gradient was
    0.3 to 3.1 times theirs; a wrong term in it is another matter than a factor of ten.
    """
    theirs = build(IN_TREE, size, torch.float32)
    ours = build(OURS, size, torch.float32)
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(ours).double()
    ids = random_tokens(2, 200)

    def outputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        generated = torch.stack(model.generate(ids, **options).logits)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for _, parameter in sorted(model.named_parameters())])
        return {"logits": logits, "generate": generated, "gradient": gradient}

    expected, actual = outputs(exact), {OURS: outputs(ours), IN_TREE: outputs(theirs)}
    errors = {
        name: {peer: significant(relative_error(x[name], expected[name]), 2) for peer, x in actual.items()}
        for name in expected
    }
    if not all(error[OURS] < 10 * error[IN_TREE] < 0.5 for error in errors.values()):
        raise AssertionError(f"hf_xlstm is less exact than the xLSTM of Transformers at {size}: {errors}.")
    return errors


# Measurements


def timed(function: Callable[[], object], least_seconds: float = 0.02) -> Turn:
    """Calls a function so often that one turn takes long enough to be timed, and returns the seconds per call."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    calls = 1 if seconds(1) > 1 else math.ceil(least_seconds / seconds(1))
    return functools.partial(seconds, calls)


def take_turns(turns: dict[str, Turn], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Every peer once per round, so that they meet the same machine; one that has used up `seconds` sits out."""
    times: dict[str, list[float]] = {peer: [] for peer in turns}
    for _ in range(rounds):
        for peer, turn in turns.items():
            if sum(times[peer]) < seconds:
                times[peer].append(turn())
    return times


def significant(x: float, digits: int = 4) -> float:
    return float(f"{x:.{digits}g}")


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


def compare(start: Start, peers: Iterable[str], tokens: int, args: argparse.Namespace, **options) -> dict[str, dict]:
    """Speed of each peer at work that comes to `tokens` per turn. Where in-tree xLSTM cannot do it, its error."""
    turns, failed = {}, {}
    for peer in peers:
        try:
            turns[peer] = start(peer)
        except RuntimeError as error:
            if peer != IN_TREE:
                raise
            failed[peer] = {"error": str(error).splitlines()[0]}
    return summarize(take_turns(turns, args.rounds, args.seconds), tokens, **options) | failed


def products(size: str, dtype: torch.dtype, rows: int, head_rows: int) -> Turn:
    """The floor: `F.linear` with every weight of the model, for that many tokens at once, and nothing else."""
    model = build(OURS, size, dtype)
    linears = [x for x in model.modules() if isinstance(x, nn.Linear)]
    sizes = [(head_rows if x is model.lm_head else rows, x.in_features) for x in linears]
    inputs = [(torch.randn(*shape, dtype=dtype), x.weight.detach()) for shape, x in zip(sizes, linears, strict=True)]
    return timed(lambda: [F.linear(x, weight) for x, weight in inputs], least_seconds=0.1)


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


def _peak_memory(start: Start, peer: str) -> dict[str, float]:
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


def main(name: str, description: str, rows: Callable[[bool], dict[str, Measure]]) -> None:
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
    parser.add_argument("--output", type=Path, help=f"default: benchmarks/results/{name}-cpu.json")
    args = parser.parse_args()
    selected = {row: measure for row, measure in rows(args.quick).items() if any(fnmatch(row, x) for x in args.only)}
    if not selected:
        parser.error(f"no row matches {' '.join(args.only)}; --list shows them")
    if args.list:
        print("\n".join(selected))
        return
    if args.quick:
        args.rounds = 1
    output = args.output or (None if args.quick else RESULTS / f"{name}-cpu.json")
    for row, measure in selected.items():
        result = measure(args) | provenance()
        print(f"{row}: {json.dumps(result)}", flush=True)
        if output:
            merge(output, row, result)
        gc.collect()


def merge(path: Path, row: str, result: dict) -> None:
    """Puts a row into the result file. A file holds the results of one machine and one set of versions."""
    header = {"machine": machine(), "versions": versions()}
    results = json.loads(path.read_text()) if path.exists() else header | {"rows": {}}
    for key, value in header.items():
        if results[key] != value:
            raise SystemExit(f"{path.name} has the {key} {results[key]}, here it is {value}: start a new file.")
    results["rows"][row] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


def machine() -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    packages = {"torch": torch.__version__, "transformers": transformers.__version__, "hf_xlstm": hf_xlstm.__version__}
    return {"python": platform.python_version(), **packages}


def provenance() -> dict[str, str | float]:
    """Where a row comes from: code, command, day, and how fast memory was in that process."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", ROOT, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return {
        "commit": (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else ""),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "copy_gigabytes_per_second": significant(copy_bandwidth(), 3),
    }
