"""The statistics of a comparison against closed forms, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from curriq.evaluate.statistics import (
    ALPHA,
    FEWEST_SEEDS,
    TAIL_MARGIN,
    Ratio,
    SignFlips,
    TwoWay,
    WindowChanges,
    first_crossing,
    interval,
    mean_height,
    ratio_to_target,
    seeds_needed,
    sign_flip_p,
    summarise_differences,
    summarise_ratios,
)


def line(slope: float, points: int = 5, start: float = 6.0, length: float = 100.0):
    """y = start − slope·x, sampled where the line's ends and its crossings are no points."""
    x = np.linspace(length / points, length, points)
    return x, start - slope * x


class TestCrossing:
    @pytest.mark.parametrize("points", [2, 3, 7, 50])
    def test_of_a_line_is_exact_between_any_points(self, points: int):
        x, y = line(0.02, points)
        crossing, reached = first_crossing(x, y, target=4.7)
        assert reached
        assert crossing == pytest.approx(65.0)

    def test_takes_the_first_of_several(self):
        x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.0, 1.0, 3.0, 1.0])
        assert first_crossing(x, y, 2.0)[0] == 1.5

    def test_never_reached_is_the_end_as_a_bound(self):
        x, y = line(0.01)
        assert first_crossing(x, y, 1.0) == (100.0, False)

    def test_a_first_point_below_is_not_extrapolated(self):
        x, y = line(0.01)
        assert first_crossing(x, y, 9.0) == (20.0, True)

    def test_a_touch_counts(self):
        x, y = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 2.5])
        assert first_crossing(x, y, 2.0) == (2.0, True)

    def test_flat_stretches_do_not_divide_by_zero(self):
        x, y = np.array([1.0, 2.0, 3.0]), np.array([3.0, 3.0, 3.0])
        assert first_crossing(x, y, 3.0) == (1.0, True)
        assert first_crossing(x, y, 2.0) == (3.0, False)


class TestRatio:
    def test_of_two_lines_is_the_ratio_of_their_slopes(self):
        """Twice as steep from one start: half of the examples, on every axis that is a multiple of them."""
        baseline, arm = line(0.01, 8), line(0.02, 5)
        assert ratio_to_target(*arm, *baseline) == pytest.approx((0.5, False))
        flops = 3.7
        assert ratio_to_target(flops * arm[0], arm[1], *baseline).value == pytest.approx(0.5 * flops)

    def test_of_the_baseline_to_itself_is_one_even_when_its_curve_rises_at_the_end(self):
        x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([5.0, 3.0, 2.0, 2.5])
        assert ratio_to_target(x, y, x, y) == (1.0, False)

    def test_censored_at_equal_windows_is_a_bound_of_at_least_one(self):
        ratio = ratio_to_target(*line(0.005), *line(0.01))
        assert ratio.censored
        assert ratio.value == pytest.approx(1.0)
        x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([5.0, 3.0, 2.0, 2.5])
        assert ratio_to_target(x, y + 1, x, y).value == pytest.approx(4.0 / 2.5)

    def test_summary_is_geometric(self):
        """Six seeds: only equal signs are rejected, so the interval goes from the least to the greatest."""
        summary = summarise_ratios([Ratio(value, False) for value in (0.5, 2.0, 1.0, 1.0, 0.8, 1.25)])
        assert summary.mean == pytest.approx(1.0)
        assert (summary.low, summary.high) == pytest.approx((0.5, 2.0))
        assert (summary.censored, summary.seeds) == (0, 6)

    def test_summary_with_a_censored_seed_is_a_bound(self):
        summary = summarise_ratios([Ratio(0.5, False)] * 5 + [Ratio(2.0, True)])
        assert summary.censored == 1
        assert summary.mean == pytest.approx(2 ** (-4 / 6))
        assert summary.low == pytest.approx(0.5)
        assert summary.high is None

    def test_summary_of_one_seed_has_no_interval(self):
        summary = summarise_ratios([Ratio(0.7, False)])
        assert (summary.mean, summary.low, summary.high) == (pytest.approx(0.7), None, None)


class TestMeanHeight:
    def test_of_a_line_is_its_middle(self):
        x, y = line(0.03, 6)
        assert mean_height(x, y) == pytest.approx((y[0] + y[-1]) / 2)

    def test_of_a_parabola_converges_to_the_integral(self):
        """∫₀¹ x² dx = 1/3; the trapezoid rule is off by h²/6."""
        x = np.linspace(0.0, 1.0, 101)
        assert mean_height(x, x**2) == pytest.approx(1 / 3 + 1e-4 / 6, abs=1e-12)

    def test_weighs_uneven_steps_by_their_length(self):
        assert mean_height(np.array([0.0, 1.0, 10.0]), np.array([2.0, 0.0, 0.0])) == pytest.approx(0.1)

    def test_of_one_point_is_its_height(self):
        assert mean_height(np.array([4.0]), np.array([2.5])) == 2.5


class TestInterval:
    """By inversion of the sign-flip test."""

    @pytest.mark.parametrize("n", [6, 7, 9])
    def test_holds_exactly_the_values_that_the_test_does_not_reject(self, n: int):
        """Against p(μ) by enumeration of the definition, on either side of both ends."""
        differences = np.random.default_rng(n).normal(0.4, 1.0, size=n)
        low, high = interval(differences)
        for end, inside in ((low, +1e-6), (high, -1e-6)):
            assert enumerated_p(differences - end - inside) >= ALPHA
            assert enumerated_p(differences - end + inside) < ALPHA
        for mean in np.linspace(low, high, 7):
            assert enumerated_p(differences - mean) >= ALPHA - 1e-12

    def test_of_six_goes_from_the_least_to_the_greatest(self):
        """Only six equal signs are rejected: 2/64 < 0.05 ≤ 4/64."""
        assert interval(np.array([0.3, -0.1, 0.9, 0.2, 0.4, 0.5])) == pytest.approx((-0.1, 0.9))

    @pytest.mark.parametrize("n", [6, 8, 12, 16, 24])
    def test_leaves_out_zero_exactly_when_p_is_below_alpha(self, n: int):
        rng = np.random.default_rng(n)
        rejected = 0
        for _ in range(60):
            differences = rng.normal(rng.uniform(-1.2, 1.2), 1.0, size=n).round(1)  # with ties and zeros
            low, high = interval(differences)
            assert (low > 0 or high < 0) == (sign_flip_p(differences) < ALPHA)
            rejected += low > 0 or high < 0
        assert 5 < rejected < 55

    @pytest.mark.parametrize(("n", "draw"), [(6, "normal"), (8, "laplace"), (12, "standard_cauchy")])
    def test_covers_the_truth_as_often_as_it_says(self, n: int, draw: str):
        """Of any symmetric distribution: exactly 1 − ⌈0.05·2ⁿ − 1⌉/2ⁿ (even counts), simulated 3,000 times;
        the percentile bootstrap covers 87 % at n = 6."""
        rng = np.random.default_rng(0)
        samples = getattr(rng, draw)(size=(3000, n)) + 0.7
        covered = np.mean([low <= 0.7 <= high for low, high in map(interval, samples)])
        patterns = 2**n
        most_rejected = max(k for k in range(0, patterns, 2) if k / patterns < ALPHA)
        assert 1 - most_rejected / patterns >= 0.95
        assert covered == pytest.approx(1 - most_rejected / patterns, abs=0.012)

    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_fewer_than_six_have_none(self, n: int):
        assert interval(-np.arange(1.0, n + 1)) == (None, None)
        assert SignFlips.of(-np.arange(1.0, n + 1)).interval == (None, None)

    def test_equal_values_give_that_value(self):
        assert interval(np.full(7, -0.2)) == pytest.approx((-0.2, -0.2))

    def test_many_values_agree_with_students_t(self):
        values = np.random.default_rng(4).normal(0.7, 2.0, size=40)
        expected = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
        assert interval(values) == pytest.approx(expected, abs=0.06)
        assert interval(values) == interval(values)


def changes_of(*rows: list[float], tokens: list[int] | None = None, shared: bool = False):
    """One seed per row."""
    return [
        WindowChanges(
            np.array(row),
            np.array(tokens or [31] * len(row)),
            np.arange(len(row)) + (0 if shared else 1000 * seed),
        )
        for seed, row in enumerate(rows)
    ]


class TestTwoWay:
    """Seeds that share one test set."""

    def test_by_hand(self):
        """Means of the seeds 1 and 3, of the windows 0, 2 and 4: var 2/2 and 4/3."""
        found = TwoWay.of(changes_of([-1, 1, 3], [1, 3, 5], shared=True))
        assert found.mean == 2
        assert found.error == pytest.approx(math.sqrt(2 / 2 + 4 / 3))
        assert found.freedom == pytest.approx((1 + 4 / 3) ** 2 / (1**2 / 1 + (4 / 3) ** 2 / 2))
        assert found.interval == pytest.approx(stats.t.interval(0.95, found.freedom, 2, found.error))
        assert found.p == pytest.approx(2 * stats.t.sf(2 / found.error, found.freedom))

    def test_windows_weigh_by_their_learnt_tokens(self):
        found = TwoWay.of(changes_of([0.0, 4.0], [1.0, 5.0], tokens=[3, 1], shared=True))
        assert found.mean == pytest.approx(1.5)
        idle = TwoWay.of(changes_of([0.0, 4.0, 99.0], [1.0, 5.0, -99.0], tokens=[3, 1, 0], shared=True))
        assert (idle.mean, idle.error) == pytest.approx((found.mean, found.error))

    def test_the_text_does_not_average_out_over_seeds(self):
        """Where all seeds find the same changes, what is left is the text's share, sd/√w."""
        row = np.random.default_rng(2).normal(0.0, 0.5, size=200)
        found = TwoWay.of(changes_of(*[row.tolist()] * 6, shared=True))
        assert found.error == pytest.approx(stats.sem(row))
        assert found.freedom == pytest.approx(199)
        assert interval(np.full(6, row.mean())) == pytest.approx((row.mean(),) * 2)

    def test_equal_changes_have_no_scatter(self):
        for value, p in ((0.25, 0.0), (0.0, 1.0)):
            found = TwoWay.of(changes_of(*[[value, value]] * 6, shared=True))
            assert found.interval == (value, value)
            assert found.p == p

    def test_covers_the_truth_where_the_interval_over_seeds_does_not(self):
        """Six seeds (sd 0.02) of 128 windows (sd 0.3) of one test set, and 0.1 of each in each."""
        rng, samples = np.random.default_rng(0), 800
        covered = np.zeros(2)
        for _ in range(samples):
            text = rng.normal(0, 0.3, size=(1, 128))
            rows = rng.normal(0, 0.02, size=(6, 1)) + text + rng.normal(0, 0.1, size=(6, 128))
            both = TwoWay.of(changes_of(*rows.tolist(), shared=True))
            ends = (both.interval, interval(rows.mean(axis=1)))
            covered += [low <= 0 <= high for low, high in ends]
            assert (both.interval[0] > 0 or both.interval[1] < 0) == (both.p < ALPHA)
        two_way, over_seeds = covered / samples
        assert two_way >= 0.94
        assert over_seeds <= 0.65

    def test_the_verdict_takes_it_where_the_test_set_is_shared(self):
        """Over seeds a gain of 1 % is excluded; over other windows it is not."""
        arm = 5 + np.array([-0.01, 0.012, 0.003, -0.008, 0.01, -0.004])
        noisy = np.random.default_rng(0).normal(0, 2, size=64)
        rows = [(noisy - noisy.mean() + d - 5).tolist() for d in arm]
        own = summarise_differences(arm, np.full(6, 5.0), changes_of(*rows))
        assert (own.test, own.verdict) == ("sign-flip", "no gain")
        shared = summarise_differences(arm, np.full(6, 5.0), changes_of(*rows, shared=True))
        assert shared.low < -shared.margin < own.low
        assert shared.high > own.high
        assert (shared.test, shared.verdict) == ("two-way", "undetermined")

    def test_the_tail_counts_windows_that_are_worse_by_more_than_the_margin(self):
        (seed,) = changes_of([TAIL_MARGIN + 1e-9, TAIL_MARGIN - 1e-9, 5.0, -3.0, 9.0], tokens=[1, 9, 2, 3, 0])
        assert seed.share_worse == 0.5  # two of the four windows with a learnt token


class TestSignFlip:
    @pytest.mark.parametrize("n", [2, 3, 5, 8])
    def test_equals_enumeration(self, n: int):
        differences = np.random.default_rng(n).normal(0.4, 1.0, size=n)
        assert sign_flip_p(differences) == pytest.approx(enumerated_p(differences))

    @pytest.mark.parametrize(("n", "p"), [(5, 0.0625), (6, 0.03125)])
    def test_smallest_p(self, n: int, p: float):
        """Hence at least six seeds."""
        assert sign_flip_p(-np.arange(1.0, n + 1)) == pytest.approx(p)
        assert (p < 0.05) == (n >= FEWEST_SEEDS)

    def test_does_not_know_the_sign(self):
        differences = np.array([0.3, -0.1, 0.5, 0.2])
        assert sign_flip_p(differences) == sign_flip_p(-differences)

    def test_one_difference_says_nothing(self):
        assert sign_flip_p(np.array([-5.0])) == 1.0

    def test_no_difference_at_all(self):
        assert sign_flip_p(np.zeros(6)) == 1.0

    def test_many_seeds_are_sampled_and_agree_with_the_t_test(self):
        differences = np.random.default_rng(3).normal(0.45, 1.0, size=24)
        expected = stats.ttest_1samp(differences, 0.0).pvalue
        assert sign_flip_p(differences) == pytest.approx(expected, abs=0.02)


def enumerated_p(differences: np.ndarray) -> float:
    """By the definition: the share of sign patterns with |Σ σ_i d_i| ≥ |Σ d_i|."""
    patterns = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    return float(np.mean(np.abs(patterns @ differences) >= abs(differences.sum()) - 1e-12))


class TestVerdict:
    BASELINE = np.full(6, 5.0)  # the gain that matters is 0.05

    def judge(self, *differences: float):
        baseline = self.BASELINE[0] + np.zeros(len(differences))
        return summarise_differences(baseline + np.array(differences), baseline)

    def test_gain(self):
        summary = self.judge(-0.2, -0.3, -0.25, -0.22, -0.28, -0.31)
        assert summary.verdict == "gain"
        assert summary.more_seeds == 0
        assert summary.mean == pytest.approx(-0.26)
        assert summary.low < summary.mean < summary.high < 0
        assert summary.p == pytest.approx(2 / 64)
        assert summary.seeds == 6
        assert summary.margin == pytest.approx(0.05)

    def test_worse(self):
        assert self.judge(0.2, 0.3, 0.25, 0.22, 0.28, 0.31).verdict == "worse"

    def test_a_gain_below_the_margin_is_a_gain_when_it_is_certain(self):
        assert self.judge(-0.01, -0.012, -0.011, -0.013, -0.012, -0.011).verdict == "gain"

    def test_no_gain(self):
        summary = self.judge(-0.01, 0.012, 0.003, -0.008, 0.01, -0.004)
        assert summary.verdict == "no gain"
        assert summary.more_seeds == 0

    def test_one_seed_against_five_keeps_zero_in_the_interval(self):
        """p = 0.0625, so a gain is not shown, and no gain that matters is left in the interval."""
        summary = self.judge(-0.03, -0.02, -0.031, -0.025, -0.028, 0.019)
        assert summary.p == pytest.approx(0.0625)
        assert (summary.low, summary.high) == pytest.approx((-0.031, 0.019))
        assert summary.verdict == "no gain"

    def test_an_interval_never_contradicts_p_and_verdict(self):
        rng = np.random.default_rng(5)
        for _ in range(200):
            summary = self.judge(*rng.normal(rng.uniform(-0.1, 0.1), 0.05, size=rng.integers(6, 10)))
            excludes = summary.low > 0 or summary.high < 0
            assert excludes == (summary.p < ALPHA) == (summary.verdict in ("gain", "worse"))

    def test_an_arm_equal_to_the_baseline_brings_no_gain(self):
        summary = self.judge(*np.zeros(6))
        assert (summary.verdict, summary.mean, summary.sd, summary.p) == ("no gain", 0.0, 0.0, 1.0)

    def test_undetermined_when_the_spread_hides_a_gain(self):
        summary = self.judge(-0.5, 0.4, -0.3, 0.2, -0.4, 0.1)
        assert summary.verdict == "undetermined"
        assert summary.more_seeds == seeds_needed(summary.mean, summary.sd, summary.margin) - 6

    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_few_seeds_cannot_decide_however_clear(self, n: int):
        """Neither equal differences, whose spread is zero, nor a huge gain."""
        for differences in ([-2.0] * n, [-2.0 - 0.01 * i for i in range(n)]):
            summary = self.judge(*differences)
            assert summary.verdict == "undetermined"
            assert summary.more_seeds == 6 - n

    def test_one_seed_has_neither_spread_nor_interval(self):
        summary = self.judge(-0.1)
        assert (summary.sd, summary.low, summary.high, summary.p) == (None, None, None, 1.0)

    def test_an_undetermined_verdict_always_asks_for_more(self):
        rng = np.random.default_rng(0)
        for _ in range(30):
            summary = self.judge(*rng.normal(-0.03, 0.06, size=7))
            assert (summary.more_seeds > 0) == (summary.verdict == "undetermined")


class TestSeedsNeeded:
    def test_formula(self):
        """(1.959964 + 0.841621)² = 7.848880; an effect of one standard deviation needs 8 seeds."""
        assert seeds_needed(-0.2, 0.2, margin=0.01) == 8
        assert seeds_needed(-0.1, 0.2, margin=0.01) == math.ceil(4 * 7.848880)

    def test_never_fewer_than_six(self):
        assert seeds_needed(-5.0, 0.01, margin=0.01) == 6
        assert seeds_needed(0.0, 0.0, margin=0.01) == 6

    def test_without_an_effect_the_margin_is_what_must_be_excluded(self):
        assert seeds_needed(0.0, 0.1, margin=0.05) == math.ceil(7.848880 * 4)

    def test_reaches_the_power_it_promises(self):
        """Simulated: the t-test at the number of seeds asked for finds the effect in about 80 % of cases."""
        n = seeds_needed(-0.5, 1.0, margin=0.0)
        draws = np.random.default_rng(0).normal(-0.5, 1.0, size=(4000, n))
        power = np.mean(stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05)
        assert power == pytest.approx(0.8, abs=0.03)
