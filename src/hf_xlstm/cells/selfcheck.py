"""The check that `backend="auto"` makes of the Triton kernels before it takes them: are they right on this GPU?

The first use of an op, in a dtype and with heads of some size, runs small inputs through the kernels (training, a
prompt that continues a state, a short one; and steps) and through the torch path in float64. That takes well under a
second, and the compilation of kernels of which most are needed anyway. The verdict is remembered in the process and
on disk: for this GPU, driver, torch, Triton and source of the kernels. Masks and packed sequences are not checked.

Nothing can be run while a graph is traced or captured, inside `torch.func` transforms and under dispatch modes. There
a remembered verdict holds, and where there is none the kernels are trusted: they pass their tests, and the slow path
would stay in the graph for good. `python -m hf_xlstm.env --check` checks beforehand.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import operator
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants

from ..files import write_text
from ..ops import mlstm, mlstm_step, slstm, slstm_step
from .environment import saves_states
from .numerics import is_readable, without_autocast


# Largest relative errors of outputs and states, and of gradients, in the Euclidean norm: some times what rounding does
# with any order of sums (the tests are stricter), and little beside what a wrong kernel does.
BOUNDS = {torch.float32: (2e-3, 1e-2), torch.bfloat16: (3e-2, 1e-1), torch.float16: (1e-2, 5e-2)}
TOKENS = 150  # more than a chunk of any size, and no multiple of one
SHORT = 12  # tokens that the mLSTM reads one by one
SLSTM_TOKENS = 20

Results = dict[str, torch.Tensor]
Verdict = dict[str, Any]  # the facts for which it holds, "fault": str | None, and "date"


class Question(NamedTuple):
    """What is checked: an op of `hf_xlstm.ops`, with heads of these dims (K and V, or D)."""

    op: str
    dtype: torch.dtype
    head_dims: tuple[int, ...]
    device: torch.device

    def __str__(self) -> str:
        dims, gpu = " and ".join(map(str, self.head_dims)), machine(self.device)["gpu"]
        return f"{self.op} in {str(self.dtype)[6:]} with heads of {dims} on {self.device} ({gpu})"


_faults: dict[Question, str | None] = {}  # what this process knows


def fault(op: str, *inputs: torch.Tensor) -> str | None:
    """Why the Triton kernels of `op` are not to be taken for inputs like these, or None.

    `inputs` are tensors on a GPU that the kernels support, whose last dimensions are the head dims. What cannot be
    checked, because memory runs out or the torch path does not run either, counts as right in this process, with a
    warning. Threads need no lock: two that ask at the same time both check, and find the same.
    """
    x, head_dims = inputs[0], tuple(operator.index(y.shape[-1]) for y in inputs)
    if torch.compiler.is_compiling():
        return _remembered(op, x.dtype, x.device, *head_dims) or None
    question = Question(op, x.dtype, head_dims, x.device)
    if question not in _faults:
        if not _can_run(x):
            return _remembered(op, x.dtype, x.device, *head_dims) or None
        for asked in _together(question):
            try:
                verdict = _load(asked) or ask(asked)
                _faults[asked] = verdict["fault"]
            except Exception as error:
                warnings.warn(f"{asked} was not checked: {type(error).__name__}: {error}", stacklevel=6)
                _faults[asked] = None
    fault = _faults[question]
    return fault and _explanation(question, fault)


def _together(question: Question) -> list[Question]:
    """A sequence has its cell's step checked, too: what decodes after it may be a graph, in which nothing can be."""
    step = [] if question.op.endswith("_step") else [question._replace(op=f"{question.op}_step")]
    return [question, *(asked for asked in step if asked not in _faults)]


def ask(question: Question) -> Verdict:
    """Checks now, and remembers the verdict. Raises what the torch path raises, and torch.OutOfMemoryError."""
    verdict: Verdict = _facts(question) | {"fault": check(question), "date": datetime.date.today().isoformat()}
    _faults[question] = verdict["fault"]
    with contextlib.suppress(OSError):  # a home that is full or read-only: the next process checks again
        directory().mkdir(parents=True, exist_ok=True)
        write_text(_path(question), json.dumps(verdict, indent=1) + "\n")
    return verdict


def verdicts(device: torch.device) -> dict[Question, Verdict]:
    """Those on disk that hold on this device."""
    found = {}
    for path in sorted(directory().glob("*.json")):
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, AttributeError
        ):  # what is damaged is no verdict
            verdict = json.loads(path.read_text(encoding="utf-8"))
            dtype, head_dims = getattr(torch, verdict["dtype"]), tuple(verdict["head_dims"])
            question = Question(verdict["op"], dtype, head_dims, device)
            if path == _path(question):
                found[question] = verdict
    return found


# --- what is remembered


def directory() -> Path:
    """Where verdicts are kept: beside the other caches of Hugging Face's libraries."""
    return Path(constants.HF_HOME) / "hf_xlstm" / "verdicts"


@torch.compiler.assume_constant_result
def _remembered(op: str, dtype: torch.dtype, device: torch.device, *head_dims: int) -> str:
    """The explanation of a fault that is known, or "". It becomes a constant of a graph that is traced."""
    question = Question(op, dtype, head_dims, device)
    known = _faults[question] if question in _faults else (_load(question) or {}).get("fault")
    return _explanation(question, known) if known else ""


def _load(question: Question) -> Verdict | None:
    """The verdict on disk, if there is one that can be read."""
    with contextlib.suppress(OSError, ValueError):
        verdict = json.loads(_path(question).read_text(encoding="utf-8"))
        if isinstance(verdict, dict) and "fault" in verdict:
            return verdict
    return None


def _path(question: Question) -> Path:
    text = json.dumps(_facts(question), sort_keys=True)
    return directory() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _facts(question: Question) -> dict[str, Any]:
    """Everything for which a verdict holds."""
    asked = {"op": question.op, "dtype": str(question.dtype)[6:], "head_dims": list(question.head_dims)}
    return asked | machine(question.device) | {"saves_states": saves_states()}


@functools.cache
def machine(device: torch.device) -> dict[str, str]:
    """What a kernel runs on, and its source."""
    import triton

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    return {
        "gpu": gpu,
        "driver": driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "source": _source(),
    }


def driver() -> str:
    """The version of the GPU's driver."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().splitlines()[0].strip()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _source() -> str:
    """A hash of the kernels and of what launches them."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*here.rglob("triton_*.py"), Path(__file__)]):
        digest.update(path.relative_to(here).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _explanation(question: Question, found: str) -> str:
    return (
        f"its Triton kernels failed the check of {question} ({found}). Please report this, with what "
        "`python -m hf_xlstm.env --check` prints, which also checks again. HF_XLSTM_BACKEND=triton takes them "
        "without a check"
    )


# --- the check


def _can_run(x: torch.Tensor) -> bool:
    """Whether kernels may be run here for their results alone, which nobody may trace, capture or count."""
    return (
        is_readable(x)
        and not torch.jit.is_tracing()
        and not _is_captured(x)
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _is_captured(x: torch.Tensor) -> bool:
    """Whether what is launched goes into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def check(question: Question) -> str | None:
    """What is wrong with the results of the kernels, or None. Raises what the torch path raises, and
    torch.OutOfMemoryError."""
    results = _STEP_RESULTS if question.op.endswith("_step") else _SEQUENCE_RESULTS
    run = results[question.op.removesuffix("_step")]
    with _undisturbed(question.device):
        expected = run("torch", Numbers(question, exact=True), *question.head_dims)
        try:
            actual = run("triton", Numbers(question, exact=False), *question.head_dims)
            errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:1000]
    output_bound, gradient_bound = BOUNDS[question.dtype]
    bounds = {name: gradient_bound if name.startswith("gradient") else output_bound for name in errors}
    wrong = [
        f"{name} is off by {error:.1e}, {bounds[name]:.0e} allowed"
        for name, error in errors.items()
        if not error <= bounds[name]
    ]
    return "; ".join(wrong) or None


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """A context in which gradients are recorded as if no one else did anything: without autocast, inference mode and
    the hooks of activation checkpointing, which count what is saved."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        without_autocast(device),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        yield


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach()
    return ((actual - expected).norm() / expected.norm()).item()


class Numbers:
    """Normal random tensors, the same for both paths: rounded to the dtype in question, and `exact` ones then float64.
    They leave the random state of the program alone."""

    def __init__(self, question: Question, exact: bool):
        self.dtype, self.device, self.exact = question.dtype, question.device, exact
        self.generator = torch.Generator("cpu").manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        x = torch.randn(shape, generator=self.generator, device="cpu", dtype=torch.float32)
        x = x.to(dtype or self.dtype).to(self.device)
        return x.double() if self.exact else x

    def mlstm_inputs(self, *shape: int, K: int, V: int) -> list[torch.Tensor]:
        """q, k, v and gates, most of them open; `shape` is (B, T, H) or (B, H)."""
        igate, fgate = (self(*shape, dtype=torch.float32) for _ in range(2))
        return [self(*shape, K), self(*shape, K), self(*shape, V), igate, fgate + 3]

    def mlstm_state(self, rows: int, H: int, K: int, V: int) -> tuple[torch.Tensor, ...]:
        return tuple(self(*shape, dtype=torch.float32) for shape in ((rows, H, K, V), (rows, H, K), (rows, H)))

    def slstm_parameters(self, H: int, D: int) -> list[torch.Tensor]:
        """Recurrent weight and bias."""
        return [self(4, H, D, D) / 2 ** (1 + (D - 1).bit_length() // 2), self(4, H, D)]

    def slstm_state(self, rows: int, H: int, D: int) -> tuple[torch.Tensor, ...]:
        h, c, n, m = (self(rows, H, D, dtype=torch.float32) for _ in range(4))
        return h.tanh(), c, 1 + n.abs(), m


def _meaning(state: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
    """What a state stands for, whatever its m: c e^m and n e^m, and the h of the sLSTM."""
    assert state is not None
    *h, c, n, m = (x.double() for x in state)
    scaled = (x * m.exp().reshape(*m.shape, *[1] * (x.ndim - m.ndim)) for x in (c, n))
    return torch.cat([x.flatten() for x in (*h, *scaled)])


def _training(op, inputs: list[torch.Tensor], names: tuple[str, ...], backend: str) -> Results:
    leaves = [x.requires_grad_() for x in inputs]
    h, _ = op(*leaves, backend=backend)
    weight = torch.linspace(-3, 3, h.numel(), dtype=torch.float64, device="cpu").sin().view(h.shape)
    gradients = torch.autograd.grad(h, leaves, weight.to(h))
    return {"h": h} | {f"gradient of {name}": x for name, x in zip(names, gradients, strict=True)}


def _mlstm(backend: str, numbers: Numbers, K: int, V: int) -> Results:
    """Training; then prompts that continue a state, first of as many sequences as C is kept on chip for in the widest
    tiles."""
    inputs = numbers.mlstm_inputs(1, TOKENS, 2, K=K, V=V)
    results = _training(mlstm, inputs, ("q", "k", "v", "igate", "fgate"), backend)
    with torch.no_grad():
        for name, rows, length in (("prompt", _rows(numbers, K, V), TOKENS), ("short prompt", 2, SHORT)):
            inputs, state = numbers.mlstm_inputs(rows, length, 1, K=K, V=V), numbers.mlstm_state(rows, 1, K, V)
            h, state = mlstm(*inputs, initial_state=state, output_final_state=True, backend=backend)
            results |= {f"h of a {name}": h, f"state after a {name}": _meaning(state)}
    return results


def _rows(numbers: Numbers, K: int, V: int) -> int:
    from .mlstm.triton_launch import on_chip_plan
    from .triton_common import GPU

    gpu = GPU.of(numbers.device)
    plans = {n: on_chip_plan(numbers.dtype, K, V, n, gpu) for n in range(2, gpu.processors + 1)}
    widths = {n: plan.output.BV or 0 for n, plan in plans.items() if plan}
    return max(widths, key=widths.__getitem__, default=2)  # the first of the widest


def _slstm(backend: str, numbers: Numbers, D: int) -> Results:
    """Training; then a prompt that continues a state, of more sequences than several programs share a head for."""
    parameters, rows = numbers.slstm_parameters(2, D), _slstm_rows(numbers, D)
    gates = numbers(3, SLSTM_TOKENS, 4, 2, D)
    results = _training(slstm, [gates, *parameters], ("gates", "recurrent_weight", "bias"), backend)
    gates, state = numbers(rows, SLSTM_TOKENS, 4, 2, D), numbers.slstm_state(rows, 2, D)
    with torch.no_grad():
        h, state = slstm(gates, *parameters, initial_state=state, output_final_state=True, backend=backend)
    return results | {"h of a prompt": h, "state after a prompt": _meaning(state)}


def _slstm_rows(numbers: Numbers, D: int) -> int:
    from .slstm.triton_launch import BB, spread_plan
    from .triton_common import GPU

    gpu = GPU.of(numbers.device)
    rows = range(3, BB * gpu.processors, BB)
    return next(n for n in rows if not spread_plan(numbers.dtype, D, n, 2, SLSTM_TOKENS, gpu))


def _steps(step, inputs: list[torch.Tensor], pool: tuple[torch.Tensor, ...], backend: str) -> Results:
    """A step of three rows in a pool of more slots, of which one row is padding; then one in place; then a copy."""
    results: Results = {}
    rows = inputs[0].shape[0]
    state = tuple(x[:rows] for x in pool)
    indices = torch.tensor([rows, -1, 0], device=inputs[0].device)
    options: dict[str, tuple[tuple[torch.Tensor, ...], dict[str, Any]]]
    options = {"in a pool": (pool, {"state_indices": indices, "inplace": True})}
    options |= {"in place": (state, {"inplace": True}), "to a copy": (state, {})}
    with torch.no_grad():
        for name, (before, option) in options.items():
            h, after = step(*inputs, before, **option, backend=backend)
            results |= {f"h of a step {name}": h, f"state after a step {name}": _meaning(after)}
    return results


def _mlstm_steps(backend: str, numbers: Numbers, K: int, V: int) -> Results:
    inputs = numbers.mlstm_inputs(3, 2, K=K, V=V)
    return _steps(mlstm_step, inputs, numbers.mlstm_state(4, 2, K, V), backend)


def _slstm_steps(backend: str, numbers: Numbers, D: int) -> Results:
    inputs = [numbers(3, 4, 2, D), *numbers.slstm_parameters(2, D)]
    return _steps(slstm_step, inputs, numbers.slstm_state(4, 2, D), backend)


_SEQUENCE_RESULTS: dict[str, Callable[..., Results]] = {"mlstm": _mlstm, "slstm": _slstm}
_STEP_RESULTS: dict[str, Callable[..., Results]] = {"mlstm": _mlstm_steps, "slstm": _slstm_steps}
