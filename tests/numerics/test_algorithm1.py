"""The loop against a naive Algorithm 1: plain PyTorch, two passes, everything written out, in float64."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tests.helpers import random_offer, tiny_lm

from curriq.config import CriticConfig, OptimConfig
from curriq.lm.beside import Beside
from curriq.lm.held_out import HeldOutReward
from curriq.lm.learner import Learner, ReforwardedAction, TDIntoTheta
from curriq.lm.mixture import one_action
from curriq.rng import Generators
from curriq.select.base import Uniform
from curriq.select.soft_q import SoftQ
from curriq.softq.critic import QInputs, TDCritic
from curriq.softq.temperature import FixedBeta
from curriq.train.loop import (
    Components,
    LoopState,
    SampledAction,
    theta_reset_schedule,
    train_step,
    trained_action,
)

N, T, D, M, STEPS = 6, 8, 10, 4, 5
LR, WEIGHT_DECAY, CLIP = 1e-2, 0.01, 0.05


class Scripted:
    """Proposes a fixed list of batches."""

    def __init__(self, batches):
        self.propose = batches.__getitem__

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def losses_and_hidden(network, tokens):
    output = network(input_ids=tokens, use_cache=False, output_hidden_states=True)
    nll = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return nll.mean(1), output.hidden_states[-1][:, -1]


def naive_algorithm1(network, q_net, batches, reward_set, settings, generators, single):
    """Algorithm 1 of the paper as it stands, with our joint TD step where that is set; returns rewards,
    mixture losses and TD targets."""
    beta, gamma = settings.beta, settings.gamma
    target = copy.deepcopy(q_net)
    lm_optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    q_optimizer = torch.optim.Adam(q_net.parameters(), lr=settings.q_lr)
    previous, log = None, []
    for batch in batches:
        with torch.no_grad():
            losses_at_k, hidden = losses_and_hidden(network, batch.windows.tokens)
            q = q_net(hidden)
        td_theta = None
        y = None
        if previous is not None:
            tokens, old_hidden, reward = previous
            with torch.no_grad():
                next_q = target(hidden)
                value = beta * (torch.logsumexp(next_q / beta, 0) - math.log(N))
                y = (1 - gamma) * reward + gamma * value
            q_optimizer.zero_grad()
            if settings.reforward_action:
                with torch.no_grad():
                    _, old_hidden = losses_and_hidden(network, tokens)
            if settings.td_into_theta:
                network.zero_grad()
                _, fresh = losses_and_hidden(network, tokens)
                loss = 0.5 * (q_net(fresh)[0] - y) ** 2
                loss.backward()
                td_theta = [
                    torch.zeros_like(p) if p.grad is None else settings.td_lambda * p.grad.clone()
                    for p in network.parameters()
                ]
            else:
                loss = 0.5 * (q_net(old_hidden)[0] - y) ** 2
                loss.backward()
            torch.nn.utils.clip_grad_norm_(q_net.parameters(), settings.q_grad_clip)
            q_optimizer.step()
            if settings.td_step == "own":
                for parameter, gradient in zip(network.parameters(), td_theta, strict=True):
                    parameter.grad = gradient
                torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
                lm_optimizer.step()
                td_theta = None
            for slow, fast in zip(target.parameters(), q_net.parameters(), strict=True):
                slow.data = settings.polyak_tau * fast.data + (1 - settings.polyak_tau) * slow.data
        policy = torch.softmax(q / beta, 0)
        weights = policy if settings.q_weighting else torch.full((N,), 1 / N, dtype=torch.float64)
        draw = torch.rand((), generator=generators("action"), dtype=torch.float64)
        action = int(((weights if single else policy).cumsum(0) <= draw).sum())
        if single:
            weights = F.one_hot(torch.tensor(action), N).double()
        network.zero_grad()
        nll, _ = losses_and_hidden(network, batch.windows.tokens)
        mixture_loss = weights @ nll
        mixture_loss.backward()
        if td_theta is not None:
            for parameter, gradient in zip(network.parameters(), td_theta, strict=True):
                parameter.grad += gradient
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        lm_optimizer.step()
        subset = torch.randperm(D, generator=generators("reward"))[:M]
        with torch.no_grad():
            reward = -losses_and_hidden(network, reward_set.tokens[subset])[0].mean().item()
        previous = (batch.windows.tokens[action : action + 1], hidden[action : action + 1], reward)
        # The log has the losses at θ_k, and a step on the TD loss moves θ before the mixture step.
        log.append((reward, (weights @ losses_at_k).item(), None if y is None else y.item()))
    return log


OWN_STEP = CriticConfig(beta=0.05, td_into_theta=True, td_lambda=0.3, td_step="own", q_lr=0.05)
PAPER = CriticConfig(beta=0.05, reforward_action=True, q_lr=0.05)


@pytest.mark.parametrize("single", [False, True], ids=["mixture", "single action"])
@pytest.mark.parametrize(
    "settings",
    [
        CriticConfig(beta=0.01, gamma=0.9, q_lr=0.05),
        CriticConfig(beta=1.0, gamma=0.0, q_lr=0.01, polyak_tau=1.0, q_grad_clip=0.01),
        CriticConfig(beta=0.01, q_weighting=False),
        CriticConfig(beta=0.05, td_into_theta=True, td_lambda=0.3, q_lr=0.05),
        OWN_STEP,
        PAPER,
    ],
    ids=["sharp", "myopic, clipped", "no-q-weighting", "td-into-theta", "own TD step", "line 19"],
)
def test_five_steps_agree(settings, single):
    lm = tiny_lm()
    lm.network.double()
    network = copy.deepcopy(lm.network)
    batches = [random_offer(N, T, seed=k) for k in range(STEPS)]
    reward_set = random_offer(D, T, seed=99).windows

    generators = Generators(2)
    learner = Learner(
        lm,
        OptimConfig(
            lm_lr=LR,
            weight_decay=WEIGHT_DECAY,
            grad_clip=CLIP,
            lr_schedule="constant",
            lr_warmup_steps=0,
            micro_batch=4,
            head_chunk_tokens=T,
        ),
        STEPS,
        draw=one_action(generators("action")) if single else None,
        own_td_step=settings.td_step == "own",
    )
    previous_action = None
    if settings.td_into_theta:
        previous_action = TDIntoTheta(lm, settings.td_lambda)
    if settings.reforward_action:
        previous_action = ReforwardedAction(lm)
    temperature = FixedBeta(settings.beta)
    inputs = QInputs(settings.q_features, lm.width)
    critic = TDCritic(settings, inputs, temperature, "cpu", Generators(1), previous_action)
    critic.online.double()
    critic.target.double()
    critic.optimizer = torch.optim.Adam(critic.online.parameters(), lr=settings.q_lr)
    q_net = copy.deepcopy(critic.online)
    reward = HeldOutReward(lm, reward_set, M, generators("reward"))
    components = Components(
        proposer=Scripted(batches),
        selector=SoftQ(critic, temperature) if settings.q_weighting else Uniform(),
        critic=critic,
        learner=learner,
        held_out=reward,
        theta_resets=theta_reset_schedule(always=False, warmup=0, period=0),
        act=trained_action if single else SampledAction(critic, generators("action")),
        beside=partial(Beside, device=torch.device("cpu")),
    )
    state = LoopState()
    steps = [train_step(components, state) for _ in range(STEPS)]

    expected = naive_algorithm1(network, q_net, batches, reward_set, settings, Generators(2), single)
    for step, (expected_reward, expected_loss, expected_target) in zip(steps, expected, strict=True):
        assert step.reward == pytest.approx(expected_reward, abs=1e-9)
        assert step.metrics["train/loss"] == pytest.approx(expected_loss, abs=1e-9)
        assert step.metrics.get("critic/td_target") == pytest.approx(expected_target, abs=1e-9)
    for ours, theirs in zip(lm.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for ours, theirs in zip(critic.online.parameters(), q_net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    if single:
        assert [step.action for step in steps] == [int(step.weights.argmax()) for step in steps]
    assert steps[0].metrics.keys().isdisjoint({"critic/td_loss"})
    assert "critic/td_loss" in steps[1].metrics
