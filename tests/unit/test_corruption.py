"""Corruptions: what each changes and what it keeps, how much, and that it repeats exactly."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from curriq.config import CorruptionName
from curriq.data.corruption import (
    DISTINCT_DUPLICATES,
    Duplicates,
    corrupt_text,
    corrupt_tokens,
    document_rng,
)
from curriq.data.documents import Document, DocumentSource, MemorySource, read_epoch
from curriq.errors import CurriqError

TEXT = (
    "The modern learner returns home in a cold morning. I will clearly explain all of it: O, how little "
    "we know! 10 small vessels, 1 large ship, and a fine harbour filled with silent men.\n"
) * 12


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance, by the textbook recurrence."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


class TestOcr:
    def test_about_eight_percent_of_the_characters_are_wrong(self) -> None:
        clean = TEXT[:900]
        rates = [edit_distance(clean, corrupt_text("ocr", clean, rng(seed))) / 900 for seed in range(3)]
        assert 0.06 < np.mean(rates) < 0.12  # a pair that is taken for one character counts as two edits

    def test_every_kind_of_error_occurs(self) -> None:
        noisy = corrupt_text("ocr", TEXT * 10, rng())
        for clean_word, read_as in (("modern", "modem"), ("will", "wi1l"), ("The", "Thc"), ("O,", "0,")):
            assert clean_word in TEXT
            assert read_as in noisy
        assert noisy.count("-\n") > 10  # words broken by a line break
        assert noisy.count(" ") < (TEXT * 10).count(" ")  # lost spaces
        assert set(noisy) - set(TEXT) >= set("~^|*`")  # stray marks

    def test_keeps_most_words(self) -> None:
        clean, noisy = TEXT.split(), corrupt_text("ocr", TEXT, rng()).split()
        kept = sum((Counter(clean) & Counter(noisy)).values())
        assert 0.4 < kept / len(clean) < 0.85

    @pytest.mark.parametrize("text", ["", "a", "rn", " ", "学習", "\n\n", "😀" * 50])
    def test_any_text(self, text: str) -> None:
        for seed in range(50):
            assert isinstance(corrupt_text("ocr", text, rng(seed)), str)

    def test_untouched_text_is_kept_in_order(self) -> None:
        digits = "23568" * 200  # characters that nothing is mistaken for
        noisy = corrupt_text("ocr", digits, rng())
        assert "".join(c for c in noisy if c.isdigit()) == digits


class TestTokens:
    VOCABULARY = np.array([1, 2, 3, 5, 8, 13, 21, 34])

    def test_random_tokens_are_uniform_over_the_vocabulary(self) -> None:
        ids = corrupt_tokens("random-tokens", [0] * 8000, self.VOCABULARY, rng())
        assert len(ids) == 8000
        assert set(ids) == set(self.VOCABULARY.tolist())
        assert stats.chisquare(list(Counter(ids).values())).pvalue > 1e-3

    def test_shuffled_tokens_are_a_permutation(self) -> None:
        ids = [7, 7, 8, 9] * 50
        shuffled = corrupt_tokens("shuffled-tokens", ids, self.VOCABULARY, rng())
        assert shuffled != ids
        assert sorted(shuffled) == sorted(ids)

    def test_shuffled_tokens_are_uniform_over_orders(self) -> None:
        orders = Counter(
            tuple(corrupt_tokens("shuffled-tokens", [1, 2, 3], self.VOCABULARY, rng(seed)))
            for seed in range(3000)
        )
        assert len(orders) == 6
        assert stats.chisquare(list(orders.values())).pvalue > 1e-3

    @pytest.mark.parametrize("name", ["random-tokens", "shuffled-tokens"])
    def test_plain_integers_and_empty_documents(self, name: CorruptionName) -> None:
        assert corrupt_tokens(name, [], self.VOCABULARY, rng()) == []
        assert {type(i) for i in corrupt_tokens(name, [1, 2], self.VOCABULARY, rng())} == {int}


ACTS_ON = {
    "none": (),
    "ocr": ("text",),
    "random-tokens": ("tokens",),
    "shuffled-tokens": ("tokens",),
    "duplicates": (),
}


@pytest.mark.parametrize("name", ACTS_ON)
def test_each_corruption_acts_in_its_own_place_only(name: CorruptionName) -> None:
    ids = list(range(100))
    changed = {
        "text": corrupt_text(name, TEXT, rng()) != TEXT,
        "tokens": corrupt_tokens(name, ids, np.arange(100), rng()) != ids,
    }
    assert tuple(what for what, is_changed in changed.items() if is_changed) == ACTS_ON[name]


def test_randomness_of_a_document_follows_from_its_place_alone() -> None:
    document = Document("some text")
    places = [(0, "a", document, 0), (1, "a", document, 0), (0, "b", document, 0), (0, "a", document, 1)]
    places.append((0, "a", Document("other text"), 0))
    draws = [tuple(document_rng(*place).integers(1 << 30, size=4).tolist()) for place in places]
    assert len(set(draws)) == len(places)
    assert draws == [tuple(document_rng(*place).integers(1 << 30, size=4).tolist()) for place in places]
    # What counts is the key: a copy in other white space has the same noise.
    again = document_rng(0, "a", Document(" some\ntext "), 0)
    assert tuple(again.integers(1 << 30, size=4).tolist()) == draws[0]


class TestDuplicates:
    def source(self, size: int = 100) -> MemorySource:
        return MemorySource("mine", [Document(f"document {i}", i) for i in range(size)], seed=0)

    def test_repeats_a_few_documents_exactly(self) -> None:
        duplicates = Duplicates(self.source(), seed=0)
        epochs = [list(read_epoch(duplicates)) for _ in range(5)]
        assert {len(epoch) for epoch in epochs} == {DISTINCT_DUPLICATES}
        assert len({frozenset(epoch) for epoch in epochs}) == 1
        assert len({tuple(epoch) for epoch in epochs}) == 5
        assert set(epochs[0]) <= set(read_epoch(self.source()))
        assert duplicates.epoch == 5

    def test_resumes_exactly_from_every_point(self) -> None:
        original = Duplicates(self.source(), seed=0, distinct=3)
        states, seen = [], []
        for _ in range(10):
            states.append(original.state_dict())
            seen.append(original.next_document())
        for point, state in enumerate(states):
            resumed = Duplicates(self.source(), seed=0, distinct=3)
            resumed.load_state_dict(state)
            assert [resumed.next_document() for _ in range(point, 10)] == seen[point:]

    def test_small_and_empty_sources(self) -> None:
        assert len(list(read_epoch(Duplicates(self.source(5), seed=0)))) == 5
        empty = self.source(1)
        empty.next_document()
        with pytest.raises(CurriqError, match="holds no document"):
            Duplicates(empty, seed=0)

    def test_is_a_source_with_the_fingerprint_of_the_whole(self) -> None:
        duplicates = Duplicates(self.source(), seed=0)
        assert isinstance(duplicates, DocumentSource)
        assert duplicates.name == "mine"
        assert duplicates.fingerprint() == self.source().fingerprint()
