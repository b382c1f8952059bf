"""The policy-weighted mixture gradient (Eqs. 6–8) in a single pass over the candidates.

Scoring and training need the same forward pass at the same θ_k, so there is one. The weights
π_i = exp(s_i)/Z are not known before the last candidate has been scored; the running maximum m of the
log-weights s and the gradient of Σ exp(s_i − m) ℓ_i are, and when m grows, the gradient collected so far is
scaled by exp(m_old − m_new), as in an online softmax. Dividing by Z at the end gives the exact gradient.

Within a micro-batch the graph is cut at the last hidden state: the head runs forward and backward on a few
windows at a time, so that no more than their logits exist at once, and the trunk runs backward once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq import parallel
from curriq.lm.model import LanguageModel, window_losses
from curriq.softq.equations import sample_action
from curriq.types import Features, Mixture, Offer, Windows

SomeWindows = TypeVar("SomeWindows", Offer, Windows)

ScoreFunction = Callable[[Offer, Features], Float[Tensor, "n"]]
"""Log-weights of some windows; must not depend on which windows are scored together."""


def single_pass(lm: LanguageModel, offer: Offer, score: ScoreFunction, with_entropy: bool = False) -> Mixture:
    """Leave the gradient of Σ π_i ℓ_i on θ (cleared before) and return the mixture.

    Cost: one forward and one backward pass, as in plain training.
    """
    lm.network.zero_grad()
    parameters = lm.parameters
    local = offer.take(parallel.shard())
    chunk = lm.pieces.windows(local.windows)
    running_max = -torch.inf
    seen: list[Features] = []
    scores: list[Tensor] = []
    for batch in _batches(local, lm.pieces.micro_batch):
        hidden = lm.trunk(batch.windows.tokens)
        leaves = [piece.detach().requires_grad_() for piece in hidden.split(chunk)]
        for leaf, part in zip(leaves, _batches(batch, chunk), strict=True):
            losses, entropy = window_losses(lm, leaf, part.windows, with_entropy)
            features = window_features(leaf, part, losses, entropy)
            part_scores = score(part, features)
            seen.append(features)
            scores.append(part_scores)
            peak = part_scores.max().item()
            if peak > running_max:
                _scale_gradients([*parameters, *leaves], running_max - peak)
                running_max = peak
            if running_max > -torch.inf:
                relative = torch.exp(part_scores - running_max)
                (relative.to(losses.dtype) * losses).sum().backward()
        gradient = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
        hidden.backward(torch.cat(gradient))
    _make_global(parameters, running_max, scores)
    return _mixture(lm, offer, seen, scores, with_entropy)


def two_pass(lm: LanguageModel, offer: Offer, score: ScoreFunction, with_entropy: bool = False) -> Mixture:
    """The same gradient by scoring everything first; the reference for `single_pass`.

    Used when the model has dropout: scores are measured without it, gradients are taken with it.
    """
    lm.network.zero_grad()
    mixture = score_pass(lm, offer, score, with_entropy)
    weighted_gradient(lm, offer.windows, mixture.weights)
    return mixture


Draw = Callable[[Float[Tensor, "n"]], Int[Tensor, "b"]]
"""Indices of the windows to train on, from the log-weights of all."""


def narrowed(scored: Mixture, draw: Draw) -> Mixture:
    """The scored mixture with weight 1/B on the B windows drawn: a forward over N buys a backward over B."""
    # A draw may hang on the last bit of a score, so rank 0's counts.
    chosen = parallel.from_rank_zero(draw(scored.scores).cpu()).to(scored.scores.device)
    weights = torch.zeros_like(scored.weights)
    weights[chosen] = 1 / len(chosen)
    loss = (weights.double() * scored.features.loss.double()).sum().item()
    return replace(scored, weights=weights, loss=loss)


def one_action(generator: torch.Generator) -> Draw:
    """Draws a_k ~ π = softmax(s) alone: the single-action formulation."""
    return lambda scores: torch.tensor(
        [sample_action(torch.softmax(scores.double(), 0), generator)], device=scores.device
    )


def gumbel_top(b: int, generator: torch.Generator) -> Draw:
    """Draws b windows without replacement from π = softmax(s): the b greatest of s_i plus Gumbel noise.

    Successive draws from π, each renormalised over what is left, have the same distribution (Yellott 1977;
    Kool et al. 2019, "Stochastic Beams and Where to Find Them").
    """

    def draw(scores: Tensor) -> Tensor:
        uniform = torch.rand(len(scores), dtype=torch.float64, generator=generator)
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        keys = scores.double().cpu() + gumbel
        return keys.topk(min(b, len(keys))).indices.sort().values.to(scores.device)

    return draw


def score_pass(lm: LanguageModel, offer: Offer, score: ScoreFunction, with_entropy: bool = False) -> Mixture:
    """Features, scores and weights of all windows, without a gradient and without dropout."""
    local = offer.take(parallel.shard())
    chunk = lm.pieces.windows(local.windows)
    seen: list[Features] = []
    scores: list[Tensor] = []
    with lm.measuring():
        for batch in _batches(local, lm.pieces.micro_batch):
            hidden = lm.trunk(batch.windows.tokens)
            for piece, part in zip(hidden.split(chunk), _batches(batch, chunk), strict=True):
                losses = window_losses(lm, piece, part.windows, with_entropy)
                features = window_features(piece, part, *losses)
                seen.append(features)
                scores.append(score(part, features))
    return _mixture(lm, offer, seen, scores, with_entropy)


def weighted_gradient(lm: LanguageModel, windows: Windows, weights: Float[Tensor, "n"]) -> float:
    """Add the gradient of Σ w_i ℓ_i to θ, over the windows of all ranks, and return the sum.

    Windows of weight 0 are not forwarded.
    """
    used = weights.nonzero().squeeze(1)[parallel.shard()]
    # Ids and sources lie on the CPU, wherever the tokens are: an index there serves both.
    windows, weights = windows.take(used.cpu()), weights[used]
    micro_batch, chunk = lm.pieces.micro_batch, lm.pieces.windows(windows)
    total = torch.zeros((), dtype=torch.float64, device=lm.device)
    for start in range(0, len(windows), micro_batch):  # none where there are more ranks than windows
        batch = windows.take(slice(start, start + micro_batch)).to(lm.device)
        weight = weights[start : start + micro_batch]
        hidden = lm.trunk(batch.tokens)
        leaves = [piece.detach().requires_grad_() for piece in hidden.split(chunk)]
        for leaf, part, w in zip(leaves, _batches(batch, chunk), weight.split(chunk), strict=True):
            losses, _ = window_losses(lm, leaf, part)
            loss = (w.to(losses) * losses).sum()
            loss.backward()
            total += loss.detach()
        hidden.backward(torch.cat([leaf.grad for leaf in leaves]))
    for parameter in lm.parameters:
        parallel.reduce_sum_(_gradient(parameter))
    return parallel.reduce_sum_(total).item()


def _batches(batch: SomeWindows, size: int) -> Iterator[SomeWindows]:
    for start in range(0, len(batch), size):
        yield batch.take(slice(start, start + size))  # ty: ignore[invalid-yield]


def window_features(
    hidden: Float[Tensor, "n T d"],
    offer: Offer,
    losses: Float[Tensor, "n"],
    entropy: Float[Tensor, "n"] | None = None,
) -> Features:
    """What a critic may see of some windows, from their last hidden states; detached."""
    last, pooled = last_and_pooled(hidden.detach())
    return Features(
        hidden=last,
        loss=losses.detach(),
        entropy=entropy,
        pooled=pooled,
        source=offer.windows.source.to(hidden.device),
        known={name: column.to(hidden.device) for name, column in offer.known.items()},
    )


def last_and_pooled(hidden: Float[Tensor, "n T d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """h_x of Eq. 2 (the last token's hidden state), and the mean over tokens; float32 or finer."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden[:, -1].to(dtype), hidden.mean(1, dtype=dtype)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """The gradient, made zero where this process has none, so that every rank can reduce it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _scale_gradients(tensors: list[Tensor], log_factor: float) -> None:
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, math.exp(log_factor))


def _make_global(parameters: list[torch.nn.Parameter], local_max: float, scores: list[Tensor]) -> None:
    """Turn Σ exp(s_i − m) ∇ℓ_i of each rank into the global Σ π_i ∇ℓ_i.

    Raises:
        FloatingPointError: a score is NaN or +∞, or all are −∞.
    """
    peak = parallel.reduce_max(local_max)
    device = parameters[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    if scores:
        total = torch.exp(torch.cat(scores).double() - peak).sum()
    normaliser = parallel.reduce_sum_(total).item()
    if not normaliser > 0:
        raise FloatingPointError(f"the scores of the candidates are not finite (their maximum is {peak})")
    _scale_gradients(list(parameters), local_max - peak - math.log(normaliser))
    if parallel.world_size() > 1:
        for parameter in parameters:
            parallel.reduce_sum_(_gradient(parameter))


def _mixture(
    lm: LanguageModel, offer: Offer, seen: list[Features], scores: list[Tensor], with_entropy: bool
) -> Mixture:
    """Join the pieces of this rank, gather those of the others, and normalise the weights."""
    # A rank without windows must send the type that the others send.
    dtype = torch.promote_types(lm.parameters[0].dtype, torch.float32)

    def join(pieces: list[Tensor], *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        local = torch.cat(pieces) if pieces else torch.zeros((0, *shape), device=lm.device)
        return parallel.gather_rows(local.to(dtype), len(offer))

    features = Features(
        hidden=join([f.hidden for f in seen], lm.width),
        loss=join([f.loss for f in seen]),
        entropy=join([f.entropy for f in seen if f.entropy is not None]) if with_entropy else None,
        pooled=join([f.pooled for f in seen if f.pooled is not None], lm.width),
        source=join([f.source for f in seen if f.source is not None], dtype=torch.int64),
        known={name: join([f.known[name] for f in seen]) for name in offer.known},
    )
    all_scores = join(scores)
    weights = torch.softmax(all_scores.double(), dim=0)
    loss = (weights * features.loss.double()).sum().item()
    return Mixture(features=features, scores=all_scores, weights=weights.to(dtype), loss=loss)
