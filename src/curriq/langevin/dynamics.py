"""Eqs. 11–15: Langevin dynamics over the vocabulary, as pure functions of tensors.

K chains of L positions climb Q in the logits λ [K, L, V]. One step is: soft embeddings through the bridge
(Eq. 11), energy and its gradient with respect to the *embeddings* (Eq. 12, `energy.py`), and the update
(Eq. 13). The bridge is differentiated by hand: with g = ∂E/∂ẽ,

    ∂E/∂λ_v = (1/τ) p_v (g·W_v − Σ_u p_u g·W_u) = (1/τ) p_v (g·W_v − g·ẽ),

so no graph holds [K, L, V] tensors, and the only one of that size is λ itself, which is updated in place.

Shapes are those of `curriq.types`; V counts the vocabulary entries that the chains may use, e is the width of
the input embeddings. Every function works in float32 and in float64.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_ELEMENTS = 1 << 22
"""Gradient entries held at once in `langevin_step_`: 16 MB in float32, at least one chain's."""
VOCABULARY_CHUNK = 8192
"""Vocabulary entries whose probabilities are held at once."""

GradientRule = Literal["clip", "chain", "position"]
"""`clip` shortens each chain's gradient to at most the limit (Eq. 13); `chain` and `position` rescale that of
each chain, or of each position, to exactly the limit."""


class SoftTokens(NamedTuple):
    """Soft embeddings ẽ = Σ_v p_v W_v (Eq. 11), and logsumexp(λ/τ): p_v = exp(λ_v/τ − log_normaliser)."""

    embeddings: Float[Tensor, "*batch e"]
    log_normaliser: Float[Tensor, "*batch"]


class StepRule(NamedTuple):
    """The constants of Eq. 13: ε; G, the length that gradients are clipped or scaled to, and how; and σ,
    which is 0 for plain gradient ascent."""

    step_size: float
    limit: float
    gradient: GradientRule
    noise_scale: float


def anneal(start: float, end: float, step: int, steps: int) -> float:
    """Bridge temperature of step t of T_max (Eq. 14): linear, `start` at t = 0, `end` at T_max − 1."""
    return start + (end - start) * (step / (steps - 1)) if steps > 1 else end


def one_hot_logits(
    tokens: Int[Tensor, "K L"], vocabulary: int, margin: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "K L V"]:
    """Initial logits λ_0: `margin` at the chains' first tokens, 0 elsewhere."""
    logits = torch.zeros((*tokens.shape, vocabulary), dtype=dtype, device=tokens.device)
    return logits.scatter_(2, tokens.unsqueeze(2), margin)


def soft_embed(
    logits: Float[Tensor, "*batch V"],
    temperature: float,
    weight: Float[Tensor, "V e"],
    chunk: int = VOCABULARY_CHUNK,
) -> SoftTokens:
    """Soft embeddings ẽ = p W_e with p = softmax(λ/τ) (Eq. 11), by an online softmax over vocabulary chunks.

    With W_e in bfloat16 the products are taken in bfloat16 and summed in float32.
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


def soft_one_hot(
    tokens: Int[Tensor, "*batch"], margin: float, temperature: float, weight: Float[Tensor, "V e"]
) -> Float[Tensor, "*batch e"]:
    """ẽ of the initial logits of some tokens, `one_hot_logits`, without a tensor of the vocabulary's size.

    With odds r = exp(−margin/τ) of any other token, ẽ = ((1 − r) W_t + r Σ_v W_v)/(1 + (V − 1) r).
    """
    odds = math.exp(-margin / temperature)
    rows, total = weight[tokens].float(), weight.sum(0, dtype=torch.float32)
    if weight.dtype == torch.float64:
        rows, total = weight[tokens], weight.sum(0)
    return ((1 - odds) * rows + odds * total) / (1 + (len(weight) - 1) * odds)


def bridge_gradient(
    logits: Float[Tensor, "*batch V"],
    temperature: float,
    weight: Float[Tensor, "V e"],
    soft: SoftTokens,
    gradient: Float[Tensor, "*batch e"],
) -> Float[Tensor, "*batch V"]:
    """∂E/∂λ from g = ∂E/∂ẽ (formula in the module docstring); `soft` is the result of `soft_embed`."""
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

    The first five arguments are those of `bridge_gradient`; λ is overwritten. The generator of the noise is
    on the device of λ.

    Returns:
        Norm of each chain's ∂E/∂λ before it was clipped or scaled.
    """
    # A block of chains at a time, its noise in the memory of its gradient: nothing else is as large as λ.
    size = max(1, block_elements // logits[0].numel())
    norms = []
    blocks = zip(*(x.split(size) for x in (logits, *soft, gradient)), strict=True)
    for block, embeddings, log_normaliser, part in blocks:
        drift = bridge_gradient(block, temperature, weight, SoftTokens(embeddings, log_normaliser), part)
        factor, block_norms = gradient_scale(drift, rule)
        block.addcmul_(drift, factor, value=rule.step_size / 2)
        if rule.noise_scale > 0:
            block.add_(drift.normal_(generator=generator), alpha=rule.step_size**0.5 * rule.noise_scale)
        norms.append(block_norms)
    return torch.cat(norms)


def extract(logits: Float[Tensor, "*batch V"]) -> Int[Tensor, "*batch"]:
    """Hard tokens t_i = argmax_v λ_{i,v} (Eq. 15)."""
    return logits.argmax(-1)


def soft_statistics(
    logits: Float[Tensor, "K L V"],
    temperature: float,
    log_normaliser: Float[Tensor, "K L"],
    chunk: int = VOCABULARY_CHUNK,
) -> tuple[float, float]:
    """Mean entropy of the positions' p in nats, and the mean of their greatest probability."""
    mean_scaled = torch.zeros_like(log_normaliser)
    for part in logits.split(chunk, 2):
        scaled = part / temperature
        mean_scaled += torch.exp(scaled - log_normaliser.unsqueeze(2)).mul_(scaled).sum(2)
    greatest = torch.exp(logits.amax(2) / temperature - log_normaliser)
    return (log_normaliser - mean_scaled).mean().item(), greatest.mean().item()
