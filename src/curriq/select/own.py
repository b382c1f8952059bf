"""What parts of the user's own give, checked: a mistake there is neither trained on nor called ours."""

import reprlib
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from curriq.errors import CurriqError
from curriq.select.base import Method
from curriq.state import State
from curriq.types import (
    Critic,
    Features,
    Metrics,
    Offer,
    Proposer,
    Reading,
    Selector,
    Step,
    readings_of,
    status_of,
)


def require_method(built: object, name: str) -> Method:
    """What the function `name` built.

    Raises:
        CurriqError: it is no method, or one of its parts lacks what the loop asks of it.
    """
    if not isinstance(built, Method):
        raise CurriqError(
            f"{name} gave {reprlib.repr(built)}: the function must return a Method, such as "
            "curriq.select.base.plain(selector, config, context)."
        )
    for part, kind in {"proposer": Proposer, "selector": Selector, "critic": Critic}.items():
        ours, asked = getattr(built, part), {*dir(kind), *kind.__annotations__}
        if missing := sorted(n for n in asked if not n.startswith("_") and not hasattr(ours, n)):
            raise CurriqError(
                f"the {part} of {name}, {type(ours).__name__}, lacks {', '.join(missing)}: a selector "
                "has them from curriq.select.base.PlainSelector; curriq.types says what each part must have."
            )
    return built


def require_metrics(found: object, part: object, function: str) -> Metrics:
    """What the function of a part gave for the log.

    Raises:
        CurriqError: it is no dictionary of numbers.
    """
    name, rule = f"{function} of {type(part).__name__}", "it must give a dictionary of numbers, {} for none"
    if not isinstance(found, dict):
        raise CurriqError(f"{name} gave {reprlib.repr(found)}: {rule}.")
    for metric, value in found.items():
        if type(value) not in (int, float):
            kind = type(value).__name__
            raise CurriqError(f"{name} gave {metric!r} as a {kind}: {rule}; float(…) makes one of a tensor.")
    return found


@dataclass(eq=False)
class OwnProbe:
    """A probe of the user's own, `inner`, whose measurements are checked."""

    inner: Any

    def __post_init__(self) -> None:
        self.due = getattr(self.inner, "due", lambda step: True)

    def measure(self, step: Step) -> Metrics:
        return require_metrics(self.inner.measure(step), self.inner, "measure")


@dataclass(eq=False)
class OwnSelector:
    """A selector of the user's own, `inner`, whose answers are checked; its state is that of `inner`."""

    inner: Selector

    def __post_init__(self) -> None:
        self.needs_entropy = self.inner.needs_entropy
        self.needs_reward = self.inner.needs_reward
        self.readings: tuple[Reading, ...] = readings_of(self.inner)

    def status(self) -> str:
        return status_of(self.inner)

    def admit(self, step: int, offer: Offer) -> Offer:
        return self.inner.admit(step, offer)

    def score(self, step: int, offer: Offer, features: Features) -> Float[Tensor, "n"]:
        """The log-weights, without a graph of their own: its gradient is none of the mixture's.

        Raises:
            CurriqError: they are no log-weights, one for each window. A tensor [n, 1] would be multiplied
                with the losses to [n, n], which trains evenly.
        """
        found, n = self.inner.score(step, offer, features), len(features.loss)
        if isinstance(found, Tensor) and found.is_floating_point() and found.shape == (n,):
            return found.detach()
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else reprlib.repr(found)
        raise CurriqError(
            f"score of {type(self.inner).__name__} gave {what} for {n} windows: it must give a tensor [{n}] "
            "of floating-point numbers, one log-weight each."
        )

    def observe(self, step: Step) -> Metrics:
        return require_metrics(self.inner.observe(step), self.inner, "observe")

    def state_dict(self) -> State:
        return self.inner.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.inner.load_state_dict(state)
