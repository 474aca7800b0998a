"""Linear layers: products by the faster library, and a prepacked copy of the weights to decode from.

The layers of a block call their `nn.Linear` children through `joint_linear` and `recompute_linear`, which do up to
three things that `layer(x)` does not:

1. On x86 CPUs PyTorch multiplies float32 matrices by MKL. oneDNN is as fast or faster there (but for single rows on
   Intel's), and is asked instead; also for bfloat16 matrices where the processor has no instructions for them.
2. Decoding on such a CPU reads every weight for each token. `PackedWeights`, one copy per model, holds the weights of
   layers with the same input side by side in the layout that oneDNN prefers (*prepacked*), for one product instead of
   up to six. `generate` uses it by itself, other code from `model.pack_for_decoding()` to `model.unpack()`.
3. In training, on any device, `recompute_linear` computes the input of a layer again in the backward pass instead of
   keeping it.

A product stands for a call only where nobody can tell the difference: `is_plain` and `is_watched` say when. Otherwise
both functions call the layer.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from .cells import NAMESPACE
from .cells.numerics import INTEL, NO_BFLOAT16, X86
from .quantized import has_int8_product, int8_product


ONEDNN = torch.backends.mkldnn.is_available() and X86
# Whether oneDNN has products of bfloat16 numbers, with instructions or without: not where AVX-512 is missing.
ONEDNN_HAS_BFLOAT16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# Numbers in a float32 weight below which the call takes longer than the product, and MKL is as good.
MIN_SIZE = 2**16
# Rows from which on a product of bfloat16 numbers is faster in float32, conversions included, if there are no
# instructions for bfloat16.
MIN_WIDENED_ROWS = 16
# Products of more rows gain little from prepacked weights.
MAX_DECODING_ROWS = 64
PACKED_DTYPES = (torch.float32, torch.bfloat16)
# What `nn.Linear` does unless someone, such as a counter of FLOPs, replaces it.
LINEAR, LINEAR_FORWARD = F.linear, nn.Linear.forward


def joint_linear(x: torch.Tensor, *layers: nn.Module) -> Sequence[torch.Tensor]:
    """The outputs of several linear layers for one input: [layer(x) for layer in layers], where it pays as one product
    of their prepacked weights. x (..., D)."""
    packed = None if torch.compiler.is_compiling() else vars(layers[0]).get("packed_weights")
    if not (packed is not None and packed.is_in_step(x)) and is_watched(x):
        return [layer(x) for layer in layers]
    joint = packed.find(x, layers) if packed is not None and packed.in_use else None
    if joint is None:
        return [_linear(x, layer) for layer in layers]
    y = packed_product(x, joint.weight, joint.bias)
    return y.split_with_sizes(joint.sizes, dim=-1) if len(layers) > 1 else (y,)


def recompute_linear(function: Callable[..., torch.Tensor], layer: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """The output layer(function(*inputs)), for which training keeps `inputs` and not the result of the function. The
    function must be cheap and depend on nothing else that wants a gradient."""
    if torch.is_grad_enabled() and not is_watched(*inputs) and is_plain(layer, inputs[0]):
        return _RecomputeLinear.apply(function, layer.weight, layer.bias, *inputs)
    return joint_linear(function(*inputs), layer)[0]


def is_watched(*inputs: torch.Tensor) -> bool:
    """Whether someone may see or change each call of a layer or an operator: a compiler or tracer, a transform of
    torch.func, forward-mode differentiation, autocast, a mode (FLOP counters, fake tensors), a global hook, a
    subclass of tensor as input, or a replacement of PyTorch's own functions."""
    if torch.compiler.is_compiling():
        return True
    for x in inputs:
        if type(x) is not torch.Tensor or x.is_meta or torch.is_autocast_enabled(x.device.type):
            return True
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
        or bool(_has_any_global_hook())
        or torch._C._get_tracing_state() is not None
        or F.linear is not LINEAR
        or nn.Linear.forward is not LINEAR_FORWARD
    )


def is_plain(layer: nn.Module, x: torch.Tensor, weight_class: type = nn.Parameter) -> bool:
    """Whether a product with its weight may stand for a call layer(x): the layer is an `nn.Linear`, no subclass,
    wrapper or parametrization of it; it has no hooks, no other forward (as accelerate gives to offloaded layers); and
    its parameters are its own (those of a DataParallel replica are not, nor pruned ones), of the device and dtype of
    x, the weight is of `weight_class` and the bias of no other class than `nn.Parameter` (as quantised and sharded
    ones are). An x without rows goes to the layer, too."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    return (
        _is_bare(layer)
        and x.ndim > 1
        and x.numel() > 0
        and type(weight) is weight_class
        and weight.dtype == x.dtype
        and weight.device == x.device
        and (
            (bias is None and "bias" in layer._parameters)
            or (type(bias) is nn.Parameter and bias.dtype == x.dtype and bias.device == x.device)
        )
    )


def _is_bare(layer: nn.Module) -> bool:
    """Whether a call of the layer does what `nn.Linear` does, and nothing else."""
    own = layer.__dict__  # asked for every layer in every step: attributes of modules are found slowly
    return type(layer) is nn.Linear and is_unhooked(own) and not ("weight" in own or "bias" in own)


def is_unhooked(own: dict[str, Any]) -> bool:
    """Whether a call of the module with this `__dict__` is one of its class: no hooks, no other `forward`."""
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


# ---- products


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias by oneDNN, without autograd. The weight may be prepacked."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias by the faster library, without autograd."""
    if not _pytorch_is_slower(x, weight):
        return F.linear(x, weight, bias)
    if x.dtype == torch.float32:
        return _onednn(x, weight, bias)
    return _onednn(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _pytorch_is_slower(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN in float32 takes less time than PyTorch's own product x @ weight.T."""
    if not (ONEDNN and x.is_cpu and weight.numel() >= MIN_SIZE):
        return False
    rows = x.numel() // x.shape[-1]
    if x.dtype == torch.bfloat16:
        return NO_BFLOAT16 and rows >= MIN_WIDENED_ROWS
    return x.dtype == torch.float32 and _onednn_is_faster(x.dtype, rows)


def _onednn_is_faster(dtype: torch.dtype, rows: int) -> bool:
    """Whether oneDNN, given weights of a layout that it likes, is faster than PyTorch: not for a single row of float32
    on Intel's processors, where MKL reads the weights as fast and takes a third of the time to begin."""
    return not (INTEL and dtype == torch.float32 and rows == 1)


def _linear(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """layer(x), of a plain `nn.Linear` by the faster library, of one with 8-bit weights by a product that reads these.
    Nobody is watching."""
    if not is_plain(layer, x):
        weight = layer._parameters.get("weight")
        is_int8 = has_int8_product(x, weight) and is_plain(layer, x, type(weight))
        return int8_product(x, weight, layer.bias) if is_int8 else layer(x)
    if not _pytorch_is_slower(x, layer.weight):
        return layer(x)
    if torch.is_grad_enabled():
        return _RecomputeLinear.apply(_identity, layer.weight, layer.bias, x)
    return _product(x, layer.weight, layer.bias)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


class _RecomputeLinear(torch.autograd.Function):
    """The product F.linear(function(*inputs), weight, bias), whose first factor is computed again in the backward
    pass. Its second derivatives are exact: a backward pass that is to be differentiated, or watched, consists of
    PyTorch's own operators."""

    @staticmethod
    def forward(ctx, function, weight, bias, *inputs):
        ctx.function = function
        ctx.save_for_backward(weight, bias, *inputs)
        return _product(function(*inputs), weight, bias)

    @staticmethod
    def backward(ctx, dy):
        weight, bias, *inputs = ctx.saved_tensors
        need_weight, need_bias, *need_inputs = ctx.needs_input_grad[1:]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [x.view_as(x) for x in inputs]  # of its own for each argument, should two be the same tensor
            x = ctx.function(*inputs)
        needed_inputs = [y for y, need in zip(inputs, need_inputs, strict=True) if need]
        # the last: `is_grads_batched`
        if create_graph or is_watched(dy) or torch._C._functorch.is_legacy_batchedtensor(dy):
            with torch.enable_grad():
                y = F.linear(x, weight, bias)
            needed = [p for p, need in ((weight, need_weight), (bias, need_bias)) if need] + needed_inputs
            grads = iter(torch.autograd.grad(y, needed, dy, create_graph=create_graph))
            return None, *(next(grads) if need else None for need in ctx.needs_input_grad[1:])

        dweight = dbias = None
        dinputs = iter(())
        if needed_inputs:
            dinputs = iter(torch.autograd.grad(x, needed_inputs, _product(dy, weight.t())))
        x, dy = x.detach().flatten(0, -2), dy.flatten(0, -2)
        if need_weight:  # faster with the longer side of the result in its rows
            wide = weight.shape[0] > weight.shape[1]
            dweight = _product(x.t(), dy.t()).t().contiguous() if wide else _product(dy.t(), x.t())
        if need_bias:
            dbias = dy.sum(0)
        return None, dweight, dbias, *(next(dinputs) if need else None for need in need_inputs)


# ---- prepacked weights


def packed_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias in the dtype of x, where the weight may be prepacked. Without autograd."""
    if torch.compiler.is_compiling():
        return _opaque_product(x, weight, bias)
    if not weight.is_mkldnn:
        return _product(x, weight, bias)
    if weight.dtype == x.dtype:
        return _onednn(x, weight, bias)
    return _onednn(x.float(), weight, bias).to(x.dtype)


# The same for a compiler, which cannot look into prepacked weights. Not a `custom_op`, which is slow to be called.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("packed_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("packed_product", packed_product, "CompositeExplicitAutograd")
_opaque_product = getattr(torch.ops, NAMESPACE).packed_product


@torch.library.register_fake(f"{NAMESPACE}::packed_product", lib=_library)
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _Source(NamedTuple):
    """A layer, and its parameters when they were copied. Fields, since a step asks after every layer: no calls."""

    layer: weakref.ref
    weight: nn.Parameter
    weight_version: int
    weight_address: int
    bias: nn.Parameter | None
    bias_version: int = 0
    bias_address: int = 0

    @classmethod
    def of(cls, layer: nn.Module) -> "_Source":
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        assert weight is not None
        of_weight = weakref.ref(layer), weight, weight._version, weight.data_ptr()
        return cls(*of_weight, None) if bias is None else cls(*of_weight, bias, bias._version, bias.data_ptr())


class _JointWeight(NamedTuple):
    """The prepacked weights of layers with the same input, one below the other."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype  # of the layers; the copy is float32 where that is faster
    for_many: bool  # whether it was made for several rows
    sizes: list[int]  # output features of each layer
    sources: list[_Source]
    checksums: list[torch.Tensor]  # of the parameters; none if the weight is that of the layer and no copy

    @classmethod
    @torch.no_grad()
    def of(cls, layers: Sequence[nn.Module], rows: int) -> "_JointWeight":
        """A copy for products of so many rows: laid out for one, or for several. A single row times a single float32
        matrix gains nothing from one: there it is the weight itself."""
        dtype = layers[0].weight.dtype
        is_copied = rows > 1 or len(layers) > 1 or dtype != torch.float32
        sources, sizes = [_Source.of(layer) for layer in layers], [len(layer.weight) for layer in layers]
        if not is_copied:
            return cls(layers[0].weight, layers[0].bias, dtype, False, sizes, sources, [])
        weight, bias = torch.cat([layer.weight for layer in layers]), None
        if any(layer.bias is not None for layer in layers):
            bias = [weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
            bias = torch.cat(bias)
        if NO_BFLOAT16 and dtype == torch.bfloat16 and (rows > 1 or not ONEDNN_HAS_BFLOAT16):
            weight, bias = weight.float(), None if bias is None else bias.float()
        if _onednn_is_faster(dtype, rows):
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        joint = cls(weight, bias, dtype, rows > 1, sizes, sources, [])
        joint.checksums.extend(checksum(parameter) for parameter in joint.parameters())
        return joint

    @property
    def nbytes(self) -> int:
        """Of the copy."""
        return sum(x.nbytes for x in (self.weight, self.bias) if x is not None) if self.checksums else 0

    def parameters(self) -> Iterator[nn.Parameter]:
        """What was copied."""
        return (p for source in self.sources for p in (source.weight, source.bias) if p is not None)

    def is_current(self) -> bool:
        """Whether the layers still are plain and hold what was copied, to which no operation has written since."""
        for ref, weight, weight_version, weight_address, bias, bias_version, bias_address in self.sources:
            layer = ref()
            if layer is None or not _is_bare(layer):
                return False
            own = layer.__dict__["_parameters"]
            if own.get("weight") is not weight or own.get("bias") is not bias:
                return False
            if weight._version != weight_version or weight.data_ptr() != weight_address:
                return False
            if bias is not None and (bias._version != bias_version or bias.data_ptr() != bias_address):
                return False
        return True

    def has_same_content(self) -> bool:
        """Whether the checksums are those of what was copied."""
        return all(torch.equal(old, checksum(p)) for old, p in zip(self.checksums, self.parameters()))


def checksum(x: torch.Tensor) -> torch.Tensor:
    """Sums of every (D + 1)st number, D the last dimension, as integers and modulo a power of two: another number
    changes them, and so does another order of rows or columns. Takes as long as reading x."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits, width = x.detach().contiguous().flatten().view(integer), (x.shape[-1] if x.ndim else 1) + 1
    whole = bits.numel() // width * width
    return torch.cat([bits[:whole].view(-1, width).sum(0, dtype=integer), bits[whole:]])


class PackedWeights:
    """A model's prepacked copy of the weights of its linear layers, to decode from on a CPU.

    The model, the one within it and their linear layers share it as their attribute `packed_weights`. While it is in
    use, from `pack_for_decoding` on or during a call of `generate`, the first step (a pass of one token per sequence)
    fills it, layer by layer. A part that is no copy of the weights any more is dropped and made anew. Operations that
    write to a parameter are noticed at once. Writes that PyTorch does not count (through `parameter.data`, NumPy, a
    fused optimizer) are found by checksums, which are compared once in each call of `generate`, and once after
    `pack_for_decoding` or a pass with gradients. A copied or loaded model starts without.

    On a processor without bfloat16 the copy of a bfloat16 model is float32, twice as large, once several sequences
    take a step together; without AVX-512 also for one."""

    def __init__(self):
        self.joint: dict[tuple[int, ...], _JointWeight] = {}  # by the ids of the layers
        self.checked: set[tuple[int, ...]] = set()  # those compared by checksums since the latest such call began
        self.kept_in_use = False
        self.compiled = False  # whether steps are
        self.calls = 0  # of `generate` that are running
        self.stepping: int | None = None  # the thread that takes a step which nobody watches

    def __reduce__(self):  # for copies and pickles
        return PackedWeights, ()

    @property
    def in_use(self) -> bool:
        return self.kept_in_use or self.calls > 0

    @property
    def nbytes(self) -> int:
        return sum(joint.nbytes for joint in list(self.joint.values()))

    def find(self, x: torch.Tensor, layers: tuple[nn.Module, ...]) -> _JointWeight | None:
        """The current copy of the weights of these layers; None where it does not pay, or they must be called."""
        if torch.is_grad_enabled():
            self.checked.clear()  # an optimizer may follow, and PyTorch does not count the writes of fused ones
            return None
        rows = x.numel() // x.shape[-1]
        if not ONEDNN or not x.is_cpu or x.ndim < 2 or not 0 < rows <= MAX_DECODING_ROWS:
            return None
        if x.dtype not in PACKED_DTYPES:
            return None
        key, is_step = tuple(map(id, layers)), x.shape[-2] == 1
        joint = self.joint.get(key)
        is_current = joint is not None and joint.dtype == x.dtype
        if is_current and joint.for_many != (rows > 1):
            if joint.for_many:  # the first step of a call decides which kind of copy it is
                is_current = not is_step or key in self.checked
            elif is_step:  # requests that come and go have it made once more, not again and again
                is_current = False
            else:
                return None
        if not is_current or not joint.is_current() or not (key in self.checked or joint.has_same_content()):
            self.joint.pop(key, None)
            if not is_step:
                return None  # a prompt: the next step makes a copy, in the layout for its number of rows
            if not all(is_plain(layer, x) for layer in layers):
                return None
            if any(p is not None and p.is_inference() for layer in layers for p in layer._parameters.values()):
                return None  # PyTorch counts nothing that is written to them
            joint = self.joint[key] = _JointWeight.of(layers, rows)
        self.checked.add(key)
        return joint

    @contextlib.contextmanager
    def step(self, x: torch.Tensor) -> Iterator[None]:
        """Around the pass of a model over x (B, 1) or (B, 1, D): whether somebody is watching is looked at once."""
        if self.stepping is None and self.in_use and not is_watched(x):
            self.stepping = threading.get_ident()
            try:
                yield
            finally:
                self.stepping = None
        else:
            yield

    def is_in_step(self, x: torch.Tensor) -> bool:
        """Whether this thread is within `step`; then nobody watches what is done with x."""
        return self.stepping == threading.get_ident() and type(x) is torch.Tensor

    @contextlib.contextmanager
    def during_generate(self) -> Iterator[None]:
        self.calls += 1
        self.checked.clear()
        try:
            yield
        finally:
            self.calls -= 1
            if not self.calls and self.checked:  # layers that were replaced or wrapped are not asked for any more
                self.joint = {key: joint for key, joint in list(self.joint.items()) if key in self.checked}


class PackedWeightsMixin:
    """The methods of a model about its `PackedWeights`."""

    #: Whether `generate` may, on a CPU, decode from a prepacked copy of the linear weights, which is kept for the next
    #: calls and takes as much memory as they do (twice as much for several sequences at once in bfloat16, where the
    #: processor lacks that). It does so where the weights fit into a quarter of the memory.
    pack_in_generate: bool = True

    def pack_for_decoding(self, compile: bool = False) -> None:
        """Decode from a prepacked copy of the linear weights from now on, also outside of `generate` and however large
        the model is.

        Args:
            compile: have TorchInductor compile what the blocks of a step compute between the products. The first step
                then takes some ten seconds, and so does the first one of another number of rows. It needs a C++
                compiler.

        The next step without gradients, a pass of one token for each of at most 64 sequences, makes the copy
        (`packed_nbytes`). `unpack()`, `train()` and moving or casting the model drop it. It has no effect on
        processors other than x86, and in dtypes other than float32 and bfloat16. After writing to weights through
        `parameter.data` or NumPy call this again: PyTorch does not count such writes, so that otherwise only the next
        call of `generate` would notice.

        Raises:
            NotImplementedError: `compile` on another processor, in another dtype, or for blocks of the paper or with
                biases.
        """
        if compile and not self._can_compile_steps():
            raise NotImplementedError(
                "`compile` needs a float32 or bfloat16 model on an x86 CPU, of block_family='large', use_bias=False."
            )
        packed = self._attach_packed_weights()
        packed.kept_in_use, packed.compiled = True, compile
        packed.checked.clear()

    def _can_compile_steps(self) -> bool:
        config = self.config
        can_pack = ONEDNN and self.device.type == "cpu" and self.dtype in PACKED_DTYPES
        return self.pack_in_generate and can_pack and config.block_family == "large" and not config.use_bias

    def unpack(self) -> None:
        """Drop the prepacked copy of the weights, and use none until `pack_for_decoding` or the next `generate`."""
        for module in self.modules():
            packed = vars(module).pop("packed_weights", None)
            if packed is not None:
                packed.kept_in_use = packed.compiled = False
                packed.joint = {}

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the prepacked copy of the weights that this model holds now."""
        packed = vars(self).get("packed_weights")
        return 0 if packed is None else packed.nbytes

    def train(self, mode: bool = True):
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.unpack()
        return super()._apply(*args, **kwargs)

    def _step(self, x: torch.Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Around a forward pass over x (B, T) or (B, T, D), which may be a step of decoding."""
        if torch.compiler.is_compiling():
            return contextlib.nullcontext()
        packed = vars(self).get("packed_weights")
        if packed is None or x is None or x.ndim < 2 or x.shape[1] != 1:
            return contextlib.nullcontext()
        return packed.step(x)

    def _attach_packed_weights(self) -> PackedWeights:
        packed = vars(self).get("packed_weights")
        if packed is None:
            packed = self.packed_weights = PackedWeights()
        for module in self.modules():
            if type(module) is nn.Linear or isinstance(module, PackedWeightsMixin):
                module.packed_weights = packed
        return packed

    def _packed_during_generate(self) -> contextlib.AbstractContextManager[None]:
        """Around `generate`: the layers use the prepacked copy, or make it."""
        if not (self.pack_in_generate and ONEDNN and self.device.type == "cpu") or torch.compiler.is_compiling():
            return contextlib.nullcontext()
        if "packed_weights" not in vars(self) and 4 * sum(p.nbytes for p in self.parameters()) > _memory():
            return contextlib.nullcontext()
        return self._attach_packed_weights().during_generate()


def _memory() -> int:
    """Bytes of memory that this machine, or the container this runs in, has; 0 if that is unknown."""
    if not hasattr(os, "sysconf"):
        return 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:
        memory = min(memory, int(file.read()))  # a file that does not exist, or says "max", is no limit
    return memory
