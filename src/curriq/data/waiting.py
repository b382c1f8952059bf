"""Says in the log that something long goes on, so that no silence looks like a hang."""

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Generator

_log = logging.getLogger("curriq")

EVERY = 10.0
"""Seconds between two messages."""


@contextlib.contextmanager
def reporting(message: Callable[[float], str], every: float, level: int = logging.INFO) -> Generator[None]:
    """Log a message every so many seconds until the end of the context; `message` gets the seconds so far.

    From a thread, because what is waited for may block in a system call.
    """
    began, ended = time.monotonic(), threading.Event()

    def report() -> None:
        while not ended.wait(every):
            _log.log(level, message(time.monotonic() - began))

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()


class Watch:
    """Like `reporting`, for something that is waited for many times and mostly for a moment: one thread
    serves all of them, and ends with this object."""

    def __init__(self, every: float, level: int) -> None:
        self._every = every
        self._level = level
        self._due: tuple[float, float, Callable[[float], str]] | None = None  # since when, seconds, message
        self._thread = threading.Thread(target=_watch, args=(weakref.ref(self), every / 5), daemon=True)

    @contextlib.contextmanager
    def waiting(self, message: Callable[[float], str]) -> Generator[None]:
        """Something is waited for until the end of the context."""
        if not self._thread.is_alive():
            self._thread.start()
        self._due = time.monotonic(), self._every, message
        try:
            yield
        finally:
            self._due = None

    def look(self) -> None:
        """Log the message if it is due."""
        if (due := self._due) is None:
            return
        began, after, message = due
        if (seconds := time.monotonic() - began) >= after:
            _log.log(self._level, message(seconds))
            if self._due is due:
                self._due = began, after + self._every, message


def _watch(watch: weakref.ReferenceType[Watch], every: float) -> None:
    while (found := watch()) is not None:
        found.look()
        del found
        time.sleep(every)


def still_at_work(what: str) -> contextlib.AbstractContextManager[None]:
    """Log `what` and the seconds it has taken, every `EVERY` seconds until the end of the context."""
    return reporting(lambda seconds: f"{what}: {seconds:.0f} s so far", EVERY)
