"""Eq. 12: Q of K short strings of soft or hard tokens, and its gradient with respect to the embeddings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curriq.lm.embeddings import InputEmbeddings, frozen
from curriq.lm.mixture import last_and_pooled
from curriq.lm.model import LanguageModel
from curriq.types import Features

QFunction = Callable[[Features], Float[Tensor, "n"]]
"""Q_φ of some windows, with a gradient into their features."""


class EnergyPoint(NamedTuple):
    """Q at some soft tokens.

    Attributes:
        q: Q_φ of each chain, nats per token; the energy of Eq. 12 is q/τ_sgld.
        gradient: ∂(Σ q)/∂ẽ. Chains do not see each other, so each row is the gradient of its own q.
        hidden: last hidden states, detached.
    """

    q: Float[Tensor, "K"]
    gradient: Float[Tensor, "K L e"]
    hidden: Float[Tensor, "K L d"]


@dataclass(frozen=True)
class Energy:
    """Q_φ of soft and of hard strings, through the trunk, with θ and φ frozen.

    Attributes:
        lm: θ.
        inputs: its embeddings.
        q_function: Q_φ.
        parameters: φ.
        batch: strings per forward (and backward) pass.
    """

    lm: LanguageModel
    inputs: InputEmbeddings
    q_function: QFunction
    parameters: Sequence[nn.Parameter]
    batch: int

    def point(self, embeddings: Float[Tensor, "K L e"]) -> EnergyPoint:
        """Value and gradient at soft tokens."""
        points, parameters = [], [*self.lm.network.parameters(), *self.parameters]
        with self.lm.without_dropout(), frozen(parameters), torch.enable_grad():
            for part in embeddings.split(self.batch):
                leaf = part.detach().requires_grad_()
                hidden = self.inputs.trunk(leaf)
                q = self.q_function(features_of(hidden))
                (gradient,) = torch.autograd.grad(q.sum(), leaf)
                points.append((q.detach(), gradient, hidden.detach()))
        return EnergyPoint(*map(torch.cat, zip(*points, strict=True)))

    def soft(self, embeddings: Float[Tensor, "K L e"]) -> Float[Tensor, "K"]:
        """Value alone at soft tokens."""
        return self._values(self.inputs.trunk, embeddings)

    def hard(self, tokens: Int[Tensor, "K L"]) -> Float[Tensor, "K"]:
        """Value of real tokens."""
        return self._values(self.lm.trunk, tokens.to(self.lm.device))

    def _values(self, trunk: Callable[[Tensor], Tensor], strings: Tensor) -> Float[Tensor, "K"]:
        with self.lm.measuring():
            return torch.cat([self.q_function(features_of(trunk(p))) for p in strings.split(self.batch)])


def features_of(hidden: Float[Tensor, "n L d"]) -> Features:
    """Features for the Q-network, made of the trunk's hidden states as in training.

    Soft tokens have no next token and so no loss: it is NaN, so that a Q-network that reads it returns NaN.
    """
    last, pooled = last_and_pooled(hidden)
    return Features(hidden=last, pooled=pooled, loss=torch.full_like(last[:, 0], torch.nan))
