"""Checkpoint state of the parts of a run."""

import copy
from collections import deque
from itertools import zip_longest
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
    must be a number, a string, None, or a list, deque or dictionary of these. What the object holds already
    when it is loaded is put into its state, so that it keeps its type, its device and those who share it, as
    an optimizer shares a parameter. So a part must be there when the object is built.

    Raises:
        ValueError: the state belongs to an object with other attributes.
        TypeError: an array is in a list or dictionary, from where it might come back as a tensor.
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
    inside = list(value.values()) if isinstance(value, dict) else value
    if isinstance(inside, list | deque) and any(isinstance(item, np.ndarray) for item in inside):
        raise TypeError(f"an array in a {type(value).__name__} is not saved: keep a tensor there.")
    if isinstance(value, list | deque):
        return [_captured(item) for item in value]
    return {name: _captured(item) for name, item in value.items()} if isinstance(value, dict) else value


def _restored(current: Any, saved: Any) -> Any:
    import torch

    if isinstance(current, torch.Generator):
        current.set_state(saved)
        return current
    if isinstance(current, torch.nn.Parameter):
        with torch.no_grad():
            current.copy_(saved)
        return current
    if hasattr(current, "load_state_dict"):
        current.load_state_dict(saved)
        return current
    if isinstance(current, np.ndarray):
        return saved.numpy().copy()
    if isinstance(saved, torch.Tensor):
        return saved.to(current.device if isinstance(current, torch.Tensor) else "cpu", copy=True)
    if isinstance(saved, list):
        here = list(current) if isinstance(current, list | deque) else []
        items = [_restored(*pair) for pair in zip_longest(here[: len(saved)], saved)]
        return deque(items, maxlen=current.maxlen) if isinstance(current, deque) else items
    if isinstance(saved, dict):
        before = current if isinstance(current, dict) else {}
        restored = copy.copy(before)  # a defaultdict or a Counter stays one
        restored.clear()
        for name, item in saved.items():
            restored[name] = _restored(before.get(name), item)
        return restored
    return saved
