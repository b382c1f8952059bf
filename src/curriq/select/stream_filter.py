"""The policy applied before the forward pass: an online data filter, and what it knows of a window.

A window is accepted with a probability that grows with its Q, and what is accepted is weighed evenly. Q sees
what is known before the forward pass: the window's source, and its DSIR score, which its tokens alone give.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import RunConfig
from curriq.data.stream import Unreadable
from curriq.rng import Generators
from curriq.select.base import StreamEnded, Uniform
from curriq.softq.critic import QInputs, TDCritic
from curriq.softq.temperature import (
    ALWAYS_ACCEPT_QUANTILE,
    Acceptance,
    Temperature,
    build_temperature,
    solve_beta,
)
from curriq.state import Saved, State
from curriq.types import Cost, Critic, Features, Metrics, Offer, Sampled, Step, Windows, WindowSource

BUCKETS = 2**15
"""Unigrams and bigrams are hashed into this many buckets each."""
NO_NGRAM = 2 * BUCKETS
"""Bucket of the n-grams with a token that is not learnt, which count nowhere."""
PRIOR = 8192.0
"""Mass of the prior, in n-grams."""
MEMORY = 0.998
"""Share of the running mean and spread of the scores that stays per window."""
BOUND = 3.0


class DsirScore(Saved):
    """How target-like a window is: its importance weight, in standard deviations.

    The importance weight is that of DSIR (Xie et al. 2023, "Data Selection for Language Models via
    Importance Resampling"), per n-gram: the mean over the window's unigrams and bigrams w of
    log p_D(w) − log p_S(w), with p_D from the reward set and p_S from all windows scored so far, this batch
    included. Both are smoothed with one prior, the mean of the two, because most bigrams of a small reward
    set occur in it once or never. A window's own n-grams do not count among what it is compared with, so that
    on a stream of the target's kind neither side has an advantage; one that occurs nowhere else says nothing.
    Scores are standardised by their running mean and spread and clipped at ±3. Only learnt tokens count.

    Args:
        target: windows of the reward set D; never of the validation or test set.
        device: where n-grams are counted. The scores themselves lie on the CPU, as the windows do.
    """

    SAVED = ("_seen", "_sums")

    def __init__(self, target: Windows, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._ngrams = _ngrams(target, device)
        self._within = _count_within(self._ngrams)
        self._target = _counts(self._ngrams)
        self._seen = torch.zeros_like(self._target)
        # Exponentially weighted sums of 1, of the scores and of their squares.
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def __call__(self, windows: Windows) -> Float[Tensor, "n"]:
        """Scores of a batch, which the counts, the mean and the spread take in first."""
        ngrams = _ngrams(windows, self._device)
        self._seen += _counts(ngrams)
        score = self._log_ratio(ngrams, self._target[ngrams], self._seen[ngrams] - _count_within(ngrams))
        keep = MEMORY ** len(score)
        moments = torch.stack([torch.ones_like(score), score, score.square()]).mean(1)
        self._sums = keep * self._sums + (1 - keep) * moments
        return self._standardised(score)

    def of_target(self) -> Float[Tensor, "D"]:
        """Scores of the reward set's own windows now, each compared with the others."""
        target, seen = self._target[self._ngrams] - self._within, self._seen[self._ngrams]
        return self._standardised(self._log_ratio(self._ngrams, target, seen))

    def _log_ratio(
        self, ngrams: Int[Tensor, "n g"], target: Float[Tensor, "n g"], seen: Float[Tensor, "n g"]
    ) -> Float[Tensor, "n"]:
        """Mean of log p_D − log p_S over the n-grams of each window, from their counts in both."""
        of_target, of_seen = self._target.sum().item(), self._seen.sum().item()
        prior = PRIOR / 2 * (target / of_target + seen / of_seen)
        ratio = ((target + prior) / (of_target + PRIOR)).log() - ((seen + prior) / (of_seen + PRIOR)).log()
        ratio = torch.where(prior > 0, ratio, 0.0)
        counted = ngrams != NO_NGRAM
        if counted.all():
            return ratio.mean(1)
        return ratio.where(counted, 0.0).sum(1) / counted.sum(1).clamp(min=1)

    def _standardised(self, score: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        weight, total, squares = self._sums.tolist()
        mean = total / weight
        spread = math.sqrt(max(0.0, squares / weight - mean**2))
        return ((score - mean) / max(spread, 1e-12)).clamp(-BOUND, BOUND).float().cpu()


def _ngrams(windows: Windows, device: torch.device | str) -> Int[Tensor, "n g"]:
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


def _counts(ngrams: Int[Tensor, "n g"]) -> Float[Tensor, "G"]:
    counts = torch.bincount(ngrams.flatten(), minlength=NO_NGRAM + 1).double()
    counts[NO_NGRAM] = 0
    return counts


def _count_within(ngrams: Int[Tensor, "n g"]) -> Float[Tensor, "n g"]:
    """How often each n-gram occurs in its own window."""
    of_window = ngrams + (NO_NGRAM + 1) * torch.arange(len(ngrams), device=ngrams.device)[:, None]
    _, place, counts = of_window.unique(return_inverse=True, return_counts=True)
    return counts[place].double()


@dataclass(eq=False)
class ScoredStream(Saved):
    """The windows of a stream, each with its `dsir_score`."""

    SAVED = ("stream", "score")

    stream: WindowSource
    score: DsirScore

    def read(self, n: int) -> Offer:
        offer = self.stream.read(n)
        return replace(offer, known={**offer.known, "dsir_score": self.score(offer.windows)})


@dataclass(eq=False)
class FilteredStream(Saved):
    """Reads the stream in its order and accepts each window with its own probability (rejection sampling).

    With probabilities p(x) = min(1, exp((Q(x) − c)/β)) the accepted windows are distributed as the stream is,
    tilted by exp(Q/β) below c: the Boltzmann policy over everything that the stream offers, applied before
    the forward pass, so that no pass and no part of the effective batch goes to what is rejected. Where all
    probabilities are 1 it is NEXTBATCH to the letter: it reads no window more than it accepts. Otherwise it
    reads as many at a time as it will probably need, and unreads what it did not need.

    Args:
        stream: where the windows come from; it must take back what is unread.
        n: N, windows accepted per step.
        max_read_ratio: windows read per window accepted, at most. When they are used up the step is filled
            with those that came nearest to being accepted.
        accept_prob: probability for each of some windows, from what is known of them without a forward pass.
        num_unfiltered: how many of the first windows of a step are accepted without being judged.
        generator: CPU generator of the draws, one per window read.
    """

    SAVED = ("stream", "generator")

    stream: Unreadable
    n: int
    _: KW_ONLY
    max_read_ratio: int
    accept_prob: Callable[[Offer], Float[Tensor, "n"]]
    num_unfiltered: Callable[[int], int]
    generator: torch.Generator

    def propose(self, step: int) -> Offer:
        """The accepted windows of a step: N, or fewer at the end of a stream that ends.

        Raises:
            StreamEnded: no window is left.
        """
        unfiltered, most = self.num_unfiltered(step), self.max_read_ratio * self.n
        read: list[Offer] = []
        prob = torch.ones(0, dtype=torch.float64)
        accepted = torch.zeros(0, dtype=torch.bool)
        keys = torch.zeros(0, dtype=torch.float64)  # a window is accepted where its key is not negative
        ended = False
        while (missing := self.n - int(accepted.sum())) > 0 and len(keys) < most:
            # As many as it will probably accept; where all are accepted, none is read that is not needed now.
            wanted = missing if not len(prob) else math.ceil(missing / max(prob.mean().item(), 1e-6))
            batch = self.stream.read(min(wanted, most - len(keys)))
            if ended := not len(batch):
                break
            new = self.accept_prob(batch).double().cpu()
            drawn = torch.rand(len(batch), dtype=torch.float64, generator=self.generator)
            read.append(batch)
            prob = torch.cat([prob, new])
            keys = torch.cat([keys, new.log() - drawn.log()])
            keys[:unfiltered] = torch.inf
            accepted = keys >= 0
        if not read:
            raise StreamEnded
        everything = Offer.cat(read)
        # What came after the last window that was needed is judged in the next step, with a new draw.
        end = int((accepted.cumsum(0) < self.n).sum()) + 1
        self.stream.unread(everything.take(slice(end, None)))
        n = int(accepted.sum()) if ended else self.n
        chosen = keys[:end].topk(n).indices.sort().values
        prob = prob[:end]
        sampled = Sampled(accept_prob=prob, unfiltered=torch.arange(len(prob)) < unfiltered)
        judged = replace(everything.take(slice(end)), sampled=sampled)
        rejected = torch.ones(len(judged), dtype=torch.bool)
        rejected[chosen] = False
        return replace(
            judged.take(chosen),
            rows=torch.arange(n),
            rejected=judged.take(rejected.nonzero().squeeze(1)),
            cost=Cost(windows_read=len(judged)),
        )


@dataclass(eq=False)
class StreamFilter(Uniform):
    """The acceptance probability of a window, from its Q; what was accepted is weighed evenly.

    The probability is min(1, exp((Q − c)/β)). The unfiltered windows are an on-distribution sample of the
    stream: β is solved and c measured on these, and the calibration gate judges Q by them alone.

    Whatever the temperature says, β is at least so great that of windows like the target's own the share
    `min_target_accept_rate` would be accepted. Among these the policy must not choose much: training on the
    target's own distribution is what all selection aims at, and where the stream has it already, to prefer a
    part of it is to lose the rest. Their Q is that of the source which is worth most, so that the target need
    not be one of the stream's.

    Args:
        critic: a critic whose inputs are known without a forward pass.
        temperature: gives β, and learns it from probes.
        acceptance: the probability.
        target: DSIR scores of the target's own windows [D] at this time; None where they are not measured,
            and β is the temperature's.
        min_target_accept_rate: share of these that must be accepted, in [0, 1).
        memory: probes whose unfiltered windows are remembered.
    """

    SAVED = ("temperature", "_least_beta", "_unfiltered")

    critic: Critic
    temperature: Temperature
    acceptance: Acceptance
    _: KW_ONLY
    target: Callable[[], Float[Tensor, "D"]] | None = None
    min_target_accept_rate: float = 0.0
    memory: int = 8

    def __post_init__(self) -> None:
        self._least_beta = 0.0
        self._unfiltered: deque[Features] = deque(maxlen=self.memory)

    @property
    def beta(self) -> float:
        """β of the next draws, nats per token; ∞ accepts everything."""
        return max(self.temperature.beta, self._least_beta)

    def accept_prob(self, offer: Offer) -> Float[Tensor, "n"]:
        """The acceptance probability of each window of the stream."""
        beta = self.beta
        if not self._unfiltered or beta == math.inf:
            return torch.ones(len(offer))
        # Q of the unfiltered windows again: φ has moved since they were probed.
        q = self._values([*self._unfiltered, Features.before_forward(offer)])
        ours, sample = q[-len(offer) :], q[: -len(offer)]
        # β can be far below the level of Q: differences first, or they would be lost to rounding.
        level = sample.mean()
        return self.acceptance.prob((ours - level) / beta, (sample - level) / beta)

    def observe(self, step: Step) -> Metrics:
        """The temperature learns from the unfiltered windows that were probed, before Q does."""
        beta = self.beta
        metrics = {"policy/beta": beta} if math.isfinite(beta) else {}
        effects, sampled = step.effects, step.trained.sampled
        if effects is None or sampled is None:
            return metrics
        rows = effects.rows.cpu()
        own = sampled.unfiltered[rows].nonzero().squeeze(1)
        self._unfiltered.append(Features.before_forward(step.trained.take(rows[own])))
        q = self._values(list(self._unfiltered))
        latest = torch.arange(len(q) - len(own), len(q))
        metrics |= self.temperature.observe(
            q, replace(effects, rows=latest, effect=effects.effect.cpu()[own])
        )
        return metrics if self.target is None else metrics | self._bound_by_target(self.target(), q)

    def _bound_by_target(self, dsir_score: Float[Tensor, "D"], sample: Float[Tensor, "m"]) -> Metrics:
        """Set the least β; the metric is the share of the target's own windows that it would accept."""
        count, m = len(dsir_score), len(sample)
        sources = torch.cat([features.source for features in self._unfiltered if features.source is not None])
        kinds = sources.unique()
        of_target = Features(
            hidden=torch.zeros(count * len(kinds), 0),
            loss=torch.full((count * len(kinds),), torch.nan),
            source=kinds.repeat_interleave(count),
            known={"dsir_score": dsir_score.repeat(len(kinds))},
        )
        by_source = self._values([of_target]).view(-1, count)
        q = torch.cat([sample, by_source[by_source.mean(1).argmax()]]).double()

        def accepted(z: Float[Tensor, "b n"]) -> Float[Tensor, "b"]:
            return self.acceptance.prob(z[:, m:], z[:, :m]).mean(1)

        q = q - q[:m].mean()
        rate = self.min_target_accept_rate
        self._least_beta = (solve_beta(q, rate, accepted) or 0.0) if rate else 0.0
        return {"policy/target_accept_rate": accepted(q[None] / self.beta).item()}

    def _values(self, features: list[Features]) -> Float[Tensor, "n"]:
        """On the CPU, where the stream is, and where β is solved in many small operations."""
        q = self.critic.values(Features.cat(features))
        assert q is not None, "a stream is filtered by a critic that has values"
        return q.cpu()

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._unfiltered = deque(map(Features.from_state_dict, state["unfiltered"]), self._unfiltered.maxlen)


def build_filter(
    config: RunConfig,
    sources: int,
    generators: Generators,
    *,
    target: Callable[[], Float[Tensor, "D"]] | None,
    device: torch.device | str = "cpu",
) -> tuple[StreamFilter, TDCritic]:
    """The learned filter over so many sources and its critic, on `device`; `target` as in `StreamFilter`."""
    settings = config.critic
    acceptance = Acceptance(min(ALWAYS_ACCEPT_QUANTILE, settings.accept_fraction))
    temperature = build_temperature(settings, settings.accept_fraction, share=acceptance, memory=1)
    inputs = QInputs(settings.q_features, 0, sources, layer_norm=settings.q_layer_norm)
    critic = TDCritic(settings, inputs, temperature, device, generators)
    rate = settings.min_target_accept_rate
    policy = StreamFilter(critic, temperature, acceptance, target=target, min_target_accept_rate=rate)
    return policy, critic


def filtered(
    stream: Unreadable,
    config: RunConfig,
    accept_prob: Callable[[Offer], Float[Tensor, "n"]],
    generators: Generators,
    *,
    learns: bool = True,
) -> FilteredStream:
    """The windows of a stream that a policy accepts, N per step.

    If it learns, half of the windows are unfiltered in the steps that probe effects: Q is judged by these,
    and a source that is rejected today is looked at again.
    """
    n, every = config.train.num_candidates, config.train.reward_every
    return FilteredStream(
        stream,
        n,
        max_read_ratio=config.train.max_read_ratio,
        accept_prob=accept_prob,
        num_unfiltered=lambda step: math.ceil(n / 2) if learns and step % every == 0 else 0,
        generator=generators("steer"),
    )
