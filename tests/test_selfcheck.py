"""The check that backend="auto" makes of the Triton kernels on a GPU, here with the interpreter in a GPU's place, and
kernels that are wrong on purpose."""

import json
import threading
import warnings

import pytest
import torch
import torch.utils.checkpoint
from common import relative_error
from torch._subclasses.fake_tensor import FakeTensorMode


pytest.importorskip("triton")

import triton
import triton.language as tl

from hf_xlstm import env, hub
from hf_xlstm.cells import dispatch, selfcheck
from hf_xlstm.cells.mlstm import triton_backward, triton_recurrent
from hf_xlstm.cells.mlstm import triton_launch as mlstm_launch
from hf_xlstm.cells.slstm import triton_launch as slstm_launch
from hf_xlstm.cells.triton_common import GPU
from hf_xlstm.ops import backend_and_reason, mlstm, mlstm_step


pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="compiled kernels cannot be replaced")
CPU, F32 = torch.device("cpu"), torch.float32


@triton.jit
def roughly_log_sigmoid(x):
    return tl.minimum(x, 0.0)


@triton.jit
def always_reset(x):
    return tl.minimum(x, -1e30)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """The interpreter is a GPU of which nothing is known yet, and looks at short sequences."""
    monkeypatch.setattr(dispatch, "GPU", "cpu")
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(selfcheck, "directory", lambda: tmp_path / "verdicts")
    for name, value in {"_faults": {}, "TOKENS": 20, "SHORT": 2, "SLSTM_TOKENS": 3}.items():
        monkeypatch.setattr(selfcheck, name, value)
    return tmp_path / "verdicts"


@pytest.fixture
def checked(monkeypatch):
    """The questions that have been checked, one after another."""
    questions, check = [], selfcheck.check
    monkeypatch.setattr(selfcheck, "check", lambda question: questions.append(question) or check(question))
    return questions


def ask(op: str = "mlstm_step", dtype: torch.dtype = F32) -> str:
    """The backend that "auto" takes."""
    x = torch.empty(1, 1, 4, 16, dtype=dtype)
    return backend_and_reason(op, "auto", x, *([x] if op.startswith("mlstm") else []))[0]


def step_inputs() -> tuple:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 1, 16)
    return q, k, v, *torch.randn(2, 2, 1), (torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16), torch.zeros(2, 1))


@pytest.mark.parametrize("op", ["mlstm", "mlstm_step", "slstm", "slstm_step"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, F32])
def test_right_kernels_are_taken(op, dtype, checked, gpu, recwarn):
    for _ in range(2):
        assert ask(op, dtype) == "triton"
    both = [op] if op.endswith("_step") else [op, f"{op}_step"]  # since a graph may decode after a prompt
    assert [(question.op, question.dtype) for question in checked] == [(name, dtype) for name in both]
    verdicts = [json.loads(path.read_text()) for path in gpu.iterdir()]
    assert sorted(verdict["op"] for verdict in verdicts) == both
    for verdict in verdicts:
        assert verdict["fault"] is None and verdict["head_dims"] == [16] * (1 + op.startswith("mlstm"))
    # but the interpreter's, of infinities that a kernel subtracts and does not use
    assert not [warning for warning in recwarn.list if warning.category is not RuntimeWarning]


def test_verdict_holds_for_one_driver_and_one_source(monkeypatch):
    checked = []
    monkeypatch.setattr(selfcheck, "check", checked.append)
    for name, value in [("driver", "580.1"), ("driver", "580.2"), ("_source", "changed")]:
        monkeypatch.setattr(selfcheck, name, lambda value=value: value)
        before = len(checked)
        for _ in range(2):  # the second as in another process
            selfcheck.machine.cache_clear()
            selfcheck._faults.clear()
            assert ask() == "triton"
        assert len(checked) == before + 1
    selfcheck.machine.cache_clear()


@pytest.mark.parametrize(
    "op, module, kernel, message",
    [
        ("mlstm", triton_backward, always_reset, "(gradient of fgate is off by 1.0e+00, 1e-02 allowed)"),
        ("mlstm_step", triton_recurrent, roughly_log_sigmoid, "state after a step to a copy is off by"),
    ],
)
def test_wrong_kernel_is_not_taken(op, module, kernel, message, checked, monkeypatch, gpu):
    monkeypatch.setattr(module, "log_sigmoid", kernel)
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            assert ask(op) == "torch"
        selfcheck._faults.clear()  # as in another process
        assert ask(op) == "torch"
    assert len(checked) == len({*checked}) == len([*gpu.iterdir()]) and len(warned) == 1
    for part in (f"{op} runs on the torch backend", message, "Triton's interpreter", "env --check`", "report"):
        assert part in str(warned[0].message)


def test_kernel_that_raises_is_not_taken(monkeypatch):
    def run_forward(*_, **__):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(slstm_launch, "run_forward", run_forward)
    with pytest.warns(UserWarning, match="RuntimeError: out of resource: shared memory"):
        assert ask("slstm") == "torch"


def test_who_chooses_a_backend_is_not_checked(checked, monkeypatch, recwarn):
    monkeypatch.setattr(triton_recurrent, "log_sigmoid", roughly_log_sigmoid)
    inputs = step_inputs()
    wrong, _ = mlstm_step(*inputs, backend="triton")
    right, _ = mlstm_step(*inputs, backend="torch")
    for choice, expected in (("triton", wrong), ("torch", right)):
        monkeypatch.setenv("HF_XLSTM_BACKEND", choice)
        assert backend_and_reason("mlstm_step", "auto", inputs[0])[1] == "asked for by HF_XLSTM_BACKEND"
        assert torch.equal(mlstm_step(*inputs)[0], expected)
    assert not checked and not recwarn.list
    monkeypatch.delenv("HF_XLSTM_BACKEND")
    with pytest.warns(UserWarning, match="failed the check"):
        assert torch.equal(mlstm_step(*inputs)[0], right)


def test_damaged_verdict_is_asked_again(monkeypatch, gpu):
    checked = []
    monkeypatch.setattr(selfcheck, "check", checked.append)
    ask()
    (path,) = gpu.iterdir()
    for text in ("", "{}", "[]", '"fault"'):
        path.write_text(text)
        selfcheck._faults.clear()
        before = len(checked)
        assert not selfcheck.verdicts(CPU)
        assert ask() == "triton" and len(checked) == before + 1
    assert len(selfcheck.verdicts(CPU)) == 1


def test_without_a_place_for_verdicts(monkeypatch, tmp_path, recwarn):
    checked = []
    monkeypatch.setattr(selfcheck, "check", checked.append)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(selfcheck, "directory", lambda: tmp_path / "file" / "verdicts")
    assert ask() == ask() == "triton"
    assert len(checked) == 1 and not recwarn.list


def test_memory_that_runs_out_is_no_verdict(monkeypatch, gpu):
    def check(_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(selfcheck, "check", check)
    with pytest.warns(UserWarning, match=r"was not checked: OutOfMemoryError: no room") as warned:
        assert ask() == ask() == "triton"
    assert len(warned) == 1 and not gpu.exists()


def compiled(function, x):
    return torch.compile(function, backend="eager", fullgraph=True, dynamic=True)(x)


def captured(function, x):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfcheck, "_is_captured", lambda _: True)
        return function(x)


def mapped(function, x):
    return torch.vmap(function)(x)


@pytest.mark.parametrize("trace", [compiled, captured, mapped])
@pytest.mark.parametrize("known", [None, "fault"])
def test_nothing_runs_while_a_graph_is_traced(trace, known, checked, gpu):
    """A verdict that is remembered decides, else the kernels are trusted, which is no verdict."""

    def function(x):
        backend, _ = backend_and_reason("mlstm_step", "auto", x, x)
        return x + 1 if backend == "triton" else x - 1

    if known:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selfcheck, "check", lambda _: "it is wrong")
            selfcheck.ask(selfcheck.Question("mlstm_step", F32, (16, 16), CPU))
        selfcheck._faults.clear()
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as warned:
        result = trace(function, torch.zeros(3, 16))
    torch._dynamo.reset()
    assert sum("it is wrong" in str(warning.message) for warning in warned) == bool(known)
    assert torch.equal(result, torch.full((3, 16), -1.0 if known else 1.0))
    assert not checked and not selfcheck._faults


def test_nothing_runs_on_fake_tensors(checked):
    with FakeTensorMode():
        assert ask() == "triton"
    assert not checked and not selfcheck._faults


def test_check_leaves_no_trace_in_the_program(checked):
    """The first use may be under activation checkpointing, which counts what is saved for the backward pass, under
    autocast, in inference mode, and in a program that counts on its random numbers."""
    q, k, v = torch.randn(3, 1, 3, 1, 16).requires_grad_()
    gates = torch.randn(1, 3, 1), torch.randn(1, 3, 1)
    state = torch.get_rng_state()

    def run(q, k, v):
        return mlstm(q, k, v, *gates)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = torch.utils.checkpoint.checkpoint(run, q, k, v, use_reentrant=False)
    gradients = torch.autograd.grad(h.sum(), (q, k, v))
    expected_h, _ = mlstm(q, k, v, *gates, backend="torch")
    expected = torch.autograd.grad(expected_h.sum(), (q, k, v))
    for x, y in zip((h, *gradients), (expected_h, *expected), strict=True):
        assert relative_error(x, y) < 1e-5
    with torch.inference_mode():
        assert ask(dtype=torch.bfloat16) == "triton"
    assert torch.equal(torch.get_rng_state(), state)
    assert [question.op for question in checked] == ["mlstm", "mlstm_step", "mlstm_step"]
    assert selfcheck._faults == dict.fromkeys(checked)


def test_threads(monkeypatch):
    """Two that ask at the same time find the same."""
    barrier, answers = threading.Barrier(2, timeout=60), []

    def check(_):
        barrier.wait()
        return "it is wrong"

    monkeypatch.setattr(selfcheck, "check", check)
    threads = [threading.Thread(target=lambda: answers.append(ask())) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == ["torch", "torch"]
    assert [verdict["fault"] for verdict in selfcheck.verdicts(CPU).values()] == ["it is wrong"]


def test_env_shows_and_checks_again(monkeypatch):
    """A kernel that was wrong and is mended: `report` shows the old verdict, `--check` finds the new one."""
    monkeypatch.setattr(env, "KERNELS", {"slstm_step": (16,)})
    wrong, asked = (selfcheck.Question(op, F32, (16,) * n, CPU) for op, n in (("mlstm_step", 2), ("slstm_step", 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_recurrent, "log_sigmoid", roughly_log_sigmoid)
        assert selfcheck.ask(wrong)["fault"]
        ((name, holds, figure), (_, other_holds, _)) = env.check_kernels(CPU)
        assert name == f"kernels of {wrong}" and not holds and other_holds and "is off by" in figure
    monkeypatch.setattr(env, "backend_and_reason", lambda op, backend, *_: (backend, ""))
    assert f"{wrong}: checked on " in (report := env.report()) and "is off by" in report
    assert [holds for _, holds, _ in env.check_kernels(CPU)] == [True, True]
    assert f"{wrong}: checked on " in (report := env.report()) and "is off by" not in report
    assert selfcheck._faults[wrong] is None and asked._replace(dtype=torch.bfloat16) in selfcheck._faults


def test_the_copy_beside_a_checkpoint_does_without():
    assert "cells_dispatch.py" in hub.flat_modules() and "cells_selfcheck.py" not in hub.flat_modules()


def test_checks_the_plans_of_many_sequences(monkeypatch):
    """As many as C is kept on chip for in the widest tiles, and more than several programs share a head for."""
    gpu = GPU(major=9, processors=132)
    monkeypatch.setattr(GPU, "of", lambda device: gpu)
    numbers = selfcheck.Numbers(selfcheck.Question("mlstm", torch.bfloat16, (256, 512), torch.device("cpu")), False)
    rows = [selfcheck._rows(numbers, *dims) for dims in ((256, 512), (128, 256), (512, 512))]
    assert rows == [33, 66, 2]
    assert mlstm_launch.on_chip_plan(torch.bfloat16, 256, 512, 33, gpu).output.BV == 128
    assert [selfcheck._slstm_rows(numbers, D) for D in (128, 256, 512)] == [3, 131, 67]
