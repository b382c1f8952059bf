"""A rolling memory of numbers, for ranks and quantiles over what was seen lately."""

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.state import Saved


class History(Saved):
    """The last `capacity` values, oldest first, in float64 on the CPU."""

    SAVED = ("values",)

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._capacity = capacity
        self.values = torch.zeros(0, dtype=torch.float64)

    def extend(self, new: Float[Tensor, "n"]) -> None:
        self.values = torch.cat([self.values, new.detach().cpu().double()])[-self._capacity :].clone()
