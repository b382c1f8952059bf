"""β solved against closed forms, the governor on confidence that is known, and the learned temperature."""

import io
import math

import pytest
import torch
from scipy import stats
from tests.helpers import effects_of

from curriq.config import CriticConfig
from curriq.softq.equations import boltzmann, effective_batch_size, entropy
from curriq.softq.temperature import (
    Acceptance,
    CalibrationGate,
    Evidence,
    FixedBeta,
    FixedFraction,
    LearnedBeta,
    PriorTrust,
    Sharpness,
    SolvedBeta,
    Temperature,
    build_temperature,
    effective_batch_fraction,
    rank_correlation,
    solve_beta,
)


def draws(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_solved_beta_gives_the_fraction_at_any_scale_of_q(fraction, scale):
    q = 3.0 + scale * draws(64)
    policy = boltzmann(q, solve_beta(q, fraction))
    assert effective_batch_size(policy).item() / 64 == pytest.approx(fraction, rel=1e-4)


def test_solved_beta_of_two_values_is_the_closed_form():
    """Half at 0 and half at 1 with ratio x = exp(1/β): the fraction is (1 + x)²/(2 (1 + x²))."""
    q = torch.tensor([0.0, 1.0] * 8, dtype=torch.float64)
    x = math.exp(1 / solve_beta(q, 0.8))
    assert (1 + x) ** 2 / (2 * (1 + x**2)) == pytest.approx(0.8)


def test_the_share_taken_of_two_values_is_the_closed_form():
    """Half at 0 and half at 1: (1 + exp(−1/β))/2 of the windows are taken."""
    q = torch.tensor([0.0, 1.0] * 8, dtype=torch.float64)
    assert (1 + math.exp(-1 / solve_beta(q, 0.8, Acceptance()))) / 2 == pytest.approx(0.8)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.9])
def test_solved_beta_takes_the_share_at_any_scale_of_q(fraction):
    q = 3.0 + 1e-5 * draws(200)
    beta = solve_beta(q, fraction, Acceptance())
    assert ((q - q.max()) / beta).exp().mean().item() == pytest.approx(fraction, rel=1e-6)


def test_solved_beta_takes_the_share_of_which_a_part_is_sure():
    """All above the upper quartile for sure, and as many of the rest as are missing."""
    q = draws(201)
    beta = solve_beta(q, 0.6, Acceptance(0.25))
    c = q.sort().values[150]
    below = q[q < c]
    assert (51 + ((below - c) / beta).exp().sum()).item() / 201 == pytest.approx(0.6, rel=1e-6)


def test_solved_beta_at_its_ends():
    q = draws(16)
    assert solve_beta(q, 1.0) == math.inf
    assert effective_batch_size(boltzmann(q, solve_beta(q, 1.0))).item() == pytest.approx(16, rel=1e-6)
    assert effective_batch_size(boltzmann(q, solve_beta(q, 1e-6))).item() == pytest.approx(1, rel=1e-6)
    assert solve_beta(torch.full((5,), 2.0), 0.5) is None


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_spearmans(seed):
    a, b = draws(20, seed).mul(2).round(), draws(20, seed + 100)  # ties on one side
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_rank_correlation_without_any_order_is_zero():
    assert rank_correlation(torch.ones(4), draws(4)) == 0.0
    assert rank_correlation(torch.ones(1), torch.ones(1)) == 0.0


def play(sharpness, probes: int, correlation: float, seed: int = 0, n: int = 32) -> dict[str, float]:
    """Probes in which Q and effects are normal with a given correlation."""
    row = {}
    for k in range(probes):
        q, noise = draws(n, seed + 2 * k), draws(n, seed + 2 * k + 1)
        effect = correlation * q + math.sqrt(1 - correlation**2) * noise
        row = sharpness.observe(q, effects_of(torch.arange(n), effect))
    return row


class TestEvidence:
    def test_standard_error_is_that_of_a_mean(self):
        """With a memory of all measurements it is the sample standard deviation over √n."""
        evidence, found = Evidence(1e12), draws(12).tolist()
        for x in found:
            evidence.add(x)
        mean, error = evidence.mean_and_error()
        assert evidence.count == 12
        assert mean == pytest.approx(sum(found) / 12)
        assert error == pytest.approx(stats.sem(found), rel=1e-6)

    def test_standard_error_counts_old_measurements_for_less(self):
        """That of a weighted mean, with Kish's effective number of measurements."""
        evidence, found = Evidence(5.0), draws(12).tolist()
        for x in found:
            evidence.add(x)
        weights = [0.8 ** (11 - k) for k in range(12)]
        expected = sum(w * r for w, r in zip(weights, found, strict=True)) / sum(weights)
        n = sum(weights) ** 2 / sum(w * w for w in weights)
        variance = sum(w * r * r for w, r in zip(weights, found, strict=True)) / sum(weights) - expected**2
        mean, error = evidence.mean_and_error()
        assert mean == pytest.approx(expected)
        assert error == pytest.approx(math.sqrt(variance / (n - 1)), rel=1e-6)

    def test_one_measurement_is_no_evidence(self):
        evidence = Evidence()
        evidence.add(0.4)
        assert evidence.mean_and_error() == (pytest.approx(0.4), 1.0)


class TestGovernor:
    def test_is_uniform_before_there_is_evidence(self):
        governor = CalibrationGate(0.3)
        assert governor.fraction == 1.0
        play(governor, 3, 1.0)
        assert governor.fraction == 1.0

    def test_is_sharpest_where_q_ranks_well(self):
        governor = CalibrationGate(0.3)
        row = play(governor, 30, 0.6)
        assert governor.fraction == pytest.approx(0.3)
        assert row["gate/calibration"] == pytest.approx(0.58, abs=0.1)
        assert row["gate/target_fraction"] == governor.fraction

    @pytest.mark.parametrize(
        ("rho", "fraction", "without"),
        [(0.1, 0.75, 0.75), (0.2, 0.5, 0.5), (0.3, 0.5**1.5, 0.5), (0.4, 0.25, 0.5), (0.9, 0.125, 0.5)],
    )
    def test_falls_on_where_q_ranks_better_than_it_must(self, rho: float, fraction: float, without: float):
        for lowest, expected in ((0.125, fraction), (1.0, without), (0.7, without)):
            gate = CalibrationGate(0.5, lowest=lowest)
            for _ in range(8):
                gate._evidence.add(rho)  # always the same, so the bound is ρ itself
            assert gate.fraction == pytest.approx(expected, rel=1e-6)

    def test_stays_near_uniform_where_the_effects_mean_nothing(self):
        """Over 30 independent runs of 100 probes; the bound lies two standard errors below the mean."""
        fractions = []
        for run in range(30):
            governor = CalibrationGate(0.3)
            play(governor, 100, 0.0, seed=10_000 * run)
            fractions.append(governor.fraction)
        assert sum(fractions) / 30 > 0.99
        assert sorted(fractions)[3] == 1.0

    def test_goes_back_when_q_stops_ranking(self):
        governor = CalibrationGate(0.3)
        play(governor, 40, 0.7)
        play(governor, 80, 0.0, seed=5000)
        assert governor.fraction > 0.9

    def test_is_uniform_where_q_ranks_the_wrong_way_round(self):
        governor = CalibrationGate(0.3)
        play(governor, 40, -0.6)
        assert governor.fraction == 1.0

    def test_reports_its_evidence(self):
        """Mean and standard error are those of all correlations so far."""
        governor, evidence = CalibrationGate(0.3), Evidence()
        for k in range(12):
            row = play(governor, 1, 0.4, seed=100 * k)
            evidence.add(row["gate/rank_correlation"])
        assert (row["gate/calibration"], row["gate/calibration_error"]) == evidence.mean_and_error()

    @pytest.mark.parametrize(("full", "fraction"), [(0.2, 0.3), (10.0, 0.95)])
    def test_the_correlation_for_full_sharpness_is_a_setting(self, full, fraction):
        config = CriticConfig(
            credit="counterfactual",
            q_features=("source",),
            temperature="gated",
            corr_for_full_sharpness=full,
        )
        row = play(build_temperature(config, 0.3, share=effective_batch_fraction), 30, 0.6)
        assert row["gate/target_fraction"] == pytest.approx(fraction, abs=0.03)

    def test_a_step_without_a_probe_says_nothing(self):
        governor = CalibrationGate(0.3)
        assert governor.observe(draws(8), None) == {}


def doubt(trust: PriorTrust, probes: int, correlation: float, seed: int = 0, n: int = 32) -> dict[str, float]:
    """Probes in which prior and effects are normal with a given correlation."""
    row = {}
    for k in range(probes):
        prior, noise = draws(n, seed + 2 * k), draws(n, seed + 2 * k + 1)
        row = trust.observe(prior, correlation * prior + math.sqrt(1 - correlation**2) * noise)
    return row


class TestPriorTrust:
    def test_is_full_without_evidence(self):
        trust = PriorTrust()
        assert trust.exponent == 1.0
        doubt(trust, 3, -1.0)
        assert trust.exponent == 1.0

    @pytest.mark.parametrize("correlation", [0.05, 0.3, 0.9])
    def test_stays_full_where_the_prior_ranks_rightly(self, correlation):
        trust = PriorTrust()
        assert all(doubt(trust, 1, correlation, seed=1000 * k)["prior/trust"] == 1.0 for k in range(60))

    def test_stays_full_where_it_ranks_nothing(self):
        """Over 30 independent runs of 100 probes: the bound lies two standard errors above the mean."""
        exponents = []
        for run in range(30):
            trust = PriorTrust()
            doubt(trust, 100, 0.0, seed=10_000 * run)
            exponents.append(trust.exponent)
        assert sorted(exponents)[3] == 1.0
        assert sum(exponents) / 30 > 0.95

    def test_falls_to_zero_where_it_ranks_the_wrong_way_round(self):
        trust = PriorTrust()
        row = doubt(trust, 40, -0.7)
        assert row["prior/trust"] == trust.exponent == 0.0
        assert row["prior/rank_correlation"] < -0.3

    def test_falls_in_proportion_to_the_upper_bound_of_the_correlation(self):
        """Mean and standard error of a weighted sample, by hand, with Kish's number of probes."""
        trust, found = PriorTrust(full=1.0, z=1.5), []
        for k in range(12):
            found.append(doubt(trust, 1, -0.4, seed=100 * k)["prior/rank_correlation"])
        weights = [0.95 ** (11 - k) for k in range(12)]
        mean = sum(w * r for w, r in zip(weights, found, strict=True)) / sum(weights)
        n = sum(weights) ** 2 / sum(w * w for w in weights)
        variance = sum(w * r * r for w, r in zip(weights, found, strict=True)) / sum(weights) - mean**2
        bound = mean + 1.5 * math.sqrt(variance / (n - 1))
        assert -1 < bound < 0
        assert trust.exponent == pytest.approx(1 + bound)

    def test_a_constant_prior_is_never_doubted(self):
        """It ranks nothing, so that no effect can speak against it."""
        trust = PriorTrust()
        for k in range(20):
            assert trust.observe(torch.ones(16, dtype=torch.float64), draws(16, k))["prior/trust"] == 1.0

    def test_continues_from_its_state(self):
        one, other = PriorTrust(), PriorTrust()
        doubt(one, 9, -0.3)
        other.load_state_dict(one.state_dict())
        assert doubt(one, 5, -0.5, seed=77) == doubt(other, 5, -0.5, seed=77)


def test_the_solved_temperature_follows_the_batches_before():
    temperature = SolvedBeta(FixedFraction(0.6), memory=4)
    for k in range(8):
        temperature.observe(draws(2048, k) + 10 * k, None)  # the level of Q drifts and must not count
    fresh = boltzmann(draws(4096, 99), temperature.beta)
    assert effective_batch_size(fresh).item() / 4096 == pytest.approx(0.6, abs=0.06)
    before = temperature.beta
    temperature.observe(torch.full((64,), 3.0, dtype=torch.float64), None)
    assert math.isfinite(temperature.beta)
    assert before > 0


def test_the_learned_temperature_finds_its_entropy():
    temperature = LearnedBeta(FixedFraction(0.25), beta=5.0, learning_rate=0.1)
    for k in range(400):
        temperature.observe(draws(64, k), None)
    found = sum(entropy(boltzmann(draws(64, k), temperature.beta)).item() for k in range(50)) / 50
    assert found == pytest.approx(math.log(64 * 0.25), abs=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedBeta(0.5),
        lambda: SolvedBeta(FixedFraction(0.5)),
        lambda: SolvedBeta(CalibrationGate(0.3)),
        lambda: LearnedBeta(CalibrationGate(0.5), 1.0, 0.1),
    ],
)
def test_a_temperature_conforms_and_continues_bitwise_from_its_state(make):
    one, other = make(), make()
    assert isinstance(one, Temperature)
    play(one, 9, 0.5)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert play(one, 5, 0.2, seed=77) == play(other, 5, 0.2, seed=77)
    assert one.beta == other.beta


@pytest.mark.parametrize("make", [lambda: FixedFraction(0.4), lambda: CalibrationGate(0.4)])
def test_a_sharpness_conforms(make):
    assert isinstance(make(), Sharpness)
