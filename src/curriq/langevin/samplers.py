"""Searches for query tokens of high Q, and what is measured of every search (Section 3.6).

All take the same initial strings and return strings of the same shape; what they have in common (shares of
tokens changed, hard Q against random strings) is measured once for all of them, by `search_metrics`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import LangevinConfig
from curriq.langevin.dynamics import (
    StepRule,
    anneal,
    extract,
    langevin_step_,
    one_hot_logits,
    soft_embed,
    soft_one_hot,
    soft_statistics,
)
from curriq.langevin.energy import Energy, EnergyPoint
from curriq.types import NO_COST, Cost, Metrics

logger = logging.getLogger("curriq")

BASELINE_STRINGS = 64
"""Random strings whose Q the hard queries must beat."""


class Sample(NamedTuple):
    """Result of one search.

    Attributes:
        tokens: hard tokens (Eq. 15), one string per chain.
        metrics: measurements of this sampler alone.
        soft_q: Q of the relaxed strings that the tokens were taken from; None where nothing is relaxed.
        cost: of the search; a built-in sampler's is counted where it is built.
    """

    tokens: Int[Tensor, "K L"]
    metrics: Metrics
    soft_q: Float[Tensor, "K"] | None = None
    cost: Cost = NO_COST


@runtime_checkable
class QuerySampler(Protocol):
    """Searches strings of high Q."""

    def sample(self, start: Int[Tensor, "K L"]) -> Sample:
        """One string per chain; `start` holds ordinary tokens and stays as it is."""
        ...


class Vocabulary:
    """The tokens that a query may hold: the tokenizer's, without special tokens and padding rows; their ids
    are given in ascending order."""

    def __init__(self, ordinary: Int[Tensor, "V"], device: torch.device | str) -> None:
        self.ids = ordinary.to(device)
        first, last = int(ordinary[0]), int(ordinary[-1]) + 1
        self._slice = slice(first, last) if last - first == len(ordinary) else None

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, weight: Tensor) -> Tensor:
        """Their rows of a matrix over the model's whole vocabulary; a view where the ids are consecutive."""
        return weight[self.ids if self._slice is None else self._slice]

    def position(self, tokens: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """Index among the ordinary tokens; the inverse of `ids[…]`."""
        return torch.searchsorted(self.ids, tokens.contiguous())  # it warns of a view


@dataclass(frozen=True)
class SoftmaxLangevin:
    """Softmax-relaxed stochastic gradient Langevin dynamics (Eqs. 11–15).

    `noise` returns the generator of one search's noise, on the model's device; `baseline` is the CPU
    generator of the random logits that soft Q is compared with.
    """

    config: LangevinConfig
    energy: Energy
    vocabulary: Vocabulary
    noise: Callable[[], torch.Generator]
    baseline: torch.Generator

    def sample(self, start: Int[Tensor, "K L"]) -> Sample:
        c, weight, inputs = self.config, self._weight(), self.energy.inputs
        end = c.bridge_temperature_end
        rule = StepRule(c.langevin_step_size, c.langevin_limit, c.langevin_gradient, c.langevin_noise_scale)
        position, entries = self.vocabulary.position(start), len(self.vocabulary)
        logits = one_hot_logits(position, entries, c.langevin_margin, inputs.weight.dtype)
        generator = self.noise()
        # Soft Q before and after is compared at one temperature: at two, the temperature alone moves it.
        q_before = self.energy.soft(soft_embed(logits, end, weight).embeddings[..., : inputs.width])
        norms, initial_q = [], torch.zeros(())
        for t in range(c.langevin_steps):
            temperature = anneal(c.bridge_temperature_start, end, t, c.langevin_steps)
            soft = soft_embed(logits, temperature, weight)
            point = self.energy.point(soft.embeddings[..., : inputs.width])
            initial_q = point.q.mean() if t == 0 else initial_q
            gradient = self._drift(point)
            norms.append(langevin_step_(logits, temperature, weight, soft, gradient, rule, generator))
        soft = soft_embed(logits, end, weight)
        q_after = self.energy.soft(soft.embeddings[..., : inputs.width])
        entropy, max_prob = soft_statistics(logits, end, soft.log_normaliser)
        norm = torch.stack(norms)
        metrics = {
            "langevin/soft_q_gain": q_after.mean().item() - q_before.mean().item(),
            "langevin/annealed_q_gain": (q_after.mean() - initial_q).item(),
            "langevin/random_soft_q": self._random_q(start.shape[1], weight),
            "langevin/soft_cosine": _mean_cosine(soft.embeddings[..., : inputs.width].flatten(1)),
            "langevin/entropy": entropy,
            "langevin/max_prob": max_prob,
            "langevin/grad_norm": norm.mean().item(),
            "langevin/clip_fraction": (norm > rule.limit).double().mean().item(),
        }
        return Sample(self.vocabulary.ids[extract(logits)], metrics, q_after)

    def _random_q(self, length: int, weight: Tensor) -> float:
        """Mean Q at τ_end of fresh random logits."""
        c, width = self.config, self.energy.inputs.width
        strings = random_strings(BASELINE_STRINGS, length, self.vocabulary, self.baseline)
        position = self.vocabulary.position(strings)
        soft = soft_one_hot(position, c.langevin_margin, c.bridge_temperature_end, weight[:, :width])
        return self.energy.soft(soft).mean().item()

    def _weight(self) -> Tensor:
        """W_e, with the head's matrix beside it where a fluency prior needs one of its own."""
        inputs = self.energy.inputs
        weight = self.vocabulary.rows(inputs.weight)
        if self.config.fluency > 0 and not inputs.is_tied:
            head = self.energy.lm.network.get_output_embeddings().weight.detach()
            weight = torch.cat([weight, self.vocabulary.rows(head)], dim=1)
        return weight.bfloat16() if self.config.bridge_precision == "bf16" else weight

    def _drift(self, point: EnergyPoint) -> Tensor:
        """∂E/∂ẽ, with the fluency prior's part.

        The prior is w Σ_i Σ_v p_{i,v} log p_θ(v | ẽ_<i) with the prediction held fixed. The logarithm is
        h_{i−1}·U_v but for a constant, which the bridge centres away, so w h_{i−1} is to U what g is to
        W_e: they add up where the two matrices are one, and stand side by side where they are not.
        """
        gradient = point.gradient / self.config.energy_temperature
        if self.config.fluency == 0:
            return gradient
        previous = torch.nn.functional.pad(point.hidden[:, :-1], (0, 0, 1, 0))
        prior = previous.to(gradient.dtype) * self.config.fluency
        if self.energy.inputs.is_tied:
            return gradient + prior / self.energy.inputs.scale
        return torch.cat([gradient, prior], dim=-1)


@dataclass(frozen=True)
class BestOfRandom:
    """The control of equal effort: of `count` random strings per chain, the initial one included, that of
    greatest Q. A CPU generator draws the strings."""

    count: int
    energy: Energy
    vocabulary: Vocabulary
    generator: torch.Generator

    def sample(self, start: Int[Tensor, "K L"]) -> Sample:
        chains, length = start.shape
        others = random_strings(chains * (self.count - 1), length, self.vocabulary, self.generator)
        strings = torch.cat([start[:, None], others.view(chains, -1, length)], dim=1)
        best = self.energy.hard(strings.view(-1, length)).view(chains, -1).argmax(1)
        return Sample(strings[torch.arange(chains), best], {})


class IdentitySampler:
    """The control without a search: the initial strings are the queries."""

    def sample(self, start: Int[Tensor, "K L"]) -> Sample:
        return Sample(start, {})


def random_strings(
    count: int, length: int, vocabulary: Vocabulary, generator: torch.Generator
) -> Int[Tensor, "count length"]:
    """Uniform strings of ordinary tokens, drawn on the CPU."""
    index = torch.randint(len(vocabulary), (count, length), generator=generator)
    return vocabulary.ids[index.to(vocabulary.ids.device)]


def search_metrics(
    start: Int[Tensor, "K L"],
    tokens: Int[Tensor, "K L"],
    start_q: Float[Tensor, "K"],
    hard_q: Float[Tensor, "K"],
    random_q: Float[Tensor, "m"],
) -> Metrics:
    """Metrics of a search that are judged on its hard tokens, the queries.

    `start_q` and `hard_q` are Q of the initial tokens and of the queries, `random_q` that of fresh random
    strings of the same length.
    """
    above = (hard_q.mean() - random_q.mean()).item()
    return q_metrics(start_q, hard_q) | {
        "langevin/random_q": random_q.mean().item(),
        "langevin/above_random": above,
        "langevin/above_random_sd": above / max(random_q.std().item(), 1e-12),
        "langevin/tokens_changed": (tokens != start).double().mean().item(),
        "langevin/distinct_tokens": distinct_share(tokens),
        "langevin/jaccard": mean_pairwise(jaccard(tokens)),
    }


def q_metrics(start_q: Float[Tensor, "K"], q: Float[Tensor, "K"]) -> Metrics:
    """Metrics of the queries' Q, and of what it was where the search began."""
    return {
        "langevin/hard_q": q.mean().item(),
        "langevin/hard_q_sd": q.std(correction=0).item(),
        "langevin/hard_q_best": q.max().item(),
        "langevin/hard_q_gain": (q.mean() - start_q.mean()).item(),
    }


def distinct_share(tokens: Int[Tensor, "K L"]) -> float:
    """Mean over the strings of their distinct tokens over L."""
    return float(np.mean([len(set(row)) / len(row) for row in tokens.tolist()]))


def jaccard(tokens: Int[Tensor, "K L"]) -> Float[Tensor, "K K"]:
    """Jaccard similarity of the strings' sets of tokens."""
    sets = [set(row) for row in tokens.tolist()]
    shares = [[len(a & b) / len(a | b) for b in sets] for a in sets]
    return torch.tensor(shares, dtype=torch.float64)


def _mean_cosine(vectors: Float[Tensor, "K e"]) -> float:
    """Mean cosine of two different rows."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return mean_pairwise(unit @ unit.T)


def mean_pairwise(similarity: Float[Tensor, "K K"]) -> float:
    """Mean over the pairs of different rows; 1 where there is one row only."""
    count = len(similarity)
    if count == 1:
        return 1.0
    return ((similarity.sum() - similarity.trace()) / (count * (count - 1))).item()


@dataclass
class SearchAlarm:
    """Warns once of each way in which a search can be ineffective, and names the settings that matter.

    With less than `least_changed` of the tokens changed, the queries are the initial strings; over `patience`
    steps hard Q must beat random strings on average.
    """

    least_changed: float = 0.05
    patience: int = 20
    _above: list[float] = field(default_factory=list)
    _reported: set[str] = field(default_factory=set)

    def look(self, metrics: Metrics) -> None:
        """Take in the metrics of one search; one in which Q was flat, as it is at first, does not count."""
        if metrics.get("langevin/grad_norm") == 0:
            return
        changed, messages = metrics["langevin/tokens_changed"], {}
        if changed < self.least_changed:
            messages["changed"] = (
                f"the search changed {changed:.1%} of the query tokens: the queries are the strings that it "
                "began with. Lower --langevin-margin, raise --langevin-step-size or --langevin-steps, or "
                "scale the gradient with --langevin-gradient chain."
            )
        self._above = [*self._above, metrics["langevin/above_random"]][-self.patience :]
        mean = sum(self._above) / len(self._above)
        if len(self._above) == self.patience and mean <= 0:
            messages["random"] = (
                f"over {self.patience} steps the Q of the hard queries is {-mean:.2g} nats per token below "
                "that of random strings: the search finds nothing. Lower --langevin-noise-scale, raise "
                "--langevin-steps, or lower --bridge-temperature-end, so that the optimum of the soft tokens "
                "is one of hard tokens too."
            )
        for key, message in messages.items():
            if key not in self._reported:
                logger.warning(message)
        self._reported |= messages.keys()
