"""The charts and tables of a report outside of its page: PNG and SVG by matplotlib, a terminal by rich."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curriq.report import look
from curriq.report.chart import Chart, Forest, Section, Series, Table
from curriq.terminal import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

FEW = 4
"""Lines whose names find room inside a picture."""
CHARACTER = 0.017
"""Width of a character of a mark's label, as a share of the picture's."""
LEVEL: dict[str, Any] = {"color": "0.4", "linewidth": 1, "linestyle": (0, (2, 2)), "zorder": 0}
"""Line of a reference level."""
NUMBER = re.compile(r"[\[>]? ?[−+]?\d.*|–")


def save_figures(sections: list[Section], folder: Path, axis: str = "step", prefix: str = "") -> list[Path]:
    """`save_figure` of every chart as FOLDER/PREFIXid.png, over `axis` where it has several."""
    charts = [chart for section in sections for chart in section.charts()]
    return [save_figure(chart, folder / f"{prefix}{chart.id}.png", axis) for chart in charts]


def save_figure(block: Chart | Forest, path: Path, axis: str) -> Path:
    """Write one chart as PNG and, beside it, as SVG; equal data give equal files. ImportError without
    matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(_plain(block.title), loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    if isinstance(block, Forest):
        _forest(axes, block)
    else:
        _chart(axes, block, axis)
    figure.savefig(path, dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": "curriq", "svg.fonttype": "none"}):  # text stays text
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return path


def print_table(console: "Console", table: Table) -> None:
    """Print a table under its title; numbers never wrap, words of text wrap between each other."""
    from rich import box
    from rich.table import Table as RichTable

    printed = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, heading in enumerate(table.header):
        cells = [row[index] for row in table.rows]
        if index == 0:
            printed.add_column(heading, overflow="fold")
        elif all(map(NUMBER.fullmatch, cells)):
            printed.add_column(heading, justify="right", no_wrap=True)
        else:
            words = " ".join([heading, *cells]).split()
            printed.add_column(heading, min_width=max(map(len, words)))
    for row in table.rows:
        printed.add_row(*row)
    console.print(table.title, style="bold")
    console.print(printed)
    if table.note:
        console.print(f"{table.note}\n", style="dim")


def _chart(axes: "Axes", chart: Chart, axis: str) -> None:
    draw = _layers if chart.kind == "stack" else _lines
    draw(axes, chart, axis)
    marks = sorted((at.get(axis, next(iter(at.values()))), _plain(label)) for at, label in chart.marks)
    for x, _ in marks:
        axes.axvline(x, color="0.2", linewidth=0.8, linestyle=(0, (1, 2)))
    left, right = axes.get_xlim()
    places = [((x - left) / (right - left or 1), len(label) * CHARACTER) for x, label in marks]
    for (x, label), row in zip(marks, rows_apart(places), strict=True):
        below: dict[str, Any] = {"xytext": (2, -11 * row), "textcoords": "offset points", "va": "top"}
        axes.annotate(label, (x, 1), xycoords=("data", "axes fraction"), fontsize="small", **below)
    shared = chart.series[0].x
    name = axis if axis in shared else next(iter(shared), "")
    axes.set_xlabel(chart.axis or look.AXIS_LABELS.get(name, name))
    axes.set_ylabel(_plain(chart.y))
    if (named := sum(bool(series.label) for series in chart.series)) > 1:
        outside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        place = outside if named > FEW or chart.kind == "stack" else {}
        axes.legend(frameon=False, fontsize="small", **place)


def rows_apart(places: list[tuple[float, float]]) -> list[int]:
    """A row for each of some labels (start, width; starts ascending), the first in which it overprints none
    before it."""
    ends: list[float] = []
    rows = []
    for start, width in places:
        row = next((row for row, end in enumerate(ends) if end <= start), len(ends))
        ends[row : row + 1] = [start + width]
        rows.append(row)
    return rows


def _lines(axes: "Axes", chart: Chart, axis: str) -> None:
    for series, style in chart.styled():
        colour = "0.6" if series.faint else _colour(style)
        dash = look.DASHES[style // len(look.LIGHT) % len(look.DASHES)]
        x = _along(series, axis)
        if series.low is not None and series.high is not None:
            axes.fill_between(x, series.low, series.high, color=colour, alpha=look.BAND_OPACITY, linewidth=0)
        axes.plot(
            x,
            series.y,
            color=colour,
            linestyle=(0, dash) if dash else "solid",
            linewidth=0.8 if series.faint else 1.5,
            marker="o" if series.dots or len(x) <= look.MOST_DOTS else None,
            ms=3,
            label=_plain(series.label) or "_",
        )
    for value, label in chart.levels:
        axes.axhline(value, **LEVEL)
        at_start = _clear_of(chart, value, 0) > _clear_of(chart, value, -1)
        place: dict[str, Any] = {"xytext": (2 if at_start else -2, 3), "ha": "left" if at_start else "right"}
        _beside(axes, label, (0 if at_start else 1, value), color="0.35", **place)
    if chart.log and all(np.nanmin(s.y) > 0 for s in chart.series if np.isfinite(s.y).any()):
        axes.set_yscale("log")


def _clear_of(chart: Chart, value: float, end: int) -> float:
    """Distance of a level from the nearest curve at one end of the picture; there its name can be read."""
    ends = [known[end] for s in chart.series if len(known := s.y[np.isfinite(s.y)])]
    return min((abs(y - value) for y in ends), default=0.0)


def _layers(axes: "Axes", chart: Chart, axis: str) -> None:
    axes.stackplot(
        _along(chart.series[0], axis),
        *(np.nan_to_num(series.y) for series in chart.series),
        colors=[_colour(style) for _, style in chart.styled()],
        labels=[_plain(series.label) for series in chart.series],
        alpha=look.LAYER_OPACITY,
    )
    axes.margins(x=0, y=0)


def _forest(axes: "Axes", forest: Forest) -> None:
    axes.axvline(forest.neutral, **LEVEL)
    rows = forest.rows[::-1]
    for place, row in enumerate(rows):
        colour = _colour(row.style)
        if row.low is not None:
            right = row.mean if row.high is None else row.high
            axes.plot([row.low, right], [place, place], color=colour, linewidth=2)
        axes.plot(
            row.points,
            [place] * len(row.points),
            color=colour,
            marker="o",
            ms=2.5,
            linestyle="none",
            alpha=0.5,
        )
        if row.mean is not None:
            axes.plot(row.mean, place, color=colour, marker=">" if row.censored else "o", ms=6)
        _beside(axes, row.note, (1, place), xytext=(4, 0), va="center")
    axes.set_yticks(range(len(rows)), [_plain(row.label) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(_plain(forest.x))


def _beside(axes: "Axes", text: str, xy: tuple[float, float], **place: Any) -> None:
    """Text at a share of the width and a value of y, moved by `xytext` points."""
    place |= {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": "small"}
    axes.annotate(_plain(text), xy, **place)


def _colour(style: int) -> str:
    return look.LIGHT[style % len(look.LIGHT)]


def _along(series: Series, axis: str) -> np.ndarray:
    """The wanted axis, or the first that there is; plain numbers where the log has none."""
    return series.x[axis] if axis in series.x else next(iter(series.x.values()), np.arange(len(series.y)))


def _plain(text: str) -> str:
    """A name that matplotlib can draw and does not take for mathematics."""
    return visible(text).replace("$", r"\$")
