"""The split by document hash, and the filter that keeps held-out text out of the stream.

A document's side follows from its key and the split's seed alone, so every arm with one split shares the
held-out sets, whatever its training seed. Near-duplicates of their documents, and longer documents that
contain one, are found exactly, by the shingles that they share, over an inverted index: each shingle's hash,
sorted, with its document's number. For so few documents that is cheaper than MinHash with locality-sensitive
hashing (Broder 1997, who defines resemblance and containment; Lee et al. 2022, "Deduplicating Training Data
Makes Language Models Better") and misses no pair.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt64

from curriq.config import DataConfig
from curriq.data.documents import Document

HeldOutName = Literal["reward", "validation", "test"]
Side = Literal["train", "reward", "validation", "test"]

_SALT = b"curriq-split-1"

SHINGLE_WORDS = 5
"""Words per shingle, as in Lee et al. 2022."""
SHINGLE_CHARACTERS = 4
"""Characters per shingle of Chinese, Japanese, Korean and Yi, whose words are of one to three."""
SHINGLE_LETTERS = 5
"""Characters per shingle of Thai, Lao, Khmer, Burmese, Javanese, Balinese and the Tai scripts, which write
letters without spaces."""
LEAST_CONTAINED = 12
"""Shingles from which a text counts as contained in a longer one: shorter ones are phrases that many use."""

_CHARACTERS = (
    "\u1100-\u11ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3100-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua000-\ua4cf\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
_LETTERS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaadf"
)
_UNSPACED = re.compile(f"[{_CHARACTERS}{_LETTERS}]")
_UNIT = re.compile(rf"[{_CHARACTERS}{_LETTERS}]|[^\W{_CHARACTERS}{_LETTERS}]+")
"""A word, or one character of a script without spaces."""
_CHARACTER = re.compile(f"[{_CHARACTERS}]")
_WORD = re.compile(r"\w+")
_MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F],
    np.uint64,
)
"""Odd, so that each product is a bijection of the unit's hash modulo 2⁶⁴ and order counts."""
_LOW = np.uint64(2**22 - 1)
"""Bits of a shingle's hash by which most of those that no indexed document has are passed over."""

Shingles = UInt64[np.ndarray, "k"]


def shingles(text: str) -> Shingles:
    """64-bit hashes of the text's shingles in their order, without case and punctuation.

    A shingle has 5 words or, where it begins in a script that is shingled by characters, as many of these. A
    shorter text is one shingle.
    """
    text = text.lower()
    has_characters = not text.isascii() and _UNSPACED.search(text) is not None
    units = (_UNIT if has_characters else _WORD).findall(text)
    # Python's salted hash will do: hashes are compared within one process and never stored.
    hashes = np.fromiter(map(hash, units), np.int64, len(units)).view(np.uint64)
    if not has_characters:
        return _grams(hashes, min(len(units), SHINGLE_WORDS))
    lengths = np.fromiter(map(_shingle_length, units), np.int64, len(units))
    whole = np.arange(len(units)) + lengths <= len(units)
    if not whole.any():
        return _grams(hashes, len(units))
    total = np.empty(len(units), np.uint64)
    for length in np.unique(lengths[whole]).tolist():
        of_length = whole & (lengths == length)
        total[of_length] = _grams(hashes, length)[of_length[: len(units) - length + 1]]
    return total[whole]


def _shingle_length(unit: str) -> int:
    if _UNSPACED.match(unit) is None:
        return SHINGLE_WORDS
    return SHINGLE_LETTERS if _CHARACTER.match(unit) is None else SHINGLE_CHARACTERS


def _grams(hashes: UInt64[np.ndarray, "m"], length: int) -> Shingles:
    """Hashes of all sequences of so many units; none of no unit."""
    total = np.zeros(len(hashes) - length + 1 if length else 0, np.uint64)
    for offset, multiplier in enumerate(_MULTIPLIERS[:length]):
        total += hashes[offset : offset + len(total)] * multiplier
    return total


class NearDuplicateIndex:
    """The indexed documents that a text is near to, or of which it contains a copy.

    Near are those whose Jaccard similarity of shingles is at least `threshold` t, in (0, 1]. Contained are
    those of whose shingles 2t/(1 + t) lie together in the text, in a stretch of twice their length: what two
    texts of equal length share at a similarity of t.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._documents: list[Shingles] = []  # distinct and sorted
        self._sizes: list[int] = []
        self._segments: list[tuple[np.ndarray, np.ndarray]] = []
        self._indexed = np.zeros(int(_LOW) + 1, bool)  # whether a shingle with these low bits is

    def add(self, document: Shingles) -> int:
        """Index one document's shingles; returns its number, counted from 0."""
        number, distinct = len(self._sizes), np.unique(document)
        self._indexed[distinct & _LOW] = True
        self._documents.append(distinct)
        self._sizes.append(len(distinct))
        self._segments.append((distinct, np.full(len(distinct), number, np.int32)))
        # Merging while the last two are of similar size costs O(n log² n) and leaves O(log n) segments.
        while len(self._segments) > 1 and len(self._segments[-2][0]) <= 2 * len(self._segments[-1][0]):
            self._merge_last_two()
        return number

    def compact(self) -> None:
        """Merge all segments, once no more documents will come."""
        while len(self._segments) > 1:
            self._merge_last_two()

    def matches(self, document: Shingles) -> Int[np.ndarray, "m"]:
        """Numbers of the documents that this one is near to or contains, ascending."""
        perhaps = document[self._indexed[document & _LOW]]  # few, or none, of an unrelated document
        owned = [_owners(np.unique(perhaps), *segment) for segment in self._segments]
        if not any(map(len, owned)):
            return np.empty(0, np.int64)
        distinct = np.unique(document)
        shared = np.bincount(np.concatenate(owned), minlength=len(self._sizes))
        sizes = np.array(self._sizes)
        matching = (shared > 0) & (shared >= self.threshold * (sizes + len(distinct) - shared))
        least = 2 * self.threshold / (1 + self.threshold) * sizes
        for number in np.flatnonzero(~matching & (sizes >= LEAST_CONTAINED) & (shared >= least)).tolist():
            matching[number] = self._lies_together(document, number, least[number])
        return np.flatnonzero(matching)

    def _lies_together(self, document: Shingles, number: int, least: float) -> bool:
        """Whether so many shingles of an indexed document lie in one stretch of this one: in a book, those of
        any short text are found, scattered."""
        hits = np.concatenate([[0], np.cumsum(np.isin(document, self._documents[number]))])
        length = min(2 * self._sizes[number], len(document))
        return bool((hits[length:] - hits[: len(hits) - length]).max() >= least)

    def _merge_last_two(self) -> None:
        hashes, owners = map(np.concatenate, zip(self._segments.pop(), self._segments.pop(), strict=True))
        order = np.argsort(hashes, kind="stable")
        self._segments.append((hashes[order], owners[order]))


def _owners(
    document: Shingles, hashes: UInt64[np.ndarray, "n"], owners: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "m"]:
    """Numbers of the indexed documents that have a shingle of this one, once for each that they share."""
    low = np.searchsorted(hashes, document)
    hits = hashes[np.minimum(low, len(hashes) - 1)] == document if len(hashes) else np.zeros(len(low), bool)
    if not hits.any():
        return owners[:0]
    low, high = low[hits], np.searchsorted(hashes, document[hits], "right")
    counts = high - low
    return owners[np.repeat(low - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())]


@dataclass(frozen=True)
class SplitRule:
    """The side of each document, by its key and the split's seed; the sets share the held-out ones by their
    sizes."""

    held_out_share: float
    sizes: Mapping[HeldOutName, int]
    seed: int = 0

    @staticmethod
    def from_config(config: DataConfig) -> "SplitRule":
        reward, validation, test = config.reward_set_size, config.validation_set_size, config.test_set_size
        sizes: dict[HeldOutName, int] = {"reward": reward, "validation": validation, "test": test}
        return SplitRule(config.held_out_share, sizes, config.split_seed)

    def side(self, document: Document) -> Side:
        """The side of a document. A larger `held_out_share` only adds held-out documents; the sizes of the
        sets do not change which documents are for training."""
        # Zero bytes are BLAKE2's default, so seed 0 is the split that runs before `split_seed` had.
        person = (self.seed % 2**128).to_bytes(16, "big")
        digest = hashlib.blake2b(document.key.encode(), digest_size=8, salt=_SALT, person=person).digest()
        position = int.from_bytes(digest, "big") / 2**64
        if position >= self.held_out_share:
            return "train"
        place = position / self.held_out_share * sum(self.sizes.values())
        for name, size in self.sizes.items():
            place -= size
            if place < 0:
                return name
        return name


class ContaminationFilter:
    """The documents that may enter the training stream: no held-out document of the target, in a set or not,
    and none that is near to one in a set or contains it, see `NearDuplicateIndex`. A `threshold` of 1
    compares keys only."""

    def __init__(self, rule: SplitRule, threshold: float) -> None:
        self.rule = rule
        self._keys: set[str] = set()
        self._index = NearDuplicateIndex(threshold) if threshold < 1 else None
        self._sides: list[HeldOutName] = []

    def allows(self, document: Document, *, of_target: bool = False) -> bool:
        """Whether a document may be trained on: it holds no copy or near-duplicate of a document in a
        held-out set and, where it is `of_target`, its key is not held out."""
        if document.key in self._keys or (of_target and self.rule.side(document) != "train"):
            return False
        return not self._near_duplicates(document)

    def place(self, document: Document) -> HeldOutName | None:
        """The held-out set that a document of the target belongs to: that of the near-duplicates placed
        before it, otherwise the one of its key. None for a training document, a copy of one that is placed,
        and one with near-duplicates in two sets."""
        side = self.rule.side(document)
        if side == "train" or document.key in self._keys:
            return None
        sides = {self._sides[number] for number in self._near_duplicates(document)} or {side}
        return sides.pop() if len(sides) == 1 else None

    def add(self, document: Document, side: HeldOutName) -> None:
        """Remember a document of a held-out set."""
        self._keys.add(document.key)
        if self._index is not None:
            self._index.add(shingles(document.text))
            self._sides.append(side)

    def freeze(self) -> None:
        """Make queries fast, once all held-out documents are known."""
        if self._index is not None:
            self._index.compact()

    def _near_duplicates(self, document: Document) -> list[int]:
        """Numbers of the indexed documents that are near-duplicates of this one."""
        return [] if self._index is None else self._index.matches(shingles(document.text)).tolist()
