"""The Triton mLSTM against the float64 recurrence: on the GPU where there is one, else in Triton's interpreter."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms demand it on a GPU
pytest.importorskip("triton")

from hf_xlstm.cells.mlstm import triton_launch as launch
from hf_xlstm.cells.mlstm.reference import mlstm_recurrent, mlstm_recurrent_step
from hf_xlstm.cells.mlstm.triton_ops import mlstm_step_triton, mlstm_triton
from hf_xlstm.cells.triton_common import GPU, unsupported_gpu, unsupported_reason


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# mean and deviation of the input gate, then of the forget gate
GATES = {
    "unit": (0, 1, 0, 1),
    "quiet": (-10, 1, 3, 1),
    "loud": (5, 1, 3, 1),
    "capped": (0, 15, 0, 15),
    "wild": (0, 120, 0, 120),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["C in memory", "C on chip"])
def either_forward(request, monkeypatch):
    """C on chip in float32, too, which shows more than bfloat16. Head dims must be multiples of 16."""
    if request.param == "C on chip":
        decide, gpu = launch.on_chip_plan, GPU(major=9, processors=1)
        monkeypatch.setattr(launch, "on_chip_plan", lambda dtype, K, V, *_: decide(torch.bfloat16, K, V, 1, gpu))


def make_inputs(B, T, H, K, V, dtype=torch.float32, gates="unit"):
    """q, k, v as slices of one projection, so that no stride is the contiguous one."""
    q, k, v = torch.randn(B, T, H, 2 * K + V, device=DEVICE).to(dtype).split([K, K, V], dim=-1)
    i_mean, i_std, f_mean, f_std = GATES[gates]
    igate, fgate = torch.randn(2, B, H, T, device=DEVICE).transpose(-1, -2)
    igate, fgate = igate * i_std + i_mean, fgate * f_std + f_mean
    if gates == "capped":
        igate, fgate = (15 * torch.tanh(x / 15) for x in (igate, fgate))
    return q, k, v, igate, fgate


def make_state(rows, H, K, V):
    c, n, m = (torch.randn(*shape, device=DEVICE) for shape in ((rows, H, K, V), (rows, H, K), (rows, H)))
    return c, n, m


def double(x):
    """Detached float64 copies, in whatever structure."""
    if isinstance(x, torch.Tensor):
        return x.detach().double() if x.is_floating_point() else x
    return type(x)(double(y) for y in x) if isinstance(x, tuple | list) else x


def error(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_states_close(actual, expected, tolerance):
    """c and n up to the gauge: each is brought to the expected m."""
    shift = torch.exp(actual[2].double() - expected[2])
    assert error(actual[0] * shift[..., None, None], expected[0]) < tolerance
    assert error(actual[1] * shift[..., None], expected[1]) < tolerance


def run(function, inputs, **options):
    q = inputs[0]
    return function(*inputs, scale=q.shape[-1] ** -0.5, eps=1e-6, **options)


def check_forward(inputs, tolerance, **options):
    expected_h, expected_state = run(
        mlstm_recurrent, double(inputs), output_final_state=True, **{name: double(x) for name, x in options.items()}
    )
    h, state = run(mlstm_triton, inputs, output_final_state=True, **options)
    assert h.dtype == inputs[2].dtype
    assert error(h, expected_h) < tolerance
    assert_states_close(state, expected_state, tolerance)
    return h, state


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 1, 4, 1),
        (1, 7, 2, 16, 24),
        (2, 17, 1, 33, 65),
        (1, 64, 2, 96, 32),
        (1, 130, 2, 40, 130),
        (2, 200, 1, 16, 16),
    ],
    ids=str,
)
def test_forward(shape, dtype):
    check_forward(make_inputs(*shape, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 300, 1, 512, 512), (1, 1000, 2, 128, 256), (3, 65, 4, 256, 100)], ids=str)
def test_forward_large(shape, dtype):
    check_forward(make_inputs(*shape, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gates", GATES)
def test_gate_regimes(either_forward, gates, dtype):
    """Loud and capped gates make n.q cancel: float32 itself is no better than this there."""
    tolerance = 1e-3 if gates in ("loud", "capped", "wild") else 1e-5
    for length in (16, 200):
        check_forward(make_inputs(2, length, 2, 48, 80, dtype, gates), max(tolerance, TOLERANCE[dtype]))


@pytest.mark.parametrize("length", [16, 100])
@pytest.mark.parametrize("igate", [-INF, -1e4, 1e4, None])
@pytest.mark.parametrize("fgate", [-INF, -1e30, -1e4, 1e4, INF, None])
def test_extreme_gates_stay_finite(length, igate, fgate):
    inputs = make_inputs(1, length, 2, 16, 16)
    for gate, value in zip(inputs[3:], (igate, fgate), strict=True):
        if value is not None:
            gate[torch.rand_like(gate) < 0.5] = value
    h, state = run(mlstm_triton, inputs, output_final_state=True)
    assert all(torch.isfinite(x).all() for x in (h, *state))


@pytest.mark.parametrize("length", [12, 150])
def test_closed_forget_gate_is_a_reset(either_forward, length):
    inputs = make_inputs(1, length, 2, 16, 48)
    inputs[4][:, [0, 5, 6, 11]] = -INF
    inputs[3][:, 3] = -INF
    inputs[4][:, [2, 9]] = INF
    state = make_state(1, 2, 16, 48)
    check_forward(inputs, 1e-5, initial_state=state)


@pytest.mark.parametrize("length", [10, 150])
@pytest.mark.parametrize("masking", ["left", "right", "holes", "all"])
def test_mask(either_forward, length, masking):
    inputs = make_inputs(2, length, 2, 16, 48)
    state = make_state(2, 2, 16, 48)
    mask = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    if masking == "left":
        mask[0, : length // 2] = False
    elif masking == "right":
        mask[1, length // 2 :] = False
    elif masking == "holes":
        mask[torch.rand(2, length, device=DEVICE) < 0.4] = False
    else:
        mask[0] = False
    h, final = check_forward(inputs, 1e-5, initial_state=state, mask=mask)
    assert (h[~mask] == 0).all()
    if masking == "all":
        assert all(torch.equal(new[0], old[0]) for new, old in zip(final, state, strict=True))
    # what stands at a masked position is never read
    for x in inputs:
        x[~mask] = float("nan")
    h_again, again = run(mlstm_triton, inputs, output_final_state=True, initial_state=state, mask=mask)
    assert torch.equal(h, h_again)
    assert all(torch.equal(a, b) for a, b in zip(final, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences(either_forward, dtype):
    bounds = [0, 1, 40, 40, 168, 200]
    inputs = make_inputs(1, bounds[-1], 2, 16, 48, dtype)
    inputs[4][:, 45] = -INF
    mask = torch.rand(1, bounds[-1], device=DEVICE) < 0.9
    cu_seqlens = torch.tensor(bounds, device=DEVICE)
    check_forward(inputs, TOLERANCE[dtype], cu_seqlens=cu_seqlens)
    state = make_state(len(bounds) - 1, 2, 16, 48)
    h, final = check_forward(inputs, TOLERANCE[dtype], cu_seqlens=cu_seqlens, initial_state=state, mask=mask)
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        alone, alone_state = run(
            mlstm_triton,
            [x[:, start:end] for x in inputs],
            output_final_state=True,
            initial_state=tuple(x[row : row + 1] for x in state),
            mask=mask[:, start:end],
        )
        # Alone, a short sequence goes through the recurrence, which forms its products in float32.
        tolerance = max(1e-6, TOLERANCE[dtype] * (dtype != torch.float32))
        assert error(h[:, start:end], double(alone)) < tolerance
        assert_states_close(tuple(x[row : row + 1] for x in final), double(alone_state), tolerance)


@pytest.mark.parametrize("packed", [True, False])
def test_many_chunks(monkeypatch, packed):
    """So many that m at their boundaries is computed tile by tile."""
    monkeypatch.setattr(launch, "BOUNDARY_TILE", 2)
    inputs = make_inputs(1, 270, 2, 16, 16)
    inputs[4].add_(5)  # or nothing would reach from tile to tile
    options = {"cu_seqlens": torch.tensor([0, 201, 201, 270], device=DEVICE)} if packed else {}
    check_forward(inputs, 1e-5, initial_state=make_state(3 if packed else 1, 2, 16, 16), **options)


@pytest.mark.parametrize(
    "K, V, sequences, on_chip",
    [(256, 512, 2, False), (256, 512, 3, True), (128, 256, 8, False), (128, 256, 9, True), (96, 200, 99, False)],
)
def test_c_stays_on_chip_where_the_programs_fill_the_gpu(K, V, sequences, on_chip):
    hopper = GPU(major=9, processors=132)
    assert bool(launch.on_chip_plan(torch.bfloat16, K, V, 8 * sequences, hopper)) is on_chip
    assert launch.on_chip_plan(torch.float32, K, V, 8 * sequences, hopper) is None


def test_two_halves_make_the_whole(either_forward):
    inputs = make_inputs(2, 100, 2, 16, 48)
    h, final = run(mlstm_triton, inputs, output_final_state=True)
    first, state = run(mlstm_triton, [x[:, :37] for x in inputs], output_final_state=True)
    before = tuple(x.clone() for x in state)
    second, state_end = run(mlstm_triton, [x[:, 37:] for x in inputs], initial_state=state, output_final_state=True)
    assert error(torch.cat([first, second], dim=1), double(h)) < 1e-6
    assert_states_close(state_end, double(final), 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


# --- gradients


GRADIENT_TOLERANCE = {
    torch.float32: dict.fromkeys("qkvifcn", 1e-4),
    torch.bfloat16: {"q": 3e-2, "k": 3e-2, "v": 1.5e-2, "i": 3e-2, "f": 5e-2, "c": 1.5e-2, "n": 3e-2},
    torch.float16: {"q": 3e-3, "k": 3e-3, "v": 2e-3, "i": 3e-3, "f": 5e-3, "c": 2e-3, "n": 5e-3},
}


def gradients(function, inputs, state, dh, dstate, gauge=None, **options):
    """Gradients of <h, dh> + <c, dc> + <n, dn>, by name. `gauge`: the final m in which c and n are to be taken."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    initial = None
    if state is not None:
        initial = (*(x.detach().requires_grad_() for x in state[:2]), state[2])
        leaves += initial[:2]
    h, (c, n, m) = run(function, leaves[:5], initial_state=initial, output_final_state=True, **options)
    shift = torch.exp(m - (m if gauge is None else gauge.to(m.dtype))).detach()
    loss = 0 if dh is None else (h * dh).sum()
    if dstate is not None:
        loss = loss + (c * shift[..., None, None] * dstate[0]).sum() + (n * shift[..., None] * dstate[1]).sum()
    return dict(zip("qkvifcn", torch.autograd.grad(loss, leaves, materialize_grads=True), strict=False)), m


def check_gradients(inputs, tolerance, *, state=None, from_h=True, from_state=True, **options):
    """A loss on h itself, without the norm that follows in a model and hides the scale of h."""
    rows = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else len(inputs[0])
    dh = torch.randn_like(inputs[2]) if from_h else None
    dstate = make_state(rows, *inputs[0].shape[2:], inputs[2].shape[-1])[:2] if from_state else None
    actual, m = gradients(mlstm_triton, inputs, state, dh, dstate, **options)
    options = {name: double(x) for name, x in options.items()}
    expected, _ = gradients(mlstm_recurrent, *map(double, (inputs, state, dh, dstate)), m, **options)
    for name, gradient in actual.items():
        assert gradient.dtype == (inputs["qkvif".index(name)].dtype if name in "qkvif" else torch.float32)
        assert error(gradient, expected[name]) < tolerance[name], name
    return actual


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 4, 8), (1, 7, 2, 16, 24), (2, 65, 1, 33, 65), (1, 140, 2, 40, 72)], ids=str
)
def test_gradients(shape, dtype):
    inputs = make_inputs(*shape, dtype=dtype)
    state = make_state(shape[0], *shape[2:])
    check_gradients(inputs, GRADIENT_TOLERANCE[dtype], state=state)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 80, 1, 512, 512), (1, 300, 1, 128, 256), (2, 65, 2, 256, 100)], ids=str)
def test_gradients_large(shape, dtype):
    check_gradients(make_inputs(*shape, dtype=dtype), GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gates", GATES)
def test_gradient_regimes(either_forward, gates, dtype):
    tolerance = GRADIENT_TOLERANCE[dtype]
    if gates in ("loud", "capped", "wild"):
        tolerance = {name: max(bound, 1e-3) for name, bound in tolerance.items()}
    if gates == "wild" and dtype == torch.bfloat16:
        # Where one token outweighs all others, h is its v whatever q and k are: what is left of the gradients, but for
        # dv, may be less than the rounding of C, and must be finite only.
        tolerance = dict.fromkeys(tolerance, math.inf) | {"v": tolerance["v"]}
    check_gradients(make_inputs(2, 130, 1, 48, 80, dtype, gates), tolerance)


def test_gradients_through_a_checkpoint():
    inputs = make_inputs(1, 70, 2, 16, 24)
    leaves = [x.detach().requires_grad_() for x in inputs]
    checkpoint(lambda *x: run(mlstm_triton, x)[0], *leaves, use_reentrant=False).square().sum().backward()
    expected = [x.detach().requires_grad_() for x in inputs]
    run(mlstm_triton, expected)[0].square().sum().backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(leaves, expected, strict=True))


@pytest.mark.parametrize("with_state", [True, False])
def test_gradients_from_h_alone(with_state):
    state = make_state(1, 2, 16, 24) if with_state else None
    check_gradients(make_inputs(1, 80, 2, 16, 24), GRADIENT_TOLERANCE[torch.float32], state=state, from_state=False)


def test_gradients_from_the_state_alone():
    inputs = make_inputs(1, 80, 2, 16, 24)
    inputs[4].add_(6)  # or nothing would be left of the first tokens
    actual = check_gradients(inputs, GRADIENT_TOLERANCE[torch.float32], state=make_state(1, 2, 16, 24), from_h=False)
    assert (actual["q"] == 0).all()


def test_gradients_masked_and_packed(either_forward):
    bounds = [0, 1, 40, 40, 139, 150]
    inputs = make_inputs(1, bounds[-1], 2, 16, 48)
    inputs[3][:, 3] = -INF
    inputs[4][:, [45, 60]] = -INF
    inputs[4][:, [50, 51]] = INF
    mask = torch.rand(1, bounds[-1], device=DEVICE) < 0.8
    actual = check_gradients(
        inputs,
        dict.fromkeys("qkvifcn", 1e-5),
        state=make_state(len(bounds) - 1, 2, 16, 48),
        cu_seqlens=torch.tensor(bounds, device=DEVICE),
        mask=mask,
    )
    assert all((actual[name][~mask] == 0).all() for name in "qkvif")


def test_backpropagation_through_two_parts(either_forward):
    inputs = make_inputs(2, 100, 2, 16, 48)
    inputs[4].add_(3)
    dh = torch.randn_like(inputs[2])
    whole, _ = gradients(mlstm_triton, inputs, None, dh, None)

    leaves = [x.detach().requires_grad_() for x in inputs]
    first, state = run(mlstm_triton, [x[:, :37] for x in leaves], output_final_state=True)
    second, _ = run(mlstm_triton, [x[:, 37:] for x in leaves], initial_state=state)
    torch.cat([first, second], dim=1).backward(dh)
    for x, expected in zip(leaves, whole.values(), strict=True):
        assert error(x.grad, double(expected)) < 1e-5


@pytest.mark.parametrize("packed", [True, False])
def test_saved_states_give_the_same_gradients(monkeypatch, packed):
    inputs = make_inputs(1, 100, 2, 16, 24)
    options = {"cu_seqlens": torch.tensor([0, 3, 100], device=DEVICE)} if packed else {}
    dh = torch.randn_like(inputs[2])
    expected, _ = gradients(mlstm_triton, inputs, None, dh, None, **options)
    monkeypatch.setenv("HF_XLSTM_SAVE_STATES", "1")
    actual, _ = gradients(mlstm_triton, inputs, None, dh, None, **options)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("length, spans", [(200, 4), (300, 2)], ids=["one chunk each", "three chunks and two"])
def test_spans(monkeypatch, length, spans):
    """Few and long sequences: the states of their spans are computed side by side."""
    monkeypatch.setattr(launch, "MIN_SPANS", spans)
    monkeypatch.setattr(launch, "MIN_CHUNKS_PER_SPAN", 4 // spans)
    inputs = make_inputs(1, length, 2, 20, 72)
    inputs[4].add_(4)  # or the first spans would be forgotten
    plan = launch.plan(torch.float32, 20, 72, GPU.of(inputs[0].device))
    assert launch.Chunks.cut(inputs[0], None, plan).spans == spans
    state = make_state(1, 2, 20, 72) if spans == 4 else None
    check_forward(inputs, 1e-5, **({"initial_state": state} if state else {}))
    inputs[4][:, 80] = -INF
    check_gradients(inputs, GRADIENT_TOLERANCE[torch.float32], state=state)


@pytest.mark.parametrize("length", [9, 70])
def test_without_epsilon(length):
    """What is masked out, and a normalizer that underflows, are still no 0 / 0."""
    inputs = make_inputs(1, length, 1, 16, 16)
    inputs[3].add_(150)
    inputs[0][:, 2] = 0
    mask = torch.arange(length, device=DEVICE)[None] != 1
    leaves = [x.detach().requires_grad_() for x in inputs]
    h, _ = mlstm_triton(*leaves, mask=mask, scale=0.25, eps=0.0)
    assert h.isfinite().all() and (h[:, 1:3] == 0).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(h.sum(), leaves))


@pytest.mark.parametrize("length", [9, 70])
def test_any_strides(length):
    """Heads first, features last but not side by side, gates of another dtype, gradients without strides."""
    q, k, v, igate, fgate = make_inputs(2, length, 3, 16, 24)
    strided = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.transpose(2, 3).contiguous().transpose(2, 3),
        v.transpose(0, 1).contiguous().transpose(0, 1),
        igate.bfloat16(),
        fgate[:1].expand_as(fgate),
    )
    check_forward(strided, 1e-5)
    leaves = [x.detach().requires_grad_() for x in strided]
    dense = [x.detach().clone().contiguous().requires_grad_() for x in strided]
    for inputs in (leaves, dense):
        run(mlstm_triton, inputs)[0].sum().backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(leaves, dense, strict=True))


def test_strided_bounds():
    table = torch.tensor([[0, 9], [40, 9], [70, 9]], dtype=torch.int32, device=DEVICE)
    check_forward(make_inputs(1, 70, 2, 16, 24), 1e-5, cu_seqlens=table[:, 0])


def test_gradients_are_deterministic():
    inputs = make_inputs(1, 70, 2, 16, 24)
    dh = torch.randn_like(inputs[2])
    first, second = (gradients(mlstm_triton, inputs, None, dh, None)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU with 80 GB")
@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(1, 300_000, 32, 256, 256), (1, 80_000, 64, 16, 16)], ids=["2^31 elements", "65,535 programs"]
)
def test_addresses_and_grids_beyond_their_usual_limits(shape):
    """The end of a very long sequence, behind a reset, against the same tokens alone."""
    tail = 300
    inputs = make_inputs(*shape, dtype=torch.bfloat16)
    inputs[4][:, -tail] = -INF
    part = [x[:, -tail:] for x in inputs]
    with torch.no_grad():
        h, state = run(mlstm_triton, inputs, output_final_state=True)
        expected_h, expected_state = run(mlstm_triton, part, output_final_state=True)
    assert error(h[:, -tail:], double(expected_h)) < 1e-2
    assert_states_close(state, double(expected_state), 1e-2)
    dh = torch.zeros_like(h)
    dh[:, -tail:] = 1
    actual, _ = gradients(mlstm_triton, inputs, None, dh, None)
    expected, _ = gradients(mlstm_triton, part, None, dh[:, -tail:], None)
    for name, bound in GRADIENT_TOLERANCE[torch.bfloat16].items():
        if name in actual:
            assert error(actual[name][:, -tail:], double(expected[name])) < bound
            assert (actual[name][:, :-tail] == 0).all()


# --- step, operators


@pytest.mark.skipif(torch.version.hip is not None, reason="takes more shared memory than AMD's GPUs have")
@pytest.mark.parametrize("processors", [132, 1], ids=["C in memory", "C on chip"])
def test_hopper(monkeypatch, processors):
    """Chunks of 128 tokens instead of 64, with larger tiles; or all rows of C in one program."""
    monkeypatch.setattr(GPU, "of", lambda device: GPU(major=9, processors=processors))
    inputs = make_inputs(1, 200, 1, 80, 144, torch.bfloat16)
    check_forward(inputs, TOLERANCE[torch.bfloat16], initial_state=make_state(1, 1, 80, 144))
    check_gradients(inputs, GRADIENT_TOLERANCE[torch.bfloat16], state=make_state(1, 1, 80, 144))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("inplace", [True, False])
def test_step(dtype, inplace):
    inputs = [x[:, 0] for x in make_inputs(3, 1, 2, 24, 100, dtype)]
    state = make_state(3, 2, 24, 100)
    before = tuple(x.clone() for x in state)
    expected_h, expected_state = run(mlstm_recurrent_step, double(inputs), state=double(state))
    h, new_state = run(mlstm_step_triton, inputs, state=state, inplace=inplace)
    assert error(h, expected_h) < TOLERANCE[dtype]
    assert_states_close(new_state, expected_state, 1e-6)
    if inplace:
        assert all(new is old for new, old in zip(new_state, state, strict=True))
    else:
        assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


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


def test_step_on_a_strided_state():
    inputs = [x[:, 0] for x in make_inputs(3, 1, 2, 24, 40)]
    state = tuple(x.transpose(0, 1) for x in make_state(2, 3, 24, 40))
    _, expected_state = run(mlstm_recurrent_step, double(inputs), state=double(state))
    run(mlstm_step_triton, inputs, state=state, inplace=True)
    assert_states_close(state, expected_state, 1e-6)


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("save_states", [True, False])
def test_operator_contracts(length, packed, save_states):
    inputs = [x.detach().requires_grad_() for x in make_inputs(1, length, 1, 8, 8)]
    c, n, m = make_state(2 if packed else 1, 1, 8, 8)
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
    inputs = [x[:, 0] for x in make_inputs(1, 1, 1, 8, 8)]
    torch.library.opcheck(torch.ops.hf_xlstm.mlstm_step.default, (*inputs, *make_state(1, 1, 8, 8), None, 0.3, 1e-6))


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
        h, state = run(mlstm_triton, inputs, output_final_state=True)
        return h.square().mean() + state[0].square().mean()

    torch.compiler.reset()
    compiled = torch.compile(training_step, fullgraph=True, backend=backend)
    for length in (20, 33, 64, 65, 100):
        inputs = [x.detach().requires_grad_() for x in make_inputs(1, length, 1, 8, 8)]
        loss = compiled(inputs)
        assert error(loss.detach(), double(training_step(inputs))) < 1e-6
        assert all(torch.isfinite(x).all() for x in torch.autograd.grad(loss, inputs))
    assert graphs <= 2


@pytest.mark.parametrize("scope", ["--quick", pytest.param("", marks=pytest.mark.slow)])
def test_kernel_resources(scope):
    """In a process of its own: this one interprets."""
    script = Path(__file__).parents[1] / "benchmarks/kernel_resources.py"
    command = [sys.executable, script, *scope.split()]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
