"""Compile every kernel of both cells as it is launched, for GPUs that are not there, and check what it needs.

    python benchmarks/gpu/kernel_resources.py [--quick | --architectures sm_90 ...] [--cells slstm] [--json FILE]

The launches are recorded: the launchers run on tensors without memory (device "meta"), so what is compiled is what a
call would run. Fails (exit code 1) when a kernel spills registers, exceeds the shared memory of its GPU, depends on
the sequence length, has a product on Hopper whose operands may change under it, or, of the mLSTM, does without wgmma
or asynchronous copies on Hopper where it multiplies bfloat16. (The sLSTM's products have 16 rows, fewer than those
instructions take.)
"""

import argparse
import contextlib
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hf_xlstm.cells.mlstm import triton_launch as launch
from hf_xlstm.cells.mlstm import triton_launch_recurrent as launch_recurrent
from hf_xlstm.cells.slstm import triton_launch as slstm_launch
from hf_xlstm.cells.triton_common import GPU


NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
POINTERS = {torch.int32: "*i32", torch.bool: "*i1"} | {dtype: f"*{name}" for name, dtype in DTYPES.items()}
HEADS = 8
CELLS = ("mlstm", "slstm")
# (dtype, K, V) of the mLSTM, (dtype, D) of the sLSTM
QUICK = [("bf16", 256, 512), ("fp16", 64, 64), ("bf16", 64), ("bf16", 256)]
ALL = [
    *(
        ("bf16", *dims)
        for dims in [(64, 64), (128, 128), (128, 256), (256, 512), (512, 512), (192, 384), (96, 200), (9, 33)]
    ),
    *((dtype, *dims) for dtype in ("fp32", "fp16") for dims in [(64, 64), (256, 512), (96, 200)]),
    *(("bf16", D) for D in (16, 64, 100, 128, 256, 512)),
    *((dtype, D) for dtype in ("fp32", "fp16") for D in (16, 32, 64, 192, 512)),
]
MEASURES = ("registers", "shared", "spill")
LENGTHS = [17, 64, 100, 1000, 4097]
IN_SPANS = 8192  # a length of several spans, given enough processors


class Architecture(NamedTuple):
    target: GPUTarget
    shared_memory: int

    def gpu(self, processors: int = 1) -> GPU:
        return GPU(self.target.arch // 10 if self.target.backend == "cuda" else 0, processors)


KB = 1024
ARCHITECTURES = {
    # what sm_86 and sm_89 have, which run the same code: sm_80 itself has 163
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 99 * KB),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227 * KB),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 227 * KB),
    "sm_120": Architecture(GPUTarget("cuda", 120, 32), 99 * KB),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 * KB),
}


class Launch(NamedTuple):
    """One compilation: what Triton takes into account of a launch."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    maxnreg: int | None

    @classmethod
    def of(cls, kernel: JITFunction, arguments: dict[str, object], *options: int | None) -> "Launch":
        """Triton's rules: 1 and None become constants, pointers and integers are multiples of 16 or not."""
        signature, constants, aligned = {}, {}, []
        for parameter in kernel.params:
            name, value = parameter.name, arguments[parameter.name]
            specialized = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (specialized and isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
                aligned.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                if specialized and value % 16 == 0:
                    aligned.append(name)
        return cls(kernel, *map(tuple, (signature.items(), constants.items(), aligned)), *options)


@contextlib.contextmanager
def recording() -> Iterator[dict[Launch, None]]:
    """Kernels are not run: their launches are collected."""
    launches = {}

    def record(kernel, *args, grid, warmup, num_warps, num_stages=3, maxnreg=None, **kwargs):
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launches[Launch.of(kernel, arguments, num_warps, num_stages, maxnreg)] = None

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def record_launches(dtype: torch.dtype, K: int, V: int, T: int, gpu: GPU, full: bool) -> dict[Launch, None]:
    """What a step, a forward and a backward pass launch; `full`: with mask, initial and final state, else without."""
    B, H = 2, HEADS
    q, k, v = (empty(B, T, H, dim, dtype=dtype) for dim in (K, K, V))
    igate, fgate, s = empty(B, T, H), empty(B, T, H), empty(B, H, T)
    state = (empty(B, H, K, V), empty(B, H, K), empty(B, H)) if full else (None, None, None)
    mask = empty(B, T, dtype=torch.bool) if full else None
    plan = launch.plan(dtype, K, V, gpu)
    inputs = (q, k, v, igate, fgate, mask)
    with recording() as launches:
        launch_recurrent.recurrent(*inputs, state, state, 0.1, 1e-6)
        if full:  # decoding, from states of its own and from a pool
            token = [x[:, :1] for x in inputs[:-1]]
            for state_indices in (None, empty(B, dtype=torch.int32)):
                launch_recurrent.step(*token, state, state_indices, 0.1, 1e-6)
        for forward_plan in filter(None, (plan, *on_chip_plans(dtype, K, V, B * H, gpu))):
            launch.forward(*inputs, None, state, state, 0.1, 1e-6, forward_plan)
        launch.backward(v, state[:2], *inputs, None, state, state[:2], state[2], (s, s), None, 0.1, 1e-6, plan)
    return launches


def on_chip_plans(dtype: torch.dtype, K: int, V: int, recurrences: int, gpu: GPU) -> list[launch.Plan | None]:
    """With tiles as wide as they come, and where there are just programs enough for narrower ones."""
    few = gpu._replace(processors=recurrences * V // 64)
    return [launch.on_chip_plan(dtype, K, V, recurrences, x) for x in (gpu, few)]


def all_launches(dtype: torch.dtype, K: int, V: int, architecture: str) -> dict[Launch, None]:
    """What one run over a sequence launches; for the head dims of a 7B model also in spans, and both without
    states."""
    few, many = (ARCHITECTURES[architecture].gpu(processors) for processors in (1, 10**6))
    launches = record_launches(dtype, K, V, 1000, few, full=True)
    if (K, V) == (256, 512):
        for T, gpu, full in ((1000, few, False), (IN_SPANS, many, True), (IN_SPANS, many, False)):
            launches |= record_launches(dtype, K, V, T, gpu, full)
    return launches


def record_slstm_launches(dtype: torch.dtype, D: int, T: int, gpu: GPU) -> dict[Launch, None]:
    """What a step, a forward and a backward pass with mask launch, by one program per head and by several."""
    B, H = 2, HEADS
    many = gpu._replace(processors=10**6)
    plans = slstm_launch.plan(dtype, D, gpu), slstm_launch.spread_plan(dtype, D, B, H, T, many)
    gates, mask, c = empty(B, T, 4, H, D, dtype=dtype), empty(B, T, dtype=torch.bool), empty(B, T, H, D)
    weight, bias = empty(4, H, D, D, dtype=dtype), empty(4, H, D, dtype=dtype)
    state = tuple(empty(B, H, D) for _ in range(4))
    with recording() as launches:
        for plan in filter(None, plans):
            for slots in (None, empty(B, dtype=torch.int32)):
                slstm_launch.run_forward(gates[:, :1], weight, bias, state, state, None, None, False, plan, slots)
            h, saved, c = slstm_launch.run_forward(gates, weight, bias, state, state, mask, None, True, plan)
            slstm_launch.run_backward(h, state[:3], weight, state[1], mask, None, saved, c, plan)
    return launches


def compile_launch(item: Launch, architecture: Architecture) -> dict[str, int]:
    """Registers, bytes of spill and shared memory, and how often the instructions in question occur."""
    position = {name: i for i, name in enumerate(item.kernel.arg_names)}
    source = ASTSource(
        fn=item.kernel,
        signature=dict(item.signature),
        constexprs={(position[name],): value for name, value in item.constants},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in item.aligned},
    )
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages}
    if item.maxnreg and architecture.target.backend == "cuda":
        options["maxnreg"] = item.maxnreg
    compiled = triton.compile(source, target=architecture.target, options=options)
    report = {"shared": compiled.metadata.shared}
    if architecture.target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        report["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        report["spill"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1])
        return report
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    report["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
    report["spill"] = int(re.search(r"STACK:(\d+)", usage)[1])
    for name, opcode in (("wgmma", "HGMMA"), ("async_copies", "LDGSTS|UTMALDG")):
        report[name] = len(re.findall(rf"\b(?:{opcode})\b", assembly))
    return report | {"races": len(races(compiled.asm["ttgir"]))}


def races(ttgir: str) -> list[str]:
    """Hopper's products whose operands may change before they are read. wgmma is asynchronous, and two faults of the
    compiler do not respect that. Both gave wrong results on an H100:

    - A tile in shared memory that the program also reads into registers has one buffer too few, and the copy of a
      later tile overwrites it (triton-lang/triton#6691, in Triton 3.6 to 3.9 at least).
    - A left operand in registers: ptxas before CUDA 13.3 may reuse them too early (triton-lang/triton#11781), unless
      the program waits for the product at once, as it does in float16.
    """
    whole = {}  # the allocation that a view of shared memory is a part of
    for view, of in re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", ttgir):
        whole[view] = whole.get(of, of)
    read = {whole.get(x, x) for x in re.findall(r"ttg\.local_load (%\w+)", ttgir)}
    pending = {}
    for values, number in re.findall(r"warp_group_dot_wait (.*?) {pendings = (\d+)", ttgir):
        pending |= dict.fromkeys(re.findall(r"%\w+", values), int(number))
    found = []
    for name, left, right, types in re.findall(r"(%\w+) = ttng\.warp_group_dot (%\w+), (%\w+)(.*)", ttgir):
        if not pending.get(name, 0):
            continue
        if "dot_op<{opIdx = 0" in types:
            found.append(f"{name}: left operand in registers")
        elif read & {whole.get(left, left), whole.get(right, right)}:
            found.append(f"{name}: another use of a tile")
    return found


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


# Bytes that a kernel may spill, where another choice was slower on an H100 or crosses a limit.
# States by 4 warps, two programs on a processor, take 1.16 ms where 8 warps without a spill take 1.76 (8 heads of
# 256 x 512, 65,536 tokens), and C on chip in tiles of 128 columns 1.41 where 64 columns take 1.86.
# The gradients of the scores keep the diagonal of G apart, which a closed forget gate needs (its gradient was 1e-3
# off in float32, now 3e-7), and hold three tiles of 128 x 128 in 255 registers. Ways to take fewer were tried: other
# orders of the sums, 32-bit offsets, two stages; none took less.
# The sLSTM's forward pass keeps m in two floats (one left errors of 1e-2 where tokens compete at 1e5): six registers
# too many where it saves for the backward pass with R of a head of 128 on chip. In float32 on Blackwell, where the
# compiler fills whatever it may take with unrolled products, it spills with 64, 72, 80, 96 and 128 registers.
SPILLS = {
    "state_kernel": 144,
    "state_gradient_kernel": 40,
    "on_chip_kernel": 176,
    "score_gradient_kernel": 72,
    "recurrent_kernel": 8,  # by Triton 3.9
    "forward_resident_kernel": 24,
    "forward_streamed_kernel": 56,
    "forward_spread_kernel": 32,
}


def violations(item: Launch, architecture: str, report: dict[str, int]) -> list[str]:
    found = []
    if report["spill"] > SPILLS.get(item.kernel.__name__, 0):
        found.append(f"spills {report['spill']} bytes")
    if report["shared"] > ARCHITECTURES[architecture].shared_memory:
        found.append(f"takes {report['shared']} bytes of shared memory")
    if report.get("races"):
        found.append(f"has {report['races']} products whose operands may change under them")
    constants = dict(item.constants)
    multiplies_bf16 = str(constants.get("DOT")) == "bf16"
    if architecture == "sm_90" and "K" in constants and multiplies_bf16 and constants["BK"] >= 64:
        looping = constants["K"] > constants["BK"]  # a single tile leaves nothing to prefetch
        required = ("wgmma", "async_copies") if looping else ("wgmma",)
        found += [f"has no {name}" for name in required if not report[name]]
    return found


class Case(NamedTuple):
    """A cell at some sizes: what is launched for an architecture, and what must be the same at all these lengths."""

    sizes: dict[str, object]
    launches: Callable[[str], dict[Launch, None]]
    at_length: Callable[[int], dict[Launch, None]]
    lengths: list[int]

    @classmethod
    def of(cls, dtype: str, *dims: int) -> "Case":
        if len(dims) == 1:
            record = functools.partial(record_slstm_launches, DTYPES[dtype], *dims)
            return cls(
                {"dtype": dtype, "D": dims[0]},
                lambda architecture: record(1000, ARCHITECTURES[architecture].gpu()),
                functools.partial(record, gpu=ARCHITECTURES["sm_90"].gpu()),
                LENGTHS,
            )
        K, V = dims
        # Where a token's features are not a multiple of 16 elements, whether a sequence's are depends on its length:
        # two compilations then serve all lengths.
        lengths = LENGTHS if HEADS * K % 16 == HEADS * V % 16 == 0 else LENGTHS[:1]
        gpu = ARCHITECTURES["sm_90"].gpu()
        return cls(
            {"dtype": dtype, "K": K, "V": V},
            lambda architecture: all_launches(DTYPES[dtype], K, V, architecture),
            lambda T: record_launches(DTYPES[dtype], K, V, T, gpu, full=True),
            lengths,
        )

    def recompiled(self) -> list[str]:
        """Kernels that another sequence length would compile again."""
        first, *others = (self.at_length(T).keys() for T in self.lengths)
        return sorted({item.kernel.__name__ for other in others for item in first ^ other})


def check(cases: list[Case], architectures: list[str]) -> tuple[list[dict], int]:
    rows, failures = [], 0
    for case in cases:
        for kernel in case.recompiled():
            print(f"FAIL {kernel} {case.sizes}: compiled again for another sequence length")
            failures += 1
        for architecture in architectures:
            for item in case.launches(architecture):
                report = compile_launch(item, ARCHITECTURES[architecture])
                found = violations(item, architecture, report)
                failures += len(found)
                row = {"architecture": architecture, "kernel": item.kernel.__name__} | case.sizes | report
                rows.append(row)
                print("FAIL" if found else "ok  ", *(f"{k}={v}" for k, v in row.items()), *found, flush=True)
    return rows, failures


def write_worst(path: Path, rows: list[dict]) -> None:
    """What each kernel takes at most on each GPU, merged into the file."""
    worst = {}
    for row in rows:
        case = worst.setdefault(f"{row['architecture']} {row['kernel']}", {"compilations": 0})
        case["compilations"] += 1
        for name in MEASURES:
            case[name] = max(case.get(name, 0), row[name])
    results = json.loads(path.read_text()) if path.exists() else {}
    if results.get("triton") != triton.__version__:
        results = {"triton": triton.__version__, "worst": {}}
    results["worst"] |= worst
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few head dims on Hopper")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=[*ARCHITECTURES])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=[*CELLS])
    parser.add_argument("--json", type=Path, help="write the worst cases here, beside those of other runs")
    args = parser.parse_args()
    cases = [Case.of(dtype, *dims) for dtype, *dims in (QUICK if args.quick else ALL)]
    cases = [case for case in cases if ("slstm" if "D" in case.sizes else "mlstm") in args.cells]
    rows, failures = check(cases, ["sm_90"] if args.quick else args.architectures)
    if args.json:
        write_worst(args.json, rows)
    print(f"{len(rows)} compilations, {failures} limits crossed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
