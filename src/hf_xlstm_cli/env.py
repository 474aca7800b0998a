"""Shows versions, devices, and which implementation of the cells would run, and why. A bug report needs it.

    hf-xlstm env --check

`--check` runs tiny models for a few seconds and tells whether generation is right with the versions at hand.
"""

import argparse
from collections.abc import Sequence

from .errors import Parser


def parse(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("--check", action="store_true", help="run tiny models: is generation right here?")
    return parser.parse_args(arguments)
