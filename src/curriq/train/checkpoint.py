"""Checkpoints that survive a killed process, a full disk and a flipped bit.

    RUN/checkpoints/step-00000200/
        lm/              a Hugging Face folder: config, safetensors, tokenizer
        state.pt         everything else a bitwise resume needs, readable with `weights_only=True`
        manifest.json    format version, step, library versions, settings, extent and SHA-256 of the log,
                         size and SHA-256 of every other file

A checkpoint is written under a temporary name, forced to the disk and then renamed, so a folder called
`step-…` is always complete; only then are older ones removed. Later damage shows in the hashes. The manifest
also says how much of the run's log the checkpoint covers (`runlog/promise.py`). Between two saves a reserve
file keeps room for the next one, so a disk that others fill up ends a run with everything saved. Where
processes hold parts of the model, each writes its own (`train/parts.py`), and the folder is finished here.
"""

import errno
import importlib.metadata
import io
import json
import logging
import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from rich import filesize
from torch import Tensor

import curriq
from curriq.errors import CurriqError
from curriq.runlog.checkpoints import (
    FORMAT,
    PARTS_FORMAT,
    BadCheckpoint,
    checkpoint_folders,
    folder_size,
    manifest_digest,
    pruned,
    remove_folder,
    require_log,
    sha256,
    step_of,
    verify,
)
from curriq.runlog.promise import Promise
from curriq.runlog.storage import LOCK, fsync, make_folder
from curriq.train.parts import PARTS, described, joined, parts_size, split
from curriq.types import State

STATE = "state.pt"
PRUNED = "`curriq runs prune` has removed its training state"
SLACK = 64 * 1024
"""Bytes beside the next checkpoint that the reserve keeps free: the log's last rows, and the summary."""

log = logging.getLogger("curriq")


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A verified checkpoint.

    Attributes:
        step: number of finished steps, the index of the next one.
        state: as given to `Checkpointer.save`; tensors are on the CPU.
    """

    path: Path
    step: int
    state: State
    manifest: dict[str, Any]

    @property
    def lm(self) -> Path:
        """The Hugging Face folder of the language model."""
        return self.path / "lm"


class NotSaved(Exception):
    """The disk refused a checkpoint; says why, what it needs, and what is left of earlier ones."""


class NoRoom(Exception):
    """A checkpoint is saved, and the disk has no room for the next one; says how much it needs."""


class Checkpointer:
    """The only writer of a run's checkpoints; the newest `keep` of them stay.

    Args:
        about: what else the manifests say, for instance the settings.
        exported: bytes that the last checkpoint takes beyond the others.
    """

    def __init__(
        self, run_dir: Path, keep: int, about: Mapping[str, Any] | None = None, exported: int = 0
    ) -> None:
        assert keep >= 1, keep
        self.folder = run_dir / "checkpoints"
        self.keep = keep
        self.reserve = Reserve(self.folder / ".reserve")
        self.exported = exported
        self._about = about or {}
        self._last_size = 0
        self._lock = run_dir / LOCK
        self._held = self._lock.exists()
        for leftover in self.folder.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def save(
        self, step: int, state: State, save_lm: Callable[[Path], object], log: Promise | None = None
    ) -> Path:
        """The folder of the new checkpoint; all but the `keep` newest are removed.

        Args:
            step: number of finished steps.
            state: plain containers, numbers, strings and tensors only; TypeError for anything else.
            save_lm: writes the language model and its tokenizer into the folder it is given.
            log: what the checkpoint promises of the log.

        Raises:
            NotSaved: the disk refused it; the earlier checkpoints are untouched.
        """
        require_plain(state)
        with self._refusals(step):
            temporary = self._begin(step, save_lm, log)
            if temporary is None:
                return self._final(step)
            # Through a Python file, because torch's own writer hides the operating system's error.
            with (temporary / STATE).open("wb") as file:
                torch.save(state, file)
            return self.finish(step, log)

    def begin(self, step: int, save_lm: Callable[[Path], object], log: Promise | None = None) -> Path | None:
        """A folder with the language model in it, for the rest of a checkpoint; None where there is the same
        checkpoint already, which is not risked to write it again: a run is deterministic.

        Raises:
            CurriqError: the run's folder is gone.
            NotSaved: the disk refused it; the earlier checkpoints are untouched.
        """
        with self._refusals(step):
            return self._begin(step, save_lm, log)

    def _begin(self, step: int, save_lm: Callable[[Path], object], log: Promise | None) -> Path | None:
        if self._held and not self._lock.exists():  # whoever writes the log makes the folder again
            raise CurriqError(
                f"{self.folder.parent} is gone: it was moved or removed while its run was at work. What "
                "followed the last checkpoint is lost: go on from there with `curriq resume` and the "
                "folder's new name."
            )
        self.reserve.release()
        make_folder(self.folder)
        with suppress(BadCheckpoint):
            if verify(self._final(step))["log"] == (log or {}):
                return None
        temporary = self._temporary(step)
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "lm").mkdir(parents=True)
        save_lm(temporary / "lm")
        return temporary

    def finish(
        self, step: int, log: Promise | None = None, parts: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Path:
        """Make the folder that `begin` gave a checkpoint; all but the `keep` newest are removed.

        Args:
            parts: files that others have written, forced to the disk and hashed.
        """
        temporary, final = self._temporary(step), self._final(step)
        write_manifest(temporary, step, {**self._about, "log": log or {}}, parts)
        self.set_aside_from(step)
        temporary.rename(final)
        fsync(self.folder)
        self._prune()
        return final

    def refuse(self, step: int, reason: str) -> str:
        """Remove what there is of a checkpoint that could not be written; returns the message."""
        shutil.rmtree(self._temporary(step), ignore_errors=True)
        return self._refused(step, reason)

    @contextmanager
    def _refusals(self, step: int) -> Generator[None]:
        try:
            yield
        except BaseException as error:
            refusal = disk_error(error)
            if refusal is None:
                shutil.rmtree(self._temporary(step), ignore_errors=True)
                raise
            raise NotSaved(self.refuse(step, refusal)) from error

    def _final(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _temporary(self, step: int) -> Path:
        return self.folder / f".tmp-step-{step:08d}"

    def hold_room(self, saved: Path, state: State | None = None) -> None:
        """Keep room for the checkpoint after `saved`, the newest one.

        It will have that one's size and what the last interval added, or a sixteenth. The first of a run has
        no moments of the optimizer yet and empty buffers: `state` is the state after a step, to be measured.
        All the checkpoints that are to be kept must fit.

        Raises:
            NoRoom: the disk has not that much.
        """
        size = folder_size(saved)
        growth = max(size // 16, size - self._last_size if self._last_size else 0)
        self._last_size = size
        if state is not None:
            size = folder_size(saved / "lm") + saved_size(state)
        size += growth + SLACK + self.exported
        missing = max(1, self.keep + 1 - len(checkpoint_folders(self.folder)))
        free = shutil.disk_usage(self.folder).free + self.reserve.size
        try:
            if missing * size > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.reserve.hold(size)
        except OSError as error:
            needed = f"the next one needs about {filesize.decimal(size)}"
            if missing > 1:
                needed = f"{missing} more of about {filesize.decimal(size)} have to fit"
            raise NoRoom(
                f"{self.folder} has no room for the next checkpoint ({error.strerror}): {needed}, "
                f"{filesize.decimal(free)} are free"
            ) from error

    def set_aside_from(self, step: int) -> None:
        """Rename checkpoints of this step or a later one, so that no unusable one counts as the newest."""
        for path in checkpoint_folders(self.folder):
            if step_of(path) >= step:
                aside = path.with_name(f"rejected-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                log.warning(f"{path} could not be used and was renamed to {aside.name}; delete it at will.")

    def _prune(self) -> None:
        for path in checkpoint_folders(self.folder)[self.keep :]:
            try:
                remove_folder(path)
            except OSError as error:
                log.warning(f"the old checkpoint {path} could not be removed: {error}.")

    def _refused(self, step: int, refusal: str) -> str:
        needed, kept = "", "there is no earlier checkpoint"
        if earlier := checkpoint_folders(self.folder):
            needed = f"It needs about {filesize.decimal(folder_size(earlier[0]))}, "
            kept = f"the checkpoint of step {step_of(earlier[0])} is intact"
        folder = self.folder.absolute()
        existing = next(path for path in (folder, *folder.parents) if path.is_dir())
        return (
            f"the checkpoint of step {step} could not be written to {self.folder}: {refusal}. {needed}"
            f"{filesize.decimal(shutil.disk_usage(existing).free)} are free; {kept}"
        )


@dataclass(frozen=True)
class Finish:
    """What makes a folder in which all ranks have written their parts a checkpoint. It works in a thread of
    rank 0, and reads nothing that a step changes.

    Args:
        state: content of the file of everything else.
        promise: what the checkpoint promises of the log.
    """

    checkpointer: Checkpointer
    step: int
    state: bytes
    promise: Promise

    def __call__(self, folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> tuple[Path, str]:
        """The checkpoint; and why the next one has no room, if it has none."""
        (folder / STATE).write_bytes(self.state)
        path = self.checkpointer.finish(self.step, self.promise, parts)
        try:
            self.checkpointer.hold_room(path)
        except NoRoom as error:
            return path, str(error)
        return path, ""

    def refused(self, reason: str) -> str:
        """The message where it could not be written, of which nothing stays."""
        return self.checkpointer.refuse(self.step, reason)


class Reserve:
    """A file that takes up room on the disk until it is released."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def hold(self, size: int) -> None:
        """Take up so many bytes; OSError when the disk has not that much, and then none are taken."""
        if not hasattr(os, "posix_fallocate"):
            return  # macOS, Windows: the free space that was just looked up is all that can be known
        try:
            with self.path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            self.release()
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise

    def release(self) -> None:
        with suppress(OSError):
            self.path.unlink()

    @property
    def size(self) -> int:
        """Bytes that it takes up now."""
        return self.path.stat().st_size if self.path.exists() else 0


class _Counter(io.RawIOBase):
    """A file that keeps nothing but the number of its bytes."""

    size = 0

    def write(self, content: Any) -> int:
        self.size += (count := memoryview(content).nbytes)
        return count


def latest_checkpoint(run_dir: Path, name: str = "") -> LoadedCheckpoint:
    """The newest checkpoint of a run whose manifest and hashes hold, or the one of this name; reads only.

    A checkpoint that is truncated, damaged or of an unknown format is skipped with a warning; so is one whose
    log does not hold what it promises.

    Raises:
        CurriqError: the run has no checkpoint, or none that can be used; names what is wrong with each.
    """
    folder = run_dir / "checkpoints"
    defects: list[str] = []
    for path in checkpoint_folders(folder):
        if name not in ("", path.name):
            continue
        try:
            manifest = verify(path)
            if STATE in pruned(manifest):
                raise BadCheckpoint(PRUNED)
            require_log(run_dir, manifest)
            state = torch.load(path / STATE, map_location="cpu", weights_only=True)
            if manifest["format"] == PARTS_FORMAT:
                state = joined(state, path / PARTS)
        except BadCheckpoint as defect:
            defects.append(f"{path.name}: {defect}")
            continue
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            defects.append(f"{path.name}: state.pt cannot be read by torch {torch.__version__} ({error})")
            continue
        if defects:
            log.warning(
                f"falling back to {path.name} in {folder}; skipped {'; '.join(defects)}. "
                f"The steps from {manifest['step']} on are repeated."
            )
        return LoadedCheckpoint(path=path, step=manifest["step"], state=state, manifest=manifest)
    if defects and all(defect.endswith(PRUNED) for defect in defects):
        raise CurriqError(
            f"{run_dir} cannot go on: {PRUNED}. Its log and its results are there; start again with `curriq "
            f"train --config {run_dir / 'config.toml'} --run-dir NEW`."
        )
    if defects:
        raise CurriqError(
            f"no checkpoint in {folder} can be used ({'; '.join(defects)}): restore the named files from a "
            f"copy, or start again with `curriq train --config {run_dir / 'config.toml'} --run-dir NEW`."
        )
    raise CurriqError(
        f"{run_dir} has no checkpoint under {folder}: check the path, or start the run again with "
        "`curriq train`; --checkpoint-every sets how often a run saves."
    )


def write_manifest(
    folder: Path,
    step: int,
    about: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write the manifest of a checkpoint, which says `about` too, and force all but the parts to the disk."""
    transformers = importlib.metadata.version("transformers")  # its import would take seconds
    own = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    named = {path.relative_to(folder).as_posix(): path for path in own}
    ours = {name: path for name, path in named.items() if name not in (parts or {})}
    manifest = {
        "format": FORMAT if parts is None else PARTS_FORMAT,
        "step": step,
        "versions": {"curriq": curriq.__version__, "torch": torch.__version__, "transformers": transformers},
        "threads": torch.get_num_threads(),
        **about,
        "files": {name: {"size": path.stat().st_size, "sha256": sha256(path)} for name, path in ours.items()}
        | {name: dict(stated) for name, stated in (parts or {}).items()},
    }
    manifest["sha256"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    for path in (*ours.values(), folder / "manifest.json", *folders, folder):
        fsync(path)


def require_plain(state: Any, where: str = "state") -> None:
    """Refuse when saving what `torch.load(weights_only=True)` would refuse when resuming; TypeError names it.

    Types are compared exactly: a numpy float is a float to Python, but not to the unpickler.
    """
    if state is None or isinstance(state, Tensor) or type(state) in (bool, int, float, complex, str, bytes):
        return
    if type(state) in (dict, OrderedDict):
        for key, value in state.items():
            require_plain(key, f"a key of {where}")
            require_plain(value, f"{where}[{key!r}]")
    elif type(state) in (list, tuple, set):
        for index, value in enumerate(state):
            require_plain(value, f"{where}[{index}]")
    else:
        kind = f"{type(state).__module__}.{type(state).__qualname__}"
        raise TypeError(f"{where} is a {kind}: save plain containers, numbers, strings and tensors only")


def disk_error(error: BaseException) -> str | None:
    """The operating system's message when the disk stopped the writing; None for any other error.

    torch raises a RuntimeError over the OSError when it closes a truncated archive; safetensors and
    tokenizers, written in Rust, put it into their own exception's text, as "… (os error 28)".
    """
    cause = error if isinstance(error, Exception) else None  # Ctrl-C is none, whatever it interrupted
    while cause is not None:
        if isinstance(cause, OSError):
            return described(cause)
        if re.search(r"\(os error \d+\)", str(cause)):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def saved_size(state: State) -> int:
    """Bytes that a state takes in a checkpoint, with the parts of all processes."""
    plain, tensors = split(state)
    counter = _Counter()
    torch.save(plain, cast(IO[bytes], counter))
    return counter.size + parts_size(tensors)
