"""Models by name: widths, depths and heads of common sizes, where the sLSTM blocks stand, and schedules of
the learning rate."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What a size is made of, and the learning rate to begin with."""

    hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    learning_rate: float


SCHEDULES = ("cosine", "wsd")  # wsd: warm-up, stable, decay
DEFAULT = Preset(192, 4, 4, 2048, 6e-3)  # of the quickstart
SIZES = {
    "10m": Preset(256, 10, 4, 4096, 4e-3),
    "50m": Preset(512, 10, 4, 16384, 2e-3),
    "160m": Preset(768, 12, 4, 50304, 1e-3),
    "400m": Preset(1024, 24, 4, 50304, 8e-4),
    "1.3b": Preset(2048, 24, 4, 50304, 7e-4),
    "7b": Preset(4096, 32, 8, 50304, 5e-4),
}


def slstm_positions(num_layers: int, ratio: str) -> list[int]:
    """The sLSTM blocks of `ratio`, mLSTM to sLSTM blocks: the second of every mLSTM + sLSTM blocks, and those after it
    where there is more than one.

    Raises:
        ValueError: `ratio` is not of the form 7:1.
    """
    mlstm, separator, slstm = ratio.partition(":")
    if not separator or not mlstm.isdecimal() or not slstm.isdecimal() or int(mlstm) + int(slstm) == 0:
        raise ValueError(f"a ratio is written like 7:1, mLSTM blocks to sLSTM blocks, got {ratio!r}")
    group, first = int(mlstm) + int(slstm), min(1, int(mlstm))
    return [i for i in range(num_layers) if first <= i % group < first + int(slstm)]
