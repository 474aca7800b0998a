"""Serves a model over HTTP; `hf_xlstm_cli.serve` reads the options."""

import argparse
import os
import sys

from hf_xlstm_cli.errors import UserError, need

from .helpers.models import check_directory


def run(args: argparse.Namespace) -> None:
    """Runs the server until it is interrupted."""
    for module in ("fastapi", "uvicorn", "openai"):
        need(module, "serve")
    if args.model is not None:
        check_directory(args.model)
    key = args.api_key or os.environ.get("HF_XLSTM_API_KEY") or None
    if key is None and args.host not in ("localhost", "127.0.0.1", "::1"):
        print(f"warning: anybody who reaches {args.host} can use the model: give an API key", file=sys.stderr)

    import transformers
    import typer
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server

    import hf_xlstm

    from .helpers.serving import batch, protect

    # The server looks for the model's class by its name in Transformers. Importing hf_xlstm sets it there, but on a
    # module that is replaced by another one meanwhile.
    transformers.xLSTMForCausalLM = hf_xlstm.xLSTMForCausalLM  # type: ignore[misc, assignment]
    if "--continuous-batching" in args.others:
        try:
            batch(args.states, args.state_bytes)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{args.states or '--state-bytes'}: {error}") from error
    build = server.build_server
    server.build_server = lambda *args_, **kwargs: protect(build(*args_, **kwargs), args.model, key)
    sys.argv[1:] = [*([args.model] if args.model else []), "--host", args.host, *args.others]
    try:
        typer.run(Serve)
    except (ValueError, ImportError) as error:
        raise UserError(f"{args.model or 'serve'}: {error}") from error
