"""The log: what goes in comes out bit by bit, a resume forgets what it will repeat, every name is defined."""

import errno
import json
import math
import os
import subprocess
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.helpers import effects_of
from tests.runs import without_times
from tests.steps import finished_step

from curriq.errors import CurriqError
from curriq.runlog import schema as registry
from curriq.runlog import writers as module
from curriq.runlog.promise import Extent, Promise, broken
from curriq.runlog.read import read_candidates, read_metrics, read_summary
from curriq.runlog.writers import NOTHING, CandidateLog, MetricsLog, Parts, RunLogs, write_summary
from curriq.train.record import TensorBoardSink, WandbSink, log_entry
from curriq.types import Offer, Sampled, Windows

REPOSITORY = Path(__file__).resolve().parents[2]


def write_rows(run_dir: Path, first: int, end: int, kept: Extent = NOTHING) -> dict[int, Extent]:
    """Rows from `first` on, over what is kept of an earlier log; gives what checkpoints promise, by step."""
    log = MetricsLog(run_dir, kept)
    promised = {first: kept}
    for step in range(first, end):
        log.append({"step": step, "train/loss": step + 0.1})
        promised[step + 1] = log.flush()
    log.close()
    return promised


def steps(run_dir: Path) -> list[float]:
    return [row["step"] for row in read_metrics(run_dir)]


class TestRegistry:
    def test_page_is_printed_from_the_registry(self):
        page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
        assert page == registry.page(), "run: python -m curriq.runlog.schema > docs/metrics.md"

    def test_names_are_unique_and_documented(self):
        names = [metric.name for metric in registry.metrics()]
        assert len(set(names)) == len(names)
        assert all(metric.doc.endswith(".") and metric.unit for metric in registry.metrics())

    def test_unknown_name_offers_the_nearest(self):
        with pytest.raises(KeyError, match=r"policy/entrpy.*Did you mean 'policy/entropy'"):
            registry.find("policy/entrpy")

    @pytest.mark.parametrize(
        ("name", "family"),
        [
            ("bandit/p_web", "bandit/p_<source>"),
            ("select/weight_share/my source/2", "select/weight_share/<source>"),
            ("own/needle_weight", "own/<name>"),
        ],
    )
    def test_family(self, name, family):
        assert registry.find(name).name == family

    @pytest.mark.parametrize("name", ["bandit/p_", "select/weight_share", "own/", "x/", ""])
    def test_family_needs_a_member(self, name):
        with pytest.raises(KeyError):
            registry.find(name)

    def test_only_times_and_memory_differ_between_runs(self):
        varying = {metric.name for metric in registry.metrics() if not metric.deterministic}
        assert varying == {
            "x/seconds",
            "memory/peak",
            "time/propose",
            "time/propose_share",
            "time/train",
            "time/ingest",
            "time/search",
            "time/retrieve",
            "time/step",
            "time/reward",
            "time/probe",
            "time/evaluate",
            "time/checkpoint",
            "time/checkpoint_written",
            "checkpoint/bytes",
            "time/tasks",
            "time/windows_per_second",
            "perf/tokens_per_second",
            "perf/mfu",
            "perf/predicted_seconds",
        }

    def test_without_times(self):
        row = {"step": 3, "train/loss": 1.5, "time/step": 0.1, "x/seconds": 9.0, "x/tokens": 12}
        assert without_times(row) == {"step": 3, "train/loss": 1.5, "x/tokens": 12}

    def test_reading_needs_no_torch(self):
        code = (
            "import sys, curriq.runlog.read, curriq.runlog.schema\n"
            "assert not {'torch', 'pyarrow', 'transformers'} & set(sys.modules)"
        )
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)


class TestMetricsLog:
    def test_floats_come_back_bit_by_bit(self, tmp_path):
        values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2**53 + 1]
        log = MetricsLog(tmp_path)
        for step, value in enumerate(values):
            log.append({"step": step, "reward": value})
        log.close()
        back = [row["reward"] for row in read_metrics(tmp_path)]
        assert [repr(value) for value in back] == [repr(value) for value in values]

    def test_row_is_on_file_before_the_next_step(self, tmp_path):
        log = MetricsLog(tmp_path)
        log.append({"step": 0, "reward": -1.0})
        assert steps(tmp_path) == [0]

    @pytest.mark.parametrize("start", [0, 1, 7, 10])
    def test_resume_cuts_the_rows_it_will_repeat(self, tmp_path, start):
        promised = write_rows(tmp_path, 0, 10)
        before = (tmp_path / "metrics.jsonl").read_bytes()
        MetricsLog(tmp_path, promised[start]).close()
        assert steps(tmp_path) == list(range(start))
        assert write_rows(tmp_path, start, 10, promised[start])[10] == promised[10]
        assert (tmp_path / "metrics.jsonl").read_bytes() == before

    def test_cut_at_every_byte(self, tmp_path):
        """A kill may leave any prefix of the file; rows before the checkpoint are on the disk."""
        promised = write_rows(tmp_path, 0, 4)
        path = tmp_path / "metrics.jsonl"
        whole = path.read_bytes()
        for length in range(promised[2].size, len(whole) + 1):
            path.write_bytes(whole[:length])
            assert all(isinstance(row["train/loss"], float) for row in read_metrics(tmp_path))
            write_rows(tmp_path, 2, 4, promised[2])
            assert path.read_bytes() == whole

    def test_promise_is_what_sha256sum_says(self, tmp_path):
        promised = write_rows(tmp_path, 0, 5)[5]
        tool = subprocess.run(
            ["sha256sum", tmp_path / "metrics.jsonl"], capture_output=True, text=True, check=True
        )
        assert promised == Extent((tmp_path / "metrics.jsonl").stat().st_size, tool.stdout.split()[0])

    @pytest.mark.parametrize("position", [0, 40, 100])
    def test_promised_rows_are_never_cut(self, tmp_path, position):
        promised = write_rows(tmp_path, 0, 5)[4]
        path = tmp_path / "metrics.jsonl"
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
        with pytest.raises(CurriqError, match=r"metrics\.jsonl is damaged: `curriq verify"):
            MetricsLog(tmp_path, promised)
        assert path.read_bytes() == content

    def test_unknown_metric(self, tmp_path):
        with pytest.raises(KeyError, match="Did you mean 'train/loss'"):
            MetricsLog(tmp_path).append({"step": 0, "train/los": 1.0})
        assert read_metrics(tmp_path) == []

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, tmp_path, value):
        with pytest.raises(CurriqError, match=r"train/grad_norm = -?(nan|inf) at step 4"):
            module.encode_row({"step": 4, "train/grad_norm": value})

    @pytest.mark.parametrize("value", [torch.tensor(1.0), np.float64(1.0), "1", None, True])
    def test_no_number(self, value):
        with pytest.raises(TypeError, match=r"metric 'reward' is a \w+, not a Python number"):
            module.encode_row({"step": 0, "reward": value})

    def test_full_disk_keeps_rows_until_there_is_space(self, tmp_path, caplog):
        log = MetricsLog(tmp_path)
        file, log._file = log._file, FullDisk(takes=5)
        for step in range(3):
            log.append({"step": step, "reward": -1.0})
        assert caplog.text.count("No space left on device") == 1
        with pytest.raises(OSError, match="No space left on device"):
            log.flush()
        file.write(log._file.taken)
        log._file = file
        promised = log.flush()
        log.close()
        assert steps(tmp_path) == [0, 1, 2]
        MetricsLog(tmp_path, promised).close()
        assert steps(tmp_path) == [0, 1, 2]

    def test_damaged_line_is_named(self, tmp_path):
        write_rows(tmp_path, 0, 3)
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(path.read_bytes().replace(b'{"step": 1', b'{"step" 1'))
        with pytest.raises(CurriqError, match="line 2, is damaged"):
            read_metrics(tmp_path)

    def test_no_log(self, tmp_path):
        with pytest.raises(CurriqError, match="does not exist"):
            read_metrics(tmp_path)


class FullDisk:
    """A file that takes a few bytes and then reports a full disk."""

    def __init__(self, takes: int) -> None:
        self.room = takes
        self.taken = b""

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = content[: self.room]
        self.room -= len(part)
        self.taken += part
        return len(part)

    def close(self) -> None:
        pass


def collect(
    log: CandidateLog, step: int, n: int = 4, trained: tuple[int, ...] = (3, 1), with_q: bool = True
) -> None:
    """A step with n candidates of which the rows `trained` were forwarded, in that order."""
    windows = Windows(
        tokens=torch.zeros(n, 2, dtype=torch.long),
        ids=torch.arange(n) + 2**62 + 100 * step,
        source=torch.arange(n) % 2,
    )
    index = torch.tensor(trained)
    loss = index.float() + step
    effects = effects_of(torch.tensor([0]), torch.tensor([0.25]), 0.25) if with_q else None
    q = -loss if with_q else None
    made = finished_step(step, Offer.of(windows), index, loss=loss, scores=index * 0.5, q=q, effects=effects)
    log.append(log_entry(made, {}))


def write_candidates(
    run_dir: Path, first: int, end: int, every: int, promise: Promise | None = None
) -> dict[int, Promise]:
    """Gives what a checkpoint of each flushed step promises."""
    parts, promises = Parts(run_dir, promise or {}), {first: promise or {}}
    log = CandidateLog(parts, ["prose", "code"])
    for step in range(first, end):
        collect(log, step)
        if (step + 1) % every == 0 or step + 1 == end:
            log.flush()
            promises[step + 1] = {"parts.jsonl": asdict(parts.flush())}
    return promises


def parts(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "candidates").iterdir())


class TestCandidateLog:
    def test_content(self, tmp_path):
        log = CandidateLog(Parts(tmp_path, {}), ["prose", "code"])
        collect(log, 5)
        log.flush()
        table = read_candidates(tmp_path)
        assert [(f.name, str(f.type)) for f in table.schema] == [
            ("step", "int32"),
            ("row", "int32"),
            ("window_id", "int64"),
            ("source", "dictionary<values=string, indices=int32, ordered=0>"),
            ("score", "float"),
            ("weight", "float"),
            ("loss", "float"),
            ("q", "float"),
            ("effect", "float"),
            ("accept_prob", "float"),
            ("static_score", "float"),
        ]
        assert table.to_pydict() == {
            "step": [5, 5, 5, 5],
            "row": [0, 1, 2, 3],
            "window_id": [2**62 + 500, 2**62 + 501, 2**62 + 502, 2**62 + 503],
            "source": ["prose", "code", "prose", "code"],
            "score": [None, 0.5, None, 1.5],
            "weight": [0.0, 0.5, 0.0, 0.5],
            "loss": [None, 6.0, None, 8.0],
            "q": [None, -6.0, None, -8.0],
            "effect": [None, None, None, 0.25],  # of the first trained window, which is row 3
            "accept_prob": [None, None, None, None],
            "static_score": [None, None, None, None],
        }

    def test_what_was_rejected_follows_with_its_probability_and_no_weight(self, tmp_path):
        log = CandidateLog(Parts(tmp_path, {}), ["prose", "code"])
        taken, rejected = (
            replace(
                Offer.of(
                    Windows(
                        tokens=torch.zeros(2, 2, dtype=torch.long),
                        ids=torch.arange(2) + 10 * number,
                        source=torch.full((2,), number),
                    ),
                    known={"static_score": torch.tensor([1.5, -0.5]) + number},
                    sampled=Sampled(
                        accept_prob=torch.tensor([0.5, 0.25], dtype=torch.float64) / (1 + number),
                    ),
                ),
                rows=torch.tensor(rows),
            )
            for number, rows in enumerate(([0, 1], [1, 3]))
        )
        index = torch.tensor([1, 0])
        step = finished_step(0, replace(taken, rejected=rejected), index, loss=index + 4.0)
        log.append(log_entry(step, {}))
        log.flush()
        rows = read_candidates(tmp_path).to_pydict()
        assert rows["row"] == [0, 1, 2, 3]
        assert rows["window_id"] == [0, 1, 10, 11]
        assert rows["source"] == ["prose", "prose", "code", "code"]
        assert rows["weight"] == [0.5, 0.5, 0, 0]
        assert rows["loss"] == [4.0, 5.0, None, None]
        assert rows["accept_prob"] == [0.5, 0.25, 0.25, 0.125]
        assert rows["static_score"] == [1.5, -0.5, 2.5, 0.5]

    def test_effects_stand_at_the_windows_that_were_probed_the_rejected_ones_included(self, tmp_path):
        """Of four proposed windows two are trained on, rows 3 and 1 of the proposal; three were rejected."""
        log = CandidateLog(Parts(tmp_path, {}), ["prose"])
        proposed, rejected = (
            Offer.of(
                Windows(
                    tokens=torch.zeros(n, 2, dtype=torch.long),
                    ids=torch.arange(first, first + n),
                    source=torch.zeros(n, dtype=torch.long),
                )
            )
            for n, first in ((4, 0), (3, 10))
        )
        # Effect of each window: its id in hundredths. Rows 0 and 1 are trained windows, 2, 3, 4 rejected.
        effects = effects_of(torch.tensor([0, 1, 3, 4]), torch.tensor([0.03, 0.01, 0.11, 0.12]))
        offer = replace(proposed, rejected=rejected)
        log.append(log_entry(finished_step(0, offer, torch.tensor([3, 1]), effects=effects), {}))
        log.flush()
        rows = read_candidates(tmp_path).to_pydict()
        found = dict(zip(rows["window_id"], rows["effect"], strict=True))
        assert found == {
            **dict.fromkeys((0, 2, 10)),
            **{i: pytest.approx(i / 100) for i in (1, 3, 11, 12)},
        }

    def test_columns_are_the_documented_ones(self, tmp_path):
        write_candidates(tmp_path, 0, 1, every=1)
        assert read_candidates(tmp_path).column_names == [column.name for column in registry.CANDIDATES]

    def test_no_q(self, tmp_path):
        log = CandidateLog(Parts(tmp_path, {}), ["prose", "code"])
        collect(log, 0, with_q=False)
        log.flush()
        assert read_candidates(tmp_path)["q"].null_count == 4

    def test_compressed_with_zstd(self, tmp_path):
        write_candidates(tmp_path, 0, 3, every=3)
        metadata = pq.read_metadata(tmp_path / "candidates" / "part-00000000.parquet")
        assert {metadata.row_group(0).column(i).compression for i in range(8)} == {"ZSTD"}

    @pytest.mark.parametrize("start", [0, 3, 6, 9, 10])
    def test_resume_leaves_the_table_of_an_uninterrupted_run(self, tmp_path, start):
        write_candidates(tmp_path / "whole", 0, 10, every=4)
        promises = write_candidates(tmp_path / "resumed", 0, 10, every=3)
        Parts(tmp_path / "resumed", promises[start])
        if start:
            assert read_candidates(tmp_path / "resumed")["step"].to_pylist()[-1] == start - 1
        else:
            assert parts(tmp_path / "resumed") == []
        write_candidates(tmp_path / "resumed", start, 10, 4, promises[start])
        assert read_candidates(tmp_path / "resumed").equals(read_candidates(tmp_path / "whole"))

    def test_every_damaged_promised_part_is_named_with_its_steps(self, tmp_path):
        promise = write_candidates(tmp_path, 0, 10, every=3)[9]
        assert broken(tmp_path, promise) == []
        flipped, cut, gone = (tmp_path / "candidates" / f"part-{i:08d}.parquet" for i in (0, 3, 6))
        content = bytearray(flipped.read_bytes())
        content[len(content) // 2] ^= 1
        flipped.write_bytes(content)
        os.truncate(cut, 100)
        gone.unlink()
        first, second, third = broken(tmp_path, promise)
        assert first == "candidates/part-00000000.parquet (steps 0 to 2) is damaged: its SHA-256 is another"
        assert second.startswith("candidates/part-00000003.parquet (steps 3 to 5) has not its ")
        assert third.endswith("(steps 6 to 8) cannot be read (No such file or directory)")

    def test_every_byte_of_the_list_of_parts_is_guarded(self, tmp_path):
        promise = write_candidates(tmp_path, 0, 4, every=2)[4]
        path = tmp_path / "parts.jsonl"
        whole = path.read_bytes()
        for position in range(len(whole)):
            content = bytearray(whole)
            content[position] ^= 1
            path.write_bytes(content)
            (defect,) = broken(tmp_path, promise)
            assert defect.startswith("parts.jsonl is damaged")

    def test_leftover_of_a_killed_write_goes(self, tmp_path):
        promise = write_candidates(tmp_path, 0, 4, every=4)[4]
        (tmp_path / "candidates" / ".tmp-part-00000004.parquet").write_bytes(b"half")
        assert len(read_candidates(tmp_path)) == 16
        Parts(tmp_path, promise)
        assert parts(tmp_path) == ["part-00000000.parquet"]

    def test_full_disk_keeps_the_candidates_in_memory(self, tmp_path, monkeypatch):
        log = CandidateLog(Parts(tmp_path, {}), ["prose", "code"])
        collect(log, 0)

        def refuse(path: Path, content: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(module, "write_atomically", refuse)
            with pytest.raises(OSError, match="No space left on device"):
                log.flush()
        collect(log, 1)
        log.flush()
        assert read_candidates(tmp_path)["step"].to_pylist() == [0] * 4 + [1] * 4

    def test_damaged_part_is_named(self, tmp_path):
        write_candidates(tmp_path, 0, 4, every=4)
        (tmp_path / "candidates" / "part-00000000.parquet").write_bytes(b"PAR1")
        with pytest.raises(CurriqError, match=r"part-00000000\.parquet is damaged"):
            read_candidates(tmp_path)

    def test_part_of_another_table_is_named(self, tmp_path):
        write_candidates(tmp_path, 0, 4, every=4)
        path = tmp_path / "candidates" / "part-00000000.parquet"
        pq.write_table(pa.table({"step": ["a"], "row": [1]}), path)
        with pytest.raises(CurriqError, match="column 'step' is of type string, not int32"):
            read_candidates(tmp_path)

    def test_none_logged(self, tmp_path):
        with pytest.raises(CurriqError, match="holds no candidates"):
            read_candidates(tmp_path)


class TestRunLogs:
    @pytest.mark.parametrize("candidates", [True, False])
    def test_one_entry_goes_into_every_table_that_is_kept(self, tmp_path, candidates):
        windows = Windows(tokens=torch.ones(2, 3).long(), ids=torch.arange(2), source=torch.zeros(2).long())
        logs = RunLogs(
            tmp_path, source_names=["prose"], tokenizer="{}", windows_mb=1.0, candidates=candidates
        )
        for step in range(3):
            logs.write(log_entry(finished_step(step, Offer.of(windows)), {"step": step}))
        logs.flush()
        logs.close()
        assert steps(tmp_path) == [0, 1, 2]
        made = {"metrics.jsonl", "parts.jsonl", "windows"} | ({"candidates"} if candidates else set())
        assert set(os.listdir(tmp_path)) == made  # nothing was searched, so there is no queries table
        assert sorted(os.listdir(tmp_path / "windows")) == ["part-00000000.parquet", "tokenizer.json"]
        if candidates:
            assert len(read_candidates(tmp_path)) == 6

    def test_a_mirror_that_fails_is_switched_off_with_one_warning(self, tmp_path, caplog):
        class Broken:
            def write(self, row):
                raise RuntimeError("no connection")

            def close(self):
                raise AssertionError("it is switched off")

        def refuse():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        windows = Windows(tokens=torch.ones(2, 3).long(), ids=torch.arange(2), source=torch.zeros(2).long())
        logs = RunLogs(
            tmp_path,
            source_names=["prose"],
            tokenizer="",
            windows_mb=0.0,
            candidates=False,
            mirrors=[Broken, refuse],
        )
        with logs:
            for step in range(3):
                logs.write(log_entry(finished_step(step, Offer.of(windows)), {"step": step}))
        assert steps(tmp_path) == [0, 1, 2]
        assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
        assert "Broken failed and is switched off (no connection)" in caplog.text


class TestSummary:
    def test_round_trip(self, tmp_path):
        summary = {"steps": 3, "test_loss": 0.1 + 0.2, "weight_share": {"prose": 0.75, "ocr-é": 0.25}}
        write_summary(tmp_path, summary)
        assert read_summary(tmp_path) == summary
        assert os.listdir(tmp_path) == ["summary.json"]

    def test_unknown_field(self, tmp_path):
        with pytest.raises(KeyError, match="Did you mean 'test_loss'"):
            write_summary(tmp_path, {"test_los": 1.0})

    def test_not_finite(self, tmp_path):
        with pytest.raises(ValueError, match="JSON"):
            write_summary(tmp_path, {"test_loss": math.nan})
        assert os.listdir(tmp_path) == []


class TestTensorBoard:
    def test_resume_hides_what_it_repeats(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        for first, value in ((0, 1.0), (3, 2.0)):
            sink = TensorBoardSink(tmp_path, first)
            for step in range(first, 5):
                sink.write({"step": step, "train/loss": value})
            sink.close()
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert events.Tags()["scalars"] == ["train/loss"]
        points = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert points == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


class TestWandb:
    @pytest.fixture
    def calls(self, monkeypatch):
        """A stand-in for the wandb module that notes how it is called."""
        made: list = []

        class Run:
            def log(self, values: dict, step: int) -> None:
                made.append(("log", step, values))

            def finish(self) -> None:
                made.append(("finish",))

        def init(**settings) -> Run:
            made.append(("init", settings))
            return Run()

        fake = types.ModuleType("wandb")
        fake.init = init
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return made

    def test_rows_arrive(self, tmp_path, calls):
        sink = WandbSink("project", tmp_path, {"critic": {"beta": 1.0}})
        sink.write({"step": 7, "train/loss": 2.5})
        sink.close()
        settings = calls[0][1]
        assert (settings["project"], settings["name"]) == ("project", tmp_path.name)
        assert (settings["dir"], settings["config"]) == (str(tmp_path), {"critic": {"beta": 1.0}})
        assert calls[1:] == [("log", 7, {"train/loss": 2.5}), ("finish",)]

    def test_resume_continues_the_same_run(self, tmp_path, calls):
        for _ in range(2):
            WandbSink("project", tmp_path, {}).close()
        first, second = (call[1] for call in calls if call[0] == "init")
        assert first["id"] == second["id"]
        assert second["resume"] == "allow"

    def test_missing_package_names_the_extra(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(CurriqError, match=r'pip install "curriq\[wandb\]".*-e "\.\[wandb\]"'):
            WandbSink("project", tmp_path, {})


def test_rows_are_json_lines(tmp_path):
    write_rows(tmp_path, 0, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_metrics(tmp_path)
