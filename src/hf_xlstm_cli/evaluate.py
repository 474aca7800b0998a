"""Evaluates a causal language model: bits per byte of texts, and tasks of the lm-evaluation-harness.

    hf-xlstm evaluate runs/quickstart --texts book.txt --tasks my_task --include-path my_tasks

Writes what it measures to evaluation.json in the model's directory, from where `share` takes it into the card.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .errors import Parser, positive_int


def parse(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("model", help="directory that `train` wrote, or any checkpoint with its tokenizer")
    parser.add_argument("--texts", nargs="+", type=Path, default=[], metavar="FILE", help="UTF-8 texts")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON (evaluation.json in the directory of the model)"
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=8, metavar="N", help="texts or requests at once (%(default)s)"
    )
    tasks = parser.add_argument_group("lm-evaluation-harness (needs the packages of hf-xlstm[eval])")
    tasks.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="as `lm_eval ls tasks` lists them")
    tasks.add_argument("--include-path", metavar="DIR", help="directory with task files of your own")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples in a prompt (what the task says)")
    tasks.add_argument("--limit", type=positive_int, metavar="N", help="only the first N documents of each task")
    tasks.add_argument(
        "--max-length",
        type=positive_int,
        default=2048,
        metavar="N",
        help="tokens of a request at most (%(default)s)",
    )
    args = parser.parse_args(arguments)
    if not args.texts and not args.tasks:
        parser.error("nothing to evaluate: give --texts or --tasks")
    if args.output is None and not Path(args.model).is_dir():
        parser.error("--output is needed for a model that is not a directory")
    return args
