"""Documents cut into windows of their own, and counts of their hashed n-grams."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

BUCKETS = 2**15
"""Unigrams and bigrams are hashed into this many buckets each."""
NO_NGRAM = 2 * BUCKETS
"""Bucket of the n-grams with a token that is not learnt, which count nowhere."""
WIDTH = NO_NGRAM + 1
"""Buckets in all."""
FOLDS = 8
"""The stream's n-grams are counted in so many folds of documents."""


@dataclass(frozen=True)
class Cut:
    """Documents cut into windows, one after another; no window holds text of two documents.

    Attributes:
        tokens: token ids of all documents.
        learnt: which tokens are learnt; None where all are.
        windows: tokens of each window, at least 1: T, and of each document's last one what is left.
        per_document: windows of each document.
        numbers: 63-bit identity of each document.
        taught: learnt tokens of each window, at least 1 in each document.
    """

    tokens: Int[np.ndarray, "t"]
    learnt: Bool[np.ndarray, "t"] | None
    windows: Int[np.ndarray, "w"]
    per_document: Int[np.ndarray, "d"]
    numbers: Int[np.ndarray, "d"]
    taught: Int[np.ndarray, "w"]

    @property
    def document(self) -> Int[np.ndarray, "w"]:
        """Place of each window's document."""
        return np.repeat(np.arange(len(self.per_document)), self.per_document)


def window_lengths(tokens: Int[np.ndarray, "d"], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each window of documents with so many tokens, at least 1, and windows of each document."""
    per_document = -(-tokens // length)
    windows = np.full(int(per_document.sum()), length, np.int64)
    windows[per_document.cumsum() - 1] = tokens - (per_document - 1) * length
    return windows, per_document


def document_means(
    values: Float[np.ndarray, "w"], taught: Int[np.ndarray, "w"], per_document: Int[np.ndarray, "d"]
) -> Float[np.ndarray, "d"]:
    """Mean over each document's windows, each weighed by its learnt tokens, so that a short last window, or
    one that is mostly a question, counts for what it holds."""
    first = per_document.cumsum() - per_document
    sums = np.add.reduceat(values.astype(np.float64) * taught, first) if len(first) else np.zeros(0)
    return sums / np.add.reduceat(taught, first) if len(first) else sums


def cut_ngrams(cut: Cut) -> tuple[Int[np.ndarray, "t"], Int[np.ndarray, "t"]]:
    """Bucket of the unigram and of the bigram that begin at each token; `NO_NGRAM` where it is not learnt,
    and for the bigram of a window's last token."""
    tokens = cut.tokens.astype(np.int64)
    unigrams = _hashed(tokens.copy())
    bigrams = np.full(len(tokens), NO_NGRAM)
    bigrams[:-1] = _hashed(tokens[:-1] * 1_000_003 + tokens[1:]) + BUCKETS
    bigrams[cut.windows.cumsum() - 1] = NO_NGRAM
    if cut.learnt is not None:
        unigrams[~cut.learnt] = NO_NGRAM
        bigrams[~cut.learnt] = NO_NGRAM
        bigrams[:-1][~cut.learnt[1:]] = NO_NGRAM
    return unigrams, bigrams


def _hashed(keys: Int[np.ndarray, "m"]) -> Int[np.ndarray, "m"]:
    """As `select.static` hashes, modulo a power of two; in place."""
    keys *= 2_654_435_761
    keys >>= 11
    keys &= BUCKETS - 1
    return keys


@dataclass(frozen=True)
class NgramCounts:
    """N-grams of a target and of a corpus.

    Attributes:
        target: count of each bucket in the target's text.
        seen: count of each bucket in each fold of the corpus's documents.
        own_documents: identities of the target's documents, ascending.
    """

    target: Float[np.ndarray, "b"]
    seen: Int[np.ndarray, "f b"]
    own_documents: Int[np.ndarray, "m"]

    @staticmethod
    def of(cut: Cut, *, of_target: bool) -> "NgramCounts":
        """The counts of some documents, as those of the target or of the corpus."""
        none = NgramCounts.none()
        if not len(cut.windows):
            return none
        unigrams, bigrams = cut_ngrams(cut)
        tokens = np.add.reduceat(cut.windows, cut.per_document.cumsum() - cut.per_document)
        fold = np.zeros(len(unigrams), np.int64) if of_target else np.repeat(cut.numbers % FOLDS, tokens)
        both = np.concatenate([unigrams + WIDTH * fold, bigrams + WIDTH * fold])
        counts = np.bincount(both, minlength=FOLDS * WIDTH).reshape(FOLDS, WIDTH)
        counts[:, NO_NGRAM] = 0
        if of_target:
            return NgramCounts(counts[0].astype(float), none.seen, np.unique(cut.numbers))
        return NgramCounts(none.target, counts, none.own_documents)

    @staticmethod
    def none() -> "NgramCounts":
        return NgramCounts(np.zeros(WIDTH), np.zeros((FOLDS, WIDTH), np.int64), np.zeros(0, np.int64))

    def __add__(self, other: "NgramCounts") -> "NgramCounts":
        own = np.union1d(self.own_documents, other.own_documents)
        return NgramCounts(self.target + other.target, self.seen + other.seen, own)
