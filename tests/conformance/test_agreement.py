"""Ranks that come to disagree: rounding is levelled to rank 0's numbers, anything more stops all of them."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks import in_processes
from tests.runs import Finished, tiny

from curriq import parallel
from curriq.config import RunConfig
from curriq.errors import CurriqError
from curriq.langevin.retrieval import Retrieved
from curriq.runlog.read import read_metrics
from curriq.train.checkpoint import latest_checkpoint
from curriq.train.run import Run, prepare, resume, train

REPOSITORY = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"num_candidates": 5, "checkpoint_every": 2}
FILTER = SMALL | {
    "max_read_ratio": 3,
    "accept_fraction": 0.5,
    "q_features": ("source",),
    "credit": "counterfactual",
}
AT = 3


class Disturb:
    """A probe that changes something on rank 1 at the end of step AT − 1."""

    def __init__(self, run: Run, what: str) -> None:
        self.run, self.what = run, what

    def measure(self, step) -> dict[str, float]:
        if step.index != AT - 1 or parallel.rank() == 0:
            return {}
        parts = self.run.session.components
        with torch.no_grad():
            if self.what == "windows":
                parts.proposer.stream.read(1)
            elif self.what == "weights":
                for parameter in self.run.lm.parameters:
                    parameter.mul_(1.5)
            else:
                for parameter in parts.critic.online.parameters():
                    parameter.mul_(1 + {"Q": 0.02, "rounding": 1e-6}[self.what])
        return {}


def disturbed(config: RunConfig, what: str) -> Run:
    run = prepare(config)
    run.session.probes.append(Disturb(run, what))
    return run


def stops_and_resumes(folder: Path, cases: dict[str, tuple[dict[str, Any], str]]) -> None:
    for what, (overrides, message) in cases.items():
        steps = AT + (what == "weights")  # which are compared when a checkpoint is written
        config = tiny(**overrides, run_dir=str(folder / what))
        with pytest.raises(CurriqError, match=message) as error:
            disturbed(config, what).session.train()
        for part in (f"step {steps} stopped", "Resume from the last checkpoint", str(folder / what)):
            assert part in str(error.value)
        parallel.barrier()
        assert len(read_metrics(folder / what)) == steps
        parallel.barrier()
        assert resume(folder / what).finished


@pytest.mark.long
def test_a_rank_that_drifts_stops_all_and_all_resume(tmp_path):
    cases = {
        "Q": (SMALL, "differ in Q by 0.02 of its size"),
        "weights": (SMALL, "differ in the model's weights, one of them by 0.5"),
        "windows": ({**SMALL, "selector": "uniform"}, "different windows to train on"),
    }
    in_processes(2, stops_and_resumes, tmp_path, cases)
    for what, (overrides, _) in cases.items():
        train(tiny(**overrides, run_dir=str(tmp_path / "alone" / what)))
        alone, together = Finished(tmp_path / "alone" / what), Finished(tmp_path / what)
        assert together.candidates["window_id"] == alone.candidates["window_id"]
        assert latest_checkpoint(tmp_path / what).step == 6


def goes_on(folder: Path) -> None:
    config = tiny(**FILTER, run_dir=str(folder / "run"))
    run = disturbed(config, "rounding")
    assert run.session.train().finished
    critic = run.session.components.critic
    torch.save(critic.online.state_dict(), folder / f"phi-{parallel.rank()}.pt")


def test_rounding_does_not_grow_into_two_policies(tmp_path):
    in_processes(2, goes_on, tmp_path)
    first, second = (torch.load(tmp_path / f"phi-{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


class Elsewhere:
    """A retriever that takes the oldest windows of the buffer, as a search that rounding led elsewhere."""

    def retrieve(self, buffer):
        return Retrieved(buffer.live.nonzero().flatten()[:5], {})


def searches_elsewhere(folder: Path) -> None:
    buffer = {"proposer": "uniform-buffer", "buffer_size": 64, "ingest": 16, "encoder": "hashing"}
    run = prepare(tiny(**SMALL, **buffer, run_dir=str(folder / "run")))
    proposer = run.session.components.proposer
    if parallel.rank() == 1:
        proposer.phase = lambda step: Elsewhere()
    assert run.session.train().finished


def test_the_search_of_rank_0_decides(tmp_path):
    in_processes(2, searches_elsewhere, tmp_path)
    together = Finished(tmp_path / "run").candidates["window_id"]
    assert len(together) == 6 * 5


def differing_numbers() -> None:
    rank = parallel.rank()
    ours = torch.tensor([3.0, 4.0]) * (1 + 0.5 * rank)
    gaps = parallel.adopt_({"one": [ours], "none": [], "both": [torch.ones(2), torch.ones(1)]})
    assert ours.tolist() == [3.0, 4.0]
    assert gaps == {"one": 0.5, "none": 0.0, "both": 0.0}
    gone = torch.tensor([math.nan if rank else 1.0])
    assert parallel.adopt_({"gone": [gone]}) == {"gone": math.inf}
    assert parallel.from_rank_zero(f"rank {rank}") == "rank 0"
    assert parallel.all_equal(b"same")
    assert not parallel.all_equal(b"%d" % rank)
    parallel.require_same_rows(torch.tensor([7, 8]), "windows")
    different = {r"\(9 only on rank 1\)": [7, 8 + rank], "another order or number": [7] * (1 + rank)}
    for message, rows in different.items():
        with pytest.raises(parallel.RanksDiffer, match=message):
            parallel.require_same_rows(torch.tensor(rows), "windows")


def test_what_is_compared_and_adopted():
    in_processes(2, differing_numbers)


def different_text(folder: Path) -> None:
    text = folder / f"text-{parallel.rank()}.txt"
    text.write_text("\n\n".join(f"Sentence {i} of rank {parallel.rank()} is here." * 9 for i in range(200)))
    source = dataclasses.replace(tiny().data.sources[0], path=str(text))
    with pytest.raises(CurriqError, match="read different text"):
        prepare(tiny(sources=(source,), run_dir=str(folder / "run")))


def test_processes_that_read_different_text_are_refused(tmp_path):
    in_processes(2, different_text, tmp_path)


def test_one_process_compares_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *a, **k: pytest.fail("a collective"))
    assert train(tiny(steps=2, run_dir=str(tmp_path / "run"))).finished


PROGRAM = """
import sys
import torch
from curriq import cli, parallel
from curriq.train import session
step = session.train_step
def drifting(components, state):
    if state.step == 2 and parallel.rank() == 1:
        with torch.no_grad():
            for parameter in components.critic.online.parameters():
                parameter.mul_(1.02)
    return step(components, state)
session.train_step = drifting
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_command_says_so_and_ends_with_status_2(tmp_path):
    (tmp_path / "drifting.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    program = ["drifting.py", "train", "--preset", "smoke", "--threads", "1", "--run-dir", "run"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(
        [*torchrun, *program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert "curriq: step 2 stopped: the ranks differ in Q by 0.02" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert len(read_metrics(tmp_path / "run")) == 2
