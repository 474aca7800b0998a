"""Gates of 300 to 1e5 and infinite ones through every Triton kernel of both cells, against the float64 recurrence.

Logarithms of weights are then differences of sums that float32 rounds to anything between 1e-5 and 1e-2, and what is
left of an exponent of -1e5 is 0: both must come out as in float64.
"""

import os

import pytest
import torch


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms demand it on a GPU
pytest.importorskip("triton")

from hf_xlstm.cells.mlstm import triton_launch as launch
from hf_xlstm.cells.mlstm.reference import mlstm_recurrent, mlstm_recurrent_step
from hf_xlstm.cells.mlstm.triton_ops import mlstm_step_triton, mlstm_triton
from hf_xlstm.cells.slstm import triton_launch as slstm_launch
from hf_xlstm.cells.slstm.reference import slstm_recurrent
from hf_xlstm.cells.slstm.triton_ops import slstm_step_triton, slstm_triton
from hf_xlstm.cells.triton_common import GPU, Tiles


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
SCALES = [300.0, 1e5]
# Where a gate closes so hard that it holds back more than the next tokens bring, what came before it still counts.
KINDS = ("random", "level", "closing", "infinite")
PATHS = ("step by step", "C in memory", "C on chip", "spans")
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 5e-2)}  # outputs and states, gradients


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


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


def make_gates(kind: str, scale: float, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """igate and fgate (B, T, ...)."""
    igate, fgate = torch.randn(2, *shape, device=DEVICE)
    token = torch.arange(shape[1], device=DEVICE).view(1, -1, *[1] * (len(shape) - 2))
    if kind in ("random", "infinite"):
        igate, fgate = scale * igate, scale * fgate
    if kind == "level":  # all input gates high, and of one height: tokens compete
        igate, fgate = igate + scale, fgate + 4
    if kind == "closing":  # every sixth token closes the forget gate, and brings less than that holds back
        igate = igate - 1.5 * scale * (token // 6)
        fgate = torch.where(token % 6 == 5, fgate - scale, fgate + 4)
    if kind == "infinite":
        igate = torch.where(token % 7 == 3, -INF, igate)
        fgate = torch.where(token % 5 == 4, INF, torch.where(token % 31 == 20, -INF, fgate))
    return igate, fgate


def make_inputs(kind: str, scale: float, B: int, T: int, dtype: torch.dtype):
    """q and k of one sign: n.q must not cancel, or no float32 would do."""
    q, k, v = torch.randn(B, T, 1, 3 * 16, device=DEVICE).to(dtype).split(16, dim=-1)
    return q.abs(), k.abs(), v, *make_gates(kind, scale, B, T, 1)


def make_state(rows: int, level: float = 0.0):
    c, n, m = (torch.randn(shape, device=DEVICE) for shape in ((rows, 1, 16, 16), (rows, 1, 16), (rows, 1)))
    return c, n.abs(), m + level


def double(x):
    if isinstance(x, torch.Tensor):
        return x.detach().double() if x.is_floating_point() else x
    return None if x is None else tuple(map(double, x))


def evaluate(function, inputs, state, dh, dstate, gauge=None, **options):
    """Outputs and gradients by name, of a loss on h and on the final c and n, and the final m. c and n are brought to
    the m called `gauge`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    initial = None if state is None else (*(x.detach().requires_grad_() for x in state[:2]), state[2])
    h, (c, n, m) = function(*leaves, initial_state=initial, output_final_state=True, scale=0.25, eps=0.0, **options)
    shift = torch.exp(m - (m if gauge is None else gauge.to(m.dtype))).detach()
    outputs = {"h": h, "c": c * shift[..., None, None], "n": n * shift[..., None]}
    loss = sum((x * d).sum() for x, d in zip(outputs.values(), (dh, *dstate), strict=True))
    leaves += [] if initial is None else initial[:2]
    gradients = torch.autograd.grad(loss, leaves)
    names = [f"d{name}" for name in ("q", "k", "v", "igate", "fgate", "c", "n")]
    return outputs | dict(zip(names, gradients, strict=False)), m


def error(actual: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    assert actual.isfinite().all()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(floor)).item()


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
    errors = {name: error(actual[name], x.detach(), size if name[0] == "d" else 1e-30) for name, x in expected.items()}
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


@pytest.fixture(params=["resident", "streamed"])
def head_dim(request, monkeypatch):
    """A head whose R stays on chip, and one that is read in tiles at every step."""
    if request.param == "resident":
        return 5
    tiles = Tiles(num_warps=4, num_stages=1, BB=slstm_launch.BB, BD=16, BK=16)
    monkeypatch.setattr(slstm_launch, "plan", lambda *_: tiles)
    return 20


def make_slstm_inputs(kind: str, scale: float, T: int, D: int):
    gates = torch.randn(2, T, 4, 2, D, device=DEVICE)
    gates[:, :, 0], gates[:, :, 1] = make_gates(kind, scale, 2, T, 2, D)
    return gates, torch.randn(4, 2, D, D, device=DEVICE) / D**0.5, torch.randn(4, 2, D, device=DEVICE)


def evaluate_slstm(function, inputs, dh):
    """h, what the final state means (its output, c / n, the log of all weight) and the gradients of sum(h dh)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    h, (h_final, c, n, m) = function(*leaves, output_final_state=True)
    gradients = torch.autograd.grad((h * dh).sum(), leaves)
    names = ("h", "final h", "c / n", "m + log n", "dgates", "dweight", "dbias")
    return dict(zip(names, (h, h_final, c / n, m + n.log(), *gradients), strict=True))


@pytest.mark.parametrize("scale", [300.0, 1e5])
@pytest.mark.parametrize("kind", ["random", "closing", "infinite"])
def test_slstm(head_dim, kind, scale):
    """Without "level": next to m = 1e5, the n = 1 of these kernels leaves float32 two digits to tell tokens apart."""
    inputs = make_slstm_inputs(kind, scale, 9, head_dim)
    dh = torch.randn(2, 9, 2, head_dim, device=DEVICE)
    actual = evaluate_slstm(slstm_triton, inputs, dh)
    expected = evaluate_slstm(slstm_recurrent, *(double(x) for x in (inputs, dh)))
    for name, x in expected.items():
        assert error(actual[name], x.detach(), 1e-30) < (1e-4 if name[0] == "d" else 1e-5), name


@pytest.mark.parametrize("scale", SCALES)
def test_slstm_step(head_dim, scale):
    gates, *parameters = make_slstm_inputs("random", scale, 6, head_dim)
    expected_h, _ = slstm_recurrent(*double((gates, *parameters)))
    state = tuple(torch.zeros(4, 2, 2, head_dim, device=DEVICE))
    for t in range(6):
        h, state = slstm_step_triton(gates[:, t], *parameters, state, inplace=True)
        assert error(h, expected_h[:, t], 1e-30) < 1e-5
