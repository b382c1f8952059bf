"""Rows of data files against independent readers: `csv.DictReader`, `json.loads` and the written texts, on
whole, cut and mutated files."""

import contextlib
import csv
import gzip
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from curriq.config import SourceConfig
from curriq.data.documents import read_epoch
from curriq.data.rows import _JsonText
from curriq.data.sources import LocalSource
from curriq.errors import CurriqError

CHECKED = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
BAD = object()
"""What a reference gives for a row that does not fit."""


def opened(path: Path, **options: Any) -> LocalSource:
    return LocalSource(SourceConfig(name="mine", path=str(path), **options))


def read(content: bytes, extension: str, **options: Any) -> list[str]:
    """What curriq reads from a file; CurriqError where it refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{extension}")
        path.write_bytes(content)
        return [document.text for document in read_epoch(opened(path, **options))]


def documents(rows: list[Any]) -> list[str]:
    """The texts of a reference's rows as documents: without bad and empty ones."""
    texts = [row.encode(errors="replace").decode() for row in rows if row is not BAD]
    return [text.strip("\n") for text in texts if text and not text.isspace()]


def agrees(content: bytes, extension: str, reference: Callable[[bytes], list[Any]]) -> None:
    """Both readers give the same texts, or both refuse the same file; with on_bad_row=skip, the same rows."""
    try:
        rows = reference(content)
    except ValueError:
        for choice in ("error", "skip"):
            with pytest.raises(CurriqError):
                read(content, extension, on_bad_row=choice)
        return
    expected = documents(rows)
    if not expected:
        with pytest.raises(CurriqError, match=r"holds no document|on_bad_row|no bytes"):
            read(content, extension)
        return
    if BAD in rows:
        with pytest.raises(CurriqError, match=r"on_bad_row=skip"):
            read(content, extension)
    else:
        assert read(content, extension) == expected
    assert read(content, extension, on_bad_row="skip") == expected


def csv_rows(content: bytes) -> list[Any]:
    text = content.decode("utf-8-sig", errors="surrogateescape").lstrip("\r\n")  # blank lines are no header
    try:
        header, *others = csv.reader(io.StringIO(text, newline=""), strict=True)
    except csv.Error as error:
        raise ValueError from error
    escaped = [field for field in header if not valid(field)]
    if escaped or header.count("text") > 1:
        raise ValueError(header)
    rows = csv.DictReader(io.StringIO(text, newline=""), restkey="more", restval=None)
    return [csv_text(row) for row in rows] if others else []


def csv_text(row: dict[Any, Any]) -> Any:
    extra = row.pop("more", [])
    fits = "text" in row and None not in row.values() and not any(extra) and all(map(valid, row.values()))
    return row["text"] if fits else BAD


def valid(text: str) -> bool:
    return not any("\udc80" <= character <= "\udcff" for character in text)


def json_text(value: Any) -> Any:
    return value["text"] if isinstance(value, dict) and isinstance(value.get("text"), str) else BAD


def line_rows(content: bytes) -> list[Any]:
    return [line_text(line) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")]


def line_text(line: bytes) -> Any:
    if not line.strip(b" \t\r\v\f"):
        return ""
    try:
        return json_text(json.loads(line.decode("utf-8")))
    except (ValueError, RecursionError):
        return BAD


def array_rows(content: bytes) -> list[Any]:
    values = json.loads(content.decode("utf-8-sig", errors="surrogateescape"))
    values = values if isinstance(values, list) else [values]
    return [json_text(value) if valid(json.dumps(value, ensure_ascii=False)) else BAD for value in values]


def write_csv(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["id", "text", "n"])
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def write_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_array(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def write_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=3)
    return file.getvalue()


def write_arrow(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=3)
    return file.getvalue()


def write_feather(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=3)
    return file.getvalue()


TEXTS = st.text(st.sampled_from("ab ,\"'\\{}[]:\n\r\t\0é€😀学#0") | st.characters(codec="utf-8"), max_size=30)
ROWS = st.lists(TEXTS, min_size=1, max_size=7).map(
    lambda texts: [{"id": i, "text": text, "n": i / 2} for i, text in enumerate(texts)]
)
REFERENCES = {
    ".csv": (write_csv, csv_rows),
    ".jsonl": (write_lines, line_rows),
    ".json": (write_array, array_rows),
}
BINARY = {".parquet": write_parquet, ".arrow": write_arrow}
PIECES = st.sampled_from(
    [
        b"",
        b",",
        b'"',
        b"\n",
        b"\r\n",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"[",
        b"]",
        b"{",
        b"}",
        b"null",
        b"NaN",
    ]
) | st.binary(max_size=3)


@st.composite
def mutated(draw: st.DrawFn, write: Callable[[list[dict[str, Any]]], bytes]) -> bytes:
    """A written file in which up to three stretches have been replaced, or whose end is cut."""
    content = write(draw(ROWS))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = draw(st.sampled_from([at, at + 1, at + 4, len(content)]))
        content = content[:at] + draw(PIECES) + content[end:]
    return content


@pytest.fixture(params=[7, 1 << 20])
def chunk(request: pytest.FixtureRequest) -> Iterator[int]:
    """Characters of a .json file that are read at a time."""
    with patch.object(_JsonText, "CHUNK", request.param):
        yield request.param


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("extension", REFERENCES)
class TestAgainstPython:
    @CHECKED
    @given(data=st.data())
    def test_whole_files(self, extension: str, data: st.DataObject) -> None:
        write, reference = REFERENCES[extension]
        rows = data.draw(ROWS)
        content = write(rows)
        assert documents(reference(content)) == documents([row["text"] for row in rows])
        agrees(content, extension, reference)

    @CHECKED
    @given(data=st.data())
    def test_mutated_files(self, extension: str, data: st.DataObject) -> None:
        write, reference = REFERENCES[extension]
        agrees(data.draw(mutated(write)), extension, reference)

    @pytest.mark.slow
    @settings(CHECKED, max_examples=2000)
    @given(data=st.data())
    def test_many_mutated_files(self, extension: str, data: st.DataObject) -> None:
        write, reference = REFERENCES[extension]
        agrees(data.draw(mutated(write)), extension, reference)


@pytest.mark.parametrize("write", [write_parquet, write_arrow, write_feather])
@CHECKED
@given(rows=ROWS)
def test_tables_hold_what_was_written(
    write: Callable[[list[dict[str, Any]]], bytes], rows: list[dict[str, Any]]
) -> None:
    extension = ".parquet" if write is write_parquet else ".arrow"
    agrees(write(rows), extension, lambda _: [row["text"] for row in rows])


@pytest.mark.parametrize("extension", [*REFERENCES, *BINARY, ".txt"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@settings(CHECKED, max_examples=25)
@given(data=st.data())
def test_damaged_files_end_in_one_error_or_are_read(
    extension: str, compression: str, data: st.DataObject
) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[compression]
    write = {**{e: w for e, (w, _) in REFERENCES.items()}, **BINARY, ".txt": write_lines}[extension]
    content = data.draw(mutated(lambda rows: pack(write(rows))))
    choice = data.draw(st.sampled_from(["error", "skip"]))
    with contextlib.suppress(CurriqError):  # anything else is a traceback
        read(content, extension + compression, on_bad_row=choice)


ROWS_OF = [{"id": i, "text": f"text {i}: naïve, {'x' * 40}", "n": i / 2} for i in range(12)]


def cuts(content: bytes) -> list[int]:
    return [*range(0, len(content), 1 + len(content) // 40), *range(len(content) - 16, len(content))]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("extension", [*REFERENCES, *BINARY, ".txt"])
def test_every_cut_of_a_compressed_file_is_an_error(extension: str, compression: str) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}[compression]
    write = {**{e: w for e, (w, _) in REFERENCES.items()}, **BINARY, ".txt": write_lines}[extension]
    content = pack(write(ROWS_OF))
    for end in cuts(content):
        with pytest.raises(CurriqError, match=rf"a\{extension}\{compression}"):
            read(content[:end], extension + compression, on_bad_row="skip")


@pytest.mark.parametrize("extension", [".json", ".parquet", ".arrow"])
def test_every_cut_of_a_format_with_an_end_is_an_error(extension: str) -> None:
    write = {".json": write_array, **BINARY}[extension]
    content = write(ROWS_OF)
    for end in cuts(content):
        with pytest.raises(CurriqError, match=rf"a\{extension}"):
            read(content[:end], extension, on_bad_row="skip")


def test_a_line_or_row_that_is_cut_is_an_error() -> None:
    lines = write_lines(ROWS_OF).rstrip(b"\n")
    with pytest.raises(CurriqError, match=r"line 12 of .*a\.jsonl: no valid JSON"):
        read(lines[:-1], ".jsonl")
    quoted = write_csv([{"id": 0, "text": 'a "quoted" text', "n": 1}])
    with pytest.raises(CurriqError, match=r"a\.csv cannot be read as CSV after row 0.*unexpected end"):
        read(quoted[:-6], ".csv")
    with pytest.raises(CurriqError, match=r"row 12 of .*a\.csv: 1 fields where the header has 3 \(line 13\)"):
        read(write_csv([{**row, "text": "short"} for row in ROWS_OF]).rsplit(b",", 2)[0], ".csv")


@pytest.mark.parametrize("compression", [gzip.compress, zstandard.compress])
def test_an_archive_of_several_parts_is_read_whole(compression: Callable[[bytes], bytes]) -> None:
    """As pigz, pzstd and `cat` write them."""
    content = compression(write_lines(ROWS_OF)) + compression(write_lines(ROWS_OF))
    extension = ".jsonl.gz" if compression is gzip.compress else ".jsonl.zst"
    assert read(content, extension) == [row["text"] for row in ROWS_OF] * 2


class TestRows:
    """What a row is, format by format."""

    def test_end_commas_are_no_columns(self) -> None:
        assert read(b"text,label\nhello,1,\nworld,2,,\n", ".csv") == ["hello", "world"]

    @pytest.mark.parametrize("row", [b"a, b,1", b"hello", b"a,1,,x"])
    def test_csv_row_with_other_fields_than_the_header(self, row: bytes) -> None:
        content = b"text,label\nfirst,0\n" + row + b"\nlast,2\n"
        with pytest.raises(
            CurriqError, match=r"row 2 of .*a\.csv: \d fields where the header has 2 \(line 3\)"
        ):
            read(content, ".csv")
        assert read(content, ".csv", on_bad_row="skip") == ["first", "last"]

    def test_another_delimiter_lists_the_one_column(self) -> None:
        with pytest.raises(CurriqError, match=r"no column 'text' for the text\. Columns: id;text\."):
            read(b"id;text\n1;hello, there\n", ".csv")

    def test_quotes_line_breaks_and_null_bytes_of_csv(self) -> None:
        content = 'text,n\r\n"a ""b"", c",1\r\n"two\r\nlines",2\r\nnul\0byte,3\r\n\r\n5" disk,4\r\n'
        assert read(content.encode(), ".csv") == ['a "b", c', "two\r\nlines", "nul\0byte", '5" disk']

    def test_stray_quotes_of_csv_are_no_text(self) -> None:
        with pytest.raises(CurriqError, match="cannot be read as CSV after row 1: Error: ',' expected after"):
            read(b'text,n\nfirst,0\n"He said "hi" to me",1\n', ".csv", on_bad_row="skip")

    @pytest.mark.parametrize("extension", [".csv", ".parquet"])
    def test_two_columns_of_the_same_name(self, extension: str) -> None:
        table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
        file = io.BytesIO()
        parquet.write_table(table, file)
        content = b"text,text\na,b\n" if extension == ".csv" else file.getvalue()
        with pytest.raises(CurriqError, match="columns are named 'text'"):
            read(content, extension)

    def test_long_fields(self) -> None:
        text = "x" * 300_000
        assert read(f'text,n\n"{text}",1\n'.encode(), ".csv") == [text]

    def test_other_rows_decide_nothing(self) -> None:
        dates = [{"text": "2020-01-01"}, {"text": "2021-05-06"}]
        assert read(json.dumps(dates).encode(), ".json") == ["2020-01-01", "2021-05-06"]
        mixed = [{"text": 'He said "hi".\n–'}, {"text": 5}, {"text": "plain"}, {"text": None}]
        assert read(json.dumps(mixed).encode(), ".json", on_bad_row="skip") == ['He said "hi".\n–', "plain"]
        with pytest.raises(CurriqError, match=r"row 2 of .*a\.json: column 'text' holds 5 \(int\)"):
            read(json.dumps(mixed).encode(), ".json")

    @pytest.mark.parametrize("extension", [".json", ".jsonl"])
    def test_numbers_of_any_size_and_deep_nesting(self, extension: str) -> None:
        good = b'{"text": "ok", "other": ' + b"9" * 5000 + b', "n": NaN}\n'
        assert read(good, extension) == ["ok"]
        with pytest.raises(CurriqError, match=r"holds inf \(float\)"):
            read(b'{"text": ' + b"9" * 5000 + b"}", extension)
        with pytest.raises(CurriqError, match=r"1 of .*holds .*must be a number"):
            read(good, extension, difficulty_field="other")
        with pytest.raises(CurriqError, match="nested too deeply"):
            read(b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", extension)

    def test_the_last_of_equal_keys_counts(self) -> None:
        assert read(b'{"text": "a", "text": "b"}', ".jsonl") == ["b"]

    def test_json_lines_under_the_name_json(self) -> None:
        assert read(write_lines(ROWS_OF), ".json") == [row["text"] for row in ROWS_OF]

    @pytest.mark.parametrize("extension", [".json", ".jsonl", ".csv", ".txt"])
    def test_utf16_is_no_utf8(self, extension: str) -> None:
        content = '[{"text": "a"}]'.encode("utf-16")
        with pytest.raises(CurriqError, match=rf"a\{extension}.* 0xff is not UTF-8"):
            read(content, extension)

    @pytest.mark.parametrize(
        ("content", "advice"),
        [
            ("{}".encode("utf-16"), "iconv -f UTF-16"),
            ("é".encode("latin1"), "iconv -f LATIN1"),
            (gzip.compress(b"{}"), r"must end in \.gz"),
            (zstandard.compress(b"{}"), r"must end in \.zst"),
        ],
        ids=["utf-16", "latin-1", "gzip", "zstd"],  # the compressed bytes hold the time
    )
    @pytest.mark.parametrize("extension", [".jsonl", ".txt"])
    def test_what_a_file_may_be_instead(self, content: bytes, advice: str, extension: str) -> None:
        """LATIN1 would spell a UTF-16 or compressed file as nonsense that is valid UTF-8."""
        with pytest.raises(CurriqError, match=advice):
            read(content, extension)

    def test_page_checksums_are_compared(self) -> None:
        """A changed letter is a letter, too; only the checksum, where the file has them, can tell."""
        file = io.BytesIO()
        table = pyarrow.table({"text": ["the first text", "the other text"]})
        parquet.write_table(table, file, compression="none", use_dictionary=False, write_page_checksum=True)
        assert read(file.getvalue(), ".parquet") == ["the first text", "the other text"]
        with pytest.raises(CurriqError, match="CRC"):
            read(file.getvalue().replace(b"\x0e\0\0\0the other", b"\x0e\0\0\0the otter"), ".parquet")

    @pytest.mark.parametrize("value", ["nan", "", " 2.5 "])
    def test_difficulties(self, value: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.csv")
            path.write_text(f"text,n\na,{value}\n")
            (document,) = read_epoch(opened(path, difficulty_field="n"))
            assert (document.difficulty == 2.5) == (value == " 2.5 ")
            for wrong in ("inf", "x", "1e999"):
                path.write_text(f"text,n\na,{wrong}\n")
                with pytest.raises(CurriqError, match="must be a number"):
                    list(read_epoch(opened(path, difficulty_field="n")))

    def test_dictionary_encoded_and_large_strings(self) -> None:
        for kind in (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.large_string()):
            file = io.BytesIO()
            parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", "b"], kind), "n": [1, 2]}), file)
            assert read(file.getvalue(), ".parquet") == ["a", "b"]


class TestSkipping:
    def test_rows_are_named_and_counted(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text(
            "".join(f'{{"text": {i if i % 3 else chr(34) * 2}}}\n' for i in range(20)) + '{"text": "a"}'
        )
        source = opened(path, on_bad_row="skip")
        assert [document.text for document in read_epoch(source)] == ["a"]
        assert source.skipped == 13
        named = [record.getMessage() for record in caplog.records]
        assert f"source 'mine', line 2 of {path}, is skipped: column 'text' holds 1 (int)" in named[0]
        assert len(named) == 6
        assert "Further ones are only counted" in named[4]
        assert "13 rows skipped by the end of epoch 0" in named[5]

    def test_count_survives_a_resume(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": 1}\n{"text": "a"}\n{"text": null}\n{"text": "b"}\n{"text": 2}\n')
        source = opened(path, on_bad_row="skip")
        source.next_document()
        resumed = opened(path, on_bad_row="skip")
        resumed.load_state_dict(source.state_dict())
        assert [document.text for document in read_epoch(resumed)] == ["b"]
        assert resumed.skipped == 3
        list(read_epoch(resumed))
        assert resumed.skipped == 6

    def test_nothing_left_is_an_error(self) -> None:
        with pytest.raises(CurriqError, match="every text is empty, and 1 row skipped"):
            read(b'{"text": 1}\n', ".jsonl", on_bad_row="skip")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), values, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("extension", [".json", ".jsonl"])
@CHECKED
@given(
    rows=st.lists(st.fixed_dictionaries({}, optional={"text": VALUES, "n": VALUES}), min_size=1, max_size=4)
)
def test_any_value_is_a_text_a_conversation_or_refused(extension: str, rows: list[dict[str, Any]]) -> None:
    """Rows with a text as text, and a number or nothing as difficulty, are read; conversations may be."""
    content = write_lines(rows) if extension == ".jsonl" else write_array(rows)
    good = [row["text"] for row in rows if isinstance(row.get("text"), str) and is_difficulty(row)]
    with contextlib.suppress(CurriqError):  # where nothing is left
        found = read(content, extension, on_bad_row="skip", difficulty_field="n")
        others = iter(found)
        assert all(text in others for text in documents(good)), "in their order, among conversations"


def is_difficulty(row: dict[str, Any]) -> bool:
    value = row.get("n", True)
    try:
        return value in (None, "") or (not isinstance(value, bool) and not math.isinf(float(value)))
    except (TypeError, ValueError, OverflowError):
        return False
