"""Opens a source of documents: the embedded corpus, local files, or a data set of the Hugging Face hub.

Local files and hub data sets are streamed by `datasets`; nothing is held in memory or written to disk,
and the position is the library's own, exact to the document. They come in the order of the files: the
library's shuffle buffer is not resumable, so windows are shuffled further down the stream instead.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from curriq.config import SourceConfig, did_you_mean
from curriq.data.documents import Document, DocumentSource, MemorySource, short_hash
from curriq.data.embedded import KINDS, corpus_version, embedded_documents
from curriq.data.files import find_files, find_undecodable, locate_line
from curriq.errors import CurriqError
from curriq.types import State

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]


def open_source(config: SourceConfig, generator_seed: int) -> DocumentSource:
    """The source that `config.path` names, at its beginning.

    Args:
        config: name, path and columns. Weight and corruption are applied by the stream.
        generator_seed: seed of the order of the embedded corpus; files keep their order.

    Raises:
        CurriqError: nothing matches the path, its format is unknown, or it cannot be read.
    """
    scheme, _, rest = config.path.partition(":")
    opener = OPENERS.get(scheme)
    return _open_local(config) if opener is None else opener(config, rest, generator_seed)


class BadRow(Exception):
    """What is wrong with one row; the source adds where the row is."""


class StreamedSource:
    """Documents of a streamed data set, in its own order; each epoch is one pass.

    Args:
        config: name, path and columns of the source.
        open_dataset: opens the data set at its beginning.
        identity: what the fingerprint covers.
        explain: turns an exception of the library into an error that the user can mend.
        parse: makes a row out of the row of the data set; raises `BadRow`.
        locate: where the row with a number, from 1, is to be found.

    Raises:
        CurriqError: the data set cannot be opened. The same when a document is asked for and cannot be
            read, has no text column, a text that is no string or a difficulty that is no number; and at
            the end of an epoch without any document.
    """

    def __init__(
        self,
        config: SourceConfig,
        open_dataset: Callable[[], "datasets.IterableDataset"],
        *,
        identity: Callable[[], str],
        explain: Callable[[Exception], CurriqError],
        parse: Callable[[Row], Row] = lambda row: row,
        locate: Callable[[int], str] = "row {}".format,
    ) -> None:
        self.name = config.name
        self.epoch = 0
        self._config = config
        self._identity = identity
        self._explain = explain
        self._parse = parse
        self._locate = locate
        self._count = 0  # documents handed out in this epoch
        self._row = 0  # rows read in this epoch
        with self._explained():
            self._dataset = open_dataset()
        self._start: State = self._dataset.state_dict()
        self._resume = self._start
        self._rows: Iterator[Row] | None = None  # None: to be started from self._resume

    def next_document(self) -> Document | None:
        while (row := self._next_row()) is not None:
            self._row += 1
            if (document := self._document(row)) is not None:
                self._count += 1
                return document
        if self._count == 0:
            raise CurriqError(
                f"{self._where()} holds no document with text: every text is empty. Give it a file with "
                "text, or leave the source out."
            )
        self.epoch += 1
        self._count = self._row = 0
        self._rewind(self._start)
        return None

    def fingerprint(self) -> str:
        return self._identity()

    def state_dict(self) -> State:
        # The library reports a state that has been loaded only once iteration has begun.
        dataset = self._resume if self._rows is None else self._dataset.state_dict()
        return {"epoch": self.epoch, "count": self._count, "row": self._row, "dataset": dataset}

    def load_state_dict(self, state: State) -> None:
        self.epoch = state["epoch"]
        self._count = state["count"]
        self._row = state["row"]
        self._rewind(state["dataset"])

    def _rewind(self, state: State) -> None:
        self._resume = state
        self._rows = None

    def _next_row(self) -> Row | None:
        with self._explained():
            if self._rows is None:
                self._dataset.load_state_dict(self._resume)
                self._rows = iter(self._dataset)
            return next(self._rows, None)

    @contextlib.contextmanager
    def _explained(self) -> Generator[None, None, None]:
        """Turn whatever goes wrong inside the library into an error for the user."""
        try:
            yield
        except CurriqError:
            raise
        except Exception as error:
            raise self._explain(error) from error

    def _document(self, row: Row) -> Document | None:
        """The row as a document; None when it has no text."""
        try:
            return self._read(self._parse(row))
        except BadRow as error:
            raise CurriqError(f"{self._where()}, {self._locate(self._row)}: {error}") from None

    def _read(self, row: Row) -> Document | None:
        text = self._column(row, self._config.text_field, "text_field", "text")
        if text is not None and not isinstance(text, str):
            raise BadRow(
                f"column {self._config.text_field!r} holds {shorten(text)}, which is no text but "
                f"{type(text).__name__}. Name the column of the text with text_field=COLUMN; "
                f"columns: {', '.join(row)}."
            )
        if not text or text.isspace():
            return None
        # JSON can spell half a surrogate pair ("\ud83d", an emoji cut in two), which is no text: "?" instead.
        text = text.encode(errors="replace").decode()
        return Document(text.strip("\n"), difficulty=self._difficulty(row))

    def _difficulty(self, row: Row) -> float:
        if not self._config.difficulty_field:
            return math.nan
        value = self._column(row, self._config.difficulty_field, "difficulty_field", "difficulty")
        if value is None or value == "":
            return math.nan
        try:
            return float(value)
        except (TypeError, ValueError):
            raise BadRow(
                f"column {self._config.difficulty_field!r} holds {shorten(value)}; a difficulty must be a "
                "number (higher is harder). Name a numeric column, or leave difficulty_field out."
            ) from None

    def _column(self, row: Row, column: str, setting: str, meaning: str) -> Any:
        if column not in row:
            raise BadRow(
                f"there is no column {column!r} for the {meaning}. Columns: {', '.join(row)}. Name "
                f"one of them with {setting}=COLUMN."
            )
        return row[column]

    def _where(self) -> str:
        return f"source {self.name!r} ({self._config.path})"


def shorten(value: object) -> str:
    """The value as Python writes it, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def said(error: Exception) -> str:
    """Type and text of a library's error, without the full stop, for the middle of a sentence."""
    return f"{type(error).__name__}: {error}".rstrip(" .:\n")


def _open_embedded(config: SourceConfig, kind: str, seed: int) -> DocumentSource:
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS, "embedded:{}")
        known = " and ".join(f"embedded:{known}" for known in KINDS)
        raise CurriqError(f"source {config.name!r}: there is no {config.path}.{hint} There are {known}.")
    return MemorySource(config.name, embedded_documents(kind), seed, version=corpus_version())


def _open_local(config: SourceConfig) -> DocumentSource:
    files = find_files(config)

    def open_dataset() -> "datasets.IterableDataset":
        with offline():
            return _stream(files.format.builder, **files.options(config))

    def explain(error: Exception) -> CurriqError:
        if (found := find_undecodable(files.paths)) is not None:
            path, offset, value = found
            return CurriqError(
                f"source {config.name!r}: {path} is not UTF-8: byte 0x{value:02x} at offset {offset} of its "
                "text. Convert it, for instance with `iconv -f LATIN1 -t UTF-8`."
            )
        return CurriqError(
            f"source {config.name!r} ({config.path}) cannot be read as {files.format.builder}: "
            f"{said(error)}. Check that the files are complete and what their names say."
        )

    def locate(row: int) -> str:
        if files.format.json_lines:
            return locate_line(files.paths, row)
        return f"row {row} of {files.paths[0].name}" if len(files.paths) == 1 else f"row {row}"

    return StreamedSource(
        config,
        open_dataset,
        identity=lambda: short_hash(
            config.text_field, config.difficulty_field, config.documents, files.fingerprint()
        ),
        explain=explain,
        parse=json_line(config) if files.format.json_lines else lambda row: row,
        locate=locate,
    )


def json_line(config: SourceConfig) -> Callable[[Row], Row]:
    """Reads rows of a .jsonl file from its lines.

    The library's own reader takes the types of all columns from the first 10 MB and refuses later rows
    that differ, even in columns that nobody asked for; here every line stands for itself.
    """

    def parse(row: Row) -> Row:
        line = row["text"]
        if not line or line.isspace():
            return {config.text_field: None, config.difficulty_field: None}
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadRow(
                f"no valid JSON ({error}): {shorten(line)}. Each line of a .jsonl file must be one "
                "object; mend or remove it."
            ) from None
        if not isinstance(values, dict):
            raise BadRow(
                f"the line is {shorten(values)}, not an object. Each line of a .jsonl file must be one "
                'object, such as {"text": "…"}.'
            )
        return values

    return parse


def pin_revision(config: SourceConfig) -> SourceConfig:
    """The source with the revision of its hub data set as a commit; any other source as it is.

    Raises:
        CurriqError: the hub cannot be reached, or has no such data set or revision.
    """
    scheme, _, rest = config.path.partition(":")
    if scheme != "hub" or config.is_pinned:
        return config
    from huggingface_hub import HfApi

    name = rest.partition(":")[0]
    try:
        commit = HfApi().dataset_info(name, revision=config.hub_revision or None).sha
    except Exception as error:  # no connection, no such name or revision, no permission
        raise _hub_error(config, error) from error
    return dataclasses.replace(config, hub_revision=commit or config.hub_revision)


def _open_hub(config: SourceConfig, rest: str, seed: int) -> DocumentSource:
    name, _, subset = rest.partition(":")
    pinned = pin_revision(config)  # so that all epochs read one revision and the fingerprint can name it
    options = {"name": subset or None, "revision": pinned.hub_revision or None}
    columns = (config.text_field, config.difficulty_field)
    return StreamedSource(
        pinned,
        lambda: _stream(name, split=config.hub_split, **options),
        identity=lambda: short_hash("hub", name, subset, config.hub_split, pinned.hub_revision, *columns),
        explain=lambda error: _hub_error(pinned, error),
    )


def _hub_error(config: SourceConfig, error: Exception) -> CurriqError:
    name, _, subset = config.path.removeprefix("hub:").partition(":")
    where = (
        f"hub data set {name!r} (configuration {subset or 'default'}, split {config.hub_split!r}, revision "
        f"{config.hub_revision or 'newest'})"
    )
    return CurriqError(
        f"source {config.name!r}: the {where} cannot be read: {said(error)}. With a connection, check the "
        "name, the configuration, the split and the revision, and that HF_HUB_OFFLINE is not set. Without "
        f"one, download the data elsewhere and give its files: name={config.name},path=FOLDER/*.parquet."
    )


OPENERS: dict[str, Callable[[SourceConfig, str, int], DocumentSource]] = {
    "embedded": _open_embedded,
    "hub": _open_hub,
}
"""Word before the colon of a path → how it is opened; every other path is a local one."""


def _stream(path: str, *, split: str = "train", **options: Any) -> "datasets.IterableDataset":
    """`datasets.load_dataset(..., streaming=True)` without its bars and its log: what it has to say
    stands in the exception that it raises."""
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
