"""Runs commands in several processes with one live display; an interrupt lets them save before they stop."""

import json
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

TAIL_BYTES = 1 << 16
"""More than the longest row of a log."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command: program and arguments."""

    name: str
    command: Sequence[str]
    log: Path  # its output is appended here
    steps: int
    progress: Callable[[], int]  # steps finished so far, cheap to ask
    result: Callable[[], str]  # shown after a success


@dataclass(kw_only=True)
class Outcome:
    """How the jobs ended."""

    failed: dict[str, str] = field(default_factory=dict)  # name → last message
    stopped: bool = False  # by Ctrl-C


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    finished_steps: int,
    lock: int,
    console: Console | None = None,
    poll_seconds: float = 0.2,
) -> Outcome:
    """Run all jobs, at most `workers` at once; one that fails does not stop the others.

    The first Ctrl-C interrupts every worker, waits for them to save, and starts no more; the second kills
    them.

    Args:
        finished_steps: steps of jobs that were finished before, for the display.
        lock: descriptor that the workers keep open; see `storage.exclusive`.
        console: where to show progress; standard error when None.
        poll_seconds: time between two polls of the workers.
    """
    console = console or Console(stderr=True, highlight=False)
    outcome, display = Outcome(), _Display(console, jobs, finished_steps)
    waiting, running = deque(jobs), dict[str, tuple[Job, subprocess.Popen]]()
    with stop_flag() as stop, display.progress:
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
    """The process, in its own session: the terminal's Ctrl-C reaches it only once, through us."""
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
        message = outcome.failed[job.name] = last_line(job.log)
        display.ended(job, f"failed (exit status {status}): {message}", "red")


class _Display:
    """On a terminal a bar for all steps and one per worker; elsewhere a line when a job starts or ends."""

    def __init__(self, console: Console, jobs: Sequence[Job], finished_steps: int) -> None:
        self.progress = Progress(
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
        self._steps = {job.name: job.progress() for job in jobs}
        self._finished_steps, self._ended = finished_steps, 0
        total = finished_steps + sum(job.steps for job in jobs)
        self._all = self.progress.add_task("[bold]all steps", total=total, completed=self._done())
        self._bars: dict[str, TaskID] = {}

    def started(self, job: Job) -> None:
        self._bars[job.name] = self.progress.add_task(
            escape(job.name), total=job.steps, completed=self._steps[job.name]
        )
        if not self.progress.console.is_terminal:
            self._print(f"{job.name}: started")

    def update(self, job: Job) -> None:
        if self.progress.console.is_terminal:
            self._steps[job.name] = job.progress()
            self.progress.update(self._bars[job.name], completed=self._steps[job.name])
            self.progress.update(self._all, completed=self._done())

    def ended(self, job: Job, text: str, style: str = "") -> None:
        self._ended += 1
        self.progress.remove_task(self._bars.pop(job.name))
        self._print(f"[{self._ended}/{len(self._steps)}] {job.name}: {text}", style)

    def _done(self) -> int:
        return self._finished_steps + sum(self._steps.values())

    def _print(self, text: str, style: str = "") -> None:
        self.progress.console.print(escape(text), style=style, soft_wrap=True)


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
    """The last line of a log that is not empty; the program's own error where there is one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    own = [line for line in lines[-20:] if line.startswith("curriq: ")]
    messages = own or [line for line in lines if line] or ["it printed nothing"]
    return messages[-1].removeprefix("curriq: ")
