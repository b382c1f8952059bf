"""Two processes make the run of one: the same gradients, rewards, policy and log; only rank 0 writes.

The processes are started as `torchrun` starts them, by environment variables, on the CPU with gloo.
Sums over ranks are taken in another order than in one process, so results agree closely, not to the bit.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks import in_processes
from tests.runs import Finished, assert_same_state, tiny

from curriq import parallel
from curriq.config import RunConfig
from curriq.runlog.read import read_metrics, read_summary
from curriq.train.run import load_run, prepare, resume, train

WORLD = 2
REPOSITORY = Path(__file__).parents[2]
RUNS: dict[str, dict[str, Any]] = {
    "soft-q": {"num_candidates": 7, "td_into_theta": True},
    "one window": {"selector": "random-single"},
    "uncertainty": {"selector": "uncertainty", "num_candidates": 5, "micro_batch": 2},
}


def train_and_keep_theta(configs: dict[str, RunConfig], folder: Path) -> None:
    """Each rank is told a folder of its own, so that what it writes can be seen."""
    for name, config in configs.items():
        run = prepare(config.override(run_dir=str(folder / name / f"rank-{parallel.rank()}")))
        run.session.train()
        torch.save(run.lm.network.state_dict(), folder / f"{name}-{parallel.rank()}.pt")


def assert_close_runs(a: Path, b: Path) -> None:
    ours, theirs = Finished(a), Finished(b)
    assert ours.candidates["window_id"] == theirs.candidates["window_id"]
    for column in ("weight", "loss", "score", "q"):
        pairs = zip(ours.candidates[column], theirs.candidates[column], strict=True)
        for x, y in pairs:
            assert x == (None if y is None else pytest.approx(y, rel=1e-4, abs=1e-5)), column
    for row, expected in zip(ours.rows, theirs.rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)
        for name in ("train/loss", "train/mean_loss", "reward", "validation/loss"):
            assert row.get(name) == (pytest.approx(expected[name], rel=1e-6) if name in expected else None)


@pytest.mark.slow
def test_whole_runs_and_only_rank_0_writes(tmp_path):
    configs = {name: tiny(**overrides) for name, overrides in RUNS.items()}
    configs["dropout"] = tiny(dropout=0.1, td_into_theta=True, num_candidates=7)
    in_processes(WORLD, train_and_keep_theta, configs, tmp_path)
    for name, config in configs.items():
        assert not (tmp_path / name / "rank-1").exists()
        thetas = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(WORLD)]
        assert_same_state(*thetas)
        if name != "dropout":  # ranks draw dropout masks of their own
            train(config.override(run_dir=str(tmp_path / name / "alone")))
            assert_close_runs(tmp_path / name / "rank-0", tmp_path / name / "alone")


class InterruptRankOne:
    def measure(self, step) -> dict[str, float]:
        if step.index == 2 and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return {}


def interrupt_then_resume(config: RunConfig) -> None:
    run = prepare(config)
    run.session.probes.append(InterruptRankOne())
    halfway = run.session.train()
    assert not halfway.finished
    assert run.session.state.step == 3
    parallel.barrier()
    assert resume(config.log.run_dir).finished


def test_ctrl_c_on_one_rank_stops_both_and_both_resume(tmp_path):
    config = tiny(num_candidates=7)
    in_processes(WORLD, interrupt_then_resume, config.override(run_dir=str(tmp_path / "two")))
    train(config.override(run_dir=str(tmp_path / "one")))
    assert_close_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_torchrun(tmp_path):
    """The real launcher and program, and a single process that goes on where two stopped."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    program = ["-m", "curriq", "train", "--preset", "smoke", "--threads", "1", "--run-dir", "run"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(
        [*torchrun, *program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test loss") == 1
    assert len(read_metrics(tmp_path / "run")) == 12
    assert load_run(tmp_path / "run", steps=14).session.train().finished
    assert read_summary(tmp_path / "run")["steps"] == 14
