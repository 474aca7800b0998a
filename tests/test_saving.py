"""What `save_pretrained` writes and `from_pretrained` reads: files of one save, damaged files, unindexed shards."""

import json
import os
import threading

import pytest
import torch
import transformers
from common import MIXED, STACKS, tiny_config, tiny_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, modeling_utils

from hf_xlstm import hub, xLSTMConfig, xLSTMForCausalLM
from hf_xlstm.conversion import convert_checkpoint


def save_id(directory) -> str | None:
    return json.loads((directory / "config.json").read_text()).get("save_id")


def number_shards(directory) -> None:
    """Gives the shards of a checkpoint the names they have in the scaling-law runs of NX-AI, which have no index."""
    for index, path in enumerate(sorted(directory.glob("model-*.safetensors"))):
        path.rename(directory / f"model_{index}.safetensors")
    (directory / "model.safetensors.index.json").unlink()


# ---- files of one save


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_save_cut_off_over_another_model_is_noticed(max_shard_size, tmp_path):
    old, new = tiny_model(layer_types=MIXED), tiny_model(seed=1, layer_types=MIXED, output_logit_soft_cap=5.0)
    old.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = 0
    write = modeling_utils.safe_save_file

    def stop(*args, **kwargs):
        nonlocal shards
        shards += 1
        if shards == (2 if max_shard_size == "20KB" else 1):
            raise KeyboardInterrupt
        write(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(modeling_utils, "safe_save_file", stop)
        new.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    for read in (xLSTMForCausalLM.from_pretrained, lambda path: convert_checkpoint(path, tmp_path / "target")):
        with pytest.raises(ValueError, match=r"config\.json and model.*safetensors in .* are not of the same save"):
            read(tmp_path)
    new.save_pretrained(tmp_path, max_shard_size=max_shard_size)  # once more, to the end
    assert torch.equal(xLSTMForCausalLM.from_pretrained(tmp_path).lm_head.weight, new.lm_head.weight)


def test_files_that_say_nothing_are_accepted(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    fields = json.loads(config.read_text())
    save_file(load_file(file), file, {"format": "pt"})  # as other tools rewrite weights
    assert torch.equal(xLSTMForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)
    model.save_pretrained(tmp_path)
    config.write_text(json.dumps({name: value for name, value in fields.items() if name != "save_id"}))
    assert torch.equal(xLSTMForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_configuration_edited_in_place_stays_with_its_weights(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    before = save_id(tmp_path)
    config = xLSTMConfig.from_pretrained(tmp_path)
    config.chunk_size = 16
    config.save_pretrained(tmp_path)
    assert save_id(tmp_path) == before
    model = xLSTMForCausalLM.from_pretrained(tmp_path)
    assert model.config.chunk_size == 16 and model.config.save_id is None
    model.save_pretrained(tmp_path)
    assert save_id(tmp_path) != before


def test_others_read_and_write_what_has_a_save_id(tmp_path):
    model, ids = tiny_model(hidden_size=128, num_heads=2), tokens(2, 9)
    model.save_pretrained(tmp_path / "ours")
    in_tree = transformers.xLSTMForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(in_tree(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    in_tree.save_pretrained(tmp_path / "theirs")
    assert torch.equal(xLSTMForCausalLM.from_pretrained(tmp_path / "theirs")(ids).logits, model(ids).logits)
    PreTrainedConfig.from_pretrained(tmp_path / "ours")  # as Trainer does
    convert_checkpoint(tmp_path / "ours", tmp_path / "large", to="xlstm_large")
    convert_checkpoint(tmp_path / "large", tmp_path / "again")
    assert save_id(tmp_path / "again") is None
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("stack", STACKS)
def test_saving_leaves_the_configuration_as_it_was(stack, tmp_path):
    model = tiny_model(**STACKS[stack])
    config, before = model.config, dict(model.config.__dict__)
    model.save_pretrained(tmp_path)
    assert model.config is config and config.__dict__ == before
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(modeling_utils, "safe_save_file", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError()))
        model.save_pretrained(tmp_path)
    assert model.config is config and config.__dict__ == before


def test_saving_from_two_threads(tmp_path):
    """Each file has the metadata of its own save, and Transformers' writer is itself again afterwards."""
    write = modeling_utils.safe_save_file
    models = [tiny_model(seed=seed) for seed in range(2)]
    directories = [tmp_path / str(index) for index in range(2)]
    threads = [threading.Thread(target=m.save_pretrained, args=(d,)) for m, d in zip(models, directories)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert modeling_utils.safe_save_file is write
    for directory in directories:
        with safe_open(directory / "model.safetensors", framework="pt") as file:
            assert file.metadata()["save_id"] == save_id(directory)
    assert save_id(directories[0]) != save_id(directories[1])


def test_code_is_parsed_once(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path, with_code=True)
    monkeypatch.setattr(hub.ast, "parse", None)
    model.save_pretrained(tmp_path / "again", with_code=True)
    assert (tmp_path / "again" / "modeling_xlstm.py").read_text() == (tmp_path / "modeling_xlstm.py").read_text()


# ---- damaged files


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize(
    "damage", [lambda x: x[:-10], lambda x: b"", lambda x: b"hello world"], ids=["cut", "empty", "text"]
)
def test_damaged_weights_are_named(damage, max_shard_size, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size=max_shard_size)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{file.name} cannot be read, it is damaged or cut off") as error:
        xLSTMForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"weight_map": {}}', '{"weight_map": 1, "metadata": {}}'])
def test_damaged_index_is_named(text, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json cannot be read"):
        xLSTMForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["a: [", "[1, 2]", "a: 1", "- \x00"])
def test_damaged_yaml_is_named(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml") as error:
        xLSTMConfig.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_generation_config_is_named(tmp_path):
    """Transformers would leave it out, and generate by other defaults, in silence."""
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read"):
        xLSTMForCausalLM.from_pretrained(tmp_path)


# ---- shards without an index


@pytest.mark.parametrize("cls", [xLSTMForCausalLM, AutoModelForCausalLM])
def test_numbered_shards_without_an_index(cls, tmp_path):
    """A run of NX-AI/xlstm_scaling_laws: `embedding_dim`, a folder in the repository, `model_{n}.safetensors`."""
    model, ids = tiny_model(), tokens(2, 9)
    run = tmp_path / "runs" / "1"
    model.save_pretrained(run, max_shard_size="5KB")
    number_shards(run)
    assert len(list(run.glob("model_*"))) > 10  # 2 comes before 10
    config = json.loads((run / "config.json").read_text())
    config |= {"embedding_dim": config.pop("hidden_size"), "num_blocks": config.pop("num_hidden_layers")}
    (run / "config.json").write_text(json.dumps(config))
    loaded, info = cls.from_pretrained(tmp_path / "runs", subfolder="1", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert cls.from_pretrained(run, max_inference_chunksize=7).config.max_inference_chunksize == 7
    loaded.save_pretrained(tmp_path / "again")
    assert "transformers_weights" not in json.loads((tmp_path / "again" / "config.json").read_text())
    (run / "model_3.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks weights"):
        cls.from_pretrained(run)


def test_directory_without_weights_is_named(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors.*" + os.path.basename(tmp_path)):
        xLSTMForCausalLM.from_pretrained(tmp_path)


# ---- special tokens


@pytest.mark.parametrize("stack", STACKS)
def test_no_token_is_padding_because_of_its_id(stack, caplog):
    """The default `pad_token_id` is 1, an ordinary token of most vocabularies."""
    model = tiny_model(**STACKS[stack])
    model.generation_config = GenerationConfig.from_model_config(xLSTMConfig())
    assert model.generation_config.pad_token_id == 1
    ids = torch.tensor([[1, 5, 1, 7, 9, 1], [1, 1, 1, 3, 3, 2]])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    plain = model.generate(ids, **options)
    assert torch.equal(plain, model.generate(ids, attention_mask=torch.ones_like(ids), **options))
    masked = model.generate(ids, attention_mask=(ids != 1).long(), **options)  # who says so is heard
    assert not torch.equal(plain, masked)
