"""Checks that settings share; each error names the value and the rule."""

import math
from collections.abc import Iterable
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
