"""Says in the log that something long goes on, so that no silence looks like a hang."""

import contextlib
import logging
import threading
import time
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


def still_at_work(what: str) -> contextlib.AbstractContextManager[None]:
    """Log `what` and the seconds it has taken, every `EVERY` seconds until the end of the context."""
    return reporting(lambda seconds: f"{what}: {seconds:.0f} s so far", EVERY)
