"""The ops on one GPU: correctness, then time and memory beside other kernels.

Forward and forward+backward in bf16, then decode steps inside a CUDA graph. Those of hf_xlstm come first, each
configuration checked against float64 before it is timed.

mLSTM: sequences of S tokens, 65,536 in all. Baselines run where they are installed: mlstm-kernels (TFLA),
flash-linear-attention (simple GLA), and the attention of torch. The variants are what the launch plan could have
chosen.

sLSTM: B sequences of T tokens, 4 heads of D. Baselines: the PyTorch path of hf_xlstm, and cuDNN's LSTM (torch.nn.LSTM)
of equal width, in float16, which every cuDNN takes. The LSTM does more: its recurrent weights are one block instead of
4, and the products with its inputs, which the sLSTM gets as gates, are its own.
"""

import functools
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import harness
from benchmarks.gpu.harness import (
    Job,
    Jobs,
    kernel_milliseconds,
    milliseconds,
    milliseconds_cold_allocator,
    peak_gigabytes,
)
from benchmarks.peers import HF_XLSTM
from benchmarks.provenance import relative_error
from hf_xlstm.cells import environment, triton_common
from hf_xlstm.cells.mlstm import triton_launch as launch
from hf_xlstm.cells.mlstm import triton_ops
from hf_xlstm.cells.slstm import triton_launch as slstm_launch
from hf_xlstm.ops import mlstm, mlstm_step, slstm, slstm_step


TOKENS = 65_536
LENGTHS = [512, 2048, 8192, 65_536]
SHAPES = [(8, 256, 512), (16, 128, 256)]  # heads, K, V
ATTENTION_SHAPE = (32, 128)  # heads, head dim: the attention of a 7B Transformer
STEP_BATCHES = [1, 8, 64, 1024]
L2_BYTES = 50e6
BOUNDS = {"h": 1e-2, "q": 3e-2, "k": 3e-2, "v": 1.5e-2, "igate": 3e-2, "fgate": 5e-2}

SLSTM_HEADS = 4
SLSTM_SHAPES = [  # B, T, D
    *((16, 1024, D) for D in (64, 128, 256, 512)),
    *((B, 1024, 128) for B in (1, 64)),
    *((16, T, 128) for T in (256, 4096)),
]
SLSTM_STEP_SHAPES = [(B, D) for D in (64, 128, 256, 512) for B in (1, 64)]
SLSTM_LAYERS = 32  # with weights of their own: those of one layer would stay in the cache
SLSTM_BACKENDS = {HF_XLSTM: "triton", "pytorch": "torch"}
SLSTM_BOUNDS = {"h": 1e-2, "gates": 3e-2, "recurrent_weight": 3e-2, "bias": 3e-2}

# What the launch plan decides, decided otherwise: module, name, value.
VARIANTS = {
    "chunks of 64": (triton_common.GPU, "of", lambda device: triton_common.GPU(major=8, processors=132)),
    "C in memory": (launch, "on_chip_plan", lambda *_: None),
    "C on chip, however few the sequences": (
        triton_common.GPU,
        "of",
        lambda device: triton_common.GPU(major=9, processors=1),
    ),
    "saved states": (environment, "saves_states", lambda: True),
    "no spans": (launch, "MIN_SPANS", 10**9),
    "two spans or more": (launch, "MIN_SPANS", 2),
}


def retiled(kernels: str, **changes: int) -> tuple[object, str, Callable]:
    """The launch plan with other tiles, of the kernels that are named."""
    name = "on_chip_plan" if kernels == "on chip" else "plan"
    planned = getattr(launch, name)

    def plan(*arguments):
        plan = planned(*arguments)
        names = ("output",) if kernels == "on chip" else kernels.split()
        return plan and plan._replace(**{name: getattr(plan, name)._replace(**changes) for name in names})

    return launch, name, plan


TILE_VARIANTS = {
    "4 warps": retiled("score output", num_warps=4),
    "8 warps": retiled("state", num_warps=8),
    "two stages": retiled("state score output", num_stages=2),
    "three stages": retiled("score", num_stages=3),
    "four stages": retiled("state output", num_stages=4),
    "V tiles of 64": retiled("state", BV=64),
    "V tiles of 128": retiled("output", BV=128),
    "on chip: one stage": retiled("on chip", num_stages=1),
    "on chip: 64 columns": retiled("on chip", BV=64),
    "on chip: 64 columns, three stages": retiled("on chip", BV=64, num_stages=3),
}
TILE_LENGTHS = [2048]
LONG_VARIANTS = {  # of one sequence, whose programs are few
    "states: 4 warps": retiled("state_alone", num_warps=4),
    "states: 4 warps, V tiles of 64": retiled("state state_alone", num_warps=4, BV=64),
    "states: V tiles of 64": retiled("state state_alone", num_warps=8, BV=64),
}
LONG_LENGTHS = [65_536]


def respread(**changes: int) -> tuple[object, str, Callable]:
    """Several programs for each head of the sLSTM, with other tiles."""
    planned = slstm_launch.spread_plan

    def plan(*arguments):
        plan = planned(*arguments)
        return plan and plan._replace(tiles=plan.tiles._replace(**changes))

    return slstm_launch, "spread_plan", plan


SLSTM_VARIANTS = {
    "one program per head": (slstm_launch, "spread_plan", lambda *_: None),
    "4 warps": respread(num_warps=4),
    "8 warps, 64 units": respread(num_warps=8, BD=64),
    "2 warps, 16 units": respread(num_warps=2, BD=16),
}
SLSTM_VARIANT_SHAPES = [(16, 1024, D) for D in (256, 512)]
SHORT_LENGTHS = [16, 64]
SHORT_VARIANTS = {  # the same of sequences so short that they may be read token by token
    "as planned": (triton_ops, "MAX_RECURRENT", triton_ops.MAX_RECURRENT),
    "recurrent up to 64 tokens": (triton_ops, "MAX_RECURRENT", 64),
    "never recurrent": (triton_ops, "MAX_RECURRENT", 0),
}

Inputs = dict[str, torch.Tensor]


def make_inputs(S: int, H: int, K: int, V: int) -> Inputs:
    """Gates as in a trained model: the forget gates mostly open, memories from a few to some thousand tokens long."""
    B, randn = TOKENS // S, functools.partial(torch.randn, device=harness.DEVICE)
    inputs = {name: randn(B, S, H, dim, dtype=torch.bfloat16) for name, dim in (("q", K), ("k", K), ("v", V))}
    inputs["igate"] = randn(B, S, H)
    inputs["fgate"] = randn(B, S, H) + torch.linspace(3, 6, H, device=harness.DEVICE)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def check(op: Callable, inputs: Inputs, oracle: str, parts: list[Callable], bounds: dict[str, float]) -> dict:
    """Errors of h and of all gradients against float64, in some parts of the tensors that are a problem of their own.
    A part gets a name (of an input, or h) and the tensor."""
    h = op(**inputs, backend="triton")[0]
    dh = torch.randn_like(h)
    actual = {"h": h} | dict(zip(inputs, torch.autograd.grad(h, list(inputs.values()), dh), strict=True))
    errors = dict.fromkeys(bounds, 0.0)
    for part in parts:
        leaves = {name: part(name, x.detach()).double().requires_grad_() for name, x in inputs.items()}
        expected_h = op(**leaves, backend=oracle)[0]
        expected = torch.autograd.grad(expected_h, list(leaves.values()), part("h", dh).double())
        for name, exact in zip(("h", *leaves), (expected_h, *expected), strict=True):
            error = relative_error(part(name, actual[name]), exact)
            errors[name] = max(errors[name], error)
    if not all(errors[name] <= bound for name, bound in bounds.items()):
        raise ValueError(f"wrong result, not timed: {errors}, allowed {bounds}")
    return errors


def check_mlstm(inputs: Inputs) -> dict:
    parts = [functools.partial(sequence_and_head, i, i) for i in (0, -1)]
    return check(mlstm, inputs, "torch", parts, BOUNDS)


def sequence_and_head(row: int, head: int, name: str, x: torch.Tensor) -> torch.Tensor:
    return x[row, :, head, None][None]


# --- the contestants of the mLSTM: each gives a forward pass and its leaves


def native(inputs: Inputs):
    return lambda: mlstm(**inputs, backend="triton")[0], list(inputs.values())


def tfla(inputs: Inputs):
    """As its README shows."""
    from mlstm_kernels.torch.backend_module import mLSTMBackend, mLSTMBackendConfig

    config = mLSTMBackendConfig(
        chunkwise_kernel="chunkwise--triton_xl_chunk",
        sequence_kernel="native_sequence__triton",
        step_kernel="triton",
        chunk_size=128,
        return_last_states=False,
    )
    backend = mLSTMBackend(config)
    leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs.values()]
    return lambda: backend(**dict(zip("qkvif", leaves, strict=True))), leaves


def simple_gla(inputs: Inputs):
    from fla.ops.simple_gla import chunk_simple_gla

    leaves = [x.detach().requires_grad_() for x in (*(inputs[n] for n in "qkv"), F.logsigmoid(inputs["fgate"]))]
    return lambda: chunk_simple_gla(*leaves[:3], g=leaves[3])[0], leaves


def attention(backend: SDPBackend, inputs: Inputs):
    B, S = inputs["q"].shape[:2]
    H, D = ATTENTION_SHAPE
    options = {"dtype": torch.bfloat16, "device": harness.DEVICE, "requires_grad": True}
    leaves = [torch.randn(B, H, S, D, **options) for _ in range(3)]

    def forward():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*leaves, is_causal=True)

    return forward, leaves


BASELINES: dict[str, Callable] = {"tfla": tfla, "simple_gla": simple_gla}
ATTENTION: dict[str, Callable] = {  # does not depend on the shape
    "flash_attention_2": functools.partial(attention, SDPBackend.FLASH_ATTENTION),
    "cudnn_attention": functools.partial(attention, SDPBackend.CUDNN_ATTENTION),
}


def jobs() -> Jobs:
    """hf_xlstm first, then what it is measured beside, whose kernels compile on the spot."""
    yield Job({"op": "copy", "kernel": "torch"}, copy_bandwidth)
    yield from sequence_jobs({HF_XLSTM: native})
    for B in STEP_BATCHES:
        name = {"op": "step", "kernel": HF_XLSTM, "B": B}
        yield Job(name, functools.partial(time_step, B, *SHAPES[0]), ("smoke/mlstm/step/bfloat16/*",))
    yield from slstm_jobs([HF_XLSTM])
    others = [*slstm_jobs(["cudnn_lstm"])]
    yield from (job for job in others if job.name["op"] == "slstm_sequence")
    yield from sequence_jobs(BASELINES, ATTENTION)
    yield from (job for job in others if job.name["op"] == "slstm_step")  # whose graphs take long to capture
    yield from slstm_jobs(["pytorch"])


def copy_bandwidth() -> dict[str, float]:
    """Read and written, by a copy much larger than the caches: the speed limit of everything bound by memory."""
    source = torch.ones(round(20 * L2_BYTES / 4), device=harness.DEVICE)
    target = torch.empty_like(source)
    return {"tb_per_s": 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e9}


def variant_jobs() -> Jobs:
    """What the launch plan decides, decided otherwise."""
    for variant, replacement in SLSTM_VARIANTS.items():
        for B, T, D in SLSTM_VARIANT_SHAPES:
            name = {"op": "slstm_sequence", "kernel": HF_XLSTM, "B": B, "T": T, "D": D, "variant": variant}
            work = functools.partial(slstm_variant_row, replacement, B, T, D)
            yield Job(name, work, ("smoke/slstm/*ward/bfloat16/*",))
    groups = [(LONG_VARIANTS, LONG_LENGTHS), (TILE_VARIANTS, TILE_LENGTHS)]
    groups += [(VARIANTS, LENGTHS), (SHORT_VARIANTS, SHORT_LENGTHS)]
    for variants, lengths in groups:
        for variant, replacement in variants.items():
            for job in sequence_jobs({HF_XLSTM: native}, lengths=lengths):
                sizes = [job.name[x] for x in "SHKV"]
                work = functools.partial(variant_row, replacement, *sizes)
                yield Job(job.name | {"variant": variant}, work, job.needs)


def slstm_variant_row(replacement: tuple[object, str, object], *sizes: int) -> dict:
    with mock.patch.object(*replacement):
        return slstm_sequence(HF_XLSTM, *sizes)


def variant_row(replacement: tuple[object, str, object], S: int, H: int, K: int, V: int) -> dict:
    with mock.patch.object(*replacement):
        inputs = make_inputs(S, H, K, V)
        row = {"errors": check_mlstm(inputs)}
        inference, training = passes(native(inputs)[0])
        row |= {"forward_ms": milliseconds(inference), "training_ms": milliseconds(training, native(inputs)[1])}
        return row | {"kernel_ms": kernel_milliseconds(lambda: (inference(), training()))}


def sequence_jobs(
    contestants: dict[str, Callable],
    for_first_shape: dict[str, Callable] | None = None,
    lengths: list[int] | None = None,
) -> Jobs:
    for H, K, V in SHAPES:
        for S in lengths or LENGTHS:
            for kernel, make in (contestants | (for_first_shape or {} if SHAPES[0] == (H, K, V) else {})).items():
                name = {"op": "sequence", "kernel": kernel, "H": H, "K": K, "V": V, "S": S}
                needs = ("smoke/mlstm/*ward/bfloat16/*",) if make is native else ()
                yield Job(name, functools.partial(sequence_row, make, S, H, K, V), needs)


def sequence_row(make: Callable, S: int, H: int, K: int, V: int) -> dict:
    inputs = make_inputs(S, H, K, V)
    row = {}
    if make is native:
        row["errors"] = check_mlstm(inputs)
    forward, leaves = make(inputs)
    return row | time_sequence(forward, leaves) | time_with_cold_allocator(forward)


def passes(forward: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward alone, and forward and backward."""
    gradient = torch.randn_like(forward())
    return torch.no_grad()(forward), lambda: forward().backward(gradient)


def time_sequence(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> dict[str, float]:
    inference, training = passes(forward)
    return {
        "forward_ms": milliseconds(inference),
        "training_ms": milliseconds(training, leaves),
        "training_gb": peak_gigabytes(training),
    }


def time_with_cold_allocator(forward: Callable[[], torch.Tensor]) -> dict[str, float]:
    inference, training = passes(forward)
    return {
        "forward_cold_ms": milliseconds_cold_allocator(inference),
        "training_cold_ms": milliseconds_cold_allocator(training),
    }


def time_step(B: int, H: int, K: int, V: int) -> dict:
    """One decode step of one layer, in place, as in a model: other layers' states push this one's out of the cache."""
    state_bytes = 4 * B * H * K * V
    layers = max(2, round(5 * L2_BYTES / state_bytes))
    randn = functools.partial(torch.randn, device=harness.DEVICE)
    states = [tuple(map(randn, ((B, H, K, V), (B, H, K), (B, H)))) for _ in range(layers)]
    q, k, v = (randn(B, H, dim, dtype=torch.bfloat16) for dim in (K, K, V))
    inputs = (q, k, v, randn(B, H), randn(B, H) + 4)

    def double(tensors):
        return tuple(x.double() for x in tensors)

    expected_h, (expected_c, _, expected_m) = mlstm_step(*double(inputs), double(states[0]), backend="reference")
    h, (c, _, m) = mlstm_step(*inputs, states[0], inplace=True, backend="triton")
    shift = torch.exp(m - expected_m)[..., None, None]
    errors = {"h": relative_error(h, expected_h), "c": relative_error(c * shift, expected_c)}
    if not (errors["h"] <= BOUNDS["h"] and errors["c"] <= 1e-5):
        raise ValueError(f"wrong result, not timed: {errors}")

    def steps():
        for state in states:
            mlstm_step(*inputs, state, inplace=True, backend="triton")

    us = triton.testing.do_bench_cudagraph(steps, rep=100, return_mode="median") / layers * 1e3
    return {"H": H, "K": K, "V": V, "us": us, "tb_per_s": 2 * state_bytes / us / 1e6, "errors": errors}


# --- sLSTM


def slstm_jobs(kernels: list[str]) -> Jobs:
    for B, T, D in SLSTM_SHAPES:
        for kernel in kernels:
            name = {"op": "slstm_sequence", "kernel": kernel, "B": B, "T": T, "D": D}
            needs = ("smoke/slstm/*ward/bfloat16/*",) if kernel == HF_XLSTM else ()
            yield Job(name, functools.partial(slstm_sequence, kernel, B, T, D), needs)
    for B, D in SLSTM_STEP_SHAPES:
        for kernel in kernels:
            needs = ("smoke/slstm/step/bfloat16/*",) if kernel == HF_XLSTM else ()
            name = {"op": "slstm_step", "kernel": kernel, "B": B, "D": D}
            yield Job(name, functools.partial(time_slstm_step, kernel, B, D), needs)


def make_slstm_inputs(B: int, T: int, D: int) -> Inputs:
    """The parameters as a new model has them where R is not zero."""
    H = SLSTM_HEADS
    gates = torch.randn(B, T, 4, H, D, device=harness.DEVICE)
    weight = torch.empty(4, H, D, D, device=harness.DEVICE).uniform_(-1, 1) / (H * D) ** 0.5
    bias = torch.zeros(4, H, D, device=harness.DEVICE)
    bias[1] = torch.linspace(5, -7, D)
    inputs = {"gates": gates, "recurrent_weight": weight, "bias": bias}
    return {name: x.bfloat16().requires_grad_() for name, x in inputs.items()}


def slstm_sequence(kernel: str, B: int, T: int, D: int) -> dict:
    if kernel == "cudnn_lstm":
        return time_sequence(*cudnn_lstm(B, T, SLSTM_HEADS * D))
    inputs, row = make_slstm_inputs(B, T, D), {}
    if kernel == HF_XLSTM:
        row["errors"] = check(slstm, inputs, "reference", [outer_heads], SLSTM_BOUNDS)
    return row | time_sequence(lambda: slstm(**inputs, backend=SLSTM_BACKENDS[kernel])[0], list(inputs.values()))


def outer_heads(name: str, x: torch.Tensor) -> torch.Tensor:
    """The first and the last head of all sequences, which share the parameters."""
    dim = {"gates": 3, "recurrent_weight": 1, "bias": 1, "h": 2}[name]
    return x.index_select(dim, torch.tensor([0, x.shape[dim] - 1], device=x.device))


def cudnn_lstm(B: int, T: int, width: int):
    half = {"dtype": torch.float16, "device": harness.DEVICE}
    lstm = torch.nn.LSTM(width, width, **half)
    x = torch.randn(T, B, width, requires_grad=True, **half)

    def forward():
        lstm.train(torch.is_grad_enabled())  # else it keeps what a backward pass would need
        return lstm(x)[0]

    return forward, [x, *lstm.parameters()]


def time_slstm_step(kernel: str, B: int, D: int) -> dict:
    """One decode step of one layer, in place."""
    steps, row = cudnn_lstm_steps(B, D) if kernel == "cudnn_lstm" else slstm_steps(SLSTM_BACKENDS[kernel], B, D)
    us = triton.testing.do_bench_cudagraph(steps, rep=100, return_mode="median") / SLSTM_LAYERS * 1e3
    return row | {"us": us}


def slstm_steps(backend: str, B: int, D: int) -> tuple[Callable[[], None], dict]:
    states = [tuple(torch.zeros(4, B, SLSTM_HEADS, D, device=harness.DEVICE)) for _ in range(SLSTM_LAYERS)]
    inputs = [[x.detach() for x in make_slstm_inputs(1, B, D).values()] for _ in range(SLSTM_LAYERS)]
    inputs = [(gates[0], *parameters) for gates, *parameters in inputs]

    def steps():
        for arguments, state in zip(inputs, states, strict=True):
            slstm_step(*arguments, state, inplace=True, backend=backend)

    steps()  # so that the states are those of a running model
    exact_inputs, exact_state = (tuple(x.double() for x in tensors) for tensors in (inputs[0], states[0]))
    expected_h, (_, expected_c, expected_n, _) = slstm_step(*exact_inputs, exact_state, backend="reference")
    h, (_, c, n, _) = slstm_step(*inputs[0], states[0], inplace=True, backend=backend)
    errors = {"h": relative_error(h, expected_h), "c / n": relative_error(c / n, expected_c / expected_n)}
    if not all(error <= SLSTM_BOUNDS["h"] for error in errors.values()):
        raise ValueError(f"wrong result, not timed: {errors}")
    return steps, {"errors": errors}


def cudnn_lstm_steps(B: int, D: int) -> tuple[Callable[[], None], dict]:
    width, half = SLSTM_HEADS * D, {"dtype": torch.float16, "device": harness.DEVICE}
    layers = [torch.nn.LSTM(width, width, **half).eval() for _ in range(SLSTM_LAYERS)]
    x, h, c = torch.randn(3, 1, B, width, **half)

    def steps():
        with torch.no_grad():
            for layer in layers:
                layer(x, (h, c))

    return steps, {}
