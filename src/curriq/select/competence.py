"""Competence-based curriculum learning (Platanios et al. 2019, "Competence-based Curriculum Learning
for Neural Machine Translation")."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import RunConfig
from curriq.errors import CurriqError
from curriq.select.base import Context, History, Method, Uniform, plain
from curriq.state import Saved
from curriq.types import Metrics, Offer, Reading, Stateful, Step, Windows


@runtime_checkable
class Difficulty(Stateful, Protocol):
    """Called once per step, on all its candidates, because it may learn from them."""

    def __call__(self, windows: Windows) -> Float[Tensor, "n"]: ...


class LabelDifficulty(Saved):
    """The label that came with the data; a window without one counts as harder than all that have one.

    Raises:
        CurriqError: no source has labels.
    """

    def __call__(self, windows: Windows) -> Float[Tensor, "n"]:
        if windows.difficulty is None:
            raise CurriqError(
                "--difficulty label: no source has difficulty labels. Name their column with "
                "difficulty_field=…, or use --difficulty rarity or length."
            )
        label = windows.difficulty.cpu().double()
        return label.masked_fill(label.isnan(), torch.inf)


@dataclass(eq=False)
class LengthDifficulty(Saved):
    """Minus the characters of the window.

    Windows have a constant number of *tokens*. A tokenizer spells frequent text with few long tokens
    and rare text (names, numbers, noise) with many short ones, so fewer characters mean harder text.
    """

    token_characters: Int[Tensor, "V"]

    def __call__(self, windows: Windows) -> Float[Tensor, "n"]:
        return -self.token_characters[windows.tokens.cpu()].sum(1).double()


def token_characters(decode: Callable[[list[int]], str], vocab_size: int) -> Int[Tensor, "V"]:
    """Characters that each token alone decodes to, for `LengthDifficulty`."""
    return torch.tensor([len(decode([token])) for token in range(vocab_size)])


class RarityDifficulty(Saved):
    """Mean −log unigram probability of the window's tokens, nats per token.

    Probabilities are add-one estimates from all candidates seen so far, this step's among them
    (rarity after Platanios et al. 2019, which sums over a sentence; windows have one length).
    """

    SAVED = ("_counts",)

    def __init__(self, vocab_size: int) -> None:
        self._counts = torch.zeros(vocab_size, dtype=torch.int64)

    def __call__(self, windows: Windows) -> Float[Tensor, "n"]:
        tokens = windows.tokens.cpu()
        self._counts += torch.bincount(tokens.flatten(), minlength=self._counts.shape[0])
        smoothed = self._counts.double() + 1
        surprise = smoothed.sum().log() - smoothed.log()
        return surprise[tokens].mean(1)


class LabelOrRarity(Saved):
    """The label where the stream has labels, otherwise unigram rarity; one or the other for a whole run."""

    SAVED = ("_rarity",)

    def __init__(self, vocab_size: int) -> None:
        self._label = LabelDifficulty()
        self._rarity = RarityDifficulty(vocab_size)

    def __call__(self, windows: Windows) -> Float[Tensor, "n"]:
        return (self._rarity if windows.difficulty is None else self._label)(windows)


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

    SAVED = ("_difficulty", "_seen")
    readings = (Reading("open", "competence/level", "{:.0%}"),)

    def __init__(self, difficulty: Difficulty, total_steps: int, initial: float, history: int = 8192) -> None:
        assert total_steps >= 1
        assert 0 < initial <= 1
        self._difficulty = difficulty
        self._total_steps = total_steps
        self._initial = initial
        self._seen = History(history)

    def admit(self, step: int, offer: Offer) -> Offer:
        difficulty = self._difficulty(offer.windows)
        self._seen.extend(difficulty)
        ordered = self._seen.values.sort().values
        easier_share = torch.searchsorted(ordered, difficulty) / ordered.shape[0]
        is_open = easier_share < self._level(step)
        is_open[difficulty.argmin()] = True
        return offer.take(is_open.nonzero().squeeze(1))

    def _level(self, step: int) -> float:
        return root_competence(step, self._total_steps, self._initial)

    def observe(self, step: Step) -> Metrics:
        return {"competence/level": self._level(step.index)}


def build(config: RunConfig, context: Context) -> Method:
    select = config.select
    total = select.competence_steps or max(1, config.train.steps // 2)
    difficulty = DIFFICULTIES[select.difficulty](context)
    return plain(Competence(difficulty, total, select.competence_initial), config, context)


def _length(context: Context) -> Difficulty:
    tokenizer, size = context.corpus.tokenizer, context.lm.vocab_size
    return LengthDifficulty(token_characters(lambda ids: str(tokenizer.decode(ids)), size))


DIFFICULTIES: dict[str, Callable[[Context], Difficulty]] = {
    "auto": lambda context: LabelOrRarity(context.lm.vocab_size),
    "label": lambda context: LabelDifficulty(),
    "length": _length,
    "rarity": lambda context: RarityDifficulty(context.lm.vocab_size),
}
"""The values of `--difficulty`."""
