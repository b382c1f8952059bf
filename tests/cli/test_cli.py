"""The program as a user meets it: what it prints, what it refuses and how, and what survives a kill."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.runs import assert_same_run, tiny

import curriq
from curriq.cli import FIRST, GROUPS, TRAIN_OPTIONS, describe, main, parse_run_config
from curriq.config import EMBEDDED_SOURCES, SourceConfig, field_owners, flag, format_source, load_toml
from curriq.presets import PRESETS, preset
from curriq.runlog.read import read_metrics, read_summary
from curriq.train.run import train

REPOSITORY = Path(__file__).parents[2]
QUICK = (
    *("--preset", "smoke", "--steps", "6", "--vocab-size", "300", "--tokenizer-sample-bytes", "50000"),
    *("--threads", "1", "--no-tensorboard", "--progress", "none"),
    *("--sources", *map(format_source, tiny().data.sources)),
)
"""The settings of `tiny()` but for β, as flags."""


def start(*arguments: str, folder: Path) -> subprocess.Popen:
    """The program in a process of its own, in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "COLUMNS": "120"}
    command = [sys.executable, "-m", "curriq", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for_rows(run_dir: Path, count: int, process: subprocess.Popen) -> None:
    log = run_dir / "metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def refused(capsys, *arguments: str) -> str:
    """The one error of a command that must be refused: status 2, no traceback, nothing on stdout."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("curriq: ")]
    assert len(errors) == 1, err
    return errors[0]


class TestHelp:
    def test_help_is_fast_and_imports_no_torch(self):
        code = (
            "import sys\nfrom curriq.cli import main\n"
            "assert main(['--help']) == 0 and main(['train', '--help']) == 0\n"
            "assert not {'torch', 'transformers', 'pyarrow', 'datasets'} & set(sys.modules)"
        )
        began = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert time.perf_counter() - began < 5
        assert "curriq resume" in done.stdout
        assert "--num-candidates" in done.stdout

    def test_every_setting_is_explained(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        assert main(["train", "--help-all"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        for name, (_, explanation) in describe().items():
            assert f" {flag(name)} " in text or f" {flag(name)}, " in text
            assert explanation in text

    def test_help_shows_what_most_runs_change_and_the_names_of_the_groups(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "140")
        assert main(["train", "--help"]) == 0
        text = capsys.readouterr().out
        shown = re.findall(r"^  (--[a-z-]+)", text, flags=re.MULTILINE)
        assert shown == ["--preset", "--config", *TRAIN_OPTIONS, *map(flag, FIRST)]
        for group, content in GROUPS.items():
            assert re.search(rf"^  {group} +{re.escape(content)}$", text, flags=re.MULTILINE)
        assert max(map(len, text.splitlines())) <= 140
        assert len(text.splitlines()) <= 60

    def test_the_groups_hold_every_setting_once(self, capsys):
        shown = []
        for group in GROUPS:
            assert main(["train", "--help", group]) == 0
            shown += re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, flags=re.MULTILINE)
        assert sorted(shown) == sorted(map(flag, field_owners()))

    def test_the_defaults_shown_are_those_of_the_preset(self, capsys):
        assert main(["train", "--preset", "recommended", "--help", "policy"]) == 0
        assert "(default: 8)" in capsys.readouterr().out
        assert main(["train", "--help", "policy"]) == 0
        assert "(default: 8)" not in capsys.readouterr().out

    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"curriq {curriq.__version__}\n"

    def test_no_command_prints_the_overview(self, capsys):
        assert main([]) == 0
        assert "curriq train" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("command", "word"), [("resume", "newest valid checkpoint"), ("presets", "[NAME]")]
    )
    def test_commands_without_a_parser_of_their_own(self, command, word, capsys):
        for option in ("-h", "--help"):
            assert main([command, option]) == 0
            text = capsys.readouterr().out
            assert text.startswith(f"usage: curriq {command} ")
            assert word in text

    def test_a_reader_that_goes_away_is_no_error(self):
        command = f"{sys.executable} -m curriq train --help | head -1"
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
        assert done.stdout.startswith("usage: curriq train")
        assert done.stderr == ""


class TestPresets:
    def test_list(self, capsys):
        assert main(["presets"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(PRESETS)
        assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)

    @pytest.mark.parametrize("name", PRESETS)
    def test_printed_preset_reads_back(self, name, capsys, tmp_path):
        assert main(["presets", name]) == 0
        file = tmp_path / "run.toml"
        file.write_text(capsys.readouterr().out, encoding="utf-8")
        assert load_toml(file) == preset(name)

    def test_a_run_file_with_overrides(self, capsys, tmp_path):
        assert main(["presets", "smoke"]) == 0
        (tmp_path / "run.toml").write_text(capsys.readouterr().out, encoding="utf-8")
        run_dir = tmp_path / "run"
        command = ["train", "--config", str(tmp_path / "run.toml"), *QUICK[2:], "--run-dir", str(run_dir)]
        assert main([*command, "--steps", "2", "--beta", "0.25"]) == 0
        written = load_toml(run_dir / "config.toml")
        assert written.critic.beta == 0.25
        assert written.train.num_candidates == preset("smoke").train.num_candidates
        assert read_summary(run_dir)["steps"] == 2


class TestSources:
    def test_what_is_printed_is_read_back(self):
        unusual = SourceConfig(
            name="a b", path="/x/*.jsonl.gz", weight=0.125, text_field="t", documents="line", corruption="ocr"
        )
        clean = SourceConfig(name="clean", path="embedded:prose")
        for source in (*EMBEDDED_SOURCES, unusual):
            words = [format_source(clean), format_source(source)]
            config = parse_run_config(["--sources", *words, "--target", "clean"])
            assert config.data.sources == (clean, source)

    def test_sources_on_the_command_line(self):
        words = [format_source(source) for source in EMBEDDED_SOURCES]
        config = parse_run_config(["--preset", "smoke", "--sources", *words, "--target", "code"])
        assert config.data.sources == EMBEDDED_SOURCES
        assert config.data.target == "code"


class TestTrain:
    def test_smoke_prints_result_shares_and_places(self, tmp_path):
        process = start("train", "--preset", "smoke", folder=tmp_path)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        summary = read_summary(tmp_path / "runs" / "soft-q-0")
        assert f"test loss {summary['test_loss']:.4f}" in out
        assert f"perplexity {summary['test_perplexity']:.2f}" in out
        for source, share in summary["weight_share"].items():
            assert any(source in line and f"{share:.1%}" in line for line in out.splitlines())
        for place in ("runs/soft-q-0/metrics.jsonl", "runs/soft-q-0/checkpoints/step-00000012/lm"):
            assert place in out
            assert (tmp_path / place).exists()
        for reading in ("step 12/12", "loss", "reward", "policy spread", "tokens/s", "left"):
            assert reading in err

    def test_ctrl_c_saves_and_the_printed_command_goes_on(self, tmp_path):
        endless = ("--steps", "2000", "--lr-schedule", "constant")
        process = start("train", *QUICK, *endless, "--run-dir", "run", folder=tmp_path)
        wait_for_rows(tmp_path / "run", 3, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        done = read_summary(tmp_path / "run")["steps"]
        assert done >= 3
        assert f"interrupted at step {done} of 2000: resume with `curriq resume run`" in out
        assert "too early for a verdict" in out.lower()
        assert "selected nothing" not in out
        process = start("resume", "run", "--steps", str(done + 2), folder=tmp_path)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        same = {"beta": 1.0, "eval_every": 6, "lr_schedule": "constant"}
        train(tiny(steps=done + 2, run_dir=str(tmp_path / "other"), **same))
        assert_same_run(tmp_path / "run", tmp_path / "other")

    def test_auto_named_folders_do_not_collide(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["train", *QUICK, "--steps", "1"]) == 0
        assert main(["train", *QUICK, "--steps", "1"]) == 0
        assert {path.name for path in (tmp_path / "runs").iterdir()} == {"soft-q-0", "soft-q-0-2"}


class TestRefused:
    """Each mistake gives one error that names the value, the rule and the way out."""

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--num-candidates", "0"], ["--num-candidates = 0", "at least 1"]),
            (["--beta", "0"], ["--beta = 0", "greater than 0", "--no-q-weighting"]),
            (["--beta", "-1"], ["--beta = -1", "greater than 0"]),
            (["--gamma", "1"], ["--gamma = 1", "[0, 1)"]),
            (["--sources", "name=a,path=b,color=red"], ["'color'", "Known: name, path"]),
            (["--sources", "nonsense"], ["'nonsense'", "name=NAME,path=PATH"]),
            (
                ["--sources", "name=a,path=b,c.txt"],
                ["'c.txt' is not key=value", "run file ([[data.sources]])"],
            ),
            (["--sources", "name=a,path=b,path=c"], ["path is given twice", "'b' and 'c'"]),
            (["--target", "poetry"], ["--target 'poetry'", "choose one of"]),
            (["--selector", "rho"], ["--selector rho", "--reference-model"]),
            (["--window", "5000"], ["--window = 5000", "1024 tokens", "at most 1024"]),
            (["--test-set-size", "1000000"], ["test 1000000", "available", "Lower --reward-set-size"]),
            (["--model", "random:gtp2"], ["'gtp2'"]),
            (["--model", "/nowhere/at/all"], ["'/nowhere/at/all'"]),
            (["--device", "cuda:7"], ["--device 'cuda:7'", "try auto or cpu"]),
            (["--config", "/no/such/file.toml"], ["/no/such/file.toml", "no such file"]),
            (["--preset", "smok"], ["'smok'", "Did you mean 'smoke'", "paper"]),
        ],
        ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
    )
    def test_bad_values(self, arguments, said, capsys, tmp_path):
        error = refused(capsys, "train", *QUICK, *arguments, "--run-dir", str(tmp_path / "run"))
        for words in said:
            assert words in error
        assert not (tmp_path / "run").exists()

    def test_bad_reference_model(self, capsys, tmp_path):
        """The model's own loader would speak of --model and of training from scratch."""
        choice = ["--selector", "rho", "--reference-model", "/nope", "--run-dir", str(tmp_path / "run")]
        error = refused(capsys, "train", *QUICK, *choice)
        assert "--reference-model '/nope'" in error
        assert "--preset reference" in error
        assert "--model" not in error.replace("--reference-model", "")
        assert "random:" not in error

    def test_unknown_command(self, capsys):
        assert "Did you mean 'train'" in refused(capsys, "trian")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--bta", "1"], ["'--bta'", "Did you mean '--beta'?", "--help-all"]),
            (["--no-tensorboard", "extra"], ["unknown argument 'extra'", "--help-all"]),
            (["--beta"], ["--beta", "has no value", "--help-all"]),
            (["--steps", "many"], ["--steps = 'many'", "valid integer"]),
            (["--beta", "low"], ["--beta = 'low'", "valid number"]),
            (["--selector", "softq"], ["unknown --selector 'softq'", "Did you mean 'soft-q'?"]),
            (["--q-features", "source", "colour"], ["--q-features.1 = 'colour'", "'static_score'"]),
            (["--help", "date"], ["'date'", "Did you mean 'data'?", "q-network"]),
        ],
        ids=lambda value: " ".join(value),
    )
    def test_what_the_parser_refuses(self, arguments, said, capsys):
        error = refused(capsys, "train", *QUICK, *arguments)
        for words in said:
            assert words in error

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("[critic]\nbtea = 1\n", ["'btea'", "Did you mean 'beta'", "[critic]"]),
            ("[critc]\nbeta = 1\n", ["'critc'", "Did you mean 'critic'"]),
            ("[critic]\nbeta = 0\n", ["--beta = 0", "greater than 0"]),
            ("[critic]\nbeta = 'low'\n", ["--beta = 'low'", "valid number"]),
            ("beta 1\n", ["not valid TOML"]),
        ],
    )
    def test_bad_run_files(self, text, said, capsys, tmp_path):
        (tmp_path / "run.toml").write_text(text)
        error = refused(capsys, "train", "--config", str(tmp_path / "run.toml"))
        for words in [*said, "run.toml"]:
            assert words in error

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", ["text.txt", "empty"]),
            ("Grüße aus Köln. ".encode("latin-1") * 200, ["text.txt", "UTF-8"]),
            (b"one short line", ["held-out sets are larger"]),
        ],
        ids=["empty", "not UTF-8", "too small"],
    )
    def test_bad_corpora(self, content, said, capsys, tmp_path):
        (tmp_path / "text.txt").write_bytes(content)
        source = ["--sources", f"name=a,path={tmp_path / 'text.txt'}", "--target", "a"]
        error = refused(capsys, "train", *QUICK, *source)
        for words in said:
            assert words in error

    def test_vocabulary_mismatch(self, finished, capsys):
        """A model of 300 entries with a tokenizer of 600."""
        model = str(finished / read_summary(finished)["checkpoint"] / "lm")
        error = refused(
            capsys, "train", *QUICK, "--model", model, "--tokenizer", "train", "--vocab-size", "600"
        )
        assert "vocabulary mismatch" in error
        assert "600" in error
        assert "300" in error
        assert "--tokenizer auto" in error

    def test_a_folder_that_holds_a_run(self, finished, capsys):
        error = refused(capsys, "train", *QUICK, "--run-dir", str(finished))
        assert "holds a run already" in error
        assert f"curriq resume {finished}" in error

    @pytest.mark.parametrize("below", ["", "run", "run/deep"])
    def test_a_file_in_the_place_of_the_folder(self, below, capsys, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        place = tmp_path / "notes.txt" / below
        error = refused(capsys, "train", *QUICK, "--run-dir", str(place))
        assert f"--run-dir {place} cannot be the folder of a run" in error
        assert "give a new folder" in error
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_a_file_in_the_place_of_runs(self, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("runs").write_text("mine")
        assert "--run-dir runs/soft-q-0 cannot be" in refused(capsys, "train", *QUICK)

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
    @pytest.mark.parametrize("below", ["", "run"])
    def test_a_folder_without_write_permission(self, below, capsys, tmp_path):
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        error = refused(capsys, "train", *QUICK, "--run-dir", str(closed / below))
        assert "Permission denied" in error
        assert "where you may write" in error
        assert list(closed.iterdir()) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny(checkpoint_every=2, run_dir=str(folder)))
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


class TestResume:
    @pytest.mark.parametrize("arguments", [[], ["--steps", "8"]])
    def test_no_folder(self, arguments, capsys):
        assert "RUN is missing: folder of the run, as in curriq resume" in refused(
            capsys, "resume", *arguments
        )

    def test_help_shows_the_settings_of_the_run(self, finished, capsys):
        assert main(["resume", str(finished), "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: curriq resume {finished} ")
        assert "(default: 6)" in text
        assert "--preset" not in text

    def test_no_run(self, capsys, tmp_path):
        assert "is not the folder of a run" in refused(capsys, "resume", str(tmp_path))

    def test_finished_run(self, finished, capsys):
        error = refused(capsys, "resume", str(finished))
        assert "6 steps are done" in error
        assert "raise --steps" in error

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--window", "16"], ["window was 32, is 16", "new run"]),
            (["--seed", "1"], ["seed was 0, is 1"]),
            (["--shuffle-buffer", "5"], ["shuffle_buffer was 64, is 5"]),
            (["--selector", "uniform"], ["--selector = 'uniform'", "'soft-q'", "Leave it out"]),
            (["--model", "random:gpt2"], ["--model = 'random:gpt2'", "cannot change"]),
            (["--q-hidden", "8"], ["--q-hidden = 8", "cannot change"]),
            (["--run-dir", "elsewhere"], ["--run-dir", "cannot change"]),
            (["--gamma", "2"], ["--gamma = 2"]),
        ],
        ids=lambda value: value[0] if value[0].startswith("--") else "",
    )
    def test_changes_that_cannot_be(self, arguments, said, finished, capsys):
        error = refused(capsys, "resume", str(finished), "--steps", "8", *arguments)
        for words in said:
            assert words in error

    def test_more_steps_train_on(self, copied, capsys):
        assert main(["resume", str(copied), "--steps", "8"]) == 0
        assert [row["step"] for row in read_metrics(copied)] == list(range(8))
        assert "after 8 steps" in capsys.readouterr().out
        assert load_toml(copied / "config.toml").train.steps == 8

    def test_other_threads_are_allowed_with_a_warning(self, copied, caplog):
        assert main(["resume", str(copied), "--steps", "7", "--threads", "2"]) == 0
        assert any("--threads = 2" in r.message and "last bits" in r.message for r in caplog.records)

    def test_phases_may_begin_at_a_resume(self, copied):
        """Without a snapshot in the checkpoint, the phase takes its own."""
        assert main(["resume", str(copied), "--steps", "8", "--reset-theta"]) == 0
        assert [row["theta_reset"] for row in read_metrics(copied)] == [0] * 6 + [1] * 2

    def test_unreadable_checkpoints(self, copied, capsys):
        for state in copied.glob("checkpoints/*/state.pt"):
            state.write_bytes(state.read_bytes()[:-100])
        error = refused(capsys, "resume", str(copied), "--steps", "8")
        assert "no checkpoint" in error
        assert "state.pt has" in error

    def test_a_truncated_checkpoint_falls_back(self, copied, finished, caplog):
        newest = copied / "checkpoints" / "step-00000006" / "lm" / "model.safetensors"
        newest.write_bytes(newest.read_bytes()[:1000])
        assert main(["resume", str(copied)]) == 0
        assert any("falling back to step-00000004" in record.message for record in caplog.records)
        assert_same_run(copied, finished)

    def test_a_run_killed_before_its_summary_gets_it(self, copied, finished):
        (copied / "summary.json").unlink()
        assert main(["resume", str(copied)]) == 0
        assert_same_run(copied, finished)


class TestNotFinite:
    """An update of θ that blows it up: nothing that was saved is lost, and the printed command works."""

    @pytest.mark.parametrize("selector", ["soft-q", "uniform", "high-loss"])
    def test_blown_up_by_the_learning_rate(self, selector, capsys, tmp_path):
        run = str(tmp_path / "run")
        error = refused(capsys, "train", *QUICK, "--selector", selector, "--lm-lr", "1e9", "--run-dir", run)
        assert error.startswith("curriq: step ")
        assert "nan" in error or "inf" in error
        assert "Its windows: " in error
        assert "checkpoint of step 0" in error
        assert f"curriq resume {run} --lm-lr 1e+08" in error
        assert main(["resume", run, "--lm-lr", "2e-3"]) == 0
        other = tmp_path / "other"
        assert (
            main(["train", *QUICK, "--selector", selector, "--lm-lr", "2e-3", "--run-dir", str(other)]) == 0
        )
        assert_same_run(tmp_path / "run", other)

    @pytest.mark.parametrize(
        "flags",
        [
            ("--beta", "1e-40"),
            ("--beta", "1e-40", "--dropout", "0.1"),
            ("--beta", "1e-40", "--no-q-weighting"),
            ("--selector", "low-loss", "--selector-temperature", "1e-40"),
            ("--selector", "uncertainty", "--selector-temperature", "1e-40"),
        ],
        ids=" ".join,
    )
    def test_a_temperature_that_overflows_is_named(self, flags, capsys, tmp_path):
        run = tmp_path / "run"
        error = refused(capsys, "train", *QUICK, *flags, "--run-dir", str(run))
        assert error.startswith("curriq: step 0 stopped: ")
        assert "are finite" in error
        assert "Raise --beta (soft-q) or --selector-temperature" in error
        assert "--precision" not in error

    def test_a_checkpoint_after_the_bad_update_is_set_aside(self, capsys, tmp_path):
        """Without a reward the damage of step 1 shows in step 2, when a checkpoint has been written."""
        run = tmp_path / "run"
        flags = [
            "--selector",
            "uniform",
            "--checkpoint-every",
            "1",
            "--eval-every",
            "5",
            "--run-dir",
            str(run),
        ]
        error = refused(capsys, "train", *QUICK, *flags, "--lm-lr", "1e9")
        standing = {path.name for path in (run / "checkpoints").glob("step-*")}
        assert standing == {"step-00000000"}
        assert "checkpoint of step 0 are intact" in error
        assert main(["resume", str(run), "--lm-lr", "1e-3"]) == 0


class TestPythonApi:
    def test_ten_lines(self, tmp_path):
        import curriq

        config = curriq.preset("smoke").override(**{"steps": 2, "run_dir": str(tmp_path), "threads": 1})
        result = curriq.run(config.override(vocab_size=300, tokenizer_sample_bytes=50_000, progress="none"))
        assert result.finished
        assert result.summary["steps"] == 2
        assert (result.model_dir / "model.safetensors").exists()
        with pytest.raises(curriq.CurriqError, match="finished"):
            curriq.resume(tmp_path)
