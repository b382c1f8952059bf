"""Eqs. 11–15: Langevin dynamics over the vocabulary, as pure functions of tensors.

K chains of L positions climb Q in the logits λ [K, L, V]. One step is: soft embeddings through the bridge
(Eq. 11), energy and its gradient with respect to the *embeddings* (Eq. 12, `energy.py`), and the update
(Eq. 13). The bridge is differentiated by hand: with g = ∂E/∂ẽ,

    ∂E/∂λ_v = (1/τ) p_v (g·W_v − Σ_u p_u g·W_u) = (1/τ) p_v (g·W_v − g·ẽ),

so no graph holds [K, L, V] tensors, and the only one of that size is λ itself, which is updated in place.

| letter | meaning |
|---|---|
| K | chains |
| L | tokens of a query |
| V | entries of the vocabulary that the chains may use |
| e | width of the input embeddings |

Every function works in float32 and in float64.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_ELEMENTS = 1 << 22
"""Gradient entries held at once in `langevin_step_`: 16 MB in float32, at least one chain's."""
VOCABULARY_CHUNK = 8192
"""Entries of the vocabulary whose probabilities are held at once in `soft_embed`."""

GradientRule = Literal["clip", "chain", "position"]
"""What bounds the gradient: `clip` shortens each chain's to at most the limit (Eq. 13); `chain` and
`position` give that of each chain, or of each position, exactly this length."""


class SoftTokens(NamedTuple):
    """Eq. 11 without p itself: p_v = exp(λ_v/τ − log_normaliser).

    Attributes:
        embeddings: ẽ = Σ_v p_v W_v.
        log_normaliser: logsumexp(λ/τ).
    """

    embeddings: Float[Tensor, "*batch e"]
    log_normaliser: Float[Tensor, "*batch"]


class StepRule(NamedTuple):
    """The constants of Eq. 13.

    Attributes:
        step_size: ε.
        limit: G, the length that the gradient is clipped or scaled to.
        gradient: how.
        noise_scale: σ; 0 makes it plain gradient ascent.
    """

    step_size: float
    limit: float
    gradient: GradientRule
    noise_scale: float


def anneal(start: float, end: float, step: int, steps: int) -> float:
    """Eq. 14, the bridge temperature of step t of T_max: linear, `start` at t = 0, `end` at T_max − 1."""
    return start + (end - start) * (step / (steps - 1)) if steps > 1 else end


def one_hot_logits(
    tokens: Int[Tensor, "K L"], vocabulary: int, margin: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "K L V"]:
    """λ_0: `margin` at the chains' first tokens, 0 elsewhere."""
    logits = torch.zeros((*tokens.shape, vocabulary), dtype=dtype, device=tokens.device)
    return logits.scatter_(2, tokens.unsqueeze(2), margin)


def token_probs(logits: Float[Tensor, "*batch V"], temperature: float) -> Float[Tensor, "*batch V"]:
    """Eq. 11, p = softmax(λ/τ), as a whole; the sampler itself never holds it."""
    return torch.softmax(logits / temperature, dim=-1)


def soft_embed(
    logits: Float[Tensor, "*batch V"],
    temperature: float,
    weight: Float[Tensor, "V e"],
    chunk: int = VOCABULARY_CHUNK,
) -> SoftTokens:
    """Eq. 11, ẽ = p W, in one pass over λ with an online softmax over chunks of the vocabulary.

    Args:
        logits: λ.
        temperature: τ_t.
        weight: W_e, frozen; in bfloat16 the products are taken in bfloat16 and summed in float32.
        chunk: entries at a time.
    """
    rows = logits.flatten(0, -2)
    peak = rows.new_full((len(rows), 1), -torch.inf)
    total = rows.new_zeros((len(rows), 1))
    embeddings = rows.new_zeros((len(rows), weight.shape[1]))
    for part, part_weight in zip(rows.split(chunk, 1), weight.split(chunk), strict=True):
        scaled = part / temperature
        new_peak = torch.maximum(peak, scaled.amax(1, keepdim=True))
        shrink = torch.exp(peak - new_peak)
        mass = scaled.sub_(new_peak).exp_()
        total = total * shrink + mass.sum(1, keepdim=True)
        embeddings.mul_(shrink).add_(mass.to(part_weight.dtype) @ part_weight)
        peak = new_peak
    shape = logits.shape[:-1]
    return SoftTokens((embeddings / total).view(*shape, -1), (peak + total.log()).view(shape))


def bridge_gradient(
    logits: Float[Tensor, "*batch V"],
    temperature: float,
    weight: Float[Tensor, "V e"],
    soft: SoftTokens,
    gradient: Float[Tensor, "*batch e"],
) -> Float[Tensor, "*batch V"]:
    """∂E/∂λ from g = ∂E/∂ẽ; the formula at the head of this file.

    Args:
        logits: λ, the point.
        temperature: τ_t.
        weight: W_e.
        soft: what `soft_embed` returned at the same point and temperature.
        gradient: g.
    """
    along = (gradient.to(weight.dtype) @ weight.T).to(logits.dtype)
    centred = along.sub_((gradient * soft.embeddings).sum(-1, keepdim=True))
    probs = (logits / temperature).sub_(soft.log_normaliser.unsqueeze(-1)).exp_()
    return centred.mul_(probs).div_(temperature)


def gradient_scale(
    gradient: Float[Tensor, "K L V"], rule: StepRule
) -> tuple[Float[Tensor, "K _ 1"], Float[Tensor, "K"]]:
    """Factor on each chain's (or position's) gradient, and each chain's norm over all L × V entries."""
    position_norms = torch.linalg.vector_norm(gradient, dim=2, keepdim=True)
    chain_norms = torch.linalg.vector_norm(position_norms, dim=1, keepdim=True)
    norms = position_norms if rule.gradient == "position" else chain_norms
    factor = rule.limit / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    if rule.gradient == "clip":
        factor = factor.clamp(max=1.0)
    return factor, chain_norms.flatten()


@torch.no_grad()
def langevin_step_(
    logits: Float[Tensor, "K L V"],
    temperature: float,
    weight: Float[Tensor, "V e"],
    soft: SoftTokens,
    gradient: Float[Tensor, "K L e"],
    rule: StepRule,
    generator: torch.Generator,
    block_elements: int = BLOCK_ELEMENTS,
) -> Float[Tensor, "K"]:
    """Eq. 13 in place, λ ← λ + (ε/2) clip(∂E/∂λ, G) + √ε η with η ~ N(0, σ²I); climbs E.

    Works on a few chains at a time: their gradient is formed, measured, applied, and its memory then
    filled with their noise, so that beside λ only one block exists.

    Args:
        logits: λ, overwritten.
        temperature, weight, soft, gradient: as in `bridge_gradient`.
        rule: step size, limit and noise.
        generator: of the noise, on the device of λ.
        block_elements: gradient entries held at once; at least one chain's.

    Returns:
        Norm of each chain's ∂E/∂λ before it was clipped or scaled.
    """
    chains = max(1, block_elements // logits[0].numel())
    norms = []
    for start in range(0, len(logits), chains):
        part = slice(start, start + chains)
        block = logits[part]
        part_soft = SoftTokens(soft.embeddings[part], soft.log_normaliser[part])
        drift = bridge_gradient(block, temperature, weight, part_soft, gradient[part])
        factor, part_norms = gradient_scale(drift, rule)
        block.addcmul_(drift, factor, value=rule.step_size / 2)
        if rule.noise_scale > 0:
            noise = drift.normal_(generator=generator)
            block.add_(noise, alpha=rule.step_size**0.5 * rule.noise_scale)
        norms.append(part_norms)
    return torch.cat(norms)


def extract(logits: Float[Tensor, "*batch V"]) -> Int[Tensor, "*batch"]:
    """Eq. 15, t_i = argmax_v λ_{i,v}."""
    return logits.argmax(-1)


@torch.no_grad()
def embedding_step_(
    embeddings: Float[Tensor, "K L e"],
    gradient: Float[Tensor, "K L e"],
    rule: StepRule,
    generator: torch.Generator,
) -> Float[Tensor, "K"]:
    """Eq. 13 on the embeddings themselves, the older sampler that the paper compares with.

    Returns:
        Norm of each chain's gradient before it was clipped or scaled.
    """
    factor, norms = gradient_scale(gradient, rule)
    embeddings.addcmul_(gradient, factor, value=rule.step_size / 2)
    if rule.noise_scale > 0:
        noise = torch.empty_like(embeddings).normal_(generator=generator)
        embeddings.add_(noise, alpha=rule.step_size**0.5 * rule.noise_scale)
    return norms


def nearest_tokens(
    embeddings: Float[Tensor, "*batch e"], weight: Float[Tensor, "V e"], chunk: int = VOCABULARY_CHUNK
) -> tuple[Int[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """The token whose embedding has the greatest cosine with each vector, and that cosine."""
    rows = torch.nn.functional.normalize(embeddings.flatten(0, -2), dim=-1)
    best = rows.new_full((len(rows),), -torch.inf)
    index = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for number, part in enumerate(weight.split(chunk)):
        cosine = rows @ torch.nn.functional.normalize(part, dim=-1).T
        top, where = cosine.max(1)
        better = top > best
        best = torch.where(better, top, best)
        index = torch.where(better, where + number * chunk, index)
    shape = embeddings.shape[:-1]
    return index.view(shape), best.view(shape)


def soft_statistics(
    logits: Float[Tensor, "K L V"],
    temperature: float,
    log_normaliser: Float[Tensor, "K L"],
    chunk: int = VOCABULARY_CHUNK,
) -> tuple[float, float]:
    """Mean entropy of the positions' p in nats, and the mean of their greatest probability."""
    mean_scaled = torch.zeros_like(log_normaliser)
    greatest = torch.full_like(log_normaliser, -torch.inf)
    for part in logits.split(chunk, 2):
        scaled = part / temperature
        greatest = torch.maximum(greatest, scaled.amax(2))
        probs = torch.exp(scaled - log_normaliser.unsqueeze(2))
        mean_scaled += probs.mul_(scaled).sum(2)
    entropy = log_normaliser - mean_scaled
    return entropy.mean().item(), torch.exp(greatest - log_normaliser).mean().item()
