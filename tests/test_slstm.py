"""The sLSTM op: the float64 recurrence against the formula of the paper, the fast sequence form and the step against
the recurrence; outputs, final states, and the gradient of every input."""

from itertools import pairwise

import pytest
import torch
from common import relative_error
from torch._dynamo.testing import CompileCounterWithBackend

from hf_xlstm.ops import slstm, slstm_step


INF = float("inf")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BACKENDS = ["reference", "torch"]
# means of i, f, z, o and deviation of all
GATES = {
    "unit": ((0, 0, 0, 0), 1),
    "closed": ((-10, -10, -10, -10), 1),
    "open": ((5, 5, 5, 5), 1),
    "initial": ((0, 4.5, 0, 0), 1),
    "forgetful": ((5, -10, 0, 0), 1),
    "capped": ((0, 0, 0, 0), 15),
}
# (c, n, m) and (c e^a, n e^a, m - a) are the same state: r = c / n and l = m + log n are what it means
FORWARD = ("h", "state h", "state r", "state l")
GRADIENTS = ("dgates", "dweight", "dbias", "dh0", "dc0", "dn0")
TOLERANCE = {  # outputs, gradients
    F64: (1e-12, 1e-12),
    F32: (1e-5, 1e-4),
    F16: (1e-3, 1e-3),
    BF16: (1e-2, 3e-2),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_inputs(B=2, T=100, H=2, D=5, dtype=F64, gates="unit"):
    """gates, recurrent weight, bias; gates as a projection and a transposition leave them, not contiguous."""
    mean, std = GATES[gates]
    x = torch.tensor(mean, dtype=F64)[:, None] + std * torch.randn(T, B, 4, H * D + 3, dtype=F64)
    if gates == "capped":
        x = 15 * torch.tanh(x / 15)
    x = x.to(dtype)[..., 3:].unflatten(-1, (H, D)).transpose(0, 1)
    assert not x.is_contiguous()
    weight, bias = torch.randn(4, H, D, D, dtype=F64) / D**0.5, torch.randn(4, H, D, dtype=F64)
    return x, weight.to(dtype), bias.to(dtype)


def make_state(rows=2, H=2, D=5, dtype=F64):
    h, c, n, m = torch.randn(4, rows, H, D, dtype=dtype)
    return h.tanh(), c, n.abs() + 0.1, m


def state_dtype(dtype):
    return torch.promote_types(dtype, F32)


def double(tensors):
    return tuple(x.double() for x in tensors)


def meaning(state):
    h, c, n, m = state
    return h, c / n, m + n.log()


def evaluate(inputs, state, weights, **options):
    """h, the final state, and the gradients of sum(weights * (h, what the state means))."""
    before = tuple(x.clone() for x in (*inputs, *state))
    *leaves, m0 = [x.detach().requires_grad_() for x in (*inputs, *state)]
    h, final = slstm(*leaves[:3], initial_state=(*leaves[3:], m0), output_final_state=True, **options)
    assert h.dtype == inputs[0].dtype
    assert all(x.dtype == y.dtype for x, y in zip(final, state, strict=True))
    outputs = (h, *meaning(final))
    loss = sum((w * x.to(w.dtype)).sum() for w, x in zip(weights, outputs, strict=True))
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    assert all(d.dtype == x.dtype for d, x in zip(gradients, leaves, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(before, (*inputs, *state), strict=True))
    return dict(zip((*FORWARD, *GRADIENTS), (*outputs, *gradients), strict=True))


def assert_exact(inputs, state=None, tolerance=None, weights=(1, 1, 1, 1), **options):
    """The fast form against the recurrence in float64; `weights` are those of h and the final state in the loss."""
    gates = inputs[0]
    if state is None:
        rows = gates.shape[0] if options.get("cu_seqlens") is None else options["cu_seqlens"].shape[0] - 1
        state = make_state(rows, *gates.shape[3:], dtype=state_dtype(gates.dtype))
    weights = [w * torch.randn(x.shape, dtype=F64) for w, x in zip(weights, (gates[:, :, 0], *state[:3]), strict=True)]
    expected = evaluate(double(inputs), double(state), weights, backend="reference", **options)
    actual = evaluate(inputs, state, weights, backend="torch", **options)
    outputs, gradients = tolerance or TOLERANCE[gates.dtype]
    for name in expected:
        assert relative_error(actual[name], expected[name]) < (outputs if name in FORWARD else gradients), name
    return actual


def paper(gates, weight, bias, state):
    """Exponential input gate, no stabilizer: h and the true state (h, c e^m, n e^m)."""
    h, c, n, m = state
    c, n = c * m.exp(), n * m.exp()
    outputs = []
    for x in gates.unbind(1):
        i, f, z, o = (x + bias + torch.einsum("ghoi,bhi->bgho", weight, h)).unbind(1)
        i, f, z, o = i.exp(), f.sigmoid(), z.tanh(), o.sigmoid()
        c, n = f * c + i * z, f * n + i
        h = o * c / n
        outputs.append(h)
    return torch.stack(outputs, dim=1), h, c, n


@pytest.mark.parametrize("backend", BACKENDS)
def test_formula_of_the_paper(backend):
    leaves = [x.detach().requires_grad_() for x in (*make_inputs(T=20), *make_state())]
    expected = paper(*leaves[:3], leaves[3:])
    h, final = slstm(*leaves[:3], initial_state=tuple(leaves[3:]), output_final_state=True, backend=backend)
    actual = (h, final[0], final[1] * final[3].exp(), final[2] * final[3].exp())
    weights = [torch.randn_like(x) for x in expected]
    for x, y in zip(actual, expected, strict=True):
        assert relative_error(x, y) < 1e-12
    for x, y in zip(*(torch.autograd.grad(f, leaves[:6], weights) for f in (actual, expected)), strict=True):
        assert relative_error(x, y) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_step_from_nothing(backend):
    """Where n = 0 the new input is all there is, however weak, and whatever m says."""
    gates, weight, bias = make_inputs(T=1)
    gates[:, :, 0] = -1000
    h, c, n, m = make_state()
    state = (h, torch.zeros_like(c), torch.zeros_like(n), m)
    x = gates[:, 0] + bias + torch.einsum("ghoi,bhi->bgho", weight, h)
    actual, final = slstm(gates, weight, bias, initial_state=state, output_final_state=True, backend=backend)
    assert relative_error(actual[:, 0], x[:, 3].sigmoid() * x[:, 2].tanh()) < 1e-12
    assert relative_error(meaning(final)[2], x[:, 0]) < 1e-12


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 200])
def test_lengths_and_dtypes(length, dtype):
    assert_exact(make_inputs(T=length, dtype=dtype))


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("gates", GATES)
def test_gate_regimes(gates, dtype):
    assert_exact(make_inputs(T=150, dtype=dtype, gates=gates))


@pytest.mark.parametrize("heads, head_dim", [(1, 1), (3, 1), (1, 33), (5, 24)])
def test_head_dims(heads, head_dim):
    assert_exact(make_inputs(T=70, H=heads, D=head_dim))


@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)], ids=FORWARD)
def test_losses(weights):
    """Of the outputs alone and of each part of the final state alone."""
    assert_exact(make_inputs(T=30), weights=weights)


def test_gradcheck():
    leaves = [x.detach().requires_grad_() for x in (*make_inputs(B=1, T=5, D=3), *make_state(1, D=3))]
    *leaves, m0 = leaves

    def outputs(*leaves):
        h, final = slstm(*leaves[:3], initial_state=(*leaves[3:], m0.detach()), output_final_state=True)
        return h, *meaning(final)

    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("part", range(4), ids=["h", "final h", "final c", "final n"])
def test_one_output_used(part):
    """The others have no gradient at all, not even zeros."""
    inputs, state = make_inputs(T=10), make_state()
    gradients = []
    for backend in BACKENDS:
        gates = inputs[0].detach().requires_grad_()
        h, final = slstm(gates, *inputs[1:], initial_state=state, output_final_state=True, backend=backend)
        # n = 1 in one implementation, and not in the other: the gradient of n alone only needs to exist
        used = (h, final[0], final[1] / final[2].detach(), final[2])[part]
        assert not final[3].requires_grad
        gradients.append(torch.autograd.grad(used.sum(), gates)[0])
    assert all(x.isfinite().all() for x in gradients)
    if part < 2:
        assert relative_error(gradients[1], gradients[0]) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_initial_state_is_zeros(backend):
    inputs, zeros = make_inputs(), tuple(torch.zeros(4, 2, 2, 5, dtype=F64))
    h, state = slstm(*inputs, output_final_state=True, backend=backend)
    expected_h, expected = slstm(*inputs, initial_state=zeros, output_final_state=True, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip((h, *state), (expected_h, *expected), strict=True))
    assert slstm(*inputs, backend=backend)[1] is None


def test_partly_empty_state():
    """n = 0 in some units and rows, not in others."""
    h, c, n, m = make_state()
    empty = torch.rand(n.shape) < 0.5
    state = (h, c.masked_fill(empty, 0), n.masked_fill(empty, 0), m)
    actual = assert_exact(make_inputs(), state)
    assert (actual["dc0"][empty] == 0).all()
    assert (actual["dn0"][empty] == 0).all()


@pytest.mark.parametrize("layout", ["time first", "gates last", "shared by heads", "one token"])
def test_strides(layout):
    gates, *parameters = make_inputs()
    if layout == "time first":
        gates = gates.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "gates last":
        gates = gates.movedim(2, -1).contiguous().movedim(-1, 2)
    elif layout == "shared by heads":
        gates = gates[:, :, :, :1].expand_as(gates)
    else:
        gates = gates[:, :1].expand_as(gates)
    weight = parameters[0].mT.contiguous().mT
    actual = assert_exact((gates, weight, parameters[1]), state := make_state())
    assert torch.equal(slstm(gates.contiguous(), *parameters, initial_state=state)[0], actual["h"])


@pytest.mark.parametrize("gates_dtype, parameter_dtype", [(F32, BF16), (BF16, F32), (F32, F64), (F64, F32)])
def test_parameters_of_another_dtype(gates_dtype, parameter_dtype):
    gates, weight, bias = make_inputs(T=50, dtype=gates_dtype)
    actual = assert_exact((gates, weight.to(parameter_dtype), bias.to(parameter_dtype)), tolerance=(1e-2, 3e-2))
    assert actual["dweight"].dtype == actual["dbias"].dtype == parameter_dtype
    state = make_state(dtype=state_dtype(gates_dtype))
    h, final = slstm_step(gates[:, 0], weight.to(parameter_dtype), bias.to(parameter_dtype), state)
    assert h.dtype == gates_dtype
    assert all(x.dtype == y.dtype for x, y in zip(final, state, strict=True))


def test_autocast_leaves_the_op_alone():
    inputs, state = make_inputs(dtype=F32), make_state(dtype=F32)
    expected, _ = slstm_step(inputs[0][:, 0], *inputs[1:], state)
    with torch.autocast("cpu", dtype=BF16):
        assert_exact(inputs)
        assert torch.equal(slstm_step(inputs[0][:, 0], *inputs[1:], state)[0], expected)


MASKS = {
    "left": lambda length: torch.arange(length) >= length // 2,
    "right": lambda length: torch.arange(length) < length // 2,
    "inside": lambda length: torch.arange(length) % 7 > 2,
    "all": lambda length: torch.zeros(length, dtype=torch.bool),
}


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("masking", MASKS)
def test_mask(masking, dtype):
    inputs, state = make_inputs(dtype=dtype), make_state(dtype=state_dtype(dtype))
    mask = torch.stack([MASKS[masking](100), torch.ones(100, dtype=torch.bool)])
    actual = assert_exact(inputs, state, mask=mask)
    for name in ("h", "dgates"):
        assert (actual[name][~mask] == 0).all(), name
    garbage = inputs[0].masked_fill(~mask[..., None, None, None], 1e3)
    assert torch.equal(slstm(garbage, *inputs[1:], initial_state=state, mask=mask)[0], actual["h"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masking", MASKS)
def test_masked_tokens_are_absent(masking, backend):
    """Gate values alone could not do this: a masked step must not move h either, which the next step reads."""
    mask = MASKS[masking](100)[None]
    (gates, *parameters), state = make_inputs(B=1), make_state(1)
    options = {"initial_state": state, "output_final_state": True, "backend": backend}
    h, final = slstm(gates, *parameters, mask=mask, **options)
    if masking == "all":
        assert all(torch.equal(x, y) for x, y in zip(final, state, strict=True))
        assert (h == 0).all()
        return
    expected_h, expected = slstm(gates[:, mask[0]], *parameters, **options)
    assert relative_error(h[:, mask[0]], expected_h) < 1e-12
    assert all(relative_error(x, y) < 1e-12 for x, y in zip(final, expected, strict=True))


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize(
    "bounds", [[0, 100], [0, 1, 2, 40, 100], [0, 0, 64, 64, 64, 65, 100, 100], list(range(101))], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_packed(bounds, masked, dtype):
    (gates, *parameters), state = make_inputs(B=1, dtype=dtype), make_state(len(bounds) - 1, dtype=dtype)
    mask = torch.rand(1, 100) < 0.8 if masked else None
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    actual = assert_exact((gates, *parameters), state, cu_seqlens=cu_seqlens, mask=mask)
    options = {"output_final_state": True}
    h, final = slstm(gates, *parameters, initial_state=state, cu_seqlens=cu_seqlens.long(), mask=mask, **options)
    assert torch.equal(h, actual["h"])
    tolerance = {F64: 1e-12, F32: 1e-6}[dtype]
    for row, (start, end) in enumerate(pairwise(bounds)):
        own_state, own_final = (tuple(x[row : row + 1] for x in s) for s in (state, final))
        if start == end:
            assert all(torch.equal(x, y) for x, y in zip(own_final, own_state, strict=True))
            continue
        own_mask = mask[:, start:end] if masked else None
        alone, alone_final = slstm(gates[:, start:end], *parameters, initial_state=own_state, mask=own_mask, **options)
        assert relative_error(h[:, start:end], alone) < tolerance
        assert all(relative_error(x, y) < tolerance for x, y in zip(own_final, alone_final, strict=True))


def test_packed_documents_do_not_leak():
    """Not even where the earlier document shouts and the later one whispers."""
    gates, *parameters = make_inputs(B=1, dtype=F32)
    gates[:, :50, 0], gates[:, 50:, 0] = 15, -15
    h, _ = slstm(gates, *parameters, cu_seqlens=torch.tensor([0, 50, 100]))
    assert relative_error(h[:, 50:], slstm(gates[:, 50:], *parameters)[0]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("igate", [-INF, -1e4, 1e4, None])
@pytest.mark.parametrize("fgate", [-INF, -1e4, 1e4, INF, None])
@pytest.mark.parametrize("initial", ["empty", "running"])
def test_extreme_gates_stay_finite(igate, fgate, initial, backend):
    """At some steps, and in one row at all of them."""
    inputs, state = make_inputs(T=20, dtype=F32), make_state(dtype=F32)
    if initial == "empty":
        state = tuple(torch.zeros_like(x) for x in state)
    for gate, value in ((0, igate), (1, fgate)):
        if value is not None:
            inputs[0][:, :, gate][torch.rand(2, 20, 2, 5) < 0.5] = value
            inputs[0][1, :, gate] = value
    leaves = [x.detach().requires_grad_() for x in (*inputs, *state[:3])]
    h, final = slstm(*leaves[:3], initial_state=(*leaves[3:], state[3]), output_final_state=True, backend=backend)
    gradients = torch.autograd.grad((h, *final[:3]), leaves, [torch.randn_like(x) for x in (h, *final[:3])])
    assert all(x.isfinite().all() for x in (h, *final, *gradients))


def test_huge_gates_are_exact():
    """All gates are shut or open: most gradients are nothing but rounding errors, and only have to be finite."""
    gates, *parameters = make_inputs(T=50)
    assert_exact((gates * 1e4, *parameters), tolerance=(1e-10, INF))


def test_infinite_gates_are_exact():
    """-inf: nothing is stored, everything is forgotten; +inf: everything is kept."""
    inputs = make_inputs()
    inputs[0][:, 3::10, 0], inputs[0][:, 5::20, 1], inputs[0][:, 7::10, 1] = -INF, -INF, INF
    assert_exact(inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_step(dtype, inplace, backend):
    """Steps against the sequence; in place they write into the tensors they were given, else they leave them alone."""
    inputs, state = make_inputs(B=3, T=20, dtype=dtype), make_state(3, dtype=state_dtype(dtype))
    state[2][0], state[1][0] = 0, 0
    expected_h, expected = slstm(
        *double(inputs), initial_state=double(state), output_final_state=True, backend="reference"
    )
    state, outputs = tuple(x.clone() for x in state), []
    for gates in inputs[0].unbind(1):
        before = tuple(x.clone() for x in state)
        h, new_state = slstm_step(gates, *inputs[1:], state, inplace=inplace, backend=backend)
        assert inplace == all(x is y for x, y in zip(new_state, state, strict=True))
        assert inplace or all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
        state = new_state
        outputs.append(h)
    assert h.dtype == dtype
    tolerance, _ = TOLERANCE[dtype]
    assert relative_error(torch.stack(outputs, dim=1), expected_h) < tolerance
    # the step stores its state without rounding it to the dtype of the gates
    for x, y in zip(meaning(state), meaning(expected), strict=True):
        assert relative_error(x, y) < min(tolerance, 1e-5)


def test_step_in_place_leaves_earlier_outputs_alone():
    inputs, state = make_inputs(T=2, dtype=F32), make_state(dtype=F32)
    h, _ = slstm_step(inputs[0][:, 0], *inputs[1:], state, inplace=True)
    before = h.clone()
    slstm_step(inputs[0][:, 1], *inputs[1:], state, inplace=True)
    assert torch.equal(h, before)


@pytest.mark.parametrize("pieces", [[1] * 10, [30, 50, 20]], ids=["steps", "segments"])
def test_gradients_through_pieces(pieces):
    """Backpropagation through a sequence run in pieces, by the state between them, equals that in one go."""
    length = sum(pieces)
    leaves = [x.detach().requires_grad_() for x in (*make_inputs(T=length), *make_state())]
    *leaves, m0 = leaves
    gates, *parameters, h0, c0, n0 = leaves
    h, final = slstm(gates, *parameters, initial_state=(h0, c0, n0, m0.detach()), output_final_state=True)
    weights = [torch.randn_like(x) for x in (h, *meaning(final))]
    expected = torch.autograd.grad((h, *meaning(final)), leaves, weights)

    outputs, state = [], (h0, c0, n0, m0.detach())
    for piece in gates.split(pieces, dim=1):
        if len(pieces) == length:
            h, state = slstm_step(piece[:, 0], *parameters, state)
            h = h[:, None]
        else:
            h, state = slstm(piece, *parameters, initial_state=state, output_final_state=True)
        outputs.append(h)
    actual = torch.autograd.grad((torch.cat(outputs, dim=1), *meaning(state)), leaves, weights)
    assert all(relative_error(x, y) < 1e-12 for x, y in zip(actual, expected, strict=True))


OPTIONS = {
    "plain": {},
    "mask": {"mask": torch.arange(18).view(2, 9) % 4 > 0},
    "packed": {"cu_seqlens": torch.tensor([0, 4, 4, 9])},
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck(options, dtype):
    from torch.library import opcheck

    options = OPTIONS[options]
    B, rows = (1, 3) if "cu_seqlens" in options else (2, 2)
    inputs = [x.contiguous() for x in (*make_inputs(B=B, T=9, dtype=dtype), *make_state(rows, dtype=F32))]
    packing = options.get("mask"), options.get("cu_seqlens")
    forward, backward = torch.ops.hf_xlstm.slstm_torch.default, torch.ops.hf_xlstm.slstm_torch_backward.default
    opcheck(forward, (*inputs, *packing))
    _, weight, _, h0, _, n0, _ = inputs
    h, *_, x, c = forward(*inputs, *packing)
    opcheck(backward, (torch.randn_like(h), h0, h0, h0, weight, h0, n0, *packing, h, x, c))


@pytest.mark.parametrize("options", OPTIONS)
def test_compiles_once_for_all_lengths(options):
    """One graph for the first length and one for all others, forward and backward, without a break."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(gates, weight, bias, options):
        h, state = slstm(gates, weight, bias, output_final_state=True, backend="torch", **options)
        return h * 2, meaning(state)[1]

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for length in (9, 12, 17, 40, 63):
        inputs = make_inputs(B=1 if options == "packed" else 2, T=length)
        if options == "mask":
            arguments = {"mask": torch.arange(2 * length).view(2, length) % 4 > 0}
        else:
            arguments = {"cu_seqlens": torch.tensor([0, 4, 7, length])} if options == "packed" else {}
        gradients = []
        for function in (run, compiled):
            leaves = [x.detach().requires_grad_() for x in inputs]
            outputs = function(*leaves, arguments)
            gradients.append((*outputs, *torch.autograd.grad(sum(x.sum() for x in outputs), leaves)))
        assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))
    assert counter.frame_count <= 2


def test_step_compiles():
    torch._dynamo.reset()
    inputs, state = make_inputs(T=1, dtype=F32), make_state(dtype=F32)
    gates, parameters = inputs[0][:, 0], inputs[1:]
    expected_h, expected = slstm_step(gates, *parameters, state)
    compiled = torch.compile(slstm_step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        h, new_state = compiled(gates, *parameters, state, inplace=True)
    assert all(x is y for x, y in zip(new_state, state, strict=True))
    assert all(relative_error(x, y) < 1e-6 for x, y in zip((h, *state), (expected_h, *expected), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("bias", [4.0, 9.0])
def test_long_stream(bias):
    """Over 20,000 tokens, remembered for some 50 or for 8,000, neither sequence form nor step drifts away."""
    inputs = make_inputs(B=1, T=20_000, dtype=F32)
    inputs[2][1] = bias
    with torch.no_grad():
        expected, expected_state = slstm(*double(inputs), output_final_state=True, backend="reference")
        h, final = slstm(*inputs, output_final_state=True)
        state, outputs = tuple(torch.zeros_like(x) for x in final), []
        for gates in inputs[0].unbind(1):
            outputs.append(slstm_step(gates, *inputs[1:], state, inplace=True)[0])
    for stream in (h, torch.stack(outputs, dim=1)):
        assert relative_error(stream[:, -1000:], expected[:, -1000:]) < 1e-5
    for result in (final, state):
        for x, y in zip(meaning(result), meaning(expected_state), strict=True):
            assert relative_error(x, y) < 1e-5
