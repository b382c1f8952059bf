"""The files of a corpus, and their rows in chunks: what is read, in one order, from any place on."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from curriq.config import SourceConfig
from curriq.data.cache import file_hash
from curriq.data.documents import short_hash
from curriq.data.files import COMPRESSIONS, LocalFiles, extension_of, find_files
from curriq.data.rows import FORMATS, Format
from curriq.data.sources import unreadable
from curriq.errors import CurriqError

_log = logging.getLogger("curriq")

CHUNK_ROWS = 1024
CHUNK_CHARACTERS = 1 << 20
"""A chunk ends where either is reached: the piece of work of one process."""
UNPACKED = 3
"""How many times its size a compressed file is taken to hold, for the time left alone."""


READING = ("text_field", "documents", "on_bad_row")
"""Keys of a source that say what its documents are."""
_NO_SPLIT = ("name one of them with hub_split=SPLIT, or the files with a glob.", "name the files of one.")
"""Advice that only a source of a run can follow, and what can be done here."""


class Place(NamedTuple):
    """Position in the corpus: file, and row in it."""

    file: int
    row: int


BEGINNING = Place(0, 0)


@dataclass(frozen=True)
class CorpusSource:
    """A part of the corpus that is reported by itself.

    Attributes:
        config: how it is read.
        position: of the run's source whose text it is like; 0 without a run.
    """

    config: SourceConfig
    position: int = 0


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus.

    Attributes:
        path: as it was found.
        source: position of its `CorpusSource`.
        of: what `find_files` found it in; holds decompressed copies.
    """

    path: Path
    source: int
    of: LocalFiles

    @property
    def format(self) -> Format:
        return FORMATS[self.extension]

    @property
    def extension(self) -> str:
        """Of the format, without that of a compression."""
        return extension_of(self.path)

    @property
    def readable(self) -> Path:
        """The file itself, or a decompressed copy where its reader seeks."""
        return self.of.readable(self.path)

    @property
    def size(self) -> int:
        """Bytes of text, roughly where it is compressed."""
        packed = self.path.suffix.lower() in COMPRESSIONS or self.extension == ".parquet"
        return self.path.stat().st_size * (UNPACKED if packed else 1)


@dataclass(frozen=True)
class Inputs:
    """The corpus: sources, and their files in the order in which they are read."""

    sources: tuple[CorpusSource, ...]
    files: tuple[InputFile, ...]

    def config(self, file: int) -> SourceConfig:
        return self.sources[self.files[file].source].config

    def fingerprint(self) -> str:
        """Hash of the files' content, and of how they are read."""
        parts: list[str | bytes] = []
        for number, file in enumerate(self.files):
            config, position = self.config(number), self.sources[file.source].position
            how = [str(getattr(config, name)) for name in READING]
            # A name need not be UTF-8.
            parts += [os.fsencode(file.path.name), file_hash(file.path).sha256, str(position), *how]
        return short_hash(*parts)

    def columns(self) -> set[str]:
        """The columns that the files themselves name, whichever of them are read."""
        schemas = (file.format.schema(file.readable) for file in self.files if file.format.schema)
        return {name for schema in schemas for name in schema.names}

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def open_inputs(sources: Sequence[CorpusSource]) -> Inputs:
    """The files of some sources; a file that several name is read for the first.

    Raises:
        CurriqError: there is no source, or a source cannot be read; see `find_files`.
    """
    if not sources:
        raise CurriqError(
            "there is nothing to read: name files, folders or globs, such as 'data/*.jsonl.gz'."
        )
    files, seen = [], set()
    for position, source in enumerate(sources):
        if source.config.path.startswith(("hub:", "embedded:")):
            raise CurriqError(
                f"{source.config.path} is no local file. Download a data set of the hub with `hf download "
                "--repo-type dataset NAME`, and name its files."
            )
        try:
            found = find_files(source.config)
        except CurriqError as error:  # of the keys of a source some are no options of this command
            raise CurriqError(str(error).replace(*_NO_SPLIT)) from None
        _log.info(f"{source.config.name}: {found.summary()}.")
        for path in found.paths:
            if (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                files.append(InputFile(path, position, found))
    _check(files, sources)
    return Inputs(tuple(sources), tuple(files))


def _check(files: Sequence[InputFile], sources: Sequence[CorpusSource]) -> None:
    """Refuse files that are seen to be damaged, or to lack the column, without reading them."""
    for file in files:
        config = sources[file.source].config
        try:
            file.format.check(file.readable, config)
        except Exception as error:
            raise unreadable(config, file.path, 0, error) from error


@dataclass
class Chunk:
    """Some raw rows of one file.

    Attributes:
        rows: their numbers in the file, from 0.
        raw: the rows, as the format reads them.
        characters: of their text, roughly.
        after: where reading goes on.
    """

    file: int
    rows: list[int] = field(default_factory=list)
    raw: list[Any] = field(default_factory=list)
    characters: int = 0
    after: Place = BEGINNING


def read_chunks(inputs: Inputs, start: Place = BEGINNING, every: int = 1) -> Iterator[Chunk]:
    """The rows of the corpus from a place on; with `every` = k, one of k rows, spread over all files.

    Raises:
        CurriqError: a file cannot be read on.
    """
    for file in range(start.file, len(inputs.files)):
        first = start.row if file == start.file else 0
        yield from _chunks_of(inputs, file, first, every)


def _chunks_of(inputs: Inputs, file: int, first: int, every: int) -> Iterator[Chunk]:
    entry, chunk = inputs.files[file], Chunk(file)
    row = first
    try:
        for raw in entry.format.read(entry.readable, inputs.config(file), first):
            if (row + 1_000_003 * file) % every == 0:
                chunk.rows.append(row)
                chunk.raw.append(raw)
            chunk.characters += _characters(raw)
            row += 1
            if len(chunk.raw) == CHUNK_ROWS or chunk.characters >= CHUNK_CHARACTERS:
                chunk.after = Place(file, row)
                yield chunk
                chunk = Chunk(file)
    except CurriqError:
        raise
    except Exception as error:
        raise unreadable(inputs.config(file), entry.path, row, error) from error
    chunk.after = Place(file + 1, 0)
    yield chunk


def _characters(raw: Any) -> int:
    if isinstance(raw, bytes | str):
        return len(raw)
    values: Iterable[Any] = raw.values() if isinstance(raw, dict) else getattr(raw, "values", ())
    return sum(len(value) for value in values if isinstance(value, str | bytes))
