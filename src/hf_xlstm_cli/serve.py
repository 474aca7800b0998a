"""Serves an xLSTM model over HTTP as OpenAI's API: `transformers serve`, with the classes of this package.

    hf-xlstm serve runs/mine --port 8000

It listens on the loopback interface, serves this one model, and lets no request load another one or throw this one
out. `/v1/completions` continues a text; `/v1/chat/completions` needs a tokenizer with a chat template. Options beside
those below are those of `transformers serve`, such as --port, --device and --dtype. With --continuous-batching,
requests are answered side by side, and the next turn of a conversation reads its new tokens only.
"""

import argparse
from collections.abc import Sequence

from .errors import Parser


def parse(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("model", nargs="?", help="directory or Hub name of the model, with its tokenizer")
    parser.add_argument("--host", default="localhost", metavar="ADDRESS", help="address to listen at (%(default)s)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="that requests must have (the variable HF_XLSTM_API_KEY, which others cannot see)",
    )
    parser.add_argument(
        "--states",
        metavar="DIRECTORY",
        help="with --continuous-batching, where states of conversations outlive the server (in memory only)",
    )
    parser.add_argument(
        "--state-bytes",
        type=int,
        default=2**30,
        metavar="N",
        help="bytes of states in memory, ten times that on disk (2^30)",
    )
    parser.add_argument("--any-model", action="store_true", help="let requests load and unload any model")
    args, args_of_transformers = parser.parse_known_args(arguments)
    args.others = args_of_transformers
    if args.states is not None and "--continuous-batching" not in args.others:
        parser.error("--states needs --continuous-batching")
    if (args.model is None) != args.any_model:
        parser.error("give a model to serve, or --any-model")
    return args
