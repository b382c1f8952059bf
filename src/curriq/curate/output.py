"""The kept rows with all their columns, and their score and rank beside them, as a file or a data set."""

import json
import logging
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from curriq.curate.rows import Rows
from curriq.data.files import COMPRESSIONS, extension_of, user_path
from curriq.errors import CurriqError
from curriq.runlog.storage import make_folder, replacing

_log = logging.getLogger("curriq")

ROW_GROUP = 1 << 16
GROUP_BYTES = 1 << 25
"""A row group of a table ends where it has so many rows or bytes."""
FEATURES = b"huggingface"
"""Key of a schema's metadata in which `datasets` keeps what Arrow does not know, such as names of classes."""


@dataclass(frozen=True)
class Columns:
    """The columns that are added: names, and values by a document's place in the corpus."""

    score_name: str
    rank_name: str
    score: np.ndarray
    rank: np.ndarray

    def json(self, document: int) -> bytes:
        score = float(self.score[document])
        value = {
            self.score_name: score if math.isfinite(score) else None,
            self.rank_name: int(self.rank[document]),
        }
        return json.dumps(value).encode()

    def add(self, table: pa.Table, documents: np.ndarray) -> pa.Table:
        scored = table.append_column(self.score_name, pa.array(self.score[documents], pa.float64()))
        return scored.append_column(self.rank_name, pa.array(self.rank[documents], pa.int64()))


class Output(ABC):
    """Where kept rows go; it replaces what was there when all are written, or nothing."""

    @abstractmethod
    def write(self, rows: Rows) -> None: ...


class JsonLines(Output):
    def __init__(self, stream: Any, columns: Columns) -> None:
        self._stream, self._columns = stream, columns

    def write(self, rows: Rows) -> None:
        for document, line in zip(rows.documents.tolist(), rows.lines(), strict=True):
            # Beside the columns as they were spelled: no number and no escape of the input changes.
            own = line.rstrip()[:-1].rstrip()
            self._stream.write(own + b", " + self._columns.json(document)[1:] + b"\n")


class Tables(Output):
    """Tables in a scratch folder, whose columns need not agree before the last one is known."""

    def __init__(self, scratch: Path, columns: Columns) -> None:
        self._scratch, self._columns = scratch, columns
        self._schemas: list[pa.Schema] = []
        self._features: set[bytes | None] = set()

    def write(self, rows: Rows) -> None:
        file = self._scratch / f"{len(self._schemas)}.parquet"
        with _one_table(f"the rows of source {rows.config.name!r}"):
            table = self._columns.add(rows.table(), rows.documents)
            parquet.write_table(table.replace_schema_metadata(None), file, compression="zstd")
            # That of the file, which is another one where Parquet has no such type: of a dictionary of
            # numbers it holds the numbers.
            self._schemas.append(parquet.read_schema(file).remove_metadata())
        self._features.add((table.schema.metadata or {}).get(FEATURES))

    def join(self, path: Path) -> None:
        """Write all rows into one Parquet file; a column that some rows lack is null there."""
        with _one_table("the rows"):
            schema = pa.unify_schemas(self._schemas, promote_options="permissive")
            schema = schema.with_metadata(self._metadata(schema.names))
            with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
                for group in self._groups(schema):
                    writer.write_table(group, row_group_size=len(group))

    def _groups(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """All rows, in tables of the size of a row group."""
        # Schema.empty_table() has none for extension types.
        none = pa.Table.from_arrays([pa.nulls(0, kind) for kind in schema.types], schema=schema)
        waiting: list[pa.Table] = []
        for number in range(len(self._schemas)):
            table = parquet.read_table(self._scratch / f"{number}.parquet")
            joined = pa.concat_tables([none, table], promote_options="permissive")
            waiting.append(joined.select(schema.names).cast(schema))
            if sum(map(len, waiting)) >= ROW_GROUP or sum(part.nbytes for part in waiting) >= GROUP_BYTES:
                yield pa.concat_tables(waiting)
                waiting = []
        if waiting:
            yield pa.concat_tables(waiting)

    def _metadata(self, names: list[str]) -> dict[bytes, bytes] | None:
        """The features of the inputs with those of the new columns; None, with a warning where there were
        any, unless all rows have the same ones."""
        if self._features <= {None}:
            return None
        try:
            (found,) = map(json.loads, filter(None, self._features))
            features = found["info"]["features"]
            new = {self._columns.score_name: "float64", self._columns.rank_name: "int64"}
            features |= {name: {"dtype": kind, "_type": "Value"} for name, kind in new.items()}
            known = None not in self._features and {*features} == {*names}
        except (ValueError, LookupError, TypeError):
            known = False
        if not known:
            _log.warning(
                "the rows have different features, or some have none: what `datasets` knows of their "
                "columns, such as names of classes, is not written."
            )
            return None
        return {FEATURES: json.dumps({"info": {"features": features}}).encode()}


@contextmanager
def _one_table(rows: str) -> Generator[None]:
    """CurriqError in place of what Arrow raises for rows that no Parquet file holds."""
    try:
        yield
    except (pa.ArrowException, NotImplementedError, OverflowError, UnicodeEncodeError) as error:
        raise CurriqError(
            f"{rows} do not fit into one table: {error}. Write JSON Lines, which keep each row as it is: "
            "--out NAME.jsonl."
        ) from error


DATA_SET = {"state.json", "dataset_info.json"}
"""What `save_to_disk` writes beside its Arrow files."""


def is_folder(out: Path, text: str) -> bool:
    """Whether the output is a folder for `datasets.load_from_disk`: a name with an end slash or without an
    extension."""
    return text.endswith("/") or not out.suffix


def require_not_read(text: str, inputs: Iterable[Path]) -> None:
    """Raise CurriqError where the output is one of the files that are read, or a folder that holds one."""
    out = user_path(text).resolve()
    for path in inputs:
        if out == path.resolve():
            raise CurriqError(f"--out {text} is one of the files that are read: choose another name.")
        if out in path.resolve().parents:
            raise CurriqError(f"--out {text} holds {path}, which is read: choose another name.")


def _require_replaceable(text: str, folder: Path) -> None:
    """Raise CurriqError for a folder that holds anything but a data set as `save_to_disk` writes it."""
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name not in DATA_SET and not name.endswith(".arrow")]
    if others or (names and "state.json" not in names):
        raise CurriqError(
            f"--out {text} is a folder with other files in it ({(others or names)[0]}), and --overwrite "
            "replaces only a data set that was written before: choose another name, such as "
            f"{folder / 'clean.jsonl'}."
        )
    if folder.resolve() in (here := Path.cwd(), *here.parents):
        raise CurriqError(f"--out {text} is the folder that this command runs in: choose another name.")


def check_output(text: str, *, overwrite: bool, inputs: Iterable[Path]) -> Path:
    """The path of the output.

    Raises:
        CurriqError: it is of no known kind, exists, holds what is read, or is a folder with other files.
    """
    out = user_path(text)
    if not is_folder(out, text) and extension_of(out) not in (".jsonl", ".parquet"):
        raise CurriqError(
            f"--out {text}: write .jsonl (also .jsonl.gz, .jsonl.zst), .parquet, or a name without an "
            "extension for a folder that datasets.load_from_disk opens."
        )
    if extension_of(out) == ".parquet" and out.suffix in COMPRESSIONS:
        raise CurriqError(f"--out {text}: a Parquet file is compressed inside: leave {out.suffix} out.")
    require_not_read(text, inputs)
    if out.exists() and not overwrite:
        raise CurriqError(f"--out {text} exists: choose another name, or replace it with --overwrite.")
    if out.exists() and out.is_dir() != is_folder(out, text):
        raise CurriqError(
            f"--out {text} exists and is {'a' if out.is_dir() else 'no'} folder: remove it first."
        )
    if out.is_dir():
        _require_replaceable(text, out)
    return out


@contextmanager
def open_output(out: Path, columns: Columns) -> Generator[Output]:
    """What writes the output; the name appears when all is written."""
    make_folder(out.absolute().parent)
    if extension_of(out) == ".jsonl":
        with replacing(out) as temporary:
            compression = COMPRESSIONS.get(out.suffix.lower())
            with pa.output_stream(str(temporary), compression=compression) as stream:
                yield JsonLines(stream, columns)
        return
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".tmp-{out.name}-") as scratch:
        tables = Tables(Path(scratch), columns)
        yield tables
        if extension_of(out) == ".parquet":
            with replacing(out) as temporary:
                tables.join(temporary)
        else:
            _save_to_disk(tables, Path(scratch), out)


def _save_to_disk(tables: Tables, scratch: Path, out: Path) -> None:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    tables.join(scratch / "all.parquet")
    try:
        data = datasets.Dataset.from_parquet(str(scratch / "all.parquet"), cache_dir=str(scratch / "cache"))
        assert isinstance(data, datasets.Dataset)
        data.save_to_disk(str(scratch / "saved"))
    except (ValueError, DatasetGenerationError) as error:  # maps, for instance
        raise CurriqError(
            f"the rows do not fit into a data set: {error.__cause__ or error}. A Parquet file holds them: "
            f"--out {out.name}.parquet."
        ) from error
    if out.exists():
        out.replace(scratch / "before")  # goes with the scratch, when the new one has its name
    (scratch / "saved").replace(out)


def write_kept(rows: Iterator[Rows], output: Output, kept: np.ndarray, sample: dict[int, str]) -> None:
    """Write the kept rows; `sample` has places of documents as keys and gets their texts."""
    for piece in rows:
        wanted = [place for place in range(len(piece.documents)) if int(piece.documents[place]) in sample]
        for place in wanted:
            sample[int(piece.documents[place])] = piece.text(place)
        mask = kept[piece.documents]
        if mask.any():
            output.write(piece.take(np.flatnonzero(mask)))
