"""A step's queries: vectors that the buffer is searched by, from strings or in the retriever's own space."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.langevin.energy import Encode, Energy
from curriq.langevin.ring_buffer import RingBuffer
from curriq.langevin.samplers import (
    BASELINE_STRINGS,
    QuerySampler,
    SearchAlarm,
    Vocabulary,
    random_strings,
    search_metrics,
)
from curriq.state import Saved, State
from curriq.types import NO_COST, Cost, Metrics, Reading

SEARCHED = (
    Reading("changed", "langevin/tokens_changed", "{:.0%}"),
    Reading("query Q (sd)", "langevin/above_random_sd", "{:+.1f}"),
)
"""Of a search: tokens of the queries that it changed, and their Q above that of random strings."""


class Found(NamedTuple):
    """The queries of one search.

    Attributes:
        vectors: unit vectors in the space of the buffer's rows.
        text: the queries decoded; empty where a query is a vector and no string.
        q: Q_φ of each query, nats per token; NaN without Q.
        soft_q: Q_φ of the relaxed strings that they were taken from; NaN where nothing is relaxed.
        start_q: Q_φ of what the search began with.
        changed: share of the tokens that the search changed; NaN where a query has none.
        tokens: of the queries; None where they have none.
        embed_seconds: that embedding them took.
    """

    vectors: Float[np.ndarray, "K e"]
    text: tuple[str, ...]
    q: Float[Tensor, "K"]
    soft_q: Float[Tensor, "K"]
    start_q: Float[Tensor, "K"]
    changed: Float[Tensor, "K"]
    tokens: Int[Tensor, "K L"] | None
    metrics: Metrics
    cost: Cost = NO_COST
    embed_seconds: float = 0.0


@runtime_checkable
class Search(Protocol):
    """Makes the queries of a step."""

    def search(self, buffer: RingBuffer) -> Found: ...


@dataclass(frozen=True, kw_only=True)
class StringSearch:
    """Strings of high Q, embedded as the buffer's windows are (Algorithm 2, lines 5–16).

    Attributes:
        energy: Q; None where Q does not exist, and then no Q is reported.
        initial_sequences: returns the initial tokens of the chains.
        vocabulary: tokens of random strings.
        encode: embeds the queries as it embedded the buffer's windows.
        baseline_generator: CPU generator of the random strings that the queries are compared with.
        flops: operations of the language model in one search, without the diagnostics'.
        alarm: warns when the search is ineffective.
    """

    sampler: QuerySampler
    energy: Energy | None
    initial_sequences: Callable[[RingBuffer], Int[Tensor, "K L"]]
    vocabulary: Vocabulary
    decode: Callable[[Int[Tensor, "n T"]], list[str]]
    encode: Encode
    baseline_generator: torch.Generator
    flops: int
    alarm: SearchAlarm | None = None

    @property
    def readings(self) -> tuple[Reading, ...]:
        return () if self.energy is None or self.alarm is None else SEARCHED

    def search(self, buffer: RingBuffer) -> Found:
        began = time.perf_counter()
        start = self.initial_sequences(buffer)
        sample = self.sampler.sample(start)
        searched = time.perf_counter()
        vectors = self.encode(sample.tokens)
        embedded = time.perf_counter()
        q, start_q = self._q(sample.tokens), self._q(start)
        metrics: Metrics = {"time/search": searched - began}
        if self.energy is not None:
            strings = random_strings(
                BASELINE_STRINGS, start.shape[1], self.vocabulary, self.baseline_generator
            )
            metrics |= sample.metrics | search_metrics(start, sample.tokens, start_q, q, self._q(strings))
            if self.alarm is not None:
                self.alarm.look(metrics)
        return Found(
            vectors=vectors,
            text=tuple(self.decode(sample.tokens)),
            q=q,
            soft_q=torch.full_like(q, torch.nan) if sample.soft_q is None else sample.soft_q.float().cpu(),
            start_q=start_q,
            changed=(sample.tokens != start).float().mean(1).cpu(),
            tokens=sample.tokens,
            metrics=metrics,
            cost=sample.cost + Cost(extra_flops=self.flops),
            embed_seconds=embedded - searched,
        )

    def _q(self, strings: Int[Tensor, "m L"]) -> Float[Tensor, "m"]:
        """Q of the strings on the CPU, NaN without Q."""
        if self.energy is None:
            return torch.full((len(strings),), torch.nan)
        return self.energy.hard(strings).float().cpu()


@dataclass(eq=False, kw_only=True)
class RepeatedSearch(Saved):
    """Searches in every n-th step, and uses the same queries until the next search.

    Strings are embedded anew in each step, because what they are compared with is of the present θ.

    Attributes:
        every: n.
        encode: embeds strings as the buffer's windows.
        flops: operations of the language model that embed the strings.
    """

    SAVED = ("_age",)

    inner: Search
    every: int
    encode: Encode
    flops: int
    _age: int = field(default=0, init=False)
    _found: Found | None = field(default=None, init=False)

    @property
    def readings(self) -> tuple[Reading, ...]:
        return getattr(self.inner, "readings", ())

    def search(self, buffer: RingBuffer) -> Found:
        if self._found is None or self._age % self.every == 0:
            self._age, self._found = 0, self.inner.search(buffer)
            found = self._found
        else:
            began = time.perf_counter()
            found = self._found._replace(metrics={}, cost=NO_COST)
            if found.tokens is not None:
                found = found._replace(vectors=self.encode(found.tokens), cost=Cost(extra_flops=self.flops))
            found = found._replace(embed_seconds=time.perf_counter() - began)
        self._age += 1
        return found

    def state_dict(self) -> State:
        found = self._found
        kept = None
        if found is not None:
            kept = found._asdict() | {"vectors": torch.from_numpy(found.vectors), "text": list(found.text)}
            kept = {name: kept[name] for name in kept if name not in ("metrics", "cost", "embed_seconds")}
        return super().state_dict() | {"found": kept}

    def load_state_dict(self, state: State) -> None:
        kept = state["found"]
        super().load_state_dict({"age": state["age"]})
        self._found = None
        if kept is not None:
            arrays = {"vectors": kept["vectors"].numpy(), "text": tuple(kept["text"])}
            self._found = Found(**(kept | arrays), metrics={})
