"""Bits per byte of a causal language model on whole documents."""

import math
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_xlstm.integration import CACHE_NAME

from .corpus import num_bytes


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
    A tokenizer without BOS begins with EOS, which ends the document before.
    """
    was_training = model.training
    model.eval()
    eos = tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    texts = sorted(documents, key=len)
    sequences = [[bos, *ids, eos] for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    nats = 0.0
    for first in range(0, len(sequences), batch_size):
        batch = [torch.tensor(ids) for ids in sequences[first : first + batch_size]]
        ids = pad_sequence(batch, batch_first=True, padding_value=eos).to(model.device)
        mask = pad_sequence([torch.ones_like(x) for x in batch], batch_first=True).to(model.device)
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        cache = None
        for start in range(0, targets.shape[1], window):
            here = slice(start, min(start + window, targets.shape[1]))
            outputs = model(ids[:, here], attention_mask=mask[:, here], use_cache=True, **{CACHE_NAME: cache})
            cache = outputs.get(CACHE_NAME)
            logits = outputs.logits.float().flatten(0, 1)
            nats += torch.nn.functional.cross_entropy(logits, targets[:, here].flatten(), reduction="sum").item()
    model.train(was_training)
    return nats / math.log(2) / num_bytes(documents)
