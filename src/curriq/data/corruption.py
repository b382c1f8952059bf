"""How documents are spoiled, to see whether a curriculum learns to avoid them.

Three kinds, by where they act: on the text (`ocr`), on the tokens (`random-tokens`, `shuffled-tokens`)
and on the choice of documents (`duplicates`). Each kind of function leaves alone what is not its own, so
a caller applies all three with the name of the source's corruption and branches nowhere:

    source = corrupted_source(corruption, source, seed)
    rng = document_rng(seed, source.name, document, source.epoch)
    ids = corrupt_tokens(corruption, encode(corrupt_text(corruption, document.text, rng)), vocabulary, rng)

Nothing here has a state to save. The randomness of a document follows from (seed, source, document key,
epoch), so a resumed run spoils each document exactly as the uninterrupted one does, and a document is
spoiled afresh in each epoch. A spoiled document keeps the key of the clean one: apply the split by key
first, and no spoiled copy of a held-out document enters the stream.
"""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from curriq.config import CorruptionName
from curriq.data.documents import Document, DocumentSource, MemorySource, read_epoch
from curriq.rng import derive_seed
from curriq.types import State

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
"""What a scanner takes for what: look-alike letters, joined and broken ones, and lost spaces."""
_STRAY_MARKS = ".,'`~^:;-|*\"_"
_LINE_BREAK_SHARE = 0.1
_STRAY_MARK_SHARE = 0.1

TextDirt = Callable[[str, np.random.Generator], str]
TokenDirt = Callable[[list[int], Int[np.ndarray, "V"], np.random.Generator], list[int]]


def document_rng(seed: int, source: str, document: Document, epoch: int) -> np.random.Generator:
    """The generator that spoils one document of one source in one epoch."""
    return np.random.default_rng(derive_seed(seed, f"dirt/{source}/{document.key}/{epoch}"))


def corrupt_text(name: CorruptionName, text: str, rng: np.random.Generator) -> str:
    """The text as the corruption called `name` leaves it; unchanged when that corruption does not act on text."""
    spoil = TEXT_DIRT.get(name)
    return text if spoil is None else spoil(text, rng)


def corrupt_tokens(
    name: CorruptionName, ids: list[int], vocabulary: Int[np.ndarray, "V"], rng: np.random.Generator
) -> list[int]:
    """The tokens of a document as the corruption called `name` leaves them; as many as before.

    Args:
        name: name of the corruption; the ids are unchanged when it does not act on tokens.
        ids: token ids of the document, without EOS.
        vocabulary: ids that random tokens are drawn from, see `tokenizer.ordinary_ids`.
        rng: generator of the document, see `document_rng`.
    """
    spoil = TOKEN_DIRT.get(name)
    return ids if spoil is None else spoil(ids, vocabulary, rng)


def corrupted_source(name: CorruptionName, source: DocumentSource, seed: int) -> DocumentSource:
    """The source as the corruption called `name` leaves it; the source itself when it keeps all documents."""
    wrap = SOURCE_DIRT.get(name)
    return source if wrap is None else wrap(source, seed)


def ocr_errors(text: str, rng: np.random.Generator) -> str:
    """Errors of a bad scan at 8 % of the characters: look-alikes (rn → m, l → 1, e → c, O → 0), lost
    spaces, words broken by a hyphen and a line break, stray punctuation."""
    hits = np.flatnonzero(rng.random(len(text)) < OCR_ERROR_RATE).tolist()
    kinds = rng.random(len(hits)).tolist()
    marks = rng.integers(len(_STRAY_MARKS), size=len(hits)).tolist()
    pieces: list[str] = []
    done = 0  # characters of the text that are already written
    for hit, kind, mark in zip(hits, kinds, marks, strict=True):
        if hit < done:
            continue  # inside a pair that has just been replaced
        read, written = _ocr_error(text, hit, kind, _STRAY_MARKS[mark])
        pieces += (text[done:hit], written)
        done = hit + read
    return "".join((*pieces, text[done:]))


def _ocr_error(text: str, at: int, kind: float, mark: str) -> tuple[int, str]:
    """Characters that one error swallows, and what it puts in their place; `kind` lies in [0, 1)."""
    inside_word = text[at].isalpha() and at > 0 and text[at - 1].isalpha()
    if kind < _LINE_BREAK_SHARE and inside_word:
        return 0, "-\n"
    if kind >= 1 - _STRAY_MARK_SHARE:
        return 0, mark
    for length in (2, 1):
        if (seen := _CONFUSIONS.get(text[at : at + length])) is not None:
            return length, seen
    return 0, mark


def random_tokens(ids: list[int], vocabulary: Int[np.ndarray, "V"], rng: np.random.Generator) -> list[int]:
    """As many tokens, each drawn uniformly from the vocabulary."""
    return rng.choice(vocabulary, size=len(ids)).tolist()


def shuffled_tokens(ids: list[int], vocabulary: Int[np.ndarray, "V"], rng: np.random.Generator) -> list[int]:
    """The same tokens in random order: right unigrams, no syntax."""
    return rng.permutation(np.asarray(ids, dtype=np.int64)).tolist()


class Duplicates:
    """A source whose every document is one of a few documents of another source, repeated exactly.

    These few are the first ones of the wrapped source (an embedded source hands out a random sample);
    an epoch is one permutation of them. Wrap a source from which held-out documents are already taken
    away. They are read again on resume, so the state is (epoch, position) alone.

    Args:
        source: source at its beginning; nobody else may read from it.
        seed: seed of the run.
        distinct: number of distinct documents; fewer when the source has fewer.
    """

    def __init__(self, source: DocumentSource, seed: int, distinct: int = DISTINCT_DUPLICATES) -> None:
        self.name = source.name
        self._fingerprint = source.fingerprint
        documents = tuple(itertools.islice(read_epoch(source), distinct))
        self._repeated = MemorySource(f"{source.name}/duplicates", documents, seed)

    @property
    def epoch(self) -> int:
        return self._repeated.epoch

    def next_document(self) -> Document | None:
        return self._repeated.next_document()

    def fingerprint(self) -> str:
        return self._fingerprint()

    def state_dict(self) -> State:
        return self._repeated.state_dict()

    def load_state_dict(self, state: State) -> None:
        self._repeated.load_state_dict(state)


TEXT_DIRT: dict[str, TextDirt] = {"ocr": ocr_errors}
TOKEN_DIRT: dict[str, TokenDirt] = {"random-tokens": random_tokens, "shuffled-tokens": shuffled_tokens}
SOURCE_DIRT: dict[str, Callable[[DocumentSource, int], DocumentSource]] = {"duplicates": Duplicates}
