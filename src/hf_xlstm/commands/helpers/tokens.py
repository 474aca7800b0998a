"""Tokens on disk: tokenised once, read through the memory map, cut into what a training step sees."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_xlstm.files import appearing
from hf_xlstm_cli.errors import UserError

from .corpus import Document, pieces


TOKENIZER_BYTES = 256 * 2**20  # a tokenizer is trained on the first of a text, at most so much
BATCH_BYTES = 8 * 2**20  # what all cores tokenise together


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, lossless on any text; every encoded text begins with BOS."""
    bos, eos, pad = special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_first(documents, TOKENIZER_BYTES), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def _first(documents: Iterable[Document], nbytes: int) -> Iterator[str]:
    for document in documents:
        for piece in pieces(document):
            if nbytes <= 0:
                return
            nbytes -= len(piece.encode())
            yield piece


def tokenise(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, directory: Path, nbytes: int | None = None
) -> None:
    """Writes all documents, from BOS to EOS, as one stream to `directory`, which appears when it is complete:
    tokens.bin, starts.bin (where the documents begin) and tokens.json.

    All cores take part, by the tokenizer's own threads. Memory is bounded, whatever the size of the text.

    Args:
        nbytes: about the size of the text, for the progress bar, and more than the tokens are going to need.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no fast version")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no EOS token, which separates documents")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [tokenizer.eos_token_id]
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    position = read = 0
    opening = True  # whether a document begins here
    with (
        appearing(directory, nbytes or 0) as partial,
        tqdm(total=nbytes, desc="tokenising", unit="B", unit_scale=True, delay=1) as bar,
        (partial / "tokens.bin").open("wb") as tokens,
        (partial / "starts.bin").open("wb") as starts,
    ):
        for batch in _batches(documents):
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(
                [text for text, _ in batch], add_special_tokens=False
            )
            for (text, last), encoding in zip(batch, encodings):
                if opening:
                    starts.write(np.int64(position).tobytes())
                ids = (bos if opening else []) + encoding.ids + (eos if last else [])
                tokens.write(np.array(ids, dtype).tobytes())
                position += len(ids)
                opening = last
                size = len(text.encode())
                read += size
                bar.update(size)
        tokens.close()
        starts.close()
        facts = {"dtype": np.dtype(dtype).name, "tokens": position, "bytes": read}
        (partial / "tokens.json").write_text(json.dumps(facts), encoding="utf-8")


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents, and whether each is the last of its document."""
    batch, size = [], 0
    for document in documents:
        parts = iter(pieces(document))
        part = next(parts, "")
        while part is not None:
            following = next(parts, None)
            batch.append((part, following is None))
            size += len(part)
            part = following
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class Tokens:
    """What `tokenise` wrote."""

    def __init__(self, directory: Path):
        facts = json.loads((directory / "tokens.json").read_text(encoding="utf-8"))
        self.nbytes: int = facts["bytes"]  # of the text
        if self.nbytes == 0:
            raise UserError("there is no text to train on")
        self.ids = np.memmap(directory / "tokens.bin", dtype=facts["dtype"], mode="r")
        self.starts = np.memmap(directory / "starts.bin", dtype=np.int64, mode="r")

    def __len__(self) -> int:
        return len(self.ids)

    def span(self, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """`length` tokens from `start`, what each is to predict (nothing of the next document), and where documents
        begin among them, after the first token."""
        ids = torch.from_numpy(self.ids[start : start + length + 1].astype(np.int64))
        targets = ids[1:].clone()
        first = np.searchsorted(self.starts, start, side="right")
        inner = []
        last = np.searchsorted(self.starts, start + length, side="right")
        for begin in (self.starts[first:last] - start).tolist():
            targets[begin - 1] = -100
            if begin < length:
                inner.append(begin)
        return ids[:-1], targets, inner


class Windows(torch.utils.data.Dataset):
    """The stream cut into windows, each from a zero state. Documents in a window do not see each other: their
    positions start anew, by which the model knows them."""

    def __init__(self, tokens: Tokens, length: int):
        self.tokens, self.length = tokens, length
        self.count = (len(tokens) - 1) // length
        if self.count < 1:
            raise UserError(f"the text has {len(tokens)} tokens, fewer than one window of --sequence-length {length}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, targets, inner = self.tokens.span(index * self.length, self.length)
        positions = torch.arange(self.length)
        for begin in inner:
            positions[begin:] = torch.arange(self.length - begin)
        return {"input_ids": ids, "labels": targets, "shift_labels": targets, "position_ids": positions}


class Streams(torch.utils.data.Dataset):
    """The stream cut into `rows` streams of equal length that are read side by side, window by window: item n is
    window n // rows of stream n % rows. Each window goes on from the state in which the one before it ended; `first`
    tells those that begin a stream. Documents follow each other as they do in a long text."""

    def __init__(self, tokens: Tokens, length: int, rows: int):
        self.tokens, self.length, self.rows = tokens, length, rows
        self.windows = (len(tokens) - 1) // rows // length
        if self.windows < 1:
            raise UserError(
                f"the text has {len(tokens)} tokens, fewer than one window of --sequence-length {length} for each of "
                f"{rows} rows"
            )

    def __len__(self) -> int:
        return self.windows * self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window, row = divmod(index, self.rows)
        ids, targets, _ = self.tokens.span((row * self.windows + window) * self.length, self.length)
        return {"input_ids": ids, "labels": targets, "shift_labels": targets, "first": torch.tensor(window == 0)}
