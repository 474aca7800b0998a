"""The mLSTM op: the float64 recurrence against the formula of the paper, the chunkwise form and the step against the
recurrence; outputs, final states, and the gradient of every input."""

from itertools import pairwise

import pytest
import torch
from common import relative_error

from hf_xlstm.ops import mlstm, mlstm_step


INF = float("inf")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# mean and deviation of the input gate, then of the forget gate
GATES = {
    "unit": (0, 1, 0, 1),
    "closed": (-10, 1, -10, 1),
    "initial": (-10, 1, 4.5, 1),
    "loud": (5, 1, 5, 1),
    "capped": (0, 15, 0, 15),
}
FORWARD = ("h", "c", "n", "m")
TOLERANCE = {
    F64: dict.fromkeys(FORWARD, 1e-12) | {"gradient": 1e-12},
    F32: dict.fromkeys(FORWARD, 1e-5) | {"gradient": 1e-4},
    F16: dict.fromkeys(FORWARD, 1e-3) | {"gradient": 1e-3},
    BF16: dict.fromkeys(FORWARD, 1e-2) | {"gradient": 3e-2, "dv": 1.5e-2, "dfgate": 5e-2},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_inputs(B=2, T=100, H=2, K=5, V=7, dtype=F64, gates="unit"):
    """q, k, v, igate, fgate as slices of one projection, so that no stride is the contiguous one."""
    i_mean, i_std, f_mean, f_std = GATES[gates]
    q, k, v, igate, fgate = torch.randn(B, T, H, 2 * K + V + 2, dtype=F64).to(dtype).split([K, K, V, 1, 1], dim=-1)
    igate, fgate = igate[..., 0] * i_std + i_mean, fgate[..., 0] * f_std + f_mean
    if gates == "capped":
        igate, fgate = 15 * torch.tanh(igate / 15), 15 * torch.tanh(fgate / 15)
    return q, k, v, igate, fgate


def make_state(rows=2, H=2, K=5, V=7, dtype=F64):
    return tuple(torch.randn(shape, dtype=dtype) for shape in ((rows, H, K, V), (rows, H, K), (rows, H)))


def double(tensors):
    return tuple(x.double() for x in tensors)


def evaluate(inputs, state, weights, gauge=None, **options):
    """h, the final state, and the gradients of sum(weights * (h, c, n)). (c, n, m) is the same state as
    (c e^a, n e^a, m - a): it is brought to m = gauge first."""
    state_before = tuple(x.clone() for x in state)
    *leaves, m0 = [x.detach().requires_grad_() for x in (*inputs, *state)]
    h, (c, n, m) = mlstm(*leaves[:5], initial_state=(*leaves[5:], m0), output_final_state=True, **options)
    assert h.dtype == inputs[2].dtype
    assert all(x.dtype == y.dtype for x, y in zip((c, n, m), state, strict=True))
    factor = torch.exp(m - (m if gauge is None else gauge)).to(m.dtype)
    c, n = c * factor[..., None, None], n * factor[..., None]
    weights = [weight.to(x) for weight, x in zip(weights, (h, c, n), strict=True)]
    gradients = torch.autograd.grad((h, c, n), leaves, weights)
    assert all(torch.equal(x, y) for x, y in zip(state, state_before, strict=True)), "the initial state was modified"
    names = ("dq", "dk", "dv", "digate", "dfgate", "dc0", "dn0")
    return dict(zip(FORWARD, (h, c, n, m), strict=True)) | dict(zip(names, gradients, strict=True))


def assert_exact(inputs, state=None, tolerance=None, weights=(1, 1, 1), **options):
    """The chunkwise form against the recurrence in float64; `weights` are those of h, c and n in the loss."""
    q, _, v, *_ = inputs
    rows = q.shape[0] if options.get("cu_seqlens") is None else options["cu_seqlens"].shape[0] - 1
    if state is None:
        state = make_state(rows, *q.shape[2:], v.shape[-1], dtype=torch.promote_types(q.dtype, F32))
    weights = [w * torch.randn(x.shape).to(q.dtype) for w, x in zip(weights, (v, *state[:2]), strict=True)]
    expected = evaluate(double(inputs), double(state), weights, backend="reference", **options)
    actual = evaluate(inputs, state, weights, gauge=expected["m"], backend="torch", **options)
    tolerances = TOLERANCE[q.dtype]
    for name in expected:
        limit = tolerance or tolerances.get(name, tolerances["gradient"])
        assert relative_error(actual[name], expected[name]) < limit, name
    return actual


def paper(q, k, v, igate, fgate, state):
    """All pairs of tokens at once, without a stabilizer, eps = 0: h and the true state (c e^m, n e^m)."""
    c0, n0, m0 = state
    F = torch.nn.functional.logsigmoid(fgate).cumsum(1)
    D = torch.exp(F[:, :, None] - F[:, None] + igate[:, None]).permute(0, 3, 1, 2).tril()  # (B, H, T, J)
    carry = torch.exp(F + m0[:, None])[..., None]
    q = q * q.shape[-1] ** -0.5
    S = D * torch.einsum("bthk,bjhk->bhtj", q, k)
    numerator = torch.einsum("bhtj,bjhv->bthv", S, v) + carry * torch.einsum("bthk,bhkv->bthv", q, c0)
    normalizer = S.sum(-1).mT[..., None] + carry * torch.einsum("bthk,bhk->bth", q, n0)[..., None]
    c = torch.einsum("bhj,bjhk,bjhv->bhkv", D[:, :, -1], k, v) + carry[:, -1, ..., None] * c0
    n = torch.einsum("bhj,bjhk->bhk", D[:, :, -1], k) + carry[:, -1] * n0
    return numerator / normalizer.abs().clamp_min(1), c, n


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_formula_of_the_paper(backend):
    inputs, state = make_inputs(T=20), make_state()
    leaves = [x.detach().requires_grad_() for x in (*inputs, *state)]
    expected = paper(*leaves[:5], leaves[5:])
    h, (c, n, m) = mlstm(
        *leaves[:5], initial_state=tuple(leaves[5:]), output_final_state=True, eps=0.0, chunk_size=7, backend=backend
    )
    actual = (h, c * m.exp()[..., None, None], n * m.exp()[..., None])
    weights = [torch.randn_like(x) for x in expected]
    for x, y in zip(actual, expected, strict=True):
        assert relative_error(x, y) < 1e-12
    for x, y in zip(*(torch.autograd.grad(f, leaves[:7], weights) for f in (actual, expected)), strict=True):
        assert relative_error(x, y) < 1e-11


def test_gradcheck():
    leaves = [x.detach().requires_grad_() for x in (*make_inputs(B=1, T=5, K=3, V=2), *make_state(1, K=3, V=2))]

    def true_outputs(*leaves):
        h, (c, n, m) = mlstm(
            *leaves[:5], initial_state=leaves[5:], output_final_state=True, eps=0.0, chunk_size=2, backend="torch"
        )
        return h, c * m.exp()[..., None, None], n * m.exp()[..., None]

    *leaves, m0 = leaves
    assert torch.autograd.gradcheck(lambda *x: true_outputs(*x, m0.detach()), leaves)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 200, pytest.param(1000, marks=pytest.mark.slow)])
def test_lengths_and_dtypes(length, dtype):
    assert_exact(make_inputs(T=length, dtype=dtype))


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("gates", GATES)
def test_gate_regimes(gates, alone, dtype):
    """With loud gates n q cancels: there float arithmetic itself is no better. Alone, without a state before or a loss
    on the one after, closed forget gates have tiny gradients that must not drown in larger terms."""
    torch.manual_seed(1)  # draws no query for which n q cancels almost completely
    tolerance = {F64: 1e-11, F32: 1e-3}[dtype] if gates == "loud" else None
    state = make_state(dtype=dtype)
    if alone:
        state = tuple(torch.zeros_like(x) for x in state)
    inputs = make_inputs(T=150, dtype=dtype, gates=gates)
    assert_exact(inputs, state, tolerance=tolerance, weights=(1, 0, 0) if alone else (1, 1, 1))


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_chunk_size_changes_nothing(chunk_size, masked):
    assert_exact(make_inputs(T=300), chunk_size=chunk_size, mask=torch.rand(2, 300) < 0.8 if masked else None)


@pytest.mark.parametrize("heads, key_dim, value_dim", [(1, 1, 1), (3, 16, 1), (1, 1, 8), (5, 33, 24)])
def test_head_dims(heads, key_dim, value_dim):
    assert_exact(make_inputs(T=70, H=heads, K=key_dim, V=value_dim))


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 1), (0, 0, 1)], ids=["h", "state", "n"])
def test_losses(weights):
    """Of the outputs alone and of the final state alone. None of them is blind to the scale of h, as a loss behind a
    norm would be: the normalizer's gradient counts."""
    assert_exact(make_inputs(), weights=weights)


def test_options():
    assert_exact(make_inputs(), scale=0.7, eps=0.1)


def test_no_initial_state_is_zeros():
    inputs, (c, n, m) = make_inputs(), make_state()
    zeros = tuple(torch.zeros_like(x) for x in (c, n, m))
    for backend in ("reference", "torch"):
        expected_h, expected = mlstm(*inputs, initial_state=zeros, output_final_state=True, backend=backend)
        h, final = mlstm(*inputs, output_final_state=True, backend=backend)
        assert relative_error(h, expected_h) < 1e-14
        assert all(relative_error(x, y) < 1e-14 for x, y in zip(final, expected, strict=True))
        assert mlstm(*inputs, backend=backend)[1] is None


@pytest.mark.parametrize("layout", ["heads first", "reversed dims", "shared by heads", "one token"])
def test_strides(layout):
    inputs = make_inputs()
    if layout == "heads first":
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    elif layout == "reversed dims":
        inputs = [x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))) for x in inputs]
    elif layout == "shared by heads":
        inputs = [x[:, :, :1].expand_as(x) for x in inputs]
    else:
        inputs = [x[:, :1].expand_as(x) for x in inputs]
    actual = assert_exact(inputs, state := make_state())
    contiguous = mlstm(*(x.contiguous() for x in inputs), initial_state=state)[0]
    assert relative_error(actual["h"], contiguous) < 1e-14


@pytest.mark.parametrize("gate_dtype", [BF16, F32, F64])
def test_gates_of_another_dtype(gate_dtype):
    q, k, v, igate, fgate = make_inputs(dtype=F32)
    inputs = (q, k, v, igate.to(gate_dtype), fgate.to(gate_dtype))
    actual = assert_exact(inputs, tolerance=1e-2 if gate_dtype == BF16 else None)
    assert actual["digate"].dtype == actual["dfgate"].dtype == gate_dtype


def test_autocast_leaves_the_op_alone():
    inputs = make_inputs(dtype=F32)
    with torch.autocast("cpu", dtype=BF16):
        assert_exact(inputs)


MASKS = {
    "left": lambda length: torch.arange(length) >= length // 2,
    "right": lambda length: torch.arange(length) < length // 2,
    "inside": lambda length: torch.arange(length) % 7 > 2,
    "all": lambda length: torch.zeros(length, dtype=torch.bool),
}


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("masking", MASKS)
def test_mask(masking, dtype):
    inputs, state = make_inputs(dtype=dtype), make_state(dtype=torch.promote_types(dtype, F32))
    mask = torch.stack([MASKS[masking](100), torch.ones(100, dtype=torch.bool)])
    actual = assert_exact(inputs, state, mask=mask)
    for name in ("h", "dq", "dk", "dv", "digate", "dfgate"):
        assert (actual[name][~mask] == 0).all(), name
    garbage = [torch.where(mask.view(2, 100, *[1] * (x.ndim - 2)), x, 1e3) for x in inputs]
    assert torch.equal(mlstm(*garbage, initial_state=state, mask=mask)[0], actual["h"])


@pytest.mark.parametrize("masking", MASKS)
def test_masked_tokens_are_absent(masking):
    mask = MASKS[masking](100)[None]
    inputs, state = make_inputs(B=1), make_state(1)
    h, final = mlstm(*inputs, initial_state=state, output_final_state=True, mask=mask)
    if masking == "all":
        assert all(torch.equal(x, y) for x, y in zip(final, state, strict=True))
        return
    alone = [x[:, mask[0]] for x in inputs]
    expected_h, expected = mlstm(*alone, initial_state=state, output_final_state=True)
    assert relative_error(h[:, mask[0]], expected_h) < 1e-12
    assert all(relative_error(x, y) < 1e-12 for x, y in zip(final, expected, strict=True))


@pytest.mark.parametrize(
    "bounds", [[0, 100], [0, 1, 2, 40, 100], [0, 0, 64, 64, 64, 65, 100, 100], list(range(101))], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_packed(bounds, masked):
    inputs, state = make_inputs(B=1), make_state(len(bounds) - 1)
    mask = torch.rand(1, 100) < 0.8 if masked else None
    options = {"mask": mask, "chunk_size": 16}
    actual = assert_exact(inputs, state, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **options)
    h, final = mlstm(*inputs, initial_state=state, output_final_state=True, cu_seqlens=torch.tensor(bounds), **options)
    assert torch.equal(h, actual["h"])
    for row, (start, end) in enumerate(pairwise(bounds)):
        own_state, own_final = (tuple(x[row : row + 1] for x in s) for s in (state, final))
        if start == end:
            assert all(torch.equal(x, y) for x, y in zip(own_final, own_state, strict=True))
            continue
        alone, alone_final = mlstm(
            *(x[:, start:end] for x in inputs),
            initial_state=own_state,
            output_final_state=True,
            mask=mask[:, start:end] if masked else None,
        )
        assert relative_error(h[:, start:end], alone) < 1e-12
        assert all(relative_error(x, y) < 1e-12 for x, y in zip(own_final, alone_final, strict=True))


def test_packed_documents_do_not_leak():
    """Not even where the earlier document shouts and the later one whispers."""
    inputs = make_inputs(B=1, dtype=F32)
    inputs[3][:, :50], inputs[3][:, 50:] = 15, -15
    h, _ = mlstm(*inputs, cu_seqlens=torch.tensor([0, 50, 100]))
    assert relative_error(h[:, 50:], mlstm(*(x[:, 50:] for x in inputs))[0]) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("igate", [-INF, -1e4, 1e4, None])
@pytest.mark.parametrize("fgate", [-INF, -1e4, 1e4, INF, None])
def test_extreme_gates_stay_finite(igate, fgate, backend):
    inputs, state = make_inputs(dtype=F32), make_state(dtype=F32)
    for gate, value in zip(inputs[3:], (igate, fgate), strict=True):
        if value is not None:
            gate[torch.rand_like(gate) < 0.5] = value
            gate[1] = value
    weights = [torch.randn_like(x) for x in (inputs[2], *state[:2])]
    actual = evaluate(inputs, state, weights, backend=backend)
    assert all(x.isfinite().all() for x in actual.values())


def test_infinite_gates_are_exact():
    """-inf: nothing is stored, everything is forgotten; +inf: everything is kept."""
    inputs = make_inputs()
    inputs[3][:, 3::10], inputs[4][:, 5::20], inputs[4][:, 7::10] = -INF, -INF, INF
    assert_exact(inputs)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_closed_forget_gate_is_a_reset(backend):
    inputs = make_inputs()
    inputs[3][:, :50] += 15  # what is forgotten had been loud
    inputs[4][:, 50] = -INF
    h, _ = mlstm(*inputs, initial_state=make_state(), eps=0.0, backend=backend)
    expected, _ = mlstm(*(x[:, 50:] for x in inputs), eps=0.0, backend=backend)
    assert relative_error(h[:, 50:], expected) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_step(dtype, inplace, backend):
    """Steps against the sequence; in place they write into the tensors they were given, else they leave them alone."""
    inputs, initial = make_inputs(T=20, dtype=dtype), make_state(dtype=torch.promote_types(dtype, F32))
    options = {"scale": 0.7, "eps": 0.1}
    expected_h, expected = mlstm(
        *double(inputs), initial_state=double(initial), output_final_state=True, backend="reference", **options
    )
    state, outputs = tuple(x.clone() for x in initial), []
    for t in range(20):
        before = tuple(x.clone() for x in state)
        h, new_state = mlstm_step(*(x[:, t] for x in inputs), state, inplace=inplace, backend=backend, **options)
        assert inplace == all(x is y for x, y in zip(new_state, state, strict=True))
        assert inplace or all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
        state = new_state
        outputs.append(h)
    assert h.dtype == dtype
    tolerance = TOLERANCE[dtype]
    assert relative_error(torch.stack(outputs, dim=1), expected_h) < tolerance["h"]
    # the step stores its state without rounding it to the inputs' dtype
    assert all(relative_error(x, y) < min(tolerance["c"], 1e-5) for x, y in zip(state, expected, strict=True))


@pytest.mark.parametrize("pieces", [[1] * 10, [30, 50, 20]], ids=["steps", "segments"])
def test_gradients_through_pieces(pieces):
    """Backpropagation through a sequence run in pieces, by the state between them, equals that in one go."""
    length = sum(pieces)
    inputs, state = make_inputs(T=length), make_state()
    leaves = [x.detach().requires_grad_() for x in (*inputs, *state[:2])]
    h, (c, n, _) = mlstm(*leaves[:5], initial_state=(*leaves[5:], state[2]), output_final_state=True)
    weights = [torch.randn_like(x) for x in (h, c, n)]
    expected = torch.autograd.grad((h, c, n), leaves, weights)

    outputs, current = [], (*leaves[5:], state[2])
    for segment in zip(*(x.split(pieces, dim=1) for x in leaves[:5]), strict=True):
        if len(set(pieces)) == 1:
            h, current = mlstm_step(*(x[:, 0] for x in segment), current)
            h = h[:, None]
        else:
            h, current = mlstm(*segment, initial_state=current, output_final_state=True)
        outputs.append(h)
    actual = torch.autograd.grad((torch.cat(outputs, dim=1), *current[:2]), leaves, weights)
    assert all(relative_error(x, y) < 1e-12 for x, y in zip(actual, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["unit", "initial"])
def test_long_stream(gates):
    """Over 20,000 tokens neither the chunkwise form nor the step drifts away from float64."""
    inputs = make_inputs(B=1, T=20_000, dtype=F32, gates=gates)
    with torch.no_grad():
        expected, expected_state = mlstm(*double(inputs), output_final_state=True, backend="reference")
        h, final = mlstm(*inputs, output_final_state=True)
        state, outputs = tuple(torch.zeros_like(x) for x in final), []
        for t in range(20_000):
            outputs.append(mlstm_step(*(x[:, t] for x in inputs), state, inplace=True)[0])
    for stream in (h, torch.stack(outputs, dim=1)):
        assert relative_error(stream[:, -1000:], expected[:, -1000:]) < 1e-5
    for result in (final, state):
        assert all(relative_error(x, y) < 1e-5 for x, y in zip(result, expected_state, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["unit", "initial"])
@torch.no_grad()
def test_million_steps(gates):
    """The chunkwise form, from state to state, and the step stay together."""
    state = chunk_state = None
    for _ in range(10):
        inputs = make_inputs(B=1, T=100_000, dtype=F32, gates=gates)
        h, chunk_state = mlstm(*inputs, initial_state=chunk_state, output_final_state=True)
        if state is None:
            state = tuple(torch.zeros_like(x) for x in chunk_state)
        steps = [mlstm_step(*x, state, inplace=True)[0] for x in zip(*(x.unbind(1) for x in inputs), strict=True)]
    assert relative_error(torch.stack(steps[-1000:], dim=1), h[:, -1000:]) < 1e-4
    for stepped, chunked in zip(state, chunk_state, strict=True):  # both with the m of the recurrence
        assert relative_error(stepped, chunked) < 1e-4
