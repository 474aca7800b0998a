"""Exports a model for OpenVINO or ONNX Runtime: a directory that opens by xLSTMExportedForCausalLM.from_pretrained.

hf-xlstm export runs/mine --format openvino --output runs/exported
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .errors import Parser


def parse(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("model", help="directory of a checkpoint, or its name on the Hub")
    parser.add_argument("--format", choices=("openvino", "onnx"), default="openvino", help="runtime (%(default)s)")
    parser.add_argument(
        "--weights",
        choices=("float32", "int8", "int4"),
        default="float32",
        help="those of linear layers (%(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write, new or empty")
    args = parser.parse_args(arguments)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        parser.error(f"{args.output} exists")
    return args
