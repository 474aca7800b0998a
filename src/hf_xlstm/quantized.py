"""Products with weights that torchao has quantised to 8 bits, to decode from on a CPU.

torchao converts the whole matrix at every call, which for one token takes several times as long as the product with
bfloat16 weights. PyTorch has a product that reads the 8 bits as they are. The 4-bit weights of torchao for CPUs, and
those of bitsandbytes, come with products of their own; nothing is done for them here.
"""

from typing import Any

import torch


# Elsewhere the operator is a plain loop.
HAS_KERNEL = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
# Products of more rows do not gain enough on processors that have instructions for bfloat16.
MAX_ROWS = 64


def has_int8_product(x: torch.Tensor, weight: Any) -> bool:
    """Whether `int8_product` computes what torchao's own product of x (..., D_in) and this weight does, and sooner:
    the weight has 8 bits with one scale per row, and x is bfloat16 and has few rows. PyTorch's kernel reads past the
    end of the scales unless 32 divides D_in, and is slow in float32."""
    kind, width = type(weight), x.shape[-1]
    return (
        kind.__name__ == "Int8Tensor"
        and kind.__module__.startswith("torchao.")
        and HAS_KERNEL
        and x.is_cpu
        and x.dtype == weight.dtype == torch.bfloat16
        and 0 < x.numel() <= MAX_ROWS * width
        and width % 32 == 0
        and not torch.is_grad_enabled()
        and weight.act_quant_kwargs is None
        and weight.act_pre_scale is None
        and list(weight.block_size) == [1, width]
        and weight.qdata.is_contiguous()
    )


def int8_product(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias (..., D_out) with a weight of torchao's class `Int8Tensor`, without autograd."""
    if not _is_aligned(weight.qdata):  # a loaded weight starts anywhere in its file
        weight.qdata = weight.qdata.clone()
    rows, scale = x.reshape(-1, x.shape[-1]).contiguous(), weight.scale.flatten().to(x.dtype)
    rows = rows if _is_aligned(rows) else rows.clone()
    y = torch.ops.aten._weight_int8pack_mm(rows, weight.qdata, scale).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def _is_aligned(x: torch.Tensor) -> bool:
    """Whether x starts where PyTorch's kernel can read it: it crashes elsewhere."""
    return x.data_ptr() % 64 == 0
