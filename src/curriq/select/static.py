"""What is known of a window before the model has learnt anything: static scores, and how much they accept.

A static score says how target-like a window is. An acceptance rule turns scores into probabilities between 0
and 1. Both together are a data filter of the usual kind, which `--selector filter` applies as it is, and the
prior π₀ of the learned policy, π ∝ π₀ exp(Q/β) (Eq. 17 with p₀ = π₀).
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import brentq, isotonic_regression
from torch import Tensor

from curriq.config import SelectConfig
from curriq.data.ngrams import BUCKETS, FOLDS, NO_NGRAM, NgramCounts
from curriq.select.base import History
from curriq.state import Saved
from curriq.types import NO_COST, Cost, Offer, Stateful, Windows, WindowSource

PRIOR = 8192.0
"""Mass of the smoothing prior, in n-grams."""
DOCUMENTS = 2**16
"""Documents whose mean score is remembered, the most recent ones."""
WINDOWS = 2**18
"""Windows whose repetitions are counted, the most recent ones."""


@runtime_checkable
class StaticScore(Stateful, Protocol):
    """How target-like a window is, known without what θ has learnt; higher is more so.

    Attributes:
        cost: of scoring one window.
    """

    @property
    def cost(self) -> Cost: ...

    def __call__(self, windows: Windows) -> Float[Tensor, "n"]:
        """Scores of windows of the stream, which a score that learns takes in first."""
        ...

    def of_target(self) -> Float[Tensor, "D"]:
        """Scores of the target's own windows now, none compared with text of its own document."""
        ...


class DsirScore(Saved):
    """The importance weight of a window by its n-grams, in nats per n-gram.

    The weight is that of DSIR (Xie et al. 2023, "Data Selection for Language Models via Importance
    Resampling"): the mean over the window's unigrams and bigrams w of log p_D(w) − log p_S(w), with p_D from
    the target's text and p_S from all windows scored so far, this batch included. Both are smoothed with one
    prior, the mean of the two, because most bigrams of a small target occur in it once or never. An n-gram
    that occurs nowhere else says nothing. Only learnt tokens count.

    A document's own text counts on neither side: with it the target's windows would score above, and the
    stream's below, fresh text of the same kind. For the stream that takes counts in `FOLDS` folds of
    documents, of which a window's own is left out.

    Args:
        target: windows of the target's held-out text, of the reward set's documents alone.
        device: where n-grams are counted. The scores themselves lie on the CPU, as the windows do.
    """

    SAVED = ("_seen", "_totals")
    cost = NO_COST

    def __init__(self, target: Windows, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._windows = target
        self._ngrams = hashed_ngrams(target, device)
        document = documents_of(target).to(device)
        self._fold = document.remainder(FOLDS)
        _, of_document = document.unique(return_inverse=True)
        self._target = torch.bincount(self._ngrams.flatten(), minlength=NO_NGRAM + 1).double()
        self._target[NO_NGRAM] = 0
        self._own = _count_within(self._ngrams, of_document)
        counted = (self._ngrams != NO_NGRAM).sum(1)
        self._own_total = _sum_by(of_document, counted.double())[of_document]
        # Counts of the stream by fold, and over all folds. Integers: exact in any order of summation.
        self._seen = torch.zeros(FOLDS, NO_NGRAM + 1, dtype=torch.int32, device=device)
        self._totals = torch.zeros(NO_NGRAM + 1, dtype=torch.int32, device=device)

    def __call__(self, windows: Windows) -> Float[Tensor, "n"]:
        ngrams = hashed_ngrams(windows, self._device)
        fold = documents_of(windows).to(self._device).remainder(FOLDS)
        ones = torch.ones(ngrams.numel(), dtype=torch.int32, device=self._device)
        self._seen.view(-1).index_add_(0, (ngrams + (NO_NGRAM + 1) * fold[:, None]).flatten(), ones)
        self._totals.index_add_(0, ngrams.flatten(), ones)
        self._seen[:, NO_NGRAM] = 0
        self._totals[NO_NGRAM] = 0
        return _log_ratio(ngrams, self._target[ngrams], self._target.sum(), *self._others(ngrams, fold))

    def of_target(self) -> Float[Tensor, "D"]:
        target, target_total = self._target[self._ngrams] - self._own, self._target.sum() - self._own_total
        # A fold of the stream is left out here too: rare n-grams are then missing as often as for the
        # stream's own windows.
        return _log_ratio(self._ngrams, target, target_total, *self._others(self._ngrams, self._fold))

    def counts(self) -> NgramCounts:
        """What has been counted so far."""
        own = documents_of(self._windows).unique()
        return NgramCounts(
            target=self._target.cpu().numpy(), seen=self._seen.long().cpu().numpy(), own_documents=own.numpy()
        )

    def _others(
        self, ngrams: Int[Tensor, "n g"], fold: Int[Tensor, "n"]
    ) -> tuple[Float[Tensor, "n g"], Float[Tensor, "n"]]:
        """Counts in the stream without each window's fold, and their totals."""
        seen = self._totals[ngrams] - self._seen[fold[:, None], ngrams]
        return seen.double(), (self._totals.sum() - self._seen.sum(1))[fold].double()


class RecentTotals(Saved):
    """Running totals by identity, of documents or windows.

    A table of fixed size by the identity; where two share a slot, the later one begins afresh, so that memory
    and checkpoints stay small however long the stream is.

    Args:
        slots: of the table.
        columns: totals of each identity.
    """

    SAVED = ("_identity", "_totals")

    def __init__(self, slots: int, columns: int) -> None:
        self._identity = torch.full((slots,), -1, dtype=torch.int64)
        self._totals = torch.zeros(slots, columns, dtype=torch.float64)

    def add(
        self, identity: Int[Tensor, "n"], values: Float[Tensor, "n c"]
    ) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
        """The totals of each row's identity before this batch, and with it."""
        names, place = identity.unique(return_inverse=True)
        slots = names.remainder(len(self._identity))
        self._totals[slots[self._identity[slots] != names]] = 0
        before = self._totals[slots]
        after = before + torch.zeros_like(before).index_add_(0, place, values.double())
        self._identity[slots], self._totals[slots] = names, after
        return before[place], after[place]


def documents_of(windows: Windows) -> Int[Tensor, "n"]:
    """Identity of each window's document; its own where documents are not known."""
    return windows.ids if windows.document is None else windows.document


def _sum_by(group: Int[Tensor, "n"], values: Float[Tensor, "n"]) -> Float[Tensor, "g"]:
    return torch.bincount(group, weights=values.to(group.device))


def smoothed_log_ratio(
    target: Float[Tensor, "*#n"], target_total: Tensor, seen: Float[Tensor, "*#n"], seen_total: Tensor
) -> Float[Tensor, "*n"]:
    """log p_D − log p_S of each n-gram, from its counts in the target and in the stream and their totals; 0
    where neither has it. Both are smoothed with their mean, of mass `PRIOR`."""
    target_total, seen_total = target_total.double().clamp(min=1), seen_total.double().clamp(min=1)
    prior = PRIOR / 2 * (target / target_total + seen / seen_total)
    ratio = ((target + prior) / (target_total + PRIOR)).log() - ((seen + prior) / (seen_total + PRIOR)).log()
    return torch.where(prior > 0, ratio, 0.0)


def _log_ratio(
    ngrams: Int[Tensor, "n g"],
    target: Float[Tensor, "n g"],
    target_total: Tensor,
    seen: Float[Tensor, "n g"],
    seen_total: Tensor,
) -> Float[Tensor, "n"]:
    """Mean of log p_D − log p_S over the n-grams of each window, from counts in both: of one total for all
    windows, or of one for each. On the CPU."""
    ratio = smoothed_log_ratio(target, target_total[..., None], seen, seen_total[..., None])
    counted = ngrams != NO_NGRAM
    return (ratio.where(counted, 0.0).sum(1) / counted.sum(1).clamp(min=1)).cpu()


def hashed_ngrams(windows: Windows, device: torch.device | str) -> Int[Tensor, "n g"]:
    """Buckets of the T unigrams and T − 1 bigrams of each window."""
    tokens = windows.tokens.to(device)
    unigrams = _hashed(tokens)
    bigrams = _hashed(tokens[:, :-1] * 1_000_003 + tokens[:, 1:]) + BUCKETS
    if (learnt := windows.learnt) is not None:
        learnt = learnt.to(device)
        unigrams = unigrams.masked_fill(~learnt, NO_NGRAM)
        bigrams = bigrams.masked_fill(~(learnt[:, :-1] & learnt[:, 1:]), NO_NGRAM)
    return torch.cat([unigrams, bigrams], dim=1)


def _hashed(keys: Int[Tensor, "n m"]) -> Int[Tensor, "n m"]:
    """Knuth's multiplicative hash; the high bits of a product depend on all bits of the key."""
    return (keys * 2_654_435_761 >> 11) % BUCKETS


def _count_within(ngrams: Int[Tensor, "n g"], document: Int[Tensor, "n"]) -> Float[Tensor, "n g"]:
    """How often each n-gram occurs in its own document."""
    _, place, counts = (ngrams + (NO_NGRAM + 1) * document[:, None]).unique(
        return_inverse=True, return_counts=True
    )
    return counts[place].double()


# Acceptance rules: the probability of each score, from a sample of the stream's scores and the target's own.

Scores = Float[Tensor, "n"]
Rule = Callable[[Scores, Float[Tensor, "m"], Float[Tensor, "D"]], Scores]
LEAST = 1e-100
"""Least probability: its logarithm is finite, for interpolation and as a factor of weights."""
SOFT_EDGE = 0.01
"""Width of a threshold's edge, in standard deviations of the stream's scores: where a step runs out of
windows to read, those nearest to the threshold fill it."""


def _above(score: Scores, threshold: Tensor, sample: Float[Tensor, "m"]) -> Scores:
    edge = SOFT_EDGE * sample.std(correction=0).clamp(min=1e-12)
    return ((score - threshold) / edge).clamp(-600, 0).exp()


@dataclass(frozen=True)
class TopShare:
    """Accepts the share of the stream that scores highest."""

    share: float

    def __call__(self, score: Scores, sample: Float[Tensor, "m"], target: Float[Tensor, "D"]) -> Scores:
        return _above(score, sample.quantile(1 - self.share), sample)


@dataclass(frozen=True)
class TargetQuantile:
    """Accepts what scores at least as high as this quantile of the target's own windows."""

    quantile: float

    def __call__(self, score: Scores, sample: Float[Tensor, "m"], target: Float[Tensor, "D"]) -> Scores:
        return _above(score, target.quantile(self.quantile), sample)


@dataclass(frozen=True)
class Resampling:
    """Importance resampling as DSIR publishes it: without replacement, a share of the stream with probability
    ∝ exp(total log-weight), by Gumbel noise on the log-weights.

    Args:
        terms: n-grams of a window, so that terms · score is the total log-weight.
    """

    share: float
    terms: int

    def __call__(self, score: Scores, sample: Float[Tensor, "m"], target: Float[Tensor, "D"]) -> Scores:
        # Into the top k of log-weight + Gumbel noise with probability 1 − exp(−exp(log-weight − c)).
        def entering(weight: Tensor, c: float) -> Tensor:
            return -torch.expm1(-(weight - c).clamp(-600, 50).exp())

        level = self.terms * sample
        low, high = level.min().item() - 50, level.max().item() + 50
        c = brentq(lambda c: entering(level, c).mean().item() - self.share, low, high)
        return entering(self.terms * score, c)


@dataclass(frozen=True)
class TargetPosterior:
    """Accepts with the probability that a window is of the target's kind, to the power `sharpness`.

    The density ratio p_D(s)/p_S(s) of the scores grows with s; isotonic regression of "is the target's" on s
    estimates it. On a stream that is target-like in part the ratio levels off at the inverse of this part.
    Divided by that level, which the median of the target's own windows stands for, it is the posterior: 1 for
    all windows where stream and target are alike, so that nothing is selected among equals, and the sharper,
    the less the two overlap. No share has to be chosen.
    """

    sharpness: float = 1.0

    def __call__(self, score: Scores, sample: Float[Tensor, "m"], target: Float[Tensor, "D"]) -> Scores:
        # Equal scores are one point of the regression.
        places, of = torch.cat([target, sample]).unique(return_inverse=True)
        ours = torch.bincount(of[: len(target)], minlength=len(places)) / len(target)
        theirs = torch.bincount(of[len(target) :], minlength=len(places)) / len(sample)
        share = ours.double() / (ours + theirs)
        share = torch.from_numpy(isotonic_regression(share.numpy(), weights=(ours + theirs).numpy()).x)
        ratio = share / (1 - share).clamp(min=1e-6)

        def at(s: Scores) -> Scores:
            return ratio[torch.searchsorted(places, s).clamp(max=len(places) - 1)]

        level = at(target).median().clamp(min=1e-12)
        return ((at(score) / level).clamp(0.0, 1.0) ** self.sharpness).clamp(min=LEAST)


RULES: dict[str, Callable[[SelectConfig, int], Rule]] = {
    "share": lambda settings, window: TopShare(settings.static_share),
    "resample": lambda settings, window: Resampling(settings.static_share, 2 * window - 1),
    "quantile": lambda settings, window: TargetQuantile(settings.static_quantile),
    "posterior": lambda settings, window: TargetPosterior(settings.static_sharpness),
}
"""The values of `--static-rule`, for windows of so many tokens."""


SAMPLE = 4096
"""Scores of the stream that are remembered, the latest ones."""
LOOK_AHEAD = 2048
"""Windows that are scored before the first step, so that the first scores have something to be compared
with. They are not lost: the first steps train on them."""
REFIT = 16
"""The rule is fitted again when the number of windows scored has grown by a 16th."""
OTHER_SOURCE = 1e-6
"""Factor on the prior of windows that the label says are not of the target's source."""
RECENT = 256
"""Windows over which the number of readings is averaged."""
FRESH = 4
STALE = 16
"""Text that is repeated up to four times is worth nearly as much as new text; after about sixteen repetitions
little of its worth is left (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models")."""
DOCUMENT_SHARE = 0.5
"""Share of its document's mean in a window's score."""
GRID = 1024
"""Points at which the rule is evaluated."""


@dataclass(eq=False)
class ScoredStream(Saved):
    """The windows of a stream with what a static score says of them, as `known` columns.

    `static_score`: in standard deviations of the stream's latest scores from their mean, clipped at ±3.
    `prior`: the probability in [0, 1] with which the rule accepts the window; absent without a rule.

    A window's score enters as its mean with that of its document, over the windows of the document that have
    been read. A document is of one kind, and a few dozen n-grams say little; but the window's own half keeps
    the best parts of a mixed document, and some of most documents.

    Args:
        target: the windows that `score.of_target` scores.
        own_source: the target's own source, whose label is trusted: its windows are accepted whatever they
            score, and others only where it does not fill a step, the most target-like first. A window that
            has been read `FRESH` times more often than those of the stream on average begins to lose this
            privilege, and has lost it at `STALE` times. −1 for none, and the score decides.
    """

    SAVED = (
        *("stream", "score", "_documents", "_reads", "_recent_reads"),
        *("_recent", "_scored", "_fitted_at", "_target", "_curve"),
    )

    stream: WindowSource
    score: StaticScore
    rule: Rule | None
    target: Windows
    _: KW_ONLY
    own_source: int = -1
    _documents: RecentTotals = field(default_factory=lambda: RecentTotals(DOCUMENTS, 2), init=False)
    _reads: RecentTotals = field(default_factory=lambda: RecentTotals(WINDOWS, 1), init=False)
    _recent_reads: History = field(default_factory=lambda: History(RECENT), init=False)
    _recent: History = field(default_factory=lambda: History(SAMPLE), init=False)
    _scored: int = field(default=0, init=False)
    _fitted_at: int = field(default=0, init=False)
    _target: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64), init=False)
    _curve: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.float64), init=False)

    def read(self, n: int) -> Offer:
        offer = self.stream.read(n)
        if not len(offer):
            return offer
        raw = self._pooled(offer.windows)
        self._recent.extend(raw)
        self._scored += len(raw)
        if self._scored > self._fitted_at * (1 + 1 / REFIT):
            self._fit()
        known = {**offer.known, "static_score": self._standardised(raw)}
        if self.rule is not None:
            prior = self._accepted(raw)
            known["prior"] = prior if self.own_source < 0 else self._by_label(offer.windows, prior)
        return replace(offer, known=known, cost=offer.cost + self.score.cost * len(offer))

    def describe(
        self, score: Float[Tensor, "n"], of_document: Float[Tensor, "n"], source: Int[Tensor, "n"]
    ) -> dict[str, Float[Tensor, "n"]]:
        """What `read` would say now of windows with these scores, `known` by name; nothing is remembered.

        Args:
            score: what the static score says of each window.
            of_document: its mean over the window's whole document.
            source: of each window. Those of the target's own source count as fresh.
        """
        raw = torch.lerp(score.double(), of_document.double(), DOCUMENT_SHARE)
        known = {"static_score": self._standardised(raw)}
        if self.rule is not None:
            known["prior"] = prior = self._accepted(raw)
            if self.own_source >= 0:
                known["prior"] = torch.where(source == self.own_source, 1.0, OTHER_SOURCE * prior)
        return known

    def _accepted(self, raw: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """The rule's probability, before any label."""
        return _interpolated(raw, *self._curve).exp()

    def _by_label(self, windows: Windows, prior: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """The target's own source first, as long as it is not read over and over again."""
        own = windows.source == self.own_source
        reads = torch.zeros(len(windows), dtype=torch.float64)
        before, _ = self._reads.add(windows.ids[own], torch.ones(int(own.sum()), 1))
        reads[own] = before[:, 0]
        self._recent_reads.extend(reads)
        excess = reads - self._recent_reads.values.mean()
        staleness = ((excess - FRESH) / (STALE - FRESH)).clamp(min=0)
        return torch.where(own, OTHER_SOURCE**staleness, OTHER_SOURCE * prior)

    def of_target(self) -> Float[Tensor, "D"]:
        """The target's own scores as `static_score` gives them."""
        return self._standardised(self._target)

    def _fit(self) -> None:
        """The rule on a grid of scores: it is monotone, and one fit serves many windows."""
        own = self.score.of_target().double()
        _, document = documents_of(self.target).unique(return_inverse=True)
        mean = _sum_by(document, own) / torch.bincount(document)
        self._target, self._fitted_at = torch.lerp(own, mean[document], DOCUMENT_SHARE), self._scored
        if self.rule is None:
            return
        both = torch.cat([self._recent.values, self._target])
        grid = torch.linspace(both.min().item(), both.max().item(), GRID, dtype=torch.float64)
        prior = self.rule(grid, self._recent.values, self._target).log()
        self._curve = torch.stack([grid, prior])

    def _pooled(self, windows: Windows) -> Float[Tensor, "n"]:
        score = self.score(windows).double()
        # A corrupted copy has its clean document's identity, and is of another kind.
        document = documents_of(windows) * 1_000_003 + windows.source
        _, totals = self._documents.add(document, torch.stack([score, torch.ones_like(score)], 1))
        return torch.lerp(score, totals[:, 0] / totals[:, 1], DOCUMENT_SHARE)

    def _standardised(self, raw: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        recent = self._recent.values
        spread = recent.std(correction=0).clamp(min=1e-12)
        return ((raw - recent.mean()) / spread).clamp(-3.0, 3.0).float()


def _interpolated(
    x: Float[Tensor, "n"], xs: Float[Tensor, "g"], ys: Float[Tensor, "g"]
) -> Float[Tensor, "n"]:
    """The piecewise linear curve through (xs, ys) at x; constant beyond its ends."""
    return torch.from_numpy(np.interp(x.numpy(), xs.numpy(), ys.numpy()))
