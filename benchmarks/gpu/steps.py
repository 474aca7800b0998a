"""The steps of prove.py, from what must be known first to what is good to know."""

import math
from typing import NamedTuple


class Step(NamedTuple):
    """Limits in seconds: of the step, and of a row, compilation included."""

    seconds: float
    row_seconds: float


STEPS = {
    "prefill": Step(30, 30),  # kernels compiled beforehand
    "smoke": Step(60, 40),
    "tests": Step(150, 60),  # the kernels' own
    "ops": Step(150, 75),  # at the shapes of the targets; then the baselines, which tune themselves at first
    "generation": Step(120, 100),
    "training": Step(90, 60),
    "breakdown": Step(45, 40),  # what takes the time, kernel by kernel
    "variants": Step(math.inf, 45),  # of the launch plan, in what time is left
}
POISONED = 3  # exit code of a worker whose GPU context is beyond use
