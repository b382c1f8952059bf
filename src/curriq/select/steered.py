"""The policy that is spent on the stream, before the forward pass."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.select.uniform import Uniform
from curriq.softq.temperature import Acceptance, Temperature, solve_beta
from curriq.types import Candidates, Critic, Features, Metrics, Outcome, State, join_features


class Steered(Uniform):
    """Says with what probability `SteeredStream` takes a window; what was taken is weighed evenly.

    The probability is min(1, exp((Q − c)/β)). The windows that were taken as they came are a fair sample of
    the stream: on these β is solved and c told, and the governor judges Q by them alone.

    Whatever the temperature says, β is at least so great that of windows like the target's own the share
    `keep` would be taken. Among these the policy must not choose much: training on the target's own
    distribution is what all selection aims at, and where the stream has it already, to prefer a part of it is
    to lose the rest. Their Q is that of the source which is worth most, so that the target need not be one of
    the stream's.

    Args:
        critic: a critic whose inputs are known without a forward pass.
        temperature: gives β, and learns it from probes.
        acceptance: the probability.
        target: likeness of the target's own windows [D] at this time; None where likeness is not measured,
            and β is the temperature's.
        keep: share of these that must be taken, in [0, 1).
        memory: probes whose fair windows are remembered.
    """

    def __init__(
        self,
        critic: Critic,
        temperature: Temperature,
        acceptance: Acceptance,
        *,
        target: Callable[[], Float[Tensor, "D"]] | None = None,
        keep: float = 0.0,
        memory: int = 8,
    ) -> None:
        self._critic = critic
        self._temperature = temperature
        self.acceptance = acceptance
        self._target = target
        self._keep = keep
        self._least = 0.0
        self._fair: deque[Features] = deque(maxlen=memory)

    @property
    def beta(self) -> float:
        """β of the next draws, nats per token; ∞ takes everything."""
        return max(self._temperature.beta, self._least)

    def probability(self, candidates: Candidates) -> Float[Tensor, "n"]:
        """Of being taken, for each of some windows of the stream."""
        beta = self.beta
        if not self._fair or beta == math.inf:
            return torch.ones(len(candidates))
        # Q of the fair windows anew: φ has moved since they were probed.
        q = self._values([*self._fair, known_before(candidates)])
        ours, fair = q[-len(candidates) :], q[: -len(candidates)]
        # β can be far below the level of Q: differences first, or they would be lost to rounding.
        level = fair.mean()
        return self.acceptance.chance((ours - level) / beta, (fair - level) / beta)

    def observe(self, step: int, outcome: Outcome) -> Metrics:
        """The temperature learns from the fair windows that were probed; Q has not learnt from them yet."""
        beta = self.beta
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
            rows=torch.arange(len(q) - len(fair), len(q)),
            effect=effects.effect.cpu()[fair],
        )
        metrics |= self._temperature.observe(q, own)
        return metrics if self._target is None else metrics | self._keep_target(self._target(), q)

    def _keep_target(self, likeness: Float[Tensor, "D"], fair: Float[Tensor, "m"]) -> Metrics:
        """Set the least β, and say which share of the target's own windows the next draws would take."""
        sources = torch.cat([features.source for features in self._fair if features.source is not None])
        of_target = self._values(
            [_known(source.expand(len(likeness)), likeness) for source in sources.unique()]
        )
        by_source = of_target.view(-1, len(likeness))
        best = by_source[by_source.mean(1).argmax()]
        q, m = torch.cat([fair, best]).double(), len(fair)

        def taken(z: Float[Tensor, "b n"]) -> Float[Tensor, "b"]:
            return self.acceptance.chance(z[:, m:], z[:, :m]).mean(1)

        q = q - q[:m].mean()
        self._least = (solve_beta(q, self._keep, taken) or 0.0) if self._keep else 0.0
        return {"policy/target_kept": taken(q[None] / self.beta).item()}

    def _values(self, features: list[Features]) -> Float[Tensor, "n"]:
        """On the CPU, where the stream is, and where β is solved in many small operations."""
        q = self._critic.values(join_features(features))
        assert q is not None, "a stream is steered by a critic that has values"
        return q.cpu()

    def state_dict(self) -> State:
        return {
            "temperature": self._temperature.state_dict(),
            "least": self._least,
            "fair": [features.state_dict() for features in self._fair],
        }

    def load_state_dict(self, state: State) -> None:
        self._temperature.load_state_dict(state["temperature"])
        self._least = state["least"]
        self._fair.clear()
        self._fair.extend(Features.from_state_dict(features, "cpu") for features in state["fair"])


def known_before(candidates: Candidates) -> Features:
    """What is known of windows without a forward pass: no hidden state [n, 0], and no loss (NaN)."""
    return _known(candidates.source, candidates.likeness)


def _known(source: Int[Tensor, "n"], likeness: Float[Tensor, "n"] | None) -> Features:
    n = len(source)
    return Features(
        hidden=torch.zeros(n, 0), loss=torch.full((n,), torch.nan), source=source, likeness=likeness
    )
