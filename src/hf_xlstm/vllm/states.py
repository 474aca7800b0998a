"""Layers whose recurrent states live in vLLM's cache blocks.

Shapes: T tokens of the whole batch, R requests that decode, N requests that prefill, H heads of this rank.
"""

from math import prod
from typing import Protocol

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from ..configuration_xlstm import xLSTMConfig
from .backend import Guesses, XLSTMBackend, XLSTMMetadata, without_null


Tensors = tuple[torch.Tensor, ...]


def state_shapes(config: xLSTMConfig, layer_type: str, tp_size: int) -> list[tuple[int, ...]]:
    """The tensors of a layer's state on one rank, without the batch: the cell's, then the inputs that a convolution
    still needs.

    Raises:
        ValueError: the heads cannot be split over the ranks.
    """
    if layer_type == "mlstm":
        name, heads = "num_heads", config.num_heads
        taps, width = config.mlstm_conv_kernel_size if config.block_family == "paper" else 0, config.v_dim
    else:
        name, heads = "slstm_num_heads or num_heads", config.slstm_num_heads or config.num_heads
        taps, width = config.slstm_conv_kernel_size, config.hidden_size
    if heads % tp_size:
        raise ValueError(
            f"tensor_parallel_size must divide {name}, since every rank has whole heads: got {tp_size} and {heads}."
        )
    heads //= tp_size
    if layer_type == "mlstm":
        cell = [(heads, config.qk_head_dim, config.v_head_dim), (heads, config.qk_head_dim), (heads,)]
    else:
        cell = [(heads, config.slstm_head_dim)] * 4
    return cell + ([(taps - 1, width // tp_size)] if taps > 1 else [])


def block_shape(config: xLSTMConfig, tp_size: int) -> tuple[int]:
    """One flat row of float32 numbers, as long as the largest state. With blocks of one size all layers make one
    group, with one table of blocks; what a smaller state leaves of its row is lost."""
    return (max(sum(map(prod, state_shapes(config, kind, tp_size))) for kind in set(config.layers_block_type)),)


class Recurrence(Protocol):
    """A cell or a convolution, as `StatefulLayer.over_batch` runs it."""

    def sequence(self, inputs: Tensors, state: Tensors | None, bounds: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """Output and new states of N packed requests, inputs (T, ...), bounds (N + 1,). No state means zeros."""

    def step(self, inputs: Tensors, pools: Tensors, slots: torch.Tensor) -> torch.Tensor:
        """Output of one token each of R requests, inputs (R, ...). Their states are `pool[slots]` and are changed in
        place; a negative slot is padding."""


class StatefulLayer(nn.Module, MambaBase):
    """A layer with a cell, and perhaps a convolution before it. vLLM finds it by its name, allocates the blocks of
    `get_state_shape` and puts them into `kv_cache`. They are not cleared for a new request."""

    kv_cache: Tensors

    def __init__(self, vllm_config: VllmConfig, layer_type: str, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.tp_size = get_tensor_model_parallel_world_size()
        self.prefix = prefix
        self.state_shapes = state_shapes(config, layer_type, self.tp_size)
        cell_tensors = {"mlstm": 3, "slstm": 4}[layer_type]
        self.cell_state, self.conv_state = slice(cell_tensors), slice(cell_tensors, None)
        self.block_shape = block_shape(config, self.tp_size)
        self.kv_cache = (torch.empty(0),)
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"There are two layers named {prefix}.")
        context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.CUSTOM

    def get_attn_backend(self) -> type[XLSTMBackend]:
        return XLSTMBackend

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return (self.block_shape,)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,)

    @property
    def metadata(self) -> XLSTMMetadata | None:
        """None in the run in which vLLM measures the memory in use."""
        metadata = get_forward_context().attn_metadata
        return None if metadata is None else metadata[self.prefix]

    def state_pools(self) -> Tensors:
        """Views of all states, (blocks, ...) each."""
        (rows,), offset, pools = self.kv_cache, 0, []
        for shape in self.state_shapes:
            pools.append(rows[:, offset : offset + prod(shape)].unflatten(1, shape))
            offset += prod(shape)
        return tuple(pools)

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution before the cell, `self.conv`, over all tokens of the batch, (T, D) to (T, D)."""
        if not self.conv.past:
            return self.conv.over_window(x)
        return self.over_batch(self.conv, (x,), self.conv_state)

    def over_batch(self, recurrence: Recurrence, inputs: Tensors, parts: slice) -> torch.Tensor:
        """A recurrence over all tokens of the batch, inputs (T, ...) each, from the states in their blocks and back
        into them. `parts` says which of the state's tensors it has."""
        metadata, length = self.metadata, len(inputs[0])
        if metadata is None:
            bounds = torch.tensor([0, length], device=inputs[0].device, dtype=torch.int32)
            return recurrence.sequence(inputs, None, bounds)[0]
        decoding, prefilling = metadata.num_decode_tokens, metadata.num_prefill_tokens
        pools, outputs = self.state_pools()[parts], []
        if decoding:
            rows = tuple(x[:decoding] for x in inputs)
            if metadata.decode_guesses is None:
                outputs.append(recurrence.step(rows, pools, metadata.decode_slots))
            else:
                outputs.append(verify(recurrence, rows, pools, metadata.decode_guesses))
        if prefilling:
            rows = tuple(x[decoding : decoding + prefilling] for x in inputs)
            blocks, known = metadata.prefill_blocks, metadata.has_initial_states_p
            # where, and not a product: what a block holds from before may be anything, NaN included
            state = tuple(torch.where(known.view(-1, *(1,) * (x.ndim - 1)), x[blocks], 0.0) for x in pools)
            output, final_state = recurrence.sequence(rows, state, metadata.query_start_loc_p)
            for pool, x in zip(pools, final_state, strict=True):
                pool[blocks] = x.to(pool.dtype)
            outputs.append(output)
            if metadata.padded_guesses is not None:  # the output is right, but it takes the state after every token
                for pool, x in zip(pools, state, strict=True):
                    pool[metadata.padded_guesses.source] = x[metadata.padded]
                verify(recurrence, rows, pools, metadata.padded_guesses)
        padding = length - decoding - prefilling
        if padding:
            outputs.append(outputs[0].new_zeros(padding, *outputs[0].shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def verify(recurrence: Recurrence, inputs: Tensors, pools: Tensors, guesses: Guesses) -> torch.Tensor:
    """Decoding with guesses: a request has one or more tokens, and a block for its state after each of them. It goes
    on from the state after the last token that was accepted in the step before, whichever block that is in.

    The loop is over the tokens of a request, all requests at once; nothing is read on the host. A request without a
    t-th token works on vLLM's null block, and its output goes into a row that is thrown away.
    """
    source, total, output = guesses.source, len(inputs[0]), None
    for t in range(guesses.longest):
        token = guesses.start + t
        active = token < guesses.end
        source, target = (torch.where(active, x, NULL_BLOCK_ID) for x in (source, guesses.blocks[:, t]))
        for pool in pools:
            pool[target] = pool[source]
        row = torch.where(active, token, 0)
        output_t = recurrence.step(tuple(x[row] for x in inputs), pools, without_null(target))
        if output is None:
            output = output_t.new_zeros(total + 1, *output_t.shape[1:])
        output[torch.where(active, token, total)] = output_t
        source = target
    return output[:total]


def sharded(parameter: nn.Parameter, dim: int = 0) -> None:
    """Has `parameter`, this rank's part, loaded from a weight that is split over ranks along `dim`."""
    set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(dim)})
