"""Names that look like markup, or hold escape sequences, through every command: they are printed as they
are, or as escapes."""

import json
from pathlib import Path

import pytest
from tests.runs import SETTINGS

from curriq.cli import main
from curriq.config import RunConfig, to_toml
from curriq.presets import preset

ESCAPE = "\x1b]0;title\x07\x1b[31m"
SHOWN = "\\x1b]0;title\\x07\\x1b[31m"
MARKUP = "a[/b] [red]b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and a run whose names have both."""
    folder = tmp_path_factory.mktemp("names") / f"r[/x] [v1]{ESCAPE}"
    folder.mkdir(parents=True)
    rows = [{"text": f"{MARKUP} {ESCAPE} row {i} " + "word " * 60} for i in range(200)]
    (folder / f"d{ESCAPE}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config(folder: Path, **more) -> RunConfig:
    source = {"name": f"{MARKUP}{ESCAPE}", "path": str(folder / f"d{ESCAPE}.jsonl")}
    return preset("smoke").override(
        **(SETTINGS | {"sources": [source], "target": source["name"], "progress": "lines"} | more)
    )


def said(capsys) -> str:
    """What a command printed, which has no control character but line breaks."""
    out, err = capsys.readouterr()
    text = out + err
    assert not {c for c in text if (c < " " or "\x7f" <= c <= "\x9f") and c not in "\n\t"}, repr(text)
    assert "Traceback" not in text
    return text


def test_every_command_prints_names_as_they_are(folder: Path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    run = str(folder / "run[/b]")
    place = run.replace(ESCAPE, SHOWN)
    (folder / "run.toml").write_text(to_toml(config(folder, steps=2)), encoding="utf-8")
    assert main(["train", "--config", str(folder / "run.toml"), "--run-dir", run]) == 0
    text = said(capsys)
    assert f"{MARKUP}{SHOWN}" in text  # in the table of sources
    assert f"{place}/metrics.jsonl" in text
    assert main(["train", "--config", str(folder / "run.toml"), "--run-dir", run]) == 2
    assert place in said(capsys)
    assert main(["resume", run, "--steps", "3"]) == 0
    assert f"{place}/checkpoints/step-00000003" in said(capsys)
    assert main(["export", run]) == 0
    assert f"{place}/curriculum.parquet" in said(capsys)
    assert main(["report", run, "--topics", "2"]) == 0
    assert f"{place}/report.html" in said(capsys)
    page = (Path(run) / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in page
    assert main(["eval", run, "--tasks", "--source-windows", "4"]) == 0
    assert f"{MARKUP}{SHOWN}" in said(capsys)
    assert main(["watch", run, "--port", "99999"]) == 2
    said(capsys)


@pytest.mark.long
def test_compare_prints_names_as_they_are(folder: Path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    (folder / "base.toml").write_text(to_toml(config(folder, steps=2, run_dir="")), encoding="utf-8")
    where = json.dumps(str(folder / "base.toml"))
    plan = f'[compare]\nseeds = [0]\nbaseline = "a"\nconfig = {where}\nallow_constant_lr = true\n'
    plan += '[arms.a]\nselector = "uniform"\n[arms.b]\nselector = "nonsense[/b]\\u001b[31m"\n'
    (folder / "plan.toml").write_text(plan, encoding="utf-8")
    assert main(["compare", str(folder / "plan.toml"), "--out", str(folder / "out")]) == 2
    assert "nonsense[/b]\\x1b[31m" in said(capsys)
    plan = plan.replace("nonsense[/b]\\u001b[31m", "random-k")
    (folder / "plan.toml").write_text(plan, encoding="utf-8")
    assert main(["compare", str(folder / "plan.toml"), "--out", str(folder / "out")]) == 0
    assert str(folder / "out" / "comparison.json").replace(ESCAPE, SHOWN) in said(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        [f"tr{ESCAPE}"],
        ["train", f"--x{ESCAPE}", "1"],
        ["train", "--preset", ESCAPE],
        ["train", "--config", ESCAPE],
        ["train", "--config", "a\0b"],
        ["train", "--model", f"random:{ESCAPE}"],
        ["train", "--sources", f"name={ESCAPE},path={ESCAPE}", "--target", ESCAPE],
        ["resume", ESCAPE],
        ["resume", "x" * 5000],
        ["presets", ESCAPE],
        ["compare", ESCAPE],
        ["eval", ESCAPE],
        ["report", ESCAPE],
        ["report", ESCAPE, f"--out{ESCAPE}"],
        ["watch", ESCAPE],
        ["watch", ".", "--every", "inf"],
        ["watch", ".", "--port", ESCAPE],
        ["export", ESCAPE],
        ["export", "a\0b"],
        ["eval", "a\0b"],
        ["report", "a\0b"],
        ["compare", "a\0b"],
    ],
)
def test_refusals_print_names_as_they_are(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) in (2, 74)
    assert len(said(capsys)) < 20_000
