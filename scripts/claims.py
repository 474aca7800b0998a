"""What the xLSTM architecture promises, shown with small models in minutes on two CPU cores.

    python scripts/claims.py [--only NAME ...] [--output docs/claims] [--seeds 3]

Every claim is measured through the package's public functions, judged against a threshold that stands beside it, and
written to the output directory: results.json, a table in README.md, and plots. The exit status is 1 if one fails.
"""

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hf_xlstm import xLSTMConfig, xLSTMForCausalLM, xLSTMModel
from hf_xlstm.cells.slstm.reference import slstm_cell, zero_slstm_state
from hf_xlstm.modeling_xlstm import xLSTMsLSTMLayer
from hf_xlstm.ops import mlstm, mlstm_step
from report import markdown_table, plt


Batch = tuple[torch.Tensor, torch.Tensor]  # inputs; targets, -100 where there is nothing to say
CLAIMS: dict[str, Callable[[int, Path], list[dict]]] = {}


def claim(title: str):
    def register(function):
        function.title = title
        CLAIMS[function.__name__] = function
        return function

    return register


def row(name: str, values: list[float], at_least: float | None = None, at_most: float | None = None) -> dict:
    """One line of a table: the median of `values` must not be below `at_least` nor above `at_most`."""
    median = statistics.median(values)
    holds = (at_least is None or median >= at_least) and (at_most is None or median <= at_most)
    return {"name": name, "values": values, "median": median, "at_least": at_least, "at_most": at_most, "holds": holds}


# --- small models and how they learn ---------------------------------------------------------------------------------


class Learner(nn.Module):
    """A sequence model between an input and an output map."""

    def __init__(self, encoder: nn.Module, body: nn.Module, width: int, outputs: int):
        super().__init__()
        self.encoder, self.body, self.decoder = encoder, body, nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x)
        x = self.body(x)[0] if isinstance(self.body, nn.LSTM) else self.body(inputs_embeds=x).last_hidden_state
        return self.decoder(x)


def xlstm(layer_types: list[str], width: int, heads: int, **fields) -> xLSTMModel:
    config = xLSTMConfig(
        vocab_size=1,
        hidden_size=width,
        num_hidden_layers=len(layer_types),
        num_heads=heads,
        layer_types=layer_types,
        ffn_round_up_to_multiple_of=1,
        slstm_recurrent_init="uniform",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        **fields,
    )
    return xLSTMModel(config)


def freeze_recurrence(model: xLSTMModel) -> None:
    """An sLSTM that does not see its own output: the gates depend on the input alone, as the mLSTM's do."""
    for block in model.blocks:
        if block.layer_type == "slstm":
            nn.init.zeros_(block.slstm_layer.recurrent_weight).requires_grad_(False)


def learn(model: nn.Module, draw: Callable[[], Batch], loss: Callable, steps: int, lr: float) -> None:
    """Linear warm-up over a tenth of the steps, then cosine to zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    factor = lambda step: min(10 * (step + 1) / steps, 0.5 * (1 + math.cos(math.pi * step / steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(steps):
        inputs, targets = draw()
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


# --- claims ----------------------------------------------------------------------------------------------------------


@claim("State tracking: parity of a bit string, trained up to length 40, asked at length 256")
def state_tracking(seeds: int, output: Path) -> list[dict]:
    def draw(batch: int = 64, length: int | None = None) -> Batch:
        length = length or int(torch.randint(3, 41, ()))
        bits = torch.randint(0, 2, (batch, length))
        return bits, bits.cumsum(1) % 2

    def accuracy(layer_types: list[str], frozen: bool, seed: int) -> float:
        torch.manual_seed(seed)
        model = Learner(nn.Embedding(2, 32), xlstm(layer_types, width=32, heads=2), width=32, outputs=2)
        if frozen:
            freeze_recurrence(model.body)
        learn(model, draw, cross_entropy, steps=300, lr=1e-2)
        bits, parity = draw(1000, 256)
        with torch.no_grad():
            return (model(bits)[:, -1].argmax(-1) == parity[:, -1]).float().mean().item()

    models = {
        "sLSTM": (["slstm"], False, {"at_least": 0.99}),
        "mLSTM and sLSTM": (["mlstm", "slstm"], False, {"at_least": 0.99}),
        "mLSTM": (["mlstm", "mlstm"], False, {"at_most": 0.60}),
        "sLSTM, recurrent weights frozen at zero": (["slstm"], True, {"at_most": 0.60}),
    }
    return [
        row(name, [accuracy(layers, frozen, seed) for seed in range(seeds)], **threshold)
        for name, (layers, frozen, threshold) in models.items()
    ]


class SigmoidGates(xLSTMsLSTMLayer):
    """The sLSTM layer with an input gate sigmoid(i~) instead of exp(i~): same parameters, recurrence, head norm.

    Without the normalizer this is the cell of an LSTM, c_t = f c_{t-1} + i z, h_t = o c_t."""

    normalized: bool

    def forward(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        x = x.unflatten(-1, (-1, self.head_dim))
        gates = torch.stack([gate(x) for gate in (self.igate, self.fgate, self.zgate, self.ogate)], dim=2) + self.bias
        state, outputs = zero_slstm_state(gates, len(gates)), []
        for x in gates.unbind(1):
            i, f, z, o = (x + torch.einsum("ghoi,bhi->bgho", self.recurrent_weight, state[0])).unbind(1)
            if self.normalized:
                state = slstm_cell(torch.stack([F.logsigmoid(i), f, z, o], dim=1), state)
            else:
                c = f.sigmoid() * state[1] + i.sigmoid() * z.tanh()
                state = (o.sigmoid() * c, c)
            outputs.append(state[0])
        return self.multihead_norm(torch.stack(outputs, dim=1))


@claim("Revising storage decisions: the value of the highest score so far, at length 128")
def revising_storage(seeds: int, output: Path) -> list[dict]:
    """With exponential gates a later token can outweigh everything stored before; with those of an LSTM it cannot.

    The third model shows which part does it: exp and sigmoid differ where they saturate, and far below that a
    sigmoid is an exponential. Divided by the sum of its weights, it can learn to do the same.
    """

    def draw(batch: int = 32, length: int = 64) -> Batch:
        scores, values = torch.randn(batch, length), torch.rand(batch, length)
        highest = torch.cummax(scores, dim=1).indices
        return torch.stack([scores, values], dim=-1), values.gather(1, highest)

    def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(prediction.squeeze(-1), target)

    def error(normalized: bool | None, seed: int) -> float:
        torch.manual_seed(seed)
        body = xlstm(["slstm"], width=32, heads=4)
        if normalized is not None:
            layer = body.blocks[0].slstm_layer
            layer.__class__, layer.normalized = SigmoidGates, normalized
        model = Learner(nn.Linear(2, 32), body, width=32, outputs=1)
        learn(model, draw, squared_error, steps=1500, lr=3e-2)
        inputs, targets = draw(1000, 128)
        with torch.no_grad():
            return squared_error(model(inputs)[:, -1], targets[:, -1]).item()

    exponential, sigmoid, normalized = ([error(kind, seed) for seed in range(seeds)] for kind in (None, False, True))
    return [
        row("squared error, sLSTM", exponential),
        row("squared error, sigmoid gates as in an LSTM", sigmoid),
        row("ratio", [x / y for x, y in zip(exponential, sigmoid, strict=True)], at_most=1 / 3),
        row("squared error, sigmoid gates with the normalizer of the sLSTM", normalized),
    ]


@claim("Memory capacity: recalling the values of 8 and of 16 keys")
def memory_capacity(seeds: int, output: Path) -> list[dict]:
    """Pairs come one per step, then all keys again in another order, each asking for its value."""
    symbols, width = 64, 64

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.value = nn.Embedding(symbols, width), nn.Embedding(symbols + 1, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.key(x[..., 0]) + self.value(x[..., 1])

    def draw(pairs: int, batch: int = 64) -> Batch:
        keys, order = torch.rand(batch, symbols).argsort(1)[:, :pairs], torch.rand(batch, pairs).argsort(1)
        values, unknown = torch.randint(0, symbols, (batch, pairs)), torch.full((batch, pairs), symbols)
        stored, asked = torch.stack([keys, values], dim=-1), torch.stack([keys.gather(1, order), unknown], dim=-1)
        nothing = torch.full_like(values, -100)
        return torch.cat([stored, asked], dim=1), torch.cat([nothing, values.gather(1, order)], dim=1)

    bodies = {
        "mLSTM": lambda: xlstm(["mlstm"] * 2, width, heads=1, qk_dim_factor=1.0),
        "sLSTM": lambda: xlstm(["slstm"] * 2, width, heads=4),
        "LSTM": lambda: nn.LSTM(width, width, num_layers=2, batch_first=True),
    }

    def accuracy(kind: str, pairs: int, seed: int) -> float:
        torch.manual_seed(seed)
        model = Learner(Pair(), bodies[kind](), width, outputs=symbols)
        learn(model, lambda: draw(pairs), cross_entropy, steps=600, lr=3e-3)
        inputs, targets = draw(pairs, 500)
        with torch.no_grad():
            right = model(inputs).argmax(-1) == targets
        return right[targets >= 0].float().mean().item()

    return [
        row(f"{kind}, {pairs} pairs", [accuracy(kind, pairs, seed) for seed in range(seeds)], **threshold)
        for pairs in (8, 16)
        for kind, threshold in {
            "mLSTM": {"at_least": 0.99},
            "sLSTM": {"at_most": 0.9},
            "LSTM": {"at_most": 0.9},
        }.items()
    ]


def unstabilised_mlstm(q, k, v, igate, fgate) -> torch.Tensor:
    """The definition with exp(i~) as it stands: the mLSTM without m."""
    B, T, H, K = q.shape
    c, n = q.new_zeros(B, H, K, v.shape[-1]), q.new_zeros(B, H, K)
    outputs = []
    for t in range(T):
        i, f = igate[:, t].exp(), fgate[:, t].sigmoid()
        c = f[..., None, None] * c + i[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        n = f[..., None] * n + i[..., None] * k[:, t]
        x = q[:, t] * K**-0.5
        outputs.append(torch.einsum("bhk,bhkv->bhv", x, c) / (x * n).sum(-1).abs().clamp_min(1)[..., None])
    return torch.stack(outputs, dim=1)


@claim("Stabilisation: float32 with and without m against float64, gates of standard deviation 10 to 120")
def stabilisation(seeds: int, output: Path) -> list[dict]:
    """Errors are medians over h and the gradients of q, k, v, of those values that float32 can hold: a gate of -1e3
    makes others vanish altogether, and a few are ill-conditioned by themselves."""

    def measure(scale: float, seed: int) -> tuple[float, ...]:
        torch.manual_seed(seed)
        inputs = (*torch.randn(3, 2, 64, 2, 16), *(scale * torch.randn(2, 2, 64, 2)))
        exact = _with_gradients(
            lambda *x: mlstm(*x, eps=0.0, backend="reference")[0], tuple(x.double() for x in inputs)
        )
        stabilised = _with_gradients(lambda *x: mlstm(*x, eps=0.0)[0], inputs)
        plain = _with_gradients(unstabilised_mlstm, inputs)
        held = exact.abs() > torch.finfo(torch.float32).tiny

        def error(actual: torch.Tensor, where: torch.Tensor) -> float:
            return ((actual.double() - exact).abs() / exact.abs())[where].median().item()

        both = held & stabilised.isfinite() & plain.isfinite()
        finite = (x.isfinite().double().mean().item() for x in (stabilised, plain))
        return *finite, error(stabilised, held), error(stabilised, both) / error(plain, both)

    rows = []
    for scale in (10, 20, 40, 80, 120):
        columns = zip(*(measure(scale, seed) for seed in range(seeds)), strict=True)
        finite, finite_without, errors, ratios = map(list, columns)
        rows += [
            row(f"scale {scale}: share of finite results with m", finite, at_least=1),
            row(f"scale {scale}: share of finite results without m", finite_without),
            row(f"scale {scale}: relative error with m", errors, at_most=1e-5),
            row(f"scale {scale}: error with m over error without, where both are finite", ratios, at_most=2),
        ]
    return rows


def _with_gradients(function: Callable, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """h and the gradients of q, k, v, all in one row."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    h = function(*leaves)
    return torch.cat([x.detach().flatten() for x in (h, *torch.autograd.grad(h.sum(), leaves[:3]))])


def _seconds(function: Callable, repetitions: int = 5) -> float:
    function()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _in_turns(functions: dict, rounds: int) -> dict:
    """Median seconds of each, taken in turns so that all meet the same machine."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(x[rounds // 3 :]) for name, x in times.items()}


def _plot(path: Path, curves: dict[str, dict[int, float]], x: str, y: str, title: str) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150, layout="constrained")
    for name, points in curves.items():
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def _cell_inputs(length: int, heads: int = 4, K: int = 64, V: int = 128) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, length, heads, K)
    igate, fgate = torch.randn(2, 1, length, heads)
    return q, k, torch.randn(1, length, heads, V), igate, fgate + 4


@claim("Parallel training: the chunkwise form computes what the recurrence computes, in a fraction of the time")
@torch.no_grad()
def parallel_training(seeds: int, output: Path) -> list[dict]:
    inputs = _cell_inputs(2048)
    state = tuple(torch.zeros(shape) for shape in ((1, 4, 64, 128), (1, 4, 64), (1, 4)))
    outputs = []

    def stepwise():
        outputs.clear()
        for s in state:
            s.zero_()
        for step in zip(*(x.unbind(1) for x in inputs), strict=True):
            outputs.append(mlstm_step(*step, state, inplace=True)[0])

    times = _seconds(stepwise, 3), _seconds(lambda: mlstm(*inputs), 3)
    h, stepped = mlstm(*inputs)[0], torch.stack(outputs, dim=1)
    return [
        row("2,048 steps one by one, seconds", [times[0]]),
        row("2,048 steps chunkwise, seconds", [times[1]]),
        row("times faster", [times[0] / times[1]], at_least=3),
        row("relative difference", [((h - stepped).norm() / stepped.norm()).item()], at_most=1e-5),
    ]


@claim("Constant cost: time and memory per token do not depend on the context")
@torch.no_grad()
def constant_cost(seeds: int, output: Path) -> list[dict]:
    """A token after a context of 256 to 16,384, beside Llama of the same size."""
    common = {"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 4, "bos_token_id": None}
    common |= {"eos_token_id": None, "pad_token_id": None}
    llama = LlamaConfig(intermediate_size=768, num_attention_heads=4, max_position_embeddings=32768, **common)
    torch.manual_seed(0)
    models = {
        "xLSTM": xLSTMForCausalLM(xLSTMConfig(num_heads=4, **common)).eval(),
        "Llama": LlamaForCausalLM(llama).eval(),
    }
    token = torch.zeros(1, 1, dtype=torch.long)
    seconds, bytes_ = {}, {name: {} for name in models}
    for name, model in models.items():
        steps, cache = {}, None
        for context in (256, 1024, 4096, 16384):
            seen = 0 if cache is None else cache.get_seq_length()
            prompt = torch.randint(0, 1024, (1, context - seen))
            cache = model(prompt, cache=cache, use_cache=True, logits_to_keep=1).cache
            bytes_[name][context] = _cache_bytes(cache)
            own = copy.deepcopy(cache)
            steps[context] = lambda model=model, own=own: model(token, cache=own, use_cache=True)
        seconds[name] = _in_turns(steps, 60)
    _plot(output / "constant_cost_time.png", seconds, "context, tokens", "seconds per token", "Time per token")
    _plot(output / "constant_cost_memory.png", bytes_, "context, tokens", "bytes", "State of one sequence")
    growth = {name: [s[16384] / s[256]] for name, s in seconds.items()}
    return [
        row("xLSTM: time at 16,384 over time at 256", growth["xLSTM"], at_most=1.3),
        row("Llama: time at 16,384 over time at 256", growth["Llama"]),
        row("xLSTM: memory at 16,384 over memory at 256", [bytes_["xLSTM"][16384] / bytes_["xLSTM"][256]], at_most=1),
        row("Llama: memory at 16,384 over memory at 256", [bytes_["Llama"][16384] / bytes_["Llama"][256]]),
    ]


def _cache_bytes(cache) -> int:
    if hasattr(cache, "nbytes"):
        return cache.nbytes() if callable(cache.nbytes) else cache.nbytes
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


@claim("Long context on CPU: chunkwise mLSTM against causal scaled-dot-product attention")
@torch.no_grad()
def long_context(seeds: int, output: Path) -> list[dict]:
    seconds = {"mLSTM": {}, "attention": {}}
    for length in (512, 1024, 2048, 4096, 8192, 16384):
        inputs = _cell_inputs(length, K=64, V=128)
        q, k, v = (torch.randn(1, 4, length, 128) for _ in range(3))
        seconds["mLSTM"][length] = _seconds(lambda inputs=inputs: mlstm(*inputs), 3)
        attend = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
        seconds["attention"][length] = _seconds(attend, 3)
    _plot(output / "long_context.png", seconds, "length, tokens", "seconds", "4 heads of width 128, one sequence")
    ratio = {length: seconds["attention"][length] / s for length, s in seconds["mLSTM"].items()}
    crossover = next((length for length, r in ratio.items() if r > 1), 2 * 16384)
    return [
        row("first length at which mLSTM is faster", [crossover], at_most=8192),
        row("times faster at 16,384", [ratio[16384]], at_least=2),
    ]


# --- report ----------------------------------------------------------------------------------------------------------


def write_report(results: dict, output: Path) -> None:
    def number(x: float | None) -> str:
        return "" if x is None else f"{x:.3g}"

    sections = []
    for name in (name for name in CLAIMS if name in results):
        result = results[name]
        rows = []
        for line in result["rows"]:
            spread = f"{number(min(line['values']))} … {number(max(line['values']))}"
            limit = [f"{sign} {number(line[key])}" for key, sign in (("at_least", "≥"), ("at_most", "≤")) if line[key]]
            verdict = "" if not limit else "holds" if line["holds"] else "**fails**"
            rows.append([line["name"], number(line["median"]), spread, " ".join(limit), verdict])
        table = markdown_table(["", "median", "spread", "threshold", ""], rows)
        plots = "".join(f"\n![{path.stem}]({path.name})" for path in sorted(output.glob(f"{name}*.png")))
        sections.append(
            f"## {result['title']}\n\n{table}\n{plots}\n\n{result['seconds']:.0f} s, {result['machine']}\n"
        )
    text = "# Claims\n\nWritten by `python scripts/claims.py`.\n\n" + "\n".join(sections)
    (output / "README.md").write_text(text, encoding="utf-8")


def run(names: list[str], seeds: int, output: Path) -> bool:
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    machine = f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    for name in names:
        start = time.perf_counter()
        rows = CLAIMS[name](seeds, output)
        seconds = round(time.perf_counter() - start, 1)
        results[name] = {"title": CLAIMS[name].title, "rows": rows, "seconds": seconds, "machine": machine}
        for line in rows:
            print(f"{name}: {line['name']}: {line['median']:.4g} {'holds' if line['holds'] else 'FAILS'}", flush=True)
        path.write_text(json.dumps(results, indent=1), encoding="utf-8")
        write_report(results, output)
    return all(line["holds"] for name in names for line in results[name]["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CLAIMS, default=[*CLAIMS], help="these claims; all by default")
    parser.add_argument("--output", type=Path, default=Path("docs/claims"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    sys.exit(not run(arguments.only, arguments.seeds, arguments.output))


if __name__ == "__main__":
    main()
