"""`curriq runs list` and `curriq runs prune`: the runs of a folder, and the room that they take."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich import filesize

from curriq import terminal
from curriq.config import Within, require
from curriq.errors import CurriqError
from curriq.parser import Parser
from curriq.report.chart import Table, fixed
from curriq.report.figures import print_table
from curriq.runlog.runs import RunState, as_json, find_runs, plan_pruning, read_state


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = Parser(
        prog="curriq runs", description="List runs, or free the room that their checkpoints take."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help="list or prune")
    shown = "how far the runs of a folder came, their losses, and what they take on the disk"
    lists = commands.add_parser("list", description=f"Show {shown}.", help=shown)
    lists.add_argument("FOLDER", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    lists.add_argument("--json", action="store_true", help="print a list of objects for a program")
    freed = "remove the checkpoints that nothing needs any more"
    prunes = commands.add_parser(
        "prune",
        help=freed,
        description="Show which checkpoints of runs can go, and with --yes remove them: all but the last, "
        "and leftovers of kills. A run that is training now is left alone. Log and results stay, so verify, "
        "report, compare and export work as before.",
    )
    prunes.add_argument("RUN", type=Path, nargs="+", help="folder of a run, or of several")
    kept = prunes.add_mutually_exclusive_group()
    kept.add_argument(
        "--keep-last", type=int, default=1, metavar="N", help="checkpoints that stay (default: 1)"
    )
    model = "of finished runs keep the last checkpoint's model alone: they cannot be resumed, nor score by Q"
    kept.add_argument("--keep-model", action="store_true", help=model)
    kept.add_argument("--checkpoints", action="store_true", help="of finished runs remove every checkpoint")
    prunes.add_argument("--yes", action="store_true", help="do it; without it nothing is removed")
    options = parser.parse_args(list(arguments))
    if options.command == "list":
        return list_runs(options.FOLDER, json=options.json)
    Within("[1, 1e6]", above="a run has fewer").check("keep_last", options.keep_last)
    return prune_runs(
        options.RUN, options.keep_last, options.keep_model, options.checkpoints, confirmed=options.yes
    )


def list_runs(folder: Path, *, json: bool = False) -> int:
    """The exit status after printing the runs at and below a folder."""
    states = list(map(read_state, find_runs(folder)))
    if json:
        print(as_json(states))
    elif not states:
        print(f"No runs in {folder}: `curriq train` makes one.")
    else:
        header = ["run", "method", "steps", "state", "validation", "test", "size", "checkpoints", "age"]
        now = time.time()
        console = terminal.console(soft_wrap=True)
        if not console.is_terminal:
            console.width = 200  # for a program or a file, in which no name may be cut
        print_table(console, Table(str(folder), header, [_row(state, folder, now) for state in states]))
        total, saved = (sum(getattr(s, name) for s in states) for name in ("size", "checkpoints_size"))
        took = f"{filesize.decimal(total)}, {filesize.decimal(saved)} of it checkpoints"
        print(f"{_several(len(states), 'run')}, {took} (`curriq runs prune {folder}` shows what can go).")
    return 0


def _row(run: RunState, folder: Path, now: float) -> list[str]:
    name = str(run.folder.relative_to(folder)) if run.folder != folder else run.folder.resolve().name
    return [
        name,
        run.method,
        f"{run.steps}/{run.total_steps or '?'}",
        run.state,
        fixed(run.validation_loss, ".4f"),
        fixed(run.test_loss, ".4f"),
        filesize.decimal(run.size),
        filesize.decimal(run.checkpoints_size),
        _age(now - run.changed),
    ]


def _age(seconds: float) -> str:
    """`40 s`, `12 min`, `5 h` or `3 d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def prune_runs(
    folders: Sequence[Path], keep_last: int, model_only: bool, no_checkpoint: bool, *, confirmed: bool
) -> int:
    """The exit status after removing what can go, or after showing it where that is not `confirmed`."""
    runs = [run for folder in folders for run in find_runs(folder)]
    require(bool(runs), f"{' '.join(map(str, folders))}: there is no run in it.")
    freed, status = 0, 0
    for run in dict.fromkeys(runs):
        plan = plan_pruning(run, keep_last, model_only, no_checkpoint)
        if plan.reason:
            print(f"{run}: {plan.reason}.")
            continue
        what = [path.name for path in plan.paths]
        if plan.stripped is not None:
            what.append(f"{plan.stripped.name} but for its {'model' if plan.kept else 'manifest'}")
        if confirmed:
            try:
                plan.carry_out()
            except CurriqError as error:  # it has started, or was damaged, since the plan was made
                print(error)
                status = 2
                continue
        freed += plan.size
        print(f"{run}: {filesize.decimal(plan.size)} ({', '.join(what)})")
    if confirmed:
        print(f"Freed {filesize.decimal(freed)}.")
    else:
        print(f"{filesize.decimal(freed)} can be freed; nothing was removed. Add --yes to do it.")
    return status


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
