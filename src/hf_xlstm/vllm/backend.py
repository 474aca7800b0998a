"""What the cells need to know of a batch: which tokens decode, which prefill, and in which blocks their states are."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata
from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadataBuilder
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID


def without_null(blocks: torch.Tensor) -> torch.Tensor:
    """Block numbers as the cells' steps take them: negative for padding, to which vLLM gives its null block."""
    return torch.where(blocks == NULL_BLOCK_ID, -1, blocks)


@dataclass
class Guesses:
    """R requests whose last tokens are guesses, so that the state after each of their tokens is kept. The tensors are
    (R,) but for `blocks`.

    Args:
        start, end: where the tokens of each are, in the part of the batch that decodes or in the one that prefills.
        source: the blocks with the states they go on from.
        blocks: (R, 1 + guesses), where the state is to be after each token.
        longest: tokens of the longest of them.
    """

    start: torch.Tensor
    end: torch.Tensor
    source: torch.Tensor
    blocks: torch.Tensor
    longest: int


@dataclass
class XLSTMMetadata(BaseMambaAttentionMetadata):
    """One batch, requests that decode in front. What is derived is computed by the first layer that asks for it, so
    that a CUDA graph contains the computation."""

    decode_guesses: Guesses | None = None  # with speculation, all that decode
    padded_guesses: Guesses | None = None  # those that prefill and have guesses, see `XLSTMMetadataBuilder`
    padded: torch.Tensor | None = None  # the numbers of the latter among those that prefill

    @cached_property
    def decode_blocks(self) -> torch.Tensor:
        """(R, 1 + guesses): where a decoding request's state is to be after each of its tokens."""
        return self.state_indices_tensor_d.long()

    @cached_property
    def decode_slots(self) -> torch.Tensor:
        """(R,): where it is without speculation, negative for padding."""
        return without_null(self.decode_blocks[:, 0])

    @cached_property
    def prefill_blocks(self) -> torch.Tensor:
        """(N,): where the state of a request that prefills is."""
        return self.state_indices_tensor_p.long()


class XLSTMMetadataBuilder(ShortConvAttentionMetadataBuilder):
    """Makes the metadata of a batch. It has nothing to do with the convolutions of its base, which is the plainest of
    those to which vLLM says how many tokens of a request are guesses.

    Where the state of a request is, after guesses, the builder keeps account of itself: vLLM says how many tokens of
    the request are final, and `tokens_seen` how many of them the state in its first block has seen. The difference is
    the number of the block. vLLM's own count does not serve: a request that sits out a step, because the batch had no
    room for it, comes back with a count of 1.

    A prompt of one token that joins requests which decode is padded by vLLM to the length of a request with guesses.
    It is among those that prefill, and the state after its last token is not the one to go on from.
    """

    metadata_cls = XLSTMMetadata
    needs_causal_conv1d_metadata = False
    # graphs of several tokens per request, for speculation, were never run
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens_seen = torch.empty(0)  # (blocks,), by the state in a block that is some request's first

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args, **kwargs):
        if not self.use_spec_decode:
            return super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
        batch, block_count, most = common_attn_metadata, self.block_count(), 1 + self.num_spec_tokens
        if len(self.tokens_seen) != block_count:
            self.tokens_seen = torch.zeros(block_count, dtype=torch.int64, device=batch.seq_lens.device)
        blocks, known = batch.block_table_tensor[:, :most].long(), batch.compute_num_computed_tokens().long()
        accepted = known - self.tokens_seen[blocks[:, 0]] + 1
        kwargs["num_accepted_tokens"] = accepted.clamp(1, most)
        metadata = super().build(common_prefix_len, batch, *args, **kwargs)

        count, row = metadata.num_decodes, torch.arange(batch.num_reqs)
        decodes, lengths = (row < count).to(blocks.device), batch.query_start_loc_cpu.diff()
        torch._assert_async(
            (((accepted >= 1) & (accepted <= most)) | ~decodes | (blocks[:, 0] == NULL_BLOCK_ID)).all(),
            "A request goes on from a token after which no state was kept: vLLM took back more than guesses.",
        )
        guessed = kwargs.get("num_decode_draft_tokens_cpu")
        padded = torch.zeros_like(row, dtype=torch.bool) if guessed is None else (row >= count) & (guessed > 0)
        stepwise = decodes | padded.to(blocks.device)
        self.tokens_seen[blocks[:, 0]] = known + torch.where(stepwise, 1, batch.query_start_loc.diff())

        start, end = batch.query_start_loc[:-1].long(), batch.query_start_loc[1:].long()
        if count:
            source = blocks[:count].gather(1, metadata.num_accepted_tokens[:count, None] - 1).squeeze(1)
            guesses = Guesses(start[:count], end[:count], source, blocks[:count], int(lengths[:count].max()))
            metadata = replace(metadata, decode_guesses=guesses)
        if padded.any():
            rows = padded.nonzero().squeeze(1).to(blocks.device)
            start, end = (x[rows] - metadata.num_decode_tokens for x in (start, end))
            guesses = Guesses(start, end, blocks[rows, 0], blocks[rows], int(lengths[padded].max()))
            metadata = replace(metadata, padded_guesses=guesses, padded=rows - count)
        return metadata

    def block_count(self) -> int:
        layers = self.vllm_config.compilation_config.static_forward_context
        return len(layers[self.layer_names[0]].kv_cache[0])


class XLSTMBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "XLSTM"

    @staticmethod
    def get_builder_cls() -> type[XLSTMMetadataBuilder]:
        return XLSTMMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True
