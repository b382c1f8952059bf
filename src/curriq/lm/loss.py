"""Next-token losses without the logits of a whole batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from curriq.lm.model import LanguageModel


def window_losses(
    lm: LanguageModel,
    hidden: Float[Tensor, "n T d"],
    tokens: Int[Tensor, "n T"],
    chunk_tokens: int,
    with_entropy: bool = False,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"] | None]:
    """Mean next-token loss of each window, and its mean predictive entropy, both in nats per token.

    Give it as many windows as their logits may be held at once. A single window of more than
    `chunk_tokens` tokens is cut into pieces whose logits are recomputed in the backward pass.
    The entropy carries no gradient.
    """
    n, length = tokens.shape
    inputs, targets = hidden[:, :-1], tokens[:, 1:]
    pieces = range(0, length - 1, max(1, chunk_tokens)) if length - 1 > chunk_tokens else (0,)
    size = chunk_tokens if len(pieces) > 1 else length - 1
    losses = inputs.new_zeros(n, dtype=torch.promote_types(hidden.dtype, torch.float32))
    entropies = torch.zeros_like(losses) if with_entropy else None
    for start in pieces:
        piece = inputs[:, start : start + size], targets[:, start : start + size]
        if len(pieces) > 1 and torch.is_grad_enabled():
            loss, entropy = checkpoint(_piece, lm, *piece, with_entropy, use_reentrant=False)
        else:
            loss, entropy = _piece(lm, *piece, with_entropy)
        losses = losses + loss
        if entropies is not None and entropy is not None:
            entropies = entropies + entropy
    count = length - 1
    return losses / count, None if entropies is None else entropies / count


def _piece(
    lm: LanguageModel, hidden: Tensor, targets: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss and entropy [n] of some positions."""
    logits = lm.head(hidden)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = loss.view(targets.shape).sum(1)
    if not with_entropy:
        return loss, None
    with torch.no_grad():
        log_probs = F.log_softmax(logits.detach(), dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).sum(1)
    return loss, entropy
