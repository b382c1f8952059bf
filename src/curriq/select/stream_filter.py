"""How like the target a window is, told from its tokens alone: what can be known before a forward pass."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.data.stream import Windows
from curriq.select.base import Uniform
from curriq.softq.temperature import Acceptance, Temperature, solve_beta
from curriq.types import Candidates, Critic, Features, Metrics, Outcome, State, concatenate, join_features

BUCKETS = 2**15
"""Unigrams and bigrams are hashed into this many buckets each."""
PRIOR = 8192.0
"""Mass of the prior, in n-grams."""
MEMORY = 0.998
"""Share of the running mean and spread of the scores that stays per window."""
BOUND = 3.0


class DsirStream:
    """The windows of a stream, each with its dsir_score to the target.

    The dsir_score is the importance weight of DSIR (Xie et al. 2023, "Data Selection for Language Models via
    Importance Resampling"), per n-gram: the mean over the window's unigrams and bigrams w of
    log p_D(w) − log p_S(w), with p_D from the reward set and p_S from all that the stream has given so far,
    this batch included. Both are smoothed with one prior, the mean of the two, because most bigrams of a
    small reward set occur in it once or never. A window's own n-grams do not count among what it is compared
    with, so that on a stream of the target's kind neither side has an advantage; one that occurs nowhere else
    says nothing. Scores are standardised by their running mean and spread and clipped at ±3.

    Args:
        stream: where the windows come from.
        target: windows of the reward set D; never of the validation or test set.
        device: where n-grams are counted. The dsir_score itself lies on the CPU, as the windows do.
    """

    def __init__(
        self, stream: Windows, target: Int[Tensor, "D T"], device: torch.device | str = "cpu"
    ) -> None:
        self._stream = stream
        self._device = device
        self._ngrams = _ngrams(target.to(device))
        self._within = _count_within(self._ngrams)
        self._target = _counts(self._ngrams)
        self._seen = torch.zeros_like(self._target)
        # Exponentially weighted sums of 1, of the scores and of their squares.
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def next_batch(self, n: int) -> Candidates:
        """The next n windows of the stream, with `dsir_score`."""
        batch = self._stream.next_batch(n)
        ngrams = _ngrams(batch.tokens.to(self._device))
        self._seen += _counts(ngrams)
        score = _log_ratio(self._target[ngrams], self._seen[ngrams] - _count_within(ngrams), self._totals())
        self._follow(score)
        return replace(batch, dsir_score=self._standardised(score))

    def of_target(self) -> Float[Tensor, "D"]:
        """The dsir_score of the reward set's own windows now, each to the others."""
        target, seen = self._target[self._ngrams] - self._within, self._seen[self._ngrams]
        return self._standardised(_log_ratio(target, seen, self._totals()))

    def _totals(self) -> tuple[float, float]:
        return self._target.sum().item(), self._seen.sum().item()

    def _follow(self, score: Float[Tensor, "n"]) -> None:
        """Let the running mean and spread take in the scores of a batch."""
        keep = MEMORY ** len(score)
        moments = torch.stack([torch.ones_like(score), score, score.square()]).mean(1)
        self._sums = keep * self._sums + (1 - keep) * moments

    def _standardised(self, score: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        weight, total, squares = self._sums.tolist()
        mean = total / weight
        spread = math.sqrt(max(0.0, squares / weight - mean**2))
        return ((score - mean) / max(spread, 1e-12)).clamp(-BOUND, BOUND).float().cpu()

    def state_dict(self) -> State:
        return {
            "stream": self._stream.state_dict(),
            "seen": self._seen.to("cpu", copy=True),
            "sums": self._sums.to("cpu", copy=True),
        }

    def load_state_dict(self, state: State) -> None:
        self._stream.load_state_dict(state["stream"])
        self._seen = state["seen"].to(self._device, copy=True)
        self._sums = state["sums"].to(self._device, copy=True)


def _log_ratio(
    target: Float[Tensor, "n g"], seen: Float[Tensor, "n g"], totals: tuple[float, float]
) -> Float[Tensor, "n"]:
    """Mean of log p_D − log p_S over the n-grams of each window, from their counts and both totals."""
    of_target, of_seen = totals
    prior = PRIOR / 2 * (target / of_target + seen / of_seen)
    ratio = ((target + prior) / (of_target + PRIOR)).log() - ((seen + prior) / (of_seen + PRIOR)).log()
    return torch.where(prior > 0, ratio, 0.0).mean(1)


def _ngrams(tokens: Int[Tensor, "n T"]) -> Int[Tensor, "n g"]:
    """Buckets of the T unigrams and T − 1 bigrams of each window."""
    unigrams = _hashed(tokens)
    bigrams = _hashed(tokens[:, :-1] * 1_000_003 + tokens[:, 1:]) + BUCKETS
    return torch.cat([unigrams, bigrams], dim=1)


def _hashed(keys: Int[Tensor, "n m"]) -> Int[Tensor, "n m"]:
    """Knuth's multiplicative hash; the high bits of a product depend on all bits of the key."""
    return (keys * 2_654_435_761 >> 11) % BUCKETS


def _counts(ngrams: Int[Tensor, "n g"]) -> Float[Tensor, "G"]:
    return torch.bincount(ngrams.flatten(), minlength=2 * BUCKETS).double()


def _count_within(ngrams: Int[Tensor, "n g"]) -> Float[Tensor, "n g"]:
    """How often each n-gram occurs in its own window."""
    of_window = ngrams + 2 * BUCKETS * torch.arange(len(ngrams), device=ngrams.device)[:, None]
    _, place, counts = of_window.unique(return_inverse=True, return_counts=True)
    return counts[place].double()


class FilteredStream:
    """Reads the stream in its order and takes each window with its own probability (rejection sampling).

    With probabilities p(x) = min(1, exp((Q(x) − c)/β)) the windows taken are distributed as the stream is,
    tilted by exp(Q/β) below c: the Boltzmann policy over everything that the stream offers, spent before the
    forward pass, so that no pass and no part of the effective batch goes to what is passed over. Where all
    probabilities are 1 it is NEXTBATCH to the letter: it reads no window more than it takes. Otherwise it
    reads ahead as many as it will probably need, and looks at what it did not need in the next step.

    Args:
        stream: where the windows come from.
        n: N, windows taken per step.
        most: windows read per window taken, at the most. When they are spent the step is filled with those
            that came nearest to being taken.
        probability: of being taken, for each of some windows; from what is known of them without a forward
            pass.
        num_unfiltered: how many of the first windows of a step are taken as they come.
        generator: CPU generator of the draws, one per window read.
    """

    def __init__(
        self,
        stream: Windows,
        n: int,
        *,
        most: int,
        probability: Callable[[Candidates], Float[Tensor, "n"]],
        num_unfiltered: Callable[[int], int],
        generator: torch.Generator,
    ) -> None:
        self.stream = stream
        self.n = n
        self._most = most * n
        self._probability = probability
        self._open_windows = num_unfiltered
        self._generator = generator
        self._ahead: Candidates | None = None

    def propose(self, step: int) -> Candidates:
        began = time.perf_counter()
        unfiltered = self._open_windows(step)
        read: list[Candidates] = []
        accept_prob = torch.ones(0, dtype=torch.float64)
        taken = torch.zeros(0, dtype=torch.bool)
        keys = torch.zeros(0, dtype=torch.float64)  # a window is taken where its key is not negative
        while (missing := self.n - int(taken.sum())) > 0 and len(keys) < self._most:
            # As many as it will probably take; where all are taken, none is read that is not needed now.
            wanted = (
                missing if not len(accept_prob) else math.ceil(missing / max(accept_prob.mean().item(), 1e-6))
            )
            batch = self._next(min(wanted, self._most - len(keys)))
            new = self._probability(batch).double().cpu()
            drawn = torch.rand(len(batch), dtype=torch.float64, generator=self._generator)
            read.append(replace(batch, accept_prob=new))
            accept_prob = torch.cat([accept_prob, new])
            keys = torch.cat([keys, new.log() - drawn.log()])
            keys[:unfiltered] = torch.inf
            taken = keys >= 0
        everything = concatenate(read)
        # What came after the last that was needed is looked at in the next step, with a draw of its own.
        end = int((taken.cumsum(0) < self.n).sum()) + 1
        self._put_back(everything.take(slice(end, None)))
        chosen = keys[:end].topk(self.n).indices.sort().values
        rejected = torch.ones(min(end, len(keys)), dtype=torch.bool)
        rejected[chosen] = False
        metrics = {"data/windows_read": float(len(rejected)), "time/propose": time.perf_counter() - began}
        return replace(
            everything.take(chosen),
            rows=torch.arange(self.n),
            unfiltered=chosen < unfiltered,
            rejected=everything.take(rejected.nonzero().squeeze(1)),
            metrics=everything.metrics | metrics,
        )

    def _next(self, n: int) -> Candidates:
        """At most n windows: those that were put back, then the stream's."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self.stream.next_batch(n)
        self._put_back(ahead.take(slice(n, None)))
        return ahead.take(slice(n))

    def _put_back(self, windows: Candidates) -> None:
        """To be read before all others."""
        parts = [part for part in (windows, self._ahead) if part is not None and len(part)]
        self._ahead = concatenate(parts) if parts else None

    def state_dict(self) -> State:
        return {
            "stream": self.stream.state_dict(),
            "generator": self._generator.get_state(),
            "ahead": None if self._ahead is None else dict(vars(self._ahead)),
        }

    def load_state_dict(self, state: State) -> None:
        self.stream.load_state_dict(state["stream"])
        self._generator.set_state(state["generator"])
        self._ahead = None if state["ahead"] is None else Candidates(**state["ahead"])


class StreamFilter(Uniform):
    """Says with what probability `FilteredStream` takes a window; what was taken is weighed evenly.

    The probability is min(1, exp((Q − c)/β)). The windows that were taken as they came are a fair sample of
    the stream: on these β is solved and c told, and the governor judges Q by them alone.

    Whatever the temperature says, β is at least so great that of windows like the target's own the share
    `keep` would be taken. Among these the policy must not choose much: training on the target's own
    distribution is what all selection aims at, and where the stream has it already, to prefer a part of it is
    to lose the rest. Their Q is that of the source which is worth most, so that the target need not be one of
    the stream's.

    Args:
        critic: a critic whose inputs are known without a forward pass.
        temperature: gives β, and learns it from probes.
        acceptance: the probability.
        target: dsir_score of the target's own windows [D] at this time; None where dsir_score is not measured,
            and β is the temperature's.
        keep: share of these that must be taken, in [0, 1).
        memory: probes whose fair windows are remembered.
    """

    def __init__(
        self,
        critic: Critic,
        temperature: Temperature,
        acceptance: Acceptance,
        *,
        target: Callable[[], Float[Tensor, "D"]] | None = None,
        keep: float = 0.0,
        memory: int = 8,
    ) -> None:
        self._critic = critic
        self._temperature = temperature
        self.acceptance = acceptance
        self._target = target
        self._keep = keep
        self._least = 0.0
        self._fair: deque[Features] = deque(maxlen=memory)

    @property
    def beta(self) -> float:
        """β of the next draws, nats per token; ∞ takes everything."""
        return max(self._temperature.beta, self._least)

    def probability(self, candidates: Candidates) -> Float[Tensor, "n"]:
        """Of being taken, for each of some windows of the stream."""
        beta = self.beta
        if not self._fair or beta == math.inf:
            return torch.ones(len(candidates))
        # Q of the fair windows anew: φ has moved since they were probed.
        q = self._values([*self._fair, pre_forward_features(candidates)])
        ours, fair = q[-len(candidates) :], q[: -len(candidates)]
        # β can be far below the level of Q: differences first, or they would be lost to rounding.
        level = fair.mean()
        return self.acceptance.prob((ours - level) / beta, (fair - level) / beta)

    def observe(self, step: int, outcome: Outcome) -> Metrics:
        """The temperature learns from the fair windows that were probed; Q has not learnt from them yet."""
        beta = self.beta
        metrics = {"policy/beta": beta} if math.isfinite(beta) else {}
        effects, unfiltered = outcome.effects, outcome.candidates.unfiltered
        if effects is None or unfiltered is None:
            return metrics
        rows = effects.rows.cpu()
        fair = unfiltered[rows].nonzero().squeeze(1)
        self._fair.append(pre_forward_features(outcome.candidates.take(rows[fair])))
        q = self._values(list(self._fair))
        own = replace(
            effects,
            rows=torch.arange(len(q) - len(fair), len(q)),
            effect=effects.effect.cpu()[fair],
        )
        metrics |= self._temperature.observe(q, own)
        return metrics if self._target is None else metrics | self._bound_by_target(self._target(), q)

    def _bound_by_target(self, dsir_score: Float[Tensor, "D"], fair: Float[Tensor, "m"]) -> Metrics:
        """Set the least β, and say which share of the target's own windows the next draws would take."""
        sources = torch.cat([features.source for features in self._fair if features.source is not None])
        of_target = self._values(
            [_known(source.expand(len(dsir_score)), dsir_score) for source in sources.unique()]
        )
        by_source = of_target.view(-1, len(dsir_score))
        best = by_source[by_source.mean(1).argmax()]
        q, m = torch.cat([fair, best]).double(), len(fair)

        def taken(z: Float[Tensor, "b n"]) -> Float[Tensor, "b"]:
            return self.acceptance.prob(z[:, m:], z[:, :m]).mean(1)

        q = q - q[:m].mean()
        self._least = (solve_beta(q, self._keep, taken) or 0.0) if self._keep else 0.0
        return {"policy/target_accept_rate": taken(q[None] / self.beta).item()}

    def _values(self, features: list[Features]) -> Float[Tensor, "n"]:
        """On the CPU, where the stream is, and where β is solved in many small operations."""
        q = self._critic.values(join_features(features))
        assert q is not None, "a stream is steered by a critic that has values"
        return q.cpu()

    def state_dict(self) -> State:
        return {
            "temperature": self._temperature.state_dict(),
            "least": self._least,
            "fair": [features.state_dict() for features in self._fair],
        }

    def load_state_dict(self, state: State) -> None:
        self._temperature.load_state_dict(state["temperature"])
        self._least = state["least"]
        self._fair.clear()
        self._fair.extend(Features.from_state_dict(features, "cpu") for features in state["fair"])


def pre_forward_features(candidates: Candidates) -> Features:
    """What is known of windows without a forward pass: no hidden state [n, 0], and no loss (NaN)."""
    return _known(candidates.source, candidates.dsir_score)


def _known(source: Int[Tensor, "n"], dsir_score: Float[Tensor, "n"] | None) -> Features:
    n = len(source)
    return Features(
        hidden=torch.zeros(n, 0), loss=torch.full((n,), torch.nan), source=source, dsir_score=dsir_score
    )
