"""Algorithm 2 as a proposer: fresh windows go into a ring buffer, and what a finder takes out are the
candidates of the step. The loop that trains on them is that of Algorithm 1."""

import time
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from curriq import parallel
from curriq.errors import CurriqError
from curriq.langevin.encoder import WindowEncoder
from curriq.langevin.energy import Energy
from curriq.langevin.ingest import FreshWindows
from curriq.langevin.retrievers import Retriever, uniform_slots
from curriq.langevin.ring_buffer import RingBuffer
from curriq.rng import Generators
from curriq.state import Saved
from curriq.types import NO_COST, Cost, Metrics, Offer, Windows


class BufferProposer(Saved):
    """Ingest, find, retire (Algorithm 2, lines 3–9).

    Args:
        buffer: the ring buffer.
        fresh: reads and encodes the windows that go into it.
        refresher: keeps the rows of the buffer young; None where they do not age.
        initial: windows in the buffer before the first search.
        finder: takes the candidates out of it.
        flops: operations of the language model per step's search.
        probe: measures Q of retrieved and of random windows for the log; None measures neither.
        generators: everything that the parts draw from.
    """

    SAVED = ("buffer", "_fresh", "_generators")

    def __init__(
        self,
        *,
        buffer: RingBuffer,
        fresh: FreshWindows,
        refresher: "Refresher | None",
        initial: int,
        finder: Retriever,
        flops: int,
        probe: "RetrievalProbe | None",
        generators: Generators,
    ) -> None:
        self.buffer = buffer
        self._fresh = fresh
        self._refresher = refresher
        self._initial = initial
        self._finder = finder
        self._flops = flops
        self._probe = probe
        self._generators = generators

    def propose(self, step: int) -> Offer:
        """The retrieved windows of step k, R ≤ K.

        Raises:
            CurriqError: the buffer has no window left that has not been used; or the processes of a
                distributed run retrieve different windows.
        """
        began = time.perf_counter()
        cost, epoch = self._ingest(step)
        metrics: Metrics = {}
        if self._refresher is not None:
            metrics |= self._refresher.refresh(self.buffer, step)
        ingested = time.perf_counter()
        if not self.buffer.live.any():
            raise CurriqError(
                f"step {step}: every window of the buffer has been used. Raise --ingest above the windows "
                "that a step retrieves (--chains; --num-candidates when that is 0), or raise --buffer-size."
            )
        found = self._finder.find(self.buffer)
        windows = self.buffer.take(found.slots)
        metrics |= {
            "buffer/windows": float(len(self.buffer)),
            "buffer/live": float(self.buffer.live.sum()),
            "retrieval/windows": float(len(windows)),
            "retrieval/age": (step - self.buffer.written_at(found.slots)).double().mean().item(),
        }
        if self._probe is not None:
            metrics |= self._probe.measure(self.buffer, windows)
        self.buffer.mark_used(windows.ids)
        self._fresh.begin_next()
        _require_agreement(windows.ids, step)
        times = {"time/ingest": ingested - began, "time/propose": time.perf_counter() - began}
        return Offer.of(
            windows,
            queries=found.queries,
            cost=cost + Cost(extra_flops=self._flops) + found.cost,
            epoch=epoch,
            metrics=metrics | found.metrics | times,
        )

    def _ingest(self, step: int) -> tuple[Cost, int | None]:
        """Fresh windows into the buffer: what that cost, and their epoch."""
        pieces = self._fresh.fill(self._initial) if len(self.buffer) == 0 else [self._fresh.next()]
        cost, epoch = NO_COST, None
        for offer, texts, vectors in pieces:
            self.buffer.write(offer.windows, texts, vectors, step)
            cost, epoch = cost + offer.cost, offer.epoch
        return cost, epoch


class Refresher:
    """Embeds some rows of the buffer anew each step, in turn, where the embedding follows θ.

    Which rows follows from the step alone, so there is no state. A row is at most ⌈I/count⌉ steps old.

    Args:
        count: slots per step.
        encoder: embeds windows at the present θ.
        decode: token ids → text.
    """

    def __init__(
        self, count: int, encoder: WindowEncoder, decode: Callable[[Int[Tensor, "n T"]], list[str]]
    ) -> None:
        self._count = count
        self._encoder = encoder
        self._decode = decode

    def refresh(self, buffer: RingBuffer, step: int) -> Metrics:
        """Embed the rows whose turn it is; says how far they had moved."""
        count = min(self._count, len(buffer))
        slots = (step * count + torch.arange(count)) % len(buffer)
        slots = slots[buffer.live[slots]]
        if not len(slots):
            return {}
        tokens = buffer.take(slots).tokens
        before = buffer.vectors(slots)
        after = self._encoder.encode(tokens, self._decode(tokens))
        buffer.reembed(slots, after)
        cosine = torch.nn.functional.cosine_similarity(before, torch.from_numpy(after))
        return {"buffer/refresh_cosine": cosine.mean().item()}


class RetrievalProbe:
    """Is what was retrieved better, by Q, than what lay beside it? Costs forward passes and decides nothing.

    Args:
        count: random windows per step.
        energy: Q of windows.
        device: where windows are forwarded.
        generator: CPU generator that draws them.
    """

    def __init__(
        self, count: int, energy: Energy, device: torch.device | str, generator: torch.Generator
    ) -> None:
        self._count = count
        self._energy = energy
        self._device = device
        self._generator = generator

    def measure(self, buffer: RingBuffer, retrieved: Windows) -> Metrics:
        """Mean Q of the retrieved windows and of random live ones, before the former are retired."""
        others = buffer.take(uniform_slots(buffer, self._count, self._generator))
        q_retrieved, q_buffer = (
            self._energy.hard(windows.tokens.to(self._device)).mean().item()
            for windows in (retrieved, others)
        )
        return {
            "retrieval/q": q_retrieved,
            "retrieval/buffer_q": q_buffer,
            "retrieval/q_advantage": q_retrieved - q_buffer,
        }


def _require_agreement(window_ids: Int[Tensor, "R"], step: int) -> None:
    """Every process searches for itself, from equal numbers, and must find the same windows.

    Raises:
        CurriqError: they have not.
    """
    weights = torch.arange(1, len(window_ids) + 1)
    checksum = float((window_ids % 1_000_003 * weights).sum())
    if parallel.reduce_max(checksum) != -parallel.reduce_max(-checksum):
        raise CurriqError(
            f"step {step}: the processes retrieved different windows, because their devices round "
            "differently. Train Langevin-RAG in one process, or on equal devices."
        )
