"""The optimizer around the mixture step: schedule, clipping, failure, snapshots, resume."""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.helpers import finished_step, random_offer, tiny_lm

from curriq.config import OptimConfig
from curriq.lm.learner import Learner, NonFiniteError, ReforwardedAction, TDIntoTheta, learning_rate
from curriq.types import Features, Step

N, T = 6, 8


def make(steps: int = 20, *, dropout: float = 0.0, **options) -> Learner:
    defaults = {"lm_lr": 1e-2, "lr_schedule": "constant", "lr_warmup_steps": 0, "micro_batch": 4}
    return Learner(tiny_lm(dropout=dropout), OptimConfig(**(defaults | options)), steps)


def by_loss(part, features):
    return features.loss


def run(learner: Learner, steps: range) -> list[float]:
    losses = []
    for k in steps:
        losses.append(learner.accumulate(random_offer(N, T, seed=k), by_loss, False).loss)
        learner.update(k)
    return losses


def theta(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.lm.parameters])


def moments(learner: Learner) -> list:
    state = learner.optimizer.state_dict()["state"]
    return [(i, name, value.clone()) for i in sorted(state) for name, value in sorted(state[i].items())]


def equal(left: list, right: list) -> bool:
    return len(left) == len(right) and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(left, right, strict=True)
    )


def schedule(kind: str, warmup_steps: int, steps: int) -> Callable[[int], float]:
    config = OptimConfig(lm_lr=8.0, lr_schedule=kind, lr_warmup_steps=warmup_steps)
    return lambda step: learning_rate(config, step, steps)


class TestSchedule:
    """By hand, peak 8."""

    def test_warm_up_is_linear_and_reaches_the_peak_in_the_step_after_it(self) -> None:
        rate = schedule("constant", warmup_steps=3, steps=100)
        assert [rate(k) for k in range(5)] == [2.0, 4.0, 6.0, 8.0, 8.0]
        assert rate(99) == 8.0

    def test_linear(self) -> None:
        rate = schedule("linear", warmup_steps=1, steps=5)
        assert [rate(k) for k in range(6)] == [4.0, 8.0, 6.0, 4.0, 2.0, 0.0]

    def test_cosine(self) -> None:
        rate = schedule("cosine", warmup_steps=2, steps=8)
        third = 8.0 / 3
        expected = [third, 2 * third, 8.0, 4 + 2 * math.sqrt(3), 6.0, 4.0, 2.0, 4 - 2 * math.sqrt(3), 0.0]
        assert [rate(k) for k in range(9)] == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
    def test_without_warm_up_it_begins_at_the_peak(self, kind: str) -> None:
        assert schedule(kind, warmup_steps=0, steps=10)(0) == 8.0

    def test_run_shorter_than_its_warm_up(self) -> None:
        rate = schedule("cosine", warmup_steps=7, steps=3)
        assert [rate(k) for k in range(3)] == [1.0, 2.0, 3.0]


class TestUpdate:
    def test_is_one_step_of_adamw_on_the_clipped_mixture_gradient(self) -> None:
        """Against torch's plain AdamW on a gradient that autograd takes of Σ π_i ℓ_i in one piece."""
        learner = make(weight_decay=0.1, adam_beta2=0.95, grad_clip=0.05)
        lm = tiny_lm()
        options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
        reference = torch.optim.AdamW(lm.parameters, foreach=False, **options)
        for k in range(3):
            offer = random_offer(N, T, seed=k)
            tokens = offer.windows.tokens
            mixture = learner.accumulate(offer, by_loss, False)
            metrics = learner.update(k)
            reference.zero_grad()
            logits = lm.network(input_ids=tokens).logits[:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
            loss = torch.softmax(losses.detach(), 0) @ losses
            loss.backward()
            norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in lm.parameters))
            for p in lm.parameters:
                p.grad *= min(1.0, 0.05 / norm)
            reference.step()
            assert mixture.loss == pytest.approx(loss.item(), rel=1e-5)
            assert metrics.pop("time/train") > 0
            assert metrics == {"train/grad_norm": pytest.approx(norm, rel=1e-4), "train/lr": 1e-2}
            assert norm > 0.05
        reference_theta = torch.cat([p.detach().flatten() for p in lm.parameters])
        # Adam divides by the gradient's own size, so where that is near zero rounding shows.
        torch.testing.assert_close(theta(learner), reference_theta, rtol=0, atol=2e-4)

    def test_clips_the_gradient_to_the_stated_norm(self) -> None:
        learner = make(grad_clip=0.25)
        learner.accumulate(random_offer(N, T), by_loss, False)
        before = [p.grad.clone() for p in learner.lm.parameters]
        norm = learner.update(0)["train/grad_norm"]
        after = [p.grad for p in learner.lm.parameters]
        total = math.sqrt(sum(g.double().square().sum().item() for g in after))
        assert norm > 0.25
        assert total == pytest.approx(0.25, rel=1e-5)
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close(new, old * (0.25 / norm), rtol=1e-4, atol=1e-9)

    def test_leaves_a_small_gradient_alone(self) -> None:
        learner = make(grad_clip=1e6)
        learner.accumulate(random_offer(N, T), by_loss, False)
        before = [p.grad.clone() for p in learner.lm.parameters]
        learner.update(0)
        assert all(torch.equal(p.grad, old) for p, old in zip(learner.lm.parameters, before, strict=True))

    def test_follows_the_schedule(self) -> None:
        learner = make(steps=4, lm_lr=0.08, lr_schedule="linear", lr_warmup_steps=0)
        rates = []
        for k in range(4):
            learner.accumulate(random_offer(N, T), by_loss, False)
            rates.append(learner.update(k)["train/lr"])
        assert rates == pytest.approx([0.08, 0.06, 0.04, 0.02])

    def test_passes(self) -> None:
        assert make().passes == 1
        assert make(dropout=0.1).passes == 2

    @pytest.mark.parametrize(("two_passes", "passes"), [(False, 1), (True, 2)])
    def test_two_passes_can_be_chosen(self, two_passes, passes) -> None:
        chosen = Learner(tiny_lm(), OptimConfig(), 1, two_passes=two_passes)
        calls = []

        def score(part, features):
            calls.append(torch.is_grad_enabled())
            return features.loss

        chosen.accumulate(random_offer(N, T), score, False)
        assert chosen.passes == passes
        assert set(calls) == {passes == 1}  # the second pass of two scores nothing

    def test_training_lowers_the_loss(self) -> None:
        learner = make()
        same = [learner.accumulate(random_offer(N, T), by_loss, False).loss]
        for k in range(10):
            learner.update(k)
            same.append(learner.accumulate(random_offer(N, T), by_loss, False).loss)
        assert same[-1] < same[0] - 0.5


class TestNonFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_gradient(self, bad: float) -> None:
        learner = make()
        run(learner, range(2))
        before, before_moments = theta(learner), moments(learner)
        learner.accumulate(random_offer(N, T), by_loss, False)
        learner.lm.parameters[3].grad[0] = bad
        with pytest.raises(NonFiniteError, match=r"the gradient norm is (nan|inf)"):
            learner.update(2)
        assert torch.equal(theta(learner), before)
        assert equal(moments(learner), before_moments)

    def test_loss(self) -> None:
        learner = make()
        run(learner, range(1))
        learner.lm.network.transformer.ln_f.bias.data[0] = math.nan
        before, before_moments = theta(learner), moments(learner)
        with pytest.raises(ArithmeticError):
            learner.accumulate(random_offer(N, T), lambda part, f: torch.zeros(len(part)), False)
        assert torch.equal(theta(learner).nan_to_num(7.0), before.nan_to_num(7.0))
        assert equal(moments(learner), before_moments)

    def test_training_goes_on_after_it(self) -> None:
        """The broken gradient is gone with the next accumulation."""
        broken, whole = make(), make()
        run(whole, range(3))
        run(broken, range(2))
        broken.accumulate(random_offer(N, T), by_loss, False)
        broken.lm.parameters[0].grad[0] = math.nan
        with pytest.raises(NonFiniteError):
            broken.update(2)
        run(broken, range(2, 3))
        assert torch.equal(theta(broken), theta(whole))


class TestSnapshot:
    @pytest.mark.parametrize("taken_at", [0, 2])  # before the first step there are no moments yet
    def test_restore_is_as_if_the_steps_had_not_been_taken(self, taken_at: int) -> None:
        learner, plain = make(), make()
        run(plain, range(taken_at))
        run(learner, range(taken_at))
        before, before_moments = theta(learner), moments(learner)
        learner.snapshot()
        run(learner, range(10, 13))
        assert not torch.equal(theta(learner), before)
        learner.restore()
        assert torch.equal(theta(learner), before)
        assert equal(moments(learner), before_moments)
        assert run(learner, range(20, 23)) == run(plain, range(20, 23))
        assert torch.equal(theta(learner), theta(plain))
        assert equal(moments(learner), moments(plain))

    def test_can_be_restored_again_and_again(self) -> None:
        learner = make()
        run(learner, range(2))
        learner.snapshot()
        before, before_moments = theta(learner), moments(learner)
        for k in range(3):
            run(learner, range(k, k + 2))
            learner.restore()
            assert torch.equal(theta(learner), before)
            assert equal(moments(learner), before_moments)

    def test_second_snapshot_keeps_the_first_until_released(self) -> None:
        learner = make()
        first = theta(learner)
        learner.snapshot()
        run(learner, range(2))
        second = theta(learner)
        learner.snapshot()
        learner.restore()
        assert torch.equal(theta(learner), first)
        run(learner, range(2))
        learner.release()
        learner.snapshot()
        learner.restore()
        assert torch.equal(theta(learner), second)

    def test_restore_without_a_snapshot_is_a_bug(self) -> None:
        learner = make()
        with pytest.raises(AssertionError, match="snapshot first"):
            learner.restore()
        learner.snapshot()
        learner.release()
        with pytest.raises(AssertionError, match="snapshot first"):
            learner.restore()


class TestResume:
    def through_a_file(self, learner: Learner, dropout: float = 0.0) -> Learner:
        file = io.BytesIO()
        torch.save(learner.state_dict(), file)
        file.seek(0)
        again = make(dropout=dropout)
        # θ travels as a Hugging Face folder, beside the state.
        again.lm.network.load_state_dict(copy.deepcopy(learner.lm.network.state_dict()))
        again.load_state_dict(torch.load(file, weights_only=True))
        return again

    @pytest.mark.parametrize("done", [0, 3])
    def test_goes_on_bitwise(self, done: int) -> None:
        learner = make()
        run(learner, range(done))
        again = self.through_a_file(learner)
        assert run(again, range(done, 6)) == run(learner, range(done, 6))
        assert torch.equal(theta(again), theta(learner))
        assert equal(moments(again), moments(learner))

    def test_between_steps_theta_is_its_own_snapshot(self) -> None:
        """θ is put back after each step of a reset phase, so a resume can take the snapshot anew."""
        learner = make()
        run(learner, range(2))
        learner.snapshot()
        run(learner, range(2, 4))
        learner.restore()
        again = self.through_a_file(learner)
        again.snapshot()
        for each in (learner, again):
            run(each, range(3))
            each.restore()
            run(each, range(5))
        assert torch.equal(theta(again), theta(learner))
        assert equal(moments(again), moments(learner))

    def test_takes_a_new_learning_rate(self) -> None:
        """`curriq resume --lm-lr` must win over the rate inside the optimizer's saved state."""
        learner = make()
        run(learner, range(2))
        again = Learner(tiny_lm(), OptimConfig(lm_lr=1e-4, lr_schedule="constant", lr_warmup_steps=0), 20)
        again.load_state_dict(learner.state_dict())
        again.accumulate(random_offer(N, T), by_loss, False)
        assert again.update(2)["train/lr"] == 1e-4
        assert again.optimizer.param_groups[0]["lr"] == 1e-4


class TestReforwardedAction:
    def step(self) -> Step:
        features = Features(hidden=torch.zeros(N, 16), loss=torch.arange(N).float())
        return finished_step(features, offer=random_offer(N, T), action=4, reward=-1.0)

    @pytest.mark.parametrize("kind", [ReforwardedAction, lambda lm: TDIntoTheta(lm, 1.0)])
    def test_is_the_last_hidden_state_of_the_action_under_the_present_model(self, kind) -> None:
        lm, step = tiny_lm(), self.step()
        expected = lm.network.transformer(step.trained.windows.tokens).last_hidden_state[4]
        features = kind(lm).features(step)
        torch.testing.assert_close(features.hidden, expected[None, -1])
        torch.testing.assert_close(features.pooled, expected.mean(0)[None])
        assert features.loss.tolist() == [4.0]  # as it was stored, without a gradient

    def test_sends_no_gradient_into_the_model(self) -> None:
        assert not ReforwardedAction(tiny_lm()).features(self.step()).hidden.requires_grad

    @pytest.mark.parametrize("td_lambda", [0.0, 0.5, 1.0])
    def test_scales_only_the_gradient_and_measures_it_unscaled(self, td_lambda: float) -> None:
        """The gradient lands on top of what is there already: one AdamW step takes both."""
        lm, step = tiny_lm(), self.step()
        direction = torch.linspace(-1, 1, 16)
        (lm.network.transformer(step.trained.windows.tokens).last_hidden_state[4, -1] @ direction).backward()
        expected = [p.grad.clone() for p in lm.parameters]
        for p in lm.parameters:
            p.grad.fill_(3.0)
        action = TDIntoTheta(lm, td_lambda)
        (action.features(step).hidden[0] @ direction).backward()
        metrics = action.backward()
        for p, gradient in zip(lm.parameters, expected, strict=True):
            torch.testing.assert_close(p.grad, 3.0 + td_lambda * gradient, rtol=1e-5, atol=1e-6)
        norm = sum(gradient.square().sum().item() for gradient in expected) ** 0.5
        assert metrics == {"critic/theta_grad_norm": pytest.approx(norm, rel=1e-5)}
