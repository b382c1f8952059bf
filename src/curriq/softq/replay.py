"""Q replay: a ring of past regression pairs (x, y), one of the extras of the authors' published code."""

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.types import State


class Replay:
    """The last `capacity` pairs of Q's input and its target, sampled uniformly.

    A pair keeps the target that was computed when it was stored; later changes of Q̄ do not reach it.

    Args:
        capacity: pairs kept; a new one overwrites the oldest.
        width: entries of an input.
        device: where the pairs lie.
        generator: CPU generator of the draws.
    """

    def __init__(
        self, capacity: int, width: int, device: torch.device | str, generator: torch.Generator
    ) -> None:
        assert capacity > 0
        self.capacity = capacity
        self._hidden = torch.zeros(capacity, width, device=device)
        self._targets = torch.zeros(capacity, device=device)
        self._added = 0
        self._generator = generator

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    def add(self, inputs: Float[Tensor, "m d"], targets: Float[Tensor, "m"]) -> None:
        """Store pairs, detached, in their order."""
        slots = (self._added + torch.arange(len(targets))) % self.capacity
        kept = slice(max(0, len(targets) - self.capacity), None)
        slots = slots[kept].to(self._hidden.device)
        self._hidden[slots] = inputs.detach()[kept].to(self._hidden.dtype)
        self._targets[slots] = targets.detach()[kept].to(self._targets.dtype)
        self._added += len(targets)

    def sample(self, batch: int) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b"]]:
        """`batch` pairs drawn uniformly with replacement; the ring must not be empty."""
        index = torch.randint(len(self), (batch,), generator=self._generator).to(self._hidden.device)
        return self._hidden[index], self._targets[index]

    def state_dict(self) -> State:
        filled = len(self)
        return {
            "hidden": self._hidden[:filled].clone().cpu(),
            "targets": self._targets[:filled].clone().cpu(),
            "added": self._added,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        self._added = state["added"]
        filled = len(self)
        assert state["hidden"].shape[0] == filled, "the state comes from a ring of another capacity"
        self._hidden[:filled] = state["hidden"].to(self._hidden.device)
        self._targets[:filled] = state["targets"].to(self._targets.device)
        self._generator.set_state(state["generator"])
