"""Embeddings of windows and queries: of their text, or of what the Q-network reads of their tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        follows_theta: whether the embedding is of the present θ, so that rows of the buffer age.
    """

    follows_theta: bool

    def encode(self, tokens: Int[Tensor, "n T"], texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        """Float32 embeddings, one row per string, of the tokens or of the same strings decoded."""
        ...


@dataclass
class TextEncoder:
    """Sentence embeddings of the text, as in the paper; independent of θ."""

    encoder: Encoder
    follows_theta = False

    def encode(self, tokens: Int[Tensor, "n T"], texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        return self.encoder.encode(texts)


@dataclass
class HiddenStateEncoder:
    """The Q-network's own input (`QInputs`), scaled to length 1, from the model itself.

    Where Q is linear, Q = w·x + b, and its inputs have one length (`--q-layer-norm`), the inner product with
    the direction w orders windows as Q does: the best query retrieves exactly the windows of greatest Q.

    Attributes:
        lm: θ.
        inputs: a window's features → x.
        batch: strings per forward pass.
    """

    lm: LanguageModel
    inputs: Callable[[Features], Float[Tensor, "n w"]]
    batch: int
    follows_theta = True

    def encode(self, tokens: Int[Tensor, "n T"], texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        with self.lm.measuring():
            vectors = [
                F.normalize(self.inputs(features_of(self.lm.trunk(part))), dim=1).float().cpu()
                for part in tokens.to(self.lm.device).split(self.batch)
            ]
        return torch.cat(vectors).numpy()


class NoEncoder:
    """For the controls that retrieve without a query: nothing is embedded."""

    follows_theta = False

    def encode(self, tokens: Int[Tensor, "n T"], texts: Sequence[str]) -> Float[np.ndarray, "n e"]:
        return np.zeros((len(tokens), 1), np.float32)
