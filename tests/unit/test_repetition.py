"""Repetitions of text, against counting by dictionary; a filter that accepts them less."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from curriq.data.stream import Unreadable
from curriq.select import repetition
from curriq.select.base import PASSAGE
from curriq.select.repetition import REPEATED, Repetitions
from curriq.select.static import FRESH
from curriq.select.stream_filter import FilteredStream
from curriq.types import IGNORED, Cost, Offer, Sampled, Windows

T = 32


def of(tokens: torch.Tensor, labels: torch.Tensor | None = None) -> Windows:
    n = len(tokens)
    return Windows(
        tokens=tokens, ids=torch.arange(n), source=torch.zeros(n, dtype=torch.int64), labels=labels
    )


def random_text(n: int, seed: int, vocabulary: int = 1000) -> torch.Tensor:
    return torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(seed))


def brute_force(trained: torch.Tensor, window: torch.Tensor) -> int:
    """The count that at least `REPEATED` of the window's passages reach, strictly more than that share."""

    def passages(row: torch.Tensor) -> list[tuple[int, ...]]:
        tokens = row.tolist()
        return [tuple(tokens[i : i + PASSAGE]) for i in range(len(tokens) - PASSAGE + 1)]

    counts = Counter(passage for row in trained for passage in passages(row))
    most_first = sorted((counts[passage] for passage in passages(window)), reverse=True)
    return most_first[int(REPEATED * len(most_first))]


class TestCount:
    def test_is_that_of_a_dictionary(self) -> None:
        """A vocabulary of two tokens, in which passages recur often and everywhere."""
        text = random_text(200 * T, 0, vocabulary=2).view(-1, T)
        counter = Repetitions(0.5, T)
        for part in text[:150].split(7):
            counter.add(of(part))
        wanted = [brute_force(text[:150], row) for row in text]
        assert counter.count(of(text)).tolist() == wanted
        assert max(wanted) > min(wanted) > 0

    def test_a_copy_cut_elsewhere_counts(self) -> None:
        text = random_text(100 * T, 1)
        counter = Repetitions(0.5, T)
        counter.add(of(text.view(-1, T)))
        shifted = text[T // 2 : -T // 2].view(-1, T)
        assert (counter.count(of(shifted)) == 1).all()
        counter.add(of(shifted))
        assert (counter.count(of(text.view(-1, T)))[1:-1] == 2).all()

    @pytest.mark.parametrize(("every", "seen"), [(20, 1.0), (6, 0.0)])
    def test_a_near_copy_counts_and_other_text_does_not(self, every: int, seen: float) -> None:
        text = random_text(100 * T, 2).view(-1, T)
        counter = Repetitions(0.5, T)
        counter.add(of(text))
        edited = text.clone()
        edited.view(-1)[::every] = 1000
        assert counter.count(of(edited)).mean() == pytest.approx(seen, abs=0.05)
        assert counter.count(of(random_text(100 * T, 3).view(-1, T))).sum() == 0

    def test_of_long_windows_the_same_passages_are_sampled_in_every_copy(self) -> None:
        text = random_text(50 * 512, 4)
        counter = Repetitions(0.5, 512)
        counter.add(of(text.view(-1, 512)))
        assert (counter.count(of(text[100:-412].view(-1, 512))) == 1).all()
        assert len(counter.state_dict()["where"]) < 50 * 512 / 10

    def test_what_is_not_learnt_does_not_count(self) -> None:
        """Two windows with the same prompt and padding, and other answers."""
        tokens = random_text(2 * T, 5).view(2, T)
        tokens[1, : T // 2] = tokens[0, : T // 2]
        labels = tokens.clone()
        labels[:, : T // 2] = IGNORED
        counter = Repetitions(0.5, T)
        counter.add(of(tokens[:1], labels[:1]))
        assert counter.count(of(tokens, labels)).tolist() == [1, 0]

    def test_windows_too_short_to_tell_have_none(self) -> None:
        short = of(torch.zeros(3, PASSAGE - 1, dtype=torch.int64))
        counter = Repetitions(0.5, T)
        counter.add(short)
        assert counter.count(short).tolist() == [0, 0, 0]

    def test_old_text_is_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(repetition, "SLOTS", 2**16)
        text = random_text(1000 * T, 6).view(-1, T)
        counter = Repetitions(0.5, T)
        for part in text.split(10):
            counter.add(of(part))
        counts = counter.count(of(text))
        assert counts[:300].mean() < 0.05
        assert (counts[-150:] >= 1).all()


def offered(counter: Repetitions, text: torch.Tensor, prob: torch.Tensor, accepted: int = 0) -> Offer:
    """Text that has been read, with the probabilities of being accepted; the first windows were."""
    windows = of(text)
    sampled = Sampled(accept_prob=prob, repetitions=counter.count(windows))
    offer = replace(Offer.of(windows), sampled=sampled)
    return replace(offer.take(slice(accepted)), rejected=offer.take(slice(accepted, None)))


def factors(counter: Repetitions, text: torch.Tensor) -> list[float]:
    return counter.factor(counter.count(of(text))).tolist()


class TestFactor:
    def test_each_repetition_beyond_those_of_the_least_repeated_and_the_free_ones_is_discounted(self) -> None:
        text = random_text(200 * T, 7).view(-1, T)
        counter = Repetitions(0.5, T)
        for rows, times in ((50, FRESH), (100, 1), (200, 1)):
            for _ in range(times):
                counter.add(of(text[:rows]))
        counter.add(of(text[:25]))
        counter.take_in(offered(counter, text, torch.ones(200, dtype=torch.float64)))
        assert factors(counter, text) == [0.25] * 25 + [0.5] * 25 + [1.0] * 150

    def test_where_all_is_repeated_alike_nothing_is(self) -> None:
        text = random_text(100 * T, 8).view(-1, T)
        counter = Repetitions(0.5, T)
        for _ in range(2 * FRESH):
            counter.add(of(text))
        assert factors(counter, text) == [0.5**FRESH] * 100
        # What was rejected for repetition alone counts for the level all the same.
        counter.take_in(offered(counter, text, torch.full((100,), 0.5**FRESH, dtype=torch.float64)))
        assert factors(counter, text) == [1.0] * 100

    def test_fresh_text_that_is_hardly_accepted_does_not_set_the_level(self) -> None:
        text = random_text(100 * T, 9).view(-1, T)
        counter = Repetitions(0.5, T)
        for _ in range(2 * FRESH):
            counter.add(of(text[:50]))
        repeated = torch.arange(100) < 50
        prob = torch.where(repeated, 0.5**FRESH, 1e-6).double()
        counter.take_in(offered(counter, text, prob))
        assert factors(counter, text)[:50] == [1.0] * 50

    def test_accepted_and_rejected_are_judged_by_one_level(self) -> None:
        """What was accepted would move the level so far that what was rejected for repetition alone would no
        longer seem so."""
        text = random_text(20 * T, 11).view(-1, T)
        counter = Repetitions(0.5, T)
        for _ in range(2 * FRESH):
            counter.add(of(text))
        for _ in range(2):
            counter.add(of(text[:10]))
        prob = counter.factor(counter.count(of(text)))
        counter.take_in(offered(counter, text, prob, accepted=10))
        # The accepted ten are trained on once more; the level is the count of the rejected ten.
        assert factors(counter, text) == [1.0] * 20
        counter.add(of(text[:10]))
        counter.add(of(text[:10]))
        assert factors(counter, text) == [0.5] * 10 + [1.0] * 10

    def test_what_was_not_counted_is_not_discounted(self) -> None:
        counter = Repetitions(0.5, T)
        assert counter.factor(torch.tensor([FRESH + 1.0, torch.nan]).double()).tolist() == [0.5, 1.0]

    def test_only_what_is_likely_or_drawn_is_counted(self) -> None:
        text = random_text(3 * T, 12).view(-1, T)
        counter = Repetitions(0.5, T)
        counter.add(of(text))
        prob, draws = torch.tensor([0.5, 0.4, 0.4]).double(), torch.tensor([0.9, 0.4, 0.41]).double()
        assert counter.count_likely(of(text), prob, draws).isnan().tolist() == [False, False, True]


class Text:
    """A stream of one text in two thirds of its windows, and new ones."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.common = random_text(T, 10)

    def read(self, n: int) -> Offer:
        tokens = torch.randint(0, 1000, (n, T), generator=self.generator)
        tokens[torch.rand(n, generator=self.generator) < 2 / 3] = self.common
        return Offer.of(of(tokens), cost=Cost(windows_read=n), epoch=0)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])


def filtering(discount: float, prob: tuple[float, float] = (1.0, 1.0)) -> FilteredStream:
    """Accepts new text, and the common one, with these probabilities, but for repetitions."""
    stream, (new, common) = Text(), prob

    def accept_prob(offer: Offer) -> torch.Tensor:
        return torch.where((offer.windows.tokens == stream.common).all(1), common, new).double()

    return FilteredStream(
        Unreadable(stream),
        16,
        max_read_ratio=8,
        accept_prob=accept_prob,
        generator=torch.Generator().manual_seed(1),
        repetitions=Repetitions(discount, T) if discount < 1 else None,
    )


def test_a_filter_trains_on_new_text_first() -> None:
    def repeated(offer: Offer, common: torch.Tensor) -> float:
        return (offer.windows.tokens == common).all(1).double().mean().item()

    common = Text().common
    plain, discounting = filtering(1.0), filtering(0.5)
    offers = [(plain.propose(k), discounting.propose(k)) for k in range(20)]
    assert sum(repeated(without, common) for without, _ in offers) / 20 > 0.6
    assert sum(repeated(with_, common) for _, with_ in offers[5:]) / 15 < 0.1
    assert "policy/repetitions" not in offers[0][0].metrics
    hardly = filtering(0.999)
    repetitions = [hardly.propose(k).metrics["policy/repetitions"] for k in range(3)]
    assert repetitions[0] == 0
    assert repetitions[2] > repetitions[1] > 1


class CountsAll(Repetitions):
    def count_likely(self, windows: Windows, prob: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        return self.count(windows)


def test_a_step_that_is_filled_is_that_of_a_filter_that_counts_every_window() -> None:
    """With so small probabilities all windows that may be read are; the rest are those that came nearest."""
    some, every = filtering(0.5, (0.02, 0.1)), filtering(0.5, (0.02, 0.1))
    every.repetitions = CountsAll(0.5, T)
    uncounted = 0
    for k in range(20):
        mine, wanted = some.propose(k), every.propose(k)
        assert mine.cost.windows_read == 8 * 16
        assert mine.windows.tokens.equal(wanted.windows.tokens)
        for name in ("accept_prob", "repetitions"):
            assert getattr(mine.sampled, name).equal(getattr(wanted.sampled, name))
        uncounted += int(mine.rejected.sampled.repetitions.isnan().sum())
    assert uncounted > 20 * 20


def test_a_filter_goes_on_as_if_it_had_not_been_interrupted() -> None:
    whole, first, second = filtering(0.5), filtering(0.5), filtering(0.5)
    expected = [whole.propose(k) for k in range(10)]
    for k in range(5):
        first.propose(k)
    second.load_state_dict(first.state_dict())
    for k in range(5, 10):
        offer = second.propose(k)
        assert offer.windows.tokens.equal(expected[k].windows.tokens)
        assert offer.metrics == expected[k].metrics
