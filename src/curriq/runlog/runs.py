"""Runs on the disk: which there are, how far they came, what they take, and what of them can go."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curriq.config import load_run_config, require
from curriq.errors import CurriqError
from curriq.runlog.checkpoints import (
    BadCheckpoint,
    checkpoint_folders,
    files_below,
    folder_size,
    remove_folder,
    require_log,
    strip_checkpoint,
    verify,
)
from curriq.runlog.promise import METRICS
from curriq.runlog.read import has_finished, last_rows, read_summary, steps_logged
from curriq.runlog.storage import LOCK, exclusive, is_locked

log = logging.getLogger("curriq")

DEPTH = 4
"""Folders below the one that is listed in which runs are looked for: a folder of comparisons has three."""
LEFTOVERS = (".tmp-*", ".reserve", "rejected-step-*")
"""Beside the checkpoints: what a kill leaves, and checkpoints that could not be used."""
RUNNING = "it is running"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How far a run came, and what it takes.

    Attributes:
        state: `finished`, `running`, `interrupted` (it can be resumed), `not started` or `damaged`.
        validation_loss, test_loss: nats per token; None where not measured.
        size, checkpoints_size: bytes.
        changed: when something was last written, seconds since 1970.
    """

    folder: Path
    method: str
    steps: int
    total_steps: int
    state: str
    validation_loss: float | None
    test_loss: float | None
    size: int
    checkpoints_size: int
    changed: float


def find_runs(folder: Path) -> list[Path]:
    """Folders of runs at and below a folder, sorted by name; CurriqError where there is no such folder."""
    require(
        folder.is_dir(), f"{folder}: there is no such folder. Give that of a run, or one that holds runs."
    )
    return sorted(_below(folder, DEPTH))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "config.toml").is_file() or (folder / METRICS).is_file():
        yield folder  # what is below a run is its own
    elif depth:
        try:
            below = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
        except PermissionError as error:  # such as lost+found: the others are listed
            log.warning(f"{folder} is left out: {error.strerror}.")
            return
        for path in below:
            yield from _below(path, depth - 1)


def read_state(run: Path) -> RunState:
    """The state of a run as its files say it; a damaged file makes it `damaged`, and is no error."""
    steps, method, total, summary = steps_logged(run), "?", 0, dict[str, Any]()
    try:
        config = load_run_config(run)
        method, total = config.method, config.train.steps
        summary = read_summary(run) if (run / "summary.json").exists() else {}
        state = "finished" if summary.get("finished") else "interrupted"
        if not summary and not steps and not checkpoint_folders(run / "checkpoints"):
            state = "not started"
    except CurriqError:
        state = "damaged"
    if is_locked(run):
        state = "running"
    losses = [row["validation/loss"] for row in last_rows(run) if "validation/loss" in row]
    files = [found for path, found in files_below(run) if path.name != LOCK]
    return RunState(
        folder=run,
        method=str(summary.get("selector", method)),
        steps=int(summary.get("steps", steps)),
        total_steps=total,
        state=state,
        validation_loss=summary.get("validation_loss", losses[-1] if losses else None),
        test_loss=summary.get("test_loss"),
        size=sum(file.st_size for file in files),
        checkpoints_size=folder_size(run / "checkpoints"),
        changed=max((file.st_mtime for file in files), default=run.stat().st_mtime),
    )


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What of a run can go, and why the rest stays.

    Attributes:
        paths: to remove whole: older checkpoints, and leftovers.
        stripped: checkpoint that is reduced to the files whose names begin with `kept`; None for none.
        size: bytes that this frees.
        reason: why nothing goes; empty otherwise.
    """

    run: Path
    paths: tuple[Path, ...] = ()
    stripped: Path | None = None
    kept: str = ""
    size: int = 0
    reason: str = ""

    def carry_out(self) -> None:
        """Remove it; a kill at any moment leaves a run that `curriq verify` accepts.

        Raises:
            CurriqError: the run is being trained now, or its newest checkpoint is damaged.
        """
        with exclusive(self.run, f"{self.run}: {RUNNING}, so nothing was removed."):
            if self.stripped is not None:
                try:
                    strip_checkpoint(self.stripped, self.kept)
                except BadCheckpoint as defect:
                    raise CurriqError(f"{self.stripped}: {defect}. Nothing was removed.") from None
            for path in self.paths:
                if path.is_file():
                    path.unlink()
                elif path.name.startswith("."):
                    shutil.rmtree(path)
                else:
                    remove_folder(path)


def plan_pruning(
    run: Path, keep_last: int = 1, model_only: bool = False, no_checkpoint: bool = False
) -> Pruning:
    """What can be removed from a run.

    Older checkpoints go, and leftovers of kills. The newest one stays whole, so that the run can be resumed,
    unless the run is finished and less is wanted.

    Args:
        keep_last: checkpoints that stay.
        model_only: of the last checkpoint of a finished run only the model stays: no resume, no score by Q.
        no_checkpoint: of a finished run no checkpoint stays; its log and its results do.
    """
    if is_locked(run):
        return Pruning(run=run, reason=RUNNING)
    checkpoints = checkpoint_folders(run / "checkpoints")
    defect = next((defect for path in checkpoints[:keep_last] if (defect := _defect(run, path))), "")
    if defect:
        return Pruning(run=run, reason=f"{defect}; an older checkpoint may be its way on")
    if (model_only or no_checkpoint) and not _is_finished(run):
        return Pruning(run=run, reason="it is not finished, and goes on from its checkpoint")
    leftovers = [path for name in LEFTOVERS for path in (run / "checkpoints").glob(name)]
    paths = (*checkpoints[keep_last:], *leftovers)
    size = sum(path.stat().st_size if path.is_file() else folder_size(path) for path in paths)
    stripped, kept = None, "" if no_checkpoint else "lm/"
    if checkpoints and (model_only or no_checkpoint):
        within = files_below(checkpoints[0])
        going = sum(found.st_size for path, found in within if not _stays(path, checkpoints[0], kept))
        stripped, size = checkpoints[0] if going else None, size + going
    reason = "" if size else "there is nothing to remove"
    return Pruning(run=run, paths=paths, stripped=stripped, kept=kept, size=size, reason=reason)


def _stays(path: Path, checkpoint: Path, kept: str) -> bool:
    name = path.relative_to(checkpoint).as_posix()
    return name == "manifest.json" or bool(kept and name.startswith(kept))


def _defect(run: Path, checkpoint: Path) -> str:
    """Why a run cannot go on from a checkpoint; empty where it can, or could before it was pruned."""
    try:
        require_log(run, verify(checkpoint))
    except BadCheckpoint as defect:
        return f"{checkpoint.name}: {defect}"
    return ""


def _is_finished(run: Path) -> bool:
    try:
        return has_finished(run)
    except CurriqError:
        return False


def as_json(states: list[RunState]) -> str:
    """The states as JSON, a list of objects."""
    return json.dumps([vars(state) | {"folder": str(state.folder)} for state in states], indent=1)
