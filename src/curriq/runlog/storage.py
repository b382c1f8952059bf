"""Writing that survives a crash: data reaches the disk before the name that announces it."""

import itertools
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from curriq.errors import CurriqError

if os.name == "posix":
    import fcntl


def fsync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder; its renames are ordered by the file system
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or the next start after a crash, sees the old content or the new.

    Raises:
        OSError: the file could not be written; the old content stands and no temporary is left.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


_locks: set[int] = set()


def _close_locks() -> None:
    """In a forked child: a worker that reads data must not hold a folder after this process has ended."""
    while _locks:
        os.close(_locks.pop())


if os.name == "posix":
    os.register_at_fork(after_in_child=_close_locks)


@contextmanager
def exclusive(folder: Path, refusal: str) -> Generator[int]:
    """Hold the folder's lock; gives its descriptor. Children that it is passed to hold the lock too.

    It is free again when this process and all that have inherited it have ended, however they end.

    Args:
        folder: is made where it is not there, and `.lock` in it.
        refusal: what to say when somebody else holds the lock.

    Raises:
        CurriqError: the refusal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            if os.name == "posix":  # elsewhere nothing holds the folder
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CurriqError(refusal) from None
        except OSError:
            pass  # some network file systems have no locks
        _locks.add(descriptor)
        yield descriptor
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)


def new_folder(path: Path) -> Path:
    """Makes `path`, or the first of `path-2`, `path-3`, … that nobody else has made.

    Raises:
        OSError: the parent folder cannot be written.
    """
    for count in itertools.count(1):
        folder = path if count == 1 else path.with_name(f"{path.name}-{count}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def readable_bytes(count: int) -> str:
    """A number of bytes for people: `readable_bytes(1_520_000) == "1.5 MB"`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
