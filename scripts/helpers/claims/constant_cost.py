"""Constant cost: time and memory per token do not depend on the context."""

import copy
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_xlstm import xLSTMConfig, xLSTMForCausalLM
from hf_xlstm.integration import CACHE_NAME

from .measuring import in_turns, plot, row


TITLE = "Constant cost: time and memory per token do not depend on the context"


@torch.no_grad()
def measure(seeds: int, output: Path) -> list[dict]:
    """A token after a context of 256 to 16,384, beside Llama of the same size."""
    common = {"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 4, "bos_token_id": None}
    common |= {"eos_token_id": None, "pad_token_id": None}
    llama = LlamaConfig(intermediate_size=768, num_attention_heads=4, max_position_embeddings=32768, **common)
    torch.manual_seed(0)
    models = {
        "xLSTM": xLSTMForCausalLM(xLSTMConfig(num_heads=4, **common)).eval(),
        "Llama": LlamaForCausalLM(llama).eval(),
    }
    token = torch.zeros(1, 1, dtype=torch.long)
    seconds, bytes_ = {}, {name: {} for name in models}
    for name, model in models.items():
        steps, cache = {}, None
        for context in (256, 1024, 4096, 16384):
            seen = 0 if cache is None else cache.get_seq_length()
            prompt = torch.randint(0, 1024, (1, context - seen))
            cache = model(prompt, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})[CACHE_NAME]
            bytes_[name][context] = _cache_bytes(cache)
            own = copy.deepcopy(cache)
            steps[context] = lambda model=model, own=own: model(token, use_cache=True, **{CACHE_NAME: own})
        seconds[name] = in_turns(steps, 60)
    plot(output / "constant_cost_time.png", seconds, "context, tokens", "seconds per token", "Time per token")
    plot(output / "constant_cost_memory.png", bytes_, "context, tokens", "bytes", "State of one sequence")
    growth = {name: [s[16384] / s[256]] for name, s in seconds.items()}
    return [
        row("xLSTM: time at 16,384 over time at 256", growth["xLSTM"], at_most=1.3),
        row("Llama: time at 16,384 over time at 256", growth["Llama"]),
        row("xLSTM: memory at 16,384 over memory at 256", [bytes_["xLSTM"][16384] / bytes_["xLSTM"][256]], at_most=1),
        row("Llama: memory at 16,384 over memory at 256", [bytes_["Llama"][16384] / bytes_["Llama"][256]]),
    ]


def _cache_bytes(cache) -> int:
    if hasattr(cache, "nbytes"):
        return cache.nbytes() if callable(cache.nbytes) else cache.nbytes
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
