"""The cells of xLSTM alone on a CPU: batch 1, the heads of models 512, 768 and 1,024 wide.

mlstm        a sequence, forward or with backward; beside the chunkwise mLSTM and causal attention of the same heads
mlstm_step   one step, in place; beside the step of Transformers and a copy of the state
slstm        a sequence, forward or with backward; beside the reference and an LSTM, whose recurrence is dense
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.xlstm import modeling_xlstm as in_tree

from hf_xlstm.ops import mlstm, mlstm_step, slstm


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.harness import DTYPES, Measure, Turn, compare, main
from benchmarks.peers import HF_XLSTM, IN_TREE
from benchmarks.provenance import relative_error, significant, timed


# float64 reference and result may differ by this much (relative, Euclidean)
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
ATTENTION, REFERENCE, LSTM, COPY = "attention", "reference", "lstm", "copy"


def mlstm_inputs(shape: str, dtype: torch.dtype, batch_size: int, length: int) -> list[torch.Tensor]:
    """q, k, v, igate, fgate for `shape` "<heads>x<K>x<V>"."""
    heads, key_dim, value_dim = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    widths = [(key_dim,), (key_dim,), (value_dim,), (), ()]
    q, k, v, i, f = (torch.randn(batch_size, length, heads, *width, generator=generator) for width in widths)
    return [q.to(dtype), k.to(dtype), v.to(dtype), i, f + 3]


def mlstm_step_inputs(shape: str, dtype: torch.dtype, batch_size: int) -> list[torch.Tensor]:
    """q, k, v, igate, fgate, c, n, m."""
    q, k, v, i, f = (x.squeeze(1) for x in mlstm_inputs(shape, dtype, batch_size, 1))
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(*k.shape, v.shape[-1], generator=generator)
    return [q, k, v, i, f, c, torch.randn(k.shape, generator=generator), torch.zeros(i.shape)]


def slstm_inputs(shape: str, dtype: torch.dtype, length: int) -> list[torch.Tensor]:
    """gates, recurrent weight, bias for `shape` "<heads>x<D>"."""
    heads, head_dim = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(1, length, 4, heads, head_dim, generator=generator)
    weight = torch.randn(4, heads, head_dim, head_dim, generator=generator) / (4 * head_dim**0.5)
    return [gates.to(dtype), weight.to(dtype), torch.zeros(4, heads, head_dim, dtype=dtype)]


def evaluate(function: Callable, inputs: Sequence[torch.Tensor], backward: bool) -> list[torch.Tensor]:
    """The output, and with `backward` also the gradients of all inputs for one of ones."""
    if not backward:
        with torch.no_grad():
            return [function(*inputs)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    h = function(*inputs)
    return [h, *torch.autograd.grad(h, inputs, torch.ones_like(h))]


def assert_exact(function: Callable, inputs: Sequence[torch.Tensor], backward: bool, dtype: str) -> list[float]:
    """Relative errors against the reference in float64. No number is written before this has passed."""
    actual = evaluate(function, inputs, backward)
    expected = evaluate(partial(function, backend="reference"), [x.double() for x in inputs], backward)
    errors = [significant(relative_error(a, e), 2) for a, e in zip(actual, expected, strict=True)]
    if not all(error < TOLERANCE[dtype] for error in errors):
        raise AssertionError(f"Relative errors {errors} against the reference.")
    return errors


def native_mlstm(*inputs: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    return mlstm(*inputs, backend=backend)[0]


def native_mlstm_step(*inputs: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    return mlstm_step(*inputs[:5], inputs[5:], backend=backend)[0]


def native_slstm(*inputs: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    return slstm(*inputs, backend=backend)[0]


def mlstm_turn(peer: str, shape: str, dtype: str, length: int, backward: bool) -> Turn:
    inputs = mlstm_inputs(shape, DTYPES[dtype], 1, length)
    if peer == HF_XLSTM:
        return timed(partial(evaluate, native_mlstm, inputs, backward))
    q, k, v, i, f = (x.transpose(1, 2).to(DTYPES[dtype]).contiguous() for x in inputs)
    if peer == ATTENTION:
        return timed(partial(evaluate, partial(F.scaled_dot_product_attention, is_causal=True), [q, k, v], backward))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), q.new_zeros(q[:, :, 0].shape), i.new_zeros(1, 1, 1)
    names = ("c_initial", "n_initial", "m_initial")
    function = partial(in_tree.mlstm_chunkwise_native_autograd, **dict(zip(names, state, strict=True)))
    return timed(partial(evaluate, function, [q, k, v, i, f], backward))


def mlstm_step_turn(peer: str, shape: str, dtype: str, batch_size: int) -> Turn:
    q, k, v, i, f, c, n, m = mlstm_step_inputs(shape, DTYPES[dtype], batch_size)
    if peer == COPY:
        return timed(partial(torch.empty_like(c).copy_, c))
    if peer == HF_XLSTM:
        return timed(partial(mlstm_step, q, k, v, i, f, (c, n, m), inplace=True))
    i, f, m = (x[..., None] for x in (i, f, m))
    return timed(partial(in_tree.mlstm_recurrent_step_native, q, k, v, i, f, c, n, m))


def slstm_turn(peer: str, shape: str, dtype: str, length: int, backward: bool) -> Turn:
    inputs = slstm_inputs(shape, DTYPES[dtype], length)
    function = partial(native_slstm, backend=REFERENCE) if peer == REFERENCE else native_slstm
    if peer == LSTM:
        width = inputs[2][0].numel()
        lstm = nn.LSTM(width, width, batch_first=True, dtype=DTYPES[dtype])
        inputs, function = [torch.randn(1, length, width, dtype=DTYPES[dtype])], lambda x: lstm(x)[0]
    return timed(partial(evaluate, function, inputs, backward))


def measure_mlstm(shape: str, dtype: str, length: int, backward: bool, args: argparse.Namespace) -> dict:
    errors = assert_exact(native_mlstm, mlstm_inputs(shape, DTYPES[dtype], 1, 200), backward, dtype)
    start = partial(mlstm_turn, shape=shape, dtype=dtype, length=length, backward=backward)
    peers = compare(start, [HF_XLSTM, IN_TREE, ATTENTION], length, args, baselines=[IN_TREE, ATTENTION])
    return {"errors": errors, "peers": peers}


def measure_mlstm_step(shape: str, dtype: str, batch_size: int, args: argparse.Namespace) -> dict:
    errors = assert_exact(native_mlstm_step, mlstm_step_inputs(shape, DTYPES[dtype], batch_size), False, dtype)
    start = partial(mlstm_step_turn, shape=shape, dtype=dtype, batch_size=batch_size)
    return {"errors": errors, "peers": compare(start, [HF_XLSTM, IN_TREE, COPY], batch_size, args)}


def measure_slstm(shape: str, dtype: str, length: int, backward: bool, args: argparse.Namespace) -> dict:
    errors = assert_exact(native_slstm, slstm_inputs(shape, DTYPES[dtype], 50), backward, dtype)
    start = partial(slstm_turn, shape=shape, dtype=dtype, length=length, backward=backward)
    peers = compare(start, [HF_XLSTM, REFERENCE, LSTM], length, args, baselines=[REFERENCE, LSTM])
    return {"errors": errors, "peers": peers}


def rows(quick: bool) -> dict[str, Measure]:
    mlstm_shapes = ["2x16x24"] if quick else ["4x64x128", "4x96x192", "4x128x256"]
    slstm_shapes = ["2x16"] if quick else ["4x128", "4x192", "4x256"]
    lengths = [128] if quick else [512, 2048, 8192]
    batch_sizes = [2] if quick else [1, 8]
    table = {}
    for dtype in DTYPES:
        for direction in ("forward", "backward"):
            backward = direction == "backward"
            for length in lengths:
                for shape in mlstm_shapes:
                    name = f"mlstm/{shape}/{dtype}/{length}/{direction}"
                    table[name] = partial(measure_mlstm, shape, dtype, length, backward)
            for shape in slstm_shapes:
                name = f"slstm/{shape}/{dtype}/{lengths[0]}/{direction}"
                table[name] = partial(measure_slstm, shape, dtype, lengths[0], backward)
        for shape in mlstm_shapes:
            for batch_size in batch_sizes:
                name = f"mlstm_step/{shape}/{dtype}/batch-{batch_size}"
                table[name] = partial(measure_mlstm_step, shape, dtype, batch_size)
    return table


if __name__ == "__main__":
    main("ops", __doc__, rows)
