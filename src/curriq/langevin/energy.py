"""Eq. 12: Q of strings of soft or hard tokens, its gradient with respect to the embeddings, its inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from curriq.lm.embeddings import InputEmbeddings, frozen
from curriq.lm.mixture import last_and_pooled
from curriq.lm.model import LanguageModel
from curriq.types import Features

QFunction = Callable[[Features], Float[Tensor, "n"]]
"""Q_φ of some windows, with a gradient into their features."""

Encode = Callable[[Int[Tensor, "n T"]], Float[np.ndarray, "n e"]]
"""Float32 embeddings of token strings of one length, windows or queries."""


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
    """Q_φ of soft and of hard strings, through the trunk, with θ and φ (`parameters`) frozen; `batch` strings
    per forward and backward pass."""

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


def hidden_state_vectors(
    lm: LanguageModel,
    inputs: Callable[[Features], Float[Tensor, "n w"]],
    batch: int,
    tokens: Int[Tensor, "n T"],
) -> Float[np.ndarray, "n w"]:
    """The Q-network's own input (`QInputs`) for each string at the present θ, scaled to length 1.

    Where Q is linear, Q = w·x + b, and its inputs have one length (`--q-layer-norm`), the inner product with
    the direction w orders windows as Q does: the best query retrieves exactly the windows of greatest Q.
    """
    with lm.measuring():
        vectors = [
            F.normalize(inputs(features_of(lm.trunk(part))), dim=1).float().cpu()
            for part in tokens.to(lm.device).split(batch)
        ]
    return torch.cat(vectors).numpy()
