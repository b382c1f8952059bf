"""Ctrl-C, SIGTERM and SIGHUP end a run after its step, with everything saved."""

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger("curriq")

HANGUP = getattr(signal, "SIGHUP", None)
"""None on Windows."""


@contextmanager
def stop_flag(piece: str = "step") -> Generator[Callable[[], bool]]:
    """Whether a stop was requested, as a function: the first Ctrl-C, SIGTERM or SIGHUP requests it, a second
    one raises KeyboardInterrupt. The message says that this `piece` of the work is finished first.

    After SIGHUP the terminal is gone, and writing to it would be an error: what would go there is dropped. A
    process that ignores SIGHUP, as under nohup, goes on ignoring it.

    Signals within a second of the first count as one, because launchers forward a Ctrl-C that the terminal
    has sent to every process already.
    """
    asked_at = math.inf
    on_terminal = [stream for stream in (1, 2) if os.isatty(stream)]

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if number == HANGUP:
            for stream in on_terminal:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if time.monotonic() > asked_at + 1:
            raise KeyboardInterrupt
        if asked_at == math.inf:
            asked_at = time.monotonic()
            logger.warning(f"stopping after this {piece} and saving; press Ctrl-C again to stop at once.")

    signals = [signal.SIGINT, signal.SIGTERM]
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        signals.append(HANGUP)
    try:
        previous = {number: signal.signal(number, ask) for number in signals}
    except ValueError:  # not in the main thread: the caller's own handling stays
        previous = {}
    try:
        yield lambda: asked_at < math.inf
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
