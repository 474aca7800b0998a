"""Two gloo processes on a CPU compute what one computes: tensor, data and pipeline parallelism; offloading.

All of it in float64, where an error is not mistaken for another order of summation.
"""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import relative_error
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_xlstm import xLSTMConfig, xLSTMForCausalLM
from hf_xlstm.configuration_xlstm import PAPER_FIELDS
from hf_xlstm.modeling_xlstm import xLSTMBlock


WORKERS = 2
IDS = torch.tensor([[5, 3, 17, 2, 9, 4, 11, 8, 6], [1, 1, 1, 12, 7, 3, 9, 30, 2]])
PADDED = IDS.ne(1).long()
GENERATION = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
VARIANTS = {
    "mlstm": {"tie_word_embeddings": True},
    "mixed": {"layer_types": ["mlstm", "slstm", "mlstm"], "slstm_conv_kernel_size": 4, "use_bias": True},
    "paper": PAPER_FIELDS | {"layer_types": ["mlstm", "slstm", "mlstm"]},
}


def random_model(**fields) -> xLSTMForCausalLM:
    torch.manual_seed(0)
    config = xLSTMConfig(
        vocab_size=68,
        hidden_size=32,
        num_hidden_layers=3,  # the stages of a pipeline differ
        num_heads=4,
        chunk_size=4,
        **fields,
    )
    model = xLSTMForCausalLM(config)
    for parameter in model.parameters():  # no gate at its starting value, so that every gradient counts
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


@pytest.fixture(autouse=True)
def norms_and_logits_in_float64(monkeypatch):
    """What a model computes in float32 whatever its dtype. The processes that a test starts do the same."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def launch(function, *args) -> None:
    """Runs `function(rank, *args)` in processes that see what torchrun sets. They fork from a server that has imported
    everything, which takes seconds, once."""
    mp.get_context("forkserver").set_forkserver_preload(["transformers.trainer", "hf_xlstm", "torch._dynamo"])
    with socket.socket() as port:
        port.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port.getsockname()[1])}
    mp.start_processes(_worker, (address, function, args), nprocs=WORKERS, start_method="forkserver")


def _worker(rank: int, address: dict[str, str], function, args: tuple) -> None:
    os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    torch.set_num_threads(1)
    torch.Tensor.float = torch.Tensor.double
    dist.init_process_group("gloo")
    function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()


def check_generation(model: xLSTMForCausalLM, whole: xLSTMForCausalLM, rows: slice = slice(None)) -> None:
    """The logits of every step, since a lost state need not change the likeliest token."""
    options = GENERATION | {"output_logits": True, "return_dict_in_generate": True}
    expected = whole.generate(IDS, attention_mask=PADDED, **options)
    actual = model.generate(IDS[rows], attention_mask=PADDED[rows], **options)
    assert actual.sequences.equal(expected.sequences[rows])
    for step, logits in zip(actual.logits, expected.logits, strict=True):
        assert relative_error(step, logits[rows]) < 1e-12


def full(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def check_equal(model: xLSTMForCausalLM, directory: Path, rank: int, rows: slice) -> None:
    """Logits, loss, every gradient and generation of the sharded model, given `rows` of the batch, against those
    of the whole model; then saves it."""
    whole = xLSTMForCausalLM.from_pretrained(directory)
    for attention_mask in (None, PADDED):
        expected = whole(IDS, attention_mask=attention_mask)
        mask = None if attention_mask is None else attention_mask[rows]
        outputs = model(IDS[rows], attention_mask=mask)
        assert relative_error(outputs.logits, expected.logits[rows]) < 1e-12

    model.train()
    whole(IDS, labels=IDS).loss.backward()
    model(IDS[rows], labels=IDS[rows]).loss.backward()
    for (name, parameter), sharded in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert relative_error(full(sharded.grad), parameter.grad) < 1e-10, name
    model.eval()
    check_generation(model, whole, rows)
    model.save_pretrained(directory / "saved")


def check_tensor_parallel(rank: int, directory: Path) -> None:
    model = xLSTMForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(tp_size=WORKERS))
    layer = model.backbone.blocks[0].mlstm_layer
    if model.config.block_family == "large":  # the paper's blocks are whole on every rank
        assert layer.q.weight.to_local().shape == (8, 32) and layer.igate_preact.weight.to_local().shape == (2, 32)
    check_equal(model, directory, rank, slice(None))


def check_fsdp(rank: int, directory: Path) -> None:
    model = xLSTMForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(fsdp_size=WORKERS))
    assert model.backbone.blocks[0].mlstm_layer.out_proj.weight.to_local().shape[0] == 16
    check_equal(model, directory, rank, slice(rank, rank + 1))


def check_pipeline(rank: int, directory: Path) -> None:
    model = xLSTMForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(pp_size=WORKERS))
    assert sum(isinstance(block, xLSTMBlock) for block in model.backbone.blocks) in (1, 2)  # of three
    whole = xLSTMForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for mask in (None, PADDED):
            expected = whole(IDS, attention_mask=mask).logits
            assert relative_error(model(IDS, attention_mask=mask).logits, expected) < 1e-12
    check_generation(model, whole)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("check", [check_tensor_parallel, check_fsdp, check_pipeline])
def test_two_processes_equal_one(check, variant, tmp_path):
    whole = random_model(**VARIANTS[variant])
    whole.save_pretrained(tmp_path)
    launch(check, tmp_path)
    if check is not check_pipeline:  # what two processes save, one loads
        saved = xLSTMForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
        assert saved.keys() == whole.state_dict().keys()
        for name, parameter in whole.state_dict().items():
            assert parameter.equal(saved[name]), name


def train(rank: int, directory: Path, batch_size: int) -> None:
    """Two steps of Trainer over rows with different numbers of labels."""
    model = xLSTMForCausalLM.from_pretrained(directory)
    rows = [{"input_ids": ids, "labels": ids.where(ids > i, -100)} for i, ids in enumerate(torch.cat([IDS, IDS + 9]))]
    arguments = TrainingArguments(
        output_dir=directory / f"trained_{batch_size}",
        use_cpu=True,
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to="none",
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 2
    trainer.save_model()


def test_data_parallel_training_equals_one_process(tmp_path):
    random_model(**VARIANTS["mixed"]).save_pretrained(tmp_path)
    train(0, tmp_path, 2)
    launch(train, tmp_path, 1)
    one, two = (xLSTMForCausalLM.from_pretrained(tmp_path / f"trained_{size}") for size in (2, 1))
    start = xLSTMForCausalLM.from_pretrained(tmp_path)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), start.parameters(), strict=True):
        assert relative_error(b, a) < 1e-12, name
        assert not a.equal(c)


def test_offload(tmp_path):
    whole = random_model(**VARIANTS["mixed"])
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    model = xLSTMForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": "40KB"}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in model.hf_device_map.values()
    assert relative_error(model(IDS).logits, whole(IDS).logits) < 1e-12
    check_generation(model, whole)
