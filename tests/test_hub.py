"""Conversations with a Hub on localhost, by the real client; each in a process of its own, as strangers have them."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from common import STACKS
from common import tiny_model as memorable_model
from hub_server import TOKEN, USER, HubServer
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_xlstm
from hf_xlstm import xLSTMConfig, xLSTMForCausalLM
from hf_xlstm.commands import share
from hf_xlstm.hub import AUTO_MAP, flat_modules, save_self_contained
from hf_xlstm_cli import run_verb


REPOSITORY = f"{USER}/tiny"
PROMPT = [[5, 3, 7, 2, 9, 4]]
# Interpreters of environments with other versions of Transformers, as tests/matrix.sh makes them.
PYTHONS = [path for path in os.environ.get("HF_XLSTM_PYTHONS", "").split(os.pathsep) if path]
# what a process sees where neither the package nor Triton was ever installed
STRANGER = "import sys; sys.modules['hf_xlstm'] = sys.modules['triton'] = None\n"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["[UNK]", "Once", "upon", "a", "time"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def tiny_model(layer_types: list[str] | None = None, seed: int = 0) -> xLSTMForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4}
    return xLSTMForCausalLM(xLSTMConfig(**sizes, layer_types=layer_types)).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(torch.tensor(PROMPT)).logits


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def start(hub, tmp_path):
    """Starts `python -c code arguments` or any other command as a client of the hub, with an empty cache."""

    def start(*command: str, token: str = TOKEN) -> subprocess.Popen:
        home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
        return subprocess.Popen(command, env={**os.environ, **hub.environment, **home}, **options)

    return start


@pytest.fixture
def run(start):
    def run(*command: str, **options) -> str:
        process = start(*command, **options)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    return run


def python(code: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *map(str, arguments))


# --- self-contained folders ------------------------------------------------------------------------------------------


def test_flat_modules_stand_alone():
    modules = flat_modules()
    assert {f"{reference.split('.')[0]}.py" for reference in AUTO_MAP.values()} <= set(modules)
    assert not any("triton" in name for name in modules)
    for source in modules.values():
        compile(source, "module", "exec")
        # the pattern by which Transformers finds the files that a module needs
        for needed in re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE):
            assert f"{needed}.py" in modules


def test_package_wins_over_the_code_in_a_folder(tmp_path):
    save_self_contained(tiny_model(["mlstm", "slstm"]), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is hf_xlstm.xLSTMForCausalLM


@pytest.mark.parametrize("first", ["code of the folder", "package"])
def test_package_and_copies_of_its_code_live_in_one_process(first, run, tmp_path):
    """Each with operators of its own: one registered twice would replace the other one's."""
    for name in ("one", "two"):
        save_self_contained(tiny_model(["mlstm", "slstm"]), tmp_path / name)
    code = f"""
import torch
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

def from_package():
    import hf_xlstm
    return [AutoModelForCausalLM.from_pretrained("one", trust_remote_code=True)]

def from_folders():
    reference = "modeling_xlstm.xLSTMForCausalLM"
    return [get_class_from_dynamic_module(reference, name).from_pretrained(name) for name in ("one", "two")]

def use(model):
    ids = torch.tensor({PROMPT})
    outputs = model(ids, labels=ids)
    gradients = torch.autograd.grad(outputs.loss, model.parameters())
    return torch.cat([x.flatten() for x in (outputs.logits, *gradients)])

loaders = [from_package, from_folders]
models = loaders[{first == "package"} - 1]()
before = use(models[0])
models += loaders[0 - {first == "package"}]()
assert len({{type(model).__module__ for model in models}}) == 3
for model in models:
    torch.testing.assert_close(use(model), before)
"""
    run(*python(code))


def test_folder_works_for_a_stranger_and_can_be_saved_again(run, tmp_path):
    model = tiny_model(["mlstm", "slstm"])
    model.generation_config.max_new_tokens = 8
    save_self_contained(model, tmp_path / "first", tiny_tokenizer())
    code = f"""{STRANGER}
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
prompt = torch.tensor({PROMPT})
model = AutoModelForCausalLM.from_pretrained("first", trust_remote_code=True)
model.save_pretrained("second")
again = AutoModelForCausalLM.from_pretrained("second", trust_remote_code=True)
assert type(again).__module__.startswith("transformers_modules.")
torch.save((again(prompt).logits, again.generate(prompt, do_sample=False)), "results.pt")
for name, reference in {AUTO_MAP}.items():
    loaded = getattr(transformers, name).from_pretrained("second", trust_remote_code=True)
    assert type(loaded).__name__ == reference.split(".")[1]
    for part in (loaded, getattr(loaded, "backbone", loaded)):  # not Transformers' own
        assert type(part).__module__.startswith("transformers_modules.")
tokenizer = AutoTokenizer.from_pretrained("first", trust_remote_code=True)
assert tokenizer("Once upon a time").input_ids == [1, 2, 3, 4]
"""
    run(*python(code))
    seen_logits, seen_tokens = torch.load(tmp_path / "results.pt")
    torch.testing.assert_close(seen_logits, logits(model))
    expected = model.generate(torch.tensor(PROMPT), do_sample=False)
    assert expected.shape[1] == len(PROMPT[0]) + 8
    torch.testing.assert_close(seen_tokens, expected)
    assert {path.name for path in (tmp_path / "second").glob("*.py")} == set(flat_modules())


def test_code_is_written_only_to_be_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(xLSTMForCausalLM, "_saves_code", False)
    model = tiny_model(["mlstm", "slstm"])
    before = model.config.to_dict()

    def code(name: str) -> set[str]:
        """The code files in a directory, which its configuration knows of."""
        files = {path.name for path in (tmp_path / name).glob("*.py")}
        assert ("auto_map" in json.loads((tmp_path / name / "config.json").read_text())) == bool(files)
        return files

    model.save_pretrained(tmp_path / "plain")
    assert not code("plain")
    save_self_contained(model, tmp_path / "shared")
    assert code("shared") == set(flat_modules())
    model.save_pretrained(tmp_path / "again")  # the call before has left no trace
    assert not code("again")
    model.register_for_auto_class()
    model.config.register_for_auto_class()  # as people are told to do with code of their own
    model.save_pretrained(tmp_path / "registered")
    assert code("registered") == set(flat_modules())
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").iterdir())
    assert model.config.to_dict() == before

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shared")
    loaded.config.save_pretrained(tmp_path / "config")
    assert not code("config")
    loaded.config.save_pretrained(tmp_path / "shared")  # where its code is
    assert code("shared") == set(flat_modules())


@pytest.mark.parametrize("name", ["my model (1)", "Müller+Söhne", "v1.5-final", "3b", "class", "."])
def test_any_directory_name_works_for_a_stranger(name, run, tmp_path):
    directory = tmp_path / "parent" / name
    model = tiny_model(["mlstm", "slstm"])
    save_self_contained(model, directory)
    code = f"""{STRANGER}
import os, sys, torch
from transformers import AutoModelForCausalLM
os.chdir(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
torch.save(model(torch.tensor({PROMPT})).logits, sys.argv[3])
"""
    where = directory if name == "." else directory.parent
    run(*python(code, where, name, tmp_path / "logits.pt"))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model))


GREEDY = f"""{STRANGER}
import torch, transformers
from transformers import AutoModelForCausalLM
ids = torch.tensor([[5, 3, 7, 2, 9, 4], [0, 0, 0, 8, 6, 1]])
options = {{"attention_mask": (ids != 0).long(), "max_new_tokens": 24, "do_sample": False}}
texts = {{}}
for name in {list(STACKS)}:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    texts[name] = [model.generate(ids, **options, use_cache=use_cache) for use_cache in (True, False)]
torch.save([transformers.__version__, texts], "texts.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHONS, reason="HF_XLSTM_PYTHONS names no interpreters with other versions of Transformers")
@pytest.mark.parametrize("interpreter", PYTHONS)
def test_folder_generates_the_same_text_on_every_version(interpreter, tmp_path):
    """Greedy text by the code in the folder, in a clean process; with the state, and from all tokens at every step."""
    ids = torch.tensor([[5, 3, 7, 2, 9, 4], [0, 0, 0, 8, 6, 1]])
    expected = {}
    for stack, fields in STACKS.items():
        model = memorable_model(**fields)
        save_self_contained(model, tmp_path / stack)
        options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 24, "do_sample": False}
        expected[stack] = model.generate(ids, **options)
        assert expected[stack].shape == (2, 30)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [interpreter, "-c", GREEDY]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    version, texts = torch.load(tmp_path / "texts.pt")
    for stack, (with_cache, without) in texts.items():
        assert torch.equal(with_cache, expected[stack]), (version, stack)
        assert torch.equal(without, expected[stack]), (version, stack)


def test_default_card(tmp_path):
    save_self_contained(tiny_model(["mlstm", "slstm"]), tmp_path / "mixed")
    save_self_contained(tiny_model(), tmp_path / "pure")
    mixed, pure = (ModelCard.load(tmp_path / name / "README.md") for name in ("mixed", "pure"))
    assert mixed.data.library_name == "transformers" and mixed.data.pipeline_tag == "text-generation"
    assert "1 mlstm blocks, 1 slstm blocks" in mixed.content and "opens this checkpoint" not in mixed.content
    assert "2 mlstm blocks" in pure.content and "opens this checkpoint" in pure.content


def test_plain_transformers_opens_pure_mlstm_and_refuses_slstm(run, tmp_path):
    pure = tiny_model()
    save_self_contained(pure, tmp_path / "pure")
    save_self_contained(tiny_model(["mlstm", "slstm"]), tmp_path / "mixed")
    code = f"""{STRANGER}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("pure", trust_remote_code=False)
assert type(model).__module__.startswith("transformers.models.")
torch.save(model(torch.tensor({PROMPT}), use_cache=False).logits, "logits.pt")
try:
    AutoModelForCausalLM.from_pretrained("mixed", trust_remote_code=False)
except Exception as error:
    print("refused:", error)
"""
    output = run(*python(code))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(pure))
    assert re.search(r"refused: .*layer_types", output, flags=re.DOTALL), output


# --- conversations ---------------------------------------------------------------------------------------------------


def test_sharded_push_and_use_by_a_stranger(hub, run, tmp_path):
    model = tiny_model(["slstm", "mlstm"])
    save_self_contained(model, tmp_path / "model")
    push = f"""
from transformers import AutoModelForCausalLM
import hf_xlstm
model = AutoModelForCausalLM.from_pretrained("model")
model.push_to_hub("{REPOSITORY}", max_shard_size="20KB")
model.push_to_hub("{REPOSITORY}", revision="whole")
"""
    use = f"""{STRANGER}
import torch
from transformers import AutoModelForCausalLM
for revision in ("main", "whole"):
    model = AutoModelForCausalLM.from_pretrained("{REPOSITORY}", revision=revision, trust_remote_code=True)
    torch.save(model(torch.tensor({PROMPT})).logits, f"{{revision}}.pt")
"""
    run(*python(f"from huggingface_hub import HfApi; HfApi().create_repo('{REPOSITORY}')"))
    hub.find(REPOSITORY).commit("whole", {})
    run(*python(push))
    files = hub.files(REPOSITORY)
    assert {"config.json", "generation_config.json", "README.md", *flat_modules()} <= set(files)
    assert len([name for name in files if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]) > 1
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    assert "model.safetensors" in hub.files(REPOSITORY, "whole")

    run(*python(use))
    for revision in ("main", "whole"):
        torch.testing.assert_close(torch.load(tmp_path / f"{revision}.pt"), logits(model))


def test_numbered_shards_without_an_index_on_the_hub(run, tmp_path):
    """As in NX-AI/xlstm_scaling_laws: a folder for each run, found by `subfolder`."""
    model = tiny_model(["mlstm", "slstm"])
    folder = tmp_path / "folder" / "run"
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    for index, path in enumerate(shards):
        path.rename(folder / f"model_{index}.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    code = f"""
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM
import hf_xlstm
HfApi().create_repo("{REPOSITORY}")
HfApi().upload_folder(repo_id="{REPOSITORY}", folder_path="folder")
model = AutoModelForCausalLM.from_pretrained("{REPOSITORY}", subfolder="run")
torch.save(model(torch.tensor({PROMPT})).logits, "logits.pt")
"""
    run(*python(code))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model))


def test_history_branches_card_and_deletion(hub, run):
    code = f"""
from pathlib import Path
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
api = HfApi()
api.create_repo("{REPOSITORY}")
first = api.upload_file(path_or_fileobj=b"one", path_in_repo="a.txt", repo_id="{REPOSITORY}")
api.create_branch("{REPOSITORY}", branch="work")
api.upload_file(path_or_fileobj=b"two", path_in_repo="a.txt", repo_id="{REPOSITORY}")
read = lambda revision: Path(hf_hub_download("{REPOSITORY}", "a.txt", revision=revision)).read_text()
assert [read(first.oid), read("work"), read("main")] == ["one", "one", "two"]

card = b"---\\nlicense: apache-2.0\\n---\\n# tiny"
api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="{REPOSITORY}")
assert ModelCard.load("{REPOSITORY}").data.license == "apache-2.0"
api.delete_file("a.txt", "{REPOSITORY}")
assert [path.name for path in Path(snapshot_download("{REPOSITORY}")).iterdir()] == ["README.md"]
api.delete_repo("{REPOSITORY}")
assert not api.repo_exists("{REPOSITORY}")
"""
    run(*python(code))
    assert not hub.repositories


def test_command_line(hub, run, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights.safetensors").write_bytes(os.urandom(100_000))
    hf = str(Path(sys.executable).with_name("hf"))
    assert USER in run(hf, "auth", "whoami")
    run(hf, "upload", REPOSITORY, "folder")  # creates the repository
    run(hf, "download", REPOSITORY, "--local-dir", "copy")
    original, copy = (tmp_path / name / "weights.safetensors" for name in ("folder", "copy"))
    assert copy.read_bytes() == original.read_bytes()


def test_interrupted_push_leaves_the_repository_as_it_was(hub, start, run, tmp_path):
    save_self_contained(tiny_model(), tmp_path / "model")
    code = "from huggingface_hub import HfApi; HfApi().upload_folder(repo_id='{}', folder_path='model')"
    push = python(code.format(REPOSITORY))
    run(*python(f"from huggingface_hub import HfApi; HfApi().create_repo('{REPOSITORY}')"))
    run(*push)
    before = hub.files(REPOSITORY)

    save_self_contained(tiny_model(seed=1), tmp_path / "model", card="# another")
    interrupted = []
    hub.before_upload = lambda: interrupted[0].kill()
    interrupted.append(start(*push))
    interrupted[0].communicate()
    assert interrupted[0].returncode == -signal.SIGKILL
    assert hub.files(REPOSITORY) == before

    hub.before_upload = lambda: None
    run(*push)
    after = hub.files(REPOSITORY)
    assert after["README.md"] == b"# another" and after["model.safetensors"] != before["model.safetensors"]


def test_wrong_token_and_missing_repository_give_clear_errors(hub, start):
    hub.repositories.clear()
    download = f"from huggingface_hub import snapshot_download; snapshot_download('{USER}/missing')"
    output, _ = start(*python(download)).communicate()
    assert "RepositoryNotFoundError" in output and f"{USER}/missing" in output

    create = f"from huggingface_hub import HfApi; HfApi().create_repo('{REPOSITORY}')"
    output, _ = start(*python(create), token="hf_wrong").communicate()
    assert "401" in output and "Invalid credentials" in output
    assert not hub.repositories


@pytest.fixture
def trained(tmp_path) -> Path:
    """The output directory of scripts/train.py, and something in it that is not to be published."""
    tiny_model(["mlstm", "slstm"]).save_pretrained(tmp_path / "run")
    tiny_tokenizer().save_pretrained(tmp_path / "run")
    metrics = {"bits_per_byte": 2.5, "yardsticks": {"lzma": 3.5}, "corpus": "four words", "parameters": 35432}
    sizes = ("train_bytes", "train_tokens", "heldout_bytes", "steps", "tokens_seen", "training_seconds")
    metrics |= dict.fromkeys(sizes, 7) | {"layer_types": ["mlstm", "slstm"], "device": "cpu", "arguments": {"seed": 0}}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    evaluation = [{"task": "my task", "metric": "acc", "value": 0.25, "stderr": 0.125, "shots": 2}]
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "run" / "optimizer.pt").write_bytes(b"state")
    return tmp_path / "run"


def test_dry_run_shows_what_would_be_sent(trained, capsys):
    with pytest.raises(SystemExit) as end:
        run_verb("share", [str(trained), REPOSITORY, "--dry-run"], "share")
    assert not end.value.code
    shown = capsys.readouterr().out
    assert "| model.safetensors |" in shown and "| evaluation.json |" in shown and "optimizer.pt" not in shown
    assert "| lzma | 3.500 |" in shown and "four words" in shown
    assert "| my task | acc | 0.2500 ± 0.1250 | 2 shots |" in shown


@pytest.mark.parametrize("text", [None, "{", "{}"], ids=["missing", "damaged", "empty"])
def test_push_of_what_train_did_not_write(text, trained, capsys):
    (trained / "metrics.json").unlink()
    if text is not None:
        (trained / "metrics.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        run_verb("share", [str(trained), REPOSITORY, "--dry-run"], "share")
    line = capsys.readouterr().err.splitlines()[-1]  # below the bars of loading
    assert "metrics.json" in line and str(trained) in line


def test_card_metadata_is_a_model_index(trained, tmp_path):
    card = share.prepare(trained, tmp_path / "out", REPOSITORY, "mit", "en")
    read = ModelCard.load(tmp_path / "out" / "README.md").data
    assert read.to_dict() == card.data.to_dict()
    assert (read.license, read.language, read.model_name) == ("mit", "en", "tiny")
    assert {"xlstm", "mlstm", "slstm", "custom_code"} == set(read.tags)
    heldout, task = read.eval_results
    assert (heldout.metric_type, heldout.metric_value) == ("bits_per_byte", 2.5)
    assert (task.dataset_name, task.metric_type, task.metric_value) == ("my task", "acc", 0.25)
    assert task.metric_args == {"shots": 2}
    (entry,) = eval_results_to_model_index("tiny", read.eval_results)  # what the Hub reads
    assert entry == read.to_dict()["model-index"][0]


@pytest.mark.slow
def test_push_script_publishes_what_its_card_says(hub, run, trained):
    run(sys.executable, "-m", "hf_xlstm_cli", "share", str(trained), REPOSITORY)
    files = hub.files(REPOSITORY)
    published = {"config.json", "model.safetensors", "tokenizer.json", "metrics.json", *flat_modules()}
    assert published <= set(files) and "optimizer.pt" not in files
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.eval_results[0].metric_value == 2.5
    example = re.search(r"```python\n(.*?)```", card.content, flags=re.DOTALL)[1]
    assert "Once upon a time" in run(*python(STRANGER + example))


@pytest.mark.slow
def test_trainer_pushes_what_a_stranger_can_use(hub, run, tmp_path):
    save_self_contained(tiny_model(["mlstm", "slstm"]), tmp_path / "model")
    train = f"""
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import hf_xlstm
rows = [{{"input_ids": torch.arange(8), "labels": torch.arange(8)}}] * 4
arguments = TrainingArguments(
    "trained", push_to_hub=True, hub_model_id="{REPOSITORY}", max_steps=2, save_steps=1, report_to=[], use_cpu=True
)
model = AutoModelForCausalLM.from_pretrained("model")
model.register_for_auto_class()  # Trainer's checkpoints are to be shared
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
trainer.push_to_hub()
torch.save(trainer.model.eval()(torch.tensor({PROMPT})).logits, "trained.pt")
"""
    use = f"""{STRANGER}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{REPOSITORY}", trust_remote_code=True)
torch.save(model(torch.tensor({PROMPT})).logits, "used.pt")
"""
    run(*python(train))
    run(*python(use))
    torch.testing.assert_close(torch.load(tmp_path / "used.pt"), torch.load(tmp_path / "trained.pt"))
