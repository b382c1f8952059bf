"""Downstream tasks: what is read from the harness's results, when they run, and what stays untouched."""

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers import tiny_lm
from tests.runs import Finished, tiny

from curriq.cli import main
from curriq.config import EvalConfig
from curriq.data.tokenizer import train_tokenizer
from curriq.errors import CurriqError
from curriq.evaluate.tasks import model_folder
from curriq.lm.harness import BOOTSTRAP, _scores, _untouched
from curriq.lm.held_out import held_out_loss
from curriq.runlog.read import read_metrics
from curriq.train.meter import TaskProbe
from curriq.train.run import load_run, train
from curriq.types import Score


def refuse(*_: Any) -> None:
    raise CurriqError("the data have moved.")


def results() -> dict[str, Any]:
    """As the harness gives them: a group of two tasks with choices, and one with a perplexity."""
    choices = {"output_type": "multiple_choice"}
    return {
        "results": {
            "group": {"alias": "group", "acc,none": 0.3, "acc_stderr,none": 0.05},
            "first": {
                "acc,none": 0.25,
                "acc_stderr,none": 0.1,
                "acc_norm,none": 0.5,
                "acc_norm_stderr,none": 0.2,
            },
            "second": {"acc,none": 0.35, "acc_stderr,none": 0.1},
            "text": {"perplexity,none": math.inf, "perplexity_stderr,none": "N/A"},
        },
        "group_subtasks": {"group": ["first", "second"]},
        "configs": {"first": choices, "second": choices, "text": {"output_type": "loglikelihood"}},
        "samples": {
            "first": [{"arguments": [0] * 4}] * 3,
            "second": [{"arguments": [0] * 2}],
            "text": [{"arguments": [0]}] * 5,
        },
    }


class TestScores:
    def test_a_group_stands_for_its_tasks(self):
        (score,) = _scores(results(), ["group"])
        assert score == Score("group", "acc", 0.3, 0.05, (3 * 0.25 + 0.5) / 4, 4)

    def test_measures_stderr_and_chance(self):
        scores = {(s.task, s.measure): s for s in _scores(results(), ["first", "text"])}
        assert list(scores) == [("first", "acc"), ("first", "acc_norm"), ("text", "perplexity")]
        assert scores["first", "acc_norm"].stderr == 0.2
        assert scores["first", "acc_norm"].chance_level == 0.25
        assert scores["text", "perplexity"].stderr is None
        assert scores["text", "perplexity"].chance_level is None

    def test_a_tag_stands_for_its_members(self):
        only = results()
        del only["results"]["group"], only["group_subtasks"]
        assert [s.task for s in _scores(only, ["some-tag"])] == ["first", "first", "second", "text"]


class StubHarness:
    """One accuracy, and a perplexity that has overflowed."""

    def scores(self) -> list[Score]:
        return [Score("a", "acc", 0.5, 0.1, 0.25, 9), Score("b", "perplexity", math.inf, None, None, 9)]


@pytest.mark.parametrize(("every", "due"), [(0, [6]), (2, [1, 3, 5, 6]), (7, [6])])
def test_tasks_are_scored_at_intervals_and_after_the_last_step(every: int, due: list[int]):
    probe = TaskProbe(StubHarness().scores, EvalConfig(eval_tasks_every=every), steps=7)
    assert [step for step in range(7) if probe.due(step)] == due


def test_an_infinite_score_is_left_out_of_the_log_and_said_once(caplog: pytest.LogCaptureFixture):
    probe = TaskProbe(StubHarness().scores, EvalConfig(), steps=7)
    probe.score()
    row = probe.score()
    assert row.pop("time/tasks") >= 0
    assert row == {"task/a/acc": 0.5, "task/a/acc/stderr": 0.1, "task/a/acc/chance_level": 0.25}
    assert len(caplog.records) == 1


def test_the_run_around_the_harness_stays_as_it_was():
    lm = tiny_lm(dropout=0.1)
    lm.network.train()
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    with _untouched(lm):
        assert not lm.network.training
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
    assert lm.network.training
    assert before[0] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(before[2], torch.get_rng_state())


class TestCommand:
    def test_what_is_no_model_is_refused(self, tmp_path, capsys):
        assert main(["eval", str(tmp_path)]) == 2
        assert "holds no model" in capsys.readouterr().err

    def test_which_model_a_path_means(self, tmp_path):
        lm = tmp_path / "checkpoints" / "step-00000006" / "lm"
        lm.mkdir(parents=True)
        (lm / "config.json").touch()
        for path in (lm, lm.parent):
            assert model_folder(path) == (lm, tmp_path)
        alone = tmp_path / "alone"
        alone.mkdir()
        (alone / "config.json").touch()
        assert model_folder(alone) == (alone, None)

    def test_a_relative_path_means_the_same(self, tmp_path, monkeypatch):
        lm = tmp_path / "checkpoints" / "step-00000006" / "lm"
        lm.mkdir(parents=True)
        (lm / "config.json").touch()
        monkeypatch.chdir(lm.parent)
        assert model_folder(Path("lm")) == model_folder(Path(".")) == (lm, tmp_path)
        monkeypatch.chdir(tmp_path / "checkpoints")
        (tmp_path / "checkpoints" / "lm").mkdir()
        (tmp_path / "checkpoints" / "lm" / "config.json").touch()
        assert model_folder(Path("lm"))[1] is None

    def test_scores_are_printed_and_saved(self, tmp_path, monkeypatch, capsys):
        """What is not finite is printed as it is and saved as null."""
        score = Score(task="mmlu", measure="acc", value=0.26, stderr=0.01, chance_level=0.25, examples=1234)
        infinite = replace(score, measure="perplexity", value=math.inf, stderr=None, chance_level=None)
        monkeypatch.setattr("curriq.lm.harness.score_folder", lambda *_, **__: [score, infinite])
        (tmp_path / "config.json").touch()
        assert main(["eval", str(tmp_path), "--tasks", "mmlu", "--out", str(tmp_path / "out.json")]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["mmlu", "acc", "0.2600", "0.0100", "0.2500", "1,234"] in rows
        assert ["mmlu", "perplexity", "inf", "–", "–", "1,234"] in rows
        saved = json.loads((tmp_path / "out.json").read_text())["tasks"]
        assert [row["value"] for row in saved] == [0.26, None]

    def test_what_earlier_calls_found_of_a_checkpoint_is_kept(self, tmp_path, monkeypatch, capsys):
        """Also where what follows the tasks fails."""
        train(tiny(run_dir=str(tmp_path), steps=2))
        score = Score(task="mmlu", measure="acc", value=0.26, stderr=0.01, chance_level=0.25, examples=1234)
        found = [score]
        monkeypatch.setattr("curriq.lm.harness.score_folder", lambda *_, **__: found)
        kept = tmp_path / "eval" / "step-00000002.json"

        def call(*words: str) -> dict[str, Any]:
            assert main(["eval", str(tmp_path), *words]) == 0
            return json.loads(kept.read_text())

        assert call("--tasks", "mmlu", "--limit", "5")["tasks"][0]["limit"] == 5
        with_sources = call("--tasks", "--source-windows", "4")
        assert [row["value"] for row in with_sources["tasks"]] == [0.26]
        assert sum(source["windows"] for source in with_sources["sources"]["losses"].values()) == 4
        found = [replace(score, value=0.3), replace(score, task="lambada_openai")]
        again = call("--tasks", "mmlu", "lambada_openai")
        rows = [(row["task"], row["value"], row["limit"]) for row in again["tasks"]]
        assert rows == [("mmlu", 0.3, None), ("lambada_openai", 0.26, None)]
        assert again["sources"] == with_sources["sources"]
        found = [replace(score, value=0.4)]
        monkeypatch.setattr("curriq.evaluate.tasks.source_losses", refuse)
        assert main(["eval", str(tmp_path), "--tasks", "mmlu", "--source-windows", "4"]) == 2
        assert json.loads(kept.read_text())["tasks"][0]["value"] == 0.4

    def test_sources_are_measured_under_the_checkpoint_that_is_named(self, tmp_path, capsys):
        train(tiny(run_dir=str(tmp_path), steps=4, checkpoint_every=2, checkpoint_keep=2, lm_lr=0.05))
        losses = {}
        for name in ("step-00000002", "step-00000004"):
            assert (
                main(["eval", str(tmp_path / "checkpoints" / name), "--tasks", "--source-windows", "8"]) == 0
            )
            losses[name] = json.loads((tmp_path / "eval" / f"{name}.json").read_text())["sources"]["losses"]
        assert losses["step-00000002"] != losses["step-00000004"]
        run = load_run(tmp_path, at="step-00000002")
        windows = run.corpus.stream.read(8).windows
        total = sum(found["loss"] * found["windows"] for found in losses["step-00000002"].values())
        assert total / 8 == pytest.approx(held_out_loss(run.lm, windows), rel=1e-5)
        (tmp_path / "checkpoints" / "step-00000004" / "state.pt").unlink()
        # The model of the checkpoint is damaged with it: another is taken for both, or none.
        assert main(["eval", str(tmp_path), "--tasks", "--source-windows", "8"]) == 0
        assert "step-00000002" in capsys.readouterr().out.splitlines()[-1]

    def test_bad_values_are_refused(self, capsys):
        assert main(["eval", "x", "--limit", "-1"]) == 2
        assert "--limit = -1" in capsys.readouterr().err

    def test_settings_are_checked(self):
        with pytest.raises(ValueError, match="every task once"):
            EvalConfig(eval_tasks=("a", "a"))


def task_files(folder: Path, data: Path) -> Path:
    """HellaSwag and MMLU on local files: from JSON lines, and from CSV with few-shot rows."""
    folder.mkdir()
    accuracy = "[{metric: acc, aggregation: mean, higher_is_better: true}"
    normal = accuracy + ", {metric: acc_norm, aggregation: mean, higher_is_better: true}]"
    (folder / "hellaswag_local.yaml").write_text(f"""
task: hellaswag_local
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data / "hellaswag" / "val_shared.jsonl.gz"}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{activity_label}}}}: {{{{ctx}}}}"
doc_to_choice: endings
doc_to_target: label
metric_list: {normal}
""")
    (folder / "mmlu_local.yaml").write_text(f"""
task: mmlu_local
dataset_path: csv
dataset_kwargs:
  keep_default_na: false
  data_files: {{test: {data / "mmlu" / "test_shared.csv.gz"}, dev: {data / "mmlu" / "dev.csv.gz"}}}
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{A}}}}\\nB. {{{{B}}}}\\nC. {{{{C}}}}\\nD. {{{{D}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{{{['A', 'B', 'C', 'D'].index(answer)}}}}"
metric_list: {accuracy}]
""")
    return folder


WORDS = "the river ran beside an old village and people spoke of harvest rain or winter"


def text_task_files(folder: Path) -> Path:
    """LAMBADA's and WikiText's forms on texts made up here: the last word of a text, and whole texts."""
    folder.mkdir()
    words = WORDS.split()
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=count)) for count in (12, 20, 9, 15, 200, 90, 31, 7, 26, 11)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "texts.jsonl"}}}}}
test_split: test"""
    (folder / "last_word.yaml").write_text(f"""
task: last_word{data}
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
""")
    (folder / "whole_text.yaml").write_text(f"""
task: whole_text{data}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
""")
    return folder


def tiny_model(folder: Path) -> Path:
    """A Hugging Face folder with a random model whose context is shorter than the longest texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(
        ["the river ran beside the old village, or was it winter rain"] * 9, 300, 9999
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
class TestAgainstTheHarness:
    def test_last_words_and_whole_texts(self, tmp_path):
        """LAMBADA's and WikiText's kinds of task: finite, and equal to the harness's own evaluation."""
        lm_eval = pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
        from lm_eval.tasks import TaskManager

        path, model, out = text_task_files(tmp_path / "tasks"), tiny_model(tmp_path / "lm"), tmp_path / "out"
        names = ["last_word", "whole_text"]
        assert main(["eval", str(model), "--tasks", *names, "--path", str(path), "--out", str(out)]) == 0
        expected = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={model},dtype=float32",
            tasks=names,
            task_manager=TaskManager(include_path=str(path), include_defaults=False),
            device="cpu",
            batch_size=8,
            bootstrap_iters=BOOTSTRAP,
        )["results"]
        scores = json.loads(out.read_text())["tasks"]
        assert {(score["task"], score["measure"]) for score in scores} == {
            *(("last_word", name) for name in ("perplexity", "acc")),
            *(("whole_text", name) for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")),
        }
        for score in scores:
            theirs = expected[score["task"]]
            assert math.isfinite(score["value"])
            assert score["value"] == theirs[f"{score['measure']},none"]
            stderr = theirs[f"{score['measure']}_stderr,none"]
            assert score["stderr"] == (stderr if stderr != "N/A" else None)
            assert score["chance_level"] is None  # there are no choices to guess among
            assert score["examples"] == 10

    def test_equal_to_the_harness_own_command_line(self, shared_data, tmp_path):
        """HellaSwag without and MMLU with worked examples, on a pretrained model, to the last digit."""
        pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
        path, model = task_files(tmp_path / "tasks", shared_data), shared_data / "stories260k"
        for task, fewshot in (("hellaswag_local", 0), ("mmlu_local", 2)):
            out = tmp_path / f"{task}.json"
            common = ["--tasks", task, "--limit", "40"]
            ours = [
                "eval",
                str(model),
                *common,
                "--fewshot",
                str(fewshot),
                "--path",
                str(path),
                "--out",
                str(out),
            ]
            assert main(ours) == 0
            theirs = [
                sys.executable,
                "-m",
                "lm_eval",
                "--model",
                "hf",
                "--device",
                "cpu",
                "--batch_size",
                "8",
            ]
            theirs += [
                "--model_args",
                f"pretrained={model},dtype=float32",
                *common,
                "--num_fewshot",
                str(fewshot),
            ]
            theirs += ["--include_path", str(path), "--output_path", str(tmp_path / task)]
            done = subprocess.run(theirs, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            (file,) = (tmp_path / task).rglob("results_*.json")
            expected = json.loads(file.read_text())["results"][task]
            scores = json.loads(out.read_text())["tasks"]
            assert {s["measure"] for s in scores} >= {"acc"}
            for score in scores:
                assert score["value"] == expected[f"{score['measure']},none"]
                assert score["stderr"] == expected[f"{score['measure']}_stderr,none"]
                assert score["chance_level"] == 0.25
                assert score["examples"] == 40

    def test_tasks_during_training_change_nothing_else(self, shared_data, tmp_path):
        pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
        path = task_files(tmp_path / "tasks", shared_data)
        plain = train(tiny(run_dir=str(tmp_path / "plain"), steps=4, dropout=0.1))
        scored = train(
            tiny(run_dir=str(tmp_path / "scored"), steps=4, dropout=0.1).override(
                eval_tasks=("hellaswag_local",),
                eval_tasks_every=2,
                eval_tasks_limit=8,
                eval_tasks_path=str(path),
            )
        )
        rows = read_metrics(scored.run_dir)
        assert [row["step"] for row in rows if "task/hellaswag_local/acc" in row] == [1, 3]
        assert rows[-1]["task/hellaswag_local/acc/chance_level"] == 0.25
        assert Finished(plain.run_dir).weights == Finished(scored.run_dir).weights
        own = [
            {k: v for k, v in row.items() if not k.startswith("task/")}
            for row in Finished(scored.run_dir).rows
        ]
        assert own == Finished(plain.run_dir).rows
