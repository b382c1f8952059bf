"""Samplers of query tokens: searches for strings of high Q.

All take the same initial strings and return strings of the same shape; what they have in common (shares of
tokens changed, hard Q against random strings) is measured once for all of them, in `diagnostics.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

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
    soft_statistics,
)
from curriq.langevin.energy import Energy, EnergyPoint
from curriq.lm.embeddings import InputEmbeddings
from curriq.types import NO_COST, Cost, Metrics


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
    """The tokens that a query may hold: the tokenizer's, without special tokens and padding rows.

    Args:
        ordinary: their ids, ascending.
        device: where the strings lie.
    """

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
        return torch.searchsorted(self.ids, tokens)


@dataclass(frozen=True)
class SoftmaxLangevin:
    """Softmax-relaxed stochastic gradient Langevin dynamics (Eqs. 11–15).

    Attributes:
        config: settings of the search.
        energy: Q and its gradient.
        inputs: W_e.
        head: returns the vocabulary head's matrix, which the fluency prior reads.
        vocabulary: tokens that the chains may use.
        noise: returns the generator of one search's noise, on the model's device.
    """

    config: LangevinConfig
    energy: Energy
    inputs: InputEmbeddings
    head: Callable[[], Tensor]
    vocabulary: Vocabulary
    noise: Callable[[], torch.Generator]

    def sample(self, start: Int[Tensor, "K L"]) -> Sample:
        c, weight, width = self.config, self._weight(), self.inputs.width
        rule = StepRule(c.langevin_step_size, c.langevin_limit, c.langevin_gradient, c.langevin_noise_scale)
        position, dtype = self.vocabulary.position(start), self.inputs.weight.dtype
        logits = one_hot_logits(position, len(self.vocabulary), c.langevin_margin, dtype)
        generator = self.noise()
        # Soft Q before and after is compared at one temperature: at two, the temperature alone moves it.
        soft = soft_embed(logits, c.bridge_temperature_end, weight)
        q_before = self.energy.soft(soft.embeddings[..., :width])
        norms = []
        for t in range(c.langevin_steps):
            temperature = anneal(c.bridge_temperature_start, c.bridge_temperature_end, t, c.langevin_steps)
            soft = soft_embed(logits, temperature, weight)
            gradient = self._drift(self.energy.point(soft.embeddings[..., :width]))
            norms.append(langevin_step_(logits, temperature, weight, soft, gradient, rule, generator))
        soft = soft_embed(logits, c.bridge_temperature_end, weight)
        q_after = self.energy.soft(soft.embeddings[..., :width])
        entropy, max_prob = soft_statistics(logits, c.bridge_temperature_end, soft.log_normaliser)
        norm = torch.stack(norms)
        metrics = {
            "langevin/soft_q_gain": q_after.mean().item() - q_before.mean().item(),
            "langevin/entropy": entropy,
            "langevin/max_prob": max_prob,
            "langevin/grad_norm": norm.mean().item(),
            "langevin/clip_fraction": (norm > rule.limit).float().mean().item(),
        }
        return Sample(self.vocabulary.ids[extract(logits)], metrics, q_after)

    def _weight(self) -> Tensor:
        """W_e, with the head's matrix beside it where a fluency prior needs one of its own."""
        weight = self.vocabulary.rows(self.inputs.weight)
        if self.config.fluency > 0 and not self.inputs.is_tied:
            weight = torch.cat([weight, self.vocabulary.rows(self.head())], dim=1)
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
        if self.inputs.is_tied:
            return gradient + prior / self.inputs.scale
        return torch.cat([gradient, prior], dim=-1)


@dataclass(frozen=True)
class BestOfRandom:
    """The control of equal effort: of many random strings per chain, the one of greatest Q.

    Attributes:
        count: strings per chain, the initial one included.
        energy: Q.
        vocabulary: tokens of random strings.
        generator: CPU generator of the strings.
    """

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
