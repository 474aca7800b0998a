"""The listing of the chunkwise mLSTM, against the recurrence."""

import pytest
import torch
from common import relative_error

from hf_xlstm.cells.mlstm.chunkwise import mlstm_chunkwise_listing
from hf_xlstm.ops import mlstm


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 20])
def test_listing(chunk_size):
    torch.manual_seed(0)
    B, H, T, K, V = 2, 3, 14, 4, 5
    q, k, v = (torch.randn(B, H, T, size, dtype=torch.float64) for size in (K, K, V))
    igate, fgate = (torch.randn(B, H, T, dtype=torch.float64) * 3 for _ in range(2))
    state = tuple(torch.randn(B, H, *shape, dtype=torch.float64) for shape in ((K, V), (K,), ()))
    leaves = [x.requires_grad_() for x in (q, k, v, igate, fgate, *state[:2])]

    h, (c, n, m) = mlstm_chunkwise_listing(*leaves[:5], (*leaves[5:], state[2]), chunk_size, eps=0.0)
    inputs = (x.transpose(1, 2) for x in leaves[:5])
    expected, final = mlstm(
        *inputs, initial_state=(*leaves[5:], state[2]), output_final_state=True, eps=0.0, backend="reference"
    )
    for x, y in zip((h.transpose(1, 2), c, n, m), (expected, *final), strict=True):
        assert relative_error(x, y) < 1e-12
    weights = torch.randn_like(h)
    actual = torch.autograd.grad((weights * h).sum() + c.square().sum(), leaves)
    expected = torch.autograd.grad((weights.transpose(1, 2) * expected).sum() + final[0].square().sum(), leaves)
    for x, y in zip(actual, expected, strict=True):
        assert relative_error(x, y) < 1e-10
