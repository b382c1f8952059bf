"""The charts of a report as PNG and SVG files for a paper, drawn by matplotlib from the same data."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curriq.report.chart import Chart, Forest, Section
from curriq.report.comparison import COLOURS, DASHES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 4
"""Lines whose names find room inside a picture."""
AXIS_LABELS = {"windows": "windows seen", "read": "windows read"}


def save_figures(sections: list[Section], folder: Path, axis: str = "step", prefix: str = "") -> list[Path]:
    """Write every chart of some sections as FOLDER/PREFIXid.png and .svg.

    Args:
        sections: whose charts to draw.
        folder: made when it is not there.
        axis: x-axis of the charts that have several.
        prefix: of the file names, to tell runs apart.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for section in sections:
        for block in section.blocks:
            if not isinstance(block, Chart | Forest) or not block:
                continue
            figure = Figure(figsize=(5.5, 3.6), layout="constrained")
            draw(figure, block, axis)
            path = folder / f"{prefix}{block.id}.png"
            figure.savefig(path, dpi=150)
            # Equal data, equal file; text stays text.
            with matplotlib.rc_context({"svg.hashsalt": "curriq", "svg.fonttype": "none"}):
                figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
            written.append(path)
    return written


def draw(figure: "Figure", block: Chart | Forest, axis: str) -> None:
    """One chart on an empty figure."""
    axes = figure.add_subplot()
    axes.set_title(_plain(block.title), loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    if isinstance(block, Forest):
        _forest(axes, block)
    elif block.kind == "stack":
        _stack(axes, block, axis)
    else:
        _lines(axes, block, axis)


def _lines(axes: "Axes", chart: Chart, axis: str) -> None:
    for index, series in enumerate(chart.series):
        style = index if series.style is None else series.style
        colour = "0.6" if series.faint else COLOURS[style % len(COLOURS)]
        x = _along(series.x, axis)
        if series.low is not None and series.high is not None:
            axes.fill_between(x, series.low, series.high, color=colour, alpha=0.17, linewidth=0)
        axes.plot(
            x,
            series.y,
            color=colour,
            linestyle=DASHES[style // len(COLOURS) % len(DASHES)],
            linewidth=0.8 if series.faint else 1.5,
            marker="o" if series.dots or len(x) <= 24 else None,
            ms=3,
            label=_plain(series.label) or "_",
        )
    for value, label in chart.levels:
        axes.axhline(value, color="0.4", linewidth=1, linestyle=(0, (2, 2)), zorder=0)
        at_start = _clear_of(chart, value, 0) > _clear_of(chart, value, -1)
        axes.annotate(
            _plain(label),
            xy=(0 if at_start else 1, value),
            xycoords=("axes fraction", "data"),
            xytext=(2 if at_start else -2, 3),
            textcoords="offset points",
            ha="left" if at_start else "right",
            color="0.35",
            fontsize="small",
        )
    if chart.log and all(np.nanmin(s.y) > 0 for s in chart.series if np.isfinite(s.y).any()):
        axes.set_yscale("log")
    _finish(axes, chart, axis)


def _clear_of(chart: Chart, value: float, end: int) -> float:
    """Distance of a level from the nearest curve at one end of the picture; there its name can be read."""
    ends = [known[end] for s in chart.series if len(known := s.y[np.isfinite(s.y)])]
    return min((abs(y - value) for y in ends), default=0.0)


def _stack(axes: "Axes", chart: Chart, axis: str) -> None:
    if not chart.series:
        return
    x = _along(chart.series[0].x, axis)
    axes.stackplot(
        x,
        *(np.nan_to_num(series.y) for series in chart.series),
        colors=[COLOURS[i % len(COLOURS)] for i in range(len(chart.series))],
        labels=[_plain(series.label) for series in chart.series],
        alpha=0.85,
    )
    axes.margins(x=0, y=0)
    _finish(axes, chart, axis)


def _finish(axes: "Axes", chart: Chart, axis: str) -> None:
    for at, label in chart.marks:
        x = at.get(axis, next(iter(at.values())))
        axes.axvline(x, color="0.2", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(
            _plain(label), xy=(x, 1), xycoords=("data", "axes fraction"), fontsize="small", va="top"
        )
    shared = chart.series[0].x if chart.series else {}
    name = axis if axis in shared else next(iter(shared), "")
    axes.set_xlabel(chart.axis or AXIS_LABELS.get(name, name))
    axes.set_ylabel(_plain(chart.y))
    named = sum(bool(series.label) for series in chart.series)
    if named > FEW or (chart.kind == "stack" and named > 1):
        axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    elif named > 1:
        axes.legend(frameon=False, fontsize="small")


def _forest(axes: "Axes", forest: Forest) -> None:
    axes.axvline(forest.neutral, color="0.4", linewidth=1, linestyle=(0, (2, 2)), zorder=0)
    for place, row in enumerate(reversed(forest.rows)):
        colour = COLOURS[row.style % len(COLOURS)]
        if row.low is not None:
            right = row.mean if row.high is None else row.high
            axes.plot([row.low, right], [place, place], color=colour, linewidth=2)
        if row.mean is not None:
            axes.plot(row.mean, place, color=colour, marker=">" if row.censored else "o", ms=6)
        axes.annotate(
            _plain(row.note),
            xy=(1, place),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )
    axes.set_yticks(range(len(forest.rows)), [_plain(row.label) for row in reversed(forest.rows)])
    axes.set_ylim(-0.6, len(forest.rows) - 0.4)
    axes.set_xlabel(_plain(forest.x))


def _along(x: dict[str, np.ndarray], axis: str) -> np.ndarray:
    return x[axis] if axis in x else next(iter(x.values()), np.empty(0))


def _plain(text: str) -> str:
    """A name that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")
