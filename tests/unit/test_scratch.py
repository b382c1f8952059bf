"""Decompressed copies: gone with their owner, and after a kill with the next process."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from curriq.data.scratch import scratch_folder

MAKE = """
import sys, time
from curriq.data.scratch import scratch_folder
class Owner: pass
owner = Owner()
folder = scratch_folder(owner)
(folder / "copy.parquet").write_bytes(b"x" * 1000)
print(folder, flush=True)
time.sleep(60)
"""


class Owner:
    pass


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_a_folder_goes_with_its_owner():
    owner = Owner()
    folder = scratch_folder(owner)
    assert folder.is_dir()
    del owner
    gc.collect()
    assert not folder.exists()


@pytest.mark.skipif(os.name != "posix", reason="processes are asked by signal 0")
def test_a_killed_process_leaves_nothing_for_long_and_a_living_one_keeps_its_own():
    killed, living = (
        subprocess.Popen([sys.executable, "-c", MAKE], stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    try:
        left, kept = (Path(process.stdout.readline().strip()) for process in (killed, living))
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert (left / "copy.parquet").exists()
        owner = Owner()
        own = scratch_folder(owner)
        assert not left.exists()
        assert (kept / "copy.parquet").exists()
        assert own.is_dir()
    finally:
        for process in (killed, living):
            process.kill()
            process.wait()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say when it began")
def test_a_number_that_another_process_has_now_does_not_keep_a_folder(tmp_path):
    old = tmp_path / f"curriq-scratch-{os.getpid()}-1-abc"
    old.mkdir()
    foreign = tmp_path / "curriq-scratch-mine"
    foreign.mkdir()
    scratch_folder(Owner())
    assert not old.exists()
    assert foreign.exists()
