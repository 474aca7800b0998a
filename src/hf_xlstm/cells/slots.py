"""A step of a cell on states that lie in a pool of slots, as a server of many users keeps them."""

from collections.abc import Callable

import torch

from .numerics import is_readable


def step_in_slots(
    step: Callable, inputs: tuple[torch.Tensor, ...], pools: tuple[torch.Tensor, ...], state_indices: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One step in place: row b of the inputs (B, ...) reads and writes slot state_indices[b] of `pools` (slots, ...).
    A row with a negative index is padding: it touches no slot, and its output is 0.

    `step(*inputs, state, inplace=...)` is the step of rows with states of their own. Returns h and the pools.
    """
    if state_indices.is_cpu and is_readable(state_indices):
        return _step_in_known_slots(step, inputs, pools, state_indices), pools
    # The device is not waited for, so every row takes a step and writes. A padding row does what the first real one
    # does, and writes the same into the same slot.
    real = state_indices >= 0
    row = torch.where(real, torch.arange(real.shape[0], device=real.device), real.int().argmax())
    slots = state_indices.long().index_select(0, row).clamp_min(0)
    old = tuple(x.index_select(0, slots) for x in pools)
    h, new = step(*(x.index_select(0, row) for x in inputs), old)
    for pool, x, y in zip(pools, new, old, strict=True):
        pool.index_copy_(0, slots, torch.where(real.any(), x, y))
    return torch.where(real.view(-1, *[1] * (h.ndim - 1)), h, 0), pools


def _step_in_known_slots(step, inputs, pools, state_indices: torch.Tensor) -> torch.Tensor:
    """On a CPU: only the real rows take a step, and neighbouring slots are views of the pools, not copies."""
    slots = state_indices.tolist()
    rows = [row for row, slot in enumerate(slots) if slot >= 0]
    if not rows:
        return step(*inputs, tuple(x.new_zeros(len(slots), *x.shape[1:]) for x in pools))[0].zero_()
    if len(rows) < len(slots):
        index = torch.tensor(rows)
        h = _step_in_known_slots(step, tuple(x[index] for x in inputs), pools, state_indices[index])
        return h.new_zeros(len(slots), *h.shape[1:]).index_copy(0, index, h)
    first, count = slots[0], len(slots)
    if slots == list(range(first, first + count)):
        return step(*inputs, tuple(x[first : first + count] for x in pools), inplace=True)[0]
    state = tuple(x.index_select(0, state_indices) for x in pools)
    h, _ = step(*inputs, state, inplace=True)
    for pool, x in zip(pools, state, strict=True):
        pool.index_copy_(0, state_indices.long(), x)
    return h
