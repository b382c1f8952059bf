"""The statistics of a comparison over seeds, as pure functions; docs/compare.md explains how to read them.

Everything is paired by seed: two arms with one seed read the same stream, so the effect of the seed cancels
in their difference. Losses are in nats per token; a negative difference is a better arm.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8
RESAMPLES = 9999
EXACT_UP_TO = 16
"""Seeds up to which all 2^n sign flips are enumerated."""
FEWEST_SEEDS = 6
"""With n seeds the smallest two-sided p of a sign-flip test is 2/2^n: 0.0625 for 5, 0.031 for 6."""
MARGIN_SHARE = 0.01
"""Share of the baseline's loss below which a gain does not matter."""
TAIL_MARGIN = 0.1
"""Nats per token; a window that ends worse by more than this is in the tail."""
MOST_DRAWS = 1 << 20
"""Numbers that a bootstrap draws at once, which bounds its memory to some 40 MB."""

Verdict = Literal["gain", "no gain", "worse", "undetermined"]


class Ratio(NamedTuple):
    """Cost at which an arm reaches the baseline's final loss, over the baseline's own; below 1 is cheaper.

    When `censored` the arm never reached it, and the value is a lower bound.
    """

    value: float
    censored: bool


@dataclass(frozen=True, kw_only=True)
class RatioSummary:
    """Ratios over seeds."""

    mean: float  # geometric; a lower bound when censored > 0
    low: float | None  # bootstrap interval of the mean; None for one seed
    high: float | None  # None also when censored > 0
    censored: int  # seeds whose arm never reached the target
    seeds: int


@dataclass(frozen=True, kw_only=True)
class PairedSummary:
    """Differences arm − baseline over seeds, nats per token."""

    mean: float  # d̄
    sd: float | None  # None for one seed
    low: float | None  # bootstrap interval of d̄ over seeds; None for one seed
    high: float | None
    low_with_text: float | None  # two-level interval, over seeds and windows; None without losses by window
    high_with_text: float | None
    p: float  # two-sided sign-flip test of d̄ = 0
    seeds: int
    margin: float  # the smallest gain that matters
    verdict: Verdict
    more_seeds: int  # seeds missing for a verdict; 0 unless undetermined


def first_crossing(x: Float[np.ndarray, "K"], y: Float[np.ndarray, "K"], target: float) -> tuple[float, bool]:
    """First x at which the curve, linear between its points, is at or below the target, and True; the last x,
    a lower bound, and False for a curve that never comes down to it.

    With y_{j−1} > target ≥ y_j: x_{j−1} + (x_j − x_{j−1}) (y_{j−1} − target) / (y_{j−1} − y_j). A first
    point that is below already gives its own x: nothing is extrapolated.
    """
    below = np.flatnonzero(y <= target)
    if not below.size:
        return float(x[-1]), False
    j = int(below[0])
    if j == 0:
        return float(x[0]), True
    share = (y[j - 1] - target) / (y[j - 1] - y[j])
    return float(x[j - 1] + share * (x[j] - x[j - 1])), True


def ratio_to_target(
    arm_x: Float[np.ndarray, "K"],
    arm_y: Float[np.ndarray, "K"],
    baseline_x: Float[np.ndarray, "J"],
    baseline_y: Float[np.ndarray, "J"],
) -> Ratio:
    """x_arm(L) / x_baseline(L) at the first crossings of L = the baseline's final loss.

    The baseline against itself gives exactly 1. An arm that never reaches L is right-censored: its ratio is
    at least its last x over x_baseline(L). That is at least 1 on an axis that both arms spend equally
    (windows), but can be below 1 on the others (FLOPs, seconds).
    """
    target = float(baseline_y[-1])
    x, reached = first_crossing(arm_x, arm_y, target)
    return Ratio(x / first_crossing(baseline_x, baseline_y, target)[0], not reached)


def mean_height(x: Float[np.ndarray, "K"], y: Float[np.ndarray, "K"]) -> float:
    """Mean of the curve by the trapezoid rule: ∫ y dx / (x_K − x_1), in units of y; of one point its y."""
    return float(y[0]) if len(x) == 1 else float(np.trapezoid(y, x) / (x[-1] - x[0]))


def bootstrap_interval(values: Float[np.ndarray, "n"]) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile-bootstrap interval of the mean (Efron and Tibshirani 1993, section 13.3).

    (None, None) for one value; equal values give that value twice. The resampling has a fixed seed, so equal
    data give an equal interval. With few values it is too narrow: at n = 6 it covers the truth in 87 % of
    normal samples, not 95 %.
    """
    if len(values) < 2:
        return None, None
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(0)
    how = {"confidence_level": CONFIDENCE, "n_resamples": RESAMPLES, "method": "percentile", "rng": rng}
    interval = stats.bootstrap((values,), np.mean, **how).confidence_interval
    return float(interval.low), float(interval.high)


class WindowChanges(NamedTuple):
    """Changes arm − baseline of the windows of one seed's test set, nats per token."""

    changes: Float[np.ndarray, "w"]
    tokens: Int[np.ndarray, "w"]  # learnt tokens, the weights of the mean
    ids: Int[np.ndarray, "w"]

    @property
    def share_worse(self) -> float:
        """Share of the windows with a learnt token that are worse by more than `TAIL_MARGIN`."""
        learnt = self.tokens > 0
        return float((self.changes[learnt] > TAIL_MARGIN).sum() / max(1, learnt.sum()))


def two_level_means(
    seeds: list[WindowChanges], resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "r"]:
    """Resampled means of the change over seeds and test windows, with replacement on both levels.

    Each resample draws as many seeds as there are, and for each drawn one as many of its windows as it has:
    its mean is Σ c_i d_i / Σ c_i over these, with the tokens c_i. For test sets of equal weights the variance
    is (v + mean_s(v_s / w_s)) / n, with v the population variance of the n seeds' means, and v_s that of the
    w_s windows of seed s.

    Where all seeds have one test set, a resample draws its windows once for all its seeds, because what is
    peculiar to this text does not average out over seeds.
    """
    picked = rng.integers(len(seeds), size=(resamples, len(seeds)))
    shared = all(np.array_equal(seed.ids, seeds[0].ids) for seed in seeds)
    most = max(1, MOST_DRAWS // sum(len(seed.ids) for seed in seeds))
    parts = [picked[start : start + most] for start in range(0, resamples, most)]
    return np.concatenate([_resampled(seeds, part, shared, rng).mean(axis=1) for part in parts])


def _resampled(
    seeds: list[WindowChanges], picked: Int[np.ndarray, "r n"], shared: bool, rng: np.random.Generator
) -> Float[np.ndarray, "r n"]:
    """Mean change of each picked seed over resampled windows, the same in all of a row if they are shared."""
    means = np.empty(picked.shape)
    size = len(seeds[0].ids)
    common = rng.integers(size, size=(len(picked), size)) if shared else None
    for number, seed in enumerate(seeds):
        row, column = np.nonzero(picked == number)
        size = len(seed.ids)
        drawn = rng.integers(size, size=(len(row), size)) if common is None else common[row]
        weights = seed.tokens[drawn]
        means[row, column] = (seed.changes[drawn] * weights).sum(1) / np.maximum(1, weights.sum(1))
    return means


def two_level_interval(seeds: list[WindowChanges]) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile interval of the mean change over seeds and test windows; (None, None) for one seed.

    It is wider than that over seeds alone. Where each seed has its own test set, the scatter of the seeds
    contains that of the text already, and the interval errs on the wide side; with one test set for all, the
    interval over seeds says nothing about other text, and this one does.
    """
    if len(seeds) < 2:
        return None, None
    means = two_level_means(seeds, RESAMPLES, np.random.default_rng(0))
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def sign_flip_p(differences: Float[np.ndarray, "n"]) -> float:
    """Two-sided p of the paired sign-flip (Fisher-Pitman) test: share of the 2^n sign patterns s with
    |Σ s_i d_i| ≥ |Σ d_i|.

    Exact up to `EXACT_UP_TO` differences, above by 9,999 random patterns with a fixed seed. Its only
    assumption is that under the null hypothesis a difference and its opposite are equally likely.
    """
    if len(differences) < 2:
        return 1.0
    resamples, rng = np.inf if len(differences) <= EXACT_UP_TO else RESAMPLES, np.random.default_rng(0)
    how = {"permutation_type": "samples", "alternative": "two-sided", "n_resamples": resamples, "rng": rng}
    return float(stats.permutation_test((differences,), np.mean, **how).pvalue)


def summarise_ratios(ratios: list[Ratio]) -> RatioSummary:
    """Geometric mean exp(mean log ρ_s) with its bootstrap interval, taken on the logarithms.

    Geometric, so that ½ and 2 cancel. A censored ratio enters with its lower bound: mean and lower end stay
    lower bounds, and the upper end is unknown.
    """
    logs = np.log([ratio.value for ratio in ratios])
    censored = sum(ratio.censored for ratio in ratios)
    low, high = (None if end is None else math.exp(end) for end in bootstrap_interval(logs))
    high = None if censored else high
    return RatioSummary(mean=math.exp(logs.mean()), low=low, high=high, censored=censored, seeds=len(ratios))


def summarise_differences(
    arm: Float[np.ndarray, "n"],
    baseline: Float[np.ndarray, "n"],
    windows: list[WindowChanges] | None = None,
) -> PairedSummary:
    """Summary and verdict of the final losses of an arm against the baseline's, in the same order of seeds.

    The verdict needs at least `FEWEST_SEEDS`. With them it is *gain* or *worse* when p < 0.05, by the sign
    of the mean; *no gain* when the interval excludes every gain of `MARGIN_SHARE` of the baseline's mean loss
    or more; otherwise *undetermined*. The interval is that over seeds and text where there are losses by
    window, otherwise that over seeds.
    """
    differences = arm - baseline
    n = len(differences)
    mean = float(differences.mean())
    sd = float(differences.std(ddof=1)) if n > 1 else None
    over_seeds = bootstrap_interval(differences)
    with_text = two_level_interval(windows) if windows is not None else (None, None)
    low, high = over_seeds if with_text[0] is None else with_text
    p = sign_flip_p(differences)
    margin = MARGIN_SHARE * float(baseline.mean())
    verdict: Verdict = "undetermined"
    if n >= FEWEST_SEEDS and p < ALPHA:
        verdict = "gain" if mean < 0 else "worse"
    elif n >= FEWEST_SEEDS and low is not None and high is not None and low > -margin and high >= 0:
        verdict = "no gain"
    more = max(seeds_needed(mean, sd or 0.0, margin), n + 1) - n if verdict == "undetermined" else 0
    return PairedSummary(
        mean=mean,
        sd=sd,
        low=over_seeds[0],
        high=over_seeds[1],
        low_with_text=with_text[0],
        high_with_text=with_text[1],
        p=p,
        seeds=n,
        margin=margin,
        verdict=verdict,
        more_seeds=more,
    )


def seeds_needed(mean: float, sd: float, margin: float) -> int:
    """Seeds for a verdict with power 0.8 at two-sided 0.05, if mean and standard deviation stay as measured.

    n = ⌈((z_0.975 + z_0.8) sd / δ)²⌉ and at least `FEWEST_SEEDS`, where δ = max(|d̄|, d̄ + margin) ≥ margin/2
    is the larger distance: from no difference (gain, worse) or from the smallest gain that matters (no gain).
    This is the normal approximation of the power of a paired test.
    """
    distance = max(abs(mean), mean + margin)
    z = stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER)
    return max(FEWEST_SEEDS, math.ceil((z * sd / distance) ** 2))
