"""The DSIR score against a count by dictionary, and on text of which only the order is corrupted."""

import io
import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

from curriq.data.ngrams import FOLDS
from curriq.select.static import PRIOR, DsirScore, StaticScore
from curriq.types import IGNORED, Windows

V, T = 12, 12
"""Twelve tokens have 144 bigrams, none of which share a bucket."""


def windows_of(
    tokens: torch.Tensor, document: torch.Tensor | None = None, labels: torch.Tensor | None = None
) -> Windows:
    """Windows with these tokens; each is a document of its own unless others are named."""
    numbers = torch.arange(len(tokens))
    return Windows(
        tokens=tokens, ids=numbers, source=torch.zeros_like(numbers), document=document, labels=labels
    )


def grammar(n: int, seed: int, step: int = 1, vocabulary: int = V) -> torch.Tensor:
    """Windows in which `step` follows from each token to the next, nine times in ten."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (n, T), generator=generator)
    follows = torch.rand(n, T, generator=generator) < 0.9
    for t in range(1, T):
        tokens[:, t] = torch.where(follows[:, t], (tokens[:, t - 1] + step) % vocabulary, tokens[:, t])
    return tokens


def ngrams(window: list[int]) -> list[tuple[int, ...]]:
    return [(a,) for a in window] + list(pairwise(window))


def count(windows: list[list[int]]) -> Counter:
    return Counter(g for window in windows for g in ngrams(window))


def mean_log_ratio(window: list[int], target: Counter, stream: Counter) -> float:
    """Mean log-ratio of the smoothed probabilities of a window's n-grams."""
    n, m = target.total(), stream.total()
    logs = []
    for g in ngrams(window):
        prior = PRIOR * (target[g] / n + stream[g] / m) / 2
        ratio = ((target[g] + prior) / (n + PRIOR)) / ((stream[g] + prior) / (m + PRIOR)) if prior else 1.0
        logs.append(math.log(ratio))
    return sum(logs) / len(logs)


def without(tokens: torch.Tensor, left_out: torch.Tensor) -> Counter:
    return count(tokens[~left_out].tolist())


def test_equals_a_count_by_dictionary_that_leaves_out_a_windows_own_document():
    """On the target's side exactly the document, on the stream's a fold of documents."""
    target, ours = grammar(40, 0), torch.arange(40) // 4 * 1_000_003
    stream, theirs = torch.cat([grammar(24, 1), grammar(24, 2, step=7)]), torch.arange(48) // 3 + 7
    score = DsirScore(windows_of(target, ours))
    assert isinstance(score, StaticScore)
    first = score(windows_of(stream[:20], theirs[:20]))
    second = score(windows_of(stream[20:], theirs[20:]))
    for found, upto in ((first, 20), (second, 48)):
        rows = range(upto - len(found), upto)
        others = [without(stream[:upto], theirs[:upto] % FOLDS == theirs[i] % FOLDS) for i in rows]
        expected = [
            mean_log_ratio(stream[i].tolist(), count(target.tolist()), seen)
            for i, seen in zip(rows, others, strict=True)
        ]
        assert found.tolist() == pytest.approx(expected, abs=1e-9)
    expected = [
        mean_log_ratio(
            target[i].tolist(),
            without(target, ours == ours[i]),
            without(stream, theirs % FOLDS == ours[i] % FOLDS),
        )
        for i in range(40)
    ]
    assert score.of_target().tolist() == pytest.approx(expected, abs=1e-9)


def test_tokens_that_are_not_learnt_count_on_neither_side():
    """A learnt half has the score of that half alone."""
    target, stream = grammar(30, 0), grammar(30, 1, step=5)

    def half(tokens: torch.Tensor) -> Windows:
        labels = tokens.clone()
        labels[:, T // 2 :] = IGNORED
        return windows_of(tokens, labels=labels)

    masked, cut = DsirScore(half(target)), DsirScore(windows_of(target[:, : T // 2]))
    torch.testing.assert_close(masked(half(stream)), cut(windows_of(stream[:, : T // 2])))
    torch.testing.assert_close(masked.of_target(), cut.of_target())


def own_words(documents: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Six windows of each document: common words, and every third token one of three words of its own."""
    generator = torch.Generator().manual_seed(seed)
    document = torch.arange(documents).repeat_interleave(6) + 10_000 * seed
    tokens = torch.randint(0, 30, (len(document), T), generator=generator)
    own = 100 + 3 * document[:, None] + torch.randint(0, 3, (len(document), T), generator=generator)
    tokens[:, ::3] = own[:, ::3]
    return tokens, document


def gap_to_the_target(known: bool, seed: int) -> float:
    """How far the target's windows lie above the latest ones of a stream of its kind, in deviations."""
    ours, theirs = own_words(60, seed), own_words(600, seed + 1)
    score = DsirScore(windows_of(ours[0], ours[1] if known else None))
    order = torch.randperm(len(theirs[0]), generator=torch.Generator().manual_seed(0))
    stream = windows_of(theirs[0][order], theirs[1][order] if known else order)
    parts = [score(stream.take(slice(start, start + 100))) for start in range(0, len(stream), 100)]
    late = torch.cat(parts)[-300:]  # the level of all scores falls as the stream's rare n-grams are counted
    return ((score.of_target().mean() - late.mean()) / late.std()).item()


def test_on_a_stream_of_the_targets_kind_neither_side_scores_higher():
    """Every document repeats words of its own, so that its own text is the only text like it. Where documents
    are not known, the target's windows are far above the stream's, and the test sees it."""
    gaps = [gap_to_the_target(True, seed) for seed in (1, 3, 5)]
    assert abs(sum(gaps) / 3) < 0.15, gaps
    assert gap_to_the_target(False, 1) > 1


def test_separates_shuffled_tokens_from_the_targets():
    """The same tokens in another order have other bigrams."""
    clean = grammar(200, 3, vocabulary=50)
    order = torch.rand(clean.shape, generator=torch.Generator().manual_seed(4)).argsort(1)
    score = DsirScore(windows_of(grammar(300, 0, vocabulary=50)))
    found = score(windows_of(torch.cat([clean, clean.gather(1, order)])))
    assert found[:200].mean() > found[200:].mean() + 1.5 * found.std()


def test_what_occurs_nowhere_else_tells_nothing():
    """One document alone: the rest of the stream is empty, and the target has none of its tokens."""
    score = DsirScore(windows_of(grammar(20, 0)))
    assert score(windows_of(torch.full((3, T), 40), torch.zeros(3, dtype=torch.int64))).tolist() == [0.0] * 3


def test_continues_bitwise_from_its_state():
    stream, document = own_words(20, seed=2)
    one, other = (DsirScore(windows_of(*own_words(10, seed=1))) for _ in range(2))
    one(windows_of(stream[:50], document[:50]))
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    rest = windows_of(stream[50:], document[50:])
    assert torch.equal(one(rest), other(rest))
    assert torch.equal(one.of_target(), other.of_target())
