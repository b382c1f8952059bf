"""`curriq compare`: what it refuses before it starts, whom it runs, and what it writes."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from tests.runs import SETTINGS

from curriq.cli import main
from curriq.evaluate.assess import never_selected
from curriq.evaluate.compare import Job, last_line, run_jobs, steps_logged
from curriq.evaluate.plan import OWN, load_plan
from curriq.report.outcome import print_comparison
from curriq.runlog.read import read_metrics, read_summary
from curriq.runlog.storage import exclusive
from curriq.terminal import console
from curriq.train.run import train

REPOSITORY = Path(__file__).parents[2]

PREAMBLE = """
[compare]
base = "smoke"
seeds = {seeds}
baseline = "uniform"
workers = {workers}
[arms.uniform]
selector = "uniform"
[arms.low-loss]
selector = "low-loss"
"""
AGAIN = """
[arms.again]
selector = "uniform"
seed_offset = 100
"""


def stream(name: str = "dirty", **overrides: object) -> str:
    """A stream of tiny runs, as TOML."""
    settings = {name: value for name, value in SETTINGS.items() if name not in {*OWN, "sources", "beta"}}
    lines = [f"{setting} = {json.dumps(value)}" for setting, value in (settings | overrides).items()]
    return "\n".join(
        (
            f"[streams.{name}]",
            *lines,
            'sources = [{name = "prose", path = "embedded:prose", weight = 0.5},',
            '           {name = "code", path = "embedded:code", weight = 0.5}]\n',
        )
    )


def write(folder: Path, seeds: list[int], extra: str = "", workers: int = 2, **overrides: object) -> Path:
    file = folder / "compare.toml"
    text = PREAMBLE.format(seeds=seeds, workers=workers) + extra + stream(**overrides)
    file.write_text(text)
    return file


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line of an error: status 2 and nothing on stdout."""
    assert main(["compare", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a comparison whose runs were all trained, here in this process."""
    folder = tmp_path_factory.mktemp("finished")
    extra = AGAIN + '[arms.idle]\nselector = "soft-q"\nq_weighting = false\n'
    plan = load_plan(write(folder, [0, 1], extra), folder / "out")
    for run in plan.runs:
        train(run.config.override(threads=1))
    return folder


@contextmanager
def edited(file: Path, content: bytes | None) -> Iterator[None]:
    """A file with other content for a while, or without the file."""
    before = file.read_bytes()
    file.unlink() if content is None else file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


class TestPlan:
    def test_arms_of_a_seed_stand_side_by_side(self, here: Path):
        plan = load_plan(write(here, [3, 4]))
        assert [run.name for run in plan.runs] == [
            "dirty/uniform-3",
            "dirty/low-loss-3",
            "dirty/uniform-4",
            "dirty/low-loss-4",
        ]
        assert plan.runs[3].folder == Path("runs/compare/dirty/low-loss-4")

    def test_base_then_stream_then_arm(self, here: Path):
        (here / "run.toml").write_text("[train]\nsteps = 7\n[optim]\nlm_lr = 0.1\n")
        (here / "c.toml").write_text(
            '[compare]\nbase = "smoke"\nconfig = "run.toml"\nseeds = [0]\nbaseline = "a"\n'
            "[arms.a]\nlm_lr = 0.3\n[arms.b]\n[streams.s]\nlm_lr = 0.2\n[streams.t]\n"
        )
        configs = {(run.stream, run.arm): run.config for run in load_plan(here / "c.toml").runs}
        rates = {cell: config.optim.lm_lr for cell, config in configs.items()}
        assert rates == {("s", "a"): 0.3, ("s", "b"): 0.2, ("t", "a"): 0.3, ("t", "b"): 0.1}
        assert all(config.train.steps == 7 and config.data.window == 32 for config in configs.values())

    def test_a_stream_from_a_file_beside_the_plan(self, here: Path):
        """Over its preset and under its own settings, wherever the command is called."""
        (here / "plans" / "streams").mkdir(parents=True)
        (here / "plans" / "streams" / "s.toml").write_text("[train]\nsteps = 7\n[data]\nwindow = 16\n")
        (here / "plans" / "c.toml").write_text(
            '[compare]\nseeds = [0]\nbaseline = "a"\n[arms.a]\n[arms.b]\nselector = "uniform"\n'
            '[streams.s]\npreset = "smoke"\nfile = "streams/s.toml"\nwindow = 8\n'
        )
        config = load_plan(Path("plans/c.toml")).runs[0].config
        assert (config.train.steps, config.data.window, config.data.shuffle_buffer) == (7, 8, 64)

    def test_without_streams_there_is_one(self, here: Path):
        (here / "c.toml").write_text(PREAMBLE.format(seeds=[0], workers=1))
        assert load_plan(here / "c.toml").streams == ("default",)

    def test_a_replay_is_an_arm_where_all_seeds_share_the_split(self, here: Path):
        text = PREAMBLE.format(seeds=[0], workers=1).replace("[compare]", "[compare]\nvary_split = false")
        (here / "c.toml").write_text(text + '[arms.replay]\ncurriculum = "c.parquet"\n')
        assert load_plan(here / "c.toml").runs[-1].config.data.curriculum == "c.parquet"

    def test_a_schedule_that_decays_nowhere_can_be_allowed(self, here: Path):
        text = PREAMBLE.format(seeds=[0], workers=1).replace("workers", "allow_constant_lr = true\nworkers")
        (here / "c.toml").write_text(text + '[streams.s]\nlr_schedule = "constant"\n')
        assert load_plan(here / "c.toml").runs[0].config.optim.lr_schedule == "constant"

    def test_every_seed_has_a_split_of_its_own_unless_the_file_says_otherwise(self, here: Path):
        def splits(text: str) -> dict[str, tuple[int, int]]:
            (here / "c.toml").write_text(text)
            runs = load_plan(here / "c.toml").runs
            return {
                f"{run.arm}-{run.seed}": (run.config.train.seed, run.config.data.split_seed) for run in runs
            }

        text = (
            PREAMBLE.format(seeds=[3, 4], workers=1)
            + '[arms.again]\nselector = "uniform"\nseed_offset = 100\n'
        )
        assert splits(text) == {
            "uniform-3": (3, 3), "low-loss-3": (3, 3), "again-3": (103, 3),
            "uniform-4": (4, 4), "low-loss-4": (4, 4), "again-4": (104, 4),
        }  # fmt: skip
        shared = text.replace("[compare]", "[compare]\nvary_split = false") + "[streams.s]\nsplit_seed = 7\n"
        assert splits(shared) == {
            "uniform-3": (3, 7), "low-loss-3": (3, 7), "again-3": (103, 7),
            "uniform-4": (4, 7), "low-loss-4": (4, 7), "again-4": (104, 7),
        }  # fmt: skip


BAD = {
    "no table of ours": ("[train]\nsteps = 5\n", "unknown table 'train'"),
    "no TOML": ("[compare\n", "not valid TOML"),
    "no seeds": ('[compare]\nbaseline = "a"\n', "lacks seeds"),
    "empty seeds": ('[compare]\nseeds = []\nbaseline = "a"\n', "seeds is empty"),
    "seed twice": ('[compare]\nseeds = [1, 1]\nbaseline = "a"\n', "one is there twice"),
    "negative seed": ('[compare]\nseeds = [-1]\nbaseline = "a"\n', "0 or greater"),
    "seed of the wrong type": ('[compare]\nseeds = ["x"]\nbaseline = "a"\n', "seeds.0 = 'x'"),
    "unknown key": ('[compare]\nseed = [0]\nbaseline = "a"\n', "Did you mean 'seeds'?"),
    "no workers": ('[compare]\nseeds = [0]\nbaseline = "a"\nworkers = 0\n', "it must be at least 1"),
    "unknown preset": ('base = "smok"', "Did you mean 'smoke'?"),
    "missing file of a stream": ('[streams.s]\nfile = "gone.toml"\n', "gone.toml: there is no such file"),
    "unknown section in a file": (
        '[streams.s]\nfile = "bad.toml"\n',
        "bad.toml: bad.toml: unknown setting 'compare'",
    ),
    "missing run file": ('config = "gone.toml"', "gone.toml: there is no such file"),
    "unknown baseline": (
        '[compare]\nseeds = [0]\nbaseline = "unifrom"\n[arms.uniform]\n[arms.b]\n',
        "Did you",
    ),
    "one arm": ('[compare]\nseeds = [0]\nbaseline = "a"\n[arms.a]\n', "one arm only"),
    "arm that is no table": ('[compare]\nseeds = [0]\nbaseline = "a"\n[arms]\na = 3\n', "write [arms.NAME]"),
    "arm whose name is no folder": ('[arms."a/b"]\n', "becomes a folder"),
    "unknown setting": ("[arms.x]\nbetta = 0.1\n", "[arms.x] unknown setting 'betta'. Did you mean 'beta'?"),
    "setting of the comparison": ("[arms.x]\nseed = 3\n", "[arms.x] seed: take it out"),
    "split of an arm": ("[arms.x]\nsplit_seed = 3\n", "[arms.x] split_seed: take it out; each seed has"),
    "split of a stream": ("[streams.s]\nsplit_seed = 0\n", "set vary_split = false under [compare]"),
    "split of the base": ('config = "split.toml"', "split_seed = 3 in a run file: take it out"),
    "curriculum of one split": (
        '[streams.s]\ncurriculum = "c.parquet"\n',
        "may be test text of another; set",
    ),
    "offset of a stream": ("[streams.s]\nseed_offset = 3\n", "only an arm has one"),
    "no offset": ("[arms.x]\nseed_offset = -1\n", "seed_offset = -1: it must be a whole number"),
    "wrong type": ('[arms.x]\nbeta = "hot"\n', "[arms.x] on [streams.default]: --beta = 'hot'"),
    "refused value": ("[arms.x]\nbeta = 0\n", "--beta = 0"),
    "unknown selector": ('[arms.x]\nselector = "best"\n', "unknown --selector 'best'"),
    "unknown key of a source": (
        '[streams.s]\nsources = [{name = "a", pth = "b"}]\n',
        "unknown source key 'pth'",
    ),
    "other data": ("[arms.x]\nwindow = 16\n", "[arms.x] window = 16, but [arms.uniform] has 32"),
    "other tokenizer": ("[arms.x]\nvocab_size = 300\n", "vocab_size = 300, but"),
    "other N": ("[arms.x]\nnum_candidates = 4\n", "num_candidates = 4, but"),
    "other length": ("[arms.x]\nsteps = 4\n", "arms must share the data, the model, the steps and N"),
    "differs by what is not read": (
        '[arms.x]\nselector = "uniform"\nrandom_k = 3\n',
        "have the same settings on the stream 'default', but for what is not read (random_k has no effect: "
        "only --selector random-k reads it), so they would",
    ),
    "constant learning rate": ('[arms.x]\nlr_schedule = "constant"\n', "set allow_constant_lr = true"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_clear_error_before_anything_starts(case: str, here: Path, capsys):
    text, expected = BAD[case]
    if text.startswith(("[arms", "[streams")):
        text = PREAMBLE.format(seeds=[0], workers=1) + text
    elif text.startswith(("base", "config")):
        text = PREAMBLE.format(seeds=[0], workers=1).replace('base = "smoke"', text)
    (here / "split.toml").write_text("[data]\nsplit_seed = 3\n")
    (here / "bad.toml").write_text(text)
    error = refused(capsys, "bad.toml")
    assert error.startswith("curriq: bad.toml")
    assert expected in error
    assert sorted(os.listdir(here)) == ["bad.toml", "split.toml"]


def test_data_of_every_stream_are_looked_at_before_anything_starts(here: Path, capsys):
    (here / "b.jsonl").write_text(json.dumps({"body": "a text of some length that can be a document"}))
    streams = "".join(
        f'[streams.{name}]\nsources = [{{name = "{name}", path = "{path}"}}]\n'
        for name, path in {"s": "gone.jsonl", "t": "b.jsonl", "u": "b.jsonl"}.items()
    )
    arm = '[arms.named]\nreference_model = "./none"\n'
    (here / "all.toml").write_text(PREAMBLE.format(seeds=[0, 1], workers=1) + arm + streams)
    assert main(["compare", "all.toml"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    named = ("source 's'", "source 't'", "source 'u'", "--reference-model")
    assert [error.count(name) for name in named] == [1, 1, 1, 1], error
    assert error.count("text_field=body") == 2
    assert not [path for path in here.rglob("*") if path.name in ("config.toml", "metrics.jsonl")]


def test_a_missing_file_is_named(here: Path, capsys):
    assert "gone.toml: there is no such file" in refused(capsys, "gone.toml")


class TestFinished:
    """A comparison with nothing left to run: what it says about the runs, and what it leaves alone."""

    @pytest.fixture
    def compare(self, finished: Path, capsys):
        def call(*arguments: str, file: Path = finished / "compare.toml") -> tuple[int, str]:
            status = main(["compare", str(file), "--out", str(finished / "out"), *arguments])
            return status, capsys.readouterr().out

        return call

    @pytest.mark.long
    def test_runs_nothing_and_judges_everything(self, compare, finished: Path):
        out = finished / "out"
        logs = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
        assert len(logs) == 8
        status, printed = compare()
        assert status == 0
        assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")} == logs
        assert not list(out.rglob("worker.log"))
        assert "too few seeds: 4 more" in printed
        result = json.loads((out / "comparison.json").read_text())
        arms = result["streams"]["dirty"]
        losses = {
            arm: [read_summary(out / "dirty" / f"{arm}-{seed}")["test_loss"] for seed in (0, 1)]
            for arm in arms
        }
        differences = [a - b for a, b in zip(losses["low-loss"], losses["uniform"], strict=True)]
        assert arms["low-loss"]["difference"]["mean"] == pytest.approx(sum(differences) / 2)
        assert arms["low-loss"]["difference"]["more_seeds"] == 4
        assert arms["uniform"]["difference"] is None
        for axis in ("windows", "tokens", "flops", "seconds"):
            assert arms["uniform"]["to_target"][axis]["mean"] == 1.0
        curve = arms["low-loss"]["runs"][1]["curve"]
        rows = [row for row in read_metrics(out / "dirty" / "low-loss-1") if "validation/loss" in row]
        assert curve["validation_loss"] == [row["validation/loss"] for row in rows]
        assert curve["windows"] == [32, 48]
        assert (out / "curves-dirty.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / "curves-dirty.svg").read_text()

    def test_its_file_alone_makes_the_page(self, compare, finished: Path, here: Path, capsys):
        """As it is published: compressed, and the folders of its runs are elsewhere."""
        assert compare()[0] == 0
        result = json.loads((finished / "out" / "comparison.json").read_text())
        for run in (run for arm in result["streams"]["dirty"].values() for run in arm["runs"]):
            run["folder"] = "dirty/" + Path(run["folder"]).name
        file = here / "small.json.gz"
        file.write_bytes(gzip.compress(json.dumps(result).encode()))
        assert main(["report", str(file), "--no-figures"]) == 0
        assert "The logs of 8 finished runs are not there" in capsys.readouterr().err
        page = (here / "report.html").read_text(encoding="utf-8")
        assert "<title>curriq: small</title>" in page
        assert "The logs of 8 finished runs are not there" in page
        assert main(["report", str(finished / "out"), "--no-figures", "--out", str(here / "whole.html")]) == 0
        assert "are not there" not in capsys.readouterr().err
        for damaged in (
            b"[]",
            b"{}",
            gzip.compress(b"{}")[:-4],
            gzip.compress(b'{"streams": {}, "baseline": 1}'),
        ):
            file.write_bytes(damaged)
            assert main(["report", str(file)]) != 0
            said = capsys.readouterr().err
            assert str(file) in said
            assert "fault of curriq" not in said

    def test_says_the_same_twice(self, compare, finished: Path):
        written = []
        for _ in range(2):
            assert compare()[0] == 0
            files = ("comparison.json", "curves-dirty.svg", "curves-dirty.png")
            written.append([(finished / "out" / file).read_bytes() for file in files])
        assert written[0] == written[1]

    def losses(self, out: Path, arm: str, seed: int) -> np.ndarray:
        """Of the test windows, as the file has them."""
        return parquet.read_table(out / "dirty" / f"{arm}-{seed}" / "test_losses.parquet")["loss"].to_numpy()

    def test_the_tail_is_the_share_of_windows_that_end_clearly_worse(self, compare, finished: Path):
        out = finished / "out"
        file = out / "dirty" / "low-loss-1" / "test_losses.parquet"
        table, worse = parquet.read_table(file), io.BytesIO()
        losses = table["loss"].to_numpy().copy()
        losses[::4] += 0.3  # six steps make no window clearly worse
        parquet.write_table(table.set_column(1, "loss", [losses]), worse)
        with edited(file, worse.getvalue()):
            self.check_the_tail(compare, out)

    def check_the_tail(self, compare, out: Path):
        compare()
        arms = json.loads((out / "comparison.json").read_text())["streams"]["dirty"]
        assert arms["uniform"]["tail"] is None
        for arm in ("low-loss", "again"):
            changes = [self.losses(out, arm, seed) - self.losses(out, "uniform", seed) for seed in (0, 1)]
            shares = [float(np.mean(change > 0.1)) for change in changes]
            assert arms[arm]["tail"]["by_seed"] == {"0": shares[0], "1": shares[1]}
            assert arms[arm]["tail"]["mean"] == np.mean(shares)
            difference = arms[arm]["difference"]
            both_losses = zip(arms[arm]["runs"], arms["uniform"]["runs"], strict=True)
            assert difference["by_seed"] == [a["test_loss"] - b["test_loss"] for a, b in both_losses]
            assert (difference["low"], difference["high"]) == (None, None)  # two seeds reject nothing
        assert arms["low-loss"]["tail"]["by_seed"]["1"] >= 0.25
        assert any(run["test_loss"] != twin["test_loss"] for run, twin in both(arms, "again", "uniform"))

    def test_who_read_how_much(self, compare, finished: Path):
        compare()
        result = json.loads((finished / "out" / "comparison.json").read_text())
        for arm, found in result["streams"]["dirty"].items():
            summaries = [read_summary(finished / "out" / "dirty" / f"{arm}-{seed}") for seed in (0, 1)]
            for total in ("windows_read", "windows_trained", "flops", "seconds"):
                assert found["spent"][total] == pytest.approx(np.mean([s[total] for s in summaries]))

    def test_an_arm_that_never_selected_is_named(self, compare, finished: Path):
        """Q learns, but weighs nothing; the uniform arms, which are meant to be so, are not named."""
        _, printed = compare()
        idle = "idle on dirty never selected: with all 2 seeds"
        (note,) = json.loads((finished / "out" / "comparison.json").read_text())["notes"]
        assert note.startswith(idle)
        assert idle in " ".join(printed.split())
        log = finished / "out" / "dirty" / "idle-1" / "metrics.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        rows[2]["policy/effective_batch_fraction"] = 0.99
        with edited(log, "".join(json.dumps(row) + "\n" for row in rows).encode()):
            compare()
        (note,) = json.loads((finished / "out" / "comparison.json").read_text())["notes"]
        assert note.startswith("idle on dirty never selected: with 1 of 2 seeds (0) it rejected")

    @pytest.mark.parametrize(("read", "even", "idle"), [
        (1920, 1.0, True),
        (1921, 1.0, True),  # a filter that accepts all still holds the first window of the next step
        (2000, 1.0, False),
        (1920, 0.9, False),
    ])  # fmt: skip
    def test_hardly_any_window_rejected_is_no_selection(self, read: int, even: float, idle: bool):
        row = {"x/windows_read": read, "x/windows_proposed": 1920, "policy/effective_batch_fraction": even}
        assert never_selected([row]) is idle

    def test_runs_without_losses_by_window_fall_back_and_say_so(self, compare, finished: Path):
        with edited(finished / "out" / "dirty" / "low-loss-1" / "test_losses.parquet", None):
            _, printed = compare()
        result = json.loads((finished / "out" / "comparison.json").read_text())
        found = result["streams"]["dirty"]["low-loss"]
        assert found["tail"] is None
        assert found["difference"]["test"] == "sign-flip"
        assert result["streams"]["dirty"]["again"]["tail"] is not None
        said = " ".join(printed.split())
        assert "1 run of an earlier version has no test_losses.parquet (dirty/low-loss-1)" in said

    def test_an_arm_with_a_training_seed_of_its_own_must_have_the_same_test_set(self, finished: Path, capsys):
        environment = finished / "out" / "dirty" / "again-1" / "environment.json"
        about = json.loads(environment.read_text())
        about["fingerprint"]["held_out"] = "other"
        with edited(environment, json.dumps(about).encode()):
            status = main(["compare", str(finished / "compare.toml"), "--out", str(finished / "out")])
        assert status == 2
        assert "again-1 and" in (said := capsys.readouterr().err)
        assert "saw different data" in said

    @pytest.mark.parametrize("width", [80, 120])
    def test_tables_fit_the_terminal(self, compare, finished: Path, width: int):
        compare()
        result = json.loads((finished / "out" / "comparison.json").read_text())
        screen = console(width=width, record=True, file=io.StringIO())
        print_comparison(result, screen)
        text = screen.export_text()
        assert "…" not in text
        lines = [line.rstrip() for line in text.splitlines() if not line.startswith("note ")]
        assert max(map(len, lines)) <= width
        assert "too few seeds" in text
        assert "tail: % of test windows over 0.1 nats worse" in text

    def test_without_matplotlib_the_numbers_stand_and_the_extra_is_named(self, compare, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        status, printed = compare()
        assert status == 0
        assert 'pip install "curriq[report]"' in printed
        assert '.venv/bin/pip install -e ".[report]"' in printed

    def test_other_settings_are_refused_by_name(self, finished: Path, here: Path, capsys):
        write(here, [0, 1], window=16)
        error = refused(capsys, "compare.toml", "--out", str(finished / "out"))
        assert "window = 32 there, 16 now" in error
        assert "uniform-0" in error

    def test_runs_of_one_split_are_not_taken_for_runs_of_their_own(self, finished: Path, here: Path, capsys):
        """Seed 0 has split 0 either way; seed 1 is the one that is refused."""
        file = write(here, [0, 1])
        file.write_text(file.read_text().replace("[compare]", "[compare]\nvary_split = false"))
        error = refused(capsys, "compare.toml", "--out", str(finished / "out"))
        assert "uniform-1 holds a run with other settings (split_seed = 1 there, 0 now)" in error
        assert "for split_seed: vary_split under [compare]" in error

    def test_how_a_run_is_saved_and_shown_may_change(self, compare, here: Path):
        file = write(here, [0, 1], checkpoint_every=3, log_candidates=False)
        assert compare("--workers", "1", file=file)[0] == 0

    def test_runs_that_saw_other_data_are_refused(self, finished: Path, capsys):
        summary = finished / "out" / "dirty" / "low-loss-1" / "summary.json"
        changed = json.loads(summary.read_text()) | {"data_fingerprint": "other"}
        with edited(summary, json.dumps(changed).encode()):
            assert main(["compare", str(finished / "compare.toml"), "--out", str(finished / "out")]) == 2
        assert "saw different data" in capsys.readouterr().err

    def test_a_file_that_was_another_one_for_another_seed(self, finished: Path, capsys):
        """In other words: a mean over seeds is of one corpus."""
        changed = [finished / "out" / "dirty" / f"low-loss-{seed}" / "environment.json" for seed in (0, 1)]
        abouts = [json.loads(path.read_text()) for path in changed]
        for about, digest in zip(abouts, ("a", "b"), strict=True):
            about["files"] = {"gone.jsonl": {"size": 1, "sha256": digest}}
        with ExitStack() as held:
            for path, about in zip(changed, abouts, strict=True):
                held.enter_context(edited(path, json.dumps(about).encode()))
            assert main(["compare", str(finished / "compare.toml"), "--out", str(finished / "out")]) == 2
        assert "low-loss-1 and" in (error := capsys.readouterr().err)
        assert "saw different data: gone.jsonl changed between the runs" in error

    def test_more_seeds_are_not_begun_on_other_data(self, finished: Path, here: Path, capsys):
        (here / "web.jsonl").write_text("what is there now")
        environment = finished / "out" / "dirty" / "low-loss-1" / "environment.json"
        about = json.loads(environment.read_text())
        about["files"] = {str(here / "web.jsonl"): {"size": 3, "sha256": "of what was there"}}
        file = write(here, [0, 1, 2])
        with edited(environment, json.dumps(about).encode()):
            error = refused(capsys, str(file), "--out", str(finished / "out"))
        assert "low-loss-1 was trained on other data" in error
        assert "web.jsonl has changed" in error
        assert not (finished / "out" / "dirty" / "low-loss-2").exists()

    def test_runs_of_other_versions_and_machines_are_told_of(self, compare, finished: Path):
        environment = finished / "out" / "dirty" / "low-loss-1" / "environment.json"
        about = json.loads(environment.read_text())
        about |= {"hardware": "an abacus, 9 wires", "versions": {"torch": "0.1"}}
        with edited(environment, json.dumps(about).encode()):
            _, printed = compare()
        said = " ".join(printed.split())
        assert "The runs are of different hardware: " in said
        assert "an abacus, 9 wires" in said
        assert "The runs are of different versions: " in said
        assert "torch 0.1" in said
        assert "are of different" not in " ".join(compare()[1].split())

    def test_a_folder_at_work_is_left_alone(self, finished: Path, capsys):
        with exclusive(finished / "out", "still finishing"):
            error = refused(capsys, str(finished / "compare.toml"), "--out", str(finished / "out"))
        assert "another `curriq compare` is at work there" in error


def both(arms: dict, first: str, second: str) -> Iterator[tuple[dict, dict]]:
    """Runs of two arms with one seed."""
    return zip(arms[first]["runs"], arms[second]["runs"], strict=True)


class TestWorkers:
    def job(self, folder: Path, name: str, code: str) -> Job:
        return Job(
            name=name,
            command=[sys.executable, "-c", code],
            log=folder / f"{name}.log",
            steps=1,
            progress=lambda: 0,
            result=lambda: "well",
        )

    def test_a_worker_that_was_killed_says_by_what(self, tmp_path: Path):
        """What its log has of an earlier start is no reason."""
        (tmp_path / "killed.log").write_text("curriq: no space left.\n")
        (tmp_path / "quiet.log").write_text("curriq: no space left.\n")
        jobs = [
            self.job(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"),
            self.job(tmp_path, "quiet", "raise SystemExit(3)"),
        ]
        screen = console(record=True, file=io.StringIO(), width=100)
        with exclusive(tmp_path, "still finishing") as lock:
            failed, _ = run_jobs(jobs, 1, 0, lock, screen, poll_seconds=0.01)
        assert failed == {
            "killed": "killed by SIGKILL; the machine may have too little memory",
            "quiet": "it printed nothing",
        }

    def test_a_failure_does_not_sink_the_others(self, tmp_path: Path):
        jobs = [
            self.job(tmp_path, "bad", "import sys; print('curriq: no luck.'); print('bye'); sys.exit(2)"),
            self.job(tmp_path, "good", f"open('{tmp_path}/good', 'w')"),
        ]
        screen = console(record=True, file=io.StringIO(), width=100)
        with exclusive(tmp_path, "still finishing") as lock:
            failed, stopped = run_jobs(jobs, 1, 0, lock, screen, poll_seconds=0.01)
        assert failed == {"bad": "no luck."}
        assert not stopped
        assert (tmp_path / "good").exists()
        text = screen.export_text()
        assert "bad: failed (exit status 2): no luck." in text
        assert "good: well" in text
        assert "good: started" in text

    @pytest.mark.parametrize(("kind", "shown"), [("lines", True), ("none", False)])
    def test_a_display_that_was_asked_for(self, tmp_path: Path, kind: str, shown: bool):
        """Without any, a failure is still told; on a terminal, lines are lines."""
        jobs = [self.job(tmp_path, "bad", "raise SystemExit(2)"), self.job(tmp_path, "good", "")]
        screen = console(record=True, file=io.StringIO(), width=100, force_terminal=True)
        with exclusive(tmp_path, "still finishing") as lock:
            run_jobs(jobs, 1, 0, lock, screen, poll_seconds=0.01, progress=kind)
        text = screen.export_text()
        assert "bad: failed (exit status 2)" in text
        assert ("good: started" in text, "good: well" in text) == (shown, shown)
        assert "all steps" not in text

    @pytest.mark.parametrize("workers", [1, 3])
    def test_no_more_than_so_many_at_once(self, tmp_path: Path, workers: int):
        code = "import time; print(time.time()); time.sleep(0.4); print(time.time())"
        jobs = [self.job(tmp_path, f"j{i}", code) for i in range(4)]
        with exclusive(tmp_path, "still finishing") as lock:
            run_jobs(jobs, workers, 0, lock, console(file=io.StringIO()), poll_seconds=0.01)
        spans = [tuple(map(float, job.log.read_text().split())) for job in jobs]
        at_once = max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans)
        assert at_once <= workers
        assert (at_once == 1) == (workers == 1)

    def test_workers_keep_the_lock_after_the_parent(self, tmp_path: Path):
        """A worker left behind by a kill holds the folder until it ends."""
        with exclusive(tmp_path, "still finishing") as lock:
            left = subprocess.Popen(
                [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)
            )
        with pytest.raises(ValueError, match="still finishing"), exclusive(tmp_path, "still finishing"):
            pass
        left.communicate(b"\n")
        with exclusive(tmp_path, "still finishing"):
            pass

    def test_steps_come_from_the_last_whole_row(self, tmp_path: Path):
        assert steps_logged(tmp_path) == 0
        log = tmp_path / "metrics.jsonl"
        log.write_text('{"step": 0')
        assert steps_logged(tmp_path) == 0
        log.write_text('{"step": 0, "pad": "' + "x" * 70_000 + '"}\n{"step": 1}\n{"step": 2')
        assert steps_logged(tmp_path) == 2

    def test_the_last_word_of_a_log(self, tmp_path: Path):
        log = tmp_path / "log"
        log.write_text("Traceback\n  here\nValueError: x\n\n")
        assert last_line(log) == "ValueError: x"
        log.write_text("")
        assert last_line(log) == "it printed nothing"


@pytest.mark.slow
def test_a_comparison_from_start_to_end(tmp_path: Path):
    """Interrupted, gone on with and extended by a seed in one call, then by an arm that fails."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "COLUMNS": "100"}

    def start() -> subprocess.Popen:
        command = [sys.executable, "-m", "curriq", "compare", "compare.toml", "--out", "out"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)

    def rows(run: str) -> int:
        return steps_logged(tmp_path / "out" / "dirty" / run)

    steps = {"steps": 150, "eval_every": 50}
    write(tmp_path, [0], **steps)
    process = start()
    while not rows("uniform-0"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Go on with: curriq compare compare.toml --out out" in said
    assert 0 < rows("uniform-0") < 150
    assert not (tmp_path / "out" / "comparison.json").exists()

    write(tmp_path, [0, 1], **steps)
    process = start()
    printed, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "too few seeds: 4 more" in printed
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    for arm in result["streams"]["dirty"].values():
        assert [run["windows_proposed"] for run in arm["runs"]] == [1200, 1200]
    assert {run["threads"] for run in result["streams"]["dirty"]["uniform"]["runs"]} == {
        max(1, (os.cpu_count() or 1) // 2)
    }

    logs = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    write(tmp_path, [0, 1], '[arms.broken]\nselector = "rho"\nreference_model = "./gone"\n', **steps)
    process = start()
    printed, said = process.communicate(timeout=100)
    assert process.returncode == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")} == logs
    assert "4 of 6 runs are finished already" in said
    assert "dirty/broken-1" in printed
    assert "out/dirty/broken-1/worker.log" in printed
    assert "no pairs" in printed
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(result["failed"]) == ["dirty/broken-0", "dirty/broken-1"]
    assert "gone" in result["failed"]["dirty/broken-0"]
    assert result["streams"]["dirty"]["low-loss"]["difference"]["seeds"] == 2
