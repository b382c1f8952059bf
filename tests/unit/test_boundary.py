"""Whatever a command raises becomes one message and the status that is documented for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from curriq.boundary import STATUSES, exit_status
from curriq.cli import USAGE, main
from curriq.errors import CurriqError

ROOT = Path(__file__).resolve().parents[2]


def raising(error: BaseException):
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (CurriqError("fix it."), 2, "curriq: fix it.\n"),
        (OSError(28, "No space left on device", "a/b"), 74, "for a/b: No space left on device"),
        (PermissionError(13, "Permission denied"), 74, "Permission denied"),
        (MemoryError(), 71, "too little memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 TB"),
            71,
            "--micro-batch",
        ),
        (SystemExit(0), 0, ""),
        (SystemExit(2), 2, ""),
        (KeyboardInterrupt(), 130, "the last checkpoint stands"),
    ],
)
def test_each_kind_has_its_status_and_one_message(error, status, said, capsys) -> None:
    assert exit_status(raising(error)) == status
    assert status in STATUSES
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == bool(said)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("[…/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1", 69),
        ("a shape differs", 70),
    ],
)
def test_a_process_that_lost_another_is_no_fault(words, status, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert exit_status(raising(RuntimeError(words))) == 70  # there is no other
    monkeypatch.setenv("WORLD_SIZE", "2")
    capsys.readouterr()
    assert exit_status(raising(RuntimeError(words))) == status
    assert ("another process has ended" in capsys.readouterr().err) == (status == 69)


@pytest.mark.parametrize("command", ["plan", "try", "compare", "select", "score", "eval"])
def test_what_works_in_one_process_says_so_under_a_launcher(command, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, "--steps", "3"]) == 2
    said = f"curriq {command} under torchrun (2 processes): it works in one; call it without torchrun."
    assert said in capsys.readouterr().err


def test_of_several_processes_one_prints_what_a_check_found(capsys, monkeypatch) -> None:
    words = ["check", "--data-only", "--json", "--sources", "name=a,path=none.txt"]
    assert main(words) == 1
    found = capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(found)["faults"][0]["problem"] in err
    assert err.startswith("rank 1: source 'a': ")


def test_a_fault_is_written_down(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert exit_status(raising(ZeroDivisionError("by\nnothing"))) == 70
    err = capsys.readouterr().err
    assert "this is a fault of curriq (ZeroDivisionError: by)" in err
    (file,) = tmp_path.glob("curriq-fault-*.log")
    assert str(file) in err
    assert "Traceback" not in err
    details = file.read_text()
    assert "Traceback" in details
    assert "in command" in details
    assert "ZeroDivisionError: by\nnothing" in details


def test_where_nothing_can_be_written_the_details_are_shown(capsys, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
    assert exit_status(raising(ZeroDivisionError())) == 70
    assert "Traceback" in capsys.readouterr().err


def test_debugging_shows_the_traceback_of_any_error(capsys, monkeypatch) -> None:
    monkeypatch.setenv("CURRIQ_DEBUG", "1")
    assert exit_status(raising(CurriqError("fix it."))) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("curriq: fix it.\n")


def test_no_line_of_a_message_looks_like_one_of_ours(capsys) -> None:
    assert exit_status(raising(CurriqError("no column 'a\ncurriq: all is well'"))) == 2
    assert capsys.readouterr().err == "curriq: no column 'a\n  curriq: all is well'\n"


def test_the_help_and_the_documentation_list_the_statuses(capsys) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(USAGE)
    table = (ROOT / "docs" / "howto.md").read_text(encoding="utf-8")
    for status, meaning in STATUSES.items():
        assert re.search(rf"^ +{status}  {re.escape(meaning)}$", out, flags=re.MULTILINE)
        assert f"| {status} | {meaning} |" in table


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("words", [["presets"], ["train", "--help-all"], ["report", "--help"]])
@pytest.mark.parametrize("kept", [os.environ.keys(), {"PATH", "HOME"}])  # what is buffered hangs on it
def test_an_output_that_takes_nothing_is_one_message(words: list[str], kept) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "curriq", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={name: os.environ[name] for name in kept} | {"PYTHONPATH": str(ROOT / "src")},
        )
    assert done.returncode == 74
    assert done.stderr.splitlines() == [line for line in done.stderr.splitlines() if "No space left" in line]
    assert len(done.stderr.splitlines()) == 1
