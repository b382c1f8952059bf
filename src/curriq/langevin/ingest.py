"""Fresh windows for the ring buffer, with their text and embeddings; encoding may run ahead in a thread."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.langevin.encoder import WindowEncoder
from curriq.types import Candidates, State, Stateful

logger = logging.getLogger("curriq")

FILL_BATCH = 256
"""Windows that are read and encoded at a time while the buffer is filled."""
FILL_REPORT_SECONDS = 10.0


@runtime_checkable
class WindowSource(Stateful, Protocol):
    """Where fresh windows come from; `data.stream.WindowStream` is one."""

    def next_batch(self, n: int) -> Candidates: ...


class Encoded(NamedTuple):
    """Windows, their text and their embeddings."""

    windows: Candidates
    texts: list[str]
    vectors: Float[np.ndarray, "n e"]


class FreshWindows:
    """Reads windows from the stream and encodes them.

    With `ahead`, `begin_next` takes the next windows from the stream and encodes them in a thread while
    the model trains; `next` collects them. The numbers do not depend on it: the same windows are encoded
    together either way, and a resumed run encodes again what was pending.

    Args:
        stream: endless training windows.
        count: n_ingest.
        decode: token ids → text.
        encoder: embeds them.
        known: embedding of a window that needs no encoding, or None.
        ahead: encode in a thread.
    """

    def __init__(
        self,
        stream: WindowSource,
        count: int,
        decode: Callable[[Int[Tensor, "n T"]], list[str]],
        encoder: WindowEncoder,
        known: Callable[[int], Float[np.ndarray, "e"] | None],
        ahead: bool,
    ) -> None:
        self._stream = stream
        self._count = count
        self._decode = decode
        self._encoder = encoder
        self._known = known
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="encode") if ahead else None
        self._pending: Candidates | None = None
        self._future: Future[Encoded] | None = None

    def fill(self, count: int) -> Iterator[Encoded]:
        """`count` windows in pieces, before the first step; says how far it is."""
        began = told = time.perf_counter()
        for done in range(0, count, FILL_BATCH):
            yield self._plan(self._stream.next_batch(min(FILL_BATCH, count - done)))()
            now, finished = time.perf_counter(), min(done + FILL_BATCH, count)
            if now - told > FILL_REPORT_SECONDS and finished < count:
                left = (now - began) / finished * (count - finished)
                logger.info(f"filling the buffer: {finished} of {count} windows encoded, {left:.0f} s left")
                told = now

    def next(self) -> Encoded:
        """The n_ingest windows of this step."""
        if self._future is None:
            return self._plan(self._stream.next_batch(self._count))()
        encoded = self._future.result()
        self._future = self._pending = None
        return encoded

    def begin_next(self) -> None:
        """Take the windows of the next step and start to encode them, when encoding ahead."""
        if self._pool is not None and self._pending is None:
            self._start(self._stream.next_batch(self._count))

    def _start(self, windows: Candidates) -> None:
        assert self._pool is not None
        self._pending = windows
        self._future = self._pool.submit(self._plan(windows))

    def _plan(self, windows: Candidates) -> Callable[[], Encoded]:
        """The work of encoding. Which windows need it is settled now, so that the result does not depend on
        when the work is done; a window that comes twice is encoded once."""
        texts = self._decode(windows.tokens)
        ids = windows.window_ids.tolist()
        vectors = {window: vector for window in ids if (vector := self._known(window)) is not None}
        first = {window: row for row, window in reversed(list(enumerate(ids))) if window not in vectors}
        rows = sorted(first.values())

        def work() -> Encoded:
            if rows:
                encoded = self._encoder.encode(windows.tokens[rows], [texts[row] for row in rows])
                vectors.update(zip((ids[row] for row in rows), encoded, strict=True))
            return Encoded(windows, texts, np.stack([vectors[window] for window in ids]))

        return work

    def state_dict(self) -> State:
        """The stream stands behind the pending windows, so they are part of the state."""
        pending = None
        if (waiting := self._pending) is not None:
            pending = {
                "tokens": waiting.tokens.int(),
                "window_ids": waiting.window_ids,
                "source": waiting.source,
                "difficulty": waiting.difficulty,
                "metrics": dict(waiting.metrics),
            }
        return {"stream": self._stream.state_dict(), "pending": pending}

    def load_state_dict(self, state: State) -> None:
        """Needs the buffer's state first, which says what is known."""
        self._stream.load_state_dict(state["stream"])
        if (pending := state["pending"]) is None:
            return
        windows = Candidates(
            tokens=pending["tokens"].long(),
            window_ids=pending["window_ids"],
            source=pending["source"],
            difficulty=pending["difficulty"],
            rows=torch.arange(len(pending["tokens"])),
            metrics=pending["metrics"],
        )
        if self._pool is not None:
            self._start(windows)
        else:  # the run goes on without encoding ahead
            self._pending = windows
            encoded = self._plan(windows)()
            self._future = Future()
            self._future.set_result(encoded)
