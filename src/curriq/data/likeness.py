"""How like the target a window is, told from its tokens alone."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.data.stream import WindowStream
from curriq.types import Candidates, State

MEMORY = 0.995


class LikenessStream:
    def __init__(self, stream: WindowStream, target: Int[Tensor, "D T"], buckets: int = 2**15, prior: float = 1.0) -> None:
        self._stream = stream
        self._buckets = buckets
        self._prior = prior
        self._target = torch.bincount(self._grams(target).flatten(), minlength=2 * buckets).double()
        self._seen = torch.zeros(2 * buckets, dtype=torch.float64)
        self._mean, self._square, self._weight = 0.0, 0.0, 0.0

    def _grams(self, tokens):
        first = (tokens * 2654435761 >> 7) % self._buckets
        pairs = ((tokens[:, :-1] * 1000003 + tokens[:, 1:]) * 2654435761 >> 9) % self._buckets
        return torch.cat([first, self._buckets + pairs], dim=1)

    def next_batch(self, n):
        batch = self._stream.next_batch(n)
        grams = self._grams(batch.tokens)
        self._seen += torch.bincount(grams.flatten(), minlength=len(self._seen)).double()
        # both smoothed towards one another's sum
        both = self._target / self._target.sum() + self._seen / self._seen.sum()
        prior = self._prior * both / both.sum() * self._buckets / 4
        table = ((self._target + prior) / (self._target.sum() + prior.sum())).log() - ((self._seen + prior) / (self._seen.sum() + prior.sum())).log()
        table = torch.nan_to_num(table)
        raw = table[grams].mean(1)
        keep = MEMORY ** n
        self._weight = keep * self._weight + 1 - keep
        self._mean = keep * self._mean + (1 - keep) * raw.mean().item()
        self._square = keep * self._square + (1 - keep) * raw.square().mean().item()
        mean = self._mean / self._weight
        spread = math.sqrt(max(1e-12, self._square / self._weight - mean**2))
        return replace(batch, likeness=((raw - mean) / spread).clamp(-3, 3).float())

    def state_dict(self) -> State:
        return {"stream": self._stream.state_dict(), "seen": self._seen.clone(), "moments": [self._mean, self._square, self._weight]}

    def load_state_dict(self, state: State) -> None:
        self._stream.load_state_dict(state["stream"])
        self._seen = state["seen"].clone()
        self._mean, self._square, self._weight = state["moments"]
