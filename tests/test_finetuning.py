"""Fine-tuning: Trainer's options, adapters, quantised weights, TRL, training through states and of states."""

import copy

import pytest
import torch
from common import MIXED, relative_error, tiny_model, tokens
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from hf_xlstm import (
    LORA_TARGET_MODULES,
    xLSTMCache,
    xLSTMForCausalLM,
    xLSTMForQuestionAnswering,
    xLSTMForSequenceClassification,
    xLSTMForTokenClassification,
)
from hf_xlstm.commands.helpers.tokens import train_tokenizer


peft = pytest.importorskip("peft", reason="adapters need peft")
mixed = {"layer_types": MIXED, "slstm_conv_kernel_size": 4}
LINES = ["the slithy toves", "did gyre and gimble in the wabe", "all mimsy", "were the borogoves"] * 2


def rows(lengths: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    """Sequences of 12 tokens of which only the last `length` are labels."""
    ids = tokens(len(lengths), 12)
    return [{"input_ids": x, "labels": torch.cat([x[:-n] * 0 - 100, x[-n:]])} for x, n in zip(ids, lengths)]


def train(model, dataset, tmp_path, **options) -> list[float]:
    """One epoch in the order of the data; the losses."""
    defaults = {"per_device_train_batch_size": 1, "learning_rate": 0.1, "optim": "sgd", "num_train_epochs": 1}
    defaults |= {"lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    arguments = TrainingArguments(tmp_path, use_cpu=True, train_sampling_strategy="sequential", **defaults | options)
    trainer = Trainer(model, arguments, train_dataset=dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- Trainer


def test_accumulated_batches_equal_one(tmp_path):
    """Different numbers of labels: the mean is over the labels of all of them (`num_items_in_batch`)."""
    models = {size: tiny_model(**mixed) for size in (1, 4)}
    for size, model in models.items():
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        train(model, rows((1, 9, 4, 2)), tmp_path, **options)
    for a, b in zip(models[1].parameters(), models[4].parameters(), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("cls", [xLSTMForSequenceClassification, xLSTMForTokenClassification])
def test_accumulated_batches_of_a_classifier_equal_one(cls, tmp_path):
    labels = (1, 0, 2, 1) if cls is xLSTMForSequenceClassification else tokens(4, 12, seed=1) % 3
    dataset = [{"input_ids": x, "labels": torch.as_tensor(y)} for x, y in zip(tokens(4, 12), labels)]
    models = {size: tiny_model(cls, num_labels=3, classifier_dropout=0.0, **mixed) for size in (1, 4)}
    losses = []
    for size, model in models.items():
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_grad_norm": 0}
        losses += train(model, dataset, tmp_path, **options)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for a, b in zip(models[1].parameters(), models[4].parameters(), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing(adapter, use_reentrant, tmp_path):
    models = []
    for checkpointing in (True, False):
        model = tiny_model(**mixed)
        if adapter:
            torch.manual_seed(0)
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
        kwargs = {"use_reentrant": use_reentrant} if checkpointing else None
        options = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": kwargs}
        train(model, rows((11, 9, 4)), tmp_path, **options)
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert relative_error(a, b) < 1e-5


def test_gradient_checkpointing_refuses_a_state():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="Gradient checkpointing cannot continue"):
        model(tokens(1, 4), cache=xLSTMCache(model.config))


def test_neftune(tmp_path):
    losses = {}
    for alpha in (None, 5.0):
        model = tiny_model(**mixed)
        losses[alpha] = train(model, rows((9, 9)), tmp_path, neftune_noise_alpha=alpha, learning_rate=0.0)
        logits = [model.train()(tokens(1, 5)).logits for _ in range(2)]
        assert logits[0].equal(logits[1])  # no noise after training
    assert all(noisy != plain for plain, noisy in zip(*losses.values(), strict=True))


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_after_prompt_tuning(padded, options):
    """The learnt vectors stand in front of the text, once, and not in front of every token."""
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, ids = peft.get_peft_model(tiny_model(**mixed), config).eval(), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0 if padded else 1
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False} | options
    actual = model.generate(input_ids=ids, **options)
    options.pop("prefill_chunk_size", None)
    assert actual.equal(model.generate(input_ids=ids, **options, use_cache=False))


# ---- heads


@pytest.mark.parametrize("padding", ["left", "right"])
def test_classification_of_padded_batches(padding):
    """The class of a text is that at its last token, wherever the padding is."""
    model = tiny_model(xLSTMForSequenceClassification, num_labels=3, pad_token_id=0, **mixed)
    texts = [tokens(1, length, seed=length)[0] for length in (3, 9, 6)]
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=0, padding_side=padding)
    outputs = model(ids, attention_mask=ids.ne(0), labels=torch.tensor([0, 2, 1]))
    singly = [model(text[None], labels=torch.tensor([label])) for text, label in zip(texts, (0, 2, 1), strict=True)]
    assert relative_error(outputs.logits, torch.cat([x.logits for x in singly])) < 1e-5
    assert relative_error(outputs.loss, torch.stack([x.loss for x in singly]).mean()) < 1e-5


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("cls", [xLSTMForTokenClassification, xLSTMForQuestionAnswering])
def test_other_heads_on_padded_batches(cls, padding):
    model = tiny_model(cls, **mixed)
    texts = [tokens(1, length, seed=length)[0] for length in (3, 9)]
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=0, padding_side=padding)
    rows = model(ids, attention_mask=ids.ne(0)).to_tuple()
    for row, text in enumerate(texts):
        for batched, single in zip(rows, model(text[None]).to_tuple(), strict=True):
            assert relative_error(batched[row][ids[row].ne(0)], single[0]) < 1e-5


HEADS = {
    AutoModelForSequenceClassification: {"labels": torch.tensor([1, 0])},
    AutoModelForTokenClassification: {"labels": torch.arange(14).view(2, 7) % 2},
    AutoModelForQuestionAnswering: {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 6])},
}


@pytest.mark.parametrize("auto_class", HEADS)
def test_heads_learn_and_reload(auto_class, tmp_path):
    """Put on a language model's backbone by the Auto class, and saved with it."""
    whole = tiny_model(pad_token_id=0, **mixed)
    whole.save_pretrained(tmp_path)
    model = auto_class.from_pretrained(tmp_path).train()
    assert model.backbone.embeddings.weight.equal(whole.backbone.embeddings.weight)
    inputs, optimizer = {"input_ids": tokens(2, 7)} | HEADS[auto_class], torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        losses.append(model(**inputs).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    reloaded = auto_class.from_pretrained(tmp_path)
    assert type(reloaded) is type(model) and model(**inputs).loss.equal(reloaded(**inputs).loss)
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings().num_embeddings == model.backbone.embeddings.num_embeddings == 70


# ---- adapters


def test_lora_target_modules_are_all_large_maps():
    model = tiny_model(**mixed)
    linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear - {"igate_preact", "fgate_preact", "lm_head"} == set(LORA_TARGET_MODULES)


@pytest.mark.parametrize("target_modules", ["all-linear", LORA_TARGET_MODULES], ids=["all-linear", "constant"])
def test_lora(target_modules, tmp_path):
    base, ids = tiny_model(**mixed), tokens(2, 20)
    before = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=target_modules, r=4))
    train(model, rows((11, 9, 4)), tmp_path, optim="adamw_torch", learning_rate=0.05)
    model.eval()
    logits = model(ids).logits
    generated = model.generate(input_ids=ids, max_new_tokens=5)
    model.save_pretrained(tmp_path)

    fresh = tiny_model(**mixed)
    assert relative_error(fresh(ids).logits, logits) > 1e-2  # the adapter has learnt something
    assert relative_error(peft.PeftModel.from_pretrained(fresh, tmp_path)(ids).logits, logits) < 1e-6
    merged = model.merge_and_unload()
    assert type(merged) is xLSTMForCausalLM and merged.state_dict().keys() == before.keys()
    assert relative_error(merged(ids).logits, logits) < 1e-5
    assert merged.generate(ids, max_new_tokens=5).equal(generated)
    changed = {name for name, x in merged.state_dict().items() if not x.equal(before[name])}
    assert ("backbone.blocks.0.mlstm_layer.igate_preact.weight" in changed) == (target_modules == "all-linear")
    assert "lm_head.weight" not in changed and "backbone.blocks.1.ffn.proj_down.weight" in changed


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights need torchao")
    kept = ["lm_head", ".*igate_preact", ".*fgate_preact"]
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=kept)


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes", reason="8-bit and NF4 weights need bitsandbytes")
    return BitsAndBytesConfig(llm_int8_skip_modules=["lm_head", "igate_preact", "fgate_preact"], **options)


QUANTIZATIONS = {
    "torchao-int8": (torchao_int8, 0.1),
    "bitsandbytes-int8": (lambda: bitsandbytes(load_in_8bit=True), 0.1),
    "bitsandbytes-nf4": (
        lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        0.5,
    ),
}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_lora_on_quantised_weights(quantization, tmp_path):
    """On a CPU. The gates of the cells and the head keep their precision."""
    make_config, tolerance = QUANTIZATIONS[quantization]
    ids, whole = tokens(2, 20), tiny_model(hidden_size=64, layer_types=MIXED)
    whole.save_pretrained(tmp_path / "model")
    model = xLSTMForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=make_config(), device_map={"": "cpu"}
    )
    layer = model.backbone.blocks[0].mlstm_layer
    assert type(layer.igate_preact.weight) is nn.Parameter and type(model.lm_head.weight) is nn.Parameter
    assert 1e-4 < relative_error(model(ids).logits, whole(ids).logits) < tolerance

    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=LORA_TARGET_MODULES))
    losses = train(model, rows((11,) * 8), tmp_path, num_train_epochs=4, learning_rate=0.02, optim="adamw_torch")
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    model.eval().generate(input_ids=ids, max_new_tokens=2)


# ---- TRL


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(LINES, vocab_size=280)
    tokenizer.padding_side = "left"
    return tokenizer


def trl_step(trainer_name: str, dataset: list[dict], tokenizer, tmp_path, config: dict, **arguments) -> nn.Module:
    trl = pytest.importorskip("trl", reason="SFT, DPO and GRPO need trl")
    datasets = pytest.importorskip("datasets", reason="trl needs datasets")
    model = tiny_model(vocab_size=len(tokenizer), **mixed)
    before = copy.deepcopy(model.state_dict())
    options = {"max_steps": 1, "learning_rate": 0.1, "use_cpu": True, "bf16": False, "report_to": "none"}
    if trainer_name == "DPO":
        arguments["ref_model"] = copy.deepcopy(model)
    arguments |= {"processing_class": tokenizer, "train_dataset": datasets.Dataset.from_list(dataset)}
    args = getattr(trl, f"{trainer_name}Config")(str(tmp_path), save_strategy="no", **options | config)
    trainer = getattr(trl, f"{trainer_name}Trainer")(model, args=args, **arguments)
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert torch.tensor(loss).isfinite()
    assert any(not x.equal(before[name]) for name, x in model.state_dict().items())
    return loss


@pytest.mark.slow
def test_sft(tokenizer, tmp_path):
    dataset = [{"prompt": line[:8], "completion": line[8:]} for line in LINES]
    trl_step("SFT", dataset, tokenizer, tmp_path, {"logging_steps": 1})


@pytest.mark.slow
def test_dpo(tokenizer, tmp_path):
    dataset = [{"prompt": line[:8], "chosen": line[8:], "rejected": line[:5]} for line in LINES]
    loss = trl_step("DPO", dataset, tokenizer, tmp_path, {"logging_steps": 1})
    assert loss == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)  # model and reference are still the same


@pytest.mark.slow
def test_grpo(tokenizer, tmp_path):
    config = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 6, "logging_steps": 1}
    dataset = [{"prompt": line[:8]} for line in LINES]

    def vowels(completions, **kwargs):
        return [float(sum(c in "aeiou" for c in text)) for text in completions]

    trl_step("GRPO", dataset, tokenizer, tmp_path, config, reward_funcs=vowels)


# ---- states


def test_truncated_backpropagation():
    """Windows that continue each other have the losses of the whole text; gradients stay within a window."""
    model, ids = tiny_model(**mixed).train(), tokens(2, 33)
    inputs, labels = ids[:, :-1], ids[:, 1:]
    expected = nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten(), reduction="none")
    state, losses, gradients = None, [], []
    for x, y in zip(inputs.split(8, dim=1), labels.split(8, dim=1), strict=True):
        y = y.contiguous()
        before = copy.deepcopy(state)
        outputs = model(x, labels=y, shift_labels=y, cache=state, use_cache=True)
        state = outputs.cache
        losses.append(outputs.loss)
        gradients.append(torch.autograd.grad(outputs.loss, model.lm_head.weight, retain_graph=True)[0])
        # what the window before handed over is a constant
        model.zero_grad()
        outputs.loss.backward()
        again = model(x, labels=y, shift_labels=y, cache=before).loss
        for parameter, gradient in zip(
            model.parameters(), torch.autograd.grad(again, list(model.parameters())), strict=True
        ):
            assert relative_error(parameter.grad, gradient) < 1e-6
    windows = expected.view(2, 4, 8).mean((0, 2))
    assert relative_error(torch.stack(losses), windows) < 1e-6
    assert state.get_seq_length() == 32


@pytest.mark.parametrize("variant", [{}, mixed], ids=["mlstm", "mixed"])
def test_state_tuning(variant, tmp_path):
    """The initial state as the only parameters: learnt, saved as a cache, continued from."""
    model, ids = tiny_model(**variant).requires_grad_(False), tokens(3, 12)
    prompt = model(tokens(1, 5, seed=1), use_cache=True).cache
    states = [tuple(x.clone().requires_grad_() for x in layer.state) for layer in prompt.layers]

    def initial_cache(batch_size: int) -> xLSTMCache:
        cache = xLSTMCache(model.config)
        for layer, state in zip(cache.layers, states, strict=True):
            layer.state = state
        cache.batch_repeat_interleave(batch_size)
        return cache

    parameters = [x for state in states for x in state]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids, cache=initial_cache(3)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for layer, state in zip(prompt.layers, states, strict=True):
        learnt = dict(zip(layer.tensors(), (x.grad is not None for x in state)))
        assert all(learnt[name] == (name != "m") for name in learnt)  # m is the scale in which c and n are stored

    with torch.no_grad():
        cache = initial_cache(1)
        cache.save_pretrained(tmp_path)
        loaded = xLSTMCache.from_pretrained(tmp_path)
        assert loaded.get_seq_length() == 0
        expected = model(ids[:1], cache=cache).logits
        assert relative_error(model(ids[:1], cache=loaded).logits, expected) < 1e-6
        before = copy.deepcopy(states)
        generated = model.generate(ids, cache=initial_cache(3), max_new_tokens=3, do_sample=False)
        assert generated.shape == (3, 15)
        assert all(x.equal(y) for a, b in zip(states, before) for x, y in zip(a, b))
        plain = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert not generated.equal(plain)
