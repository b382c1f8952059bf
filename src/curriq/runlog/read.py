"""Readers of a run's folder. They import neither torch nor the report, so a log opens anywhere.

Where a file is missing or damaged they raise CurriqError, which names the file and how to fix it.
"""

import gzip
import json
import logging
import os
import tomllib
import zlib
from array import array
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curriq.errors import CurriqError
from curriq.runlog.promise import METRICS, TABLES, listed_parts

if TYPE_CHECKING:
    import pyarrow as pa
    import tokenizers

AXES = {
    "step": "step",
    "windows": "x/windows_proposed",
    "read": "x/windows_read",
    "tokens": "x/tokens",
    "FLOPs": "x/flops",
    "seconds": "x/seconds",
}
"""x-axis of a chart → its metric."""
CANDIDATE_NUMBERS = ("score", "weight", "loss", "q", "effect", "accept_prob", "static_score")
"""Columns of the candidates table that `candidate_parts` reads; a run may lack the last three."""
MOST_MEASURED = 8_000
"""Windows that averages over windows are taken from; a greater number changes no picture."""
NGRAM = 4
SHOWN = 3
"""Parts that a warning names."""
_SUMMARY_FIX = "resume the run to write it again"
TAIL_BYTES = 1 << 16
"""More than the longest row of a log."""
ADDED_LATER = ("effect", "accept_prob", "static_score")
COLUMN_TYPES = {
    "candidates": {
        **dict.fromkeys(("step", "row"), "int32"),
        **{"window_id": "int64", "source": "dictionary"},
        **dict.fromkeys(CANDIDATE_NUMBERS, "float"),
    },
    "queries": {
        **{"step": "int32", "query": "int32", "text": "string"},
        **{"window_id": "int64", "window_text": "string", "row": "int32"},
    },
    "windows": {"window_id": "int64", "tokens": "fixed_size_list"},
    "test_losses": {"window_id": "int64", "loss": "double", "tokens": "int64"},
}
"""Table → beginnings of the types of its columns, as pyarrow names them."""


@contextmanager
def explained(folder: Path) -> Generator[None]:
    """Turn what damaged files in a run's folder make their readers raise into a CurriqError that names it."""
    try:
        yield
    except (CurriqError, OSError, ImportError):
        raise
    except Exception as error:  # a file may hold anything where numbers and names are expected
        raise CurriqError(
            f"{folder} cannot be read ({type(error).__name__}: {error}): a file in it is damaged, or this is "
            "a fault of curriq; CURRIQ_DEBUG=1 shows where."
        ) from error


def existing(path: Path) -> Path:
    """The same path, when the file exists."""
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise CurriqError(f"{path} {what}: give the folder of a run that has written one.")
    return path


def recorded(run_dir: Path, what: str) -> dict[str, Any]:
    """What a run wrote down when it began: `files`, the local files that it reads, with size and SHA-256, or
    `code`, the components of the user's own. Empty where the record is missing or damaged: a checkpoint's
    fingerprint covers the text without it."""
    try:
        return dict(read_document(run_dir / "environment.json")[what])
    except (CurriqError, KeyError, TypeError, ValueError):
        return {}


def read_document(path: Path, fix: str = "remove it to report on the rest") -> dict[str, Any]:
    """The content of a JSON file, also compressed (.gz), or of a TOML file; empty when there is no such file.
    An error ends with `fix`."""
    if not path.exists():
        return {}
    loads = tomllib.loads if path.suffix == ".toml" else json.loads
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        content = loads(content.decode("utf-8"))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise CurriqError(f"{path} is damaged ({error}): {fix}.") from None
    if not isinstance(content, dict):
        raise CurriqError(f"{path} is damaged (it holds a {type(content).__name__}, not a table): {fix}.")
    return content


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """The fields of `summary.json`, once the run has ended; docs/metrics.md defines them."""
    return read_document(existing(Path(run_dir) / "summary.json"), _SUMMARY_FIX)


def has_finished(run_dir: str | Path) -> bool:
    """Whether a run has reached its last step; CurriqError where its `summary.json` is damaged."""
    return bool(read_document(Path(run_dir) / "summary.json", _SUMMARY_FIX).get("finished"))


@dataclass(frozen=True)
class LossByWindow:
    """The final losses of a run on the windows of its test set, in their order.

    Attributes:
        ids: of the windows.
        losses: nats per token.
        tokens: learnt tokens.
    """

    ids: np.ndarray
    losses: np.ndarray
    tokens: np.ndarray


def read_test_losses(run_dir: str | Path) -> LossByWindow | None:
    """The losses by test window; None for a run of an earlier version, which wrote none."""
    path = Path(run_dir) / "test_losses.parquet"
    if not path.exists():
        return None
    table = read_part(path, fix="remove the run's folder and run it again")
    ids, losses, tokens = (table[name].to_numpy() for name in ("window_id", "loss", "tokens"))
    return LossByWindow(ids, losses, tokens)


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`, one dict per step; docs/metrics.md defines the names.

    A line without its end is left out: the run is still writing it, or was killed in it.
    """
    rows: list[dict[str, float]] = []
    _each_row(run_dir, rows.append)
    return rows


def last_rows(run_dir: str | Path) -> list[dict[str, float]]:
    """The newest rows of a log that may still grow, oldest first; empty where none can be read.

    It reads the end of the file alone: for a display, to which a damaged row is no row.
    """
    try:
        with (Path(run_dir) / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return []
    rows = []
    for line in lines:
        with suppress(CurriqError):  # the first is cut where the end of the file begins
            rows.append(_row(line, METRICS))
    return rows


def steps_logged(run_dir: str | Path) -> int:
    """Steps that a run's log holds so far, from its last whole row; 0 where none can be read."""
    rows = last_rows(run_dir)
    try:
        return max(0, int(rows[-1]["step"]) + 1)
    except (IndexError, KeyError, ValueError, OverflowError):  # no log yet, or a row that is none of a run
        return 0


def _each_row(run_dir: str | Path, collect: Callable[[dict[str, float]], None]) -> None:
    path = existing(Path(run_dir) / METRICS)
    try:
        with path.open("rb") as file:  # a byte that is no UTF-8 belongs to one line, not to the whole file
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    collect(_row(line, f"{path}, line {number},"))
    except OSError as error:
        raise CurriqError(f"{path} cannot be read: {error.strerror}.") from None


def _row(line: bytes, where: str) -> dict[str, float]:
    try:
        row = json.loads(line.decode())
        if all(type(value) in (int, float) for value in row.values()):
            return row
        reason = "a value is no number"
    except (ValueError, AttributeError, RecursionError) as error:
        reason = str(error)
    raise CurriqError(f"{where} is damaged ({reason}): `curriq verify RUN` says what else is.")


@dataclass(frozen=True)
class Buckets:
    """Values averaged over consecutive measurements.

    Attributes:
        x: by name of the axis, at the last measurement of each bucket.
        mean, low, high: of the measurements in each bucket; NaN where there are none.
    """

    x: dict[str, np.ndarray]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Columns:
    """All metrics of a run: for each one (index of the row, value) of its measurements, over `rows` rows."""

    def __init__(self, values: dict[str, tuple[np.ndarray, np.ndarray]], rows: int) -> None:
        self._values = values
        self.rows = rows

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def names(self) -> list[str]:
        return list(self._values)

    def raw(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(rows, values) of a metric; both empty when it was never measured."""
        return self._values.get(name, (np.empty(0, np.int64), np.empty(0)))

    def full(self, name: str) -> np.ndarray:
        """One value per row, NaN where the metric was not measured."""
        column = np.full(self.rows, np.nan)
        where, values = self.raw(name)
        column[where] = values
        return column

    def last(self, name: str) -> float | None:
        _, values = self.raw(name)
        return float(values[-1]) if len(values) else None

    @cached_property
    def _axes(self) -> dict[str, np.ndarray]:
        return {axis: self.full(name) for axis, name in AXES.items() if name in self}

    def at(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The x-axes at some rows; an axis that the log lacks is left out."""
        return {axis: values[rows] for axis, values in self._axes.items()}

    def rows_of(self, steps: np.ndarray) -> np.ndarray:
        """The row of each step, or of the next logged one; zeros for an empty log."""
        where, logged = self.raw("step")
        if not len(logged):
            return np.zeros(len(steps), np.int64)
        return where[np.searchsorted(logged, steps).clip(max=len(logged) - 1)]

    def thinned(self, name: str, most: int) -> Buckets:
        """A metric in at most `most` buckets."""
        rows, values = self.raw(name)
        return self.bucketed(values, rows, most)

    def bucketed(self, values: np.ndarray, rows: np.ndarray, most: int) -> Buckets:
        """Values at some rows in at most `most` buckets; a NaN counts as not measured."""
        if not len(values):
            return Buckets(self.at(rows), values, values, values)
        edges = bucket_edges(len(values), most)
        known = ~np.isnan(values)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            sums = np.add.reduceat(np.where(known, values, 0.0), edges[:-1])
            mean = sums / np.add.reduceat(known.astype(float), edges[:-1])
        low, high = (least.reduceat(values, edges[:-1]) for least in (np.fmin, np.fmax))
        return Buckets(self.at(rows[edges[1:] - 1]), mean, low, high)


def bucket_edges(count: int, most: int) -> np.ndarray:
    """Borders of at most `most` buckets of nearly equal size over `count` items, from 0 to `count`."""
    return np.unique(np.linspace(0, count, min(count, most) + 1).astype(np.int64))


def read_columns(run_dir: str | Path) -> Columns:
    """`metrics.jsonl` by metric, read line by line: a log of 100,000 steps does not fit as dictionaries."""
    rows: dict[str, array] = {}
    values: dict[str, array] = {}
    count = 0

    def collect(row: dict[str, float]) -> None:
        nonlocal count
        for name, value in row.items():
            rows.setdefault(name, array("q")).append(count)
            values.setdefault(name, array("d")).append(value)
        count += 1

    _each_row(run_dir, collect)
    return Columns({name: (np.array(rows[name]), np.array(values[name])) for name in rows}, count)


def part_paths(run_dir: str | Path, table: str) -> list[Path]:
    """The parts of a table of the log (`candidates`, `queries` or `windows`), in the order of the steps."""
    return sorted((Path(run_dir) / table).glob("part-*.parquet"))


def _present_parts(run_dir: str | Path, table: str) -> list[Path]:
    """`part_paths`, with a warning of parts that the log lists and that are gone."""
    missing = [part for part in listed_parts(Path(run_dir), table) if not Path(run_dir, part.file).exists()]
    if missing:
        steps = ", ".join(f"{part.first_step} to {part.last_step}" for part in missing[:SHOWN])
        steps += ", …" if len(missing) > SHOWN else ""
        _warn_once(f"{Path(run_dir, table)} lacks the steps {steps}: what follows is without them.")
    return part_paths(run_dir, table)


@cache
def _warn_once(message: str) -> None:
    """One report reads a table several times."""
    logging.getLogger("curriq").warning(message)


def read_part(
    path: Path, columns: list[str] | None = None, fix: str = "delete it to read the others"
) -> "pa.Table":
    """One part of a table, with all columns when None are named. An error ends with `fix`."""
    import pyarrow.parquet as pq

    try:
        file = path.open("rb")  # pyarrow itself cannot open a path that is not UTF-8
    except OSError as error:
        raise CurriqError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        with file:
            part = pq.ParquetFile(file).read(columns=columns)
        _require_schema(part.schema, path, columns)
        return part
    except Exception as error:  # of a damaged file pyarrow raises whatever its bytes lead it to
        raise CurriqError(f"{path} is damaged ({error}): {fix}.") from None


def _require_schema(found: "pa.Schema", path: Path, columns: list[str] | None) -> None:
    """pyarrow's error where a file lacks a column of the table that it is a part of, or has another type
    there; columns that an earlier version did not write may be missing."""
    import pyarrow as pa

    table = path.stem if path.parent.name not in TABLES else path.parent.name
    for name, kind in COLUMN_TYPES.get(table, {}).items():
        if columns is not None and name not in columns:
            continue
        where = found.get_field_index(name)
        if where < 0 and name not in ADDED_LATER:
            raise pa.ArrowInvalid(f"there is no column {name!r}")
        if where >= 0 and not str(found.field(where).type).startswith(kind):
            raise pa.ArrowInvalid(f"column {name!r} is of type {found.field(where).type}, not {kind}")


def read_candidates(run_dir: str | Path) -> "pa.Table":
    """The candidates table, in the order of the steps; docs/metrics.md defines the columns."""
    return _read_table(run_dir, "candidates", "the run had --no-log-candidates")


def read_queries(run_dir: str | Path) -> "pa.Table":
    """The queries table, in the order of the steps; docs/metrics.md defines the columns."""
    return _read_table(run_dir, "queries", "the run had no --proposer with queries, had --no-log-candidates")


def _read_table(run_dir: str | Path, name: str, reason: str) -> "pa.Table":
    paths = _present_parts(run_dir, name)
    if not paths:
        folder = Path(run_dir) / name
        raise CurriqError(f"{folder} holds no {name}: {reason}, or has saved no checkpoint yet.")
    return together([read_part(path) for path in paths])


def together(parts: "list[pa.Table]") -> "pa.Table":
    """The rows of parts of one table; a column that only some of them have is null in the others."""
    import pyarrow as pa

    # A run that another version resumed may have a column in its later parts only.
    return pa.concat_tables(parts, promote_options="default").unify_dictionaries()


def read_queries_of(run_dir: str | Path, steps: np.ndarray) -> "pa.Table | None":
    """The queries of some steps; None when there are none.

    Only the parts that hold such a step are read whole: the texts of a long run do not fit into memory.
    """
    found = []
    for path in _present_parts(run_dir, "queries"):
        wanted = np.isin(read_part(path, ["step"])["step"].to_numpy(), steps)
        if wanted.any():
            found.append(read_part(path).filter(wanted))
    return together(found) if found else None


@dataclass(frozen=True)
class CandidateRows:
    """Rows of the candidates table as arrays.

    Attributes:
        columns: of `CANDIDATE_NUMBERS` those that the table has; a null is NaN.
        names: of the sources, which `source` indexes.
    """

    step: np.ndarray
    row: np.ndarray
    window_id: np.ndarray
    source: np.ndarray
    columns: dict[str, np.ndarray]
    names: list[str]

    def take(self, which: np.ndarray) -> "CandidateRows":
        columns = {name: values[which] for name, values in self.columns.items()}
        labels = (self.step[which], self.row[which], self.window_id[which], self.source[which])
        return CandidateRows(*labels, columns, self.names)

    @staticmethod
    def of(table: "pa.Table") -> "CandidateRows":
        labels = (table[name].to_numpy() for name in ("step", "row", "window_id"))
        source = table["source"].combine_chunks()
        columns = {name: floats(table[name]) for name in CANDIDATE_NUMBERS if name in table.column_names}
        return CandidateRows(*labels, source.indices.to_numpy(), columns, source.dictionary.to_pylist())


def candidate_parts(run_dir: str | Path) -> "Iterator[pa.Table]":
    """The candidates table part by part, so that a run of any length fits; none when the run logged none."""
    return map(read_part, _present_parts(run_dir, "candidates"))


def floats(column: Any) -> np.ndarray:
    """A column of numbers of an Arrow table; a null is NaN."""
    return column.to_numpy(zero_copy_only=False).astype(float)


def token_ids(stored: np.ndarray) -> np.ndarray:
    """Token ids of tokens as the log has them: −1 − id where a token is not learnt."""
    return np.where(stored < 0, ~stored, stored)


@dataclass(frozen=True)
class KeptWindows:
    """Windows by ascending id.

    Attributes:
        ids: window ids.
        stored: [windows, T], tokens as the log has them.
        tokenizer: turns them into text; None when the run has no fast tokenizer.
    """

    ids: np.ndarray
    stored: np.ndarray
    tokenizer: "tokenizers.Tokenizer | None"

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token ids [windows, T]."""
        return token_ids(self.stored)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Position of each id, −1 where the window was not kept."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        where = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return np.where(self.ids[where] == ids, where, -1)

    def texts(self, positions: np.ndarray, *, special: bool = True) -> list[str]:
        """The text of some windows, with the names of special tokens or without; empty strings without a
        tokenizer."""
        if self.tokenizer is None:
            return [""] * len(positions)
        ids = token_ids(self.stored[positions])
        return self.tokenizer.decode_batch(ids.tolist(), skip_special_tokens=not special)

    def sample(self, most: int = MOST_MEASURED) -> "KeptWindows":
        """At most so many of the windows, drawn evenly (an id is a hash)."""
        where = np.linspace(0, len(self) - 1, min(len(self), most)).round().astype(np.int64)
        return KeptWindows(self.ids[where], self.stored[where], self.tokenizer)

    def measures(self) -> dict[str, np.ndarray]:
        """Difficulty, length and repetition of each window; empty without windows.

        Difficulty is the mean negative log relative frequency of the tokens among these windows, nats per
        token (as in the competence baseline by rarity); length the number of characters of the text.
        """
        if not len(self):
            return {}
        counts = np.bincount(self.tokens.ravel())
        with np.errstate(divide="ignore"):
            rarity = -np.log(counts / max(1, counts.sum()))
        measured = {"difficulty": rarity[self.tokens].mean(axis=1), "repetition": repetition(self.tokens)}
        if self.tokenizer is not None:
            pieces = self.tokenizer.decode_batch([[i] for i in range(len(counts))], skip_special_tokens=False)
            characters = np.array([len(piece) for piece in pieces])
            measured["length"] = characters[self.tokens].sum(axis=1).astype(float)
        return measured


def repetition(tokens: np.ndarray) -> np.ndarray:
    """Share of each row's n-grams that occurred earlier in the row: 0 for no repeat, near 1 for one token
    over and over."""
    if tokens.shape[1] < NGRAM:
        return np.zeros(len(tokens))
    grams = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), NGRAM, axis=1)
    mixed = np.zeros(grams.shape[:2], np.uint64)
    for position in range(NGRAM):  # a polynomial hash modulo 2^64; tokens + 1 so that id 0 counts
        mixed = mixed * np.uint64(1_000_003) + grams[:, :, position] + np.uint64(1)
    ordered = np.sort(mixed, axis=1)
    distinct = 1 + (np.diff(ordered, axis=1) != 0).sum(axis=1)
    return 1 - distinct / grams.shape[1]


def read_windows(run_dir: str | Path) -> KeptWindows:
    """All windows that the run kept; none when it kept none."""
    parts = [read_part(path, ["window_id", "tokens"]) for path in _present_parts(run_dir, "windows")]
    if not parts:
        return KeptWindows(np.empty(0, np.int64), np.empty((0, 0), np.int32), None)
    ids = np.concatenate([part["window_id"].to_numpy() for part in parts])
    tokens = np.concatenate([token_rows(part["tokens"]) for part in parts])
    order = np.argsort(ids)
    tokenizer = _tokenizer(Path(run_dir) / "windows" / "tokenizer.json")
    return KeptWindows(ids[order], tokens[order], tokenizer)


def token_rows(column: "pa.ChunkedArray") -> np.ndarray:
    """[windows, T] array of a column of tokens, which `writers.token_column` writes."""
    return column.combine_chunks().flatten().to_numpy().reshape(-1, column.type.list_size)


def _tokenizer(path: Path) -> Any:
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise CurriqError(
            f"{path} is damaged ({error}): copy tokenizer.json from a checkpoint's lm folder."
        ) from None
