"""Checkpoint state by attribute names: everything that a part may keep, through a file and back."""

import collections
import io
from collections import defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from curriq.state import Saved, State


class Counter(Saved):
    """A nested part."""

    SAVED = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Part(Saved):
    """One attribute of each kind; `play` changes all of them, by amounts that its generator draws."""

    SAVED = (
        *("_generator", "tensor", "_array", "_counter", "_layer", "_optimizer", "_recent", "_pieces"),
        *("_by_name", "number", "_maybe", "text"),
        *("_weight", "_its_optimizer", "_layers", "_draws", "_grouped", "_counts"),
    )

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.tensor = torch.zeros(3, dtype=torch.float64)
        self._array = np.zeros(4, np.int32)
        self._counter = Counter()
        self._layer = nn.Linear(2, 1)
        self._optimizer = torch.optim.AdamW(self._layer.parameters(), lr=0.1)
        self._recent: deque[torch.Tensor] = deque(maxlen=2)
        self._pieces: list[torch.Tensor] = [torch.zeros(2)]
        self._by_name: dict[str, Any] = {"total": torch.zeros(2), "steps": 0}
        self._weight = nn.Parameter(torch.zeros(2))
        self._its_optimizer = torch.optim.SGD([self._weight], lr=0.1, momentum=0.9)
        self._layers = [nn.Linear(1, 1), Counter()]
        self._draws = {"a": torch.Generator().manual_seed(seed)}
        self._grouped: defaultdict[str, list[float]] = defaultdict(list)
        self._counts = collections.Counter[str]()
        self.number = 0.0
        self._maybe: float | None = None
        self.text = ""
        self.unsaved = 0

    def play(self) -> None:
        drawn = torch.rand(3, generator=self._generator, dtype=torch.float64)
        self.tensor += drawn
        self._array += 1
        self._counter.count += 1
        self._optimizer.zero_grad()
        self._layer(drawn[:2].float()).sum().backward()
        self._optimizer.step()
        self._its_optimizer.zero_grad()
        (self._weight * drawn[:2]).sum().backward()
        self._its_optimizer.step()
        self._layers[1].count += 1
        with torch.no_grad():
            self._layers[0].weight += torch.rand(1, generator=self._draws["a"])
        self._grouped[f"{self.number:.0f}"].append(self.number)
        self._counts.update({"x": 5})
        self._recent.append(drawn[:1])
        self._pieces[0] += drawn[0]
        self._by_name["total"] += drawn[1]
        self._by_name["steps"] += 1
        self.number += drawn[2].item()
        self._maybe = self.number
        self.text += "."
        self.unsaved += 1


def played(steps: int, seed: int = 0) -> Part:
    part = Part(seed)
    for _ in range(steps):
        part.play()
    return part


def through_a_file(state: State) -> State:
    """As a checkpoint goes, with the safe loader."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_equal(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for name in ours:
            assert_equal(ours[name], theirs[name])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    else:
        assert ours == theirs


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_restored_part_continues_bitwise(steps):
    original, restored = played(steps), played(2, seed=7)  # whatever it was, the state replaces it
    restored.load_state_dict(through_a_file(original.state_dict()))
    assert_equal(restored.state_dict(), original.state_dict())
    for part in (original, restored):
        part.play()
    assert_equal(restored.state_dict(), original.state_dict())


def test_every_attribute_comes_back_as_what_it_was():
    original, restored = played(5), Part(seed=1)
    generator, layer, counter = restored._generator, restored._layer, restored._counter
    restored.load_state_dict(through_a_file(original.state_dict()))
    assert restored._generator is generator  # others may draw from it too
    assert restored._layer is layer
    assert restored._counter is counter
    assert counter.count == 5
    assert restored.number == restored._maybe == original.number
    assert restored.text == "....."
    assert restored.tensor.dtype == torch.float64
    assert isinstance(restored._array, np.ndarray)
    assert restored._array.dtype == np.int32
    assert isinstance(restored._recent, deque)
    assert restored._recent.maxlen == 2
    assert len(restored._recent) == 2
    assert restored.unsaved == 0
    assert restored._its_optimizer.param_groups[0]["params"][0] is restored._weight
    assert restored._counts == original._counts == {"x": 25}
    restored._counts.update({"x": 1})
    assert restored._counts["x"] == 26
    assert restored._grouped["never seen"] == []


def test_an_array_in_a_list_is_refused():
    class Arrays(Saved):
        SAVED = ("arrays",)

        def __init__(self) -> None:
            self.arrays = [np.zeros(2)]

    with pytest.raises(TypeError, match="an array in a list is not saved: keep a tensor there"):
        Arrays().state_dict()


def test_names_lose_their_underscore():
    assert set(played(1).state_dict()) == {name.lstrip("_") for name in Part.SAVED}
    assert Part().state_dict()["counter"] == {"count": 0}


def own_values(state: State) -> State:
    """All but what the parts of torch give out, which follow their parameters."""
    of_torch = ("layer", "optimizer", "its_optimizer", "layers")
    return {name: value for name, value in state.items() if name not in of_torch}


def test_a_state_is_a_snapshot():
    part = played(3)
    state = own_values(part.state_dict())
    before = through_a_file(state)
    part.play()
    assert_equal(state, before)


def test_a_loaded_state_does_not_follow_the_part_either():
    """What a part changes in place is its own: the same state can be loaded twice."""
    state = played(3).state_dict()
    before = through_a_file(state)
    part = Part()
    part.load_state_dict(state)
    part.play()
    assert_equal(own_values(state), own_values(before))


def test_what_was_none_may_become_a_tensor_and_back():
    one, other = Part(), Part()
    one._maybe = torch.ones(2)
    other.load_state_dict(through_a_file(one.state_dict()))
    assert torch.equal(other._maybe, torch.ones(2))
    other.load_state_dict(Part().state_dict())
    assert other._maybe is None


def test_nothing_is_saved_unless_it_is_named():
    class Stateless(Saved):
        def __init__(self) -> None:
            self.number = 1

    assert Stateless().state_dict() == {}
    Stateless().load_state_dict({})
    with pytest.raises(ValueError, match=r"Stateless saves \[\], the state holds \['number'\]"):
        Stateless().load_state_dict({"number": 2})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"Counter saves \['count'\], the state holds \[\]"),
        ({"count": 1, "other": 2}, r"the state holds \['count', 'other'\]"),
        ({"counts": 1}, r"the state holds \['counts'\]"),
    ],
)
def test_the_state_of_another_class_is_refused(state, message):
    counter = Counter()
    with pytest.raises(ValueError, match=message):
        counter.load_state_dict(state)
    assert counter.count == 0
    with pytest.raises(ValueError, match=message):
        Part().load_state_dict(Part().state_dict() | {"counter": state})
