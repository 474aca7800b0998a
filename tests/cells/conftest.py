import pytest
import torch
from oracle import BF16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def backend(request, monkeypatch):
    """The name of a backend, for `oracle.on`. Triton runs as the launch plans have it, or in another way:

    "on chip": C of the mLSTM in registers during the forward pass, in float32, too, which shows more than bfloat16.
        Its head dims must be multiples of 16.
    "streamed": R of the sLSTM read in tiles at every step, of 16 units, so that a small head has several.
    "spread": several programs of the sLSTM for each head, of 16 units; R on chip up to a head dim of 32.
    """
    if request.param in ("reference", "torch"):
        return request.param
    pytest.importorskip("triton")
    from hf_xlstm.cells.mlstm import triton_launch as mlstm
    from hf_xlstm.cells.slstm import triton_launch as slstm
    from hf_xlstm.cells.triton_common import GPU, Tiles

    if request.param == "on chip":
        decide, gpu = mlstm.on_chip_plan, GPU(major=9, processors=1)
        monkeypatch.setattr(mlstm, "on_chip_plan", lambda dtype, K, V, *_: decide(BF16, K, V, 1, gpu))
    elif request.param == "streamed":
        tiles = Tiles(num_warps=4, num_stages=1, BB=slstm.BB, BD=16, BK=16)
        monkeypatch.setattr(slstm, "spread_plan", lambda *_: slstm.Plan(tiles))
    elif request.param == "spread":

        def spread_plan(dtype, D, *_):
            tiles = Tiles(num_warps=4, num_stages=1, BB=slstm.BB, BD=16, BK=32 if D <= 32 else 16)
            return slstm.Plan(tiles, spread=True)

        monkeypatch.setattr(slstm, "spread_plan", spread_plan)
    return "triton"
