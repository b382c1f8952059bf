"""One style of errors: every command answers a wrong call in one line that says what to do."""

import ast
from pathlib import Path

import pytest

import curriq
from curriq.cli import COMMANDS, main

WORDS = {
    "compare": ["c.toml"],
    "push": ["runs/x", "me/x"],
    "completion": ["bash"],
    "resume": ["runs/x"],
    "select": ["--out", "clean.jsonl", "runs/x"],
}
"""Words with which a command gets as far as its options; the others take a folder or nothing."""
OPTIONAL = {"train", "check", "plan", "try", "presets", "schema"}
"""Commands without a required argument."""


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("curriq: ")
    assert line.endswith((".", "?"))
    assert "usage:" not in line
    return line.removeprefix("curriq: ")


def words_of(command: str) -> list[str]:
    if command == "runs":
        return ["list", "runs"]
    return WORDS.get(command, [] if command in OPTIONAL else ["runs/x"])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option(command: str, capsys):
    if command in ("resume", "check"):  # needs the run; lists all faults instead
        pytest.skip("see test_cli, test_check")
    line = refused(capsys, command, *words_of(command), "--no-such-thing")
    assert line.startswith("unknown argument '--no-such-thing'.")
    assert "explains every option" in line


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in OPTIONAL])
def test_a_missing_argument(command: str, capsys):
    assert " is missing: " in refused(capsys, command)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in {*OPTIONAL, "completion"}])
def test_a_missing_folder_or_file(command: str, capsys):
    line = refused(capsys, command, *words_of(command))
    assert words_of(command)[-1 if command != "push" else 0] in line


def test_an_unknown_command(capsys):
    assert refused(capsys, "trian").startswith("unknown command 'trian'. Did you mean 'train'?")


def test_every_command_uses_the_one_parser():
    """argparse's own prints a usage and ends the program; only help pages of `train` use it."""
    package = Path(curriq.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "argparse.ArgumentParser":
                found.append(path.relative_to(package).as_posix())
    assert set(found) <= {"cli.py"}
