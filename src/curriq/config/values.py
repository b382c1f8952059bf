"""From plain values, of TOML or of the command line, to sections and sources; errors name what is wrong."""

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from curriq.config.aliases import rename_source_keys
from curriq.config.checks import unknown_key
from curriq.config.sections import SourceConfig
from curriq.errors import CurriqError

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def validated(kind: type, values: dict[str, Any], spell: Callable[[str], str]) -> Any:
    """A dataclass from plain values, which may be strings; errors name its fields as `spell` writes them.

    Raises:
        CurriqError: the first value that is missing, of the wrong type, or refused by the dataclass.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, CurriqError):
            raise CurriqError(str(cause)) from None
        name = ".".join((spell(str(first["loc"][0])), *map(str, first["loc"][1:])))
        if first["type"] == "missing":
            raise CurriqError(f"{name} is missing in {first['input']!r}.") from None
        raise CurriqError(f"{name} = {first['input']!r}: {first['msg']}.") from None


def refuse_unknown(
    names: Iterable[str], known: Iterable[str], where: str = "", kind: str = "setting"
) -> None:
    """Raise CurriqError for the first name that is not known; `where` is how the error begins."""
    known = list(known)
    for name in names:
        if name not in known:
            raise CurriqError(where + unknown_key(name, known, kind))


def source_tables(sources: Any) -> list[Any]:
    """Sources as `validated` takes them: objects as they are, tables with today's keys and paths expanded.

    Raises:
        CurriqError: no list of tables, an unknown key, or an environment variable that is not set.
    """
    if not isinstance(sources, list | tuple) or any(not isinstance(s, dict | SourceConfig) for s in sources):
        raise CurriqError(
            f"data.sources = {sources!r}: write each source as a table of its own, [[data.sources]] "
            'with name = "…" and path = "…".'
        )
    return [source if isinstance(source, SourceConfig) else _source_table(source) for source in sources]


def _source_table(table: dict[str, Any]) -> dict[str, Any]:
    table = rename_source_keys(table)
    refuse_unknown(table, SourceConfig.__dataclass_fields__, "[[data.sources]] ")
    if isinstance(path := table.get("path"), str):
        table["path"] = _VARIABLE.sub(_expand, path)
    return table


def _expand(variable: re.Match[str]) -> str:
    """The value of an environment variable, written ${NAME} or ${NAME:-DEFAULT}."""
    name, default = variable.groups()
    value = os.environ.get(name) or default
    if value is None:
        raise CurriqError(
            f"path = {variable.string!r}: the environment variable {name} is not set; set it, or write a "
            f"default as in ${{{name}:-data}}."
        )
    return value
