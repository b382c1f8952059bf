"""How like the target a window is, told from its tokens alone: what can be known before a forward pass."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.data.stream import Windows
from curriq.types import Candidates, State

BUCKETS = 2**15
"""Unigrams and bigrams are hashed into this many buckets each."""
PRIOR = 8192.0
"""Mass of the prior, in n-grams."""
MEMORY = 0.998
"""Share of the running mean and spread of the scores that stays per window."""
BOUND = 3.0


class LikenessStream:
    """The windows of a stream, each with its likeness to the target.

    The likeness is the importance weight of DSIR (Xie et al. 2023, "Data Selection for Language Models via
    Importance Resampling"), per n-gram: the mean over the window's unigrams and bigrams w of
    log p_D(w) − log p_S(w), with p_D from the reward set and p_S from all that the stream has given so far,
    this batch included. Both are smoothed with one prior, the mean of the two, because most bigrams of a
    small reward set occur in it once or never. A window's own n-grams do not count among what it is compared
    with, so that on a stream of the target's kind neither side has an advantage; one that occurs nowhere else
    says nothing. Scores are standardised by their running mean and spread and clipped at ±3.

    Args:
        stream: where the windows come from.
        target: windows of the reward set D; never of the validation or test set.
        device: where n-grams are counted. The likeness itself lies on the CPU, as the windows do.
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
        """The next n windows of the stream, with `likeness`."""
        batch = self._stream.next_batch(n)
        ngrams = _ngrams(batch.tokens.to(self._device))
        self._seen += _counts(ngrams)
        score = _log_ratio(self._target[ngrams], self._seen[ngrams] - _count_within(ngrams), self._totals())
        self._follow(score)
        return replace(batch, likeness=self._standardised(score))

    def of_target(self) -> Float[Tensor, "D"]:
        """The likeness of the reward set's own windows now, each to the others."""
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
