"""Steps on their way into the log: tensors become plain columns, and the mirrors get the metrics."""

import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curriq.config import RunConfig, missing_extra, to_dict
from curriq.errors import CurriqError
from curriq.runlog.promise import Promise
from curriq.runlog.storage import write_atomically
from curriq.runlog.writers import Entry, Mirror, RunLogs
from curriq.types import Metrics, Offer, Queries, Step, WindowLosses, Windows

WINDOW_CHARACTERS = 300
"""Beginning of a retrieved window's text that is kept; the whole is found by the window's id."""


def open_logs(
    config: RunConfig,
    run_dir: Path,
    start: int,
    promise: Promise,
    source_names: tuple[str, ...],
    tokenizer: str,
) -> RunLogs:
    """The log of one session, from step `start` on, of which a checkpoint promises the steps before; with the
    mirrors that the configuration asks for."""
    mirrors: list[Callable[[], Mirror]] = []
    if config.log.tensorboard:
        mirrors.append(lambda: TensorBoardSink(run_dir, start))
    if config.log.wandb:
        mirrors.append(lambda: WandbSink(config.log.wandb, run_dir, to_dict(config)))
    return RunLogs(
        run_dir,
        promise,
        source_names=source_names,
        tokenizer=tokenizer,
        windows_mb=config.log.log_windows_mb,
        candidates=config.log.log_candidates,
        mirrors=mirrors,
    )


def on_host(step: Step) -> Step:
    """The step with the columns that the meter, the probes and the log read on the CPU, brought there in one
    transfer; hidden states stay where they are."""
    return step if step.weights.device.type == "cpu" else in_one_transfer(step)


def in_one_transfer(step: Step) -> Step:
    """The same, whatever the device."""
    own_q = [] if step.q is None or step.q.device != step.weights.device else [step.q]  # a filter's is here
    columns = [step.scores, step.weights, step.features.loss, *own_q]
    scores, weights, loss, *q = torch.stack([column.double() for column in columns]).cpu()
    effects = step.effects
    if effects is not None:
        effects = replace(effects, rows=effects.rows.cpu(), effect=effects.effect.cpu())
    return replace(
        step,
        scores=scores.to(step.scores.dtype),
        weights=weights.to(step.weights.dtype),
        features=replace(step.features, loss=loss.to(step.features.loss.dtype)),
        q=q[0].to(step.q.dtype) if step.q is not None and q else step.q,
        effects=effects,
    )


def log_entry(step: Step, row: Metrics) -> Entry:
    """The step's metrics, its windows (those that a filter rejected last) and its queries."""
    parts = step.offer.judged
    windows = Windows.cat([part.windows.to("cpu") for part in parts])
    n, proposed = len(windows), len(step.offer)
    trained_rows = step.trained.rows.cpu().numpy()

    def spread(values: Float[Tensor, "n"] | None, missing: float = math.nan) -> np.ndarray:
        column = np.full(n, missing, dtype=np.float32)
        if values is not None:
            column[trained_rows] = values.detach().float().cpu().numpy()
        return column

    accept_prob = [
        torch.full((len(part),), math.nan) if part.sampled is None else part.sampled.accept_prob.cpu()
        for part in parts
    ]
    learnt = windows.learnt
    tokens = windows.tokens if learnt is None else torch.where(learnt, windows.tokens, ~windows.tokens)
    return Entry(
        step=step.index,
        row=row,
        candidates={
            "step": np.full(n, step.index),
            "row": torch.cat([step.offer.rows.cpu(), torch.arange(proposed, n)]).numpy(),
            "window_id": windows.ids.numpy(),
            "source": windows.source.numpy(),
            "score": spread(step.scores),
            "weight": spread(step.weights, 0.0),
            "loss": spread(step.features.loss),
            "q": spread(step.q),
            "effect": _effects(step, n),
            "accept_prob": torch.cat(accept_prob).numpy(),
            "static_score": torch.cat([_static_score(part) for part in parts]).numpy(),
        },
        tokens=tokens.int().numpy(),
        proposed=proposed,
        queries=[] if step.offer.queries is None else list(_query_rows(step, step.offer.queries)),
    )


def _static_score(offer: Offer) -> Float[Tensor, "n"]:
    score = offer.known.get("static_score")
    return torch.full((len(offer),), math.nan) if score is None else score.float().cpu()


def _effects(step: Step, n: int) -> np.ndarray:
    """The measured effects of the n windows of a step, NaN where a window was not probed."""
    column = np.full(n, math.nan, dtype=np.float32)
    if step.effects is not None:
        rows, trained = step.effects.rows.cpu().numpy(), step.trained.rows.cpu().numpy()
        # The log has the proposal before the rejected windows, whether or not all of it was trained on.
        own = rows < len(trained)
        rows = np.where(own, trained[np.where(own, rows, 0)], rows - len(trained) + len(step.offer))
        column[rows] = step.effects.effect.float().cpu().numpy()
    return column


def test_columns(tested: WindowLosses) -> dict[str, np.ndarray]:
    """The columns of the table of the test losses."""
    return {
        "window_id": tested.ids.cpu().numpy(),
        "loss": tested.losses.cpu().numpy(),
        "tokens": tested.tokens.cpu().numpy(),
    }


def _query_rows(step: Step, queries: Queries) -> Iterator[dict[str, Any]]:
    ids = step.offer.windows.ids.tolist()
    columns = [x.tolist() if isinstance(x, Tensor) else x for x in vars(queries).values()]
    for number, values in enumerate(zip(*columns, strict=True)):
        row = dict(zip(vars(queries), values, strict=True))
        drawn = {"row": row["row"], "window_id": ids[row["row"]], "score": row["score"]}
        drawn["window_text"] = row["window_text"][:WINDOW_CHARACTERS]
        found = sum(window >= 0 for window in row["shortlist"])  # those that are missing come last
        yield {
            "step": step.index,
            "query": number,
            **{name: row[name] for name in ("text", "q", "soft_q", "start_q", "changed")},
            **(drawn if row["row"] >= 0 else dict.fromkeys(drawn)),
            "shortlist": row["shortlist"][:found],
            "shortlist_scores": row["shortlist_scores"][:found],
        }


class TensorBoardSink:
    """Event files under `RUN/tensorboard`; points from `start_step` on of an earlier part are hidden.

    Written without the library's own writer, which does so in a thread and reports a full disk as that
    thread's traceback.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        try:
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise CurriqError(
                "--tensorboard needs the package tensorboard, which is not installed: "
                "pip install tensorboard, or switch it off with --no-tensorboard."
            ) from None
        folder = run_dir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("wb", buffering=0))
        self._event(file_version="brain.Event:2")
        self._event(step=start_step, session_log={"status": "START"})

    def write(self, row: Metrics) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in row.items() if name != "step"]
        self._event(step=int(row["step"]), summary={"value": values})

    def close(self) -> None:
        self._writer.close()

    def _event(self, **content: Any) -> None:
        from tensorboard.compat.proto import event_pb2

        make = getattr(event_pb2, "Event")  # noqa: B009 (the module is made at run time, unknown to a type checker)
        self._writer.write(make(wall_time=time.time(), **content).SerializeToString())


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
