"""Converts a checkpoint of another xLSTM implementation to the format of this package, or back."""

import argparse

from helpers.errors import UserError, command
from hf_xlstm.conversion import FORMATS, convert_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="directory with the weights and config.json or config.yaml")
    parser.add_argument("target", help="directory to write, which must not exist")
    parser.add_argument("--to", choices=FORMATS, default="hf_xlstm", help="format to write (default: %(default)s)")
    parser.add_argument("--fused", action="store_true", help="for xlstm_large: write weight_mode fused")
    parser.add_argument(
        "--slstm-backend",
        choices=["vanilla", "cuda"],
        default="vanilla",
        help="for xlstm: backend to arrange sLSTM weights for (default: %(default)s)",
    )
    parser.add_argument(
        "--max-shard-size", type=float, default=5, metavar="GB", help="size of a file at most (default: %(default)s)"
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison of the result with the source")
    args = parser.parse_args()
    if not args.max_shard_size > 0:
        parser.error(f"--max-shard-size must be positive, got {args.max_shard_size}")
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
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"{args.target}: {report}")


if __name__ == "__main__":
    command(main)
