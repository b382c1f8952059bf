"""One pass over the candidates table: what was selected against what was offered, and which windows to show.

The table is read part by part, so that a run of any length fits into memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curriq.report.chart import numbers
from curriq.runlog.kept_windows import KeptWindows
from curriq.runlog.read import read_part

MOST_SEEN = 40
"""Appearances of one window that a report lists."""
NUMBERS = ("score", "weight", "loss", "q", "effect", "accept_prob")
"""Columns that the explorer shows; `effect` and `accept_prob` where the run has them."""


@dataclass(frozen=True)
class Part:
    """Some steps of the candidates table as arrays; a null is NaN."""

    step: np.ndarray
    row: np.ndarray
    window_id: np.ndarray
    source: np.ndarray
    columns: dict[str, np.ndarray]
    names: list[str]

    def take(self, which: np.ndarray) -> "Part":
        columns = {name: values[which] for name, values in self.columns.items()}
        labels = (self.step[which], self.row[which], self.window_id[which], self.source[which])
        return Part(*labels, columns, self.names)


def read_parts(run_dir: str | Path) -> Iterator[Part]:
    """The parts of the candidates table in order; none when the run logged none.

    Raises:
        CurriqError: a part is damaged.
    """
    for path in sorted((Path(run_dir) / "candidates").glob("part-*.parquet")):
        table = read_part(path)
        source = table["source"].combine_chunks()
        yield Part(
            table["step"].to_numpy(),
            table["row"].to_numpy(),
            table["window_id"].to_numpy(),
            source.indices.to_numpy(),
            {name: floats(table[name]) for name in NUMBERS if name in table.column_names},
            source.dictionary.to_pylist(),
        )


def floats(column: Any) -> np.ndarray:
    """A column of a table of numbers; a null is NaN."""
    return column.to_numpy(zero_copy_only=False).astype(float)


@dataclass(frozen=True)
class Selection:
    """What the pass found.

    Attributes:
        step: the steps that the table holds, ascending.
        per_step: for each of them, mean of each measure over what was offered and over the weight, as
            `offered/NAME` and `selected/NAME`; loss per source as `loss/SOURCE`; `rank/effect`, Spearman's
            correlation of Q with the measured effect. NaN where a step has none.
        shown: the rows of the steps that the explorer shows; None without any.
        pairs: (Q minus the step's mean, effect minus the step's mean) of every window with both.
        names: of the sources.
        labels: [steps, labels], sums over the windows offered and over the weight, as `offered/NAME` and
            `selected/NAME`.
    """

    step: np.ndarray
    per_step: dict[str, np.ndarray]
    shown: Part | None
    pairs: np.ndarray
    names: list[str]
    labels: dict[str, np.ndarray]


def select(
    run_dir: str | Path, measures: dict[str, np.ndarray], sampled: KeptWindows | None, steps: set[int]
) -> Selection:
    """Read the candidates once.

    Args:
        run_dir: folder of the run.
        measures: name → value per window of `sampled`; integers from 0 are labels (topics).
        sampled: the windows that were measured; averages are over these.
        steps: which steps to keep whole.
    """
    step_parts: list[np.ndarray] = []
    sums: list[dict[str, np.ndarray]] = []
    label_sums: dict[str, list[np.ndarray]] = {}
    shown: list[Part] = []
    pairs: list[np.ndarray] = []
    names: list[str] = []
    wanted = np.array(sorted(steps), dtype=np.int64)
    for part in read_parts(run_dir):
        names = part.names
        unique, index = np.unique(part.step, return_inverse=True)
        step_parts.append(unique)
        where = np.full(len(part.step), -1) if sampled is None else sampled.find(part.window_id)
        row = _means(part, measures, where, index, len(unique))
        for name, shares in _labels(part, measures, where, index, len(unique)).items():
            label_sums.setdefault(name, []).append(shares)
        correlation, points = _calibration(part, index, len(unique))
        sums.append(row | {"rank/effect": correlation})
        pairs.append(points)
        keep = np.isin(part.step, wanted)
        if keep.any():
            shown.append(part.take(keep))
    per_step = {name: np.concatenate([row[name] for row in sums]) for name in (sums[0] if sums else {})}
    return Selection(
        np.concatenate(step_parts) if step_parts else np.empty(0, np.int64),
        per_step,
        _joined(shown),
        np.concatenate(pairs) if pairs else np.empty((0, 2)),
        names,
        {name: np.concatenate(parts) for name, parts in label_sums.items()},
    )


def appearances(run_dir: str | Path, ids: np.ndarray) -> dict[int, list[list[float | None]]]:
    """Window id → [step, weight, loss, Q] of its appearances in the run, the first `MOST_SEEN` of them."""
    found: dict[int, list[list[float | None]]] = {}
    wanted = np.unique(ids)
    for part in read_parts(run_dir):
        for i in np.flatnonzero(np.isin(part.window_id, wanted)):
            seen = found.setdefault(int(part.window_id[i]), [])
            if len(seen) < MOST_SEEN:
                values = np.array([part.columns[name][i] for name in ("weight", "loss", "q")])
                seen.append([int(part.step[i]), *numbers(values)])
    return found


def _means(
    part: Part, measures: dict[str, np.ndarray], where: np.ndarray, index: np.ndarray, steps: int
) -> dict[str, np.ndarray]:
    """Means per step over the offered windows and over the weight, and the loss of each source."""
    weight = part.columns["weight"]
    row = {}
    for name, values in measures.items():
        if np.issubdtype(values.dtype, np.integer):
            continue
        value = np.where(where >= 0, values[where], np.nan) if len(values) else np.full(len(where), np.nan)
        row[f"offered/{name}"] = _mean(index, steps, value, np.ones(len(value)))
        row[f"selected/{name}"] = _mean(index, steps, value, weight)
    for number, name in enumerate(part.names):
        of_source = np.where(part.source == number, part.columns["loss"], np.nan)
        row[f"loss/{name}"] = _mean(index, steps, of_source, np.ones(len(of_source)))
    return row


def _labels(
    part: Part, measures: dict[str, np.ndarray], where: np.ndarray, index: np.ndarray, steps: int
) -> dict[str, np.ndarray]:
    """[steps, labels] sums: windows offered and weight, by label."""
    sums = {}
    for name, values in measures.items():
        if not np.issubdtype(values.dtype, np.integer) or not len(values):
            continue
        count = int(values.max()) + 1
        known = where >= 0
        cell = index[known] * count + values[where[known]]
        for kind, amount in (("offered", np.ones(known.sum())), ("selected", part.columns["weight"][known])):
            flat = np.bincount(cell, weights=amount, minlength=steps * count)
            sums[f"{kind}/{name}"] = flat.reshape(steps, count)
    return sums


def _mean(index: np.ndarray, steps: int, value: np.ndarray, weight: np.ndarray) -> np.ndarray:
    known = ~np.isnan(value) & ~np.isnan(weight)
    total = np.bincount(index[known], weights=weight[known], minlength=steps)
    summed = np.bincount(index[known], weights=(weight * np.nan_to_num(value))[known], minlength=steps)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, summed / total, np.nan)


def _calibration(part: Part, index: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's correlation of Q with the effect in each step, and both as differences from the step."""
    correlation = np.full(steps, np.nan)
    if "effect" not in part.columns or "q" not in part.columns:
        return correlation, np.empty((0, 2))
    from scipy.stats import rankdata

    q, effect = part.columns["q"], part.columns["effect"]
    points = []
    for step in range(steps):
        both = (index == step) & ~np.isnan(q) & ~np.isnan(effect)
        if both.sum() < 3:
            continue
        a, b = q[both], effect[both]
        points.append(np.column_stack([a - a.mean(), b - b.mean()]))
        if a.std() > 0 and b.std() > 0:
            correlation[step] = np.corrcoef(rankdata(a), rankdata(b))[0, 1]
    return correlation, np.concatenate(points) if points else np.empty((0, 2))


def _joined(parts: list[Part]) -> Part | None:
    if not parts:
        return None
    names = set(parts[0].columns).intersection(*(part.columns for part in parts))
    return Part(
        np.concatenate([part.step for part in parts]),
        np.concatenate([part.row for part in parts]),
        np.concatenate([part.window_id for part in parts]),
        np.concatenate([part.source for part in parts]),
        {name: np.concatenate([part.columns[name] for part in parts]) for name in NUMBERS if name in names},
        parts[-1].names,
    )
