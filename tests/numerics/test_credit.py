"""What sampled credit can learn: E[r | a from s] = const + share · (e_s − ē), exactly, by enumeration."""

from itertools import product

import pytest
import torch
from tests.helpers import finished_step

from curriq.softq.critic import CREDIT_RULES
from curriq.softq.equations import effective_batch_size
from curriq.types import Features, Step

EFFECTS = torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64)
PROBABILITIES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
LEVEL = -3.0
UNEVEN = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


def step(sources: tuple[int, ...], action: int, weights: torch.Tensor) -> Step:
    """A step whose reward is linear in the mixture: the level plus Σ w_i e_i."""
    source = torch.tensor(sources)
    features = Features(hidden=torch.zeros(len(source), 1), loss=torch.zeros(len(source)), source=source)
    reward = LEVEL + (weights @ EFFECTS[source]).item()
    return finished_step(features, weights=weights.float(), action=action, reward=reward)


def expected_rewards(weights_given_action, n: int) -> torch.Tensor:
    """E[r | source of the credited window], over all compositions of N windows and all actions.

    It is what a Q with one value per source converges to under the rule, since least squares is the mean.
    """
    total, mass = torch.zeros(2, 3, dtype=torch.float64)
    for sources in product(range(3), repeat=n):
        for action in range(n):
            policy, weights = weights_given_action(action)
            finished = step(sources, action, weights)
            (credited,) = CREDIT_RULES["sampled"](finished).features.source.tolist()
            probability = PROBABILITIES[list(sources)].prod() * policy[action]
            total[credited] += probability * finished.reward
            mass[credited] += probability
    assert mass.sum().item() == pytest.approx(1)
    return total / mass


def closed_form(share: float) -> torch.Tensor:
    mean = PROBABILITIES @ EFFECTS
    return LEVEL + mean + share * (EFFECTS - mean)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_in_a_uniform_mixture_the_share_is_one_nth(n):
    even = torch.full((n,), 1 / n, dtype=torch.float64)
    torch.testing.assert_close(expected_rewards(lambda action: (even, even), n), closed_form(1 / n))


def test_in_an_uneven_mixture_the_share_is_one_over_the_effective_batch():
    """Candidate i is drawn with probability π_i and has weight π_i in the mixture, which makes Σ π_i²."""
    share = 1 / effective_batch_size(UNEVEN).item()
    assert share == pytest.approx(0.46)
    torch.testing.assert_close(expected_rewards(lambda action: (UNEVEN, UNEVEN), 3), closed_form(share))


@pytest.mark.parametrize("n", [1, 3])
def test_a_single_action_is_credited_in_full(n):
    even = torch.full((n,), 1 / n, dtype=torch.float64)
    one_hot = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(expected_rewards(lambda action: (even, one_hot[action]), n), closed_form(1.0))
