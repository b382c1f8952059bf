"""The JSON Schema of the file of a comparison, from the declaration of its settings."""

from typing import Any

from curriq.config import run_schema
from curriq.evaluate.plan import OFFSET, OWN, CompareConfig
from curriq.presets import PRESETS

_START = {
    "preset": {"enum": list(PRESETS), "description": "Preset whose settings these are laid over."},
    "file": {"type": "string", "description": "Run file beside this one, laid over the preset."},
}


def comparison_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a file for `curriq compare`."""
    from pydantic import TypeAdapter

    run = run_schema()
    flat = {
        name: setting
        for section in run["properties"].values()
        for name, setting in section["properties"].items()
        if name not in OWN
    }
    compare = TypeAdapter(CompareConfig).json_schema()
    for setting in compare["properties"].values():
        del setting["title"]
    compare["properties"]["base"] = {"enum": list(PRESETS)} | _described("preset that everything starts from")
    offset = {"type": "integer", "minimum": 0} | _described("added to the comparison's seeds for training")
    return {
        "$schema": run["$schema"],
        "title": "curriq comparison",
        "description": "Arms × seeds × streams for curriq compare; docs/compare.md explains it.",
        "type": "object",
        "additionalProperties": False,
        "required": ["compare", "arms"],
        "properties": {
            "compare": compare | {"additionalProperties": False, "description": "Seeds, baseline, workers."},
            "arms": _tables({**_START, OFFSET: offset}, "Settings of one arm."),
            "streams": _tables(_START, "Settings that all arms share on one stream."),
        },
        "$defs": run["$defs"] | {"Settings": {"properties": flat}},
    }


def _described(text: str) -> dict[str, str]:
    return {"description": text[0].upper() + text[1:] + "."}


def _tables(more: dict[str, Any], text: str) -> dict[str, Any]:
    """One table of flat settings per name."""
    settings = {
        "type": "object",
        "description": text,
        "$ref": "#/$defs/Settings",
        "properties": more,
        "unevaluatedProperties": False,
    }
    return {"type": "object", "additionalProperties": settings}
