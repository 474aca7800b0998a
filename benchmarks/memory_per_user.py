"""Prints the bytes a conversation takes in a server, against its length: states of xLSTM, keys and values of Llama.

    python benchmarks/memory_per_user.py

The table of docs/serving.md. Weights and what all users share are not in it.
"""

from math import ceil

from hf_xlstm import xLSTMConfig


CONTEXTS = (256, 1_024, 8_192, 32_768, 131_072, 1_048_576)
FLOAT32, BFLOAT16 = 4, 2
BLOCK_SIZE = 16  # tokens of a block in paged attention


def state_bytes(config: xLSTMConfig) -> int:
    """The states of all mLSTM layers, C, n and m of each head, float32."""
    per_head = config.qk_head_dim * config.v_head_dim + config.qk_head_dim + 1
    return config.num_hidden_layers * config.num_heads * per_head * FLOAT32


def paged_bytes(tokens: int, layers: int, kv_heads: int, head_dim: int) -> int:
    """Keys and values in whole blocks, bfloat16."""
    return ceil(tokens / BLOCK_SIZE) * BLOCK_SIZE * 2 * layers * kv_heads * head_dim * BFLOAT16


def table() -> str:
    xlstm = state_bytes(xLSTMConfig())
    llama_2_7b = {"layers": 32, "kv_heads": 32, "head_dim": 128}
    llama_3_8b = {"layers": 32, "kv_heads": 8, "head_dim": 128}
    lines = ["| context | xLSTM-7B | Llama-3-8B | Llama-2-7B |", "|---:|---:|---:|---:|"]
    for tokens in CONTEXTS:
        sizes = [xlstm, paged_bytes(tokens, **llama_3_8b), paged_bytes(tokens, **llama_2_7b)]
        lines.append(" | ".join([f"| {tokens:,}", *(f"{size / 1e6:,.0f} MB" for size in sizes)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
