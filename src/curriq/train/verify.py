"""`curriq verify`: whether a run's folder holds what its checkpoints promise, and its repair."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from curriq.config import from_dict, load_run_config, require, to_toml
from curriq.errors import CurriqError
from curriq.parser import Parser
from curriq.runlog import read
from curriq.runlog.checkpoints import BadCheckpoint, checkpoint_folders, verify
from curriq.runlog.promise import METRICS, TABLES, Extent, Promise, broken, promised_parts, whole_until
from curriq.runlog.storage import exclusive, write_atomically

log = logging.getLogger("curriq")

Finding = tuple[str, str]
"""What was looked at, and what is wrong with it; empty where it holds."""
TRAINING = "another process is training this run"


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status: 0 when all holds or was repaired, else 1."""
    parser = Parser(
        prog="curriq verify",
        description="Check checkpoints, log, summary, data and cache of runs against their hashes. "
        "Half-written rows behind the last checkpoint are cut off, a lost config.toml is written again, "
        "damaged entries of the cache are removed; nothing that a checkpoint promises is ever removed.",
        epilog="docs/reliability.md says what is promised, and what to do about damage.",
    )
    parser.add_argument("RUN", type=Path, nargs="+", help="folder of a run, or of a comparison")
    options = parser.parse_args(list(arguments))
    from curriq.data import damaged_entries  # with torch, which `--help` need not wait for

    runs = [run for folder in options.RUN for run in runs_in(folder)]
    findings = [finding for run in runs for finding in verify_run(run)]
    for path in damaged_entries():
        log.warning(f"{path}: removed; the entry of the cache was damaged and will be made again.")
        path.unlink()
    for what, defect in findings:
        print(f"{'BAD ' if defect else 'ok  '} {what}{f': {defect}' if defect else ''}")
    bad = sum(bool(defect) for _, defect in findings)
    print(f"{len(findings) - bad} of {len(findings)} hold." if bad else f"All {len(findings)} hold.")
    return 1 if bad else 0


def runs_in(folder: Path) -> list[Path]:
    """The folder itself, or the runs of a comparison below it; CurriqError when there is neither."""
    if (folder / "checkpoints").is_dir() or (folder / "config.toml").exists():
        return [folder]
    begun = ("checkpoints", METRICS, "summary.json")  # a run that waits for its turn has its settings alone
    runs = sorted({path.parent for name in begun for path in folder.glob(f"*/*/{name}")})
    require(bool(runs), f"{folder} is neither the folder of a run nor of a comparison.")
    return runs


def verify_run(run: Path) -> Iterator[Finding]:
    """What was looked at in a run's folder, and what is wrong with it."""
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(run, TRAINING))
            idle = True
        except CurriqError:
            idle = False
            log.warning(f"{run}: {TRAINING}, so nothing is repaired.")
        except OSError as error:
            idle = False
            log.warning(f"{run}: it cannot be written ({error.strerror}), so nothing is repaired.")
        sound = None
        for path in checkpoint_folders(run / "checkpoints"):
            defect, manifest = _of_checkpoint(run, path)
            yield f"{path} and the log up to it", defect
            sound = sound or (None if defect else manifest)
        if sound is None:
            yield str(run / "checkpoints"), "no checkpoint from which the run could go on"
        elif idle:
            _repair_log(run, sound["log"])
            _repair_settings(run, sound["settings"])
        yield from _records(run)
        yield from _inputs(run)


def _of_checkpoint(run: Path, path: Path) -> tuple[str, dict[str, Any]]:
    """What is wrong with a checkpoint or the log that it covers, and its manifest."""
    try:
        manifest = verify(path)
    except BadCheckpoint as error:
        return str(error), {}
    return "; ".join(broken(run, manifest["log"])), manifest


def _repair_log(run: Path, promise: Promise) -> None:
    """Cut off what a kill left half-written behind the last checkpoint; whole rows and parts stay."""
    for name in promise:
        path, size = run / name, whole_until(run / name, Extent.of(promise, name).size)
        if path.stat().st_size > size:
            log.warning(
                f"{path}: cut to {size} bytes; what followed was half-written, behind the last checkpoint."
            )
            with path.open("rb+") as file:
                file.truncate(size)
    kept = {part.file for part in promised_parts(run, promise)}
    for path in (path for name in TABLES for path in (run / name).glob("*part-*")):
        if path.relative_to(run).as_posix() not in kept and _half_written(path):
            log.warning(f"{path}: removed; it was half-written, behind the last checkpoint.")
            path.unlink()


def _half_written(path: Path) -> bool:
    """Whether a part is seen to be: one that this process may not open is not."""
    try:
        path.open("rb").close()
    except OSError:
        return False
    return path.name.startswith(".") or bool(_defect(lambda: read.read_part(path)))


def _repair_settings(run: Path, settings: dict[str, Any]) -> None:
    if defect := _defect(lambda: load_run_config(run)):
        log.warning(f"{defect} It is written again, with the settings of the last checkpoint.")
        write_atomically(run / "config.toml", to_toml(from_dict(settings)).encode())


def _defect(reads: Callable[[], object]) -> str:
    """The error of a reader; empty when it has none."""
    try:
        reads()
    except CurriqError as error:
        return str(error)
    return ""


def _records(run: Path) -> Iterator[Finding]:
    """The small files that say what ran and how it ended."""
    environment = run / "environment.json"
    yield str(run / "config.toml"), _defect(lambda: load_run_config(run))
    yield str(environment), _defect(lambda: read.read_document(read.existing(environment)))
    if (run / "summary.json").exists():
        yield str(run / "summary.json"), _defect(lambda: read.read_summary(run))
        yield str(run / "test_losses.parquet"), _defect(lambda: read.read_test_losses(run))


def _inputs(run: Path) -> Iterator[Finding]:
    """The local files that a resume reads again; those that are not on this machine are left out."""
    from curriq.data import changed_files, file_hash

    for name, of_file in read.recorded(run, "files").items():
        if Path(name).exists():
            now = {name: file_hash(Path(name))}
            yield name, "; ".join(changed_files({name: of_file}, now))
