"""Writers of a run's log: rows, candidates, summary, and the sinks that mirror the rows.

`RUN/metrics.jsonl` and `RUN/candidates/` are the truth; TensorBoard and Weights & Biases are mirrors. A
log that is opened at step s forgets what it holds from s on, because a resumed run writes those steps
again. Call both `flush()` before a checkpoint is saved: a checkpoint of step s promises a complete log
of the steps before s.
"""

import json
import logging
import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curriq.config import did_you_mean, missing_extra
from curriq.errors import CurriqError
from curriq.runlog import schema as registry
from curriq.runlog.storage import fsync, write_atomically
from curriq.types import Candidates, Effects, Metrics

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("curriq")


class MetricsLog:
    """`RUN/metrics.jsonl`: one row per step, in the order of the steps.

    Args:
        run_dir: folder of the run.
        start_step: first step that will be appended; rows from there on and a half-written last line
            are cut off.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        size, last_step = self._kept(start_step)
        if last_step != start_step - 1:
            log.warning(
                f"{self.path} ends with step {last_step}, but the run goes on from step {start_step}: the "
                "rows between are lost. The run itself is not affected."
            )
        # Unbuffered: one write per step costs microseconds, and a killed process leaves every row behind.
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(size)
        self._unwritten = b""
        self._warned = False

    def append(self, row: Metrics) -> None:
        """Validate a row and write it.

        Raises:
            KeyError: a name that the registry does not define.
            TypeError: a value that is no Python number.
            CurriqError: a value that is not finite.
        """
        self._unwritten += encode_row(row)
        self._write()

    def flush(self) -> None:
        """Force all rows to the disk."""
        self._write()
        fsync(self.path)

    def close(self) -> None:
        """Write what is left; on a disk that is still full this raises CurriqError."""
        self._write()
        self._file.close()
        if self._unwritten:
            raise CurriqError(
                f"the last rows ({len(self._unwritten)} bytes) could not be written to {self.path}: free "
                "some space and resume the run; it repeats the steps since the last checkpoint."
            )

    def _write(self) -> None:
        """Write as much as the disk takes; the rest waits in memory for the next call."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned:
                log.warning(f"{self.path}: {error.strerror}. Rows wait in memory until the disk takes them.")
            self._warned = True
        else:
            self._warned = False

    def _kept(self, start_step: int) -> tuple[int, int]:
        """Bytes of the file that stay, and the step of the last row in them (−1 without one)."""
        size, last_step = 0, -1
        if not self.path.exists():
            return size, last_step
        with self.path.open("rb") as file:
            for line in file:
                step = step_of_line(line)
                if step is None or step >= start_step:
                    break
                size, last_step = size + len(line), step
        return size, last_step


def encode_row(row: Metrics) -> bytes:
    """One validated JSON line; floats in the shortest form that reads back to the same bits."""
    for name, value in row.items():
        registry.find(name)
        require_finite(name, value, row.get("step"))
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def require_finite(name: str, value: Any, step: Any) -> None:
    """Refuse what JSON would write as something else than a number.

    Raises:
        TypeError: no Python number; a tensor, a numpy scalar or a bool is none.
        CurriqError: nan or infinite.
    """
    if type(value) not in (int, float):
        raise TypeError(f"metric {name!r} is a {type(value).__name__}, not a Python number: {value!r}")
    if not math.isfinite(value):
        raise CurriqError(
            f"{name} = {value} at step {step}: the log holds finite numbers only. The last checkpoint "
            "stands; a lower --lm-lr or --q-lr usually helps."
        )


def step_of_line(line: bytes) -> int | None:
    """The step of one line of the log; None when the line is not a whole row."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class CandidateLog:
    """`RUN/candidates/part-<first step>.parquet`: every window that was offered, scored and weighed.

    Steps are collected in memory and written as one part at each `flush`.

    Args:
        run_dir: folder of the run.
        source_names: names that `Candidates.source` indexes.
        start_step: first step that will be appended; what the parts hold from there on is dropped.
    """

    def __init__(self, run_dir: Path, source_names: Sequence[str], start_step: int) -> None:
        self.folder = run_dir / "candidates"
        self.source_names = list(source_names)
        self._steps: list[dict[str, np.ndarray]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        drop_candidates(self.folder, start_step)

    def append(
        self,
        step: int,
        proposed: Candidates,
        trained: Candidates,
        loss: Float[Tensor, "n"],
        scores: Float[Tensor, "n"],
        weights: Float[Tensor, "n"],
        q: Float[Tensor, "n"] | None,
        effects: Effects | None = None,
    ) -> None:
        """Collect one step.

        Args:
            step: its index.
            proposed: all N candidates, in the order of their `rows`. Those that were passed over follow them.
            trained: those that were forwarded; the tensors below are in this order.
            loss: ℓ_i, nats per token.
            scores: log-weights from the selector, unnormalised.
            weights: mixture weights, summing to one.
            q: Q-values, None without a Q-network.
            effects: measured effects of some of the trained windows, None where none were probed.
        """
        everything = [proposed] if proposed.rejected is None else [proposed, proposed.rejected]
        n = sum(map(len, everything))
        trained_rows = trained.rows.cpu().numpy()
        rows = [proposed.rows, torch.arange(len(proposed), n)]

        measured = None
        if effects is not None:
            measured = torch.full((len(trained),), math.nan)
            measured[effects.rows.cpu()] = effects.effect.float().cpu()

        def spread(values: Float[Tensor, "n"] | None, missing: float) -> np.ndarray:
            column = np.full(n, missing, dtype=np.float32)
            if values is not None:
                column[trained_rows] = values.detach().float().cpu().numpy()
            return column

        self._steps.append(
            {
                "step": np.full(n, step, dtype=np.int32),
                "row": torch.cat([part.cpu() for part in rows]).numpy().astype(np.int32),
                "window_id": torch.cat([part.window_ids.cpu() for part in everything]).numpy(),
                "source": torch.cat([part.source.cpu() for part in everything]).numpy().astype(np.int32),
                "score": spread(scores, math.nan),
                "weight": spread(weights, 0.0),
                "loss": spread(loss, math.nan),
                "q": spread(q, math.nan),
                "effect": spread(measured, math.nan),
                "accept_prob": np.concatenate([_accept_prob(part) for part in everything]),
            }
        )

    def flush(self) -> None:
        """Write the collected steps as one part; on a full disk they stay in memory, with a warning."""
        if not self._steps:
            return
        path = self.folder / f"part-{self._steps[0]['step'][0]:08d}.parquet"
        try:
            write_part(path, self._table())
        except OSError as error:
            log.warning(f"{path}: {error.strerror}. The candidates wait in memory until the disk takes them.")
            return
        self._steps.clear()

    def _table(self) -> "pa.Table":
        import pyarrow as pa

        columns = {name: np.concatenate([s[name] for s in self._steps]) for name in self._steps[0]}
        arrays: dict[str, pa.Array] = {
            name: pa.array(values, mask=np.isnan(values) if values.dtype == np.float32 else None)
            for name, values in columns.items()
        }
        arrays["source"] = pa.DictionaryArray.from_arrays(arrays["source"], self.source_names)
        return pa.table(arrays)


def _accept_prob(windows: Candidates) -> np.ndarray:
    if windows.accept_prob is None:
        return np.full(len(windows), math.nan, dtype=np.float32)
    return windows.accept_prob.cpu().numpy().astype(np.float32)


def write_part(path: Path, table: "pa.Table") -> None:
    """One Parquet file, atomically.

    Raises:
        OSError: the disk refused it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    write_atomically(path, buffer.getvalue().to_pybytes())


def drop_candidates(folder: Path, start_step: int) -> None:
    """Remove the steps from `start_step` on: whole parts, and the end of the part that holds the border.

    Raises:
        CurriqError: the part at the border cannot be read.
    """
    for temporary in folder.glob(".tmp-*"):
        temporary.unlink()
    border = None
    for path in sorted(folder.glob("part-*.parquet")):
        if int(path.stem.removeprefix("part-")) >= start_step:
            path.unlink()
        else:
            border = path
    if border is None:
        return
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(border)
    except (OSError, pa.ArrowInvalid) as error:
        raise CurriqError(f"{border} is damaged ({error}): move it away and resume again.") from None
    kept = table.filter(pc.field("step") < start_step)
    if len(kept) < len(table):
        write_part(border, kept)


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write `RUN/summary.json` atomically.

    Raises:
        KeyError: a field that the registry does not define.
        ValueError: a number that is not finite.
    """
    known = [field.name for field in registry.SUMMARY]
    for name in summary:
        if name not in known:
            raise KeyError(f"unknown summary field {name!r}.{did_you_mean(name, known)}")
    content = json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(run_dir / "summary.json", content.encode() + b"\n")


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


if __name__ == "__main__":
    print(registry.page(), end="")
