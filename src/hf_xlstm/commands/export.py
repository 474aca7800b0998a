"""Exports a model; `hf_xlstm_cli.export` reads the options."""

import argparse

import torch

from hf_xlstm import xLSTMForCausalLM
from hf_xlstm.export import export_model
from hf_xlstm_cli.errors import UserError

from .helpers.models import check_directory, has_tokenizer, load_model, load_tokenizer


def run(args: argparse.Namespace) -> None:
    """Writes `args.output` and says how large it is."""
    check_directory(args.model)
    model = load_model(args.model, dtype=torch.float32)
    if not isinstance(model, xLSTMForCausalLM):
        raise UserError(f"{args.model} is a {type(model).__name__}, not an xLSTM")
    tokenizer = load_tokenizer(args.model) if has_tokenizer(args.model) else None
    try:
        export_model(model, args.output, args.format, args.weights)
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from error
    if tokenizer is not None:
        tokenizer.save_pretrained(args.output)
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{args.output}: {args.format}, {args.weights} weights, {size / 1e6:,.1f} MB")
