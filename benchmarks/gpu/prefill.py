"""Compile Triton kernels on a CPU into a cache that a run on a Hopper GPU finds complete.

    python benchmarks/gpu/prefill.py fill DIR/kernels.tar.xz --python-headers HEADERS    # ends with a check: 0 misses
    python benchmarks/gpu/prefill.py check DIR/kernels.tar.xz      # in another process, in any order of --work

`prove.py --out DIR` unpacks it, and counts what it finds. HEADERS is the folder of Python 3.12's Python.h; without it
the launchers are left to the GPU's machine. `same`, there, says whether its Triton is the one that the constants below
describe.

The work runs as it is, on tensors without memory (device "meta") and a driver that launches nothing. What decides
whether Triton finds a kernel is in benchmarks/README.md. Written for triton 3.6.0: what it takes from Triton is not
public.
"""

import argparse
import collections
import contextlib
import functools
import gc
import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia_driver
from triton.compiler import compiler
from triton.runtime import cache as triton_cache
from triton.runtime import driver
from triton.runtime.build import platform_key
from triton.runtime.jit import JITCallable


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `benchmarks` is a package of the checkout


TRITON = "3.6.0"
TARGET = GPUTarget("cuda", 90, 32)
PROCESSORS = 132  # H100 SXM and H200
SHARED_MEMORY = 227 * 1024
# libtriton.so of PyPI's wheel for CPython 3.12, x86-64: the one file in the key that differs between Python versions
LIBTRITON = "28daaa70a904e4f8add754e518533e8a69b94ab8b16431ce77d45f1f25282b87"
PTXAS = "cuda_12.8.r12.8/compiler.35583870_0"
SUFFIX = ".cpython-312-x86_64-linux-gnu.so"
# the last part says whether the machine has the command `file`
PLATFORMS = ("x86_64,Linux,64bit,ELF", "x86_64,Linux,64bit,")


# --- what the cache's keys hold of the other machine -----------------------------------------------------------------


def local_libtriton() -> str:
    return hashlib.sha256((Path(triton.__file__).parent / "_C/libtriton.so").read_bytes()).hexdigest()


@functools.cache
def target_key() -> str:
    """What `triton_key` returns on the other machine: all else in it is the same file in every wheel of a version."""
    key, here = triton_cache.triton_key(), local_libtriton()
    assert triton.__version__ == TRITON and key.count(here) == 1
    return key.replace(here, LIBTRITON)


# --- a GPU that is not there -----------------------------------------------------------------------------------------


class Launchers:
    """The C modules through which Triton launches. `headers`: of the other machine's Python; None: build nothing."""

    def __init__(self, headers: Path | None = None):
        self.headers, self.found, self.missing = headers, set(), set()

    def __call__(self, src: str, name: str, include_dirs=(), **_) -> types.SimpleNamespace:
        keys = [hashlib.sha256((src + platform).encode()).hexdigest() for platform in PLATFORMS]
        managers = [triton_cache.get_cache_manager(key) for key in keys]
        if self.headers and not managers[0].get_file(name + SUFFIX):
            module = self.build(src, include_dirs)
            for manager in managers:
                manager.put(module, name + SUFFIX)
        (self.found if managers[0].get_file(name + SUFFIX) else self.missing).add(keys[0])
        return types.SimpleNamespace(launch=lambda *_: None)

    def build(self, src: str, include_dirs) -> bytes:
        """Linked to an empty library of the driver's name, in whose place the loader there takes the real one."""
        with tempfile.TemporaryDirectory() as folder:
            source, stub, out = (Path(folder) / name for name in ("main.c", "libcuda.so.1", "main.so"))
            (Path(folder) / "empty.c").write_text("")
            source.write_text(src)
            gcc = ["gcc", "-shared", "-fPIC"]
            subprocess.check_call([*gcc, "-Wl,-soname,libcuda.so.1", Path(folder) / "empty.c", "-o", stub])
            flags = [f"-I{path}" for path in (*include_dirs, self.headers)]
            libraries = [f"-L{folder}", "-Wl,--no-as-needed", "-l:libcuda.so.1"]
            subprocess.check_call([*gcc, "-O3", "-s", "-Wno-psabi", source, "-o", out, *libraries, *flags])
            return out.read_bytes()


class Driver:
    """Of the Hopper GPU: kernels are loaded and launched without effect."""

    launcher_cls = nvidia_driver.CudaLauncher

    class utils:
        @staticmethod
        def load_binary(*_):
            return None, None, 0, 0, 1024  # module, function, registers, spills, threads at most

        @staticmethod
        def get_device_properties(_):
            return {"max_shared_mem": SHARED_MEMORY}

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0


@contextlib.contextmanager
def driving(launchers: Launchers) -> Iterator[None]:
    """Triton believes in the GPU, and looks for kernels under the keys of the other machine."""
    key = target_key()
    driver.set_active(Driver())
    with (
        mock.patch.object(triton_cache, "triton_key", lambda: key),
        mock.patch.object(nvidia_driver, "compile_module_from_src", launchers),
        mock.patch.object(nvidia_driver, "library_dirs", list),
    ):
        yield


def value_of(result):
    return lambda *_, **__: result


@contextlib.contextmanager
def hopper_on_meta() -> Iterator[None]:
    """hf_xlstm's launchers take tensors of the device "meta" for tensors on that GPU. Their custom operators, which
    would only work out shapes, run in earnest; what is read from a tensor is a constant."""
    import torch
    from torch.overrides import TorchFunctionMode

    from benchmarks.gpu import harness
    from hf_xlstm.cells import triton_common
    from hf_xlstm.cells.mlstm import triton_ops as mlstm_triton
    from hf_xlstm.cells.slstm import triton_ops as slstm_triton

    answers = {
        torch.Tensor.item: 0.0,
        torch.Tensor.__bool__: True,
        torch.Tensor.__float__: 0.0,
        torch.equal: True,
        torch.testing.assert_close: None,
    }

    class Answers(TorchFunctionMode):
        def __torch_function__(self, function, _, args=(), kwargs=None):
            if function in answers and any(getattr(x, "is_meta", False) for x in args):
                return answers[function]
            result = function(*args, **kwargs or {})
            return 0.0 if function is torch.Tensor.item and result != result else result

    operators = (
        *(mlstm_triton.mlstm_forward, mlstm_triton.mlstm_backward, mlstm_triton.mlstm_step_inplace),
        *(slstm_triton.slstm_forward, slstm_triton.slstm_backward, slstm_triton.slstm_step_inplace),
    )
    with contextlib.ExitStack() as stack:
        for operator in operators:
            stack.enter_context(mock.patch.object(operator, "_abstract_fn", operator._init_fn))
        gpu = triton_common.GPU(major=TARGET.arch // 10, processors=PROCESSORS)
        stack.enter_context(mock.patch.object(triton_common.GPU, "of", value_of(gpu)))
        stack.enter_context(mock.patch.object(triton_common, "unsupported_reason", value_of(None)))
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
            stack.enter_context(mock.patch.object(torch.cuda, name, value_of(None)))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", value_of(False)))
        stack.enter_context(mock.patch.object(harness, "DEVICE", "meta"))
        stack.enter_context(Answers())
        yield


# --- the work --------------------------------------------------------------------------------------------------------


def once(function, *_, **__) -> float:
    """In place of a measurement."""
    function()
    return 1.0


def attempt(name: str, function: Callable, *arguments) -> None:
    try:
        function(*arguments)
    except Exception:
        print(f"BROKEN OFF {name}: {traceback.format_exc(limit=-1)}", file=sys.stderr)


def smoke_jobs() -> None:
    """Every op of the smoke test, and what its model launches in a forward, a backward pass and a step."""
    import torch

    from benchmarks.gpu import smoke

    for job in smoke.jobs():
        if job.name["op"] != "model":
            attempt(job.id, job.run)
    ids = torch.zeros(2, smoke.LENGTH, dtype=torch.long, device="meta")
    attempt("smoke model", train, smoke.model("triton"), ids)
    attempt("smoke model", generate, smoke.model("triton"), 2, smoke.LENGTH)


def ops_jobs(variants: bool) -> None:
    """What benchmarks/gpu/ops.py measures of hf_xlstm."""
    import torch

    from benchmarks.gpu import ops

    def check(op, inputs, *_):
        h = op(**inputs, backend="triton")[0]
        torch.autograd.grad(h, list(inputs.values()), torch.randn_like(h))
        return {}

    measures = ("milliseconds", "milliseconds_cold_allocator", "peak_gigabytes")
    with contextlib.ExitStack() as stack:
        fakes = {"check": check, "kernel_milliseconds": once} | dict.fromkeys(measures, once)
        for name, value in fakes.items():
            stack.enter_context(mock.patch.object(ops, name, value))
        stack.enter_context(mock.patch.object(triton.testing, "do_bench_cudagraph", once))
        for job in ops.variant_jobs() if variants else ops.jobs():
            if job.name["kernel"] == ops.HF_XLSTM:
                attempt(job.id, job.run)


def train(model, ids) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()


def generate(model, batch_size: int, length: int) -> None:
    """A prompt and two tokens. The second goes the way of all others."""
    import torch

    from hf_xlstm import xLSTMCache

    with torch.no_grad():
        cache = xLSTMCache(model.config)
        for n in (length, 1, 1):
            ids = torch.zeros(batch_size, n, dtype=torch.long, device="meta")
            model(ids, use_cache=True, cache=cache)


def models() -> None:
    """What the models of benchmarks/gpu/generation.py and training.py launch."""
    import torch

    from benchmarks.gpu import generation, training

    with mock.patch.dict(os.environ, {"HF_XLSTM_BACKEND": "triton"}):
        for name in (training.HF_XLSTM, training.MIXED):
            for size in training.SIZES:
                model = training.build(name, size)
                for length in training.LENGTHS:
                    ids = torch.zeros(training.TOKENS // length, length, dtype=torch.long, device="meta")
                    attempt(f"{name} {size} {length}", train, model, ids)
        model = generation.build(generation.HF_XLSTM)
        for batch_size, length in (*generation.DECODE, *((1, n) for n in generation.PROMPTS)):
            attempt(f"7B {batch_size} {length}", generate, model, batch_size, length)
        attempt("check", training.check)
        attempt("check", generation.check)


def kernel_tests() -> None:
    """The tests of the kernels, on the CPU since they look at values. Outputs are NaN, which their fixtures make of
    memory that was not written, and NaN passes for right. Tests that break off all the same may launch more there."""
    import pytest
    import torch

    class Plugin:
        def pytest_collection_modifyitems(self, items):
            for module in {item.module for item in items}:
                if hasattr(module, "DEVICE"):
                    module.DEVICE = "cpu"

    def finite(x):
        return torch.ones_like(x, dtype=torch.bool)

    sys.path.insert(0, str(ROOT / "tests"))
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*_triton.py"))]
    with (
        mock.patch.object(torch.cuda, "is_available", value_of(True)),
        mock.patch.object(torch, "isfinite", finite),
        mock.patch.object(torch.Tensor, "isfinite", finite),
        mock.patch.object(torch, "equal", value_of(True)),
        mock.patch.object(torch.testing, "assert_close", value_of(None)),
    ):
        pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", "-rN", *files], plugins=[Plugin()])


WORK: dict[str, Callable[[], None]] = {
    "smoke": smoke_jobs,
    "ops": functools.partial(ops_jobs, variants=False),
    "models": models,
    "variants": functools.partial(ops_jobs, variants=True),
    "tests": kernel_tests,
}


def work(names: list[str]) -> None:
    with hopper_on_meta():
        for name in names:
            WORK[name]()


# --- keys ------------------------------------------------------------------------------------------------------------


def keys_of(kernels: list) -> list[list[str]]:
    """The keys that the source of each kernel can have. A key holds the global constants of the functions that the
    kernel calls only if those functions' own keys were computed before (`DependenciesFinder._update_hash` copies them
    too early): it depends on what the process launched before. This goes through all orders of launches."""
    functions = [x for x in gc.get_objects() if issubclass(type(x), JITCallable)]
    called = [x for x in functions if not any(x is kernel for kernel in kernels)]
    parsed = {id(x): x.parse() for x in functions}  # their hash() is that of their key
    keys = [{} for _ in kernels]

    def forget(functions):
        for x in functions:
            x.hash, x.used_global_vals = None, {}

    def state():
        return [(x.hash, x.used_global_vals) for x in called]

    forget(functions)
    todo, seen = [state()], set()
    with mock.patch.object(JITCallable, "parse", lambda x: parsed[id(x)]):
        while todo:
            before = todo.pop()
            for kernel, found in zip(kernels, keys, strict=True):
                for x, (key, constants) in zip(called, before, strict=True):
                    x.hash, x.used_global_vals = key, constants
                forget([kernel])
                found[kernel.cache_key] = None
                after = tuple((x.hash, tuple(x.used_global_vals)) for x in called)
                if after not in seen:
                    seen.add(after)
                    todo.append(state())
    forget(functions)
    return [list(found) for found in keys]


# --- commands --------------------------------------------------------------------------------------------------------


def record(names: list[str]) -> list[tuple]:
    """What would be compiled: functions, and what Triton has specialised them on. Nothing is."""
    found = {}

    def hook(*, fn, compile, **_):
        data = compile["specialization_data"]
        found.setdefault((fn.module, fn.name, data), (fn.jit_function, data))
        return True  # do not compile

    with driving(Launchers()), mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook):
        work(names)
    return list(found.values())


def compile_item(index: int) -> tuple[list[str], float]:
    """All names under which Triton may look for one compilation, the first of which it gets; and seconds taken."""
    function, data = FOUND[index]
    keys, parts = KEYS[id(function)], []

    def get_cache_key(*arguments, **options):
        parts.append((arguments, options))
        return triton_cache.get_cache_key(*arguments, **options)

    with driving(LAUNCHERS), mock.patch.object(compiler, "get_cache_key", get_cache_key):
        start, function.hash = time.perf_counter(), keys[0]
        kernel = function.preload(data)
        seconds = time.perf_counter() - start
        if LAUNCHERS.headers:
            Driver.launcher_cls(kernel.src, kernel.metadata)
        names = []
        for function.hash in keys:
            key = triton_cache.get_cache_key(*parts[0][0], **parts[0][1])
            names.append(triton_cache._base32(hashlib.sha256(key.encode()).hexdigest()))
    return names, seconds


def fill(args: argparse.Namespace) -> int:
    global FOUND, KEYS, LAUNCHERS
    start = time.perf_counter()
    FOUND, LAUNCHERS = record(args.work), Launchers(args.python_headers)
    print(f"{len(FOUND)} compilations recorded in {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    kernels = {id(function): function for function, _ in FOUND}
    KEYS = dict(zip(kernels, keys_of(list(kernels.values())), strict=True))
    print(f"{len(KEYS)} kernels have {sum(map(len, KEYS.values()))} keys ({time.perf_counter() - start:.0f} s)")
    with tempfile.TemporaryDirectory() as folder:
        cache = str(args.cache or folder)
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_STORE_BINARY_ONLY": "1"}
        start = time.perf_counter()
        if args.python_headers:  # what loads kernels, and asks for the properties of the GPU
            with driving(LAUNCHERS):
                source = Path(nvidia_driver.__file__).with_name("driver.c").read_text()
                LAUNCHERS(source, "cuda_utils", include_dirs=nvidia_driver.include_dirs)
        with multiprocessing.get_context("fork").Pool(args.processes) as pool:
            names, seconds = zip(*pool.imap_unordered(compile_item, range(len(FOUND))), strict=True)
        print(f"compiled in {time.perf_counter() - start:.0f} s; {sum(seconds):.0f} s of kernels one after another")
        aliases = {first: others for first, *others in names if others}
        pack(Path(cache), aliases, args.archive)
    command = [sys.executable, __file__, "check", args.archive, "--work", *args.work]
    return subprocess.call(command)


def pack(cache: Path, aliases: dict[str, list[str]], archive_path: Path) -> None:
    """Only what a hit reads. The lists of files (`__grp__`) hold absolute paths: `unpack` writes them."""
    kinds = (".json", ".cubin", ".so")
    files = [x for x in cache.glob("*/*") if x.suffix in kinds and not x.name.startswith("__grp__")]
    with tarfile.open(archive_path, "w:xz", preset=6) as archive:
        for path in sorted(files, key=lambda x: (x.suffix, x.name, x.stat().st_size)):  # alike beside alike
            archive.add(path, path.relative_to(cache))
        text = json.dumps(aliases).encode()
        info = tarfile.TarInfo("aliases.json")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    for kind in kinds:
        sizes = [x.stat().st_size for x in files if x.suffix == kind]
        print(f"{len(sizes)} {kind}, {sum(sizes) / 2**20:.1f} MiB", end="; ")
    print(f"packed {archive_path.stat().st_size / 2**20:.2f} MiB")


def unpack(archive_path: Path, cache: Path) -> dict[str, int]:
    """Into a folder that TRITON_CACHE_DIR will name. Returns what it held."""
    cache = cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive_path) as archive:
        archive.extractall(cache, filter="data")
    aliases = json.loads((cache / "aliases.json").read_text())
    kernels = [path for path in cache.glob("*/*.json") if not path.name.startswith("__grp__")]
    for metadata in kernels:
        members = {path.name: str(path) for path in metadata.parent.glob(f"{metadata.stem}.*")}
        for name in (metadata.parent.name, *aliases.get(metadata.parent.name, ())):
            (cache / name).mkdir(exist_ok=True)
            (cache / name / f"__grp__{metadata.name}").write_text(json.dumps({"child_paths": members}))
    return {"kernels": len(kernels), "launchers": len([*cache.glob("*/*.so")])}


def check(args: argparse.Namespace) -> int:
    """Runs the work up to the launches, and counts what was found."""
    launchers, counts, missing = Launchers(), collections.Counter(), collections.Counter()

    def listen(*, src, cache_hit, **_):
        counts[cache_hit] += 1
        missing.update([] if cache_hit else [src.name])

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        print(f"unpacked {unpack(args.archive, Path(cache))}")
        with driving(launchers), mock.patch.object(triton.knobs.compilation, "listener", listen):
            work(args.work)
    print(f"kernels: {counts[True]} hits, {counts[False]} misses {dict(missing) or ''}")
    print(f"launchers: {len(launchers.found)} hits, {len(launchers.missing)} misses")
    return int(counts[False] > 0)


def facts() -> dict[str, bool]:
    """What enters every key on the machine with the GPU, and whether it is what the archive was filled for."""
    ptxas = subprocess.check_output([triton.knobs.nvidia.ptxas.path, "--version"], text=True)
    libtriton = local_libtriton()
    return {
        f"triton {triton.__version__}": triton.__version__ == TRITON,
        f"libtriton {libtriton}": libtriton == LIBTRITON,
        f"ptxas {ptxas.split()[-1]}": ptxas.split()[-1] == PTXAS,
        f"variables {get_cache_invalidating_env_vars()}": not get_cache_invalidating_env_vars(),
        f"modules {sysconfig.get_config_var('EXT_SUFFIX')}": sysconfig.get_config_var("EXT_SUFFIX") == SUFFIX,
        f"platform {platform_key()}": platform_key() in PLATFORMS,
    }


def same(_: argparse.Namespace) -> int:
    known = facts()
    for fact, expected in known.items():
        print("same     " if expected else "DIFFERENT", fact)
    return int(not all(known.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (fill, check, same):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        if function is not same:
            command.add_argument("archive", type=Path)
            command.add_argument("--work", nargs="+", choices=WORK, default=[*WORK])
        if function is fill:
            command.add_argument("--python-headers", type=Path, help="folder of the other Python's Python.h")
            command.add_argument("--cache", type=Path, help="a folder to keep: compiles only what has changed since")
            command.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
