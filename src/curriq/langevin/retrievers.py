"""Ways to find the windows of a step in the ring buffer: by a searched query, by Q itself, or by chance."""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import RetrievalConfig
from curriq.langevin.diagnostics import BASELINE_STRINGS, SearchAlarm, search_metrics
from curriq.langevin.encoder import WindowEncoder
from curriq.langevin.energy import Energy
from curriq.langevin.retrieval import Drawn, draw_windows
from curriq.langevin.ring_buffer import RingBuffer
from curriq.langevin.samplers import QuerySampler, Sample, Vocabulary, random_strings
from curriq.types import Metrics, Queries


class Retrieved(NamedTuple):
    """What a finder chose.

    Attributes:
        slots: R live slots of the buffer with different windows.
        metrics: how it came to them.
        queries: what they were retrieved with; None without queries.
    """

    slots: Int[Tensor, "R"]
    metrics: Metrics
    queries: Queries | None = None


@runtime_checkable
class Retriever(Protocol):
    """Chooses the windows of a step; R ≤ K of them, at least one."""

    def find(self, buffer: RingBuffer) -> Retrieved: ...


class UniformRetriever:
    """The control without Q: K windows of the buffer by chance.

    Args:
        count: K.
        generator: CPU generator of the draw.
    """

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self._count = count
        self._generator = generator

    def find(self, buffer: RingBuffer) -> Retrieved:
        return Retrieved(uniform_slots(buffer, self._count, self._generator), {})


class DirectRetriever:
    """The control without queries: Q of a pool of the buffer's windows is measured, and the K best are taken.

    Q reads the model's hidden state, which no index holds, so each window of the pool is forwarded.

    Args:
        count: K.
        pool: windows of the pool, drawn uniformly; 0 takes all.
        energy: Q of windows.
        device: where windows are forwarded.
        generator: CPU generator of the pool.
    """

    def __init__(
        self,
        count: int,
        pool: int,
        energy: Energy,
        device: torch.device | str,
        generator: torch.Generator,
    ) -> None:
        self._count = count
        self._pool = pool
        self._energy = energy
        self._device = device
        self._generator = generator

    def find(self, buffer: RingBuffer) -> Retrieved:
        began = time.perf_counter()
        slots = uniform_slots(buffer, self._pool or len(buffer), self._generator)
        q = self._energy.hard(buffer.take(slots).tokens.to(self._device)).cpu()
        best = q.topk(min(self._count, len(slots))).indices
        return Retrieved(slots[best], {"time/search": time.perf_counter() - began})


class QueryRetriever:
    """Algorithm 2: search queries of high Q, embed their text, draw from the windows nearest to them.

    Args:
        sampler: searches the queries.
        energy: Q; None where Q does not exist, and then no Q is reported.
        initial_sequences: first tokens of the chains.
        vocabulary: what random strings are made of.
        decode: token ids → text.
        encoder: embeds the queries as it embedded the buffer's windows.
        retrieval: top k, temperature, draw and duplicates.
        generator: CPU generator of the draws (Eq. 16).
        baseline_generator: CPU generator of the random strings that the queries are compared with.
    """

    def __init__(
        self,
        *,
        sampler: QuerySampler,
        energy: Energy | None,
        initial_sequences: Callable[[RingBuffer], Int[Tensor, "K L"]],
        vocabulary: Vocabulary,
        decode: Callable[[Int[Tensor, "K L"]], list[str]],
        encoder: WindowEncoder,
        retrieval: RetrievalConfig,
        generator: torch.Generator,
        baseline_generator: torch.Generator,
        alarm: SearchAlarm | None = None,
    ) -> None:
        self._sampler = sampler
        self._energy = energy
        self._initial_sequences = initial_sequences
        self._vocabulary = vocabulary
        self._decode = decode
        self._encoder = encoder
        self._retrieval = retrieval
        self._generator = generator
        self._baseline_generator = baseline_generator
        self._alarm = alarm

    def find(self, buffer: RingBuffer) -> Retrieved:
        began = time.perf_counter()
        start = self._initial_sequences(buffer)
        sample = self._sampler.sample(start)
        searched = time.perf_counter()
        texts = self._decode(sample.tokens.cpu())
        vectors = self._encoder.encode(sample.tokens, texts)
        if self._retrieval.centre_queries:
            vectors = _unit(vectors - buffer.centre())
        scores, slots = buffer.search(vectors, self._retrieval.retrieval_top_k)
        drawn = draw_windows(
            scores,
            buffer.window_ids(slots),
            self._retrieval.retrieval_temperature,
            self._generator,
            draw=self._retrieval.retrieval_draw,
            duplicates=self._retrieval.retrieval_duplicates,
        )
        chosen = slots[drawn.query, drawn.rank]
        shortlist = torch.where(slots < 0, -1, buffer.window_ids(slots))
        metrics = {
            "time/search": searched - began,
            "time/retrieve": time.perf_counter() - searched,
            "retrieval/score": scores[drawn.query, drawn.rank].mean().item(),
            "retrieval/rank": drawn.rank.double().mean().item(),
            "retrieval/collisions": drawn.collisions / len(start),
        }
        start_q, hard_q = (self._q(strings) for strings in (start, sample.tokens))
        if self._energy is not None:
            metrics |= sample.metrics | search_metrics(
                start, sample.tokens, start_q, hard_q, self._q(self._baseline(start.shape[1])), vectors
            )
            if self._alarm is not None:
                self._alarm.look(metrics)
        return Retrieved(
            chosen,
            metrics,
            _queries(texts, start, sample, start_q, hard_q, shortlist, scores, drawn, chosen, buffer),
        )

    def _q(self, strings: Int[Tensor, "m L"]) -> Float[Tensor, "m"]:
        if self._energy is None:
            return torch.full((len(strings),), torch.nan)
        return self._energy.hard(strings).float().cpu()

    def _baseline(self, length: int) -> Int[Tensor, "m L"]:
        return random_strings(BASELINE_STRINGS, length, self._vocabulary, self._baseline_generator)


def _queries(
    texts: list[str],
    start: Int[Tensor, "K L"],
    sample: Sample,
    start_q: Float[Tensor, "K"],
    hard_q: Float[Tensor, "K"],
    shortlist: Int[Tensor, "K k"],
    scores: Float[Tensor, "K k"],
    drawn: Drawn,
    chosen: Int[Tensor, "R"],
    buffer: RingBuffer,
) -> Queries:
    """Every query beside the windows nearest to it and the one of them that it drew."""
    row = torch.full((len(texts),), -1)
    row[drawn.query] = torch.arange(len(drawn.query))
    score = torch.full((len(texts),), torch.nan)
    score[drawn.query] = scores[drawn.query, drawn.rank]
    soft_q = torch.full((len(texts),), torch.nan) if sample.soft_q is None else sample.soft_q.float().cpu()
    found = [buffer.text(slot) for slot in chosen.tolist()]
    return Queries(
        text=tuple(texts),
        q=hard_q,
        soft_q=soft_q,
        start_q=start_q,
        changed=(sample.tokens != start).float().mean(1).cpu(),
        row=row,
        score=score,
        window_text=tuple(found[r] if r >= 0 else "" for r in row.tolist()),
        shortlist=shortlist,
        shortlist_scores=scores,
    )


def _unit(vectors: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n e"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def uniform_slots(buffer: RingBuffer, count: int, generator: torch.Generator) -> Int[Tensor, "n"]:
    """At most `count` live slots by chance, no window twice."""
    live = buffer.live.nonzero().flatten()
    shuffled = live[torch.randperm(len(live), generator=generator)]
    seen: set[int] = set()
    slots = []
    for slot, window in zip(shuffled.tolist(), buffer.window_ids(shuffled).tolist(), strict=True):
        if len(slots) == count:
            break
        if window not in seen:
            seen.add(window)
            slots.append(slot)
    return torch.tensor(slots, dtype=torch.long)
