"""Bits per byte of a causal language model on whole documents."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from corpus import num_bytes


@torch.inference_mode()
def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    window: int = 512,
    batch_size: int = 8,
) -> float:
    """Cost of all tokens from BOS to EOS, each given everything before it in its document, per UTF-8 byte.

    Documents are read window by window and the cache carries the state over, so that the context is the whole
    document at the memory of one window. A text has other tokenisations too, hence this is an upper bound.
    """
    was_training = model.training
    model.eval()
    sequences = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in sorted(documents, key=len)]
    nats = 0.0
    for first in range(0, len(sequences), batch_size):
        batch = tokenizer.pad({"input_ids": sequences[first : first + batch_size]}, return_tensors="pt")
        ids, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        cache = None
        for start in range(0, targets.shape[1], window):
            here = slice(start, min(start + window, targets.shape[1]))
            outputs = model(ids[:, here], attention_mask=mask[:, here], past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits = outputs.logits.float().flatten(0, 1)
            nats += torch.nn.functional.cross_entropy(logits, targets[:, here].flatten(), reduction="sum").item()
    model.train(was_training)
    return nats / math.log(2) / num_bytes(documents)
