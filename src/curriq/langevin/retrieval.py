"""Retrieval of windows from the ring buffer: by searched queries (Eq. 16), by Q itself, or by chance."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import RetrievalConfig
from curriq.langevin.energy import Encode, Energy
from curriq.langevin.ring_buffer import RingBuffer
from curriq.langevin.samplers import (
    BASELINE_STRINGS,
    QuerySampler,
    Sample,
    SearchAlarm,
    Vocabulary,
    random_strings,
    search_metrics,
)
from curriq.types import NO_COST, Cost, Metrics, Queries, Reading

SEARCHED = (
    Reading("changed", "langevin/tokens_changed", "{:.0%}"),
    Reading("query Q (sd)", "langevin/above_random_sd", "{:+.1f}"),
)
"""Of a search: tokens of the queries that it changed, and their Q above that of random strings."""


class Retrieved(NamedTuple):
    """Choice of a retriever: R live slots of the buffer with different windows, and what each query drew."""

    slots: Int[Tensor, "R"]
    metrics: Metrics
    queries: Queries | None = None
    cost: Cost = NO_COST


@runtime_checkable
class Retriever(Protocol):
    """Chooses the windows of a step; R ≤ K of them, at least one."""

    def retrieve(self, buffer: RingBuffer) -> Retrieved: ...


@dataclass(frozen=True)
class UniformRetriever:
    """The control without Q: K = `count` windows of the buffer by chance, from a CPU generator."""

    count: int
    generator: torch.Generator

    def retrieve(self, buffer: RingBuffer) -> Retrieved:
        return Retrieved(uniform_slots(buffer, self.count, self.generator), {})


@dataclass(frozen=True)
class DirectRetriever:
    """The control without queries: the K = `count` windows of greatest Q in a pool of the buffer's windows.

    Q reads the model's hidden state, which no index holds, so each window of the pool is forwarded. The pool
    is drawn uniformly by a CPU generator; `pool` = 0 takes the whole buffer.
    """

    count: int
    pool: int
    energy: Energy
    generator: torch.Generator

    def retrieve(self, buffer: RingBuffer) -> Retrieved:
        began = time.perf_counter()
        slots = uniform_slots(buffer, self.pool or len(buffer), self.generator)
        q = self.energy.hard(buffer.take(slots).tokens).cpu()
        best = q.topk(min(self.count, len(slots))).indices
        return Retrieved(slots[best], {"time/search": time.perf_counter() - began})


@dataclass(frozen=True, kw_only=True)
class QueryRetriever:
    """Algorithm 2: search queries of high Q, embed them, draw from the windows nearest to them.

    Attributes:
        energy: Q; None where Q does not exist, and then no Q is reported.
        initial_sequences: returns the initial tokens of the chains.
        vocabulary: tokens of random strings.
        encode: embeds the queries as it embedded the buffer's windows.
        generator: CPU generator of the draws (Eq. 16).
        baseline_generator: CPU generator of the random strings that the queries are compared with.
        alarm: warns when the search is ineffective.
    """

    sampler: QuerySampler
    energy: Energy | None
    initial_sequences: Callable[[RingBuffer], Int[Tensor, "K L"]]
    vocabulary: Vocabulary
    decode: Callable[[Int[Tensor, "n T"]], list[str]]
    encode: Encode
    config: RetrievalConfig
    generator: torch.Generator
    baseline_generator: torch.Generator
    alarm: SearchAlarm | None = None

    @property
    def readings(self) -> tuple[Reading, ...]:
        return () if self.energy is None or self.alarm is None else SEARCHED

    def retrieve(self, buffer: RingBuffer) -> Retrieved:
        c, began = self.config, time.perf_counter()
        start = self.initial_sequences(buffer)
        sample = self.sampler.sample(start)
        searched = time.perf_counter()
        vectors = self.encode(sample.tokens)
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
        texts = self.decode(buffer.take(chosen).tokens)
        q, start_q = self._q(sample.tokens), self._q(start)
        queries = Queries(
            text=tuple(self.decode(sample.tokens)),
            q=q,
            soft_q=torch.full_like(q, torch.nan) if sample.soft_q is None else sample.soft_q.float().cpu(),
            start_q=start_q,
            changed=(sample.tokens != start).float().mean(1).cpu(),
            row=row,
            score=torch.where(row < 0, torch.nan, chosen_scores[row]),
            window_text=tuple(texts[r] if r >= 0 else "" for r in row.tolist()),
            shortlist=ids,
            shortlist_scores=scores,
        )
        metrics |= self._judged(start, sample, queries, vectors)
        return Retrieved(chosen, metrics, queries, sample.cost)

    def _judged(
        self, start: Int[Tensor, "K L"], sample: Sample, queries: Queries, vectors: Float[np.ndarray, "K e"]
    ) -> Metrics:
        """Metrics of the search; none without Q."""
        if self.energy is None:
            return {}
        others = random_strings(BASELINE_STRINGS, start.shape[1], self.vocabulary, self.baseline_generator)
        metrics = sample.metrics | search_metrics(
            start, sample.tokens, queries.start_q, queries.q, self._q(others), vectors
        )
        if self.alarm is not None:
            self.alarm.look(metrics)
        return metrics

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


class Drawn(NamedTuple):
    """R of the K queries, and the rank among its nearest windows, from 0, of the one that each has drawn.

    `collisions` counts queries whose window another had drawn before; they drew again, or were dropped.
    """

    query: Int[Tensor, "R"]
    rank: Int[Tensor, "R"]
    collisions: int


def retrieval_probs(scores: Float[Tensor, "*batch k"], temperature: float) -> Float[Tensor, "*batch k"]:
    """Retrieval probabilities p_j ∝ exp(score_j/τ_rag) over the top k of each query (Eq. 16)."""
    return torch.softmax(scores.double() / temperature, dim=-1)


def draw_windows(
    scores: Float[Tensor, "K k"],
    window_ids: Int[Tensor, "K k"],
    temperature: float,
    generator: torch.Generator,
    draw: Literal["softmax", "top-1"] = "softmax",
    duplicates: Literal["redraw", "drop"] = "redraw",
) -> Drawn:
    """At most one window per query, and no window twice.

    Args:
        scores: inner products, best first; −∞ where there is no window.
        window_ids: their windows; two slots with one id hold the same window.
        temperature: τ_rag.
        generator: CPU generator of the draws; every query takes two numbers from it.
        draw: by Eq. 16, or the nearest.
        duplicates: whether a query whose window is taken draws from the rest of its top k, by Eq. 16
            restricted to them, or is dropped as it is when all of them are taken.
    """
    # The second is for drawing again: the first, given that it led to a taken window, is not uniform.
    first, second = torch.rand(2, len(scores), generator=generator, dtype=torch.float64)
    taken: set[int] = set()
    drawn, collisions = [], 0
    for query, (row, ids) in enumerate(zip(scores, window_ids.tolist(), strict=True)):
        rank = _pick(row, temperature, first[query], draw)
        if rank is not None and ids[rank] in taken:
            collisions += 1
            rest = row.masked_fill(torch.tensor([window in taken for window in ids]), -torch.inf)
            rank = _pick(rest, temperature, second[query], draw) if duplicates == "redraw" else None
        if rank is not None:
            taken.add(ids[rank])
            drawn.append((query, rank))
    queries, ranks = torch.tensor(drawn, dtype=torch.long).view(-1, 2).T
    return Drawn(queries, ranks, collisions)


def _pick(scores: Float[Tensor, "k"], temperature: float, uniform: Tensor, draw: str) -> int | None:
    """Index of one score, None where all are −∞; by inversion of the cumulative distribution."""
    if scores.max() == -torch.inf:
        return None
    if draw == "top-1":
        return int(scores.argmax())
    cumulative = retrieval_probs(scores, temperature).cumsum(0)
    return int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
