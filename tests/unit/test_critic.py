"""The Q-network and its learning rule: hand calculation, fixed point, replay, resume, credit."""

import io
import math

import pytest
import torch
from tests.helpers import finished_step

from curriq.config import CriticConfig
from curriq.errors import CurriqError
from curriq.rng import Generators
from curriq.select.base import NoCritic
from curriq.softq.critic import QInputs, QNetwork, QReplay, TDCritic, mixture_credit, sampled_credit
from curriq.softq.temperature import FixedBeta, build_temperature, effective_batch_fraction
from curriq.types import NO_COST, Cost, Critic, Features, Step

TD_NAMES = {"critic/td_loss", "critic/td_target", "critic/q_pred", "critic/grad_norm"}
VALUE_NAMES = {f"critic/{name}" for name in ("q_mean", "q_std", "q_min", "q_max", "soft_value")}


def features(hidden: torch.Tensor) -> Features:
    return Features(hidden=hidden, loss=torch.zeros(len(hidden)))


def transition(hidden: torch.Tensor, action: int, reward: float) -> Step:
    return finished_step(features(hidden), action=action, reward=reward)


def critic(width: int = 3, seed: int = 0, previous_action=None, **settings) -> TDCritic:
    config = CriticConfig(**settings)
    inputs = QInputs(config.q_features, width, layer_norm=config.q_layer_norm)
    return TDCritic(config, inputs, FixedBeta(config.beta), "cpu", Generators(seed), previous_action)


def saved_and_loaded(state):
    """Through a file, the way a checkpoint goes, with the safe loader."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# The network


def test_q_network_is_equation_2():
    network = QNetwork(2, 3, generator=torch.Generator().manual_seed(0))
    w1, b1, w2, b2 = [p.detach().tolist() for p in network.parameters()]
    h = [0.7, -1.3]
    units = [max(0.0, row[0] * h[0] + row[1] * h[1] + b) for row, b in zip(w1, b1, strict=True)]
    expected = sum(w * u for w, u in zip(w2[0], units, strict=True)) + b2[0]
    assert 0 < sum(unit > 0 for unit in units) < 3  # the seed exercises both sides of the ReLU
    assert network(torch.tensor([h])).item() == pytest.approx(expected, rel=1e-5)


def test_q_network_without_hidden_units_is_linear():
    network = QNetwork(3, 0, generator=torch.Generator().manual_seed(0))
    weight, bias = [p.detach() for p in network.parameters()]
    assert weight.abs().max() <= 1 / math.sqrt(3)
    hidden = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(hidden), hidden @ weight[0] + bias)


def test_q_network_starts_in_the_range_of_a_linear_layer_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    network = QNetwork(400, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    for layer, inputs in ((network.layer1, 400), (network.layer2, 64)):
        bound = 1 / math.sqrt(inputs)
        assert layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.25)


def test_q_network_stays_in_float32_under_autocast():
    network = QNetwork(8, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(hidden), network(hidden.clone()))
        inside = network(hidden)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, network(hidden))


# Algorithm 1 by hand


def one_unit_critic(q_grad_clip: float = 1e9) -> TDCritic:
    """Q(h) = 2·relu(1·h + 0) + 0.5, online and target; γ = τ = 0.5, Adam's learning rate 0.1."""
    made = critic(width=1, q_hidden=1, gamma=0.5, polyak_tau=0.5, q_lr=0.1, q_grad_clip=q_grad_clip)
    for network in (made.online, made.target):
        with torch.no_grad():
            for parameter, value in zip(network.parameters(), (1.0, 0.0, 2.0, 0.5), strict=True):
                parameter.fill_(value)
    return made


def parameters(network: QNetwork) -> list[float]:
    return [p.item() for p in network.parameters()]


def test_two_steps_calculated_by_hand():
    made = one_unit_critic()
    h0, h1, h2 = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [2.0]])

    # Step 0 has no pending transition: Q(1) = 2.5 and Q(2) = 4.5 are reported and nothing moves.
    # V = log((e^2.5 + e^4.5)/2) = 4.5 + log((1 + e^-2)/2).
    row, cost = made.learn(None, features(h0))
    assert cost == NO_COST
    assert set(row) == VALUE_NAMES
    assert row["critic/q_mean"] == 3.5
    assert row["critic/q_std"] == 1.0
    assert (row["critic/q_min"], row["critic/q_max"]) == (2.5, 4.5)
    assert row["critic/soft_value"] == pytest.approx(4.5 + math.log((1 + math.exp(-2)) / 2), rel=1e-6)
    assert parameters(made.online) == parameters(made.target) == [1.0, 0.0, 2.0, 0.5]

    # Step 1: action h = 2, reward −1. Equal candidates give V = Q̄(1) = 2.5 exactly.
    # y = 0.5·(−1) + 0.5·2.5 = 0.75;  q̂ = Q(2) = 4.5;  δ = 3.75;  loss = 3.75²/2 = 7.03125.
    # ∂W1 = δ·W2·h = 15, ∂b1 = δ·W2 = 7.5, ∂W2 = δ·relu = 7.5, ∂b2 = δ = 3.75;
    # norm = 3.75·√(16 + 4 + 4 + 1) = 18.75. Adam's first step is lr·sign: every parameter loses 0.1.
    # Polyak with τ = 0.5: the target is half-way, 0.05 below its start.
    row, _ = made.learn(transition(h0, action=1, reward=-1.0), features(h1))
    assert set(row) == VALUE_NAMES | TD_NAMES
    assert row["critic/soft_value"] == 2.5
    assert row["critic/td_target"] == 0.75
    assert row["critic/q_pred"] == 4.5
    assert row["critic/td_loss"] == 7.03125
    assert row["critic/grad_norm"] == pytest.approx(18.75)
    assert parameters(made.online) == pytest.approx([0.9, -0.1, 1.9, 0.4], abs=1e-6)
    assert parameters(made.target) == pytest.approx([0.95, -0.05, 1.95, 0.45], abs=1e-6)

    # Step 2: action h = 1, reward −2.
    # V = Q̄(2) = 1.95·(0.95·2 − 0.05) + 0.45 = 4.0575;  y = 0.5·(−2) + 0.5·4.0575 = 1.02875.
    # q̂ = 1.9·(0.9 − 0.1) + 0.4 = 1.92;  δ = 0.89125;  loss = 0.39716328.
    # The report of Q on H_2 is of φ before the update: Q(2) = 1.9·(1.8 − 0.1) + 0.4 = 3.63.
    # ∂b2 = δ. Adam: m̂ = (0.09·3.75 + 0.1·0.89125)/0.19 = 2.24539474,
    # v̂ = (0.000999·14.0625 + 0.001·0.79432656)/0.001999 = 7.42509833, √v̂ = 2.72490336,
    # b2 ← 0.4 − 0.1·2.24539474/2.72490336 = 0.31759730;  target: (0.45 + 0.31759730)/2 = 0.38379865.
    row, _ = made.learn(transition(h1, action=0, reward=-2.0), features(h2))
    assert row["critic/q_mean"] == pytest.approx(3.63, rel=1e-5)
    assert row["critic/soft_value"] == pytest.approx(4.0575, rel=1e-5)
    assert row["critic/td_target"] == pytest.approx(1.02875, rel=1e-5)
    assert row["critic/q_pred"] == pytest.approx(1.92, rel=1e-5)
    assert row["critic/td_loss"] == pytest.approx(0.39716328, rel=1e-4)
    assert parameters(made.online)[3] == pytest.approx(0.31759730, abs=1e-5)
    assert parameters(made.target)[3] == pytest.approx(0.38379865, abs=1e-5)


def test_clipping_bounds_the_gradient_and_reports_the_norm_before_it():
    made = one_unit_critic(q_grad_clip=0.5)
    made.optimizer = torch.optim.SGD(made.online.parameters(), lr=1.0)  # Adam would hide the scale
    row, _ = made.learn(transition(torch.tensor([[2.0]]), 0, -1.0), features(torch.tensor([[1.0]])))
    moved = torch.tensor(parameters(made.online)) - torch.tensor([1.0, 0.0, 2.0, 0.5])
    assert row["critic/grad_norm"] == pytest.approx(18.75)
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


# Learning


def constant_reward_run(made: TDCritic, steps: int, reward: float = -3.0) -> dict[str, float]:
    generator = torch.Generator().manual_seed(5)
    previous, row = None, {}
    for step in range(steps):
        now = torch.randn(8, 3, generator=generator)
        row, _ = made.learn(previous, features(now))
        previous = transition(now, action=step % 8, reward=reward)
    return row


@pytest.mark.parametrize("credit", ["sampled", "mixture"])
def test_a_constant_reward_is_learnt_as_q_equal_r(credit):
    made = critic(gamma=0.5, polyak_tau=0.1, q_lr=1e-2, credit=credit)
    constant_reward_run(made, 600)
    made.optimizer.param_groups[0]["lr"] = 5e-4  # a constant rate leaves Q jittering by about its size
    row = constant_reward_run(made, 300)
    assert row["critic/q_mean"] == pytest.approx(-3.0, abs=0.1)
    assert row["critic/q_std"] < 0.1
    assert row["critic/soft_value"] == pytest.approx(-3.0, abs=0.1)


def test_values_are_detached_and_policy_is_boltzmann():
    made = critic(beta=0.5)
    h = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    q = made.values(features(h))
    assert not q.requires_grad
    torch.testing.assert_close(made.policy(q, features(h)), torch.exp(q / 0.5) / torch.exp(q / 0.5).sum())


class Forwarded:
    """The previous action through a "model" that is its hidden state."""

    cost = Cost(extra_flops=3)

    def __init__(self, theta):
        self.theta = theta

    def features(self, previous):
        return features(self.theta * 1.0)

    def backward(self):
        return {"critic/theta_grad_norm": self.theta.grad.norm().item()}


def test_td_gradient_reaches_the_forwarded_hidden_state_once_and_unclipped():
    """TD-into-θ: ∂loss/∂h = δ·∂Q/∂h lands on θ in full, however small the clip on φ is."""
    theta = torch.tensor([[0.4, -0.2, 0.9]], requires_grad=True)
    made = critic(previous_action=Forwarded(theta), td_into_theta=True, q_grad_clip=1e-6)
    h = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    leaf = theta.detach().clone().requires_grad_()
    q = made.online(leaf)
    (slope,) = torch.autograd.grad(q.sum(), leaf)
    row, cost = made.learn(transition(h, 0, -50.0), features(h))
    assert cost == Forwarded.cost
    assert row["critic/theta_grad_norm"] == pytest.approx(theta.grad.norm().item())
    error = row["critic/q_pred"] - row["critic/td_target"]
    torch.testing.assert_close(theta.grad, error * slope)
    assert abs(error) > 1


def test_a_loss_that_is_not_finite_stops_before_the_update():
    made = critic()
    before = saved_and_loaded(made.state_dict())
    h = torch.ones(4, 3)
    with pytest.raises(FloatingPointError, match=r"reward = nan"):
        made.learn(transition(h, 0, math.nan), features(h))
    after = made.state_dict()
    for name in ("online", "target"):
        assert all(torch.equal(before[name][key], after[name][key]) for key in before[name])


def test_no_critic_conforms_and_does_nothing():
    nobody = NoCritic()
    assert isinstance(nobody, Critic)
    assert isinstance(critic(), Critic)
    assert not nobody.needs_reward
    h = torch.ones(4, 3)
    assert nobody.values(features(h)) is None
    assert nobody.policy(torch.arange(4.0), features(h)).tolist() == [0.25] * 4
    assert nobody.learn(transition(h, 0, -1.0), features(h)) == ({}, NO_COST)
    nobody.load_state_dict(nobody.state_dict())


# Replay


def test_replay_keeps_the_last_pairs_and_overwrites_the_oldest():
    ring = QReplay(3, 1, "cpu", torch.Generator().manual_seed(0))
    for number in range(5):
        ring.add(torch.tensor([[float(number)]]), torch.tensor([10.0 * number]))
        assert len(ring) == min(number + 1, 3)
    hidden, targets = ring.sample(200)
    assert set(hidden[:, 0].tolist()) == {2.0, 3.0, 4.0}
    torch.testing.assert_close(targets, 10 * hidden[:, 0])


def test_replay_never_draws_empty_slots():
    ring = QReplay(100, 1, "cpu", torch.Generator().manual_seed(0))
    ring.add(torch.tensor([[7.0]], requires_grad=True), torch.tensor([1.0]))
    hidden, targets = ring.sample(50)
    assert hidden.unique().tolist() == [7.0]
    assert targets.unique().tolist() == [1.0]
    assert not hidden.requires_grad


def test_replay_resumes_with_the_same_draws_after_it_has_wrapped():
    ring, other = (QReplay(4, 2, "cpu", torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for number in range(6):
        ring.add(torch.full((1, 2), float(number)), torch.tensor([float(number)]))
    ring.sample(3)
    other.load_state_dict(saved_and_loaded(ring.state_dict()))
    for which in (ring, other):
        which.add(torch.full((1, 2), 6.0), torch.tensor([6.0]))
    assert all(torch.equal(a, b) for a, b in zip(ring.sample(20), other.sample(20), strict=True))


def test_replay_state_does_not_follow_the_ring():
    ring = QReplay(2, 1, "cpu", torch.Generator().manual_seed(0))
    ring.add(torch.tensor([[1.0]]), torch.tensor([2.0]))
    state = ring.state_dict()
    for _ in range(2):
        ring.add(torch.tensor([[7.0]]), torch.tensor([8.0]))
    assert state["hidden"].tolist() == [[1.0], [0.0]]
    assert state["targets"].tolist() == [2.0, 0.0]


def test_replay_updates_train_more_and_polyak_follows_them():
    """With τ = 1 the target equals φ after *all* updates of the step."""
    made = critic(q_replay_size=16, q_replay_batch=4, q_replay_updates=3, polyak_tau=1.0)
    steps_taken = constant_reward_run(made, 5)
    assert steps_taken["critic/replay_loss"] > 0
    assert made.optimizer.state_dict()["state"][0]["step"].item() == 4 * (1 + 3)
    for online, target in zip(made.online.parameters(), made.target.parameters(), strict=True):
        assert torch.equal(online, target)


# Resume


@pytest.mark.parametrize("q_replay_size", [0, 5])
def test_a_restored_critic_continues_bitwise(q_replay_size):
    original, restored = (critic(seed=seed, q_replay_size=q_replay_size) for seed in (0, 9))
    constant_reward_run(original, 9)
    restored.load_state_dict(saved_and_loaded(original.state_dict()))
    assert constant_reward_run(original, 7) == constant_reward_run(restored, 7)
    for name, value in original.online.state_dict().items():
        assert torch.equal(value, restored.online.state_dict()[name])


def test_one_seed_gives_one_critic_and_another_seed_another():
    rows = [constant_reward_run(critic(seed=seed, q_replay_size=5), 6) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


# Credit


def recovered_scale(credit, n: int, steps: int = 1500, width: int = 4) -> float:
    """Share of the true scale that least squares on the rule's predictions recovers.

    Q is linear, Q(h) = w·h; the reward is the uniform mixture's true value Σ w*·h_i/N plus noise and
    γ = 0, so the target is the reward. The prediction is linear in w, and the regression is exact.
    """
    generator = torch.Generator().manual_seed(n)
    truth = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
    rows, rewards = [], []
    for _ in range(steps):
        hidden = torch.randn(n, width, generator=generator, dtype=torch.float64)
        noise = 0.03 * torch.randn((), generator=generator, dtype=torch.float64)
        rewards.append((hidden @ truth).mean() + noise)
        done = transition(hidden, int(torch.randint(n, (), generator=generator)), rewards[-1].item())
        task = credit(done)
        inputs = task.features.hidden  # Q is linear, so a prediction's gradient is its (combined) input
        rows.append(inputs[0] if task.combine is None else (task.combine.double() @ inputs)[0])
    found = torch.linalg.lstsq(torch.stack(rows), torch.stack(rewards)[:, None]).solution[:, 0]
    return (found @ truth / (truth @ truth)).item()


def test_sampled_credit_recovers_one_nth_of_the_scale_and_mixture_credit_all_of_it():
    """Standard errors here: 0.007 for the sampled rule at N = 16, 0.003 for the mixture's."""
    assert recovered_scale(sampled_credit, 16) == pytest.approx(1 / 16, abs=0.035)
    assert recovered_scale(mixture_credit, 16) == pytest.approx(1.0, abs=0.02)
    assert recovered_scale(sampled_credit, 1) == pytest.approx(1.0, abs=0.02)


def weight_on_the_best(settings: dict, steps: int = 600, n: int = 8) -> float:
    """Mean weight of the windows of the best of three sources in the last quarter of a run, over their share,
    where rewards are linear: Σ w_i e_i plus the noise of a paired reward of 16 windows."""
    config = CriticConfig(**settings)
    temperature = build_temperature(config, config.effective_batch_fraction, share=effective_batch_fraction)
    made = TDCritic(config, QInputs(("source",), 3, 3), temperature, "cpu", Generators(0))
    generator = torch.Generator().manual_seed(0)
    effects, previous, ratios = torch.tensor([4e-3, 0.0, -4e-3]), None, []
    for step in range(steps):
        source = torch.randint(3, (n,), generator=generator)
        now = Features(hidden=torch.zeros(n, 3), loss=torch.zeros(n), source=source)
        q = made.values(now)
        weights = made.policy(q, now)
        action = int(torch.multinomial(weights, 1, generator=generator))
        made.learn(previous, now)
        temperature.observe(q, None)
        reward = (weights @ effects[source] + 1e-3 * torch.randn((), generator=generator)).item()
        previous = finished_step(now, weights=weights, action=action, reward=reward, q=q)
        if step >= 3 * steps // 4 and 0 in source:
            ratios.append((weights[source == 0].sum() / (source == 0).float().mean()).item())
    return sum(ratios) / len(ratios)


def test_sampled_credit_selects_once_its_reward_says_enough_and_beta_is_on_the_scale_of_q():
    """With β = 1 the weights stay even whatever Q has learnt."""
    settings = {"q_standardise": True, "q_features": ("source",), "gamma": 0.0}
    assert weight_on_the_best(settings | {"temperature": "fraction"}) > 1.3
    assert weight_on_the_best(settings) == pytest.approx(1, abs=0.01)


def test_mixture_credit_is_refused_where_it_has_no_meaning():
    with pytest.raises(CurriqError, match="--td-into-theta"):
        CriticConfig(credit="mixture", td_into_theta=True)
    with pytest.raises(CurriqError, match="--q-replay-size"):
        CriticConfig(credit="mixture", q_replay_size=8)
