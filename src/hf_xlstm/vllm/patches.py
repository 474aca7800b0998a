"""What this plugin changes in vLLM itself, each with its reason."""

import ctypes

import torch
from vllm.platforms import current_platform
from vllm.transformers_utils import model_arch_config_convertor
from vllm.triton_utils import HAS_TRITON
from vllm.v1.worker import mamba_utils


UNLIMITED = 2**31 - 1


def apply_patches(max_model_len: int) -> None:
    """All of them. Repeating it changes nothing."""
    give_default_length(max_model_len)
    if current_platform.is_cpu() and not HAS_TRITON:
        mamba_utils.batch_memcpy = copy_blocks


def give_default_length(max_model_len: int) -> None:
    """An entry in vLLM's table of model types. Without a maximal length in the configuration vLLM takes 2,048 tokens,
    and with one it refuses a larger `--max-model-len`; for a recurrent model neither makes sense."""

    class Convertor(model_arch_config_convertor.ModelArchConfigConvertorBase):
        def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
            length, key = super().derive_max_model_len_and_key()
            if key is not None and length != UNLIMITED:  # somebody wrote a limit into the configuration
                return length, key
            self.hf_config.model_max_length = UNLIMITED  # up to which `--max-model-len` is accepted
            return max_model_len, "hf_xlstm's default"

    model_arch_config_convertor.MODEL_ARCH_CONFIG_CONVERTORS["xlstm"] = Convertor


def copy_blocks(sources: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor) -> None:
    """vLLM's `batch_memcpy` for CPUs: addresses and numbers of bytes. Prefix caching copies states with a Triton
    kernel, on CPUs as well, where vLLM runs without Triton."""
    for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist()):
        ctypes.memmove(target, source, size)
