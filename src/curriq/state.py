"""Checkpoint state of the parts of a run."""

from collections import deque
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

State = dict[str, Any]
"""Plain containers, numbers, strings and tensors only, so that `torch.load(weights_only=True)` reads it."""


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state a checkpoint must hold for a bitwise resume."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class Saved:
    """`state_dict` and `load_state_dict` over the attributes that `SAVED` names; none by default.

    A part with a state of its own is asked for it; generators, tensors and arrays are copied; anything else
    must be a number, a string, None, or a list, deque or dictionary of these. Tensors come back on the device
    where the object keeps them.

    Raises:
        ValueError: the state belongs to an object with other attributes.
    """

    SAVED: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> State:
        return {name.lstrip("_"): _captured(getattr(self, name)) for name in self.SAVED}

    def load_state_dict(self, state: State) -> None:
        expected = {name.lstrip("_") for name in self.SAVED}
        if state.keys() != expected:
            raise ValueError(
                f"{type(self).__name__} saves {sorted(expected)}, the state holds {sorted(state)}"
            )
        for name in self.SAVED:
            setattr(self, name, _restored(getattr(self, name), state[name.lstrip("_")]))


def _captured(value: Any) -> Any:
    import torch  # here, so that data can be checked before torch is loaded

    if isinstance(value, torch.Generator):
        return value.get_state()
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, list | deque):
        return [_captured(item) for item in value]
    return {name: _captured(item) for name, item in value.items()} if isinstance(value, dict) else value


def _restored(current: Any, saved: Any) -> Any:
    import torch

    if isinstance(current, torch.Generator):
        current.set_state(saved)
        return current
    if hasattr(current, "load_state_dict"):
        current.load_state_dict(saved)
        return current
    if isinstance(current, np.ndarray):
        return saved.numpy().copy()
    if isinstance(saved, torch.Tensor):
        return saved.to(current.device if isinstance(current, torch.Tensor) else "cpu", copy=True)
    copied = _captured(saved)  # what the object changes in place must not change the state
    return deque(copied, maxlen=current.maxlen) if isinstance(current, deque) else copied
