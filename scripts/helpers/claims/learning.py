"""Small models between an input and an output map, and how they learn."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from hf_xlstm import xLSTMConfig, xLSTMModel


Batch = tuple[torch.Tensor, torch.Tensor]  # inputs; targets, -100 where there is nothing to say


class Learner(nn.Module):
    """A sequence model between an input and an output map."""

    def __init__(self, encoder: nn.Module, body: nn.Module, width: int, outputs: int):
        super().__init__()
        self.encoder, self.body, self.decoder = encoder, body, nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x)
        x = self.body(x)[0] if isinstance(self.body, nn.LSTM) else self.body(inputs_embeds=x).last_hidden_state
        return self.decoder(x)


def xlstm(layer_types: list[str], width: int, heads: int, **fields) -> xLSTMModel:
    config = xLSTMConfig(
        vocab_size=1,
        hidden_size=width,
        num_hidden_layers=len(layer_types),
        num_heads=heads,
        layer_types=layer_types,
        ffn_round_up_to_multiple_of=1,
        slstm_recurrent_init="uniform",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        **fields,
    )
    return xLSTMModel(config)


def freeze_recurrence(model: xLSTMModel) -> None:
    """An sLSTM that does not see its own output: the gates depend on the input alone, as the mLSTM's do."""
    for block in model.blocks:
        if block.layer_type == "slstm":
            nn.init.zeros_(block.slstm_layer.recurrent_weight).requires_grad_(False)


def learn(model: nn.Module, draw: Callable[[], Batch], loss: Callable, steps: int, lr: float) -> None:
    """Linear warm-up over a tenth of the steps, then cosine to zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    factor = lambda step: min(10 * (step + 1) / steps, 0.5 * (1 + math.cos(math.pi * step / steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(steps):
        inputs, targets = draw()
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
