"""Functions of the user's own by module, file and entry point, and one clear error for every mistake."""

import importlib.metadata
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from tests.conformance.compositions import RAG
from tests.runs import tiny

from curriq import select
from curriq.errors import CurriqError
from curriq.plugins import find_builder, load_object
from curriq.train.run import prepare

BUILT_IN = {"uniform": list, "bandit": dict}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, on Python's path, with a package, a file of two levels and a broken module."""
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "__init__.py").write_text("")
    (tmp_path / "my_pkg" / "parts.py").write_text(
        "def build(context): return ['built', context]\nX = 3\n"
        "def search(context): raise TypeError('found by its name')\n"
    )
    (tmp_path / "plain.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Made:\n    x: int = 7\n"
    )
    (tmp_path / "needs.py").write_text("import a_module_that_nobody_has\n")
    (tmp_path / "wrong.py").write_text("raise ValueError('its own')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def find(name: str):
    return find_builder(name, BUILT_IN, setting="--selector", group="curriq.selectors")


def installed(monkeypatch: pytest.MonkeyPatch, name: str, group: str) -> None:
    """An entry point of this name."""
    function = "search" if group == "curriq.samplers" else "build"
    points = EntryPoints([EntryPoint(name, f"my_pkg.parts:{function}", group)])
    for place in ("curriq.plugins", "curriq.config.checks"):
        monkeypatch.setattr(f"{place}.entry_points", lambda **wanted: points.select(**wanted))


def test_a_built_in_name_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "bandit", "curriq.selectors")
    assert find("bandit") is dict


def test_the_groups_are_those_of_the_documentation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "mine", "curriq.selectors")
    assert tiny(selector="mine").method == "mine"
    assert select.builder("mine")(2) == ["built", 2]
    installed(monkeypatch, "searching", "curriq.samplers")
    with pytest.raises(TypeError, match="found by its name"):
        prepare(tiny(**RAG, proposer="searching"))


def test_by_module_and_by_file(folder: Path) -> None:
    assert find("my_pkg.parts:build")(1) == ["built", 1]
    assert load_object("my_pkg.parts:X") == 3
    for path in ("plain.py", "./plain.py", folder / "plain.py"):
        assert load_object(f"{path}:Made")().x == 7  # a dataclass looks its module up


def test_by_entry_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def entry_points(**wanted: str) -> EntryPoints:
        asked.append(wanted["group"])
        points = EntryPoints([EntryPoint("mine", "my_pkg.parts:build", wanted["group"])])
        return points.select(**wanted)

    monkeypatch.setattr("curriq.plugins.entry_points", entry_points)
    monkeypatch.setattr("curriq.config.checks.entry_points", entry_points)
    assert find("mine")(2) == ["built", 2]
    assert set(asked) == {"curriq.selectors"}
    with pytest.raises(CurriqError, match=r"unknown --selector 'mines'\. Did you mean 'mine'\? Known: "):
        find("mines")


def test_no_entry_points_are_installed_by_the_package_itself() -> None:
    assert not importlib.metadata.entry_points(group="curriq.selectors")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            "bandits",
            r"unknown --selector 'bandits'.*Did you mean 'bandit'\?.*Or write package\.module:function",
        ),
        ("my_pkg.part:build", r"there is no module 'my_pkg\.part'; write package\.module:name"),
        ("other.parts:build", r"there is no module 'other'"),
        ("my_pkg.parts:built", r"my_pkg\.parts has no 'built'"),
        ("my_pkg.parts:", r"my_pkg\.parts has no ''"),
        ("missing.py:build", r"there is no file missing\.py in /.*; write"),
        ("plain.py:make", r"plain\.py has no 'make'"),
        (":build", r"':build': write package\.module:name"),
        (".parts:build", r"'\.parts:build': write"),
        ("my pkg:build", r"'my pkg:build': write"),
        ("my_pkg.parts:X", r"--selector my_pkg\.parts:X: 3 is not a function"),
    ],
)
def test_mistakes(reference: str, message: str, folder: Path) -> None:
    with pytest.raises(CurriqError, match=message):
        find(reference)


def test_errors_of_the_module_itself_pass_through(folder: Path) -> None:
    for module in ("needs", "needs.py"):
        with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
            load_object(f"{module}:build")
    for module in ("wrong", "wrong.py"):
        with pytest.raises(ValueError, match="its own"):
            load_object(f"{module}:build")
