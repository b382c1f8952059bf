"""Opens a source of documents: the embedded corpus, local files, or a data set of the Hugging Face hub.

Local files and hub data sets are streamed by `datasets`; nothing is held in memory or written to disk,
and the position is the library's own, exact to the document. They come in the order of the files: the
library's shuffle buffer is not resumable, so windows are shuffled further down the stream instead.
"""

import abc
import contextlib
import dataclasses
import json
import math
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curriq.config import SourceConfig, did_you_mean
from curriq.data.chat import read_conversation, render_plain
from curriq.data.documents import Document, DocumentSource, MemorySource, short_hash, shorten, valid_text
from curriq.data.embedded import KINDS, corpus_version, embedded_documents
from curriq.data.files import BUILDERS, find_files, find_undecodable, locate_line
from curriq.errors import CurriqError
from curriq.types import State

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]


def open_source(config: SourceConfig, seed: int) -> DocumentSource:
    """The source that `config.path` names, at its beginning; the stream applies weight and corruption. `seed`
    decides the order of the embedded corpus; files keep theirs.

    Raises:
        CurriqError: nothing matches the path, its format is unknown, or it cannot be read.
    """
    scheme, _, kind = config.path.partition(":")
    if scheme == "hub":
        return HubSource(config)
    if scheme != "embedded":
        return LocalSource(config)
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS, "embedded:{}")
        known = " and ".join(f"embedded:{known}" for known in KINDS)
        raise CurriqError(f"source {config.name!r}: there is no {config.path}.{hint} There are {known}.")
    return MemorySource(config.name, embedded_documents(kind), seed, version=corpus_version())


def local_paths(config: SourceConfig) -> list[Path]:
    """The local files that a source is read from; none for the embedded corpus and the hub."""
    scheme = config.path.partition(":")[0]
    return [] if scheme in ("hub", "embedded") else find_files(config).paths


class BadRow(Exception):
    """What is wrong with one row; the source adds where the row is."""


class StreamedSource(abc.ABC):
    """Documents of a streamed data set, in its own order; each epoch is one pass.

    Raises:
        CurriqError: the data set cannot be opened. The same later when a row cannot be read, has no text
            column or a value of the wrong kind, and when an epoch ends without any document.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.name = config.name
        self._config = config
        with self._explained():
            self._dataset = self._open()
        self._start: State = {"epoch": 0, "count": 0, "row": 0, "dataset": self._dataset.state_dict()}
        self.load_state_dict(self._start)

    @abc.abstractmethod
    def _open(self) -> "datasets.IterableDataset":
        """The data set at its beginning."""

    @abc.abstractmethod
    def _explain(self, error: Exception) -> CurriqError:
        """The error for the user that stands for an error of the library."""

    @abc.abstractmethod
    def fingerprint(self) -> str: ...

    def _parse(self, row: Row) -> Row:
        """The columns of a row of the data set; raises `BadRow`."""
        return row

    def _locate(self, row: int) -> str:
        """Where a row is to be found, given its number from 1."""
        return f"row {row}"

    def next_document(self) -> Document | None:
        where = f"source {self.name!r} ({self._config.path})"
        while (row := self._next_row()) is not None:
            self._row += 1
            try:
                document = self._document(self._parse(row))
            except BadRow as error:
                raise CurriqError(f"{where}, {self._locate(self._row)}: {error}") from None
            if document is not None:
                self._count += 1
                return document
        if self._count == 0:
            raise CurriqError(
                f"{where} holds no document with text: every text is empty. Give it a file with text, or "
                "leave the source out."
            )
        self.load_state_dict(self._start | {"epoch": self.epoch + 1})
        return None

    def state_dict(self) -> State:
        # The library reports a state that has been loaded only once iteration has begun.
        dataset = self._resume if self._rows is None else self._dataset.state_dict()
        return {"epoch": self.epoch, "count": self._count, "row": self._row, "dataset": dataset}

    def load_state_dict(self, state: State) -> None:
        self.epoch: int = state["epoch"]
        self._count: int = state["count"]  # documents handed out in this epoch
        self._row: int = state["row"]  # rows read in this epoch
        self._resume = state["dataset"]
        self._rows: Iterator[Row] | None = None  # None: iteration starts from self._resume

    def _next_row(self) -> Row | None:
        with self._explained():
            if self._rows is None:
                self._dataset.load_state_dict(self._resume)
                self._rows = iter(self._dataset)
            return next(self._rows, None)

    @contextlib.contextmanager
    def _explained(self) -> Generator[None, None, None]:
        """Turn any failure inside the library into an error for the user."""
        try:
            yield
        except CurriqError:
            raise
        except Exception as error:
            raise self._explain(error) from error

    def _document(self, row: Row) -> Document | None:
        """The row as a document; None when it has no text."""
        field = self._config.text_field
        value = _column(row, field, "text_field", "text")
        messages = read_conversation(value)
        text = value if messages is None else render_plain(messages)
        if text is not None and not isinstance(text, str):
            raise BadRow(
                f"column {field!r} holds {shorten(value)} ({type(value).__name__}), neither a text nor a "
                'conversation, a list of {"role": …, "content": …}. Name the column of the text with '
                f"text_field=COLUMN; columns: {', '.join(row)}."
            )
        if not text or text.isspace():
            return None
        text = valid_text(text).strip("\n")
        return Document(text, difficulty=self._difficulty(row), messages=messages)

    def _difficulty(self, row: Row) -> float:
        field = self._config.difficulty_field
        value = _column(row, field, "difficulty_field", "difficulty") if field else None
        if value is None or value == "":
            return math.nan
        try:
            return float(value)
        except (TypeError, ValueError):
            raise BadRow(
                f"column {field!r} holds {shorten(value)}; a difficulty must be a number (higher is harder). "
                "Name a numeric column, or leave difficulty_field out."
            ) from None


def _column(row: Row, column: str, setting: str, meaning: str) -> Any:
    if column not in row:
        raise BadRow(
            f"there is no column {column!r} for the {meaning}. Columns: {', '.join(row)}. Name "
            f"one of them with {setting}=COLUMN."
        )
    return row[column]


def describe(error: Exception) -> str:
    """Type and text of a library's error, without the full stop, for the middle of a sentence."""
    return f"{type(error).__name__}: {error}".rstrip(" .:\n")


class LocalSource(StreamedSource):
    """Documents of local files."""

    def __init__(self, config: SourceConfig) -> None:
        self._files = find_files(config)
        self._builder = BUILDERS[self._files.extension]
        self._json_lines = self._files.extension == ".jsonl"  # rows are lines that are still to be parsed
        super().__init__(config)

    def fingerprint(self) -> str:
        config = self._config
        return short_hash(
            config.text_field, config.difficulty_field, config.documents, self._files.fingerprint()
        )

    def _open(self) -> "datasets.IterableDataset":
        with offline():
            return _stream(self._builder, **self._files.options(self._config))

    def _explain(self, error: Exception) -> CurriqError:
        source = f"source {self.name!r}"
        if (found := find_undecodable(self._files.paths)) is not None:
            path, offset, value = found
            return CurriqError(
                f"{source}: {path} is not UTF-8: byte 0x{value:02x} at offset {offset} of its text. Convert "
                "it, for instance with `iconv -f LATIN1 -t UTF-8`."
            )
        return CurriqError(
            f"{source} ({self._config.path}) cannot be read as {self._builder}: "
            f"{describe(error)}. Check that the files are complete and match their extensions."
        )

    def _parse(self, row: Row) -> Row:
        """The row itself, or the object in its line of a .jsonl file.

        The library's own reader takes the types of all columns from the first 10 MB and refuses later rows
        that differ, even in unused columns; here every line stands for itself.
        """
        if not self._json_lines:
            return row
        line = row["text"]
        if not line or line.isspace():
            return {self._config.text_field: None, self._config.difficulty_field: None}
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadRow(
                f"no valid JSON ({error}): {shorten(line)}. Each line of a .jsonl file must be one "
                "object; fix or remove it."
            ) from None
        if not isinstance(values, dict):
            raise BadRow(
                f"the line is {shorten(values)}, not an object. Each line of a .jsonl file must be one "
                'object, such as {"text": "…"}.'
            )
        return values

    def _locate(self, row: int) -> str:
        paths = self._files.paths
        if self._json_lines:
            return locate_line(paths, row)
        return f"row {row} of {paths[0].name}" if len(paths) == 1 else f"row {row}"


class HubSource(StreamedSource):
    """Documents of a hub data set, at one revision: all epochs read it and the fingerprint names it."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(pin_revision(config))

    def fingerprint(self) -> str:
        config = self._config
        name, subset = _hub_name(config)
        columns = (config.text_field, config.difficulty_field)
        return short_hash("hub", name, subset, config.hub_split, config.hub_revision, *columns)

    def _open(self) -> "datasets.IterableDataset":
        config = self._config
        name, subset = _hub_name(config)
        return _stream(
            name, split=config.hub_split, name=subset or None, revision=config.hub_revision or None
        )

    def _explain(self, error: Exception) -> CurriqError:
        return _hub_error(self._config, error)


def pin_revision(config: SourceConfig) -> SourceConfig:
    """The source with the revision of its hub data set as a commit; any other source unchanged.

    Raises:
        CurriqError: the hub cannot be reached, or has no such data set or revision.
    """
    if not config.path.startswith("hub:") or config.is_pinned:
        return config
    from huggingface_hub import HfApi

    name, _ = _hub_name(config)
    try:
        commit = HfApi().dataset_info(name, revision=config.hub_revision or None).sha
    except Exception as error:  # no connection, no such name or revision, no permission
        raise _hub_error(config, error) from error
    return dataclasses.replace(config, hub_revision=commit or config.hub_revision)


def _hub_name(config: SourceConfig) -> tuple[str, str]:
    """Name and configuration of a hub data set; the latter is empty for the default one."""
    name, _, subset = config.path.removeprefix("hub:").partition(":")
    return name, subset


def _hub_error(config: SourceConfig, error: Exception) -> CurriqError:
    name, subset = _hub_name(config)
    where = (
        f"hub data set {name!r} (configuration {subset or 'default'}, split {config.hub_split!r}, revision "
        f"{config.hub_revision or 'newest'})"
    )
    return CurriqError(
        f"source {config.name!r}: the {where} cannot be read: {describe(error)}. With a connection, check "
        "the name, the configuration, the split and the revision, and that HF_HUB_OFFLINE is not set. "
        "Without one, download the data elsewhere and give its files: "
        f"name={config.name},path=FOLDER/*.parquet."
    )


def _stream(path: str, *, split: str = "train", **options: Any) -> "datasets.IterableDataset":
    """`datasets.load_dataset(..., streaming=True)` without its bars and its log: the exception that it raises
    says the same."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets.load_dataset(path, split=split, streaming=True, **options)


@contextlib.contextmanager
def offline() -> Generator[None, None, None]:
    """Keep `datasets` off the network: opening local files otherwise asks a server that counts use."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
