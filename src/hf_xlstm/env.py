"""`python -m hf_xlstm.env`: versions, devices, and which implementation of the cells would run, and why.

`--check` runs tiny models for a few seconds and tells whether generation is right with the versions at hand. On a GPU
it also checks the Triton kernels, again if that was done before; the first time they compile for a minute or two.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from hf_xlstm_cli import run_verb

from . import __version__
from .cache import xLSTMCache
from .cells import dispatch, selfcheck
from .cells.environment import VARIABLES
from .configuration_xlstm import xLSTMConfig
from .modeling_xlstm import xLSTMForCausalLM
from .ops import backend_and_reason, mlstm, slstm
from .versions import TESTED


PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "triton", "peft", "trl")
# the kinds of stack that take different paths through the model
STACKS: dict[str, dict[str, Any]] = {
    "mLSTM": {"layer_types": ["mlstm", "mlstm"]},
    "sLSTM and mLSTM": {"layer_types": ["slstm", "mlstm"], "slstm_conv_kernel_size": 4},
    "paper": {"layer_types": ["mlstm", "slstm"], "block_family": "paper", "gate_soft_cap": None},
}
# kernels that `--check` checks, beside those that have been checked because a program took them
KERNELS = {"mlstm": (64, 64), "mlstm_step": (64, 64), "slstm": (64,), "slstm_step": (64,)}


def report() -> str:
    """The text that goes into a bug report."""
    lines = [f"hf_xlstm {__version__}", f"python {sys.version.split()[0]}, {platform.platform()}"]
    for name in PACKAGES:
        tested = f" (tested: {' to '.join(TESTED[name])})" if name in TESTED else ""
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}{tested}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed{tested}")
    lines.append(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    for name, meaning in VARIABLES.items():
        lines.append(f"{name}: {os.environ.get(name) or 'not set'} ({meaning})")
    for device in devices():
        for op in ("mlstm", "slstm"):
            x = torch.empty(1, 1, 4, 64, dtype=torch.bfloat16, device=device)
            backend, reason = backend_and_reason(op, "auto", x, x)
            lines.append(f"{op} on {device}: {backend} ({reason})")
        for question, verdict in selfcheck.verdicts(torch.device(device)).items() if has_kernels(device) else ():
            lines.append(f"{question}: checked on {verdict['date']}, {verdict['fault'] or 'right'}")
    return "\n".join(lines)


def devices() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def has_kernels(device: str) -> bool:
    """Whether the Triton kernels support a device. `report` says why they do not."""
    x = torch.empty(1, 1, 4, 64, dtype=torch.bfloat16, device=device)
    try:
        return x.device.type == dispatch.GPU and backend_and_reason("mlstm", "triton", x, x)[0] == "triton"
    except RuntimeError:
        return False


def check() -> list[tuple[str, bool, str]]:
    """What must hold for generation to be right: a name, whether it does, and the figure or error, for each."""
    checks = []
    for device in devices():
        for stack, fields in STACKS.items():
            model = tiny_model(device, fields)
            for name, holds in MODEL_CHECKS.items():
                checks.append((f"{name}, {stack}, {device}", *_outcome(lambda: holds(model))))  # noqa: B023
        for name, error in OP_CHECKS.items():
            checks.append((f"{name}, {device}", *_outcome(lambda: error(device))))  # noqa: B023
        if has_kernels(device):
            checks += check_kernels(torch.device(device))
    return checks


def check_kernels(device: torch.device) -> list[tuple[str, bool, str]]:
    """The Triton kernels beside the torch path, whatever was found before."""
    asked = [selfcheck.Question(op, torch.bfloat16, head_dims, device) for op, head_dims in KERNELS.items()]
    checks = []
    for question in dict.fromkeys([*selfcheck.verdicts(device), *asked]):
        try:
            fault = selfcheck.ask(question)["fault"]
        except Exception as error:
            fault = f"not checked, {type(error).__name__}: {error}"
        checks.append((f"kernels of {question}", fault is None, fault or "as on the torch path"))
    return checks


def _outcome(measure: Callable[[], float]) -> tuple[bool, str]:
    """Whether a relative error is one of rounding; any exception is a finding, too."""
    try:
        error = measure()
    except Exception as failure:
        return False, f"{type(failure).__name__}: {failure}"
    return error < 1e-4, f"relative error {error:.1e}"


def tiny_model(device: str, fields: dict[str, Any]) -> xLSTMForCausalLM:
    """A random model with open gates, so that what it remembers decides what it says."""
    torch.manual_seed(0)
    special: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    sizes: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4}
    model = xLSTMForCausalLM(xLSTMConfig(**sizes, **special, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.2 * torch.randn_like(parameter)
            if name.endswith("igate_preact.bias") and model.config.block_family == "large":
                parameter += 10
    return model.to(device)


def _tokens(model: xLSTMForCausalLM, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, shape, generator=generator).to(model.device)


@torch.no_grad()
def _stepwise(model: xLSTMForCausalLM, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The greedy continuation without a cache and without `generate`."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def _generate_equals_stepwise(model: xLSTMForCausalLM) -> float:
    ids = _tokens(model, 2, 7)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = _stepwise(model, ids, 8)
    texts: list[Any] = [model.generate(ids, **options), model.generate(ids, prefill_chunk_size=3, **options)]
    rows: list[Any] = [model.generate(row[None], prompt_lookup_num_tokens=2, **options) for row in ids]
    texts.append(torch.cat(rows))
    return max((text != expected).double().mean().item() for text in texts)


@torch.no_grad()
def _padded_equals_alone(model: xLSTMForCausalLM) -> float:
    ids, mask = _tokens(model, 2, 9), torch.ones(2, 9, dtype=torch.long, device=model.device)
    mask[1, :4] = 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    alone = _stepwise(model, ids[1:, 4:], 6)
    differ = (together[1:, 4:] != alone).double().mean().item()
    return max(differ, relative_error(model(ids, attention_mask=mask).logits[1:, 4:], model(ids[1:, 4:]).logits))


@torch.no_grad()
def _saved_and_continued(model: xLSTMForCausalLM) -> float:
    ids = _tokens(model, 2, 9)
    cache = xLSTMCache(model.config)
    model(ids[:, :5], cache=cache)
    with tempfile.TemporaryDirectory() as directory:
        cache.save_pretrained(directory)
        cache = xLSTMCache.from_pretrained(directory, device=model.device)
    text: Any = model.generate(ids, cache=cache, max_new_tokens=6, do_sample=False)
    return (text != _stepwise(model, ids, 6)).double().mean().item()


@torch.no_grad()
def _packed_equals_separate(model: xLSTMForCausalLM) -> float:
    ids, positions = _tokens(model, 1, 11), torch.tensor([[*range(4), *range(7)]], device=model.device)
    separate = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
    return relative_error(model(ids, position_ids=positions).logits, separate)


def _mlstm_error(device: str) -> float:
    """The largest error of the output and the gradients of the mLSTM on `device` against the definition in float64."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 70, 2, 16) for _ in range(3)] + [2 * torch.randn(2, 70, 2) for _ in range(2)]
    return _op_error(mlstm, inputs, device)


def _slstm_error(device: str) -> float:
    """The same of the sLSTM."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 20, 4, 2, 16), torch.randn(4, 2, 16, 16) / 4, torch.randn(4, 2, 16)]
    return _op_error(slstm, inputs, device)


def _op_error(op: Callable, inputs: list[torch.Tensor], device: str) -> float:
    def run(inputs: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        h, _ = op(*inputs, backend=backend)
        weight = torch.linspace(-1, 1, h.numel(), dtype=torch.float64).view(h.shape).to(h)
        return [h, *torch.autograd.grad((h * weight).sum(), inputs)]

    actual = run([x.to(device) for x in inputs], "auto")
    expected = run([x.double() for x in inputs], "reference")
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance relative to `expected`, in the Euclidean norm and float64."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()


MODEL_CHECKS = {
    "generate equals stepwise": _generate_equals_stepwise,
    "padded equals alone": _padded_equals_alone,
    "saved and continued": _saved_and_continued,
    "packed equals separate": _packed_equals_separate,
}
OP_CHECKS = {"mlstm against float64": _mlstm_error, "slstm against float64": _slstm_error}


def run(arguments: argparse.Namespace) -> int:
    """Prints the report and, with `--check`, the checks; the exit status is 1 if one of them fails."""
    print(report())
    if not arguments.check:
        return 0
    checks = check()
    for name, holds, figure in checks:
        print(f"{'ok' if holds else 'FAILED':6} {name}: {figure}")
    return 0 if all(holds for _, holds, _ in checks) else 1


if __name__ == "__main__":
    run_verb("env", sys.argv[1:], "python -m hf_xlstm.env")
