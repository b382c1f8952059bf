"""A checkpoint survives truncation, bit rot, a full disk and SIGKILL; tested against the real thing."""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from curriq.errors import CurriqError
from curriq.runlog.checkpoints import FORMATS, latest_model
from curriq.runlog.writers import MetricsLog
from curriq.train import checkpoint as module
from curriq.train.checkpoint import (
    FORMAT,
    BadCheckpoint,
    Checkpointer,
    NoRoom,
    NotSaved,
    latest_checkpoint,
    require_plain,
    sha256,
    verify,
)


def state_of(step: int) -> dict:
    return {
        "step": step,
        "weights": torch.arange(1000, dtype=torch.float64) * step,
        "nested": {
            "generator": torch.Generator().manual_seed(step).get_state(),
            "none": None,
            "pair": (1, 0.5),
        },
        "text": "ℓ_i",
    }


def save_lm(path: Path) -> None:
    save_file({"w": torch.full((64,), 3.0)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")


def save(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        assert checkpointer.save(step, state_of(step), save_lm) is not None


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def fill(path: Path) -> None:
    """Write to a file until its disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x01
    path.write_bytes(content)


def rewrite_manifest(path: Path, **changes: object) -> None:
    """A manifest that is honest about its own content."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    manifest["sha256"] = module.manifest_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


class TestRoundTrip:
    def test_state_comes_back_bit_by_bit(self, tmp_path):
        save(Checkpointer(tmp_path, keep=2), 7)
        loaded = latest_checkpoint(tmp_path)
        assert (loaded.step, loaded.path) == (7, folder(tmp_path, 7))
        expected = state_of(7)
        assert torch.equal(loaded.state["weights"], expected["weights"])
        assert torch.equal(loaded.state["nested"]["generator"], expected["nested"]["generator"])
        assert loaded.state["nested"]["pair"] == (1, 0.5)
        assert loaded.state["text"] == "ℓ_i"
        assert loaded.lm == folder(tmp_path, 7) / "lm"
        assert (loaded.lm / "model.safetensors").is_file()

    def test_manifest_lists_every_other_file(self, tmp_path):
        save(Checkpointer(tmp_path, keep=1), 3)
        manifest = json.loads((folder(tmp_path, 3) / "manifest.json").read_text())
        assert manifest["format"] == FORMAT
        assert manifest["threads"] == torch.get_num_threads()
        assert manifest["versions"]["torch"] == torch.__version__
        assert set(manifest["files"]) == {"lm/config.json", "lm/model.safetensors", "state.pt"}
        tool = subprocess.run(
            ["sha256sum", folder(tmp_path, 3) / "state.pt"], capture_output=True, text=True, check=True
        )
        assert manifest["files"]["state.pt"]["sha256"] == tool.stdout.split()[0]

    def test_only_the_newest_stay(self, tmp_path):
        save(Checkpointer(tmp_path, keep=2), 1, 2, 30, 100)
        assert names(tmp_path) == ["step-00000030", "step-00000100"]

    def test_leftovers_of_a_killed_save_go_at_the_start(self, tmp_path):
        save(Checkpointer(tmp_path, keep=2), 1)
        leftover = tmp_path / "checkpoints" / ".tmp-step-00000002"
        leftover.mkdir()
        (leftover / "state.pt").write_bytes(b"half")
        latest_checkpoint(tmp_path)
        assert leftover.exists(), "a reader must not touch a run that may be saving"
        Checkpointer(tmp_path, keep=2)
        assert names(tmp_path) == ["step-00000001"]

    def test_saving_one_step_twice_keeps_the_first(self, tmp_path):
        save(Checkpointer(tmp_path, keep=1), 5)
        before = (folder(tmp_path, 5) / "manifest.json").stat().st_mtime_ns
        save(Checkpointer(tmp_path, keep=1), 5)
        assert (folder(tmp_path, 5) / "manifest.json").stat().st_mtime_ns == before

    @pytest.mark.parametrize(
        ("value", "kind"), [(np.float64(1.5), "numpy.float64"), (Path("x"), "PosixPath"), (print, "builtin")]
    )
    def test_state_that_could_not_be_read_back_is_refused(self, tmp_path, value, kind):
        with pytest.raises(TypeError, match=rf"state\['critic'\]\[1\] is a .*{kind}"):
            Checkpointer(tmp_path, keep=1).save(1, {"critic": [0, value]}, save_lm)

    def test_plain_state_is_what_torch_reads_with_weights_only(self, tmp_path):
        state = {1: None, "b": True, "i": 2**70, "f": 0.1, "c": 1j, "y": b"ab", "l": [1], "t": (1,), "s": {1}}
        require_plain(state)
        torch.save(state, tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt", weights_only=True) == state


class TestFallback:
    """The newest checkpoint is damaged; the one before must be found, with the reason in a warning."""

    @pytest.fixture
    def run_dir(self, tmp_path):
        save(Checkpointer(tmp_path, keep=2), 10, 20)
        return tmp_path

    def falls_back(self, run_dir: Path, caplog, reason: str) -> None:
        with caplog.at_level(logging.WARNING, "curriq"):
            loaded = latest_checkpoint(run_dir)
        assert loaded.step == 10
        assert torch.equal(loaded.state["weights"], state_of(10)["weights"])
        assert reason in caplog.text
        assert "step-00000020" in caplog.text
        assert "falling back to step-00000010" in caplog.text

    @pytest.mark.parametrize("name", ["state.pt", "lm/model.safetensors", "lm/config.json"])
    def test_truncated(self, run_dir, caplog, name):
        path = folder(run_dir, 20) / name
        size = path.stat().st_size
        os.truncate(path, size - 1)
        self.falls_back(run_dir, caplog, f"{name} has {size - 1} bytes instead of {size}")

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
    def test_flipped_byte(self, run_dir, caplog, share):
        path = folder(run_dir, 20) / "state.pt"
        flip_byte(path, int(share * path.stat().st_size))
        self.falls_back(run_dir, caplog, "state.pt is damaged")

    @pytest.mark.parametrize("name", ["state.pt", "lm/model.safetensors", "manifest.json"])
    def test_missing(self, run_dir, caplog, name):
        (folder(run_dir, 20) / name).unlink()
        self.falls_back(run_dir, caplog, f"{name} cannot be read (No such file or directory)")

    def test_unknown_format(self, run_dir, caplog):
        rewrite_manifest(folder(run_dir, 20), format="zip")
        self.falls_back(run_dir, caplog, "checkpoint format zip")

    def test_newer_format_names_both_versions(self, run_dir, caplog):
        newer = max(FORMATS) + 1
        rewrite_manifest(folder(run_dir, 20), format=newer, versions={"curriq": "9.9.9"})
        self.falls_back(run_dir, caplog, f"format {newer} (written by curriq 9.9.9)")
        assert "reads the formats 3 and 4: upgrade curriq" in caplog.text

    def test_renamed_folder(self, run_dir, caplog):
        folder(run_dir, 10).rename(folder(run_dir, 30))
        save(Checkpointer(run_dir, keep=3), 10)
        with caplog.at_level(logging.WARNING, "curriq"):
            assert latest_checkpoint(run_dir).step == 10

    def test_every_byte_of_the_manifest_is_guarded(self, run_dir):
        path = folder(run_dir, 20) / "manifest.json"
        content = path.read_bytes()
        original = json.loads(content)
        for position in range(len(content)):
            flip_byte(path, position)
            with contextlib.suppress(BadCheckpoint):
                assert verify(path.parent) == original  # a space became another white space
            path.write_bytes(content)

    def test_none_valid_says_what_is_wrong_with_each(self, run_dir):
        (folder(run_dir, 10) / "state.pt").unlink()
        flip_byte(folder(run_dir, 20) / "lm" / "model.safetensors", 100)
        with pytest.raises(CurriqError) as error:
            latest_checkpoint(run_dir)
        assert "step-00000010: state.pt cannot be read" in str(error.value)
        assert "step-00000020: lm/model.safetensors is damaged" in str(error.value)
        assert "curriq train" in str(error.value)

    def test_no_checkpoint_at_all(self, tmp_path):
        with pytest.raises(CurriqError, match="has no checkpoint"):
            latest_checkpoint(tmp_path / "nowhere")

    def test_log_that_does_not_hold_what_a_checkpoint_promises(self, tmp_path, caplog):
        log = MetricsLog(tmp_path)
        checkpointer = Checkpointer(tmp_path, keep=2)
        for step in (10, 20):
            for row in range(step - 10, step):
                log.append({"step": row})
            promise = {"metrics.jsonl": asdict(log.flush())}
            checkpointer.save(step, state_of(step), save_lm, promise)
        flip_byte(tmp_path / "metrics.jsonl", 13 * 15)
        self.falls_back(tmp_path, caplog, "metrics.jsonl is damaged in line ")
        assert latest_model(tmp_path) == tmp_path / "checkpoints" / "step-00000020" / "lm"
        flip_byte(tmp_path / "metrics.jsonl", 13 * 5)
        with pytest.raises(CurriqError, match=r"not whole: metrics\.jsonl is damaged in line 6"):
            latest_checkpoint(tmp_path)

    def test_a_checkpoint_of_the_same_step_with_another_log_replaces_it(self, run_dir):
        promise = {"metrics.jsonl": asdict(MetricsLog(run_dir).flush())}
        Checkpointer(run_dir, keep=2).save(20, state_of(20), save_lm, promise)
        assert latest_checkpoint(run_dir).manifest["log"] == promise

    def test_a_damaged_later_checkpoint_does_not_push_out_the_good_ones(self, run_dir, caplog):
        (folder(run_dir, 20) / "state.pt").unlink()
        checkpointer = Checkpointer(run_dir, keep=1)
        assert latest_checkpoint(run_dir).step == 10
        save(checkpointer, 15)
        assert names(run_dir) == ["rejected-step-00000020", "step-00000015"]
        assert latest_checkpoint(run_dir).step == 15

    def test_a_damaged_checkpoint_of_the_same_step_is_replaced(self, run_dir):
        (folder(run_dir, 20) / "state.pt").unlink()
        save(Checkpointer(run_dir, keep=1), 20)
        assert latest_checkpoint(run_dir).step == 20


class TestRefusedByTheDisk:
    def check(self, run_dir: Path, failing_save_lm, state=None) -> None:
        checkpointer = Checkpointer(run_dir, keep=1)
        save(checkpointer, 1)
        with pytest.raises(NotSaved, match=r"No space left on device.*checkpoint of step 1 is intact"):
            checkpointer.save(2, state or state_of(2), failing_save_lm)
        assert names(run_dir) == ["step-00000001"]
        assert latest_checkpoint(run_dir).step == 1
        save(checkpointer, 3)

    def test_error_while_the_model_is_saved(self, tmp_path):
        def refuse(path: Path) -> None:
            (path / "part").write_bytes(b"x" * 5000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.check(tmp_path, refuse)

    def test_first_checkpoint_says_that_there_is_none_before(self, tmp_path, monkeypatch):
        def refuse(path: Path) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(module, "fsync", refuse)
        with pytest.raises(NotSaved, match=r"Permission denied.*there is no earlier checkpoint"):
            Checkpointer(tmp_path, keep=1).save(1, state_of(1), save_lm)

    @pytest.mark.parametrize("error", [RuntimeError("CUDA error"), KeyboardInterrupt()])
    def test_other_errors_are_not_swallowed(self, tmp_path, error):
        def fail(path: Path) -> None:
            raise error

        with pytest.raises(type(error)):
            Checkpointer(tmp_path, keep=1).save(1, state_of(1), fail)
        assert names(tmp_path) == []

    @pytest.fixture
    def small_disk(self, tmp_path):
        mount, unmount = shutil.which("mount"), shutil.which("umount")
        if sys.platform != "linux" or os.geteuid() != 0 or mount is None or unmount is None:
            pytest.skip("needs root on Linux, to mount a small disk")
        disk = tmp_path / "disk"
        disk.mkdir()
        if subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
            pytest.skip("this machine does not allow a mount")
        yield disk
        subprocess.run([unmount, disk], check=True)

    def test_reserve_keeps_room_for_the_next_checkpoint(self, small_disk):
        """Others fill the disk to the last byte, and the next checkpoint still fits."""
        checkpointer = Checkpointer(small_disk, keep=1)
        checkpointer.hold_room(checkpointer.save(1, state_of(1), save_lm))
        fill(small_disk / "other")
        assert shutil.disk_usage(small_disk).free < 4096
        saved = checkpointer.save(2, state_of(2), save_lm)
        assert latest_checkpoint(small_disk).step == 2
        fill(small_disk / "more")
        with pytest.raises(NoRoom, match=r"no room for the next checkpoint .*the next one needs about"):
            checkpointer.hold_room(saved)
        assert names(small_disk) == ["step-00000002"]

    def test_all_that_are_to_be_kept_must_fit_at_the_start(self, small_disk):
        checkpointer = Checkpointer(small_disk, keep=20)
        with pytest.raises(NoRoom, match=r"20 more of about .* have to fit"):
            checkpointer.hold_room(checkpointer.save(0, state_of(0), save_lm))

    def test_really_full_disk_in_torch(self, small_disk):
        self.check(small_disk, save_lm, state={"big": torch.zeros(2_000_000)})

    def test_really_full_disk_in_safetensors(self, small_disk):
        big = torch.zeros(2_000_000)
        self.check(small_disk, lambda path: save_file({"w": big}, path / "model.safetensors"))


def save_many(run_dir: Path, last: int, report) -> None:
    checkpointer = Checkpointer(run_dir, keep=1)
    for step in range(1, last + 1):
        checkpointer.save(step, state_of(step), save_lm)
        report.send(step)


def save_and_die_at_event(run_dir: Path, event_number: int, report) -> None:
    """Kill this process just before its n-th access to the run's files."""
    seen = 0

    def die(event: str, args: tuple) -> None:
        nonlocal seen
        if event.startswith(("open", "os.", "shutil.")) and any(str(run_dir) in str(arg) for arg in args):
            seen += 1
            if seen == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    save_many(run_dir, 2, report)
    report.send("done")


@pytest.fixture(scope="module")
def processes():
    """Forks of one server that has torch already, so that a process costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "curriq.train.checkpoint"])
    return context


class TestSigkill:
    """Killed at any moment, the run has its last acknowledged checkpoint or a newer one."""

    def received(self, pipe) -> list:
        messages = []
        try:
            while True:
                messages.append(pipe.recv())
        except EOFError:
            return messages

    def check(self, run_dir: Path, acknowledged: int) -> None:
        if acknowledged == 0 and not list((run_dir / "checkpoints").glob("step-*")):
            return
        for path in module.checkpoint_folders(run_dir / "checkpoints"):
            verify(path)
        Checkpointer(run_dir, keep=1)
        loaded = latest_checkpoint(run_dir)
        assert loaded.step in (acknowledged, acknowledged + 1)
        assert torch.equal(loaded.state["weights"], state_of(loaded.step)["weights"])
        assert not list((run_dir / "checkpoints").glob(".tmp-*"))

    def test_before_every_access_to_the_file_system(self, tmp_path, processes, caplog):
        for event_number in range(1, 400):
            run_dir = tmp_path / str(event_number)
            run_dir.mkdir()
            receiver, sender = processes.Pipe(duplex=False)
            process = processes.Process(target=save_and_die_at_event, args=(run_dir, event_number, sender))
            process.start()
            sender.close()
            messages = self.received(receiver)
            process.join()
            if messages[-1:] == ["done"]:
                break
            assert process.exitcode == -signal.SIGKILL
            self.check(run_dir, acknowledged=max(messages, default=0))
            shutil.rmtree(run_dir)
        assert 40 < event_number < 399
        assert caplog.text == "", "a kill leaves whole checkpoints only, so there is nothing to warn of"

    @pytest.mark.parametrize("delay_ms", range(0, 40, 2))
    def test_after_a_delay(self, tmp_path, processes, delay_ms):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=save_many, args=(tmp_path, 100_000, sender))
        process.start()
        sender.close()
        first = receiver.recv()
        time.sleep(delay_ms / 1000)
        process.kill()
        process.join()
        self.check(tmp_path, acknowledged=max([first, *self.received(receiver)]))


def test_hash_is_sha256_of_the_content(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
