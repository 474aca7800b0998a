"""Converts a checkpoint of another xLSTM implementation to the format of this package, or back.

hf-xlstm convert runs/package runs/converted
"""

import argparse
from collections.abc import Sequence

from .errors import Parser, positive


FORMATS = ("hf_xlstm", "xlstm_large", "xlstm", "xlstm_wrapper")  # those of hf_xlstm.conversion


def parse(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("source", help="directory with the weights and config.json or config.yaml")
    parser.add_argument("target", help="directory to write, which must not exist")
    parser.add_argument("--to", choices=FORMATS, default="hf_xlstm", help="format to write (%(default)s)")
    parser.add_argument("--fused", action="store_true", help="for xlstm_large: write weight_mode fused")
    parser.add_argument(
        "--slstm-backend",
        choices=["vanilla", "cuda"],
        default="vanilla",
        help="for xlstm: backend to arrange sLSTM weights for (%(default)s)",
    )
    parser.add_argument(
        "--max-shard-size", type=positive, default=5, metavar="GB", help="size of a file at most (%(default)s)"
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison of the result with the source")
    return parser.parse_args(arguments)
