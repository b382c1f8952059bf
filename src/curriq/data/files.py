"""Local files: which ones a path names, how their format is read, and where their faults are."""

import functools
import glob
import gzip
import io
import itertools
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curriq.config import SourceConfig, did_you_mean
from curriq.data.cache import file_hash
from curriq.data.documents import short_hash
from curriq.errors import CurriqError

BUILDERS = {".txt": "text", ".jsonl": "text", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Extension of a format → the builder of `datasets` that reads it."""
COMPRESSIONS = (".gz", ".zst")
_KNOWN = f"Known: {', '.join(BUILDERS)}, each also with {' or '.join(COMPRESSIONS)}."

Options = dict[str, Any]


@dataclass(frozen=True)
class LocalFiles:
    """The files of one source, sorted by path; `extension` is theirs without that of the compression."""

    paths: list[Path]
    extension: str

    @functools.cached_property
    def scratch(self) -> Path:
        """Folder for decompressed copies of Parquet files and for the lock files of `datasets`, which then
        needs no writable home; removed with this object."""
        folder = tempfile.mkdtemp(prefix="curriq-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def options(self, config: SourceConfig) -> Options:
        """Arguments of `load_dataset` besides the builder and the split."""
        is_parquet = self.extension == ".parquet"  # its reader seeks, which no compressed file allows
        readable = [self._unpack(path) if is_parquet else path for path in self.paths]
        patterns = [glob.escape(str(path.resolve())) for path in readable]  # every path is taken for a glob
        chosen = _format_options(self.extension, config, readable)
        return {"data_files": {"train": patterns}, "cache_dir": str(self.scratch), **chosen}

    def fingerprint(self) -> str:
        """Hash of each file's name and whole content."""
        return short_hash(*(part for path in self.paths for part in (path.name, file_hash(path).sha256)))

    def _unpack(self, path: Path) -> Path:
        if path.suffix.lower() not in COMPRESSIONS:
            return path
        copy = self.scratch / f"{short_hash(str(path))}{self.extension}"
        if not copy.exists():
            with open_decompressed(path) as packed, copy.open("wb") as file:
                shutil.copyfileobj(packed, file)
        return copy


def _format_options(extension: str, config: SourceConfig, paths: list[Path]) -> Options:
    columns = [name for name in (config.text_field, config.difficulty_field) if name]
    match extension:
        case ".txt" | ".jsonl":
            unit = "line" if extension == ".jsonl" else config.documents.replace("file", "document")
            return {"sample_by": unit, "encoding": "utf-8-sig"}  # -sig: skips a byte order mark
        case ".csv":
            # Both stay strings: a text may be "None" or "007", and guessed types change between chunks.
            return {"keep_default_na": False, "converters": dict.fromkeys(columns, str)}
        case ".parquet":
            from pyarrow import parquet

            schemas = [parquet.read_schema(path) for path in paths]
            usable = all(
                {*columns} <= {*schema.names} and _holds_text(schema.field(config.text_field))
                for schema in schemas
            )
            return {"columns": columns} if usable else {}  # all columns, so that the error lists them
    return {}


def _holds_text(field: Any) -> bool:
    """Whether a field of a pyarrow schema holds text or conversations."""
    from pyarrow import types

    if types.is_list(field.type) or types.is_large_list(field.type):
        item = field.type.value_type
        return types.is_struct(item) and item.get_field_index("role") >= 0
    return types.is_string(field.type) or types.is_large_string(field.type)


def find_files(config: SourceConfig) -> LocalFiles:
    """The files that `config.path` names: a file, a folder with all below it, or a glob.

    In a folder, hidden files and files of other formats are skipped; files of no bytes always are.

    Raises:
        CurriqError: nothing matches, all files are empty, a format is unknown, or formats are mixed.
    """
    where = f"source {config.name!r}: path {config.path!r}"
    found = sorted(_matches(config, where))
    if not found:
        raise CurriqError(
            f"{where} matches no file (current folder: {Path.cwd()}). Give a file, a folder or a glob such "
            "as 'data/*.jsonl.gz'; a data set of the hub is hub:NAME, the built-in text embedded:prose."
        )
    by_extension = {extension_of(file): file for file in reversed(found)}
    for extension, file in by_extension.items():
        if extension not in BUILDERS:
            hint = did_you_mean(extension, BUILDERS, "{}")
            raise CurriqError(f"{where}: {file.name} has the unknown format {extension!r}.{hint} {_KNOWN}")
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


def _matches(config: SourceConfig, where: str) -> list[Path]:
    path = Path(config.path).expanduser()
    if not path.is_dir():
        names = [str(path)] if path.is_file() else glob.glob(str(path), recursive=True)
        return [Path(name) for name in names if Path(name).is_file()]
    inside = [
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    found = [file for file in inside if extension_of(file) in BUILDERS]
    if inside and not found:
        raise CurriqError(f"{where} holds no file of a known format. {_KNOWN}")
    return found


def extension_of(path: Path) -> str:
    """Extension of the format, in lower case, without that of the compression."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower()


def open_decompressed(path: Path) -> io.BufferedIOBase:
    """The file without its compression, open for reading."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".zst":
            import zstandard

            return io.BufferedReader(zstandard.open(path, "rb"))  # its own reader has no lines
    return path.open("rb")


def locate_line(paths: list[Path], number: int) -> str:
    """Where the `number`-th line, from 1, of all the files lies: `line 3 of data/b.jsonl`."""
    left = number
    for path in paths:
        with open_decompressed(path) as file:
            count = sum(1 for _ in itertools.islice(file, left))
        if count == left:
            return f"line {left} of {path}"
        left -= count
    return f"line {number}"


def find_undecodable(paths: list[Path]) -> tuple[Path, int, int] | None:
    """The first byte that is not UTF-8: its file, its offset in the decompressed text and its value;
    None when all files are UTF-8 or cannot be read at all. Parquet files are skipped."""
    for path in paths:
        if extension_of(path) == ".parquet":
            continue
        offset = 0
        try:
            with open_decompressed(path) as file:
                for line in file:  # no character holds a line break, so each line stands for itself
                    line.decode()
                    offset += len(line)
        except UnicodeDecodeError as error:
            return path, offset + error.start, error.object[error.start]
        except Exception:  # a damaged archive: the reader's own error says more
            return None
    return None
