"""What weight decay applies to."""

from torch import nn


def decayed_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters that are drawn towards zero: matrices, convolutions and embeddings; no norms, no
    biases (of gates neither, nor the sLSTM's, which has three axes) and no skips."""
    return [name for name, x in model.named_parameters() if x.ndim >= 2 and name.rpartition(".")[2] != "bias"]


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for an optimizer: `AdamW(weight_decay_groups(model, 0.1), lr=1e-3)`.

    Transformers' Trainer makes the same groups by itself, but for one parameter of the paper's blocks, the
    `learnable_skip`, which it decays. Frozen parameters are left out.
    """
    decayed = set(decayed_parameters(model))
    parameters = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
    return [
        {"params": [x for name, x in parameters if name in decayed], "weight_decay": weight_decay},
        {"params": [x for name, x in parameters if name not in decayed], "weight_decay": 0.0},
    ]
