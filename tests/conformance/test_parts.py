"""Checkpoints in parts: what ranks write while training goes on, and what of it anybody reads."""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import open_lm
from tests.ranks import in_processes
from tests.runs import Finished, InterruptAt, tiny
from torch.distributed.tensor import DTensor

from curriq import parallel
from curriq.cli import main
from curriq.config import RunConfig
from curriq.errors import CurriqError
from curriq.evaluate.tasks import model_folder as evaluated_folder
from curriq.lm import stored
from curriq.presets import own_settings
from curriq.runlog.checkpoints import checkpoint_folders, has_weights, verify
from curriq.runlog.read import read_metrics
from curriq.train import parts
from curriq.train.checkpoint import latest_checkpoint
from curriq.train.estimate import estimate
from curriq.train.export import model_folder
from curriq.train.parts import joined, split
from curriq.train.run import load_run, prepare, resume, train
from curriq.train.session import Session

LLAMA = "random:llama:hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2"
GPT2 = "random:gpt2:hidden_size=32,num_hidden_layers=2,num_attention_heads=2"  # tied embeddings
FSDP: dict[str, Any] = own_settings("recommended") | {
    **{"engine": "fsdp", "num_candidates": 7, "micro_batch": 2, "sources": tiny().data.sources},
    **{"probe_windows": 5, "reward_every": 2, "checkpoint_every": 2, "checkpoint_keep": 9},
}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_state_without_its_parts_and_with_them_again(tmp_path):
    state = {"lm": {"a": torch.ones(2)}, "other": [torch.zeros(1), {"b": 3}], "none": None}
    plain, tensors = split(state)
    assert list(tensors) == ["lm/a"]
    again = joined(torch.load(_saved(plain, tmp_path), weights_only=True), tmp_path)
    assert again["lm"]["a"] == stored.Stored(tmp_path, "lm/a")
    assert again["other"][1] == {"b": 3}
    assert again["none"] is None


def _saved(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def test_weights_are_exported_piece_by_piece(tmp_path, monkeypatch):
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 4}
    monkeypatch.setattr(stored, "PIECE", 8)
    assert stored._pieces(sizes) == [["a", "b"], ["c"], ["d", "e"]]
    import torch.distributed.checkpoint as dcp

    tensors = {f"lm/{name}": torch.rand(size) for name, size in sizes.items()}
    dcp.save(tensors | {"moments": torch.ones(3)}, checkpoint_id=tmp_path / "parts", no_dist=True)
    stored.export_weights(tmp_path / "parts", "lm/", tmp_path)
    from safetensors.torch import load_file

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(sizes)
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[f"lm/{name}"])


# Runs --------------------------------------------------------------------------------------------------


def never_whole(tensor: DTensor, **options: Any) -> Any:
    raise AssertionError("a rank has put the whole of a tensor together")


def straight_and_stopped(folder: Path) -> None:
    DTensor.full_tensor = never_whole  # ty: ignore[invalid-assignment]
    for name, model in {"llama": LLAMA, "gpt2": GPT2}.items():
        config = tiny(**FSDP, model=model)
        assert train(config.override(run_dir=str(folder / name / "straight"))).finished
        run = prepare(config.override(run_dir=str(folder / name / "stopped")))
        run.session.probes.append(InterruptAt(2))
        assert not run.session.train().finished
        parallel.barrier()
        if parallel.rank() == 0 and name == "llama":
            exported(folder / name / "stopped")
        parallel.barrier()
        assert resume(folder / name / "stopped").finished


def exported(run: Path) -> None:
    """The model of a run that was stopped, on demand; the run goes on from the same checkpoint."""
    newest = checkpoint_folders(run / "checkpoints")[0]
    assert not has_weights(verify(newest))
    with pytest.raises(CurriqError, match=f"parts of its checkpoint: `curriq export {run} --model` writes"):
        open_lm(str(newest / "lm"))
    assert main(["export", str(run), "--model"]) == 0
    assert model_folder(run) == newest / "lm"
    older = checkpoint_folders(run / "checkpoints")[1]  # `curriq eval` of that one
    assert evaluated_folder(older) == (older / "lm", run)
    assert has_weights(verify(older))
    assert has_weights(verify(newest))
    assert main(["export", str(run), "--model"]) == 0
    assert not (newest / ".tmp-lm").exists()
    assert weights_of(newest / "lm")


@pytest.mark.long
def test_parts_are_whole_hashed_exported_and_gone_on_from(tmp_path):
    in_processes(2, straight_and_stopped, tmp_path)
    for name, model in {"llama": LLAMA, "gpt2": GPT2}.items():
        straight, stopped = tmp_path / name / "straight", tmp_path / name / "stopped"
        again, first = Finished(stopped), Finished(straight)
        assert again.rows == first.rows  # to the bit
        assert again.candidates == first.candidates
        assert again.weights == first.weights
        train(tiny(**FSDP, model=model, run_dir=str(tmp_path / name / "alone")))
        alone = weights_of(tmp_path / name / "alone" / "checkpoints" / "step-00000006" / "lm")
        last = straight / "checkpoints" / "step-00000006" / "lm"
        ours = weights_of(last)
        assert ours.keys() == alone.keys()
        for weight, expected in ((ours[name], alone[name]) for name in alone):
            # Adam moves a bias whose gradient is rounding alone, such as that of keys, in any direction.
            assert (weight - expected).norm() <= 1e-3 * expected.norm() + 1e-4
        config, expected = (
            json.loads((folder / "config.json").read_text())
            for folder in (last, tmp_path / name / "alone" / "checkpoints" / "step-00000006" / "lm")
        )
        assert config == expected
    run = tmp_path / "llama" / "straight"
    checkpoints = checkpoint_folders(run / "checkpoints")
    assert [path.name[-1] for path in checkpoints] == ["6", "4", "2", "0"]
    for path in checkpoints:
        manifest = verify(path)
        assert manifest["format"] == 4
        assert has_weights(manifest) == (path == checkpoints[0])
        files = manifest["files"]
        assert {"state.pt", "parts/.metadata", "parts/__0_0.distcp", "parts/__1_0.distcp"} <= set(files)
        on_disk = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        assert on_disk == {*files, "manifest.json"}
        for file, stated in files.items():
            assert hashlib.sha256((path / file).read_bytes()).hexdigest() == stated["sha256"]
    assert not [*(run / "checkpoints").glob(".*")]
    sizes = [sum(p.stat().st_size for p in (path / "parts").glob("__*")) for path in checkpoints]
    assert sizes[0] > 2.5 * sizes[-1]  # moments too
    rows = read_metrics(run)
    assert {row["step"] for row in rows if "time/checkpoint" in row} == {0, 2, 4}
    written = [row for row in rows if "time/checkpoint_written" in row]
    assert written[0]["step"] == 0
    assert all(row["checkpoint/bytes"] > 1e5 for row in written)


@pytest.mark.slow
def test_a_finished_run_is_pruned_to_its_model_and_one_process_goes_on(tmp_path, capsys):
    in_processes(2, train_once, tiny(**FSDP, model=LLAMA, run_dir=str(tmp_path / "run")))
    run = tmp_path / "run"
    assert load_run(run, steps=8).session.train().finished  # one process, in its own format
    newest = checkpoint_folders(run / "checkpoints")[0]
    assert verify(newest)["format"] == 3
    in_processes(2, go_on, run, 10)  # and two again, from a whole model
    assert latest_checkpoint(run).manifest["format"] == 4
    assert main(["verify", str(run)]) == 0
    assert main(["runs", "prune", str(run), "--keep-model", "--yes"]) == 0
    left = checkpoint_folders(run / "checkpoints")[0]
    assert {path.name for path in left.iterdir()} == {"lm", "manifest.json"}
    assert weights_of(model_folder(run))
    assert main(["verify", str(run)]) == 0
    with pytest.raises(CurriqError, match="prune` has removed its training state"):
        latest_checkpoint(run)


def train_once(config: RunConfig) -> None:
    assert train(config).finished


def go_on(run: Path, steps: int) -> None:
    assert resume(run, steps=steps).finished


# While training goes on ----------------------------------------------------------------------------------


class Slow:
    """`sha256` of a checkpoint in parts that takes as long as it is told."""

    def __init__(self) -> None:
        self.wait, self.entered = True, False

    def __call__(self, path: Path) -> str:
        self.entered = True
        while self.wait:
            time.sleep(0.02)
        return hashlib.sha256(path.read_bytes()).hexdigest()


class Watch:
    """Notes which checkpoints there are after each step, and lets the writing go on after step 3."""

    def __init__(self, folder: Path, slow: Slow) -> None:
        self.folder, self.slow, self.seen = folder, slow, dict[int, list[str]]()

    def measure(self, step) -> dict[str, float]:
        self.seen[step.index] = [path.name for path in checkpoint_folders(self.folder)]
        if step.index == 0:
            self.slow.wait = True
        if step.index == 3:
            while not self.slow.entered:
                time.sleep(0.02)
            self.slow.wait = False
        return {}


def goes_on_meanwhile(folder: Path, killed: bool) -> None:
    slow = Slow()
    slow.wait = False
    parts.sha256 = slow  # ty: ignore[invalid-assignment]
    config = tiny(**FSDP | {"checkpoint_every": 3, "steps": 7}, model=LLAMA, run_dir=str(folder / "run"))
    run = prepare(config)
    watch = Watch(folder / "run" / "checkpoints", slow)
    run.session.probes.append(watch)
    if killed:
        run.session.probes.append(KillAt(4))
        slow_for_ever(watch)
    assert run.session.train().finished
    # The checkpoint of step 3 is begun before step 3 runs, and durable only after it.
    assert watch.seen[3] == ["step-00000000"]
    assert checkpoint_folders(watch.folder)[0].name == "step-00000007"
    rows = read_metrics(folder / "run") if parallel.rank() == 0 else []
    waited = [row["step"] for row in rows if "time/checkpoint_written" in row]
    assert all(step in (0, 4, 5, 6) for step in waited)


def slow_for_ever(watch: Watch) -> None:
    measure = watch.measure

    def and_never_again(step) -> dict[str, float]:
        measured = measure(step)
        watch.slow.wait = step.index >= 0
        return measured

    watch.measure = and_never_again  # ty: ignore[invalid-assignment]


class KillAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def measure(self, step) -> dict[str, float]:
        if step.index == self.step:
            os._exit(0)
        return {}


@pytest.mark.slow
def test_steps_go_on_while_a_checkpoint_is_written(tmp_path):
    in_processes(2, goes_on_meanwhile, tmp_path, False)


@pytest.mark.long
def test_killed_while_a_checkpoint_is_written(tmp_path):
    """All ranks at once: the checkpoint before is the one to go on from."""
    in_processes(2, goes_on_meanwhile, tmp_path, True)
    run = tmp_path / "run"
    assert (run / "checkpoints" / ".tmp-step-00000003").is_dir()
    assert latest_checkpoint(run).step == 0
    assert resume(run).finished
    assert not [*(run / "checkpoints").glob(".tmp-*")]


def refused(folder: Path) -> None:
    """The disk of one rank is full: while a later checkpoint is written, and when the first one is."""
    writer = parts.dcp.FileSystemWriter
    full = {"now": True}

    class Full(writer):
        def write_data(self, plan: Any, planner: Any) -> Any:
            if full["now"] and parallel.rank() == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the file")
            return super().write_data(plan, planner)

    parts.dcp.FileSystemWriter = Full  # ty: ignore[invalid-assignment]
    config = tiny(**FSDP, model=LLAMA)
    message = "not saved: the checkpoint of step {} could not be written to .*: No space left on device"
    with pytest.raises(CurriqError, match=f"step 0, {message.format(0)}.*start again with the same command"):
        prepare(config.override(run_dir=str(folder / "first"))).session.train()
    run = prepare(config.override(run_dir=str(folder / "later")))
    full["now"] = False
    run.session.probes.append(FillAt(full))
    with pytest.raises(CurriqError, match=f"{message.format(2)}.*the checkpoint of step 0 is intact"):
        run.session.train()
    assert run.session.state.step < 5  # not at the next save only
    parallel.barrier()
    assert [path.name for path in checkpoint_folders(folder / "later" / "checkpoints")] == ["step-00000000"]
    assert not [*(folder / "later" / "checkpoints").glob(".tmp-*")]
    full["now"] = False
    parallel.barrier()
    assert resume(folder / "later").finished


def refused_on_rank_zero(folder: Path) -> None:
    """What rank 0 alone writes of a checkpoint cannot be written, or the run's folder has gone."""

    def stopped(session: Session, why: str) -> None:
        says = why if parallel.rank() == 0 else "rank 0 says why"
        with pytest.raises(CurriqError, match=says):
            session.train()
        parallel.barrier()

    for engine in ("fsdp", "ddp"):
        run_dir = folder / engine
        session = prepare(tiny(**FSDP | {"engine": engine}, model=LLAMA, run_dir=str(run_dir))).session
        session.save_lm = full_after_the_first(session.save_lm)
        stopped(session, "step 2 could not be written to .*: File too large")
        assert not [*(run_dir / "checkpoints").glob(".tmp-*")]
        session = load_run(run_dir).session
        session.probes.append(MoveAt(3, run_dir))
        stopped(session, "is gone: it was moved")


def full_after_the_first(save: Callable[[Path], object]) -> Callable[[Path], object]:
    def full(path: Path) -> object:
        if path.parent.name != ".tmp-step-00000000":
            raise Exception("File too large (os error 27)")  # as tokenizers, in Rust, says it
        return save(path)

    return full


class MoveAt:
    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder = step, folder

    def measure(self, step) -> dict[str, float]:
        if step.index == self.step and parallel.rank() == 0:
            self.folder.rename(self.folder.with_name("moved-" + self.folder.name))
        return {}


@pytest.mark.long
def test_what_rank_zero_cannot_write_stops_all_ranks(tmp_path):
    in_processes(2, refused_on_rank_zero, tmp_path)


def estimated(folder: Path) -> None:
    costs = {}
    for engine in ("ddp", "fsdp"):
        run = prepare(tiny(**FSDP | {"engine": engine}, model=LLAMA, run_dir=str(folder / engine)))
        costs[engine] = estimate(run)
    weights = 4 * sum(p.numel() for p in run.lm.network.parameters())
    whole, in_parts = (costs[engine].checkpoint_bytes for engine in ("ddp", "fsdp"))
    assert abs(whole - in_parts) < weights / 4
    beyond = costs["fsdp"].disk_bytes - costs["ddp"].disk_bytes - 10 * (in_parts - whole)
    assert abs(beyond - weights) < weights / 4  # exported once, at the end


@pytest.mark.long
def test_weights_in_parts_are_counted_once_in_a_checkpoint(tmp_path):
    in_processes(2, estimated, tmp_path)


class FillAt:
    def __init__(self, full: dict[str, bool]) -> None:
        self.full = full

    def measure(self, step) -> dict[str, float]:
        self.full["now"] = step.index == 1
        return {}


@pytest.mark.long
def test_a_refused_part_stops_all_ranks_and_leaves_the_checkpoint_before(tmp_path):
    in_processes(2, refused, tmp_path)
