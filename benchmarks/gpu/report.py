"""What a run of prove.py found, to be read: failures, targets, and a table of every step."""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from benchmarks.gpu.steps import STEPS


KERNELS = 12  # of a breakdown, those that are shown


def outcome(row: dict) -> str:
    """One line."""
    if "skipped" in row:
        return f"skipped, {row['skipped']}"
    if "failed" in row:
        where = [f"kernel {row['kernel']}"] if "kernel" in row else []
        where += [f"at {row['at']}"] if "at" in row else []
        return " ".join(["FAILED", *where, row["failed"].splitlines()[0] if row["failed"] else ""])
    return ", ".join(numbers(row["result"]))


def numbers(result: dict) -> Iterator[str]:
    for name, value in result.items():
        if name == "kernel_ms":
            yield from (f"{kernel} {milliseconds:.3g}" for kernel, milliseconds in [*value.items()][:KERNELS])
            continue
        if isinstance(value, dict):
            value = max(value.values(), default=0.0)
            name = f"largest of {name}"
        yield f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {'–' if value is None else value}"


class Target(NamedTuple):
    """A bound for a field of all rows that match, or for its ratio to the same field of another row."""

    title: str
    rows: str
    field: str
    bound: float
    unit: str
    relative_to: Callable[[dict], str] | None = None
    inverse: bool = False  # of a speed: the bound is its least

    def value(self, rows: dict[str, dict]) -> float | None:
        values = []
        for id, row in rows.items():
            if not fnmatchcase(id, self.rows) or (value := row.get("result", {}).get(self.field)) is None:
                continue
            if self.relative_to:
                other = rows.get(self.relative_to(row["name"]), {}).get("result", {}).get(self.field)
                if other is None:
                    continue
                value = other / value if self.inverse else value / other
            values.append(value)
        worst = min if self.inverse and not self.relative_to else max
        return worst(values, default=None)

    def line(self, rows: dict[str, dict]) -> str:
        value = self.value(rows)
        target = f"{'>=' if self.at_least else '<='} {self.bound:g} {self.unit}"
        if value is None:
            return f"| {self.title} | {target} | – | – |"
        met = value >= self.bound if self.at_least else value <= self.bound
        return f"| {self.title} | {target} | {value:.3g} {self.unit} | {'yes' if met else 'no'} |"

    @property
    def at_least(self) -> bool:
        return self.inverse and not self.relative_to


MIXED = "hf_xlstm, one sLSTM block in eight"
TARGETS = [
    *(
        Target(f"mLSTM {what}, {H} heads of {dims}, {length}", f"ops/sequence/hf_xlstm/H={H}/*/S={S}", field, ms, "ms")
        for H, dims, bounds in ((8, "256/512", (2.5, 9)), (16, "128/256", (2.2, 8)))
        for length, S in (("sequences of 512 to 8,192", "[!6]*"), ("one of 65,536", "65536"))
        for (what, field), ms in zip(
            (("forward", "forward_ms"), ("with backward", "training_ms")), bounds, strict=True
        )
    ),
    Target("mLSTM step, batch 1, in a graph", "ops/step/hf_xlstm/B=1", "us", 10, "us"),
    Target(
        "mLSTM step from batch 8, to a copy of its state",
        "ops/step/hf_xlstm/B=*[!1]",
        "tb_per_s",
        2,
        "times",
        lambda name: "ops/copy/torch",
        inverse=True,
    ),
    Target(
        "7B decoding, batch 1, any context",
        "generation/hf_xlstm/decode/batch=1/*/CUDA graph",
        "tokens_per_s",
        200,
        "tokens/s",
        inverse=True,
    ),
    Target(
        "sLSTM forward and backward up to head dim 128, to cuDNN's LSTM",
        "ops/slstm_sequence/hf_xlstm/*/D=[!25]*",
        "training_ms",
        1.5,
        "times",
        lambda name: f"ops/slstm_sequence/cudnn_lstm/B={name['B']}/T={name['T']}/D={name['D']}",
    ),
    Target(
        "400M training step with one sLSTM block in eight, to none",
        f"training/{MIXED}/step/400M/*",
        "ms",
        1.15,
        "times",
        lambda name: f"training/hf_xlstm/step/{name['size']}/S={name['S']}",
    ),
]


class Column(NamedTuple):
    """A column of a table: its head, the row that it is read from, the field, and how it is written."""

    head: str
    row: str
    field: str
    form: str = "{:.3g}"

    def cell(self, rows: dict[str, dict], key: dict[str, object]) -> str:
        value = rows.get(self.row.format(**key), {}).get("result", {}).get(self.field)
        return "" if value is None else self.form.format(value)


def table(rows: dict[str, dict], title: str, keys: list[dict[str, object]], columns: list[Column]) -> list[str]:
    """The keys of which anything was measured. The first of a key's entries names the line."""
    lines = [(next(iter(key.values())), [column.cell(rows, key) for column in columns]) for key in keys]
    measured = [any(cells[i] for _, cells in lines) for i in range(len(columns))]
    if not any(measured):
        return []

    def line(name: object, cells: list[str]) -> str:
        return "| " + " | ".join([str(name), *(x for x, shown in zip(cells, measured, strict=True) if shown)]) + " |"

    head = line(title, [column.head for column in columns])
    body = [line(name, cells) for name, cells in lines if any(cells)]
    return [head, "|---" + "|---:" * sum(measured) + "|", *body, ""]


SHAPES = [(8, 256, 512), (16, 128, 256)]
PEERS = {"hf_xlstm": "mLSTM", "tfla": "TFLA", "simple_gla": "simple GLA"} | {
    "flash_attention_2": "FlashAttention 2, 32 heads of 128",
    "cudnn_attention": "cuDNN's attention, 32 heads of 128",
}


def tables(rows: dict[str, dict]) -> list[str]:
    """What was measured of the ops, of decoding and of training, in bfloat16."""
    text = []
    for H, K, V in SHAPES:
        keys = [{"name": f"{S:,}", "S": S} for S in (512, 2048, 8192, 65_536)]
        columns = [
            Column(f"{peer}, {what}", f"ops/sequence/{kernel}/H={H}/K={K}/V={V}/S={{S}}", field)
            for kernel, peer in PEERS.items()
            for what, field in (("forward", "forward_ms"), ("and backward", "training_ms"))
        ]
        text += table(rows, f"{H} heads of {K} x {V}, 65,536 tokens in sequences of; ms", keys, columns)
    keys = [{"name": B, "B": B} for B in (1, 8, 64, 1024)]
    step = "ops/step/hf_xlstm/B={B}"
    columns = [Column("us", step, "us", "{:,.1f}"), Column("TB/s of state", step, "tb_per_s", "{:.2f}")]
    text += table(rows, "mLSTM, one step of 8 heads of 256 x 512 in a CUDA graph, batch", keys, columns)
    shapes = [*((16, 1024, D) for D in (64, 128, 256, 512)), (1, 1024, 128), (64, 1024, 128)]
    shapes += [(16, 256, 128), (16, 4096, 128)]
    keys = [{"name": f"{B} x {T:,}, 4 heads of {D}", "B": B, "T": T, "D": D} for B, T, D in shapes]
    columns = [
        Column(f"{peer}, {what}", f"ops/slstm_sequence/{kernel}/B={{B}}/T={{T}}/D={{D}}", field)
        for kernel, peer in {"hf_xlstm": "sLSTM", "cudnn_lstm": "cuDNN's LSTM", "pytorch": "sLSTM in PyTorch"}.items()
        for what, field in (("forward", "forward_ms"), ("and backward", "training_ms"))
    ]
    text += table(rows, "sequences x steps; ms", keys, columns)
    keys = [{"name": "decoding, tokens/s, CUDA graph", "row": "decode/batch=1/context=128/CUDA graph"}]
    keys += [{"name": "decoding, tokens/s, no graph", "row": "decode/batch=1/context=128/no graph"}]
    keys += [{"name": f"prompt of {n:,}, tokens/s", "row": f"first token/context={n}"} for n in (2048, 16_384, 65_536)]
    columns = [
        Column(peer, "generation/" + peer + "/{row}", "tokens_per_s", "{:,.0f}")
        for peer in ("hf_xlstm", "in_tree", "llama")
    ]
    text += table(rows, "7B, batch 1", keys, columns)
    keys = [{"name": f"{S:,}", "S": S} for S in (2048, 8192, 32_768)]
    columns = [
        Column(peer, "training/" + peer + "/step/400M/S={S}", "tokens_per_s", "{:,.0f}")
        for peer in ("hf_xlstm", MIXED, "in_tree", "llama")
    ]
    return text + table(rows, "training 400M, tokens/s, sequences of", keys, columns)


def targets(rows: dict[str, dict]) -> list[str]:
    """The targets that anything measured speaks of."""
    lines = [target.line(rows) for target in TARGETS if target.value(rows) is not None]
    return ["| | target | measured | met |", "|---|---:|---:|---|", *lines, ""]


def summary(source: str, environment: dict[str, str], rows: dict[str, dict]) -> str:
    """Markdown: failures first, then the targets, then all rows."""
    where = ", ".join(f"{name} {value}" for name, value in environment.items())
    lines = ["# Kernels on a GPU", "", f"{where}, source of the kernels {source}.", ""]
    lines += ["| step | rows | failed | skipped | kernels found | compiled |", "|---" + "|---:" * 5 + "|"]
    for step in STEPS:
        of_step = [row for row in rows.values() if row["step"] == step]
        counts = [len(of_step), *(sum(kind in row for row in of_step) for kind in ("failed", "skipped"))]
        counts += [sum(row.get("found", 0) for row in of_step), sum(len(row.get("compiled", ())) for row in of_step)]
        lines.append("| " + " | ".join([step, *map(str, counts)]) + " |")
    lines += ["", "## Failures", ""]
    lines += [f"- `{id}`: {outcome(row)}" for id, row in rows.items() if "failed" in row] or ["None."]
    lines += ["", "## Targets", "", "| | target | measured | met |", "|---|---:|---:|---|"]
    lines += [target.line(rows) for target in TARGETS]
    for step in STEPS:
        shown = {id: row for id, row in rows.items() if row["step"] == step and "failed" not in row}
        if step == "tests":
            shown = {id: row for id, row in shown.items() if "skipped" in row}
        if shown:
            lines += ["", f"## {step}", "", "| row | |", "|---|---|"]
            lines += [f"| {id.removeprefix(step + '/')} | {outcome(row)} |" for id, row in shown.items()]
    return "\n".join(lines) + "\n"
