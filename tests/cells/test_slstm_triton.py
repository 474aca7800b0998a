"""What is about the sLSTM's Triton kernels alone: launch plans, operators, addresses. What they compute is tested in
test_slstm.py, like every backend: on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from oracle import BF16, DEVICE, F16, F32
from slstm_oracle import make_inputs, make_state


pytest.importorskip("triton")

import triton
import triton.language as tl

from hf_xlstm.cells.slstm.triton_cell import places
from hf_xlstm.cells.slstm.triton_launch import plan, spread_plan
from hf_xlstm.cells.slstm.triton_ops import slstm_forward
from hf_xlstm.cells.triton_common import GPU, unsupported_reason
from hf_xlstm.ops import slstm


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("D", [1, 16, 33, 64, 100, 128, 512])
@pytest.mark.parametrize("major", [0, 8, 9, 12])
def test_plan_fits(D, dtype, major):
    """R stays on chip only whole, and where it fits there; tiles are powers of two."""
    cut = plan(dtype, D, GPU(major, processors=1)).tiles
    if cut.BK is None:
        assert D <= cut.BD
        assert 4 * cut.BD**2 * (2 if dtype == BF16 else 4) <= (128 if major == 9 else 32) * 1024
    assert all(size >= 16 and size & (size - 1) == 0 for size in (cut.BD, cut.BK or 16))


def test_battery_meets_both_plans():
    """The head dims of test_slstm.py: 20 stays on chip, 33 and 160 are streamed."""
    resident = [plan(F32, D, GPU(major=0, processors=1)).tiles.BK is None for D in (20, 33, 160)]
    assert resident == [True, False, False]


@pytest.mark.parametrize(
    "dtype, D, sequences, major, programs",
    [
        (BF16, 256, 16, 9, 32),
        (BF16, 256, 64, 8, 128),
        (BF16, 256, 65, 9, None),  # more programs than processors: not all of them would run at once
        (BF16, 512, 32, 9, 128),
        (F32, 64, 1, 12, 8),
        (BF16, 64, 16, 9, None),  # R stays on chip
        (BF16, 256, 16, 0, None),  # no cooperative launch
    ],
)
def test_wide_heads_are_spread_where_all_programs_run_at_once(dtype, D, sequences, major, programs):
    gpu = GPU(major, processors=132)
    spread = spread_plan(dtype, D, sequences, 4, 2, gpu)
    assert (spread is None) == (programs is None)
    # a single step waits for nobody
    assert (spread_plan(dtype, D, sequences, 4, 1, gpu) is None) == (
        major == 0 or plan(dtype, D, gpu).tiles.BK is None
    )
    if spread is not None:
        assert -(-sequences // spread.tiles.BB) * 4 * -(-D // spread.tiles.BD) == programs


def test_inference_keeps_nothing():
    """Without gradients the kernel writes h and the final state only."""
    inputs = make_inputs(dtype=F32)
    h, *_, saved, c = slstm_forward(*inputs, *(torch.zeros_like(x) for x in make_state(dtype=F32)), None, None, False)
    assert saved.numel() == c.numel() == 0
    assert torch.equal(h, slstm(*inputs, backend="triton")[0])


def test_time_major_gates_have_64_bit_offsets():
    """Gates laid out time-major, or very long sequences: a step's offset passes 2^31."""

    @triton.jit
    def kernel(p_offsets, t, stride):
        tl.store(
            p_offsets + tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :],
            places(tl.arange(0, 2).to(tl.int64), t, stride, tl.arange(0, 4)),
        )

    offsets = torch.empty(2, 4, dtype=torch.int64, device=DEVICE)
    kernel[(1,)](offsets, 5, 2**30)
    assert offsets[:, 0].tolist() == [5 * 2**30, 5 * 2**30 + 1]


@pytest.mark.parametrize("options", ["plain", "mask", "packed"])
def test_opcheck(options):
    B, rows = (1, 3) if options == "packed" else (2, 2)
    mask = (torch.arange(12).view(2, 6) % 4 > 0).to(DEVICE) if options == "mask" else None
    cu_seqlens = torch.tensor([0, 4, 4, 6], device=DEVICE) if options == "packed" else None
    inputs = [x.contiguous() for x in (*make_inputs(B=B, D=5, dtype=F32), *make_state(rows, D=5, dtype=F32))]
    args = [x.requires_grad_() for x in inputs[:-1]] + inputs[-1:]
    torch.library.opcheck(torch.ops.hf_xlstm.slstm_forward.default, (*args, mask, cu_seqlens, True))
    _, weight, _, *state = inputs
    h, *final, saved, c = torch.ops.hf_xlstm.slstm_forward(*inputs, mask, cu_seqlens, True)
    tensors = (h, *final[:3], weight, *state[:3], final[2], mask, cu_seqlens, h, saved, c)
    tensors = tuple(None if x is None else x.detach() for x in tensors)
    torch.library.opcheck(torch.ops.hf_xlstm.slstm_backward.default, tensors)


def test_opcheck_step():
    gates, *parameters = make_inputs(D=5, dtype=F32)
    inputs = (gates[:, 0], *parameters, *make_state(D=5, dtype=F32))
    torch.library.opcheck(torch.ops.hf_xlstm.slstm_step.default, (*(x.contiguous() for x in inputs), None))


def test_compiles():
    torch._dynamo.reset()

    def run(*inputs):
        return slstm(*inputs, backend="triton")[0]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (2, 3):
        inputs = make_inputs(T=length, D=5, dtype=F32)
        results = []
        for function in (run, compiled):
            leaves = [x.detach().requires_grad_() for x in inputs]
            h = function(*leaves)
            results.append((h, *torch.autograd.grad(h.sum(), leaves)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_unsupported_reason(monkeypatch):
    gates = make_inputs(dtype=F32)[0]
    assert unsupported_reason(gates, 16) is None
    assert "float64" in unsupported_reason(gates.double(), 16)
    assert "512" in unsupported_reason(gates, 513)
    monkeypatch.setattr("hf_xlstm.cells.triton_common.INTERPRETED", False)
    if DEVICE == "cpu":
        assert "GPU" in unsupported_reason(gates, 16)
