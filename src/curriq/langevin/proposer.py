"""Algorithm 2 as a proposer: new windows go into a ring buffer, and those that a retriever takes out are the
candidates of the step. The loop that trains on them is that of Algorithm 1."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq import parallel
from curriq.data.stream import Unreadable
from curriq.errors import CurriqError, StreamEnded
from curriq.langevin.energy import Encode, Energy
from curriq.langevin.retrieval import Retriever, uniform_slots
from curriq.langevin.ring_buffer import RingBuffer
from curriq.langevin.search import RepeatedSearch
from curriq.rng import Generators
from curriq.state import Saved, State
from curriq.types import Cost, Metrics, Offer, Reading, Windows

logger = logging.getLogger("curriq")

FILL_BATCH = 256
"""Windows that are read and encoded at a time while the buffer is filled."""
FILL_REPORT_SECONDS = 10.0

PROPOSING = Reading("search", "time/propose_share", "{:.0%}")
"""Share of a step's seconds that goes to the buffer, the search and the retrieval."""
LEAST_REFRESH = 1 / 32
"""Share of `--refresh` that is re-embedded at the least, to notice when rows move again."""


class Encoded(NamedTuple):
    """Windows of the stream, their embeddings, and how many of them had to be encoded."""

    offer: Offer
    vectors: Float[np.ndarray, "n e"]
    encoded: int


@dataclass(kw_only=True)
class FreshWindows:
    """Reads the windows of each step from the stream and encodes them.

    With `ahead`, `begin_next` encodes the next windows in a thread while the model trains, and `next` waits
    for them. The numbers do not depend on it: the same windows are encoded together either way.

    Attributes:
        stream: the corpus's, or what a filter accepts of it.
        count: n_ingest.
        known: returns the embeddings of those windows that need no encoding, by their ids.
    """

    stream: Unreadable
    count: int
    encode: Encode
    known: Callable[[Int[Tensor, "n"]], dict[int, np.ndarray]]
    ahead: bool
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encode"), init=False)
    _future: Future[Encoded] | None = field(default=None, init=False)

    def fill(self, count: int) -> Iterator[Encoded]:
        """`count` windows in pieces, before the first step; logs its progress."""
        began = reported = time.perf_counter()
        finished = 0
        while finished < count:
            offer = self._read(min(FILL_BATCH, count - finished))
            finished += len(offer)
            yield self._plan(offer)()
            now = time.perf_counter()
            if now - reported > FILL_REPORT_SECONDS and finished < count:
                left = (now - began) / finished * (count - finished)
                logger.info(f"filling the buffer: {finished} of {count} windows encoded, {left:.0f} s left")
                reported = now

    def next(self) -> Encoded:
        """The n_ingest windows of this step."""
        offer, future = self._read(self.count), self._future
        self._future = None
        return self._plan(offer)() if future is None else future.result()

    def begin_next(self) -> None:
        """Start to encode the windows of the next step, when encoding ahead."""
        if self.ahead and self._future is None:
            offer = self.stream.read(self.count)
            self._future = self._pool.submit(self._plan(offer))
            self.stream.unread(offer)  # `next` reads it, or a resumed run, which encodes it again

    def _read(self, n: int) -> Offer:
        """At least one window of the stream, at most n; StreamEnded where there is none."""
        offer = self.stream.read(n)
        if not len(offer):
            raise StreamEnded
        return offer

    def _plan(self, offer: Offer) -> Callable[[], Encoded]:
        """The work of encoding. Which windows need it is settled now, so that the result does not depend on
        when the work is done; a window that comes twice is encoded once."""
        ids = offer.windows.ids.tolist()
        vectors = self.known(offer.windows.ids)
        first = {window: row for row, window in [*enumerate(ids)][::-1] if window not in vectors}
        new = sorted(first.values())

        def work() -> Encoded:
            if new:
                encoded = self.encode(offer.windows.tokens[new])
                vectors.update(zip((ids[row] for row in new), encoded, strict=True))
            return Encoded(offer, np.stack([vectors[window] for window in ids]), len(new))

        return work

    def state_dict(self) -> State:
        return self.stream.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.stream.load_state_dict(state)
        self._future = None


@dataclass(kw_only=True)
class BufferProposer(Saved):
    """Ingest, retrieve, mark as used (Algorithm 2, lines 4–18).

    Attributes:
        initial: windows in the buffer before the first search.
        refresh: rows embedded again in each step, at most; 0 where embeddings do not follow θ.
        refresh_below: mean cosine of the rows embedded again with what they were, above which half as many
            are in the next step, and below which twice as many.
        flops: operations of the language model that embed one window.
        phase: retrieves the windows of a step, given its number.
        searching: the retriever whose state a checkpoint keeps; None where it has none.
        mark_used: whether a window is retrieved once only.
        probe: measures Q of retrieved windows for the log; None measures none.
        generators: everything that the parts draw from.
        readings: what the retrieval shows of itself while the run goes on.
    """

    SAVED = ("buffer", "fresh", "generators", "searching", "_pace", "_next_row")

    buffer: RingBuffer
    fresh: FreshWindows
    initial: int
    refresh: int
    refresh_below: float
    flops: int
    phase: Callable[[int], Retriever]
    mark_used: bool
    probe: Callable[[RingBuffer, Windows], Metrics] | None
    generators: Generators
    searching: RepeatedSearch | None = None
    readings: tuple[Reading, ...] = ()
    _pace: float = field(default=1.0, init=False)
    _next_row: int = field(default=0, init=False)
    _left_out: int = field(default=0, init=False)

    def propose(self, step: int) -> Offer:
        """The retrieved windows of step k, R ≤ K.

        Raises:
            CurriqError: the buffer has no window left that has not been used.
        """
        began = time.perf_counter()
        ingested, encoded = self._ingest(step)
        metrics, refreshed = self._refreshed()
        metrics["time/ingest"] = time.perf_counter() - began
        if not self.buffer.live.any():
            raise CurriqError(
                f"step {step}: every window of the buffer has been used. Raise --ingest above the windows "
                "that a step retrieves (--chains; --num-candidates when that is 0), or raise --buffer-size."
            )
        # A search amplifies rounding until it ends at other windows, so rank 0's counts; the others search
        # too, because a search forwards the model, and keep their generators in step.
        found = self.phase(step).retrieve(self.buffer)
        slots = parallel.from_rank_zero(found.slots.cpu())
        windows = self.buffer.take(slots)
        metrics |= {
            "buffer/windows": float(len(self.buffer)),
            "buffer/live": float(self.buffer.live.sum()),
            "retrieval/windows": float(len(windows)),
            "retrieval/age": (step - self.buffer.written_at(slots)).double().mean().item(),
        }
        if self.probe is not None:
            metrics |= self.probe(self.buffer, windows)
        if self.mark_used:
            self.buffer.mark_used(windows.ids)
        self.fresh.begin_next()
        return Offer.of(
            windows,
            ingested=torch.cat([part.windows.source for offer in ingested for part in offer.judged]),
            queries=found.queries,
            cost=sum((offer.cost for offer in ingested), found.cost)
            + Cost(extra_flops=self.flops * (encoded + refreshed)),
            epoch=ingested[-1].epoch,
            metrics=ingested[-1].metrics | metrics | found.metrics,
        )

    def shorten_fill(self, most: int) -> float:
        """Fill the buffer with at most so many windows, to see what it costs; returns how many times as many
        it takes otherwise, at least 1."""
        whole, self.initial = self.initial, min(self.initial, most)
        self._left_out = whole - self.initial
        return whole / self.initial

    @property
    def left_out_bytes(self) -> int:
        """What the windows that `shorten_fill` left out would add to a checkpoint."""
        columns = self.buffer.state_dict()["table"].values()
        return self._left_out * sum(column.nbytes for column in columns) // max(1, len(self.buffer))

    def _ingest(self, step: int) -> tuple[list[Offer], int]:
        """Write fresh windows into the buffer; returns the readings that they came in, at least one, and how
        many windows were encoded."""
        ingested, encoded = [], 0
        for fresh in [self.fresh.next()] if len(self.buffer) else self.fresh.fill(self.initial):
            self.buffer.write(fresh.offer.windows, fresh.vectors, step)
            ingested.append(fresh.offer)
            encoded += fresh.encoded
        return ingested, encoded

    def _refreshed(self) -> tuple[Metrics, int]:
        """Embed the next live rows of the buffer again, round and round; returns how far they had moved, and
        how many they were."""
        live = self.buffer.live.nonzero().flatten()
        in_turn = live[((live - self._next_row) % len(self.buffer)).argsort()]
        slots = in_turn[: math.ceil(self.refresh * self._pace)]
        if not len(slots):
            return {}, 0
        self._next_row = (int(slots[-1]) + 1) % len(self.buffer)
        before, after = self.buffer.vectors(slots), self.fresh.encode(self.buffer.take(slots).tokens)
        self.buffer.reembed(slots, after)
        cosine = torch.nn.functional.cosine_similarity(before, torch.from_numpy(after)).mean().item()
        if self.refresh_below < 1:
            pace = self._pace / 2 if cosine > self.refresh_below else self._pace * 2
            self._pace = min(max(pace, LEAST_REFRESH), 1.0)
        return {"buffer/refresh_cosine": cosine, "buffer/refreshed": float(len(slots))}, len(slots)


def retrieval_probe(
    energy: Energy, count: int, generator: torch.Generator, buffer: RingBuffer, retrieved: Windows
) -> Metrics:
    """Mean Q of the retrieved windows, not yet used, and of `count` random live ones beside them.

    Costs forward passes and decides nothing. The CPU generator draws the random ones.
    """
    others = buffer.take(uniform_slots(buffer, count, generator))
    q_retrieved, q_buffer = (energy.hard(windows.tokens).mean().item() for windows in (retrieved, others))
    return {
        "retrieval/q": q_retrieved,
        "retrieval/buffer_q": q_buffer,
        "retrieval/q_advantage": q_retrieved - q_buffer,
    }
