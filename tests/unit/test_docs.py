"""The documentation site holds every page, its links lead somewhere, and its commands are understood."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from curriq.cli import COMMANDS, parse_run_config

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = [page for entry in settings["nav"] for page in entry.values()]
    assert sorted(named) == [page.name for page in PAGES]
    assert settings["strict"] is True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        assert not target or (DOCS / target).exists(), target
        if anchor:
            text = (DOCS / target if target else page).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", ["tutorial.md", "howto.md", "replay.md", "tasks.md", "report.md"])
def test_commands_are_understood(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("[train]\nsteps = 5\n")
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]
    called = [line for line in lines if line and line[0].endswith("curriq")]
    assert called
    for _, command, *arguments in called:
        assert command in COMMANDS
        if command == "train":
            parse_run_config(arguments)


@pytest.mark.parametrize("name", ["algorithm.md", "langevin.md"])
def test_pointers_into_the_code_are_right(name: str):
    """`folder/file.py: Class.method` names a file and what is in it."""
    found = 0
    for path, symbol in re.findall(
        r"`([\w/]+\.py)(?:: ?([\w.]+))?`", (DOCS / name).read_text(encoding="utf-8")
    ):
        files = [*(ROOT / "src" / "curriq").rglob(path), *ROOT.glob(path)]
        assert files, path
        texts = [file.read_text(encoding="utf-8") for file in files]
        for part in filter(None, symbol.split(".")):
            defined = rf"(def|class) {part}\b|^{part}\b"
            assert any(re.search(defined, text, re.MULTILINE) for text in texts), f"{path}: {part}"
        found += 1
    assert found > 3
