"""What a report shows, as data: the page draws it in the browser, `figures.py` with matplotlib."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

DIGITS = 5
"""Significant digits of a drawn number; more cannot be seen and makes the page twice as large."""

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one layer of a stack.

    Attributes:
        label: in the legend.
        x: by name of the axis; all of the same length as `y`.
        y: values; NaN leaves a gap.
        low, high: the band around the line, when there is one.
        style: index into the palette and the dashes; the position in the chart when None.
        faint: an auxiliary line, drawn thin and grey.
        dots: marks instead of a line, for few measurements.
    """

    label: str
    x: dict[str, np.ndarray]
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    style: int | None = None
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture.

    Attributes:
        id: unique on the page; also the name of the figure's file.
        kind: lines, or layers stacked on each other.
        levels: (y, label) of horizontal reference lines, such as chance.
        marks: (x by axis, label) of vertical lines, such as a change point.
        axis: name of the x-axis when it is none of the run's.
    """

    id: str
    title: str
    y: str
    series: list[Series]
    note: str = ""
    kind: Literal["line", "stack"] = "line"
    levels: list[tuple[float, str]] = field(default_factory=list)
    marks: list[tuple[dict[str, float], str]] = field(default_factory=list)
    axis: str = ""
    log: bool = False

    def __bool__(self) -> bool:
        """Whether there is anything to draw."""
        return any(np.isfinite(series.y).any() for series in self.series)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One row of a forest plot; None where it could not be measured."""

    label: str
    mean: float | None
    low: float | None
    high: float | None
    note: str = ""
    censored: bool = False
    style: int = 0


@dataclass(frozen=True, kw_only=True)
class Forest:
    """Point estimates with their intervals beside a line of no change."""

    id: str
    title: str
    x: str
    rows: list[Interval]
    neutral: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; a cell that begins with a digit, a sign or a dash is aligned as a number."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Code:
    """Text as it stands in a file, or a command."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Explorer:
    """Some steps, one at a time: windows with their text (`explore.py`), or queries (`queries.py`)."""

    content: Json
    type: Literal["windows", "queries"]


Block = Chart | Forest | Table | Code | Explorer | str
"""A string is a paragraph."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question of the report and what answers it.

    Attributes:
        id: its anchor.
        answer: one or two sentences in plain words, before any picture.
    """

    id: str
    title: str
    answer: str
    blocks: list[Block] = field(default_factory=list)

    def charts(self) -> list[Chart]:
        return [block for block in self.blocks if isinstance(block, Chart) and block]


def section_json(section: Section) -> Json:
    blocks = [block_json(block) for block in section.blocks if not (isinstance(block, Chart) and not block)]
    return {"id": section.id, "title": section.title, "answer": section.answer, "blocks": blocks}


def block_json(block: Block) -> Json:
    match block:
        case str():
            return {"type": "prose", "text": block}
        case Chart():
            return _chart_json(block)
        case Forest():
            rows = [{k: _plain(v) for k, v in vars(row).items()} for row in block.rows]
            return {"type": "forest", **vars(block), "rows": rows}
        case Table():
            return {"type": "table", **vars(block)}
        case Code():
            return {"type": "code", **vars(block)}
        case Explorer():
            return {"type": block.type, **block.content}


def numbers(values: np.ndarray) -> list[float | int | None]:
    """A JSON list with `DIGITS` significant digits; null for NaN."""
    return [_plain(float(value)) for value in values]


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _chart_json(chart: Chart) -> Json:
    """Axes that several series share are written once."""
    axes: list[dict[str, list]] = []
    known: dict[str, int] = {}
    series = []
    for one in chart.series:
        x = {name: numbers(values) for name, values in one.x.items()}
        key = repr(x)
        if key not in known:
            known[key] = len(axes)
            axes.append(x)
        drawn: Json = {"label": one.label, "x": known[key], "y": numbers(one.y)}
        if one.low is not None and one.high is not None:
            drawn |= {"low": numbers(one.low), "high": numbers(one.high)}
        drawn |= {name: getattr(one, name) for name in ("faint", "dots") if getattr(one, name)}
        if one.style is not None:
            drawn["style"] = one.style
        series.append(drawn)
    marks = [{"x": {k: _plain(v) for k, v in x.items()}, "label": label} for x, label in chart.marks]
    return {
        "type": "chart",
        "id": chart.id,
        "title": chart.title,
        "y": chart.y,
        "note": chart.note,
        "kind": chart.kind,
        "levels": [[_plain(value), label] for value, label in chart.levels],
        "marks": marks,
        "axis": chart.axis,
        "log": chart.log,
        "axes": axes,
        "series": series,
    }
