"""The trivial half of the Selector protocol."""

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.types import Candidates, Features, Metrics, Outcome, Selector, State


class PlainSelector:
    """Keeps all candidates, learns nothing and has no state; a subclass adds `scores`."""

    needs_entropy: bool = False
    needs_reward: bool = False

    def narrow(self, step: int, candidates: Candidates) -> Candidates:
        return candidates

    def observe(self, step: int, outcome: Outcome) -> Metrics:
        return {}

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        assert not state, f"{type(self).__name__} has no state, but was given {sorted(state)}"


class Uniform(PlainSelector):
    """π_i = 1/N (Eqs. 9–10)."""

    def scores(self, step: int, candidates: Candidates, features: Features) -> Float[Tensor, "n"]:
        return torch.zeros_like(features.loss)


class RandomK(Uniform):
    """Trains uniformly on k random candidates of each step; `random-single` is k = 1.

    Args:
        k: windows kept per step; all of them where fewer are proposed.
        generator: CPU generator of the draws.
    """

    def __init__(self, k: int, generator: torch.Generator) -> None:
        assert k >= 1
        self._k = k
        self._generator = generator

    def narrow(self, step: int, candidates: Candidates) -> Candidates:
        shuffled = torch.randperm(len(candidates), generator=self._generator)
        return candidates.take(shuffled[: self._k].sort().values)

    def state_dict(self) -> State:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        self._generator.set_state(state["generator"])


class UniformUntil:
    """Uniform over all candidates before `step`, then `inner`; the mixture of Q warm-up.

    Until then `inner` is not asked and does not learn.

    Args:
        inner: the selector that takes over.
        step: first step of `inner`.
    """

    def __init__(self, inner: Selector, step: int) -> None:
        self._inner = inner
        self._start = step
        self._warm_up = Uniform()
        self.needs_entropy = inner.needs_entropy
        self.needs_reward = inner.needs_reward

    def _active(self, step: int) -> Selector:
        return self._warm_up if step < self._start else self._inner

    def narrow(self, step: int, candidates: Candidates) -> Candidates:
        return self._active(step).narrow(step, candidates)

    def scores(self, step: int, candidates: Candidates, features: Features) -> Float[Tensor, "n"]:
        return self._active(step).scores(step, candidates, features)

    def observe(self, step: int, outcome: Outcome) -> Metrics:
        return self._active(step).observe(step, outcome)

    def state_dict(self) -> State:
        return self._inner.state_dict()

    def load_state_dict(self, state: State) -> None:
        self._inner.load_state_dict(state)
