"""Scores a corpus: chunks of rows through worker processes into files, from which a stopped call goes on."""

import json
import logging
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from curriq.curate.documents import Done, NgramScore, Worker
from curriq.curate.inputs import BEGINNING, Inputs, Place, read_chunks
from curriq.curate.pool import ordered_map
from curriq.data.ngrams import Cut, NgramCounts
from curriq.errors import CurriqError
from curriq.runlog.storage import exclusive, replacing, write_atomically
from curriq.train.interrupt import stop_flag

if TYPE_CHECKING:
    import transformers

_log = logging.getLogger("curriq")

PART_CHARACTERS = 1 << 26
"""Text of a file of scores: what a stopped call has to do again, at most."""
NAMED_ROWS = 5
"""Skipped rows that are named in the log; the others are counted."""


@runtime_checkable
class Judge(Protocol):
    """Gives windows their scores, in the process that writes."""

    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def dsir(self) -> NgramScore | None: ...
    @property
    def reads_text(self) -> bool: ...

    def __call__(self, cut: Cut, dsir: np.ndarray | None, source: int) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class Scorer:
    """How a corpus is scored.

    Attributes:
        name: of the run or the target, for messages.
        key: identity: equal for equal scores of equal files.
        length: T, tokens per window.
        judge: the scores.
        default: the score that documents are ranked by where nothing else is said.
    """

    name: str
    key: str
    tokenizer: "transformers.PreTrainedTokenizerBase"
    length: int
    judge: Judge
    default: str


@dataclass
class Totals:
    """What has been read."""

    rows: int = 0
    empty: int = 0
    skipped: int = 0
    characters: int = 0
    columns: list[str] = field(default_factory=list)

    def add(self, done: Done) -> None:
        self.rows += done.read
        self.empty += done.empty
        for problem in done.bad[: max(0, NAMED_ROWS - self.skipped)]:
            _log.warning(f"{problem} The row is skipped.")
        self.skipped += len(done.bad)
        self.characters += done.characters
        self.columns = sorted({*self.columns, *done.columns})


@dataclass
class Part:
    """Scores that wait to be written."""

    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    characters: int = 0

    def add(self, done: Done, scores: dict[str, np.ndarray]) -> None:
        per_document = done.cut.per_document
        number = np.arange(len(done.cut.windows))
        number -= np.repeat(per_document.cumsum() - per_document, per_document)
        found = {
            "file": np.full(len(number), done.file, np.int32),
            "row": done.rows[done.cut.document],
            "window": number.astype(np.int32),
            "tokens": done.cut.windows.astype(np.int32),
            "learnt": done.cut.taught.astype(np.int32),
        }
        for name, values in (found | {name: v.astype(np.float32) for name, v in scores.items()}).items():
            self.columns.setdefault(name, []).append(values)
        self.characters += done.characters

    def table(self, meta: dict[str, Any]) -> pa.Table:
        table = pa.table({name: np.concatenate(values) for name, values in self.columns.items()})
        return table.replace_schema_metadata({b"curriq": json.dumps(meta).encode()})


class ScoreFolder:
    """The scores of one corpus by one scorer, in parts; `about.json` says of what.

    Attributes:
        folder: named after the identity of scorer and files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def progress(self) -> tuple[Place, Totals, bool]:
        """Where reading goes on, what has been read, and whether that is all."""
        parts = self.parts()
        if not parts:
            return BEGINNING, Totals(), False
        try:
            meta = json.loads(parquet.read_schema(parts[-1]).metadata[b"curriq"])
            return Place(*meta["next"]), Totals(**meta["totals"]), meta["finished"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.damaged(parts[-1]) from error

    def damaged(self, part: Path) -> CurriqError:
        return CurriqError(f"{part} is damaged: remove the folder {self.folder}, and score again.")

    def add(self, part: Part, after: Place, totals: Totals, *, finished: bool) -> None:
        """Write a part, which is there whole or not at all."""
        table = part.table({"next": list(after), "totals": asdict(totals), "finished": finished})
        with replacing(self.folder / f"part-{len(self.parts()):05d}.parquet") as temporary:
            parquet.write_table(table, temporary, compression="zstd")

    def tables(self) -> Iterator[pa.Table]:
        """The parts, one row per window."""
        for part in self.parts():
            try:
                yield parquet.read_table(part)
            except (OSError, ValueError) as error:
                raise self.damaged(part) from error

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


Advance = Callable[[int], None]
"""Told of the characters that have been read."""


def score_corpus(
    inputs: Inputs, scorer: Scorer, scores: ScoreFolder, workers: int, advance: Advance
) -> Totals:
    """Score what the folder does not hold yet; returns what has been read in all.

    The result is the same, bit by bit, for any number of workers and wherever a call was stopped.

    Raises:
        CurriqError: a file cannot be read on, or another process writes the folder.
        KeyboardInterrupt: a stop was requested; what has been scored is in the folder.
    """
    with _locked(scores.folder):
        start, totals, finished = scores.progress()
        advance(totals.characters)
        if finished:
            return totals
        _write_about(inputs, scorer, scores)
        judge, part = scorer.judge, Part()
        worker = Worker(
            inputs,
            scorer.tokenizer,
            scorer.length,
            dsir=judge.dsir,
            keeps_tokens=judge.reads_text,
        )
        after = start
        chunks = ordered_map(worker.score, read_chunks(inputs, start), workers)
        with stop_flag("piece of text") as stopped, closing(chunks):
            for done in chunks:
                position = inputs.sources[inputs.files[done.file].source].position
                part.add(done, judge(done.cut, done.dsir, position))
                totals.add(done)
                after = done.after
                advance(done.characters)
                if part.characters >= PART_CHARACTERS or stopped():
                    scores.add(part, after, totals, finished=False)
                    part = Part()
                if stopped():
                    raise KeyboardInterrupt
        if not part.columns:  # a part ended where the corpus does
            part.add(_nothing(), judge(_nothing().cut, np.zeros(0), 0))
        scores.add(part, after, totals, finished=True)
    return totals


def _nothing() -> Done:
    none = np.zeros(0, np.int64)
    cut = Cut(none, None, none, none, none, none)
    return Done(0, none, cut, np.zeros(0), 0, [], set(), 0, 0, BEGINNING)


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    refusal = f"another process is writing the scores in {folder}: wait for it, or name another --scores."
    with exclusive(folder, refusal):
        yield


def _write_about(inputs: Inputs, scorer: Scorer, scores: ScoreFolder) -> None:
    about = {
        "scored by": scorer.name,
        "window": scorer.length,
        "columns": scorer.judge.columns,
        "files": [str(file.path) for file in inputs.files],
    }
    write_atomically(scores.folder / "about.json", json.dumps(about, indent=1).encode())


def count_corpus(
    inputs: Inputs,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    length: int,
    every: int,
    workers: int,
    advance: Advance,
) -> NgramCounts:
    """The n-grams of one of `every` rows of the corpus: what the target is compared with."""
    worker, total = Worker(inputs, tokenizer, length), NgramCounts.none()
    for counts, characters in ordered_map(worker.count, read_chunks(inputs, every=every), workers):
        total = total + counts
        advance(characters)
    return total
