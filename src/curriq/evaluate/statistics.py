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

ALPHA = 0.05
CONFIDENCE = 1 - ALPHA
"""Of every interval: it holds what a test at `ALPHA` does not reject."""
POWER = 0.8
RESAMPLES = 9999
EXACT_UP_TO = 16
"""Seeds up to which all 2^n sign flips are enumerated."""
FEWEST_SEEDS = 6
"""With n seeds the smallest two-sided p of a sign-flip test is 2/2^n: 0.0625 for 5, 0.031 for 6. With fewer
there is no interval either: nothing at all would be rejected."""
MARGIN_SHARE = 0.01
"""Share of the baseline's loss below which a gain does not matter."""
TAIL_MARGIN = 0.1
"""Nats per token; a window that ends worse by more than this is in the tail."""
TIE = 1e-12
"""Differences closer than this share of the greatest one are equal, whatever the order of summation."""

Verdict = Literal["gain", "no gain", "worse", "undetermined"]
Test = Literal["sign-flip", "two-way"]


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
    low: float | None  # sign-flip interval of the mean; None for fewer than `FEWEST_SEEDS`
    high: float | None  # None also when censored > 0
    censored: int  # seeds whose arm never reached the target
    seeds: int


@dataclass(frozen=True, kw_only=True)
class PairedSummary:
    """Differences arm − baseline over seeds, nats per token."""

    mean: float  # d̄
    sd: float | None  # None for one seed
    by_seed: list[float]  # d_s
    low: float | None  # what the test does not reject: it leaves out 0 exactly when p < 0.05
    high: float | None  # both None for fewer than `FEWEST_SEEDS`
    p: float  # two-sided, of no difference
    test: Test
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


@dataclass(frozen=True)
class SignFlips:
    """The paired sign-flip (Fisher-Pitman) test of some differences, and the interval that it leaves.

    Under the hypothesis that the differences scatter symmetrically about μ, each d_i − μ might as well have
    the other sign. p(μ) is the share of the 2^n sign patterns σ with |Σ σ_i (d_i − μ)| ≥ |Σ (d_i − μ)|.
    For a μ below the mean these are the patterns of which either half, the differences that keep their sign
    or those that change it, has a mean of at most μ; so both ends of the interval {μ: p(μ) ≥ 0.05} are means
    of some of the differences (Hartigan 1969, "Using subsample values as typical values").

    Attributes:
        lower, upper: of each pattern the lesser and the greater mean of its halves; ∓∞ where one is empty.
    """

    mean: float
    lower: Float[np.ndarray, "k"]
    upper: Float[np.ndarray, "k"]

    @staticmethod
    def of(differences: Float[np.ndarray, "n"]) -> "SignFlips":
        """All patterns up to `EXACT_UP_TO` differences; above, 9,999 random ones with a fixed seed and the
        one that flips nothing."""
        n = len(differences)
        if n <= EXACT_UP_TO:
            flipped = (np.arange(1 << n)[:, None] >> np.arange(n)) & 1 == 1
        else:
            flipped = np.random.default_rng(0).random((RESAMPLES + 1, n)) < 0.5
            flipped[0] = False
        with np.errstate(invalid="ignore", divide="ignore"):
            halves = np.stack([half @ differences / half.sum(1) for half in (flipped, ~flipped)])
        # What is 0 but for the order of summation must not lie on one side of it in p, on the other in the
        # interval.
        halves[np.abs(halves) <= TIE * np.abs(differences).max()] = 0.0
        whole = np.isnan(halves).any(axis=0)
        lower, upper = halves.min(axis=0), halves.max(axis=0)
        mean = float(differences.mean())
        return SignFlips(mean, np.where(whole, -np.inf, lower), np.where(whole, np.inf, upper))

    @property
    def p(self) -> float:
        """Two-sided p of μ = 0."""
        if self.mean == 0:
            return 1.0
        beyond = self.lower <= 0 if self.mean > 0 else self.upper >= 0
        return float(beyond.mean())

    @property
    def interval(self) -> tuple[float, float] | tuple[None, None]:
        """All μ with p(μ) ≥ 0.05; (None, None) where that is every number."""
        rank = math.ceil(ALPHA * len(self.lower)) - 1
        low, high = np.sort(self.lower)[rank], -np.sort(-self.upper)[rank]
        return (float(low), float(high)) if np.isfinite(low) else (None, None)


def interval(values: Float[np.ndarray, "n"]) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of the mean by inversion of the sign-flip test; (None, None) for fewer than
    `FEWEST_SEEDS` values. It covers the centre of any symmetric distribution at least as often as it says."""
    return SignFlips.of(values).interval if len(values) >= FEWEST_SEEDS else (None, None)


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


def sign_flip_p(differences: Float[np.ndarray, "n"]) -> float:
    """Two-sided p of `SignFlips`; 1 for a single difference."""
    return SignFlips.of(differences).p if len(differences) > 1 else 1.0


@dataclass(frozen=True)
class TwoWay:
    """Student's t for a mean change over seeds *and* test windows, where all seeds share one test set.

    d_sw = μ + a_s + b_w + e_sw. What is peculiar to the one test set, b_w, does not average out over seeds,
    so the scatter of the seeds' means does not show it. The variance of the mean is taken as the sum of what
    either way of averaging shows, var_s(d_s·)/n + var_w(d_·w)/w, which counts σ_e²/(nw) twice and so errs on
    the wide side; its degrees of freedom are Satterthwaite's. Windows weigh by their learnt tokens.
    """

    mean: float
    error: float
    freedom: float

    @staticmethod
    def of(seeds: "list[WindowChanges]") -> "TwoWay":
        weights = seeds[0].tokens / seeds[0].tokens.sum()
        changes = np.stack([seed.changes for seed in seeds])
        over_windows, over_seeds = changes @ weights, changes.mean(axis=0)
        mean = float(over_windows.mean())
        n, w = len(seeds), np.count_nonzero(weights)
        by_seed = float(over_windows.var(ddof=1)) / n
        by_window = float((weights**2 * (over_seeds - mean) ** 2).sum()) * w / max(1, w - 1)
        total = by_seed + by_window
        freedom = total**2 / (by_seed**2 / (n - 1) + by_window**2 / max(1, w - 1)) if total else math.inf
        return TwoWay(mean, math.sqrt(total), freedom)

    @property
    def p(self) -> float:
        """Two-sided p of μ = 0."""
        if self.error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))

    @property
    def interval(self) -> tuple[float, float]:
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom)) * self.error
        return self.mean - reach, self.mean + reach


def share_test_set(seeds: "list[WindowChanges] | None") -> bool:
    """Whether the seeds were all tested on the same windows, of which some can be learnt."""
    if not seeds or not seeds[0].tokens.any():
        return False
    return all(np.array_equal(seed.ids, seeds[0].ids) for seed in seeds)


def summarise_ratios(ratios: list[Ratio]) -> RatioSummary:
    """Geometric mean exp(mean log ρ_s) with its sign-flip interval, taken on the logarithms.

    Geometric, so that ½ and 2 cancel. A censored ratio enters with its lower bound: mean and lower end stay
    lower bounds, and the upper end is unknown.
    """
    logs = np.log([ratio.value for ratio in ratios])
    censored = sum(ratio.censored for ratio in ratios)
    low, high = (None if end is None else math.exp(end) for end in interval(logs))
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
    or more; otherwise *undetermined*.

    p and the interval are of one test, so that they cannot contradict each other. Where each seed has its own
    test set, that is the sign-flip test: the scatter of the seeds contains that of the text. Where all seeds
    share one, it is the two-way t-test, for which the losses by window are needed; without them it is the
    sign-flip test, which then holds for this test set alone.
    """
    differences = arm - baseline
    n = len(differences)
    mean = float(differences.mean())
    sd = float(differences.std(ddof=1)) if n > 1 else None
    test: Test = "sign-flip"
    p, (low, high) = sign_flip_p(differences), interval(differences)
    if n >= FEWEST_SEEDS and windows is not None and share_test_set(windows):
        both = TwoWay.of(windows)
        test, p, (low, high) = "two-way", both.p, both.interval
    margin = MARGIN_SHARE * float(baseline.mean())
    verdict: Verdict = "undetermined"
    if n >= FEWEST_SEEDS and p < ALPHA:
        verdict = "gain" if mean < 0 else "worse"
    elif low is not None and low > -margin:
        verdict = "no gain"
    more = max(seeds_needed(mean, sd or 0.0, margin), n + 1) - n if verdict == "undetermined" else 0
    return PairedSummary(
        mean=mean,
        sd=sd,
        by_seed=differences.tolist(),
        low=low,
        high=high,
        p=p,
        test=test,
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
