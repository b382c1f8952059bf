"""Counts of hashed n-grams, and the importance weights of whole documents by a table of them.

The same numbers as `select.static.DsirScore` gives, in the form in which a corpus of any size is scored: one look-up per
n-gram, without torch, so that worker processes need nothing else.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BUCKETS = 2**15
"""Unigrams and bigrams are hashed into this many buckets each."""
NO_NGRAM = 2 * BUCKETS
"""Bucket of the n-grams with a token that is not learnt, which count nowhere."""
WIDTH = NO_NGRAM + 1
"""Buckets in all."""
PRIOR = 8192.0
"""Mass of the smoothing prior, in n-grams."""
FOLDS = 8
"""The stream's n-grams are counted in so many folds of documents."""


def smoothed_log_ratio(
    target: Float[Tensor, "*#n"], target_total: Tensor, seen: Float[Tensor, "*#n"], seen_total: Tensor
) -> Float[Tensor, "*n"]:
    """log p_D − log p_S of each n-gram, from its counts in the target and in the stream and their totals; 0
    where neither has it. Both are smoothed with their mean, of mass `PRIOR`."""
    target_total, seen_total = target_total.double().clamp(min=1), seen_total.double().clamp(min=1)
    prior = PRIOR / 2 * (target / target_total + seen / seen_total)
    ratio = ((target + prior) / (target_total + PRIOR)).log() - ((seen + prior) / (seen_total + PRIOR)).log()
    return torch.where(prior > 0, ratio, 0.0)


@dataclass(frozen=True)
class Cut:
    """Documents cut into windows, one after another; no window holds text of two documents.

    Attributes:
        tokens: token ids of all documents.
        learnt: which tokens are learnt; None where all are.
        windows: tokens of each window, at least 1: T, and of each document's last one what is left.
        per_document: windows of each document.
        numbers: 63-bit identity of each document.
    """

    tokens: Int[np.ndarray, "t"]
    learnt: Bool[np.ndarray, "t"] | None
    windows: Int[np.ndarray, "w"]
    per_document: Int[np.ndarray, "d"]
    numbers: Int[np.ndarray, "d"]

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
    values: Float[np.ndarray, "w"], tokens: Int[np.ndarray, "w"], per_document: Int[np.ndarray, "d"]
) -> Float[np.ndarray, "d"]:
    """Mean over each document's windows, each weighed by its tokens, so that a short last window counts for
    what it holds."""
    first = per_document.cumsum() - per_document
    sums = np.add.reduceat(values.astype(np.float64) * tokens, first) if len(first) else np.zeros(0)
    return sums / np.add.reduceat(tokens, first) if len(first) else sums


def cut_ngrams(cut: Cut) -> tuple[Int[np.ndarray, "t"], Int[np.ndarray, "t"]]:
    """Bucket of the unigram and of the bigram that begin at each token; `NO_NGRAM` where it is not learnt, and
    for the bigram of a window's last token."""
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


class NgramScorer:
    """Importance weights of documents' windows, in nats per n-gram, by counts that stay as they are.

    A document's own text counts on neither side: its fold of the corpus is left out, and where the document is
    one of the target's its n-grams are taken out of the target's.
    """

    def __init__(self, counts: NgramCounts) -> None:
        self._counts = counts
        self._target = torch.from_numpy(counts.target)
        self._others = torch.from_numpy(counts.seen.sum(0) - counts.seen).double()  # without each fold
        self._other_totals = self._others.sum(1, keepdim=True)
        ratio = smoothed_log_ratio(self._target, self._target.sum(), self._others, self._other_totals)
        ratio[:, NO_NGRAM] = 0.0
        self._table = ratio.numpy().ravel()

    def __call__(self, cut: Cut) -> Float[np.ndarray, "w"]:
        """The score of each window."""
        if not len(cut.windows):
            return np.zeros(0)
        unigrams, bigrams = cut_ngrams(cut)
        starts = cut.windows.cumsum() - cut.windows
        first = cut.per_document.cumsum() - cut.per_document
        tokens = np.add.reduceat(cut.windows, first)
        shift = np.repeat(WIDTH * (cut.numbers % FOLDS), tokens)
        ratio = self._table[unigrams + shift] + self._table[bigrams + shift]
        for place in np.flatnonzero(np.isin(cut.numbers, self._counts.own_documents)):
            part = slice(starts[first[place]], starts[first[place]] + tokens[place])
            ratio[part] = self._without_own(unigrams[part], bigrams[part], int(cut.numbers[place]) % FOLDS)
        counted = (unigrams != NO_NGRAM).astype(np.int64) + (bigrams != NO_NGRAM)
        return np.add.reduceat(ratio, starts) / np.maximum(1, np.add.reduceat(counted, starts))

    def _without_own(
        self, unigrams: Int[np.ndarray, "t"], bigrams: Int[np.ndarray, "t"], fold: int
    ) -> Float[np.ndarray, "t"]:
        """Sum of the log ratios of the n-grams at each token of a document of the target."""
        both = torch.from_numpy(np.stack([unigrams, bigrams]))
        own = torch.bincount(both.flatten(), minlength=WIDTH).double()
        own[NO_NGRAM] = 0
        # A run cuts its held-out text elsewhere, so that a few bigrams here are not among those counted.
        others = (self._target - own).clamp(min=0)
        ratio = smoothed_log_ratio(others, others.sum(), self._others[fold], self._other_totals[fold])
        ratio[NO_NGRAM] = 0.0
        return ratio[both].sum(0).numpy()
