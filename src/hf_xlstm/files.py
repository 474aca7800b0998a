"""Files and directories that are complete and new, or untouched and old, after kill -9 and on a full disk as well.

What is to be written is first written beside its place, under a name that no other process uses, and takes its place
at the end in one step of the file system. What a killed process leaves behind (`NAME.partial-…`) is removed by the
next one that writes the same target: a process locks what it writes, and the system drops the locks of the dead.
"""

import ctypes
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows has no such locks, so that leftovers stay
    fcntl = None  # type: ignore[assignment]

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


@contextmanager
def appearing(target: str | os.PathLike, nbytes: int = 0) -> Iterator[Path]:
    """A new directory to fill, which gets the name `target` at the end, or disappears after a failure.

    Args:
        nbytes: bytes that will be written; that much room must be there.

    Raises:
        FileExistsError: `target` is neither absent nor an empty directory, at the beginning or by then; or another
            process is writing it.
        OSError: there is not enough room.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists.")
    with _beside(target, nbytes) as partial:
        yield partial
        _sync(partial)
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError(f"{target} exists: another process has written it meanwhile.") from error


@contextmanager
def replacing(target: str | os.PathLike, nbytes: int = 0, keep: Iterable[str] = ()) -> Iterator[Path]:
    """A new directory to fill, which takes the place of the directory `target` as a whole at the end, or disappears
    after a failure.

    Args:
        nbytes: bytes that will be written; that much room must be there.
        keep: names in the old directory that the new one has as well, unless it has something of that name itself.

    Raises:
        FileExistsError: another process is writing it.
        OSError: there is not enough room.
    """
    target = Path(target).resolve()  # a link stays one
    with _beside(target, nbytes) as partial:
        yield partial
        for name in keep:
            if not (partial / name).exists():
                _link(target / name, partial / name)
        _sync(partial)
        if target.exists():
            shutil.copymode(target, partial)
            _exchange(partial, target)
            shutil.rmtree(partial, ignore_errors=True)  # the old one
        else:
            partial.rename(target)


@contextmanager
def replacing_file(path: str | os.PathLike) -> Iterator[Path]:
    """The path of a new file to write, with the suffix of `path`, which takes its place at the end, or disappears
    after a failure."""
    path = Path(path).resolve()
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield partial
        _sync_file(partial)
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text as UTF-8, whole or not at all."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_room(directory: str | os.PathLike, nbytes: int) -> None:
    """Raises OSError unless the disk of `directory`, or of the nearest parent that exists, has room for `nbytes`."""
    directory = Path(directory).resolve()
    place = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OSError(f"{directory} needs {nbytes:,} bytes, and the disk has {free:,} left.")


@contextmanager
def locked(directory: str | os.PathLike) -> Iterator[bool]:
    """Whether this process has the lock of `directory`, which one process at a time can have: False where another one
    has it, or the directory is gone. A process that ends, in whatever way, loses its locks."""
    if fcntl is None:
        yield True
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = True
    except BlockingIOError:
        mine = False
    try:
        yield mine
    finally:
        os.close(descriptor)


@contextmanager
def _beside(target: Path, nbytes: int) -> Iterator[Path]:
    """A directory of this process beside `target`, locked, and removed after a failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is not None:
        for leftover in target.parent.glob(f"{glob.escape(target.name)}.partial-*"):
            with locked(leftover) as mine:
                if mine:
                    shutil.rmtree(leftover, ignore_errors=True)
                elif leftover.exists():
                    raise FileExistsError(f"{target} is being written by another process.")
    check_room(target.parent, nbytes)
    while True:
        partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
        with locked(partial) as mine:
            if not mine or not partial.exists():  # taken for a leftover, in the moment before it had its lock
                continue
            try:
                yield partial
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            return


def _exchange(a: Path, b: Path) -> None:
    """Exchanges the names of two directories. Where the system cannot do it in one step, the name `b` is absent for a
    moment, with what it named beside it."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
            return
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        pass
    old = b.with_name(f"{b.name}.replaced-{secrets.token_hex(4)}")
    b.rename(old)
    a.rename(b)
    old.rename(a)


def _link(source: Path, target: Path) -> None:
    """Gives a file, or a directory with all it holds, a second name without copying what it holds."""
    if source.is_dir() and not source.is_symlink():
        target.mkdir()
        for path in source.iterdir():
            _link(path, target / path.name)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without second names
        shutil.copy2(source, target, follow_symlinks=False)


def _sync(directory: Path) -> None:
    """A name must not survive a crash that the contents did not."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _sync_file(path)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
