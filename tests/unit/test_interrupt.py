"""What stops a run: Ctrl-C, SIGTERM and SIGHUP alike, and a terminal that is gone is no error."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.runs import assert_same_run, tiny

from curriq.runlog.read import read_summary
from curriq.train.interrupt import stop_flag
from curriq.train.run import resume, train

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_asks_for_a_stop_and_is_given_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_flag() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
    assert signal.getsignal(number) == before


def test_a_process_that_ignores_hangups_goes_on_ignoring_them() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_flag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.long
def test_a_run_whose_terminal_closes_saves_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    """The terminal of a real session, with a bar that would write to it."""
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "run.py").write_text(
        "import os, sys\n"
        "from curriq.boundary import exit_status\n"
        "from curriq.terminal import escaped_output\n"
        "from curriq.train.run import train\n"
        "from tests.runs import tiny\n"
        "config = tiny(steps=3000, run_dir='run', progress='bar', lr_schedule='constant')\n"
        "with escaped_output():\n"
        "    status = exit_status(lambda: 0 if train(config).finished else 130)\n"
        "open('status', 'w').write(str(status))\n"
    )
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "run.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"},
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    os.close(side)
    log = tmp_path / "run" / "metrics.jsonl"
    os.set_blocking(terminal, False)
    while not log.exists() or log.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        try:
            os.read(terminal, 1 << 16)  # or the bar would wait for room
        except BlockingIOError:
            time.sleep(0.02)
    os.close(terminal)  # the system sends SIGHUP to the session
    assert process.wait(60) == 0
    assert (tmp_path / "status").read_text() == "130"
    done = read_summary(tmp_path / "run")["steps"]
    assert 3 <= done < 3000
    resume(tmp_path / "run", steps=done + 2, progress="none")
    train(tiny(steps=done + 2, run_dir=str(tmp_path / "other"), lr_schedule="constant"))
    assert_same_run(tmp_path / "run", tmp_path / "other")
