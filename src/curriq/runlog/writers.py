"""Writers of a run's log: rows, candidates, queries, windows, and the summary.

`RUN/metrics.jsonl` and the tables beside it are the truth; TensorBoard and Weights & Biases are mirrors, and
a mirror that fails ends no run. A log is opened with what a checkpoint promises of it and forgets the rest,
because a resumed run writes those steps again. `flush()` returns what the next checkpoint may promise.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from curriq.config import did_you_mean
from curriq.errors import CurriqError
from curriq.runlog import schema
from curriq.runlog.promise import METRICS, PARTS, TABLES, Extent, Part, Promise, promised_parts, read_hash
from curriq.runlog.read import part_paths, read_part
from curriq.runlog.storage import fsync, make_folder, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("curriq")

Row = dict[str, float]
"""Metric name to value."""
NOTHING = Extent()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the log keeps of one step.

    Attributes:
        candidates: columns of the candidates table, one entry per window that was read.
        tokens: of all windows in `candidates`, −1 − id where one is not learnt.
        proposed: how many of them, from the first, were proposed; a filter rejected the rest.
        queries: rows of the queries table.
    """

    step: int
    row: Row
    candidates: dict[str, np.ndarray]
    tokens: Int[np.ndarray, "n T"]
    proposed: int
    queries: list[dict[str, Any]]


class GrowingFile:
    """A file of lines that only grows, with the SHA-256 of what it holds.

    Opening it cuts off what follows the bytes to keep; CurriqError when these are not there.
    """

    def __init__(self, path: Path, kept: Extent) -> None:
        self.path = path
        make_folder(path.parent)
        # Unbuffered: one write per step costs microseconds, and a killed process leaves every row behind.
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        self._hash, self._size = read_hash(self._file, kept.size)
        if self._size < kept.size or self._hash.hexdigest() != kept.sha256:
            self._file.close()
            raise CurriqError(f"{path} is damaged: `curriq verify {path.parent}` says where.")
        self._file.truncate(kept.size)
        fsync(path.parent)
        self._unwritten = b""
        self._warned = False

    def write(self, line: bytes) -> None:
        """Append a line. What the disk refuses waits in memory for the next call, with a warning."""
        self._hash.update(line)
        self._size += len(line)
        self._unwritten += line
        try:
            self._drain()
        except OSError as error:
            if not self._warned:
                log.warning(f"{self.path}: {error.strerror}. Rows wait in memory until the disk takes them.")
            self._warned = True
        else:
            self._warned = False

    def flush(self) -> Extent:
        """What the file holds, forced to the disk; OSError when the disk refuses it."""
        self._drain()
        os.fsync(self._file.fileno())
        return Extent(self._size, self._hash.hexdigest())

    def close(self) -> None:
        """Rows that the disk still refuses are those after the last checkpoint, which a resume repeats."""
        with suppress(OSError):
            self._drain()
            self._file.close()

    def _drain(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


class MetricsLog(GrowingFile):
    """`RUN/metrics.jsonl`: one row per step, in the order of the steps."""

    def __init__(self, run_dir: Path, kept: Extent = NOTHING) -> None:
        super().__init__(run_dir / METRICS, kept)

    def append(self, row: Row) -> None:
        """Write a row, validated by `encode_row`."""
        self.write(encode_row(row))


def encode_row(row: Row) -> bytes:
    """One validated JSON line; floats in the shortest form that reads back to the same bits.

    Raises:
        KeyError: the schema does not define a name.
        TypeError: a value is no Python number; a tensor, a numpy scalar or a bool is none.
        CurriqError: a value is nan or infinite.
    """
    for name, value in row.items():
        schema.find(name)
        if type(value) not in (int, float):
            raise TypeError(f"metric {name!r} is a {type(value).__name__}, not a Python number: {value!r}")
        if not math.isfinite(value):
            own = name.startswith("own/")
            what = "it is of your own selector or probe" if own else "a lower --lm-lr or --q-lr usually helps"
            raise CurriqError(
                f"{name} = {value} at step {row.get('step')}: the log holds finite numbers only. The last "
                f"checkpoint is intact; {what}."
            )
    return json.dumps(row, allow_nan=False).encode() + b"\n"


class Parts(GrowingFile):
    """`RUN/parts.jsonl`: one line per part of a table, in the order in which they were written.

    Opening it removes the files of parts that the promise does not cover.
    """

    def __init__(self, run_dir: Path, promise: Promise) -> None:
        super().__init__(run_dir / PARTS, Extent.of(promise, PARTS))
        self.run_dir = run_dir
        kept = {part.file for part in promised_parts(run_dir, promise)}
        for name in TABLES:
            temporaries = (run_dir / name).glob(".tmp-*")
            for path in (*temporaries, *part_paths(run_dir, name)):
                if path.relative_to(run_dir).as_posix() not in kept:
                    path.unlink()

    def add(self, path: Path, steps: tuple[int, int], table: "pa.Table") -> None:
        """Write a part and its line; OSError when the disk refuses the part."""
        content = encode_part(table)
        make_folder(path.parent)
        write_atomically(path, content)
        file, digest = path.relative_to(self.run_dir).as_posix(), hashlib.sha256(content).hexdigest()
        self.write(Part(file, *steps, len(table), len(content), digest).line())


class TableLog:
    """`RUN/<name>/part-<first step>.parquet`: steps are collected, and each `flush` writes a part.

    A column of unit `dictionary` indexes `sources`.
    """

    name: ClassVar[str]
    columns: ClassVar[Sequence[schema.Metric]]

    def __init__(self, parts: Parts, sources: Sequence[str] = ()) -> None:
        self.folder = parts.run_dir / self.name
        self._parts = parts
        self._sources = list(sources)
        self._steps: list[Mapping[str, Any]] = []

    def append(self, entry: Entry) -> None:
        """Collect the table's part of a step."""
        raise NotImplementedError

    def flush(self) -> None:
        """Write the collected steps as one part; OSError when the disk refuses it, and then they stay."""
        if self._steps:
            first, last = (int(step["step"][0]) for step in (self._steps[0], self._steps[-1]))
            self._parts.add(self.folder / f"part-{first:08d}.parquet", (first, last), self._table())
            self._steps.clear()

    def _table(self) -> "pa.Table":
        import pyarrow as pa

        units = {column.name: column.unit for column in self.columns}
        return pa.concat_tables(
            pa.table({name: arrow_column(step[name], unit, self._sources) for name, unit in units.items()})
            for step in self._steps
        )


class CandidateLog(TableLog):
    """`RUN/candidates/`: every window that was read, with its score and weight."""

    name, columns = "candidates", schema.CANDIDATES

    def append(self, entry: Entry) -> None:
        self._steps.append(entry.candidates)


class QueryLog(TableLog):
    """`RUN/queries/`: what Langevin-RAG searched for, and what it found. A run without queries has none."""

    name, columns = "queries", schema.QUERIES

    def append(self, entry: Entry) -> None:
        if entry.queries:
            names = entry.queries[0]
            self._steps.append({name: [row[name] for row in entry.queries] for name in names})


BYTES_PER_TOKEN = 4
"""Before compression; on the disk a token of a vocabulary below 65,536 takes about half of it."""


class WindowLog(TableLog):
    """`RUN/windows/`: the tokens of every window that was read, once each, so that a choice can be read.

    Tokens are kept and not text: they cost nothing to write, replay exactly (`curriq export`), and
    `windows/tokenizer.json` beside them turns them into text without torch.

    Args:
        megabytes: bound on the tokens kept, uncompressed; 0 keeps none and makes no folder.
        tokenizer: content of the tokenizer's `tokenizer.json`; empty when it has none.
    """

    name, columns = "windows", schema.WINDOWS

    def __init__(self, parts: Parts, megabytes: float, tokenizer: str) -> None:
        import pyarrow.parquet as pq

        super().__init__(parts)
        self._budget = int(megabytes * 1e6)
        self._reserve = self._budget // 2
        self._known: set[int] = set()
        self._reported = False
        if self._budget == 0:
            return
        make_folder(self.folder)
        for path in part_paths(parts.run_dir, "windows"):
            ids = read_part(path, ["window_id"])["window_id"].to_pylist()
            self._known.update(ids)
            length = pq.read_schema(path).field("tokens").type.list_size
            self._budget -= len(ids) * length * BYTES_PER_TOKEN
        if tokenizer:
            write_atomically(self.folder / "tokenizer.json", tokenizer.encode())

    def append(self, entry: Entry) -> None:
        """Collect the windows of a step that have not been seen before."""
        if self._budget > 0:
            self._keep(entry, range(entry.proposed))
        # An export needs all that was proposed, so what was rejected gets half of the room at most.
        if self._budget > self._reserve:
            self._keep(entry, range(entry.proposed, len(entry.tokens)))

    def _keep(self, entry: Entry, rows: range) -> None:
        ids = entry.candidates["window_id"]
        fresh = []
        for row in rows:
            if (window := int(ids[row])) not in self._known:
                self._known.add(window)
                fresh.append(row)
        if not fresh:
            return
        tokens = entry.tokens[fresh]
        self._steps.append({"window_id": ids[fresh], "step": [entry.step] * len(fresh), "tokens": tokens})
        self._budget -= tokens.size * BYTES_PER_TOKEN
        if self._budget <= 0 and not self._reported:
            self._reported = True
            log.info(
                f"--log-windows-mb is used up at step {entry.step}: the texts of later windows are not kept; "
                "the candidates table goes on."
            )


@runtime_checkable
class Mirror(Protocol):
    """Another place that is given every row of the log."""

    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class RunLogs(AbstractContextManager):
    """All writers of a run, opened, flushed and closed together; as a context manager it closes itself.

    Args:
        promise: what the checkpoint that the run goes on from promises of the log.
        tokenizer, windows_mb: as in `WindowLog`.
        candidates: whether candidates and queries are kept.
        mirrors: given every row too, and closed with the logs. One that fails is warned of and left out.
    """

    def __init__(
        self,
        run_dir: Path,
        promise: Promise | None = None,
        *,
        source_names: Sequence[str],
        tokenizer: str,
        windows_mb: float,
        candidates: bool,
        mirrors: Sequence[Callable[[], Mirror]] = (),
    ) -> None:
        self._metrics = MetricsLog(run_dir, Extent.of(promise or {}, METRICS))
        self._parts = Parts(run_dir, promise or {})
        self._tables: list[TableLog] = [WindowLog(self._parts, windows_mb, tokenizer)]
        if candidates:
            self._tables += [CandidateLog(self._parts, source_names), QueryLog(self._parts)]
        self._mirrors: list[Mirror] = []
        for make in mirrors:
            with self._switched_off_by_failure():
                self._mirrors.append(make())

    def write(self, entry: Entry) -> None:
        self._metrics.append(entry.row)
        for table in self._tables:
            table.append(entry)
        for mirror in tuple(self._mirrors):
            with self._switched_off_by_failure(mirror):
                mirror.write(entry.row)

    def flush(self) -> Promise:
        """What a checkpoint may promise of the log now, all of it forced to the disk.

        OSError when the disk refuses it; what it has refused stays in memory, and a later call tries again.
        """
        for table in self._tables:
            table.flush()
        return {file.path.name: asdict(file.flush()) for file in (self._metrics, self._parts)}

    def close(self) -> None:
        for mirror in tuple(self._mirrors):
            with self._switched_off_by_failure(mirror):
                mirror.close()
        self._metrics.close()
        self._parts.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _switched_off_by_failure(self, mirror: Mirror | None = None) -> Generator[None]:
        """Go on without a mirror that fails, whatever a library of others raises; a missing package is the
        user's to hear of."""
        try:
            yield
        except CurriqError:
            raise
        except Exception as error:
            if mirror is not None and mirror in self._mirrors:
                self._mirrors.remove(mirror)
                with suppress(Exception):
                    mirror.close()
            name = "a mirror of the log" if mirror is None else type(mirror).__name__
            log.warning(f"{name} failed and is switched off ({error}); the run and its own log go on.")


def arrow_column(values: Any, unit: str, sources: list[str]) -> "pa.Array":
    """Values of a column in the type that its unit in the schema names; NaN becomes null."""
    import pyarrow as pa

    if unit == "dictionary":
        return pa.DictionaryArray.from_arrays(pa.array(values, pa.int32()), sources)
    if unit == "list of T int32":
        return token_column(values)
    kind = pa.type_for_alias(unit.removeprefix("list of "))
    return pa.array(values, pa.list_(kind) if unit.startswith("list") else kind, from_pandas=True)


def token_column(tokens: Int[np.ndarray, "n T"]) -> "pa.FixedSizeListArray":
    """Tokens as a column of lists of T int32; `read.token_rows` is the inverse."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1), pa.int32()), tokens.shape[1])


def encode_part(table: "pa.Table") -> bytes:
    """A table as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue().to_pybytes()


def write_test_losses(run_dir: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write `RUN/test_losses.parquet`, with the columns that the schema defines."""
    import pyarrow as pa

    units = {column.name: column.unit for column in schema.TEST_LOSSES}
    table = pa.table({name: arrow_column(columns[name], unit, []) for name, unit in units.items()})
    write_atomically(run_dir / "test_losses.parquet", encode_part(table))


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write `RUN/summary.json`; KeyError for an undefined field, ValueError for one that is not finite."""
    known = [field.name for field in schema.SUMMARY]
    for name in summary:
        if name not in known:
            raise KeyError(f"unknown summary field {name!r}.{did_you_mean(name, known)}")
    content = json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(run_dir / "summary.json", content.encode() + b"\n")
