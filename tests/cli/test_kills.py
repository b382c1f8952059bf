"""SIGKILL at any moment: the resumed run equals the one that was never touched, bit by bit.

A killed run is a process of its own, forked from a server that has loaded the libraries already, so that
a kill costs a second and not ten.
"""

import importlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.runs import assert_same_run, tiny

from curriq.config import load_toml, to_toml
from curriq.train.run import resume, train

SETTINGS = {
    "selector": "soft-q",
    "q_replay_size": 4,
    "alternating_period": 4,
    "checkpoint_every": 2,
    "eval_every": 3,
}

POINTS = {
    "before the first step": ("curriq.train.session:train_step", 1),
    "before the first checkpoint stands": ("curriq.train.checkpoint:fsync", 1),
    "in the middle of a step": ("curriq.lm.held_out:HeldOutReward.after", 4),
    "before a row": ("curriq.runlog.writers:MetricsLog.append", 4),
    "after a row, before its candidates": ("curriq.runlog.writers:CandidateLog.append", 4),
    "between the log and its checkpoint": ("curriq.train.checkpoint:Checkpointer.save", 3),
    "with half a checkpoint written": ("curriq.train.checkpoint:manifest_digest", 3),
    "before a checkpoint gets its name": ("curriq.train.checkpoint:Checkpointer.set_aside_from", 3),
    "before the old checkpoint goes": ("curriq.train.checkpoint:Checkpointer._prune", 4),
    "before the summary": ("curriq.train.session:write_summary", 1),
}
"""Name → the function at whose n-th call the process is killed, and n."""


def die_at(target: str, call: int) -> None:
    """Let the n-th call of a function kill this process."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), 0

    def fatal(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(owner, name, fatal)


def run(folder: Path, point: tuple[str, int] | None) -> None:
    """Start the run of a folder's `start.toml`, or go on with it, to its end or death."""
    if point is not None:
        die_at(*point)
    if any((folder / "checkpoints").glob("step-*")):
        resume(folder)
    else:
        train(load_toml(folder / "start.toml").override(run_dir=str(folder)))


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["curriq.train.run", "transformers.models.gpt2.modeling_gpt2", "datasets"])
    return context


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untouched")
    train(tiny(**SETTINGS, run_dir=str(folder)))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "start.toml").write_text(to_toml(tiny(**SETTINGS)), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(point, server, untouched, folder):
    process = server.Process(target=run, args=(folder, POINTS[point]))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL, "the run never came to the point"
    run(folder, None)
    assert_same_run(folder, untouched)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(seed, server, untouched, folder):
    """At random moments, through start, steps, checkpoints and resumes, until the run gets through."""
    draw = random.Random(seed)
    kills = 0
    while not (folder / "summary.json").exists():
        process = server.Process(target=run, args=(folder, None))
        process.start()
        time.sleep(draw.uniform(0.05, 0.4) + 0.02 * kills)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 3
    assert_same_run(folder, untouched)
