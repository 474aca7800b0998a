"""Bad input: a clear error that names the argument, before any work, with nothing changed."""

import copy
import json
import pickle

import pytest
import torch
from common import MIXED, tiny_config, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from hf_xlstm import xLSTMCache
from hf_xlstm.ops import mlstm, mlstm_step, slstm, slstm_step


# ---- configuration: field and value, and what the message must say


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 30}, r"`hidden_size` must be divisible by `num_heads`, got 30 and 4"),
        ({"qk_dim_factor": 0.3}, r"`qk_dim` must be divisible by `num_heads`, got 9 and 4"),
        ({"v_dim_factor": 0.7}, r"`v_dim` must be divisible by `num_heads`, got 22 and 4"),
        (
            {"layer_types": MIXED, "slstm_num_heads": 5},
            r"`hidden_size` must be divisible by `slstm_num_heads`, got 32 and 5",
        ),
        ({"layer_types": ["mlstm"]}, r"`layer_types`.*`num_hidden_layers` is 2, got 1"),
        ({"layer_types": ["mlstm", "lstm"]}, r"`layer_types`.*mlstm, slstm, got lstm"),
        ({"chunk_size": 0}, r"`chunk_size` must be positive, got 0"),
        ({"backend": "cuda"}, r"`backend` must be one of auto, triton, torch, reference, got 'cuda'"),
        ({"slstm_recurrent_init": "ones"}, r"`slstm_recurrent_init` must be one of zeros, uniform, got 'ones'"),
        ({"weight_mode": "split"}, r"`weight_mode` must be one of single, fused, got 'split'"),
        ({"hidden_size": 0}, r"`hidden_size` must be positive, got 0"),
        ({"num_hidden_layers": 0}, r"`num_hidden_layers` must be positive, got 0"),
        ({"num_heads": -1}, r"`num_heads` must be positive, got -1"),
        ({"vocab_size": 0}, r"`vocab_size` must be positive, got 0"),
        ({"qk_dim_factor": 0.001}, r"`qk_dim` must be positive, got 0"),
        ({"ffn_proj_factor": 0.0}, r"`ffn_proj_factor` must be positive, got 0.0"),
        ({"max_inference_chunksize": 0}, r"`max_inference_chunksize` must be positive, got 0"),
        ({"slstm_conv_kernel_size": -1}, r"`slstm_conv_kernel_size` must be 0 or more, got -1"),
        ({"slstm_num_heads": 0}, r"`slstm_num_heads` must be positive, got 0"),
    ],
    ids=str,
)
def test_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize("fields", [{"hidden_size": "wide"}, {"num_heads": 2.5}, {"layer_types": "mlstm"}], ids=str)
def test_configuration_types(fields):
    (name,) = fields
    with pytest.raises(Exception, match=name):
        tiny_config(**fields)


# ---- ops


def mlstm_arguments() -> dict:
    B, T, H, K, V = 2, 6, 3, 4, 5
    state = (torch.zeros(B, H, K, V), torch.zeros(B, H, K), torch.zeros(B, H))
    q, k, v, gate = torch.ones(B, T, H, K), torch.ones(B, T, H, K), torch.ones(B, T, H, V), torch.ones(B, T, H)
    return {"q": q, "k": k, "v": v, "igate": gate, "fgate": gate, "initial_state": state}


def slstm_arguments() -> dict:
    B, T, H, D = 2, 6, 3, 4
    weights = {"recurrent_weight": torch.ones(4, H, D, D), "bias": torch.ones(4, H, D)}
    return {"gates": torch.ones(B, T, 4, H, D), **weights, "initial_state": (torch.ones(B, H, D),) * 4}


OPS = {"mlstm": (mlstm, mlstm_arguments), "slstm": (slstm, slstm_arguments)}
BAD_ARGUMENTS = [
    ("mlstm", "q", lambda q: q[:, 0], r"`q` must have shape \(B, T, H, K\), got \(2, 3, 4\)"),
    ("mlstm", "k", lambda k: k[..., :3], r"`k` must have shape \(2, 6, 3, 4\), got \(2, 6, 3, 3\)"),
    ("mlstm", "v", lambda v: v[:, :5], r"`v` must have shape \(2, 6, 3, 5\), got \(2, 5, 3, 5\)"),
    ("mlstm", "v", lambda v: v[0], r"`v` must have shape \(B, T, H, V\), got \(6, 3, 5\)"),
    ("mlstm", "igate", lambda x: x[..., None], r"`igate` must have shape \(2, 6, 3\), got \(2, 6, 3, 1\)"),
    ("mlstm", "fgate", lambda x: x[:1], r"`fgate` must have shape \(2, 6, 3\), got \(1, 6, 3\)"),
    ("mlstm", "q", lambda q: q.long(), r"`q` must have a floating dtype, got torch.int64"),
    ("mlstm", "k", lambda k: k.double(), r"`k` must have the dtype of `q`, torch.float32, got torch.float64"),
    ("mlstm", "v", lambda v: v.int(), r"`v` must have a floating dtype, got torch.int32"),
    ("mlstm", "igate", lambda x: x.long(), r"`igate` must have a floating dtype, got torch.int64"),
    ("mlstm", "v", lambda v: v.to("meta"), r"`v` must be on cpu.*got meta"),
    ("mlstm", "fgate", lambda x: x.to("meta"), r"`fgate` must be on cpu.*got meta"),
    ("mlstm", "initial_state", lambda s: s[:2], r"`initial_state` must be a tuple \(c, n, m\)"),
    ("mlstm", "initial_state", list, r"`initial_state` must be a tuple \(c, n, m\), got list"),
    ("mlstm", "initial_state", lambda s: (s[0].mT, *s[1:]), r"`initial_state c` .*\(2, 3, 4, 5\), got \(2, 3, 5, 4\)"),
    ("mlstm", "initial_state", lambda s: (s[0], s[1], s[2][..., None]), r"`initial_state m` .*got \(2, 3, 1\)"),
    ("mlstm", "initial_state", lambda s: (s[0], s[1].half(), s[2]), r"`initial_state n` .*float32, got torch.float16"),
    ("slstm", "gates", lambda x: x[:, 0], r"`gates` must have shape \(B, T, 4, H, D\), got \(2, 4, 3, 4\)"),
    ("slstm", "gates", lambda x: x[:, :, :3], r"`gates` must hold the 4 gates.*got \(2, 6, 3, 3, 4\)"),
    ("slstm", "gates", lambda x: x.long(), r"`gates` must have a floating dtype, got torch.int64"),
    ("slstm", "recurrent_weight", lambda x: x[..., :3], r"`recurrent_weight` must have shape \(4, 3, 4, 4\)"),
    ("slstm", "bias", lambda x: x.flatten(1), r"`bias` must have shape \(4, 3, 4\), got \(4, 12\)"),
    ("slstm", "bias", lambda x: x.long(), r"`bias` must have a floating dtype, got torch.int64"),
    ("slstm", "bias", lambda x: x.to("meta"), r"`bias` must be on cpu.*got meta"),
    ("slstm", "initial_state", lambda s: s[:3], r"`initial_state` must be a tuple \(h, c, n, m\)"),
    ("slstm", "initial_state", lambda s: (*s[:3], s[3][:1]), r"`initial_state m` .*\(2, 3, 4\), got \(1, 3, 4\)"),
]


@pytest.mark.parametrize("op, name, spoil, message", BAD_ARGUMENTS)
def test_op_arguments(op, name, spoil, message):
    function, make_arguments = OPS[op]
    arguments = make_arguments()
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ValueError, match=message):
        function(**arguments)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, r"`mask` must have shape \(2, 6\), got \(2, 5\)"),
        ({"mask": torch.ones(2, 6)}, r"`mask` must have dtype torch.bool, got torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 6])}, r"`cu_seqlens` .*B must be 1, got 2"),
        ({"backend": "cuda"}, r"`backend` must be one of auto, triton, torch, reference, got 'cuda'"),
    ],
    ids=str,
)
def test_op_options(op, options, message):
    function, make_arguments = OPS[op]
    with pytest.raises(ValueError, match=message):
        function(**make_arguments() | options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bounds", [[1, 6], [0, 5], [0, 4, 3, 6], [0, 7], [0], [[0, 6]], [0.0, 6.0]], ids=str)
def test_cu_seqlens(op, bounds):
    function, make_arguments = OPS[op]
    arguments = make_arguments()
    del arguments["initial_state"]
    for name in arguments.keys() - {"recurrent_weight", "bias"}:
        arguments[name] = arguments[name][:1]
    with pytest.raises(ValueError, match="`cu_seqlens` must"):
        function(**arguments, cu_seqlens=torch.tensor(bounds))


def test_cu_seqlens_that_change_are_looked_at_again():
    bounds = torch.tensor([0, 2, 6])
    gates, weight, bias = torch.randn(1, 6, 4, 1, 2), torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2)
    for _ in range(2):
        slstm(gates, weight, bias, cu_seqlens=bounds)
    bounds[1] = 7
    with pytest.raises(ValueError, match="`cu_seqlens` must"):
        slstm(gates, weight, bias, cu_seqlens=bounds)


@pytest.mark.parametrize("op", OPS)
def test_no_tokens(op):
    function, make_arguments = OPS[op]
    arguments = make_arguments()
    for name in arguments.keys() - {"recurrent_weight", "bias", "initial_state"}:
        arguments[name] = arguments[name][:, :0]
    with pytest.raises(ValueError, match=r"`(q|gates)` must have no empty dimension"):
        function(**arguments)


def test_chunk_size():
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1, got 0"):
        mlstm(**mlstm_arguments(), chunk_size=0)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_step_with_a_bad_state_changes_nothing(op, inplace):
    function, make_arguments = {"mlstm": (mlstm_step, mlstm_arguments), "slstm": (slstm_step, slstm_arguments)}[op]
    arguments = make_arguments()
    good, *others = arguments.pop("initial_state")
    bad = (good, *others[:-1], others[-1][:1])
    before = [x.clone() for x in bad]
    for name in arguments.keys() - {"recurrent_weight", "bias"}:
        arguments[name] = arguments[name][:, 0]
    with pytest.raises(ValueError, match="`state m` must have shape"):
        function(**arguments, state=bad, inplace=inplace)
    assert all(torch.equal(x, y) for x, y in zip(bad, before, strict=True))


def test_backend_that_cannot_run(monkeypatch):
    """Asked for it raises, by argument or by the environment; nothing falls back in silence."""
    arguments = {name: x.double() for name, x in mlstm_arguments().items() if name != "initial_state"}
    with pytest.raises(RuntimeError, match="triton backend cannot run mlstm"):
        mlstm(**arguments, backend="triton")
    monkeypatch.setenv("HF_XLSTM_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="triton backend cannot run mlstm"):
        mlstm(**arguments)
    mlstm(**arguments, backend="torch")  # an explicit choice goes before the environment
    monkeypatch.setenv("HF_XLSTM_BACKEND", "cuda")
    with pytest.raises(ValueError, match="`backend` must be one of"):
        mlstm(**arguments)


# ---- model and cache


@pytest.fixture(scope="module")
def model():
    return tiny_model(layer_types=MIXED)


def filled_cache(model, batch_size: int = 2) -> xLSTMCache:
    return model(tokens(batch_size, 5), use_cache=True).cache


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, r"exactly one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": tokens(2, 3), "inputs_embeds": torch.ones(2, 3, 32)}, r"exactly one of `input_ids`"),
        ({"input_ids": tokens(2, 3)[:, :0]}, r"no tokens"),
        ({"input_ids": tokens(2, 3)[:0]}, r"no tokens: `input_ids` has shape \(0, 3\)"),
        ({"input_ids": tokens(2, 3)[0]}, r"`input_ids` must have shape \(B, T\), got \(3,\)"),
        ({"inputs_embeds": torch.ones(3, 32)}, r"`inputs_embeds` must have shape \(B, T, D\), got \(3, 32\)"),
        ({"input_ids": tokens(2, 3), "attention_mask": torch.ones(2, 5)}, r"`attention_mask` has 5 columns for 3 tok"),
        ({"input_ids": tokens(1, 3), "attention_mask": torch.tensor([[1, 2, 2]])}, r"1 for tokens and 0 for padding"),
        ({"input_ids": tokens(1, 3), "attention_mask": torch.tensor([[-1e9, 0, 0]])}, r"1 for tokens and 0 for pad"),
        ({"input_ids": tokens(2, 3), "seq_idx": torch.zeros(2, 4)}, r"`seq_idx`.*\(2, 3\).*\(2, 4\)"),
        ({"input_ids": tokens(2, 3), "position_ids": torch.tensor([[0, 1, 0, 1]])}, r"`position_ids`.*\(1, 4\)"),
        ({"input_ids": tokens(2, 3), "cu_seq_lens_q": torch.tensor([0, 5])}, r"T = 6, got \[0, 5\]"),
        ({"input_ids": tokens(2, 3), "attention_mask": torch.ones(1, 3)}, r"`attention_mask`.*\(2, 3\).*\(1, 3\)"),
        ({"input_ids": tokens(2, 3), "attention_mask": torch.zeros(2, 2)}, r"`attention_mask`.*\(2, 3\).*\(2, 2\)"),
    ],
)
def test_model_inputs(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
@pytest.mark.parametrize(
    "other, message",
    [
        ({"batch_size": 3}, r"`cache` has batch size 3, the input has 2"),
        (
            {"num_hidden_layers": 3, "layer_types": [*MIXED, "mlstm"]},
            r"`cache` has 3 layers, the model.* 2",
        ),
        ({"layer_types": MIXED[::-1]}, r"another configuration: layer 0 is slstm .* the model's is mlstm"),
        (
            {"qk_dim_factor": 1.0},
            r"layer 0 is mlstm \(4, 8, 8\), the model's is mlstm \(4, 4, 8\)",
        ),
        ({"slstm_num_heads": 8}, r"layer 1 is slstm \(8, 4.*\), the model's is slstm \(4, 8"),
        ({"slstm_conv_kernel_size": 4}, r"another configuration: layer 1"),
    ],
    ids=str,
)
def test_cache_of_something_else(model, other, message, name):
    batch_size = other.get("batch_size", 2)
    fields = {key: value for key, value in other.items() if key != "batch_size"}
    cache = filled_cache(tiny_model(**({"layer_types": MIXED} | fields)), batch_size)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=message):
        model(tokens(2, 3), **{name: cache})
    assert cache.get_seq_length() == 5
    for layer, layer_before in zip(cache.layers, before.layers, strict=True):
        for key, x in layer_before.tensors().items():
            assert torch.equal(layer.tensors()[key], x)


def test_two_names_for_one_cache(model):
    cache = filled_cache(model)
    with pytest.raises(ValueError, match="`cache` and `cache_params` are names of the same argument"):
        model(tokens(2, 3), cache=cache, cache_params=cache)
    assert cache.get_seq_length() == 5


def test_foreign_cache(model):
    message = r"`cache` must be a hf_xlstm\.cache\.xLSTMCache, got a transformers\.cache_utils\.DynamicCache"
    with pytest.raises(ValueError, match=message):
        model(tokens(2, 3), cache=DynamicCache())


def test_packed_sequences_do_not_continue_a_cache(model):
    cache = filled_cache(model, 1)
    with pytest.raises(ValueError, match="`cache`"):
        model(tokens(1, 4), cache=cache, cu_seq_lens_q=torch.tensor([0, 2, 4]))
    assert cache.get_seq_length() == 5


def test_failed_forward_leaves_the_cache_alone(model):
    cache = filled_cache(model)
    before = copy.deepcopy(cache)
    with pytest.raises(IndexError):
        model(tokens(2, 3) + 1000, cache=cache)
    assert cache.get_seq_length() == 5
    assert torch.equal(cache.layers[0].tensors()["c"], before.layers[0].tensors()["c"])


# ---- checkpoints


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(checkpoint, change) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


NAME = "backbone.blocks.0.mlstm_layer.q.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop(NAME),
        lambda weights: weights.update({NAME: weights[NAME][:-1].clone()}),
        lambda weights: weights.update({NAME: weights[NAME].flatten()}),
    ],
    ids=["missing", "narrow", "flat"],
)
@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_incomplete_checkpoint(checkpoint, change, weight_mode):
    """Nothing starts at random in silence: the error names the tensor."""
    rewrite(checkpoint, change)
    if weight_mode == "fused":  # nothing in it is fused, which changes nothing
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"weight_mode": "fused"}))
    with pytest.raises(Exception, match=r"mlstm_layer\.q\.weight"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_extra_tensor(checkpoint):
    rewrite(checkpoint, lambda weights: weights.update({"backbone.blocks.0.mlstm_layer.z.weight": torch.ones(2)}))
    with pytest.raises(Exception, match=r"mlstm_layer\.z\.weight"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_truncated_checkpoint(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|truncated|safetensors"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_pickle_is_refused(checkpoint):
    """A pickle may run code: neither under its own name nor under that of safetensors."""
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)safetensors"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "pytorch_model.bin").rename(file)
    with pytest.raises(Exception, match=r"(?i)safetensors|header"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_saved_cache_that_is_no_safetensors_file(model, tmp_path):
    filled_cache(model).save_pretrained(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(pickle.dumps({"layers": []}))
    with pytest.raises(Exception, match=r"(?i)safetensors|header"):
        xLSTMCache.from_pretrained(tmp_path)
