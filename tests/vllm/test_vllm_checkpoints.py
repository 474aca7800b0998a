"""What a checkpoint may be: the layouts of other implementations, quantized weights, LoRA adapters."""

import json
import shutil

import pytest
import torch
from common import tiny_model
from engine import (
    CHARACTERS,
    assert_same,
    complete,
    engine,
    errors,
    log_probabilities,
    ragged_prompts,
    saved_model,
    saved_tokenizer,
)
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from hf_xlstm.conversion import convert_checkpoint


def rewrite_weights(directory, change) -> None:
    """Saves what `change` makes of the dictionary of weights."""
    path = directory / "model.safetensors"
    weights = {name: x.clone() for name, x in load_file(path).items()}  # not views of the file to be written
    save_file(change(weights), path, metadata={"format": "pt"})


def rewrite_config(directory, **fields) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_joined_weights_of_the_xlstm_package(tmp_path):
    """`xlstm_large`, `weight_mode="fused"`, beside the config.json that vLLM wants."""
    _, model = saved_model(tmp_path / "native", "mlstm")
    convert_checkpoint(tmp_path / "native", tmp_path / "joined", "xlstm_large", fused=True)
    shutil.copy(tmp_path / "native/config.json", tmp_path / "joined")
    rewrite_config(tmp_path / "joined", weight_mode="fused")
    assert "backbone.blocks.0.mlstm_layer.qkv_opreact.weight" in load_file(tmp_path / "joined/model.safetensors")
    with engine(str(tmp_path / "joined")) as llm:
        assert_same(model, complete(llm, ragged_prompts(4)))


def test_the_papers_models_of_the_xlstm_package(tmp_path):
    """The layout `xlstm`, sLSTM arranged for its CUDA kernels."""
    _, model = saved_model(tmp_path / "native", "paper")
    convert_checkpoint(tmp_path / "native", tmp_path / "foreign", "xlstm", slstm_backend="cuda")
    shutil.copy(tmp_path / "native/config.json", tmp_path / "foreign")
    with engine(str(tmp_path / "foreign")) as llm:
        assert_same(model, complete(llm, ragged_prompts(4)))


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path):
    directory, model = saved_model(tmp_path, "mixed", tie_word_embeddings=True)
    embedding = model.backbone.embeddings.weight.detach()
    rewrite_weights(tmp_path, lambda weights: weights | {"lm_head.weight": embedding.clone()})
    with engine(directory) as llm:
        assert_same(model, complete(llm, ragged_prompts(4)))
    rewrite_weights(tmp_path, lambda weights: weights | {"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to .*, but they differ"), engine(directory):
        pass


@pytest.mark.parametrize("name", ["blocks.0.mlstm_layer.k.weight", "blocks.1.slstm_layer.bias", "out_norm.weight"])
def test_missing_weights_are_named(name, tmp_path):
    directory, _ = saved_model(tmp_path, "mixed")
    rewrite_weights(tmp_path, lambda weights: {n: x for n, x in weights.items() if n != f"backbone.{name}"})
    with pytest.raises(ValueError, match=rf"lacks weights: backbone\.{name}"), engine(directory):
        pass


def test_unknown_weights_are_named(tmp_path):
    directory, _ = saved_model(tmp_path, "mixed")
    rewrite_weights(tmp_path, lambda weights: weights | {"backbone.extra": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"unknown weights: backbone\.extra"), engine(directory):
        pass


QUANTIZED = ("q", "k", "v", "ogate_preact", "out_proj", "proj_up_gate", "proj_up", "proj_down")


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8, one scale per row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def is_quantized(name: str) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in QUANTIZED


def round_model(model) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_quantized(name):
                weight, scale = rounded(parameter)
                parameter.copy_(weight * scale)


def round_inputs(model) -> None:
    """int8, one scale per token."""

    def hook(module, inputs):
        weight, scale = rounded(inputs[0].flatten(0, -2))
        return ((weight * scale).view_as(inputs[0]),)

    for name, module in model.named_modules():
        if is_quantized(f"{name}.weight"):
            module.register_forward_pre_hook(hook)


# wide enough for the integer kernels of CPUs
WIDE = {"hidden_size": 128, "vocab_size": 61}


def test_a_quantization_that_leaves_all_layers_as_they_are_is_refused(tmp_path):
    """`int8_per_channel_weight_only` is for mixtures of experts in vLLM 0.32, and would do nothing without a word."""
    directory, _ = saved_model(tmp_path, "conv", **WIDE)
    options = {"quantization": "int8_per_channel_weight_only", "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="leaves all layers of an xLSTM as they are"), engine(directory, **options):
        pass


def save_quantized(directory) -> None:
    """Makes the checkpoint one of compressed-tensors: int8 weights, and activations to be rounded, per token."""

    def quantize(weights):
        quantized = {}
        for name, x in weights.items():
            if is_quantized(name):
                quantized[name], quantized[name + "_scale"] = rounded(x)
            else:
                quantized[name] = x
        return quantized

    rewrite_weights(directory, quantize)
    channel = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    token = channel | {"strategy": "token", "dynamic": True}
    scheme = {"targets": ["Linear"], "weights": channel, "input_activations": token, "output_activations": None}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head", "re:.*[if]gate_preact"],
    }
    rewrite_config(directory, quantization_config=quantization)


def test_int8_weights_and_activations_of_compressed_tensors(tmp_path):
    directory, model = saved_model(tmp_path, "conv", **WIDE)
    save_quantized(tmp_path)
    with engine(directory) as llm:
        outputs = complete(llm, ragged_prompts(6))
    round_model(model)
    by_weights = torch.cat([errors(model, x) for x in outputs]).mean()
    round_inputs(model)
    error = torch.cat([errors(model, x) for x in outputs]).mean()
    assert error < 1e-3  # an input between two integers may be rounded either way
    assert by_weights > 1e-2  # what the rounding of the inputs makes


def test_requests_with_and_without_a_lora_adapter(tmp_path):
    """In batches of their own: on a CPU, vLLM 0.32 gives a request without an adapter that of its neighbours."""
    directory, model = saved_model(tmp_path / "model", "conv", **WIDE)
    adapter, rank, weights = tmp_path / "adapter", 4, {}
    adapter.mkdir()
    torch.manual_seed(1)
    adapted = tiny_model(layer_types=model.config.layers_block_type, slstm_conv_kernel_size=4, **WIDE)
    adapted.load_state_dict(model.state_dict())
    targets = ("q", "v", "out_proj", "proj_up", "proj_down")
    for name, module in adapted.named_modules():
        if name.split(".")[-1] in targets and isinstance(module, torch.nn.Linear):
            down, up = torch.randn(rank, module.in_features) / 8, torch.randn(module.out_features, rank) / 8
            weights[f"base_model.model.{name}.lora_A.weight"] = down
            weights[f"base_model.model.{name}.lora_B.weight"] = up
            with torch.no_grad():
                module.weight += 2 * up @ down
    save_file(weights, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    prompts = ragged_prompts(6)
    with engine(directory, enable_lora=True, max_lora_rank=8) as llm:
        outputs = complete(llm, prompts, lora_request=LoRARequest("adapter", 1, str(adapter)))
        plain_outputs = complete(llm, prompts)
    assert_same(adapted, outputs)
    assert_same(model, plain_outputs)
    with pytest.raises(AssertionError):
        assert_same(model, outputs)


def test_structured_output(tmp_path):
    """The grammar forbids tokens, and the text is the most probable one of those that are left."""
    directory, model = saved_model(tmp_path, "mixed", vocab_size=len(CHARACTERS))
    tokenizer = saved_tokenizer(tmp_path)
    constraints = [
        StructuredOutputsParams(choice=["yes", "no"]),
        StructuredOutputsParams(regex="[0-9]{3}-[a-f]{2}"),
        None,
    ]
    params = [SamplingParams(temperature=0, max_tokens=12, structured_outputs=x) for x in constraints]
    with engine(directory, skip_tokenizer_init=False) as llm:
        choice, regex, free = (
            x.outputs[0] for x in llm.generate(["Is it? ", "A code: ", "Anything: "], params, use_tqdm=False)
        )
    assert choice.text in ("yes", "no")
    prompt = tokenizer("Is it? ").input_ids
    yes, no = (log_probabilities(model, prompt, tokenizer(word).input_ids)[0] for word in ("yes", "no"))
    first = {"yes": yes[tokenizer("y").input_ids[0]], "no": no[tokenizer("n").input_ids[0]]}
    assert choice.text == max(first, key=first.get)
    assert len(regex.text) == 6 and regex.text[3] == "-" and regex.text[:3].isdigit()
    assert len(free.token_ids) > 0
