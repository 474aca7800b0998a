"""Revising storage decisions: the value of the highest score so far, at length 128."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from hf_xlstm import xLSTMConfig
from hf_xlstm.cells.slstm.reference import slstm_cell, zero_slstm_state
from hf_xlstm.layers import MultiHeadNorm, SLSTMLayer

from .learning import Batch, Learner, learn, xlstm
from .measuring import row


TITLE = "Revising storage decisions: the value of the highest score so far, at length 128"


class SigmoidGates(SLSTMLayer):
    """The sLSTM layer with an input gate sigmoid(i~) instead of exp(i~): same parameters, recurrence, head norm.

    Without the normalizer this is the cell of an LSTM, c_t = f c_{t-1} + i z, h_t = o c_t."""

    def __init__(self, config: xLSTMConfig, normalized: bool):
        super().__init__(config, layer_idx=0, multihead_norm=MultiHeadNorm(config.hidden_size, config.norm_eps))
        self.normalized = normalized

    def forward(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        x = x.unflatten(-1, (-1, self.head_dim))
        gates = torch.stack([gate(x) for gate in (self.igate, self.fgate, self.zgate, self.ogate)], dim=2) + self.bias
        state, outputs = zero_slstm_state(gates, len(gates)), []
        for x in gates.unbind(1):
            i, f, z, o = (x + torch.einsum("ghoi,bhi->bgho", self.recurrent_weight, state[0])).unbind(1)
            if self.normalized:
                state = slstm_cell(torch.stack([F.logsigmoid(i), f, z, o], dim=1), state)
            else:
                c = f.sigmoid() * state[1] + i.sigmoid() * z.tanh()
                state = (o.sigmoid() * c, c)
            outputs.append(state[0])
        return self.multihead_norm(torch.stack(outputs, dim=1))


def measure(seeds: int, output: Path) -> list[dict]:
    """With exponential gates a later token can outweigh everything stored before; with those of an LSTM it cannot.

    The third model shows which part does it: exp and sigmoid differ where they saturate, and far below that a
    sigmoid is an exponential. Divided by the sum of its weights, it can learn to do the same.
    """

    def draw(batch: int = 32, length: int = 64) -> Batch:
        scores, values = torch.randn(batch, length), torch.rand(batch, length)
        highest = torch.cummax(scores, dim=1).indices
        return torch.stack([scores, values], dim=-1), values.gather(1, highest)

    def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(prediction.squeeze(-1), target)

    def error(normalized: bool | None, seed: int) -> float:
        torch.manual_seed(seed)
        body = xlstm(["slstm"], width=32, heads=4)
        if normalized is not None:
            layer = SigmoidGates(body.config, normalized)
            layer.load_state_dict(body.blocks[0].slstm_layer.state_dict())
            body.blocks[0].slstm_layer = layer
        model = Learner(nn.Linear(2, 32), body, width=32, outputs=1)
        learn(model, draw, squared_error, steps=1500, lr=3e-2)
        inputs, targets = draw(1000, 128)
        with torch.no_grad():
            return squared_error(model(inputs)[:, -1], targets[:, -1]).item()

    exponential, sigmoid, normalized = ([error(kind, seed) for seed in range(seeds)] for kind in (None, False, True))
    return [
        row("squared error, sLSTM", exponential),
        row("squared error, sigmoid gates as in an LSTM", sigmoid),
        row("ratio", [x / y for x, y in zip(exponential, sigmoid, strict=True)], at_most=1 / 3),
        row("squared error, sigmoid gates with the normalizer of the sLSTM", normalized),
    ]
