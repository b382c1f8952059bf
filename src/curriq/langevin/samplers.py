"""Samplers of query tokens: they differ in how they search for strings of high Q.

All take the same first strings and return strings of the same shape; what they have in common (shares of
tokens changed, hard Q against random strings) is measured once for all of them, in `diagnostics.py`.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import LangevinConfig
from curriq.langevin.dynamics import (
    StepRule,
    anneal,
    embedding_step_,
    extract,
    langevin_step_,
    nearest_tokens,
    one_hot_logits,
    soft_embed,
    soft_statistics,
)
from curriq.langevin.energy import Energy, EnergyPoint
from curriq.lm.embeddings import InputEmbeddings
from curriq.types import Metrics


class Sample(NamedTuple):
    """What a sampler found.

    Attributes:
        tokens: hard tokens (Eq. 15), one string per chain.
        metrics: what only this sampler can measure.
        soft_q: Q of the relaxed strings that the tokens were taken from; None where nothing is relaxed.
    """

    tokens: Int[Tensor, "K L"]
    metrics: Metrics
    soft_q: Float[Tensor, "K"] | None = None


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
        """Their rows of a matrix over the model's whole vocabulary; a view where their ids are in a row."""
        return weight[self._slice] if self._slice is not None else weight[self.ids]

    def position(self, tokens: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """Index among the ordinary tokens; the inverse of `ids[…]`."""
        return torch.searchsorted(self.ids, tokens)


class IdentitySampler:
    """The control: the first strings are the queries."""

    def sample(self, start: Int[Tensor, "K L"]) -> Sample:
        return Sample(start, {})


class SoftmaxLangevin:
    """Softmax-relaxed stochastic gradient Langevin dynamics (Eqs. 11–15).

    Args:
        config: the settings of the search.
        energy: Q and its gradient.
        inputs: W_e.
        head: the vocabulary head's matrix, which the fluency prior reads.
        vocabulary: tokens that the chains may use.
        noise_generator: gives the generator of one search's noise, on the model's device.
    """

    def __init__(
        self,
        config: LangevinConfig,
        energy: Energy,
        inputs: InputEmbeddings,
        head: Callable[[], Tensor],
        vocabulary: Vocabulary,
        noise_generator: Callable[[], torch.Generator],
    ) -> None:
        self._config = config
        self._energy = energy
        self._inputs = inputs
        self._head = head
        self._vocabulary = vocabulary
        self._noise_generator = noise_generator
        self._rule = step_rule(config)

    def sample(self, start: Int[Tensor, "K L"]) -> Sample:
        c = self._config
        weight, width = self._weight(), self._inputs.width
        dtype = torch.promote_types(self._inputs.weight.dtype, torch.float32)
        logits = one_hot_logits(
            self._vocabulary.position(start), len(self._vocabulary), c.langevin_margin, dtype
        )
        generator = self._noise_generator()
        # Soft Q before and after is compared at one temperature: at two, the temperature alone moves it.
        soft = soft_embed(logits, c.bridge_temperature_end, weight)
        q_before = self._energy.soft(soft.embeddings[..., :width]).mean().item()
        norms = []
        for t in range(c.langevin_steps):
            temperature = anneal(c.bridge_temperature_start, c.bridge_temperature_end, t, c.langevin_steps)
            soft = soft_embed(logits, temperature, weight)
            point = self._energy.point(soft.embeddings[..., :width])
            gradient = self._drift(point)
            norms.append(langevin_step_(logits, temperature, weight, soft, gradient, self._rule, generator))
        soft = soft_embed(logits, c.bridge_temperature_end, weight)
        q_after = self._energy.soft(soft.embeddings[..., :width])
        entropy, max_prob = soft_statistics(logits, c.bridge_temperature_end, soft.log_normaliser)
        metrics = {
            "langevin/soft_q_gain": q_after.mean().item() - q_before,
            "langevin/entropy": entropy,
            "langevin/max_prob": max_prob,
            **gradient_metrics(norms, self._rule),
        }
        return Sample(self._vocabulary.ids[extract(logits)], metrics, q_after)

    def _weight(self) -> Tensor:
        """W_e, with the head's matrix beside it where a fluency prior needs one of its own."""
        weight = self._vocabulary.rows(self._inputs.weight)
        if self._config.fluency > 0 and not self._inputs.is_tied:
            weight = torch.cat([weight, self._vocabulary.rows(self._head())], dim=1)
        return weight.bfloat16() if self._config.bridge_precision == "bf16" else weight

    def _drift(self, point: EnergyPoint) -> Tensor:
        """∂E/∂ẽ, with the fluency prior's part.

        The prior is w Σ_i Σ_v p_{i,v} log p_θ(v | ẽ_<i) with the prediction held fixed. The logarithm is
        h_{i−1}·U_v but for a constant, which the bridge centres away, so w h_{i−1} is to U what g is to
        W_e: they add up where the two matrices are one, and stand side by side where they are not.
        """
        c = self._config
        gradient = point.gradient / c.energy_temperature
        if c.fluency == 0:
            return gradient
        before = torch.zeros_like(point.hidden)
        before[:, 1:] = point.hidden[:, :-1]
        before = before.to(gradient.dtype) * c.fluency
        if self._inputs.is_tied:
            return gradient + before / self._inputs.scale
        return torch.cat([gradient, before], dim=-1)


class EmbeddingLangevin:
    """The older sampler: Langevin dynamics on the embeddings, and the nearest token at the end.

    Args:
        config: the settings of the search; margin and bridge play no part.
        energy, inputs, vocabulary, noise_generator: as in `SoftmaxLangevin`.
    """

    def __init__(
        self,
        config: LangevinConfig,
        energy: Energy,
        inputs: InputEmbeddings,
        vocabulary: Vocabulary,
        noise_generator: Callable[[], torch.Generator],
    ) -> None:
        self._config = config
        self._energy = energy
        self._inputs = inputs
        self._vocabulary = vocabulary
        self._noise_generator = noise_generator
        self._rule = step_rule(config)

    def sample(self, start: Int[Tensor, "K L"]) -> Sample:
        embeddings = self._inputs.weight[start].clone()
        generator = self._noise_generator()
        q_before = self._energy.soft(embeddings).mean().item()
        norms = []
        for _ in range(self._config.langevin_steps):
            gradient = self._energy.point(embeddings).gradient / self._config.energy_temperature
            norms.append(embedding_step_(embeddings, gradient, self._rule, generator))
        q_after = self._energy.soft(embeddings)
        weight = self._vocabulary.rows(self._inputs.weight)
        index, cosine = nearest_tokens(embeddings, weight)
        _, random_cosine = nearest_tokens(torch.empty_like(embeddings).normal_(generator=generator), weight)
        metrics = {
            "langevin/soft_q_gain": q_after.mean().item() - q_before,
            "langevin/snap_cosine": cosine.mean().item(),
            "langevin/snap_cosine_random": random_cosine.mean().item(),
            **gradient_metrics(norms, self._rule),
        }
        return Sample(self._vocabulary.ids[index], metrics, q_after)


class GuidedSwaps:
    """Discrete proposals as in GCG (Zou et al. 2023): the gradient suggests swaps of one token, the hard
    strings with these swaps are scored, and the best takes over where it is better.

    Args:
        config: the settings of the search; `langevin_steps` swaps at most.
        energy, inputs, vocabulary: as in `SoftmaxLangevin`.
        generator: CPU generator that draws positions and ranks.
    """

    def __init__(
        self,
        config: LangevinConfig,
        energy: Energy,
        inputs: InputEmbeddings,
        vocabulary: Vocabulary,
        generator: torch.Generator,
    ) -> None:
        self._config = config
        self._energy = energy
        self._inputs = inputs
        self._vocabulary = vocabulary
        self._generator = generator

    def sample(self, start: Int[Tensor, "K L"]) -> Sample:
        tokens = start.clone()
        q = self._energy.hard(tokens)
        accepted, norms = 0.0, []
        for _ in range(self._config.langevin_steps):
            gradient = self._energy.point(self._inputs.weight[tokens]).gradient
            norms.append(torch.linalg.vector_norm(gradient, dim=(1, 2)))
            proposals = self._proposals(tokens, gradient)
            chains, count, length = proposals.shape
            proposed_q, best = self._energy.hard(proposals.view(-1, length)).view(chains, count).max(1)
            better = proposed_q > q
            tokens = torch.where(better[:, None], proposals[torch.arange(chains), best], tokens)
            q = torch.maximum(q, proposed_q)
            accepted += better.float().mean().item()
        metrics = {
            "langevin/swap_acceptance": accepted / self._config.langevin_steps,
            "langevin/grad_norm": torch.cat(norms).mean().item(),
        }
        return Sample(tokens, metrics)

    def _proposals(self, tokens: Int[Tensor, "K L"], gradient: Tensor) -> Int[Tensor, "K B L"]:
        """B copies of each string with one token swapped, among the most promising of a random position.

        The first-order gain of token v at position i is g_i·(W_v − W_{t_i}).
        """
        (chains, length), count = tokens.shape, self._config.swap_candidates
        top_k = min(self._config.swap_top_k, len(self._vocabulary))
        gain = gradient @ self._vocabulary.rows(self._inputs.weight).T
        promising = self._vocabulary.ids[gain.topk(top_k, dim=-1).indices]
        position = torch.randint(length, (chains, count), generator=self._generator).to(tokens.device)
        rank = torch.randint(top_k, (chains, count), generator=self._generator).to(tokens.device)
        swapped = promising[torch.arange(chains, device=tokens.device)[:, None], position, rank]
        return tokens[:, None].repeat(1, count, 1).scatter_(2, position[..., None], swapped[..., None])


class BestOfRandom:
    """The control of equal effort: of many random strings per chain the one with the greatest Q.

    Args:
        count: strings per chain, the first string included.
        energy: Q.
        vocabulary: what random strings are made of.
        generator: CPU generator of the strings.
    """

    def __init__(
        self, count: int, energy: Energy, vocabulary: Vocabulary, generator: torch.Generator
    ) -> None:
        self._count = count
        self._energy = energy
        self._vocabulary = vocabulary
        self._generator = generator

    def sample(self, start: Int[Tensor, "K L"]) -> Sample:
        chains, length = start.shape
        others = random_strings(chains * (self._count - 1), length, self._vocabulary, self._generator)
        strings = torch.cat([start[:, None], others.view(chains, -1, length)], dim=1)
        best = self._energy.hard(strings.view(-1, length)).view(chains, -1).argmax(1)
        return Sample(strings[torch.arange(chains), best], {})


def random_strings(
    count: int, length: int, vocabulary: Vocabulary, generator: torch.Generator
) -> Int[Tensor, "count length"]:
    """Uniform strings of ordinary tokens, drawn on the CPU."""
    index = torch.randint(len(vocabulary), (count, length), generator=generator)
    return vocabulary.ids[index.to(vocabulary.ids.device)]


def step_rule(config: LangevinConfig) -> StepRule:
    """The constants of Eq. 13 as the pure functions take them."""
    return StepRule(
        step_size=config.langevin_step_size,
        limit=config.langevin_limit,
        gradient=config.langevin_gradient,
        noise_scale=config.langevin_noise_scale,
    )


def gradient_metrics(norms: list[Tensor], rule: StepRule) -> Metrics:
    """Mean gradient norm over chains and steps, and the share of them that the limit shortened."""
    every = torch.stack(norms)
    return {
        "langevin/grad_norm": every.mean().item(),
        "langevin/clip_fraction": (every > rule.limit).float().mean().item(),
    }
