"""What a report shows, as data: the page draws it in the browser, `figures.py` elsewhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

DIGITS = 5
"""Significant digits of a drawn number; more cannot be seen and makes the page twice as large."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """One line, or one layer of a stack."""

    label: str  # in the legend
    x: dict[str, np.ndarray]  # by name of the axis; all of the same length as `y`
    y: np.ndarray  # NaN leaves a gap
    low: np.ndarray | None = None  # the band around the line
    high: np.ndarray | None = None
    style: int | None = None  # index into the colours, then the dashes; the position in the chart when None
    faint: bool = False  # an auxiliary line, drawn thin and grey
    dots: bool = False  # marks instead of a line, for few measurements


@dataclass(frozen=True)
class Chart:
    """One picture of lines, or of layers stacked on each other."""

    id: str  # unique on the page; also the name of the figure's file
    title: str
    y: str
    series: list[Series]
    note: str = ""
    kind: Literal["line", "stack"] = "line"
    levels: list[tuple[float, str]] = field(default_factory=list)  # (y, label) of horizontal reference lines
    marks: list[tuple[dict[str, float], str]] = field(default_factory=list)  # vertical ones, x by axis
    axis: str = ""  # name of the x-axis when it is none of the run's
    log: bool = False

    def __bool__(self) -> bool:
        """Whether there is anything to draw."""
        return any(np.isfinite(series.y).any() for series in self.series)

    def styled(self) -> list[tuple[Series, int]]:
        """Each series with its style."""
        return [(s, index if s.style is None else s.style) for index, s in enumerate(self.series)]


@dataclass(frozen=True)
class Interval:
    """One row of a forest plot; None where it could not be measured."""

    label: str
    mean: float | None
    low: float | None
    high: float | None
    note: str = ""
    censored: bool = False
    style: int = 0
    points: Sequence[float] = ()  # what the mean is of


@dataclass(frozen=True)
class Forest:
    """Point estimates with their intervals beside a line of no change."""

    id: str
    title: str
    x: str
    rows: list[Interval]
    neutral: float
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text; a column of numbers, dashes and intervals is aligned to the right."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Code:
    """Text as it stands in a file, or a command."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Explorer:
    """Some steps, one at a time: windows with their text, or queries (`explore.py`)."""

    type: Literal["windows", "queries"]
    content: Json


@dataclass(frozen=True)
class Heading:
    """What the blocks after it are about, up to the next one."""

    text: str


Block = Chart | Forest | Table | Code | Explorer | Heading | str
"""A string is a paragraph."""


@dataclass(frozen=True)
class Section:
    """One question of the report and what answers it."""

    id: str  # its anchor
    title: str
    answer: str  # one or two sentences in plain words, before any picture
    blocks: Sequence[Block] = ()

    def charts(self) -> list[Chart | Forest]:
        """Those with something to draw."""
        return [block for block in self.blocks if isinstance(block, Chart | Forest) and block]


def fixed(value: float | None, form: str) -> str:
    """A number in a fixed format with the typographic minus, as wide as the plus; a dash for None."""
    return "–" if value is None else f"{value:{form}}".replace("-", "−")


def section_json(section: Section) -> Json:
    return vars(section) | {"blocks": [block_json(block) for block in section.blocks if block]}


def block_json(block: Block) -> Json:
    if isinstance(block, str):
        return {"type": "prose", "text": block}
    if isinstance(block, Explorer):
        return {"type": block.type, **block.content}
    kind = {"type": type(block).__name__.lower()}
    if not isinstance(block, Chart):
        return kind | _plain(vars(block))
    rest = {name: value for name, value in vars(block).items() if name != "series"}
    return kind | _plain(rest) | _series_json(block)


def numbers(values: np.ndarray | Sequence[float | None]) -> list[float | int | None]:
    """A JSON list with `DIGITS` significant digits; null for NaN and None."""
    return _plain(np.asarray(values, dtype=float))


def _plain(value: Any) -> Any:
    """What JSON can hold of series, intervals, containers, arrays and numbers."""
    match value:
        case float():
            return _short(value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case np.ndarray() if value.dtype.kind == "f" and value.ndim == 1:
            return [_short(number) for number in value.tolist()]
        case np.ndarray():
            return _plain(value.tolist())
        case dict():
            return {name: _plain(item) for name, item in value.items()}
        case Series() | Interval():
            return _plain(vars(value))
    return value


def _short(value: float) -> float | int | None:
    """A number with `DIGITS` significant digits; None for one that is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _series_json(chart: Chart) -> Json:
    """Series without what they lack; axes that several of them share are written once."""
    series: list[Json] = []
    axes: list[dict[str, np.ndarray]] = []
    for one, style in chart.styled():
        place = next((i for i, axis in enumerate(axes) if _equal_axes(axis, one.x)), len(axes))
        if place == len(axes):
            axes.append(one.x)
        drawn = {name: _plain(value) for name, value in vars(one).items() if name != "x"}
        drawn |= {"x": place, "style": style}
        present = {name: value for name, value in drawn.items() if value is not None and value is not False}
        series.append(present)
    return {"series": series, "axes": _plain(axes)}


def _equal_axes(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)
