"""`curriq runs`: what it lists, what it removes, and that what is left still works."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.runs import InterruptAt, tiny

from curriq.cli import main
from curriq.errors import CurriqError
from curriq.evaluate.compare import is_finished
from curriq.evaluate.plan import load_plan
from curriq.runlog.checkpoints import checkpoint_folders, folder_size, latest_model, verify
from curriq.runlog.curriculum import export
from curriq.runlog.runs import find_runs, plan_pruning, read_state
from curriq.runlog.storage import exclusive, is_locked
from curriq.train.checkpoint import latest_checkpoint
from curriq.train.run import resume, train
from curriq.train.verify import verify_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with three checkpoints and an interrupted one, also with three."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny(checkpoint_every=2, checkpoint_keep=3)
    train(config.override(run_dir=str(folder / "done")))
    train(config.override(run_dir=str(folder / "half")), probes=(InterruptAt(3),))
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs"))


def steps_kept(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint_folders(run / "checkpoints")]


def holds(run: Path) -> bool:
    return not any(defect for _, defect in verify_run(run))


class TestList:
    def test_state_steps_losses_and_sizes(self, runs: Path):
        done, half = map(read_state, find_runs(runs))
        summary = json.loads((runs / "done" / "summary.json").read_text())
        assert (done.state, done.steps, done.total_steps, done.method) == ("finished", 6, 6, "soft-q")
        assert (done.test_loss, done.validation_loss) == (summary["test_loss"], summary["validation_loss"])
        assert (half.state, half.steps, half.test_loss) == ("interrupted", 4, None)
        files = [path for path in (runs / "done").rglob("*") if path.is_file()]
        assert done.size == sum(path.stat().st_size for path in files)
        assert done.checkpoints_size == folder_size(runs / "done" / "checkpoints")
        assert done.changed == max(path.stat().st_mtime for path in files if path.name != ".lock")

    def test_what_goes_while_it_is_looked_at_is_no_error(self, runs: Path, monkeypatch):
        """A run that trains renames its checkpoint's folder and removes the oldest."""
        whole = read_state(runs / "done")
        gone = runs / "done" / "checkpoints" / "step-00000002" / "state.pt"
        size, stat = gone.stat().st_size, Path.stat

        def vanished(path: Path, **how: Any):
            if path == gone:
                raise FileNotFoundError(2, "No such file or directory", str(path))
            return stat(path, **how)

        monkeypatch.setattr(Path, "stat", vanished)
        assert read_state(runs / "done").size == whole.size - size

    def test_a_folder_that_may_not_be_read_is_left_out(self, runs: Path, monkeypatch, caplog):
        (runs / "lost+found").mkdir()
        iterdir = Path.iterdir

        def guarded(path: Path):
            if path.name == "lost+found":
                raise PermissionError(13, "Permission denied", str(path))
            return iterdir(path)

        monkeypatch.setattr(Path, "iterdir", guarded)
        assert [run.name for run in find_runs(runs)] == ["done", "half"]
        assert "lost+found is left out: Permission denied" in caplog.text

    def test_a_killed_run_tells_its_steps_from_its_log(self, runs: Path):
        (runs / "half" / "summary.json").unlink()
        state = read_state(runs / "half")
        assert (state.state, state.steps) == ("interrupted", 4)
        assert state.validation_loss is not None

    def test_one_that_is_running_one_that_was_not_started_and_a_damaged_one(self, runs: Path):
        (runs / "new").mkdir()
        shutil.copy(runs / "done" / "config.toml", runs / "new")
        (runs / "half" / "config.toml").write_text("[train")
        with exclusive(runs / "done", "held"):
            assert [read_state(run).state for run in find_runs(runs)] == ["running", "damaged", "not started"]
        assert read_state(runs / "done").state == "finished"

    def test_runs_of_comparisons_are_found_and_what_is_in_a_run_is_none(self, runs: Path):
        shutil.copytree(runs / "done", runs / "compare" / "dirty" / "uniform-0")
        shutil.copytree(runs / "done", runs / "done" / "eval" / "copy")
        found = [str(run.relative_to(runs)) for run in find_runs(runs)]
        assert found == ["compare/dirty/uniform-0", "done", "half"]
        assert find_runs(runs / "done") == [runs / "done"]

    def test_table_and_json(self, runs: Path, capsys: pytest.CaptureFixture):
        assert main(["runs", "list", str(runs)]) == 0
        text = capsys.readouterr().out
        assert [line.split()[:4] for line in text.splitlines() if "soft-q" in line] == [
            ["done", "soft-q", "6/6", "finished"],
            ["half", "soft-q", "4/6", "interrupted"],
        ]
        assert text.splitlines()[-1].startswith("2 runs, ")
        assert main(["runs", "list", str(runs), "--json"]) == 0
        first, _ = json.loads(capsys.readouterr().out)
        assert first["folder"] == str(runs / "done")
        assert first["state"] == "finished"

    def test_an_empty_folder_and_none(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        assert main(["runs", "list", str(tmp_path)]) == 0
        assert "No runs" in capsys.readouterr().out
        assert main(["runs", "list", str(tmp_path / "no")]) == 2
        assert "there is no such folder" in capsys.readouterr().err

    def test_looking_at_a_lock_takes_nothing(self, tmp_path: Path):
        assert not is_locked(tmp_path)
        assert list(tmp_path.iterdir()) == []
        with exclusive(tmp_path, "held"):
            assert is_locked(tmp_path)
        assert not is_locked(tmp_path)


class TestPrune:
    def test_nothing_is_removed_without_yes(self, runs: Path, capsys: pytest.CaptureFixture):
        for words in ([], ["--checkpoints"], ["--keep-model"], ["--keep-last", "2"]):
            assert main(["runs", "prune", str(runs), *words]) == 0
            assert "nothing was removed" in capsys.readouterr().out
        assert steps_kept(runs / "done") == [6, 4, 2]

    def test_the_newest_stays_whole_and_both_runs_go_on(self, runs: Path, capsys: pytest.CaptureFixture):
        before = read_state(runs / "done").size
        planned = plan_pruning(runs / "done").size
        assert main(["runs", "prune", str(runs), "--yes"]) == 0
        assert f"{runs / 'done'}: " in capsys.readouterr().out
        assert read_state(runs / "done").size == before - planned
        assert (steps_kept(runs / "done"), steps_kept(runs / "half")) == ([6], [4])
        assert holds(runs / "done")
        assert resume(runs / "half").finished
        assert resume(runs / "done", steps=8).summary["steps"] == 8

    def test_as_many_stay_as_are_wanted(self, runs: Path):
        assert main(["runs", "prune", str(runs / "done"), "--keep-last", "2", "--yes"]) == 0
        assert steps_kept(runs / "done") == [6, 4]

    @pytest.mark.parametrize("option", ["--keep-model", "--checkpoints"])
    def test_everything_but_a_resume_works_on_without_the_state(self, option: str, runs: Path, capsys):
        run = runs / "done"
        assert main(["runs", "prune", str(run), option, "--yes"]) == 0
        assert steps_kept(run) == [6]
        assert holds(run)
        assert main(["verify", str(run)]) == 0
        assert main(["report", str(run), "--no-figures"]) == 0
        assert export(run, runs / "curriculum.parquet").steps == 6
        assert read_state(run).state == "finished"
        with pytest.raises(
            CurriqError, match="cannot go on: `curriq runs prune` has removed its training state"
        ):
            resume(run, steps=8)
        capsys.readouterr()
        assert main(["runs", "prune", str(run), option, "--yes"]) == 0  # again
        assert "nothing to remove" in capsys.readouterr().out

    def test_the_model_stays_unless_it_is_to_go(self, runs: Path):
        lm, run = latest_model(runs / "done"), runs / "done"
        files = {path.name: path.read_bytes() for path in lm.iterdir()}
        assert main(["runs", "prune", str(run), "--keep-model", "--yes"]) == 0
        assert latest_model(run) == lm
        assert {path.name: path.read_bytes() for path in lm.iterdir()} == files
        assert {path.name for path in lm.parent.iterdir()} == {"lm", "manifest.json"}
        assert main(["runs", "prune", str(run), "--checkpoints", "--yes"]) == 0
        assert {path.name for path in lm.parent.iterdir()} == {"manifest.json"}
        with pytest.raises(CurriqError, match=r"holds no model: .*`curriq runs prune` has removed its model"):
            latest_model(run)

    def test_damage_of_what_is_left_is_found(self, runs: Path):
        run = runs / "done"
        plan_pruning(run, model_only=True).carry_out()
        weights = latest_model(run) / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert not holds(run)

    def test_damage_of_the_log_is_found_without_any_checkpoint(self, runs: Path):
        run = runs / "done"
        plan_pruning(run, no_checkpoint=True).carry_out()
        log = run / "metrics.jsonl"
        log.write_bytes(log.read_bytes().replace(b"1", b"2", 1))
        assert any("metrics.jsonl is damaged" in defect for _, defect in verify_run(run))

    def test_an_interrupted_run_keeps_its_way_on(self, runs: Path, capsys: pytest.CaptureFixture):
        assert main(["runs", "prune", str(runs / "half"), "--checkpoints", "--yes"]) == 0
        assert "it is not finished" in capsys.readouterr().out
        assert steps_kept(runs / "half") == [4, 2, 0]

    def test_a_run_that_is_training_is_left_alone(self, runs: Path, capsys: pytest.CaptureFixture):
        plan = plan_pruning(runs / "done")
        with exclusive(runs / "done", "held"):
            assert main(["runs", "prune", str(runs / "done"), "--yes"]) == 0
            assert "it is running" in capsys.readouterr().out
            with pytest.raises(CurriqError, match="it is running"):  # it has started since the plan was made
                plan.carry_out()
        assert steps_kept(runs / "done") == [6, 4, 2]

    def test_older_checkpoints_stay_where_the_newest_is_damaged(self, runs: Path, capsys):
        (checkpoint_folders(runs / "done" / "checkpoints")[0] / "state.pt").write_bytes(b"")
        assert main(["runs", "prune", str(runs / "done"), "--yes"]) == 0
        assert "state.pt has 0 bytes" in capsys.readouterr().out
        assert steps_kept(runs / "done") == [6, 4, 2]
        assert latest_checkpoint(runs / "done").step == 4

    def test_older_checkpoints_stay_where_the_log_of_the_newest_is_not_whole(self, runs: Path, capsys):
        """The run goes on from one that promises less of the log."""
        newest = checkpoint_folders(runs / "done" / "checkpoints")[0]
        parts = sorted((runs / "done" / "candidates").glob("part-*"))
        parts[-1].unlink()
        assert latest_checkpoint(runs / "done").step < int(newest.name[5:])
        assert main(["runs", "prune", str(runs / "done"), "--yes"]) == 0
        assert "the log that it covers is not whole" in capsys.readouterr().out
        assert steps_kept(runs / "done") == [6, 4, 2]

    def test_leftovers_of_kills_go(self, runs: Path):
        folder = runs / "done" / "checkpoints"
        for name in (".tmp-step-00000008", ".tmp-old-step-00000001", "rejected-step-00000003"):
            (folder / name).mkdir()
            (folder / name / "state.pt").write_bytes(b"x" * 100)
        (folder / ".reserve").write_bytes(b"x" * 1000)
        plan_pruning(runs / "done").carry_out()
        assert {path.name for path in folder.iterdir()} == {"step-00000006"}

    def test_a_kill_between_manifest_and_removal_is_finished_next_time(self, runs: Path, monkeypatch):
        run = runs / "done"
        plan = plan_pruning(run, model_only=True)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                plan.carry_out()
        assert holds(run)
        assert (plan.stripped / "state.pt").exists()
        plan_pruning(run, model_only=True).carry_out()
        assert not (plan.stripped / "state.pt").exists()
        assert verify(plan.stripped)["pruned"] == ["state.pt"]

    def test_a_comparison_does_not_run_a_pruned_run_again(self, made: Path, tmp_path: Path):
        sources = "".join(
            f'[[streams.s.sources]]\nname = "{s.name}"\npath = "{s.path}"\ncorruption = "{s.corruption}"\n'
            for s in tiny().data.sources
        )
        (tmp_path / "c.toml").write_text(
            '[compare]\nbase = "smoke"\nseeds = [0]\nbaseline = "a"\nallow_constant_lr = true\n[arms.a]\n'
            f'selector = "uniform"\n[arms.b]\n[streams.s]\nsteps = 2\n{sources}'
        )
        run = load_plan(tmp_path / "c.toml", tmp_path / "out").runs[0]
        train(run.config.override(threads=1))
        assert is_finished(run)
        plan_pruning(run.folder, no_checkpoint=True).carry_out()
        assert is_finished(run)

    def test_nothing_can_be_kept_of_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        assert main(["runs", "prune", str(tmp_path)]) == 2
        assert "there is no run in it" in capsys.readouterr().err
        assert main(["runs", "prune", str(tmp_path), "--keep-last", "0"]) == 2
        assert "--keep-last = 0: it must be at least 1." in capsys.readouterr().err


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_listing_beside_a_lock_never_refuses_the_owner(tmp_path: Path):
    """A run that starts while others are listed must not believe that another process trains it."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.001):
            is_locked(tmp_path)

    with exclusive(tmp_path, "made"):
        pass
    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(300):
            with exclusive(tmp_path, "refused"):
                pass
    finally:
        stop.set()
        thread.join()
