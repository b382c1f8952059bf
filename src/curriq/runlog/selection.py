"""One pass over the candidates table: the windows selected against the windows read, and those to show.

The table is read part by part, so that a run of any length fits into memory.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curriq.runlog.read import CandidateRows, KeptWindows, candidate_parts, together


@dataclass(frozen=True)
class Selection:
    """What the pass found.

    Attributes:
        step: the steps that the table holds, ascending.
        per_step: one value for each of them, NaN where a step has none. `offered/NAME` and `selected/NAME`
            are the mean of a measure over the windows in the table (those read for the step, or retrieved
            from a buffer) and over the weight, `loss/SOURCE` the mean loss of a source, `rank/effect`
            Spearman's correlation of Q with the measured effect; `offered/topic` and `selected/topic` are
            sums [steps, topics] over windows and weight.
        shown: the rows of the steps that the explorer shows; None without any.
        pairs: (Q minus the step's mean, effect minus the step's mean) of every window with both.
        preferred: of each of the windows that averages are taken over, its weight in all its appearances over
            that of a uniform policy; NaN for a window that never appears.
    """

    step: np.ndarray
    per_step: dict[str, np.ndarray]
    shown: CandidateRows | None
    pairs: np.ndarray
    preferred: np.ndarray


def select(
    run_dir: str | Path,
    windows: KeptWindows,
    measures: dict[str, np.ndarray],
    topic_of: np.ndarray | None,
    steps: np.ndarray,
) -> Selection:
    """One pass over the candidates table: averages of each step, and the rows of `steps` whole.

    `measures` (name → values) and `topic_of` describe the `windows` that averages are taken over.
    """
    found: list[dict[str, np.ndarray]] = []
    shown = []
    pairs = [np.empty((0, 2))]
    weight, uniform = np.zeros(len(windows)), np.zeros(len(windows))
    for table in candidate_parts(run_dir):
        part = CandidateRows.of(table)
        by = _BySteps(part.step)
        correlation, points = _calibration(part, by)
        averages = _averages(part, by, windows, measures, topic_of)
        found.append({"step": by.step, "rank/effect": correlation} | averages)
        pairs += points
        where = windows.find(part.window_id)
        known = where >= 0
        np.add.at(weight, where[known], part.columns["weight"][known])
        np.add.at(uniform, where[known], 1 / np.bincount(by.index)[by.index[known]])
        if (keep := np.isin(part.step, steps)).any():
            shown.append(table.filter(keep))
    per_step = {name: np.concatenate([row[name] for row in found]) for name in (found[0] if found else ())}
    step = per_step.pop("step", np.empty(0, np.int64))
    rows = CandidateRows.of(together(shown)) if shown else None
    with np.errstate(invalid="ignore", divide="ignore"):
        preferred = weight / uniform
    return Selection(step, per_step, rows, np.concatenate(pairs), preferred)


def appearances(run_dir: str | Path, ids: np.ndarray, most: int) -> dict[int, list[list[float]]]:
    """Window id → [step, weight, loss, Q] of its appearances in the run, the first `most` of them."""
    found: dict[int, list[list[float]]] = {}
    for part in map(CandidateRows.of, candidate_parts(run_dir)):
        where = np.flatnonzero(np.isin(part.window_id, ids))
        columns = (part.step, *(part.columns[name] for name in ("weight", "loss", "q")))
        rows = zip(*(column[where].tolist() for column in columns), strict=True)
        for window, row in zip(part.window_id[where].tolist(), rows, strict=True):
            seen = found.setdefault(window, [])
            if len(seen) < most:
                seen.append(list(row))
    return found


class _BySteps:
    """Sums over the rows of each step."""

    def __init__(self, steps: np.ndarray) -> None:
        self.step, self.index = np.unique(steps, return_inverse=True)

    def mean(self, values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        known = ~np.isnan(values) & ~np.isnan(weight)
        total, summed = (
            np.bincount(self.index, weights=np.where(known, amounts, 0.0), minlength=len(self.step))
            for amounts in (weight, weight * values)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(total > 0, summed / total, np.nan)

    def tally(self, labels: np.ndarray, amounts: np.ndarray, count: int) -> np.ndarray:
        """[steps, labels] sums of the amounts of each label; a negative label counts nowhere."""
        known = labels >= 0
        cells = self.index[known] * count + labels[known]
        sums = np.bincount(cells, weights=amounts[known], minlength=len(self.step) * count)
        return sums.reshape(-1, count)


def _averages(
    part: CandidateRows,
    by: _BySteps,
    windows: KeptWindows,
    measures: dict[str, np.ndarray],
    topic_of: np.ndarray | None,
) -> dict[str, np.ndarray]:
    where = windows.find(part.window_id)
    ones = np.ones(len(where))
    found = {}
    for kind, amounts in (("offered", ones), ("selected", part.columns["weight"])):
        for name, values in measures.items():
            found[f"{kind}/{name}"] = by.mean(np.where(where >= 0, values[where], np.nan), amounts)
        for name in ("loss", "static_score"):
            if name in part.columns:
                found[f"{kind}/{name}"] = by.mean(part.columns[name], amounts)
        if topic_of is not None:
            labels = np.where(where >= 0, topic_of[where], -1)
            found[f"{kind}/topic"] = by.tally(labels, amounts, int(topic_of.max()) + 1)
    for number, name in enumerate(part.names):
        found[f"loss/{name}"] = by.mean(np.where(part.source == number, part.columns["loss"], np.nan), ones)
    return found


def _calibration(part: CandidateRows, by: _BySteps) -> tuple[np.ndarray, list[np.ndarray]]:
    """Spearman's correlation of Q with the effect in each step, and both as differences from the step."""
    correlation, points = np.full(len(by.step), np.nan), []
    missing = np.full(len(part.step), np.nan)
    q, effect = (part.columns.get(name, missing) for name in ("q", "effect"))
    known = ~np.isnan(q) & ~np.isnan(effect)
    if not known.any():
        return correlation, points
    rows = np.flatnonzero(known)  # in the order of the steps
    for both in np.split(rows, np.flatnonzero(np.diff(by.index[rows])) + 1):
        if len(both) < 3:
            continue
        a, b = q[both], effect[both]
        points.append(np.column_stack([a - a.mean(), b - b.mean()]))
        if a.std() > 0 and b.std() > 0:
            correlation[by.index[both[0]]] = np.corrcoef(_midranks(a), _midranks(b))[0, 1]
    return correlation, points


def _midranks(values: np.ndarray) -> np.ndarray:
    """Ranks of the values; equal ones share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
