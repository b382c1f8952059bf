"""Acceptance rules: how likely a window is accepted, by its static score.

Each compares the score with a sample of the stream's scores and with the target's own. Probabilities lie
between 0 and 1 and grow with the score.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import brentq, isotonic_regression
from torch import Tensor

from curriq.config import SelectConfig

Scores = Float[Tensor, "n"]
Rule = Callable[[Scores, Float[Tensor, "m"], Float[Tensor, "D"]], Scores]
"""The probability of each score, from a sample of the stream's scores and the target's own."""
LEAST = 1e-100
"""Least probability: its logarithm is finite, for interpolation and as a factor of weights."""
SOFT_EDGE = 0.01
"""Width of a threshold's edge, in standard deviations of the stream's scores: where a step runs out of
windows to read, those nearest to the threshold fill it."""


def above(score: Scores, threshold: Tensor, sample: Float[Tensor, "m"]) -> Scores:
    """The probability to accept everything above the threshold, with a soft edge below it."""
    edge = SOFT_EDGE * sample.std(correction=0).clamp(min=1e-12)
    return ((score - threshold) / edge).clamp(-600, 0).exp()


@dataclass(frozen=True)
class TopShare:
    """Accepts the share of the stream that scores highest."""

    share: float

    def __call__(self, score: Scores, sample: Float[Tensor, "m"], target: Float[Tensor, "D"]) -> Scores:
        return above(score, sample.quantile(1 - self.share), sample)


@dataclass(frozen=True)
class TargetQuantile:
    """Accepts what scores at least as high as this quantile of the target's own windows."""

    quantile: float

    def __call__(self, score: Scores, sample: Float[Tensor, "m"], target: Float[Tensor, "D"]) -> Scores:
        return above(score, target.quantile(self.quantile), sample)


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
