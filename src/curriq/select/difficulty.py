"""How hard a window is, without asking the model. Higher is harder; the scale has no meaning.

All difficulties are float64 on the CPU, whatever device the tokens lie on.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.errors import CurriqError
from curriq.types import Candidates, State, Stateful


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
