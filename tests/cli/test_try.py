"""`curriq try` and `curriq train --against`: what is planned, run and said."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.runs import SETTINGS, tiny

from curriq.cli import main
from curriq.config import SourceConfig
from curriq.errors import CurriqError
from curriq.evaluate import trial
from curriq.evaluate.beside import folder_beside, other_config
from curriq.evaluate.plan import load_plan
from curriq.evaluate.trial import Costs, conclusions, fitting_steps
from curriq.evaluate.trial_plan import OWN_ARM, STATIC, arms_of, plan_toml
from curriq.presets import PRESETS, is_rule, preset, rule_settings
from curriq.report.chart import Table
from curriq.report.latex import escape, latex_table
from curriq.runlog.read import read_summary
from curriq.train.run import train


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(folder: Path, config: Any, seeds: int = 2) -> Any:
    """The comparison that a try of this configuration writes."""
    (folder / trial.FILE).write_text(plan_toml(config, arms_of(config), range(seeds), 1))
    return load_plan(folder / trial.FILE, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A try whose runs were trained in this process; the commands find them finished."""
    folder = tmp_path_factory.mktemp("try")
    for run in planned(folder, tiny(beta=1.0, steps=3, eval_every=2)).runs:
        train(run.config.override(threads=1))
    return folder


class TestPlan:
    def test_it_is_a_comparison_on_the_given_data(self, here: Path):
        sources = (
            SourceConfig(name="crawl", path="crawl.jsonl", text_field="content", weight=0.9),
            SourceConfig(name="news", path="news.csv", weight=0.1),
        )
        config = preset("small").override(sources=sources, target="news", lm_lr=5e-4, steps=77)
        plan = planned(here, config)
        assert plan.compare.baseline == "plain"
        assert list(plan.arms) == ["plain", "dsir-8", "dsir-4", "quantile", "recommended"]
        for run in plan.runs:
            assert run.config.data.sources == sources
            assert (run.config.optim.lm_lr, run.config.train.steps) == (5e-4, 77)
            assert run.config.data.held_out_sizes == "fit"
            assert run.config.data.test_set_size == 384
            assert run.config.lm == config.lm
        by_arm = {run.arm: run.config for run in plan.runs}
        assert by_arm["plain"].select.selector == "uniform"
        for name in ("dsir-4", "quantile"):
            assert by_arm[name].select.selector == "filter"
        recommended = preset("recommended")
        assert by_arm["recommended"].critic == recommended.critic
        assert by_arm["recommended"].select == recommended.select

    def test_sizes_that_were_set_are_kept_exactly(self, here: Path):
        plan = planned(here, tiny(test_set_size=8))
        assert {run.config.data.held_out_sizes for run in plan.runs} == {"exact"}

    @pytest.mark.parametrize("name", ["default", "recommended", "dsir", "small", "smoke"])
    def test_a_rule_that_is_an_arm_already_is_no_second_one(self, name: str):
        assert OWN_ARM not in arms_of(preset(name))

    @pytest.mark.parametrize("changes", [
        {"selector": "high-loss"},
        {"selector": "filter", "max_read_ratio": 8, "static_rule": "share", "static_share": 0.3},
        {"beta": 0.05},
    ])  # fmt: skip
    def test_a_rule_of_ones_own_is_an_arm(self, here: Path, changes: dict[str, Any]):
        config = tiny(beta=1.0).override(**changes)
        plan = planned(here, config)
        (own,) = {
            run.config.override(seed=0, split_seed=0, run_dir="") for run in plan.runs if run.arm == "yours"
        }
        for name, value in changes.items():
            assert own.value(name) == value

    def test_steps_fill_the_minutes(self):
        """Two seeds of 5 arms: each costs 10 s once and a second per step."""
        costs = dict.fromkeys(("plain", "static", "recommended"), Costs(step=1.0, evaluation=0.0, once=10.0))
        arms = dict.fromkeys(("plain", *STATIC, "recommended"))
        assert fitting_steps(costs, arms, seconds=1100, seeds=2, workers=1) == 100
        assert fitting_steps(costs, arms, seconds=1100, seeds=2, workers=2) == 210
        with pytest.raises(CurriqError, match=r"would have 20 steps, and at least 48 .* --minutes 10,"):
            fitting_steps(costs, arms, seconds=300, seeds=2, workers=1)

    def test_a_folder_with_a_try_is_kept(self, here: Path, capsys: pytest.CaptureFixture):
        (here / trial.FILE).write_text("")
        assert main(["try", "--preset", "smoke", "--out", str(here)]) == 2
        assert "curriq try --resume" in capsys.readouterr().err

    @pytest.mark.parametrize(("words", "message"), [
        (["--resume", "--window", "64"], "goes on with its own settings"),
        (["--resume"], "there is no try in it"),
        (["--preset", "smoke", "--minutes", "-1"], "--minutes = -1"),
        (["--preset", "smoke", "--seeds", "0"], "--seeds = 0"),
        (["--seeds", "many"], "it must be a whole number"),
    ])  # fmt: skip
    def test_what_is_refused(self, here: Path, capsys: pytest.CaptureFixture, words: list[str], message: str):
        assert main(["try", "--out", str(here / "out"), *words]) == 2
        assert message in capsys.readouterr().err
        assert not (here / "out").exists()

    @pytest.mark.parametrize("name", ["seed", "split-seed", "run-dir", "threads"])
    def test_what_a_try_decides_itself(self, here: Path, capsys: pytest.CaptureFixture, name: str):
        for words in ([f"--{name}", "3"], [f"--{name}=3"]):
            assert main(["try", "--preset", "smoke", "--out", str(here / "out"), *words]) == 2
            assert f"--{name}: leave it out" in capsys.readouterr().err

    def test_minutes_of_a_resumed_try_are_named(self, here: Path, capsys: pytest.CaptureFixture):
        assert main(["try", "--resume", "--minutes", "3"]) == 2
        assert "curriq try --resume --minutes: a try goes on" in capsys.readouterr().err

    def test_a_folder_that_cannot_be_made(self, here: Path, capsys: pytest.CaptureFixture, monkeypatch):
        monkeypatch.setattr(trial, "_time_arms", lambda *_: pytest.fail("it took minutes first"))
        (here / "file").write_text("")
        for out in ("file", "file/deep"):
            assert main(["try", "--preset", "smoke", "--out", str(here / out)]) == 74
        assert "file" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda text: text + "x = [", "not valid TOML"),
            (lambda text: text.replace("[compare]", "[comp]"), "comp"),
            (lambda text: re.sub("seeds = .*", "", text), "lacks seeds"),
            (lambda text: re.sub("seeds = .*", "seeds = 3", text), "seeds = 3"),
            (lambda text: re.sub("seeds = .*", "seeds = [true]", text), "seeds = true"),
        ],
    )
    def test_a_file_that_was_edited(self, here: Path, capsys: pytest.CaptureFixture, edit, message: str):
        text = plan_toml(tiny(beta=1.0), arms_of(tiny(beta=1.0)), range(2), 1)
        (here / trial.FILE).write_text(edit(text))
        for words in ([], ["--seeds", "3"]):
            assert main(["try", "--resume", "--out", str(here), *words]) == 2
            assert message in capsys.readouterr().err

    def test_a_file_that_is_no_try_any_more(self, here: Path, capsys: pytest.CaptureFixture):
        text = plan_toml(tiny(beta=1.0), arms_of(tiny(beta=1.0)), range(2), 1)
        for edited in (
            text + "\n[streams.other]\nlm_lr = 0.1\n[streams.same]\n",
            text.replace('baseline = "plain"', 'baseline = "recommended"'),
        ):
            (here / trial.FILE).write_text(edited)
            assert main(["try", "--resume", "--out", str(here)]) == 2
            assert f"run it with `curriq compare {here / trial.FILE}`" in capsys.readouterr().err

    def test_a_byte_order_mark_is_none_of_the_text(self, here: Path, monkeypatch):
        text = plan_toml(tiny(beta=1.0), arms_of(tiny(beta=1.0)), range(2), 1)
        (here / trial.FILE).write_text(text, encoding="utf-8-sig")  # as Notepad saves it
        monkeypatch.setattr(trial, "_run", lambda out: 0)
        assert main(["try", "--resume", "--out", str(here), "--seeds", "3"]) == 0
        assert load_plan(here / trial.FILE, here).compare.seeds == (0, 1, 2)

    def test_refused_workers_and_seeds_of_ones_own_stay(self, here: Path, capsys, monkeypatch):
        text = plan_toml(tiny(beta=1.0), arms_of(tiny(beta=1.0)), [3, 4, 0], 1)
        (here / trial.FILE).write_text(text)
        assert main(["try", "--resume", "--out", str(here), "--workers", "0"]) == 2
        assert (here / trial.FILE).read_text() == text
        monkeypatch.setattr(trial, "_run", lambda out: 0)
        assert main(["try", "--resume", "--out", str(here), "--seeds", "5"]) == 0
        assert load_plan(here / trial.FILE, here).compare.seeds == (3, 4, 0, 1, 2)


class TestRun:
    @pytest.mark.long
    def test_resume_judges_and_draws(self, finished: Path, capsys: pytest.CaptureFixture):
        assert main(["try", "--resume", "--out", str(finished)]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "chosen in hindsight among dsir-8, dsir-4, quantile" in out
        assert "before training" in out
        assert "--seeds 6` adds 4" in out
        losses = {
            arm: [read_summary(finished / "data" / f"{arm}-{seed}")["test_loss"] for seed in (0, 1)]
            for arm in ("dsir-8", "dsir-4", "quantile", "recommended")
        }
        best = min(("dsir-8", "dsir-4", "quantile"), key=lambda arm: sum(losses[arm]))
        change = (sum(losses["recommended"]) - sum(losses[best])) / 2
        assert f"recommended against {best}: {change:+.4f}".replace("-0.", "−0.") in out.replace("-0.", "−0.")
        for name in ("comparison.json", "report.html", "verdict.tex", "figures.tex"):
            assert (finished / name).stat().st_size
        tex = (finished / "figures.tex").read_text()
        for picture in re.findall(r"\{(figures/[^}]*)\}", tex):
            assert (finished / picture).exists()
        assert tex.count(r"\caption{") == tex.count(r"\begin{figure}") > 2

    def test_more_seeds_leave_the_others(self, finished: Path, monkeypatch: pytest.MonkeyPatch):
        seen = []
        monkeypatch.setattr(trial, "_run", lambda out: seen.append(load_plan(out / trial.FILE, out)) or 0)
        assert main(["try", "--resume", "--seeds", "4", "--out", str(finished)]) == 0
        assert seen[0].compare.seeds == (0, 1, 2, 3)
        assert main(["try", "--resume", "--seeds", "2", "--out", str(finished)]) == 2
        (finished / trial.FILE).write_text(plan_toml(tiny(beta=1.0), arms_of(tiny(beta=1.0)), range(2), 1))

    @pytest.mark.long  # reads what the resume above has judged
    def test_one_seed_proves_nothing(self, finished: Path):
        result = json.loads((finished / "comparison.json").read_text())
        result["seeds"] = [0]
        assert any("One seed proves nothing" in sentence for sentence in conclusions(result, finished))


class TestPresetsOfArms:
    @pytest.mark.parametrize("name", PRESETS)
    def test_an_arm_has_the_rule_of_its_preset_whatever_the_base(self, name: str):
        if PRESETS[name]().langevin.proposer != "stream":
            pytest.skip("its search has settings of its own")
        arm = preset("recommended").override(**rule_settings(name))
        wanted = preset(name)
        assert arm.critic == wanted.critic
        assert arm.select == wanted.select
        assert arm.train.max_read_ratio == wanted.train.max_read_ratio

    def test_sizes_and_data_are_no_rule(self):
        for name in (
            "sources",
            "window",
            "steps",
            "num_candidates",
            "model",
            "lm_lr",
            "reference_model",
            "seed",
        ):
            assert not is_rule(name)

    def test_default_means_the_default(self, here: Path):
        (here / "c.toml").write_text(
            '[compare]\nbase = "recommended"\nseeds = [0]\nbaseline = "a"\n'
            '[arms.a]\npreset = "default"\n[arms.b]\n[streams.x]\nsteps = 100\n'
        )
        first, second = load_plan(here / "c.toml").runs
        assert first.config.critic == preset("default").critic
        assert second.config.critic == preset("recommended").critic
        assert first.config.train.steps == 100

    @pytest.mark.parametrize("again", [
        "[arms.b]",
        '[arms.b]\npreset = "recommended"',
        "[arms.b]\nmax_read_ratio = 8",
        '[arms.b]\nfile = "same.toml"',
    ])  # fmt: skip
    def test_equal_arms_are_refused_however_they_are_spelled(self, here: Path, again: str):
        (here / "same.toml").write_text("[select]\nprior = true\n")
        text = '[compare]\nbase = "recommended"\nseeds = [0]\nbaseline = "a"\n[arms.a]\n'
        (here / "c.toml").write_text(f"{text}{again}\n")
        with pytest.raises(CurriqError, match=r"\[arms.a\] and \[arms.b\] have the same settings"):
            load_plan(here / "c.toml")
        (here / "c.toml").write_text(f"{text}{again}\nseed_offset = 100\n")
        load_plan(here / "c.toml")


class TestAgainst:
    WORDS = (
        *("--preset", "smoke", "--steps", "6", "--vocab-size", "300", "--tokenizer-sample-bytes", "50000"),
        *("--threads", "1", "--device", "cpu", "--no-tensorboard", "--progress", "none", "--eval-every", "2"),
        *("--selector", "low-loss", "--run-dir", "runs/mine"),
    )

    def test_the_other_run_is_trained_once(self, here: Path, capsys: pytest.CaptureFixture):
        assert main(["train", *self.WORDS, "--against", "uniform"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        (other,) = (here / "runs").glob("uniform-0-*")
        ours, theirs = read_summary(here / "runs/mine"), read_summary(other)
        assert theirs["selector"] == "uniform"
        assert ours["data_fingerprint"] == theirs["data_fingerprint"]
        change = ours["test_loss"] - theirs["test_loss"]
        assert f"test loss {abs(change):.4f} nats per token {'less' if change < 0 else 'more'}" in out
        assert "just trained" in out
        assert "One seed proves nothing: `curriq try`" in out
        before = (other / "summary.json").stat().st_mtime_ns
        words = ["runs/again" if word == "runs/mine" else word for word in self.WORDS]
        assert main(["train", *words, "--against", "uniform"]) == 0
        assert "recorded" in capsys.readouterr().out
        assert (other / "summary.json").stat().st_mtime_ns == before

    @pytest.mark.parametrize("stopped", ["the run", "the other"])
    def test_one_command_goes_on_where_ctrl_c_stopped_either(
        self,
        here: Path,
        capsys: pytest.CaptureFixture,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        stopped: str,
    ):
        """It ends as if nothing had happened, and is what the stopped call prints."""
        assert main(["train", *self.WORDS, "--against", "uniform"]) == 0
        whole = capsys.readouterr().out.partition("Against uniform")[2]
        for folder in (here / "runs").iterdir():
            shutil.rmtree(folder)
        calls = iter([stopped == "the run", stopped == "the other"])

        @contextlib.contextmanager
        def stop_in_one(*arguments: Any, **named: Any):
            yield (lambda: True) if next(calls, False) else (lambda: False)

        monkeypatch.setattr("curriq.train.session.stop_flag", stop_in_one)
        assert main(["train", *self.WORDS, "--against", "uniform"]) == 130
        go_on = "curriq resume runs/mine --against uniform"
        assert go_on in " ".join((capsys.readouterr().out + caplog.text).split())
        assert main(go_on.split()[1:]) == 0
        said = capsys.readouterr().out.partition("Against uniform")[2]
        losses = [re.search(r"test loss .*", text).group() for text in (whole, said)]
        assert losses[0] == losses[1]
        assert len(list((here / "runs").iterdir())) == 2

    @pytest.mark.parametrize("left", [".tmp-step-00000000", "rejected-step-00000000"])
    def test_another_run_without_a_checkpoint_begins_again(self, here: Path, left: str):
        """It was killed in its first save, or failed in its first step."""
        assert main(["train", *self.WORDS, "--against", "uniform"]) == 0
        (other,) = (here / "runs").glob("uniform-0-*")
        loss = read_summary(other)["test_loss"]
        shutil.rmtree(other / "checkpoints")
        (other / "checkpoints" / left).mkdir(parents=True)
        for path in ("summary.json", "metrics.jsonl", "parts.jsonl"):
            (other / path).unlink()
        assert main(["resume", "runs/mine", "--against", "uniform"]) == 0
        assert read_summary(other)["test_loss"] == loss

    def test_the_other_run_stands_beside_wherever_it_is_called_from(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        run = tmp_path / "run"
        train(tiny(run_dir=str(run)))
        outside = folder_beside(tiny(run_dir=str(run)), run, "uniform")
        monkeypatch.chdir(run)
        assert folder_beside(tiny(run_dir="."), Path(), "uniform") == outside

    @pytest.mark.parametrize("name", ["uniform", "unifrom"])
    def test_what_is_refused_before_anything_is_trained(
        self, here: Path, capsys: pytest.CaptureFixture, name: str
    ):
        assert main(["train", *self.WORDS, "--selector", "uniform", "--against", name]) == 2
        message = "the run itself has these settings" if name == "uniform" else "Did you mean 'uniform'?"
        error = capsys.readouterr().err
        assert message in error
        assert name == "unifrom" or "such as --against recommended" in error
        assert not (here / "runs").exists()
        assert main(["train", *self.WORDS, "--selector", "uniform", "--against", name, "--dry-run"]) == 2
        assert message in capsys.readouterr().err

    def test_another_setting_is_another_run(self, tmp_path: Path):
        run = tmp_path / "run"
        train(tiny(run_dir=str(run)))
        first = folder_beside(tiny(run_dir=str(run)), run, "uniform")
        assert folder_beside(tiny(run_dir=str(run), beta=0.5), run, "uniform") == first  # it has no β
        assert folder_beside(tiny(run_dir=str(run), lm_lr=0.1), run, "uniform") != first
        assert folder_beside(tiny(run_dir=str(run)), run, "dsir") != first

    def test_the_other_run_has_the_same_data_and_sizes(self):
        other = other_config(tiny(), "recommended")
        assert other.data == tiny().data
        assert other.train.steps == SETTINGS["steps"]
        assert other.critic == preset("recommended").critic


class TestLatex:
    def test_a_table(self):
        table = Table(
            "Loss & change", ["arm", "change"], [["a_b", "−0.5 [−0.6, −0.4]"]], "Fine. See docs/x.md."
        )
        text = latex_table(table, "tab:x")
        assert r"\caption{Loss \& change. Fine.}" in text
        assert r"a\_b & $-$0.5 [$-$0.6, $-$0.4] \\" in text
        assert r"\begin{tabular}{lr}" in text
        assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1

    def test_what_a_comparison_says_is_ascii(self):
        """pdflatex has no other signs by itself."""
        note = "p cannot be below 2/2ⁿ: ≥ ≤ π θ β α … × → − –"
        assert escape(note).isascii()

    def test_signs(self):
        assert escape("50 % of $x^2$ {θ} \\ ~") == (
            r"50 \% of \$x\textasciicircum{}2\$ \{$\theta$\} \textbackslash{} \textasciitilde{}"
        )
