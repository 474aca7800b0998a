"""Continues a text with a trained xLSTM, word by word as it comes, and measures on request that speed and memory do
not depend on the length of the context.

    hf-xlstm generate runs/mine --prompt "Once upon a time" --max-new-tokens 300
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .errors import Parser, positive_int


def parse(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("model", help="directory that `train` wrote, or any xLSTM checkpoint with its tokenizer")
    add("--prompt", default="My fellow Americans, tonight", metavar="TEXT", help='text to continue ("%(default)s")')
    add("--max-new-tokens", type=int, default=200, metavar="N", help="tokens of the continuation (%(default)s)")
    add("--temperature", type=float, default=0.8, metavar="X", help="of sampling; 0 is the likeliest (%(default)s)")
    add("--top-p", type=float, default=0.95, metavar="P", help="sample from tokens of this probability (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of sampling (%(default)s)")
    add("--contexts", type=positive_int, nargs="+", metavar="N", help="also measure after contexts of N tokens")
    add("--report", type=Path, metavar="FILE", help="append text and measurements to this Markdown file")
    args = parser.parse_args(arguments)
    if args.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    if not args.temperature >= 0 or not 0 < args.top_p <= 1:
        parser.error("--temperature must be 0 or more, --top-p above 0 and at most 1")
    if args.report and not args.report.parent.is_dir():
        parser.error(f"--report: {args.report.parent} is no directory")
    return args
