"""What is known of a window before the model has learnt anything: static scores, and how much they accept.

A static score says how target-like a window is. An acceptance rule turns scores into probabilities between 0
and 1. Both together are a data filter of the usual kind, which `--selector filter` applies as it is, and the
prior π₀ of the learned policy, π ∝ π₀ exp(Q/β) (Eq. 17 with p₀ = π₀).
"""

import logging
import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq import parallel
from curriq.data.ngrams import BUCKETS, FOLDS, NO_NGRAM, NgramCounts
from curriq.select.base import PASSAGE, History, RecentTotals, passages
from curriq.select.rules import Rule, above
from curriq.state import Saved
from curriq.types import NO_COST, Cost, Offer, Stateful, Windows, WindowSource

logger = logging.getLogger("curriq")

PRIOR = 8192.0
"""Mass of the smoothing prior, in n-grams."""
DOCUMENTS = 2**16
"""Documents whose mean score is remembered, the most recent ones."""
PASSAGES = 2**18
"""Passages of the target's own source that are remembered, the most recent ones."""


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


@runtime_checkable
class SharedScore(StaticScore, Protocol):
    """A static score that takes windows in and scores them in two separate moves, so that what each of
    several processes has read can be taken in by all of them."""

    def learn(self, windows: Windows) -> None:
        """Take in windows of the stream, the same on all ranks."""
        ...

    def score(self, windows: Windows) -> Float[Tensor, "n"]:
        """Scores of windows, of which nothing is remembered."""
        ...


class LearningScore(Saved):
    """Scores windows after taking them in; a subclass adds `score` and, where it learns, `learn`.

    Attributes:
        steady: whether it runs no model, so that windows can be scored while the model trains.
    """

    steady: bool = False

    def learn(self, windows: Windows) -> None:
        pass

    def score(self, windows: Windows) -> Float[Tensor, "n"]:
        raise NotImplementedError

    def __call__(self, windows: Windows) -> Float[Tensor, "n"]:
        self.learn(windows)
        return self.score(windows)


class DsirScore(LearningScore):
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
    steady = True
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
        ngrams, fold = self._ngrams_and_fold(windows)  # once for both
        self._count(ngrams, fold)
        return self._scored(ngrams, fold)

    def learn(self, windows: Windows) -> None:
        # Every rank counts its part of the windows, which are the same on all.
        ngrams, fold = self._ngrams_and_fold(windows.take(parallel.shard()))
        counted = torch.zeros_like(self._seen)
        counted.view(-1).index_add_(0, *_ones_at(ngrams, fold))
        counted[:, NO_NGRAM] = 0
        self._seen += parallel.reduce_sum_(counted)
        self._totals = self._seen.sum(0, dtype=torch.int32)

    def score(self, windows: Windows) -> Float[Tensor, "n"]:
        return self._scored(*self._ngrams_and_fold(windows))

    def _ngrams_and_fold(self, windows: Windows) -> tuple[Int[Tensor, "n g"], Int[Tensor, "n"]]:
        fold = documents_of(windows).to(self._device).remainder(FOLDS)
        return hashed_ngrams(windows, self._device), fold

    def _count(self, ngrams: Int[Tensor, "n g"], fold: Int[Tensor, "n"]) -> None:
        where, ones = _ones_at(ngrams, fold)
        self._seen.view(-1).index_add_(0, where, ones)
        self._totals.index_add_(0, ngrams.flatten(), ones)
        self._seen[:, NO_NGRAM] = 0
        self._totals[NO_NGRAM] = 0

    def _scored(self, ngrams: Int[Tensor, "n g"], fold: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
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


def _ones_at(ngrams: Int[Tensor, "n g"], fold: Int[Tensor, "n"]) -> tuple[Int[Tensor, "m"], Int[Tensor, "m"]]:
    """The place of each n-gram in a table of counts by fold, and a 1 for each."""
    where = (ngrams + (NO_NGRAM + 1) * fold[:, None]).flatten()
    return where, torch.ones(len(where), dtype=torch.int32, device=where.device)


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


SAMPLE = 4096
"""Scores of the stream that are remembered, the latest ones."""
LOOK_AHEAD = 2048
"""Windows that are scored before the first step, so that the first scores have something to be compared
with. They are not lost: the first steps train on them."""
REFIT = 16
"""The rule is fitted again when the number of windows scored has grown by a 16th."""
OTHER_SOURCE = 1e-6
"""Prior of the most target-like window that the label says is not of the target's source; the third power for
the least. The range is wide, so that the better window fills a step, whatever it draws."""
RECENT = 128
"""Passages that tell how often the target's own source has been read."""
FRESH = 4
"""Text that is repeated up to four times is worth nearly as much as new text (Muennighoff et al. 2023,
"Scaling Data-Constrained Language Models")."""
PARTS = 2**16
"""Into so many equal parts windows are divided by their hash, to take a share of them."""
DOCUMENT_SHARE = 0.5
"""Share of its document's mean in a window's score."""
START_QUANTILE = 0.8
"""Quantile of the target's own scores that a window must reach at the start, where the rule rejects nearly
all of the stream; less in proportion where it rejects less, so that nothing is selected among equals."""
BLUNT = 1.5
"""A start that would accept more than so many times what the label does is dropped: scores hardly tell the
stream from the target then, and the label does."""
GRID = 1024
"""Points at which the rule is evaluated."""


@dataclass(frozen=True)
class Budget:
    """What a run may read and train on.

    Attributes:
        windows: trained on in all its steps; 0 where that is not known.
        read_ratio: windows that may be read for each.
        passes: over the target's own source, about, at most.
    """

    windows: float = 0.0
    read_ratio: float = 1.0
    passes: float = math.inf


UNKNOWN = Budget()


class WindowScorer(Saved):
    """What a static score and an acceptance rule say of windows, as `known` columns.

    `static_score`: in standard deviations of the stream's latest scores from their mean, clipped at ±3.
    `prior`: the probability in [0, 1] with which the rule accepts the window; absent without a rule.

    A window's score enters as its mean with that of its document, over the windows of the document that have
    been read. A document is of one kind, and a few dozen n-grams say little; but the window's own half keeps
    the best parts of a mixed document, and some of most documents.

    Args:
        target: the windows that `score.of_target` scores.
        own_source: the target's own source, whose label is trusted: its windows are accepted whatever they
            score, and others only where it does not fill a step, the most target-like first. A source that
            would be trained on clearly more than `budget.passes` times is trusted in part (`trusted_share`).
            −1 for none, and the score decides.
        sharp_start: windows read before that. Of these the most target-like are accepted, wherever they are
            from: an untrained model gains most from them, and breadth pays later. Not where that would be
            blunter than a label that is trusted.
        budget: what the run may read and train on.
    """

    SAVED = (
        *("score", "_documents", "_passages", "_own_reads", "_own_scored"),
        *("_recent", "_recent_own", "_scored", "_fitted_at", "_target", "_curve"),
    )

    def __init__(
        self,
        score: StaticScore,
        rule: Rule | None,
        target: Windows,
        *,
        own_source: int = -1,
        sharp_start: int = 0,
        budget: Budget = UNKNOWN,
    ) -> None:
        self.score = score
        self.rule = rule
        self.target = target
        self.own_source = own_source
        self.sharp_start = sharp_start
        self.budget = budget
        self._documents = RecentTotals(DOCUMENTS, 2)
        self._passages, self._own_reads = RecentTotals(PASSAGES, 1), History(RECENT)
        self._own_scored, self._reported = 0, False
        self._recent, self._recent_own = History(SAMPLE), History(SAMPLE)
        self._scored = self._fitted_at = 0
        self._target = torch.zeros(0, dtype=torch.float64)
        self._curve = torch.zeros(3, 0, dtype=torch.float64)

    @property
    def shared_score(self) -> SharedScore:
        """The score, which must be able to learn from windows that another process has scored."""
        assert isinstance(self.score, SharedScore), type(self.score)
        return self.score

    def judge(self, windows: Windows) -> dict[str, Float[Tensor, "n"]]:
        """What is known of windows by the score and the rule as they stand. Nothing is remembered, so `raw`
        and `pooled` hand the score on to `take_in`, alone and with that of the document."""
        raw = self.shared_score.score(windows).double()
        pooled = _pooled(raw, self._documents.preview(*_of_documents(windows, raw)))
        return {**self._known(windows, pooled), "raw": raw, "pooled": pooled}

    def begin(self, windows: Windows, raw: Float[Tensor, "n"]) -> dict[str, Float[Tensor, "n"]]:
        """What is known of the first windows of the stream, with these scores, once they are taken in. Their
        `raw` is NaN, so that `take_in` passes them over."""
        pooled = _pooled(raw, self._documents.preview(*_of_documents(windows, raw)))
        self._remember(windows, raw, pooled)
        self._fit_if_due()
        gone = torch.full_like(raw, torch.nan)
        return {**self._known(windows, pooled), "raw": gone, "pooled": gone}

    def take_in(self, offer: Offer) -> Offer:
        """The offer without `raw` and `pooled`, after learning from its windows, accepted and rejected: from
        each once, when a step has judged it."""
        for part in offer.judged:
            new = (~part.known["raw"].isnan()).nonzero().squeeze(1)
            windows = part.windows.take(new)
            if len(new):
                self.shared_score.learn(windows)
                self._remember(windows, part.known["raw"][new], part.known["pooled"][new])
        self._fit_if_due()
        return _without_scores(offer)

    @property
    def fitted(self) -> tuple[Float[Tensor, "D"], Float[Tensor, "3 g"]]:
        """What the last fit has found: the target's scores, and the curves of the rule and of the start."""
        return self._target, self._curve

    @fitted.setter
    def fitted(self, found: tuple[Float[Tensor, "D"], Float[Tensor, "3 g"]]) -> None:
        self._target, self._curve = found

    @property
    def fitted_at(self) -> int:
        """Windows that had been scored at the last fit."""
        return self._fitted_at

    def describe(
        self, score: Float[Tensor, "n"], of_document: Float[Tensor, "n"], source: Int[Tensor, "n"]
    ) -> dict[str, Float[Tensor, "n"]]:
        """What `read` would say now of windows with these scores, once the start is over, `known` by name;
        nothing is remembered.

        Args:
            score: what the static score says of each window.
            of_document: its mean over the window's whole document.
            source: of each window. Those of the target's own source count as fresh.
        """
        raw = torch.lerp(score.double(), of_document.double(), DOCUMENT_SHARE)
        known = {"static_score": self._standardised(raw)}
        if self.rule is not None:
            known["prior"] = torch.where(source == self.own_source, 1.0, self._accepted(raw))
        return known

    def of_target(self) -> Float[Tensor, "D"]:
        """The target's own scores as `static_score` gives them."""
        return self._standardised(self._target)

    def _known(self, windows: Windows, pooled: Float[Tensor, "n"]) -> dict[str, Float[Tensor, "n"]]:
        known = {"static_score": self._standardised(pooled)}
        if self.rule is not None:
            known["prior"] = self._prior(windows, pooled)
        return known

    def _accepted(self, raw: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """The rule's probability; where a label is trusted, that of other sources' windows."""
        return _interpolated(raw, self._curve[0], self._curve[1]).exp()

    def _prior(self, windows: Windows, raw: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """At the start, 1 for the most target-like text; then the rule's probability, or the target's own
        source first where its label is trusted. Of text that is read over and over again a share is trusted,
        and the rest comes last."""
        own = windows.source == self.own_source
        # Others in each epoch, also where the same windows come again.
        mixed = (windows.ids ^ self._own_scored * 2_654_435_761) * 0x5851F42D4C957F2D
        trusted = (mixed >> 40) % PARTS < self.trusted_share * PARTS
        if self._scored < self.sharp_start and not self._curve[2, 0].isnan():
            prior = _interpolated(raw, self._curve[0], self._curve[2]).exp()
        else:
            prior = torch.where(own, 1.0, self._accepted(raw))
        return torch.where(own & ~trusted, OTHER_SOURCE**3, prior)

    @property
    def passes(self) -> float:
        """Times that the run would train on the text of the target's own source if it took nothing else; 0 as
        long as that is not known, until it has been read `FRESH` times."""
        reads = self._own_reads.values.sort().values
        aside = len(reads) // 4  # phrases that recur, and a passage that stood across two windows each time
        epochs = reads[aside : len(reads) - aside].mean().item() if len(reads) else 0.0
        return 0.0 if epochs < FRESH else self.budget.windows * (epochs + 0.5) / self._own_scored

    @property
    def own_share(self) -> float:
        """Share of what is trained on that the target's own source may be: 1, or less where its text would be
        trained on clearly more than `budget.passes` times; never less than the stream offers."""
        share = self.budget.passes / max(self.passes, 1)
        if share > 0.9:  # a tenth is not worth reading up to the cap in each step
            return 1.0
        return max(share, self._recent_own.values.mean().item())

    @property
    def trusted_share(self) -> float:
        """Share of the windows of the target's own source that its label says yes to."""
        if (wanted := self.own_share) >= 1:
            return 1.0
        return min(1.0, wanted / (self._recent_own.values.mean().item() * self.budget.read_ratio))

    def _count_reads(self, windows: Windows) -> None:
        """How often the text of the target's own source has been read before. By its passages: the windows of
        an epoch are cut at other places than those of the one before."""
        if self.rule is None or self.own_source < 0:
            return
        own = windows.take((windows.source == self.own_source).nonzero().squeeze(1))
        length = windows.tokens.shape[1]
        whole = max(1, length - PASSAGE + 1)  # places where a passage does not go on in the next window
        _, passage = passages(own, whole)  # about one of each window
        before, _ = self._passages.add(passage, torch.ones(len(passage), 1))
        self._own_reads.extend(before[:, 0] * (length / whole))
        self._own_scored += len(own)
        if not self._reported and (share := self.own_share) < 1:
            self._reported = True
            logger.warning(
                f"this run would train on the text of the target's own source {self.passes:.0f} times: from "
                f"now on it is {share:.0%} of what is trained on, and the most target-like text of other "
                f"sources fills the rest (--target-passes {self.budget.passes:g})."
            )

    def _remember(self, windows: Windows, raw: Float[Tensor, "n"], pooled: Float[Tensor, "n"]) -> None:
        self._documents.add(*_of_documents(windows, raw))
        self._count_reads(windows)
        self._extend(windows, pooled)

    def _extend(self, windows: Windows, pooled: Float[Tensor, "n"]) -> None:
        self._recent.extend(pooled)
        self._recent_own.extend((windows.source == self.own_source).double())
        self._scored += len(pooled)

    def _fit_if_due(self) -> None:
        if self._scored > self._fitted_at * (1 + 1 / REFIT):
            self._fit()

    def _fit(self) -> None:
        """The probabilities on a grid of scores: they are monotone, and one fit serves many windows."""
        own = self.score.of_target().double()
        _, document = documents_of(self.target).unique(return_inverse=True)
        mean = _sum_by(document, own) / torch.bincount(document)
        self._target, self._fitted_at = torch.lerp(own, mean[document], DOCUMENT_SHARE), self._scored
        if self.rule is None:
            return
        both = torch.cat([self._recent.values, self._target])
        grid = torch.linspace(both.min().item(), both.max().item(), GRID, dtype=torch.float64)
        recent = self._recent.values
        prior = self.rule(grid, recent, self._target).log()
        rejected = 1 - _interpolated(recent, grid, prior).exp().mean().item()
        start = above(grid, self._target.quantile(START_QUANTILE * rejected), recent).log()
        if self.own_source >= 0:
            if _interpolated(recent, grid, start).exp().mean() > BLUNT * self._recent_own.values.mean():
                start.fill_(torch.nan)
            # By rank: a rule says 1 of all that it takes for the target's, and would fill a step by chance.
            rank = torch.searchsorted(recent.sort().values, grid) / len(recent)
            prior = math.log(OTHER_SOURCE) * (3 - 2 * rank.double())
        self._curve = torch.stack([grid, prior, start])

    def _standardised(self, raw: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        recent = self._recent.values
        spread = recent.std(correction=0).clamp(min=1e-12)
        return ((raw - recent.mean()) / spread).clamp(-3.0, 3.0).float()


class ScoredStream(WindowScorer):
    """The windows of a stream with what a `WindowScorer` says of them, each batch taken in before it is
    judged."""

    SAVED = ("stream", *WindowScorer.SAVED)

    def __init__(
        self,
        stream: WindowSource,
        score: StaticScore,
        rule: Rule | None,
        target: Windows,
        *,
        own_source: int = -1,
        sharp_start: int = 0,
        budget: Budget = UNKNOWN,
    ) -> None:
        super().__init__(score, rule, target, own_source=own_source, sharp_start=sharp_start, budget=budget)
        self.stream = stream

    def read(self, n: int) -> Offer:
        offer = self.stream.read(n)
        if not len(offer):
            return offer
        windows = offer.windows
        raw = self.score(windows).double()
        pooled = _pooled(raw, self._documents.add(*_of_documents(windows, raw)))
        self._extend(windows, pooled)
        self._fit_if_due()
        self._count_reads(windows)
        known = {**offer.known, **self._known(windows, pooled)}
        return replace(offer, known=known, cost=offer.cost + self.score.cost * len(offer))


def _of_documents(windows: Windows, raw: Float[Tensor, "n"]) -> tuple[Int[Tensor, "n"], Float[Tensor, "n 2"]]:
    """What `WindowScorer` adds up by document: scores and windows."""
    # A corrupted copy has its clean document's identity, and is of another kind.
    return documents_of(windows) * 1_000_003 + windows.source, torch.stack([raw, torch.ones_like(raw)], 1)


def _pooled(
    raw: Float[Tensor, "n"], totals: tuple[Float[Tensor, "n 2"], Float[Tensor, "n 2"]]
) -> Float[Tensor, "n"]:
    """Each window's score with the mean of its document, from the totals before this batch and with it."""
    _, after = totals
    return torch.lerp(raw, after[:, 0] / after[:, 1], DOCUMENT_SHARE)


def _without_scores(offer: Offer) -> Offer:
    known = {name: column for name, column in offer.known.items() if name not in ("raw", "pooled")}
    rejected = None if offer.rejected is None else _without_scores(offer.rejected)
    return replace(offer, known=known, rejected=rejected)


def _interpolated(
    x: Float[Tensor, "n"], xs: Float[Tensor, "g"], ys: Float[Tensor, "g"]
) -> Float[Tensor, "n"]:
    """The piecewise linear curve through (xs, ys) at x; constant beyond its ends."""
    return torch.from_numpy(np.interp(x.numpy(), xs.numpy(), ys.numpy()))
