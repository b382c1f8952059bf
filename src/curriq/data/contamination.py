"""The split by document hash, and the filter that keeps held-out text out of the stream.

A document's side follows from its key and the split's seed alone, so every arm with one split shares the
held-out sets, whatever its training seed. Near-duplicates of their documents are found exactly, by the
Jaccard similarity of word 5-shingles over an inverted index: each shingle's hash, sorted, with its document's
number. For so few documents that is cheaper than MinHash with locality-sensitive hashing (Broder 1997; Lee et
al. 2022, "Deduplicating Training Data Makes Language Models Better") and misses no pair.
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

_WORD = re.compile(r"\w+")
_MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F],
    np.uint64,
)
"""Odd, so that each product is a bijection of the word's hash modulo 2⁶⁴ and word order counts."""


def shingles(text: str) -> UInt64[np.ndarray, "k"]:
    """Sorted distinct 64-bit hashes of the text's word 5-grams, without case and punctuation; empty for a
    text of fewer than five words, whose copies the document key finds."""
    words = _WORD.findall(text.lower())
    count = len(words) - SHINGLE_WORDS + 1
    if count < 1:
        return np.empty(0, np.uint64)
    # Python's salted hash will do: hashes are compared within one process and never stored.
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    total = np.zeros(count, np.uint64)
    for offset, multiplier in enumerate(_MULTIPLIERS):
        total += hashes[offset : offset + count] * multiplier
    return np.unique(total)


class NearDuplicateIndex:
    """The indexed documents whose Jaccard similarity to a text is at least `threshold`, in (0, 1]; 1 finds
    equal sets of shingles."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._sizes: list[int] = []
        self._segments: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, document: UInt64[np.ndarray, "k"]) -> int:
        """Index one document's shingles; returns its number, counted from 0."""
        number = len(self._sizes)
        self._sizes.append(len(document))
        self._segments.append((document, np.full(len(document), number, np.int32)))
        # Merging while the last two are of similar size costs O(n log² n) and leaves O(log n) segments.
        while len(self._segments) > 1 and len(self._segments[-2][0]) <= 2 * len(self._segments[-1][0]):
            self._merge_last_two()
        return number

    def compact(self) -> None:
        """Merge all segments, once no more documents will come."""
        while len(self._segments) > 1:
            self._merge_last_two()

    def matches(self, document: UInt64[np.ndarray, "k"]) -> Int[np.ndarray, "m"]:
        """Numbers of the near-duplicates of a document, ascending."""
        found = np.zeros(len(document), bool)
        ranges = []
        for hashes, owners in self._segments:
            low, high = (np.searchsorted(hashes, document, side) for side in ("left", "right"))
            found |= high > low
            ranges.append((owners, low, high))
        # Jaccard <= shared / own, so almost every unrelated document is settled here.
        if not found.any() or found.mean() < self.threshold:
            return np.empty(0, np.int64)
        owned = [owners[low:high] for owners, *ends in ranges for low, high in zip(*ends, strict=True)]
        sharers, shared = np.unique(np.concatenate(owned), return_counts=True)
        union = np.array([self._sizes[number] for number in sharers]) + len(document) - shared
        return sharers[shared / union >= self.threshold].astype(np.int64)

    def _merge_last_two(self) -> None:
        hashes, owners = map(np.concatenate, zip(self._segments.pop(), self._segments.pop(), strict=True))
        order = np.argsort(hashes, kind="stable")
        self._segments.append((hashes[order], owners[order]))


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
    and no near-duplicate of one in a set, from a Jaccard `threshold` on shingles; 1 compares keys only."""

    def __init__(self, rule: SplitRule, threshold: float) -> None:
        self.rule = rule
        self._keys: set[str] = set()
        self._index = NearDuplicateIndex(threshold) if threshold < 1 else None
        self._sides: list[HeldOutName] = []

    def allows(self, document: Document, *, of_target: bool = False) -> bool:
        """Whether a document may be trained on: no copy or near-duplicate of a document in a held-out set
        and, where it is `of_target`, none whose key is held out."""
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
