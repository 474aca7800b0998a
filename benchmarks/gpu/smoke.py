"""Whether anything is wrong, in under a minute: every op at small shapes against float64, the check of
backend="auto", then a small model of both cells against itself and against the torch backend."""

import functools
from collections.abc import Callable

import torch

from benchmarks import peers
from benchmarks.gpu import harness
from benchmarks.gpu.harness import Job, Jobs
from benchmarks.peers import HF_XLSTM
from benchmarks.provenance import relative_error
from hf_xlstm import xLSTMForCausalLM
from hf_xlstm.cells import selfcheck
from hf_xlstm.ops import mlstm, mlstm_step, slstm, slstm_step


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# of h, c and the gradients (relative, Euclidean); float32 products go through tf32 where the kernels say so
BOUNDS = {"bfloat16": {"h": 1e-2, "state": 1e-2, "gradient": 5e-2}}
BOUNDS["float32"] = {name: bound / 10 for name, bound in BOUNDS["bfloat16"].items()}
MLSTM_SHAPES = [(2, 150, 2, 64, 128), (1, 70, 1, 256, 512)]  # B, S, H, K, V
SLSTM_SHAPES = [(3, 40, 2, 64), (2, 20, 1, 256)]  # B, T, H, D
MODEL = {"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 2, "num_heads": 2}
LENGTH = 40  # tokens that it reads
MODEL_BOUND = 1e-2

Inputs = list[torch.Tensor]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=harness.DEVICE)


def mlstm_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Inputs, Inputs]:
    """q, k, v, igate, fgate; c, n, m."""
    B, S, H, K, V = shape
    q, k, v = (randn(B, S, H, dim).to(dtype) for dim in (K, K, V))
    return [q, k, v, randn(B, S, H), randn(B, S, H) + 3], [randn(B, H, K, V), randn(B, H, K), randn(B, H)]


def slstm_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Inputs, Inputs]:
    """gates, recurrent weight, bias; h, c, n, m as a sequence of zeros leaves them."""
    B, T, H, D = shape
    inputs = [randn(B, T, 4, H, D), randn(4, H, D, D) / (2 * D**0.5), randn(4, H, D)]
    inputs = [x.to(dtype) for x in inputs]
    start = torch.zeros(B, 2, 4, H, D, device=harness.DEVICE)
    _, state = slstm(start, *(x.float() for x in inputs[1:]), output_final_state=True, backend="reference")
    return inputs, list(state)


def double(tensors: Inputs) -> Inputs:
    return [x.detach().double() for x in tensors]


def within(errors: dict[str, float], bounds: dict[str, float]) -> dict:
    """The errors, which are all within their bounds; or an exception that says which are not."""
    if wrong := {name: error for name, error in errors.items() if not error <= bounds[name]}:
        raise ValueError(f"wrong result: {wrong}, allowed {bounds}")
    return {"errors": errors}


def state_error(actual: Inputs, expected: Inputs) -> float:
    """The error of what a state stands for: an mLSTM's C exp(m), an sLSTM's c / n."""
    if len(actual) == 3:
        (c, _, m), (expected_c, _, expected_m) = actual, expected
        return relative_error(c.double() * torch.exp(m.double() - expected_m)[..., None, None], expected_c)
    (_, c, n, _), (_, expected_c, expected_n, _) = actual, expected
    return relative_error(c / n, expected_c / expected_n)


@torch.no_grad()
def forward(op: Callable, inputs: Inputs, state: Inputs, bounds: dict[str, float]) -> dict:
    """Output and final state, from an initial one."""
    h, final = op(*inputs, initial_state=tuple(state), output_final_state=True, backend="triton")
    inputs, state = double(inputs), tuple(double(state))
    expected_h, expected = op(*inputs, initial_state=state, output_final_state=True, backend="reference")
    return within({"h": relative_error(h, expected_h), "state": state_error(final, expected)}, bounds)


def backward(op: Callable, inputs: Inputs, _: Inputs, bounds: dict[str, float]) -> dict:
    """Gradients of all inputs."""
    gradients = []
    for leaves, backend in ((inputs, "triton"), (double(inputs), "reference")):
        leaves = [x.detach().requires_grad_() for x in leaves]
        h = op(*leaves, backend=backend)[0]
        dh = torch.linspace(-1, 1, h.numel(), device=h.device).sin().view_as(h).to(h.dtype)
        gradients.append(torch.autograd.grad(h, leaves, dh))
    errors = {f"gradient {i}": relative_error(*pair) for i, pair in enumerate(zip(*gradients, strict=True))}
    return within(errors, dict.fromkeys(errors, bounds["gradient"]))


def step(op: Callable, inputs: Inputs, state: Inputs, bounds: dict[str, float]) -> dict:
    """One token, its state updated in place."""
    token = [inputs[0][:, 0], *inputs[1:]] if op is slstm_step else [x[:, 0] for x in inputs]
    expected_h, expected = op(*double(token), tuple(double(state)), backend="reference")
    h, final = op(*token, tuple(state), inplace=True, backend="triton")
    return within({"h": relative_error(h, expected_h), "state": state_error(final, expected)}, bounds)


# A model of one block of either cell, in float32


@functools.lru_cache(maxsize=2)
def model(backend: str) -> xLSTMForCausalLM:
    options = {"dtype": torch.float32, "device": harness.DEVICE, "layer_types": ["mlstm", "slstm"]}
    return peers.build(HF_XLSTM, **MODEL, **options, backend=backend)


def tokens(batch_size: int, length: int) -> torch.Tensor:
    return torch.randint(1, MODEL["vocab_size"], (batch_size, length), device=harness.DEVICE)


def logits_within_bound(actual: torch.Tensor, expected: torch.Tensor) -> dict:
    return within({"logits": relative_error(actual, expected)}, {"logits": MODEL_BOUND})


@torch.no_grad()
def generate_as_stepwise() -> dict:
    """Greedy `generate` gives the logits of one pass over what it wrote."""
    prompt = tokens(2, LENGTH)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    generated = model("triton").generate(prompt, **options)
    expected = model("triton")(generated.sequences, use_cache=False).logits[:, LENGTH - 1 : -1]
    return logits_within_bound(torch.stack(generated.logits, dim=1), expected)


@torch.no_grad()
def padded_as_alone() -> dict:
    ids = tokens(1, LENGTH)
    padded = torch.cat([tokens(1, 7), ids], dim=1)
    mask = (torch.arange(7 + LENGTH, device=harness.DEVICE) >= 7).long()[None]
    actual = model("triton")(padded, attention_mask=mask, use_cache=False).logits[:, 7:]
    return logits_within_bound(actual, model("triton")(ids, use_cache=False).logits)


@torch.no_grad()
def packed_as_separate() -> dict:
    lengths = (LENGTH - 3, LENGTH + 2)
    parts = [tokens(1, length) for length in lengths]
    positions = torch.cat([torch.arange(length, device=harness.DEVICE) for length in lengths])[None]
    actual = model("triton")(torch.cat(parts, dim=1), position_ids=positions, use_cache=False).logits
    expected = torch.cat([model("triton")(part, use_cache=False).logits for part in parts], dim=1)
    return logits_within_bound(actual, expected)


def training_step_as_torch() -> dict:
    """Loss and gradients of one step, beside those of the torch backend."""
    ids, gradients = tokens(2, LENGTH), []
    for backend in ("triton", "torch"):
        model(backend).zero_grad()
        model(backend)(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model(backend).parameters()]))
    return within({"gradient": relative_error(*gradients)}, {"gradient": 2 * MODEL_BOUND})


def check(op: Callable, test: Callable, make: Callable, shape: tuple[int, ...], dtype: str) -> dict:
    return test(op, *make(shape, DTYPES[dtype]), BOUNDS[dtype])


def passes_selfcheck(op: str, head_dims: tuple[int, ...]) -> dict:
    """What a program with backend="auto" checks at the first use of an op. Nothing is remembered of it."""
    question = selfcheck.Question(op, torch.bfloat16, head_dims, torch.device(harness.DEVICE))
    if fault := selfcheck.check(question):
        raise ValueError(f"not taken by backend='auto': {fault}")
    return {}


def jobs() -> Jobs:
    cells = [
        ("mlstm", mlstm_inputs, MLSTM_SHAPES, {forward: mlstm, backward: mlstm, step: mlstm_step}),
        ("slstm", slstm_inputs, SLSTM_SHAPES, {forward: slstm, backward: slstm, step: slstm_step}),
    ]
    for dtype in DTYPES:
        for cell, make, shapes, tests in cells:
            for test, op in tests.items():
                for shape in shapes:
                    name = {"op": cell, "pass": test.__name__, "dtype": dtype, "shape": "x".join(map(str, shape))}
                    yield Job(name, functools.partial(check, op, test, make, shape, dtype))
    for cell, _, shapes, _ in cells:
        for op in (cell, f"{cell}_step"):
            yield Job({"op": op, "test": "selfcheck"}, functools.partial(passes_selfcheck, op, shapes[0][3:]))
    needs = ("smoke/*/float32/*",)
    for test in (generate_as_stepwise, padded_as_alone, packed_as_separate, training_step_as_torch):
        yield Job({"op": "model", "test": test.__name__.replace("_", " ")}, test, needs)
