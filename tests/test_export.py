"""Exported models: the forward pass as a program of torch.export, and of OpenVINO and ONNX Runtime."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import MIXED, STACKS, assert_same_states, relative_error, tiny_model, tokens
from transformers import GenerationConfig

from hf_xlstm import xLSTMCache
from hf_xlstm.commands.helpers.tokens import train_tokenizer
from hf_xlstm.export import (
    FORMATS,
    OpenVINOProgram,
    empty_state,
    export_forward,
    export_model,
    state_of,
    state_shapes,
    xLSTMExportedForCausalLM,
)
from hf_xlstm.state_store import StateStore


RUNTIME = {"openvino": "openvino", "onnx": "onnxruntime"}
TOLERANCE = 1e-5
ROOT = Path(__file__).parents[1]


def padded(batch_size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and a mask with padding on the left of the first row and inside the last one, where there is room."""
    ids = tokens(batch_size, length)
    mask = torch.ones_like(ids)
    if length > 5:
        mask[0, :3] = 0
        mask[-1, 4] = 0
    return ids, mask


@pytest.mark.parametrize("stack", STACKS)
def test_names_and_shapes_of_the_state_are_those_of_the_cache(stack):
    model = tiny_model(**STACKS[stack])
    cache = xLSTMCache(model.config)
    model(tokens(3, 2), cache=cache)
    shapes = {name: tuple(x.shape[1:]) for name, x in state_of(cache).items()}
    assert list(shapes.items()) == list(state_shapes(model.config).items())


@pytest.mark.parametrize("stack", ["conv", pytest.param("paper", marks=pytest.mark.slow)])
@torch.no_grad()
def test_one_graph_serves_every_batch_and_length(stack):
    model = tiny_model(**STACKS[stack])
    prefill, decode = (export_forward(model, program).module() for program in ("prefill", "decode"))
    # around the chunk of 8 tokens, and one of everything
    for batch_size, length in ((1, 1), (3, 1), (2, 7), (2, 8), (1, 20)):
        ids, mask = padded(batch_size, length)
        cache = xLSTMCache(model.config)
        expected = model(ids, attention_mask=mask, cache=cache).logits
        state = list(empty_state(model.config, batch_size).values())
        logits, state = prefill(ids, mask, torch.arange(length), state)
        assert relative_error(logits, expected) < TOLERANCE
        following = tokens(batch_size, 1, seed=1)
        before = [x.clone() for x in state]
        logits, _ = decode(following, None, None, state)
        assert relative_error(logits, model(following, cache=cache).logits) < TOLERANCE
        assert all(map(torch.equal, before, state))  # an argument is left alone


@torch.no_grad()
def test_a_prompt_longer_than_a_piece_of_inference_is_one_graph():
    model = tiny_model(max_inference_chunksize=16)
    program = export_forward(model, "prefill").module()
    ids, mask = padded(2, 40)
    logits, _ = program(ids, mask, torch.tensor([39]), list(empty_state(model.config, 2).values()))
    assert relative_error(logits, model(ids, attention_mask=mask, logits_to_keep=1).logits) < TOLERANCE


# ---- the runtimes


@pytest.fixture(scope="module", params=FORMATS)
def runtime(request):
    pytest.importorskip("onnxscript", reason="exports need hf-xlstm[export]")
    pytest.importorskip(RUNTIME[request.param], reason="exports need hf-xlstm[export]")
    return request.param


@pytest.fixture(
    scope="module", params=["conv", *(pytest.param(x, marks=pytest.mark.slow) for x in ("mlstm", "slstm", "paper"))]
)
def models(request, runtime, tmp_path_factory):
    """A model, and the same exported."""
    model = tiny_model(**STACKS[request.param])
    directory = tmp_path_factory.mktemp("exported") / "model"
    export_model(model, directory, runtime)
    return model, xLSTMExportedForCausalLM.from_pretrained(directory)


@torch.no_grad()
def test_logits_and_state(models):
    model, exported = models
    for batch_size, length in ((1, 1), (2, 7), (3, 20)):
        ids, mask = padded(batch_size, length)
        expected = model(ids, attention_mask=mask, use_cache=True)
        actual = exported(ids, attention_mask=mask, use_cache=True)
        assert relative_error(actual.logits, expected.logits) < TOLERANCE
        assert_same_states(actual.cache, expected.cache)
        keep = torch.tensor([length - 1, 0])
        actual = exported(ids, attention_mask=mask, logits_to_keep=keep).logits
        assert relative_error(actual, expected.logits[:, keep]) < TOLERANCE


def test_generation(models):
    model, exported = models
    ids, mask = padded(2, 9)
    mask[-1] = 1  # generate takes padding on the left
    for options in (
        {"max_new_tokens": 60, "do_sample": False},
        {"max_new_tokens": 10, "do_sample": False, "num_beams": 3},
        {"max_new_tokens": 10, "do_sample": True, "top_k": 5},
    ):
        texts = []
        for x in (model, exported):
            torch.manual_seed(0)
            texts.append(x.generate(ids, attention_mask=mask, **options))
        assert torch.equal(*texts), options


def test_a_conversation_moves_between_the_model_and_its_export(models):
    model, exported = models
    ids = tokens(1, 30)
    whole = model.generate(ids, max_new_tokens=10, do_sample=False)
    for first, second in ((model, exported), (exported, model), (exported, exported)):
        cache = first(ids[:, :12], use_cache=True).cache
        other = copy.deepcopy(cache)
        for x in (cache, other):
            assert torch.equal(second.generate(ids, cache=x, max_new_tokens=10, do_sample=False), whole)


def test_requests_in_a_batch_and_their_states(models):
    model, exported = models
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 5, 9)]
    options = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = [output.generated_tokens for output in model.generate_batch(prompts, options).values()]
    exported.state_store = store = StateStore()
    for _ in range(2):
        outputs = exported.generate_batch(prompts, options).values()
        assert [output.generated_tokens for output in outputs] == expected
    exported.state_store = None
    # an export of other weights has the same configuration, and no parameters to be told by
    longer = torch.tensor([prompts[-1] + [1]])
    assert store.find(exported, longer).get_seq_length() == len(prompts[-1])
    other = copy.copy(exported)
    other._programs = {name: copy.copy(program) for name, program in exported._programs.items()}
    other._programs["decode"].export_id = "another"
    assert store.find(other, longer).get_seq_length() == 0


def test_a_long_prompt_is_read_in_pieces(models, monkeypatch):
    model, exported = models
    monkeypatch.setattr("hf_xlstm.export.PIECE", 8)
    ids, mask = padded(2, 20)
    for keep in (0, 1, 10):
        expected = model(ids, attention_mask=mask, logits_to_keep=keep).logits
        assert relative_error(exported(ids, attention_mask=mask, logits_to_keep=keep).logits, expected) < TOLERANCE


def test_what_is_not_exported_raises(models):
    _, exported = models
    ids = tokens(2, 4)
    with pytest.raises(NotImplementedError, match="inputs_embeds"):
        exported(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(NotImplementedError, match="hidden states"):
        exported(ids, output_hidden_states=True)
    with pytest.raises(NotImplementedError, match="packed"):
        exported(ids, seq_idx=torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]))
    cache = xLSTMCache(exported.config)
    cache.activate_past_recording()
    with pytest.raises(NotImplementedError, match="record"):
        exported(ids, cache=cache)
    with pytest.raises(TypeError, match="memory"):
        exported(ids, memory=torch.zeros(1))
    with pytest.raises(ValueError, match="must hold 1 for tokens"):
        exported(ids, attention_mask=torch.tensor([[1, 1, 2, 2], [1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="6 columns for 4 tokens"):
        exported(ids, attention_mask=torch.ones(2, 6))
    with pytest.raises(NotImplementedError, match="compile"):
        exported.pack_for_decoding(compile=True)


def test_losses(models):
    model, exported = models
    ids = tokens(2, 9)
    for options in ({"labels": ids}, {"labels": ids, "num_items_in_batch": 100}, {"shift_labels": ids}):
        assert exported(ids, **options).loss.item() == pytest.approx(model(ids, **options).loss.item(), rel=1e-4)


@torch.no_grad()
def test_a_conversation_of_a_bfloat16_model_goes_on(models):
    model, exported = models
    half, ids = copy.deepcopy(model).bfloat16(), tokens(2, 9)
    for reader in (exported, model):
        cache = half(ids[:, :6], use_cache=True).cache
        logits = reader(ids[:, 6:], cache=cache).logits
        assert relative_error(logits, model(ids).logits[:, 6:]) < 0.1
        for layer in cache.layers:
            assert {x.dtype for x in layer.tensors().values()} == {torch.float32}


def test_files_of_another_export(models, tmp_path):
    _, exported = models
    directory = tmp_path / "damaged"
    with pytest.raises(ValueError, match="no exported model"):
        xLSTMExportedForCausalLM.from_pretrained(tmp_path)
    shutil.copytree(exported.name_or_path, directory)
    manifest = json.loads((directory / "export.json").read_text())
    (directory / "export.json").write_text(json.dumps(manifest | {"hf_xlstm_export_id": "0"}))
    with pytest.raises(ValueError, match="belongs to another export"):
        xLSTMExportedForCausalLM.from_pretrained(directory)
    (directory / "export.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        xLSTMExportedForCausalLM.from_pretrained(directory)


def test_programs_of_openvino_share_their_weights(models):
    """ONNX Runtime has a file of weights for each program."""
    model, exported = models
    directory = Path(exported.name_or_path)
    files = {path.name: path.stat().st_size for path in directory.iterdir() if path.suffix in (".bin", ".data")}
    if (directory / "decode.xml").exists():
        assert files.keys() == {"prefill.bin"}
    else:
        assert files.keys() == {"prefill.onnx.data", "decode.onnx.data"}
    assert sum(files.values()) < (len(files) + 0.3) * sum(p.nbytes for p in model.parameters())


def test_results_of_openvino_go_by_all_their_names():
    """When it compiles a program, OpenVINO may give a result a second name, and list that first."""

    class Port:
        names, any_name = {"new_state.0.m", "convert"}, "convert"

    program = object.__new__(OpenVINOProgram)
    program._program = lambda inputs, **options: {Port(): 1}
    assert program({}) == {"new_state.0.m": 1, "convert": 1}


@pytest.mark.slow
@pytest.mark.parametrize("weights, tolerance", [("int8", 0.1), ("int4", 0.7)])
@pytest.mark.parametrize("stack", ["conv", "mixed"])
def test_compressed_weights(runtime, stack, weights, tolerance, tmp_path):
    """Rounded, so not exact: at random weights, which are the worst case, but far from unrelated logits."""
    pytest.importorskip("nncf", reason="compressed weights need hf-xlstm[export]")
    model = tiny_model(**STACKS[stack])
    export_model(model, tmp_path / "exported", runtime, weights)
    exported = xLSTMExportedForCausalLM.from_pretrained(tmp_path / "exported")
    ids, mask = padded(2, 20)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    error = relative_error(exported(ids, attention_mask=mask).logits, expected)
    assert TOLERANCE < error < tolerance


@pytest.mark.slow
def test_script_and_page(runtime, tmp_path, monkeypatch):
    """scripts/export.py as docs/export.md calls it, then the blocks of that page."""
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(["My fellow Americans, tonight the state of our Union is strong."], vocab_size=300)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    monkeypatch.chdir(tmp_path)
    tiny_model(vocab_size=len(tokenizer), layer_types=MIXED, **special).save_pretrained("runs/quickstart")
    tokenizer.save_pretrained("runs/quickstart")
    script = [sys.executable, ROOT / "scripts/export.py"]
    command = [*script, "runs/quickstart", "--format", runtime, "--output", "runs/exported"]
    subprocess.run(command, check=True)
    namespace = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S):
        exec(compile(code, "docs/export.md", "exec"), namespace)
    for wrong, message in ((command, "exists"), ([*script, "nowhere/at/all", "--output", "x"], "does not exist")):
        result = subprocess.run(wrong, capture_output=True, text=True)
        assert result.returncode == 2
        assert message in result.stderr
