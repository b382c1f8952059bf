"""The JSON Schema of a run file, from the one declaration of the settings: types, bounds, choices, defaults
and help texts. Editors complete and check TOML by it (`curriq schema`)."""

from typing import Any, get_type_hints

from curriq.config.describe import describe_fields
from curriq.config.run import RunConfig
from curriq.config.search import PROPOSERS
from curriq.config.sections import SELECTORS, SourceConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_BUILT_IN = {"selector": SELECTORS, "proposer": PROPOSERS}
"""Settings with built-in values beside those of plug-ins."""


def run_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a run file: one table per section, all of them optional.

    It knows today's names alone, so that an editor marks former ones, which are still read.
    """
    kinds = get_type_hints(RunConfig)
    made = _schema_of(RunConfig)
    sections = made.pop("$defs")
    source = sections.pop("SourceConfig")
    described = {name: _section(kind, sections[kind.__name__]) for name, kind in kinds.items()}
    return {
        "$schema": DIALECT,
        "title": "curriq run file",
        "description": "Settings of a run of curriq; what is absent keeps its default.",
        "type": "object",
        "additionalProperties": False,
        "properties": described,
        "$defs": {"SourceConfig": _source(source)},
    }


def _schema_of(kind: type) -> dict[str, Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind).json_schema()


def _section(kind: type, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a dataclass as pydantic makes it, with the help texts and without unknown keys."""
    for name, (_, text) in describe_fields(kind).items():
        setting = schema["properties"][name]
        del setting["title"]  # the name in other letters
        setting["description"] = text
        if name in _BUILT_IN:
            del setting["type"]
            setting["anyOf"] = [{"enum": list(_BUILT_IN[name])}, {"type": "string"}]
    del schema["title"]
    return schema | {"additionalProperties": False}


def _source(schema: dict[str, Any]) -> dict[str, Any]:
    described = _section(SourceConfig, schema)
    described["description"] = "One named source of documents."  # the docstring goes on about flags
    return described
