"""Publishes a model that `train` wrote: weights, tokenizer, the code to load them, and a model card, in one commit.

hf-xlstm share runs/quickstart me/my-xlstm --dry-run
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .errors import Parser


def parse(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("run", type=Path, help="output directory of `train`")
    parser.add_argument("repo_id", metavar="repository", help="user/name, created if it does not exist")
    parser.add_argument(
        "--revision", metavar="BRANCH", default="main", help="branch, created if it does not exist (%(default)s)"
    )
    parser.add_argument(
        "--license", metavar="NAME", default="apache-2.0", help="licence of the weights, as on the Hub (%(default)s)"
    )
    parser.add_argument(
        "--language", metavar="CODE", default="en", help="language of the text, by ISO 639-1 (%(default)s)"
    )
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--dry-run", action="store_true", help="send nothing, show the files and the card")
    args = parser.parse_args(arguments)
    if not args.run.is_dir():
        parser.error(f"{args.run} is not a directory")
    return args
