"""Credit assignment: which prediction of Q is held responsible for a step's reward.

The reward r_k follows from the whole mixture Σ π_i ℓ_i. The rules differ in the prediction q̂ that is
regressed onto the Bellman target y (Eq. 3).
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from curriq.types import Transition

QFunction = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n"]]


@runtime_checkable
class Credit(Protocol):
    """Rule that turns a finished transition into the prediction to regress onto its target."""

    def predict(
        self, previous: Transition, q_function: QFunction, action_hidden: Float[Tensor, "1 d"]
    ) -> Float[Tensor, ""]:
        """q̂ with gradient into Q's parameters (and into `action_hidden`, where that has one)."""
        ...


class SampledCredit:
    """The paper's rule: the sampled candidate answers for the step, q̂ = Q(h_a).

    Given that candidate a was drawn from a nearly uniform policy, the mixture's reward moves by only
    π_a of its own value, so Q recovers about 1/N of the true scale.
    """

    def predict(
        self, previous: Transition, q_function: QFunction, action_hidden: Float[Tensor, "1 d"]
    ) -> Float[Tensor, ""]:
        return q_function(action_hidden).squeeze(0)


class MixtureCredit:
    """The mixture answers for the step, q̂ = Σ w_i Q(h_i): what was trained on is what is rewarded.

    Recovers the full scale where rewards are linear in the mixture weights. Reads the stored hidden
    states of all candidates, so the action and `action_hidden` play no part.
    """

    def predict(
        self, previous: Transition, q_function: QFunction, action_hidden: Float[Tensor, "1 d"]
    ) -> Float[Tensor, ""]:
        return previous.weights @ q_function(previous.features.hidden)


CREDIT_RULES: dict[str, Credit] = {"sampled": SampledCredit(), "mixture": MixtureCredit()}
"""The values of `CriticConfig.credit`."""
