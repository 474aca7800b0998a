"""Errors of the one who gives a command: one line that names the file or option, exit status 2."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """Something about the command, or about what it was given, that its message names."""


def command(main: Callable[[], int | None]) -> None:
    """Runs `main` and ends the process: with what it returns, or with status 2 and one line on an error of the user's
    or of the system's (a file that is missing, a full disk). Any other exception is a fault of ours: it is shown."""
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(lines)}", file=sys.stderr)
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
