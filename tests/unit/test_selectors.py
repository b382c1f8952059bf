"""What each selector prefers, against closed forms and simulations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from tests.helpers import finished_step

from curriq.config import CriticConfig
from curriq.errors import CurriqError
from curriq.rng import Generators
from curriq.select.bandit import SourceBandit
from curriq.select.base import RandomK, Uniform, UniformUntil
from curriq.select.competence import (
    Competence,
    LabelDifficulty,
    LabelOrRarity,
    LengthDifficulty,
    RarityDifficulty,
    root_competence,
    token_characters,
)
from curriq.select.loss import ByLoss, ExcessLoss, Uncertainty
from curriq.select.soft_q import SoftQ
from curriq.softq.critic import QInputs, TDCritic
from curriq.softq.temperature import FixedBeta
from curriq.types import Features, Offer, Step, Windows


def windows(tokens=None, n: int = 4, source=None, difficulty=None) -> Windows:
    tokens = torch.zeros(n, 3, dtype=torch.int64) if tokens is None else torch.tensor(tokens)
    n = len(tokens)
    return Windows(
        tokens=tokens,
        ids=torch.arange(n),
        source=torch.zeros(n, dtype=torch.int64) if source is None else torch.tensor(source),
        difficulty=None if difficulty is None else torch.tensor(difficulty, dtype=torch.float32),
    )


def offered(**columns) -> Offer:
    return Offer.of(windows(**columns))


def measured(loss, entropy=None, width: int = 2) -> Features:
    return Features(
        hidden=torch.randn(len(loss), width, generator=torch.Generator().manual_seed(0)),
        loss=torch.tensor(loss),
        entropy=None if entropy is None else torch.tensor(entropy),
    )


# Scores


def test_soft_q_weights_are_the_critics_policy():
    temperature = FixedBeta(0.05)
    critic = TDCritic(CriticConfig(), QInputs(("last",), 2), temperature, "cpu", Generators(0))
    seen = measured([1.0, 2.0, 3.0, 4.0])
    scores = SoftQ(critic, temperature).score(0, offered(), seen)
    torch.testing.assert_close(scores.softmax(0), critic.policy(critic.values(seen), seen))


PRIOR = torch.tensor([0.5, 1e-60, 1.0, 0.02], dtype=torch.float64)
"""The second one is less than float32 can hold."""


def weighing(beta: float, uniform_share: float = 0.0) -> tuple[SoftQ, TDCritic]:
    temperature = FixedBeta(beta)
    inputs = QInputs(("last",), 2)
    critic = TDCritic(CriticConfig(), inputs, temperature, "cpu", Generators(0), weighs_by_prior=True)
    return SoftQ(critic, temperature, uniform_share, weighs_by_prior=True), critic


@pytest.mark.parametrize("beta", [0.05, 1.0, 1e9])
def test_weights_with_a_prior_are_the_prior_times_the_exponential(beta):
    """Normalised over the step; so is the policy that actions are drawn from."""
    selector, critic = weighing(beta)
    offer = replace(offered(), known={"prior": PRIOR})
    seen = replace(measured([1.0, 2.0, 3.0, 4.0]), known={"prior": PRIOR})
    scores = selector.score(0, offer, seen)
    q = critic.values(seen)
    expected = PRIOR * (q.double() / beta).exp()
    expected /= expected.sum()
    torch.testing.assert_close(scores.double().softmax(0), expected, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(critic.policy(q, seen).double(), expected, rtol=1e-4, atol=1e-7)
    assert scores.isfinite().all()


def test_windows_that_the_prior_rules_out_share_the_weight_where_there_are_no_others():
    offer = replace(offered(), known={"prior": torch.full((4,), 1e-100, dtype=torch.float64)})
    selector, _ = weighing(1e9)
    weights = selector.score(0, offer, measured([1.0, 2.0, 3.0, 4.0])).softmax(0)
    assert weights.tolist() == pytest.approx([0.25] * 4, rel=1e-5)


def test_the_even_share_of_weights_with_a_prior_is_what_was_asked_for():
    """Once a step has shown how large the weights are. The window whose prior is nearly 0 has the even share
    alone, a quarter of 0.2."""
    selector, critic = weighing(0.3, uniform_share=0.2)
    offer = replace(offered(), known={"prior": PRIOR})
    seen = replace(measured([1.0, 2.0, 3.0, 4.0]), known={"prior": PRIOR})
    selector.observe(finished_step(seen, offer=offer, q=critic.values(seen)))
    weights = selector.score(1, offer, seen).double().softmax(0)
    assert weights[1].item() == pytest.approx(0.05, rel=1e-4)
    rest = PRIOR * (critic.values(seen).double() / 0.3).exp()
    torch.testing.assert_close(weights, 0.05 + 0.8 * rest / rest.sum(), rtol=1e-4, atol=1e-6)


def test_q_bootstraps_on_the_value_under_the_prior():
    """V = β log Σ π₀ exp(Q̄/β) with π₀ normalised over the candidates."""
    _, critic = weighing(0.5)
    seen = replace(measured([1.0, 2.0, 3.0, 4.0]), known={"prior": PRIOR})
    row, _ = critic.learn(None, seen)
    q = critic.target(seen.hidden).detach().double()
    expected = 0.5 * torch.log((PRIOR / PRIOR.sum()) @ (q / 0.5).exp())
    assert row["critic/soft_value"] == pytest.approx(expected.item(), rel=1e-5)


def test_scores_by_loss_and_entropy_have_their_odds_at_the_temperature():
    """Two windows that differ by one temperature differ in weight by a factor e."""
    seen = measured([1.0, 1.5], entropy=[2.0, 2.5])
    for selector, expected in (
        (ByLoss(0.5, sign=1), math.e),
        (ByLoss(0.5, sign=-1), 1 / math.e),
        (Uncertainty(0.5), math.e),
    ):
        weights = selector.score(0, offered(n=2), seen).softmax(0)
        assert (weights[1] / weights[0]).item() == pytest.approx(expected, rel=1e-5)


def test_excess_loss_cancels_noise_and_prefers_what_the_reference_has_learnt():
    """Window 0 is noise (both models fail), 1 is learnt (both succeed), 2 is worth learning."""
    reference = torch.tensor([7.0, 1.0, 2.0])
    scores = ExcessLoss(lambda windows: reference, 0.5).score(0, offered(n=3), measured([7.0, 1.0, 5.0]))
    assert scores.tolist() == [0, 0, 6]


def test_uncertainty_declares_that_it_needs_entropy():
    assert Uncertainty(1.0).needs_entropy
    with pytest.raises(AssertionError, match="entropy"):
        Uncertainty(1.0).score(0, offered(n=1), measured([1.0]))


def test_random_k_draws_every_window_equally_often():
    selector = RandomK(3, torch.Generator().manual_seed(0))
    drawn = torch.cat([selector.admit(0, offered(n=8)).rows for _ in range(1500)])
    counts = torch.bincount(drawn, minlength=8)
    assert counts.sum() == 3 * 1500
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_warm_up_is_uniform_and_then_hands_over():
    inner = ByLoss(0.5, sign=1)
    selector = UniformUntil(inner, 2)
    seen = measured([1.0, 3.0])
    assert selector.score(1, offered(n=2), seen).tolist() == [0, 0]
    assert selector.score(2, offered(n=2), seen).tolist() == inner.score(2, offered(n=2), seen).tolist()
    narrowing = UniformUntil(RandomK(1, torch.Generator().manual_seed(0)), 2)
    assert [len(narrowing.admit(step, offered(n=5))) for step in range(4)] == [5, 5, 1, 1]
    assert UniformUntil(Uncertainty(1.0), 2).needs_entropy
    assert not UniformUntil(Uniform(), 2).needs_reward


# Competence


def test_root_competence_grows_in_the_square_from_initial_to_one():
    assert root_competence(0, 100, 0.1) == pytest.approx(0.1)
    assert root_competence(100, 100, 0.1) == pytest.approx(1.0)
    assert root_competence(500, 100, 0.1) == 1.0
    squares = np.array([root_competence(step, 100, 0.1) ** 2 for step in range(101)])
    np.testing.assert_allclose(np.diff(squares), (1 - 0.01) / 100)


@pytest.mark.parametrize("step", [0, 10, 50, 99, 100])
def test_competence_opens_the_easiest_share_of_the_windows(step):
    """Without ties this is the paper's rule CDF ≤ c: ⌈c·n⌉ windows up to rounding, the easiest ones."""
    difficulty = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    selector = Competence(LabelDifficulty(), total_steps=100, initial=0.1)
    kept = selector.admit(step, offered(n=200, difficulty=difficulty))
    level = root_competence(step, 100, 0.1)
    assert sorted(kept.windows.difficulty.tolist()) == list(range(math.ceil(200 * level - 1e-9)))
    done = finished_step(measured([0.0] * len(kept)), offer=kept, index=step)
    assert selector.observe(done) == {"competence/level": level}


def test_competence_ranks_against_the_past_and_keeps_at_least_one():
    selector = Competence(LabelDifficulty(), total_steps=100, initial=0.2, history=8)
    selector.admit(0, offered(n=8, difficulty=[0.0] * 8))
    hard = offered(n=2, difficulty=[9.0, 8.0])
    assert selector.admit(0, hard).rows.tolist() == [1]
    for _ in range(10):  # the memory rolls: what is hard becomes ordinary
        selector.admit(0, offered(n=8, difficulty=[9.0] * 8))
    assert selector.admit(0, hard).rows.tolist() == [0, 1]


def test_competence_starts_with_the_easiest_class_of_a_coarse_label():
    selector = Competence(LabelDifficulty(), total_steps=100, initial=0.1)
    classes = offered(n=6, difficulty=[1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    assert selector.admit(0, classes).rows.tolist() == [0, 3]
    assert len(selector.admit(100, classes)) == 6


def test_windows_without_a_label_come_last():
    selector = Competence(LabelDifficulty(), total_steps=100, initial=0.5)
    mixed = offered(n=4, difficulty=[math.nan, 5.0, 1.0, math.nan])
    assert selector.admit(0, mixed).rows.tolist() == [1, 2]
    assert len(selector.admit(100, mixed)) == 4
    unlabelled = offered(n=2, difficulty=[math.nan, math.nan])
    assert len(Competence(LabelDifficulty(), 100, 0.1).admit(0, unlabelled)) == 2


def test_label_difficulty_without_labels_names_the_way_out():
    with pytest.raises(CurriqError, match="difficulty_field"):
        LabelDifficulty()(windows())


def test_rarity_is_the_mean_surprise_under_add_one_counts():
    """V = 4. After the first call the counts are 0:3, 1:1, so p = (4, 2, 1, 1)/8."""
    rarity = RarityDifficulty(4)
    first = rarity(windows([[0, 0], [0, 1]]))
    assert first.tolist() == pytest.approx([math.log(2), (math.log(2) + math.log(4)) / 2])
    second = rarity(windows([[2, 3]]))  # counts 0:3, 1:1, 2:1, 3:1, so p = (4, 2, 2, 2)/10
    assert second.tolist() == pytest.approx([math.log(5)])


def test_length_counts_characters_and_calls_short_text_hard():
    pieces = ["the", "x", "ing "]
    table = token_characters(lambda ids: "".join(pieces[i] for i in ids), 3)
    assert LengthDifficulty(table)(windows([[0, 2], [1, 1]])).tolist() == [-7, -2]


def test_automatic_difficulty_takes_the_label_where_there_is_one():
    automatic = LabelOrRarity(4)
    assert automatic(windows([[0], [1]], difficulty=[5.0, 6.0])).tolist() == [5, 6]
    assert automatic(windows([[0], [1]])).tolist() == RarityDifficulty(4)(windows([[0], [1]])).tolist()


# Bandit


def make_bandit(seed: int = 0, exploration: float = 0.1) -> SourceBandit:
    return SourceBandit(("a", "b", "c"), exploration, 0.05, Generators(seed)("bandit"))


def finished(kept: Offer, reward: float) -> Step:
    return finished_step(measured([1.0] * len(kept)), offer=kept, reward=reward)


@pytest.mark.parametrize("best", [0, 2])
def test_exp3_finds_the_best_arm_of_a_stationary_bandit(best):
    """Each step improves the reward by noise, and by one more standard deviation with the best source."""
    selector = make_bandit(seed=best)
    noise = np.random.default_rng(best)
    offer, reward, metrics = offered(n=6, source=[0, 1, 2, 0, 1, 2]), -5.0, {}
    for step in range(1500):
        kept = selector.admit(step, offer)
        reward += 0.01 * (noise.normal() + (kept.windows.source[0].item() == best))
        metrics = selector.observe(finished(kept, reward))
    policy = [metrics[f"bandit/p_{name}"] for name in "abc"]
    assert sum(policy) == pytest.approx(1)
    assert policy[best] > 0.8
    assert min(policy) >= 0.1 / 3 - 1e-12  # exploration


def test_bandit_trains_on_one_present_source_per_step():
    selector = make_bandit()
    for step in range(30):
        kept = selector.admit(step, offered(n=5, source=[1, 2, 2, 1, 2]))
        assert kept.rows.tolist() in ([0, 3], [1, 2, 4])


def test_bandit_without_a_past_is_uniform_over_the_present_sources():
    selector = make_bandit(exploration=0.0)
    assert selector.policy(torch.tensor([True, False, True])).tolist() == [0.5, 0, 0.5]


def test_bandit_learns_nothing_from_the_first_reward():
    selector = make_bandit()
    metrics = selector.observe(finished(selector.admit(0, offered(source=[0, 1, 2, 0])), -3.0))
    assert metrics == {f"bandit/p_{name}": pytest.approx(1 / 3) for name in "abc"}


def test_bandit_gives_no_probability_to_a_source_that_is_never_offered():
    """A target with weight 0 is a source of the run, but no arm."""
    selector = make_bandit()
    metrics = selector.observe(finished(selector.admit(0, offered(source=[0, 2, 2, 0])), -3.0))
    assert metrics == {"bandit/p_a": 0.5, "bandit/p_b": 0.0, "bandit/p_c": 0.5}


def test_bandit_gain_is_the_improvement_between_its_quantiles():
    """Improvements 1, 2, 3, 4, 5 have quantiles 1.8 and 4.2, so 5 is clipped to +1; then 3 maps to 0.

    With the sixth improvement, 3, the quantiles of (1, 2, 3, 3, 4, 5) are 2 and 4.
    """
    selector, gains, reward = make_bandit(), [], 0.0
    for step, improvement in enumerate([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 3.0]):
        reward += improvement
        kept = selector.admit(step, offered(source=[0, 1, 2, 0]))
        gains.append(selector.observe(finished(kept, reward)).get("bandit/gain"))
    assert gains[0] is None
    assert gains[1] == 0.0  # one improvement has no spread
    assert gains[5] == 1.0
    assert gains[6] == pytest.approx(0.0)


def test_bandit_importance_weight_by_hand():
    """p = 1/3 at the start; a gain of +1 adds 0.05·1/(1/3) = 0.15 to the drawn source's log-weight."""
    selector = make_bandit(exploration=0.0)
    offer = offered(n=3, source=[0, 1, 2])
    for step, reward in enumerate([0.0, 0.0]):  # improvement 0: no spread, no gain
        selector.observe(finished(selector.admit(step, offer), reward))
    kept = selector.admit(2, offer)
    metrics = selector.observe(finished(kept, 1.0))  # above the 80 % quantile: gain +1
    drawn = "abc"[kept.windows.source[0]]
    assert metrics["bandit/gain"] == 1.0
    expected = math.exp(0.15) / (math.exp(0.15) + 2)
    assert metrics[f"bandit/p_{drawn}"] == pytest.approx(expected)
