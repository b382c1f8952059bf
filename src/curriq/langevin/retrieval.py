"""Eq. 16: from the scores of each query's nearest windows to the windows that are retrieved."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Drawn(NamedTuple):
    """R of the K queries and the window that each has drawn.

    Attributes:
        query: index of the query.
        rank: which of its nearest windows, 0 is the nearest.
        collisions: queries whose window another had drawn before (they drew again, or were dropped).
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
        duplicates: whether a query whose window is taken draws from the rest of its top k (by Eq. 16
            restricted to them) or is dropped. It is dropped as well when all of them are taken.
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
