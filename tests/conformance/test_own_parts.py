"""Conversations in `curriq train`, and parts of the user's own: what the log, the folder and a replay say."""

import json
from pathlib import Path

import pytest
from tests.runs import Finished, tiny

from curriq.cli import main
from curriq.config import SourceConfig
from curriq.runlog.read import read_summary, read_windows
from curriq.select.base import Context, Method
from curriq.train.build import build_method
from curriq.train.run import train


@pytest.fixture
def chats(tmp_path: Path) -> tuple[SourceConfig, ...]:
    """A hundred conversations: the user counts up, the assistant counts down."""
    file = tmp_path / "chats.jsonl"
    with file.open("w") as lines:
        for i in range(100):
            messages = [
                {"role": "user", "content": " ".join(f"up {i + j}" for j in range(20))},
                {"role": "assistant", "content": " ".join(f"down {i - j}" for j in range(20))},
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return (SourceConfig(name="chat", path=str(file), text_field="messages", weight=1.0),)


@pytest.mark.parametrize("selector", ["soft-q", "uniform"])
def test_conversations_are_trained_on_logged_and_replayed(selector, chats, tmp_path):
    data = {"sources": chats, "target": "chat", "held_out_share": 0.4, "selector": selector}
    data |= {"reward_set_size": 8, "validation_set_size": 4, "test_set_size": 4, "reward_windows": 4}
    train(tiny(run_dir=str(tmp_path / "run"), **data))
    assert main(["export", str(tmp_path / "run")]) == 0
    curriculum = str(tmp_path / "run" / "curriculum.parquet")
    train(tiny(run_dir=str(tmp_path / "again"), **data, curriculum=curriculum))
    assert Finished(tmp_path / "again").weights == Finished(tmp_path / "run").weights

    sample = read_windows(tmp_path / "run").sample()
    texts = sample.tokenizer.decode_batch(sample.tokens.tolist())
    answers = sample.tokenizer.decode_batch([row[row >= 0].tolist() for row in sample.stored])
    assert any("up" in text for text in texts)
    assert not any("up" in text for text in answers)
    assert any("down" in text for text in answers)


def counting(config, context: Context) -> Method:
    """The method of the configuration, with a number of its own in the log."""
    method = build_method(config, context)
    observe = method.selector.observe
    method.selector.observe = lambda step: {**observe(step), "own/count": float(step.index)}
    return method


def test_a_method_of_ones_own_gives_its_name_to_folder_and_summary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(tiny(run_dir=""), method=counting)
    assert result.run_dir == Path("runs/counting-0")
    assert read_summary(result.run_dir)["selector"] == "counting"
    assert [row["own/count"] for row in Finished(result.run_dir).rows] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_file_as_selector_gives_a_folder_without_its_marks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("sub/mine.py").write_text(
        "from curriq.train.build import build_method\n"
        "def build(config, context):\n"
        "    return build_method(config.override(selector='uniform'), context)\n"
    )
    result = train(tiny(run_dir="", selector="sub/mine.py:build"))
    assert result.run_dir == Path("runs/sub-mine.py-build-0")


def test_a_metric_without_a_definition_is_told_its_name(tmp_path):
    def undefined(config, context):
        method = counting(config, context)
        method.selector.observe = lambda step: {"mine/count": 1.0}
        return method

    with pytest.raises(KeyError, match=r"unknown metric 'mine/count'.*'own/count'"):
        train(tiny(run_dir=str(tmp_path / "run")), method=undefined)
