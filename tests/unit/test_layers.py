"""The architecture as tests: imports go one way, and few files know the concrete classes."""

import ast
import dataclasses
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import curriq
from curriq.config import RunConfig

PACKAGE = Path(curriq.__file__).parent
PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"

METHODS = ("select", "langevin")
"""Rooms whose content only the builders of runs name."""
CONCRETE = ("data", "lm", "softq", *METHODS)
"""Rooms whose classes only `train/build.py` puts together, and `curate/build.py` to score with them."""
BUILDERS = {"train.build", "langevin.build", "curriculum.parts", "curriculum.stream", "curate.build"}
RECORDS = {"Corpus", "Context", "Method"}
"""What builders are given and return: frozen, and known to all that call one."""
LOOP_MAY_IMPORT = {"types", "state", "softq.equations"}
PURE = ("softq.equations", "langevin.dynamics")
"""Equations, which know no module of the package."""


def modules() -> dict[str, Path]:
    """Dotted name below `curriq` → file. The façade `curriq/__init__.py` belongs to no room."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = modules()


@cache
def imports(module: str) -> tuple[tuple[str, str | None], ...]:
    """(module below `curriq`, imported name) of every import in the file, those inside functions too.

    A module that a string names, for `import_module`, counts as imported.
    """
    return tuple(_imports(module))


def _imports(module: str) -> Iterator[tuple[str, str | None]]:
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and str(node.value).startswith("curriq."):
            if (named := node.value.removeprefix("curriq.")) in MODULES:
                yield named, None
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("curriq."):
                    yield alias.name.removeprefix("curriq."), None
        elif isinstance(node, ast.ImportFrom):
            source = (node.module or "").split(".") if node.module else []
            if node.level:
                source = ["curriq", *package[: len(package) - node.level + 1], *source]
            if source[:1] != ["curriq"]:
                continue
            for alias in node.names:
                inside = ".".join([*source[1:], alias.name])
                if inside in MODULES:
                    yield inside, None
                elif source[1:]:
                    yield ".".join(source[1:]), alias.name
                else:
                    pytest.fail(f"{path}: import {alias.name} from its own module, not from the façade")


def room(module: str) -> str:
    """Subpackage or module directly below `curriq`."""
    first = module.split(".")[0]
    return "cli" if first == "__main__" else first


ROOMS = sorted(set(map(room, MODULES)))


def rooms_imported() -> dict[str, set[str]]:
    """Room → the other rooms that its modules import."""
    found: dict[str, set[str]] = {name: set() for name in ROOMS}
    for module in MODULES:
        found[room(module)] |= {room(imported) for imported, _ in imports(module)} - {room(module)}
    return found


def table() -> dict[str, set[str]]:
    """Room → the rooms that it may import, by the architecture page, in the page's order."""
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", allowed)) for name, allowed in rows if name in ROOMS}


@pytest.mark.parametrize("name", ROOMS)
def test_the_page_says_who_imports_whom(name: str) -> None:
    expected = rooms_imported()[name]
    row = f"| `{name}` | {' '.join(f'`{other}`' for other in sorted(expected))} |"
    assert table().get(name) == expected, f"the row of docs/architecture.md should begin with {row}"


def test_imports_go_one_way() -> None:
    """A room imports rooms above it in the table."""
    above: set[str] = set()
    for name, allowed in table().items():
        assert allowed <= above, f"{name} imports {sorted(allowed - above)}, which stand below it"
        above.add(name)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Inside a subpackage neither, and not in a function or for its types."""
    finished: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join([*way[way.index(module) :], module])
        if module not in finished:
            for imported, _ in imports(module):
                follow(imported, (*way, module))
            finished.add(module)

    for module in MODULES:
        follow(module, ())


@pytest.mark.parametrize("module", PURE)
def test_equations_know_no_module_of_the_package(module: str) -> None:
    assert imports(module) == ()


@pytest.mark.parametrize("module", MODULES)
def test_only_builders_name_methods(module: str) -> None:
    """What is in `select` and `langevin` is named outside these by the builders of runs alone."""
    for imported, name in imports(module):
        outside = room(imported) in METHODS and room(imported) != room(module)
        assert not outside or module in BUILDERS or name in RECORDS, (
            f"curriq.{module} imports {name or 'the module'} of curriq.{imported}; only builders may"
        )


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in ("train", "evaluate", "cli")])
def test_only_build_puts_concrete_classes_together(module: str) -> None:
    """A room that works on a class of a room above it (the learner's model, for instance) is no wiring: the
    rule binds those that run whole runs."""
    for imported, name in imports(module):
        is_class = name is not None and name[:1].isupper() and not name.isupper()
        concrete = room(imported) in CONCRETE and is_class and name not in RECORDS
        assert not concrete or module == "train.build", (
            f"curriq.{module} imports the class {name} of curriq.{imported}; only curriq.train.build may"
        )


def test_the_loop_knows_protocols_only() -> None:
    assert {imported for imported, _ in imports("train.loop")} <= LOOP_MAY_IMPORT


@pytest.mark.parametrize("name", ["runlog", "report"])
def test_logs_are_written_and_read_without_torch(name: str) -> None:
    """A report is made from files, on a machine that may have no torch."""
    names = [f"curriq.{module}" for module in MODULES if room(module) == name]
    assert names
    code = f"import importlib, sys\nfor m in ['curriq', *{names}]: importlib.import_module(m)\n"
    code += "print(*({'torch', 'transformers', 'curriq.types', 'curriq.train'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) == "runlog"])
def test_the_log_knows_no_tensors_and_nobody_who_uses_it(module: str) -> None:
    """Also in functions, and for types."""
    assert not {"types", "train", "report"} & {room(imported) for imported, _ in imports(module)}
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    named |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert "torch" not in {name.split(".")[0] for name in named}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, curriq; dir(curriq); print(*sorted(m for m in sys.modules if m.startswith('curriq.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_public_names_are_few_and_hide_no_subpackage() -> None:
    assert len(curriq.__all__) <= 15
    assert not set(ROOMS) & set(curriq.__all__)


@pytest.mark.parametrize("name", curriq.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(curriq, name) is not None


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'selektor'"):
        _ = curriq.selektor


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 600, f"{path} has {lines} lines: split it"


def test_functions_stay_short() -> None:
    """Their docstrings count; 19 of 20 have at most 40 lines, and none has more than 80."""
    lengths = sorted(
        (node.end_lineno - node.lineno + 1, f"{module}: {node.name}")
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert [function for function in lengths if function[0] > 80] == []
    assert lengths[int(0.95 * len(lengths))][0] <= 40, lengths[-20:]


def test_config_field_names_are_unique_over_sections() -> None:
    """The command line is flat, so a name that two sections share would be ambiguous."""
    sections = [getattr(RunConfig(), section.name) for section in dataclasses.fields(RunConfig)]
    names = [setting.name for section in sections for setting in dataclasses.fields(section)]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


@pytest.mark.parametrize(("run", "most"), [("plain", 16), ("recommended", 24)])
def test_a_step_passes_few_modules(run: str, most: int) -> None:
    """How many files a reader must open to follow one training step."""
    steps = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "step_modules.py"))
    assert len(steps["passed"](*steps["RUNS"][run])) <= most
