"""Reads streams of windows in processes of their own, ahead of training.

To tokenise, check and pack text takes half a microsecond or more per token, much of it in Python, and a
filtered stream reads several windows for each that it trains on. A GPU would wait for that; a thread would
not help, because it shares Python's lock with the one that feeds the GPU. A CPU that trains has no core to
spare: there the stream is read where it is needed. The windows are the same.
"""

import contextlib
import gc
import io
import logging
import os
import pickle
import signal
import sys
import weakref
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from curriq import parallel
from curriq.data.stream import WindowStream
from curriq.data.waiting import Watch
from curriq.errors import CurriqError
from curriq.state import State
from curriq.types import Cost, Offer

if TYPE_CHECKING:
    import transformers

_log = logging.getLogger("curriq")

SNAPSHOT_BLOCKS = 2
"""Least number of blocks between two states that the worker sends along: at most so many are read again for a
checkpoint. A state holds the whole shuffle buffer, so between two there are a quarter as many windows as that
at the least; copying it then takes about a sixth of the time that reading does."""
PATIENCE = 5.0
"""Seconds without a block after which the log says that the run waits for the worker."""


class Block(NamedTuple):
    """What the worker sends."""

    number: int  # of the stream
    offer: Offer | CurriqError  # the windows, or why there are none and will be none
    messages: list[tuple[int, str]]  # level and text of what was logged meanwhile
    skipped: dict[str, int]  # the stream's
    template: str | dict[str, str] | None  # the tokenizer's chat template, which conversations may have set


def prefetched(
    streams: Mapping[int, WindowStream],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    *,
    block: int,
    ahead: int,
) -> dict[int, "Prefetched"]:
    """The streams of this process's shards, each read ahead by a worker process of its own, as far as there
    are cores beside the one that feeds the GPU; otherwise several share a worker.

    Args:
        streams: by the number of their shard.
        tokenizer: the streams'.
        block: windows read at a time.
        ahead: blocks of each stream that may wait.
    """
    numbers, count = list(streams), reading_processes(len(streams))
    found: dict[int, Prefetched] = {}
    for worker in range(count):
        dealt = {number: streams[number] for number in numbers[worker::count]}
        process = Worker(dealt, tokenizer, block=block, ahead=ahead)
        found |= {number: Prefetched(stream, process, number) for number, stream in dealt.items()}
    return {number: found[number] for number in numbers}


def reading_processes(shards: int) -> int:
    """Processes that read so many shards ahead: one each, as far as there are cores beside the one that feeds
    the GPU."""
    return min(shards, max(1, parallel.cores() - 1))


class Worker:
    """A process that reads some streams ahead. It starts with the first read.

    It reads on in the stream of which fewest blocks wait, so that they are used up at different rates and
    none waits long, or takes much memory. It ends with the last of them that is in use.

    Attributes:
        readers: of the streams, by number.
    """

    def __init__(
        self,
        streams: Mapping[int, WindowStream],
        tokenizer: "transformers.PreTrainedTokenizerBase",
        *,
        block: int,
        ahead: int,
    ) -> None:
        self.readers = weakref.WeakValueDictionary[int, Prefetched]()
        self._streams = streams
        self._tokenizer = tokenizer
        self._block = block
        self._ahead = ahead
        self._arrived: dict[int, deque[tuple[Block, torch.Tensor | None]]] = {}
        self._asked = _Turns([])
        self._blocks: Any = None
        self._ended: CurriqError | None = None
        self._watch = Watch(PATIENCE, logging.WARNING)

    def next(self, number: int) -> tuple[Block, torch.Tensor | None]:
        """The next block of a stream and, with every few blocks, its state before that, packed.

        Raises:
            CurriqError: the process has ended.
        """
        if self._ended is not None:
            raise self._ended
        if self._blocks is None:
            self._blocks = self._start()
        while not self._arrived[number]:
            packed, state = self._wait()
            block: Block = _unpacked(packed)
            for level, message in block.messages:
                _log.log(level, message)
            self._tokenizer.chat_template = block.template
            self._arrived[block.number].append((block, state))
        self._asked.counts[number] -= 1
        return self._arrived[number].popleft()

    def stop(self) -> None:
        """End the process; each stream stands where its windows have been handed out."""
        if self._blocks is not None:
            for reader in self.readers.values():
                reader.settle()
        self._blocks = self._ended = None

    def _wait(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The process's next message, a block and a state, packed. While it does not come, the log says so
        every few seconds."""
        assert self._blocks is not None
        try:
            with self._watch.waiting(self._waiting):
                return next(self._blocks)
        except (RuntimeError, EOFError, ConnectionError) as error:
            ended = "exited unexpectedly" in str(error) or not isinstance(error, RuntimeError)
            if not ended or "in DataLoader worker" in str(error):
                raise  # an error inside the worker
            cause = error  # the last two: it ended in the middle of handing a block over
        self._ended = CurriqError(
            f"the process that reads the data has ended ({cause}). If it was killed, the machine may have "
            "had too little memory."
        )
        raise self._ended from cause

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
        for number, reader in self.readers.items():
            self._streams[number].load_state_dict(reader.snapshot)
        self._arrived = {number: deque() for number in self._streams}
        self._asked = _Turns(self._streams)
        blocks = _Blocks(self._streams, self._tokenizer, self._block)
        loader = DataLoader(
            blocks,
            batch_size=None,
            sampler=self._asked,
            collate_fn=_as_it_is,
            num_workers=1,
            prefetch_factor=self._ahead * len(self._streams),
            multiprocessing_context="fork",  # nothing to import or to pickle; the worker never touches a GPU
            worker_init_fn=blocks.begin,
        )
        before = signal.getsignal(signal.SIGCHLD)
        with _kept_from_collection():
            started = iter(loader)
        if signal.getsignal(signal.SIGCHLD) != before:
            # PyTorch's handler would raise RuntimeError in the middle of a training step; the next read says
            # that the worker has ended.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return started


@contextlib.contextmanager
def _kept_from_collection() -> Generator[None]:
    """A process that is forked within does not collect garbage that this one has left: to free what belongs
    to a GPU ends a process that has never used it."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Prefetched:
    """The windows of a stream that a worker process reads ahead; the same windows and the same state.

    Args:
        stream: what is read. The worker has a copy; this one stands where the last state was taken.
        worker: reads it.
        number: by which the worker knows it.
    """

    def __init__(self, stream: WindowStream, worker: Worker, number: int) -> None:
        self.fingerprint = stream.fingerprint
        self.skipped = stream.skipped  # like the epoch of what has been read ahead
        self._stream = stream
        self._worker = worker
        self._number = number
        worker.readers[number] = self
        self._error: CurriqError | None = None
        self._rest: Offer | None = None
        self._snapshot: State | torch.Tensor = stream.state_dict()
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

    @property
    def snapshot(self) -> State:
        """The last state that the worker has sent, or that was loaded or asked for."""
        return _unpacked(self._snapshot) if isinstance(self._snapshot, torch.Tensor) else self._snapshot

    def state_dict(self) -> State:
        """That of a `WindowStream` which has handed out the same windows: either can go on from it.

        Raises:
            CurriqError: the last read failed. The windows that it lost would be missing from the state.
        """
        if self._error is not None:
            raise self._error
        self._stream.load_state_dict(self.snapshot)
        if self._since:
            _log.disabled = True  # the worker has logged this already
            try:
                self._stream.read(self._since)
            finally:
                _log.disabled = False
        self._snapshot, self._since = state, _ = self._stream.state_dict(), 0
        return state

    def load_state_dict(self, state: State) -> None:
        """Continue exactly where the state was taken; CurriqError when it is of a stream of other data."""
        self._worker.stop()
        self._stream.load_state_dict(state)
        self.skipped = self._stream.skipped
        self._snapshot, self._since = state, 0
        self._rest = self._error = None

    def settle(self) -> None:
        """Stand where the windows that were handed out end: what has been read ahead is read again."""
        if self._error is None:
            self.state_dict()
        self._rest = None

    def _next(self) -> Offer:
        if self._error is not None:
            raise self._error
        if self._rest is not None:
            return self._rest
        try:
            (_, offer, _, self.skipped, _), state = self._worker.next(self._number)
            if isinstance(offer, CurriqError):
                raise offer
        except CurriqError as error:
            self._error = error
            raise
        if state is not None:
            self._snapshot, self._since = state, 0  # all blocks before this one have been handed out
        return offer


class _Turns:
    """The stream to read on in, again and again: the one of which fewest blocks are under way or wait."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self.counts = Counter(dict.fromkeys(numbers, 0))

    def __iter__(self) -> Iterator[int]:
        while True:
            number = min(self.counts, key=self.counts.__getitem__)
            self.counts[number] += 1
            yield number


class _Blocks(Dataset):
    """The next block of each stream, by its number; every few with the state that they were read from. After
    an error there is nothing but the error."""

    def __init__(
        self,
        streams: Mapping[int, WindowStream],
        tokenizer: "transformers.PreTrainedTokenizerBase",
        size: int,
    ) -> None:
        self._streams = streams
        self._tokenizer = tokenizer
        self._size = size
        self._captured = BufferingHandler(sys.maxsize)
        self._done: Counter[int] = Counter()
        self._errors: dict[int, CurriqError] = {}

    def begin(self, worker: int) -> None:
        """In the worker, before the first block."""
        # A fork has none of its parent's threads: the tokenizer would wait for them forever.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # Ctrl-C is for the process that trains, which ends the worker.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _log.handlers[:] = [self._captured]  # the terminal belongs to the process that trains
        _log.propagate = False

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        stream, state = self._streams[index], None
        every = max(SNAPSHOT_BLOCKS, -(-stream.buffer_size // (4 * self._size)))
        found: Offer | CurriqError | None = self._errors.get(index)
        if found is None:
            if self._done[index] % every == 0:
                state = _packed(stream.state_dict())
            self._done[index] += 1
            try:
                found = stream.read(self._size)
            except CurriqError as error:
                found = self._errors[index] = error
        messages = [(record.levelno, record.getMessage()) for record in self._captured.buffer]
        self._captured.flush()
        block = Block(index, found, messages, stream.skipped, self._tokenizer.chat_template)
        return _packed(block), state


class _Pickler(pickle.Pickler):
    """Tensors as arrays: many times as fast as what torch writes."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _packed(value: Any) -> torch.Tensor:
    """In one tensor, which travels in shared memory: each of a batch's would take a message of its own, and a
    long message that is cut by the worker's death would be waited for."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _unpacked(value: torch.Tensor) -> Any:
    return pickle.loads(value.numpy())


def _as_it_is(value: Any) -> Any:
    return value
