"""Topic-coherent held-out sets: windows drawn around a random anchor by embedding similarity.

The windows of a document must stay in one set, so the documents are divided first, at random by the hash
of their key (`split.py`), and each set then draws its windows around the one anchor from its own share.
A draw without replacement with probability ∝ exp(cosine/temperature) is the top k of the log-weights plus
Gumbel noise (Kool et al. 2019, "Stochastic Beams and Where to Find Them"), and the top k of each share is
such a draw restricted to that share.
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.rng import derive_seed

Name = TypeVar("Name", bound=str)


def gumbel_top_k(log_weights: Float[Tensor, "m"], k: int, generator: torch.Generator) -> Int[Tensor, "k"]:
    """k of m items without replacement, each draw with probability ∝ exp(log_weights) among those left."""
    uniform = torch.rand(len(log_weights), dtype=torch.float64, generator=generator)
    # −log(1 − u) is Exp(1), and −log of that is Gumbel. u = 0 gives +∞, which sorts like the rest.
    gumbel = -torch.log(-torch.log1p(-uniform))
    return torch.topk(log_weights + gumbel, k).indices


def draw_topic(
    embeddings: Mapping[Name, Float[np.ndarray, "_ e"]], sizes: Mapping[Name, int], temperature: float
) -> dict[Name, list[int]]:
    """Rows of each set's pool that are nearest in topic to one random anchor of all pools.

    The generator is the draw's own and does not depend on the run's seed: all seeds share the sets.

    Args:
        embeddings: unit-norm embeddings of each set's pool of windows.
        sizes: windows to draw for each set, at most as many as its pool has.
        temperature: softmax temperature over the cosine similarity.
    """
    generator = torch.Generator().manual_seed(derive_seed(0, "topic"))
    everything = torch.from_numpy(np.concatenate(list(embeddings.values()))).double()
    anchor = everything[torch.randint(len(everything), (), generator=generator)]
    drawn = {}
    for name, pool in embeddings.items():
        similarity = torch.from_numpy(pool).double() @ anchor
        drawn[name] = gumbel_top_k(similarity / temperature, sizes[name], generator).tolist()
    return drawn
