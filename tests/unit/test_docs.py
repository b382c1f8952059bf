"""The documentation site holds every page, its links lead somewhere, and what it shows works."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from curriq.cli import COMMANDS, TRAIN_OPTIONS, main, own_options, parse_run_config

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXT = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
POINTER = re.compile(r"`([\w/]+\.py)(?:: ([\w.]+(?:, [\w.]+)*))?`")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT[page], flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Words of each call of curriq, from the command on."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line[1:] for line in lines if line and line[0].endswith("curriq")]


WITH_COMMANDS = [name for name in TEXT if commands(name)]


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = list(_pages(settings["nav"]))
    assert sorted(named) == sorted(TEXT)
    assert settings["strict"] is True


def test_the_search_needs_no_server():
    """The index is built as a script too, and what runs it on a page from a disk is in the repository."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {"search", "offline"} <= {name for name in settings["plugins"] if isinstance(name, str)}
    (script,) = settings["extra"]["polyfills"]
    assert "IFrameWorker" in (DOCS / script).read_text(encoding="utf-8")
    assert "iframe-worker" in script  # by this the plugin sees that it need not take one from a server


def _pages(nav: list[dict]) -> Iterator[str]:
    for entry in nav:
        for page in entry.values():
            yield from _pages(page) if isinstance(page, list) else [page]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^):]*))?\)", page.read_text(encoding="utf-8")):
        assert not target or (page.parent / target).exists(), target
        if anchor and not anchor.startswith("curriq."):  # of the API reference, which the strict build checks
            text = (page.parent / target if target else page).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_commands_are_understood(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("[train]\nsteps = 5\n")
    for command, *arguments in commands(name):
        assert command in COMMANDS
        if command == "train":
            parse_run_config(own_options(arguments, TRAIN_OPTIONS)[1])
        for argument in arguments:
            for place in re.findall(r"^(?:examples|experiments)/[^:]+", argument):
                assert (ROOT / place).exists(), place


def test_pages_with_commands_are_found():
    assert {"tutorial.md", "howto.md", "compare.md", "langevin.md"} <= set(WITH_COMMANDS)


@pytest.mark.parametrize("name", ["near_level.py", "my_filter.py"])
def test_recipes_of_ones_own_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The selector and the stream filter of the page, copied into files and called as the page says."""
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in blocks("howto.md", "python") if block.startswith(f"# {name}\n")]
    Path(name).write_text(code)
    (call,) = [words for words in commands("howto.md") if f"{name}:build" in words]
    assert len(code.splitlines()) <= 30
    tiny = ["--preset", "smoke", "--steps", "2", "--progress", "none", "--no-tensorboard", "--run-dir", "run"]
    assert main([*call, *tiny]) == 0
    assert Path("run", "summary.json").exists()


@pytest.mark.parametrize("name", ["algorithm.md", "langevin.md"])
def test_pointers_into_the_code_are_right(name: str):
    """`folder/file.py: Class.method, function` names a file of the package or of the repository, and what is
    defined in it."""
    pointers = POINTER.findall(TEXT[name])
    for path, symbols in pointers:
        (file,) = [place for place in (ROOT / "src" / "curriq" / path, ROOT / path) if place.exists()]
        for symbol in filter(None, symbols.split(", ")):
            assert symbol in defined(file), f"{path}: {symbol}"
    assert sum(bool(symbols) for _, symbols in pointers) > 20


def test_the_tests_that_hold_a_promise_exist():
    """Every fault of the page names its test: `file.py::Class::function`."""
    rows = re.findall(r"^\| [^|]+\|[^|]+\|[^|]+\| (.*) \|$", TEXT["reliability.md"], flags=re.MULTILINE)
    named = [row for row in rows if row != "test"]
    assert len(named) > 25
    for row in named:
        path, *symbols = row.strip("`").split("::")
        assert ".".join(symbols) in defined(ROOT / path), row


def defined(file: Path) -> set[str]:
    """Functions, classes, methods and constants of a file, methods as `Class.method`."""

    def names(nodes: list[ast.stmt], prefix: str = "") -> set[str]:
        found = set()
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= names(node.body, f"{node.name}.")
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
        return found

    return names(ast.parse(file.read_text(encoding="utf-8")).body)
