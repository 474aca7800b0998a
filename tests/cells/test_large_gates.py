"""Gates of 300 to 1e5 and infinite ones in PyTorch, sequence and step, against the float64 recurrence. The kernels of
Triton, which have a test for each way through them, are in test_triton_large_gates.py."""

import pytest
import torch
from large_gates import (
    KINDS,
    SCALES,
    double,
    error,
    evaluate,
    evaluate_slstm,
    make_inputs,
    make_slstm_inputs,
    make_state,
    without_recurrence,
)
from oracle import BF16, DEVICE, F32

from hf_xlstm.ops import mlstm, mlstm_step, slstm, slstm_step


TOLERANCE = {F32: (1e-5, 1e-4), BF16: (1e-2, 5e-2)}  # outputs and states, gradients
kinds = pytest.mark.parametrize("kind", KINDS)
scales = pytest.mark.parametrize("scale", SCALES)


def check(inputs, state=None, rows=None, **options):
    """Gradients that vanish are held against the size of those that reach the values."""
    dh, dstate = torch.randn_like(inputs[2]), make_state(rows or len(inputs[0]))[:2]
    actual, m = evaluate(mlstm, inputs, state, dh, dstate, backend="torch", **options)
    expected, _ = evaluate(mlstm, *map(double, (inputs, state, dh, dstate)), m, backend="reference", **options)
    size, bounds = expected["dv"].norm().item(), TOLERANCE[inputs[0].dtype]
    for name, x in expected.items():
        gradient = name[0] == "d"
        assert error(actual[name], x.detach(), max(size, 1e-30) if gradient else 1e-30) < bounds[gradient], name


@pytest.mark.parametrize("length", [14, 150])
@scales
@kinds
def test_mlstm(kind, scale, length):
    check(make_inputs(kind, scale, 1, length, F32))


@pytest.mark.parametrize("kind", ["level", "infinite"])
def test_mlstm_in_bfloat16(kind):
    check(make_inputs(kind, 1e4, 1, 150, BF16))


@kinds
def test_mlstm_masked_from_a_state(kind):
    """The last chunk is filled up, and the normalizer of what fills it is 0 / 0 without eps."""
    mask = torch.rand(2, 150, device=DEVICE) < 0.8
    check(make_inputs(kind, 1e4, 2, 150, F32), make_state(2, level=2e4), mask=mask, chunk_size=16)


@kinds
def test_mlstm_packed(kind):
    cu_seqlens = torch.tensor([0, 5, 5, 80, 150], device=DEVICE)
    check(make_inputs(kind, 1e4, 1, 150, F32), make_state(4), rows=4, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@scales
@kinds
def test_mlstm_step(kind, scale, backend):
    inputs, state = make_inputs(kind, scale, 2, 30, F32), make_state(2)
    expected_state = double(state)
    for step in zip(*(x.unbind(1) for x in inputs), strict=True):
        h, state = mlstm_step(*step, state, scale=0.25, eps=0.0, inplace=True, backend=backend)
        expected_h, expected_state = mlstm_step(
            *double(step), expected_state, scale=0.25, eps=0.0, backend="reference"
        )
        assert error(h, expected_h, 1e-30) < 1e-5
    shift = torch.exp(state[2].double() - expected_state[2])[..., None]
    assert error(state[0] * shift[..., None], expected_state[0], 1e-30) < 1e-5
    assert error(state[1] * shift, expected_state[1], 1e-30) < 1e-5


@scales
@kinds
def test_slstm(kind, scale):
    inputs = make_slstm_inputs(kind, scale, 80, 5)
    inputs = without_recurrence(inputs) if kind == "level" else inputs
    dh = torch.randn(2, 80, 2, 5, device=DEVICE)
    actual = evaluate_slstm(slstm, inputs, dh, backend="torch")
    expected = evaluate_slstm(slstm, *map(double, (inputs, dh)), backend="reference")
    for name, x in expected.items():
        assert error(actual[name], x.detach(), 1e-30) < (1e-4 if name[0] == "d" else 1e-5), name


@scales
@kinds
def test_slstm_step(kind, scale):
    inputs = make_slstm_inputs(kind, scale, 30, 5)
    gates, *parameters = without_recurrence(inputs) if kind == "level" else inputs
    expected_h, _ = slstm(*double((gates, *parameters)), backend="reference")
    state = tuple(torch.zeros(4, 2, 2, 5, device=DEVICE))
    for t in range(30):
        h, state = slstm_step(gates[:, t], *parameters, state, inplace=True, backend="torch")
        assert error(h, expected_h[:, t], 1e-30) < 1e-5
