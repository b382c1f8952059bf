"""The paper's selector."""

from jaxtyping import Float
from torch import Tensor

from curriq.select.base import PlainSelector
from curriq.types import Candidates, Critic, Features


class SoftQ(PlainSelector):
    """Score q/β, so that the mixture weights are the Boltzmann policy of Eq. 6.

    Args:
        critic: a critic with values; its learning belongs to the loop, not to the selector.
        beta: β, nats per token.
    """

    def __init__(self, critic: Critic, beta: float) -> None:
        self._critic = critic
        self._beta = beta

    def scores(self, step: int, candidates: Candidates, features: Features) -> Float[Tensor, "n"]:
        q = self._critic.values(features)
        assert q is not None, "soft-q needs a critic that has values"
        return q / self._beta
