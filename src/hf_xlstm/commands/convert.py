"""Converts a checkpoint; `hf_xlstm_cli.convert` reads the options."""

import argparse

from hf_xlstm.conversion import convert_checkpoint
from hf_xlstm_cli.errors import UserError


def run(args: argparse.Namespace) -> None:
    """Writes `args.target` and says what it has become."""
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
