"""Two more samplers of queries, as controls: `--proposer experiments/control_samplers.py:swaps`.

Each of the two functions at the end builds one; `--proposer` takes any function of this kind. The other
controls (`best-of-random`, `random-queries`, `direct-q`, `uniform-buffer`) are built in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from curriq.config import LangevinConfig
from curriq.langevin.build import SearchContext
from curriq.langevin.dynamics import VOCABULARY_CHUNK, StepRule, gradient_scale
from curriq.langevin.energy import Energy
from curriq.langevin.samplers import QuerySampler, Sample, Vocabulary
from curriq.lm.embeddings import InputEmbeddings
from curriq.lm.model import trunk_flops
from curriq.types import Cost

CANDIDATES = 32
"""Strings with one token swapped that `swaps` scores per step and chain."""
TOP_K = 64
"""Tokens of a position, by their first-order gain, that `swaps` draws from."""


@dataclass(frozen=True)
class EmbeddingLangevin:
    """Langevin dynamics on the embeddings, and the nearest token at the end: the sampler that the paper
    compares its own with.

    Attributes:
        config: settings of the search; margin and bridge play no part.
        energy, inputs, vocabulary, noise: as in `SoftmaxLangevin`.
        cost: of a search.
    """

    cost: Cost
    config: LangevinConfig
    energy: Energy
    inputs: InputEmbeddings
    vocabulary: Vocabulary
    noise: Callable[[], torch.Generator]

    def sample(self, start: Tensor) -> Sample:
        c = self.config
        rule = StepRule(c.langevin_step_size, c.langevin_limit, c.langevin_gradient, c.langevin_noise_scale)
        embeddings = self.inputs.weight[start].clone()
        generator = self.noise()
        q_before = self.energy.soft(embeddings)
        norms = []
        for _ in range(c.langevin_steps):
            gradient = self.energy.point(embeddings).gradient / c.energy_temperature
            norms.append(embedding_step_(embeddings, gradient, rule, generator))
        q_after = self.energy.soft(embeddings)
        weight = self.vocabulary.rows(self.inputs.weight)
        index, cosine = nearest_tokens(embeddings, weight)
        _, random_cosine = nearest_tokens(torch.empty_like(embeddings).normal_(generator=generator), weight)
        norm = torch.stack(norms)
        metrics = {
            "langevin/soft_q_gain": q_after.mean().item() - q_before.mean().item(),
            "own/snap_cosine": cosine.mean().item(),
            "own/snap_cosine_random": random_cosine.mean().item(),
            "langevin/grad_norm": norm.mean().item(),
            "langevin/clip_fraction": (norm > rule.limit).float().mean().item(),
        }
        return Sample(self.vocabulary.ids[index], metrics, q_after, self.cost)


@torch.no_grad()
def embedding_step_(
    embeddings: Tensor, gradient: Tensor, rule: StepRule, generator: torch.Generator
) -> Tensor:
    """Eq. 13 in place, on the embeddings [K, L, e] themselves; returns the norm of each chain's gradient."""
    factor, norms = gradient_scale(gradient, rule)
    embeddings.addcmul_(gradient, factor, value=rule.step_size / 2)
    if rule.noise_scale > 0:
        noise = torch.empty_like(embeddings).normal_(generator=generator)
        embeddings.add_(noise, alpha=rule.step_size**0.5 * rule.noise_scale)
    return norms


def nearest_tokens(
    embeddings: Tensor, weight: Tensor, chunk: int = VOCABULARY_CHUNK
) -> tuple[Tensor, Tensor]:
    """For vectors [*batch, e], the row of `weight` [V, e] of greatest cosine with each, and that cosine."""
    rows = F.normalize(embeddings.flatten(0, -2), dim=-1)
    best = rows.new_full((len(rows),), -torch.inf)
    index = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for number, part in enumerate(weight.split(chunk)):
        top, where = (rows @ F.normalize(part, dim=-1).T).max(1)
        index = torch.where(top > best, where + number * chunk, index)
        best = torch.maximum(best, top)
    shape = embeddings.shape[:-1]
    return index.view(shape), best.view(shape)


@dataclass(frozen=True)
class GuidedSwaps:
    """Discrete proposals as in GCG (Zou et al. 2023): the gradient suggests swaps of one token, the hard
    strings with these swaps are scored, and the best replaces the string where it is better.

    Attributes:
        steps: swaps at most.
        candidates: B, strings that are scored per step and chain.
        top_k: tokens of a position that swaps are drawn from.
        energy, inputs, vocabulary: as in `SoftmaxLangevin`.
        generator: CPU generator that draws positions and ranks.
        cost: of a search.
    """

    cost: Cost
    steps: int
    candidates: int
    top_k: int
    energy: Energy
    inputs: InputEmbeddings
    vocabulary: Vocabulary
    generator: torch.Generator

    def sample(self, start: Tensor) -> Sample:
        tokens, q = start.clone(), self.energy.hard(start)
        accepted, norms = 0.0, []
        for _ in range(self.steps):
            gradient = self.energy.point(self.inputs.weight[tokens]).gradient
            norms.append(torch.linalg.vector_norm(gradient, dim=(1, 2)))
            proposals = self._proposals(tokens, gradient)
            chains, count, length = proposals.shape
            proposed_q, best = self.energy.hard(proposals.view(-1, length)).view(chains, count).max(1)
            better = proposed_q > q
            tokens = torch.where(better[:, None], proposals[torch.arange(chains), best], tokens)
            q = torch.maximum(q, proposed_q)
            accepted += better.float().mean().item()
        metrics = {
            "own/swap_acceptance": accepted / self.steps,
            "langevin/grad_norm": torch.cat(norms).mean().item(),
        }
        return Sample(tokens, metrics, cost=self.cost)

    def _proposals(self, tokens: Tensor, gradient: Tensor) -> Tensor:
        """B copies [K, B, L] of each string with one token swapped, at a random position each.

        The first-order gain of token v at position i is g_i·(W_v − W_{t_i}).
        """
        chains, length = tokens.shape
        shape, top_k = (chains, self.candidates), min(self.top_k, len(self.vocabulary))
        gain = gradient @ self.vocabulary.rows(self.inputs.weight).T
        promising = self.vocabulary.ids[gain.topk(top_k, dim=-1).indices]
        position = torch.randint(length, shape, generator=self.generator).to(tokens.device)
        rank = torch.randint(top_k, shape, generator=self.generator).to(tokens.device)
        swapped = promising[torch.arange(chains, device=tokens.device)[:, None], position, rank]
        copies = tokens[:, None].repeat(1, self.candidates, 1)
        return copies.scatter_(2, position[..., None], swapped[..., None])


def _cost(context: SearchContext, *, forwards: int, products: int) -> Cost:
    """Operations of passes over the K strings (a backward one counts as one: no weight has a gradient) and of
    products with W_e."""
    config, lm = context.config, context.context.lm
    strings, length = config.queries, config.langevin.query_tokens
    product = 2 * strings * length * len(context.vocabulary) * context.inputs.width
    return Cost(extra_flops=forwards * strings * trunk_flops(lm, length) + products * product)


def embedding_langevin(context: SearchContext) -> QuerySampler:
    """Langevin dynamics on the embeddings, with the settings of `--langevin-…`."""
    steps = context.config.langevin.langevin_steps
    return EmbeddingLangevin(
        _cost(context, forwards=2 * steps, products=1),
        context.config.langevin,
        context.q,
        context.inputs,
        context.vocabulary,
        context.noise,
    )


def swaps(context: SearchContext, candidates: int = CANDIDATES) -> QuerySampler:
    """Guided swaps, at most `--langevin-steps` of them."""
    steps = context.config.langevin.langevin_steps
    return GuidedSwaps(
        _cost(context, forwards=steps * (2 + candidates), products=steps),
        steps,
        candidates,
        TOP_K,
        context.q,
        context.inputs,
        context.vocabulary,
        context.context.generators("langevin/noise"),
    )


def swaps_of_8(context: SearchContext) -> QuerySampler:
    """The arm of `experiments/langevin.py`, whose search takes a quarter of the passes."""
    return swaps(context, candidates=8)
