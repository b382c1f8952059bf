"""The architecture as tests: imports go one way, and one file alone knows the concrete classes."""

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import curriq
from curriq.config import RunConfig

PACKAGE = Path(curriq.__file__).parent

# Data order. A module may import the layers before its own, and its own subpackage; never a sibling of
# its layer and never a later layer. The longest matching prefix counts.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("types", "config", "rng", "parallel"),
    ("presets", "plugins"),
    ("data", "runlog", "softq.equations", "langevin.dynamics"),
    ("lm", "softq"),
    ("select",),
    ("langevin",),
    ("train",),
    ("report",),
    ("evaluate",),
    ("cli",),
    ("__main__",),
)
RANK = {prefix: rank for rank, layer in enumerate(LAYERS) for prefix in layer}

CONCRETE = ("data", "lm", "langevin", "select", "softq")
"""Subpackages whose classes only `train/build.py` puts together."""
LOOP_MAY_IMPORT = {"types", "rng", "errors", "softq.equations"}


def modules() -> dict[str, Path]:
    """Dotted name below `curriq` → file. The façade `curriq/__init__.py` belongs to no layer."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(module: str, path: Path) -> Iterator[tuple[str, str | None]]:
    """(module below `curriq`, imported name) of every import in the file, those inside functions too."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
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
                inside = [*source[1:], alias.name]
                if ".".join(inside) in modules():
                    yield ".".join(inside), None
                elif source[1:]:
                    yield ".".join(source[1:]), alias.name
                else:
                    pytest.fail(f"{path}: import {alias.name} from its own module, not from the façade")


def layer_of(module: str) -> tuple[int, str]:
    """Rank of a module and the prefix that gives it; the longest prefix counts."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in RANK:
            return RANK[prefix], prefix
    pytest.fail(f"curriq.{module} has no layer: give it one in LAYERS")


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    rank, _ = layer_of(module)
    for imported, _name in imports(module, MODULES[module]):
        imported_rank, _ = layer_of(imported)
        same_subpackage = imported.split(".")[0] == module.split(".")[0]
        assert imported_rank < rank or (imported_rank == rank and same_subpackage), (
            f"curriq.{module} (layer {rank}) imports curriq.{imported} (layer {imported_rank})"
        )


@pytest.mark.parametrize("module", MODULES)
def test_only_build_puts_concrete_classes_together(module: str) -> None:
    """Outside its own subpackage, a class of `propose`, `select`, … is named in `train/build.py` alone.

    A layer that works on a class of an earlier layer (the learner's model, for instance) is no wiring:
    the rule binds `train` and everything after it.
    """
    if module == "train.build" or layer_of(module)[0] < RANK["train"]:
        return
    for imported, name in imports(module, MODULES[module]):
        subpackage = imported.split(".")[0]
        is_class = name is not None and name[:1].isupper() and not name.isupper()
        assert subpackage not in CONCRETE or not is_class, (
            f"curriq.{module} imports the class {name} of curriq.{imported}; only curriq.train.build may"
        )


@pytest.mark.skipif("train.loop" not in MODULES, reason="there is no train/loop.py")
def test_the_loop_knows_protocols_only() -> None:
    for imported, _name in imports("train.loop", MODULES["train.loop"]):
        helper = imported.startswith("train.") and imported not in ("train.run", "train.build")
        assert helper or imported in LOOP_MAY_IMPORT, f"train/loop.py imports curriq.{imported}"


def test_report_reads_logs_without_torch() -> None:
    """A report is made from files, on a machine that may have no torch."""
    names = [f"curriq.{m}" for m in MODULES if m.split(".")[0] == "report"]
    code = f"import importlib, sys\nfor m in ['curriq', *{names}]: importlib.import_module(m)\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, curriq; dir(curriq); print(*sorted(m for m in sys.modules if m.startswith('curriq.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_public_names_are_few_and_hide_no_subpackage() -> None:
    top_level = {module.split(".")[0] for module in MODULES}
    assert len(curriq.__all__) <= 15
    assert not top_level & set(curriq.__all__)


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


def test_config_field_names_are_unique_over_sections() -> None:
    """The command line is flat, so a name that two sections share would be ambiguous."""
    sections = [getattr(RunConfig(), section.name) for section in dataclasses.fields(RunConfig)]
    names = [setting.name for section in sections for setting in dataclasses.fields(section)]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
