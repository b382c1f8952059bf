"""`experiments/credit.py`, `horizon.py` and `shuffled_rewards.py`: what they compute, and that they run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import credit, horizon, shuffled_rewards
from tests.helpers import finished_step
from tests.runs import tiny

from curriq.select.base import NoCritic
from curriq.train.run import train
from curriq.types import Features

ROOT = Path(__file__).resolve().parents[2]


def record(slope: float, noise: float, steps: int = 4000, level: float = 0.0, seed: int = 0) -> dict:
    """A run as `credit.study` keeps it: rewards a line in the sources' values plus noise, and a Q that has
    learnt `slope` of the values of sources and windows."""
    draws = np.random.default_rng(seed)
    values = np.array([0.3, -0.1, 0.05])
    source = draws.integers(3, size=steps)
    rewards = slope * values[source] + noise * draws.normal(size=steps)
    of_windows = np.tile(np.repeat([0, 1, 2], 40), (credit.POINTS, 1))
    effect = values[of_windows] + 0.02 * draws.normal(size=of_windows.shape)
    points = {"effect": effect, "source": of_windows, "paired source": slope * values[of_windows]}
    points["paired last"] = slope * effect + 7.0
    return {
        "source": torch.tensor(source, dtype=torch.float64),
        "paired": torch.tensor(rewards),
        "absolute": torch.tensor(rewards + level * np.arange(steps) / steps),
        "points": {name: torch.tensor(value) for name, value in points.items()},
    }


def test_the_slope_of_rewards_is_recovered_with_its_standard_error():
    found = [credit.signal(record(0.25, 0.5, seed=seed), "paired") for seed in range(30)]
    slopes = np.array([each.slope for each in found])
    assert slopes.mean() == pytest.approx(0.25, abs=0.03)
    assert slopes.std() == pytest.approx(np.mean([each.error for each in found]), rel=0.4)
    assert np.mean([each.noise for each in found]) == pytest.approx(0.5, rel=0.03)


def test_errors_of_the_measured_truth_do_not_flatten_the_slope():
    """Errors δ, −2δ, δ of the values 0.2, 0 and −0.2 leave their covariance with the rewards as it is and add
    2δ² to their variance, more than half of it; the windows scatter as such errors would have it."""
    delta = 0.2 / np.sqrt(3) / np.sqrt(2)
    truth, errors = np.array([0.2, 0.0, -0.2]), delta * np.array([1, -2, 1])
    scatter = np.array([-1.0, 1.0] * 20)
    scatter *= np.sqrt(2) * delta / (scatter.std(ddof=1) / np.sqrt(40))
    effect = np.concatenate([each + scatter for each in truth + errors])
    points = {"effect": torch.tensor(effect)[None], "source": torch.arange(3).repeat_interleave(40)[None]}
    source = np.random.default_rng(0).integers(3, size=30_000)
    rewards = torch.tensor(0.25 * truth[source])
    run = {"source": torch.tensor(source), "paired": rewards, "points": points}
    found = credit.signal(run, "paired")
    assert found.slope == pytest.approx(0.25, rel=0.02)
    assert found.spread == pytest.approx(truth.std(), rel=0.02)


def test_a_drifting_level_is_taken_out_by_the_rewards_before():
    steady, drifting = (credit.signal(record(0.25, 0.1, level=level), "absolute") for level in (0.0, 20.0))
    assert drifting.slope == pytest.approx(steady.slope, abs=0.01)
    assert drifting.noise == pytest.approx(steady.noise, rel=0.02)


def test_the_steps_to_three_standard_errors_are_those_after_which_a_run_has_them():
    share, noise = 0.1, 0.3
    once = credit.signal(record(share, noise), "paired")
    steps = round(credit.steps_to(3, share, once.noise, once.spread))
    errors = [credit.signal(record(share, noise, steps, seed=seed), "paired").error for seed in range(20)]
    assert share / np.mean(errors) == pytest.approx(3, rel=0.15)
    assert credit.steps_to(3, share / 4, noise, 1.0) == 16 * credit.steps_to(3, share, noise, 1.0)


def test_q_is_compared_with_the_values_of_sources_and_of_windows():
    found = record(0.25, 0.5)
    slope, rho = credit.of_sources(found, "paired source")
    assert (slope, rho) == (pytest.approx(0.25, abs=0.05), pytest.approx(1))
    assert credit.of_windows(found, "paired last") == (pytest.approx(0.25), pytest.approx(1))


def row(windows: int, draws: float, composition: float) -> credit.Row:
    arm = credit.Arm("mixture", windows, "reset", 0)
    noise = np.sqrt(draws / credit.REWARD_WINDOWS + composition / windows)
    nothing = np.zeros((1, 2))
    return credit.Row(arm, "paired", 1 / windows, 0.1, noise, 0.02, nothing, nothing)


def test_the_extrapolation_finds_both_parts_of_the_noise():
    far = credit.extrapolate([row(n, 0.8, 0.2) for n in (1, 2, 4, 16, 64)], "reset", "paired")
    assert far.noise == pytest.approx(np.sqrt(1.0 / 256))
    assert far.steps == pytest.approx(9 * (1.0 / 256) * 256**2 / 0.02**2)


def test_equal_values_draw_all_actions_and_the_credited_window_is_the_one_trained_on():
    run, components, _ = credit.open_run(credit.Arm("single", 4, "reset", 0), 40)
    steps = [credit.train_step(components, run.session.state) for _ in range(40)]
    assert {step.action for step in steps} == {0, 1, 2, 3}
    assert all(step.weights[step.action] == 1 for step in steps)


@pytest.mark.long
def test_the_study_runs_from_its_command_and_is_continued(tmp_path, capsys):
    words = ["--quick", "--seeds", "0", "--folder", str(tmp_path)]
    call = [sys.executable, "experiments/credit.py", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    made = {file: file.stat().st_mtime_ns for file in tmp_path.glob("**/*.pt")}
    assert len(made) == 7
    credit.main(words)
    assert capsys.readouterr().out == first
    assert made == {file: file.stat().st_mtime_ns for file in made}
    assert (tmp_path / "quick" / "credit.png").stat().st_size > 10_000
    lines = re.findall(r"^(mixture|single) +(\d+) +(reset|moving) +(paired|absolute) +([\d.]+) ", first, re.M)
    assert len(lines) == 12
    assert {float(share) for name, *_, share in lines if name == "mixture"} == {1.0, 0.25}
    assert {float(share) for name, *_, share in lines if name == "single"} == {1.0}
    assert "At N = M = 256" in first


def test_other_horizons_learn_from_the_same_transitions(capsys):
    horizon.main(["--seeds", "0", "--steps", "34"])
    printed = capsys.readouterr().out
    assert re.search(r"the run's own +1\.0000 +0\.000", printed)
    assert all(name in printed for name in (*horizon.CRITICS, horizon.INITIALISATION))


class Listener(NoCritic):
    def __init__(self) -> None:
        self.heard: list[float] = []

    def learn(self, previous, features):
        self.heard.append(previous.reward)
        return super().learn(previous, features)


def test_the_control_learns_from_recent_rewards_and_hardly_ever_from_the_steps_own():
    listener = Listener()
    made = shuffled_rewards.ShuffledRewards(listener, torch.Generator().manual_seed(0))
    features = Features(hidden=torch.zeros(3, 2), loss=torch.zeros(3))
    for number in range(400):
        made.learn(finished_step(features, reward=float(number)), features)
    last, half = np.array(listener.heard[shuffled_rewards.MEMORY :]), (shuffled_rewards.MEMORY - 1) / 2
    assert abs(last.mean()) < 2  # no level
    assert (last.min(), last.max()) == (-half, half)
    assert (last == half).mean() < 0.1  # the step's own is the greatest of the last


def test_the_control_trains_as_a_selector_of_ones_own(tmp_path):
    selector = f"{ROOT}/experiments/shuffled_rewards.py:build"
    config = tiny(steps=4, selector=selector, reward="paired", run_dir=str(tmp_path / "run"))
    assert train(config).summary["steps"] == 4
