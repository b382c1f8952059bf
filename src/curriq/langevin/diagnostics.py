"""Metrics of a search (Section 3.6), whichever sampler made it, and warnings when it is ineffective."""

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.types import Metrics

logger = logging.getLogger("curriq")

BASELINE_STRINGS = 64
"""Random strings whose Q the hard queries must beat."""


def search_metrics(
    start: Int[Tensor, "K L"],
    tokens: Int[Tensor, "K L"],
    start_q: Float[Tensor, "K"],
    hard_q: Float[Tensor, "K"],
    random_q: Float[Tensor, "m"],
    vectors: Float[np.ndarray, "K e"],
) -> Metrics:
    """Metrics of a search that are judged on its hard tokens.

    Args:
        start, tokens: the chains' initial tokens, and the queries.
        start_q, hard_q: Q of both.
        random_q: Q of fresh random strings of the same length.
        vectors: unit embeddings of the queries.
    """
    above = (hard_q.mean() - random_q.mean()).item()
    return {
        "langevin/hard_q": hard_q.mean().item(),
        "langevin/hard_q_gain": (hard_q.mean() - start_q.mean()).item(),
        "langevin/random_q": random_q.mean().item(),
        "langevin/above_random": above,
        "langevin/above_random_sd": above / max(random_q.std().item(), 1e-12),
        "langevin/tokens_changed": (tokens != start).float().mean().item(),
        "langevin/distinct_tokens": distinct_share(tokens),
        "langevin/cosine": mean_pairwise(torch.from_numpy(vectors @ vectors.T)),
        "langevin/jaccard": mean_pairwise(jaccard(tokens)),
    }


def distinct_share(tokens: Int[Tensor, "K L"]) -> float:
    """Mean over the strings of their distinct tokens over L."""
    return float(np.mean([len(set(row)) / len(row) for row in tokens.tolist()]))


def jaccard(tokens: Int[Tensor, "K L"]) -> Float[Tensor, "K K"]:
    """Jaccard similarity of the strings' sets of tokens."""
    sets = [set(row) for row in tokens.tolist()]
    return torch.tensor([[len(a & b) / len(a | b) for b in sets] for a in sets])


def mean_pairwise(similarity: Float[Tensor, "K K"]) -> float:
    """Mean over the pairs of different rows; 1 where there is one row only."""
    count = len(similarity)
    if count == 1:
        return 1.0
    return ((similarity.sum() - similarity.trace()) / (count * (count - 1))).item()


@dataclass
class SearchAlarm:
    """Warns once of each way in which a search can be ineffective, and names the settings that matter.

    Attributes:
        least_changed: share of tokens changed below which the queries are the initial strings.
        patience: steps over which hard Q must beat random strings on average.
    """

    least_changed: float = 0.05
    patience: int = 20
    _above: list[float] = field(default_factory=list)
    _reported: set[str] = field(default_factory=set)

    def look(self, metrics: Metrics) -> None:
        """Take in the metrics of one search; one in which Q was flat, as it is at first, does not count."""
        if metrics.get("langevin/grad_norm") == 0:
            return
        changed = metrics["langevin/tokens_changed"]
        if changed < self.least_changed:
            self._warn_once(
                "changed",
                f"the search changed {changed:.1%} of the query tokens: the queries are the strings that it "
                "began with. Lower --langevin-margin, raise --langevin-step-size or --langevin-steps, or "
                "scale the gradient with --langevin-gradient chain.",
            )
        self._above = [*self._above, metrics["langevin/above_random"]][-self.patience :]
        mean = sum(self._above) / len(self._above)
        if len(self._above) == self.patience and mean <= 0:
            self._warn_once(
                "random",
                f"over {self.patience} steps the Q of the hard queries is {-mean:.2g} nats per token below "
                "that of random strings: the search finds nothing. Lower --langevin-noise-scale, raise "
                "--langevin-steps, or lower --bridge-temperature-end, so that the optimum of the soft tokens "
                "is one of hard tokens too.",
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._reported:
            self._reported.add(key)
            logger.warning(message)
