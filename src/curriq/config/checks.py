"""Checks and error texts that settings share; each error names the value and the rule."""

import os
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import entry_points

from curriq.config.synonyms import synonym
from curriq.errors import CurriqError


def require(condition: bool, message: str) -> None:
    """Raise CurriqError(message) unless the condition holds."""
    if not condition:
        raise CurriqError(message)


def require_one_process(what: str, instead: str) -> None:
    """Raise CurriqError where a launcher such as torchrun has started several processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    require(processes == 1, f"{what} under torchrun ({processes} processes): {instead}.")


@contextmanager
def errors_name(where: object) -> Generator[None]:
    """Puts `where` in front of a CurriqError that is raised inside."""
    try:
        yield
    except CurriqError as error:
        raise CurriqError(*(f"{where}: {fault}" for fault in error.faults)) from None


def require_writable(where: str, value: object) -> None:
    """Raise CurriqError for a text, or a tuple with one, that no file name or file of settings can hold: one
    with a NUL, or with bytes that are not UTF-8."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and re.search("[\0\ud800-\udfff]", text):
            raise CurriqError(f"{where} = {text!r}: it must be UTF-8 and have no NUL.")


def require_known(setting: str, name: str, built_in: Iterable[str], group: str) -> None:
    """Raise CurriqError unless the name is built in, an entry point of the group, or refers to a function of
    the user's own, `package.module:function` or `path/to/file.py:function`."""
    if name not in built_in and ":" not in name:
        known = [*built_in, *(point.name for point in entry_points(group=group))]
        how = " Or write package.module:function or path/to/file.py:function."
        refuse_unknown([name], known, kind=setting, how=how)


def refuse_unknown(
    names: Iterable[str], known: Iterable[str], where: str = "", kind: str = "setting", how: str = ""
) -> None:
    """Raise CurriqError for the first name that is not known, with the nearest known one, or with the one
    that other programs call so; `where` is how the error begins, `how` how it ends."""
    known = list(known)
    for name in names:
        if name not in known:
            if kind == "setting" and (hint := other_name(name, known)):
                raise CurriqError(f"{where}unknown setting {name!r}.{hint}{how}")
            near, every = did_you_mean(name, known), ", ".join(known)
            raise CurriqError(f"{where}unknown {kind} {name!r}.{near} Known: {every}.{how}")


def flag(name: str) -> str:
    """The command-line spelling of a field: `q_lr` → `--q-lr`."""
    return "--" + name.replace("_", "-")


def did_you_mean(name: str, known: Iterable[str], form: str = "{!r}") -> str:
    """A hint to append to an error: the nearest known name as `form` writes it; empty when none is near."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {form.format(close[0])}?" if close else ""


def other_name(name: str, known: Iterable[str]) -> str:
    """A hint to append to an error: which known setting other programs call by this name, and what it is, or
    nothing."""
    found = synonym(name, known)
    return f" Did you mean {found[0]} ({found[1]})?" if found else ""


def missing_extra(user: str, package: str, extra: str, instead: str) -> CurriqError:
    """The error that `user` (as the user named it) needs a package of an optional extra, or `instead`."""
    return CurriqError(
        f'{user} needs {package}, which is not installed: `pip install "curriq[{extra}]"`, in a checkout '
        f'`.venv/bin/pip install -e ".[{extra}]"`; or {instead}.'
    )
