"""`experiments/results.py`: what it runs, which streams it leaves out, and what stands above a table."""

import gzip
import json
import re
from pathlib import Path

import pytest
from experiments import results
from tests.cli.test_compare import write

from curriq.evaluate.plan import load_plan
from curriq.train.run import train

EXPERIMENTS = Path(results.__file__).parent


def test_it_knows_every_comparison_of_the_folder():
    assert sorted(results.COMPARISONS) == sorted(file.stem for file in EXPERIMENTS.glob("*.toml"))


def test_what_follows_a_comparison_is_run_with_its_folder(tmp_path, monkeypatch):
    assert all((EXPERIMENTS / script).exists() for lines in results.SCRIPTS.values() for script, *_ in lines)
    (tmp_path / "say.py").write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('done')")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setitem(results.SCRIPTS, "own", (("say.py", "{out}/said"),))
    assert results.run("own", tmp_path, workers=1) == 0
    assert (tmp_path / "said").read_text() == "done"
    monkeypatch.setitem(results.SCRIPTS, "own", (("no-such.py",),))
    assert results.run("own", tmp_path, workers=1) != 0


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("embedded", ("dirty",)),
        ("streams", ()),
        ("unseen", ()),
        ("harmless", ("half",)),
        ("default_size", ("dirty",)),
        ("ablations", ("dirty",)),
        ("rho", ("dirty",)),
        ("paper_paired", ("dirty",)),
        ("paper_few", ("dirty-8",)),
    ],
)
def test_streams_without_their_text_are_left_out_and_named(name, kept, monkeypatch, capsys):
    monkeypatch.delenv("CURRIQ_DEV_DATA", raising=False)
    plan = load_plan(EXPERIMENTS / f"{name}.toml")
    ours = results.runnable(plan)
    assert ours.streams == kept
    assert {run.stream for run in ours.runs} == set(kept)
    said = capsys.readouterr().out
    assert ("set CURRIQ_DEV_DATA" in said) == (set(kept) != set(plan.streams))
    assert all(stream in said for stream in set(plan.streams) - set(kept))
    monkeypatch.setenv("CURRIQ_DEV_DATA", "/dev-data")
    assert results.runnable(plan) == plan


def test_a_comparison_without_all_of_its_streams_is_not_published(tmp_path, monkeypatch, capsys):
    """It is refused before anything is trained."""

    def never(plan):
        raise AssertionError("it was run")

    monkeypatch.delenv("CURRIQ_DEV_DATA", raising=False)
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(results, "compare", never)
    assert results.run_comparison("harmless", tmp_path, workers=1, publishing=True) != 0
    assert "--publish needs all of them" in capsys.readouterr().err
    assert not (tmp_path / "published").exists()


def test_the_tables_stand_below_where_they_are_from(tmp_path, monkeypatch, capsys):
    """Of runs that are finished, which are not run again; published, they name nothing of this machine."""
    file = write(tmp_path, [0])
    file.rename(tmp_path / "tiny.toml")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "published")
    for run in load_plan(tmp_path / "tiny.toml", tmp_path / "out" / "tiny").runs:
        train(run.config.override(threads=1))
    assert results.run("tiny", tmp_path / "out", workers=1, publishing=True) == 0
    kept = gzip.decompress((tmp_path / "published" / "tiny.json.gz").read_bytes()).decode()
    assert str(tmp_path) not in kept
    whole = json.loads((tmp_path / "out" / "tiny" / "comparison.json").read_text(encoding="utf-8"))
    for arms in whole["streams"].values():
        for run in (run for arm in arms.values() for run in arm["runs"]):
            run["folder"] = "/".join(Path(run["folder"]).parts[-2:])
    assert json.loads(kept)["streams"] == whole["streams"]
    assert json.loads(kept)["origin"]["commit"] == "unknown"
    said = capsys.readouterr().out
    head, _, tables = said.partition("Test loss, mean of the seeds")
    assert "commit unknown" in head  # the folder is no checkout
    assert re.search(r"\d+ cores, threads per run: \d+\n\d{4}-\d\d-\d\d \d\d:\d\d", head)
    assert "low-loss" in tables
    monkeypatch.setattr(results, "FOLDER", EXPERIMENTS)
    assert re.match(r"commit ([0-9a-f]{40}( dirty)?|unknown)\n", str(results.origin(2)))
