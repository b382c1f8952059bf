"""Charts of metrics over the run: which go into one picture, and those that nobody has placed."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from curriq.report.chart import Chart, Series
from curriq.report.runlog import RunLog
from curriq.runlog import schema as registry


@dataclass(frozen=True)
class Lines:
    """Metrics in one chart.

    Attributes:
        level: name of a reference line; where it lies is said when the chart is made.
        y: what the y-axis shows; the unit of the first metric when empty.
        note: how to read it.
    """

    id: str
    title: str
    metrics: tuple[str, ...]
    level: str = ""
    log: bool = False
    y: str = ""
    note: str = ""


def line_charts(run: RunLog, placed: Sequence[Lines], levels: dict[str, float | None]) -> list[Chart]:
    """Bucket means with the range of each bucket; an empty chart where the run has none of the metrics.

    Args:
        run: the run.
        placed: the charts.
        levels: name → value of the reference lines; one that is None or absent is not drawn.
    """
    charts = []
    for lines in placed:
        series = []
        for metric in lines.metrics:
            if metric in run.columns:
                thin = run.columns.thinned(metric, run.detail.points)
                label = re.sub(r"\bq\b", "Q", metric.rpartition("/")[2].replace("_", " "))
                series.append(Series(label=label, x=thin.x, y=thin.mean, low=thin.low, high=thin.high))
        level = levels.get(lines.level)
        charts.append(
            Chart(
                id=lines.id,
                title=lines.title,
                y=lines.y or unit_of(lines.metrics[0]),
                series=series,
                levels=[(float(level), lines.level)] if level is not None else [],
                log=lines.log,
                note=lines.note,
            )
        )
    return charts


def other_charts(run: RunLog, names: Iterable[str]) -> list[Chart]:
    """One chart per metric, so that a new one is drawn before anybody has placed it."""
    return line_charts(run, [Lines("metric-" + n.replace("/", "-"), n, (n,)) for n in names], {})


def unit_of(metric: str) -> str:
    """Unit of a metric; empty for a pure number or one that the registry does not know."""
    try:
        unit = registry.find(metric).unit
    except KeyError:
        return ""
    return "" if unit == "–" else unit
