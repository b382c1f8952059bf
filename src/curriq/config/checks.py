"""Checks and error texts that settings share; each error names the value and the rule."""

import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import entry_points

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


def refuse_unknown(
    names: Iterable[str], known: Iterable[str], where: str = "", kind: str = "setting"
) -> None:
    """Raise CurriqError for the first name that is not known; `where` is how the error begins."""
    known = list(known)
    for name in names:
        require(name in known, where + unknown_key(name, known, kind))


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
    """The error that `user` (as the user named it) needs a package of an optional extra, or `instead`."""
    return CurriqError(
        f'{user} needs {package}, which is not installed: `pip install "curriq[{extra}]"`, in a checkout '
        f'`.venv/bin/pip install -e ".[{extra}]"`; or {instead}.'
    )
