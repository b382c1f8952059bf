"""`curriq compare`: runs the unfinished of arms × seeds × streams, and compares all of them."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from curriq.config import SourceConfig, differences, field_owners, load_toml, to_toml
from curriq.errors import CurriqError
from curriq.evaluate.plan import WORKER_LOG, Plan, PlannedRun, load_plan, shown
from curriq.evaluate.workers import Job, run_jobs, steps_logged
from curriq.runlog.read import read_summary
from curriq.runlog.storage import exclusive, write_atomically

HARMLESS = ("threads", "run_dir")
"""Settings outside [log] that may differ in a finished run."""


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status (0 done, 1 some runs failed, 130 interrupted)."""
    parser = argparse.ArgumentParser(
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


def compare(plan: Plan) -> int:
    """The exit status after running a plan and writing comparison.json, the curves and the tables.

    Raises:
        CurriqError: a run in the folder has other settings, or another process works there.
    """
    from curriq.evaluate.assess import assess
    from curriq.report.outcome import print_comparison, save_curves

    # The workers inherit the lock, so that after a kill no run starts while an orphaned worker writes it.
    refusal = (
        f"--out {plan.out}: another `curriq compare` is at work there, or workers of one that was killed are "
        "still finishing their runs. Wait for them, or give another folder."
    )
    with exclusive(plan.out, refusal) as lock:
        finished = {run.name for run in plan.runs if is_finished(run)}
        jobs = [_job(run, plan.compare.workers) for run in plan.runs if run.name not in finished]
        done_before = sum(run.config.train.steps for run in plan.runs if run.name in finished)
        if finished:
            print(f"{len(finished)} of {len(plan.runs)} runs are finished already.", file=sys.stderr)
        outcome = run_jobs(jobs, plan.compare.workers, done_before, lock)
        if outcome.stopped:
            again = f"curriq compare {plan.file} --out {plan.out}"
            print(f"stopped; all runs are saved. Go on with: {again}", file=sys.stderr)
            return 130
        result = assess(plan, outcome.failed)
        path = plan.out / "comparison.json"
        write_atomically(path, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
        print_comparison(result)
        for line in (f"numbers  {path}", *save_curves(result, plan.out)):
            print(line)
    return 1 if outcome.failed else 0


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
    if changed:
        raise CurriqError(
            f"{run.folder} holds a run with other settings ({'; '.join(changed)}). Undo the change, "
            "remove the folder to run it again, or give another --out."
        )
    return (run.folder / "summary.json").exists() and bool(read_summary(run.folder)["finished"])


def _same_but_pinned(planned: tuple[SourceConfig, ...], run: tuple[SourceConfig, ...]) -> bool:
    """Whether the sources differ only in the commits of hub data sets, which a run pins when it starts."""
    return len(planned) == len(run) and all(
        ours == (theirs if ours.is_pinned else dataclasses.replace(theirs, hub_revision=ours.hub_revision))
        for ours, theirs in zip(planned, run, strict=True)
    )


def _job(run: PlannedRun, workers: int) -> Job:
    """The command that starts the run, or resumes it from its checkpoint, with its share of the cores."""
    from curriq import parallel
    from curriq.train.checkpoint import checkpoint_folders

    program = [sys.executable, "-m", "curriq"]
    if checkpoint_folders(run.folder / "checkpoints"):
        command = [*program, "resume", str(run.folder)]
    else:
        # The run writes this file itself when it starts; writing it now leaves one place for settings.
        settings = run.folder / "config.toml"
        settings.parent.mkdir(parents=True, exist_ok=True)
        config = run.config.override(threads=max(1, parallel.cores() // workers))
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
