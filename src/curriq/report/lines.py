"""Lines over a run: of its metrics, of values per step, and tables of which metrics share a chart."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curriq.report.chart import Chart, Series
from curriq.report.runlog import RunLog
from curriq.runlog import schema as registry


@dataclass(frozen=True)
class Lines:
    """Metrics in one chart.

    Attributes:
        names: of the metrics, separated by spaces.
        y: what the y-axis shows; the unit of the first metric when empty.
        level: name of a reference line; its height is given when the chart is made.
    """

    id: str
    title: str
    names: str
    y: str = ""
    level: str = ""
    log: bool = False

    @property
    def metrics(self) -> list[str]:
        return self.names.split()


def line_charts(
    run: RunLog, placed: Sequence[Lines], levels: dict[str, float | None], notes: dict[str, str]
) -> list[Chart]:
    """Bucket means with the range of each bucket; an empty chart where the run has none of the metrics.

    Args:
        run: the run.
        placed: the charts.
        levels: name → height of the reference lines; one that is None or absent is not drawn.
        notes: id of a chart → how to read it.
    """
    charts = []
    for lines in placed:
        series = []
        for metric in lines.metrics:
            label = re.sub(r"\bq\b", "Q", metric.rpartition("/")[2].replace("_", " "))
            series += metric_line(run, metric, label, band=True)
        level = levels.get(lines.level)
        charts.append(
            Chart(
                lines.id,
                lines.title,
                lines.y or unit_of(lines.metrics[0]),
                series,
                levels=[] if level is None else [(float(level), lines.level)],
                log=lines.log,
                note=notes.get(lines.id, ""),
            )
        )
    return charts


def other_charts(run: RunLog, names: Iterable[str], placed: Sequence[Lines]) -> list[Chart]:
    """One chart per metric that no chart of `placed` shows, so that new ones are drawn too."""
    shown = {metric for lines in placed for metric in lines.metrics}
    rest = [Lines("metric-" + name.replace("/", "-"), name, name) for name in names if name not in shown]
    return line_charts(run, rest, {}, {})


def metric_line(
    run: RunLog, metric: str, label: str, points: int = 0, band: bool = False, **style: Any
) -> list[Series]:
    """A metric in at most `points` buckets (`run.detail.points` when 0); empty where it was never logged."""
    if metric not in run.columns:
        return []
    thin = run.columns.thinned(metric, points or run.detail.points)
    if band:
        style |= {"low": thin.low, "high": thin.high}
    return [Series(label, thin.x, thin.mean, **style)]


def value_line(
    run: RunLog, label: str, values: np.ndarray, rows: np.ndarray | None = None, points: int = 0, **style: Any
) -> Series:
    """Bucket means of values at some rows of the log (all when None); a NaN counts as not measured."""
    where = np.arange(run.columns.rows) if rows is None else rows
    thin = run.columns.bucketed(values, where, points or run.detail.points)
    return Series(label, thin.x, thin.mean, **style)


def time_stack(
    run: RunLog,
    id: str,
    title: str,
    metrics: Iterable[str],
    whole: str,
    inside: Iterable[str],
    rest: str,
    note: str = "",
) -> Chart:
    """Seconds per step of some metrics and, as a layer `rest`, what `whole` took beyond those inside it."""
    layers = {name: np.nan_to_num(run.columns.full(name)) for name in metrics if name in run.columns}
    if layers and whole in run.columns:
        parts = sum(layers[name] for name in inside if name in layers)
        layers = {rest: np.maximum(np.nan_to_num(run.columns.full(whole)) - parts, 0)} | layers
    series = [value_line(run, name.removeprefix("time/"), seconds) for name, seconds in layers.items()]
    return Chart(id, title, "seconds per step", series, kind="stack", note=note)


def unit_of(metric: str) -> str:
    """Unit of a metric; empty for a pure number or one that the registry does not know."""
    try:
        unit = registry.find(metric).unit
    except KeyError:
        return ""
    return "" if unit == "–" else unit
