"""Ctrl-C and SIGTERM end a run after its step, with everything saved."""

import logging
import math
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger("curriq")


@contextmanager
def stop_flag() -> Generator[Callable[[], bool]]:
    """Whether a stop was requested, as a function: the first Ctrl-C or SIGTERM requests it, a second one
    raises KeyboardInterrupt.

    Signals within a second of the first count as one, because launchers forward a Ctrl-C that the terminal
    has sent to every process already.
    """
    asked_at = math.inf

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if time.monotonic() > asked_at + 1:
            raise KeyboardInterrupt
        if asked_at == math.inf:
            asked_at = time.monotonic()
            logger.warning("stopping after this step and saving; press Ctrl-C again to stop at once.")

    try:
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller's own handling stays
        previous = {}
    try:
        yield lambda: asked_at < math.inf
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
