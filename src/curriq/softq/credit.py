"""Credit assignment: which predictions of Q are held responsible for a step, and for what.

The reward r_k follows from the whole mixture Σ w_i ℓ_i. A rule turns a finished transition into a regression:
some windows, how their Q-values combine into predictions q̂, and what is added to the Bellman target y (Eq. 3)
for each of them. The critic then descends the mean of ½ (q̂ − (y + offset))².
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.types import Transition


@dataclass(frozen=True, kw_only=True)
class Regression:
    """What one transition asks of Q.

    Attributes:
        rows: windows of the transition whose Q-values enter.
        combine: q̂ = combine @ Q(rows); None for the identity, one prediction per window.
        offsets: added to y, one per prediction, nats per token.
    """

    rows: Int[Tensor, "m"]
    combine: Float[Tensor, "r m"] | None
    offsets: Float[Tensor, "r"]


@runtime_checkable
class Credit(Protocol):
    """A rule of credit assignment.

    Attributes:
        by_window: each prediction is the Q of one window, so that (window, target) pairs can be replayed.
    """

    by_window: bool

    def regression(self, previous: Transition) -> Regression | None:
        """None where the transition teaches nothing under this rule."""
        ...


class SampledCredit:
    """The paper's rule: the sampled candidate answers for the step, q̂ = Q(h_a).

    Given that candidate a was drawn from a nearly uniform policy, the mixture's reward moves by only
    π_a of its own value, so Q recovers about 1/N of the true scale.
    """

    by_window = True

    def regression(self, previous: Transition) -> Regression:
        device = previous.weights.device
        return Regression(
            rows=torch.tensor([previous.action], device=device),
            combine=None,
            offsets=previous.weights.new_zeros(1),
        )


class MixtureCredit:
    """The mixture answers for the step, q̂ = Σ w_i Q(h_i): what was trained on is what is rewarded.

    Recovers the full scale where rewards are linear in the mixture weights, as long as the weights vary
    (`--weight-jitter`). Reads the stored features of all candidates; the action plays no part.
    """

    by_window = False

    def regression(self, previous: Transition) -> Regression:
        weights = previous.weights
        return Regression(
            rows=torch.arange(len(weights), device=weights.device),
            combine=weights[None],
            offsets=weights.new_zeros(1),
        )


class CounterfactualCredit:
    """Every probed window answers for itself: y_i = y + e_i − Σ w_j e_j.

    Had the step been taken on window i alone, its reward would have been r_k plus the window's own effect
    minus the mixture's, to first order (`lm/effects.py`). The effect on the *level* of the held-out
    log-probability lasts, so it reaches the normalised return in full: its share (1 − γ) now, and γ through
    every later level, sum to 1. Transitions without measured effects teach nothing.
    """

    by_window = True

    def regression(self, previous: Transition) -> Regression | None:
        effects = previous.effects
        if effects is None:
            return None
        return Regression(rows=effects.rows, combine=None, offsets=effects.effect - effects.mixture)


CREDIT_RULES: dict[str, Credit] = {
    "sampled": SampledCredit(),
    "mixture": MixtureCredit(),
    "counterfactual": CounterfactualCredit(),
}
"""The values of `CriticConfig.credit`."""
