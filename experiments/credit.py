"""Does Q converge to the value of upweighting a candidate? Sampled credit against brute force.

    python experiments/credit.py                # under an hour on one core; a stopped call is continued
    python experiments/credit.py --quick        # the same in a minute, too short to say anything

Whether Q is right can be seen where the policy does not follow it. So the weights stay uniform; then no step
depends on any Q, and several critics learn from the same transitions, with both rewards. Each run starts from
one trained θ per seed, with its AdamW moments, and either puts θ back after every step (`reset`) or goes on
(`moving`).

Truth is measured by brute force: the optimizer takes a step on one window alone, and all reward windows are
measured before and after, 128 windows of each source; under a moving θ 8 at each of 8 points of the run. A
source's value m is the mean of its windows' effects.

Printed per arm, means over seeds:

  slope       of the reward on the value m of the credited window's source: the share of the true scale
              that reaches Q's target, with its standard error; theory says 1/N for a mixture, and 1 for a
              single action
  steps to 3  steps after which a slope of the size that theory says is three standard errors from 0
  Q source    of a critic that sees the source: slope of Q on m (± over seeds), and Spearman's ρ
  Q last      of a critic that sees the last token's hidden state: slope of Q on the windows' effects, and ρ

then what two critics reach that are taught the effects themselves, and what follows for N = M = 256.
"""

import argparse
import copy
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy import optimize, stats
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
from curriq.types import Features, Offer, Step, Windows

Formulation = Literal["mixture", "single"]
Theta = Literal["reset", "moving"]
Reward = Literal["paired", "absolute"]

WARM_WINDOWS = 16
"""N of the training before every run."""
REWARD_WINDOWS = 16
"""M."""
POINTS = 8
"""Points of a run at which Q is compared with the truth."""
CRITICS: dict[str, tuple[Reward, dict[str, Any]]] = {
    "paired source": ("paired", {"q_features": ("source",), "gamma": 0.0, "q_standardise": True}),
    "absolute source": ("absolute", {"q_features": ("source",), "gamma": 0.0, "q_standardise": True}),
    "paired last": ("paired", {"q_features": ("last",), "gamma": 0.0, "q_standardise": True}),
    "absolute last": ("absolute", {"q_features": ("last",), "gamma": 0.0, "q_standardise": True}),
}
"""The reward that a critic learns from, and its settings. With γ = 0 the target is the reward itself."""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        at_one: windows of each source whose effects are measured at one θ.
        per_point: the same at each of several θ.
        warm: steps of training before every run.
        steps: of a run.
        windows: N of the arms. With equal Q-values a single action is the same at every N.
    """

    at_one: int = 128
    per_point: int = 8
    warm: int = 400
    steps: int = 2000
    windows: Mapping[Formulation, Sequence[int]] = field(
        default_factory=lambda: {"mixture": (1, 2, 4, 16, 64), "single": (4,)}
    )


QUICK = Size(at_one=2, per_point=1, warm=10, steps=16, windows={"mixture": (1, 4), "single": (4,)})


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
        reward_windows=REWARD_WINDOWS,
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
        run, components, _ = open_run(Arm("mixture", WARM_WINDOWS, "moving", seed), size.warm)
        for _ in range(size.warm):
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
        assert step.reward is not None
        assert reward.loss_before is not None
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
        slope: of the reward on the true value of the source, corrected for the error of the values, which are
            measured on a number of windows.
        error: its standard error.
        noise: standard deviation of the rewards around that line, nats per token.
        spread: standard deviation of the true value over the credited windows, nats per token.
    """

    slope: float
    error: float
    noise: float
    spread: float


def measured(record: dict[str, Any]) -> list[np.ndarray]:
    """The effects of windows of each source, over all points at which the truth was measured afresh."""
    effect, source = (record["points"][name].numpy() for name in ("effect", "source"))
    if (effect == effect[0]).all():
        effect, source = effect[0], source[0]
    return [effect[source == each] for each in range(int(source.max()) + 1)]


def source_values(record: dict[str, Any]) -> np.ndarray:
    """m, the mean effect of each source, nats per token."""
    return np.array([effects.mean() for effects in measured(record)])


def signal(record: dict[str, Any], reward: Reward) -> Signal:
    """Least squares of a run's rewards, each less a running mean of those before it: a level drifts."""
    credited = record["source"].long().numpy()[1:]
    values = source_values(record)[credited]
    rewards = record[reward].numpy()
    rewards = rewards[1:] - running_mean(rewards)[:-1]
    fit = stats.linregress(values, rewards)
    noise = float(np.std(rewards - fit.intercept - fit.slope * values))
    # Errors in the values flatten the line by the share that they have in the values' variance.
    errors = np.array([stats.sem(effects) ** 2 for effects in measured(record)])[credited]
    reliable = max(0.1, 1 - float(errors.mean() / values.var()))
    return Signal(
        fit.slope / reliable, fit.stderr / reliable, noise, float(values.std()) * math.sqrt(reliable)
    )


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
    number = torch.zeros(1, dtype=torch.long)
    offer = Offer.of(Windows(tokens=number[:, None], ids=number, source=number))  # the critic reads no text
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


# Tables and the figure ---------------------------------------------------------------------------------

FAR = 256
"""N and M of the paper."""


def arms(seeds: Sequence[int], size: Size) -> list[Arm]:
    """The grid, one seed after another. With one window a mixture is a single action."""
    return [
        Arm(formulation, windows, theta, seed)
        for seed in seeds
        for theta in ("reset", "moving")
        for formulation, sizes in size.windows.items()
        for windows in sizes
    ]


@dataclass(frozen=True)
class Row:
    """An arm and a reward: means over the seeds."""

    arm: Arm
    reward: Reward
    slope: float
    error: float
    noise: float
    spread: float
    by_source: np.ndarray
    by_window: np.ndarray

    @property
    def steps(self) -> float:
        return steps_to(3, self.arm.share, self.noise, self.spread)

    def text(self) -> str:
        """One line of the table."""
        arm = self.arm
        (source, error), (last, last_error) = map(
            _mean_and_error, (self.by_source[:, 0], self.by_window[:, 0])
        )
        return (
            f"{arm.formulation:8}{arm.windows:4}  {arm.theta:7} {self.reward:9} {arm.share:5.3f}  "
            f"{self.slope:+6.3f} ± {self.error:.3f}  {self.steps:11,.0f}  "
            f"{source:+6.3f} ± {error:.3f} {self.by_source[:, 1].mean():+5.2f}  "
            f"{last:+7.4f} ± {last_error:.4f} {self.by_window[:, 1].mean():+5.2f}"
        )


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(stats.sem(values)) if len(values) > 1 else math.nan


def summarise(records: dict[Arm, dict[str, Any]]) -> list[Row]:
    """Means over the seeds of every arm and reward; errors of slopes from the regressions."""
    grouped: dict[Arm, list[dict[str, Any]]] = {}
    for arm, record in records.items():
        grouped.setdefault(dataclasses.replace(arm, seed=0), []).append(record)
    rows = []
    for arm, found in grouped.items():
        for reward in ("paired", "absolute"):
            signals = [signal(record, reward) for record in found]
            rows.append(
                Row(
                    arm=arm,
                    reward=reward,
                    slope=float(np.mean([each.slope for each in signals])),
                    error=float(np.sqrt(np.sum([each.error**2 for each in signals])) / len(signals)),
                    noise=float(np.sqrt(np.mean([each.noise**2 for each in signals]))),
                    spread=float(np.sqrt(np.mean([each.spread**2 for each in signals]))),
                    by_source=np.array([of_sources(record, f"{reward} source") for record in found]),
                    by_window=np.array([of_windows(record, f"{reward} last") for record in found]),
                )
            )
    return rows


@dataclass(frozen=True)
class Extrapolation:
    """What noise and steps become at N = M = 256, from the mixtures of one kind of θ.

    The variance of a reward is draws/M + windows/N: which held-out windows are drawn decides on the level and
    on the gain, and which windows are in the mixture on the gain.
    """

    noise: float
    steps: float
    spread: float


def extrapolate(rows: list[Row], theta: Theta, reward: Reward) -> Extrapolation:
    mixtures = [row for row in rows if (row.arm.theta, row.reward) == (theta, reward)]
    mixtures = [row for row in mixtures if row.arm.formulation == "mixture"]
    variances = np.array([row.noise**2 for row in mixtures])
    design = np.array([[1 / REWARD_WINDOWS, 1 / row.arm.windows] for row in mixtures])
    of_draws, of_windows_ = optimize.nnls(design / variances[:, None], np.ones(len(mixtures)))[0]
    noise = math.sqrt((of_draws + of_windows_) / FAR)
    spread = float(np.sqrt(np.mean([row.spread**2 for row in mixtures])))
    return Extrapolation(noise, steps_to(3, 1 / FAR, noise, spread), spread)


HEADER = (
    "arm        N  theta   reward   theory       slope     steps to 3   Q source: slope, rho   "
    "Q last: slope, rho"
)


def print_tables(rows: list[Row], truths: list[dict[str, Any]], steps: int) -> None:
    print(HEADER)
    for row in rows:
        print(row.text())
    print("\nTrue effects by source, 1e-4 nats per token, theta reset (standard error over windows):")
    for seed, saved in enumerate(truths):
        print(f"  {seed}: " + "  ".join(_source_effects(saved)))
    for name in ("paired source", "paired last"):
        found = np.array([taught(name, _truth(saved), seed, steps) for seed, saved in enumerate(truths)])
        print(
            f"Taught the effects themselves, {steps} steps, on fresh windows: Q {name.split()[1]:6} slope "
            f"{found[:, 0].mean():.3f}, rho {found[:, 1].mean():+.2f}"
        )
    groups = len(truths[0]["sources"])
    print(f"\nAt N = M = {FAR}, by slope 1/N and reward variance draws/M + windows/N:")
    for theta in ("reset", "moving"):
        for reward in ("paired", "absolute"):
            far = extrapolate(rows, theta, reward)
            print(
                f"  {theta:7} {reward:9} noise {far.noise:.1e}, spread of the true values {far.spread:.1e}, "
                f"their share {far.spread / FAR:.1e}; steps to 3 {far.steps:12,.0f}, for one of "
                f"{groups} groups {groups * far.steps:14,.0f}"
            )


def _source_effects(saved: dict[str, Any]) -> list[str]:
    effect, source = saved["effect"].numpy(), saved["source"].numpy()
    own = [effect[source == each] for each in range(len(saved["sources"]))]
    return [
        f"{name} {1e4 * values.mean():+.1f} ({1e4 * stats.sem(values):.1f})"
        for name, values in zip(saved["sources"], own, strict=True)
    ]


def draw(rows: list[Row], path: Path) -> None:
    """Recovered share of the true scale, and steps to three standard errors, over N."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    scale, steps = figure.subplots(1, 2)
    for axes in (scale, steps):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("candidates N")
        axes.spines[["top", "right"]].set_visible(False)
    sizes = np.array([1, FAR])
    scale.plot(sizes, 1 / sizes, color="0.6", linestyle=(0, (4, 2)), label="theory, 1/N and 1")
    scale.plot(sizes, [1, 1], color="0.6", linestyle=(0, (4, 2)))
    for row in rows:
        _draw_point(scale, steps, row)
    for reward in ("paired", "absolute"):
        far = extrapolate(rows, "moving", reward)
        steps.plot(FAR, far.steps, marker="*", markersize=12, color=COLOURS[reward], linestyle="none")
    notes = "filled: θ moves; open: θ is put back\n★: N = M = 256 and θ moves, extrapolated"
    steps.annotate(notes, (0.03, 0.97), xycoords="axes fraction", fontsize="small", va="top")
    scale.set_ylabel("slope of the reward on the true value")
    scale.set_ylim(1 / (4 * FAR), 4)
    steps.set_ylabel("steps to three standard errors")
    scale.legend(fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


COLOURS: dict[Reward, str] = {"paired": "C0", "absolute": "C1"}


def _draw_point(scale: Any, steps: Any, row: Row) -> None:
    """Filled under a moving θ; circles for mixtures, squares for single actions."""
    look = {
        "color": COLOURS[row.reward],
        "marker": "o" if row.arm.formulation == "mixture" else "s",
        "markerfacecolor": COLOURS[row.reward] if row.arm.theta == "moving" else "white",
        "linestyle": "none",
    }
    moved = row.arm.windows * (1.06 if row.arm.theta == "moving" else 0.94)
    named = row.arm.windows == 4 and row.arm.theta == "moving"
    scale.errorbar(
        moved, row.slope, row.error, **look, label=f"{row.arm.formulation}, {row.reward}" if named else None
    )
    steps.plot(moved, row.steps, **look)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/credit"), help="where the runs are kept")
    parser.add_argument("--figure", type=Path, help="PNG to draw (default: credit.png in the folder)")
    parser.add_argument("--quick", action="store_true", help="few arms of 16 steps, in a folder of their own")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else Size()
    folder = options.folder / "quick" if options.quick else options.folder
    records = {}
    for arm in (planned := arms(options.seeds, size)):
        began = time.monotonic()
        records[arm] = study(arm, size, folder)
        taken = time.monotonic() - began
        print(f"[{len(records)}/{len(planned)}] {arm.name} {taken:.0f} s", file=sys.stderr, flush=True)
    rows = summarise(records)
    print_tables(rows, [warm_start(seed, size, folder) for seed in options.seeds], size.steps)
    draw(rows, options.figure or folder / "credit.png")


if __name__ == "__main__":
    main()
