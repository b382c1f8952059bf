"""A real disk that is full: before the first step, between two checkpoints, at the last one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.runs import assert_same_run, tiny

from curriq.cli import main
from curriq.config import to_toml
from curriq.errors import CurriqError
from curriq.runlog.read import read_summary
from curriq.train.checkpoint import Reserve, checkpoint_folders
from curriq.train.run import Own, prepare, resume, train

SETTINGS = {"checkpoint_every": 2, "eval_every": 3, "tensorboard": True, "checkpoint_keep": 1}


class Disk:
    """A small file system in memory."""

    def __init__(self, path: Path, mount: str) -> None:
        self.path, self._mount = path, mount

    def resize(self, kilobytes: int) -> None:
        command = [self._mount, "-o", f"remount,size={kilobytes}k", self.path]
        subprocess.run(command, check=True, capture_output=True)

    def fill(self) -> None:
        """As another program would, to the last byte."""
        try:
            with (self.path / "other").open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass


@pytest.fixture
def disk(tmp_path):
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    if sys.platform != "linux" or os.geteuid() != 0 or mount is None or unmount is None:
        pytest.skip("needs root on Linux, to mount a small disk")
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=40m", "tmpfs", path], check=False).returncode:
        pytest.skip("this machine does not allow a mount")
    yield Disk(path, mount)
    subprocess.run([unmount, "-l", path], check=True)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untouched")
    train(tiny(**SETTINGS, run_dir=str(folder)))
    return folder


def recover(run: Path, untouched: Path) -> None:
    """With room again, what the message says leads to the run that was never disturbed."""
    if checkpoint_folders(run / "checkpoints"):
        resume(run)
    else:
        train(tiny(**SETTINGS, run_dir=str(run)))
    assert_same_run(run, untouched)
    assert not (run / "checkpoints" / ".reserve").exists()


@pytest.mark.parametrize("kilobytes", [16, 64, 256, 600, 1200, 1628, 2400])
def test_too_small_from_the_start(disk, untouched, tmp_path, capsys, kilobytes):
    """Refused before the first step, with one message, whatever the size."""
    run = disk.path / "run"
    file = tmp_path / "run.toml"
    file.write_text(to_toml(tiny(**SETTINGS)), encoding="utf-8")
    disk.resize(kilobytes)
    status = main(["train", "--config", str(file), "--run-dir", str(run)])
    messages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("curriq: ")]
    assert (status, len(messages)) == (2, 1)
    assert "No space left on device" in messages[0] or "no room for the next checkpoint" in messages[0]
    assert not (run / "summary.json").exists()
    disk.resize(40_000)
    recover(run, untouched)


class Filler:
    """A probe that fills the disk in every step from some step on."""

    def __init__(self, disk: Disk, start: int) -> None:
        self.disk, self.start = disk, start

    def measure(self, step) -> dict[str, float]:
        if step.index >= self.start:
            self.disk.fill()
        return {}


@pytest.mark.parametrize("start", range(6))
def test_filled_by_others_while_it_trains(disk, untouched, start):
    """The reserve has room for the next checkpoint: the run ends, or stops right after a save."""
    run = disk.path / "run"
    disk.resize(9_000)
    session = prepare(tiny(**SETTINGS, run_dir=str(run)), own=Own(probes=(Filler(disk, start),))).session
    try:
        session.train()
    except CurriqError as error:
        message = str(error)
    else:
        assert read_summary(run)["checkpoint"] == "checkpoints/step-00000006"
        assert_same_run(run, untouched)
        return
    # Room for the first checkpoint after a step is known to be there from the end of that step on.
    saved = 0 if session.state.step == 1 else session.state.step
    assert f"stopped at step {session.state.step}{', which is saved' * (saved > 0)}: " in message
    assert f"go on from step {saved} with `curriq resume" in message
    assert checkpoint_folders(run / "checkpoints")[0].name == f"step-{saved:08d}"
    (disk.path / "other").unlink()
    recover(run, untouched)


def test_trained_and_not_saved_is_not_finished(disk, untouched, monkeypatch):
    run = disk.path / "run"
    disk.resize(9_000)
    session = prepare(tiny(**SETTINGS, run_dir=str(run))).session
    release = Reserve.release

    def taken_by_others(reserve: Reserve) -> None:
        release(reserve)
        if session.state.step == 6:
            disk.fill()

    with monkeypatch.context() as patch:
        patch.setattr(Reserve, "release", taken_by_others)
        with pytest.raises(CurriqError, match=r"^trained, not saved: .*No space left.* from step 4"):
            session.train()
    assert not (run / "summary.json").exists()
    (disk.path / "other").unlink()
    recover(run, untouched)


def test_candidates_that_cannot_be_written_stop_the_run(disk, untouched):
    """Their folder alone is full: the checkpoint that would promise them is not saved."""
    run = disk.path / "run"
    (run / "candidates").mkdir(parents=True)
    mount = [shutil.which("mount"), "-t", "tmpfs", "-o", "size=4k", "tmpfs", run / "candidates"]
    subprocess.run(mount, check=True)
    try:
        with pytest.raises(CurriqError, match=r"stopped at step [24], not saved: No space left on device"):
            train(tiny(**SETTINGS, run_dir=str(run)))
    finally:
        written = {path.name: path.read_bytes() for path in (run / "candidates").glob("part-*")}
        subprocess.run([shutil.which("umount"), "-l", run / "candidates"], check=True)
    for name, content in written.items():
        (run / "candidates" / name).write_bytes(content)
    recover(run, untouched)


def test_train_takes_over_a_folder_without_a_checkpoint(tmp_path, caplog, untouched):
    """What an earlier log holds is moved and kept; neither command sends its user to the other."""
    run = tmp_path / "run"
    shutil.copytree(untouched, run)
    shutil.rmtree(run / "checkpoints")
    rows = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CurriqError, match=r"has no checkpoint.*start the run again with `curriq train`"):
        resume(run)
    train(tiny(**SETTINGS, run_dir=str(run)))
    assert_same_run(run, untouched)
    assert (run / "earlier-log" / "metrics.jsonl").read_bytes() == rows
    assert "holds the log of a run without a checkpoint; it was moved to earlier-log/" in caplog.text


def test_a_damaged_summary_is_written_again(tmp_path, untouched):
    run = tmp_path / "run"
    shutil.copytree(untouched, run)
    whole = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text('{"finished": tr')
    assert resume(run).finished
    assert json.loads((run / "summary.json").read_text()) == whole
