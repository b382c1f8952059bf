"""Passages, by which a text is known again wherever its windows begin."""

from collections import Counter

import pytest
import torch

from curriq.select.base import PASSAGE, passages
from curriq.types import IGNORED, Windows

T = 32


def of(tokens: torch.Tensor, labels: torch.Tensor | None = None) -> Windows:
    n = len(tokens)
    return Windows(
        tokens=tokens, ids=torch.arange(n), source=torch.zeros(n, dtype=torch.int64), labels=labels
    )


def random_text(n: int, seed: int, vocabulary: int = 1000) -> torch.Tensor:
    return torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(seed))


def keys(windows: Windows, every: int = 1) -> list[set[int]]:
    """The passages of each window."""
    window, key = passages(windows, every)
    found: list[set[int]] = [set() for _ in range(len(windows))]
    for row, value in zip(window.tolist(), key.tolist(), strict=True):
        found[row].add(value)
    return found


def test_they_are_those_of_a_dictionary():
    """A vocabulary of two tokens, in which passages recur often and everywhere."""
    text = random_text(200 * T, 0, vocabulary=2).view(-1, T)
    rows = [row.unfold(0, PASSAGE, 1).tolist() for row in text]
    wanted = Counter(tuple(passage) for row in rows for passage in row)
    _, found = passages(of(text), 1)
    assert sorted(Counter(found.tolist()).values()) == sorted(wanted.values())
    assert max(wanted.values()) > 1


def test_a_copy_cut_elsewhere_has_the_same():
    """And of long windows, of which some are taken, the same ones."""
    text = random_text(50 * 512, 1)
    for every in (1, 16):
        whole = keys(of(text.view(1, -1)), every)[0]
        for shifted in keys(of(text[100:-412].view(-1, 512)), every):
            assert shifted <= whole
            assert len(shifted) == pytest.approx((512 - PASSAGE + 1) / every, rel=0.6)


def test_a_near_copy_has_most_of_them_and_other_text_none():
    text = random_text(100 * T, 2).view(-1, T)
    edited = text.clone()
    edited.view(-1)[::20] = 1000
    known = set().union(*keys(of(text)))
    shared = [len(row & known) / len(row) for row in keys(of(edited))]
    assert sum(shared) / len(shared) > 0.5
    assert not known & set().union(*keys(of(random_text(100 * T, 3).view(-1, T))))


def test_what_is_not_learnt_does_not_count():
    """Two windows with the same prompt, and other answers."""
    tokens = random_text(2 * T, 5).view(2, T)
    tokens[1, : T // 2] = tokens[0, : T // 2]
    labels = tokens.clone()
    labels[:, : T // 2] = IGNORED
    first, second = keys(of(tokens, labels))
    assert len(first) == len(second) == T // 2 - PASSAGE + 1
    assert not first & second


def test_windows_too_short_have_none():
    assert keys(of(torch.zeros(3, PASSAGE - 1, dtype=torch.int64))) == [set()] * 3
