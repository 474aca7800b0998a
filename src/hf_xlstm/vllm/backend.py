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
class XLSTMMetadata(BaseMambaAttentionMetadata):
    """One batch, requests that decode in front. What is derived is computed by the first layer that asks for it, so
    that a CUDA graph contains the computation."""

    max_decode_len: int = 1  # tokens of the longest decoding request: more than one only with speculation

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
    """vLLM hands the numbers of accepted tokens to builders of a fixed list of classes only. This derives from the
    plainest of them, and has nothing to do with its convolution."""

    metadata_cls = XLSTMMetadata
    needs_causal_conv1d_metadata = False
    # graphs of several tokens per request, for speculation, were never run
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args, **kwargs):
        metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
        if not self.use_spec_decode or metadata.num_decodes == 0:
            return metadata
        lengths = common_attn_metadata.query_start_loc_cpu[: metadata.num_decodes + 1].diff()
        return replace(metadata, max_decode_len=int(lengths.max()))


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
