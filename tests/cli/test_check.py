"""`curriq check`: what it prints, its JSON and its status; and `curriq train` with the same checks."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import Finished, InterruptAt, tiny

from curriq.cli import main
from curriq.evaluate.check import check, duration
from curriq.runlog.read import read_metrics, read_summary
from curriq.train.estimate import estimate
from curriq.train.run import prepare, resume, train

WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in "lmnrst"]
QUICK = (
    *("--preset", "smoke", "--vocab-size", "300", "--threads", "1", "--device", "cpu", "--no-tensorboard"),
    *("--tokenizer-sample-bytes", "50000"),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a crawl and a clean target, both with columns of other names."""
    monkeypatch.chdir(tmp_path)
    for name, column, count in (("crawl", "content", 300), ("news", "body", 200)):
        draw = random.Random(name)
        texts = (" ".join(draw.choices(WORDS, k=60)) for _ in range(count))
        lines = (json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def sources(**keys: str) -> tuple[str, ...]:
    return ("--sources", *(f"name={name},path={name}.jsonl{more}" for name, more in keys.items()))


def document(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a check."""
    status = main(["check", "--json", *QUICK, *arguments])
    return status, json.loads(capsys.readouterr().out)


class TestFaults:
    def test_of_settings_and_of_every_source_at_once(self, here: Path, capsys: pytest.CaptureFixture):
        bad = ("--beta", "0", "--window", "1", *sources(crawl="", news=""), "--target", "news")
        status, found = document(capsys, *bad)
        assert status == 1
        assert not found["usable"]
        assert [fault["fix"] for fault in found["faults"]] == [
            "",
            "",
            "text_field=content",
            "text_field=body",
        ]
        assert [fault["where"] for fault in found["faults"]][:2] == ["settings", "settings"]
        assert found["model"] is None

    def test_train_refuses_them_with_one_message(self, here: Path, capsys: pytest.CaptureFixture):
        assert main(["train", *QUICK, *sources(crawl="", news=""), "--target", "news"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("curriq: ") == 1
        assert "text_field=content" in err
        assert "text_field=body" in err
        assert not (here / "runs").exists()

    def test_dry_run_is_the_same(self, here: Path, capsys: pytest.CaptureFixture):
        arguments = (*QUICK, *sources(crawl="", news=""), "--target", "news")
        assert main(["train", *arguments, "--dry-run"]) == main(["check", *arguments]) == 1
        first, second = capsys.readouterr().out.split("What was read")[1:]
        assert first.strip() == second.strip()

    def test_data_only(self, here: Path, capsys: pytest.CaptureFixture):
        status, found = document(capsys, "--data-only", *sources(news=",text_field=body"))
        assert (status, found["usable"], found["model"]) == (0, True, None)

    def test_faults_beyond_the_sources(self, here: Path, capsys: pytest.CaptureFixture):
        """Of the whole run, which is built once the sources are in order."""
        status, found = document(capsys, *sources(news=",text_field=body"), "--test-set-size", "100000")
        assert status == 1
        (fault,) = found["faults"]
        assert "larger than the held-out documents" in fault["problem"]


class TestUsable:
    def test_a_folder_in_which_no_run_can_start(self, here: Path, capsys: pytest.CaptureFixture):
        """Together with the faults of the data, and by `train` before the data are read."""
        Path("taken", "checkpoints", "step-00000004").mkdir(parents=True)
        Path("file").write_text("mine")
        for folder, reason in (
            ("taken", "holds a run already"),
            ("file/run", "cannot be the folder of a run"),
        ):
            named = ("--run-dir", folder, "--sources", "name=a,path=nothing.jsonl", "--target", "a")
            status, found = document(capsys, *named)
            assert status == 1
            problems = [fault["problem"] for fault in found["faults"]]
            assert "matches no file" in problems[0]
            assert f"--run-dir {folder} {reason}" in problems[-1]
            good = sources(news=",text_field=body")
            assert main(["train", *QUICK, *good, "--run-dir", folder]) == 2
            error = capsys.readouterr().err
            assert reason in error
            assert "own loss" not in error, "the data were read first"
        assert Path("file").read_text() == "mine"

    def test_what_a_run_would_cost(self, here: Path, capsys: pytest.CaptureFixture):
        both = (*sources(crawl=",text_field=content", news=",text_field=body"), "--target", "news")
        status, found = document(capsys, *both, "--steps", "40", "--preset", "smoke")
        assert status == 0
        assert found["faults"] == []
        assert found["format"] == 1
        crawl, news = found["sources"]
        assert crawl["documents"] == 300
        assert crawl["whole"] is True
        assert news["bytes"] == (here / "news.jsonl").stat().st_size
        assert 1e5 < news["tokens_per_mb"] < 1e6  # a token of this vocabulary has some bytes
        assert found["held_out"]["asked"] == {"reward": 16, "validation": 8, "test": 8}
        assert not found["model"]["pretrained"]
        assert found["model"]["validation_loss"] == pytest.approx(math.log(300), abs=0.3)  # it knows nothing
        cost = found["estimate"]
        assert cost["steps"] == 40
        assert cost["seconds"] > 40 * cost["seconds_per_step"] > 0
        assert not (here / "runs").exists()

    def test_sizes_are_fitted_and_said(self, here: Path, capsys: pytest.CaptureFixture):
        arguments = (*QUICK, *sources(news=",text_field=body"), "--window", "32", "--test-set-size", "96")
        asked = ("--reward-set-size", "96", "--validation-set-size", "64", "--held-out-sizes", "fit")
        assert main(["check", *arguments, *asked]) == 0
        out = capsys.readouterr().out
        assert "fitted to what it can spare, of 96 reward, 64 validation, 96 test" in out

    @pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (720, "12 min"), (11_520, "3.2 h")])
    def test_durations(self, seconds: float, text: str):
        assert duration(seconds) == text


class TestEstimate:
    def test_checkpoints_are_as_large_as_it_says(self, tmp_path: Path):
        config = tiny(run_dir=str(tmp_path / "run"), checkpoint_keep=1)
        said = estimate(prepare(config))
        train(config)
        (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        tokenizer = sum(path.stat().st_size for path in (folder / "lm").glob("tokenizer*"))
        assert said.checkpoint_bytes == pytest.approx(size - tokenizer, rel=0.15)

    @pytest.mark.long
    def test_a_large_buffer_is_not_filled_to_say_what_it_costs(self, monkeypatch: pytest.MonkeyPatch):
        settings = {"proposer": "uniform-buffer", "selector": "uniform", "buffer_size": 2000, "ingest": 16}
        monkeypatch.setattr("curriq.train.estimate.REHEARSED_FILL", 200)
        run = prepare(tiny(**settings))
        said = estimate(run)
        assert len(run.session.components.proposer.buffer) <= 200 + 16 * 4
        monkeypatch.setattr("curriq.train.estimate.REHEARSED_FILL", 2000)
        whole = estimate(prepare(tiny(**settings)))
        assert said.checkpoint_bytes == pytest.approx(whole.checkpoint_bytes, rel=0.25)

    def test_rare_measurements_count_by_their_share(self, monkeypatch: pytest.MonkeyPatch):
        """Steps of 2 s, with 32 s more in every 16th: 4 s per step in the mean."""
        run = prepare(tiny(reward_every=16, steps=100))
        rows = [
            {"step": k, "time/step": 2.0 + (32.0 if k == 0 else 0.0), "data/windows_read": 8.0}
            | ({"time/reward": 20.0, "time/probe": 12.0} if k == 0 else {})
            for k in range(4)
        ]
        monkeypatch.setattr(run.session, "rehearse", lambda steps: rows[:steps])
        said = estimate(run)
        assert said.seconds_per_step == pytest.approx(4.0)
        assert said.startup_seconds == 0
        assert said.seconds >= 400

    def test_a_check_of_a_configuration_leaves_no_trace(self, tmp_path: Path):
        config = tiny(run_dir=str(tmp_path / "run"))
        assert check(config)["usable"]
        assert not (tmp_path / "run").exists()


class TestFirstValidation:
    def test_it_is_that_of_the_untrained_model(self, tmp_path: Path):
        config = tiny(run_dir=str(tmp_path / "run"))
        run = prepare(config)
        with torch.no_grad():
            expected = run.lm.window_losses(run.corpus.held_out.validation).double().mean().item()
        train(config)
        rows = read_metrics(tmp_path / "run")
        assert rows[0]["validation/initial_loss"] == pytest.approx(expected, rel=1e-6)
        assert all("validation/initial_loss" not in row for row in rows[1:])
        assert read_summary(tmp_path / "run")["initial_validation_loss"] == rows[0]["validation/initial_loss"]

    def test_an_interrupted_run_has_it_once(self, tmp_path: Path):
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        train(tiny(run_dir=str(whole)))
        train(tiny(run_dir=str(parts)), probes=(InterruptAt(2),))
        resume(parts)
        assert Finished(whole).rows == Finished(parts).rows
        assert Finished(whole).summary == Finished(parts).summary

    def test_the_end_says_before_and_after(self, tmp_path: Path, capsys: pytest.CaptureFixture):
        from curriq.report.summary import print_summary

        result = train(tiny(run_dir=str(tmp_path / "run")))
        print_summary(result.run_dir, result.summary)
        before, after = result.summary["initial_validation_loss"], result.summary["validation_loss"]
        assert f"{before:.4f} before training → {after:.4f} after" in capsys.readouterr().out

    def test_the_curve_begins_with_it(self, tmp_path: Path):
        from curriq.report.command import build

        train(tiny(run_dir=str(tmp_path / "run")))
        chart = next(
            c for c in build([tmp_path / "run"], topics=0).overview[0].charts() if c.id == "validation"
        )
        (line,) = chart.series
        assert line.y[0] == read_summary(tmp_path / "run")["initial_validation_loss"]
        assert (line.x["windows"][0], line.x["step"][0]) == (0, -1)
