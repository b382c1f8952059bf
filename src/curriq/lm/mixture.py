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

import torch
from jaxtyping import Float
from torch import Tensor

from curriq import parallel
from curriq.lm.loss import window_losses
from curriq.lm.model import LanguageModel
from curriq.types import Candidates, Features, Mixture

ScoreFunction = Callable[[Candidates, Features], Float[Tensor, "n"]]
"""Log-weights of some windows; must not depend on which windows are scored together."""


def single_pass(
    lm: LanguageModel,
    candidates: Candidates,
    score: ScoreFunction,
    *,
    micro_batch: int,
    chunk_tokens: int,
    with_entropy: bool = False,
) -> Mixture:
    """Leave the gradient of Σ π_i ℓ_i on θ (cleared before) and return the mixture.

    Cost: one forward and one backward pass, as in plain training.
    """
    parameters = lm.parameters
    _clear(parameters)
    local = candidates.take(parallel.shard())
    chunk = _windows_per_chunk(local, chunk_tokens)
    running_max = -torch.inf
    seen: list[Features] = []
    scores: list[Tensor] = []
    for batch in _batches(local, micro_batch):
        hidden = lm.trunk(batch.tokens)
        leaves = [piece.detach().requires_grad_() for piece in hidden.split(chunk)]
        for leaf, part in zip(leaves, _batches(batch, chunk), strict=True):
            losses, entropy = window_losses(lm, leaf, part.tokens, chunk_tokens, with_entropy)
            features = _features(leaf, losses, entropy)
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
    return _mixture(lm, len(candidates), seen, scores, with_entropy)


def two_pass(
    lm: LanguageModel,
    candidates: Candidates,
    score: ScoreFunction,
    *,
    micro_batch: int,
    chunk_tokens: int,
    with_entropy: bool = False,
) -> Mixture:
    """The same gradient by scoring everything first; the reference for `single_pass`.

    Used when the model has dropout: scores are measured without it, gradients are taken with it.
    """
    parameters = lm.parameters
    _clear(parameters)
    local = candidates.take(parallel.shard())
    chunk = _windows_per_chunk(local, chunk_tokens)
    seen: list[Features] = []
    scores: list[Tensor] = []
    with lm.measuring():
        for batch in _batches(local, micro_batch):
            hidden = lm.trunk(batch.tokens)
            for piece, part in zip(hidden.split(chunk), _batches(batch, chunk), strict=True):
                features = _features(
                    piece, *window_losses(lm, piece, part.tokens, chunk_tokens, with_entropy)
                )
                seen.append(features)
                scores.append(score(part, features))
    mixture = _mixture(lm, len(candidates), seen, scores, with_entropy)
    local_weights = mixture.weights[parallel.shard()]
    for start, batch in enumerate(_batches(local, micro_batch)):
        weight = local_weights[start * micro_batch :][: len(batch)]
        hidden = lm.trunk(batch.tokens)
        leaves = [piece.detach().requires_grad_() for piece in hidden.split(chunk)]
        for leaf, part, w in zip(leaves, _batches(batch, chunk), weight.split(chunk), strict=True):
            losses, _ = window_losses(lm, leaf, part.tokens, chunk_tokens)
            (w.to(losses.dtype) * losses).sum().backward()
        hidden.backward(torch.cat([leaf.grad for leaf in leaves]))
    for parameter in parameters:
        parallel.reduce_sum_(_gradient(parameter))
    return mixture


def _batches(candidates: Candidates, size: int) -> Iterator[Candidates]:
    for start in range(0, len(candidates), size):
        yield candidates.take(slice(start, start + size))


def _windows_per_chunk(candidates: Candidates, chunk_tokens: int) -> int:
    return max(1, chunk_tokens // candidates.tokens.shape[1])


def pooled(hidden: Float[Tensor, "n T d"]) -> Float[Tensor, "n d"]:
    """h_x of Eq. 2 from the last hidden states: the last token's, in float32 at least; keeps the gradient."""
    last = hidden[:, -1]
    return last.to(torch.promote_types(last.dtype, torch.float32))


def _features(hidden: Tensor, losses: Tensor, entropy: Tensor | None) -> Features:
    return Features(hidden=pooled(hidden).detach(), loss=losses.detach(), entropy=entropy)


def _clear(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


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
    lm: LanguageModel, total: int, seen: list[Features], scores: list[Tensor], with_entropy: bool
) -> Mixture:
    """Join the pieces of this rank, gather those of the others, and normalise the weights."""
    # A rank without windows must send the type that the others send.
    dtype = torch.promote_types(lm.parameters[0].dtype, torch.float32)

    def join(pieces: list[Tensor], *shape: int) -> Tensor:
        local = torch.cat(pieces) if pieces else torch.zeros((0, *shape), device=lm.device)
        return parallel.gather_rows(local.to(dtype), total)

    features = Features(
        hidden=join([f.hidden for f in seen], lm.width),
        loss=join([f.loss for f in seen]),
        entropy=join([f.entropy for f in seen if f.entropy is not None]) if with_entropy else None,
    )
    all_scores = join(scores)
    weights = torch.softmax(all_scores.double(), dim=0)
    loss = (weights * features.loss.double()).sum().item()
    return Mixture(features=features, scores=all_scores, weights=weights.to(dtype), loss=loss)
