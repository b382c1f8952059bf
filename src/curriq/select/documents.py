"""Scores of whole documents by n-grams: the numbers of `DsirScore`, for a corpus of any size.

One look-up per n-gram in a table that stays as it is, so that documents can be scored in any order and by any
number of processes.
"""

import numpy as np
import torch
from jaxtyping import Float, Int

from curriq.data.ngrams import FOLDS, NO_NGRAM, WIDTH, Cut, NgramCounts, cut_ngrams
from curriq.select.static import smoothed_log_ratio


class NgramScorer:
    """Importance weights of documents' windows, in nats per n-gram, by counts that stay as they are.

    A document's own text counts on neither side: its fold of the corpus is left out, and where the document
    is one of the target's its n-grams are taken out of the target's.
    """

    def __init__(self, counts: NgramCounts) -> None:
        self._own_documents = counts.own_documents
        self._target = counts.target
        self._others = (counts.seen.sum(0) - counts.seen).astype(np.float64)  # without each fold
        target, others = torch.from_numpy(self._target), torch.from_numpy(self._others)
        ratio = smoothed_log_ratio(target, target.sum(), others, others.sum(1, keepdim=True))
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
        for place in np.flatnonzero(np.isin(cut.numbers, self._own_documents)):
            part = slice(starts[first[place]], starts[first[place]] + tokens[place])
            ratio[part] = self._without_own(unigrams[part], bigrams[part], int(cut.numbers[place]) % FOLDS)
        counted = (unigrams != NO_NGRAM).astype(np.int64) + (bigrams != NO_NGRAM)
        return np.add.reduceat(ratio, starts) / np.maximum(1, np.add.reduceat(counted, starts))

    def _without_own(
        self, unigrams: Int[np.ndarray, "t"], bigrams: Int[np.ndarray, "t"], fold: int
    ) -> Float[np.ndarray, "t"]:
        """Sum of the log ratios of the n-grams at each token of a document of the target."""
        both = np.stack([unigrams, bigrams])
        buckets, place, own = np.unique(both, return_inverse=True, return_counts=True)
        own[buckets == NO_NGRAM] = 0
        # A run cuts its held-out text elsewhere, so that a few bigrams here are not among those counted.
        rest = torch.from_numpy((self._target[buckets] - own).clip(min=0))
        rest_total = rest.sum() + (self._target.sum() - self._target[buckets].sum())
        others = torch.from_numpy(self._others[fold])
        ratio = smoothed_log_ratio(rest, rest_total, others[buckets], others.sum()).numpy()
        ratio[buckets == NO_NGRAM] = 0.0
        return ratio[place.reshape(both.shape)].sum(0)
