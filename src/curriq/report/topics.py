"""Topics of the windows: k-means over embeddings, each cluster named by its class-based TF-IDF.

The embeddings are the caller's (a sentence-transformer), or TF-IDF reduced to a few dimensions. Names
follow Grootendorst 2022 (BERTopic): the words of a cluster, weighed against those of all clusters.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import ArpackError, svds

from curriq.report.look import asset

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts → vectors of norm 1, one row per text."""

WORD = re.compile(r"[^\W\d_]{3,24}")
STOP_WORDS = frozenset(asset("stop_words.txt").split())
VOCABULARY = 6_000
DIMENSIONS = 32
STARTS = 4
WORDS_IN_NAME = 3
PRIOR_WORDS = 500.0
"""Words that the prior of `Topics.distinctive` counts as."""


@dataclass(frozen=True)
class Topics:
    """Clusters, the greatest first."""

    names: list[str]  # of the clusters, each some of its words
    of: np.ndarray  # cluster of each text
    nearest: list[int]  # for each cluster the text nearest to its centre
    counts: csr_matrix  # [texts, words]
    words: list[str]

    def distinctive(self, ours: np.ndarray, theirs: np.ndarray, most: int = 6) -> tuple[list[str], list[str]]:
        """The words that tell two groups of the texts (masks) apart, the most distinctive first: of ours, of
        theirs.

        By the z-score of the log-odds ratio with an informative Dirichlet prior (Monroe, Colaresi and Quinn
        2008, "Fightin' Words"), which neither the most frequent words lead nor those that occur once. A text
        counts a word once, and z must be significant at 0.05 among as many words as there are.
        """
        a, b = (np.asarray((self.counts[group] > 0).sum(axis=0)).ravel() for group in (ours, theirs))
        prior = np.maximum(a + b, 1e-9)
        prior *= min(1.0, PRIOR_WORDS / max(1.0, prior.sum()))
        x, y = a + prior, b + prior
        odds = np.log(x / (x.sum() - x)) - np.log(y / (y.sum() - y))
        z = odds / np.sqrt(1 / x + 1 / y)
        order = np.argsort(-z, kind="stable")
        least = NormalDist().inv_cdf(1 - 0.025 / max(1, len(self.words)))
        found = [self.words[i] for i in order[:most] if z[i] > least]
        return found, [self.words[i] for i in order[::-1][:most] if z[i] < -least]


def find_topics(texts: Sequence[str], clusters: int, embed: Embed | None = None) -> Topics | None:
    """Clusters of the windows' texts; None when there are too few texts or words to speak of topics.

    Args:
        clusters: k; fewer come back when k-means leaves some empty.
        embed: gives the vectors; TF-IDF when None.
    """
    counts, words = _counts(texts)
    if len(texts) < 5 * clusters or len(words) < clusters:
        return None
    vectors = _tfidf(counts) if embed is None else np.asarray(embed(texts), dtype=float)
    centres, labels = _kmeans(vectors, clusters)
    sizes = np.bincount(labels, minlength=len(centres))
    order = [int(i) for i in np.argsort(-sizes, kind="stable") if sizes[i] > 0]
    nearest = [int(np.argmax(np.where(labels == i, (vectors @ centres[i]).round(9), -np.inf))) for i in order]
    place = np.full(len(centres), -1)
    place[order] = np.arange(len(order))
    names = _names(counts, words, place[labels], len(order))
    return Topics(names, place[labels], nearest, counts, words)


def _counts(texts: Sequence[str]) -> tuple[csr_matrix, list[str]]:
    """Words per text, without those in one text only and those in more than half."""
    per_text = [Counter(WORD.findall(text.lower())) for text in texts]
    in_texts = Counter(word for counted in per_text for word in counted.keys() - STOP_WORDS)
    most = max(2, len(texts) / 2)
    kept = [word for word, n in in_texts.items() if 2 <= n <= most]
    words = sorted(kept, key=lambda word: (-in_texts[word], word))[:VOCABULARY]
    column = {word: i for i, word in enumerate(words)}
    entries = [
        (row, column[word], count)
        for row, counted in enumerate(per_text)
        for word, count in counted.items()
        if word in column
    ]
    rows, columns, values = np.array(entries, dtype=int).reshape(-1, 3).T
    shape = (len(texts), max(1, len(words)))
    return csr_matrix((values.astype(float), (rows, columns)), shape=shape), words


def _tfidf(counts: csr_matrix) -> np.ndarray:
    """Unit vectors of the greatest singular directions of the TF-IDF matrix (latent semantic analysis)."""
    frequency = np.asarray((counts > 0).sum(axis=0)).ravel()
    weighted = counts.copy()
    weighted.data = 1 + np.log(weighted.data)
    weighted = weighted.multiply(np.log(counts.shape[0] / np.maximum(1, frequency))).tocsr()
    norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    weighted = csr_matrix(weighted.multiply(1 / np.maximum(norms, 1e-12)[:, None]))
    vectors = _greatest_directions(weighted, min(DIMENSIONS, min(weighted.shape) - 1))
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _greatest_directions(matrix: csr_matrix, dimensions: int) -> np.ndarray:
    """Rows of the matrix in its greatest singular directions."""
    try:
        # With `v0` scipy restarts from entropy of the system; with `rng` equal texts give equal topics.
        left, scale, _ = svds(matrix, k=dimensions, rng=np.random.default_rng(0))
    except ArpackError:  # of nearly as many directions as a small matrix has, some with empty rows
        left, scale, _ = np.linalg.svd(matrix.toarray(), full_matrices=False)
        left, scale = left[:, :dimensions], scale[:dimensions]
    return left * scale


def _kmeans(vectors: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres and labels of the tightest of a few k-means++ starts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty cluster is dropped by the caller
        rngs = map(np.random.default_rng, range(STARTS))
        found = [kmeans2(vectors, clusters, minit="++", iter=30, rng=rng) for rng in rngs]
    return min(found, key=lambda start: float(((vectors - start[0][start[1]]) ** 2).sum()))


def _names(counts: csr_matrix, words: list[str], labels: np.ndarray, clusters: int) -> list[str]:
    """c-TF-IDF: frequency of a word in the cluster times log(1 + A/frequency in all), A words per cluster."""
    by_cluster = np.stack([np.asarray(counts[labels == i].sum(axis=0)).ravel() for i in range(clusters)])
    total = by_cluster.sum(axis=0)
    average = by_cluster.sum() / max(1, clusters)
    share = by_cluster / np.maximum(1, by_cluster.sum(axis=1, keepdims=True))
    scores = share * np.log1p(average / np.maximum(1, total))
    names = []
    for index, row in enumerate(scores):
        best = [words[i] for i in np.argsort(-row, kind="stable")[:WORDS_IN_NAME] if row[i] > 0]
        names.append(", ".join(best) or f"cluster {index + 1}")
    return names
