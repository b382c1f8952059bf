"""What a person sees while a run goes: a live bar on a terminal, plain lines elsewhere.

Time left is judged by the last steps, so that it is right after a resume and when the speed changes.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Literal, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from curriq.train.sparkline import Trail
from curriq.types import Metrics

Mode = Literal["auto", "bar", "lines", "none"]


class Reading(NamedTuple):
    """One number of the display."""

    metric: str
    label: str
    form: str
    """Format of the value, and of `fraction` beside it where the row has a fraction."""
    fraction: str = ""


READINGS = (
    Reading("train/loss", "loss", "{:.3f}"),
    Reading("validation/loss", "validation", "{:.3f}"),
    Reading("reward", "reward", "{:.3f}"),
    Reading("policy/entropy", "entropy", "{:.2f}"),
    Reading(
        "policy/effective_batch_size", "effective batch", "{:.1f} ({:.0%})", "policy/effective_batch_fraction"
    ),
    Reading("langevin/tokens_changed", "tokens changed", "{:.0%}"),
    Reading("langevin/above_random_sd", "query Q (sd)", "{:+.1f}"),
    Reading("time/windows_per_second", "windows/s", "{:,.0f}"),
)


def make_progress(mode: Mode, total: int, start_step: int, console: Console | None = None) -> "Display":
    """The display of a run, as a context manager.

    Args:
        mode: `auto` takes the bar on a terminal and lines elsewhere.
        total: steps of the whole run.
        start_step: steps that are finished already.
        console: where to write; standard error when None, so that standard output stays for results.
    """
    console = console or Console(stderr=True, highlight=False)
    if mode == "auto":
        mode = "bar" if console.is_terminal else "lines"
    pace = Pace(total, start_step)
    displays: dict[str, Callable[[], Display]] = {
        "bar": lambda: Bar(console, pace),
        "lines": lambda: Lines(console, pace),
        "none": lambda: Display(console, pace),
    }
    return displays[mode]()


class Pace:
    """Finished steps, and the time that the rest will take at the speed of the last ones.

    Args:
        total: steps of the whole run.
        start_step: steps that are finished already.
        clock: seconds, monotonic.
        window: how many of the last steps count. It should span a few evaluations.
    """

    def __init__(
        self, total: int, start_step: int, clock: Callable[[], float] = time.monotonic, window: int = 100
    ) -> None:
        self.total = total
        self.finished = start_step
        self.clock = clock
        self._started = clock()
        self._recent = deque([(self._started, start_step)], maxlen=window + 1)

    def advance(self, finished: int) -> None:
        self.finished = finished
        self._recent.append((self.clock(), finished))

    def seconds_spent(self) -> float:
        """Since this process began, up to the last step."""
        return self._recent[-1][0] - self._started

    def seconds_left(self) -> float | None:
        """None before the first step has been timed."""
        (first_time, first), (last_time, last) = self._recent[0], self._recent[-1]
        if last == first:
            return None
        return (self.total - last) * (last_time - first_time) / (last - first)


class Display(AbstractContextManager):
    """Shows nothing but what is said aloud; the other displays extend it.

    While it is open, log messages of the package go through it alone: a second handler, such as the root
    logger's, would print them twice and tear the bar.
    """

    def __init__(self, console: Console, pace: Pace) -> None:
        self.console = console
        self.pace = pace
        self.last: Metrics = {}
        self._logger = logging.getLogger("curriq")
        self._handler = SayHandler(self)
        self._propagated = self._logger.propagate

    def __enter__(self) -> "Display":
        self._propagated, self._logger.propagate = self._logger.propagate, False
        self._logger.addHandler(self._handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._logger.removeHandler(self._handler)
        self._logger.propagate = self._propagated

    def update(self, row: Metrics) -> None:
        """Take in the row of a finished step. A number that a row lacks keeps its last value."""
        self.pace.advance(int(row["step"]) + 1)
        self.last |= row
        self.show()

    def show(self) -> None:
        """Bring the display up to date."""

    def say(self, text: str, style: str = "") -> None:
        """Print a lasting message, above the bar where there is one."""
        self.console.print(escape(text), style=style)


SPARK_WIDTH = 10
"""Characters of a course; six of them and their labels fit 80 columns."""


class Bar(Display):
    """A bar with a small table of readings under it and their course over the run, redrawn in place four
    times a second. Plain text, so that it works over ssh."""

    def __init__(self, console: Console, pace: Pace) -> None:
        super().__init__(console, pace)
        self._bar = Progress(
            TextColumn("step [bold]{task.completed:,.0f}[/]/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            LeftColumn(pace),
            console=console,
            expand=True,
        )
        self._trails = {reading.label: (reading.metric, Trail(SPARK_WIDTH)) for reading in READINGS}
        self._task: TaskID = self._bar.add_task("", total=pace.total, completed=pace.finished)
        self._live = Live(self._frame(), console=console, refresh_per_second=4)

    def __enter__(self) -> "Display":
        super().__enter__()
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.update(self._frame(), refresh=True)
        self._live.stop()
        super().__exit__(kind, error, traceback)

    def update(self, row: Metrics) -> None:
        for metric, trail in self._trails.values():
            if metric in row:
                trail.add(row[metric])
        super().update(row)

    def show(self) -> None:
        self._bar.update(self._task, completed=self.pace.finished)
        self._live.update(self._frame())

    def _frame(self) -> Group:
        table = Table(box=None, expand=True, padding=(0, 1), header_style="dim", show_edge=False)
        numbers = readings(self.last)
        for label in numbers:
            table.add_column(label, justify="right", no_wrap=True)
        if numbers:
            table.add_row(*numbers.values(), style="bold")
            table.add_row(*(self._trails[label][1].text() for label in numbers), style="cyan")
        return Group(self._bar, table)


class LeftColumn(TextColumn):
    """Time left, of the pace instead of rich's own estimate, which averages since the start."""

    def __init__(self, pace: Pace) -> None:
        super().__init__("")
        self._pace = pace

    def render(self, task: Task) -> Text:
        return Text(f"{time_left(self._pace):>12}", style="cyan")


class Lines(Display):
    """One line at the first and the last step, and between them every `seconds` or `share` of the run."""

    def __init__(self, console: Console, pace: Pace, seconds: float = 10, share: float = 0.05) -> None:
        super().__init__(console, pace)
        self._seconds = seconds
        self._stride = max(1, round(share * pace.total))
        self._shown_at = -float("inf")
        self._shown_step = pace.finished

    def show(self) -> None:
        now, finished = self.pace.clock(), self.pace.finished
        new_share = finished // self._stride > self._shown_step // self._stride
        if new_share or finished == self.pace.total or now - self._shown_at >= self._seconds:
            self._shown_at, self._shown_step = now, finished
            numbers = "  ".join(f"{label} {value}" for label, value in readings(self.last).items())
            line = f"step {finished}/{self.pace.total}  {numbers}  {time_left(self.pace)}"
            self.console.print(escape(line), soft_wrap=True)


class SayHandler(logging.Handler):
    """Sends log records through a display."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        warns = record.levelno >= logging.WARNING
        prefix = f"{record.levelname.lower()}: " if warns else ""
        self._display.say(prefix + record.getMessage(), style="yellow" if warns else "")


def readings(row: Metrics) -> dict[str, str]:
    """Label → formatted value of the numbers that a row has, in the order of `READINGS`."""
    shown = {}
    for reading in READINGS:
        if reading.metric in row:
            value = reading.form.format(row[reading.metric], row.get(reading.fraction, 0.0))
            shown[reading.label] = value.replace("-", "−")
    return shown


def time_left(pace: Pace) -> str:
    """`1:12 left`; the time this process took once all steps are done; empty before the first step."""
    if pace.finished >= pace.total:
        return f"in {clock_time(pace.seconds_spent())}"
    seconds = pace.seconds_left()
    return "" if seconds is None else f"{clock_time(seconds)} left"


def clock_time(seconds: float) -> str:
    """`m:ss`, `h:mm:ss` or `Nd hh h`: `clock_time(3725) == "1:02:05"`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
