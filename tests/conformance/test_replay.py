"""Export and replay: the same windows and weights, on the same run to the bit, and on others."""

from itertools import compress
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.runs import Finished, tiny

from curriq.cli import main
from curriq.errors import CurriqError
from curriq.runlog.curriculum import RecordedCurriculum
from curriq.runlog.read import read_candidates, read_metrics
from curriq.train.calibrate import calibrate, for_calibration
from curriq.train.checkpoint import latest_checkpoint
from curriq.train.run import prepare, resume, train

PLACE = ("step", "row", "window_id", "source", "score", "weight")


@pytest.fixture(scope="module", params=["soft-q", "competence"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with uneven weights, or one that leaves windows out; and its curriculum."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train(tiny(run_dir=str(folder), selector=request.param, checkpoint_every=2))
    file = folder / "curriculum.parquet"
    assert main(["export", str(folder)]) == 0
    return folder, file


def columns(folder: Path) -> dict[str, list]:
    candidates = Finished(folder).candidates
    return {name: candidates[name] for name in PLACE}


def test_a_replay_of_the_same_run_is_the_same_to_the_bit(exported, tmp_path):
    run, file = exported
    train(tiny(run_dir=str(tmp_path / "again"), curriculum=str(file), selector="bandit"))
    assert columns(tmp_path / "again") == columns(run)
    assert Finished(tmp_path / "again").weights == Finished(run).weights
    assert Finished(tmp_path / "again").summary["selector"] == "replay"
    ours, theirs = (read_metrics(folder) for folder in (tmp_path / "again", run))
    assert [row["train/loss"] for row in ours] == [row["train/loss"] for row in theirs]


def test_another_seed_and_size_see_the_same_windows_and_weights(exported, tmp_path):
    run, file = exported
    model = "random:llama:hidden_size=48,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2"
    train(tiny(run_dir=str(tmp_path / "other"), curriculum=str(file), seed=9, model=model))
    assert columns(tmp_path / "other") == columns(run)
    shapes = {
        tuple(t.shape)
        for t in load_file(latest_checkpoint(tmp_path / "other").lm / "model.safetensors").values()
    }
    assert any(48 in shape for shape in shapes)


def test_what_a_steered_stream_passed_over_is_logged_but_no_part_of_the_curriculum(tmp_path):
    settings = {
        "credit": "counterfactual",
        "q_features": ("source",),
        "max_read_ratio": 3,
        "accept_fraction": 0.4,
        "reward_every": 2,
        "steps": 12,
    }
    train(tiny(run_dir=str(tmp_path / "run"), **settings))
    assert main(["export", str(tmp_path / "run")]) == 0
    file = tmp_path / "run" / "curriculum.parquet"
    train(tiny(run_dir=str(tmp_path / "again"), curriculum=str(file), steps=12, reward_every=2))
    logged, replayed = columns(tmp_path / "run"), columns(tmp_path / "again")
    taken = [row < 8 for row in logged["row"]]
    assert not all(taken)
    assert {name: list(compress(values, taken)) for name, values in logged.items()} == replayed
    for row, taken_one in zip(read_candidates(tmp_path / "run").to_pylist(), taken, strict=True):
        assert 0 <= row["accept_prob"] <= 1
        assert (row["loss"] is None, row["weight"] == 0) == (not taken_one, not taken_one)
    rows = read_metrics(tmp_path / "run")
    assert len(taken) == rows[-1]["x/windows_read"]


def test_a_resumed_replay_is_an_uninterrupted_one(exported, tmp_path):
    _, file = exported
    settings = {"curriculum": str(file), "seed": 3, "lr_schedule": "constant"}
    train(tiny(run_dir=str(tmp_path / "whole"), **settings))
    train(tiny(run_dir=str(tmp_path / "parts"), steps=3, **settings))
    resume(tmp_path / "parts", steps=6)
    assert Finished(tmp_path / "parts").weights == Finished(tmp_path / "whole").weights
    assert columns(tmp_path / "parts") == columns(tmp_path / "whole")


def test_without_the_weights_the_selector_weighs(exported, tmp_path):
    run, file = exported
    train(
        tiny(
            run_dir=str(tmp_path / "order"),
            curriculum=str(file),
            curriculum_weights=False,
            selector="uniform",
        )
    )
    ours, theirs = columns(tmp_path / "order"), columns(run)
    assert ours["window_id"] == theirs["window_id"]
    assert set(ours["weight"]) == {1 / 8}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"vocab_size": 310}, "its tokenizer is"),
        ({"window": 16}, "use --window 32"),
        ({"num_candidates": 4, "random_k": 2}, "use --num-candidates 8"),
        ({"test_set_size": 9}, "may be test text here"),
        ({"split_seed": 1}, "may be test text here: use --split-seed 0"),
        ({"steps": 7}, "has 6 steps, this run 7"),
    ],
)
def test_what_does_not_fit_is_refused(exported, tmp_path, setting, said):
    _, file = exported
    with pytest.raises(CurriqError, match=said):
        train(tiny(run_dir=str(tmp_path / "run"), curriculum=str(file), **setting))
    assert not (tmp_path / "run").exists()


def test_what_is_no_curriculum_is_refused(exported, tmp_path, capsys):
    run, _ = exported
    for file, said in (
        (tmp_path / "none.parquet", "there is no such file"),
        (next((run / "candidates").glob("*.parquet")), "it is no curriculum"),
        (run / "metrics.jsonl", "it is no curriculum"),
    ):
        with pytest.raises(CurriqError, match=said):
            RecordedCurriculum(file)
    train(tiny(run_dir=str(tmp_path / "bare"), steps=2, log_windows_mb=0))
    assert main(["export", str(tmp_path / "bare")]) == 2
    assert "--log-windows-mb 0" in capsys.readouterr().err
    train(tiny(run_dir=str(tmp_path / "few"), steps=4, log_windows_mb=0.001))
    assert main(["export", str(tmp_path / "few")]) == 2
    assert "was used up" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "few").glob("*.parquet")] == ["test_losses.parquet"]


def test_the_model_card_tells_what_ran(exported):
    run, _ = exported
    checkpoint = latest_checkpoint(run)
    text = (checkpoint.lm / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: transformers\n")
    for said in (
        Finished(run).summary["selector"],
        "| steps | 6 |",
        "embedded:prose",
        f"{Finished(run).summary['weight_share']['prose']:.1%} |",
        "`beta` | 0.01",
        "seed 0",
    ):
        assert said in text
    assert f"| tokens | {Finished(run).summary['tokens']:,} |" in text
    assert f"{Finished(run).summary['validation_loss']:.6g}" in text
    assert str(run) not in text


def test_a_plan_takes_no_more_steps_than_there_are(tmp_path):
    train(tiny(run_dir=str(tmp_path / "run"), steps=8))
    assert main(["export", str(tmp_path / "run")]) == 0
    again = tiny(curriculum=str(tmp_path / "run" / "curriculum.parquet"), steps=8)
    for config in (again, again.override(curriculum_weights=False)):
        made, rows = calibrate(prepare(for_calibration(config)), config)
        assert len(rows) == 8
        assert made.seconds_per_step > 0
    short = again.override(steps=6)
    with pytest.raises(CurriqError, match="with --steps 6: a plan times 7 steps of it at least"):
        calibrate(prepare(for_calibration(short)), short)
