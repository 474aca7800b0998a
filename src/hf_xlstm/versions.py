"""The versions this package is tested with, in one place: `pyproject.toml`, the Makefile and the tests follow it."""

import functools
import importlib.metadata
import warnings


# oldest and newest tested minor version of each
TESTED = {"transformers": ("5.15", "5.24"), "torch": ("2.11", "2.14"), "triton": ("3.6", "3.9")}


def minor(version: str) -> tuple[int, int]:
    """(5, 24) of "5.24.0.dev0"."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


@functools.cache
def warn_if_untested() -> None:
    """Warns, once per process, of a Transformers newer than the newest tested one: a rename there can make a model
    forget its state without an error."""
    version = importlib.metadata.version("transformers")
    oldest, newest = TESTED["transformers"]
    if minor(version) > minor(newest):
        warnings.warn(
            f"hf_xlstm is tested with Transformers {oldest} to {newest}, this is {version}. "
            "`python -m hf_xlstm.env --check` tells in a few seconds whether generation is still right.",
            stacklevel=3,
        )
