"""Serves an xLSTM model over HTTP as OpenAI's API: `transformers serve`, with the classes of this package.

    python scripts/serve.py runs/mine --port 8000

It listens on the loopback interface, serves this one model, and lets no request load another one or throw this one
out. `/v1/completions` continues a text; `/v1/chat/completions` needs a tokenizer with a chat template. Options beside
those below are those of `transformers serve`, such as --host, --device and --dtype. With --continuous-batching,
requests are answered side by side, and the next turn of a conversation reads its new tokens only.
"""

import argparse
import os
import sys

from helpers.errors import UserError, command, need
from helpers.models import check_directory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
        help="of states in memory, ten times that on disk (2^30)",
    )
    parser.add_argument("--any-model", action="store_true", help="let requests load and unload any model")
    args, others = parser.parse_known_args()
    if args.states is not None and "--continuous-batching" not in others:
        parser.error("--states needs --continuous-batching")
    if (args.model is None) != args.any_model:
        parser.error("give a model to serve, or --any-model")
    for module in ("fastapi", "uvicorn", "openai"):
        need(module, "serve")
    if args.model is not None:
        check_directory(args.model)
    key = args.api_key or os.environ.get("HF_XLSTM_API_KEY") or None
    if key is None and args.host not in ("localhost", "127.0.0.1", "::1"):
        print(
            f"serve.py: warning: anybody who reaches {args.host} can use the model: give an API key", file=sys.stderr
        )

    import transformers
    import typer
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server

    import hf_xlstm
    from helpers.serving import batch, protect

    # the server looks for the model's class by its name in Transformers, where another one has that name
    transformers.xLSTMForCausalLM = hf_xlstm.xLSTMForCausalLM
    if "--continuous-batching" in others:
        try:
            batch(args.states, args.state_bytes)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{args.states or '--state-bytes'}: {error}") from error
    build = server.build_server
    server.build_server = lambda *args_, **kwargs: protect(build(*args_, **kwargs), args.model, key)
    sys.argv[1:] = [*([args.model] if args.model else []), "--host", args.host, *others]
    try:
        typer.run(Serve)
    except (ValueError, ImportError) as error:
        raise UserError(f"{args.model or 'serve'}: {error}") from error


if __name__ == "__main__":
    command(main)
