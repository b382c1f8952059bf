"""Rows with all their columns, however their format holds them."""

import datetime
import decimal
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from pyarrow import parquet

from curriq.config import SourceConfig
from curriq.curate.inputs import InputFile, Inputs
from curriq.curate.layout import plain_layout
from curriq.data.columns import document_of
from curriq.data.files import SEEKABLE
from curriq.data.rows import FORMATS, Fields, open_arrow, told_apart
from curriq.data.sources import unreadable
from curriq.errors import CurriqError

_log = logging.getLogger("curriq")

BATCH = 1024
"""Rows in memory at a time."""


@dataclass(frozen=True)
class Rows(ABC):
    """Some rows of one file.

    Attributes:
        documents: place in the corpus of each row's document.
        config: how the file is read.
    """

    documents: Int[np.ndarray, "n"]
    config: SourceConfig

    @abstractmethod
    def row(self, place: int) -> dict[str, Any]:
        """The columns of a row, at least those that its document is made of."""

    @abstractmethod
    def lines(self) -> Iterator[bytes]:
        """Each row as a JSON object."""

    @abstractmethod
    def table(self) -> pa.Table: ...

    @abstractmethod
    def take(self, places: Int[np.ndarray, "m"]) -> "Rows": ...

    def text(self, place: int) -> str:
        document = document_of(self.row(place), self.config)
        return "" if document is None else document.text


@dataclass(frozen=True)
class ReadRows(Rows):
    """Rows of a format that is read row by row."""

    raw: Sequence[Any]
    extension: str

    def row(self, place: int) -> dict[str, Any]:
        return dict(FORMATS[self.extension].parse(self.raw[place], self.config))

    def lines(self) -> Iterator[bytes]:
        if self.extension == ".jsonl":
            yield from self.raw
        else:
            yield from (_as_json(self.row(place)) for place in range(len(self.raw)))

    def table(self) -> pa.Table:
        rows = [self.row(place) for place in range(len(self.raw))]
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: [row.get(name) for row in rows] for name in names})

    def take(self, places: Int[np.ndarray, "m"]) -> Rows:
        raw = [self.raw[place] for place in places.tolist()]
        return ReadRows(self.documents[places], self.config, raw, self.extension)


@dataclass(frozen=True)
class TableRows(Rows):
    """Rows of Parquet and Arrow files."""

    data: pa.Table

    def row(self, place: int) -> dict[str, Any]:
        columns = [name for name in (self.config.text_field, self.config.difficulty_field) if name]
        return self.data.select(columns).slice(place, 1).to_pylist()[0]

    def lines(self) -> Iterator[bytes]:
        names = self.data.column_names
        columns = [_values(name, column) for name, column in zip(names, self.data.columns, strict=True)]
        return (_as_json(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True))

    def table(self) -> pa.Table:
        return self.data

    def take(self, places: Int[np.ndarray, "m"]) -> Rows:
        return TableRows(self.documents[places], self.config, self.data.take(pa.array(places)))


def read_rows(inputs: Inputs, file: np.ndarray, row: np.ndarray, wanted: np.ndarray) -> Iterator[Rows]:
    """The rows of some documents with all their columns, in the order of the corpus.

    Args:
        file, row: of every document.
        wanted: places of the documents, ascending.
    """
    for number, entry in enumerate(inputs.files):
        places = wanted[file[wanted] == number]
        if not len(places):
            continue
        config = inputs.config(number)
        try:
            if entry.extension in SEEKABLE:
                yield from _of_tables(entry, config, places, row[places])
            else:
                yield from _of_rows(entry, config, places, row[places])
        except CurriqError:
            raise
        except Exception as error:
            raise unreadable(config, entry.path, 0, error) from error


def _of_rows(entry: InputFile, config: SourceConfig, places: np.ndarray, rows: np.ndarray) -> Iterator[Rows]:
    path, extension = entry.readable, entry.extension
    found: list[Any] = []
    due = iter(rows.tolist())
    next_row, start = next(due), 0
    for number, raw in enumerate(entry.format.read(path, config, 0)):
        if number == 0 and isinstance(raw, Fields):
            _say_renamed(entry, raw.header, raw.names)
        if number != next_row:
            continue
        found.append(raw)
        next_row = next(due, None)
        if len(found) == BATCH or next_row is None:
            yield ReadRows(places[start : start + len(found)], config, found, extension)
            start += len(found)
            found = []
        if next_row is None:
            return


def _of_tables(
    entry: InputFile, config: SourceConfig, places: np.ndarray, rows: np.ndarray
) -> Iterator[Rows]:
    first, names = 0, list[str]()
    for batch in _batches(entry):
        if not names:
            names = told_apart(batch.schema.names)
            _say_renamed(entry, batch.schema.names, names)
        low, high = np.searchsorted(rows, [first, first + batch.num_rows])
        if high > low:
            columns = [plain_layout(column) for column in batch.columns]
            fields = [
                field.with_name(name).with_type(column.type)
                for field, name, column in zip(batch.schema, names, columns, strict=True)
            ]
            table = pa.Table.from_arrays(columns, schema=pa.schema(fields, batch.schema.metadata))
            yield TableRows(places[low:high], config, table.take(pa.array(rows[low:high] - first)))
        first += batch.num_rows


def _say_renamed(entry: InputFile, had: Sequence[str], names: Sequence[str]) -> None:
    """Warn that columns of one name have got different ones: JSON would keep the last of them alone."""
    renamed = [repr(new) for old, new in zip(had, names, strict=True) if new != old]
    if renamed:
        _log.warning(
            f"{entry.path}: columns have the same name; the later ones are {', '.join(renamed)} now."
        )


def _batches(entry: InputFile) -> Iterator[pa.RecordBatch]:
    path = entry.readable
    if entry.extension == ".arrow":
        _, batches = open_arrow(path)
        for batch in batches:
            batch.validate(full=True)  # Arrow trusts the bytes of a file: damaged ones would crash it
            yield batch
        return
    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
        yield from file.iter_batches(BATCH, use_threads=False)


def _values(name: str, column: pa.ChunkedArray) -> list[Any]:
    if (spelled := _spelled(column.type)) != column.type:
        column = column.cast(spelled)
    try:
        return column.to_pylist()
    except (ValueError, OverflowError) as error:  # a date before the year 1 or after 9999
        raise _unspelled(name, f"{column.type} ({error})") from error


def _spelled(kind: pa.DataType) -> pa.DataType:
    """An Arrow type with text for times of day, also inside it: Python's have no nanoseconds, and are cut."""
    types = pa.types
    if types.is_time64(kind):
        return pa.string()
    if types.is_struct(kind):
        return pa.struct([field.with_type(_spelled(field.type)) for field in kind.fields])
    if types.is_map(kind):
        return pa.map_(_spelled(kind.key_type), _spelled(kind.item_type))
    if types.is_dictionary(kind):
        return pa.string() if types.is_time64(kind.value_type) else kind
    for made, is_kind in ((pa.list_, types.is_list), (pa.large_list, types.is_large_list)):
        if is_kind(kind):
            return made(kind.value_field.with_type(_spelled(kind.value_type)))
    if types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_spelled(kind.value_type)), kind.list_size)
    return kind


def _as_json(row: dict[str, Any]) -> bytes:
    try:
        return _dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        return _dumps(row).encode()
    except ValueError:  # not a number, or infinite
        return _as_json({name: _finite(name, value) for name, value in row.items()})
    except TypeError:
        for name, value in row.items():
            try:
                _dumps(value)
            except TypeError as error:
                raise _unspelled(name, str(error)) from None
        raise


def _dumps(value: Any, **how: Any) -> str:
    return json.dumps(value, allow_nan=False, default=_plain, **how)


def _finite(name: str, value: Any) -> Any:
    """The value with null for what is no number, as pandas and JavaScript write it."""
    if isinstance(value, dict):
        return {key: _finite(name, inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(name, inside) for inside in value]
    if isinstance(value, float) and math.isinf(value):
        raise _unspelled(name, str(value))
    return None if isinstance(value, float) and math.isnan(value) else value


def _plain(value: Any) -> Any:
    """JSON's spelling of a value that only Parquet and Arrow hold; TypeError naming its type without one."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    raise TypeError(type(value).__name__)


def _unspelled(name: str, what: str) -> CurriqError:
    return CurriqError(
        f"column {name!r} holds {what}, which JSON cannot spell: write --out NAME.parquet, or leave it out."
    )
