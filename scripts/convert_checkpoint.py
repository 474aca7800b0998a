"""Convert a checkpoint of another xLSTM implementation to this package's format, or back; see docs/checkpoints.md."""

import argparse
import pickle
from pathlib import Path

import yaml

from helpers.errors import UserError, command
from helpers.models import check_directory
from hf_xlstm.conversion import FORMATS, convert_checkpoint


# what damaged or foreign files raise, in the libraries that read them as well
CONVERSION_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError)
CONVERSION_ERRORS += (pickle.UnpicklingError, yaml.YAMLError)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="directory with the weights and config.json or config.yaml")
    parser.add_argument("target", help="directory to write, which must not exist")
    parser.add_argument("--to", choices=FORMATS, default="hf_xlstm", help="default: %(default)s")
    parser.add_argument("--fused", action="store_true", help="xlstm_large: with weight_mode fused")
    parser.add_argument("--slstm-backend", choices=["vanilla", "cuda"], default="vanilla", help="xlstm: for which one")
    parser.add_argument("--max-shard-size", type=float, default=5, metavar="GB", help="default: %(default)s")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the result with the source")
    args = parser.parse_args()
    if not Path(args.source).exists():
        parser.error(f"{args.source} does not exist")
    check_directory(args.source)
    if args.max_shard_size <= 0:
        parser.error("--max-shard-size must be above 0")
    try:
        report = convert_checkpoint(
            args.source,
            args.target,
            args.to,
            fused=args.fused,
            slstm_backend=args.slstm_backend,
            max_shard_size=int(args.max_shard_size * 1e9),
            verify=not args.no_verify,
        )
    except CONVERSION_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            reason if args.source in reason or args.target in reason else f"{args.source}: {reason}"
        ) from error
    print(f"{args.target}: {report}")


if __name__ == "__main__":
    command(main)
