"""What a language model's bits per byte can be compared with: a compressor, and an n-gram model of bytes."""

import lzma
from collections.abc import Sequence

import numpy as np


def lzma_bits_per_byte(text: bytes, primer: bytes = b"") -> float:
    """Bits that `text` adds to the compressed size of `primer`, per byte of `text`."""
    added = _lzma_size(primer + text) - (_lzma_size(primer) if primer else 0)
    return 8 * added / len(text)


def _lzma_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9))  # a window of 64 MiB


class ByteNGram:
    """Interpolated Kneser-Ney model of bytes, with one absolute discount per order.

    For context c, shortened context c' and byte w, at every order

        p(w | c) = (max(count(cw) - D, 0) + D * types(c) * p(w | c')) / total(c)

    where the counts of the highest order are occurrences and those of lower orders the number of distinct bytes
    seen before cw. A context never seen leaves p(w | c'); the shortest one is uniform over the 256 bytes.
    N-grams are integers in base 257: digit 0 stands for "before the document", 1 to 256 for the bytes.
    """

    base = 257

    def __init__(self, documents: Sequence[bytes], order: int = 5):
        self.order = order
        grams, counts = np.unique(self._grams(documents), return_counts=True)
        levels = []
        for length in range(order, 0, -1):
            levels.append(_Level(grams, counts, self.base))
            grams, counts = np.unique(grams % self.base ** (length - 1), return_counts=True)
        self.levels = levels[::-1]

    def bits(self, document: bytes) -> float:
        """Code length of the document."""
        return float(-np.log2(self.probabilities(document)).sum())

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        return sum(map(self.bits, documents)) / sum(map(len, documents))

    def probabilities(self, document: bytes) -> np.ndarray:
        """Of every byte, given those before it."""
        grams = self._grams([document])
        p = np.full(len(grams), 1 / 256)
        for length, level in enumerate(self.levels, start=1):
            p = level.interpolate(grams % self.base**length, p)
        return p

    def _grams(self, documents: Sequence[bytes]) -> np.ndarray:
        """The n-gram that ends at each byte of the documents."""
        start = np.zeros(self.order - 1, dtype=np.int64)
        digits = np.concatenate([x for d in documents for x in (start, np.frombuffer(d, np.uint8) + np.int64(1))])
        grams = np.zeros(len(digits) - self.order + 1, dtype=np.int64)
        for offset in range(self.order):
            grams = grams * self.base + digits[offset : offset + len(grams)]
        return grams[digits[self.order - 1 :] > 0]


class _Level:
    """Counts of one order: sorted n-grams, and for each of their contexts the total and the number of types."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray, base: int):
        self.base = base
        self.grams, self.counts = grams, counts
        self.contexts, starts, self.types = np.unique(grams // base, return_index=True, return_counts=True)
        self.totals = np.add.reduceat(counts, starts)
        ones, twos = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
        self.discount = (ones + 0.5) / (ones + 2 * twos + 1)  # Ney's estimate, kept inside (0, 1) on tiny texts

    def interpolate(self, grams: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        at, seen = _find(self.contexts, grams // self.base)
        row, known = _find(self.grams, grams)
        kept = np.where(known, self.counts[row] - self.discount, 0)
        return np.where(seen, (kept + self.discount * self.types[at] * shorter) / self.totals[at], shorter)


def _find(table: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of `values` in a sorted table, and which of them are really there."""
    position = np.searchsorted(table, values).clip(max=len(table) - 1)
    return position, table[position] == values
