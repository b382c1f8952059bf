"""What embeds windows and queries: their text, or what the Q-network reads of their tokens."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from curriq.data.encoder import Encoder
from curriq.langevin.energy import features_of
from curriq.lm.model import LanguageModel
from curriq.types import Features


@runtime_checkable
class WindowEncoder(Protocol):
    """Embeds token strings of one length.

    Attributes:
        follows_theta: the embedding is of the present θ, so that rows of the buffer grow old.
    """

    follows_theta: bool

    def encode(self, tokens: Int[Tensor, "n T"], texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        """Float32 embeddings, one row per string.

        Args:
            tokens: the strings.
            texts: the same, decoded.
        """
        ...


class TextEncoder:
    """By the text, as the paper does; θ plays no part.

    Args:
        encoder: text → unit vector.
    """

    follows_theta = False

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def encode(self, tokens: Int[Tensor, "n T"], texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        return self._encoder.encode(texts)


class HiddenStateEncoder:
    """The unit vector of the very input that the Q-network reads (`QInputs`), by the model itself.

    Where Q is linear, Q = w·x + b, and its inputs have one length (`--q-layer-norm`), the inner product with
    the direction w orders windows as Q does: the best query retrieves exactly the windows of greatest Q.

    Args:
        lm: θ.
        inputs: what Q sees of a window's features.
        batch: strings per forward pass.
    """

    follows_theta = True

    def __init__(
        self, lm: LanguageModel, inputs: Callable[[Features], Float[Tensor, "n w"]], batch: int
    ) -> None:
        self._lm = lm
        self._inputs = inputs
        self._batch = batch

    def encode(self, tokens: Int[Tensor, "n T"], texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        with self._lm.measuring():
            vectors = [
                F.normalize(self._inputs(features_of(self._lm.trunk(part))), dim=1).float().cpu()
                for part in tokens.to(self._lm.device).split(self._batch)
            ]
        return torch.cat(vectors).numpy()


class NoEncoder:
    """For the controls that retrieve without a query: nothing is embedded."""

    follows_theta = False

    def encode(self, tokens: Int[Tensor, "n T"], texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        return np.zeros((len(tokens), 1), np.float32)
