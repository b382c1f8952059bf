"""Retrievers of a step's windows from the ring buffer: by a searched query, by Q itself, or by chance."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import RetrievalConfig
from curriq.langevin.diagnostics import BASELINE_STRINGS, SearchAlarm, search_metrics
from curriq.langevin.encoder import WindowEncoder
from curriq.langevin.energy import Energy
from curriq.langevin.retrieval import draw_windows
from curriq.langevin.ring_buffer import RingBuffer
from curriq.langevin.samplers import QuerySampler, Vocabulary, random_strings
from curriq.types import NO_COST, Cost, Metrics, Queries


class Retrieved(NamedTuple):
    """Choice of a retriever.

    Attributes:
        slots: R live slots of the buffer with different windows.
        metrics: measurements on the way.
        queries: the queries and what each drew; None without queries.
        cost: of the search.
    """

    slots: Int[Tensor, "R"]
    metrics: Metrics
    queries: Queries | None = None
    cost: Cost = NO_COST


@runtime_checkable
class Retriever(Protocol):
    """Chooses the windows of a step; R ≤ K of them, at least one."""

    def find(self, buffer: RingBuffer) -> Retrieved: ...


@dataclass(frozen=True)
class UniformRetriever:
    """The control without Q: K = `count` windows of the buffer by chance, from a CPU generator."""

    count: int
    generator: torch.Generator

    def find(self, buffer: RingBuffer) -> Retrieved:
        return Retrieved(uniform_slots(buffer, self.count, self.generator), {})


@dataclass(frozen=True)
class DirectRetriever:
    """The control without queries: the K windows of greatest Q in a pool of the buffer's windows.

    Q reads the model's hidden state, which no index holds, so each window of the pool is forwarded.

    Attributes:
        count: K.
        pool: windows of the pool, drawn uniformly; 0 takes all.
        energy: Q of windows.
        generator: CPU generator of the pool.
    """

    count: int
    pool: int
    energy: Energy
    generator: torch.Generator

    def find(self, buffer: RingBuffer) -> Retrieved:
        began = time.perf_counter()
        slots = uniform_slots(buffer, self.pool or len(buffer), self.generator)
        q = self.energy.hard(buffer.take(slots).tokens).cpu()
        best = q.topk(min(self.count, len(slots))).indices
        return Retrieved(slots[best], {"time/search": time.perf_counter() - began})


@dataclass(frozen=True, kw_only=True)
class QueryRetriever:
    """Algorithm 2: search queries of high Q, embed their text, draw from the windows nearest to them.

    Attributes:
        sampler: searches the queries.
        energy: Q; None where Q does not exist, and then no Q is reported.
        initial_sequences: returns the initial tokens of the chains.
        vocabulary: tokens of random strings.
        decode: token ids → text.
        encoder: embeds the queries as it embedded the buffer's windows.
        retrieval: top k, temperature, draw and duplicates.
        generator: CPU generator of the draws (Eq. 16).
        baseline_generator: CPU generator of the random strings that the queries are compared with.
        alarm: warns when the search is ineffective.
    """

    sampler: QuerySampler
    energy: Energy | None
    initial_sequences: Callable[[RingBuffer], Int[Tensor, "K L"]]
    vocabulary: Vocabulary
    decode: Callable[[Int[Tensor, "K L"]], list[str]]
    encoder: WindowEncoder
    retrieval: RetrievalConfig
    generator: torch.Generator
    baseline_generator: torch.Generator
    alarm: SearchAlarm | None = None

    def find(self, buffer: RingBuffer) -> Retrieved:
        c, began = self.retrieval, time.perf_counter()
        start = self.initial_sequences(buffer)
        sample = self.sampler.sample(start)
        searched = time.perf_counter()
        texts = self.decode(sample.tokens.cpu())
        vectors = self.encoder.encode(sample.tokens, texts)
        if c.centre_queries:
            vectors = vectors - buffer.centre()
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        scores, slots = buffer.search(vectors, c.retrieval_top_k)
        ids = torch.where(slots < 0, -1, buffer.window_ids(slots))
        drawn = draw_windows(
            scores, ids, c.retrieval_temperature, self.generator, c.retrieval_draw, c.retrieval_duplicates
        )
        chosen, chosen_scores = (x[drawn.query, drawn.rank] for x in (slots, scores))
        metrics = {
            "time/search": searched - began,
            "time/retrieve": time.perf_counter() - searched,
            "retrieval/score": chosen_scores.mean().item(),
            "retrieval/rank": drawn.rank.double().mean().item(),
            "retrieval/collisions": drawn.collisions / len(start),
        }
        row = torch.full((len(start),), -1)
        row[drawn.query] = torch.arange(len(chosen))
        q, start_q = self._q(sample.tokens), self._q(start)
        queries = Queries(
            text=tuple(texts),
            q=q,
            soft_q=torch.full_like(q, torch.nan) if sample.soft_q is None else sample.soft_q.float().cpu(),
            start_q=start_q,
            changed=(sample.tokens != start).float().mean(1).cpu(),
            row=row,
            score=torch.where(row < 0, torch.nan, chosen_scores[row]),
            window_text=tuple(buffer.text(int(chosen[r])) if r >= 0 else "" for r in row),
            shortlist=ids,
            shortlist_scores=scores,
        )
        if self.energy is not None:
            length, generator = start.shape[1], self.baseline_generator
            random_q = self._q(random_strings(BASELINE_STRINGS, length, self.vocabulary, generator))
            metrics |= sample.metrics | search_metrics(start, sample.tokens, start_q, q, random_q, vectors)
            if self.alarm is not None:
                self.alarm.look(metrics)
        return Retrieved(chosen, metrics, queries, sample.cost)

    def _q(self, strings: Int[Tensor, "m L"]) -> Float[Tensor, "m"]:
        """Q of the strings on the CPU, NaN without Q."""
        if self.energy is None:
            return torch.full((len(strings),), torch.nan)
        return self.energy.hard(strings).float().cpu()


def uniform_slots(buffer: RingBuffer, count: int, generator: torch.Generator) -> Int[Tensor, "n"]:
    """At most `count` live slots by chance, no window twice."""
    live = buffer.live.nonzero().flatten()
    shuffled = live[torch.randperm(len(live), generator=generator)]
    slot_of: dict[int, int] = {}
    for slot, window in zip(shuffled.tolist(), buffer.window_ids(shuffled).tolist(), strict=True):
        slot_of.setdefault(window, slot)
    return torch.tensor(list(slot_of.values())[:count], dtype=torch.long)
