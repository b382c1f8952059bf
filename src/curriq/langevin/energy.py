"""Eq. 12: Q of K short strings of soft or hard tokens, and its gradient with respect to the embeddings."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

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


@runtime_checkable
class Energy(Protocol):
    """Q of strings, soft or hard."""

    def point(self, embeddings: Float[Tensor, "K L e"]) -> EnergyPoint:
        """Value and gradient at soft tokens."""
        ...

    def soft(self, embeddings: Float[Tensor, "K L e"]) -> Float[Tensor, "K"]:
        """Value alone at soft tokens."""
        ...

    def hard(self, tokens: Int[Tensor, "K L"]) -> Float[Tensor, "K"]:
        """Value of real tokens."""
        ...


class LanguageModelEnergy:
    """Q_φ on the trunk's hidden state of a string; θ and φ are frozen meanwhile.

    Args:
        lm: θ.
        inputs: its embeddings.
        q_function: Q_φ.
        parameters: φ; frozen together with θ.
        batch: strings per forward (and backward) pass.
    """

    def __init__(
        self,
        lm: LanguageModel,
        inputs: InputEmbeddings,
        q_function: QFunction,
        parameters: Sequence[nn.Parameter],
        batch: int,
    ) -> None:
        self._lm = lm
        self._inputs = inputs
        self._q_function = q_function
        self._parameters = [*lm.network.parameters(), *parameters]
        self._batch = batch

    def point(self, embeddings: Float[Tensor, "K L e"]) -> EnergyPoint:
        values, gradients, states = [], [], []
        with self._lm.without_dropout(), frozen(self._parameters), torch.enable_grad():
            for part in embeddings.split(self._batch):
                leaf = part.detach().requires_grad_()
                hidden = self._inputs.trunk(leaf)
                q = self._q_function(features_of(hidden))
                (gradient,) = torch.autograd.grad(q.sum(), leaf)
                values.append(q.detach())
                gradients.append(gradient)
                states.append(hidden.detach())
        return EnergyPoint(torch.cat(values), torch.cat(gradients), torch.cat(states))

    def soft(self, embeddings: Float[Tensor, "K L e"]) -> Float[Tensor, "K"]:
        return self._measured(self._inputs.trunk, embeddings)

    def hard(self, tokens: Int[Tensor, "K L"]) -> Float[Tensor, "K"]:
        return self._measured(self._lm.trunk, tokens)

    def _measured(self, trunk: Callable[[Tensor], Tensor], strings: Tensor) -> Float[Tensor, "K"]:
        with self._lm.measuring():
            return torch.cat([self._q_function(features_of(trunk(p))) for p in strings.split(self._batch)])


def features_of(hidden: Float[Tensor, "n L d"]) -> Features:
    """What the Q-network reads, made of the trunk's hidden states as in training.

    Soft tokens have no next token and so no loss: it is NaN, so that a Q-network which reads it says so.
    """
    last, pooled = last_and_pooled(hidden)
    return Features(hidden=last, pooled=pooled, loss=torch.full_like(last[:, 0], torch.nan))
