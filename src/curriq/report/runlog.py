"""A run as the report sees it: its log, what is computed from it once for all sections, and lines over it."""

import math
import re
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from curriq.report.chart import Chart, Series
from curriq.report.look import asset
from curriq.report.topics import Embed, Topics, find_topics
from curriq.runlog import schema
from curriq.runlog.read import (
    MOST_MEASURED,
    Columns,
    KeptWindows,
    read_columns,
    read_document,
    read_windows,
)
from curriq.runlog.selection import Selection, select


@dataclass(frozen=True)
class Detail:
    """How much of a run a report shows; less per run when there are many."""

    points: int = 300  # most points of a line
    steps: int = 48  # steps that the explorer shows
    rows: int = 20  # windows of each of them, half from either end
    characters: int = 600  # of a window's text; the rest is cut
    topics: int = 8  # clusters of the windows; 0 for none
    windows: int = MOST_MEASURED  # that topics and means over windows are taken from

    @staticmethod
    def of(runs: int, topics: int) -> "Detail":
        """The detail that keeps a page of so many runs within a few megabytes."""
        if runs <= 1:
            return Detail(topics=topics)
        rows, characters = (20, 600) if runs <= 8 else (12, 300)
        points, steps = int(np.clip(1800 / runs, 80, 300)), int(np.clip(192 / runs, 4, 32))
        windows = int(np.clip(60_000 / runs, 1_000, MOST_MEASURED))
        return Detail(points, steps, rows, characters, topics, windows)


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """One run's folder."""

    folder: Path
    label: str  # how the page names it
    columns: Columns
    config: dict[str, Any]  # `config.toml` as a dictionary, so that the log of another version opens too
    environment: dict[str, Any]  # empty when the run has not written it yet
    summary: dict[str, Any]  # likewise
    kept: int  # windows whose tokens the run kept
    windows: KeptWindows  # the measured sample of them
    topics: Topics | None  # clusters of that sample; None when it has too few texts
    selection: Selection
    detail: Detail

    def setting(self, name: str, default: Any = None) -> Any:
        return next((section[name] for section in self.config.values() if name in section), default)

    @property
    def selector(self) -> str:
        return str(self.summary.get("selector") or self.setting("selector", "?"))

    @property
    def sources(self) -> list[str]:
        """Names of the sources that the stream offers."""
        prefix = "select/offered_share/"
        return [name.removeprefix(prefix) for name in self.columns.names() if name.startswith(prefix)]

    @property
    def buffered(self) -> bool:
        """Whether the windows of a step were retrieved from a buffer, and not read for it."""
        return self.setting("proposer", "stream") != "stream"

    @property
    def windows_read(self) -> np.ndarray:
        """Windows read from the stream in each row of the log; N where an old log does not say."""
        read = self.columns.full("data/windows_read")
        return np.where(np.isnan(read), float(self.setting("num_candidates", 0)), read)

    @property
    def accepted(self) -> float | None:
        """Share of the windows read that a stream filter has accepted; None where none was rejected."""
        read, proposed = self.columns.last("x/windows_read"), self.columns.last("x/windows_proposed")
        filtered = "data/windows_read" in self.columns and read and proposed and read > proposed
        return proposed / read if filtered and not self.buffered else None

    def value_line(
        self, label: str, values: np.ndarray, rows: np.ndarray | None = None, points: int = 0, **style: Any
    ) -> Series:
        """Means of values at some rows of the log (all when None) in at most `points` buckets
        (`detail.points` when 0); a NaN counts as not measured."""
        where = np.arange(self.columns.rows) if rows is None else rows
        thin = self.columns.bucketed(values, where, points or self.detail.points)
        return Series(label, thin.x, thin.mean, **style)

    def metric_line(self, metric: str, label: str, **style: Any) -> list[Series]:
        """`value_line` of a metric; empty where it was never logged."""
        rows, values = self.columns.raw(metric)
        return [self.value_line(label, values, rows, **style)] if len(values) else []


def load_run_log(folder: Path, label: str, detail: Detail, embed: Embed | None = None) -> RunLog:
    """A run's folder, also while the run goes on; CurriqError for another folder or a damaged file."""
    columns = read_columns(folder)
    kept = read_windows(folder)
    windows = kept.sample(detail.windows)
    topics = None
    if detail.topics and len(windows) and windows.tokenizer is not None:
        topics = find_topics(windows.texts(np.arange(len(windows)), special=False), detail.topics, embed)
    _, steps = columns.raw("step")
    shown = steps[np.linspace(0, len(steps) - 1, min(len(steps), detail.steps)).round().astype(int)]
    topic_of = None if topics is None else topics.of
    return RunLog(
        folder=folder,
        label=label,
        columns=columns,
        config=read_document(folder / "config.toml"),
        environment=read_document(folder / "environment.json"),
        summary=read_document(folder / "summary.json"),
        kept=len(kept),
        windows=windows,
        topics=topics,
        selection=select(folder, windows, windows.measures(), topic_of, shown),
        detail=detail,
    )


def charts_of(
    run: RunLog, section: str, own: dict[str, list[Series]], others: Iterable[str] = ()
) -> list[Chart]:
    """The charts of a section in `assets/charts.toml`, then one of each other metric that none of them shows.

    Args:
        own: id of a chart → its series, instead of lines of the metrics that the table names.
        others: names of metrics, so that a new one is drawn too.
    """
    placed = dict(_placed()[section])
    shown = {metric for fields in placed.values() for metric in fields.get("metrics", ())}
    rest = [name for name in others if name not in shown]
    placed |= {"metric-" + name.replace("/", "-"): {"title": name, "metrics": [name]} for name in rest}
    return [_chart(run, id, own.get(id), fields) for id, fields in placed.items()]


@cache
def _placed() -> dict[str, dict[str, dict[str, Any]]]:
    """Section → id → fields of `assets/charts.toml`."""
    return tomllib.loads(asset("charts.toml"))


def _chart(run: RunLog, id: str, series: list[Series] | None, fields: dict[str, Any]) -> Chart:
    """Of metrics the bucket means with the range of each bucket."""
    fields = dict(fields)
    metrics, level, height = fields.pop("metrics", []), fields.pop("level", ""), fields.pop("height", None)
    n = run.setting("num_candidates")
    of_n = {"N": n, "log N": n and math.log(n), "1/N": n and 1 / n}
    if height is None:
        height = of_n.get(level, run.setting(level[2:].replace("-", "_")))
    levels = [] if height is None else [(float(height), level)]
    y = fields.pop("y", "")
    with suppress(KeyError, IndexError):  # a metric of another version, or a chart without any
        y = y or schema.find(metrics[0]).unit.removeprefix("–")
    if series is None:
        series = []
        for metric in filter(run.columns.__contains__, metrics):
            label = re.sub(r"\bq\b", "Q", metric.rpartition("/")[2].replace("_", " "))
            thin = run.columns.thinned(metric, run.detail.points)
            series.append(Series(label, thin.x, thin.mean, low=thin.low, high=thin.high))
    return Chart(id, y=y, series=series, levels=levels, **fields)


def time_layers(
    run: RunLog, metrics: Iterable[str], whole: str, inside: Iterable[str], rest: str
) -> list[Series]:
    """Seconds per step of some metrics and, as a layer `rest`, what `whole` took beyond those inside it."""
    layers = {name: np.nan_to_num(run.columns.full(name)) for name in metrics if name in run.columns}
    if layers and whole in run.columns:
        parts = sum(layers[name] for name in inside if name in layers)
        layers = {rest: np.maximum(np.nan_to_num(run.columns.full(whole)) - parts, 0)} | layers
    return [run.value_line(name.removeprefix("time/"), seconds) for name, seconds in layers.items()]
