"""Writers of a run's log: rows, candidates, queries, windows, and the summary.

`RUN/metrics.jsonl` and the tables beside it are the truth; TensorBoard and Weights & Biases are mirrors. A
log that is opened at step s forgets what it holds from s on, because a resumed run writes those steps again.
Call `flush()` before a checkpoint is saved: a checkpoint of step s promises a complete log of the steps
before s.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from curriq.config import did_you_mean
from curriq.errors import CurriqError
from curriq.runlog import schema
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
        step: its index.
        row: its metrics.
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

    Args:
        run_dir: folder of the run.
        start_step: first step that will be appended; rows from there on and a half-written last line
            are cut off.
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
        """Validate a row and write it.

        Raises:
            KeyError: a name that the registry does not define.
            TypeError: a value that is no Python number.
            CurriqError: a value that is not finite.
        """
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
        if not self.path.exists():
            return size, last_step
        with self.path.open("rb") as file:
            for line in file:
                step = step_of_line(line)
                if step is None or step >= start_step:
                    break
                size, last_step = size + len(line), step
        return size, last_step


def encode_row(row: Row) -> bytes:
    """One validated JSON line; floats in the shortest form that reads back to the same bits."""
    for name, value in row.items():
        schema.find(name)
        require_finite(name, value, row.get("step"))
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def require_finite(name: str, value: Any, step: Any) -> None:
    """Refuse what JSON would write as something else than a number.

    Raises:
        TypeError: no Python number; a tensor, a numpy scalar or a bool is none.
        CurriqError: nan or infinite.
    """
    if type(value) not in (int, float):
        raise TypeError(f"metric {name!r} is a {type(value).__name__}, not a Python number: {value!r}")
    if not math.isfinite(value):
        raise CurriqError(
            f"{name} = {value} at step {step}: the log holds finite numbers only. The last checkpoint "
            "stands; a lower --lm-lr or --q-lr usually helps."
        )


def step_of_line(line: bytes) -> int | None:
    """The step of one line of the log; None when the line is not a whole row."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class TableLog:
    """`RUN/<name>/part-<first step>.parquet`: steps are collected, and each `flush` writes a part.

    Args:
        run_dir: folder of the run.
        name: of the table.
        start_step: first step that will be appended; what the parts hold from there on is dropped.
    """

    def __init__(self, run_dir: Path, name: str, start_step: int) -> None:
        self.folder = run_dir / name
        self._first_step: int | None = None
        drop_steps(self.folder, start_step)

    def flush(self) -> None:
        """Write the collected steps as one part; on a full disk they stay in memory, with a warning."""
        if self._first_step is None:
            return
        path = self.folder / f"part-{self._first_step:08d}.parquet"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_part(path, self._table())
        except OSError as error:
            log.warning(f"{path}: {error.strerror}. Its rows wait in memory until the disk takes them.")
            return
        self._first_step = None
        self._clear()

    def _begin(self, step: int) -> None:
        self._first_step = step if self._first_step is None else self._first_step

    def _table(self) -> "pa.Table":
        raise NotImplementedError

    def _clear(self) -> None:
        raise NotImplementedError


class CandidateLog(TableLog):
    """`RUN/candidates/`: every window that was read, with its score and weight.

    Args:
        source_names: names that the column `source` indexes.
    """

    def __init__(self, run_dir: Path, source_names: Sequence[str], start_step: int) -> None:
        super().__init__(run_dir, "candidates", start_step)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source_names = list(source_names)
        self._steps: list[dict[str, np.ndarray]] = []

    def append(self, entry: Entry) -> None:
        self._begin(entry.step)
        self._steps.append(entry.candidates)

    def _table(self) -> "pa.Table":
        import pyarrow as pa

        columns = {name: np.concatenate([s[name] for s in self._steps]) for name in self._steps[0]}
        arrays: dict[str, pa.Array] = {
            name: pa.array(values, mask=np.isnan(values) if values.dtype == np.float32 else None)
            for name, values in columns.items()
        }
        arrays["source"] = pa.DictionaryArray.from_arrays(arrays["source"], self.source_names)
        return pa.table(arrays)

    def _clear(self) -> None:
        self._steps.clear()


class QueryLog(TableLog):
    """`RUN/queries/`: what Langevin-RAG searched for, and what it found. A run without queries has none."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        super().__init__(run_dir, "queries", start_step)
        self._rows: list[dict[str, Any]] = []

    def append(self, entry: Entry) -> None:
        if entry.queries:
            self._begin(entry.step)
            self._rows += entry.queries

    def _table(self) -> "pa.Table":
        import pyarrow as pa

        types = {
            "int32": pa.int32(),
            "int64": pa.int64(),
            "float32": pa.float32(),
            "string": pa.string(),
            "list of int64": pa.list_(pa.int64()),
            "list of float32": pa.list_(pa.float32()),
        }
        columns = pa.schema([(column.name, types[column.unit]) for column in schema.QUERIES])
        return pa.Table.from_pylist(self._rows, schema=columns)

    def _clear(self) -> None:
        self._rows.clear()


BYTES_PER_TOKEN = 4
"""Before compression; on the disk a token of a vocabulary below 65,536 takes about half of it."""


class WindowLog(TableLog):
    """`RUN/windows/`: the tokens of every window that was read, once each, so that a choice can be read.

    The candidates table names windows by id; here an id becomes text again. Tokens are kept and not text:
    they cost nothing to write, replay exactly (`curriq export`), and `windows/tokenizer.json` beside them
    turns them into text without torch.

    Args:
        megabytes: bound on the tokens kept, uncompressed; windows that come after it are not kept. 0 keeps
            none and makes no folder.
        tokenizer: content of the tokenizer's `tokenizer.json`; empty when it has none.
    """

    def __init__(self, run_dir: Path, start_step: int, megabytes: float, tokenizer: str) -> None:
        super().__init__(run_dir, "windows", start_step)
        self._budget = int(megabytes * 1e6)
        self._reserve = self._budget // 2
        self._known: set[int] = set()
        self._new: dict[str, list[np.ndarray]] = {"window_id": [], "step": [], "tokens": []}
        self._reported = False
        if self._budget == 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for ids, length in _kept_windows(self.folder):
            self._known.update(ids)
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
        self._begin(entry.step)
        tokens = entry.tokens[fresh].astype(np.int32)
        self._new["window_id"].append(ids[fresh].astype(np.int64))
        self._new["step"].append(np.full(len(fresh), entry.step, dtype=np.int32))
        self._new["tokens"].append(tokens)
        self._budget -= tokens.size * BYTES_PER_TOKEN
        if self._budget <= 0 and not self._reported:
            self._reported = True
            log.info(
                f"--log-windows-mb is used up at step {entry.step}: the texts of later windows are not kept; "
                "the candidates table goes on."
            )

    def _table(self) -> "pa.Table":
        import pyarrow as pa

        columns = {name: np.concatenate(parts) for name, parts in self._new.items()}
        tokens = columns.pop("tokens")
        flat = pa.array(tokens.reshape(-1))
        return pa.table(
            {name: pa.array(values) for name, values in columns.items()}
            | {"tokens": pa.FixedSizeListArray.from_arrays(flat, tokens.shape[1])}
        )

    def _clear(self) -> None:
        for column in self._new.values():
            column.clear()


def _kept_windows(folder: Path) -> list[tuple[list[int], int]]:
    """(window ids, tokens per window) of every part."""
    import pyarrow.parquet as pq

    parts = (pq.ParquetFile(path) for path in sorted(folder.glob("part-*.parquet")))
    return [
        (
            part.read(columns=["window_id"])["window_id"].to_pylist(),
            part.schema_arrow.field("tokens").type.list_size,
        )
        for part in parts
    ]


class RunLogs:
    """All writers of a run, opened, flushed and closed together.

    Args:
        run_dir: folder of the run.
        start_step: first step that will be written.
        source_names: of the run.
        tokenizer: content of its `tokenizer.json`; empty when it has none.
        windows_mb: bound on the texts kept.
        candidates: whether candidates and queries are kept.
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
    ) -> None:
        self._metrics = MetricsLog(run_dir, start_step)
        self._tables: list[WindowLog | CandidateLog | QueryLog] = [
            WindowLog(run_dir, start_step, windows_mb, tokenizer)
        ]
        if candidates:
            self._tables.append(CandidateLog(run_dir, source_names, start_step))
            self._tables.append(QueryLog(run_dir, start_step))

    def write(self, entry: Entry) -> None:
        self._metrics.append(entry.row)
        for table in self._tables:
            table.append(entry)

    def flush(self) -> None:
        self._metrics.flush()
        for table in self._tables:
            table.flush()

    def close(self) -> None:
        self._metrics.close()


def write_part(path: Path, table: "pa.Table") -> None:
    """One Parquet file, atomically.

    Raises:
        OSError: the disk refused it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    write_atomically(path, buffer.getvalue().to_pybytes())


def drop_steps(folder: Path, start_step: int) -> None:
    """Remove the steps from `start_step` on: whole parts, and the end of the part that holds the border.

    Raises:
        CurriqError: the part at the border cannot be read.
    """
    for temporary in folder.glob(".tmp-*"):
        temporary.unlink()
    border = None
    for path in sorted(folder.glob("part-*.parquet")):
        if int(path.stem.removeprefix("part-")) >= start_step:
            path.unlink()
        else:
            border = path
    if border is None:
        return
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(border)
    except (OSError, pa.ArrowInvalid) as error:
        raise CurriqError(f"{border} is damaged ({error}): move it away and resume again.") from None
    kept = table.filter(pc.field("step") < start_step)
    if len(kept) < len(table):
        write_part(border, kept)


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write `RUN/summary.json` atomically.

    Raises:
        KeyError: a field that the registry does not define.
        ValueError: a number that is not finite.
    """
    known = [field.name for field in schema.SUMMARY]
    for name in summary:
        if name not in known:
            raise KeyError(f"unknown summary field {name!r}.{did_you_mean(name, known)}")
    content = json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(run_dir / "summary.json", content.encode() + b"\n")
