"""One call for a sequence and a step, writing states in place, and steps on states that lie in a pool of slots."""

import pytest
import torch
from common import relative_error

from hf_xlstm.ops import mlstm, mlstm_step, slstm, slstm_step


B, H, K, V, SLOTS = 4, 2, 3, 5, 7
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
CELLS = pytest.mark.parametrize("cell", ["mlstm", "slstm"])


def make(cell, length, rows=B, dtype=torch.float32):
    """The cell's two functions, its inputs (B, T, ...), what follows them, and a state with `rows` rows."""
    torch.manual_seed(0)
    if cell == "mlstm":
        shapes = ((H, K), (H, K), (H, V), (H,), (H,))
        inputs = [torch.randn(B, length, *shape).to(dtype) for shape in shapes]
        state = torch.randn(rows, H, K, V), torch.randn(rows, H, K), torch.randn(rows, H)
        return mlstm, mlstm_step, inputs, (), state
    inputs, weights = [torch.randn(B, length, 4, H, K).to(dtype)], (torch.randn(4, H, K, K), torch.randn(4, H, K))
    h, c, n, m = torch.randn(4, rows, H, K)
    return slstm, slstm_step, inputs, weights, (h, c, n.abs() + 1, m)


def copies(state):
    return tuple(x.clone() for x in state)


@BACKENDS
@CELLS
@pytest.mark.parametrize("length", [1, 6])
def test_in_place(cell, length, backend):
    sequence, _, inputs, weights, state = make(cell, length)
    before = copies(state)
    expected_h, expected = sequence(*inputs, *weights, initial_state=state, output_final_state=True, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
    h, final = sequence(*inputs, *weights, initial_state=state, output_final_state=True, inplace=True, backend=backend)
    assert relative_error(h, expected_h) < 1e-6
    assert all(x is y for x, y in zip(final, state, strict=True))
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(state, expected, strict=True))


@CELLS
def test_in_place_without_the_state(cell):
    sequence, _, inputs, weights, state = make(cell, 6)
    written = copies(state)
    _, final = sequence(*inputs, *weights, initial_state=written, inplace=True)
    assert final is None
    _, expected = sequence(*inputs, *weights, initial_state=state, output_final_state=True)
    assert all(torch.equal(x, y) for x, y in zip(written, expected, strict=True))
    with pytest.raises(ValueError, match="`inplace` writes into the tensors of `initial_state`"):
        sequence(*inputs, *weights, inplace=True)


@CELLS
def test_one_token_takes_the_step(cell, monkeypatch):
    """From a state, without mask and packing; everything else is a sequence."""
    from hf_xlstm.cells import dispatch

    sequence, step, inputs, weights, state = make(cell, 1)
    expected_h, expected = step(*(x[:, 0] for x in inputs), *weights, state, backend="torch")
    monkeypatch.delitem(dispatch._IMPLEMENTATIONS, (cell, "torch"))
    h, final = sequence(*inputs, *weights, initial_state=state, output_final_state=True, backend="torch")
    assert torch.equal(h[:, 0], expected_h)
    assert all(torch.equal(x, y) for x, y in zip(final, expected, strict=True))
    mask = torch.ones(B, 1, dtype=torch.bool)
    for options in ({}, {"initial_state": state, "mask": mask}):
        with pytest.raises(KeyError):
            sequence(*inputs, *weights, backend="torch", **options)


INDICES = {
    "neighbours": [2, 3, 4, 5],
    "scattered": [6, 0, 3, 1],
    "padding": [-1, 5, -1, 0],
    "slot 0 beside padding": [0, -1, -1, 6],
    "nothing": [-1, -1, -1, -1],
}


@BACKENDS
@CELLS
@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("indices", INDICES)
def test_slots(cell, indices, readable, backend, monkeypatch):
    """Pools with gaps between their slots. Where the indices cannot be read, as on a GPU, the result is the same."""
    if not readable:
        monkeypatch.setattr("hf_xlstm.cells.slots.is_readable", lambda x: False)
    _, step, inputs, weights, state = make(cell, 1, rows=SLOTS)
    indices = torch.tensor(INDICES[indices], dtype=torch.int32)
    inputs = [x[:, 0] for x in inputs]
    pools = tuple(torch.stack([x, torch.full_like(x, torch.nan)], dim=1)[:, 0] for x in state)
    for x in inputs:
        x[indices < 0] = torch.nan  # what pads the inputs is not read either
    h, final = step(*inputs, *weights, pools, inplace=True, state_indices=indices, backend=backend)
    assert all(x is y for x, y in zip(final, pools, strict=True))

    rows = (indices >= 0).nonzero().squeeze(1)
    slots = indices[rows].long()
    expected = copies(state)
    assert (h[indices < 0] == 0).all()
    if len(rows):
        own = tuple(x[slots] for x in state)
        expected_h, own = step(*(x[rows] for x in inputs), *weights, own, backend=backend)
        assert relative_error(h[rows], expected_h) < 1e-6
        expected = tuple(x.index_copy(0, slots, y) for x, y in zip(state, own, strict=True))
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(pools, expected, strict=True))
    unused = [slot for slot in range(SLOTS) if slot not in slots]
    assert all(torch.equal(x[unused], y[unused]) for x, y in zip(pools, state, strict=True))


@CELLS
@pytest.mark.parametrize(
    "indices, options, message",
    [
        ([0, 1, 2, 3], {"inplace": False}, "needs `inplace=True`"),
        ([0, 1, 2], {}, r"must have shape \(4,\)"),
        ([0.0, 1.0, 2.0, 3.0], {}, "must have dtype torch.int32 or torch.int64"),
        ([0, 1, 2, SLOTS], {}, f"less than {SLOTS} slots"),
        ([0, 1, 1, -1], {}, "must be different"),
    ],
)
def test_bad_indices(cell, indices, options, message):
    _, step, inputs, weights, state = make(cell, 1, rows=SLOTS)
    before, indices = copies(state), torch.tensor(indices)
    with pytest.raises(ValueError, match="`state_indices`.*" + message):
        step(*(x[:, 0] for x in inputs), *weights, state, **({"inplace": True} | options), state_indices=indices)
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
