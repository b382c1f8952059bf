"""Competence-based curriculum learning (Platanios et al. 2019, "Competence-based Curriculum Learning
for Neural Machine Translation")."""

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.errors import CurriqError
from curriq.select.base import Uniform
from curriq.select.history import History
from curriq.types import Candidates, Metrics, Outcome, State, Stateful


@runtime_checkable
class Difficulty(Stateful, Protocol):
    """Called once per step, on all its candidates, because it may learn from them."""

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]: ...


class _Stateless:
    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        assert not state, f"{type(self).__name__} has no state, but was given {sorted(state)}"


class LabelDifficulty(_Stateless):
    """The label that came with the data; a window without one counts as harder than all that have one.

    Raises:
        CurriqError: no source has labels.
    """

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]:
        if candidates.difficulty is None:
            raise CurriqError(
                "--difficulty label: no source has difficulty labels. Name their column with "
                "difficulty_field=…, or use --difficulty rarity or length."
            )
        label = candidates.difficulty.cpu().double()
        return label.masked_fill(label.isnan(), torch.inf)


class LengthDifficulty(_Stateless):
    """Minus the characters of the window.

    Windows have a constant number of *tokens*. A tokenizer spells frequent text with few long tokens
    and rare text (names, numbers, noise) with many short ones, so fewer characters mean harder text.

    Args:
        token_characters: characters of each token of the vocabulary, see `token_characters`.
    """

    def __init__(self, token_characters: Int[Tensor, "V"]) -> None:
        self._characters = token_characters.cpu()

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]:
        return -self._characters[candidates.tokens.cpu()].sum(1).double()


def token_characters(decode: Callable[[list[int]], str], vocab_size: int) -> Int[Tensor, "V"]:
    """Characters that each token alone decodes to, for `LengthDifficulty`."""
    return torch.tensor([len(decode([token])) for token in range(vocab_size)])


class RarityDifficulty:
    """Mean −log unigram probability of the window's tokens, nats per token.

    Probabilities are add-one estimates from all candidates seen so far, this step's among them
    (rarity after Platanios et al. 2019, which sums over a sentence; windows have one length).

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self._counts = torch.zeros(vocab_size, dtype=torch.int64)

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]:
        tokens = candidates.tokens.cpu()
        self._counts += torch.bincount(tokens.flatten(), minlength=self._counts.shape[0])
        smoothed = self._counts.double() + 1
        surprise = smoothed.sum().log() - smoothed.log()
        return surprise[tokens].mean(1)

    def state_dict(self) -> State:
        return {"counts": self._counts.clone()}

    def load_state_dict(self, state: State) -> None:
        self._counts = state["counts"].clone()


class LabelOrRarity:
    """The label where the stream has labels, otherwise unigram rarity; one or the other for a whole run.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self._label = LabelDifficulty()
        self._rarity = RarityDifficulty(vocab_size)

    def __call__(self, candidates: Candidates) -> Float[Tensor, "n"]:
        return (self._rarity if candidates.difficulty is None else self._label)(candidates)

    def state_dict(self) -> State:
        return self._rarity.state_dict()

    def load_state_dict(self, state: State) -> None:
        self._rarity.load_state_dict(state)


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
