"""Numerics that both cells and the model share: the dtype of gates and states, and the forget gate in logarithms."""

import contextlib
import platform
from collections.abc import Callable
from itertools import pairwise
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gates, states, sums and denominators are float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


X86 = platform.machine() in ("x86_64", "AMD64")


def _is_intel() -> bool:
    """Whether Intel made this processor; False where that is unknown."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "GenuineIntel" in file.read(1000)
    except OSError:  # not Linux
        return "Intel" in platform.processor() or (X86 and platform.system() == "Darwin")


INTEL = X86 and _is_intel()
# Whether this processor has no instructions for products in bfloat16. PyTorch's stand-in for them takes four times as
# long as the product in float32 of the same numbers, which is no less exact.
NO_BFLOAT16 = X86 and not torch.cpu._is_avx512_bf16_supported()


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which products with x are computed: its own, or float32 where the processor lacks it."""
    return torch.float32 if NO_BFLOAT16 and x.dtype == torch.bfloat16 and x.is_cpu else x.dtype


def log_forget_gate(fgate: torch.Tensor) -> torch.Tensor:
    """log sigmoid(fgate). PyTorch's own gives NaN for +-inf in the backward pass; the limits are what we want."""
    if not torch.is_grad_enabled():
        return F.logsigmoid(fgate)
    return torch.where(fgate.isinf(), fgate.clamp_max(0), F.logsigmoid(fgate.nan_to_num(posinf=0.0, neginf=0.0)))


def is_legacy_batched(x: torch.Tensor) -> bool:
    """Whether x is one of the batched tensors of `torch.autograd.grad(is_grads_batched=True)`."""
    return torch._C._functorch.is_legacy_batchedtensor(x)


def is_batched(x: torch.Tensor) -> bool:
    """Whether x stands for one row of a larger tensor, as in `torch.func.vmap`: it fits into no ordinary tensor."""
    while torch._C._functorch.is_gradtrackingtensor(x):  # vmap may lie beneath grad
        x = torch._C._functorch.get_unwrapped(x)
    return torch._C._functorch.is_batchedtensor(x) or is_legacy_batched(x)


def is_readable(x: torch.Tensor) -> bool:
    """Whether Python may look at the values of x: it may not while a graph is traced, on the device "meta", and inside
    `torch.func.vmap`."""
    return not (torch.compiler.is_compiling() or x.is_meta or is_fake(x) or is_batched(x))


@torch.compiler.assume_constant_result  # no compiler before PyTorch 2.13 can look into it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which products keep their dtypes. Some devices, such as "meta", have no autocast to switch off."""
    if _has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def first_derivatives_only(op: str, backend: str) -> NoReturn:
    """What the backward pass of a backward pass does that has none."""
    raise NotImplementedError(
        f"`{op}` has first derivatives only (it is once_differentiable) on the {backend} backend. "
        "backend='reference' has derivatives of every order."
    )


def no_transforms(op: str, backend: str, *tensors: torch.Tensor | None) -> None:
    """Raises NotImplementedError inside the transforms of `torch.func`, in forward-mode differentiation outside of
    them, and where one of the tensors is a batched gradient. A custom operator has no forward mode: its outputs would
    come without tangents, and the derivative out as 0, without a word."""
    if torch.compiler.is_compiling():
        return
    batched = any(x is not None and is_legacy_batched(x) for x in tensors)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    if batched or transformed:
        raise NotImplementedError(
            f"`{op}` cannot run under the transforms of torch.func, in forward mode, nor with batched gradients, on "
            f"the {backend} backend. backend='reference' can, and backend='torch' all but forward mode."
        )


def stored(new_state: tuple[torch.Tensor, ...], state: tuple[torch.Tensor, ...], inplace: bool):
    """The new state of a cell, with `inplace` in the tensors of the old one."""
    if not inplace:
        return new_state
    for old, new in zip(state, new_state, strict=True):
        old.copy_(new)
    return state


def one_after_another(
    run: Callable,
    inputs: tuple[torch.Tensor, ...],
    states: tuple[torch.Tensor, ...],
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Packed sequences by a cell that knows no packing: `run` on the part (1, T_i, ...) of each, from its own row of
    the states. An empty sequence passes its state on. Returns h (1, T, ...) and the final states."""
    outputs, final_states = [], []
    for row, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        state = tuple(s[row : row + 1] for s in states)
        if start < end:
            h, state = run(
                *(x[:, start:end] for x in inputs),
                initial_state=state,
                output_final_state=True,
                mask=None if mask is None else mask[:, start:end],
            )
            outputs.append(h)
        final_states.append(state)
    return torch.cat(outputs, dim=1), tuple(torch.cat(s) for s in zip(*final_states, strict=True))
