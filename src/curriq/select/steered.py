"""The policy that is spent on the stream, before the forward pass."""

import math
from collections import deque
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.select.uniform import Uniform
from curriq.softq.temperature import Temperature
from curriq.types import Candidates, Critic, Features, Metrics, Outcome, State


class Steered(Uniform):
    """Says with what probability `SteeredStream` takes a window; what was taken is weighed evenly.

    The probability is min(1, exp((Q − c)/β)). β and the reference c, the greatest Q of late, follow from the
    windows that were taken as they came, which are a fair sample of the stream; so does the governor's
    judgement of Q.

    Args:
        critic: a critic whose inputs are known without a forward pass.
        temperature: gives β, and learns it from probes.
        memory: probes that c is the greatest Q of.
    """

    def __init__(self, critic: Critic, temperature: Temperature, memory: int = 8) -> None:
        self._critic = critic
        self._temperature = temperature
        self._recent: deque[Features] = deque(maxlen=memory)

    def probability(self, candidates: Candidates) -> Float[Tensor, "n"]:
        """Of being taken, for each window."""
        if not self._recent:
            return torch.ones(len(candidates))
        q = self._values([*self._recent, known_before(candidates)])
        here = len(candidates)
        return ((q[-here:] - q[:-here].max()) / self._temperature.beta).exp().clamp(max=1.0)

    def observe(self, step: int, outcome: Outcome) -> Metrics:
        beta = self._temperature.beta
        metrics = {"policy/beta": beta} if math.isfinite(beta) else {}
        effects, unselected = outcome.effects, outcome.candidates.unselected
        if effects is not None and unselected is not None:
            fair = unselected[effects.rows.cpu()].nonzero().squeeze(1)
            self._recent.append(known_before(outcome.candidates.take(effects.rows.cpu()[fair])))
            q = self._values(list(self._recent))
            rows = torch.arange(len(q) - len(fair), len(q))
            metrics |= self._temperature.observe(
                q, replace(effects, rows=rows, effect=effects.effect[fair.to(effects.effect.device)])
            )
        return metrics

    def _values(self, features: list[Features]) -> Float[Tensor, "n"]:
        q = self._critic.values(join(features))
        assert q is not None, "a stream is steered by a critic that has values"
        return q

    def state_dict(self) -> State:
        return {
            "temperature": self._temperature.state_dict(),
            "recent": [features.state_dict() for features in self._recent],
        }

    def load_state_dict(self, state: State) -> None:
        self._temperature.load_state_dict(state["temperature"])
        self._recent.clear()
        self._recent.extend(Features.from_state_dict(features, "cpu") for features in state["recent"])


def join(parts: list[Features]) -> Features:
    return Features(
        hidden=torch.cat([p.hidden for p in parts]),
        loss=torch.cat([p.loss for p in parts]),
        source=torch.cat([p.source for p in parts]),
        likeness=torch.cat([p.likeness for p in parts]) if parts[0].likeness is not None else None,
    )


def known_before(candidates: Candidates) -> Features:
    """What is known of windows that have not been forwarded."""
    n = len(candidates)
    return Features(
        hidden=torch.zeros(n, 0), loss=torch.full((n,), torch.nan), source=candidates.source, likeness=candidates.likeness
    )
