"""`curriq train --against NAME`: another run with the same settings beside a finished one, and what differs.

It tells at the end of a run what its curriculum brought. One seed proves nothing; `curriq try` judges.
"""

import hashlib
import json
import logging
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import numpy as np

import curriq
from curriq import terminal
from curriq.config import RunConfig, load_run_config, refuse_unknown, require, to_dict
from curriq.config.checks import require_one_process
from curriq.config.effect import settings_read
from curriq.errors import CurriqError
from curriq.evaluate.statistics import first_crossing, ratio_to_target
from curriq.presets import PRESETS, is_rule, rule_settings
from curriq.runlog.checkpoints import checkpoint_folders, resume_command
from curriq.runlog.read import AXES, has_finished, read_document, read_metrics, read_summary

if TYPE_CHECKING:
    from curriq.train.result import RunResult

log = logging.getLogger("curriq")

UNIFORM = "uniform"
MACHINE = ("machine", "hardware", "device", "threads", "versions")
"""Entries of `environment.json` that seconds and last bits depend on."""


def check_against(config: RunConfig, name: str) -> None:
    """Refuse, before anything is trained, a `--against` that is unknown or no other run.

    Raises:
        CurriqError: no preset has this name, its settings do not fit or are those of the run, or several
            processes train together.
    """
    instead = "train the two runs by two calls, or let `curriq compare` do it"
    require_one_process(f"--against {name}", instead)
    other = other_config(config, name)
    another = "recommended" if config.method == UNIFORM else UNIFORM
    require(
        settings_read(other) != settings_read(config),
        f"--against {name}: the run itself has these settings. Compare it with another, such as --against "
        f"{another}, or choose another --preset or --selector.",
    )


def other_config(config: RunConfig, name: str) -> RunConfig:
    """The run with another rule, that of a preset or plain training (`uniform`); data, model, steps and seed
    are the same."""
    refuse_unknown([name], (UNIFORM, *PRESETS), "--against: ", "method")
    settings = rule_settings("default" if name == UNIFORM else name)
    rule = {setting: value for setting, value in settings.items() if is_rule(setting)}
    return config.override(**(rule | ({"selector": UNIFORM} if name == UNIFORM else {})))


def go_on_command(result: "RunResult", name: str) -> str:
    """What goes on with a run and the other one, for a shell."""
    return f"{resume_command(result.run_dir)} --against {quote(name)}"


def train_beside(result: "RunResult", name: str) -> int:
    """Train the other run, or take the one that is recorded for these settings, data, version and machine,
    and print what differs; returns the exit status, 130 where Ctrl-C stopped it."""
    from curriq.train.run import resume, train

    config = load_run_config(result.run_dir)  # as it was trained: a resumed run knows no other
    folder = folder_beside(config, result.run_dir, name)
    if recorded := has_finished(folder):
        log.info(f"{name}: recorded in {folder} with the same settings, data, version and machine.")
    else:
        log.info(f"now {name}, with the same settings, for comparison; it is kept in {folder}.")
        begun = bool(checkpoint_folders(folder / "checkpoints"))
        other = other_config(config, name).override(run_dir=str(folder))
        if not (resume(folder) if begun else train(other)).finished:
            log.warning(f"go on with it, and compare, by `{go_on_command(result, name)}`.")
            return 130
    console = terminal.console(soft_wrap=True)
    for line in differences_between(result.run_dir, folder, name, recorded=recorded):
        console.print(line)
    return 0


def folder_beside(config: RunConfig, run_dir: Path, name: str) -> Path:
    """`NAME-SEED-HASH` beside the run's folder, the same for the same settings, data, version and machine."""
    settings = {section: values for section, values in to_dict(other_config(config, name)).items()}
    settings["log"] = {"eval_every": config.log.eval_every}
    environment = read_document(run_dir / "environment.json")
    settings["train"] |= {"threads": environment.get("threads")}
    about = {
        "settings": settings,
        "curriq": curriq.__version__,
        "data": read_summary(run_dir)["data_fingerprint"],
        **{entry: environment.get(entry) for entry in MACHINE},
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    return run_dir.resolve().parent / f"{name}-{config.train.seed}-{digest}"


def differences_between(run_dir: Path, other: Path, name: str, *, recorded: bool) -> list[str]:
    """What the run brought against the other one, in lines: test loss, windows and seconds to the other's
    final loss; and that one seed proves nothing."""
    ours, theirs = read_summary(run_dir), read_summary(other)
    if ours["data_fingerprint"] != theirs["data_fingerprint"]:
        raise CurriqError(f"{run_dir} and {other} saw different data: remove {other}, and train again.")
    curves = {folder: _curves(folder) for folder in (run_dir, other)}
    change = ours["test_loss"] - theirs["test_loss"]
    better = "less" if change < 0 else "more"
    origin = "recorded" if recorded else "just trained"
    return [
        f"\nAgainst {name} training with the same settings and seed ({other}, {origin}):",
        f"test loss   {abs(change):.4f} nats per token {better} ({ours['test_loss']:.4f}, {name} "
        f"{theirs['test_loss']:.4f})",
        f"windows     {_cost(curves[run_dir], curves[other], 'windows', name)}",
        f"seconds     {ours['seconds']:.1f}, {name} {theirs['seconds']:.1f}; "
        f"{_cost(curves[run_dir], curves[other], 'seconds', name)}",
        "One seed proves nothing: `curriq try` with the same data and model judges it on several.",
    ]


Curves = dict[str, tuple[np.ndarray, np.ndarray]]
"""Axis → values, and validation losses there."""


def _curves(folder: Path) -> Curves:
    rows = [row for row in read_metrics(folder) if "validation/loss" in row]
    losses = np.array([row["validation/loss"] for row in rows], dtype=float)
    return {
        axis: (np.array([row[AXES[axis]] for row in rows], float), losses) for axis in ("windows", "seconds")
    }


def _cost(ours: Curves, theirs: Curves, axis: str, name: str) -> str:
    """`0.41 of those that uniform needed to reach its final validation loss (3,936 of 9,600)`."""
    (x, y), (other_x, other_y) = ours[axis], theirs[axis]
    ratio = ratio_to_target(x, y, other_x, other_y)
    target = float(other_y[-1])
    if ratio.censored:
        return f"{name}'s final validation loss of {target:.4f} was not reached"
    form = ",.0f" if axis == "windows" else ",.1f"
    reached, needed = first_crossing(x, y, target)[0], first_crossing(other_x, other_y, target)[0]
    return (
        f"{ratio.value:.2f} of those that {name} needed to reach its final validation loss of {target:.4f} "
        f"({reached:{form}} of {needed:{form}})"
    )
