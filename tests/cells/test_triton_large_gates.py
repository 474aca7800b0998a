"""Gates of 300 to 1e5 and infinite ones through every Triton kernel of both cells, against the float64 recurrence.

Logarithms of weights are then differences of sums that float32 rounds to anything between 1e-5 and 1e-2, and what is
left of an exponent of -1e5 is 0: both must come out as in float64.
"""

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
from oracle import DEVICE


pytest.importorskip("triton")

from hf_xlstm.cells.mlstm import triton_launch as launch
from hf_xlstm.cells.mlstm.reference import mlstm_recurrent, mlstm_recurrent_step
from hf_xlstm.cells.mlstm.triton_ops import mlstm_step_triton, mlstm_triton
from hf_xlstm.cells.slstm import triton_launch as slstm_launch
from hf_xlstm.cells.slstm.reference import slstm_recurrent
from hf_xlstm.cells.slstm.triton_ops import slstm_step_triton, slstm_triton
from hf_xlstm.cells.triton_common import GPU, Tiles


PATHS = ("step by step", "C in memory", "C on chip", "spans")
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 5e-2)}  # outputs and states, gradients


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """One of the ways through the mLSTM's kernels."""
    monkeypatch.setattr(launch, "MIN_SPANS", 2 if request.param == "spans" else 10**9)
    monkeypatch.setattr(launch, "MIN_CHUNKS_PER_SPAN", 1)
    monkeypatch.setattr(launch, "BOUNDARY_TILE", 2)
    if request.param == "C on chip":
        decide, gpu = launch.on_chip_plan, GPU(major=9, processors=1)
        monkeypatch.setattr(launch, "on_chip_plan", lambda dtype, K, V, *_: decide(torch.bfloat16, K, V, 1, gpu))
    return request.param


def check(inputs, state=None, **options):
    """Where one token outweighs all others, most gradients vanish: they are held against the size of those that
    reach the values."""
    rows = len(options["cu_seqlens"]) - 1 if options.get("cu_seqlens") is not None else len(inputs[0])
    dh, dstate = torch.randn(inputs[2].shape, device=DEVICE).to(inputs[2].dtype), make_state(rows)[:2]
    actual, m = evaluate(mlstm_triton, inputs, state, dh, dstate, **options)
    options = {name: double(x) for name, x in options.items()}
    expected, _ = evaluate(mlstm_recurrent, *map(double, (inputs, state, dh, dstate)), m, **options)
    bounds = TOLERANCE[inputs[0].dtype]
    size = expected["dv"].norm().item()
    errors = {
        name: error(actual[name], x.detach(), max(size, 1e-30) if name[0] == "d" else 1e-30)
        for name, x in expected.items()
    }
    assert all(bound < bounds[name[0] == "d"] for name, bound in errors.items()), errors


def length_of(path: str) -> int:
    return 14 if path == "step by step" else 150


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_mlstm(path, kind, scale):
    check(make_inputs(kind, scale, 1, length_of(path), torch.float32))


@pytest.mark.parametrize("kind", ["level", "infinite"])
def test_mlstm_in_bfloat16(path, kind):
    check(make_inputs(kind, 1e4, 1, length_of(path), torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_mlstm_masked_from_a_state(path, kind):
    length = length_of(path)
    mask = torch.rand(2, length, device=DEVICE) < 0.8
    check(make_inputs(kind, 1e4, 2, length, torch.float32), make_state(2, level=2e4), mask=mask)


@pytest.mark.parametrize("path", ["C in memory", "C on chip"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_mlstm_packed(path, kind):
    cu_seqlens = torch.tensor([0, 5, 5, 80, 150], device=DEVICE)
    check(make_inputs(kind, 1e4, 1, 150, torch.float32), make_state(4), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_mlstm_step(kind, scale):
    inputs = make_inputs(kind, scale, 2, 30, torch.float32)
    state = make_state(2)
    expected_state = double(state)
    for step in zip(*(x.unbind(1) for x in inputs), strict=True):
        h, state = mlstm_step_triton(*step, state, scale=0.25, eps=0.0, inplace=True)
        expected_h, expected_state = mlstm_recurrent_step(*double(step), expected_state, scale=0.25, eps=0.0)
        assert error(h, expected_h, 1e-30) < 1e-5
    shift = torch.exp(state[2].double() - expected_state[2])[..., None]
    assert error(state[0] * shift[..., None], expected_state[0], 1e-30) < 1e-5
    assert error(state[1] * shift, expected_state[1], 1e-30) < 1e-5


# --- sLSTM


@pytest.fixture(params=["resident", "streamed", "spread"])
def head_dim(request, monkeypatch):
    """A head whose R stays on chip, one that is read in tiles at every step, and one of several programs."""
    if request.param == "resident":
        return 5
    tiles = Tiles(num_warps=4, num_stages=1, BB=slstm_launch.BB, BD=16, BK=16)
    plan = slstm_launch.Plan(tiles, spread=request.param == "spread")
    monkeypatch.setattr(slstm_launch, "spread_plan", lambda *_: plan)
    return 20


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_slstm(head_dim, kind, scale):
    inputs = make_slstm_inputs(kind, scale, 9, head_dim)
    inputs = without_recurrence(inputs) if kind == "level" else inputs
    dh = torch.randn(2, 9, 2, head_dim, device=DEVICE)
    actual = evaluate_slstm(slstm_triton, inputs, dh)
    expected = evaluate_slstm(slstm_recurrent, *(double(x) for x in (inputs, dh)))
    for name, x in expected.items():
        assert error(actual[name], x.detach(), 1e-30) < (1e-4 if name[0] == "d" else 1e-5), name


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["random", "level"])
def test_slstm_step(head_dim, kind, scale):
    inputs = make_slstm_inputs(kind, scale, 6, head_dim)
    gates, *parameters = without_recurrence(inputs) if kind == "level" else inputs
    expected_h, _ = slstm_recurrent(*double((gates, *parameters)))
    state = tuple(torch.zeros(4, 2, 2, head_dim, device=DEVICE))
    for t in range(6):
        h, state = slstm_step_triton(gates[:, t], *parameters, state, inplace=True)
        assert error(h, expected_h[:, t], 1e-30) < 1e-5
