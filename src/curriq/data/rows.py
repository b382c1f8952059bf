"""The rows of data files, one contract for all formats: a row has the strings of its columns exactly as
Python's `csv` and `json` read them, and nothing is guessed from other rows.

A row that does not fit raises `BadRow` when it is parsed, and reading goes on after it. Where the end of a
row cannot be known (an open quote, a broken JSON array, a cut archive), reading raises the library's error.
"""

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curriq.config import SourceConfig
from curriq.data.documents import shorten
from curriq.data.files import open_decompressed

Row = Mapping[str, Any]


class BadRow(Exception):
    """What is wrong with one row; the source adds where the row is."""


@dataclass(frozen=True)
class Format:
    """How files of one format are read.

    Attributes:
        name: in messages.
        read: raw rows of a file from the one with this number on, from 0; any exception where reading cannot
            go on.
        parse: the columns of a raw row; raises `BadRow`.
        unit: what rows are numbered by.
        schema: that of a file, as Arrow has it, where the format keeps one; raises any exception for a file
            that is seen to be damaged.
    """

    name: str
    read: Callable[[Path, SourceConfig, int], Iterator[Any]]
    parse: Callable[[Any, SourceConfig], Row]
    unit: str = "row"
    schema: Callable[[Path], Any] | None = None

    def check(self, path: Path, config: SourceConfig) -> None:
        """Raise any exception for a file that is seen, without reading it, to be damaged or lack a column."""
        if self.schema is not None:
            _columns(self.schema(path), config)


def _open_text(path: Path, newline: str | None = "") -> io.TextIOWrapper:
    """The decompressed text; bytes that are not UTF-8 come as half surrogates, which no UTF-8 can spell."""
    # utf-8-sig: skips a byte order mark
    return io.TextIOWrapper(
        open_decompressed(path), encoding="utf-8-sig", errors="surrogateescape", newline=newline
    )


def _invalid(text: str) -> BadRow | None:
    """What is wrong with a text that holds bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return _not_utf8(ord(text[error.start]) - 0xDC00)
    return None


def _valid(text: str) -> str:
    if (error := _invalid(text)) is not None:
        raise error
    return text


_FIXES = {
    0x8B: "The file may be gzip's: then its name must end in .gz.",
    0xB5: "The file may be zstandard's: then its name must end in .zst.",
    **dict.fromkeys(
        (0xFE, 0xFF), "The file may be UTF-16: convert it, for instance with `iconv -f UTF-16 -t UTF-8`."
    ),
}
"""First byte that is not UTF-8 → what else the file may be: bytes of the marks that such files begin with."""


def _not_utf8(byte: int) -> BadRow:
    fix = _FIXES.get(byte, "Convert the file, for instance with `iconv -f LATIN1 -t UTF-8`.")
    return BadRow(f"byte 0x{byte:02x} is not UTF-8. {fix}")


# Text


def _read_text(path: Path, config: SourceConfig, start: int) -> Iterator[str]:
    with _open_text(path, newline=None) as file:
        pieces: Iterator[str] = file
        if config.documents == "file":
            pieces = iter([file.read()])
        elif config.documents == "paragraph":
            grouped = itertools.groupby(file, key=lambda line: line == "\n")
            pieces = ("".join(lines) for is_blank, lines in grouped if not is_blank)
        yield from itertools.islice(pieces, start, None)


def _parse_text(text: str, config: SourceConfig) -> Row:
    return {config.text_field: _valid(text)}


# CSV

# Of the whole process: by default, a text of more than 131,072 characters is refused.
csv.field_size_limit(1 << 30)


@dataclass(frozen=True, slots=True)
class Fields:
    """A row of a CSV file: its fields, and what the header calls them, as it is and told apart."""

    header: list[str]
    names: list[str]
    values: list[str]
    line: int


def told_apart(names: Sequence[str]) -> list[str]:
    """Different names for columns: of those of one name the second ends in .1, as with pandas, and so on."""
    apart: list[str] = []
    for name in names:
        numbered = (f"{name}.{i}" for i in itertools.count(1))
        apart.append(next(new for new in itertools.chain([name], numbered) if new not in apart))
    return apart


def _read_csv(path: Path, config: SourceConfig, start: int) -> Iterator[Fields]:
    with _open_text(path) as file:
        # strict: otherwise a text with stray quotes is altered, and an open quote takes the rest of the file
        reader = csv.reader(file, strict=True)
        rows = filter(None, reader)  # blank lines are no rows, as for csv.DictReader
        header = [_valid(name) for name in next(rows, [])]
        for name in filter(None, (config.text_field, config.difficulty_field)):
            if header.count(name) > 1:
                raise ValueError(f"{header.count(name)} columns are named {name!r}")
        names = told_apart(header)
        for values in itertools.islice(rows, start, None):
            yield Fields(header, names, values, reader.line_num)


def _parse_csv(raw: Fields, config: SourceConfig) -> Row:
    header, values = raw.header, raw.values
    row = {name: _valid(value) for name, value in zip(raw.names, values, strict=False)}
    if config.text_field not in header:  # with another delimiter the number of fields is wrong, too
        return dict.fromkeys(header, "")
    if len(values) < len(header) or any(values[len(header) :]):  # empty ones at the end are end commas
        raise BadRow(
            f"{len(values)} fields where the header has {len(header)} (line {raw.line}): {shorten(values)}. "
            'Quote texts with commas or line breaks, as in "a, b".'
        )
    return row


# JSON


_JSON = json.JSONDecoder()
_LENIENT_JSON = json.JSONDecoder(parse_int=float)


def _decode(method: str, *text: Any) -> Any:
    """What `json` makes of a text; whole numbers become floats if one has thousands of digits."""
    try:
        return getattr(_JSON, method)(*text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
    except ValueError:  # Python refuses to convert such numbers, because that takes quadratic time
        return getattr(_LENIENT_JSON, method)(*text)


def _read_lines(path: Path, config: SourceConfig, start: int) -> Iterator[bytes]:
    with open_decompressed(path) as file:
        for number, line in enumerate(itertools.islice(file, start, None), start):
            yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def _parse_line(line: bytes, config: SourceConfig) -> Row:
    """The object in a line; empty columns for a blank line."""
    if line.isspace():
        return {config.text_field: "", config.difficulty_field: ""}
    try:
        text = line.decode()
        return _parse_object(_decode("decode", text), config)
    except UnicodeDecodeError as error:
        raise _not_utf8(error.object[error.start]) from None
    except json.JSONDecodeError as error:
        raise BadRow(
            f"no valid JSON ({error}): {shorten(text)}. Each line of a .jsonl file must be one object: fix "
            "or remove it."
        ) from None


def _parse_object(values: Any, config: SourceConfig) -> Row:
    if isinstance(values, BadRow):
        raise values
    if not isinstance(values, dict):
        raise BadRow(f'{shorten(values)} is not an object. Each row must be one, such as {{"text": "…"}}.')
    return values


class _JsonText:
    """The values in a JSON text, decoded one after another; what is in memory is one value and a chunk."""

    CHUNK = 1 << 20
    """Characters read at a time."""
    MOST = 1 << 30
    """Characters of a value: an open quote is not followed to the end of a file of any size."""
    LONGEST_WORD = 16
    """More than the characters of any word or escape, which the end of what has been read may cut."""
    _SPACE = re.compile(r"[ \t\n\r]*")

    def __init__(self, file: io.TextIOBase) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._ended = False

    def accept(self, character: str) -> bool:
        """Whether this is the next character; then it is taken."""
        if self.next() != character:
            return False
        self._at += 1
        return True

    def next(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            space = self._SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read(self.CHUNK)

    def value(self) -> Any:
        """The next value, or a `BadRow` in place of one with bytes that are not UTF-8; ValueError where there
        is none."""
        size = self.CHUNK
        self.next()
        while True:
            try:
                value, end = _decode("raw_decode", self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_be_cut(error):
                    at = max(self._at, error.pos)
                    raise ValueError(f"{error.msg}: {shorten(self._text[at : at + 60])}") from None
            else:
                if end < len(self._text) or self._ended:  # a number at the end may go on
                    written, self._at = self._text[self._at : end], end
                    return _invalid(written) or value
            if len(self._text) - self._at > self.MOST:
                raise ValueError(f"a value of more than {self.MOST} characters: perhaps a quote is missing")
            self._read(size)
            size *= 2

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the error may come from the end of what has been read so far."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self._text) - self.LONGEST_WORD

    def _read(self, size: int) -> None:
        more = self._file.read(size)
        self._ended = not more
        self._text, self._at = self._text[self._at :] + more, 0


def _read_json(path: Path, config: SourceConfig, start: int) -> Iterator[Any]:
    """Elements of the array in a file, or its values one after another."""
    with _open_text(path) as file:
        yield from itertools.islice(_values(_JsonText(file)), start, None)


def _values(text: _JsonText) -> Iterator[Any]:
    if not _valid(text.next()):
        raise ValueError("the file holds no value")
    if not text.accept("["):
        while text.next():
            yield text.value()
        return
    more = not text.accept("]")
    while more:
        yield text.value()
        more = text.accept(",")
        if not more and not text.accept("]"):
            raise ValueError(
                f"{text.next() or 'the end'!r} where the array must go on with ',' or end with ']'"
            )
    if text.next():
        raise ValueError(f"{text.next()!r} after the end of the array")


# Parquet and Arrow

_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Last bytes of a whole stream in Arrow's IPC format, as `datasets` writes it."""
_ROWS = 1024
"""Rows of a Parquet file that are decoded at a time."""


def _read_parquet(path: Path, config: SourceConfig, start: int) -> Iterator[Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path, page_checksum_verification=True) as file:  # where there are any
        groups = list(range(file.num_row_groups))
        while groups and start >= (rows := file.metadata.row_group(groups[0]).num_rows):
            start -= rows
            del groups[0]
        columns = _columns(file.schema_arrow, config)
        batches = file.iter_batches(_ROWS, row_groups=groups, columns=columns, use_threads=False)
        yield from _rows(batches, start)


def _read_arrow(path: Path, config: SourceConfig, start: int) -> Iterator[Row]:
    schema, batches = open_arrow(path)
    columns = _columns(schema, config)
    yield from _rows((batch.select(columns) if columns else batch for batch in batches), start)


def _rows(batches: Iterator[Any], start: int) -> Iterator[Row]:
    for batch in batches:
        batch.validate(full=True)  # Arrow trusts the bytes of an .arrow file: damaged ones would crash it
        for first in range(start, batch.num_rows, _ROWS):
            yield from batch.slice(first, _ROWS).to_pylist()
        start = max(0, start - batch.num_rows)


def open_arrow(path: Path) -> tuple[Any, Iterator[Any]]:
    """Schema and batches of an Arrow file in either of the two IPC formats."""
    import pyarrow

    file = pyarrow.memory_map(str(path))
    if file.read_at(6, 0) == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    if file.size() < 8 or file.read_at(8, file.size() - 8) != _ARROW_END:
        raise ValueError("the stream has no end mark, so the file has been cut")
    reader = pyarrow.ipc.open_stream(file)
    return reader.schema, iter(reader)


def _columns(schema: Any, config: SourceConfig) -> list[str] | None:
    """The columns to read; None for all, so that an error can list them."""
    columns = [name for name in (config.text_field, config.difficulty_field) if name]
    for name in columns:
        if len(schema.get_all_field_indices(name)) > 1:
            raise ValueError(f"several columns are named {name!r}")
    usable = {*columns} <= {*schema.names} and _holds_text(schema.field(config.text_field).type)
    return columns if usable else None


def _holds_text(kind: Any) -> bool:
    """Whether an Arrow type holds text or conversations."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return types.is_struct(kind.value_type) and kind.value_type.get_field_index("role") >= 0
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _parquet_schema(path: Path) -> Any:
    from pyarrow import parquet

    return parquet.read_schema(path)


def _arrow_schema(path: Path) -> Any:
    return open_arrow(path)[0]


def _as_it_is(row: Row, config: SourceConfig) -> Row:
    return row


FORMATS = {
    ".txt": Format("text", _read_text, _parse_text, unit="text"),
    ".jsonl": Format("JSON Lines", _read_lines, _parse_line, unit="line"),
    ".json": Format("JSON", _read_json, _parse_object),
    ".csv": Format("CSV", _read_csv, _parse_csv),
    ".parquet": Format("Parquet", _read_parquet, _as_it_is, schema=_parquet_schema),
    ".arrow": Format("Arrow", _read_arrow, _as_it_is, schema=_arrow_schema),
}
"""By extension."""
