"""Mirrors of a run's metrics: TensorBoard and Weights & Biases."""

import os
import uuid
from pathlib import Path
from typing import Any, Protocol

from curriq.config import RunConfig, missing_extra, to_dict
from curriq.errors import CurriqError
from curriq.runlog.storage import write_atomically
from curriq.types import Metrics


def open_sinks(config: RunConfig, run_dir: Path, start_step: int) -> "list[Sink]":
    """The mirrors that the configuration asks for."""
    sinks: list[Sink] = []
    if config.log.tensorboard:
        sinks.append(TensorBoardSink(run_dir, start_step))
    if config.log.wandb:
        sinks.append(WandbSink(config.log.wandb, run_dir, to_dict(config)))
    return sinks


class Sink(Protocol):
    """A mirror of the log."""

    def write(self, row: Metrics) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Event files under `RUN/tensorboard`; points from `start_step` on of an earlier part are hidden."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise CurriqError(
                "--tensorboard needs the package tensorboard, which is not installed: "
                "pip install tensorboard, or switch it off with --no-tensorboard."
            ) from None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step)

    def write(self, row: Metrics) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, global_step=int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run that a resume continues; WANDB_MODE=offline keeps it on this machine.

    The run's id lies in `RUN/wandb-id`. The server ignores rows of steps that it has already; a resumed
    run repeats them bit by bit, so nothing is lost.
    """

    def __init__(self, project: str, run_dir: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise missing_extra(f"--wandb {project}", "wandb", "wandb", "leave --wandb out") from None
        id_file = run_dir / "wandb-id"
        if not id_file.exists():
            write_atomically(id_file, uuid.uuid4().hex.encode())
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            dir=os.fspath(run_dir),
            config=config,
            id=id_file.read_text(),
            resume="allow",
        )

    def write(self, row: Metrics) -> None:
        step = int(row["step"])
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=step)

    def close(self) -> None:
        self._run.finish()
