"""Training with Transformers' Trainer, in every setting that people use."""

import copy
import math

import pytest
import torch
from common import MIXED, STACKS, VOCAB_SIZE, relative_error, tiny_config, tiny_model, tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_xlstm import weight_decay_groups, xLSTMForCausalLM
from hf_xlstm.configuration_xlstm import PAPER_FIELDS
from hf_xlstm.modeling_xlstm import causal_lm_loss


def make_texts(count: int, padded: bool, seed: int = 0) -> list[dict]:
    """Sequences that count upwards from a random token: learnt in a few steps. Padded: of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, VOCAB_SIZE, (count,), generator=generator).tolist()
    lengths = torch.randint(3, 30, (count,), generator=generator).tolist() if padded else [21] * count
    return [
        {"input_ids": [(start + t) % VOCAB_SIZE for t in range(length)]}
        for start, length in zip(starts, lengths, strict=True)
    ]


def collate(texts: list[dict]) -> dict[str, torch.Tensor]:
    """Pads on the right, with labels -100."""
    length = max(len(text["input_ids"]) for text in texts)
    rows = [text["input_ids"] + [-100] * (length - len(text["input_ids"])) for text in texts]
    labels = torch.tensor(rows)
    return {"input_ids": labels.clamp_min(0), "attention_mask": (labels >= 0).long(), "labels": labels}


def make_trainer(directory, model=None, padded=True, **arguments) -> Trainer:
    set_seed(0)
    if model is None:
        model = xLSTMForCausalLM(tiny_config(layer_types=MIXED))
    defaults = {
        "output_dir": str(directory),
        "max_steps": 10,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model,
        TrainingArguments(**(defaults | arguments)),
        data_collator=collate,
        train_dataset=make_texts(64, padded),
        eval_dataset=make_texts(16, padded, seed=1),
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


SETTINGS = {
    "float32": {},
    "autocast": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "autocast and checkpointing": {"bf16": True, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_falls(setting, padded, tmp_path):
    trainer = make_trainer(tmp_path, padded=padded, **SETTINGS[setting])
    trainer.train()
    first, *_, last = losses(trainer)
    assert abs(first - math.log(VOCAB_SIZE)) < 0.5
    assert last < first - 0.5
    assert trainer.evaluate()["eval_loss"] < first - 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_falls_with_weights_in(dtype, tmp_path):
    model = xLSTMForCausalLM(tiny_config(layer_types=MIXED)).to(dtype)
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    first, *_, last = losses(trainer)
    assert last < first - 0.5
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("setting", ["checkpointing", "accumulation"])
def test_settings_that_change_nothing(setting, tmp_path):
    """Checkpointing recomputes the same; two half batches are one batch, since the loss is divided by the tokens of
    both (`num_items_in_batch`)."""
    expected, actual = (make_trainer(tmp_path, max_steps=3, **SETTINGS[name]) for name in ("float32", setting))
    expected.train()
    actual.train()
    assert losses(actual) == pytest.approx(losses(expected), rel=1e-4)
    for x, y in zip(actual.model.parameters(), expected.model.parameters(), strict=True):
        assert relative_error(x, y) < 1e-2


def test_padding_does_not_change_the_loss(tmp_path):
    """The loss of a padded batch is that of its tokens, each text by itself."""
    model, texts = tiny_model(layer_types=MIXED), make_texts(8, padded=True)
    counts = [len(text["input_ids"]) - 1 for text in texts]
    with torch.no_grad():
        alone = sum(model(**collate([text])).loss * count for text, count in zip(texts, counts, strict=True))
        assert relative_error(model(**collate(texts)).loss, alone / sum(counts)) < 1e-5


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 63, 64, 65, 130])
def test_any_length(length):
    """No length is special, whatever the chunk size: logits and gradients are those of the recurrence."""
    ids, results = torch.arange(length)[None] % VOCAB_SIZE, []
    for backend in ("torch", "reference"):
        model = tiny_model(layer_types=MIXED, chunk_size=64, backend=backend).double().train()
        logits = model(ids).logits
        results.append((logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-11)


def test_save_model_and_evaluate_it(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    expected = trainer.evaluate()["eval_loss"]
    trainer.save_model(tmp_path / "final")
    again = make_trainer(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path / "final"))
    assert again.evaluate()["eval_loss"] == expected


def test_predictions_are_logits_only(tmp_path):
    """The cache is no prediction: evaluation neither gathers nor returns it."""
    predictions = make_trainer(tmp_path, padded=False).predict(make_texts(8, padded=False)).predictions
    assert predictions.shape == (8, 21, VOCAB_SIZE)


@pytest.mark.parametrize("setting", ["float32", "autocast"])
def test_resume(setting, tmp_path):
    """Stopped after 5 steps and resumed from the checkpoint, the other 5 are as if nothing had happened."""
    options = SETTINGS[setting] | {"save_strategy": "steps", "save_steps": 5}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert losses(resumed)[5:] == losses(whole)[5:]
    for x, y in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["large", "paper"])
def test_determinism(family, autocast):
    """What docs/training.md says is bit-equal: the same run twice, and one thread or two; the paper's blocks to 1e-6
    in float32."""

    def train(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        sizes = {"hidden_size": 128, "layer_types": MIXED, "chunk_size": 64}
        model = xLSTMForCausalLM(tiny_config(**sizes, **(PAPER_FIELDS if family == "paper" else {}))).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for ids in torch.randint(VOCAB_SIZE, (2, 8, 96)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [x.detach() for x in model.parameters()]

    before = torch.get_num_threads()
    try:
        one, again, two = train(1), train(1), train(2)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, again))
    if family == "large":
        assert all(map(torch.equal, one, two))
    else:
        assert all(relative_error(x, y) < (1e-2 if autocast else 1e-5) for x, y in zip(two, one, strict=True))


def is_spared(name: str) -> bool:
    """What the original implementations do not decay, by the names of the parameters."""
    return name.endswith((".bias", "learnable_skip")) or "norm" in name


@pytest.mark.parametrize("fields", [{}, {"use_bias": True}, {"slstm_conv_kernel_size": 4}, PAPER_FIELDS])
def test_weight_decay(fields, tmp_path):
    """No norm, bias or skip is decayed, by Trainer neither but for the paper's skip; the groups have every parameter
    once, and frozen ones not at all."""
    model = xLSTMForCausalLM(tiny_config(layer_types=MIXED, **fields))
    names = [name for name, _ in model.named_parameters()]
    decayed = {name for name in names if not is_spared(name)}
    assert 0 < len(decayed) < len(names)
    by_trainer = set(make_trainer(tmp_path, model).get_decay_parameter_names(model))
    assert {name for name in by_trainer - decayed if not name.endswith("learnable_skip")} == set()
    assert decayed <= by_trainer
    model.lm_head.weight.requires_grad_(False)
    groups = weight_decay_groups(model, 0.1)
    by_id = {id(x): name for name, x in model.named_parameters()}
    found = [{by_id[id(x)] for x in group["params"]} for group in groups]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert found == [decayed - {"lm_head.weight"}, set(names) - decayed]


@pytest.mark.slow
def test_learns_what_needs_memory(tmp_path):
    """The first token decides the last one, 30 random tokens later: both cells learn it."""
    generator = torch.Generator().manual_seed(0)
    for layer_types in (["mlstm"] * 2, ["slstm"] * 2):
        set_seed(0)
        model = xLSTMForCausalLM(tiny_config(layer_types=layer_types)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(400):
            ids = torch.randint(10, VOCAB_SIZE, (32, 32), generator=generator)
            ids[:, 0] = ids[:, -1] = torch.randint(0, 4, (32,), generator=generator)
            ids[:, -2] = 5  # asks for it
            labels = torch.full_like(ids, -100)
            labels[:, -1] = ids[:, -1]
            loss = model(ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < 0.1, layer_types


@pytest.mark.parametrize("options", ["mean", "num_items_in_batch", "shift_labels", "ignore_index"])
def test_loss_is_that_of_transformers(options):
    """The same value and gradient, in less memory, and for any number of rows at once."""
    generator = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(2, 300, 11, generator=generator)).requires_grad_()
    labels = torch.randint(11, (2, 300), generator=generator)
    labels[0, :7] = labels[1, 100:] = -100
    kwargs = {
        "mean": {},
        "num_items_in_batch": {"num_items_in_batch": torch.tensor(17)},
        "shift_labels": {"shift_labels": labels.roll(3)},
        "ignore_index": {"ignore_index": 5},
    }[options]
    if options == "ignore_index":
        labels = labels.clamp_min(0)
    expected = ForCausalLMLoss(logits, labels, 11, **kwargs)
    actual = causal_lm_loss(logits, labels, 11, **kwargs)
    assert relative_error(actual, expected) < 1e-6
    grads = [torch.autograd.grad(3 * loss, logits)[0] for loss in (actual, expected)]
    assert relative_error(*grads) < 1e-6
    assert tiny_model().loss_function is causal_lm_loss


def gradients_of_rows(model, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients (B, ...) of each row's summed loss as Opacus computes them: hooks keep the input of every layer
    that has parameters of its own and the gradient of its output, and the layer is called again by `torch.func`."""
    found, handles, parameters = {}, [], {p: name for name, p in model.named_parameters()}

    def keep(layer, inputs, _output):
        layer.kept = inputs[0].detach()

    def differentiate(layer, _dinputs, doutputs):
        own = dict(layer.named_parameters())
        functional = copy.deepcopy(layer)
        functional._forward_hooks.clear(), functional._backward_hooks.clear()

        def loss(own, x, dy):
            return (torch.func.functional_call(functional, own, x[None]) * dy).sum()

        values = {name: p.detach() for name, p in own.items()}
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, layer.kept, doutputs[0])
        for name, x in gradients.items():
            found[parameters[own[name]]] = found.get(parameters[own[name]], 0) + x

    def hook(module):
        if list(module.parameters(recurse=False)):
            module.ft_compute_sample_grad = differentiate  # what Opacus leaves there
            handles.append(module.register_forward_hook(keep))
            handles.append(module.register_full_backward_hook(differentiate))
        else:
            for child in module.children():
                hook(child)

    hook(model)
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").backward()
    return found


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("stack", STACKS)
def test_opacus_finds_the_gradients_of_rows(stack, padding):
    model = tiny_model(**STACKS[stack]).double()
    ids, mask = tokens(3, 10), torch.ones(3, 10).long()
    if padding:
        mask[0, 6:] = mask[2, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    rows = []
    for row in range(3):
        logits = model(ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[row, 1:], reduction="sum")
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    found = gradients_of_rows(model, {"input_ids": ids, "attention_mask": mask}, labels)
    for (name, _), expected in zip(model.named_parameters(), zip(*rows, strict=True), strict=True):
        assert relative_error(found[name], torch.stack(expected)) < 1e-9, name


@pytest.mark.parametrize("stack", ["slstm", "paper"])
def test_opacus_cannot_see_a_mask(stack):
    """The cell's layer is called again without."""
    model, mask = tiny_model(**STACKS[stack]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(NotImplementedError, match="Opacus"):
        gradients_of_rows(model, {"input_ids": tokens(2, 3), "attention_mask": mask}, tokens(2, 3))
    with pytest.raises(NotImplementedError, match="Opacus"):
        model(tokens(1, 4), seq_idx=torch.tensor([[0, 0, 1, 1]]))
