"""The paper's equations against closed forms, brute force and numerical optimisation, in float64."""

import math
from itertools import pairwise

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import optimize, special, stats

from curriq.softq import equations as eq

SEEDS = [0, 1, 2]


def random_q(seed: int, n: int = 7) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=n))


def random_policy(seed: int, n: int = 7) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed + 100).dirichlet(np.ones(n)))


def test_shapes_are_checked_while_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError):
        eq.soft_value(torch.zeros(2, 2), 1.0)


# Eqs. 3 and 4


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.01, 0.3, 1.0, 20.0])
def test_soft_value_is_the_published_formula(seed, beta):
    q = random_q(seed)
    expected = beta * (special.logsumexp(q.numpy() / beta) - math.log(len(q)))
    assert eq.soft_value(q, beta).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [1e-6, 0.1, 1.0, 1e6])
@pytest.mark.parametrize("level", [-3.25, 0.0, 7.5])
def test_equal_q_gives_v_equal_q_exactly(beta, level):
    assert eq.soft_value(torch.full((13,), level), beta).item() == level


def test_soft_value_limits_are_the_mean_and_the_maximum():
    q = random_q(0)
    assert eq.soft_value(q, 1e7).item() == pytest.approx(q.mean().item(), abs=1e-6)
    assert eq.soft_value(q, 1e-7).item() == pytest.approx(q.max().item(), abs=1e-6)


def test_soft_value_falls_from_maximum_to_mean_as_beta_grows():
    q = random_q(1)
    values = [eq.soft_value(q, beta).item() for beta in np.logspace(-3, 3, 40)]
    assert all(left > right for left, right in pairwise(values))
    assert q.mean() < values[-1] < values[0] < q.max()


def test_soft_value_keeps_its_digits_in_float32_when_beta_dwarfs_the_spread():
    """The usual case of the paper: β = 1, gaps of a thousandth; logsumexp − log N would lose 1e-7."""
    q = 1e-3 * random_q(2, n=256)
    expected = special.logsumexp(q.numpy()) - math.log(256)
    assert eq.soft_value(q.float(), 1.0).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_soft_value_moves_and_scales_with_q(seed):
    q = random_q(seed)
    value = eq.soft_value(q, 0.5)
    torch.testing.assert_close(eq.soft_value(q + 4.0, 0.5), value + 4.0)
    torch.testing.assert_close(eq.soft_value(3.0 * q, 1.5), 3.0 * value)
    torch.testing.assert_close(eq.soft_value(q.flip(0), 0.5), value)
    torch.testing.assert_close(eq.soft_value(q.repeat(5), 0.5), value)  # the normalisation by log N


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_constant_reward_has_the_fixed_point_q_equal_r(gamma):
    """The Bellman operator maps a table of Q to (1 − γ) r + γ V(Q); it contracts onto r at rate γ."""
    reward, q = -3.7, random_q(3)
    for _ in range(400):
        q = eq.td_target(reward, eq.soft_value(q, 0.3), gamma).expand(7)
    torch.testing.assert_close(q, torch.full_like(q, reward))


def test_the_bellman_operator_contracts_at_rate_gamma():
    q = torch.full((5,), 2.0, dtype=torch.float64)
    for step in range(1, 20):
        q = eq.td_target(-1.0, eq.soft_value(q, 0.7), 0.8).expand(5)
        assert q[0].item() == pytest.approx(-1.0 + 3.0 * 0.8**step, rel=1e-12)


# Eq. 5


def test_polyak_with_tau_one_copies_and_with_tau_near_zero_keeps():
    online, start = [random_q(0), random_q(1)], [random_q(2), random_q(3)]
    copied = [p.clone() for p in start]
    eq.polyak_(copied, online, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(copied, online, strict=True))
    kept = [p.clone() for p in start]
    eq.polyak_(kept, online, 1e-14)
    torch.testing.assert_close(kept, start, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [0.01, 0.3, 0.9])
def test_polyak_approaches_a_constant_network_geometrically(tau):
    online, start = [random_q(0)], [random_q(1)]
    target = [start[0].clone()]
    for step in range(1, 30):
        eq.polyak_(target, online, tau)
        torch.testing.assert_close(target[0], online[0] + (1 - tau) ** step * (start[0] - online[0]))


def test_polyak_refuses_networks_of_different_shape():
    with pytest.raises(ValueError, match="zip"):
        eq.polyak_([random_q(0)], [random_q(0), random_q(1)], 0.5)


# Eqs. 6–10


@pytest.mark.parametrize("seed", SEEDS)
def test_boltzmann_odds_are_exponentials_of_gaps(seed):
    q, beta = random_q(seed), 0.4
    policy = eq.boltzmann(q, beta)
    assert policy.sum().item() == pytest.approx(1, abs=1e-14)
    torch.testing.assert_close(policy[:, None] / policy[None], torch.exp((q[:, None] - q[None]) / beta))


def test_boltzmann_ignores_a_constant_and_survives_extremes():
    q = random_q(0)
    torch.testing.assert_close(eq.boltzmann(q + 100.0, 0.2), eq.boltzmann(q, 0.2))
    sharp = eq.boltzmann(torch.tensor([1e4, -1e4, 0.0]), 1e-3)
    assert sharp.tolist() == [1, 0, 0]


def test_mixture_gradient_is_the_expected_gradient():
    """Eq. 8 by brute force: one gradient per candidate, averaged under π."""
    weights = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights.requires_grad_()
    inputs = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    policy = random_policy(0, n=5)
    (mixed,) = torch.autograd.grad(eq.mixture_loss(policy, torch.tanh(inputs @ weights)), weights)
    each = [torch.autograd.grad(torch.tanh(row @ weights), weights)[0] for row in inputs]
    torch.testing.assert_close(mixed, sum(p * g for p, g in zip(policy, each, strict=True)))


def test_uniform_mixture_is_the_mean_loss_and_uses_all_windows():
    losses = random_q(4)
    policy = eq.uniform_policy(losses)
    torch.testing.assert_close(eq.mixture_loss(policy, losses), losses.mean())
    assert eq.effective_batch_size(policy).item() == pytest.approx(7)
    assert eq.kl_from_prior(policy).item() == pytest.approx(0, abs=1e-15)
    assert eq.entropy(policy).item() == pytest.approx(math.log(7))


def test_a_policy_on_one_window_has_no_entropy():
    policy = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert eq.entropy(policy).item() == 0
    assert eq.effective_batch_size(policy).item() == 1
    assert eq.kl_from_prior(policy).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("seed", SEEDS)
def test_entropy_and_divergence_agree_with_scipy(seed):
    policy = random_policy(seed)
    assert eq.entropy(policy).item() == pytest.approx(stats.entropy(policy.numpy()))
    uniform = np.full(7, 1 / 7)
    assert eq.kl_from_prior(policy).item() == pytest.approx(stats.entropy(policy.numpy(), uniform))


@pytest.mark.parametrize("share", [1, 2, 7])
def test_effective_batch_size_counts_equally_weighted_windows(share):
    policy = torch.zeros(7, dtype=torch.float64)
    policy[:share] = 1 / share
    assert eq.effective_batch_size(policy).item() == pytest.approx(share)


# Eqs. 17–19


def minimise_over_policies(objective, n: int, seed: int) -> tuple[torch.Tensor, float]:
    """Minimum over the simplex, written as softmax of free logits, by BFGS with exact gradients."""

    def value_and_gradient(x):
        logits = torch.from_numpy(x).requires_grad_()
        value = objective(logits.softmax(0))
        (gradient,) = torch.autograd.grad(value, logits)
        return value.item(), gradient.numpy()

    start = np.random.default_rng(seed).normal(size=n)
    found = optimize.minimize(value_and_gradient, start, jac=True, method="BFGS", options={"gtol": 1e-10})
    return torch.from_numpy(found.x).softmax(0), found.fun


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_the_boltzmann_policy_minimises_the_free_energy(seed, beta):
    q = random_q(seed, n=5)
    policy, minimum = minimise_over_policies(lambda p: eq.free_energy(p, q, beta), 5, seed)
    torch.testing.assert_close(policy, eq.boltzmann(q, beta), rtol=0, atol=1e-6)
    assert minimum == pytest.approx(-eq.soft_value(q, beta).item(), abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_the_elbo_is_tight_at_the_boltzmann_policy(seed, beta):
    q = random_q(seed, n=5)
    log_evidence = math.log(np.mean(np.exp(q.numpy() / beta)))  # Σ p_0(i) p(optimal | i)
    policy, minimum = minimise_over_policies(lambda p: -eq.elbo(p, q, beta), 5, seed)
    assert -minimum == pytest.approx(log_evidence, abs=1e-9)
    torch.testing.assert_close(policy, eq.boltzmann(q, beta), rtol=0, atol=1e-6)
    assert eq.soft_value(q, beta).item() == pytest.approx(beta * log_evidence)


@pytest.mark.parametrize("seed", range(20))
def test_the_elbo_never_exceeds_the_log_evidence(seed):
    """The gap is KL(π ‖ Boltzmann), so it is also checked against scipy's."""
    q, policy, beta = random_q(seed), random_policy(seed), 0.6
    log_evidence = math.log(np.mean(np.exp(q.numpy() / beta)))
    gap = log_evidence - eq.elbo(policy, q, beta).item()
    boltzmann = special.softmax(q.numpy() / beta)
    assert gap == pytest.approx(stats.entropy(policy.numpy(), boltzmann), abs=1e-12)
    assert gap > 0


# A prior π₀ in place of the uniform p_0


def random_prior(seed: int, n: int = 7) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed + 200).dirichlet(np.ones(n)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.01, 0.3, 1.0, 20.0, math.inf])
def test_a_uniform_prior_changes_nothing(seed, beta):
    q, even = random_q(seed), torch.full((7,), 1 / 7, dtype=torch.float64)
    policy = random_policy(seed)
    torch.testing.assert_close(eq.soft_value(q, beta, even), eq.soft_value(q, beta))
    torch.testing.assert_close(eq.boltzmann(q, beta, even), eq.boltzmann(q, beta))
    torch.testing.assert_close(eq.kl_from_prior(policy, even), eq.kl_from_prior(policy))
    if beta < math.inf:
        torch.testing.assert_close(eq.free_energy(policy, q, beta, even), eq.free_energy(policy, q, beta))
        torch.testing.assert_close(eq.elbo(policy, q, beta, even), eq.elbo(policy, q, beta))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.02, 0.5, 3.0])
def test_soft_value_with_a_prior_is_the_log_of_a_mean_under_it(seed, beta):
    q, prior = random_q(seed), random_prior(seed)
    expected = beta * special.logsumexp(q.numpy() / beta, b=prior.numpy())
    assert eq.soft_value(q, beta, prior).item() == pytest.approx(expected, rel=1e-12)


def test_limits_of_the_soft_value_with_a_prior_are_its_mean_and_the_greatest_q_that_it_allows():
    q, prior = torch.tensor([3.0, 1.0, -1.0]).double(), torch.tensor([0.0, 0.25, 0.75]).double()
    assert eq.soft_value(q, 1e-7, prior).item() == pytest.approx(1.0, abs=1e-6)
    assert eq.soft_value(q, 1e7, prior).item() == pytest.approx(-0.5, abs=1e-6)
    assert eq.soft_value(q, math.inf, prior).item() == -0.5
    assert eq.boltzmann(q, 0.1, prior)[0] == 0


def test_soft_value_with_a_prior_keeps_its_digits_in_float32():
    q, prior = 1e-3 * random_q(2, n=256), random_prior(2, n=256)
    expected = special.logsumexp(q.numpy(), b=prior.numpy())
    assert eq.soft_value(q.float(), 1.0, prior.float()).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("least", [1e-30, 1e-6, 0.4])
def test_soft_value_where_the_greatest_q_has_hardly_any_prior(least):
    """In float32; 1 + (a number near −1) would be 0, and its logarithm infinite."""
    q, prior = torch.tensor([0.0, -1.0, -1.5]), torch.tensor([least, 0.5 - least, 0.5])
    expected = 0.005 * special.logsumexp(q.double().numpy() / 0.005, b=prior.double().numpy())
    assert eq.soft_value(q, 0.005, prior).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_the_boltzmann_policy_with_a_prior_minimises_the_free_energy_from_it(seed, beta):
    q, prior = random_q(seed, n=5), random_prior(seed, n=5)
    policy, minimum = minimise_over_policies(lambda p: eq.free_energy(p, q, beta, prior), 5, seed)
    torch.testing.assert_close(policy, eq.boltzmann(q, beta, prior), rtol=0, atol=1e-5)
    assert minimum == pytest.approx(-eq.soft_value(q, beta, prior).item(), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_the_free_energy_exceeds_minus_v_by_the_divergence_from_the_policy(seed):
    """F(π) + V = β KL(π ‖ π*), for any π; so that the ELBO is tight at π* alone."""
    q, policy, prior, beta = random_q(seed), random_policy(seed), random_prior(seed), 0.6
    best = special.softmax(q.numpy() / beta + np.log(prior.numpy()))
    gap = eq.free_energy(policy, q, beta, prior) + eq.soft_value(q, beta, prior)
    assert gap.item() == pytest.approx(beta * stats.entropy(policy.numpy(), best), abs=1e-12)
    log_evidence = math.log(prior.numpy() @ np.exp(q.numpy() / beta))
    assert eq.elbo(policy, q, beta, prior).item() == pytest.approx(
        log_evidence - gap.item() / beta, abs=1e-12
    )
    assert eq.elbo(torch.from_numpy(best), q, beta, prior).item() == pytest.approx(log_evidence, abs=1e-12)
    assert gap > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_of_the_free_energy_is_level_at_the_policy(seed):
    """Along the simplex nothing is to be gained there: ∂F/∂π_i is the same for all i."""
    q, prior = random_q(seed), random_prior(seed)
    policy = eq.boltzmann(q, 0.4, prior).requires_grad_()
    (gradient,) = torch.autograd.grad(eq.free_energy(policy, q, 0.4, prior), policy)
    torch.testing.assert_close(gradient, gradient.mean().expand(7), rtol=0, atol=1e-12)


def test_the_divergence_from_a_prior_is_scipys_and_infinite_outside_it():
    policy, prior = random_policy(1), random_prior(1)
    expected = stats.entropy(policy.numpy(), prior.numpy())
    assert eq.kl_from_prior(policy, prior).item() == pytest.approx(expected)
    allowed = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert eq.kl_from_prior(allowed, allowed).item() == 0
    assert eq.kl_from_prior(allowed.flip(0), allowed).item() == math.inf


# a_k ~ π_k


def test_sampled_actions_follow_the_policy():
    policy = torch.tensor([0.1, 0.0, 0.25, 0.4, 0.25])
    generator = torch.Generator().manual_seed(0)
    counts = np.bincount([eq.sample_action(policy, generator) for _ in range(4000)], minlength=5)
    assert counts[1] == 0
    kept = [0, 2, 3, 4]
    expected = 4000 * policy[kept].double().numpy()
    assert stats.chisquare(counts[kept], expected * 4000 / expected.sum()).pvalue > 1e-4


def test_sampling_takes_one_draw_whatever_the_policy():
    """Two arms of a comparison stay in step: the generator moves equally for every policy and precision."""
    states = []
    for policy in (torch.ones(1), eq.uniform_policy(random_q(0)), eq.boltzmann(random_q(1), 0.1).float()):
        generator = torch.Generator().manual_seed(7)
        eq.sample_action(policy, generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_sampling_refuses_a_policy_that_is_not_finite():
    with pytest.raises(FloatingPointError, match="policy"):
        eq.sample_action(torch.tensor([0.5, math.nan]), torch.Generator())
