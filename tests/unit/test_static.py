"""Acceptance rules against closed forms and brute force, document means by dictionary, scored streams."""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from curriq.config import SelectConfig
from curriq.data.split import gumbel_top_k
from curriq.data.stream import Unreadable, window_id
from curriq.select import static
from curriq.select.rules import RULES, Resampling, TargetPosterior, TargetQuantile, TopShare
from curriq.select.static import (
    DOCUMENT_SHARE,
    FRESH,
    SAMPLE,
    START_QUANTILE,
    Budget,
    RecentTotals,
    Rule,
    ScoredStream,
)
from curriq.select.stream_filter import FilteredStream
from curriq.state import Saved
from curriq.types import Cost, Offer, Windows, WindowSource


def normal(n: int, seed: int, mean: float = 0.0) -> Tensor:
    return mean + torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Document means


class ByDictionary:
    """The means by a dictionary of slots, one update after another."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.kept: dict[int, tuple[int, list[float]]] = {}

    def update(self, documents: list[int], scores: list[float]) -> list[float]:
        for document, score in zip(documents, scores, strict=True):
            name, values = self.kept.get(document % self.slots, (document, []))
            values = values if name == document else []
            self.kept[document % self.slots] = (document, [*values, score])
        return [float(np.mean(self.kept[document % self.slots][1])) for document in documents]


def means(table: RecentTotals, documents: Tensor, scores: Tensor) -> list[float]:
    """The mean of each document, from the totals of its scores and of its windows."""
    _, totals = table.add(documents, torch.stack([scores.double(), torch.ones(len(scores)).double()], 1))
    return (totals[:, 0] / totals[:, 1]).tolist()


def test_document_means_equal_a_dictionary_of_slots():
    """Fifty documents share 16 slots, of which the later one begins afresh; never two in one batch."""
    table, expected = RecentTotals(16, 2), ByDictionary(16)
    generator = np.random.default_rng(0)
    for k in range(60):
        drawn = {int(d) % 16: int(d) for d in generator.integers(0, 50, size=6)}  # one document of each slot
        documents = generator.choice(list(drawn.values()), size=20).tolist()
        found = means(table, torch.tensor(documents), normal(20, k))
        assert found == pytest.approx(expected.update(documents, normal(20, k).tolist()))


def test_two_documents_of_one_slot_in_one_batch_are_not_mixed():
    found = means(RecentTotals(4, 2), torch.tensor([3, 7, 3, 7]), torch.tensor([1.0, 10.0, 3.0, 20.0]))
    assert found == [2.0, 15.0, 2.0, 15.0]


def test_documents_have_63_bit_identities():
    table = RecentTotals(static.DOCUMENTS, 2)
    documents = torch.tensor([2**63 - 1, -(2**63), 2**62 + 1])
    assert means(table, documents, torch.tensor([1.0, 2.0, 3.0])) == [1.0, 2.0, 3.0]
    assert means(table, documents, torch.tensor([3.0, 4.0, 5.0])) == [2.0, 3.0, 4.0]


# Acceptance rules

EVERY_RULE: dict[str, Rule] = {
    "share": TopShare(0.2),
    "quantile": TargetQuantile(0.3),
    "resample": Resampling(0.2, 7),
    "posterior": TargetPosterior(),
    "sharp posterior": TargetPosterior(4.0),
}


@pytest.mark.parametrize("name", EVERY_RULE)
@pytest.mark.parametrize("seed", range(3))
def test_every_rule_gives_probabilities_that_grow_with_the_score(name, seed):
    """They are positive too: their logarithms are interpolated, and are factors of weights."""
    sample, target = normal(500, seed), normal(80, seed + 10, 1.0)
    prob = EVERY_RULE[name](torch.linspace(-6, 6, 400, dtype=torch.float64), sample, target)
    assert (prob.diff() >= 0).all()
    assert prob[0] < 0.2
    assert prob[-1] == pytest.approx(1)
    assert prob.log().isfinite().all()
    assert prob.max() <= 1


@pytest.mark.parametrize("share", [0.05, 0.125, 0.6])
def test_top_share_accepts_its_share(share):
    """The probability is a step, whose edge is a hundredth of a deviation wide."""
    sample = normal(20_000, 0)
    prob = TopShare(share)(sample, sample, normal(5, 1))
    assert prob.mean().item() == pytest.approx(share, abs=0.006)
    threshold = np.quantile(sample.numpy(), 1 - share)
    assert torch.equal(prob == 1, sample >= threshold)
    assert prob[sample < threshold - 0.1].max() < 1e-4


@pytest.mark.parametrize("quantile", [0.0, 0.2, 0.5])
def test_target_quantile_accepts_what_scores_as_the_target_does(quantile):
    sample, target = normal(5000, 0, -1.0), normal(101, 1, 1.0)
    threshold = np.quantile(target.numpy(), quantile)
    prob = TargetQuantile(quantile)(sample, sample, target)
    assert torch.equal(prob == 1, sample >= threshold)
    assert prob[sample < threshold - 0.1].max() < 1e-4


def test_resampling_is_gumbel_top_k():
    """DSIR's own procedure, drawn 600 times: how often each window is among the top k."""
    n, k, terms, draws = 1000, 250, 9, 600
    score, generator = normal(n, 0) / terms, torch.Generator().manual_seed(1)
    prob = Resampling(k / n, terms)(score, score, normal(5, 1))
    assert prob.mean().item() == pytest.approx(k / n, abs=1e-6)
    counts = torch.zeros(n)
    for _ in range(draws):
        counts[gumbel_top_k(terms * score, k, generator)] += 1
    error = (prob * (1 - prob) / draws).sqrt() + 1e-9
    z = (counts / draws - prob) / error
    assert z.abs().max() < 5
    assert (z**2).mean().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_target_posterior_accepts_nearly_all_where_stream_and_target_are_alike(seed):
    sample, target = normal(4000, seed), normal(1000, seed + 10)
    prob = TargetPosterior()(sample, sample, target)
    assert prob.mean() > 0.9
    assert (prob == 1).double().mean() > 0.5


def test_target_posterior_is_that_of_a_mixture_of_two_normals():
    """Three windows in ten are the target's, at +1.5, the others at −1.5, both of variance 1: Bayes' rule."""
    ours = 0.3
    target = normal(20_000, 0, 1.5)
    sample = torch.cat([normal(6000, 1, 1.5), normal(14_000, 2, -1.5)])
    grid = torch.linspace(-1.5, 3, 60, dtype=torch.float64)
    good, bad = ours * stats.norm.pdf(grid, 1.5), (1 - ours) * stats.norm.pdf(grid, -1.5)
    posterior = torch.from_numpy(good / (good + bad))
    found = TargetPosterior()(grid, sample, target)
    assert (found - posterior).abs().max() < 0.15  # isotonic steps where the posterior is steep
    assert (found - posterior).abs().mean() < 0.03
    sharp = TargetPosterior(4.0)(grid, sample, target)
    torch.testing.assert_close(sharp, found**4)


def test_the_posterior_of_labels_is_the_label():
    """Scores of two values: windows that tie are judged alike, whatever their order."""
    sample = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0] * 30, dtype=torch.float64)
    prob = TargetPosterior(4.0)(sample, sample, torch.ones(40, dtype=torch.float64))
    assert prob[sample == 1].tolist() == [1.0] * 60
    assert prob[sample == 0].max() < 1e-9


def test_rules_are_made_from_the_settings():
    """A window of 16 tokens has 31 n-grams."""
    settings = SelectConfig(static_share=0.3, static_quantile=0.4, static_sharpness=2.0)
    made = {name: make(settings, 16) for name, make in RULES.items()}
    assert made == {
        "share": TopShare(0.3),
        "resample": Resampling(0.3, 31),
        "quantile": TargetQuantile(0.4),
        "posterior": TargetPosterior(2.0),
    }


# Scored streams


class Given(Saved):
    """The score of a window is its first token, in thousandths; counts the windows that it is asked for."""

    SAVED = ("asked",)
    cost = Cost(forwards=2)

    def __init__(self, target: Tensor) -> None:
        self.target = target
        self.asked = 0

    def __call__(self, windows: Windows) -> Tensor:
        self.asked += len(windows)
        return windows.tokens[:, 0].double() / 1000

    def of_target(self) -> Tensor:
        return self.target


class Drawn(Saved):
    """A stream of windows with normal scores around the mean of their source.

    Args:
        means: of the sources, which are equally frequent.
        length: windows until it ends.
        size: windows of a document.
    """

    SAVED = ("position",)

    def __init__(self, *means: float, length: int = 10**9, size: int = 1) -> None:
        self.means, self.length, self.size = means, length, size
        self.position = 0

    def read(self, n: int) -> Offer:
        ids = torch.arange(self.position, min(self.position + n, self.length))
        self.position += len(ids)
        draws = [torch.randn(2, generator=torch.Generator().manual_seed(i)).tolist() for i in ids.tolist()]
        source = torch.tensor([int(abs(u) * 1e6) % len(self.means) for u, _ in draws], dtype=torch.int64)
        scores = [self.means[s] + v for s, (_, v) in zip(source.tolist(), draws, strict=True)]
        tokens = (torch.tensor(scores).view(-1, 1) * 1000).round().long().repeat(1, 2)
        windows = Windows(tokens=tokens, ids=ids, source=source, document=ids // self.size)
        return Offer.of(windows, cost=Cost(windows_read=len(ids)), epoch=0)


class Packed(Saved):
    """Twenty documents of source 0 in endless epochs, packed one after another in another order each time,
    and among them new text of source 1; windows of 16 tokens.

    Args:
        every: one window in so many is of source 0.
        sizes: tokens of the documents.
    """

    SAVED = ("position",)

    def __init__(self, every: int, sizes: Sequence[int] = range(70, 90)) -> None:
        self.every, self.position = every, 0
        generator = np.random.default_rng(0)
        documents = [generator.integers(0, 1000, size=size) for size in sizes]
        self.epoch = sum(map(len, documents)) / 16  # windows
        orders = [np.random.default_rng(k).permutation(20) for k in range(40)]
        self.text = np.concatenate([documents[d] for order in orders for d in order])
        self.new = np.random.default_rng(1).integers(0, 1000, size=(200_000, 16))

    def read(self, n: int) -> Offer:
        rows = [self._row(self.position + i) for i in range(n)]
        self.position += n
        source = torch.tensor([source for source, _ in rows])
        ids = torch.tensor([window_id(str(source), tokens) for source, tokens in rows])
        tokens = torch.tensor(np.stack([tokens for _, tokens in rows]))
        windows = Windows(tokens=tokens, ids=ids, source=source, document=ids)
        return Offer.of(windows, cost=Cost(windows_read=n), epoch=0)

    def _row(self, i: int) -> tuple[int, np.ndarray]:
        if i % self.every:
            return 1, self.new[i]
        begin = i // self.every * 16
        return 0, self.text[begin : begin + 16]


def target_windows(n: int, documents: int | None = None) -> Windows:
    numbers = torch.arange(n)
    document = numbers if documents is None else numbers % documents
    return Windows(tokens=numbers[:, None], ids=numbers, source=numbers * 0, document=document)


def scored(
    stream: WindowSource, rule: Rule | None = None, *, target: Tensor | None = None, **settings: Any
) -> ScoredStream:
    target = normal(200, 77) if target is None else target
    return ScoredStream(stream, Given(target), rule, target_windows(len(target)), **settings)


def read(stream: ScoredStream, n: int, size: int = 256) -> Offer:
    return Offer.cat([stream.read(size) for _ in range(n // size)])


class TestScoredStream:
    def test_scores_are_in_deviations_of_the_stream_and_bounded(self):
        found = read(scored(Drawn(5.0)), 4096)
        late = found.known["static_score"][-1024:]
        assert late.mean().item() == pytest.approx(0, abs=0.1)
        assert late.std().item() == pytest.approx(1, abs=0.1)
        assert found.known["static_score"].abs().max() <= 3
        assert "prior" not in found.known

    def test_the_targets_own_scores_are_on_the_same_scale(self):
        """One document each, so that its mean is the window's own score."""
        stream, target = scored(Drawn(0.0), target=normal(200, 77, 1.0)), normal(200, 77, 1.0)
        raw = read(stream, 1024).windows.tokens[:, 0].double() / 1000
        expected = ((target - raw.mean()) / raw.std(correction=0)).clamp(-3, 3)
        torch.testing.assert_close(stream.of_target().double(), expected, rtol=0, atol=1e-5)

    def test_a_window_is_scored_with_its_documents_mean(self):
        """Eight windows of each document, read at once: between its own score and the mean of the eight."""
        offer = scored(Drawn(0.0, size=8)).read(512)
        own = offer.windows.tokens[:, 0].double() / 1000
        mean = own.view(-1, 8).mean(1).repeat_interleave(8)
        pooled = (1 - DOCUMENT_SHARE) * own + DOCUMENT_SHARE * mean
        expected = ((pooled - pooled.mean()) / pooled.std(correction=0)).clamp(-3, 3)
        torch.testing.assert_close(offer.known["static_score"].double(), expected, rtol=0, atol=1e-5)

    def test_the_target_is_pooled_in_the_same_way(self):
        target = normal(60, 5)
        stream = ScoredStream(Drawn(0.0), Given(target), None, target_windows(60, documents=6))
        raw = read(stream, 512).windows.tokens[:, 0].double() / 1000
        mean = target.view(10, 6).mean(0).repeat(10)
        pooled = (1 - DOCUMENT_SHARE) * target + DOCUMENT_SHARE * mean
        expected = ((pooled - raw.mean()) / raw.std(correction=0)).clamp(-3, 3)
        torch.testing.assert_close(stream.of_target().double(), expected, rtol=0, atol=1e-5)

    def test_equal_windows_give_no_order(self):
        class Equal(Drawn):
            def read(self, n: int) -> Offer:
                offer = super().read(n)
                offer.windows.tokens.fill_(5)
                return offer

        assert scored(Equal(0.0)).read(8).known["static_score"].tolist() == [0.0] * 8

    @pytest.mark.parametrize("name", EVERY_RULE)
    def test_the_prior_is_the_rules_probability(self, name):
        """On a grid of scores, and fitted again as the sample grows; at the end that of the whole sample."""
        rule, target = EVERY_RULE[name], normal(200, 77)
        stream = scored(Drawn(0.0), rule, target=target)
        offer = read(stream, SAMPLE, 512)
        raw = offer.windows.tokens[:, 0].double() / 1000
        last = slice(-512, None)
        expected = rule(raw[last], raw, target)
        # Where the rule is a step, a cell of the grid is as wide as its edge.
        assert (offer.known["prior"][last] - expected).abs().mean() < 0.02

    def test_the_label_of_the_targets_own_source_is_trusted(self):
        """It scores lower than the other source. By the score alone it would be rejected; trusted, it comes
        first, and of the other source the most target-like comes next, among what the rule takes for the
        target's as well."""
        plain, trusting = (
            scored(Drawn(0.0, 3.0), TopShare(0.5), target=normal(200, 77, 3.0), own_source=source)
            for source in (-1, 0)
        )
        offer, other = read(plain, 1024), read(trusting, 1024)
        own = offer.windows.source == 0
        prior, trusted = offer.known["prior"], other.known["prior"]
        assert prior[own].mean() < 0.1 < 0.8 < prior[~own].mean()
        assert trusted[own].tolist() == [1.0] * int(own.sum())
        raw = offer.windows.tokens[~own, 0].double() / 1000
        assert 1e-18 <= trusted[~own].min() < trusted[~own].max() <= 1e-6
        best = raw > raw.quantile(0.9)
        assert trusted[~own][best].min() > 10 * trusted[~own][raw < raw.quantile(0.7)].max()

    def test_a_start_accepts_the_most_target_like_text_of_any_source(self):
        """A third of the stream is like the target. The rule accepts it all, the start its best part; then
        the label counts."""
        target = normal(200, 77, 3.0)
        stream = scored(
            Drawn(0.0, 3.0, 0.0), TargetPosterior(4.0), target=target, own_source=0, sharp_start=1100
        )
        share = read(scored(Drawn(0.0, 3.0, 0.0), TargetPosterior(4.0), target=target), 2048).known["prior"]
        start = stream.read(1024)
        raw = start.windows.tokens[:, 0].double() / 1000
        threshold = target.quantile(START_QUANTILE * (1 - share.mean().item()))
        accepted = start.known["prior"] > 0.5
        assert (accepted == (raw > threshold)).double().mean() > 0.98
        assert 0.1 < accepted.double().mean() < 0.2
        later = stream.read(256)
        assert later.known["prior"].gt(0.5).equal(later.windows.source == 0)

    def test_a_start_that_is_blunter_than_the_label_is_none(self):
        """All sources score alike: the scores would accept nearly everything, the label takes a third."""
        stream = scored(Drawn(0.0, 0.0, 0.0), TargetPosterior(4.0), own_source=0, sharp_start=10**6)
        offer = read(stream, 2048)
        assert offer.known["prior"].gt(0.5).equal(offer.windows.source == 0)

    def test_a_start_rejects_nothing_of_a_stream_that_is_like_the_target(self):
        offer = read(scored(Drawn(0.0), TargetPosterior(4.0), sharp_start=10**6), 2048)
        assert (offer.known["prior"] > 0.5).double().mean() > 0.95

    @pytest.mark.parametrize(("every", "times"), [(5, 30), (5, 18), (2, 16)])
    def test_text_that_would_be_trained_on_over_and_over_is_trusted_in_part(
        self, every: int, times: int, caplog: pytest.LogCaptureFixture
    ):
        """Its windows are cut elsewhere in each epoch, so that none comes twice. A run that trained on
        nothing else would train on them so many times."""
        source = Packed(every)
        budget = Budget(windows=times * source.epoch, read_ratio=8, passes=12)
        stream = scored(source, TopShare(0.5), own_source=0, budget=budget)
        wanted = max(12 / times, 1 / every)  # share of what is trained on
        share, found_shares = min(1.0, wanted * every / 8), []
        for epoch in range(1, 21):
            found = read(stream, int(source.epoch * every), size=10)
            prior = found.known["prior"][found.windows.source == 0]
            if epoch <= FRESH:
                assert prior.min() == 1
            if epoch > 10:
                assert stream.trusted_share == pytest.approx(share, rel=0.3)
                found_shares.append((prior == 1).double().mean().item())
                worst = found.known["prior"][found.windows.source == 1].min()
                assert prior.min() <= worst  # the rest comes last

        assert np.mean(found_shares) == pytest.approx(share, rel=0.3)
        (said,) = [record.getMessage() for record in caplog.records]
        found = re.search(r"own source (\d+) times: from now on it is (\d+)% of what", said)
        assert found is not None
        assert int(found[1]) == pytest.approx(times, rel=0.3)
        assert int(found[2]) / 100 == pytest.approx(wanted, rel=0.3)

    def test_where_the_same_windows_come_again_others_are_trusted_in_each_epoch(self):
        source = Packed(5, sizes=[80] * 20)
        stream = scored(source, TopShare(0.5), own_source=0, budget=Budget(30 * source.epoch, 8, passes=12))
        trusted, seen = set[int](), set[int]()
        for epoch in range(1, 31):
            found = read(stream, int(source.epoch * 5), size=10)
            own = found.windows.source == 0
            seen |= set(found.windows.ids[own].tolist())
            if epoch > 10:
                trusted |= set(found.windows.ids[own & (found.known["prior"] == 1)].tolist())
        assert len(seen) == 100
        assert len(trusted) > 90

    def test_text_that_is_not_trained_on_too_often_is_trusted_wholly(self, caplog: pytest.LogCaptureFixture):
        source = Packed(5)
        budget = Budget(windows=11 * source.epoch, read_ratio=8, passes=12)
        stream = scored(source, TopShare(0.5), own_source=0, budget=budget)
        found = read(stream, int(20 * source.epoch * 5), size=10)
        assert found.known["prior"][found.windows.source == 0].min() == 1
        assert not caplog.records

    @pytest.mark.parametrize(("passes", "share"), [(0, 1), (8, 1), (8.8, 1), (10, 0.8), (16, 0.5)])
    def test_a_limit_of_less_than_a_tenth_is_not_applied(self, passes: float, share: float, monkeypatch):
        stream = scored(Packed(5), TopShare(0.5), own_source=0, budget=Budget(1, 8, passes=8))
        read(stream, 200, size=10)
        monkeypatch.setattr(ScoredStream, "passes", passes)
        assert stream.own_share == pytest.approx(share)
        assert stream.trusted_share == (1 if share == 1 else pytest.approx(share / (0.2 * 8)))

    def test_a_source_that_is_all_of_the_stream_is_taken_as_it_comes(self):
        """There is nothing else, however often it comes."""
        source = Packed(1)
        stream = scored(source, TopShare(0.5), own_source=0, budget=Budget(1000 * source.epoch, 8, passes=12))
        assert read(stream, int(20 * source.epoch), size=10).known["prior"].min() == 1

    def test_totals_before_a_batch_equal_a_dictionary(self):
        table, expected = RecentTotals(8, 1), dict[int, tuple[int, int]]()
        generator = torch.Generator().manual_seed(5)
        for _ in range(40):
            ids = torch.randint(0, 30, (1,), generator=generator).repeat(3)
            name = int(ids[0])
            kept = expected.get(name % 8, (name, 0))
            before = kept[1] if kept[0] == name else 0
            assert table.add(ids, torch.ones(3, 1))[0].flatten().tolist() == [before] * 3
            expected[name % 8] = (name, before + 3)

    def test_a_document_and_its_corrupted_copy_have_means_of_their_own(self):
        """They have the same identity, and different sources."""

        class Copies(Drawn):
            def read(self, n: int) -> Offer:
                offer = super().read(n)
                offer.windows.document.fill_(9)
                offer.windows.source.copy_(torch.arange(n) % 2)
                offer.windows.tokens.copy_((1000 * (torch.arange(n) % 2))[:, None].expand(n, 2))
                return offer

        found = scored(Copies(0.0)).read(64).known["static_score"]
        assert found.tolist() == [-1.0, 1.0] * 32

    def test_continues_bitwise_from_its_state(self):
        one, other = (
            scored(Drawn(0.0, 2.0, size=4), TargetPosterior(4.0), own_source=0, sharp_start=300)
            for _ in range(2)
        )
        read(one, 700, 100)
        buffer = io.BytesIO()
        torch.save(one.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        for _ in range(3):
            ours, theirs = one.read(60), other.read(60)
            assert torch.equal(ours.windows.ids, theirs.windows.ids)
            for name in ("static_score", "prior"):
                assert torch.equal(ours.known[name], theirs.known[name]), name
        assert torch.equal(one.of_target(), other.of_target())

    def test_a_stream_that_ends_gives_an_empty_offer(self):
        stream = scored(Drawn(0.0, length=10), TopShare(0.5))
        assert [len(stream.read(6)) for _ in range(3)] == [6, 4, 0]


def filtered(stream: ScoredStream, accept_prob: Callable[[Offer], Tensor], look_ahead: int) -> FilteredStream:
    return FilteredStream(
        Unreadable(stream, look_ahead=look_ahead),
        16,
        max_read_ratio=8,
        accept_prob=accept_prob,
        generator=torch.Generator().manual_seed(1),
    )


class TestLookAhead:
    @pytest.mark.parametrize("look_ahead", [0, 500])
    def test_loses_and_repeats_no_window_and_counts_each_cost_once(self, look_ahead):
        stream = scored(Drawn(0.0), TopShare(0.3))
        proposer = filtered(stream, lambda offer: offer.known["prior"], look_ahead)
        offers = [proposer.propose(k) for k in range(30)]
        ids = torch.cat([part.windows.ids for offer in offers for part in offer.judged])
        assert torch.equal(ids.sort().values, torch.arange(len(ids)))
        cost = sum((offer.cost for offer in offers), Cost())
        assert cost.windows_read == len(ids)
        assert stream.score.asked == stream.stream.position  # each window was scored once
        assert cost.forwards == 2 * stream.stream.position

    def test_the_first_step_knows_what_the_stream_is_like(self):
        """Otherwise the first windows would only be compared with each other."""
        stream = scored(Drawn(0.0), TopShare(0.25))
        offer = filtered(stream, lambda offer: offer.known["prior"], 2048).propose(0)
        scores = offer.windows.tokens[:, 0].double() / 1000
        assert scores.min() > normal(100_000, 3).quantile(0.75) - 0.15

    def test_without_selection_the_windows_are_those_of_the_plain_stream(self):
        proposer = filtered(scored(Drawn(0.0)), lambda offer: torch.ones(len(offer)), 300)
        ids = torch.cat([proposer.propose(k).windows.ids for k in range(40)])
        assert torch.equal(ids, torch.arange(40 * 16))

    def test_a_stream_shorter_than_it_is_used_up(self):
        proposer = filtered(scored(Drawn(0.0, length=40)), lambda offer: torch.ones(len(offer)), 300)
        assert [len(proposer.propose(k)) for k in range(3)] == [16, 16, 8]

    def test_happens_once_also_after_a_resume(self):
        one, other = (
            filtered(scored(Drawn(0.0), TopShare(0.3)), lambda offer: offer.known["prior"], 300)
            for _ in range(2)
        )
        one.propose(0)
        other.load_state_dict(one.state_dict())
        for k in range(1, 8):
            ours, theirs = one.propose(k), other.propose(k)
            assert torch.equal(ours.windows.ids, theirs.windows.ids)
            assert ours.cost == theirs.cost
        assert math.isclose(one.stream._stream.score.asked, other.stream._stream.score.asked)
