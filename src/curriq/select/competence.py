"""Competence-based curriculum learning (Platanios et al. 2019, "Competence-based Curriculum Learning
for Neural Machine Translation")."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.select.difficulty import Difficulty
from curriq.select.history import History
from curriq.select.uniform import Uniform
from curriq.types import Candidates, Metrics, Outcome, State


def root_competence(step: int, total_steps: int, initial: float) -> float:
    """c(t) = min(1, √(t (1 − c0²)/T + c0²)), the square-root schedule of Platanios et al. 2019."""
    return min(1.0, math.sqrt(step * (1 - initial**2) / total_steps + initial**2))


class Competence(Uniform):
    """Trains uniformly on the candidates that are among the easiest share c(t) of the windows seen lately.

    A window is open when the share of seen windows that are strictly easier is below c(t). Without ties
    this is the paper's rule "empirical CDF ≤ c(t)"; with ties (labels of a few classes) it keeps the
    easiest class open from the start. At c = 1 every window is open. Where none is open, the easiest
    one is kept.

    Args:
        difficulty: higher is harder.
        total_steps: T, the step at which every window is open.
        initial: c0 in (0, 1], the share that is open at step 0.
        history: windows whose difficulty is remembered for the ranks.
    """

    def __init__(self, difficulty: Difficulty, total_steps: int, initial: float, history: int = 8192) -> None:
        assert total_steps >= 1
        assert 0 < initial <= 1
        self._difficulty = difficulty
        self._total_steps = total_steps
        self._initial = initial
        self._seen = History(history)

    def narrow(self, step: int, candidates: Candidates) -> Candidates:
        difficulty = self._difficulty(candidates)
        self._seen.extend(difficulty)
        is_open = self._easier_share(difficulty) < self._level(step)
        is_open[difficulty.argmin()] = True
        return candidates.take(is_open.nonzero().squeeze(1))

    def _easier_share(self, difficulty: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        ordered = self._seen.values.sort().values
        return torch.searchsorted(ordered, difficulty) / ordered.shape[0]

    def _level(self, step: int) -> float:
        return root_competence(step, self._total_steps, self._initial)

    def observe(self, step: int, outcome: Outcome) -> Metrics:
        return {"competence/level": self._level(step)}

    def state_dict(self) -> State:
        return {"difficulty": self._difficulty.state_dict(), "seen": self._seen.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self._difficulty.load_state_dict(state["difficulty"])
        self._seen.load_state_dict(state["seen"])
