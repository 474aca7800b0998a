"""Errors of the one who gives a command: one line that names the file or option, exit status 2."""

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Something about the command, or about what it was given, that its message names."""


class Parser(argparse.ArgumentParser):
    """A parser that keeps the lines of its description, and whose errors are one line."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def command(main: Callable[[], int | None], prog: str | None = None) -> None:
    """Runs `main` and ends the process: with what it returns, or with status 2 and one line on an error of the user's
    or of the system's (a file that is missing, a full disk). Any other exception is a fault of ours: it is shown.

    Args:
        prog: the name that begins the line, by default that of the script.
    """
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        print(f"{prog or Path(sys.argv[0]).name}: error: {' '.join(lines)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def need(module: str, extra: str):
    """The module, or an error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs the package {module}: pip install 'hf-xlstm[{extra}]'") from error


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file that is not empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if not text:
        raise UserError(f"{path} is empty")
    return text


def existing(path: str) -> Path:
    """The type of an option: a file or directory that is there."""
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{path} does not exist")
    return Path(path)


def positive(number: str) -> float:
    """The type of an option: a number above 0."""
    value = _number(number)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {number}")
    return value


def positive_int(number: str) -> int:
    """The type of an option: a whole number above 0."""
    value = _number(number)  # also 3e9
    if not math.isfinite(value) or value != int(value) or value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {number}")
    return int(value)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text}") from None
