"""The paper's selector."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.select.base import PlainSelector
from curriq.softq.temperature import Temperature
from curriq.types import Candidates, Critic, Features, Metrics, Outcome, Selector, State


class SoftQ(PlainSelector):
    """Score q/β, so that the mixture weights are the Boltzmann policy of Eq. 6.

    Args:
        critic: a critic with values; its learning belongs to the loop, not to the selector.
        temperature: gives β, and learns it from what the steps show.
        uniform_share: ε; about this share of the weight is spread evenly over all windows. The weights of a
            step are known one micro-batch at a time, so the even share is ε/(1 − ε) times the mean of
            exp(q/β) in the step before.
    """

    def __init__(self, critic: Critic, temperature: Temperature, uniform_share: float = 0.0) -> None:
        self._critic = critic
        self._temperature = temperature
        self._log_odds = math.log(uniform_share / (1 - uniform_share)) if uniform_share else -math.inf
        self._floor = -math.inf

    def scores(self, step: int, candidates: Candidates, features: Features) -> Float[Tensor, "n"]:
        q = self._critic.values(features)
        assert q is not None, "soft-q needs a critic that has values"
        scores = q / self._temperature.beta
        return scores if self._floor == -math.inf else torch.logaddexp(scores, scores.new_tensor(self._floor))

    def observe(self, step: int, outcome: Outcome) -> Metrics:
        """The temperature learns from Q as it was in this step, before it has learnt from the effects."""
        assert outcome.q is not None, "soft-q needs a critic that has values"
        beta = self._temperature.beta
        metrics = self._temperature.observe(outcome.q, outcome.effects)
        if self._log_odds > -math.inf:
            scores = outcome.q.double() / self._temperature.beta
            mean = torch.logsumexp(scores, 0).item() - math.log(len(scores))
            self._floor = mean + self._log_odds
        return ({"policy/beta": beta} if math.isfinite(beta) else {}) | metrics

    def state_dict(self) -> State:
        return {"temperature": self._temperature.state_dict(), "floor": self._floor}

    def load_state_dict(self, state: State) -> None:
        self._temperature.load_state_dict(state["temperature"])
        self._floor = state["floor"]


class DirichletNoise:
    """`inner` with weights that vary at random: π̃_i ∝ π_i g_i with g_i ~ Gamma(c)/c, independent.

    With uniform weights π̃ is a draw from the symmetric Dirichlet distribution of concentration c. Mixture
    credit needs such variation: under a policy that hardly varies there is nothing to regress on.

    Args:
        inner: the selector.
        concentration: c; the effective batch fraction is about c/(1 + c) of the inner one's.
        generator: CPU generator of the draws.
    """

    def __init__(self, inner: Selector, concentration: float, generator: torch.Generator) -> None:
        self._inner = inner
        self._concentration = concentration
        self._generator = generator
        self._noise = torch.zeros(0)
        self.needs_entropy = inner.needs_entropy
        self.needs_reward = inner.needs_reward

    def narrow(self, step: int, candidates: Candidates) -> Candidates:
        shape = torch.full((int(candidates.rows.max()) + 1,), self._concentration)
        gamma = torch._standard_gamma(shape, generator=self._generator)
        self._noise = torch.log(gamma.clamp(min=1e-30) / self._concentration)
        return self._inner.narrow(step, candidates)

    def scores(self, step: int, candidates: Candidates, features: Features) -> Float[Tensor, "n"]:
        scores = self._inner.scores(step, candidates, features)
        return scores + self._noise[candidates.rows].to(scores)

    def observe(self, step: int, outcome: Outcome) -> Metrics:
        return self._inner.observe(step, outcome)

    def state_dict(self) -> State:
        return {"inner": self._inner.state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        self._inner.load_state_dict(state["inner"])
        self._generator.set_state(state["generator"])
