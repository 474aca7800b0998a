"""Numerics that both cells and the model share: the dtype of gates and states, and the forget gate in logarithms."""

import torch
import torch.nn.functional as F


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gates, states, sums and denominators are float32, or float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


def log_forget_gate(fgate: torch.Tensor) -> torch.Tensor:
    """log sigmoid(fgate). PyTorch's own gives NaN for +-inf in the backward pass; the limits are what we want."""
    if not (fgate.requires_grad and torch.is_grad_enabled()):
        return F.logsigmoid(fgate)
    return torch.where(fgate.isinf(), fgate.clamp_max(0), F.logsigmoid(fgate.nan_to_num(posinf=0.0, neginf=0.0)))


def stored(new_state: tuple[torch.Tensor, ...], state: tuple[torch.Tensor, ...], inplace: bool):
    """The new state of a cell, with `inplace` in the tensors of the old one."""
    if not inplace:
        return new_state
    for old, new in zip(state, new_state, strict=True):
        old.copy_(new)
    return state
