"""Writing that survives a crash: data reaches the disk before the name that announces it."""

import os
import time
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
    # Windows forces only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LOCK = ".lock"
"""The file in a folder that is locked while a process works there."""


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing, and force their names to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A temporary path whose content replaces the file at the end of the context.

    A reader, or the next start after a crash, sees the old content or the new. After an error no temporary is
    left, and the old content is intact; the whole new content is there where only forcing its name failed.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file as `replacing` does; OSError when the disk refuses it."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


_locks: set[int] = set()


def _close_locks() -> None:
    """In a forked child: a worker that reads data must not hold a folder after this process has ended."""
    while _locks:
        os.close(_locks.pop())


if os.name == "posix":
    os.register_at_fork(after_in_child=_close_locks)


@contextmanager
def exclusive(folder: Path, refusal: str) -> Generator[int]:
    """Hold the lock of a folder, which is made where it is missing; gives the descriptor of `.lock` in it.

    The lock is released when this process and all children that inherited the descriptor have ended, however
    they end. While another process holds it, CurriqError with the message `refusal` is raised.
    """
    make_folder(folder)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.name == "posix" and not _take(descriptor):  # elsewhere nothing holds the folder
            raise CurriqError(refusal)
        _locks.add(descriptor)
        yield descriptor
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    """Whether the lock is ours now, or cannot be had by anybody: some network file systems have no locks."""
    for pause in (0.0, 0.02, 0.05):  # `is_locked` of another process holds it for microseconds
        time.sleep(pause)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        except OSError:
            pass
        return True
    return False


def is_locked(folder: Path) -> bool:
    """Whether another process holds the lock of a folder, see `exclusive`; writes nothing."""
    if os.name != "posix":
        return False
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # some network file systems have no locks
    finally:
        os.close(descriptor)
    return False


def new_folder(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, … that does not exist yet, newly made."""
    folder, count = path, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            count += 1
            folder = path.with_name(f"{path.name}-{count}")
