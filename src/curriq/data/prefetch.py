"""Reads a stream of text in a process of its own, ahead of training.

To tokenise, check and pack text takes a microsecond or two per token, much of it in Python, and a steered
stream reads several windows for each that it trains on. A GPU would wait for that; a thread would not help,
because it shares Python's lock with the one that feeds the GPU. A CPU that trains has no core to spare: there
the stream is read where it is needed. The windows are the same.
"""

import collections
import contextlib
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from curriq.config import RunConfig
from curriq.data.contamination import ContaminationFilter
from curriq.data.stream import WindowStream
from curriq.errors import CurriqError
from curriq.types import Candidates, Metrics, State, concatenate

if TYPE_CHECKING:
    import transformers

_log = logging.getLogger("curriq")

LEAST_BLOCKS = 4
_OTHER_SIDE = "import sys; from curriq.data.prefetch import serve; serve(int(sys.argv[1]))"


class ReadAhead:
    """The windows of a stream that another process reads.

    Args:
        config: the run; blocks of N windows are read, and for as many steps ahead as a step may need.
        tokenizer, guard, fingerprint: what the other process opens the stream with.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: "transformers.PreTrainedTokenizerBase",
        guard: ContaminationFilter,
        fingerprint: Mapping[str, str],
    ) -> None:
        self._fingerprint = dict(fingerprint)
        self._block = config.train.num_candidates
        self._blocks = max(LEAST_BLOCKS, config.train.max_read_ratio)
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _OTHER_SIDE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,  # Ctrl-C is for the process that trains
            )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(self._connection, self._answers), daemon=True).start()
        self.close = weakref.finalize(self, _stop, self._connection, self._process)
        """Ends the other process; called by itself when the stream is no longer used."""
        self._asked = 0
        self._read: collections.deque[Candidates | Exception] = collections.deque()
        self._send(config, tokenizer, guard, self._fingerprint)

    def next_batch(self, n: int) -> Candidates:
        """The next n windows; `data/epoch` is that of what has been read ahead.

        Raises:
            CurriqError: a source cannot be read on, or the other process has ended.
        """
        parts: list[Candidates] = []
        missing = n
        while missing > 0:
            self._ask()
            if not self._read:
                self._take_one()
            block = _no_error(self._read[0])
            self._read.popleft()
            parts.append(block.take(slice(missing)))
            if len(block) > missing:
                self._read.appendleft(block.take(slice(missing, None)))
            missing -= len(parts[-1])
        batch = concatenate(parts)
        return replace(batch, metrics=batch.metrics | {"data/windows_read": float(n)})

    def fingerprint(self) -> dict[str, str]:
        """What must be equal when a run is resumed, by name."""
        return dict(self._fingerprint)

    def state_dict(self) -> State:
        """That of a `WindowStream` which has handed out what this one has: either can go on from it.

        Raises:
            CurriqError: what has been read ahead ends in an error. The source is past it by now, and a run
                that went on from there would not meet it.
        """
        self._collect()
        if unread := [_no_error(block) for block in self._read]:
            self._request("put_back", concatenate(unread))
            self._read.clear()
        state = self._request("state_dict")
        self._ask()
        return state

    def load_state_dict(self, state: State) -> None:
        """Continue exactly where the state was taken.

        Raises:
            CurriqError: the state is of a stream of other data.
        """
        self._collect()
        self._read.clear()
        self._request("load_state_dict", state)

    def _request(self, *message: Any) -> Any:
        """What the other process answers; nothing else may be under way."""
        self._send(*message)
        return _no_error(self._answer())

    def _ask(self) -> None:
        """Keep enough blocks under way; after an error no more are needed."""
        while self._asked < self._blocks and not (self._read and isinstance(self._read[-1], Exception)):
            self._send("next_batch", self._block)
            self._asked += 1

    def _take_one(self) -> None:
        """Wait for the next block. An error among those to come is one when its windows are needed."""
        self._asked -= 1
        answer = self._answer()
        self._read.append(answer if isinstance(answer, Exception) else _unpacked(*answer))

    def _collect(self) -> None:
        """Wait for all that is under way."""
        while self._asked:
            self._take_one()

    def _send(self, *message: Any) -> None:
        # A broken pipe is told by the answer that does not come.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            _send(self._connection, message)

    def _answer(self) -> Any:
        """What the other process answers, or the error that it met."""
        message = self._answers.get()
        if not message:
            self._answers.put(message)
            return CurriqError(
                f"the process that reads the data has ended with exit code {self._process.wait()}. If it was "
                "killed, the machine may have had too little memory."
            )
        answer, said = pickle.loads(message)
        for level, text in said:
            _log.log(level, text)
        return answer


def _no_error(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


def _packed(windows: Candidates) -> tuple[dict[str, np.ndarray], Metrics]:
    """What a `WindowStream` hands out, as arrays: tensors take much longer to pickle."""
    columns = {name: getattr(windows, name) for name in ("tokens", "window_ids", "source", "difficulty")}
    arrays = {name: column.numpy() for name, column in columns.items() if column is not None}
    return arrays | {"tokens": arrays["tokens"].astype(np.int32)}, windows.metrics


def _unpacked(arrays: dict[str, np.ndarray], metrics: Metrics) -> Candidates:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Candidates(
        tokens=tensors["tokens"].long(),
        window_ids=tensors["window_ids"],
        source=tensors["source"],
        difficulty=tensors.get("difficulty"),
        rows=torch.arange(len(tensors["tokens"])),
        metrics=metrics,
    )


def _receive(connection: Connection, answers: queue.SimpleQueue[bytes]) -> None:
    """Take answers as they come, for a pipe holds little and the other process would wait. They are unpacked
    where they are needed, because this thread must not keep the one that feeds the GPU from Python's lock."""
    while True:
        try:
            answers.put(connection.recv_bytes())
        except (EOFError, OSError):
            answers.put(b"")
            return


def _send(connection: Connection, message: Any) -> None:
    # Connection.send would have torch pass tensors in shared memory, which only its own children can open.
    connection.send_bytes(pickle.dumps(message))


def _stop(connection: Connection, process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    connection.close()


class _Heard(logging.Handler):
    """Keeps what was logged, to be said by the process that has a screen."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))


def serve(descriptor: int) -> None:
    """The other side: open the stream, then answer one message after another."""
    heard = _Heard()
    _log.addHandler(heard)
    _log.propagate = False
    stream: WindowStream | None = None
    with Connection(descriptor) as connection, contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            message = pickle.loads(connection.recv_bytes())
            try:
                if stream is None:
                    stream = _open(*message)
                    continue
                answer = getattr(stream, message[0])(*message[1:])
                answer = _packed(answer) if isinstance(answer, Candidates) else answer
            except Exception as error:
                answer = error if _travels(error) else RuntimeError(f"{type(error).__name__}: {error}")
            _send(connection, (answer, heard.said))
            heard.said = []


def _open(
    config: RunConfig,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    guard: ContaminationFilter,
    fingerprint: dict,
) -> WindowStream:
    from curriq.data.corpus import open_stream

    return open_stream(config, tokenizer, guard, fingerprint)


def _travels(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True
