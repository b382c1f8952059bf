"""Does Q converge to the value of upweighting a candidate? Sampled credit against brute force.

    python experiments/credit.py                # under an hour on one core; a stopped call is continued
    python experiments/credit.py --quick        # the same in a minute, too short to say anything

Whether Q is right can be seen where the policy does not follow it. So the weights stay uniform; then no step
depends on any Q, and several critics learn from the same transitions, with both rewards. Each run starts from
one trained θ per seed, with its AdamW moments, and either puts θ back after every step (`reset`) or goes on
(`moving`).

Truth is measured by brute force: the optimizer takes a step on one window alone, and all reward windows are
measured before and after, 128 windows of each source; under a moving θ 16 at each of 8 points of the run. A
source's value m is the mean of its windows' effects.

Printed per arm, means over seeds:

  slope       of the reward on the value m of the credited window's source: the share of the true scale that
              reaches Q's target, with its standard error; theory says 1/N for a mixture, 1 for a single action
  steps to 3  steps after which a slope of the size that theory says is three standard errors from 0
  Q source    of a critic that sees the source: slope of Q on m (± over seeds), and Spearman's ρ
  Q last      of a critic that sees the last token's hidden state: slope of Q on the windows' effects, and ρ

then what two critics reach that are taught the effects themselves, and what follows for N = M = 256.
"""

import argparse
import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from curriq.config import CriticConfig, RunConfig
from curriq.lm.held_out import HeldOutReward, build_reward, held_out_loss
from curriq.presets import preset
from curriq.rng import Generators
from curriq.select.base import NoCritic
from curriq.softq.critic import QInputs, TDCritic
from curriq.softq.temperature import FixedBeta
from curriq.train.build import Run
from curriq.train.loop import Components, train_step
from curriq.train.run import prepare
from curriq.types import Features, Offer, Step

Formulation = Literal["mixture", "single"]
Theta = Literal["reset", "moving"]
Reward = Literal["paired", "absolute"]

WARM_STEPS, WARM_WINDOWS = 400, 16
"""Uniform training before every run: steps, and windows of a step."""
POINTS = 8
"""Points of a run at which Q is compared with the truth."""
CRITICS: dict[str, tuple[Reward, dict[str, Any]]] = {
    "paired source": ("paired", {"q_features": ("source",), "gamma": 0.0, "q_standardise": True}),
    "absolute source": ("absolute", {"q_features": ("source",), "gamma": 0.0, "q_standardise": True}),
    "paired last": ("paired", {"q_features": ("last",), "gamma": 0.0, "q_standardise": True}),
    "absolute last": ("absolute", {"q_features": ("last",), "gamma": 0.0, "q_standardise": True}),
    "published": ("absolute", {}),
}
"""The reward that a critic learns from, and its settings. `published` is the critic of the paper."""


@dataclass(frozen=True)
class Size:
    """How much is measured: windows per source at one θ, the same per point of a run, and steps."""

    at_one: int = 128
    per_point: int = 16
    steps: int = 3000


QUICK = Size(at_one=4, per_point=1, steps=24)


@dataclass(frozen=True)
class Arm:
    """One run of the study."""

    formulation: Formulation
    windows: int
    theta: Theta
    seed: int

    @property
    def name(self) -> str:
        return f"{self.formulation}-{self.windows}-{self.theta}-{self.seed}"

    @property
    def share(self) -> float:
        """Slope that theory gives, π_a of a uniform policy; 1 for a single action."""
        return 1 / self.windows if self.formulation == "mixture" else 1.0


@dataclass(frozen=True)
class Truth:
    """Windows, the effect of a step on each alone (nats per token), and what a critic sees of them."""

    effect: Tensor
    features: Features


def configuration(arm: Arm, steps: int) -> RunConfig:
    """A tiny model with uniform weights, and a clipping norm that no gradient reaches: clipping would
    shorten the steps on single windows and not those on mixtures."""
    return preset("smoke").override(
        seed=arm.seed,
        steps=steps,
        num_candidates=arm.windows,
        q_weighting=False,
        reward="paired",
        reward_windows=16,
        reward_set_size=64,
        lm_lr=1e-3,
        lr_schedule="constant",
        lr_warmup_steps=0,
        grad_clip=1e3,
        micro_batch=64,
        head_chunk_tokens=2048,
        threads=1,
        train_on="action" if arm.formulation == "single" else "mixture",
    )


class Indifferent(NoCritic):
    """Equal values for all windows, so that actions are drawn uniformly; learns nothing."""

    needs_reward = True

    def values(self, features: Features) -> Tensor:
        return torch.zeros(len(features))


def open_run(arm: Arm, steps: int) -> tuple[Run, Components, HeldOutReward]:
    """The run of an arm, with uniform actions; its reward is at hand, because both kinds are read from it."""
    run = prepare(configuration(arm, steps))
    generators = Generators(arm.seed)
    reward = build_reward(run.config, run.lm, run.corpus.held_out.reward, generators)
    components = dataclasses.replace(
        run.session.components,
        critic=Indifferent(),
        held_out=reward,
        theta_resets=lambda step: arm.theta == "reset",
    )
    return run, components, reward


# Truth --------------------------------------------------------------------------------------------------


def brute_force(run: Run, per_source: int) -> Truth:
    """The effect of one optimizer step on each window alone, on all reward windows, from θ as it is.

    The windows are the stream's next, so many of each source.
    """
    learner = run.session.components.learner
    held_out = run.corpus.held_out.reward
    learner.snapshot()
    before = held_out_loss(run.lm, held_out)
    effects, features = [], []
    for window in _of_each_source(run, per_source):
        mixture = learner.accumulate(window, lambda part, seen: torch.zeros_like(seen.loss), False)
        learner.update(run.session.state.step)
        effects.append(before - held_out_loss(run.lm, held_out))
        learner.restore()
        features.append(mixture.features)
    return Truth(effect=torch.tensor(effects, dtype=torch.float64), features=Features.cat(features))


def _of_each_source(run: Run, n: int) -> Iterator[Offer]:
    missing = dict.fromkeys(range(len(run.corpus.source_names)), n)
    while any(missing.values()):
        offer = run.corpus.stream.read(32)
        for row, source in enumerate(offer.windows.source.tolist()):
            if missing[source]:
                missing[source] -= 1
                yield offer.take(slice(row, row + 1))


def warm_start(seed: int, size: Size, folder: Path) -> dict[str, Any]:
    """A trained θ with its optimizer, and the truth there; once per seed."""
    file = folder / f"truth-{seed}.pt"
    if not file.exists():
        run, components, _ = open_run(Arm("mixture", WARM_WINDOWS, "moving", seed), WARM_STEPS)
        for _ in range(WARM_STEPS if size != QUICK else 40):
            train_step(components, run.session.state)
        kept = copy.deepcopy({"lm": run.lm.network.state_dict(), "optimizer": _optimizer(run).state_dict()})
        truth = brute_force(run, size.at_one)
        _save(file, kept | _plain(truth) | {"sources": list(run.corpus.source_names)})
    return torch.load(file, weights_only=True)


def _optimizer(run: Run) -> torch.optim.Optimizer:
    return run.session.components.learner.optimizer


def _plain(truth: Truth) -> dict[str, Tensor]:
    return {"effect": truth.effect, "source": truth.features.source, "hidden": truth.features.hidden}


def _truth(saved: dict[str, Any]) -> Truth:
    features = Features(
        hidden=saved["hidden"], loss=torch.zeros(len(saved["hidden"])), source=saved["source"]
    )
    return Truth(effect=saved["effect"], features=features)


def _save(file: Path, values: dict[str, Any]) -> None:
    """Whole or not at all, so that a stopped call is continued from what is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(values, partial)
    partial.rename(file)


# One run ------------------------------------------------------------------------------------------------


def build_critic(settings: dict[str, Any], width: int, sources: int, seed: int) -> TDCritic:
    config = CriticConfig(credit="sampled", **settings)
    inputs = QInputs(config.q_features, width, sources, layer_norm=config.q_layer_norm)
    return TDCritic(config, inputs, FixedBeta(config.beta), "cpu", Generators(seed))


def study(arm: Arm, size: Size, folder: Path) -> dict[str, Any]:
    """One run: what was credited and rewarded in each step, and truth and Q at `POINTS` points; from its file
    where it has been made."""
    file = folder / f"{arm.name}.pt"
    if not file.exists():
        _save(file, _study(arm, size, warm_start(arm.seed, size, folder)))
    return torch.load(file, weights_only=True)


def _study(arm: Arm, size: Size, warm: dict[str, Any]) -> dict[str, Any]:
    run, components, reward = open_run(arm, size.steps)
    run.lm.network.load_state_dict(warm["lm"])
    _optimizer(run).load_state_dict(copy.deepcopy(warm["optimizer"]))
    sources = len(run.corpus.source_names)
    critics = {
        name: build_critic(settings, run.lm.width, sources, arm.seed)
        for name, (_, settings) in CRITICS.items()
    }
    previous: dict[Reward, Step | None] = {"paired": None, "absolute": None}
    rows: dict[str, list[float]] = {"source": [], "paired": [], "absolute": []}
    points: list[dict[str, Tensor]] = []
    at = {round((point + 0.5) * size.steps / POINTS) for point in range(POINTS)}
    for number in range(size.steps):
        if number in at:
            points.append(_point(arm, size, run, warm, critics))
        step = train_step(components, run.session.state)
        for name, critic in critics.items():
            critic.learn(previous[CRITICS[name][0]], step.features)
        assert step.reward is not None and reward.loss_before is not None
        rewards: dict[Reward, float] = {"paired": step.reward, "absolute": step.reward - reward.loss_before}
        previous = {kind: dataclasses.replace(step, reward=value) for kind, value in rewards.items()}
        for name, value in {"source": int(step.trained.windows.source[step.action]), **rewards}.items():
            rows[name].append(value)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()} | {
        "points": {name: torch.stack([point[name] for point in points]) for name in points[0]}
    }


def _point(
    arm: Arm, size: Size, run: Run, warm: dict[str, Any], critics: dict[str, TDCritic]
) -> dict[str, Tensor]:
    truth = _truth(warm) if arm.theta == "reset" else brute_force(run, size.per_point)
    found = {"effect": truth.effect, "source": truth.features.source}
    return found | {name: critic.values(truth.features).double() for name, critic in critics.items()}


# What the runs say -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signal:
    """What rewards tell about the sources of the credited windows.

    Attributes:
        slope: of the reward on the true value of the source.
        error: its standard error.
        noise: standard deviation of the rewards around that line, nats per token.
        spread: standard deviation of the true value over the credited windows, nats per token.
    """

    slope: float
    error: float
    noise: float
    spread: float


def source_values(record: dict[str, Any]) -> np.ndarray:
    """m, the mean effect of each source over all points, nats per token."""
    effect, source = (record["points"][name].numpy() for name in ("effect", "source"))
    return np.array([effect[source == each].mean() for each in range(int(source.max()) + 1)])


def signal(record: dict[str, Any], reward: Reward) -> Signal:
    """Least squares of a run's rewards, each less a running mean of those before it: a level drifts."""
    values = source_values(record)[record["source"].long().numpy()][1:]
    rewards = record[reward].numpy()
    rewards = rewards[1:] - running_mean(rewards)[:-1]
    fit = stats.linregress(values, rewards)
    noise = float(np.std(rewards - fit.intercept - fit.slope * values))
    return Signal(float(fit.slope), float(fit.stderr), noise, float(values.std()))


def running_mean(values: np.ndarray, memory: float = 0.95) -> np.ndarray:
    """Exponential mean of the values up to each one, bias corrected."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total, weight = memory * total + value, memory * weight + 1
        means.append(total / weight)
    return np.array(means)


def steps_to(errors: float, share: float, noise: float, spread: float) -> float:
    """Steps after which a slope of this size is so many standard errors from 0: the error after n steps is
    noise/(spread √n)."""
    return (errors * noise / (share * spread)) ** 2


def of_sources(record: dict[str, Any], critic: str) -> tuple[float, float]:
    """Slope on m, and Spearman's ρ with it, of the mean Q of each source in the second half of a run."""
    points, half = record["points"], POINTS // 2
    q, source = points[critic][half:].numpy(), points["source"][half:].numpy()
    values = source_values(record)
    found = np.array([q[source == each].mean() for each in range(len(values))])
    return float(stats.linregress(values, found).slope), rank_correlation(found, values)


def of_windows(record: dict[str, Any], critic: str) -> tuple[float, float]:
    """Slope on the effects of windows, and ρ with them, of Q in the second half of a run."""
    half = POINTS // 2
    q, effect = (record["points"][name][half:].numpy() for name in (critic, "effect"))
    return _slope_and_rank(q, effect)


def _slope_and_rank(q: np.ndarray, effect: np.ndarray) -> tuple[float, float]:
    """Over the last axis, of rows that are centred each."""
    q, effect = (np.atleast_2d(x - x.mean(-1, keepdims=True)) for x in (q, effect))
    ranks = [rank_correlation(a, b) for a, b in zip(q, effect, strict=True)]
    return float((q * effect).sum() / (effect**2).sum()), float(np.mean(ranks))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(stats.spearmanr(a, b).statistic)


def taught(critic: str, truth: Truth, seed: int, steps: int) -> tuple[float, float]:
    """Slope and ρ, on every other window, of a critic that was taught the effects of the windows between."""
    rows = torch.arange(len(truth.effect))
    learnt, fresh = truth.features.take(rows[::2]), truth.features.take(rows[1::2])
    sources = int(truth.features.source.max()) + 1
    made = build_critic(CRITICS[critic][1], truth.features.hidden.shape[1], sources, seed)
    order = torch.randint(len(learnt), (steps,), generator=torch.Generator().manual_seed(seed))
    for row in order.tolist():
        made.learn(_lesson(learnt.take(slice(row, row + 1)), truth.effect[2 * row].item()), fresh)
    effect = truth.effect[1::2].numpy()
    return _slope_and_rank(made.values(fresh).double().numpy(), effect)


def _lesson(window: Features, effect: float) -> Step:
    """A step on this window alone whose reward is the effect itself."""
    offer = Offer.of(_no_text(window))
    return Step(
        features=window,
        scores=torch.zeros(1),
        weights=torch.ones(1),
        loss=0.0,
        index=0,
        offer=offer,
        trained=offer,
        action=0,
        reward=effect,
    )
