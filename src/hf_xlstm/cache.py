"""The recurrent state of an xLSTM as a Transformers `Cache`: constant in size, whatever the number of tokens seen."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from .configuration_xlstm import xLSTMConfig


CACHE_FILE = "xlstm_cache.safetensors"
STATE_NAMES = {"mlstm": ("c", "n", "m"), "slstm": ("h", "c", "n", "m")}


def state_specs(config: xLSTMConfig) -> list[tuple[str, tuple[int, ...]]]:
    """The type of every block and the sizes of its state: heads, head dims, and the taps of a convolution."""
    mlstm_conv = (config.mlstm_conv_kernel_size,) if config.block_family == "paper" else ()
    shapes = {
        "mlstm": (config.num_heads, config.qk_head_dim, config.v_head_dim, *mlstm_conv),
        "slstm": (config.slstm_num_heads or config.num_heads, config.slstm_head_dim, config.slstm_conv_kernel_size),
    }
    return [(layer_type, shapes[layer_type]) for layer_type in config.layers_block_type]


@dataclass(frozen=True)
class _Record:
    """One recorded call `layer(inputs, cache=..., mask=mask)` and the state before it, None before the first token."""

    layer: Callable
    inputs: torch.Tensor  # (B, T, D)
    mask: torch.Tensor | None  # (B, T)
    state: tuple[torch.Tensor, ...] | None
    conv_state: torch.Tensor | None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "_Record":
        return replace(
            self,
            inputs=function(self.inputs),
            mask=None if self.mask is None else function(self.mask),
            state=None if self.state is None else tuple(function(x) for x in self.state),
            conv_state=None if self.conv_state is None else function(self.conv_state),
        )

    def __deepcopy__(self, memo) -> "_Record":
        return self  # never written to, and the layer belongs to the model


class xLSTMCacheLayer(LinearAttentionCacheLayerMixin):
    """State of one block: the tensors of its cell in `recurrent_states`, and the inputs that a causal convolution
    still needs in `conv_states[0]` (B, k - 1, width). All have the batch first, so Transformers' batch operations
    apply.

    The tensors are allocated by the first update and from then on written in place, at addresses that CUDA graphs may
    keep. Where autograd is recording they are replaced instead, since a backward pass may still need the old ones;
    what is stored is detached in any case.

    Args:
        layer_type: `"mlstm"` or `"slstm"`.
        shape: sizes of the state as in `state_specs`; they tell the state of another model.
    """

    # tensors, and their device, or None before the first token
    recurrent_states: dict[int, Any]
    conv_states: dict[int, Any]
    device: Any
    dtype: Any

    def __init__(self, layer_type: str, shape: tuple[int, ...]):
        super().__init__(number_of_states=len(STATE_NAMES[layer_type]))
        self.layer_type = layer_type
        self.shape = shape
        self._records: list[_Record] = []

    @property
    def state(self) -> tuple[torch.Tensor, ...] | None:
        """The cell's state, mLSTM (c, n, m) or sLSTM (h, c, n, m), or None before the first token."""
        if not all(self.has_previous_state.values()):
            return None
        return tuple(self.recurrent_states.values())

    @state.setter
    def state(self, state: tuple[torch.Tensor, ...]) -> None:
        """Starts from these very tensors: gradients of the next forward pass reach them."""
        for index, x in enumerate(state):
            self.recurrent_states[index] = x
            self.is_recurrent_states_initialized[index] = self.has_previous_state[index] = True

    @property
    def conv_state(self) -> torch.Tensor | None:
        return self.conv_states[0] if all(self.has_previous_state.values()) else None

    @property
    def batch_size(self) -> int:
        """-1 before the first token."""
        return -1 if self.state is None else self.recurrent_states[0].shape[0]

    @property
    def writes_in_place(self) -> bool:
        """Whether a step may write the new state into the tensors of the old one."""
        return not (torch.is_grad_enabled() or self.record_past)

    def lazy_initialization(self, conv_states=None, recurrent_states=None, state_idx: int = 0) -> None:
        """Allocates what is not there yet, like the given tensors."""
        for x, states, initialized in (
            (conv_states, self.conv_states, self.is_conv_states_initialized),
            (recurrent_states, self.recurrent_states, self.is_recurrent_states_initialized),
        ):
            if x is None:
                continue
            old = states[state_idx] if initialized[state_idx] else None
            if old is None or old.shape != x.shape or old.dtype != x.dtype:
                self.device, self.dtype = x.device, x.dtype
                states[state_idx] = torch.zeros_like(x, memory_format=torch.contiguous_format, requires_grad=False)
                initialized[state_idx] = True
                _keep_address(states[state_idx])

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        self.lazy_initialization(conv_states=conv_states, state_idx=state_idx)
        self.conv_states[state_idx] = _store(self.conv_states[state_idx], conv_states)
        return self.conv_states[state_idx]

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        self.lazy_initialization(recurrent_states=recurrent_states, state_idx=state_idx)
        self.recurrent_states[state_idx] = _store(self.recurrent_states[state_idx], recurrent_states)
        self.has_previous_state[state_idx] = True
        return self.recurrent_states[state_idx]

    def update(self, state: tuple[torch.Tensor, ...]) -> None:
        """Stores the cell's state after the last token."""
        for index, x in enumerate(state):
            if x is not self.recurrent_states[index]:  # else the step has written into it
                self.update_recurrent_state(x, index)

    def record(self, layer: Callable, inputs: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Keeps what it takes to undo a part of `layer(inputs, cache=self, mask=mask)`; called before it if
        `record_past` is on. inputs (B, T, D), mask (B, T) or None."""
        state = None if self.state is None else tuple(x.clone() for x in self.state)
        conv_state = None if self.conv_state is None else self.conv_state.clone()
        self._records.append(_Record(layer, inputs, mask, state, conv_state))

    @property
    def is_croppable(self) -> bool:
        return True

    def activate_past_recording(self) -> None:
        self.record_past = True

    def deactivate_past_recording(self) -> None:
        """Ends the recording and drops what was recorded."""
        self.record_past = False
        self._records.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, at most those recorded since the last crop."""
        if not self.record_past:
            raise RuntimeError("`crop` needs `activate_past_recording` before the forward pass that it takes back.")
        if tokens_to_remove > 0:
            raise RuntimeError("A recurrent state can only be cropped by a negative number, the tokens to remove.")
        recorded = sum(record.inputs.shape[1] for record in self._records)
        if -tokens_to_remove > recorded:
            raise RuntimeError(f"Cannot remove {-tokens_to_remove} tokens: {recorded} were recorded.")
        while tokens_to_remove < 0:
            record = self._records.pop()
            tokens_to_remove += record.inputs.shape[1]
            if tokens_to_remove >= 0:
                self._restore(record, keep=tokens_to_remove)
        self._records.clear()

    def _restore(self, record: _Record, keep: int) -> None:
        """Puts back the state before a recorded call, then reads its first `keep` tokens again."""
        if record.state is None:
            for state_idx in range(self.number_of_states):
                self.has_previous_state[state_idx] = False
        else:
            if record.conv_state is not None:
                self.update_conv_state(record.conv_state)
            self.update(record.state)
        if keep:
            mask = None if record.mask is None else record.mask[:, :keep]
            record.layer(record.inputs[:, :keep], cache=self, mask=mask)

    def reset(self) -> None:
        super().reset()
        self._records.clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def to(self, device: torch.device | str) -> "xLSTMCacheLayer":
        self._map(lambda x: x.to(device))
        return self  # as accelerate expects, which sends the arguments of a layer to its device

    def leave_inference_mode(self) -> None:
        """Replaces tensors made under `torch.inference_mode`, which nothing outside of it may write to or
        differentiate, by copies."""
        states = (*self.recurrent_states.values(), *self.conv_states.values())
        if any(x is not None and x.is_inference() for x in states):
            self._map(torch.clone)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name: `c`, `n`, `m`, for the sLSTM `h`, and `conv`."""
        named = dict(zip(STATE_NAMES[self.layer_type], self.recurrent_states.values())) | {"conv": self.conv_states[0]}
        return {name: x for name, x in named.items() if x is not None}

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for states in (self.recurrent_states, self.conv_states):
            for index, x in states.items():
                if x is not None:
                    states[index] = _keep_address(function(x))
                    self.device = states[index].device
        self._records = [record.map(function) for record in self._records]


def _keep_address(x: torch.Tensor) -> torch.Tensor:
    """Marks `x` as staying where it is, without which torch.compile makes no CUDA graph of code that writes to it."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
    return x


def _store(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        return new.detach().clone()
    return old.copy_(new) if old is not new else old


class xLSTMCache(Cache):
    """Everything an xLSTM remembers of the tokens it has seen. Create it empty, or let `generate` and the model do so;
    pass it as `cache`. Its size does not depend on the number of tokens. States are float32 whatever the model's dtype
    (float64 in a float64 model); the last inputs of convolutions have the model's.

    Args:
        config: the model's configuration.

    Read a prompt once, keep it, and continue it as often as you like:

    ```python
    >>> cache = xLSTMCache(model.config)
    >>> model(prompt_ids, cache=cache)
    >>> cache.save_pretrained("runs/prompt")  # a few MB, however long the prompt
    >>> model.generate(all_ids, cache=xLSTMCache.from_pretrained("runs/prompt"))  # reads what comes after the prompt
    ```

    `copy.deepcopy(cache)` is another conversation from the same point. `batch_repeat_interleave`, `reorder_cache` and
    `batch_select_indices` work on its rows. After `activate_past_recording()`, `crop(-n)` takes back n tokens.
    """

    layers: list[xLSTMCacheLayer]  # type: ignore[assignment]  # of layers of any kind, in the class above
    #: The `fingerprint` of the weights that it was read by, if it comes from a `StateStore`.
    read_by: str

    def __init__(self, config: xLSTMConfig):
        self._make(state_specs(config))

    def _make(self, specs: list[tuple[str, tuple[int, ...]]]) -> None:
        super().__init__(layers=[xLSTMCacheLayer(*spec) for spec in specs])
        # a tensor, so that counting does not make compiled code specialise on it
        self.seen_tokens = _keep_address(torch.zeros((), dtype=torch.long))
        # `generate` compiles the model for a cache that is asked for as static
        self.is_static = False
        self._is_in_pass = False

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model for it: recording keeps tensors that a graph would reuse."""
        return self.is_static and not self.record_past

    @property
    def record_past(self) -> bool:
        """Whether forward passes are recorded, so that `crop` can take them back."""
        return any(layer.record_past for layer in self.layers)

    def deactivate_past_recording(self) -> None:
        """Ends what `activate_past_recording` began, and drops what was recorded: one state per recorded call."""
        for layer in self.layers:
            layer.deactivate_past_recording()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen, padding included."""
        return int(self.seen_tokens)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        """-1 before the first token. A pipeline stage fills the layers of its own blocks only."""
        return next((size for size in (layer.batch_size for layer in self.layers) if size != -1), -1)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def advance(self, num_tokens: int, device: torch.device) -> None:
        """Counts the tokens of a forward pass; the model calls it at the end of the pass."""
        if self.seen_tokens.device != device:
            self.seen_tokens = _keep_address(self.seen_tokens.to(device))
        self.seen_tokens.add_(num_tokens)
        self._is_in_pass = False

    def prepare(self, config: xLSTMConfig, batch_size: int) -> None:
        """Makes the cache ready for a forward pass, which ends with `advance`.

        Raises:
            ValueError: it belongs to another configuration or batch size.
            RuntimeError: the pass before ended in the middle.
        """
        specs = state_specs(config)
        if len(specs) != len(self.layers):
            raise ValueError(f"`cache` has {len(self.layers)} layers, the model has {len(specs)}.")
        for index, (layer, spec) in enumerate(zip(self.layers, specs)):
            if (layer.layer_type, layer.shape) != spec:
                raise ValueError(
                    f"`cache` belongs to another configuration: layer {index} is {layer.layer_type} {layer.shape}, "
                    f"the model's is {spec[0]} {spec[1]}."
                )
        if self.batch_size not in (-1, batch_size):
            raise ValueError(f"`cache` has batch size {self.batch_size}, the input has {batch_size}.")
        if self._is_in_pass:
            raise RuntimeError(
                "The last forward pass with this `cache` ended in the middle, so that its layers are at different "
                "tokens. Start from a copy made before that pass, or `reset()` it and read the text again."
            )
        self._leave_inference_mode()
        # until `advance`: a pass that ends before (an interrupt, no memory left) has been through some layers only
        self._is_in_pass = True

    def _leave_inference_mode(self) -> None:
        """Before anything is written outside of `torch.inference_mode` to what may have been made under it."""
        if not torch.is_inference_mode_enabled():
            for layer in self.layers:
                layer.leave_inference_mode()
            if self.seen_tokens.is_inference():
                self.seen_tokens = _keep_address(self.seen_tokens.clone())

    def reset(self) -> None:
        """Forgets everything; the tensors stay where they are."""
        self._leave_inference_mode()
        super().reset()
        self.seen_tokens.zero_()
        self._is_in_pass = False

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, by running the layers again over the others of their forward
        pass. Needs `activate_past_recording()` before that pass; reaches back to the last crop."""
        tokens_to_remove = int(tokens_to_remove)  # up to 5.17 Transformers passes a tensor, which layers would share
        self._leave_inference_mode()
        super().crop(tokens_to_remove)
        self.seen_tokens.add_(tokens_to_remove)

    def to(self, device: torch.device | str) -> "xLSTMCache":
        """Moves all states in place and returns the cache."""
        for layer in self.layers:
            layer.to(device)
        self.seen_tokens = _keep_address(self.seen_tokens.to(device))
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(x.nbytes for layer in self.layers for x in layer.tensors().values())

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes the state to `xlstm_cache.safetensors` in the directory: one file of constant size, complete or not
        there at all."""
        if self._is_in_pass:
            raise RuntimeError("A `cache` whose last forward pass ended in the middle cannot be saved.")
        os.makedirs(save_directory, exist_ok=True)
        tensors = {
            f"layers.{index}.{name}": x.contiguous()
            for index, layer in enumerate(self.layers)
            for name, x in layer.tensors().items()
            if layer.state is not None
        }
        metadata = {
            "format": "pt",
            "layers": json.dumps([(layer.layer_type, layer.shape) for layer in self.layers]),
            "tensors": json.dumps({name: [str(x.dtype), list(x.shape)] for name, x in tensors.items()}),
            "seen_tokens": str(self.get_seq_length()),
        }
        metadata["checksum"] = _checksum(tensors, metadata)
        target = os.path.join(save_directory, CACHE_FILE)
        temporary = f"{target}.{uuid.uuid4().hex}"
        try:
            save_file(tensors, temporary, metadata)
            os.replace(temporary, target)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, device: torch.device | str = "cpu") -> "xLSTMCache":
        """Reads what `save_pretrained` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged, cut off, or lacks a tensor.
        """
        path = os.path.join(directory, CACHE_FILE)
        if not os.path.isfile(path):
            raise OSError(f"{path} does not exist.")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            specs = [(layer_type, tuple(shape)) for layer_type, shape in json.loads(metadata["layers"])]
            unknown = {layer_type for layer_type, _ in specs} - STATE_NAMES.keys()
            if unknown:
                raise ValueError(f"it has layers of type {', '.join(sorted(unknown))}")
            seen_tokens = int(metadata["seen_tokens"])
            expected = json.loads(metadata["tensors"]) if "tensors" in metadata else None
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no saved cache, or it is damaged: {error}.") from error
        _check_tensors(path, tensors, specs, expected)
        if metadata.get("checksum") not in (None, _checksum(tensors, metadata)):
            raise ValueError(f"{path} is damaged: its checksum is wrong.")
        cache = cls.__new__(cls)  # the specs come from the file, not from a configuration
        cache._make(specs)
        cache.seen_tokens = _keep_address(torch.tensor(seen_tokens, device=device))
        for index, layer in enumerate(cache.layers):
            for state_idx, name in enumerate(STATE_NAMES[layer.layer_type]):
                if f"layers.{index}.{name}" in tensors:
                    layer.update_recurrent_state(tensors[f"layers.{index}.{name}"], state_idx)
            if f"layers.{index}.conv" in tensors:
                layer.update_conv_state(tensors[f"layers.{index}.conv"])
        return cache


def _check_tensors(
    path: str,
    tensors: dict[str, torch.Tensor],
    specs: list[tuple[str, tuple[int, ...]]],
    expected: dict[str, list] | None,
) -> None:
    """Raises ValueError unless the file holds what was written, and complete states. Files of earlier versions have
    neither a list of tensors nor a checksum."""
    found = {name: [str(x.dtype), list(x.shape)] for name, x in tensors.items()}
    for index, (layer_type, _) in enumerate(specs):
        names = [f"layers.{index}.{name}" for name in STATE_NAMES[layer_type]]
        missing = [name for name in names if name not in tensors]
        if missing and (len(missing) < len(names) or (expected is None and tensors)):
            raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}.")
    if expected is not None and found != expected:
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"{path} is damaged: {', '.join(names)} missing, extra, or of another shape or dtype.")


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of all tensors and of what the file says about them."""
    digest = hashlib.sha256(json.dumps([metadata[name] for name in ("layers", "seen_tokens")]).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


__all__ = ["xLSTMCache", "xLSTMCacheLayer"]
