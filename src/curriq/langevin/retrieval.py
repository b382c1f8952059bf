"""Retrieval of windows from the ring buffer: by searched queries (Eq. 16), by Q itself, or by chance."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import RetrievalConfig
from curriq.langevin.energy import Energy
from curriq.langevin.ring_buffer import RingBuffer
from curriq.langevin.samplers import mean_pairwise
from curriq.langevin.search import Search
from curriq.types import NO_COST, Cost, Metrics, Queries, Reading, readings_of


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
    is drawn uniformly by a CPU generator; `pool` = 0 takes the whole buffer. `flops` are the language model's
    operations per window.
    """

    count: int
    pool: int
    energy: Energy
    generator: torch.Generator
    flops: int

    def retrieve(self, buffer: RingBuffer) -> Retrieved:
        began = time.perf_counter()
        slots = uniform_slots(buffer, self.pool or len(buffer), self.generator)
        q = self.energy.hard(buffer.take(slots).tokens).cpu()
        best = q.topk(min(self.count, len(slots))).indices
        metrics = {"time/search": time.perf_counter() - began}
        return Retrieved(slots[best], metrics, cost=Cost(extra_flops=self.flops * len(slots)))


class Drawn(NamedTuple):
    """R of the K queries, and the rank among its nearest windows, from 0, of the one that each has drawn.

    `collisions` counts queries whose window another had drawn before; they drew again, or were dropped.
    """

    query: Int[Tensor, "R"]
    rank: Int[Tensor, "R"]
    collisions: int


@dataclass(frozen=True, kw_only=True)
class QueryRetriever:
    """Algorithm 2, lines 16 and 17: the windows nearest to the queries of a search, one draw for each.

    Attributes:
        generator: CPU generator of the draws (Eq. 16).
    """

    search: Search
    decode: Callable[[Int[Tensor, "n T"]], list[str]]
    config: RetrievalConfig
    generator: torch.Generator

    @property
    def readings(self) -> tuple[Reading, ...]:
        return readings_of(self.search)

    def retrieve(self, buffer: RingBuffer) -> Retrieved:
        c, found = self.config, self.search.search(buffer)
        began, vectors = time.perf_counter(), found.vectors
        if c.centre_queries:
            vectors = vectors - buffer.centre()
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        scores, slots = buffer.search(vectors, c.retrieval_top_k)
        ids = torch.where(slots < 0, -1, buffer.window_ids(slots))
        drawn = self._drawn(buffer, vectors, scores, slots, ids)
        chosen, chosen_scores = (x[drawn.query, drawn.rank] for x in (slots, scores))
        metrics = {
            "time/retrieve": time.perf_counter() - began + found.embed_seconds,
            "retrieval/score": chosen_scores.mean().item(),
            "retrieval/rank": drawn.rank.double().mean().item(),
            "retrieval/collisions": drawn.collisions / len(vectors),
            "langevin/cosine": mean_pairwise(torch.from_numpy(vectors @ vectors.T)),
        }
        row = torch.full((len(vectors),), -1)
        row[drawn.query] = torch.arange(len(chosen))
        texts = self.decode(buffer.take(chosen).tokens)
        queries = Queries(
            text=found.text,
            q=found.q,
            soft_q=found.soft_q,
            start_q=found.start_q,
            changed=found.changed,
            row=row,
            score=torch.where(row < 0, torch.nan, chosen_scores[row]),
            window_text=tuple(texts[r] if r >= 0 else "" for r in row.tolist()),
            shortlist=ids,
            shortlist_scores=scores,
        )
        return Retrieved(chosen, metrics | found.metrics, queries, found.cost)

    def _drawn(
        self,
        buffer: RingBuffer,
        queries: Float[np.ndarray, "K e"],
        scores: Float[Tensor, "K k"],
        slots: Int[Tensor, "K k"],
        ids: Int[Tensor, "K k"],
    ) -> Drawn:
        c = self.config
        if c.retrieval_draw != "set":
            return draw_windows(
                scores, ids, c.retrieval_temperature, self.generator, c.retrieval_draw, c.retrieval_duplicates
            )
        centre = buffer.centre() if c.centre_queries else 0.0
        rows = torch.from_numpy(buffer.vectors(slots.clamp(min=0)).numpy() - centre)
        return draw_set(torch.from_numpy(queries), rows, scores, ids, c.retrieval_temperature)


def uniform_slots(buffer: RingBuffer, count: int, generator: torch.Generator) -> Int[Tensor, "n"]:
    """At most `count` live slots by chance, no window twice."""
    live = buffer.live.nonzero().flatten()
    shuffled = live[torch.randperm(len(live), generator=generator)]
    slot_of: dict[int, int] = {}
    for slot, window in zip(shuffled.tolist(), buffer.window_ids(shuffled).tolist(), strict=True):
        slot_of.setdefault(window, slot)
    return torch.tensor(list(slot_of.values())[:count], dtype=torch.long)


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


def draw_set(
    queries: Float[Tensor, "K e"],
    rows: Float[Tensor, "K k e"],
    scores: Float[Tensor, "K k"],
    window_ids: Int[Tensor, "K k"],
    noise: float,
) -> Drawn:
    """One window per query such that they tell most together, and no window twice.

    A window is taken for a noisy observation, of variance `noise`, of a Gaussian process whose covariance is
    the inner product of unit vectors. Each query in turn draws the window of its shortlist that most lowers
    the posterior variance at the queries, summed over all of them, given the windows drawn before. What these
    give already is subtracted: a second copy of the nearest window is worth little (Hübotter et al. 2024,
    "SIFT"). The greater `noise` is, the less is subtracted.

    Args:
        rows: embeddings of the shortlists, of any length.
        scores: inner products of query and window, best first; −∞ where there is no window.
        window_ids: their windows; two slots with one id hold the same window.
    """
    first = {window: place for place, window in [*enumerate(window_ids.flatten().tolist())][::-1]}
    places = torch.tensor(list(first.values()))
    position = {window: at for at, window in enumerate(first)}
    column = torch.tensor([[position[window] for window in ids] for ids in window_ids.tolist()])
    candidates = F.normalize(rows.flatten(0, 1)[places].double(), dim=1)
    among = candidates @ candidates.T
    across = queries.double() @ candidates.T
    free = torch.ones(len(places), dtype=torch.bool)
    drawn = []
    for query in range(len(queries)):
        told = across.square().sum(0) / (among.diagonal() + noise)
        worth = told[column[query]].masked_fill((scores[query] == -torch.inf) | ~free[column[query]], -1.0)
        rank = int(worth.argmax())
        if worth[rank] < 0:
            continue
        best = column[query, rank]
        free[best] = False
        drawn.append((query, rank))
        gain = among[best] / (among[best, best] + noise)
        across = across - across[:, best, None] * gain
        among = among - among[:, best, None] * gain
    taken, ranks = torch.tensor(drawn, dtype=torch.long).view(-1, 2).T
    return Drawn(taken, ranks, 0)
