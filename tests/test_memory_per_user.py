"""The table of memory per user, in docs/serving.md."""

from pathlib import Path

import torch

from benchmarks.memory_per_user import state_bytes, table
from hf_xlstm import xLSTMCache, xLSTMConfig, xLSTMForCausalLM


def test_the_page_has_the_table():
    page = Path(__file__).parents[1] / "docs/serving.md"
    assert table() in page.read_text(encoding="utf-8")


def test_states_have_the_size_of_a_cache():
    config = xLSTMConfig(vocab_size=8, hidden_size=32, num_hidden_layers=3, num_heads=2)
    cache = xLSTMCache(config)
    xLSTMForCausalLM(config).backbone(torch.zeros(1, 5, dtype=torch.long), cache_params=cache)
    assert state_bytes(config) == cache.nbytes
