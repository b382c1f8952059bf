"""A bandit over sources (EXP3, after Graves et al. 2017, "Automated Curriculum Learning for Neural
Networks")."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curriq.config import RunConfig
from curriq.select.base import Context, History, Method, Uniform, plain
from curriq.softq.equations import sample_action
from curriq.types import Metrics, Offer, Step


class SourceBandit(Uniform):
    """Draws one source per step and trains uniformly on its candidates.

    EXP3 (Auer et al. 2002): the policy is p = (1 − ε) softmax(w) + ε/S over the S sources that the
    candidates come from, and the drawn source's log-weight gains η g/p. The gain g is the
    reward's improvement r_k − r_{k−1}, mapped linearly so that the 20 % and 80 % quantiles of past
    improvements become −1 and +1, and clipped there (Graves et al. 2017, Section 4.1). Deviations from
    Graves et al.: EXP3 without their fixed-share term, and the loop's own reward as the progress signal.

    Args:
        source_names: names of the run's sources, in the order of `Windows.source`.
        exploration: ε in [0, 1].
        learning_rate: η.
        generator: CPU generator of the draws.
        history: improvements remembered for the quantiles.
    """

    needs_reward = True
    SAVED = (
        "_log_weights",
        "_offered",
        "_improvements",
        "_last_reward",
        "_drawn",
        "_drawn_probability",
        "_generator",
    )

    def __init__(
        self,
        source_names: Sequence[str],
        exploration: float,
        learning_rate: float,
        generator: torch.Generator,
        history: int = 1000,
    ) -> None:
        self._names = list(source_names)
        self._exploration = exploration
        self._learning_rate = learning_rate
        self._generator = generator
        self._log_weights = torch.zeros(len(self._names), dtype=torch.float64)
        self._offered = torch.zeros(len(self._names), dtype=torch.bool)  # a pure target never is
        self._improvements = History(history)
        self._last_reward: float | None = None
        self._drawn = 0
        self._drawn_probability = 1.0

    def policy(self, present: Bool[Tensor, "S"]) -> Float[Tensor, "S"]:
        """p over all sources; the absent ones get probability 0."""
        exploit = self._log_weights.masked_fill(~present, -torch.inf).softmax(0)
        explore = present.double() / present.sum()
        return (1 - self._exploration) * exploit + self._exploration * explore

    def admit(self, step: int, offer: Offer) -> Offer:
        source = offer.windows.source.cpu()
        present = torch.bincount(source, minlength=len(self._names)) > 0
        self._offered |= present
        policy = self.policy(present)
        self._drawn = sample_action(policy, self._generator)
        self._drawn_probability = policy[self._drawn].item()
        return offer.take((source == self._drawn).nonzero().squeeze(1))

    def observe(self, step: Step) -> Metrics:
        assert step.reward is not None, "needs_reward is set, but the step has no reward"
        metrics: Metrics = {}
        if self._last_reward is not None:
            gain = self._rescaled(step.reward - self._last_reward)
            self._log_weights[self._drawn] += self._learning_rate * gain / self._drawn_probability
            metrics["bandit/gain"] = gain
        self._last_reward = step.reward
        for name, probability in zip(self._names, self.policy(self._offered).tolist(), strict=True):
            metrics[f"bandit/p_{name}"] = probability
        return metrics

    def _rescaled(self, improvement: float) -> float:
        """The improvement on the scale of the past ones, in [−1, 1]; 0 while they have no spread."""
        self._improvements.extend(torch.tensor([improvement], dtype=torch.float64))
        levels = torch.tensor([0.2, 0.8], dtype=torch.float64)
        low, high = self._improvements.values.quantile(levels).tolist()
        if high == low:
            return 0.0
        return min(1.0, max(-1.0, 2 * (improvement - low) / (high - low) - 1))


def build(config: RunConfig, context: Context) -> Method:
    select, generator = config.select, context.generators("bandit")
    names = context.corpus.source_names
    return plain(SourceBandit(names, select.bandit_exploration, select.bandit_lr, generator), config, context)
