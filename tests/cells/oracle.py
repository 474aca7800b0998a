"""What the tests of both cells share: on which backends and in which dtypes a test runs, and the masks."""

import pytest
import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# two computations that differ in the order of their sums alone
SAME = {F64: 1e-12, F32: 3e-6, F16: 2e-3, BF16: 1e-2}
MASKS = {
    "left": lambda length: torch.arange(length) >= length // 2,
    "right": lambda length: torch.arange(length) < length // 2,
    "inside": lambda length: torch.arange(length) % 7 > 2,
    "all": lambda length: torch.zeros(length, dtype=torch.bool),
}


def on(*backends: str, dtypes: tuple[torch.dtype, ...] | None = None):
    """Runs a test on these backends (see the fixture `backend`), in those of the dtypes that each of them knows, or
    in the most exact one. Triton runs on the GPU where there is one, else in its interpreter."""
    cases = []
    for backend in backends:
        known = (F64, F32, F16, BF16) if backend in ("reference", "torch") else (F32, F16, BF16)
        chosen = known[:1] if dtypes is None else [dtype for dtype in known if dtype in dtypes]
        cases += [pytest.param(backend, dtype, id=f"{backend}-{str(dtype)[6:]}") for dtype in chosen]
    return pytest.mark.parametrize("backend, dtype", cases, indirect=["backend"])


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, F32)


def double(tensors):
    return tuple(x.double() for x in tensors)
