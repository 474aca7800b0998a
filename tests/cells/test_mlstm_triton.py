"""What is about the mLSTM's Triton kernels alone: launch plans, spans, saved states, operators, the GPUs they run on.
What they compute is tested in test_mlstm.py, like every backend: on the GPU where there is one, else in Triton's
interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
import torch
from common import relative_error
from mlstm_oracle import assert_exact, assert_same_states, make_inputs, make_state
from oracle import BF16, DEVICE, F32, INF


pytest.importorskip("triton")

from benchmarks.gpu.kernel_resources import races
from hf_xlstm.cells.mlstm import triton_launch as launch
from hf_xlstm.cells.mlstm import triton_ops  # noqa: F401  registers the operators
from hf_xlstm.cells.triton_common import GPU, unsupported_gpu, unsupported_reason
from hf_xlstm.ops import mlstm


def gradients(inputs, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    h, _ = mlstm(*leaves, backend="triton", **options)
    return torch.autograd.grad(h.square().sum(), leaves)


@pytest.mark.parametrize("packed", [True, False])
def test_many_chunks(monkeypatch, packed):
    """So many that m at their boundaries is computed tile by tile."""
    monkeypatch.setattr(launch, "BOUNDARY_TILE", 2)
    inputs = make_inputs(B=1, T=270, H=1, K=16, V=16, dtype=F32)
    inputs[4].add_(5)  # or nothing would reach from tile to tile
    options = {"cu_seqlens": torch.tensor([0, 201, 201, 270], device=DEVICE)} if packed else {}
    assert_exact(inputs, "triton", **options)


@pytest.mark.parametrize("length, spans", [(200, 4), (300, 2)], ids=["one chunk each", "three chunks and two"])
def test_spans(monkeypatch, length, spans):
    """Few and long sequences: the states of their spans are computed side by side."""
    monkeypatch.setattr(launch, "MIN_SPANS", spans)
    monkeypatch.setattr(launch, "MIN_CHUNKS_PER_SPAN", 4 // spans)
    inputs = make_inputs(B=1, T=length, H=1, K=20, V=72, dtype=F32)
    inputs[4].add_(4)  # or the first spans would be forgotten
    plan = launch.plan(F32, 20, 72, GPU.of(inputs[0].device))
    assert launch.Chunks.cut(inputs[0], None, plan).spans == spans
    inputs[4][:, 80] = -INF
    assert_exact(inputs, "triton", state="any" if spans == 4 else None)


@pytest.mark.parametrize(
    "K, V, sequences, on_chip",
    [(256, 512, 2, False), (256, 512, 3, True), (128, 256, 4, False), (128, 256, 5, True), (96, 200, 99, False)],
)
def test_c_stays_on_chip_where_the_programs_fill_the_gpu(K, V, sequences, on_chip):
    hopper = GPU(major=9, processors=132)
    assert bool(launch.on_chip_plan(BF16, K, V, 8 * sequences, hopper)) is on_chip
    if on_chip:
        assert launch.on_chip_plan(BF16, K, V, 8 * sequences, hopper).output.BV == 64
        assert launch.on_chip_plan(BF16, K, V, 16 * sequences, hopper).output.BV == 128
    assert launch.on_chip_plan(F32, K, V, 8 * sequences, hopper) is None


@pytest.mark.skipif(torch.version.hip is not None, reason="takes more shared memory than AMD's GPUs have")
@pytest.mark.parametrize("processors", [132, 1], ids=["C in memory", "C on chip"])
def test_hopper(monkeypatch, processors):
    """Chunks of 128 tokens instead of 64, with larger tiles; or all rows of C in one program."""
    monkeypatch.setattr(GPU, "of", lambda device: GPU(major=9, processors=processors))
    assert_exact(make_inputs(B=1, T=200, H=1, K=80, V=144, dtype=BF16), "triton")


@pytest.mark.parametrize("packed", [True, False])
def test_saved_states_give_the_same_gradients(monkeypatch, packed):
    inputs = make_inputs(B=1, T=100, K=16, V=24, dtype=F32)
    options = {"cu_seqlens": torch.tensor([0, 3, 100], device=DEVICE)} if packed else {}
    expected = gradients(inputs, **options)
    monkeypatch.setenv("HF_XLSTM_SAVE_STATES", "1")
    assert all(torch.equal(x, y) for x, y in zip(gradients(inputs, **options), expected, strict=True))


def test_gradients_are_deterministic():
    inputs = make_inputs(B=1, K=16, V=24, dtype=F32)
    assert all(torch.equal(x, y) for x, y in zip(gradients(inputs), gradients(inputs), strict=True))


def test_masked_nan_is_never_read():
    """What stands at a masked position may be anything, even NaN."""
    inputs = make_inputs(B=1, H=1, K=16, V=24, dtype=F32)
    mask = torch.arange(70, device=DEVICE)[None] % 7 > 2
    options = {"mask": mask, "output_final_state": True, "backend": "triton"}
    h, final = mlstm(*inputs, **options)
    for x in inputs:
        x[~mask] = float("nan")
    h_again, again = mlstm(*inputs, **options)
    assert all(torch.equal(x, y) for x, y in zip((h, *final), (h_again, *again), strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 80 GB")
@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(1, 300_000, 32, 256, 256), (1, 80_000, 64, 16, 16)], ids=["2^31 elements", "65,535 programs"]
)
def test_addresses_and_grids_beyond_their_usual_limits(shape):
    """The end of a very long sequence, behind a reset, against the same tokens alone."""
    B, T, H, K, V = shape
    tail = 300
    inputs = [torch.randn(*size, device=DEVICE, dtype=BF16) for size in ((B, T, H, K), (B, T, H, K), (B, T, H, V))]
    inputs += [torch.randn(B, T, H, device=DEVICE) for _ in range(2)]
    inputs[4][:, -tail] = -INF
    part = [x[:, -tail:] for x in inputs]
    with torch.no_grad():
        h, state = mlstm(*inputs, output_final_state=True, backend="triton")
        expected_h, expected_state = mlstm(*part, output_final_state=True, backend="triton")
    assert relative_error(h[:, -tail:], expected_h) < 1e-2
    assert_same_states(state, expected_state, 1e-2)
    results = []
    for tensors in (inputs, part):
        leaves = [x.detach().requires_grad_() for x in tensors]
        h, _ = mlstm(*leaves, backend="triton")
        results.append(torch.autograd.grad(h[:, -tail:].sum(), leaves))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual[:, -tail:], expected) < 5e-2
        # nothing but, for a gate, what rounding leaves of the sums of the reset's chunk
        assert actual[:, :-tail].abs().max() <= (1e-4 * expected.abs().max() if actual.ndim == 3 else 0)


def test_unsupported():
    x = torch.zeros(1, 1, 1, 8, device=DEVICE)
    assert unsupported_reason(x, 4) is None
    assert "float64" in unsupported_reason(x.double(), 4)
    assert "512" in unsupported_reason(x, 4, 513)


def test_unsupported_gpus(monkeypatch):
    reasons = {}
    for name, hip, properties in (
        ("Turing", None, {"major": 7, "minor": 5}),
        ("Ada", None, {"major": 8, "minor": 9}),
        ("MI300", "7.0", {"gcnArchName": "gfx942:sramecc+:xnack-"}),
        ("Radeon", "7.0", {"gcnArchName": "gfx1100"}),
    ):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, properties=properties: Namespace(**properties)
        )
        reasons[name] = unsupported_gpu(torch.device("cuda"))
    assert reasons["Ada"] is None and reasons["MI300"] is None
    assert "7.5" in reasons["Turing"] and "gfx1100" in reasons["Radeon"]


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("save_states", [True, False])
def test_operator_contracts(length, packed, save_states):
    inputs = [x.detach().requires_grad_() for x in make_inputs(B=1, T=length, H=1, K=8, V=8, dtype=F32)]
    c, n, m = make_state(2 if packed else 1, 1, 8, 8, dtype=F32)
    cu_seqlens = torch.tensor([0, 3, length], device=DEVICE) if packed else None
    mask = None if packed else torch.ones(1, length, dtype=torch.bool, device=DEVICE)
    arguments = (*inputs, c.requires_grad_(), n.requires_grad_(), m, mask, cu_seqlens, True, save_states, 0.3, 1e-6)
    torch.library.opcheck(torch.ops.hf_xlstm.mlstm_forward.default, arguments)
    with torch.no_grad():
        h, _, _, *saved = torch.ops.hf_xlstm.mlstm_forward(*arguments)
    tensors = [None if x is None else x.detach() for x in arguments[:10]]
    torch.library.opcheck(
        torch.ops.hf_xlstm.mlstm_backward.default, (h, c.detach(), n.detach(), *tensors, *saved, 0.3, 1e-6)
    )


def test_step_operator_contract():
    inputs = [x[:, 0] for x in make_inputs(B=1, T=1, H=1, K=8, V=8, dtype=F32)]
    state = make_state(1, 1, 8, 8, dtype=F32)
    torch.library.opcheck(torch.ops.hf_xlstm.mlstm_step.default, (*inputs, *state, None, 0.3, 1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("save_states", [True, False])
def test_compiles_without_graph_breaks_for_any_length(monkeypatch, save_states):
    monkeypatch.setenv("HF_XLSTM_SAVE_STATES", str(int(save_states)))
    graphs = 0

    def backend(module, _):
        nonlocal graphs
        graphs += 1
        return module.forward

    def training_step(inputs):
        h, state = mlstm(*inputs, output_final_state=True, backend="triton")
        return h.square().mean() + state[0].square().mean()

    torch.compiler.reset()
    compiled = torch.compile(training_step, fullgraph=True, backend=backend)
    for length in (20, 33, 64, 65, 100):
        inputs = [x.detach().requires_grad_() for x in make_inputs(B=1, T=length, H=1, K=8, V=8, dtype=F32)]
        losses = compiled(inputs), training_step(inputs)
        assert relative_error(*losses) < 1e-6
        actual, expected = (torch.autograd.grad(loss, inputs) for loss in losses)
        assert all(relative_error(x, y) < 1e-6 for x, y in zip(actual, expected, strict=True))
    assert graphs <= 2


def test_products_whose_operands_may_change():
    """Both faults that an H100 showed, and neighbours of each that are right."""
    tile = """
        %tiles = ttg.local_alloc : () -> !ttg.memdesc<2x128x64xbf16>
        %tile = ttg.memdesc_index %tiles[%i] : !ttg.memdesc<128x64xbf16>
        %turned = ttg.memdesc_trans %tile : !ttg.memdesc<64x128xbf16>
        %product = ttng.warp_group_dot %other, %turned, %sum {isAsync = true} : !ttg.memdesc<1> * !ttg.memdesc<2>
        %done:2 = ttng.warp_group_dot_wait %product, %turned {pendings = 1 : i32} : tensor<1>
    """
    registers = """
        %p = ttng.warp_group_dot %a, %b, %c {isAsync = true} : tensor<1, #ttg.dot_op<{opIdx = 0, kWidth = 2}>>
        %q:2 = ttng.warp_group_dot_wait %p, %b {pendings = 3 : i32} : tensor<1>
    """
    use = "%x = ttg.local_load %tile token %t : tensor<128x64xbf16>"
    assert races(tile) == races(use) == []
    assert races((tile + use).replace("pendings = 1", "pendings = 0")) == []
    assert races(registers.replace("pendings = 3", "pendings = 0")) == []
    assert races(tile + use) == ["%product: another use of a tile"]
    assert races(registers) == ["%p: left operand in registers"]


@pytest.mark.parametrize("scope", ["--quick", pytest.param("", marks=pytest.mark.slow)])
def test_kernel_resources(scope):
    """In a process of its own: this one interprets."""
    script = Path(__file__).parents[2] / "benchmarks/gpu/kernel_resources.py"
    command = [sys.executable, script, *scope.split()]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
