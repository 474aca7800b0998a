"""The command `hf-xlstm`.

Arguments are read here, beside the package `hf_xlstm` and not in it, because importing that one imports torch and
Transformers: help and a typing error are to be answered at once. Each verb has a module here, which reads its options,
and one in `hf_xlstm.commands`, which does the work.
"""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from .errors import Parser, command


VERBS = {
    "train": "train a language model on text, or go on with one",
    "generate": "continue a text, and measure the cost of long contexts",
    "evaluate": "measure bits per byte of texts, and tasks of the lm-evaluation-harness",
    "convert": "convert a checkpoint of another xLSTM implementation, or back",
    "share": "publish a trained model on the Hub, with its code and its card",
    "serve": "answer over HTTP as OpenAI's API does",
    "export": "write a model for OpenVINO or ONNX Runtime",
    "env": "versions, devices and implementations, for a bug report; --check tries generation",
}
SPIN_COUNT = "10000"


def main(arguments: Sequence[str] | None = None) -> None:
    """`hf-xlstm VERB ...`; ends the process."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    verbs = "\n".join(f"  {verb:10}{text}" for verb, text in VERBS.items())
    parser = Parser(
        prog="hf-xlstm",
        usage="hf-xlstm [--help] [--version] VERB ...",
        description=f"xLSTM language models: train, use, convert, share.\n\n{verbs}",
        epilog="`hf-xlstm VERB --help` lists the options of a verb.",
    )
    parser.add_argument("--version", action="store_true", help="show the version of the package and exit")
    parser.add_argument("verb", nargs="?", choices=VERBS, metavar="VERB", help="what to do, one of the above")
    options = parser.parse_args(arguments[:1])
    if options.version:
        print(importlib.metadata.version("hf-xlstm"))
        sys.exit()
    if options.verb is None:
        parser.print_help()
        sys.exit(2)
    run_verb(options.verb, arguments[1:], f"hf-xlstm {options.verb}")


def run_verb(verb: str, arguments: Sequence[str], prog: str) -> None:
    """Reads the options of one verb, does its work and ends the process.

    Args:
        prog: the name of the program in its messages.
    """
    module = importlib.import_module(f".{verb}", __name__)

    def parse_and_run() -> int | None:
        args = module.parse(arguments, prog)
        spin_shortly()
        # the module of the same name, which imports torch
        return importlib.import_module(f"hf_xlstm.{'env' if verb == 'env' else f'commands.{verb}'}").run(args)

    command(parse_and_run, prog)


def spin_shortly() -> None:
    """Lets idle threads of OpenMP (libgomp) sleep soon, unless the user has chosen otherwise. They spin by default
    while they wait for each other, and where other processes want the same cores, that costs most of the time. libgomp
    reads the variables once, when torch loads it."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
