"""Runs commands in several processes with one live display, and stops them gently."""

import json
import logging
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from curriq.train.interrupt import stop_flag

logger = logging.getLogger("curriq")

TAIL_BYTES = 1 << 16
"""More than the longest row of a log."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command.

    Attributes:
        name: as the display shows it.
        command: program and arguments.
        log: file that takes its output, appended.
        steps: what `progress` ends at.
        progress: steps finished so far, cheap to ask.
        result: what to say of it when it ended well.
    """

    name: str
    command: Sequence[str]
    log: Path
    steps: int
    progress: Callable[[], int]
    result: Callable[[], str]


@dataclass(kw_only=True)
class Outcome:
    """How the jobs ended.

    Attributes:
        failed: name → what the job said last.
        stopped: Ctrl-C ended the work early.
    """

    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    finished_steps: int,
    lock: int,
    console: Console | None = None,
    poll_seconds: float = 0.2,
) -> Outcome:
    """Run all jobs, at most `workers` at once; one that fails does not stop the others.

    The first Ctrl-C passes an interrupt to every worker, waits for them to save, and starts no more; the
    second kills them.

    Args:
        jobs: in the order of their start.
        workers: processes at once.
        finished_steps: steps of jobs that were done before, for the display.
        lock: descriptor that the workers keep open; see `storage.exclusive`.
        console: where to show progress; standard error when None.
        poll_seconds: time between two looks at the workers.
    """
    console = console or Console(stderr=True, highlight=False)
    outcome = Outcome()
    waiting, running = deque(jobs), dict[str, tuple[Job, subprocess.Popen]]()
    with stop_flag() as stop, _Display(console, jobs, finished_steps) as display:
        try:
            while running or (waiting and not outcome.stopped):
                if stop() and not outcome.stopped:
                    outcome.stopped = True
                    for _, process in running.values():
                        process.send_signal(signal.SIGINT)
                while waiting and len(running) < workers and not outcome.stopped:
                    job = waiting.popleft()
                    running[job.name] = job, _start(job, lock)
                    display.started(job)
                time.sleep(poll_seconds)
                for job, process in list(running.values()):
                    display.update(job)
                    if process.poll() is not None:
                        del running[job.name]
                        _ended(job, process.returncode, outcome, display)
        finally:
            for _, process in running.values():
                process.kill()
                process.wait()
    return outcome


def _start(job: Job, lock: int) -> subprocess.Popen:
    """In a session of its own, so that the terminal's Ctrl-C reaches a worker through us, once."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            list(job.command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(lock,),
            start_new_session=True,
        )


def _ended(job: Job, status: int, outcome: Outcome, display: "_Display") -> None:
    if status == 0:
        display.ended(job, job.result())
    elif outcome.stopped:
        display.ended(job, "stopped", "yellow")
    else:
        said = last_line(job.log)
        outcome.failed[job.name] = said
        display.ended(job, f"failed (exit status {status}): {said}", "red")


class _Display:
    """On a terminal a bar for everything and one per worker; elsewhere a line when a job begins or ends."""

    def __init__(self, console: Console, jobs: Sequence[Job], finished_steps: int) -> None:
        self._console = console
        self._steps = {job.name: job.progress() for job in jobs}
        self._total = finished_steps + sum(job.steps for job in jobs)
        self._finished_steps = finished_steps
        self._bars: dict[str, TaskID] = {}
        self._jobs, self._ended = len(jobs), 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            speed_estimate_period=600,  # steps come in bursts, because a worker takes seconds to start
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("[bold]all steps", total=self._total, completed=self._done())

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def started(self, job: Job) -> None:
        self._bars[job.name] = self._progress.add_task(escape(job.name), total=job.steps)
        if not self._console.is_terminal:
            self._say(f"{job.name}: started")

    def update(self, job: Job) -> None:
        if self._console.is_terminal:
            self._steps[job.name] = job.progress()
            self._progress.update(self._bars[job.name], completed=self._steps[job.name])
            self._progress.update(self._all, completed=self._done())

    def ended(self, job: Job, text: str, style: str = "") -> None:
        self._ended += 1
        self._progress.remove_task(self._bars.pop(job.name))
        self._say(f"[{self._ended}/{self._jobs}] {job.name}: {text}", style)

    def _done(self) -> int:
        return self._finished_steps + sum(self._steps.values())

    def _say(self, text: str, style: str = "") -> None:
        self._progress.console.print(escape(text), style=style, soft_wrap=True)


def steps_logged(run_dir: Path) -> int:
    """Steps that a run's log holds so far, from its last whole row."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            rows = file.read().split(b"\n")[:-1]
        return int(json.loads(rows[-1])["step"]) + 1
    except (OSError, IndexError, ValueError, KeyError):  # no log yet, no whole row in it, or a damaged one
        return 0


def last_line(log: Path) -> str:
    """The last line of a log that says anything; the program's own error where there is one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    own = [line for line in lines[-20:] if line.startswith("curriq: ")]
    said = own or [line for line in lines if line]
    return said[-1].removeprefix("curriq: ") if said else "it said nothing"
