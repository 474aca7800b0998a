"""What takes the time on one GPU, kernel by kernel: the ops, then whole models. It comes after what is timed: a
profiler has been in the process from here on."""

import functools
from collections.abc import Callable

import torch

from benchmarks.gpu import generation, harness, ops, training
from benchmarks.gpu.harness import Job, Jobs, Model
from benchmarks.peers import HF_XLSTM
from hf_xlstm import xLSTMCache
from hf_xlstm.ops import slstm


LENGTHS = [2048, 65_536]  # of the mLSTM's sequences
SLSTM_SHAPES = [(16, 1024, 128), (16, 1024, 256)]
TRAINED = 2048  # tokens in a sequence


def kernels(make: Callable[[], Callable[[], object]]) -> dict:
    return {"kernel_ms": harness.kernel_milliseconds(make())}


def sequence(S: int, H: int, K: int, V: int) -> Callable[[], object]:
    return ops.passes(ops.native(ops.make_inputs(S, H, K, V))[0])[1]


def slstm_sequence(B: int, T: int, D: int) -> Callable[[], object]:
    inputs = ops.make_slstm_inputs(B, T, D)
    return ops.passes(lambda: slstm(**inputs, backend="triton")[0])[1]


def decode(model: Model, batch: int) -> Callable[[], object]:
    """One token of every sequence, as the first to be generated."""
    cache = xLSTMCache(model().config)
    token = torch.zeros(batch, 1, dtype=torch.long, device=harness.DEVICE)
    return torch.no_grad()(lambda: model()(token, use_cache=True, cache=cache))


def prompt(model: Model, length: int) -> Callable[[], object]:
    ids = torch.zeros(1, length, dtype=torch.long, device=harness.DEVICE)
    return torch.no_grad()(lambda: model()(ids, use_cache=True, logits_to_keep=1))


def step(model: Model, length: int) -> Callable[[], object]:
    ids = torch.zeros(training.TOKENS // length, length, dtype=torch.long, device=harness.DEVICE)

    def run() -> None:
        model()(ids, labels=ids).loss.backward()
        model().zero_grad()

    return run


def jobs() -> Jobs:
    needs = ("smoke/mlstm/*ward/bfloat16/*",)
    for H, K, V in ops.SHAPES:
        for S in LENGTHS:
            name = {"op": "sequence", "H": H, "K": K, "V": V, "S": S}
            yield Job(name, functools.partial(kernels, functools.partial(sequence, S, H, K, V)), needs)
    for B, T, D in SLSTM_SHAPES:
        name = {"op": "slstm_sequence", "B": B, "T": T, "D": D}
        work = functools.partial(slstm_sequence, B, T, D)
        yield Job(name, functools.partial(kernels, work), ("smoke/slstm/*ward/bfloat16/*",))
    model = Model(functools.partial(generation.build, HF_XLSTM))
    for batch, _ in generation.DECODE[:2]:
        name = {"model": HF_XLSTM, "measure": "decode", "batch": batch}
        yield Job(name, functools.partial(kernels, functools.partial(decode, model, batch)), needs)
    name = {"model": HF_XLSTM, "measure": "prompt", "context": generation.PROMPTS[0]}
    yield Job(name, functools.partial(kernels, functools.partial(prompt, model, generation.PROMPTS[0])), needs)
    size = next(iter(training.SIZES))
    for peer in (HF_XLSTM, training.MIXED):
        model = Model(functools.partial(training.build, peer, size))
        name = {"model": peer, "measure": "step", "size": size, "S": TRAINED}
        yield Job(name, functools.partial(kernels, functools.partial(step, model, TRAINED)), needs)
