"""What the launchers of both cells share."""

import contextlib

import torch
import triton
import triton.language as tl


INTERPRETED = triton.knobs.runtime.interpret
MAX_HEAD_DIM = 512


def unsupported_reason(x: torch.Tensor, *head_dims: int) -> str | None:
    """Why tensors like this one, with heads of these dims, cannot run here, or None."""
    if x.device.type != "cuda" and not INTERPRETED:
        return f"it needs a GPU, the tensors are on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, bfloat16 and float16, not {x.dtype}"
    if max(head_dims) > MAX_HEAD_DIM:
        return f"head dims go up to {MAX_HEAD_DIM}, got {' and '.join(map(str, head_dims))}"
    return None if INTERPRETED else unsupported_gpu(x.device)


def unsupported_gpu(device: torch.device) -> str | None:
    """The GPUs for which benchmarks/gpu/kernel_resources.py compiles every kernel, and those that run the same code."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        if properties.major >= 8:
            return None
        return f"it needs compute capability 8.0, the GPU has {properties.major}.{properties.minor}"
    architecture = properties.gcnArchName.split(":")[0]
    return None if architecture == "gfx942" else f"of AMD's GPUs it is compiled for gfx942, not {architecture}"


def dense(x: torch.Tensor) -> torch.Tensor:
    """Kernels take any strides but the last: a head's features must lie side by side, as projections produce them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def dot_options(dtype: torch.dtype) -> dict:
    """The type in which products are formed. float16 goes through tf32, whose mantissa holds it and whose exponent
    does not overflow. The interpreter cannot multiply bfloat16."""
    return {
        "DOT": tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32,
        "PRECISION": "tf32" if dtype == torch.float16 else "ieee",
    }


@triton.jit
def log_sigmoid(x):
    """min(x, 0) - log(1 + y), y = exp(-|x|), with log(1 + y) = 2 atanh(z), z = y / (2 + y) <= 1/3, as a series: full
    relative precision where an open gate (y near 0) has its digits, unlike log(1 + y)."""
    y = tl.exp(-tl.abs(x))
    z = y / (2.0 + y)
    s = z * z
    series = s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s / 15))))))
    return tl.minimum(x, 0.0) - 2.0 * (z + z * series)
