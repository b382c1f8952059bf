"""Checks that settings share; each error names the value and the rule."""

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Annotated, Any, get_type_hints

from curriq.errors import CurriqError


def require(condition: bool, message: str) -> None:
    """Raise CurriqError(message) unless the condition holds."""
    if not condition:
        raise CurriqError(message)


@contextmanager
def errors_name(where: object) -> Generator[None]:
    """Puts `where` in front of a CurriqError that is raised inside."""
    try:
        yield
    except CurriqError as error:
        raise CurriqError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Within:
    """The interval of a numeric setting, such as "[0, 1)", and what an error adds to that rule."""

    interval: str
    hint: str = ""

    def check(self, name: str, value: float) -> None:
        """Raise CurriqError unless the value lies in the interval; infinity lies in none."""
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        above = value > low or (value == low and self.interval[0] == "[")
        below = value < high or (value == high < math.inf and self.interval[-1] == "]")
        rule = f"lie in {self.interval}" if high < math.inf else f"be at least {low:g}"
        if self.interval.startswith("(") and high == math.inf:
            rule = f"be greater than {low:g}"
        if value == math.inf:
            rule = "be finite"
        require(above and below, f"{flag(name)} = {value}: it must {rule}{self.hint}.")


Positive = Annotated[float, Within("(0, inf)")]
NonNegative = Annotated[float, Within("[0, inf)")]
Share = Annotated[float, Within("[0, 1)")]
Fraction = Annotated[float, Within("(0, 1]")]
Count = Annotated[int, Within("[1, inf)")]
CountOrZero = Annotated[int, Within("[0, inf)")]

Pairs = Iterator[tuple[str, str, str]]
"""Two settings by name; why they exclude each other, and how to fix it."""


class Section:
    """Base of the dataclasses of settings; making one checks its bounds, its own rules and its pairs."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            for bound in getattr(hint, "__metadata__", ()):
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


def require_known(setting: str, name: str, built_in: Iterable[str], group: str) -> None:
    """Raise CurriqError unless the name is built in, an entry point of the group, or refers to a function of
    the user's own, `package.module:function` or `path/to/file.py:function`."""
    if name not in built_in and ":" not in name:
        known = [*built_in, *(point.name for point in entry_points(group=group))]
        how = " Or write package.module:function or path/to/file.py:function."
        require(name in known, unknown_key(name, known, setting) + how)


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
