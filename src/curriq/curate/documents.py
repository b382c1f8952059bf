"""From raw rows to tokens cut into windows: the work of one chunk, in whichever process it is done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curriq.config import SourceConfig
from curriq.curate.inputs import Chunk, Inputs, Place
from curriq.data.chat import encode_chat
from curriq.data.columns import document_of
from curriq.data.documents import Document
from curriq.data.files import extension_of
from curriq.data.ngrams import Cut, NgramCounts, window_lengths
from curriq.data.rows import FORMATS, BadRow
from curriq.data.words import FastEncoder
from curriq.errors import CurriqError

if TYPE_CHECKING:
    import transformers

NO_TOKENS = np.zeros(0, np.int32)
TARGET = "target"
"""Name of the source that holds the target's documents; those of the corpus are named after their files."""
NgramScore = Callable[[Cut], np.ndarray]
"""Documents cut into windows → the score of each window; can be pickled."""


@dataclass(frozen=True)
class Parsed:
    """The documents of a chunk.

    Attributes:
        rows: numbers of the documents' rows.
        empty: rows without text.
        bad: what is wrong with rows that were skipped, and where they are.
        columns: names of all columns.
    """

    rows: list[int]
    documents: list[Document]
    empty: int
    bad: list[str]
    columns: set[str]


def parse(chunk: Chunk, path: Path, config: SourceConfig) -> Parsed:
    """The documents of a chunk; CurriqError for a bad row that is not to be skipped."""
    form = FORMATS[extension_of(path)]
    parsed = Parsed([], [], 0, [], set())
    empty = 0
    for number, raw in zip(chunk.rows, chunk.raw, strict=True):
        try:
            row = form.parse(raw, config)
            document = document_of(row, config)
        except BadRow as error:
            option = "--target-text-field" if config.name == TARGET else "--text-field"
            how = str(error).replace("text_field=COLUMN", f"{option} COLUMN")
            problem = f"{form.unit} {number + 1} of {path}: {how}"
            if config.on_bad_row == "error":
                raise CurriqError(f"{problem} To go on without such rows, add --on-bad-row skip.") from None
            parsed.bad.append(problem)
            continue
        parsed.columns.update(row)
        if document is None:
            empty += 1
        else:
            parsed.rows.append(number)
            parsed.documents.append(document)
    return replace(parsed, empty=empty)


class Cutter:
    """Cuts documents into windows of T = `length` tokens."""

    def __init__(self, tokenizer: "transformers.PreTrainedTokenizerBase", length: int) -> None:
        self._tokenizer = tokenizer
        self._encode = FastEncoder(tokenizer)
        self._length = length

    def __call__(self, documents: Sequence[Document]) -> tuple[list[int], Cut]:
        """The places of the documents that have a learnt token, and these documents cut into windows."""
        plain = iter(self._encode([d.text for d in documents if d.messages is None]))
        kept, ids, learnt = [], [], []
        for place, document in enumerate(documents):
            if document.messages is None:
                tokens = next(plain)
                mask = np.ones(len(tokens), bool)
            else:
                listed, turns = encode_chat(self._tokenizer, document.messages)
                tokens, mask = np.asarray(listed, np.int32), np.asarray(turns, bool)
            if mask.any():
                kept.append(place)
                ids.append(tokens)
                learnt.append(mask)
        sizes = np.array([len(tokens) for tokens in ids], np.int64)
        windows, per_document = window_lengths(sizes, self._length)
        all_learnt = all(document.messages is None for document in documents)
        mask = np.concatenate([np.zeros(0, bool), *learnt])
        first = windows.cumsum() - windows
        cut = Cut(
            tokens=np.concatenate([NO_TOKENS, *ids]),
            learnt=None if all_learnt else mask,
            windows=windows,
            per_document=per_document,
            numbers=np.array([documents[place].number for place in kept], np.int64),
            taught=np.add.reduceat(mask, first, dtype=np.int64) if len(first) else first,
        )
        return kept, cut


@dataclass(frozen=True)
class Done:
    """What has been made of a chunk.

    Attributes:
        rows: of the documents, int64.
        cut: the documents' windows, without tokens where nobody reads them.
        dsir: score of each window; None where it is not asked for.
        empty: rows without a token to learn.
    """

    file: int
    rows: np.ndarray
    cut: Cut
    dsir: np.ndarray | None
    empty: int
    bad: list[str]
    columns: set[str]
    characters: int
    read: int
    after: Place


class Worker:
    """Does the work of a chunk; it is sent to every process once.

    Args:
        dsir: the score of windows by their n-grams; None for no such score.
        keeps_tokens: for scores that take a forward pass.
    """

    def __init__(
        self,
        inputs: Inputs,
        tokenizer: "transformers.PreTrainedTokenizerBase",
        length: int,
        *,
        dsir: NgramScore | None = None,
        keeps_tokens: bool = False,
    ) -> None:
        self._files = [(file.path, inputs.config(place)) for place, file in enumerate(inputs.files)]
        self._tokenizer, self._length = tokenizer, length
        self._dsir, self._keeps_tokens = dsir, keeps_tokens
        self._cutter: Cutter | None = None

    def score(self, chunk: Chunk) -> Done:
        """The scored windows of a chunk."""
        parsed = parse(chunk, *self._files[chunk.file])
        kept, cut = self._cut(parsed.documents)
        return Done(
            file=chunk.file,
            rows=np.array([parsed.rows[place] for place in kept], np.int64),
            cut=cut if self._keeps_tokens else replace(cut, tokens=NO_TOKENS, learnt=None),
            dsir=None if self._dsir is None else self._dsir(cut),
            empty=parsed.empty + len(parsed.documents) - len(kept),
            bad=parsed.bad,
            columns=parsed.columns,
            characters=chunk.characters,
            read=len(chunk.rows),
            after=chunk.after,
        )

    def count(self, chunk: Chunk) -> tuple[NgramCounts, int]:
        """The n-grams of a chunk's documents, and its characters."""
        _, cut = self._cut(parse(chunk, *self._files[chunk.file]).documents)
        return NgramCounts.of(cut, of_target=False), chunk.characters

    def _cut(self, documents: Sequence[Document]) -> tuple[list[int], Cut]:
        if self._cutter is None:  # made in the process that uses it
            self._cutter = Cutter(self._tokenizer, self._length)
        return self._cutter(documents)
