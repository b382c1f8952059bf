"""How far reading is: a bar with MB/s on a terminal, a line every few seconds elsewhere."""

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager

from curriq import terminal
from curriq.curate.scoring import Advance

_log = logging.getLogger("curriq")

EVERY_SECONDS = 10
"""Between two lines where there is no terminal."""


@contextmanager
def progress(what: str, total: int) -> Generator[Advance]:
    """Shows on standard error how many of so many characters have been read."""
    console = terminal.console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, total)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, speed_estimate_period=60) as bar:
        task = bar.add_task(what, total=total)
        yield lambda characters: bar.advance(task, characters)


class _Lines:
    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._done, self._first = 0, None
        self._began = self._shown = time.monotonic()

    def __call__(self, characters: int) -> None:
        if self._first is None and self._done == 0:  # what an earlier call has done is no speed of this one
            self._first = characters
        self._done += characters
        now = time.monotonic()
        if now - self._shown < EVERY_SECONDS:
            return
        self._shown = now
        speed = max(1.0, (self._done - (self._first or 0)) / (now - self._began))
        left = max(0.0, self._total - self._done) / speed
        _log.info(
            f"{self._what}: {self._done / 1e6:,.0f} of about {self._total / 1e6:,.0f} MB, "
            f"{speed / 1e6:.1f} MB/s, about {left:,.0f} s left"
        )
