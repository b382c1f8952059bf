"""A run's log by metric instead of by row, and thinned so that a page of it stays small."""

import json
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curriq.errors import CurriqError
from curriq.runlog.read import existing

AXES = {
    "step": "step",
    "windows": "x/windows_proposed",
    "read": "x/windows_read",
    "tokens": "x/tokens",
    "FLOPs": "x/flops",
    "seconds": "x/seconds",
}
"""x-axis of a chart → its name in the log."""


@dataclass(frozen=True)
class Thinned:
    """A metric in buckets of consecutive measurements.

    Attributes:
        x: by name of the axis, at the last measurement of each bucket.
        mean, low, high: of the measurements in each bucket.
    """

    x: dict[str, np.ndarray]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Columns:
    """All metrics of a run as arrays.

    Args:
        values: metric → (index of the row, value) of each measurement, in the order of the steps.
        rows: rows of the log.
    """

    def __init__(self, values: dict[str, tuple[np.ndarray, np.ndarray]], rows: int) -> None:
        self._values = values
        self.rows = rows

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def names(self) -> list[str]:
        return list(self._values)

    def raw(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(rows, values) of a metric; both empty when it was never measured."""
        return self._values.get(name, (np.empty(0, np.int64), np.empty(0)))

    def full(self, name: str) -> np.ndarray:
        """One value per row, NaN where the metric was not measured."""
        column = np.full(self.rows, np.nan)
        where, values = self.raw(name)
        column[where] = values
        return column

    def last(self, name: str) -> float | None:
        _, values = self.raw(name)
        return float(values[-1]) if len(values) else None

    def thinned(self, name: str, most: int) -> Thinned:
        """A metric in at most `most` buckets."""
        where, values = self.raw(name)
        edges = bucket_edges(len(values), most)
        last = edges[1:] - 1
        counts = np.diff(edges)
        with np.errstate(over="ignore"):
            mean = np.add.reduceat(values, edges[:-1]) / counts if len(values) else values
        low = np.minimum.reduceat(values, edges[:-1]) if len(values) else values
        high = np.maximum.reduceat(values, edges[:-1]) if len(values) else values
        return Thinned(self.at(where[last] if len(values) else where), mean, low, high)

    def at(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The x-axes at some rows; an axis that the log lacks is left out."""
        return {
            axis: self.full(name)[rows] if len(rows) else np.empty(0)
            for axis, name in AXES.items()
            if name in self._values
        }


def bucket_edges(count: int, most: int) -> np.ndarray:
    """Borders of at most `most` buckets of nearly equal size over `count` items, from 0 to `count`."""
    return np.unique(np.linspace(0, count, min(count, most) + 1).astype(np.int64))


def read_columns(run_dir: str | Path) -> Columns:
    """`metrics.jsonl` by metric, read line by line: a log of 100,000 steps does not fit as dictionaries.

    A line without its end is left out: the run is still writing it, or was killed in it.

    Raises:
        CurriqError: there is no log, or a line of it is damaged.
    """
    path = existing(Path(run_dir) / "metrics.jsonl")
    rows: dict[str, array] = {}
    values: dict[str, array] = {}
    count = 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                for name, value in row.items():
                    rows.setdefault(name, array("q")).append(count)
                    values.setdefault(name, array("d")).append(value)
            except (ValueError, TypeError, AttributeError) as error:
                raise CurriqError(
                    f"{path}, line {count + 1}, is damaged ({error}): delete the line."
                ) from None
            count += 1
    columns = {name: (np.array(rows[name]), np.array(values[name])) for name in rows}
    return Columns(columns, count)
