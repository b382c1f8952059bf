"""Steps on their way into the log: tensors become plain columns, and the mirrors get the metrics."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import RunConfig
from curriq.runlog.writers import Entry, RunLogs
from curriq.train.sinks import open_sinks
from curriq.types import Metrics, Offer, Queries, Step, Windows

WINDOW_CHARACTERS = 300
"""Beginning of a retrieved window's text that is kept; the whole is found by the window's id."""


class StepLog:
    """The log of one session and its mirrors, opened, flushed and closed together.

    Args:
        config: of the run.
        run_dir: its folder.
        start: first step that will be written.
        source_names: of the run.
        tokenizer: content of its `tokenizer.json`; empty when it has none.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, start: int, source_names: tuple[str, ...], tokenizer: str
    ) -> None:
        self._logs = RunLogs(
            run_dir,
            start,
            source_names=source_names,
            tokenizer=tokenizer,
            windows_mb=config.log.log_windows_mb,
            candidates=config.log.log_candidates,
        )
        self._sinks = open_sinks(config, run_dir, start)

    def write(self, step: Step, row: Metrics) -> None:
        self._logs.write(log_entry(step, row))
        for sink in self._sinks:
            sink.write(row)

    def flush(self) -> None:
        self._logs.flush()

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *exception: object) -> None:
        for sink in self._sinks:
            sink.close()
        self._logs.close()


def log_entry(step: Step, row: Metrics) -> Entry:
    """The step's metrics, its windows (those that a filter rejected last) and its queries."""
    parts = [step.offer] if step.offer.rejected is None else [step.offer, step.offer.rejected]
    n = sum(map(len, parts))
    rows = torch.cat([step.offer.rows.cpu(), torch.arange(len(step.offer), n)])
    trained_rows = step.trained.rows.cpu().numpy()
    effects = None
    if step.effects is not None:
        effects = torch.full((len(step.trained),), math.nan)
        effects[step.effects.rows.cpu()] = step.effects.effect.float().cpu()

    def spread(values: Float[Tensor, "n"] | None, missing: float) -> np.ndarray:
        column = np.full(n, missing, dtype=np.float32)
        if values is not None:
            column[trained_rows] = values.detach().float().cpu().numpy()
        return column

    return Entry(
        step=step.index,
        row=row,
        candidates={
            "step": np.full(n, step.index, dtype=np.int32),
            "row": rows.numpy().astype(np.int32),
            "window_id": torch.cat([part.windows.ids.cpu() for part in parts]).numpy(),
            "source": torch.cat([part.windows.source.cpu() for part in parts]).numpy().astype(np.int32),
            "score": spread(step.scores, math.nan),
            "weight": spread(step.weights, 0.0),
            "loss": spread(step.features.loss, math.nan),
            "q": spread(step.q, math.nan),
            "effect": spread(effects, math.nan),
            "accept_prob": np.concatenate([_accept_prob(part) for part in parts]),
        },
        tokens=np.concatenate([_stored(part.windows) for part in parts]),
        proposed=len(step.offer),
        queries=[] if step.offer.queries is None else list(_query_rows(step, step.offer.queries)),
    )


def _stored(windows: Windows) -> Int[np.ndarray, "n T"]:
    """Tokens as the log keeps them, −1 − id where one is not learnt."""
    tokens, learnt = windows.tokens, windows.learnt
    return (tokens if learnt is None else torch.where(learnt, tokens, ~tokens)).cpu().numpy()


def _accept_prob(offer: Offer) -> np.ndarray:
    if offer.sampled is None:
        return np.full(len(offer), math.nan, dtype=np.float32)
    return offer.sampled.accept_prob.cpu().numpy().astype(np.float32)


def _query_rows(step: Step, queries: Queries) -> Iterator[dict[str, Any]]:
    ids = step.offer.windows.ids.tolist()
    columns = [x.tolist() if isinstance(x, Tensor) else x for x in vars(queries).values()]
    for number, values in enumerate(zip(*columns, strict=True)):
        row = dict(zip(vars(queries), values, strict=True))
        drew = row["row"] >= 0
        there = sum(window >= 0 for window in row["shortlist"])  # those that are missing come last
        yield {
            "step": step.index,
            "query": number,
            "text": row["text"],
            **{name: None if math.isnan(row[name]) else row[name] for name in ("q", "soft_q", "start_q")},
            "changed": row["changed"],
            "row": row["row"] if drew else None,
            "window_id": ids[row["row"]] if drew else None,
            "score": row["score"] if drew else None,
            "window_text": row["window_text"][:WINDOW_CHARACTERS] if drew else None,
            "shortlist": row["shortlist"][:there],
            "shortlist_scores": row["shortlist_scores"][:there],
        }
