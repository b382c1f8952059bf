"""Scores of whole documents: against the definition by hand, and against the score of a stream."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from curriq.data.ngrams import (
    BUCKETS,
    FOLDS,
    NO_NGRAM,
    Cut,
    NgramCounts,
    cut_ngrams,
    document_means,
    window_lengths,
)
from curriq.select.documents import NgramScorer
from curriq.select.static import PRIOR, DsirScore, hashed_ngrams
from curriq.types import Windows

T = 8


def cut_of(texts: list[list[int]], numbers: list[int] | None = None, length: int = T) -> Cut:
    sizes = np.array([len(text) for text in texts], np.int64)
    windows, per_document = window_lengths(sizes, length)
    tokens = np.concatenate([np.array(text, np.int32) for text in texts])
    places = np.array(numbers or range(len(texts)), np.int64)
    return Cut(tokens, None, windows, per_document, places, windows)


def random_texts(count: int, seed: int, low: int = 0, high: int = 50) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, rng.integers(1, 30)).tolist() for _ in range(count)]


def reference(texts, numbers, target, target_numbers) -> list[list[float]]:
    """The score of each window by its definition: counters of n-grams, folds and own text left out."""

    def windows(text):
        return [text[i : i + T] for i in range(0, len(text), T)]

    def ngrams(text):
        found = Counter()
        for window in windows(text):
            found.update((token,) for token in window)
            found.update(pairwise(window))
        return found

    scores = []
    for text, number in zip(texts, numbers, strict=True):
        seen = Counter()
        for other, its in zip(texts, numbers, strict=True):
            if its % FOLDS != number % FOLDS:
                seen += ngrams(other)
        wanted = Counter()
        for other, its in zip(target, target_numbers, strict=True):
            if its != number:
                wanted += ngrams(other)
        total, ours = max(1, seen.total()), max(1, wanted.total())

        def ratio(gram, wanted=wanted, seen=seen, ours=ours, total=total):
            prior = PRIOR / 2 * (wanted[gram] / ours + seen[gram] / total)
            if prior == 0:
                return 0.0
            return math.log((wanted[gram] + prior) / (ours + PRIOR)) - math.log(
                (seen[gram] + prior) / (total + PRIOR)
            )

        found = []
        for window in windows(text):
            grams = [(token,) for token in window] + list(pairwise(window))
            found.append(sum(map(ratio, grams)) / len(grams))
        scores.append(found)
    return scores


def without_collisions(texts: list[list[int]]) -> bool:
    cut = cut_of(texts)
    unigrams, bigrams = cut_ngrams(cut)
    pairs = {pair for text in texts for pair in pairwise(text)}
    keys = {(a * 1_000_003 + b) * 2_654_435_761 >> 11 & BUCKETS - 1 for a, b in pairs}
    return len(keys) == len(pairs) and len(unigrams) == len(bigrams)


def test_scores_are_those_of_the_definition():
    texts, target = random_texts(20, 0), random_texts(6, 1, high=30)
    numbers, target_numbers = [10 + 3 * i for i in range(20)], [1000 + i for i in range(6)]
    assert without_collisions(texts + target)
    counts = NgramCounts.of(cut_of(texts, numbers), of_target=False)
    counts += NgramCounts.of(cut_of(target, target_numbers), of_target=True)
    found = NgramScorer(counts)(cut_of(texts, numbers))
    expected = reference(texts, numbers, target, target_numbers)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=1e-12)


def test_a_document_of_the_target_is_scored_without_its_own_text():
    """Also where the corpus holds it: its score is that against the rest of the target."""
    target = random_texts(6, 1, high=30)
    target_numbers = [1000 + i for i in range(6)]
    texts, numbers = [*random_texts(20, 0), target[2]], [*(10 + 3 * i for i in range(20)), 1002]
    counts = NgramCounts.of(cut_of(texts, numbers), of_target=False)
    counts += NgramCounts.of(cut_of(target, target_numbers), of_target=True)
    found = NgramScorer(counts)(cut_of(texts, numbers))
    expected = reference(texts, numbers, target, target_numbers)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=1e-12)
    with_own = NgramScorer(NgramCounts(counts.target, counts.seen, np.zeros(0, np.int64)))(
        cut_of(texts, numbers)
    )
    assert with_own[-1] > found[-1]  # what it would gain from its own text
    np.testing.assert_array_equal(with_own[: -len(expected[-1])], found[: -len(expected[-1])])


def test_buckets_are_those_of_the_stream_of_a_run():
    tokens = torch.randint(50_000, (5, T), generator=torch.Generator().manual_seed(0))
    windows = Windows(tokens=tokens, ids=torch.arange(5), source=torch.zeros(5, dtype=torch.int64))
    theirs = hashed_ngrams(windows, "cpu").numpy()
    cut = Cut(
        tokens.flatten().int().numpy(), None, np.full(5, T), np.ones(5, np.int64), np.arange(5), np.full(5, T)
    )
    unigrams, bigrams = (found.reshape(5, T) for found in cut_ngrams(cut))
    np.testing.assert_array_equal(unigrams, theirs[:, :T])
    np.testing.assert_array_equal(bigrams[:, :-1], theirs[:, T:])
    assert (bigrams[:, -1] == NO_NGRAM).all()


def test_scores_equal_those_of_the_run_whose_counts_they_use():
    """Whole windows, which a stream reads too: the table gives what `DsirScore` gives at that time."""
    generator = torch.Generator().manual_seed(0)

    def windows(n: int, high: int, first: int) -> Windows:
        return Windows(
            tokens=torch.randint(high, (n, T), generator=generator),
            ids=torch.arange(n) + first,
            source=torch.zeros(n, dtype=torch.int64),
            document=torch.arange(n) // 2 + first,
        )

    target, stream = windows(12, 30, 5000), windows(40, 60, 0)
    score = DsirScore(target)
    theirs = score(stream)
    for part, expected in ((stream, theirs), (target, score.of_target())):
        cut = Cut(
            tokens=part.tokens.flatten().int().numpy(),
            learnt=None,
            windows=np.full(len(part), T),
            per_document=np.full(len(part) // 2, 2),
            numbers=part.document[::2].numpy(),
            taught=np.full(len(part), T),
        )
        np.testing.assert_allclose(NgramScorer(score.counts())(cut), expected.numpy(), rtol=0, atol=1e-12)


def test_tokens_that_are_not_learnt_count_nowhere():
    cut = cut_of([[1, 2, 3, 4]], length=4)
    masked = replace(cut, learnt=np.array([True, True, False, True]))
    unigrams, bigrams = cut_ngrams(masked)
    assert (unigrams == NO_NGRAM).tolist() == [False, False, True, False]
    assert (bigrams == NO_NGRAM).tolist() == [False, True, True, True]
    assert NgramCounts.of(masked, of_target=True).target.sum() == 4


def test_counts_do_not_depend_on_how_the_corpus_is_cut_into_pieces():
    texts = random_texts(30, 3)
    whole = NgramCounts.of(cut_of(texts), of_target=False)
    parts = NgramCounts.none()
    for start in range(0, 30, 7):
        numbers = list(range(start, min(30, start + 7)))
        parts += NgramCounts.of(cut_of(texts[start : start + 7], numbers), of_target=False)
    np.testing.assert_array_equal(whole.seen, parts.seen)


@pytest.mark.parametrize(("tokens", "lengths"), [(1, [1]), (8, [8]), (9, [8, 1]), (24, [8, 8, 8])])
def test_no_token_is_lost_and_no_window_is_padded(tokens, lengths):
    found, per_document = window_lengths(np.array([tokens]), T)
    assert found.tolist() == lengths
    assert per_document.tolist() == [len(lengths)]


def test_a_document_is_the_mean_over_its_windows_weighed_by_what_is_learnt_of_them():
    means = document_means(np.array([1.0, 5.0, 2.0]), np.array([8, 2, 4]), np.array([2, 1]))
    assert means.tolist() == [(8 * 1 + 2 * 5) / 10, 2.0]
    assert document_means(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


def test_how_long_a_question_is_changes_no_score_of_its_answer():
    """The n-grams of an answer that stands in windows of its own, whatever stands before it."""

    def score(asked: int) -> float:
        cut = cut_of([[5] * asked + [1, 2, 3, 4, 5, 6, 7, 8]])
        mask = np.arange(asked + 8) >= asked
        masked = replace(cut, learnt=mask, taught=np.array([*[0] * (asked // T), T]))
        counts = NgramCounts.of(cut_of([[1, 2, 3, 9]], [100]), of_target=True)
        counts += NgramCounts.of(cut_of([[1, 5, 4, 8, 2]], [200]), of_target=False)
        (mean,) = document_means(NgramScorer(counts)(masked), masked.taught, masked.per_document)
        return mean

    assert score(0) != 0
    assert score(0) == score(T) == score(9 * T)
