"""Corruptions of a source, to test whether a curriculum learns to avoid noise.

Each acts in one place: on the text (`ocr`), on the tokens (`random-tokens`, `shuffled-tokens`) or on the
choice of documents (`duplicates`). The functions for the other places return their input unchanged.

There is no state to save: the noise in a document follows from (seed, source, document key, epoch), so a
resumed run repeats it exactly and each epoch has its own. A corrupted document keeps the key of the clean
one. Split by key first, and no corrupted copy of a held-out document enters the stream.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from curriq.config import CorruptionName
from curriq.data.documents import WHOLE, Document, DocumentSource, MemorySource, Shard, read_epoch
from curriq.rng import derive_seed

OCR_ERROR_RATE = 0.08
"""Share of the characters where an error begins. Real scans of old prints lie between 0.02 and 0.2."""
DISTINCT_DUPLICATES = 16
"""Documents that a source of duplicates repeats."""

_CONFUSIONS = {
    "rn": "m", "cl": "d", "vv": "w", "li": "h", "ri": "n", "fi": "h", "m": "rn", "d": "cl", "w": "vv",
    "l": "1", "I": "l", "i": "j", "1": "l", "e": "c", "c": "e", "O": "0", "0": "O", "o": "0", "a": "o",
    "n": "u", "u": "n", "h": "b", "b": "h", "t": "f", "f": "t", "s": "5", "S": "5", "B": "8", "g": "9",
    "y": "v", "v": "y", "r": "v", "p": "n", "T": "7", "E": "F", "A": "4", "D": "O", "G": "C", "k": "lc",
    " ": "",
}  # fmt: skip
"""Confusions of optical character recognition: look-alike letters, joined and broken ones, lost spaces."""
_STRAY_MARKS = ".,'`~^:;-|*\"_"
_LINE_BREAK_SHARE = 0.1
_STRAY_MARK_SHARE = 0.1


def document_rng(seed: int, source: str, document: Document, epoch: int) -> np.random.Generator:
    """The generator of the noise in one document of one source in one epoch."""
    # The word of the first release: another one would give other noise.
    return np.random.default_rng(derive_seed(seed, f"dirt/{source}/{document.key}/{epoch}"))


def corrupt_text(name: CorruptionName, text: str, rng: np.random.Generator) -> str:
    """The text under a corruption; unchanged when that corruption does not act on text."""
    return ocr_errors(text, rng) if name == "ocr" else text


def corrupt_tokens(
    name: CorruptionName,
    ids: Sequence[int] | Int[np.ndarray, "n"],
    vocabulary: Int[np.ndarray, "V"],
    rng: np.random.Generator,
) -> Sequence[int] | Int[np.ndarray, "n"]:
    """The tokens of a document under a corruption, as many as before: uniform ones of the vocabulary, or its
    own in random order; unchanged when that corruption does not act on tokens."""
    if name == "random-tokens":
        return rng.choice(vocabulary, size=len(ids)).tolist()
    if name == "shuffled-tokens":  # right unigrams, no syntax
        return rng.permutation(np.asarray(ids, dtype=np.int64)).tolist()
    return ids


def ocr_errors(text: str, rng: np.random.Generator) -> str:
    """Errors of a bad scan at 8 % of the characters: look-alikes (rn → m, l → 1, e → c, O → 0), lost
    spaces, words broken by a hyphen and a line break, stray punctuation."""
    hits = np.flatnonzero(rng.random(len(text)) < OCR_ERROR_RATE).tolist()
    kinds = rng.random(len(hits)).tolist()
    marks = rng.integers(len(_STRAY_MARKS), size=len(hits)).tolist()
    pieces: list[str] = []
    done = 0  # characters of the text that are already in `pieces`
    for hit, kind, mark in zip(hits, kinds, marks, strict=True):
        if hit < done:
            continue  # inside a pair that was just replaced
        read, written = _ocr_error(text, hit, kind, _STRAY_MARKS[mark])
        pieces += (text[done:hit], written)
        done = hit + read
    return "".join((*pieces, text[done:]))


def _ocr_error(text: str, at: int, kind: float, mark: str) -> tuple[int, str]:
    """Number of characters that one error replaces, and their replacement; `kind` lies in [0, 1)."""
    inside_word = text[at].isalpha() and at > 0 and text[at - 1].isalpha()
    if kind < _LINE_BREAK_SHARE and inside_word:
        return 0, "-\n"
    if kind >= 1 - _STRAY_MARK_SHARE:
        return 0, mark
    for length in (2, 1):
        if (seen := _CONFUSIONS.get(text[at : at + length])) is not None:
            return length, seen
    return 0, mark


class Duplicates(MemorySource):
    """A few documents of another source, repeated exactly.

    They are the first ones of that source (for an embedded source a random sample), and an epoch is one
    permutation of them. They are read again on resume, so the state is (epoch, position) alone. Nobody else
    may read from the source.

    Every shard repeats the same documents, each in an order of its own: more of them would be less repeated.
    """

    def __init__(
        self,
        source: DocumentSource,
        seed: int,
        distinct: int = DISTINCT_DUPLICATES,
        shard: Shard = WHOLE,
    ) -> None:
        documents = tuple(itertools.islice(read_epoch(source), distinct))
        purpose = "/duplicates" + (f"/{shard.number}" if shard != WHOLE else "")
        super().__init__(source.name, documents, seed, purpose=purpose)
        self._source = source
        self.skipped = source.skipped if shard.number == 0 else 0

    def fingerprint(self) -> str:
        return self._source.fingerprint()
