"""The models: every way of running a sequence gives the same numbers; saving, loading, tying, initialisation."""

import math
import os
import subprocess
import sys

import pytest
import torch
from common import MIXED, STACKS, VOCAB_SIZE, assert_same_states, relative_error, tiny_config, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_xlstm import (
    xLSTMCache,
    xLSTMConfig,
    xLSTMForCausalLM,
    xLSTMForSequenceClassification,
    xLSTMForTokenClassification,
    xLSTMModel,
)


VARIANTS = STACKS | {
    "bias": {"layer_types": MIXED, "use_bias": True},
    "bare": {"add_out_norm": False, "gate_soft_cap": None, "output_logit_soft_cap": None},
    "widths": {"num_heads": 2, "slstm_num_heads": 8, "layer_types": MIXED, "qk_dim_factor": 0.75, "v_dim_factor": 1.5},
}
stacks = pytest.mark.parametrize("stack", STACKS)


def gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ---- one sequence, many ways


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[40], [17, 1, 1, 21], [1] * 40], ids=["prefill", "chunks", "tokens"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sequence_in_pieces(variant, pieces):
    model, ids = tiny_model(**VARIANTS[variant]), tokens(2, 40)
    expected = model(ids, use_cache=True)
    assert relative_error(model(ids, use_cache=False).logits, expected.logits) < 1e-6
    cache = xLSTMCache(model.config)
    logits = [model(piece, cache=cache).logits for piece in ids.split(pieces, dim=1)]
    assert relative_error(torch.cat(logits, dim=1), expected.logits) < 1e-5
    assert_same_states(cache, expected.cache)
    assert cache.get_seq_length() == 40


@torch.no_grad()
@stacks
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_backends_agree(backend, stack):
    ids = tokens(2, 40)
    expected = tiny_model(**STACKS[stack])(ids).logits
    assert relative_error(tiny_model(backend=backend, **STACKS[stack])(ids).logits, expected) < 1e-5


@pytest.mark.parametrize("length", [1, 8, 50])
def test_long_inputs_in_pieces(length):
    """`max_inference_chunksize` bounds memory without a cache and with one; gradients still reach everything."""
    ids = tokens(2, length)
    model, whole = tiny_model(layer_types=MIXED, max_inference_chunksize=16), tiny_model(layer_types=MIXED)
    with torch.no_grad():
        for use_cache in (False, True):
            assert relative_error(model(ids, use_cache=use_cache).logits, whole(ids).logits) < 1e-5
    if length > 1:
        expected = gradients(whole, input_ids=ids, labels=ids)
        for name, gradient in gradients(model, input_ids=ids, labels=ids).items():
            assert relative_error(gradient, expected[name]) < 1e-5, name


PADDINGS = {
    "left": lambda keep: torch.arange(12) >= 12 - keep,
    "right": lambda keep: torch.arange(12) < keep,
    "inside": lambda keep: torch.arange(12).mul(keep).remainder(12) < keep,  # evenly spread
}


@torch.no_grad()
@stacks
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("pieces", [[12], [5, 1, 6], [1] * 12], ids=["prefill", "chunks", "tokens"])
def test_padding(stack, padding, pieces):
    """Rows of a padded batch equal the unpadded sequences, their final states too, whatever tokens pad them."""
    model, lengths = tiny_model(**STACKS[stack]), (12, 7, 1)
    mask = torch.stack([PADDINGS[padding](length) for length in lengths])
    ids = tokens(3, 12)
    assert mask.sum(1).tolist() == list(lengths)
    results = []
    for pad in (0, VOCAB_SIZE - 1):
        padded, cache = torch.where(mask, ids, pad), xLSTMCache(model.config)
        ends = torch.tensor(pieces).cumsum(0).tolist()
        logits = [
            model(piece, attention_mask=mask[:, :end].long(), cache=cache).logits
            for piece, end in zip(padded.split(pieces, dim=1), ends, strict=True)
        ]
        results.append(torch.cat(logits, dim=1)[mask])
        for row in range(3):
            single = model(ids[row, mask[row]][None], use_cache=True)
            assert relative_error(torch.cat(logits, dim=1)[row, mask[row]], single.logits[0]) < 1e-5
            assert_same_states(cache, single.cache, rows=slice(row, row + 1))
    assert torch.equal(*results)


@stacks
def test_masked_steps_get_no_gradient(stack):
    model, ids = tiny_model(**STACKS[stack]), tokens(2, 12)
    mask = torch.stack([PADDINGS["inside"](7), PADDINGS["left"](5)])
    embeds = model.get_input_embeddings()(ids).detach()
    embeds[~mask] *= 1e4
    embeds.requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=mask.long()).logits
    logits[mask].sum().backward()
    assert (embeds.grad[~mask] == 0).all()
    assert embeds.grad[mask].abs().amin(-1).amin() > 0


LENGTHS = [3, 1, 9, 5]  # documents, packed into one row or two
SEQ_IDX = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)).view(1, 18).int()
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS]).view(1, 18)
PACKINGS = {
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 3, 4, 13, 18], dtype=torch.int32)},
    "seq_idx": {"seq_idx": SEQ_IDX},
    "position_ids": {"position_ids": POSITIONS},
}


@stacks
@pytest.mark.parametrize("packing", PACKINGS)
def test_packing(stack, packing):
    """Packed documents equal separate ones, in logits and gradients."""
    model, ids = tiny_model(**STACKS[stack]).double(), tokens(1, 18)
    logits = model(ids, **PACKINGS[packing]).logits
    separate = torch.cat([model(document).logits for document in ids.split(LENGTHS, dim=1)], dim=1)
    assert relative_error(logits, separate) < 1e-12
    assert relative_error(model(ids).logits, separate) > 1e-2  # unpacked they would see each other
    weights = torch.randn_like(logits)
    for actual, expected in zip(
        torch.autograd.grad(logits, model.parameters(), weights),
        torch.autograd.grad(separate, model.parameters(), weights),
        strict=True,
    ):
        assert relative_error(actual, expected) < 1e-9


@torch.no_grad()
@stacks
@pytest.mark.parametrize("packing", ["seq_idx", "position_ids"])
def test_packing_of_several_rows(stack, packing):
    """A row starts anew even where numbers or positions seem to go on from the row before."""
    rows = [[4, 5], [9]]
    model, ids = tiny_model(**STACKS[stack]), tokens(2, 9)
    if packing == "seq_idx":
        marks = {"seq_idx": torch.tensor([[0] * 4 + [1] * 5, [1] * 9])}
    else:
        marks = {"position_ids": torch.tensor([[*range(4), *range(5)], [*range(5, 14)]])}
    logits = model(ids, **marks).logits
    for row, lengths in enumerate(rows):
        separate = [model(document[None]).logits[0] for document in ids[row].split(lengths)]
        assert relative_error(logits[row], torch.cat(separate)) < 1e-5


@torch.no_grad()
def test_ordinary_positions_pack_nothing():
    model, ids = tiny_model(layer_types=MIXED), tokens(2, 9)
    positions = torch.arange(5, 14)[None]
    assert torch.equal(model(ids, position_ids=positions).logits, model(ids).logits)


@torch.no_grad()
def test_inputs_embeds():
    model, ids = tiny_model(layer_types=MIXED), tokens(2, 9)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("keep, rows", [(0, slice(None)), (1, [8]), (3, [6, 7, 8]), (torch.tensor([0, 5]), [0, 5])])
def test_logits_to_keep(keep, rows):
    model, ids = tiny_model(), tokens(2, 9)
    assert relative_error(model(ids, logits_to_keep=keep).logits, model(ids).logits[:, rows]) < 1e-6


@torch.no_grad()
def test_hidden_states():
    model, ids = tiny_model(layer_types=MIXED), tokens(2, 9)
    outputs = model(ids, output_hidden_states=True)
    embedded, *_, last = outputs.hidden_states
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(embedded, model.get_input_embeddings()(ids))
    assert torch.equal(last, model.backbone(ids).last_hidden_state)
    assert model(ids).hidden_states is None
    assert isinstance(model(ids, return_dict=False), tuple)


def test_loss_is_that_of_shifted_labels():
    model, ids = tiny_model(), tokens(2, 9)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    outputs = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert relative_error(outputs.loss, expected) < 1e-6
    summed = model(ids, labels=labels, num_items_in_batch=7).loss
    assert relative_error(summed, expected * (labels[:, 1:] != -100).sum() / 7) < 1e-6


def test_soft_caps_bound_gates_and_logits():
    model = tiny_model(output_logit_soft_cap=3.0)
    logits = model(tokens(1, 9)).logits
    uncapped = tiny_model(output_logit_soft_cap=None)(tokens(1, 9)).logits
    assert relative_error(logits, 3 * torch.tanh(uncapped / 3)) < 1e-6


# ---- gradients


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant):
    ids = tokens(2, 20)
    for name, gradient in gradients(tiny_model(**VARIANTS[variant]), input_ids=ids, labels=ids).items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


@stacks
@pytest.mark.parametrize("change", ["checkpointing", "use_cache"])
def test_gradients_do_not_change_with(change, stack):
    model, ids = tiny_model(**STACKS[stack]).train(), tokens(2, 20)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][0, :6] = 0
    expected = gradients(model, **inputs)
    if change == "checkpointing":
        model.gradient_checkpointing_enable()
    actual = gradients(model, use_cache=change == "use_cache", **inputs)
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-5, name


def test_training_keeps_no_cache():
    model, ids = tiny_model(), tokens(2, 9)
    assert model(ids).cache is not None
    assert model.train()(ids).cache is None


# ---- dtypes


@torch.no_grad()
@stacks
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float64, 1e-5)])
def test_dtypes(dtype, tolerance, stack):
    model, ids = tiny_model(**STACKS[stack]), tokens(2, 40)
    expected = model(ids).logits
    model = model.to(dtype)
    outputs = model(ids, output_hidden_states=True)
    assert {x.dtype for x in outputs.hidden_states} == {dtype}
    assert outputs.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(outputs.logits, expected) < tolerance


@stacks
def test_float64_throughout(stack):
    """The gradient along a direction equals the slope along it, to digits that one step in float32 would take away.
    But for the path through m, which has no gradient and matters for `eps` only: that is made small."""
    model, ids = tiny_model(**STACKS[stack], eps=1e-10).double(), tokens(1, 20)
    parameters = list(model.parameters())
    direction = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).double() for i, p in enumerate(parameters)
    ]

    def value(step: float) -> torch.Tensor:
        moved = {n: p + step * d for (n, p), d in zip(model.named_parameters(), direction, strict=True)}
        return torch.func.functional_call(model, moved, (ids,), {"use_cache": False}).logits.square().mean()

    gradient = torch.autograd.grad(value(0.0), parameters)
    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
    with torch.no_grad():
        expected = (8 * (value(5e-6) - value(-5e-6)) - (value(1e-5) - value(-1e-5))) / 6e-5
    assert relative_error(slope, expected) < 1e-9


@torch.no_grad()
def test_load_in_another_dtype(tmp_path):
    tiny_model(layer_types=MIXED).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


# ---- save, load, tie


def test_round_trip_in_a_clean_process(tmp_path):
    """Saved here, opened by the Auto classes of another process that knows nothing but `import hf_xlstm`."""
    expected = {}
    for name, variant in VARIANTS.items():
        model = tiny_model(tie_word_embeddings=name == "bare", **variant)
        model.save_pretrained(tmp_path / name)
        expected[name] = model(tokens(2, 9)).logits.detach()
    torch.save(tokens(2, 9), tmp_path / "ids.pt")
    script = (
        "import sys, torch, hf_xlstm\n"
        "from transformers import AutoModelForCausalLM\n"
        "root, *names = sys.argv[1:]\n"
        "models = {name: AutoModelForCausalLM.from_pretrained(f'{root}/{name}') for name in names}\n"
        "assert all(type(model) is hf_xlstm.xLSTMForCausalLM for model in models.values())\n"
        "ids = torch.load(f'{root}/ids.pt')\n"
        "torch.save({name: model(ids).logits.detach() for name, model in models.items()}, f'{root}/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), *VARIANTS], check=True, env=os.environ)
    logits = torch.load(tmp_path / "logits.pt")
    for name in VARIANTS:
        assert torch.equal(logits[name], expected[name]), name


@pytest.mark.parametrize("cls", [xLSTMModel, xLSTMForSequenceClassification, xLSTMForTokenClassification])
def test_other_heads(cls, tmp_path):
    """They train, and load the backbone of a language model."""
    language_model, ids = tiny_model(layer_types=MIXED), tokens(2, 9)
    language_model.save_pretrained(tmp_path)
    backbone = cls.from_pretrained(tmp_path)
    backbone = getattr(backbone, "backbone", backbone)
    hidden = language_model.backbone(ids).last_hidden_state
    assert torch.equal(backbone(ids).last_hidden_state, hidden)
    if cls is not xLSTMModel:
        model = tiny_model(cls, layer_types=MIXED, num_labels=3, pad_token_id=0).double()
        labels = ids % 3 if cls is xLSTMForTokenClassification else torch.tensor([0, 2])
        hidden = model.backbone(ids).last_hidden_state
        scores = model.score(hidden if cls is xLSTMForTokenClassification else hidden[:, -1])
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, -2), labels.flatten())
        expected = torch.autograd.grad(loss, list(model.parameters()))
        actual = gradients(model, input_ids=ids, labels=labels).values()
        assert all(relative_error(x, y) < 1e-6 for x, y in zip(actual, expected, strict=True))


def test_tied_weights_are_one_tensor(tmp_path):
    saved = tiny_model(tie_word_embeddings=True)
    saved.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    for model in (saved, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        model.resize_token_embeddings(VOCAB_SIZE + 3)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model(tokens(1, 5)).logits.shape == (1, 5, VOCAB_SIZE + 3)


def test_untied_weights_are_two():
    model = tiny_model()
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("layer_types", [None, MIXED], ids=["mlstm", "mixed"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_fused_checkpoint(layer_types, use_bias, tmp_path):
    """`weight_mode="fused"`: [q; k; v; o], [i; f] and [gate; up] as one matrix each."""
    model = tiny_model(layer_types=layer_types, use_bias=use_bias)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    fusions = {
        "mlstm_layer.qkv_opreact": [f"mlstm_layer.{name}" for name in ("q", "k", "v", "ogate_preact")],
        "mlstm_layer.ifgate_preact": ["mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"],
        "ffn.proj_up_gate_z": ["ffn.proj_up_gate", "ffn.proj_up"],
    }
    for block in ("backbone.blocks.0.", "backbone.blocks.1."):
        for fused, parts in fusions.items():
            for kind in (".weight", ".bias"):
                if block + parts[0] + kind in weights:
                    weights[block + fused + kind] = torch.cat([weights.pop(block + part + kind) for part in parts])
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model.config.weight_mode = "fused"
    model.config.save_pretrained(tmp_path)

    fused = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(fused(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    fused.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


# ---- initialisation


def test_initialisation():
    """The values xLSTM-7B was trained from, and the paper's for the sLSTM."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_heads": 4, "vocab_size": 500}
    options = {"layer_types": MIXED * 2, "slstm_recurrent_init": "uniform", "use_bias": True}
    model = xLSTMForCausalLM(xLSTMConfig(**sizes, **options))
    normal = dict.fromkeys(
        ("embeddings", "lm_head", "q", "k", "v", "proj_up", "proj_up_gate", "igate", "fgate", "zgate", "ogate"),
        math.sqrt(2 / (5 * 128)),
    ) | dict.fromkeys(("out_proj", "proj_down"), 2 / (4 * math.sqrt(128)))
    for name, value in model.named_parameters():
        module, kind = name.split(".")[-2:]
        if kind == "weight" and module in normal:
            assert abs(value.std() / normal[module] - 1) < 0.05, name
            assert abs(value.mean()) < 5 * normal[module] / math.sqrt(value.numel()), name
        elif name.endswith("preact.weight"):
            assert (value == 0).all(), name
        elif kind == "weight":
            assert "norm" in module and (value == 1).all(), name
        elif name.endswith("igate_preact.bias"):
            assert (value == -10).all(), name
        elif name.endswith("fgate_preact.bias"):
            assert torch.equal(value, torch.linspace(3, 6, 4)), name
        elif kind == "recurrent_weight":
            assert 0.95 / math.sqrt(128) < value.abs().max() < 1 / math.sqrt(128), name
        elif not name.endswith("slstm_layer.bias"):
            assert kind == "bias" and (value == 0).all(), name


def test_initial_forget_biases_follow_a_power_law():
    """From +5 to -7 along each head, steeper in deeper blocks."""
    model = xLSTMModel(tiny_config(num_hidden_layers=3, layer_types=["slstm"] * 3))
    for block, exponent in zip(model.blocks, (0.3, 0.95, 1.6), strict=True):
        i, f, z, o = block.slstm_layer.bias
        expected = [5 - 12 * (j / 7) ** exponent for j in range(8)]
        assert torch.allclose(f, torch.tensor(expected).expand(4, 8), atol=1e-5)
        assert not any(x.any() for x in (i, z, o, block.slstm_layer.recurrent_weight))


def test_initialisation_is_that_of_a_language_model():
    """Right after it the loss is little more than that of guessing, tied or not."""
    for tie in (False, True):
        torch.manual_seed(0)
        model, ids = xLSTMForCausalLM(tiny_config(layer_types=MIXED, tie_word_embeddings=tie)), tokens(4, 50)
        assert abs(model(ids, labels=ids).loss.item() - math.log(VOCAB_SIZE)) < 0.4
