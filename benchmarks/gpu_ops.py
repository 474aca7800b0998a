"""The mLSTM op on one GPU: correctness, then time and memory beside other kernels.

    python benchmarks/gpu_ops.py --json results/gpu_ops.json [--variants]

Sequences of S tokens, 65,536 in all, bf16; forward and forward+backward; then decode steps inside a CUDA graph. Ours
come first, each configuration checked against float64 before it is timed. Baselines run where they are installed:
mlstm-kernels (TFLA), flash-linear-attention (simple GLA), and the attention of torch. `--variants` measures what the
launch plan could have chosen, instead of the baselines.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from gpu_common import (
    DEVICE,
    OURS,
    Job,
    argument_parser,
    measure,
    milliseconds,
    milliseconds_cold_allocator,
    peak_gigabytes,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_xlstm.ops import mlstm, mlstm_step, mlstm_triton
from hf_xlstm.ops import mlstm_triton_launch as launch


TOKENS = 65_536
LENGTHS = [512, 2048, 8192, 65_536]
SHAPES = [(8, 256, 512), (16, 128, 256)]  # heads, K, V
ATTENTION_SHAPE = (32, 128)  # heads, head dim: the attention of a 7B Transformer
STEP_BATCHES = [1, 8, 64, 1024]
L2_BYTES = 50e6
BOUNDS = {"h": 1e-2, "q": 3e-2, "k": 3e-2, "v": 1.5e-2, "igate": 3e-2, "fgate": 5e-2}

# What the launch plan decides, decided otherwise: module, name, value.
VARIANTS = {
    "chunks of 64": (launch.GPU, "of", lambda device: launch.GPU(hopper=False, processors=132)),
    "saved states": (mlstm_triton, "SAVE_STATES", True),
    "no segments": (launch, "MIN_SEGMENTS", 10**9),
    "two segments or more": (launch, "MIN_SEGMENTS", 2),
}

Inputs = dict[str, torch.Tensor]


def make_inputs(S: int, H: int, K: int, V: int) -> Inputs:
    """Gates as in a trained model: the forget gates mostly open, memories from a few to some thousand tokens long."""
    B = TOKENS // S
    inputs = {name: torch.randn(B, S, H, dim, dtype=torch.bfloat16) for name, dim in (("q", K), ("k", K), ("v", V))}
    inputs["igate"] = torch.randn(B, S, H)
    inputs["fgate"] = torch.randn(B, S, H) + torch.linspace(3, 6, H)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check(inputs: Inputs, dh: torch.Tensor) -> dict[str, float]:
    """Errors of h and of all gradients against float64, in the first and the last sequence, one head of each."""
    h = mlstm(**inputs, backend="triton")[0]
    gradients = dict(zip(inputs, torch.autograd.grad(h, list(inputs.values()), dh), strict=True))
    errors = dict.fromkeys(BOUNDS, 0.0)
    for row, head in ((0, 0), (-1, -1)):
        part = {name: x.detach()[row, :, head, None][None].double().requires_grad_() for name, x in inputs.items()}
        expected_h = mlstm(**part, backend="torch")[0]
        expected = torch.autograd.grad(expected_h, list(part.values()), dh[row, :, head, None][None].double())
        pairs = {"h": (h, expected_h)} | {n: (gradients[n], e) for n, e in zip(part, expected, strict=True)}
        for name, (ours, theirs) in pairs.items():
            ours = ours.detach()[row, :, head, None][None]
            errors[name] = max(errors[name], relative_error(ours, theirs.detach()))
    if not all(errors[name] <= bound for name, bound in BOUNDS.items()):
        raise ValueError(f"wrong result, not timed: {errors}, allowed {BOUNDS}")
    return errors


# --- the contestants: each gives a forward pass and its leaves


def ours(inputs: Inputs):
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
    leaves = [torch.randn(B, H, S, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def forward():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*leaves, is_causal=True)

    return forward, leaves


BASELINES: dict[str, Callable] = {"tfla": tfla, "simple_gla": simple_gla}
ATTENTION: dict[str, Callable] = {  # does not depend on the shape
    "flash_attention_2": functools.partial(attention, SDPBackend.FLASH_ATTENTION),
    "cudnn_attention": functools.partial(attention, SDPBackend.CUDNN_ATTENTION),
}


def jobs(variants: bool) -> Iterator[Job]:
    yield from sequence_jobs({OURS: ours})
    for B in STEP_BATCHES:
        yield {"op": "step", "kernel": OURS, "batch": B}, functools.partial(time_step, B, *SHAPES[0])
    if not variants:
        yield from sequence_jobs(BASELINES, ATTENTION)
    for name in VARIANTS if variants else ():
        with mock.patch.object(*VARIANTS[name]):
            for row, job in sequence_jobs({OURS: ours}):
                yield row | {"variant": name}, job


def sequence_jobs(contestants: dict[str, Callable], for_first_shape: dict[str, Callable] | None = None):
    for H, K, V in SHAPES:
        for S in LENGTHS:
            for name, make in (contestants | (for_first_shape or {} if SHAPES[0] == (H, K, V) else {})).items():
                row = {"op": "sequence", "kernel": name, "H": H, "K": K, "V": V, "S": S}
                yield row, functools.partial(sequence_row, make, S, H, K, V)


def sequence_row(make: Callable, S: int, H: int, K: int, V: int) -> dict:
    inputs = make_inputs(S, H, K, V)
    errors = {"errors": check(inputs, torch.randn_like(inputs["v"]))} if make is ours else {}
    return errors | time_sequence(*make(inputs))


def time_sequence(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> dict[str, float]:
    gradient = torch.randn_like(forward())

    def without_gradient():
        with torch.no_grad():
            return forward()

    def training():
        forward().backward(gradient)

    return {
        "forward_ms": milliseconds(without_gradient),
        "training_ms": milliseconds(training, leaves),
        "forward_cold_ms": milliseconds_cold_allocator(without_gradient),
        "training_cold_ms": milliseconds_cold_allocator(training),
        "training_gb": peak_gigabytes(training),
    }


def time_step(B: int, H: int, K: int, V: int) -> dict:
    """One decode step of one layer, in place, as in a model: other layers' states push this one's out of the cache."""
    state_bytes = 4 * B * H * K * V
    layers = max(1, round(5 * L2_BYTES / state_bytes))
    states = [tuple(map(torch.randn, ((B, H, K, V), (B, H, K), (B, H)))) for _ in range(layers)]
    q, k, v = (torch.randn(B, H, dim, dtype=torch.bfloat16) for dim in (K, K, V))
    inputs = (q, k, v, torch.randn(B, H), torch.randn(B, H) + 4)

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


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--variants", action="store_true", help="what the launch plan could have chosen")
    args = parser.parse_args()
    torch.set_default_device(DEVICE)
    torch.manual_seed(0)
    return measure(jobs(args.variants), args)


if __name__ == "__main__":
    sys.exit(main())
