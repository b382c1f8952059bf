"""`curriq compare`: runs the unfinished of arms × seeds × streams in several processes with one live display,
and compares all of them. An interrupt lets the processes save before they stop."""

import json
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from curriq import terminal
from curriq.config import SourceConfig, differences, field_owners, load_toml, require, to_toml
from curriq.data.survey import require_usable
from curriq.evaluate.plan import WORKER_LOG, Plan, PlannedRun, load_plan, shown
from curriq.parser import Parser
from curriq.plugins import changed_code
from curriq.runlog.read import explained, has_finished, read_summary, recorded, steps_logged
from curriq.runlog.storage import exclusive, write_atomically
from curriq.train.interrupt import stop_flag

HARMLESS = ("threads", "run_dir", "held_out_sizes")
"""Settings outside [log] that may differ in a finished run. Its held-out sets have the sizes that they have,
fitted or not; that the arms of a seed have equal ones is checked on what they read."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command: program and arguments."""

    name: str
    command: Sequence[str]
    log: Path  # its output is appended here
    steps: int
    progress: Callable[[], int]  # steps finished so far, cheap to ask
    result: Callable[[], str]  # shown after a success


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status (0 done, 1 some runs failed, 130 interrupted)."""
    parser = Parser(
        prog="curriq compare",
        description="Run arms × seeds × streams from one TOML, several at a time, and say which arm gains. "
        "Runs that are finished are not run again, unfinished ones are resumed.",
        epilog="docs/compare.md describes the file and each number; examples/compare.toml is an example.",
    )
    parser.add_argument("FILE", type=Path, help="what to compare, a TOML file")
    parser.add_argument("--out", type=Path, help="folder of runs and results (default: runs/NAME of FILE)")
    parser.add_argument("--workers", type=int, help="runs at a time (default: the file's, or 1)")
    options = parser.parse_args(list(arguments))
    return compare(load_plan(options.FILE, options.out, options.workers))


def compare(plan: Plan, again: str = "", progress: str = "auto") -> int:
    """The exit status after running a plan and writing comparison.json, the curves and the tables.

    Args:
        progress: as the setting of that name; with `none` only a run that fails or is stopped is told of.
        again: the command that goes on with it, where that is not `curriq compare` itself.

    Raises:
        CurriqError: a run in the folder has other settings, another process works there, or what a run would
            read has a fault.
    """
    from curriq.evaluate.assess import assess
    from curriq.report.outcome import print_comparison, save_curves

    # The workers inherit the lock, so that after a kill no run starts while an orphaned worker writes it.
    refusal = (
        f"--out {plan.out}: another `curriq compare` is at work there, or workers of one that was killed are "
        "still finishing their runs. Wait for them, or give another folder."
    )
    with exclusive(plan.out, refusal) as lock:
        finished = {run.name: run.config.train.steps for run in plan.runs if is_finished(run)}
        waiting = [run for run in plan.runs if run.name not in finished]
        if waiting:
            _require_same_files([run for run in plan.runs if run.name in finished])
        require_usable(*(run.config for run in waiting))
        jobs = [_job(run, plan.compare.workers) for run in waiting]
        if finished:
            print(f"{len(finished)} of {len(plan.runs)} runs are finished already.", file=sys.stderr)
        failed, stopped = run_jobs(
            jobs, plan.compare.workers, sum(finished.values()), lock, progress=progress
        )
        if stopped:
            again = again or f"curriq compare {quote(str(plan.file))} --out {quote(str(plan.out))}"
            print(f"stopped; all runs are saved. Go on with: {again}", file=sys.stderr)
            return 130
        with explained(plan.out):
            result = assess(plan, failed)
        path = plan.out / "comparison.json"
        write_atomically(path, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
        print_comparison(result)
        print(f"numbers  {path}", *save_curves(result, plan.out), sep="\n")
    return 1 if failed else 0


def is_finished(run: PlannedRun) -> bool:
    """Whether the run's folder holds its result; CurriqError when it holds a run with other settings."""
    settings = run.folder / "config.toml"
    if not settings.exists():
        return False
    changed = [
        f"{name} = {shown(theirs)} there, {shown(ours)} now"
        for name, ours, theirs in differences(run.config, load_toml(settings))
        if (name == "eval_every" or (field_owners()[name] != "log" and name not in HARMLESS))
        and not (name == "sources" and _same_but_pinned(ours, theirs))
    ]
    require(
        not changed,
        f"{run.folder} holds a run with other settings ({'; '.join(changed)}). Undo the change (for "
        "split_seed: vary_split under [compare]), remove the folder to run it again, or give another --out.",
    )
    edited = changed_code(recorded(run.folder, "code"), run.config)
    require(
        not edited,
        f"{run.folder} was trained by other code: the file of {' and '.join(edited)} has changed since. Undo "
        "the change, remove the folder to run it again, or give another --out.",
    )
    with explained(run.folder):
        return has_finished(run.folder)


def _require_same_files(finished: Sequence[PlannedRun]) -> None:
    """Raise CurriqError where a file that a finished run has read is another one now: the runs that are still
    to come would be of other data, and one mean of both."""
    from curriq.data import changed_files, file_hash

    for run in finished:
        files = recorded(run.folder, "files")
        now = {name: file_hash(Path(name)) for name in files if Path(name).exists()}
        changed = changed_files(files, now)
        require(
            not changed,
            f"{run.folder} was trained on other data: {'; '.join(changed)}. Restore the files, remove the "
            "folders of the runs of before to run them again, or give another --out.",
        )


def _same_but_pinned(planned: tuple[SourceConfig, ...], run: tuple[SourceConfig, ...]) -> bool:
    """Whether the sources differ only in the commits of hub data sets, which a run pins when it starts."""
    return len(planned) == len(run) and all(
        ours == (theirs if ours.is_pinned else replace(theirs, hub_revision=ours.hub_revision))
        for ours, theirs in zip(planned, run, strict=True)
    )


def _job(run: PlannedRun, workers: int) -> Job:
    """The command that starts the run, or resumes it from its checkpoint, with its share of the cores."""
    from curriq.lm.hardware import cpu_threads
    from curriq.lm.load import pick_device
    from curriq.train.checkpoint import checkpoint_folders

    program = [sys.executable, "-m", "curriq"]
    if checkpoint_folders(run.folder / "checkpoints"):
        command = [*program, "resume", str(run.folder)]
    else:
        # The run writes this file itself when it starts; writing it now leaves one place for settings.
        settings = run.folder / "config.toml"
        settings.parent.mkdir(parents=True, exist_ok=True)
        threads = cpu_threads(pick_device(run.config.lm.device), workers)
        config = run.config.override(threads=threads)
        write_atomically(settings, to_toml(config).encode())
        command = [*program, "train", "--config", str(settings)]
    return Job(
        name=run.name,
        command=command,
        log=run.folder / WORKER_LOG,
        steps=run.config.train.steps,
        progress=lambda: steps_logged(run.folder),
        result=lambda: "test loss {test_loss:.4f} in {seconds:.0f} s".format(**read_summary(run.folder)),
    )


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    finished_steps: int,
    lock: int,
    console: Console | None = None,
    poll_seconds: float = 0.2,
    progress: str = "auto",
) -> tuple[dict[str, str], bool]:
    """The last message of each job that failed, and whether Ctrl-C stopped them, after running all jobs, at
    most `workers` at once. One that fails does not stop the others.

    The first Ctrl-C interrupts every worker, waits for them to save, and starts no more; the second kills
    them.

    Args:
        finished_steps: steps of jobs that were finished before, for the display.
        lock: descriptor that the workers keep open; see `storage.exclusive`.
        console: standard error when None.
        progress: as the setting of that name.
    """
    display = _Display(console or terminal.console(stderr=True), jobs, finished_steps, progress)
    failed, stopped = dict[str, str](), False
    # With the bytes of the log before the start: what stands there is of an earlier one.
    waiting, running = deque(jobs), dict[str, tuple[Job, subprocess.Popen, int]]()
    with stop_flag() as stop, display.progress:
        try:
            while running or (waiting and not stopped):
                if stop() and not stopped:
                    stopped = True
                    for _, process, _ in running.values():
                        process.send_signal(signal.SIGINT)
                while waiting and len(running) < workers and not stopped:
                    job = waiting.popleft()
                    logged = job.log.stat().st_size if job.log.exists() else 0
                    running[job.name] = job, _start(job, lock), logged
                    display.started(job)
                time.sleep(poll_seconds)
                for job, process, logged in list(running.values()):
                    display.update(job)
                    if process.poll() is not None:
                        del running[job.name]
                        if process.returncode and not stopped:
                            failed[job.name] = _why(process.returncode, job.log, logged)
                        display.ended(job, process.returncode, failed.get(job.name))
        finally:
            for _, process, _ in running.values():
                process.kill()
                process.wait()
    return failed, stopped


def _start(job: Job, lock: int) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        # In its own session, so that the terminal's Ctrl-C reaches it only once, through us.
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(lock,),
            start_new_session=True,
        )


class _Display:
    """On a terminal a bar for all steps and one per worker; elsewhere a line when a job starts or ends."""

    def __init__(self, console: Console, jobs: Sequence[Job], finished_steps: int, kind: str) -> None:
        if kind == "auto":
            kind = "bar" if console.is_terminal else "lines"
        self._kind = kind
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            speed_estimate_period=600,  # steps come in bursts, because a worker takes seconds to start
            console=console,
            expand=True,
            disable=kind != "bar",
        )
        self._steps = {job.name: job.progress() for job in jobs}
        self._bars: dict[str, TaskID] = {}
        self._ended = 0
        done = finished_steps + sum(self._steps.values())
        total = finished_steps + sum(job.steps for job in jobs)
        self._all = self.progress.add_task("all steps", total=total, completed=done)

    def started(self, job: Job) -> None:
        done = self._steps[job.name]
        self._bars[job.name] = self.progress.add_task(job.name, total=job.steps, completed=done)
        if self._kind == "lines":
            self._print(f"{job.name}: started")

    def update(self, job: Job) -> None:
        if self._kind == "bar":
            done = job.progress()
            self.progress.update(self._bars[job.name], completed=done)
            self.progress.update(self._all, advance=done - self._steps[job.name])
            self._steps[job.name] = done

    def ended(self, job: Job, status: int, message: str | None) -> None:
        text, style = ("stopped", "yellow") if status else (job.result(), "")
        if message is not None:
            text, style = f"failed (exit status {status}): {message}", "red"
        self._ended += 1
        self.progress.remove_task(self._bars.pop(job.name))
        if status or self._kind != "none":
            self._print(f"[{self._ended}/{len(self._steps)}] {job.name}: {text}", style)

    def _print(self, text: str, style: str = "") -> None:
        self.progress.console.print(text, style=style, soft_wrap=True)


def _why(status: int, log: Path, start: int) -> str:
    """Why a worker ended: the signal that killed it, or what it said last."""
    if status >= 0:
        return last_line(log, start)
    memory = "; the machine may have too little memory" if -status == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-status).name}{memory}"


def last_line(log: Path, start: int = 0) -> str:
    """The last line of a log, from some byte on, that is not empty; the program's own error where there is
    one."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    own = [line for line in lines[-20:] if line.startswith("curriq: ")]
    return (own or lines or ["it printed nothing"])[-1].removeprefix("curriq: ")
