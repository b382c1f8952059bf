"""One function on many pieces, in one process or several, with its results in the order of the pieces."""

import itertools
import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from curriq.errors import CurriqError

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 3
"""Pieces for each process that are read before their results are taken."""


def ordered_map(function: Callable[[T], R], pieces: Iterable[T], workers: int) -> Generator[R]:
    """The results of the pieces, in their order; at most `AHEAD` pieces for each worker are in memory.

    Args:
        function: a method of an object that can be pickled, where there are several workers.
        workers: processes; 1 works in this one.

    Raises:
        CurriqError: a process has ended, for instance because the memory did not suffice.
    """
    if workers == 1:
        yield from map(function, pieces)
        return
    # Not forked: this process may have threads, of torch and of the tokenizer, which a fork lacks.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (function,))
    pending: deque[Future[Any]] = deque()
    pieces = iter(pieces)
    try:
        while True:
            for piece in itertools.islice(pieces, AHEAD * workers - len(pending)):
                pending.append(pool.submit(_call, piece))
            if not pending:
                return
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise CurriqError(
            "a process that scores documents has ended. If it was killed, the machine may have had too "
            "little memory: lower --workers."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_function: Callable[[Any], Any]


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    # Ctrl-C is for the process that writes, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    one_thread()
    logging.getLogger("curriq").setLevel(logging.ERROR)


def _call(piece: Any) -> Any:
    return _function(piece)


def one_thread() -> None:
    """One core for this process: others work beside it."""
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
