"""`experiments/results.py`: what it runs, which streams it leaves out, and what stands above a table."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from experiments import results
from tests.cli.test_compare import write

from curriq.errors import CurriqError
from curriq.evaluate.assess import assess_arm
from curriq.evaluate.compare import compare
from curriq.evaluate.plan import load_plan
from curriq.train.run import train

EXPERIMENTS = Path(results.__file__).parent


def published(folder: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress((folder / "published" / "tiny.json.gz").read_bytes()))


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


def test_one_arm_made_anew_takes_the_place_of_its_own(tmp_path, monkeypatch):
    """What is published then is what the whole comparison would have given, but for the tail of that arm."""
    file = write(tmp_path, [0, 1])
    file.rename(tmp_path / "tiny.toml")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "published")
    plan = load_plan(tmp_path / "tiny.toml", tmp_path / "out" / "tiny")
    for run in plan.runs:
        train(run.config.override(threads=1))
    assert results.run("tiny", tmp_path / "out", workers=1, publishing=True) == 0
    whole = published(tmp_path)
    arm = next(arm for arm in plan.arms if arm != plan.compare.baseline)

    old = json.loads(json.dumps(whole))
    old["origin"] |= {
        "commit": f"aaaaaaa, other at bbbbbbb, {arm} at ccccccc",
        "hardware": "an abacus; other: a quill",
    }
    old["arms"][arm] = {"selector": "what it was then"}
    old["notes"] = [f"{arm} on tiny never selected: it did then."]
    for arms in old["streams"].values():
        for run in arms[arm]["runs"]:
            run["test_loss"] += 1.0
        arms[arm] = assess_arm(arms[arm]["runs"], arms[plan.compare.baseline]["runs"], None)
    results.publish(old, tmp_path / "published" / "tiny.json.gz")
    assert published(tmp_path)["streams"] != whole["streams"]

    assert results.run("tiny", tmp_path / "out", workers=1, publishing=True, arms=[arm]) == 0
    anew = published(tmp_path)
    assert anew["origin"]["commit"] == f"aaaaaaa, other at bbbbbbb, {arm} at unknown"
    assert anew["origin"]["hardware"] == f"an abacus; other: a quill; {arm}: {whole['origin']['hardware']}"
    moved = results.OTHER_MACHINE.format(arm)
    assert anew["notes"] == [moved, *(note for note in whole["notes"] if note.startswith(f"{arm} on "))]
    assert (anew["arms"], anew["baseline"]) == (whole["arms"], whole["baseline"])
    for stream, arms in whole["streams"].items():
        assert anew["streams"][stream][arm] == arms[arm] | {"tail": None}
        assert {name: anew["streams"][stream][name] for name in arms if name != arm} == {
            name: found for name, found in arms.items() if name != arm
        }


def test_an_arm_that_read_other_data_is_not_mixed_in(tmp_path, monkeypatch):
    file = write(tmp_path, [0])
    plan = load_plan(file, tmp_path / "out")
    for run in plan.runs:
        train(run.config.override(threads=1))
    assert compare(plan) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    arm = next(arm for arm in plan.arms if arm != plan.compare.baseline)
    other = json.loads(json.dumps(found))
    for arms in other["streams"].values():
        for run in arms[plan.compare.baseline]["runs"]:
            run["data_fingerprint"] = "0" * 16
    made = results.origin(1)
    with pytest.raises(CurriqError, match="read other data"):
        results.with_arms({"origin": {"commit": "a"}} | other, found | {"arms": [arm]}, made)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "static", "alike", "--arms", "recommended"], "--only NAME"),
        (["--only", "selected", "--arms", "recommended"], "--only NAME"),
        (["--only", "static", "--arms", "recomended"], "recomended: static has uniform, recommended"),
        (["--only", "static", "--arms", "uniform"], "run all of them"),
        (["--only", "static", "--arms", "recommended"], "--arms without --publish"),
        (["--only", "rho", "--arms", "RHO", "--publish"], "not published yet"),
    ],
)
def test_arms_that_cannot_be_run_alone_are_refused_at_once(words, said, monkeypatch, capsys):
    rho = load_plan(EXPERIMENTS / "rho.toml")
    arm = next(arm for arm in rho.arms if arm != rho.compare.baseline)
    words = [arm if word == "RHO" else word for word in words]
    monkeypatch.setattr("sys.argv", ["results.py", *words])
    with pytest.raises(SystemExit) as ended:
        results.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
