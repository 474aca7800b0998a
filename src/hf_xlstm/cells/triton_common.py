"""What the Triton launchers of both cells share: which GPUs, tile sizes, strides and types they know."""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl


INTERPRETED = triton.knobs.runtime.interpret
MAX_HEAD_DIM = 512


class GPU(NamedTuple):
    """What the launch plans ask of a GPU."""

    major: int  # compute capability of NVIDIA's GPUs, 0 elsewhere
    processors: int  # what runs programs side by side: NVIDIA's multiprocessors, AMD's compute units

    @classmethod
    def of(cls, device: torch.device) -> "GPU":
        """The GPU of a device. The interpreter plans as for one of no special kind, as large as a common one."""
        if device.type != "cuda":
            return cls(major=0, processors=132)
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.major if torch.version.hip is None else 0, properties.multi_processor_count)

    @property
    def hopper(self) -> bool:
        return self.major == 9


class Tiles(NamedTuple):
    """How one kernel is cut and launched: the sizes of its tiles by the names of its parameters, warps, pipeline
    stages, and the registers a thread may take. What a kernel does not have is None."""

    num_warps: int
    num_stages: int
    BK: int | None = None
    BV: int | None = None
    BB: int | None = None
    BD: int | None = None
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        options = {name: value for name, value in self._asdict().items() if value is not None}
        if torch.version.hip:
            options.pop("maxnreg", None)  # Triton knows it for NVIDIA only
        return options


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
    """The GPUs for which benchmarks/gpu/kernel_resources.py compiles all kernels, and those that run the same code."""
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


def strides(**tensors: torch.Tensor | None) -> dict[str, int]:
    """The strides of (B, T, H, ...) tensors by the names they have in kernels: `strides(q=q)` gives stride_qb,
    stride_qt and stride_qh. Those of an absent tensor are 0, and a mask (B, T) has no heads."""
    return {
        f"stride_{name}{axis}": 0 if x is None else x.stride(dim)
        for name, x in tensors.items()
        for dim, axis in enumerate("bt" if name == "m" else "bth")
    }


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def state_rows(
    state: tuple[torch.Tensor, ...], state_indices: torch.Tensor | None, same_stride: bool = False
) -> tuple[torch.Tensor, ...]:
    """A state to be updated in place, in tensors whose rows are dense, with the same stride in all of them if the
    kernel knows one only. Others are copied, unless they are a pool: a pool of another layout raises ValueError."""
    dense_rows = all(x[:1].is_contiguous() for x in state)
    if dense_rows and not (same_stride and len({x.stride(0) for x in state}) > 1):
        return state
    if state_indices is not None:
        layouts = ", ".join(f"{tuple(x.shape)} with strides {x.stride()}" for x in state)
        raise ValueError(
            f"The slots of a pool must be contiguous{', equally far apart' * same_stride}: got {layouts}."
        )
    return tuple(x.contiguous() for x in state)


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
