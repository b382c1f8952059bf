"""The policy that is spent on the stream, before the forward pass."""

import math
from collections import deque
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.select.uniform import Uniform
from curriq.softq.temperature import Acceptance, Temperature
from curriq.types import Candidates, Critic, Features, Metrics, Outcome, State, join_features


class Steered(Uniform):
    """Says with what probability `SteeredStream` takes a window; what was taken is weighed evenly.

    The probability is min(1, exp((Q − c)/β)). The windows that were taken as they came are a fair sample of
    the stream: on these β is solved and c told, and the governor judges Q by them alone.

    Args:
        critic: a critic whose inputs are known without a forward pass.
        temperature: gives β, and learns it from probes.
        acceptance: the probability.
        memory: probes whose fair windows are remembered.
    """

    def __init__(
        self, critic: Critic, temperature: Temperature, acceptance: Acceptance, memory: int = 8
    ) -> None:
        self._critic = critic
        self._temperature = temperature
        self.acceptance = acceptance
        self._fair: deque[Features] = deque(maxlen=memory)

    def probability(self, candidates: Candidates) -> Float[Tensor, "n"]:
        """Of being taken, for each of some windows of the stream."""
        beta = self._temperature.beta
        if not self._fair or beta == math.inf:
            return torch.ones(len(candidates))
        # Q of the fair windows anew: φ has moved since they were probed.
        q = self._values([*self._fair, known_before(candidates)]).cpu()
        ours, fair = q[-len(candidates) :], q[: -len(candidates)]
        # β can be far below the level of Q: differences first, or they would be lost to rounding.
        level = fair.mean()
        return self.acceptance.chance((ours - level) / beta, (fair - level) / beta)

    def observe(self, step: int, outcome: Outcome) -> Metrics:
        """The temperature learns from the fair windows that were probed; Q has not learnt from them yet."""
        beta = self._temperature.beta
        metrics = {"policy/beta": beta} if math.isfinite(beta) else {}
        effects, unselected = outcome.effects, outcome.candidates.unselected
        if effects is None or unselected is None:
            return metrics
        rows = effects.rows.cpu()
        fair = unselected[rows].nonzero().squeeze(1)
        self._fair.append(known_before(outcome.candidates.take(rows[fair])))
        q = self._values(list(self._fair))
        own = replace(
            effects,
            rows=torch.arange(len(q) - len(fair), len(q), device=q.device),
            effect=effects.effect[fair.to(effects.effect.device)],
        )
        return metrics | self._temperature.observe(q, own)

    def _values(self, features: list[Features]) -> Float[Tensor, "n"]:
        q = self._critic.values(join_features(features))
        assert q is not None, "a stream is steered by a critic that has values"
        return q

    def state_dict(self) -> State:
        return {
            "temperature": self._temperature.state_dict(),
            "fair": [features.state_dict() for features in self._fair],
        }

    def load_state_dict(self, state: State) -> None:
        self._temperature.load_state_dict(state["temperature"])
        self._fair.clear()
        self._fair.extend(Features.from_state_dict(features, "cpu") for features in state["fair"])


def known_before(candidates: Candidates) -> Features:
    """What is known of windows without a forward pass: no hidden state [n, 0], and no loss (NaN)."""
    n = len(candidates)
    return Features(
        hidden=torch.zeros(n, 0),
        loss=torch.full((n,), torch.nan),
        source=candidates.source,
        likeness=candidates.likeness,
    )
