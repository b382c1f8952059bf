"""Reads a stream of windows in a process of its own, ahead of training.

To tokenise, check and pack text takes a microsecond or two per token, much of it in Python, and a filtered
stream reads several windows for each that it trains on. A GPU would wait for that; a thread would not help,
because it shares Python's lock with the one that feeds the GPU. A CPU that trains has no core to spare: there
the stream is read where it is needed. The windows are the same.
"""

import contextlib
import itertools
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from curriq.data.stream import WindowStream
from curriq.data.waiting import reporting
from curriq.errors import CurriqError
from curriq.state import State
from curriq.types import Cost, Offer

if TYPE_CHECKING:
    import transformers

_log = logging.getLogger("curriq")

SNAPSHOT_BLOCKS = 4
"""Least number of blocks between two states that the worker sends along: at most so many are read again for a
checkpoint. A state holds the whole shuffle buffer, so between two there are a quarter as many windows as that
at the least; copying it then takes about a sixth of the time that reading does."""
PATIENCE = 5.0
"""Seconds without a block after which the log says that the run waits for the worker."""


class Block(NamedTuple):
    """What the worker sends."""

    offer: Offer | CurriqError  # the windows, or why there are none and will be none
    state: State | None  # of the stream before them, in every few blocks
    messages: list[tuple[int, str]]  # level and text of what was logged meanwhile
    skipped: dict[str, int]  # the stream's
    template: str | dict[str, str] | None  # the tokenizer's chat template, which conversations may have set


class Prefetched:
    """The windows of a stream that a worker process reads ahead; the same windows and the same state.

    Args:
        stream: what is read. The worker has a copy; this one stands where the last state was taken.
        tokenizer: the stream's.
        block: windows read at a time.
        ahead: blocks that may wait.
    """

    def __init__(
        self,
        stream: WindowStream,
        tokenizer: "transformers.PreTrainedTokenizerBase",
        *,
        block: int,
        ahead: int,
    ) -> None:
        self.fingerprint = stream.fingerprint
        self.skipped = stream.skipped  # like the epoch of what has been read ahead
        self._tokenizer = tokenizer
        self._stream = stream
        self._block = block
        self._ahead = ahead
        self._blocks: Any = None
        self._error: CurriqError | None = None
        self._rest: Offer | None = None
        self._snapshot: State = stream.state_dict()
        self._since = 0  # windows handed out since the snapshot

    def read(self, n: int) -> Offer:
        """The next n windows; their epoch is that of what has been read ahead.

        Raises:
            CurriqError: a source cannot be read on, or the worker has ended.
        """
        parts: list[Offer] = []
        missing = n
        while missing > 0:
            block = self._next()
            parts.append(block.take(slice(missing)))
            self._rest = block.take(slice(missing, None)) if len(block) > missing else None
            missing -= len(parts[-1])
            self._since += len(parts[-1])
        return replace(Offer.cat(parts), cost=Cost(windows_read=n))

    def state_dict(self) -> State:
        """That of a `WindowStream` which has handed out the same windows: either can go on from it.

        Raises:
            CurriqError: the last read failed. The windows that it lost would be missing from the state.
        """
        if self._error is not None:
            raise self._error
        self._stream.load_state_dict(self._snapshot)
        if self._since:
            _log.disabled = True  # the worker has logged this already
            try:
                self._stream.read(self._since)
            finally:
                _log.disabled = False
        self._snapshot, self._since = self._stream.state_dict(), 0
        return self._snapshot

    def load_state_dict(self, state: State) -> None:
        """Continue exactly where the state was taken; CurriqError when it is of a stream of other data."""
        self._stream.load_state_dict(state)
        self.skipped = self._stream.skipped
        self._snapshot, self._since = state, 0
        self._blocks = self._rest = self._error = None

    def _next(self) -> Offer:
        if self._error is not None:
            raise self._error
        if self._rest is not None:
            return self._rest
        if self._blocks is None:
            self._blocks = self._start()
        offer, state, messages, self.skipped, template = self._wait()
        for level, message in messages:
            _log.log(level, message)
        self._tokenizer.chat_template = template
        if isinstance(offer, CurriqError):
            self._error = offer
            raise offer
        if state is not None:
            self._snapshot, self._since = state, 0  # all blocks before this one have been handed out
        return offer

    def _wait(self) -> Block:
        """The worker's next block. While it does not come, the log says so every few seconds."""
        assert self._blocks is not None
        try:
            with reporting(self._waiting, PATIENCE, logging.WARNING):
                return next(self._blocks)
        except (RuntimeError, EOFError, ConnectionError) as error:
            ended = "exited unexpectedly" in str(error) or not isinstance(error, RuntimeError)
            if not ended or "in DataLoader worker" in str(error):
                raise  # an error inside the worker
            cause = error  # the last two: it ended in the middle of handing a block over
        self._error = CurriqError(
            f"the process that reads the data has ended ({cause}). If it was killed, the machine may have "
            "had too little memory."
        )
        raise self._error from cause

    def _waiting(self, seconds: float) -> str:
        """What to say of a worker that has sent nothing for some seconds."""
        process = self._blocks._workers[0]  # of PyTorch's iterator
        why = ""
        with contextlib.suppress(OSError):  # a system without /proc
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][:1]
            if state in "Tt":
                why = f": it is stopped; `kill -CONT {process.pid}` lets it go on"
        return f"waiting for the process {process.pid} that reads the data, {seconds:.0f} s so far{why}."

    def _start(self) -> Any:
        self._stream.load_state_dict(self._snapshot)
        loader = DataLoader(
            _Blocks(self._stream, self._tokenizer, self._block),
            batch_size=None,
            num_workers=1,
            prefetch_factor=self._ahead,
            multiprocessing_context="fork",  # nothing to import or to pickle; the worker never touches a GPU
            worker_init_fn=_begin_worker,
        )
        before = signal.getsignal(signal.SIGCHLD)
        blocks = iter(loader)
        if signal.getsignal(signal.SIGCHLD) != before:
            # PyTorch's handler would raise RuntimeError in the middle of a training step; the next read says
            # that the worker has ended.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return blocks


class _Blocks(IterableDataset):
    """Blocks of windows, every few with the state they were read from; an error is the last item."""

    def __init__(
        self, stream: WindowStream, tokenizer: "transformers.PreTrainedTokenizerBase", size: int
    ) -> None:
        self._stream = stream
        self._tokenizer = tokenizer
        self._size = size

    def __iter__(self) -> Iterator[Block]:
        captured = BufferingHandler(sys.maxsize)
        every = max(SNAPSHOT_BLOCKS, -(-self._stream.buffer_size // (4 * self._size)))
        _log.handlers[:] = [captured]  # the terminal belongs to the process that trains
        _log.propagate = False
        for number in itertools.count():
            state = self._stream.state_dict() if number % every == 0 else None
            try:
                offer: Offer | CurriqError = self._stream.read(self._size)
            except CurriqError as error:
                offer = error
            messages = [(record.levelno, record.getMessage()) for record in captured.buffer]
            yield Block(offer, state, messages, self._stream.skipped, self._tokenizer.chat_template)
            if isinstance(offer, CurriqError):
                return
            captured.flush()


def _begin_worker(worker: int) -> None:
    # A fork has none of its parent's threads: the tokenizer would wait for them forever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C is for the process that trains, which ends the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
