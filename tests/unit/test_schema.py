"""The JSON Schemas of run files and comparisons accept and refuse what the program does."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_config import BOUNDS

from curriq.config import (
    RunConfig,
    SourceConfig,
    describe,
    field_owners,
    from_dict,
    run_schema,
    to_dict,
    to_toml,
)
from curriq.errors import CurriqError
from curriq.evaluate.plan import load_plan
from curriq.evaluate.schema import comparison_schema
from curriq.presets import PRESETS, preset

ROOT = Path(__file__).resolve().parents[2]
RUN, COMPARISON = run_schema(), comparison_schema()
TYPES = {
    **{"object": dict, "array": list, "string": str, "boolean": bool},
    **{"integer": int, "number": (int, float)},
}
COMPARED = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}
NOTES = {"$schema", "$defs", "title", "description", "default"}
CLOSING = ("additionalProperties", "unevaluatedProperties")


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Whether a value is valid, by the part of draft 2020-12 that our schemas use; another keyword fails."""
    known = {"type", "enum", "anyOf", "$ref", "properties", "required", "items", *CLOSING}
    assert set(schema) <= known | NOTES | set(COMPARED), schema
    referred = root["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else {}
    if referred and not accepts(referred, value, root):
        return False
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (kind != "boolean" and isinstance(value, bool))):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(accepts(one, value, root) for one in schema["anyOf"]):
        return False
    if not all(compare(value, schema[word]) for word, compare in COMPARED.items() if word in schema):
        return False
    if isinstance(value, list):
        return all(accepts(schema.get("items", {}), item, root) for item in value)
    if isinstance(value, dict):
        return accepts_table(schema, referred, value, root)
    return True


def accepts_table(
    schema: dict[str, Any], referred: dict[str, Any], table: dict[str, Any], root: dict
) -> bool:
    properties, closed = schema.get("properties", {}), any(schema.get(word) is False for word in CLOSING)
    rest = schema.get("additionalProperties") or {}
    others = set(table) - set(properties)
    return (
        set(schema.get("required", ())) <= set(table)
        and all(accepts(properties[name], table[name], root) for name in set(table) & set(properties))
        and (not closed or others <= set(referred.get("properties", {})))
        and all(accepts(rest, table[name], root) for name in others)
    )


def validators():
    """Our own check, and the library's where it is installed."""
    yield accepts
    try:
        import jsonschema
    except ImportError:
        return
    yield lambda schema, value, root: jsonschema.Draft202012Validator(root).is_valid(value)


def same(schema: dict[str, Any], value: Any) -> bool:
    """The common answer of all validators."""
    (answer,) = {check(schema, value, schema) for check in validators()}
    return answer


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name: str):
    assert same(RUN, tomllib.loads(to_toml(preset(name))))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_examples_are_valid_and_name_their_schema(path: Path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    schema = path.parent / first.removeprefix("#:schema ")
    assert same(
        json.loads(schema.read_text(encoding="utf-8")), tomllib.loads(path.read_text(encoding="utf-8"))
    )


@pytest.mark.parametrize(("name", "schema"), [("run", RUN), ("comparison", COMPARISON)])
def test_the_committed_schema_is_that_of_the_code(name: str, schema: dict):
    path = ROOT / "docs" / "schema" / f"{name}.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == schema, f"curriq schema {name} > {path}"


def test_every_setting_has_its_default_and_its_help_text():
    defaults = to_dict(RunConfig())
    for name, owner in field_owners().items():
        setting = RUN["properties"][owner]["properties"][name]
        assert setting["description"] == describe()[name][1]
        if name != "sources":
            assert setting["default"] == defaults[owner][name]


@pytest.mark.parametrize(("section", "name", "refused", "accepted"), BOUNDS)
def test_bounds_are_those_of_the_program(section: type, name: str, refused: list, accepted: list):
    def table(value: Any) -> dict[str, Any]:
        if section is SourceConfig:
            return {"data": {"sources": [{"name": "a", "path": "b", name: value}]}}
        return {field_owners()[name]: {name: value}}

    for value in refused:
        assert value != value or not same(RUN, table(value))
    for value in accepted:
        assert same(RUN, table(value))


@pytest.mark.parametrize(
    "values",
    [
        {"critics": {}},
        {"critic": {"bta": 1}},
        {"critic": {"beta": "warm"}},
        {"train": {"steps": 1.5}},
        {"critic": {"credit": "best"}},
        {"data": {"sources": [{"name": "a"}]}},
        {"data": {"sources": [{"name": "a", "path": "b", "corruption": "dust"}]}},
        {"critic": {"q_features": ["first"]}},
    ],
)
def test_what_the_program_refuses_is_invalid(values: dict):
    with pytest.raises(CurriqError):
        from_dict(values)
    assert not same(RUN, values)


def test_plug_ins_are_valid():
    assert same(RUN, {"select": {"selector": "my_module:build"}, "langevin": {"proposer": "file.py:f"}})


def test_comparisons_know_the_flat_settings(tmp_path: Path):
    text = '[compare]\nseeds = [0]\nbaseline = "a"\n[arms.a]\n[arms.b]\n{}\n'
    for line, valid in [
        ("beta = 0.1", True),
        ('preset = "recommended"', True),
        ("seed_offset = 100", True),
        ("beta = -1.0", False),
        ("stepps = 3", False),
        ("seed = 3", False),  # the comparison decides it
    ]:
        (tmp_path / "c.toml").write_text(text.format(line))
        assert same(COMPARISON, tomllib.loads(text.format(line))) == valid
        if valid:
            load_plan(tmp_path / "c.toml")
        else:
            with pytest.raises(CurriqError):
                load_plan(tmp_path / "c.toml")
