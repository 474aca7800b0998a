"""The mLSTM op: the float64 recurrence against the formula of the paper, and every backend, sequence and step, against
the recurrence; outputs, final states, and the gradient of every input."""

from itertools import pairwise

import pytest
import torch
from common import relative_error
from mlstm_oracle import (
    GATES,
    GRADIENTS,
    TOLERANCE,
    assert_exact,
    assert_same_states,
    evaluate,
    make_inputs,
    make_state,
    state_for,
)
from oracle import BF16, DEVICE, F16, F32, F64, INF, MASKS, SAME, double, on
from torch.utils.checkpoint import checkpoint

from hf_xlstm.cells import numerics
from hf_xlstm.ops import mlstm, mlstm_step


ALL = (F64, F32, F16, BF16)


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


@on("reference", "torch", "triton")
def test_formula_of_the_paper(backend, dtype):
    inputs, state = make_inputs(T=20, dtype=dtype), make_state(dtype=dtype)
    leaves = [x.detach().requires_grad_() for x in (*inputs, *state)]
    expected = paper(*(x.double() for x in leaves[:5]), double(leaves[5:]))
    h, (c, n, m) = mlstm(
        *leaves[:5], initial_state=tuple(leaves[5:]), output_final_state=True, eps=0.0, chunk_size=7, backend=backend
    )
    actual = (h, c * m.exp()[..., None, None], n * m.exp()[..., None])
    weights = [torch.randn_like(x) for x in expected]
    for x, y in zip(actual, expected, strict=True):
        assert relative_error(x, y) < {F64: 1e-12, F32: 1e-5}[dtype]
    gradients = [torch.autograd.grad(f, leaves[:7], [w.to(x) for w, x in zip(weights, f)]) for f in (actual, expected)]
    for x, y in zip(*gradients, strict=True):
        assert relative_error(x, y) < {F64: 1e-11, F32: 1e-4}[dtype]


def test_gradcheck():
    leaves = [x.detach().requires_grad_() for x in (*make_inputs(B=1, T=5, K=3, V=2), *make_state(1, K=3, V=2))]

    def true_outputs(*leaves):
        h, (c, n, m) = mlstm(
            *leaves[:5], initial_state=leaves[5:], output_final_state=True, eps=0.0, chunk_size=2, backend="torch"
        )
        return h, c * m.exp()[..., None, None], n * m.exp()[..., None]

    *leaves, m0 = leaves
    assert torch.autograd.gradcheck(lambda *x: true_outputs(*x, m0.detach()), leaves)


@on("torch", "triton", dtypes=ALL)
@pytest.mark.parametrize(
    "length", [1, 7, 17, 64, 65, 130, *(pytest.param(x, marks=pytest.mark.slow) for x in (200, 1000))]
)
def test_lengths_and_dtypes(length, backend, dtype):
    """One token; the recurrence and the chunks of Triton; a whole chunk, one token more, and two."""
    assert_exact(make_inputs(B=2 if length < 17 else 1, T=length, dtype=dtype), backend)


@on("torch", "triton", dtypes=ALL)
@pytest.mark.parametrize(
    "heads, key_dim, value_dim",
    [
        (1, 1, 1),
        (3, 16, 1),
        (1, 1, 24),
        (1, 33, 65),
        (1, 96, 130),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, 512, 512), (2, 128, 256), (4, 256, 100))),
    ],
)
def test_head_dims(heads, key_dim, value_dim, backend, dtype):
    """Up to three tiles, whole ones and parts of them."""
    assert_exact(make_inputs(B=1, T=70, H=heads, K=key_dim, V=value_dim, dtype=dtype), backend)


def check_gates(gates, length, backend, dtype, alone=False):
    """Where one token outweighs all others, h is its v whatever q and k are: most gradients are what is left of larger
    terms, and no arithmetic of finite precision has all their digits."""
    torch.manual_seed(1)  # draws no query for which n q cancels almost completely
    inputs = make_inputs(B=1, T=length, H=1, K=16, V=16, dtype=dtype, gates=gates)
    weights = (1, 0, 0) if alone else (1, 1, 1)
    ill_conditioned = gates in ("capped", "wild")
    assert_exact(inputs, backend, None if alone else "any", weights=weights, ill_conditioned=ill_conditioned)


@on("torch", "triton", "on chip", dtypes=(F64, F32, BF16))
@pytest.mark.parametrize("gates", GATES)
def test_gate_regimes(gates, backend, dtype):
    check_gates(gates, 70, backend, dtype)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("instructions", [False, True])
def test_processors_with_and_without_bfloat16(instructions, gates, monkeypatch):
    monkeypatch.setattr(numerics, "NO_BFLOAT16", not instructions)
    check_gates(gates, 70, "torch", BF16)


@on("torch", "triton", "on chip", dtypes=(F64, F32))
@pytest.mark.parametrize("gates", GATES)
def test_gate_regimes_alone(gates, backend, dtype):
    """Without a state before or a loss on the one after, closed forget gates have tiny gradients that must not drown
    in larger terms."""
    check_gates(gates, 70, backend, dtype, alone=True)


@on("torch", "triton", dtypes=(F64, F32, BF16))
@pytest.mark.parametrize("gates", GATES)
def test_gate_regimes_of_few_tokens(gates, backend, dtype):
    """So few that Triton has a kernel of its own for them."""
    check_gates(gates, 12, backend, dtype)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_chunk_size_changes_nothing(chunk_size, masked):
    assert_exact(make_inputs(T=200), "torch", chunk_size=chunk_size, mask=torch.rand(2, 200) < 0.8 if masked else None)


@on("torch", "triton")
@pytest.mark.parametrize("state", ["any", None])
@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 1), (0, 0, 1)], ids=["h", "state", "n"])
def test_losses(weights, state, backend, dtype):
    """Of the outputs alone and of the final state alone. None of them is blind to the scale of h, as a loss behind a
    norm would be: the normalizer's gradient counts."""
    inputs = make_inputs(B=1, dtype=dtype)
    inputs[4].add_(6)  # or nothing of the first tokens would be left in the final state
    actual = assert_exact(inputs, backend, state, weights=weights)
    if not weights[0]:
        assert (actual["dq"] == 0).all()


@on("torch", "triton")
@pytest.mark.parametrize("length", [9, 70])
def test_options(length, backend, dtype):
    assert_exact(make_inputs(B=1, T=length, dtype=dtype), backend, scale=0.7, eps=0.1)


@on("reference", "torch", "triton")
@pytest.mark.parametrize("length", [9, 70])
def test_no_initial_state_is_zeros(length, backend, dtype):
    inputs = make_inputs(B=1, T=length, dtype=dtype)
    zeros = tuple(torch.zeros_like(x) for x in state_for(inputs))
    expected_h, expected = mlstm(*inputs, initial_state=zeros, output_final_state=True, backend=backend)
    h, final = mlstm(*inputs, output_final_state=True, backend=backend)
    tolerance = {F64: 1e-14, F32: 1e-6}[dtype]
    assert relative_error(h, expected_h) < tolerance
    assert all(relative_error(x, y) < tolerance for x, y in zip(final, expected, strict=True))
    assert mlstm(*inputs, backend=backend)[1] is None


@on("reference", "torch", "triton")
@pytest.mark.parametrize("length", [9, 70])
def test_without_epsilon(length, backend, dtype):
    """What is masked out, and a normalizer that underflows, are still no 0 / 0."""
    inputs = make_inputs(B=1, T=length, dtype=dtype)
    inputs[3].add_(150)
    inputs[0][:, 2] = 0
    mask = torch.arange(length, device=DEVICE)[None] != 1
    leaves = [x.detach().requires_grad_() for x in inputs]
    h, _ = mlstm(*leaves, mask=mask, eps=0.0, backend=backend)
    assert h.isfinite().all()
    assert (h[:, 1:3] == 0).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(h.sum(), leaves))


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed dims": lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
    "shared by rows": lambda x: x[:1].expand_as(x),
    "shared by heads": lambda x: x[:, :, :1].expand_as(x),
    "one token": lambda x: x[:, :1].expand_as(x),
}


@on("torch", "triton")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend, dtype):
    """The numbers are those of contiguous inputs; the gradient of a sum, too, has no strides of its own."""
    inputs = [LAYOUTS[layout](x) for x in make_inputs(T=70 if layout == "reversed dims" else 9, dtype=dtype)]
    actual = assert_exact(inputs, backend, state := state_for(inputs))
    results = []
    for tensors in (inputs, [x.contiguous() for x in inputs]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        h, _ = mlstm(*leaves, initial_state=state, backend=backend)
        results.append((h, *torch.autograd.grad(h.sum(), leaves)))
    assert relative_error(actual["h"], results[1][0]) < {F64: 1e-14, F32: 1e-6}[dtype]
    assert all(relative_error(x, y) < SAME[dtype] for x, y in zip(*results, strict=True))


@on("torch", "triton")
@pytest.mark.parametrize("input_dtype, gate_dtype", [(F32, BF16), (F32, F32), (F32, F64), (BF16, F32)], ids=str)
def test_gates_of_another_dtype(input_dtype, gate_dtype, backend, dtype):
    q, k, v, igate, fgate = make_inputs(B=1, dtype=input_dtype)
    inputs = (q, k, v, igate.to(gate_dtype), fgate.to(gate_dtype))
    rounded = dict.fromkeys(("digate", "dfgate"), 1e-2)
    actual = assert_exact(inputs, backend, tolerance=rounded if gate_dtype == BF16 else None)
    assert actual["digate"].dtype == actual["dfgate"].dtype == gate_dtype


@on("torch", "triton", dtypes=(F32,))
def test_autocast_leaves_the_op_alone(backend, dtype):
    with torch.autocast(DEVICE, dtype=BF16):
        assert_exact(make_inputs(B=1, dtype=dtype), backend)


@on("torch", "triton", dtypes=(F32,))
@torch.no_grad()
def test_autocast_leaves_a_step_alone(backend, dtype):
    inputs = make_inputs(T=1, dtype=dtype)
    state = state_for(inputs)
    h, final = mlstm(*inputs, initial_state=state, output_final_state=True, backend=backend)
    with torch.autocast(DEVICE, dtype=BF16):
        actual, actual_final = mlstm(*inputs, initial_state=state, output_final_state=True, backend=backend)
    assert torch.equal(actual, h)
    assert all(torch.equal(a, b) for a, b in zip(actual_final, final, strict=True))


def rows_of(masking, length):
    """The mask in one row, and another one that is whole."""
    return torch.stack([MASKS[masking](length), torch.ones(length, dtype=torch.bool)]).to(DEVICE)


def check_mask(masking, length, backend, dtype):
    inputs = make_inputs(T=length, H=1, K=16, V=48, dtype=dtype)
    state, mask = state_for(inputs), rows_of(masking, length)
    actual = assert_exact(inputs, backend, state, mask=mask)
    for name in ("h", "dq", "dk", "dv", "digate", "dfgate"):
        assert (actual[name][~mask] == 0).all(), name
    # what stands at a masked position is never read
    for x in inputs:
        x[~mask] = 1e3
    h, final = mlstm(*inputs, initial_state=state, mask=mask, output_final_state=True, backend=backend)
    assert torch.equal(h, actual["h"])
    if masking == "all":
        assert all(torch.equal(new[0], old[0]) for new, old in zip(final, state, strict=True))


@on("torch", "triton", "on chip", dtypes=(F64, F32))
@pytest.mark.parametrize("masking", MASKS)
def test_mask(masking, backend, dtype):
    """Half of the tokens are a whole chunk and more."""
    check_mask(masking, 130, backend, dtype)


@on("torch", "triton", dtypes=(F64, F32, BF16))
@pytest.mark.parametrize("masking", MASKS)
def test_mask_of_few_tokens(masking, backend, dtype):
    check_mask(masking, 10, backend, dtype)


@on("reference", "torch", "triton")
@pytest.mark.parametrize("length", [10, 70])
@pytest.mark.parametrize("masking", MASKS)
def test_masked_tokens_are_absent(masking, length, backend, dtype):
    mask = MASKS[masking](length)[None].to(DEVICE)
    inputs = make_inputs(B=1, T=length, dtype=dtype)
    options = {"initial_state": (state := state_for(inputs)), "output_final_state": True, "backend": backend}
    h, final = mlstm(*inputs, mask=mask, **options)
    if masking == "all":
        assert all(torch.equal(x, y) for x, y in zip(final, state, strict=True))
        assert (h == 0).all()
        return
    expected_h, expected = mlstm(*(x[:, mask[0]] for x in inputs), **options)
    assert relative_error(h[:, mask[0]], expected_h) < SAME[dtype]
    assert_same_states(final, expected, SAME[dtype])


BOUNDS = [[0, 100], [0, 1, 40, 40, 110], [0, 0, 64, 64, 64, 65, 100, 100], list(range(13))]


def check_packed(bounds, masked, backend, dtype):
    """Against the reference, and against every sequence alone, from its own state."""
    inputs = make_inputs(B=1, T=bounds[-1], H=1, K=16, V=48, dtype=dtype)
    inputs[4][:, 5], inputs[3][:, 3] = -INF, -INF
    table = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    state = state_for(inputs, table)
    mask = torch.rand(1, bounds[-1], device=DEVICE) < 0.8 if masked else None
    options = {"mask": mask, "chunk_size": 16, "backend": backend}
    actual = assert_exact(inputs, state=state, cu_seqlens=table, **options)
    if masked:
        assert all((actual[name][~mask] == 0).all() for name in ("h", *GRADIENTS[:5]))
    options |= {"output_final_state": True}
    h, final = mlstm(*inputs, initial_state=state, cu_seqlens=torch.stack([table, -table], 1).long()[:, 0], **options)
    assert torch.equal(h, actual["h"])  # whatever the dtype and the strides of the bounds
    for row, (start, end) in enumerate(pairwise(bounds)):
        own_state, own_final = (tuple(x[row : row + 1] for x in s) for s in (state, final))
        if start == end:
            assert all(torch.equal(x, y) for x, y in zip(own_final, own_state, strict=True))
            continue
        options["mask"] = mask[:, start:end] if masked else None
        alone, alone_final = mlstm(*(x[:, start:end] for x in inputs), initial_state=own_state, **options)
        assert relative_error(h[:, start:end], alone) < SAME[dtype]
        assert_same_states(own_final, alone_final, SAME[dtype])


@on("torch", "triton", "on chip", dtypes=(F64, F32))
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_packed(bounds, masked, backend, dtype):
    check_packed(bounds, masked, backend, dtype)


@on("torch", "triton", "on chip", dtypes=(BF16,))
@pytest.mark.parametrize("masked", [False, True])
def test_packed_in_half_precision(masked, backend, dtype):
    check_packed(BOUNDS[1], masked, backend, dtype)


@on("torch", "triton", dtypes=(F32,))
def test_packed_documents_do_not_leak(backend, dtype):
    """Not even where the earlier document shouts and the later one whispers."""
    inputs = make_inputs(B=1, T=40, dtype=dtype)
    inputs[3][:, :20], inputs[3][:, 20:] = 15, -15
    h, _ = mlstm(*inputs, cu_seqlens=torch.tensor([0, 20, 40], device=DEVICE), backend=backend)
    assert relative_error(h[:, 20:], mlstm(*(x[:, 20:] for x in inputs), backend=backend)[0]) < 1e-6


@on("reference", "torch", "triton", dtypes=(F32,))
@pytest.mark.parametrize("igate", [-INF, -1e4, 1e4, None])
@pytest.mark.parametrize("fgate", [-INF, -1e30, -1e4, 1e4, INF, None])
def test_extreme_gates_stay_finite(igate, fgate, backend, dtype):
    """At some tokens, and in one row at all of them; few tokens, and with all gradients more of them."""
    inputs = make_inputs(T=70, H=1, dtype=dtype)
    for gate, value in zip(inputs[3:], (igate, fgate), strict=True):
        if value is not None:
            gate[torch.rand_like(gate) < 0.5] = value
            gate[1] = value
    state = state_for(inputs)
    weights = [torch.randn_like(x) for x in (inputs[2], *state[:2])]
    actual = evaluate(inputs, state, weights, backend=backend)
    assert all(x.isfinite().all() for x in actual.values())
    few = [x[:, :12] for x in inputs]
    h, final = mlstm(*few, initial_state=state, output_final_state=True, backend=backend)
    assert all(x.isfinite().all() for x in (h, *final))


@on("torch", "triton", "on chip")
@pytest.mark.parametrize("length", [12, 100])
def test_infinite_gates_are_exact(length, backend, dtype):
    """-inf: nothing is stored, everything is forgotten; +inf: everything is kept."""
    inputs = make_inputs(B=1, T=length, K=16, V=48, dtype=dtype)
    inputs[3][:, 3::10], inputs[4][:, 5::20], inputs[4][:, 7::10] = -INF, -INF, INF
    inputs[4][:, [0, 6]] = -INF  # at the first token, and at two in a row
    assert_exact(inputs, backend)


@on("reference", "torch", "triton", "on chip")
@pytest.mark.parametrize("length, reset", [(12, 5), (80, 50)])
def test_closed_forget_gate_is_a_reset(length, reset, backend, dtype):
    inputs = make_inputs(B=1, T=length, K=16, V=48, dtype=dtype)
    inputs[3][:, :reset] += 15  # what is forgotten had been loud
    inputs[4][:, reset] = -INF
    h, _ = mlstm(*inputs, initial_state=state_for(inputs), eps=0.0, backend=backend)
    expected, _ = mlstm(*(x[:, reset:] for x in inputs), eps=0.0, backend=backend)
    assert relative_error(h[:, reset:], expected) < SAME[dtype]


@on("reference", "torch", "triton", dtypes=ALL)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_step(strided, inplace, backend, dtype):
    """Steps against the sequence; in place they write into the tensors they were given, else they leave them alone."""
    inputs = make_inputs(B=3, T=6, K=24, V=100, dtype=dtype)
    initial, options = state_for(inputs), {"scale": 0.7, "eps": 0.1}
    expected_h, expected = mlstm(
        *double(inputs), initial_state=double(initial), output_final_state=True, backend="reference", **options
    )
    state, outputs = tuple(x.clone() for x in initial), []
    if strided:
        state = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in state)
    for t in range(6):
        before = tuple(x.clone() for x in state)
        h, new_state = mlstm_step(*(x[:, t] for x in inputs), state, inplace=inplace, backend=backend, **options)
        assert inplace == all(x is y for x, y in zip(new_state, state, strict=True))
        assert inplace or all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
        state = new_state
        outputs.append(h)
    assert h.dtype == dtype
    tolerance = TOLERANCE["torch" if backend == "reference" else backend, dtype]["h"]
    assert relative_error(torch.stack(outputs, dim=1), expected_h) < tolerance
    # the step stores its state without rounding it to the inputs' dtype, with the m of the recurrence
    assert all(relative_error(x, y) < min(tolerance, 1e-5) for x, y in zip(state, expected, strict=True))


@on("torch", "triton", "on chip")
@pytest.mark.parametrize("pieces", [[1] * 4, [37, 50, 13]], ids=["steps", "pieces"])
def test_gradients_through_pieces(pieces, backend, dtype):
    """Backpropagation through a sequence run in pieces, by the state between them, equals that in one go."""
    inputs = make_inputs(B=1, T=sum(pieces), K=16, V=48, dtype=dtype)
    inputs[4].add_(3)
    state = state_for(inputs)
    leaves = [x.detach().requires_grad_() for x in (*inputs, *state[:2])]
    h, (c, n, m) = mlstm(*leaves[:5], initial_state=(*leaves[5:], state[2]), output_final_state=True, backend=backend)
    weights = [torch.randn_like(x) for x in (h, c, n)]
    expected = torch.autograd.grad((h, c, n), leaves, weights)

    outputs, current = [], (*leaves[5:], state[2])
    for piece in zip(*(x.split(pieces, dim=1) for x in leaves[:5]), strict=True):
        if len(set(pieces)) == 1:
            piece_h, current = mlstm_step(*(x[:, 0] for x in piece), current, backend=backend)
            piece_h = piece_h[:, None]
        else:
            piece_h, current = mlstm(*piece, initial_state=current, output_final_state=True, backend=backend)
        outputs.append(piece_h)
    assert relative_error(torch.cat(outputs, dim=1), h) < SAME[dtype]
    assert_same_states(current, (c, n, m), SAME[dtype])
    factor = torch.exp(current[2] - m)
    final = current[0] * factor[..., None, None], current[1] * factor[..., None]
    actual = torch.autograd.grad((torch.cat(outputs, dim=1), *final), leaves, weights)
    assert all(relative_error(x, y) < {F64: 1e-12, F32: 1e-5}[dtype] for x, y in zip(actual, expected, strict=True))


@on("torch", "triton")
def test_gradients_through_a_checkpoint(backend, dtype):
    inputs, gradients = make_inputs(B=1, dtype=dtype), []
    for run in (lambda function, *x: function(*x), lambda *x: checkpoint(*x, use_reentrant=False)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        loss = run(lambda *x: mlstm(*x, backend=backend)[0], *leaves).square().sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["unit", "initial"])
def test_long_stream(gates):
    """Over 20,000 tokens neither the chunkwise form nor the step drifts away from float64."""
    inputs = make_inputs(B=1, T=20_000, dtype=F32, gates=gates)
    with torch.no_grad():
        expected, expected_state = mlstm(*double(inputs), output_final_state=True, backend="reference")
        h, final = mlstm(*inputs, output_final_state=True, backend="torch")
        state, outputs = tuple(torch.zeros_like(x) for x in final), []
        for t in range(20_000):
            outputs.append(mlstm_step(*(x[:, t] for x in inputs), state, inplace=True, backend="torch")[0])
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
        h, chunk_state = mlstm(*inputs, initial_state=chunk_state, output_final_state=True, backend="torch")
        if state is None:
            state = tuple(torch.zeros_like(x) for x in chunk_state)
        steps = [
            mlstm_step(*x, state, inplace=True, backend="torch")[0]
            for x in zip(*(x.unbind(1) for x in inputs), strict=True)
        ]
    assert relative_error(torch.stack(steps[-1000:], dim=1), h[:, -1000:]) < 1e-4
    for stepped, chunked in zip(state, chunk_state, strict=True):  # both with the m of the recurrence
        assert relative_error(stepped, chunked) < 1e-4
