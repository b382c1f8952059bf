"""Finished steps of the loop, made by hand for tests of what reads them."""

from typing import Any

import torch
from torch import Tensor

from curriq.types import Features, Offer, Step


def finished_step(
    index: int,
    offer: Offer,
    trained: Tensor | None = None,
    *,
    loss: Tensor | None = None,
    scores: Tensor | None = None,
    weights: Tensor | None = None,
    **attributes: Any,
) -> Step:
    """A step on the windows of an offer that a selector admitted.

    Args:
        trained: their positions in the offer; all in their order when None.
        loss: of these; ones when None.
        scores: of these; zeros when None.
        weights: of these; uniform when None.
        attributes: others of `Step`.
    """
    admitted = offer if trained is None else offer.take(trained)
    n = len(admitted)
    loss = torch.ones(n) if loss is None else loss
    return Step(
        index=index,
        offer=offer,
        trained=admitted,
        features=Features(hidden=torch.zeros(n, 2), loss=loss),
        scores=torch.zeros(n) if scores is None else scores,
        weights=torch.full((n,), 1 / n) if weights is None else weights,
        **({"loss": loss.mean().item()} | attributes),
    )
