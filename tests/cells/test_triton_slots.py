"""Decoding from a pool of states: row b of a step reads and writes the slot that `state_indices` names."""

import os

import pytest
import torch


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms demand it on a GPU
pytest.importorskip("triton")

from hf_xlstm.cells.mlstm.triton_ops import mlstm_step_triton
from hf_xlstm.cells.slstm import triton_launch as slstm_launch
from hf_xlstm.cells.slstm.triton_ops import slstm_step_triton
from hf_xlstm.cells.triton_common import Tiles


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INDICES = [4, -1, 0, 2]  # of 6 slots; the second row of the batch is padding


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def mlstm(dtype):
    """A step as a function of rows of the batch and a state, and a pool of 6 states whose slots lie apart."""
    q, k, v = (torch.randn(4, 2, dim, device=DEVICE).to(dtype) for dim in (24, 24, 40))
    igate, fgate = torch.randn(2, 4, 2, device=DEVICE)
    shapes = ((2, 24, 40), (2, 24), (2,))
    pool = tuple(torch.randn(6, 2, *shape, device=DEVICE)[:, 1] for shape in shapes)

    def step(rows, state, **options):
        inputs = (x[rows] for x in (q, k, v, igate, fgate))
        return mlstm_step_triton(*inputs, state, scale=0.2, eps=1e-6, inplace=True, **options)[0]

    return step, pool


def slstm(dtype, head_dim=5):
    gates = torch.randn(4, 4, 2, head_dim, device=DEVICE).to(dtype)
    weight = torch.randn(4, 2, head_dim, head_dim, device=DEVICE) / head_dim**0.5
    bias = torch.randn(4, 2, head_dim, device=DEVICE)
    h, c, n, m = torch.randn(6, 4, 2, head_dim, device=DEVICE).unbind(1)
    pool = (h, c, n.abs_().add_(0.1), m)

    def step(rows, state, **options):
        return slstm_step_triton(gates[rows], weight, bias, state, inplace=True, **options)[0]

    return step, pool


@pytest.fixture(params=["mlstm", "slstm resident", "slstm streamed", "slstm spread"])
def cell(request, monkeypatch):
    if request.param == "mlstm":
        return mlstm
    if request.param == "slstm resident":
        return slstm
    tiles = Tiles(num_warps=4, num_stages=1, BB=slstm_launch.BB, BD=16, BK=16)
    plan = slstm_launch.Plan(tiles, spread=request.param == "slstm spread")
    monkeypatch.setattr(slstm_launch, "spread_plan", lambda *_: plan)
    return lambda dtype: slstm(dtype, head_dim=20)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots(cell, dtype, index_dtype):
    step, pool = cell(dtype)
    before = tuple(x.clone() for x in pool)
    live = [row for row, slot in enumerate(INDICES) if slot >= 0]
    slots = [INDICES[row] for row in live]
    expected_state = tuple(x[slots].clone() for x in pool)
    expected_h = step(live, expected_state)

    indices = torch.tensor([INDICES, [0] * 4], dtype=index_dtype, device=DEVICE).T[:, 0]  # strided
    h = step(slice(None), pool, state_indices=indices)
    assert torch.equal(h[live], expected_h)
    assert (h[1] == 0).all()
    others = [slot for slot in range(6) if slot not in slots]
    for new, expected, old in zip(pool, expected_state, before, strict=True):
        assert torch.equal(new[slots], expected)
        assert not torch.equal(new[slots], old[slots])
        assert torch.equal(new[others], old[others])


def test_nothing_but_padding(cell):
    """Not even states that are NaN are touched."""
    step, pool = cell(torch.float32)
    pool = tuple(torch.full_like(x, float("nan")) for x in pool)
    indices = torch.full((4,), -1, device=DEVICE)
    assert (step(slice(None), pool, state_indices=indices) == 0).all()
    assert all(x.isnan().all() for x in pool)


def test_refused(cell):
    step, pool = cell(torch.float32)
    indices = torch.tensor(INDICES, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        step(slice(None), tuple(x.transpose(-1, -2) if x.ndim > 2 else x for x in pool), state_indices=indices)


def test_only_in_place():
    indices = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    q, gate = torch.zeros(1, 1, 8, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    with pytest.raises(ValueError, match="inplace"):
        mlstm_step_triton(q, q, q, gate, gate, (), scale=1.0, eps=0.0, inplace=False, state_indices=indices)
    with pytest.raises(ValueError, match="inplace"):
        slstm_step_triton(torch.zeros(1, 4, 1, 8, device=DEVICE), None, None, (), state_indices=indices)


def test_operator_contracts():
    c, n, m = (torch.randn(3, 1, *shape, device=DEVICE) for shape in ((8, 8), (8,), ()))
    indices = torch.tensor([2, -1], device=DEVICE)
    q, gate = torch.randn(2, 1, 8, device=DEVICE), torch.randn(2, 1, device=DEVICE)
    torch.library.opcheck(torch.ops.hf_xlstm.mlstm_step.default, (q, q, q, gate, gate, c, n, m, indices, 0.3, 1e-6))
    state = (torch.rand(4, 3, 1, 8, device=DEVICE) + 0.1).unbind(0)
    parameters = (torch.randn(4, 1, 8, 8, device=DEVICE), torch.randn(4, 1, 8, device=DEVICE))
    gates = torch.randn(2, 4, 1, 8, device=DEVICE)
    state = tuple(x.clone() for x in state)
    torch.library.opcheck(torch.ops.hf_xlstm.slstm_step.default, (gates, *parameters, *state, indices))
