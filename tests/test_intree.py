"""Against Transformers' own xLSTM: checkpoints of pure-mLSTM models pass both ways and mean the same."""

import copy
import json

import pytest
import torch
import transformers.models.xlstm.modeling_xlstm as in_tree
from common import MIXED, SLSTM, VOCAB_SIZE, relative_error, tiny_config, tiny_model, tokens
from safetensors.torch import load_file

from hf_xlstm import xLSTMConfig, xLSTMForCausalLM


# theirs needs query and key widths that are multiples of 64
SIZES = {"hidden_size": 128, "chunk_size": 16}
VARIANTS = {
    "plain": {},
    "bias": {"use_bias": True},
    "wide": {"hidden_size": 64, "qk_dim_factor": 1.0, "v_dim_factor": 2.0, "num_heads": 2},
    "quiet": {"gate_soft_cap": 1.0, "output_logit_soft_cap": 2.0},
    "eps": {"norm_eps": 1e-3, "eps": 1e-2},
}


def pair(directory, **fields):
    """A model of ours, and the same read by Transformers' class from what it saved."""
    ours = tiny_model(**(SIZES | fields))
    ours.save_pretrained(directory)
    theirs = in_tree.xLSTMForCausalLM.from_pretrained(directory)
    assert type(theirs) is not type(ours)
    return ours, theirs.eval()


def logits_and_gradients(model, ids) -> dict[str, torch.Tensor]:
    """Logits and the gradients of all parameters together, then of each."""
    model.zero_grad()
    outputs = model(ids, labels=ids, use_cache=False)
    outputs.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    everything = torch.cat([gradient.flatten() for gradient in gradients.values()])
    return {"logits": outputs.logits.detach(), "gradients": everything} | gradients


def in_float64(model, ids) -> dict[str, torch.Tensor]:
    """The same, by a model whose norms, gates and logits are not computed in float32 either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return logits_and_gradients(copy.deepcopy(model).double(), ids)


def test_same_parameters(tmp_path):
    ours, theirs = pair(tmp_path)
    shapes = {name: parameter.shape for name, parameter in ours.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in theirs.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 16, 37])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_loss(variant, length, tmp_path):
    ours, theirs = pair(tmp_path, **VARIANTS[variant])
    ids = tokens(2, length)
    assert relative_error(ours(ids).logits, theirs(ids).logits) < 1e-5
    if length > 1:
        assert relative_error(ours(ids, labels=ids).loss, theirs(ids, labels=ids).loss) < 1e-5


# m carries no gradient here and does there: the same up to a large eps
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "eps"])
def test_gradients(variant, tmp_path):
    ours, theirs = pair(tmp_path, **VARIANTS[variant])
    ids = tokens(2, 48)
    actual, expected = in_float64(ours, ids), in_float64(theirs, ids)
    assert relative_error(actual["logits"], expected["logits"]) < 1e-13
    assert relative_error(actual["gradients"], expected["gradients"]) < 1e-11
    for name in expected:  # what an input gate's bias does is undone by the head norm: little is left, of large terms
        assert relative_error(actual[name], expected[name]) < 1e-9, name

    # float32 is 2e-6 to 2e-5 from float64 on these models, whoever computes
    errors = []
    for model in (ours, theirs):
        rounded = logits_and_gradients(model, ids)
        errors.append({name: relative_error(rounded[name], actual[name]) for name in actual})
    assert errors[0]["logits"] < 1e-5 and errors[0]["gradients"] < 2 * errors[1]["gradients"]
    for name, error in errors[0].items():
        assert error < 1e-4, name


@torch.no_grad()
def test_their_checkpoint_in_our_class(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(**SIZES).to_dict()
    theirs = in_tree.xLSTMForCausalLM(in_tree.xLSTMConfig(**config)).eval()
    for parameter in theirs.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    ours, ids = xLSTMForCausalLM.from_pretrained(tmp_path), tokens(2, 37)
    assert relative_error(ours(ids).logits, theirs(ids).logits) < 1e-5
    ours.save_pretrained(tmp_path / "again")
    saved, again = (load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)


@torch.no_grad()
def test_state(tmp_path):
    """Theirs after the prompt: the same c, n and m, up to the layout of m."""
    ours, theirs = pair(tmp_path)
    ids = tokens(2, 37)
    cache, their_cache = ours(ids).cache, theirs(ids, use_cache=True).cache_params
    for index, layer in enumerate(cache.layers):
        c, n, m = their_cache.rnn_state[index]
        state = layer.tensors()
        factor = torch.exp(state["m"] - m.squeeze(-1))
        assert relative_error(state["c"] * factor[..., None, None], c) < 1e-5
        assert relative_error(state["n"] * factor[..., None], n) < 1e-5


def test_greedy_generation(tmp_path):
    ours, theirs = pair(tmp_path)
    options = {"do_sample": False, "max_new_tokens": 20}
    for ids in (tokens(1, 10), tokens(3, 1), tokens(3, 33)):
        assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


@pytest.mark.parametrize("layer_types", [MIXED, SLSTM, ["mlstm", "mlstm", "mlstm", "slstm"]], ids=str)
@pytest.mark.parametrize("cls", ["xLSTMForCausalLM", "xLSTMModel", "xLSTMConfig"])
def test_mixed_checkpoint_is_refused_by_their_class(cls, layer_types, tmp_path):
    """Loudly: it would start what it does not know at random."""
    tiny_model(layer_types=layer_types, num_hidden_layers=len(layer_types)).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="layer_types"):
        getattr(in_tree, cls).from_pretrained(tmp_path)


@torch.no_grad()
def test_kernel_names_of_others_change_nothing(tmp_path):
    """Checkpoints of NX-AI name kernels of packages that nobody needs here."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "chunkwise_kernel": "chunkwise--triton_xl_chunk",
        "sequence_kernel": "native_sequence__triton",
        "step_kernel": "triton",
        "mode": "train_with_padding",
        "inference_state_dtype": "bfloat16",
        "return_last_states": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = tokens(2, 37)
    assert torch.equal(xLSTMForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_config_with_their_names_of_width_and_depth(tmp_path):
    """As in NX-AI/xLSTM-7b: `embedding_dim`, `num_blocks`, and fields that follow from others."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"embedding_dim": config.pop("hidden_size"), "num_blocks": config.pop("num_hidden_layers")}
    config |= {"head_dim": 8, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, ids = xLSTMForCausalLM.from_pretrained(tmp_path), tokens(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert xLSTMConfig.from_pretrained(tmp_path).vocab_size == VOCAB_SIZE
