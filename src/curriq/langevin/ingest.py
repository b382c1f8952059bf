"""Fresh windows for the ring buffer, with their text and embeddings; encoding may run ahead in a thread."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from curriq.data.stream import Unreadable
from curriq.langevin.encoder import WindowEncoder
from curriq.state import State
from curriq.types import Offer

logger = logging.getLogger("curriq")

FILL_BATCH = 256
"""Windows that are read and encoded at a time while the buffer is filled."""
FILL_REPORT_SECONDS = 10.0


class Encoded(NamedTuple):
    """Fresh windows, their text and their embeddings."""

    offer: Offer
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
        stream: Unreadable,
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
        self._pending: Offer | None = None
        self._future: Future[Encoded] | None = None

    def fill(self, count: int) -> Iterator[Encoded]:
        """`count` windows in pieces, before the first step; says how far it is."""
        began = told = time.perf_counter()
        for done in range(0, count, FILL_BATCH):
            yield self._plan(self._stream.read(min(FILL_BATCH, count - done)))()
            now, finished = time.perf_counter(), min(done + FILL_BATCH, count)
            if now - told > FILL_REPORT_SECONDS and finished < count:
                left = (now - began) / finished * (count - finished)
                logger.info(f"filling the buffer: {finished} of {count} windows encoded, {left:.0f} s left")
                told = now

    def next(self) -> Encoded:
        """The n_ingest windows of this step."""
        if self._future is None:
            return self._plan(self._stream.read(self._count))()
        encoded = self._future.result()
        self._future = self._pending = None
        return encoded

    def begin_next(self) -> None:
        """Take the windows of the next step and start to encode them, when encoding ahead."""
        if self._pool is not None and self._pending is None:
            self._start(self._stream.read(self._count))

    def _start(self, offer: Offer) -> None:
        assert self._pool is not None
        self._pending = offer
        self._future = self._pool.submit(self._plan(offer))

    def _plan(self, offer: Offer) -> Callable[[], Encoded]:
        """The work of encoding. Which windows need it is settled now, so that the result does not depend on
        when the work is done; a window that comes twice is encoded once."""
        tokens, ids = offer.windows.tokens, offer.windows.ids.tolist()
        texts = self._decode(tokens)
        vectors = {window: vector for window in ids if (vector := self._known(window)) is not None}
        first = {window: row for row, window in reversed(list(enumerate(ids))) if window not in vectors}
        rows = sorted(first.values())

        def work() -> Encoded:
            if rows:
                encoded = self._encoder.encode(tokens[rows], [texts[row] for row in rows])
                vectors.update(zip((ids[row] for row in rows), encoded, strict=True))
            return Encoded(offer, texts, np.stack([vectors[window] for window in ids]))

        return work

    def state_dict(self) -> State:
        """That of the stream before the pending windows: a resumed run reads and encodes them again."""
        if self._pending is None:
            return self._stream.state_dict()
        self._stream.unread(self._pending)
        state = self._stream.state_dict()
        self._stream.read(len(self._pending))
        return state

    def load_state_dict(self, state: State) -> None:
        self._stream.load_state_dict(state)
        self._future = self._pending = None
