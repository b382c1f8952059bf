"""Who learns from what horizon: would the Bellman target change how Q of `recommended` ranks windows?

    python experiments/horizon.py               # minutes on one core
    python experiments/horizon.py --seeds 0 --steps 100

For each seed one run of `recommended`, with the Bellman target that the preset does without, is recorded at
the size of preset `small`: what its critic was asked to learn in each step, and at which β. Then critics with
other settings learn from the very same transitions, in the same order. Printed per critic:

  rho of Q    Spearman's ρ between its Q and that of the run, over all windows that the run read; the lowest
              of the seeds
  difference  largest difference of the two Qs, both centred, over the standard deviation of the run's Q
  fresh       ρ between Q and the effects of a probe before Q has learnt from it, from the fifth probe on

The first critic has the run's own settings, and must be equal to the run's to the bit.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curriq.config import RunConfig
from curriq.presets import own_settings, preset
from curriq.rng import Generators
from curriq.select.stream_filter import build_filter
from curriq.softq.critic import TDCritic
from curriq.softq.temperature import FixedBeta, rank_correlation
from curriq.train.loop import train_step
from curriq.train.run import prepare
from curriq.types import Cost, Features, Metrics, Step

CRITICS: dict[str, dict[str, Any]] = {
    "the run's own": {},
    "gamma = 0": {"gamma": 0.0},
    "gamma = 0.99": {"gamma": 0.99},
    "y = 0": {"bellman": False},
    "tau = 1": {"polyak_tau": 1.0},
}
INITIALISATION = "another initialisation"
"""Not a horizon: the run's own settings from other initial weights and other replay draws, for scale."""


@dataclass
class Recorder:
    """The critic of a run, and what it was asked to learn: transition, H_k, β."""

    critic: TDCritic

    def __post_init__(self) -> None:
        self.needs_reward = True
        self.asked: list[tuple[Step | None, Features, float]] = []

    def values(self, features: Features) -> Tensor:
        return self.critic.values(features)

    def policy(self, q: Tensor, features: Features) -> Tensor:
        return self.critic.policy(q, features)

    def learn(self, previous: Step | None, features: Features) -> tuple[Metrics, Cost]:
        self.asked.append((previous, features, self.critic.temperature.beta))
        return self.critic.learn(previous, features)

    def state_dict(self) -> dict[str, Any]:
        return self.critic.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(state)


def record(seed: int, steps: int, folder: str) -> tuple[Recorder, Features, RunConfig, int]:
    """A run's recorder, all windows that it read, its configuration, and how many sources it has."""
    config = (
        preset("small")
        .override(**own_settings("recommended"))
        .override(bellman=True, steps=steps, seed=seed, split_seed=seed, threads=1, run_dir=folder)
    )
    run = prepare(config)
    critic = run.session.components.critic
    assert isinstance(critic, TDCritic)
    recorder = Recorder(critic)
    components = dataclasses.replace(run.session.components, critic=recorder)
    read: list[Features] = []
    for _ in range(steps):
        step = train_step(components, run.session.state)
        read += [Features.before_forward(part) for part in step.offer.judged]
    return recorder, Features.cat(read), run.config, len(run.corpus.source_names)


def learn_again(
    settings: dict[str, Any], recorder: Recorder, config: RunConfig, sources: int, seed: int
) -> tuple[TDCritic, float]:
    """A critic with these settings after the recorded transitions, and its mean ρ with fresh effects."""
    changed = config.override(**settings)
    _, critic = build_filter(changed, sources, Generators(seed), target=None)
    critic.temperature = FixedBeta(1.0)
    fresh = []
    for previous, features, beta in recorder.asked:
        critic.temperature.beta = beta
        if previous is not None and previous.effects is not None:
            q = critic.values(previous.effects.features)
            fresh.append(rank_correlation(q, previous.effects.effect))
        critic.learn(previous, features)
    return critic, float(np.mean(fresh[4:])) if len(fresh) > 4 else float("nan")


def compare_with(run: Tensor, other: Tensor) -> tuple[float, float]:
    """Spearman's ρ of two Qs of the same windows, and their largest centred difference over the first's
    standard deviation."""
    difference = (other - other.mean()) - (run - run.mean())
    return rank_correlation(run, other), (difference.abs().max() / run.std()).item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 7, 8])
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args(arguments)
    found: dict[str, list[tuple[float, float, float]]] = {}
    windows = 0
    for seed in options.seeds:
        with TemporaryDirectory() as folder:
            recorder, read, config, sources = record(seed, options.steps, folder)
        own = recorder.critic.values(read)
        windows += len(read)
        for name, settings in {**CRITICS, INITIALISATION: {}}.items():
            shifted = seed + 1000 if name == INITIALISATION else seed
            critic, fresh = learn_again(settings, recorder, config, sources, shifted)
            q = critic.values(read)
            if name == "the run's own":
                assert torch.equal(q, own), "the transitions do not give the run's critic again"
            found.setdefault(name, []).append((*compare_with(own, q), fresh))
    print(f"seeds {options.seeds}, {options.steps} steps, {windows:,} windows read")
    print(f"{'critic':24} rho of Q  difference   fresh")
    for name, rows in found.items():
        rho, difference, fresh = np.array(rows).T
        print(f"{name:24} {rho.min():8.4f}  {difference.mean():10.3f}  {fresh.mean():+6.3f}")


if __name__ == "__main__":
    main()
