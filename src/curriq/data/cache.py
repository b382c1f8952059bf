"""The cache for what is derived from text, and hashes of whole files.

Every entry begins with the SHA-256 of its name and content, so that a damaged entry, or one that was copied
from another place, is made again and never used. Where there is no home folder, or none that can be written,
there is no cache, and nothing else changes.
"""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curriq.errors import CurriqError

log = logging.getLogger("curriq")

ENTRY = ".entry"
"""Extension of entries, which those of earlier versions, without a hash, do not have."""
BLOCK = 1 << 22
SETTLED_NS = 2_000_000_000
"""Age from which a file's times tell every later change; a younger one may change within a clock tick."""
QUIET_SECONDS = 10
"""Hashing says how far it is after so many seconds, and again after each further so many."""


def cache_dir() -> Path | None:
    """Folder for derived data: $CURRIQ_CACHE, else $XDG_CACHE_HOME/curriq, else ~/.cache/curriq; None without
    a home folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(os.environ.get("CURRIQ_CACHE") or f"{base}/curriq").expanduser()
    except RuntimeError:  # neither HOME nor an account that has one
        return None


def read_cached(name: str) -> bytes | None:
    """The content of an entry; None where there is none, and, with a warning, where it is another than was
    written."""
    folder = cache_dir()
    if folder is None:
        return None
    try:
        seal, _, content = _path(folder, name).read_bytes().partition(b"\n")
    except OSError:
        return None
    if seal == _seal(name, content):
        return content
    log.warning(f"{_path(folder, name)} is damaged, or of another entry of the cache: it is made again.")
    return None


def write_cached(name: str, content: bytes) -> bool:
    """Write an entry atomically; False when the cache cannot be written, which is no error because everything
    in it can be computed again."""
    folder = cache_dir()
    if folder is None:
        return False
    path = _path(folder, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as made:
            temporary = Path(made, path.name)
            temporary.write_bytes(_seal(name, content) + b"\n" + content)
            temporary.replace(path)
    except OSError:
        return False
    return True


def damaged_entries() -> Iterator[Path]:
    """The entries of the cache that are not what was written."""
    if (folder := cache_dir()) is None:
        return
    for path in sorted(folder.rglob(f"*{ENTRY}")):
        seal, _, content = path.read_bytes().partition(b"\n")
        if seal != _seal(path.relative_to(folder).as_posix().removesuffix(ENTRY), content):
            yield path


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}{ENTRY}"


def _seal(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + content).hexdigest().encode()


@dataclass(frozen=True)
class FileHash:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


def file_hash(path: Path) -> FileHash:
    """Size and SHA-256 of a whole file. The hash is kept in the cache, and taken from there as long as the
    file's size, times and inode are the same.

    Raises:
        CurriqError: the file cannot be read, or changes while it is.
    """
    try:
        identity = _identity(path)
        name = f"files/{hashlib.sha256(repr(identity).encode()).hexdigest()}"
        if (kept := _known.get(name) or read_cached(name)) is None:
            kept = hash_bytes(path, identity[1]).encode()
            if _identity(path) != identity:
                raise CurriqError(f"{path} changes while it is read: wait until it is complete.")
            if time.time_ns() - max(identity[2:4]) > SETTLED_NS:
                _known[name] = kept
                write_cached(name, kept)
        return FileHash(identity[1], kept.decode())
    except OSError as error:
        raise CurriqError(f"{path} cannot be read: {error.strerror}.") from error


_known: dict[str, bytes] = {}
"""Hashes of this process, for sources that share files and for a machine without a cache."""


def _identity(path: Path) -> tuple[str, int, int, int, int, int]:
    """Path, size, time of the content, time of the inode, inode and device."""
    stat = path.stat()
    times = (stat.st_mtime_ns, stat.st_ctime_ns)
    return (str(path.resolve()), stat.st_size, *times, stat.st_ino, stat.st_dev)


def hash_bytes(path: Path, size: int) -> str:
    """SHA-256 of the first `size` bytes of a file, with a line of progress where that takes long."""
    digest, done, report = hashlib.sha256(), 0, time.monotonic() + QUIET_SECONDS
    with path.open("rb") as file:
        while block := file.read(min(BLOCK, size - done)):
            digest.update(block)
            done += len(block)
            if time.monotonic() > report:
                report += QUIET_SECONDS
                log.info(f"hashing {path}: {done / 1e9:.1f} of {size / 1e9:.1f} GB (once, then it is cached)")
    return digest.hexdigest()


def changed_files(recorded: Mapping[str, Any], now: Mapping[str, FileHash]) -> list[str]:
    """What has become of the files that a run recorded (name → fields of its `FileHash`) and that are here,
    those that are the same left out."""
    changes = []
    for name in sorted(recorded.keys() & now.keys()):
        old, new = FileHash(**recorded[name]), now[name]
        if new.size > old.size and hash_bytes(Path(name), old.size) == old.sha256:
            changes.append(f"{name} has grown by {new.size - old.size} bytes (what was there is unchanged)")
        elif new != old:
            changes.append(f"{name} has changed")
    return changes
