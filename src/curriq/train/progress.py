"""What a run shows while it trains: a live bar on a terminal, plain lines elsewhere."""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Literal

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from curriq import terminal
from curriq.types import Metrics, Reading

ESTIMATE_SECONDS = 3600
"""Time left is estimated from the steps of the last hour, at most 1000 of them."""
BARS = "▁▂▃▄▅▆▇█"
RECENT = 20
"""Steps that a rate is measured over."""
OF_EVERY_RUN = (Reading("loss", "train/loss"), Reading("validation", "validation/loss"))
SPEED = Reading("tokens/s", "x/tokens", "{:,.0f}", per="x/seconds")
"""What a run's parts show of themselves stands between these."""


@contextmanager
def make_progress(
    mode: Literal["auto", "bar", "lines", "none"],
    total: int,
    start_step: int,
    console: Console | None = None,
    readings: Sequence[Reading] = (),
) -> Generator["Display"]:
    """The display of a run of `total` steps that begins at `start_step`, as a context manager.

    `readings` are those of the run's parts, shown beside loss, validation loss and speed. `auto` is the bar
    on a terminal and lines elsewhere. Without a console it writes to standard error, so that standard output
    stays for results.
    """
    console = console or terminal.console(stderr=True)
    if mode == "auto":
        mode = "bar" if console.is_terminal else "lines"
    display = {"bar": Bar, "lines": Lines, "none": Display}[mode](
        console, total, start_step, readings=readings
    )
    with ExitStack() as stack:
        logger, handler = logging.getLogger("curriq"), _LogHandler(console)
        stack.callback(setattr, logger, "propagate", logger.propagate)
        stack.callback(logger.removeHandler, handler)
        logger.addHandler(handler)
        logger.propagate = False  # a second handler, such as the root logger's, would tear the bar
        if isinstance(display, Bar):
            stack.enter_context(Live(get_renderable=display.frame, console=console, refresh_per_second=4))
        yield display


class Display:
    """Shows nothing beside the package's log messages; `Bar` and `Lines` add the numbers of each step."""

    def __init__(
        self,
        console: Console,
        total: int,
        start_step: int,
        clock: Callable[[], float] = time.monotonic,
        readings: Sequence[Reading] = (),
    ) -> None:
        self.console = console
        self.readings = (*OF_EVERY_RUN, *readings, SPEED)
        self.values: dict[str, str] = {}
        self.status = ""
        # Six sparklines of ten characters and their labels fit 80 columns.
        self.histories = {reading.label: History(width=10) for reading in self.readings}
        # Totals begin at 0; where a resumed run's stood is not known before its first step.
        self._totals: deque[Metrics] = deque([{}] if start_step == 0 else [], maxlen=RECENT + 1)
        self.left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
        self.progress = Progress(
            TextColumn("step [bold]{task.completed:,.0f}[/]/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            self.left,
            TextColumn("{task.description}", style="cyan"),
            get_time=clock,
            speed_estimate_period=ESTIMATE_SECONDS,
            expand=True,
        )
        task = self.progress.add_task("left", total=total, completed=start_step)
        self.progress.advance(task, 0)  # the clock of the first step starts here
        self.task = self.progress.tasks[task]

    def update(self, row: Metrics, status: str = "") -> None:
        """Show the row of a finished step and the state of the policy. A number that a row lacks keeps its
        last value."""
        finished = int(row["step"]) + 1
        ended = "in total" if finished == self.task.total else "left"
        self.progress.update(self.task.id, completed=finished, description=ended)
        self.status = status
        self._totals.append(row)
        found = {}
        for reading in self.readings:
            if (value := self._value(reading, row)) is not None:
                self.histories[reading.label].add(value)
                found[reading.label] = reading.form.format(value).replace("-", "−")
        known = self.values | found
        self.values = {
            reading.label: known[reading.label] for reading in self.readings if reading.label in known
        }

    def _value(self, reading: Reading, row: Metrics) -> float | None:
        if reading.metric not in row:
            return None
        if not reading.per:
            return reading.value(row[reading.metric])
        first = self._totals[0]
        grown, per = (row.get(name, 0.0) - first.get(name, 0.0) for name in (reading.metric, reading.per))
        return reading.value(grown / per) if per > 0 else None


class Bar(Display):
    """A bar above a small table of readings and their sparklines, redrawn in place four times a second."""

    def frame(self) -> Group:
        """What is drawn now; plain text, so that it works over ssh."""
        table = Table(box=None, expand=True, padding=(0, 1), header_style="dim", show_edge=False)
        numbers = self.values
        for label in numbers:
            table.add_column(label, justify="right", no_wrap=True)
        if numbers:
            table.add_row(*numbers.values(), style="bold")
            table.add_row(*(self.histories[label].sparkline() for label in numbers), style="cyan")
        status = [Text(self.status, style="cyan", no_wrap=True, overflow="ellipsis")] if self.status else []
        return Group(self.progress, table, *status)


class Lines(Display):
    """One line at the first and the last step, and between them every 10 seconds or twentieth of the run."""

    _shown_at, _shown_part = -float("inf"), 0

    def update(self, row: Metrics, status: str = "") -> None:
        super().update(row, status)
        now, total, finished = self.progress.get_time(), int(self.task.total or 0), int(self.task.completed)
        part = finished // max(1, round(total / 20))
        if part > self._shown_part or self.task.finished or now - self._shown_at >= 10:
            self._shown_at, self._shown_part = now, part
            numbers = (f"{label} {value}" for label, value in self.values.items())
            left = f"{self.left.render(self.task)} {self.task.description}"
            shown = (f"step {finished}/{total}", *numbers, self.status, left)
            self.console.print("  ".join(filter(None, shown)), soft_wrap=True)


class _LogHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        warns = record.levelno >= logging.WARNING
        prefix = f"{record.levelname.lower()}: " if warns else ""
        self._console.print(prefix + record.getMessage(), style="yellow" if warns else "")


class History:
    """Means over equal numbers of consecutive values, at most two for each of `width` characters."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._per_mean = 1
        self._means: list[float] = []
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        self._pending.append(value)
        if len(self._pending) == self._per_mean:
            self._means.append(fmean(self._pending))
            self._pending.clear()
        if len(self._means) == 2 * self._width:
            self._means = [fmean(pair) for pair in zip(self._means[::2], self._means[1::2], strict=True)]
            self._per_mean *= 2

    def sparkline(self) -> str:
        """The history so far, its smallest mean as the lowest bar and its largest as the highest."""
        parts = np.array_split(self._means, min(len(self._means), self._width) or 1)
        return sparkline([float(part.mean()) for part in parts if len(part)])


def sparkline(values: list[float]) -> str:
    """One bar per value: `sparkline([0, 1, 2]) == "▁▅█"`; equal values lie in the middle."""
    if not values:
        return ""
    low, high = min(values), max(values)
    if high == low:
        return BARS[3] * len(values)
    return "".join(BARS[round((value - low) / (high - low) * 7)] for value in values)
