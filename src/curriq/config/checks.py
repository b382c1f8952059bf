"""Checks that settings share; each error names the value and the rule."""

import math
from difflib import get_close_matches

from curriq.errors import CurriqError


def require(condition: bool, message: str) -> None:
    """Raise CurriqError(message) unless the condition holds."""
    if not condition:
        raise CurriqError(message)


def require_positive(**values: float) -> None:
    for name, value in values.items():
        require(value > 0, f"{flag(name)} = {value}: it must be greater than 0.")
        require(math.isfinite(value), f"{flag(name)} = {value}: it must be a finite number.")


def require_at_least(minimum: float, **values: float) -> None:
    for name, value in values.items():
        require(value >= minimum, f"{flag(name)} = {value}: it must be at least {minimum}.")
        require(math.isfinite(value), f"{flag(name)} = {value}: it must be a finite number.")


def require_share(**values: float) -> None:
    for name, value in values.items():
        require(0 <= value <= 1, f"{flag(name)} = {value}: a share lies between 0 and 1.")


def flag(name: str) -> str:
    """The command-line spelling of a field: `q_lr` → `--q-lr`."""
    return "--" + name.replace("_", "-")


def unknown_key(name: str, known: list[str], kind: str = "setting") -> str:
    """Error text for a name that is not in `known`, with the nearest known name."""
    close = get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}."
