"""Writers of a run's log: rows, candidates, queries, windows, and the summary.

`RUN/metrics.jsonl` and the tables beside it are the truth; TensorBoard and Weights & Biases are mirrors. A
log that is opened at step s forgets what it holds from s on, because a resumed run writes those steps again.
Call `flush()` before a checkpoint is saved: a checkpoint of step s promises a complete log of the steps
before s.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from curriq.config import did_you_mean
from curriq.errors import CurriqError
from curriq.runlog import schema
from curriq.runlog.read import part_paths, read_part
from curriq.runlog.storage import fsync, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("curriq")

Row = dict[str, float]
"""Metric name to value."""


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


class MetricsLog:
    """`RUN/metrics.jsonl`: one row per step, in the order of the steps.

    Opening it cuts off the rows from `start_step` on, and a half-written last line.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        size, last_step = self._kept(start_step)
        if last_step != start_step - 1:
            log.warning(
                f"{self.path} ends with step {last_step}, but the run goes on from step {start_step}: the "
                "rows between are lost. The run itself is not affected."
            )
        # Unbuffered: one write per step costs microseconds, and a killed process leaves every row behind.
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(size)
        self._unwritten = b""
        self._warned = False

    def append(self, row: Row) -> None:
        """Write a row, validated by `encode_row`."""
        self._unwritten += encode_row(row)
        self._write()

    def flush(self) -> None:
        """Force all rows to the disk."""
        self._write()
        fsync(self.path)

    def close(self) -> None:
        """Write what is left; on a disk that is still full this raises CurriqError."""
        self._write()
        self._file.close()
        if self._unwritten:
            raise CurriqError(
                f"the last rows ({len(self._unwritten)} bytes) could not be written to {self.path}: free "
                "some space and resume the run; it repeats the steps since the last checkpoint."
            )

    def _write(self) -> None:
        """Write as much as the disk takes; the rest waits in memory for the next call."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned:
                log.warning(f"{self.path}: {error.strerror}. Rows wait in memory until the disk takes them.")
            self._warned = True
        else:
            self._warned = False

    def _kept(self, start_step: int) -> tuple[int, int]:
        """Bytes of the file that stay, and the step of the last row in them (−1 without one)."""
        size, last_step = 0, -1
        self.path.touch()
        with self.path.open("rb") as file:
            for line in file:
                try:
                    step = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):
                    break
                if step >= start_step or not line.endswith(b"\n"):
                    break
                size, last_step = size + len(line), step
        return size, last_step


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
            raise CurriqError(
                f"{name} = {value} at step {row.get('step')}: the log holds finite numbers only. The last "
                "checkpoint is intact; a lower --lm-lr or --q-lr usually helps."
            )
    return json.dumps(row, allow_nan=False).encode() + b"\n"


class TableLog:
    """`RUN/<name>/part-<first step>.parquet`: steps are collected, and each `flush` writes a part.

    Opening it drops the steps from `start_step` on. A column of unit `dictionary` indexes `sources`.
    """

    name: ClassVar[str]
    columns: ClassVar[Sequence[schema.Metric]]

    def __init__(self, run_dir: Path, start_step: int, sources: Sequence[str] = ()) -> None:
        self.folder = run_dir / self.name
        self._sources = list(sources)
        self._steps: list[Mapping[str, Any]] = []
        drop_steps(run_dir, self.name, start_step)

    def append(self, entry: Entry) -> None:
        """Collect the table's part of a step."""
        raise NotImplementedError

    def flush(self) -> None:
        """Write the collected steps as one part; on a full disk they stay in memory, with a warning."""
        if not self._steps:
            return
        path = self.folder / f"part-{self._steps[0]['step'][0]:08d}.parquet"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_part(path, self._table())
        except OSError as error:
            log.warning(f"{path}: {error.strerror}. Its rows wait in memory until the disk takes them.")
        else:
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

    def __init__(self, run_dir: Path, start_step: int, megabytes: float, tokenizer: str) -> None:
        import pyarrow.parquet as pq

        super().__init__(run_dir, start_step)
        self._budget = int(megabytes * 1e6)
        self._reserve = self._budget // 2
        self._known: set[int] = set()
        self._reported = False
        if self._budget == 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in part_paths(run_dir, "windows"):
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
        tokenizer, windows_mb: as in `WindowLog`.
        candidates: whether candidates and queries are kept.
        mirrors: given every row too, and closed with the logs.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        *,
        source_names: Sequence[str],
        tokenizer: str,
        windows_mb: float,
        candidates: bool,
        mirrors: Sequence[Mirror] = (),
    ) -> None:
        self._metrics = MetricsLog(run_dir, start_step)
        self._tables: list[TableLog] = [WindowLog(run_dir, start_step, windows_mb, tokenizer)]
        if candidates:
            self._tables += [CandidateLog(run_dir, start_step, source_names), QueryLog(run_dir, start_step)]
        self._mirrors = mirrors

    def write(self, entry: Entry) -> None:
        self._metrics.append(entry.row)
        for table in self._tables:
            table.append(entry)
        for mirror in self._mirrors:
            mirror.write(entry.row)

    def flush(self) -> None:
        self._metrics.flush()
        for table in self._tables:
            table.flush()

    def close(self) -> None:
        for mirror in self._mirrors:
            mirror.close()
        self._metrics.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


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


def write_part(path: Path, table: "pa.Table") -> None:
    """Write one Parquet file atomically; OSError when the disk refuses it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    write_atomically(path, buffer.getvalue().to_pybytes())


def drop_steps(run_dir: Path, name: str, start_step: int) -> None:
    """Remove a table's steps from `start_step` on: whole parts, and the end of the part at the border."""
    for temporary in (run_dir / name).glob(".tmp-*"):
        temporary.unlink()
    paths = part_paths(run_dir, name)
    earlier = [path for path in paths if int(path.stem.removeprefix("part-")) < start_step]
    for path in paths[len(earlier) :]:
        path.unlink()
    if not earlier:
        return
    table = read_part(earlier[-1], fix="move it away and resume again")
    kept = table.filter(table["step"].to_numpy() < start_step)
    if len(kept) < len(table):
        write_part(earlier[-1], kept)


def write_test_losses(run_dir: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write `RUN/test_losses.parquet`, with the columns that the schema defines."""
    import pyarrow as pa

    units = {column.name: column.unit for column in schema.TEST_LOSSES}
    table = pa.table({name: arrow_column(columns[name], unit, []) for name, unit in units.items()})
    write_part(run_dir / "test_losses.parquet", table)


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write `RUN/summary.json`; KeyError for an undefined field, ValueError for one that is not finite."""
    known = [field.name for field in schema.SUMMARY]
    for name in summary:
        if name not in known:
            raise KeyError(f"unknown summary field {name!r}.{did_you_mean(name, known)}")
    content = json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(run_dir / "summary.json", content.encode() + b"\n")
