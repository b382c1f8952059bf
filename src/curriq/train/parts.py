"""Checkpoints of runs whose processes hold parts of the model: written by all, while training goes on.

    RUN/checkpoints/step-00000200/
        parts/           weights, moments and averaged gradients, each process its own (torch's distributed
                         checkpoint format); any number of processes reads them
        state.pt         everything else
        lm/              config and tokenizer; the weights too, where they have been exported
        manifest.json    as in `train/checkpoint.py`

A step waits until the parts are copied to main memory. Threads then write and hash them, each process its
own, and rank 0 adds the manifest, forces all to the disk and renames the folder: until then the checkpoint
before is the newest, whatever happens. No process needs memory for more than its parts, and for one piece of
the weights while they are exported.
"""

import io
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from curriq import parallel
from curriq.lm.stored import export_weights, find_stored
from curriq.runlog.checkpoints import sha256
from curriq.runlog.storage import fsync
from curriq.types import State

PARTS = "parts"
LM = "lm/"
"""How the keys of the model's own tensors begin."""
_MARK = "__stored__"


def split(state: State) -> tuple[State, dict[str, Tensor]]:
    """The state with a mark in place of each tensor that processes hold in parts, and of those of the model;
    and these tensors by the names in the marks."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, where: str) -> Any:
        if isinstance(value, dict):
            return {key: plain(item, f"{where}/{key}" if where else str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(plain(item, f"{where}/{i}") for i, item in enumerate(value))
        if isinstance(value, DTensor) or (isinstance(value, Tensor) and where.startswith(LM)):
            tensors[where] = value.detach()
            return {_MARK: where}
        return value

    return plain(state, ""), tensors


def joined(state: Any, folder: Path) -> Any:
    """A state with the tensors of a folder, not read as yet, in place of their marks."""
    if isinstance(state, dict):
        if state.keys() == {_MARK}:
            return find_stored(folder, state[_MARK])
        return {key: joined(item, folder) for key, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(joined(item, folder) for item in state)
    return state


def parts_size(tensors: Mapping[str, Tensor], prefix: str = "") -> int:
    """Bytes of the whole of these tensors, of all processes together."""
    return sum(t.numel() * t.element_size() for key, t in tensors.items() if key.startswith(prefix))


def pickled(state: State) -> bytes:
    """What `torch.load` reads as this state, as it is now."""
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


@dataclass(frozen=True)
class Outcome:
    """How the writing of a checkpoint ended, the same on all ranks.

    Attributes:
        path: the checkpoint; None where it was refused.
        refusal: why it was, or why there is no room for the next one; empty where all is well.
        size: bytes.
        seconds: from the step that it is of until it was durable.
    """

    path: Path | None = None
    refusal: str = ""
    size: int = 0
    seconds: float = 0.0


Digests = dict[str, dict[str, Any]]
"""Name of a file in a checkpoint → its size and SHA-256, as the manifest has them."""


@runtime_checkable
class Finish(Protocol):
    """Makes a folder of parts a checkpoint; `train.checkpoint.Finish` does."""

    def __call__(self, folder: Path, parts: Digests) -> tuple[Path, str]:
        """The checkpoint, and what is to stop the run all the same."""
        ...

    def refused(self, reason: str) -> str:
        """The message where it could not be written."""
        ...


class PartsWriter:
    """Writes checkpoints on all ranks, one at a time.

    The threads talk over a process group of their own, so that they never meet the messages of a step.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[Outcome] | None = None

    @property
    def running(self) -> bool:
        """Whether a checkpoint has been begun and not been waited for; the same on all ranks."""
        return self._running is not None

    @property
    def done(self) -> bool:
        """Whether this rank has nothing to wait for."""
        return self._running is None or self._running.done()

    def begin(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        finish: Finish | None,
        *,
        export: bool,
    ) -> None:
        """Copy the tensors, and write them while this rank goes on; all ranks begin together.

        Args:
            folder: the unfinished checkpoint, the same on all ranks.
            tensors: as `split` gives them.
            finish: makes the folder a checkpoint, on rank 0.
            export: write the model's weights into `lm/` too.
        """
        assert self._running is None, "one checkpoint at a time"
        began = time.perf_counter()
        writer = dcp.FileSystemWriter(folder / PARTS)  # forces the files to the disk
        written: Any = dcp.async_save(dict(tensors), storage_writer=writer, process_group=self._group)
        self._running = self._threads.submit(self._complete, folder, written, finish, export, began)

    def wait(self) -> Outcome:
        """How the writing has ended; all ranks wait together."""
        assert self._running is not None
        running, self._running = self._running, None
        return running.result()

    def _complete(
        self,
        folder: Path,
        written: "Future[Any]",
        finish: Finish | None,
        export: bool,
        began: float,
    ) -> Outcome:
        files, refusal = dict[str, dict[str, Any]](), ""
        try:
            written.result()
            files = self._digests(folder)
        except (Exception, CheckpointException) as error:  # all ranks must hear of it, whatever it is
            refusal = reason_of(error)
        everywhere: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everywhere, (files, refusal), group=self._group)
        outcome = [Outcome()]
        if finish is not None:
            outcome = [self._finished(folder, finish, everywhere, export, began)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        return outcome[0]

    def _digests(self, folder: Path) -> Digests:
        """The files that this rank has written."""
        paths = sorted((folder / PARTS).glob(f"__{parallel.rank()}_*.distcp"))
        if parallel.rank() == 0:
            paths.append(folder / PARTS / ".metadata")
        return {f"{PARTS}/{p.name}": {"size": p.stat().st_size, "sha256": sha256(p)} for p in paths}

    def _finished(
        self,
        folder: Path,
        finish: Finish,
        everywhere: list[tuple[Digests, str]],
        export: bool,
        began: float,
    ) -> Outcome:
        if refusals := [refusal for _, refusal in everywhere if refusal]:
            return Outcome(refusal=finish.refused(refusals[0]))
        digests: Digests = {}
        for files, _ in everywhere:
            digests |= files
        try:
            if export:
                export_weights(folder / PARTS, LM, folder / "lm")
            fsync(folder / PARTS)
            path, refusal = finish(folder, digests)
        except Exception as error:
            return Outcome(refusal=finish.refused(reason_of(error)))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return Outcome(path, refusal, size, time.perf_counter() - began)


def described(error: OSError) -> str:
    """The operating system's message and the file that it is about."""
    return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")


def reason_of(error: BaseException) -> str:
    """Why a checkpoint could not be written: the operating system's message where it is one's."""
    if isinstance(error, CheckpointException):
        error = next((failure for failure, _ in error.failures.values()), error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return described(cause)
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"
