"""The statistics of a comparison against closed forms, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from curriq.evaluate import statistics
from curriq.evaluate.statistics import (
    FEWEST_SEEDS,
    TAIL_MARGIN,
    Ratio,
    WindowChanges,
    bootstrap_interval,
    first_crossing,
    mean_height,
    ratio_to_target,
    seeds_needed,
    sign_flip_p,
    summarise_differences,
    summarise_ratios,
    two_level_interval,
    two_level_means,
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
        summary = summarise_ratios([Ratio(0.5, False), Ratio(2.0, False)])
        assert summary.mean == pytest.approx(1.0)
        assert (summary.low, summary.high) == pytest.approx((0.5, 2.0))
        assert (summary.censored, summary.seeds) == (0, 2)

    def test_summary_with_a_censored_seed_is_a_bound(self):
        summary = summarise_ratios([Ratio(0.5, False), Ratio(2.0, True)])
        assert summary.censored == 1
        assert summary.mean == pytest.approx(1.0)
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


class TestBootstrap:
    def test_one_value_has_no_interval(self):
        assert bootstrap_interval(np.array([0.3])) == (None, None)

    def test_equal_values_give_that_value(self):
        assert bootstrap_interval(np.full(4, -0.2)) == (-0.2, -0.2)

    def test_is_repeatable(self):
        values = np.random.default_rng(1).normal(size=8)
        assert bootstrap_interval(values) == bootstrap_interval(values)

    def test_of_two_values_spans_them(self):
        """A mean of two draws is the lower value with probability 1/4, far above 2.5 %."""
        assert bootstrap_interval(np.array([0.0, 1.0])) == (0.0, 1.0)

    def test_covers_the_truth_about_as_often_as_it_says(self):
        """At n = 30 the percentile interval of a normal mean covers 93.5 to 95 %; 200 samples are within
        ±5 points of that."""
        rng = np.random.default_rng(0)
        intervals = [bootstrap_interval(rng.normal(0.7, 2.0, size=30)) for _ in range(200)]
        covered = np.mean([low <= 0.7 <= high for low, high in intervals])
        assert 0.89 <= covered <= 0.99


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


def enumerated(seeds: list[WindowChanges], *, shared: bool):
    """Every resample of seeds and windows that two-level resampling can draw, each as likely."""
    n, w = len(seeds), len(seeds[0].changes)
    draws = list(itertools.product(range(w), repeat=w))

    def mean(seed: int, drawn: tuple[int, ...]) -> float:
        weights = [seeds[seed].tokens[i] for i in drawn]
        return sum(weights[k] * seeds[seed].changes[i] for k, i in enumerate(drawn)) / sum(weights)

    return [
        np.mean([mean(seed, drawn) for seed, drawn in zip(picked, of_each, strict=True)])
        for picked in itertools.product(range(n), repeat=n)
        for of_each in ([[d] * n for d in draws] if shared else itertools.product(draws, repeat=n))
    ]


class TestTwoLevels:
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("tokens", [None, [1, 2, 5]])
    def test_equals_the_enumeration_of_all_resamples(self, shared: bool, tokens: list[int] | None):
        seeds = changes_of([0.1, -0.4, 0.9], [1.0, 0.3, 0.35], tokens=tokens, shared=shared)
        drawn = two_level_means(seeds, 60_000, np.random.default_rng(0))
        expected = enumerated(seeds, shared=shared)
        assert stats.ks_2samp(drawn, expected).statistic < 0.01
        assert drawn.mean() == pytest.approx(np.mean(expected), abs=0.005)
        assert drawn.std() == pytest.approx(np.std(expected), rel=0.02)

    def test_variance_in_closed_form(self):
        """(v + mean_s(v_s / w_s)) / n with separate test sets of different sizes; the interval is normal."""
        rng = np.random.default_rng(1)
        sizes = (100, 200, 150, 80, 120, 90, 110, 70, 60, 140, 130, 160)
        seeds = changes_of(*(rng.normal(rng.normal(-0.1, 0.04), 0.5, size=w).tolist() for w in sizes))
        means = [seed.changes.mean() for seed in seeds]
        within = [seed.changes.var() / len(seed.changes) for seed in seeds]
        sd = math.sqrt((np.var(means) + np.mean(within)) / len(seeds))
        assert two_level_means(seeds, 40_000, rng).std() == pytest.approx(sd, rel=0.02)
        expected = (np.mean(means) - 1.96 * sd, np.mean(means) + 1.96 * sd)
        assert two_level_interval(seeds) == pytest.approx(expected, abs=0.05 * sd)

    def test_the_text_of_one_test_set_does_not_average_out_over_seeds(self):
        """Where all seeds find the same changes, what is left is the text's share, sd/√w."""
        row = np.random.default_rng(2).normal(0.0, 0.5, size=200).tolist()
        assert bootstrap_interval(np.full(6, np.mean(row))) == pytest.approx((np.mean(row),) * 2)
        low, high = two_level_interval(changes_of(*[row] * 6, shared=True))
        assert high - low == pytest.approx(2 * 1.96 * np.std(row) / math.sqrt(200), rel=0.05)
        low, high = two_level_interval(changes_of(*[row] * 6))
        assert high - low == pytest.approx(2 * 1.96 * np.std(row) / math.sqrt(6 * 200), rel=0.05)

    @pytest.mark.parametrize("shared", [False, True])
    def test_covers_the_truth_where_the_interval_over_seeds_does_not(self, shared: bool, monkeypatch):
        """Six seeds (sd 0.02) of 128 windows (sd 0.3), with test sets of their own and with one for all."""
        monkeypatch.setattr(statistics, "RESAMPLES", 499)
        rng, samples = np.random.default_rng(0), 120
        covered = np.zeros(2)
        for _ in range(samples):
            text = rng.normal(0, 0.3, size=(1 if shared else 6, 128))
            rows = rng.normal(0, 0.02, size=(6, 1)) + text + rng.normal(0, 0.1, size=(6, 128))
            intervals = (
                bootstrap_interval(rows.mean(axis=1)),
                two_level_interval(changes_of(*rows.tolist(), shared=shared)),
            )
            covered += [low <= 0 <= high for low, high in intervals]
        over_seeds, with_text = covered / samples
        assert with_text >= 0.9
        assert over_seeds <= (0.6 if shared else 0.92)

    def test_one_seed_has_no_interval_and_equal_changes_have_that_one(self):
        assert two_level_interval(changes_of([0.1, 0.2])) == (None, None)
        assert two_level_interval(changes_of([0.25, 0.25], [0.25, 0.25])) == (0.25, 0.25)

    def test_many_windows_are_resampled_in_parts(self):
        """More numbers than are drawn at once; the variance is that of the whole."""
        rng = np.random.default_rng(3)
        seeds = changes_of(*(rng.normal(size=30_000).tolist() for _ in range(3)))
        drawn = two_level_means(seeds, 400, rng)
        means = [s.changes.mean() for s in seeds]
        assert len(drawn) == 400
        assert drawn.std() == pytest.approx(math.sqrt((np.var(means) + 1 / 30_000) / 3), rel=0.15)

    def test_the_verdict_needs_the_wider_interval(self):
        """Over seeds a gain of 1 % is excluded; over other windows it is not."""
        arm = 5 + np.array([-0.01, 0.012, 0.003, -0.008, 0.01, -0.004])
        assert summarise_differences(arm, np.full(6, 5.0)).verdict == "no gain"
        noisy = np.random.default_rng(0).normal(0, 2, size=64)
        rows = [(noisy - noisy.mean() + d - 5).tolist() for d in arm]
        summary = summarise_differences(arm, np.full(6, 5.0), changes_of(*rows, shared=True))
        assert summary.low_with_text < -summary.margin < summary.low
        assert summary.high_with_text > summary.high
        assert summary.verdict == "undetermined"

    def test_the_tail_counts_windows_that_are_worse_by_more_than_the_margin(self):
        (seed,) = changes_of([TAIL_MARGIN + 1e-9, TAIL_MARGIN - 1e-9, 5.0, -3.0, 9.0], tokens=[1, 9, 2, 3, 0])
        assert seed.share_worse == 0.5  # two of the four windows with a learnt token


class TestSignFlip:
    @pytest.mark.parametrize("n", [2, 3, 5, 8])
    def test_equals_enumeration(self, n: int):
        differences = np.random.default_rng(n).normal(0.4, 1.0, size=n)
        flips = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in signs_of(n)]
        expected = np.mean([abs(flip) >= abs(differences.sum()) - 1e-12 for flip in flips])
        assert sign_flip_p(differences) == pytest.approx(expected)

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


def signs_of(n: int):
    return itertools.product((-1, 1), repeat=n)


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

    def test_small_but_hardly_chance_is_undetermined(self):
        """The interval leaves out 0 and every gain that matters, but p = 0.0625: one more seed decides."""
        summary = self.judge(-0.03, -0.02, -0.031, -0.025, -0.028, 0.019)
        assert summary.p == pytest.approx(0.0625)
        assert -summary.margin < summary.low < summary.high < 0
        assert (summary.verdict, summary.more_seeds) == ("undetermined", 1)

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
