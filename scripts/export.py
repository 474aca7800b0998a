"""Exports a model for OpenVINO or ONNX Runtime: a directory that opens by xLSTMExportedForCausalLM.from_pretrained."""

import argparse
from pathlib import Path

import torch

from helpers.errors import UserError, command
from helpers.models import check_directory, load_model, load_tokenizer
from hf_xlstm import xLSTMForCausalLM
from hf_xlstm.export import FORMATS, WEIGHTS, export_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="directory of a checkpoint, or its name on the Hub")
    parser.add_argument("--format", choices=FORMATS, default="openvino", help="runtime (default: %(default)s)")
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="float32", help="of linear layers (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write, new or empty")
    args = parser.parse_args()
    check_directory(args.model)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"{args.output} exists")
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


def has_tokenizer(name: str) -> bool:
    """Whether the model comes with a tokenizer; one on the Hub is taken to."""
    path = Path(name)
    return not path.is_dir() or (path / "tokenizer_config.json").exists()


if __name__ == "__main__":
    command(main)
