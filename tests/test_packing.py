"""Packing as data collators and TRL do it: losses and gradients are those of the separate sequences."""

import pytest
import torch
from common import MIXED, STACKS, relative_error, tiny_model, tokens
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_xlstm.commands.helpers.tokens import train_tokenizer


mixed = {"layer_types": MIXED, "slstm_conv_kernel_size": 4}
LENGTHS = (5, 1, 17, 9, 2)
COLLATORS = {
    "position_ids": {"return_position_ids": True},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "flash_attention": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "all": {"return_position_ids": True, "return_seq_idx": True, "return_flash_attn_kwargs": True},
}
LINES = [
    "the slithy toves",
    "did gyre",
    "and gimble in the wabe all mimsy",
    "were",
    "the borogoves and the mome raths",
]


def documents() -> list[dict[str, list[int]]]:
    return [{"input_ids": tokens(1, length, seed=length)[0].tolist()} for length in LENGTHS]


def separate_loss(model, documents) -> torch.Tensor:
    """Mean over all predicted tokens, one document at a time."""
    losses = []
    for document in documents:
        ids = torch.tensor([document["input_ids"]])
        if ids.shape[1] > 1:  # one token predicts nothing
            losses.append(model(ids, labels=ids).loss * (ids.shape[1] - 1))
    return sum(losses) / sum(len(document["input_ids"]) - 1 for document in documents)


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("variant", [{}, mixed], ids=["mlstm", "mixed"])
def test_flattening_collator(variant, collator):
    model = tiny_model(**variant).train()
    separate_loss(model, documents()).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    batch = DataCollatorWithFlattening(**COLLATORS[collator])(documents())
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    loss = model(**batch).loss
    loss.backward()
    assert relative_error(loss, separate_loss(model, documents())) < 1e-6
    for name, parameter in model.named_parameters():
        # what reaches the biases of the gates nearly cancels
        assert relative_error(parameter.grad, expected[name]) < 1e-4, name


@pytest.mark.parametrize("stack", STACKS)
def test_hidden_states_have_the_shape_of_the_batch(stack):
    model, ids = tiny_model(**STACKS[stack]), tokens(2, 12)
    packed = model(ids, seq_idx=(torch.arange(12) // 4).expand(2, -1), output_hidden_states=True).hidden_states
    separate = model(ids.view(6, 4), output_hidden_states=True).hidden_states
    for x, y in zip(packed, separate, strict=True):
        assert x.shape == (2, 12, 32)
        assert relative_error(x, y.view(2, 12, 32)) < 1e-5


def test_documents_do_not_see_each_other():
    """And would, were they only joined: the comparison above can fail."""
    model, packed = tiny_model(**mixed), DataCollatorWithFlattening()(documents())
    changed = {name: x.clone() for name, x in packed.items()}
    changed["input_ids"][0, 2] += 1
    difference = (model(**packed).logits - model(**changed).logits).abs().amax((0, 2))
    assert difference[2 : LENGTHS[0]].min() > 0 and difference[LENGTHS[0] :].max() == 0
    joined = [model(input_ids=x["input_ids"]).logits for x in (packed, changed)]
    assert (joined[0] - joined[1]).abs().amax((0, 2))[LENGTHS[0] :].min() > 0


def test_trainer_with_flattening_collator(tmp_path):
    model = tiny_model(**mixed)
    expected = separate_loss(model.train(), documents()).item()
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, per_device_train_batch_size=len(LENGTHS), num_train_epochs=1, logging_steps=1
    )
    collator = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    trainer = Trainer(model, arguments, train_dataset=documents(), data_collator=collator)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)  # as logged, rounded


TRL = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True, "packing_strategy": "bfd", "max_length": 40},
}


@pytest.mark.slow
def test_trl_packing(tmp_path):
    trl = pytest.importorskip("trl", reason="SFT needs trl")
    datasets = pytest.importorskip("datasets", reason="trl needs datasets")
    tokenizer = train_tokenizer(LINES, vocab_size=280)
    model = tiny_model(vocab_size=len(tokenizer), **mixed)
    losses = {}
    for name, options in TRL.items():
        config = trl.SFTConfig(
            str(tmp_path),
            **options,
            per_device_train_batch_size=len(LINES),
            max_steps=1,
            learning_rate=0.0,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        )
        dataset = datasets.Dataset.from_list([{"text": line} for line in LINES])
        trainer = trl.SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        assert (batch["input_ids"].shape[0] == 1) == (name != "padded")
        trainer.train()
        losses[name] = trainer.state.log_history[0]["loss"]
        if name == "padded":
            expected = separate_loss(model, trainer.train_dataset).item()
    assert all(loss == pytest.approx(expected, abs=1e-4) for loss in losses.values()), (expected, losses)
