"""Measured effects against brute force: train on one window alone, and see what it does to held-out text."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.helpers import in_pieces, random_offer, tiny_lm

from curriq.config import OptimConfig
from curriq.lm.held_out import EffectProbe, HeldOutReward, held_out_loss, probed_rows
from curriq.lm.learner import Learner
from curriq.lm.mixture import single_pass
from curriq.types import NO_COST, Cost, Effects, Features, Mixture, Offer

N, T, M = 8, 8, 5
SIZES = {"micro_batch": 4, "chunk_tokens": 64}


def uniform(part: Offer, features: Features) -> torch.Tensor:
    return torch.zeros_like(features.loss)


class Setting:
    """A small model in float64 that has been trained for a few steps, its held-out text and an offer."""

    def __init__(
        self,
        *,
        precision: str = "float64",
        shuffle: bool = False,
        probed: int = 99,
        steps: int = 5,
        device: str = "cpu",
    ) -> None:
        self.lm = tiny_lm("llama", device=device, precision="bf16" if precision == "bf16" else "fp32")
        if precision == "float64":
            self.lm.network.double()
        config = OptimConfig(lm_lr=1e-3, lr_schedule="constant", lr_warmup_steps=0, grad_clip=1e9, **MICRO)
        self.learner = Learner(self.lm, config, 100)
        for k in range(steps):
            self.learner.accumulate(random_offer(N, T, seed=50 + k), uniform, False)
            self.learner.update(k)
        self.held_out = random_offer(M, T, seed=7).windows
        self.offer = random_offer(N, T, seed=3)
        generator = torch.Generator().manual_seed(0)
        self.reward = HeldOutReward(self.lm, self.held_out, M, generator, paired=True)
        self.probe = EffectProbe(
            self.learner,
            self.reward,
            windows=probed,
            decay=0.0,
            generator=torch.Generator().manual_seed(1),
            shuffle=shuffle,
        )

    def mixture(self) -> Mixture:
        return self.learner.accumulate(self.offer, uniform, False)


MICRO = {"micro_batch": 4, "head_chunk_tokens": 64}


def effects_of(probe: EffectProbe, step: int, offer: Offer, mixture: Mixture) -> Effects | None:
    """The effects of a step at θ_k."""
    probe.begin(step, offer)
    return probe.before(step, offer, mixture)


def brute_force(setting: Setting, size: float) -> list[float]:
    """Gain in held-out log-probability per unit of `size`, of a preconditioned step on each window alone."""
    lm = setting.lm
    start = [p.detach().clone() for p in lm.parameters]
    before = held_out_loss(in_pieces(lm, **SIZES), setting.held_out)
    frozen = copy.deepcopy(setting.learner.optimizer.state_dict()["state"])
    beta2 = setting.learner.config.adam_beta2
    gains = []
    for i in range(N):
        single_pass(in_pieces(lm, **SIZES), setting.offer.take(slice(i, i + 1)), uniform)
        with torch.no_grad():
            for index, p in enumerate(lm.parameters):
                state = frozen[index]
                corrected = state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))
                p -= size * p.grad / (corrected.sqrt() + 1e-8)
        gains.append((before - held_out_loss(in_pieces(lm, **SIZES), setting.held_out)) / size)
        with torch.no_grad():
            for p, value in zip(lm.parameters, start, strict=True):
                p.copy_(value)
    return gains


def test_effects_are_what_training_on_a_window_alone_does() -> None:
    """In the limit of small steps; exact but for the held-out gradient's own share of the second moment."""
    setting = Setting(steps=100)  # long enough for one gradient to be a small share of the second moment
    effects = effects_of(setting.probe, 0, setting.offer, setting.mixture())
    measured = effects.effect / setting.learner.rate(0)
    expected = torch.tensor(brute_force(setting, 1e-7), dtype=torch.float64)
    assert effects.rows.tolist() == list(range(N))
    assert torch.corrcoef(torch.stack([measured, expected]))[0, 1] > 0.995
    assert (measured - expected).norm() < 0.1 * expected.norm()
    assert expected.std() > 0.1 * expected.abs().mean()  # the windows differ, or the test would say nothing


def test_the_mixture_is_the_weighted_mean_of_the_windows_effects() -> None:
    setting = Setting()
    mixture = setting.learner.accumulate(setting.offer, lambda part, f: f.loss * 2, False)
    effects = effects_of(setting.probe, 0, setting.offer, mixture)
    assert effects.mixture == pytest.approx((mixture.weights * effects.effect).sum().item())


def test_float32_agrees_with_float64() -> None:
    """Rounding stays far below the effects, at the step size that the probe takes."""
    exact, rounded = Setting(), Setting(precision="float32")
    ours = effects_of(rounded.probe, 0, rounded.offer, rounded.mixture()).effect.double()
    theirs = effects_of(exact.probe, 0, exact.offer, exact.mixture()).effect
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_bfloat16_keeps_the_order_of_the_windows() -> None:
    """The effects are differences of losses of training, whose products are rounded to eight bits."""
    exact, rounded = Setting(steps=50), Setting(precision="bf16", steps=50)
    ours = effects_of(rounded.probe, 0, rounded.offer, rounded.mixture()).effect.double()
    theirs = effects_of(exact.probe, 0, exact.offer, exact.mixture()).effect
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.9


def test_a_probe_leaves_the_model_and_its_gradient_alone() -> None:
    setting = Setting(precision="float32")
    mixture = setting.mixture()
    theta = [p.detach().clone() for p in setting.lm.parameters]
    gradient = [p.grad.clone() for p in setting.lm.parameters]
    effects_of(setting.probe, 0, setting.offer, mixture)
    for p, value, grad in zip(setting.lm.parameters, theta, gradient, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, grad)


def test_the_paired_reward_uses_the_loss_that_the_gradient_has_measured() -> None:
    setting = Setting()
    before = held_out_loss(in_pieces(setting.lm, **SIZES), setting.held_out)
    effects_of(setting.probe, 0, setting.offer, setting.mixture())
    setting.learner.update(0)
    reward, cost = setting.probe.after(0)
    assert reward == pytest.approx(
        before - held_out_loss(in_pieces(setting.lm, **SIZES), setting.held_out), abs=1e-12
    )
    # Gradient: forward and backward of M; effects: a forward of N; reward: a forward of M.
    assert cost == Cost(forwards=3 * M + N + M)


def test_a_part_of_the_windows_is_drawn_and_has_the_same_effects() -> None:
    whole, part = Setting(), Setting(probed=3)
    all_effects = effects_of(whole.probe, 0, whole.offer, whole.mixture())
    some = effects_of(part.probe, 0, part.offer, part.mixture())
    assert len(set(some.rows.tolist())) == 3
    torch.testing.assert_close(some.effect, all_effects.effect[some.rows])


def test_shuffled_effects_are_the_same_numbers_at_other_windows() -> None:
    plain, shuffled = Setting(), Setting(shuffle=True)
    ours = effects_of(shuffled.probe, 0, shuffled.offer, shuffled.mixture()).effect
    theirs = effects_of(plain.probe, 0, plain.offer, plain.mixture()).effect
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours.sort().values, theirs.sort().values)


def test_the_average_of_gradients_is_bias_corrected_and_resumes() -> None:
    """Equal gradients average to themselves, from the first probe on."""
    setting = Setting()
    setting.probe._average._decay = 0.9
    mixture = setting.mixture()
    first = effects_of(setting.probe, 0, setting.offer, mixture).effect
    state = setting.probe.state_dict()
    second = effects_of(setting.probe, 1, setting.offer, mixture).effect
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-12)
    setting.probe.load_state_dict(state)
    assert torch.equal(effects_of(setting.probe, 1, setting.offer, mixture).effect, second)


def test_nothing_is_probed_between_rewards_or_before_the_first_update() -> None:
    setting = Setting()
    setting.reward.every = 2
    assert effects_of(setting.probe, 1, setting.offer, setting.mixture()) is None
    assert setting.probe.after(1) == (None, NO_COST)
    setting.learner.optimizer.state.clear()
    assert effects_of(setting.probe, 2, setting.offer, setting.mixture()) is None
    assert setting.probe.after(2)[0] is not None


def test_paired_rewards_scatter_far_less_than_absolute_ones() -> None:
    """Which windows were drawn moves the level, and hardly the gain, of one and the same small update."""
    lm = tiny_lm()
    held_out = random_offer(60, T, seed=7).windows
    held_out.tokens[::2] = 5  # half of the windows repeat one token, so losses differ between windows
    optimizer = torch.optim.SGD(lm.parameters, lr=0.01)
    rewards: dict[bool, list[float]] = {False: [], True: []}
    for paired, found in rewards.items():
        reward = HeldOutReward(lm, held_out, 6, torch.Generator().manual_seed(0), paired=paired)
        offer = random_offer(4, T)
        for step in range(20):
            theta = [p.detach().clone() for p in lm.parameters]
            mixture = single_pass(in_pieces(lm, **SIZES), offer, uniform)
            reward.begin(step, offer)
            reward.before(step, offer, mixture)
            optimizer.step()
            found.append(reward.after(step)[0])
            with torch.no_grad():
                for p, value in zip(lm.parameters, theta, strict=True):
                    p.copy_(value)
    spread = {paired: torch.tensor(found).std().item() for paired, found in rewards.items()}
    assert spread[True] < 0.1 * spread[False]


def test_window_losses_are_those_of_training() -> None:
    setting = Setting()
    mixture = setting.mixture()
    losses = in_pieces(setting.lm, **SIZES).window_losses(setting.offer.windows)
    torch.testing.assert_close(losses, mixture.features.loss)


# Behind a filter


def filtered(setting: Setting, trained: int) -> Offer:
    """The first windows of the offer as accepted ones, the others as rejected, with what is known of all."""
    offer = replace(setting.offer, known={"static_score": torch.linspace(-1, 1, N)})
    return replace(offer.take(slice(trained)), rejected=offer.take(slice(trained, None)))


def test_effects_of_rejected_windows_are_those_that_they_have_as_trained_ones() -> None:
    """In float64, up to the rounding of a difference of losses."""
    whole, setting = Setting(), Setting()
    expected = effects_of(whole.probe, 0, whole.offer, whole.mixture())
    offer = filtered(setting, 6)
    setting.offer = offer
    found = effects_of(setting.probe, 0, offer, setting.mixture())
    assert found.rows.tolist() == list(range(N))
    torch.testing.assert_close(found.effect, expected.effect, rtol=1e-6, atol=1e-12)
    assert torch.equal(found.features.known["static_score"], torch.linspace(-1, 1, N))
    assert torch.equal(
        found.features.source, torch.cat([offer.windows.source, offer.rejected.windows.source])
    )


def test_the_mixture_is_that_of_the_trained_windows_alone() -> None:
    setting = Setting()
    setting.offer = offer = filtered(setting, 5)
    found = effects_of(setting.probe, 0, offer, setting.mixture())
    assert found.mixture == pytest.approx(found.effect[:5].mean().item())


def test_a_rejected_window_has_no_part_in_the_gradient_and_costs_two_passes() -> None:
    with_them, without = Setting(), Setting()
    with_them.offer = filtered(with_them, 5)
    without.offer = without.offer.take(slice(5))
    costs = []
    for setting in (with_them, without):
        mixture = setting.mixture()
        effects_of(setting.probe, 0, setting.offer, mixture)
        setting.learner.update(0)
        costs.append(setting.probe.after(0)[1])
    for ours, theirs in zip(with_them.lm.parameters, without.lm.parameters, strict=True):
        assert torch.equal(ours, theirs)
    # Gradient: 3 M. Effects: a second pass of the five, two of the rejected. Reward: M.
    assert costs == [Cost(forwards=3 * M + 5 + 2 * (N - 5) + M), Cost(forwards=3 * M + 5 + M)]


def test_a_third_of_the_probed_windows_are_rejected_ones() -> None:
    """As many as there are; each draw is another one, in ascending order."""
    generator = torch.Generator().manual_seed(0)
    seen: set[int] = set()
    for _ in range(150):
        ours, theirs = probed_rows(20, 30, 9, generator)
        assert len(ours) == 6
        assert len(theirs) == 3
        for rows in (ours, theirs):
            assert torch.equal(rows, rows.unique())
        assert ours.max() < 20
        seen |= set(theirs.tolist())
    assert seen == set(range(30))
    for trained, rejected, expected in ((20, 0, (9, 0)), (20, 2, (7, 2)), (4, 30, (4, 3)), (8, 1, (8, 1))):
        assert tuple(map(len, probed_rows(trained, rejected, 9, generator))) == expected


def test_drawn_rejected_windows_have_their_own_effects_and_features() -> None:
    whole, part = Setting(), Setting(probed=5)
    everything = filtered(whole, 5)
    all_effects = effects_of(whole.probe, 0, whole.offer, whole.mixture())
    part.offer = everything
    some = effects_of(part.probe, 0, everything, part.mixture())
    assert (some.rows < 5).sum() == 3
    assert (some.rows >= 5).sum() == 2
    torch.testing.assert_close(some.effect, all_effects.effect[some.rows], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(some.features.known["static_score"], torch.linspace(-1, 1, N)[some.rows])
