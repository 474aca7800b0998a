"""The recurrent state of an xLSTM as a Transformers `Cache`: constant in size, whatever the number of tokens seen."""

import json
import os
from collections.abc import Callable

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from .configuration_xlstm import xLSTMConfig


CACHE_FILE = "xlstm_cache.safetensors"
STATE_NAMES = {"mlstm": ("c", "n", "m"), "slstm": ("h", "c", "n", "m")}


class xLSTMCacheLayer(LinearAttentionCacheLayerMixin):
    """State of one block: the tensors of its cell in `recurrent_states`, and the inputs that a causal convolution
    still needs in `conv_states[0]` (B, k - 1, width). All have the batch first, so Transformers' batch operations
    apply.

    The tensors are allocated by the first update and from then on written in place, at addresses that CUDA graphs may
    keep. Where autograd is recording they are replaced instead, since a backward pass may still need the old ones;
    what is stored is detached in any case.
    """

    def __init__(self, layer_type: str, shape: tuple[int, ...]):
        super().__init__(number_of_states=len(STATE_NAMES[layer_type]))
        self.layer_type = layer_type
        self.shape = shape  # as in `state_specs`, to recognise the state of another model
        self._records: list[tuple[int, Callable[[xLSTMCacheLayer, int], None]]] = []

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
        return -1 if self.state is None else self.recurrent_states[0].shape[0]

    def lazy_initialization(self, conv_states=None, recurrent_states=None, state_idx: int = 0) -> None:
        """Allocates what is not there yet, like the given tensors."""
        for x, states, initialized in (
            (conv_states, self.conv_states, self.is_conv_states_initialized),
            (recurrent_states, self.recurrent_states, self.is_recurrent_states_initialized),
        ):
            if x is not None and (not initialized[state_idx] or states[state_idx].shape != x.shape):
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
            self.update_recurrent_state(x, index)

    def record(self, layer: Callable, inputs: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Called before `layer(inputs, cache=self, mask=mask)` if `record_past` is on: keeps what it takes to undo a
        part of it. inputs (B, T, D), mask (B, T) or None."""
        state = None if self.state is None else tuple(x.clone() for x in self.state)
        conv_state = None if self.conv_state is None else self.conv_state.clone()

        # the cache is an argument, so that a copy of this one restores itself
        def replay(cache: "xLSTMCacheLayer", keep: int) -> None:
            cache.restore(state, conv_state)
            if keep:
                layer(inputs[:, :keep], cache=cache, mask=None if mask is None else mask[:, :keep])

        self._records.append((inputs.shape[1], replay))

    @property
    def is_croppable(self) -> bool:
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, at most those recorded since the last crop."""
        if not self.record_past:
            raise RuntimeError("`crop` needs `activate_past_recording` before the forward pass that it takes back.")
        if tokens_to_remove > 0:
            raise RuntimeError("A recurrent state can only be cropped by a negative number, the tokens to remove.")
        recorded = sum(length for length, _ in self._records)
        if -tokens_to_remove > recorded:
            raise RuntimeError(f"Cannot remove {-tokens_to_remove} tokens: {recorded} were recorded.")
        while tokens_to_remove < 0:
            length, replay = self._records.pop()
            tokens_to_remove += length
            if tokens_to_remove >= 0:
                replay(self, tokens_to_remove)
        self._records.clear()

    def restore(self, state: tuple[torch.Tensor, ...] | None, conv_state: torch.Tensor | None) -> None:
        """Puts back an earlier state, None for that before the first token."""
        if state is None:
            self.reset()
            return
        if conv_state is not None:
            self.update_conv_state(conv_state)
        self.update(state)

    def reset(self) -> None:
        super().reset()
        self._records.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def to(self, device: torch.device | str) -> "xLSTMCacheLayer":
        self._map(lambda x: x.to(device))
        return self  # as accelerate expects, which sends the arguments of a layer to its device

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


def _keep_address(x: torch.Tensor) -> torch.Tensor:
    """Tells torch.compile that `x` stays where it is: without, nothing that writes to it becomes a CUDA graph."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
    return x


def _store(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        return new.detach().clone()
    return old.copy_(new) if old is not new else old


class xLSTMCache(Cache):
    """Everything an xLSTM remembers of the tokens it has seen. Create it empty, or let `generate` and the model do so;
    pass it as `past_key_values`. States are float32 whatever the model's dtype.

    Args:
        config: the model's configuration.

    ```python
    >>> cache = xLSTMCache(model.config)
    >>> model(prompt_ids, past_key_values=cache)
    >>> cache.save_pretrained("prompt")  # a few MB, however long the prompt
    >>> model.generate(all_ids, past_key_values=xLSTMCache.from_pretrained("prompt"))
    ```
    """

    # whether `generate` may compile the model for this cache; it sets this when asked for a static cache
    is_compileable = False

    def __init__(self, config: xLSTMConfig):
        super().__init__(layers=[xLSTMCacheLayer(*spec) for spec in state_specs(config)])
        # a tensor, so that counting does not make compiled code specialise on it
        self.seen_tokens = _keep_address(torch.zeros((), dtype=torch.long))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen, padding included."""
        return int(self.seen_tokens)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        """-1 before the first token. A pipeline stage fills the layers of its own blocks only."""
        return max(layer.batch_size for layer in self.layers)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def advance(self, num_tokens: int, device: torch.device) -> None:
        """Counts tokens; the model calls it once per forward pass."""
        if self.seen_tokens.device != device:
            self.seen_tokens = _keep_address(self.seen_tokens.to(device))
        self.seen_tokens.add_(num_tokens)

    def check(self, config: xLSTMConfig, batch_size: int) -> None:
        """Raises ValueError unless this is a cache for that configuration and batch size."""
        specs = state_specs(config)
        if len(specs) != len(self.layers):
            raise ValueError(f"`past_key_values` has {len(self.layers)} layers, the model has {len(specs)}.")
        for index, (layer, spec) in enumerate(zip(self.layers, specs)):
            if (layer.layer_type, layer.shape) != spec:
                raise ValueError(
                    f"`past_key_values` belongs to another configuration: layer {index} is {layer.layer_type} "
                    f"{layer.shape}, the model's is {spec[0]} {spec[1]}."
                )
        if self.batch_size not in (-1, batch_size):
            raise ValueError(f"`past_key_values` has batch size {self.batch_size}, the input has {batch_size}.")

    def reset(self) -> None:
        super().reset()
        self.seen_tokens.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, by running the layers again over the others of their forward
        pass. Needs `activate_past_recording()` before that pass; reaches back to the last crop."""
        tokens_to_remove = int(tokens_to_remove)  # up to 5.17 Transformers passes a tensor, which layers would share
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
        """Writes the state to `xlstm_cache.safetensors` in the directory: one file, of constant size."""
        os.makedirs(save_directory, exist_ok=True)
        tensors = {
            f"layers.{index}.{name}": x.contiguous()
            for index, layer in enumerate(self.layers)
            for name, x in layer.tensors().items()
        }
        metadata = {
            "format": "pt",
            "layers": json.dumps([(layer.layer_type, layer.shape) for layer in self.layers]),
            "seen_tokens": str(self.get_seq_length()),
        }
        save_file(tensors, os.path.join(save_directory, CACHE_FILE), metadata)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, device: torch.device | str = "cpu") -> "xLSTMCache":
        """Reads what `save_pretrained` wrote."""
        cache = cls.__new__(cls)
        with safe_open(os.path.join(directory, CACHE_FILE), framework="pt", device=str(device)) as file:
            metadata = file.metadata()
            specs = [(layer_type, tuple(shape)) for layer_type, shape in json.loads(metadata["layers"])]
            Cache.__init__(cache, layers=[xLSTMCacheLayer(*spec) for spec in specs])
            cache.seen_tokens = _keep_address(torch.tensor(int(metadata["seen_tokens"]), device=device))
            names = set(file.keys())
            for index, layer in enumerate(cache.layers):
                if f"layers.{index}.conv" in names:
                    layer.update_conv_state(file.get_tensor(f"layers.{index}.conv"))
                for state_idx, name in enumerate(STATE_NAMES[layer.layer_type]):
                    if f"layers.{index}.{name}" in names:
                        layer.update_recurrent_state(file.get_tensor(f"layers.{index}.{name}"), state_idx)
        return cache


def state_specs(config: xLSTMConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Type of every block and the numbers its state depends on: heads, head dims, taps of the convolution."""
    mlstm_conv = (config.mlstm_conv_kernel_size,) if config.block_family == "paper" else ()
    shapes = {
        "mlstm": (config.num_heads, config.qk_head_dim, config.v_head_dim, *mlstm_conv),
        "slstm": (config.slstm_num_heads or config.num_heads, config.slstm_head_dim, config.slstm_conv_kernel_size),
    }
    return [(layer_type, shapes[layer_type]) for layer_type in config.layers_block_type]
