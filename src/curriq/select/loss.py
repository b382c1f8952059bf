"""Selectors that read the model's own uncertainty: loss, predictive entropy, excess loss."""

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from curriq.select.base import PlainSelector
from curriq.types import Candidates, Features

ReferenceLoss = Callable[[Int[Tensor, "n T"]], Float[Tensor, "n"]]
"""Tokens to mean next-token loss of each window under the reference model, nats per token."""


class ByLoss(PlainSelector):
    """Score ±ℓ/temperature: high loss first (sign +1), or low loss first (sign −1).

    Args:
        temperature: nats per token; towards 0 the extreme window gets all the weight.
        sign: +1 or −1.
    """

    def __init__(self, temperature: float, sign: Literal[1, -1]) -> None:
        self._scale = sign / temperature

    def scores(self, step: int, candidates: Candidates, features: Features) -> Float[Tensor, "n"]:
        return features.loss * self._scale


class Uncertainty(PlainSelector):
    """Score H/temperature, where H is the mean predictive entropy of the window's tokens.

    Args:
        temperature: nats per token.
    """

    needs_entropy = True

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def scores(self, step: int, candidates: Candidates, features: Features) -> Float[Tensor, "n"]:
        assert features.entropy is not None, "needs_entropy is set, but the features have no entropy"
        return features.entropy / self._temperature


class ExcessLoss(PlainSelector):
    """Score (ℓ_θ − ℓ_ref)/temperature: windows that are learnable but not yet learnt.

    The reducible held-out loss of Mindermann et al. 2022, "Prioritized Training on Points that are
    Learnable, Worth Learning, and Not Yet Learnt" (RHO-LOSS). Noise has a high loss under both models
    and cancels.

    Args:
        reference: losses under a frozen model of the target text.
        temperature: nats per token.
    """

    def __init__(self, reference: ReferenceLoss, temperature: float) -> None:
        self._reference = reference
        self._temperature = temperature

    def scores(self, step: int, candidates: Candidates, features: Features) -> Float[Tensor, "n"]:
        irreducible = self._reference(candidates.tokens).to(features.loss.device)
        return (features.loss - irreducible) / self._temperature
