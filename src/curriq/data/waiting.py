"""Says in the log that something long goes on, so that no silence looks like a hang."""

import contextlib
import logging
import threading
import time
from collections.abc import Generator

_log = logging.getLogger("curriq")

EVERY = 10.0
"""Seconds between two messages."""


@contextlib.contextmanager
def still_at_work(what: str) -> Generator[None]:
    """Log `what` and the seconds it has taken, every `EVERY` seconds until the end of the context."""
    began, ended = time.monotonic(), threading.Event()

    def report() -> None:
        while not ended.wait(EVERY):
            _log.info(f"{what}: {time.monotonic() - began:.0f} s so far")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()
