"""Checks that settings share; each error names the value and the rule."""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, get_type_hints

from curriq.errors import CurriqError


def require(condition: bool, message: str) -> None:
    """Raise CurriqError(message) unless the condition holds."""
    if not condition:
        raise CurriqError(message)


@dataclass(frozen=True)
class Within:
    """The bound of a numeric setting, in its annotation.

    Attributes:
        interval: such as "[0, 1)"; "(0, inf)" is every finite number greater than 0.
        hint: what an error adds to the rule.
    """

    interval: str
    hint: str = ""

    def check(self, name: str, value: float) -> None:
        """Raise CurriqError unless the value lies in the interval."""
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        rule = f"lie in {self.interval}"
        if value == math.inf:
            rule = "be finite"
        elif high == math.inf:
            rule = f"be {'greater than' if self.interval[0] == '(' else 'at least'} {low:g}"
        above = value > low or (value == low and self.interval[0] == "[")
        below = value < high or (value == high and self.interval[-1] == "]")
        require(above and below, f"{flag(name)} = {value}: it must {rule}{self.hint}.")


Positive = Annotated[float, Within("(0, inf)")]
NonNegative = Annotated[float, Within("[0, inf)")]
Share = Annotated[float, Within("[0, 1)")]
Fraction = Annotated[float, Within("(0, 1]")]
Count = Annotated[int, Within("[1, inf)")]
CountOrZero = Annotated[int, Within("[0, inf)")]


Pairs = Iterator[tuple[str, str, str]]
"""Two settings by name; why they exclude each other and how to fix it."""


class Section:
    """Base of the dataclasses of settings: all are checked when one is made."""

    def __post_init__(self) -> None:
        for name, bound in _bounds(type(self)).items():
            bound.check(name, getattr(self, name))
        self.check()
        for first, second, why in self.illegal_pairs():
            raise CurriqError(f"{self.spelled(first)} with {self.spelled(second)}: {why}.")

    def check(self) -> None:
        """Raise CurriqError for what is neither a bound nor a pair."""

    def illegal_pairs(self) -> Pairs:
        """The pairs of settings that are both set and exclude each other."""
        yield from ()

    def value(self, name: str) -> Any:
        """A setting by its name."""
        return getattr(self, name)

    def spelled(self, name: str) -> str:
        """A setting as the user writes it: `--beta 0.1`, `--no-q-weighting`, `--q-features last mean`."""
        value = self.value(name)
        if isinstance(value, bool):
            return flag(name if value else f"no_{name}")
        return " ".join((flag(name), *map(str, value if isinstance(value, tuple) else (value,))))


@functools.cache
def _bounds(section: type) -> dict[str, Within]:
    """Setting → its bound, of those that have one."""
    hints = get_type_hints(section, include_extras=True)
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: mark for name, found in marks.items() for mark in found if isinstance(mark, Within)}


def require_at_least(minimum: float, **values: float) -> None:
    """Raise CurriqError unless each value, named as its flag, is finite and at least `minimum`."""
    for name, value in values.items():
        require(minimum <= value < math.inf, f"{flag(name)} = {value}: it must be at least {minimum}.")


def flag(name: str) -> str:
    """The command-line spelling of a field: `q_lr` → `--q-lr`."""
    return "--" + name.replace("_", "-")


def unknown_key(name: str, known: Iterable[str], kind: str = "setting") -> str:
    """Error text for a name that is not in `known`, with the nearest known name."""
    known = list(known)
    return f"unknown {kind} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}."


def did_you_mean(name: str, known: Iterable[str], form: str = "{!r}") -> str:
    """A hint to append to an error: the nearest known name as `form` writes it; empty when none is near."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {form.format(close[0])}?" if close else ""


def missing_extra(user: str, package: str, extra: str, instead: str) -> CurriqError:
    """The error of a part that needs a package of an optional extra.

    Args:
        user: the part that needs it, as the user named it.
        package: what cannot be imported.
        extra: name of the extra that brings it.
        instead: what to do without it.
    """
    return CurriqError(
        f'{user} needs {package}, which is not installed: `pip install "curriq[{extra}]"`, in a checkout '
        f'`.venv/bin/pip install -e ".[{extra}]"`; or {instead}.'
    )
