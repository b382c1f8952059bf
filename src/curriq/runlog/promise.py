"""What a checkpoint promises of the log, and whether the log keeps it.

A checkpoint of step s promises a complete log of the steps before s. `metrics.jsonl` (a row per step) and
`parts.jsonl` (a line per part of a table, with its size and SHA-256) only ever grow, so the extents of these
two files cover a log of any length, and a checkpoint takes as long after a million steps as after ten.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

METRICS, PARTS = "metrics.jsonl", "parts.jsonl"
TABLES = ("candidates", "queries", "windows")
"""Folders of the tables whose parts `parts.jsonl` lists."""
BLOCK = 1 << 20

Promise = Mapping[str, Mapping[str, Any]]
"""Name of a growing file → its `Extent`, as a checkpoint's manifest holds it; empty at the start of a run."""


@dataclass(frozen=True)
class Extent:
    """The first `size` bytes of a file, and their SHA-256."""

    size: int = 0
    sha256: str = hashlib.sha256().hexdigest()

    @staticmethod
    def of(promise: Promise, name: str) -> "Extent":
        return Extent(**promise[name]) if name in promise else Extent()


@dataclass(frozen=True)
class Part:
    """One line of `parts.jsonl`: a file of a table, relative to the run's folder, and what is in it."""

    file: str
    first_step: int
    last_step: int
    rows: int
    size: int
    sha256: str

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def read_hash(file: BinaryIO, size: int) -> "tuple[hashlib._Hash, int]":
    """SHA-256 of the next `size` bytes of a file, and how many of them there were."""
    digest, left = hashlib.sha256(), size
    while left and (block := file.read(min(left, BLOCK))):
        digest.update(block)
        left -= len(block)
    return digest, size - left


def promised_parts(run_dir: Path, promise: Promise) -> Iterator[Part]:
    """The parts that the promise covers, from the lines of `parts.jsonl`."""
    extent = Extent.of(promise, PARTS)
    if extent.size:
        with (run_dir / PARTS).open("rb") as file:
            for line in file.read(extent.size).splitlines():
                yield Part(**json.loads(line))


def listed_parts(run_dir: Path, *tables: str) -> Iterator[Part]:
    """The parts of some tables that `parts.jsonl` lists, from its sound lines; none where it is missing."""
    try:
        lines = (run_dir / PARTS).read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            part = Part(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue  # `curriq verify` says so
        if str(part.file).partition("/")[0] in tables:
            yield part


def broken(run_dir: Path, promise: Promise) -> list[str]:
    """What of a promised log is missing or damaged, by file and line; empty when all of it is there."""
    defects = [defect for name in promise if (defect := _of_extent(run_dir / name, Extent.of(promise, name)))]
    if any(defect.startswith(PARTS) for defect in defects):
        return defects  # nothing says any more what the parts should be
    return defects + [
        defect for part in promised_parts(run_dir, promise) if (defect := of_part(run_dir, part))
    ]


def of_part(run_dir: Path, part: Part) -> str:
    """What is wrong with one part of a table; empty when it holds what was written."""
    steps = f"{part.file} (steps {part.first_step} to {part.last_step})"
    try:
        with (run_dir / part.file).open("rb") as file:
            digest, found = read_hash(file, part.size + 1)
    except OSError as error:
        return f"{steps} cannot be read ({error.strerror})"
    if found != part.size:
        return f"{steps} has not its {part.size} bytes"
    return "" if digest.hexdigest() == part.sha256 else f"{steps} is damaged: its SHA-256 is another"


def _of_extent(path: Path, extent: Extent) -> str:
    try:
        with path.open("rb") as file:
            digest, found = read_hash(file, extent.size)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})" if extent.size else ""
    if digest.hexdigest() == extent.sha256 and found == extent.size:
        return ""
    if found < extent.size:
        return f"{path.name} has {found} bytes instead of {extent.size} or more"
    line = first_bad_line(path, extent.size)
    return f"{path.name} is damaged{f' in line {line}' if line else ': its SHA-256 is another'}"


def first_bad_line(path: Path, size: int) -> int | None:
    """Number, from 1, of the first line within `size` bytes that is no JSON object; for rows of metrics also
    the first whose step is not the next one. None when each line by itself is sound."""
    with path.open("rb") as file:
        for number, line in enumerate(file.read(size).split(b"\n")[:-1], 1):
            row = _row(line)
            if row is None or (path.name == METRICS and row.get("step") != number - 1):
                return number
    return None


def whole_until(path: Path, start: int) -> int:
    """Bytes of a growing file up to which its lines are whole JSON objects, from the byte `start` on."""
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n") or _row(line) is None:
                break
            start += len(line)
    return start


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
