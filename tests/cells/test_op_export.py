"""Exported operators: one graph for every length from 1 on, of operations that other runtimes know."""

import pytest
import torch
from common import relative_error

from hf_xlstm.ops import mlstm, slstm


B, H, K, V = 2, 2, 3, 4


class MLSTM(torch.nn.Module):
    def forward(self, q, k, v, igate, fgate):
        h, (c, n, m) = mlstm(q, k, v, igate, fgate, output_final_state=True, chunk_size=8)
        return h, c * m.exp()[..., None, None], n * m.exp()[..., None]

    def inputs(self, length):
        return tuple(torch.randn(B, length, H, *size) for size in ((K,), (K,), (V,), (), ()))


class SLSTM(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(torch.randn(4, H, *size)) for size in ((K, K), (K,)))

    def forward(self, gates):
        h, (h_final, c, n, m) = slstm(gates, self.weight, self.bias, output_final_state=True)
        return h, h_final, c / n, m + n.log()

    def inputs(self, length):
        return (torch.randn(B, length, 4, H, K),)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("cell", [MLSTM, SLSTM])
def test_any_length(cell):
    """From an example of one chunk, whose length is a special case to symbolic shapes."""
    torch.manual_seed(0)
    module = cell()
    length = torch.export.Dim.AUTO(min=1, max=2048)
    example = module.inputs(8)
    program = torch.export.export(module, example, dynamic_shapes=tuple({1: length} for _ in example), strict=False)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("diagonal" in target or "hf_xlstm" in target for target in targets)
    for length in (1, 2, 7, 8, 9, 20, 70):
        inputs = module.inputs(length)
        for x, y in zip(program.module()(*inputs), module(*inputs), strict=True):
            assert relative_error(x, y) < 1e-5
