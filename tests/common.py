"""What several test files need: an error measure, and tiny models whose memory matters."""

import torch

from hf_xlstm import xLSTMCache, xLSTMConfig, xLSTMForCausalLM
from hf_xlstm.configuration_xlstm import PAPER_FIELDS


MLSTM, SLSTM, MIXED = ["mlstm"] * 2, ["slstm"] * 2, ["mlstm", "slstm"]
# the kinds of stack that take different paths through the model
STACKS = {
    "mlstm": {"layer_types": MLSTM},
    "slstm": {"layer_types": SLSTM},
    "mixed": {"layer_types": MIXED},
    "conv": {"layer_types": MIXED, "slstm_conv_kernel_size": 4, "slstm_recurrent_init": "uniform"},
    "paper": PAPER_FIELDS | {"layer_types": MIXED},
}
VOCAB_SIZE = 61


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of finite tensors in the Euclidean norm, relative to `expected`, computed in float64."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def tiny_config(**fields) -> xLSTMConfig:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4}
    # chunks shorter than most inputs; no special tokens, so that generation never ends early and no token is special
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return xLSTMConfig(**(sizes | tokens | {"chunk_size": 8} | fields))


def tiny_model(cls=xLSTMForCausalLM, seed: int = 0, **fields):
    """A small model in eval mode. At its initial values an mLSTM hardly stores anything: here the gates depend on the
    input and the input gates are open, so that what a model remembers decides what it says."""
    torch.manual_seed(seed)
    model = cls(tiny_config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.2 * torch.randn_like(parameter)
            if name.endswith("igate_preact.bias") and model.config.block_family == "large":
                parameter += 10  # from -10; the paper's start at 0
    return model


def tokens(batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB_SIZE, (batch_size, length), generator=generator)


def true_states(cache: xLSTMCache) -> dict[str, torch.Tensor]:
    """What a cache remembers, by layer and name, free of the scale in which c and n happen to be stored."""
    states = {}
    for index, layer in enumerate(cache.layers):
        x = {name: state.double() for name, state in layer.tensors().items()}
        if layer.layer_type == "mlstm":
            factor = torch.exp(x.pop("m"))
            x |= {"c": x["c"] * factor[..., None, None], "n": x["n"] * factor[..., None]}
        else:
            x |= {"c": x["c"] / x["n"], "n": x["m"] + x["n"].log()}
            del x["m"]
        states |= {f"{index}.{name}": state for name, state in x.items()}
    return states


def assert_same_states(actual: xLSTMCache, expected: xLSTMCache, rows=slice(None), tolerance=1e-5) -> None:
    """The given rows of one cache are the other one."""
    actual, expected = true_states(actual), true_states(expected)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert relative_error(actual[name][rows], expected[name]) < tolerance, name
