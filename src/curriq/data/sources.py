"""Opens a source of documents: the embedded corpus, local files, or a data set of the Hugging Face hub.

Local files are streamed by `data.rows`, hub data sets by `datasets`; nothing is held in memory or written to
disk, and the position is exact to the row. Documents come in the order of the files: the shuffle buffer of
`datasets` is not resumable, so windows are shuffled further down the stream instead.
"""

import abc
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curriq.config import SourceConfig, did_you_mean
from curriq.data.columns import document_of
from curriq.data.documents import (
    WHOLE,
    Document,
    DocumentSource,
    MemorySource,
    Shard,
    short_hash,
    too_few_documents,
)
from curriq.data.embedded import KINDS, corpus_version, embedded_documents
from curriq.data.files import extension_of, find_files
from curriq.data.hub import hub, is_hub_name
from curriq.data.rows import FORMATS, BadRow, Row
from curriq.errors import CurriqError
from curriq.state import State

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger("curriq")

_END = object()
NAMED_ROWS = 5
"""Skipped rows of a source that are named in the log; the others are counted."""


def open_source(
    config: SourceConfig, seed: int, *, named_rows: int = NAMED_ROWS, shard: Shard = WHOLE
) -> DocumentSource:
    """The source that `config.path` names, at its beginning; the stream applies weight and corruption.

    Args:
        seed: decides the order of the embedded corpus; files keep theirs.
        named_rows: how many of the rows that are skipped are named in the log.
        shard: the part of the documents that is read.

    Raises:
        CurriqError: nothing matches the path, its format is unknown, or it cannot be read.
    """
    scheme, _, kind = config.path.partition(":")
    if scheme == "hub":
        return HubSource(config, named_rows, shard)
    if scheme != "embedded":
        return LocalSource(config, named_rows, shard)
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS, "embedded:{}")
        known = " and ".join(f"embedded:{known}" for known in KINDS)
        raise CurriqError(f"source {config.name!r}: there is no {config.path}.{hint} There are {known}.")
    return MemorySource(config.name, embedded_documents(kind), seed, corpus_version(), shard=shard)


def local_paths(config: SourceConfig) -> list[Path]:
    """The local files that a source is read from; none for the embedded corpus and the hub."""
    scheme = config.path.partition(":")[0]
    return [] if scheme in ("hub", "embedded") else find_files(config).paths


def log_files(config: SourceConfig) -> None:
    """Log which files a local source reads, and which it leaves out."""
    if not config.path.startswith(("hub:", "embedded:")):
        _log.info(f"source {config.name!r} {find_files(config).summary()}.")


class NoText(CurriqError):
    """An epoch has ended without a document."""


class StreamedSource(abc.ABC):
    """Documents of a streamed data set, in its own order; each epoch is one pass.

    Attributes:
        skipped: rows that `on_bad_row = "skip"` has passed over, all epochs together.

    Raises:
        CurriqError: the data set cannot be opened. The same later when it cannot be read on, when a row does
            not fit and is not to be skipped, and when an epoch ends without any document.
    """

    def __init__(self, config: SourceConfig, named_rows: int, shard: Shard) -> None:
        self.name = config.name
        self.epoch = 0
        self.skipped = 0
        self._config = config
        self._named_rows = named_rows
        self._shard = shard
        self._count = 0  # documents handed out in this epoch

    @abc.abstractmethod
    def _next_row(self) -> Row | None:
        """The next row, None once at the end of each pass; raises `BadRow` for one that does not fit."""

    @abc.abstractmethod
    def _locate(self) -> str:
        """Where the row that was read last is to be found."""

    @abc.abstractmethod
    def _explain(self, error: Exception) -> CurriqError:
        """The error for the user that stands for an error of the library."""

    @abc.abstractmethod
    def fingerprint(self) -> str: ...

    def next_document(self) -> Document | None:
        while True:
            try:
                row = self._next_row()
                document = None if row is None else document_of(row, self._config)
            except BadRow as error:
                self._skip(error)
                continue
            if row is None:
                self._end_epoch()
                return None
            if document is not None:
                self._count += 1
                return document

    def state_dict(self) -> State:
        return {"epoch": self.epoch, "count": self._count, "skipped": self.skipped}

    def load_state_dict(self, state: State) -> None:
        self.epoch, self._count, self.skipped = state["epoch"], state["count"], state["skipped"]

    def _skip(self, error: BadRow) -> None:
        where = f"source {self.name!r}, {self._locate()}"
        if self._config.on_bad_row == "error":
            raise CurriqError(f"{where}: {error} To go on without such rows, add on_bad_row=skip.") from None
        self.skipped += 1
        if self.skipped <= self._named_rows:
            last = " Further ones are only counted." if self.skipped == self._named_rows else ""
            _log.warning(f"{where}, is skipped: {error}{last}")

    def _end_epoch(self) -> None:
        where = f"source {self.name!r} ({self._config.path})"
        rows = "1 row" if self.skipped == 1 else f"{self.skipped} rows"
        skipped = f", and {rows} skipped" if self.skipped else ""
        if self._count == 0 and self._shard != WHOLE:
            raise too_few_documents(self.name, self._shard)
        if self._count == 0:
            raise NoText(
                f"{where} holds no document with text: every text is empty{skipped}. Give it a file with "
                "text, or leave the source out."
            )
        if self.skipped and self._named_rows:
            _log.warning(f"{where}: {rows} skipped by the end of epoch {self.epoch}.")
        self.epoch += 1
        self._count = 0

    @contextlib.contextmanager
    def _explained(self) -> Generator[None, None, None]:
        """Turn any failure inside the library into an error for the user."""
        try:
            yield
        except CurriqError:
            raise
        except Exception as error:
            raise self._explain(error) from error


def describe(error: Exception) -> str:
    """Type and text of a library's error, without the full stop, for the middle of a sentence."""
    return f"{type(error).__name__}: {error}".rstrip(" .:\n")


class LocalSource(StreamedSource):
    """Documents of local files, one after another.

    A shard reads whole files where these can be dealt out evenly, and otherwise every so many-th row of all
    of them: it then passes over the other rows without parsing them.
    """

    def __init__(self, config: SourceConfig, named_rows: int = NAMED_ROWS, shard: Shard = WHOLE) -> None:
        super().__init__(config, named_rows, shard)
        self._files = find_files(config)
        self._format = FORMATS[self._files.extension]
        dealt = dealt_files(self._files.paths, shard)
        self._paths, self._rows_of = (self._files.paths, shard) if dealt is None else (dealt, WHOLE)
        self._seek(0, 0)
        if self._format.schema is not None:
            for file in range(len(self._paths)):
                self._seek(file, 0)
                with self._explained():
                    self._format.check(self._path, config)
        self._seek(0, 0)

    def fingerprint(self) -> str:
        config = self._config
        return short_hash(
            config.text_field, config.difficulty_field, config.documents, self._files.fingerprint()
        )

    def state_dict(self) -> State:
        return {**super().state_dict(), "file": self._file, "row": self._row}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._seek(state["file"], state["row"])

    def _seek(self, file: int, row: int) -> None:
        self._file = file
        self._row = row  # rows of this file that have been read
        self._rows: Iterator[Any] | None = None  # None: reading starts at this row

    @property
    def _path(self) -> Path:
        return self._files.readable(self._paths[self._file])

    def _next_row(self) -> Row | None:
        while self._file < len(self._paths):
            ours = self._rows_of.first(self._row, self._file)
            with self._explained():
                if self._rows is None:
                    rows = self._format.read(self._path, self._config, ours)
                    self._rows = itertools.islice(rows, 0, None, self._rows_of.count)
                raw = next(self._rows, _END)
            if raw is not _END:
                self._row = ours + 1
                return self._format.parse(raw, self._config)
            self._seek(self._file + 1, 0)
        self._seek(0, 0)
        return None

    def _locate(self) -> str:
        return f"{self._format.unit} {self._row} of {self._paths[self._file]}"

    def _explain(self, error: Exception) -> CurriqError:
        return unreadable(self._config, self._paths[self._file], self._row, error)


UNEVEN = 1.1
"""Most bytes of a shard that reads whole files, over the mean: a shard with less text repeats it sooner."""


def dealt_files(paths: list[Path], shard: Shard) -> list[Path] | None:
    """The shard's files, the largest first to the shard with the fewest bytes; None where the files cannot be
    dealt out evenly."""
    if shard == WHOLE:
        return paths
    sizes = [path.stat().st_size for path in paths]
    taken, owner = [0] * shard.count, dict[int, int]()
    for file in sorted(range(len(paths)), key=lambda i: (-sizes[i], i)):
        owner[file] = taken.index(min(taken))
        taken[owner[file]] += sizes[file]
    if min(taken) == 0 or max(taken) * shard.count > UNEVEN * sum(taken):
        return None
    return [path for file, path in enumerate(paths) if owner[file] == shard.number]


def unreadable(config: SourceConfig, path: Path, row: int, error: Exception) -> CurriqError:
    """The error for the user of a local file that cannot be read on after so many rows."""
    form, problem = FORMATS[extension_of(path)], str(error)
    if not isinstance(error, BadRow):
        problem = f"{describe(error)}. Check that the file is complete and matches its extension."
    return CurriqError(
        f"source {config.name!r}: {path} cannot be read as {form.name} after {form.unit} {row}: {problem}"
    )


class HubSource(StreamedSource):
    """Documents of a hub data set, at one revision: all epochs read it and the fingerprint names it."""

    def __init__(self, config: SourceConfig, named_rows: int = NAMED_ROWS, shard: Shard = WHOLE) -> None:
        super().__init__(pin_revision(config), named_rows, shard)
        with self._explained(), hub():
            self._dataset = self._open()
        self._start: State = {"row": 0, "dataset": self._dataset.state_dict()}
        self._seek(self._start)

    def fingerprint(self) -> str:
        config = self._config
        name, subset = _hub_name(config)
        columns = (config.text_field, config.difficulty_field)
        return short_hash("hub", name, subset, config.hub_split, config.hub_revision, *columns)

    def state_dict(self) -> State:
        # The library reports a state that has been loaded only once iteration has begun.
        dataset = self._resume if self._rows is None else self._dataset.state_dict()
        return {**super().state_dict(), "row": self._row, "dataset": dataset}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._seek(state)

    def _seek(self, state: State) -> None:
        self._row: int = state["row"]  # rows read in this epoch
        self._resume = state["dataset"]
        self._rows: Iterator[Row] | None = None  # None: iteration starts from self._resume

    def _open(self) -> "datasets.IterableDataset":
        """The data set at its beginning, without the library's bars and log: its exception says the same."""
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        config = self._config
        name, subset = _hub_name(config)
        subset, revision = subset or None, config.hub_revision or None
        dataset = datasets.load_dataset(
            name, name=subset, split=config.hub_split, revision=revision, streaming=True
        )
        if self._shard == WHOLE:
            return dataset
        from datasets.distributed import split_dataset_by_node

        # Whole files where their number is a multiple of the shards', otherwise every so many-th row.
        return split_dataset_by_node(dataset, rank=self._shard.number, world_size=self._shard.count)

    def _next_row(self) -> Row | None:
        with self._explained():
            if self._rows is None:
                self._dataset.load_state_dict(self._resume)
                self._rows = iter(self._dataset)
            row = next(self._rows, None)
        if row is None:
            self._seek(self._start)
        else:
            self._row += 1
        return row

    def _locate(self) -> str:
        return f"row {self._row} of {self._config.path}"

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
        with hub():
            commit = HfApi().dataset_info(name, revision=config.hub_revision or None).sha
    except Exception as error:  # no connection, no such name or revision, no permission
        raise _hub_error(config, error) from error
    return dataclasses.replace(config, hub_revision=commit or config.hub_revision)


def _hub_name(config: SourceConfig) -> tuple[str, str]:
    """Name and configuration of a hub data set; the latter is empty for the default one."""
    name, _, subset = config.path.removeprefix("hub:").partition(":")
    if not is_hub_name(name):
        raise CurriqError(
            f"source {config.name!r}: {name!r} in {config.path!r} is no name of a hub data set, which is "
            "NAME or OWNER/NAME. The path of local files is given without hub:."
        )
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
