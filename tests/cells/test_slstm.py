"""The sLSTM op: the float64 recurrence against the formula of the paper, and every backend, sequence and step, against
the recurrence; outputs, final states, and the gradient of every input."""

from itertools import pairwise

import pytest
import torch
from common import relative_error
from oracle import BF16, DEVICE, F16, F32, F64, INF, MASKS, SAME, double, on
from slstm_oracle import (
    FORWARD,
    GATES,
    TOLERANCE,
    assert_exact,
    assert_same_states,
    make_inputs,
    make_state,
    meaning,
    state_for,
)
from torch._dynamo.testing import CompileCounterWithBackend

from hf_xlstm.ops import slstm, slstm_step


ALL = (F64, F32, F16, BF16)


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


@on("reference", "torch", "triton", "streamed", "spread")
def test_formula_of_the_paper(backend, dtype):
    leaves = [x.detach().requires_grad_() for x in (*make_inputs(dtype=dtype), *make_state(dtype=dtype))]
    expected = paper(*double(leaves[:3]), double(leaves[3:]))
    h, final = slstm(*leaves[:3], initial_state=tuple(leaves[3:]), output_final_state=True, backend=backend)
    actual = (h, final[0], final[1] * final[3].exp(), final[2] * final[3].exp())
    weights = [torch.randn_like(x) for x in expected]
    for x, y in zip(actual, expected, strict=True):
        assert relative_error(x, y) < {F64: 1e-12, F32: 1e-5}[dtype]
    gradients = [torch.autograd.grad(f, leaves[:6], [w.to(x) for w, x in zip(weights, f)]) for f in (actual, expected)]
    for x, y in zip(*gradients, strict=True):
        assert relative_error(x, y) < {F64: 1e-12, F32: 1e-4}[dtype]


@on("reference", "torch", "triton", "streamed", "spread")
def test_first_step_from_nothing(backend, dtype):
    """Where n = 0 the new input is all there is, however weak, and whatever m says."""
    gates, weight, bias = make_inputs(T=1, dtype=dtype)
    gates[:, :, 0] = -1000
    h, c, n, m = make_state(dtype=dtype)
    state = (h, torch.zeros_like(c), torch.zeros_like(n), m)
    x = gates[:, 0] + bias + torch.einsum("ghoi,bhi->bgho", weight, h)
    actual, final = slstm(gates, weight, bias, initial_state=state, output_final_state=True, backend=backend)
    assert relative_error(actual[:, 0], x[:, 3].sigmoid() * x[:, 2].tanh()) < SAME[dtype]
    assert relative_error(meaning(final)[2], x[:, 0]) < SAME[dtype]


@on("torch", dtypes=ALL)
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 200])
def test_lengths_and_dtypes(length, backend, dtype):
    """The backward pass of PyTorch goes 64 steps at a time."""
    assert_exact(make_inputs(T=length, D=5, dtype=dtype), backend)


@on("triton", "streamed", "spread", dtypes=ALL)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_short_lengths_and_dtypes(length, backend, dtype):
    assert_exact(make_inputs(B=1, T=length, H=1, dtype=dtype), backend)


@on("torch", "triton", "streamed", "spread", dtypes=(F64, F32, BF16))
@pytest.mark.parametrize("gates", GATES)
def test_gate_regimes(gates, backend, dtype):
    length = 8 if backend == "triton" else 150
    assert_exact(make_inputs(B=1, T=length, H=1, dtype=dtype, gates=gates), backend)


@on("torch", "triton")
@pytest.mark.parametrize("heads, head_dim", [(1, 1), (3, 1), (3, 16), (1, 33), (5, 24), (1, 160)])
def test_head_dims(heads, head_dim, backend, dtype):
    """As planned: Triton streams the 33 and the 160."""
    assert_exact(make_inputs(T=3, H=heads, D=head_dim, dtype=dtype), backend)


@on("torch", "triton", "streamed", "spread")
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_batch(rows, backend, dtype):
    """Triton's programs have 16 rows."""
    assert_exact(make_inputs(B=rows, T=3, H=1, dtype=dtype), backend)


@on("torch", "triton", "streamed", "spread")
@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)], ids=FORWARD)
@pytest.mark.parametrize("state", ["any", None])
def test_losses(state, weights, backend, dtype):
    """Of the outputs alone and of each part of the final state alone."""
    assert_exact(make_inputs(H=1, dtype=dtype), backend, state, weights=weights)


def test_gradcheck():
    leaves = [x.detach().requires_grad_() for x in (*make_inputs(B=1, T=5, D=3), *make_state(1, D=3))]
    *leaves, m0 = leaves

    def outputs(*leaves):
        initial = (*leaves[3:], m0.detach())
        h, final = slstm(*leaves[:3], initial_state=initial, output_final_state=True, backend="torch")
        return h, *meaning(final)

    assert torch.autograd.gradcheck(outputs, leaves)


@on("reference", "torch", "triton")
@pytest.mark.parametrize("part", range(4), ids=["h", "final h", "final c", "final n"])
def test_one_output_used(part, backend, dtype):
    """The others have no gradient at all, not even zeros."""
    inputs = make_inputs(dtype=dtype)
    state = state_for(inputs)
    gradients = []
    for name in ("reference", backend):
        gates = inputs[0].detach().requires_grad_()
        h, final = slstm(gates, *inputs[1:], initial_state=state, output_final_state=True, backend=name)
        assert not final[3].requires_grad
        # n = 1 in one implementation, and not in the other: the gradient of n alone only needs to exist
        used = (h, final[0], final[1] / final[2].detach(), final[2])[part]
        gradients.append(torch.autograd.grad(used.sum(), gates)[0])
    assert all(x.isfinite().all() for x in gradients)
    if part < 2:
        assert relative_error(gradients[1], gradients[0]) < {F64: 1e-12, F32: 1e-5}[dtype]


@on("torch", "triton", "streamed", "spread")
def test_small_cell_inputs_keep_their_digits(backend, dtype):
    """tanh near 0: everything is small, h in proportion."""
    gates, weight, bias = make_inputs(dtype=dtype)
    gates[:, :, 2] *= 1e-3
    weight[2], bias[2] = 0, 0
    h, c, n, m = make_state(dtype=dtype)
    assert_exact((gates, weight, bias), backend, (h, c * 1e-3, n, m))


@on("reference", "torch", "triton", "streamed", "spread")
def test_no_initial_state_is_zeros(backend, dtype):
    inputs = make_inputs(dtype=dtype)
    zeros = tuple(torch.zeros_like(x) for x in state_for(inputs))
    h, state = slstm(*inputs, output_final_state=True, backend=backend)
    expected_h, expected = slstm(*inputs, initial_state=zeros, output_final_state=True, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip((h, *state), (expected_h, *expected), strict=True))
    assert slstm(*inputs, backend=backend)[1] is None


@on("torch", "triton", "streamed", "spread")
def test_partly_empty_state(backend, dtype):
    """n = 0 in some units and rows, not in others."""
    inputs = make_inputs(dtype=dtype)
    h, c, n, m = state_for(inputs)
    empty = torch.rand_like(n) < 0.5
    actual = assert_exact(inputs, backend, (h, c.masked_fill(empty, 0), n.masked_fill(empty, 0), m))
    assert (actual["dc0"][empty] == 0).all()
    assert (actual["dn0"][empty] == 0).all()


@on("torch", "triton", "streamed", "spread")
@pytest.mark.parametrize("layout", ["time first", "gates last", "heads first", "shared by heads", "one token"])
def test_strides(layout, backend, dtype):
    """Of the gates, the recurrent weight and the state; the numbers are those of contiguous inputs."""
    gates, *parameters = make_inputs(dtype=dtype)
    state = state_for((gates,))
    if layout == "time first":
        gates = gates.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "gates last":
        gates = gates.movedim(2, -1).contiguous().movedim(-1, 2)
    elif layout == "heads first":
        gates = gates.transpose(1, 3).contiguous().transpose(1, 3)
    elif layout == "shared by heads":
        gates = gates[:, :, :, :1].expand_as(gates)
    else:
        gates = gates[:, :1].expand_as(gates)
    strided = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in state)
    weight = parameters[0].mT.contiguous().mT
    actual = assert_exact((gates, weight, parameters[1]), backend, strided)
    expected, _ = slstm(gates.contiguous(), *parameters, initial_state=state, backend=backend)
    assert torch.equal(expected, actual["h"])


@on("torch", "triton", "streamed", "spread")
@pytest.mark.parametrize("gates_dtype, parameter_dtype", [(F32, BF16), (BF16, F32), (F32, F64), (F64, F32)], ids=str)
def test_parameters_of_another_dtype(gates_dtype, parameter_dtype, backend, dtype):
    gates_dtype = F16 if (backend, gates_dtype) == ("triton", F64) else gates_dtype
    gates, weight, bias = make_inputs(T=4, dtype=gates_dtype)
    parameters = weight.to(parameter_dtype), bias.to(parameter_dtype)
    actual = assert_exact((gates, *parameters), backend, tolerance=(1e-2, 3e-2))
    assert actual["dweight"].dtype == actual["dbias"].dtype == parameter_dtype
    state = state_for((gates,))
    h, final = slstm_step(gates[:, 0], *parameters, state, backend=backend)
    assert h.dtype == gates_dtype
    assert all(x.dtype == y.dtype for x, y in zip(final, state, strict=True))


@on("torch", "triton", dtypes=(F32,))
def test_autocast_leaves_the_op_alone(backend, dtype):
    inputs = make_inputs(dtype=dtype)
    state = state_for(inputs)
    expected, _ = slstm_step(inputs[0][:, 0], *inputs[1:], state, backend=backend)
    with torch.autocast(DEVICE, dtype=BF16):
        assert_exact(inputs, backend)
        assert torch.equal(slstm_step(inputs[0][:, 0], *inputs[1:], state, backend=backend)[0], expected)


@on("torch", "triton", "streamed", "spread", dtypes=(F64, F32, BF16))
@pytest.mark.parametrize("masking", MASKS)
def test_mask(masking, backend, dtype):
    inputs = make_inputs(T=8, H=1, dtype=dtype)
    state = state_for(inputs)
    mask = torch.stack([MASKS[masking](8), torch.ones(8, dtype=torch.bool)]).to(DEVICE)
    actual = assert_exact(inputs, backend, state, mask=mask)
    for name in ("h", "dgates"):
        assert (actual[name][~mask] == 0).all(), name
    # what stands at a masked position is never read
    garbage = inputs[0].masked_fill(~mask[..., None, None, None], INF)
    options = {"initial_state": state, "mask": mask, "backend": backend, "output_final_state": True}
    h, final = slstm(garbage, *inputs[1:], **options)
    assert torch.equal(h, actual["h"])
    if masking == "all":
        assert all(torch.equal(x[0], y[0]) for x, y in zip(final, state, strict=True))


@on("reference", "torch", "triton", "streamed", "spread")
@pytest.mark.parametrize("masking", MASKS)
def test_masked_tokens_are_absent(masking, backend, dtype):
    """Gate values alone could not do this: a masked step must not move h either, which the next step reads."""
    mask = MASKS[masking](10)[None].to(DEVICE)
    gates, *parameters = make_inputs(B=1, T=10, H=1, dtype=dtype)
    state = state_for((gates,))
    options = {"initial_state": state, "output_final_state": True, "backend": backend}
    h, final = slstm(gates, *parameters, mask=mask, **options)
    if masking == "all":
        assert all(torch.equal(x, y) for x, y in zip(final, state, strict=True))
        assert (h == 0).all()
        return
    expected_h, expected = slstm(gates[:, mask[0]], *parameters, **options)
    assert relative_error(h[:, mask[0]], expected_h) < SAME[dtype]
    assert_same_states(final, expected, SAME[dtype])


@on("torch", "triton", "streamed", "spread", dtypes=(F64, F32))
@pytest.mark.parametrize("bounds", [[0, 7], [0, 1, 2, 5, 8], [0, 0, 5, 5, 6, 9, 9], list(range(8))], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_packed(bounds, masked, backend, dtype):
    """Against the reference, and against every sequence alone, from its own state."""
    length = bounds[-1]
    gates, *parameters = make_inputs(B=1, T=length, H=1, dtype=dtype)
    table = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    state = state_for((gates,), table)
    mask = torch.rand(1, length, device=DEVICE) < 0.8 if masked else None
    options = {"mask": mask, "backend": backend}
    actual = assert_exact((gates, *parameters), state=state, cu_seqlens=table, **options)
    if masked:
        assert (actual["dgates"][~mask] == 0).all()
    options |= {"output_final_state": True}
    strided = torch.stack([table, -table], 1).long()[:, 0]
    h, final = slstm(gates, *parameters, initial_state=state, cu_seqlens=strided, **options)
    assert torch.equal(h, actual["h"])  # whatever the dtype and the strides of the bounds
    for row, (start, end) in enumerate(pairwise(bounds)):
        own_state, own_final = (tuple(x[row : row + 1] for x in s) for s in (state, final))
        if start == end:
            assert all(torch.equal(x, y) for x, y in zip(own_final, own_state, strict=True))
            continue
        options["mask"] = mask[:, start:end] if masked else None
        alone, alone_final = slstm(gates[:, start:end], *parameters, initial_state=own_state, **options)
        assert relative_error(h[:, start:end], alone) < SAME[dtype]
        assert_same_states(own_final, alone_final, SAME[dtype])


@on("torch", "triton", "streamed", "spread", dtypes=(F32,))
def test_packed_documents_do_not_leak(backend, dtype):
    """Not even where the earlier document shouts and the later one whispers."""
    gates, *parameters = make_inputs(B=1, T=6, H=1, dtype=dtype)
    gates[:, :3, 0], gates[:, 3:, 0] = 15, -15
    h, _ = slstm(gates, *parameters, cu_seqlens=torch.tensor([0, 3, 6], device=DEVICE), backend=backend)
    assert relative_error(h[:, 3:], slstm(gates[:, 3:], *parameters, backend=backend)[0]) < 1e-6


@on("reference", "torch", "triton", dtypes=(F32,))
@pytest.mark.parametrize("igate", [-INF, -1e4, 1e4, None])
@pytest.mark.parametrize("fgate", [-INF, -1e4, 1e4, INF, None])
def test_extreme_gates_stay_finite(igate, fgate, backend, dtype):
    """At some steps, in one row at all of them; from an empty state in the first head, a running one in the other."""
    inputs, state = make_inputs(T=6, D=5, dtype=dtype), make_state(D=5, dtype=dtype)
    for x in state:
        x[:, 0] = 0
    for gate, value in ((0, igate), (1, fgate)):
        if value is not None:
            inputs[0][:, :, gate][torch.rand(2, 6, 2, 5, device=DEVICE) < 0.5] = value
            inputs[0][1, :, gate] = value
    leaves = [x.detach().requires_grad_() for x in (*inputs, *state[:3])]
    h, final = slstm(*leaves[:3], initial_state=(*leaves[3:], state[3]), output_final_state=True, backend=backend)
    gradients = torch.autograd.grad((h, *final[:3]), leaves, [torch.randn_like(x) for x in (h, *final[:3])])
    assert all(x.isfinite().all() for x in (h, *final, *gradients))
    expected, _ = slstm(*double(inputs), initial_state=double(state), backend="reference")
    # a head that has never been written to, and still is not, has no definite content
    defined = slice(1 if igate == -INF else 0, None)
    assert relative_error(h[:, :, defined], expected[:, :, defined]) < 1e-3  # m has no more digits next to 1e4


@on("torch")
def test_huge_gates_are_exact(backend, dtype):
    """All gates are shut or open: most gradients are nothing but rounding errors, and only have to be finite."""
    gates, *parameters = make_inputs(T=50, dtype=dtype)
    assert_exact((gates * 1e4, *parameters), backend, tolerance=(1e-10, INF))


@on("torch", "triton", "streamed", "spread")
def test_infinite_gates_are_exact(backend, dtype):
    """-inf: nothing is stored, everything is forgotten; +inf: everything is kept."""
    inputs = make_inputs(T=8, H=1, dtype=dtype)
    inputs[0][:, 3::4, 0], inputs[0][:, 5::6, 1], inputs[0][:, 7::4, 1] = -INF, -INF, INF
    assert_exact(inputs, backend)


@on("reference", "torch", "triton", "streamed", "spread", dtypes=ALL)
@pytest.mark.parametrize("inplace", [False, True])
def test_step(inplace, backend, dtype):
    """Steps against the sequence; in place they write into the tensors they were given, else they leave them alone."""
    inputs = make_inputs(B=3, T=3, dtype=dtype)
    state = state_for(inputs)
    state[2][0], state[1][0] = 0, 0
    expected_h, expected = slstm(
        *double(inputs), initial_state=double(state), output_final_state=True, backend="reference"
    )
    outputs = []
    for gates in inputs[0].unbind(1):
        before = tuple(x.clone() for x in state)
        h, new_state = slstm_step(gates, *inputs[1:], state, inplace=inplace, backend=backend)
        assert inplace == all(x is y for x, y in zip(new_state, state, strict=True))
        assert inplace or all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
        state = new_state
        outputs.append(h)
    assert h.dtype == dtype
    tolerance, _ = TOLERANCE["torch" if backend == "reference" else backend, dtype]
    assert relative_error(torch.stack(outputs, dim=1), expected_h) < tolerance
    # The step stores its state without rounding it to the dtype of the gates; a GPU multiplies h in that dtype.
    assert_same_states(
        state, expected, tolerance if backend == "triton" and DEVICE == "cuda" else min(tolerance, 1e-5)
    )
    assert dtype in (F32, F64) or all((x != x.to(dtype).to(x.dtype)).any() for x in state)


@on("torch", "triton", dtypes=(F32,))
def test_step_in_place_leaves_earlier_outputs_alone(backend, dtype):
    inputs = make_inputs(T=2, dtype=dtype)
    state = state_for(inputs)
    h, _ = slstm_step(inputs[0][:, 0], *inputs[1:], state, inplace=True, backend=backend)
    before = h.clone()
    slstm_step(inputs[0][:, 1], *inputs[1:], state, inplace=True, backend=backend)
    assert torch.equal(h, before)


@on("torch", "triton", "streamed", "spread")
@pytest.mark.parametrize("pieces", [[1] * 3, [2, 3, 1]], ids=["steps", "pieces"])
def test_gradients_through_pieces(pieces, backend, dtype):
    """Backpropagation through a sequence run in pieces, by the state between them, equals that in one go."""
    inputs = make_inputs(T=sum(pieces), H=1, dtype=dtype)
    leaves = [x.detach().requires_grad_() for x in (*inputs, *state_for(inputs))]
    *leaves, m0 = leaves
    gates, *parameters, h0, c0, n0 = leaves
    options = {"output_final_state": True, "backend": backend}
    h, final = slstm(gates, *parameters, initial_state=(h0, c0, n0, m0.detach()), **options)
    weights = [torch.randn_like(x) for x in (h, *meaning(final))]
    expected = torch.autograd.grad((h, *meaning(final)), leaves, weights)

    outputs, state = [], (h0, c0, n0, m0.detach())
    for piece in gates.split(pieces, dim=1):
        if len(set(pieces)) == 1:
            piece_h, state = slstm_step(piece[:, 0], *parameters, state, backend=backend)
            piece_h = piece_h[:, None]
        else:
            piece_h, state = slstm(piece, *parameters, initial_state=state, **options)
        outputs.append(piece_h)
    assert relative_error(torch.cat(outputs, dim=1), h) < SAME[dtype]
    actual = torch.autograd.grad((torch.cat(outputs, dim=1), *meaning(state)), leaves, weights)
    assert all(relative_error(x, y) < {F64: 1e-12, F32: 1e-5}[dtype] for x, y in zip(actual, expected, strict=True))


OPTIONS = {
    "plain": {},
    "mask": {"mask": torch.arange(18).view(2, 9) % 4 > 0},
    "packed": {"cu_seqlens": torch.tensor([0, 4, 4, 9])},
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck(options, dtype):
    options = {name: x.to(DEVICE) for name, x in OPTIONS[options].items()}
    B, rows = (1, 3) if "cu_seqlens" in options else (2, 2)
    inputs = [x.contiguous() for x in (*make_inputs(B=B, T=9, D=5, dtype=dtype), *make_state(rows, D=5, dtype=F32))]
    packing = options.get("mask"), options.get("cu_seqlens")
    forward, backward = torch.ops.hf_xlstm.slstm_torch.default, torch.ops.hf_xlstm.slstm_torch_backward.default
    # without gradients, which these operators have none of: an autograd.Function around them has
    torch.library.opcheck(forward, (*inputs, *packing))
    _, weight, _, h0, _, n0, _ = inputs
    h, _, _, n, _, x, c = forward(*inputs, *packing)
    torch.library.opcheck(backward, (torch.randn_like(h), h0, h0, h0, weight, h0, n0, n, *packing, h, x, c))


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
        inputs = make_inputs(B=1 if options == "packed" else 2, T=length, D=5)
        if options == "mask":
            arguments = {"mask": (torch.arange(2 * length).view(2, length) % 4 > 0).to(DEVICE)}
        else:
            bounds = torch.tensor([0, 4, 7, length], device=DEVICE)
            arguments = {"cu_seqlens": bounds} if options == "packed" else {}
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
    expected_h, expected = slstm_step(gates, *parameters, state, backend="torch")
    compiled = torch.compile(slstm_step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        h, new_state = compiled(gates, *parameters, state, inplace=True, backend="torch")
    assert all(x is y for x, y in zip(new_state, state, strict=True))
    assert all(relative_error(x, y) < 1e-6 for x, y in zip((h, *state), (expected_h, *expected), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("bias", [4.0, 9.0])
def test_long_stream(bias):
    """Over 20,000 tokens, remembered for some 50 or for 8,000, neither sequence form nor step drifts away."""
    inputs = make_inputs(B=1, T=20_000, D=5, dtype=F32)
    inputs[2][1] = bias
    with torch.no_grad():
        expected, expected_state = slstm(*double(inputs), output_final_state=True, backend="reference")
        h, final = slstm(*inputs, output_final_state=True, backend="torch")
        state, outputs = tuple(torch.zeros_like(x) for x in final), []
        for gates in inputs[0].unbind(1):
            outputs.append(slstm_step(gates, *inputs[1:], state, inplace=True, backend="torch")[0])
    for stream in (h, torch.stack(outputs, dim=1)):
        assert relative_error(stream[:, -1000:], expected[:, -1000:]) < 1e-5
    for result in (final, state):
        assert_same_states(result, expected_state, 1e-5)
