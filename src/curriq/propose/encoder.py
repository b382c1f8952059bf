"""An encoder that needs no second model: the language model's own hidden state."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float

from curriq.lm.mixture import last_and_pooled
from curriq.lm.model import LanguageModel


class HiddenStateEncoder:
    """Texts by what the Q-network reads of them: the unit vector of h_x (Eq. 2) at the present θ.

    Windows near a query of high Q then have high Q themselves, which no other encoder promises. The price:
    θ moves, so a window's row is as old as its time in the buffer.

    Args:
        lm: θ.
        tokenize: text → token ids.
        length: tokens of a text that are read.
        eos: read in place of an empty text.
        batch: texts per forward pass; only texts of one length go together, since padding would shift
            positions.
    """

    def __init__(
        self,
        lm: LanguageModel,
        tokenize: Callable[[list[str]], list[list[int]]],
        length: int,
        eos: int,
        batch: int,
    ) -> None:
        self._lm = lm
        self._tokenize = tokenize
        self._length = length
        self._eos = eos
        self._batch = batch

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        ids = [tokens[: self._length] or [self._eos] for tokens in self._tokenize(list(texts))]
        vectors = np.empty((len(ids), self._lm.width), np.float32)
        for rows in self._batches([len(tokens) for tokens in ids]):
            tokens = torch.tensor([ids[row] for row in rows], device=self._lm.device)
            with self._lm.measuring():
                hidden, _ = last_and_pooled(self._lm.trunk(tokens))
            vectors[rows] = torch.nn.functional.normalize(hidden, dim=1).float().cpu().numpy()
        return vectors

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Rows of equal length, at most `batch` together."""
        by_length: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            by_length.setdefault(length, []).append(row)
        return [
            rows[start : start + self._batch]
            for rows in by_length.values()
            for start in range(0, len(rows), self._batch)
        ]
