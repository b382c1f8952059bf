"""Checkpoints on the disk, without torch: which there are, whether they are whole, and their removal.

`train/checkpoint.py` writes them and describes the folder.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import curriq
from curriq.errors import CurriqError
from curriq.runlog.promise import broken
from curriq.runlog.storage import write_atomically

log = logging.getLogger("curriq")

FORMAT = 3
"""Version of the layout in `train/checkpoint.py`. Raise it when an older curriq could not read what this
one writes."""
PARTS_FORMAT = 4
"""Version of the layout in `train/parts.py`."""
FORMATS = (FORMAT, PARTS_FORMAT)


class BadCheckpoint(Exception):
    """One checkpoint cannot be used, for the reason that the message names."""


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, when every file has the size and the hash in it; else BadCheckpoint."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        written, files = manifest["format"], manifest["files"]
    except OSError as error:
        raise BadCheckpoint(f"manifest.json cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint("manifest.json is damaged") from error
    if written not in FORMATS:
        fix = "upgrade curriq" if isinstance(written, int) and written > max(FORMATS) else "it cannot be used"
        wrote = manifest.get("versions", {}).get("curriq", "unknown")
        raise BadCheckpoint(
            f"checkpoint format {written} (written by curriq {wrote}), while this curriq "
            f"{curriq.__version__} reads the formats {FORMAT} and {PARTS_FORMAT}: {fix}"
        )
    if manifest.get("sha256") != manifest_digest(manifest) or manifest["step"] != step_of(path):
        raise BadCheckpoint("manifest.json is damaged")
    for name, stated in files.items():
        try:
            if (size := (path / name).stat().st_size) != stated["size"]:
                raise BadCheckpoint(f"{name} has {size} bytes instead of {stated['size']}")
            if sha256(path / name) != stated["sha256"]:
                raise BadCheckpoint(f"{name} is damaged: its SHA-256 is not the one in the manifest")
        except OSError as error:
            raise BadCheckpoint(f"{name} cannot be read ({error.strerror})") from error
    return manifest


def require_log(run_dir: Path, manifest: dict[str, Any]) -> None:
    """Raise BadCheckpoint where the run's log does not hold what a checkpoint's manifest promises of it."""
    if lost := broken(run_dir, manifest["log"]):
        raise BadCheckpoint(f"the log that it covers is not whole: {'; '.join(lost)}")


def latest_model(run_dir: Path, export: Callable[[Path], object] | None = None) -> Path:
    """The Hugging Face folder of the newest checkpoint of a run that is whole and has its model.

    A warning names the newer ones, if there are any.

    Args:
        export: writes the weights of a checkpoint that has them in parts into its folder.

    Raises:
        CurriqError: there is none; names what is wrong with each checkpoint.
    """
    defects: list[str] = []
    for path in checkpoint_folders(run_dir / "checkpoints"):
        try:
            manifest = verify(path)
        except BadCheckpoint as defect:
            defects.append(f"{path.name}: {defect}")
            continue
        if any(name.startswith("lm/") for name in manifest["files"]):
            if not has_weights(manifest):
                assert export is not None, "weights in parts need somebody who reads them"
                export(path)
            if defects:
                log.warning(f"{run_dir}: taking the model of {path.name}; skipped {'; '.join(defects)}.")
            return path / "lm"
        defects.append(f"{path.name}: `curriq runs prune` has removed its model")
    why = (
        f"its checkpoints cannot be used ({'; '.join(defects)})"
        if defects
        else "it has saved no checkpoint yet"
    )
    raise CurriqError(
        f"{run_dir} holds no model: {why}. Train again with `curriq train --config "
        f"{run_dir / 'config.toml'} --run-dir NEW`."
    )


def has_weights(manifest: dict[str, Any]) -> bool:
    """Whether a checkpoint's Hugging Face folder has the weights; otherwise its parts have them."""
    return manifest["format"] == FORMAT or any(name.endswith(".safetensors") for name in manifest["files"])


def lacks_weights(lm: Path) -> bool:
    """Whether the Hugging Face folder of a checkpoint leaves its weights to the parts beside it."""
    whole = ("model.safetensors", "model.safetensors.index.json")
    return (lm.parent / "parts").is_dir() and not any((lm / name).exists() for name in whole)


def seal(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint anew, with its own hash."""
    manifest["sha256"] = manifest_digest(manifest)
    write_atomically(path / "manifest.json", json.dumps(manifest, indent=1).encode())


def strip_checkpoint(path: Path, kept: str = "") -> None:
    """Remove the files of a checkpoint but for those whose names begin with `kept`, and list them in its
    manifest, which still vouches for the log; BadCheckpoint when it is damaged."""
    manifest = verify(path)
    files = manifest["files"]
    removed = [name for name in files if not (kept and name.startswith(kept))]
    manifest["pruned"] = sorted({*removed, *pruned(manifest)})
    manifest["files"] = {name: stated for name, stated in files.items() if name not in removed}
    # The manifest first: a file that it does not name is harmless, one that it names and lacks is damage.
    seal(path, manifest)
    for name in manifest["pruned"]:
        (path / name).unlink(missing_ok=True)
    for folder in (path / "lm", path / "parts"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def pruned(manifest: dict[str, Any]) -> list[str]:
    """The files that `curriq runs prune` has removed from a checkpoint."""
    return manifest.get("pruned", [])


def remove_folder(path: Path) -> None:
    """Remove a folder; one that is removed by half no longer has its name."""
    doomed = path.with_name(f".tmp-old-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    named = (p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal())
    return sorted(named, key=step_of, reverse=True)


def resume_command(folder: Path) -> str:
    """What goes on with the run in a folder, for a shell."""
    return f"curriq resume {quote(str(folder))}"


def again_command(folder: Path) -> str:
    """What starts another run with the settings of the one in a folder, for a shell."""
    return f"curriq train --config {quote(str(folder / 'config.toml'))} --run-dir NEW"


def in_training(folder: Path) -> str:
    """Why a run that another process is training is left alone."""
    return (
        f"--run-dir {folder}: another process is training this run. Wait for it, or stop it with Ctrl-C and "
        "resume."
    )


def require_new_run(folder: Path) -> None:
    """Refuse a folder in which no run can start; nothing is written.

    Raises:
        CurriqError: the folder holds a checkpoint, is no folder, or may not be written.
    """
    if checkpoint_folders(folder / "checkpoints"):
        raise CurriqError(
            f"--run-dir {folder} holds a run already: go on with `{resume_command(folder)}`, or "
            "give another folder."
        )
    try:
        at = folder.absolute()
        while not at.exists():
            at = at.parent
        reason = errno.EACCES if not os.access(at, os.W_OK | os.X_OK) else None
        reason = reason if at.is_dir() else errno.ENOTDIR
    except OSError as error:  # too long a name, for instance
        reason = error.errno
    if reason is not None:
        raise unusable_folder(folder, os.strerror(reason))


def unusable_folder(folder: Path, reason: str | None) -> CurriqError:
    """The error for a folder that the system refuses."""
    return CurriqError(
        f"--run-dir {folder} cannot be the folder of a run ({reason}): give a new folder, or an empty one, "
        "in a place where you may write."
    )


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own `sha256` entry."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def files_below(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Each file below a folder and its size and times; none when there is no such folder. A run that trains
    renames and removes what it writes: what goes meanwhile is left out."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder; 0 when there is no such folder."""
    return sum(found.st_size for _, found in files_below(folder))
