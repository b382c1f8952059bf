"""Counterfactual credit by hand, what Q sees of a window, Q's scale, jitter, and training on a subset."""

import math

import pytest
import torch
from tests.helpers import effects_of, finished_step, in_pieces, random_offer, tiny_lm

from curriq.config import CriticConfig, OptimConfig
from curriq.errors import CurriqError
from curriq.lm.learner import Learner
from curriq.lm.mixture import gumbel_top, one_action, score_pass, two_pass, weighted_gradient
from curriq.presets import preset
from curriq.rng import Generators
from curriq.select.base import Uniform
from curriq.select.soft_q import DirichletNoise, SoftQ
from curriq.softq.critic import (
    LOSS_SCALE,
    SOURCE_SCALE,
    STATE_SCALE,
    QInputs,
    Scale,
    TDCritic,
    counterfactual_credit,
)
from curriq.softq.equations import effective_batch_size
from curriq.softq.temperature import FixedBeta
from curriq.types import NO_COST, Effects, Features, Step

SIZES = {"micro_batch": 4, "chunk_tokens": 32}


def seen(n: int = 6, width: int = 4, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        hidden=torch.randn(n, width, generator=generator),
        pooled=torch.randn(n, width, generator=generator),
        loss=3 + torch.rand(n, generator=generator),
        source=torch.arange(n) % 3,
    )


def finished(features: Features, effects: Effects | None, reward: float = 0.01) -> Step:
    return finished_step(features, reward=reward, effects=effects)


# Counterfactual credit


def test_every_probed_window_gets_the_target_plus_its_own_effect_minus_the_mixtures():
    rows, features = torch.tensor([1, 4]), seen()
    effects = effects_of(rows, torch.tensor([0.5, -0.25]), 0.125, features.take(rows))
    task = counterfactual_credit(finished(features, effects))
    assert torch.equal(task.features.hidden, features.hidden[rows])
    assert task.combine is None
    assert task.offsets.tolist() == [0.375, -0.375]
    assert counterfactual_credit(finished(seen(), None)) is None


def q_critic(sources: int = 1, **settings) -> TDCritic:
    config = CriticConfig(credit="counterfactual", gamma=0.5, q_lr=5e-3, **settings)
    inputs = QInputs(config.q_features, 4, sources, layer_norm=config.q_layer_norm)
    return TDCritic(config, inputs, FixedBeta(1.0), "cpu", Generators(0))


def test_a_step_without_effects_teaches_nothing():
    made = q_critic()
    before = [p.clone() for p in made.online.parameters()]
    row, cost = made.learn(finished(seen(), None), seen(seed=1))
    assert "critic/td_loss" not in row
    assert cost == NO_COST
    assert all(torch.equal(a, b) for a, b in zip(before, made.online.parameters(), strict=True))


def test_the_loss_of_a_probe_is_calculated_by_hand():
    """No reward, γ V = γ · 0 with Q̄ = 0: the targets are the offsets, and Q starts at 0."""
    made = q_critic(q_standardise=True)
    made.scale._fixed = True  # in nats
    rows = torch.tensor([0, 3])
    effects = effects_of(rows, torch.tensor([0.4, -0.2]), features=seen().take(rows))
    row, _ = made.learn(finished(seen(), effects, reward=0.0), seen(seed=1))
    assert row["critic/td_loss"] == pytest.approx((0.4**2 + 0.2**2) / 4)
    assert row["critic/td_target"] == pytest.approx(0.1)


def test_without_the_bellman_target_the_offsets_are_all_there_is():
    """The reward and V, large here, move the target with it and leave it alone without."""
    rows = torch.tensor([0, 3])
    previous = finished(
        seen(), effects_of(rows, torch.tensor([0.4, -0.2]), features=seen().take(rows)), reward=-50.0
    )
    targets = [
        q_critic(bellman=on).learn(previous, seen(seed=1))[0]["critic/td_target"] for on in (False, True)
    ]
    assert targets[0] == pytest.approx(0.1)
    assert targets[1] == pytest.approx(0.1 + 0.5 * -50.0, abs=1.0)


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_q_learns_the_ranking_of_effects_at_any_scale(scale):
    """Effects are a linear function of the window's state plus noise; Q must rank fresh windows by it."""
    made = q_critic(q_standardise=True, q_replay_size=512, q_replay_batch=64, q_replay_updates=4)
    direction = torch.tensor([1.0, -0.5, 0.0, 0.25])
    previous = None
    for step in range(60):
        features = seen(16, seed=step)
        made.learn(previous, features)
        noise = torch.randn(16, generator=torch.Generator().manual_seed(1000 + step))
        effect = scale * (features.hidden @ direction + noise)
        effects = effects_of(torch.arange(16), effect, effect.mean().item(), features)
        previous = finished(features, effects, reward=scale)
    fresh = seen(400, seed=9999)
    truth = fresh.hidden @ direction
    assert torch.corrcoef(torch.stack([made.values(fresh), truth]))[0, 1] > 0.9
    assert made.values(fresh).std().item() == pytest.approx(scale * truth.std().item(), rel=0.4)


def test_credit_and_its_combinations_are_refused_where_they_have_no_meaning():
    with pytest.raises(CurriqError, match="--credit counterfactual"):
        CriticConfig(temperature="gated")
    with pytest.raises(CurriqError, match="--shuffle-effects"):
        CriticConfig(shuffle_effects=True)
    for credit in ("sampled", "mixture"):
        with pytest.raises(CurriqError, match="--no-bellman"):
            CriticConfig(bellman=False, credit=credit)
    with pytest.raises(CurriqError, match="--td-into-theta"):
        CriticConfig(credit="counterfactual", td_into_theta=True)
    with pytest.raises(CurriqError, match="--q-features"):
        CriticConfig(q_features=("loss", "loss"))
    with pytest.raises(CurriqError, match="--reward-every 2"):
        preset("smoke").override(selector="bandit", reward_every=2)
    with pytest.raises(CurriqError, match="--train-subset-size"):
        preset("smoke").override(train_subset_size=9)
    with pytest.raises(CurriqError, match=r"--train-subset-size 1 with --credit sampled.*--train-on action"):
        preset("smoke").override(train_subset_size=1)
    with pytest.raises(CurriqError, match="--train-on action with --selector uniform"):
        preset("smoke").override(train_on="action", selector="uniform")
    with pytest.raises(CurriqError, match="--train-on action with --train-subset-size 2"):
        preset("smoke").override(train_on="action", train_subset_size=2, credit="mixture")
    with pytest.raises(CurriqError, match="--train-on action with --max-read-ratio 8"):
        preset("recommended").override(train_on="action")
    with pytest.raises(CurriqError, match="--reforward-action with --credit mixture"):
        CriticConfig(reforward_action=True, credit="mixture")
    with pytest.raises(CurriqError, match="a string that is searched has no source"):
        preset("smoke").override(proposer="langevin", q_features=("last", "source"))


# What Q sees


def test_inputs_are_the_named_features_in_their_order():
    features = seen()
    inputs = QInputs(("mean", "last"), 4)
    assert inputs.width == 8
    assert torch.equal(inputs(features), torch.cat([features.pooled, features.hidden], 1))


def test_a_normalised_state_does_not_depend_on_its_scale():
    features = seen()
    larger = Features(hidden=7 * features.hidden + 3, loss=features.loss)
    inputs = QInputs(("last",), 4, layer_norm=True)
    torch.testing.assert_close(inputs(features), inputs(larger), rtol=1e-3, atol=1e-4)
    assert inputs(features).std(1, correction=0).tolist() == pytest.approx([STATE_SCALE] * 6, rel=1e-3)


def test_the_source_is_one_hot():
    row = QInputs(("source",), 4, sources=3)(seen())[4]
    assert row.tolist() == [0.0, SOURCE_SCALE, 0.0]


def test_the_loss_is_measured_from_its_running_mean_in_running_deviations():
    features, inputs = seen(), QInputs(("loss",), 4)
    assert inputs(features).abs().max() == 0  # nothing is known before the first step
    inputs.observe(features)
    expected = LOSS_SCALE * (features.loss - features.loss.mean()) / features.loss.std(correction=0)
    torch.testing.assert_close(inputs(features)[:, 0], expected)
    other = QInputs(("loss",), 4)
    other.load_state_dict(inputs.state_dict())
    assert torch.equal(other(features), inputs(features))


def test_the_scale_follows_rewards_and_spread():
    scale = Scale(fixed=False, memory=0.5)
    scale.observe(2.0, torch.tensor([1.0, 3.0]))  # spread 1 around their mean
    assert (scale.loc, scale.scale) == (2.0, 1.0)
    scale.observe(4.0, torch.tensor([0.0, 6.0]))  # spread 3: √((1 + 9)/2)
    assert (scale.loc, scale.scale) == (3.0, pytest.approx(math.sqrt(5)))
    fixed = Scale(fixed=True)
    fixed.observe(2.0, torch.tensor([5.0]))
    assert (fixed.loc, fixed.scale) == (0.0, 1.0)


# Weights


def test_jitter_of_a_uniform_policy_is_a_dirichlet_draw():
    """Symmetric Dirichlet of concentration c over N: mean 1/N, variance (1 − 1/N)/(N (N c + 1))."""
    selector = DirichletNoise(Uniform(), 2.0, Generators(0)("jitter"))
    offer, features = random_offer(8), seen(8)
    weights = []
    for step in range(4000):
        kept = selector.admit(step, offer)
        weights.append(selector.score(step, kept, features).softmax(0))
    drawn = torch.stack(weights)
    assert drawn.mean(0).tolist() == pytest.approx([1 / 8] * 8, rel=0.05)
    assert drawn.var().item() == pytest.approx((7 / 8) / (8 * 17), rel=0.1)


def test_the_uniform_share_keeps_every_window_alive():
    """One window has all of q; the others share ε of the weight, up to the change of q between steps."""

    critic = q_critic()
    critic.values = lambda features: torch.tensor([50.0] + [0.0] * 5)
    selector = SoftQ(critic, FixedBeta(1.0), uniform_share=0.3)
    selector.observe(finished_step(seen(), q=torch.tensor([50.0] + [0.0] * 5)))
    weights = selector.score(1, random_offer(6), seen()).softmax(0)
    assert weights[1:].tolist() == pytest.approx([0.3 / 6] * 5, rel=1e-4)


# Training on a subset


def test_gumbel_top_draws_without_replacement_in_the_right_proportions():
    """Two of three: P({i, j}) = π_i π_j/(1 − π_i) + π_j π_i/(1 − π_j)."""
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    draw = gumbel_top(2, torch.Generator().manual_seed(0))
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        chosen = tuple(draw(policy.log()).tolist())
        counts[chosen] = counts.get(chosen, 0) + 1
    for i, j in ((0, 1), (0, 2), (1, 2)):
        p, q = policy[i].item(), policy[j].item()
        assert counts[i, j] / 6000 == pytest.approx(p * q / (1 - p) + p * q / (1 - q), abs=0.02)


def test_a_subset_step_takes_the_mean_gradient_of_the_chosen_windows():
    lm, offer = tiny_lm(), random_offer(8)
    chosen = torch.tensor([1, 2, 6])
    learner = Learner(lm, OptimConfig(micro_batch=3, grad_clip=1e9), 1, draw=lambda scores: chosen)
    mixture = learner.accumulate(offer, lambda c, f: f.loss, False)
    before = [p.detach().clone() for p in lm.parameters]
    learner.update(0)
    ours, after = [p.grad.clone() for p in lm.parameters], [p.detach().clone() for p in lm.parameters]
    with torch.no_grad():
        for p, old in zip(lm.parameters, before, strict=True):
            p.copy_(old)
    expected = two_pass(in_pieces(lm, **SIZES), offer.take(chosen), lambda c, f: torch.zeros_like(f.loss))
    for gradient, p in zip(ours, lm.parameters, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-7)
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert mixture.loss == pytest.approx(expected.loss, rel=1e-6)
    assert mixture.weights[chosen].tolist() == pytest.approx([1 / 3] * 3)
    assert effective_batch_size(mixture.weights).item() == pytest.approx(3)
    assert len(mixture.features) == 8  # all were scored
    assert learner.passes == 2


def test_the_one_action_is_drawn_from_the_policy():
    policy = torch.tensor([0.5, 0.3, 0.2])
    draw = one_action(torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.cat([draw(policy.log() + 7.0) for _ in range(6000)]), minlength=3)
    assert (counts / 6000).tolist() == pytest.approx(policy.tolist(), abs=0.02)


def test_weighted_gradient_adds_to_what_is_there_and_skips_weight_zero():
    lm, offer = tiny_lm(), random_offer(4)
    weights = torch.tensor([0.5, 0.0, 0.5, 0.0])
    for p in lm.parameters:
        p.grad = None
    loss = weighted_gradient(in_pieces(lm, **SIZES), offer.windows, weights)
    first = [p.grad.clone() for p in lm.parameters]
    weighted_gradient(in_pieces(lm, **SIZES), offer.windows, weights)
    for gradient, p in zip(first, lm.parameters, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)
    scored = score_pass(in_pieces(lm, **SIZES), offer, lambda c, f: f.loss)
    assert loss.item() == pytest.approx((weights @ scored.features.loss).item(), rel=1e-5)
