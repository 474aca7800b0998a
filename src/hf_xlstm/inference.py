"""How weights lie in memory for decoding on CPUs, where a token costs one pass over all of them.

A matrix-vector product is faster in bfloat16 with fewer, larger matrices, and in float32 with the columns of the
matrix contiguous. Both are matters of layout: the parameters keep their names, shapes and values.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel


class JointLinear:
    """Linear layers of the same input, computed as one product where no gradients are needed.

    `pack` makes their bfloat16 weights and biases views into one matrix and one vector. They stay the parameters they
    were, for optimizers and checkpoints alike. Whatever replaces one of them or its module (an adapter, a quantizer,
    `.to()`) ends the joint product, and the layers are called one by one again.
    """

    def __init__(self):
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.sizes: list[int] = []
        self.pointers: list[int] | None = None

    def __call__(self, x: torch.Tensor, *linears: nn.Module) -> Sequence[torch.Tensor]:
        if self.weight is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return [linear(x) for linear in linears]
        if _pointers(linears) != self.pointers:
            self.weight = self.bias = None
            return [linear(x) for linear in linears]
        return F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)

    @torch.no_grad()
    def pack(self, *linears: nn.Module) -> None:
        pointers = _pointers(linears)
        packed = self.weight is not None and pointers == self.pointers
        if pointers is None or packed or any(linear.weight.dtype != torch.bfloat16 for linear in linears):
            return
        self.sizes = [linear.weight.shape[0] for linear in linears]
        self.weight = torch.cat([linear.weight for linear in linears])
        biases = [
            linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears
        ]
        self.bias = torch.cat(biases) if any(linear.bias is not None for linear in linears) else None
        for linear, weight in zip(linears, self.weight.split(self.sizes)):
            linear.weight.data = weight
        if self.bias is not None:
            for linear, bias in zip(linears, self.bias.split(self.sizes)):
                if linear.bias is not None:
                    linear.bias.data = bias
        self.pointers = _pointers(linears)


@torch.no_grad()
def prepare_for_decoding(model: PreTrainedModel) -> None:
    """Lays out all weights of a model on the CPU, unless that is done. `generate` calls it."""
    # the embedding is also the head if they are tied, and stays as it is; another stage of a pipeline may have it
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    for module in model.modules():
        if isinstance(getattr(module, "joint", None), JointLinear):
            module.pack()
        if _pointers([module]) is None or module.weight is embedding or module.weight.dtype != torch.float32:
            continue
        if module.weight.is_contiguous():
            module.weight.data = module.weight.t().contiguous().t()


def _pointers(linears: Sequence[nn.Module]) -> list[int] | None:
    """Where the parameters of plain linear layers on the CPU lie, None if one is something else."""
    pointers = []
    for linear in linears:
        if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
            return None
        weight, bias = linear.weight, linear.bias
        if (
            type(weight) is not nn.Parameter
            or weight.dtype not in (torch.float32, torch.bfloat16)
            or not weight.is_cpu
        ):
            return None
        pointers += [weight.data_ptr(), 0 if bias is None else bias.data_ptr()]
    return pointers
