"""Local files: which ones a path names, what format they have, and whether they are what they say."""

import codecs
import functools
import glob
import gzip
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curriq.config import SourceConfig, did_you_mean
from curriq.data.documents import short_hash
from curriq.errors import CurriqError

EDGE_BYTES = 64 * 1024
"""Bytes at both ends of a file that its fingerprint covers."""
CHUNK_BYTES = 1 << 20

Options = dict[str, Any]


@dataclass(frozen=True)
class FileFormat:
    """How files with one extension are read.

    Attributes:
        builder: builder of the `datasets` library.
        options: its options for a source that reads the given files.
        json_lines: whether each row is a line of JSON that is still to be parsed.
        seeks: whether the reader jumps about in the file, so that it must be decompressed beforehand.
    """

    builder: str
    options: Callable[[SourceConfig, list[Path]], Options]
    json_lines: bool = False
    seeks: bool = False


def _text_options(config: SourceConfig, paths: list[Path]) -> Options:
    sample_by = "document" if config.documents == "file" else config.documents
    return {"sample_by": sample_by, "encoding": "utf-8-sig"}  # -sig: skips a byte order mark


def _line_options(config: SourceConfig, paths: list[Path]) -> Options:
    return {"sample_by": "line", "encoding": "utf-8-sig"}


def _csv_options(config: SourceConfig, paths: list[Path]) -> Options:
    # Both columns stay strings: a text may be "None" or "007", and guessed types change between chunks.
    columns = {name: str for name in (config.text_field, config.difficulty_field) if name}
    return {"keep_default_na": False, "converters": columns}


def _parquet_options(config: SourceConfig, paths: list[Path]) -> Options:
    """Read the needed columns alone; all columns when these will not do, so that the error lists them."""
    from pyarrow import parquet, types

    wanted = [name for name in (config.text_field, config.difficulty_field) if name]
    schemas = [parquet.read_schema(path) for path in paths]
    if not all(set(wanted) <= set(schema.names) for schema in schemas):
        return {}
    kinds = [schema.field(config.text_field).type for schema in schemas]
    is_text = all(types.is_string(kind) or types.is_large_string(kind) for kind in kinds)
    return {"columns": wanted} if is_text else {}


FORMATS = {
    ".txt": FileFormat("text", _text_options),
    ".jsonl": FileFormat("text", _line_options, json_lines=True),
    ".json": FileFormat("json", lambda config, paths: {}),
    ".csv": FileFormat("csv", _csv_options),
    ".parquet": FileFormat("parquet", _parquet_options, seeks=True),
}
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class LocalFiles:
    """The files of one source, sorted by path.

    Attributes:
        paths: the files as the user has them.
        extension: their common extension, without that of the compression.
    """

    paths: list[Path]
    extension: str

    @functools.cached_property
    def scratch(self) -> Path:
        """Folder for decompressed copies of files whose reader seeks and for the lock files of `datasets`,
        which then needs no writable home; removed with this object."""
        folder = tempfile.mkdtemp(prefix="curriq-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    @property
    def format(self) -> FileFormat:
        return FORMATS[self.extension]

    def readable(self) -> list[Path]:
        """The files as the reader can take them."""
        return [self._unpack(path) if self.format.seeks else path for path in self.paths]

    def patterns(self) -> dict[str, list[str]]:
        """`data_files` of `load_dataset`, which takes every path for a glob."""
        return {"train": [glob.escape(str(path.resolve())) for path in self.readable()]}

    def options(self, config: SourceConfig) -> Options:
        """What `load_dataset` has to be told besides the builder and the split."""
        chosen = self.format.options(config, self.readable())
        return {"data_files": self.patterns(), "cache_dir": str(self.scratch), **chosen}

    def fingerprint(self) -> str:
        """Hash of each file's name, size, first and last 64 KiB."""
        parts: list[str | bytes] = []
        for path in self.paths:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(EDGE_BYTES)
                file.seek(max(0, size - EDGE_BYTES))
                parts += [path.name, str(size), head, file.read(EDGE_BYTES)]
        return short_hash(*parts)

    def _unpack(self, path: Path) -> Path:
        if path.suffix.lower() not in COMPRESSIONS:
            return path
        copy = self.scratch / f"{short_hash(str(path))}{self.extension}"
        if not copy.exists():
            with copy.open("wb") as file:
                file.writelines(decompressed_chunks(path))
        return copy


def find_files(config: SourceConfig) -> LocalFiles:
    """The files that `config.path` names: a file, a folder with all below it, or a glob.

    In a folder, hidden files and files of other formats are passed over; files of no bytes always are.

    Raises:
        CurriqError: nothing matches, all files are empty, a format is unknown, or formats are mixed.
    """
    where = f"source {config.name!r}: path {config.path!r}"
    path = Path(config.path).expanduser()
    if path.is_dir():
        inside = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path)]
        found = [file for file in inside if extension_of(file) in FORMATS]
        if inside and not found:
            raise CurriqError(f"{where} holds no file of a known format. {_known_formats()}")
    else:
        names = [str(path)] if path.is_file() else glob.glob(str(path), recursive=True)
        found = [Path(name) for name in names if Path(name).is_file()]
    if not found:
        raise CurriqError(
            f"{where} matches no file (current folder: {Path.cwd()}). Give a file, a folder or a glob such "
            "as 'data/*.jsonl.gz'; a data set of the hub is hub:NAME, the built-in text embedded:prose."
        )
    found.sort()
    by_extension = {extension_of(file): file for file in reversed(found)}
    for extension, file in by_extension.items():
        if extension not in FORMATS:
            hint = did_you_mean(extension, FORMATS, "{}")
            raise CurriqError(
                f"{where}: {file.name} has the unknown format {extension!r}.{hint} {_known_formats()}"
            )
    if len(by_extension) > 1:
        examples = ", ".join(sorted(file.name for file in by_extension.values()))
        raise CurriqError(
            f"{where} mixes the formats {', '.join(sorted(by_extension))} ({examples}). One source has one "
            f"format: give each its own source, such as path={config.path.rstrip('/')}/*{min(by_extension)}."
        )
    filled = [file for file in found if file.stat().st_size > 0]
    if not filled:
        raise CurriqError(f"{where} holds no document with text: all its files are empty.")
    return LocalFiles(filled, extension_of(filled[0]))


def extension_of(path: Path) -> str:
    """Extension of the format, in lower case, without that of the compression."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower()


def decompressed_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of the file without its compression, 1 MiB at a time."""
    import zstandard

    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".zst": zstandard.open}
    with openers.get(path.suffix.lower(), open)(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def locate_line(paths: list[Path], number: int) -> str:
    """Where the line lies that is the `number`-th, from 1, of all the files' lines: `line 3 of
    data/b.jsonl`."""
    left = number
    for path in paths:
        count = _count_lines(path)
        if left <= count:
            return f"line {left} of {path}"
        left -= count
    return f"line {number}"


def find_undecodable(paths: list[Path]) -> tuple[Path, int, int] | None:
    """The first byte that is not UTF-8: its file, its offset in the decompressed text and its value;
    None when all files are UTF-8 or cannot be read at all. Parquet files are passed over."""
    for path in paths:
        if FORMATS[extension_of(path)].seeks:
            continue
        decoder = codecs.getincrementaldecoder("utf-8")()
        start = size = 0  # offset of the bytes that are being decoded, and their number
        try:
            for chunk in itertools.chain(decompressed_chunks(path), [b""]):
                kept = len(decoder.getstate()[0])  # bytes of a character that the last chunk broke off
                start += size - kept
                size = kept + len(chunk)
                decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            return path, start + error.start, error.object[error.start]
        except Exception:  # a damaged archive: the reader's own error says more
            return None
    return None


def _count_lines(path: Path) -> int:
    """Lines of the decompressed text, the last one also without a line break at its end."""
    count, last = 0, b""
    for chunk in decompressed_chunks(path):
        count += chunk.count(b"\n")
        last = chunk
    return count + bool(last and not last.endswith(b"\n"))


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _known_formats() -> str:
    return f"Known: {', '.join(FORMATS)}, each also with {' or '.join(COMPRESSIONS)}."
