"""The Triton sLSTM against the float64 recurrence: on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch


pytest.importorskip("triton")

import triton
import triton.language as tl
from common import relative_error

from hf_xlstm.cells.slstm.reference import slstm_recurrent
from hf_xlstm.cells.slstm.triton_kernels import places
from hf_xlstm.cells.slstm.triton_launch import BB, plan
from hf_xlstm.cells.slstm.triton_ops import slstm_step_triton, slstm_triton
from hf_xlstm.cells.triton_common import GPU, Tiles, unsupported_reason


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FORWARD = ("h", "state h", "state r", "state l")
GRADIENTS = ("dgates", "dweight", "dbias", "dh0", "dc0", "dn0")
TOLERANCE = {F32: (1e-5, 1e-4), F16: (2e-3, 5e-3), BF16: (1e-2, 3e-2)}  # outputs, gradients


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["resident", "streamed"])
def head_dim(request, monkeypatch):
    """A head whose R stays on chip, and one that is read in tiles at every step."""
    if request.param == "resident":
        assert plan(F32, 5, GPU(major=0, processors=1)).BK is None
        return 5
    tiles = Tiles(num_warps=4, num_stages=1, BB=BB, BD=16, BK=16)
    monkeypatch.setattr("hf_xlstm.cells.slstm.triton_launch.plan", lambda *_: tiles)
    return 20


def make_inputs(B=2, T=6, H=2, D=5, dtype=F32, mean=(0, 0, 0, 0), std=1):
    """gates, recurrent weight, bias; gates as a projection and a transposition leave them, not contiguous."""
    x = torch.tensor(mean)[:, None] + std * torch.randn(T, B, 4, H * D + 3)
    x = x.to(DEVICE, dtype)[..., 3:].unflatten(-1, (H, D)).transpose(0, 1)
    assert not x.is_contiguous()
    weight, bias = torch.randn(4, H, D, D) / D**0.5, torch.randn(4, H, D)
    return x, weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)


def make_state(rows=2, H=2, D=5):
    h, c, n, m = torch.randn(4, rows, H, D, device=DEVICE)
    return h.tanh(), c, n.abs() + 0.1, m


def double(tensors):
    return tuple(x.double() for x in tensors)


def meaning(state):
    h, c, n, m = state
    return h, c / n, m + n.log()


def evaluate(function, inputs, state, weights, **options):
    """h, the final state, and the gradients of sum(weights * (h, what the state means))."""
    *leaves, m0 = [x.detach().requires_grad_() for x in (*inputs, *state)]
    h, final = function(*leaves[:3], initial_state=(*leaves[3:], m0), output_final_state=True, **options)
    assert h.dtype == inputs[0].dtype
    assert all(x.dtype == y.dtype for x, y in zip(final, state, strict=True))
    outputs = (h, *meaning(final))
    loss = sum((w * x.to(w.dtype)).sum() for w, x in zip(weights, outputs, strict=True))
    gradients = torch.autograd.grad(loss, leaves)
    assert all(d.dtype == x.dtype for d, x in zip(gradients, leaves, strict=True))
    return dict(zip((*FORWARD, *GRADIENTS), (*outputs, *gradients), strict=True))


def assert_exact(inputs, state=None, weights=(1, 1, 1, 1), **options):
    gates = inputs[0]
    if state is None:
        rows = gates.shape[0] if options.get("cu_seqlens") is None else options["cu_seqlens"].shape[0] - 1
        state = make_state(rows, *gates.shape[3:])
    shapes = (gates[:, :, 0], *state[:3])
    weights = [w * torch.randn(x.shape, dtype=F64, device=DEVICE) for w, x in zip(weights, shapes, strict=True)]
    expected = evaluate(slstm_recurrent, double(inputs), double(state), weights, **options)
    actual = evaluate(slstm_triton, inputs, state, weights, **options)
    outputs, gradients = TOLERANCE[gates.dtype]
    for name in expected:
        assert relative_error(actual[name], expected[name]) < (outputs if name in FORWARD else gradients), name
    return actual


@pytest.mark.parametrize("length", [1, 2, 20])
def test_lengths(length, head_dim):
    assert_exact(make_inputs(T=length, H=1, D=head_dim))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(head_dim, dtype):
    assert_exact(make_inputs(T=3, D=head_dim, dtype=dtype))


@pytest.mark.parametrize("heads, dim", [(1, 1), (3, 16), (2, 33), (1, 160)])
def test_head_dims(heads, dim):
    """As planned: the last two are streamed."""
    assert_exact(make_inputs(T=3, H=heads, D=dim))


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_batch(rows):
    assert_exact(make_inputs(B=rows, T=3))


@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)], ids=FORWARD)
def test_losses(weights):
    assert_exact(make_inputs(), weights=weights)


@pytest.mark.parametrize(
    "mean, std",
    [((-10,) * 4, 1), ((5,) * 4, 1), ((5, -10, 0, 0), 1), ((0,) * 4, 15)],
    ids=["closed", "open", "forgetful", "wide"],
)
def test_gate_regimes(mean, std):
    assert_exact(make_inputs(T=12, mean=mean, std=std))


def test_small_cell_inputs_keep_their_digits():
    """tanh near 0: everything is small, h in proportion."""
    gates, weight, bias = make_inputs()
    gates[:, :, 2] *= 1e-3
    weight[2], bias[2] = 0, 0
    state = make_state()
    assert_exact((gates, weight, bias), (state[0], state[1] * 1e-3, *state[2:]))


def test_state_in_parts(head_dim):
    """Partly empty; and absent, which is the same as zeros."""
    inputs, (h, c, n, m) = make_inputs(D=head_dim, T=4), make_state(D=head_dim)
    empty = torch.rand_like(n) < 0.5
    actual = assert_exact(inputs, (h, c.masked_fill(empty, 0), n.masked_fill(empty, 0), m))
    assert (actual["dc0"][empty] == 0).all()
    zeros = tuple(torch.zeros_like(x) for x in (h, c, n, m))
    with_zeros, without = (slstm_triton(*inputs, initial_state=state) for state in (zeros, None))
    assert torch.equal(with_zeros[0], without[0])
    assert without[1] is None


MASKS = {
    "left": lambda length: torch.arange(length) >= length // 2,
    "right": lambda length: torch.arange(length) < length // 2,
    "inside": lambda length: torch.arange(length) % 3 > 0,
    "all": lambda length: torch.zeros(length, dtype=torch.bool),
}


@pytest.mark.parametrize("masking", MASKS)
def test_mask(masking, head_dim):
    inputs, state = make_inputs(D=head_dim), make_state(D=head_dim)
    mask = torch.stack([MASKS[masking](6), torch.ones(6, dtype=torch.bool)]).to(DEVICE)
    actual = assert_exact(inputs, state, mask=mask)
    for name in ("h", "dgates"):
        assert (actual[name][~mask] == 0).all(), name
    if masking == "all":
        _, final = slstm_triton(*inputs, initial_state=state, output_final_state=True, mask=mask)
        assert all(torch.equal(x[0], y[0]) for x, y in zip(final, state, strict=True))
    garbage = inputs[0].masked_fill(~mask[..., None, None, None], INF)
    assert torch.equal(slstm_triton(garbage, *inputs[1:], initial_state=state, mask=mask)[0], actual["h"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bounds", [[0, 7], [0, 0, 5, 5, 6, 9, 9], list(range(8))], ids=str)
def test_packed(bounds, masked, head_dim):
    length = bounds[-1]
    inputs, state = make_inputs(B=1, T=length, D=head_dim), make_state(len(bounds) - 1, D=head_dim)
    mask = torch.rand(1, length, device=DEVICE) < 0.7 if masked else None
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    actual = assert_exact(inputs, state, cu_seqlens=cu_seqlens, mask=mask)
    h, _ = slstm_triton(*inputs, initial_state=state, cu_seqlens=cu_seqlens.long(), mask=mask)
    assert torch.equal(h, actual["h"])


@pytest.mark.parametrize("igate", [-INF, -1e4, 1e4, None])
@pytest.mark.parametrize("fgate", [-INF, -1e4, 1e4, INF, None])
def test_extreme_gates_stay_finite(igate, fgate):
    """At some steps, in one row at all of them; from an empty state in the first head, a running one in the other."""
    inputs, state = make_inputs(T=4), make_state()
    for x in state:
        x[:, 0] = 0
    for gate, value in ((0, igate), (1, fgate)):
        if value is not None:
            inputs[0][:, :, gate][torch.rand(2, 4, 2, 5, device=DEVICE) < 0.5] = value
            inputs[0][1, :, gate] = value
    leaves = [x.detach().requires_grad_() for x in (*inputs, *state[:3])]
    h, final = slstm_triton(*leaves[:3], initial_state=(*leaves[3:], state[3]), output_final_state=True)
    gradients = torch.autograd.grad((h, *final[:3]), leaves, [torch.randn_like(x) for x in (h, *final[:3])])
    assert all(x.isfinite().all() for x in (h, *final, *gradients))
    expected, _ = slstm_recurrent(*double(inputs), initial_state=double(state))
    # a head that has never been written to, and still is not, has no definite content
    defined = slice(1 if igate == -INF else 0, None)
    assert relative_error(h[:, :, defined], expected[:, :, defined]) < 1e-3  # m has no more digits next to 1e4


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_step(dtype, inplace, head_dim):
    inputs, state = make_inputs(D=head_dim, T=3, dtype=dtype), make_state(D=head_dim)
    expected_h, expected = slstm_recurrent(*double(inputs), initial_state=double(state), output_final_state=True)
    outputs = []
    for gates in inputs[0].unbind(1):
        before = tuple(x.clone() for x in state)
        h, new_state = slstm_step_triton(gates, *inputs[1:], state, inplace=inplace)
        assert inplace == all(x is y for x, y in zip(new_state, state, strict=True))
        assert inplace or all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
        state = new_state
        outputs.append(h)
    assert h.dtype == dtype
    outputs = torch.stack(outputs, dim=1)
    assert relative_error(outputs, expected_h) < TOLERANCE[dtype][0]
    assert all(
        relative_error(x, y) < TOLERANCE[dtype][0] for x, y in zip(meaning(state), meaning(expected), strict=True)
    )


def test_gradients_through_pieces():
    leaves = [x.detach().requires_grad_() for x in (*make_inputs(), *make_state())]
    *leaves, m0 = leaves
    gates, *parameters, h0, c0, n0 = leaves
    weights = torch.randn(2, 6, 2, 5, device=DEVICE)
    gradients = []
    for pieces in ([6], [2, 4]):
        state, outputs = (h0, c0, n0, m0.detach()), []
        for piece in gates.split(pieces, dim=1):
            h, state = slstm_triton(piece, *parameters, initial_state=state, output_final_state=True)
            outputs.append(h)
        loss = (torch.cat(outputs, dim=1) * weights).sum() + meaning(state)[2].sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(*gradients, strict=True))


def test_inference_keeps_nothing():
    """Without gradients the kernel writes h and the final state only."""
    from hf_xlstm.cells.slstm.triton_ops import slstm_forward

    *_, saved, c = slstm_forward(*make_inputs(), *make_state(), None, None, False)
    assert saved.numel() == c.numel() == 0
    with torch.no_grad():
        assert relative_error(slstm_triton(*(x := make_inputs()))[0], slstm_recurrent(*double(x))[0]) < 1e-5


@pytest.mark.parametrize("options", ["plain", "mask", "packed"])
def test_opcheck(options):
    B, rows = (1, 3) if options == "packed" else (2, 2)
    mask = (torch.arange(12).view(2, 6) % 4 > 0).to(DEVICE) if options == "mask" else None
    cu_seqlens = torch.tensor([0, 4, 4, 6], device=DEVICE) if options == "packed" else None
    inputs = [x.contiguous() for x in (*make_inputs(B=B), *make_state(rows))]
    args = [x.requires_grad_() for x in inputs[:-1]] + inputs[-1:]
    torch.library.opcheck(torch.ops.hf_xlstm.slstm_forward.default, (*args, mask, cu_seqlens, True))
    _, weight, _, *state = inputs
    h, *final, saved, c = torch.ops.hf_xlstm.slstm_forward(*inputs, mask, cu_seqlens, True)
    tensors = (h, *final[:3], weight, *state[:3], mask, cu_seqlens, h, saved, c)
    tensors = tuple(None if x is None else x.detach() for x in tensors)
    torch.library.opcheck(torch.ops.hf_xlstm.slstm_backward.default, tensors)


def test_any_strides():
    """A state with its heads first, bounds out of a table."""
    inputs, state = make_inputs(B=1, T=7), make_state(2)
    bounds = torch.tensor([0, 3, 7], device=DEVICE)
    results = []
    for strided in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *state[:3])]
        initial, cu_seqlens = (*leaves[3:], state[3]), bounds
        if strided:
            initial = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in initial)
            cu_seqlens = torch.stack([bounds, -bounds], dim=1).int()[:, 0]
        options = {"initial_state": initial, "output_final_state": True, "cu_seqlens": cu_seqlens}
        h, final = slstm_triton(*leaves[:3], **options)
        gradients = torch.autograd.grad(h.square().sum() + final[1].sum(), leaves)
        results.append((h, *final, *gradients))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_opcheck_step():
    inputs = (make_inputs()[0][:, 0], *make_inputs()[1:], *make_state())
    torch.library.opcheck(torch.ops.hf_xlstm.slstm_step.default, (*(x.contiguous() for x in inputs), None))


def test_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(slstm_triton, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (2, 3):
        inputs = make_inputs(T=length)
        gradients = []
        for function in (slstm_triton, compiled):
            leaves = [x.detach().requires_grad_() for x in inputs]
            h, _ = function(*leaves)
            gradients.append((h, *torch.autograd.grad(h.sum(), leaves)))
        assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("D", [1, 16, 33, 64, 100, 128, 512])
@pytest.mark.parametrize("major", [0, 8, 9, 12])
def test_plan_fits(D, dtype, major):
    """R stays on chip only whole, and where it fits there; tiles are powers of two."""
    cut = plan(dtype, D, GPU(major, processors=1))
    if cut.BK is None:
        assert D <= cut.BD
        assert 4 * cut.BD**2 * (2 if dtype == BF16 else 4) <= (128 if major == 9 else 32) * 1024
    assert all(size >= 16 and size & (size - 1) == 0 for size in (cut.BD, cut.BK or 16))


def test_offsets_have_64_bits():
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


def test_unsupported_reason(monkeypatch):
    gates = make_inputs()[0]
    assert unsupported_reason(gates, 16) is None
    assert "float64" in unsupported_reason(gates.double(), 16)
    assert "512" in unsupported_reason(gates, 513)
    monkeypatch.setattr("hf_xlstm.cells.triton_common.INTERPRETED", False)
    if DEVICE == "cpu":
        assert "GPU" in unsupported_reason(gates, 16)
