"""What a report computes, against brute force and known answers; and what it refuses."""

import base64
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from scipy.sparse.linalg import ArpackError
from tests.reports import write_run

from curriq.cli import main
from curriq.report.chart import Chart, Explorer, Section, Series, block_json, numbers
from curriq.report.command import Report, build
from curriq.report.data_mix import change_points
from curriq.report.explore import explorer, query_content, shown_texts
from curriq.report.figures import rows_apart, save_figures
from curriq.report.look import asset
from curriq.report.page import render
from curriq.report.runlog import Detail, load_run_log
from curriq.report.topics import find_topics
from curriq.runlog import schema
from curriq.runlog.read import (
    bucket_edges,
    read_candidates,
    read_columns,
    read_queries,
    read_windows,
    repetition,
)
from curriq.runlog.selection import select

HOSTILE = "</script><script>window.harm = 1</script><img src=x onerror='window.harm = 1'>\u202egnorw"


def test_labels_of_near_marks_stand_in_rows_of_their_own():
    rng = np.random.default_rng(0)
    for _ in range(50):
        places = [(start, 0.1) for start in sorted(rng.uniform(0, 1, size=8).tolist())]
        rows = rows_apart(places)
        for i, j in itertools.combinations(range(8), 2):
            if rows[i] == rows[j]:
                assert places[i][0] + 0.1 <= places[j][0]
    assert rows_apart([(0.0, 0.1), (0.2, 0.1), (0.25, 0.1)]) == [0, 0, 1]


class TestColumns:
    def test_buckets_keep_mean_range_and_last_place(self, tmp_path):
        write_run(tmp_path, steps=37)
        columns = read_columns(tmp_path)
        values = columns.full("policy/entropy")
        thin = columns.thinned("policy/entropy", 5)
        edges = [0, 7, 14, 22, 29, 37]
        for i, (a, b) in enumerate(itertools.pairwise(edges)):
            assert thin.mean[i] == pytest.approx(values[a:b].mean(), rel=1e-12)
            assert (thin.low[i], thin.high[i]) == (values[a:b].min(), values[a:b].max())
            assert thin.x["step"][i] == b - 1
            assert thin.x["windows"][i] == 8 * b

    def test_a_metric_of_some_steps_stands_at_those(self, tmp_path):
        write_run(tmp_path, steps=35)
        thin = read_columns(tmp_path).thinned("validation/loss", 300)
        assert thin.x["step"].tolist() == [9, 19, 29, 34]

    def test_no_more_buckets_than_values(self):
        assert bucket_edges(3, 10).tolist() == [0, 1, 2, 3]
        assert bucket_edges(0, 10).tolist() == [0]

    def test_a_half_written_line_is_left_out_and_a_damaged_one_named(self, tmp_path, capsys):
        write_run(tmp_path, steps=5)
        log = tmp_path / "metrics.jsonl"
        with log.open("a") as file:
            file.write('{"step": 5, "rew')
        assert read_columns(tmp_path).rows == 5
        log.write_text(log.read_text() + "\n")
        assert main(["report", str(tmp_path)]) == 2
        assert "line 6" in capsys.readouterr().err


class TestWindows:
    def test_repetition_by_hand(self):
        tokens = np.array([[1] * 10, range(10), [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]])
        assert repetition(tokens).tolist() == pytest.approx([1 - 1 / 7, 0, 1 - 6 / 7])

    def test_measures_against_brute_force(self, tmp_path):
        kept = read_windows(write_run(tmp_path, steps=6))
        measures = kept.measures()
        flat = kept.tokens.ravel().tolist()
        for i, text in enumerate(kept.texts(np.arange(len(kept)))):
            rarity = [-np.log(flat.count(t) / len(flat)) for t in kept.tokens[i]]
            assert measures["difficulty"][i] == pytest.approx(np.mean(rarity), rel=1e-12)
            assert measures["length"][i] == len(text)


class TestStages:
    @pytest.mark.parametrize("memory", [0.0, 0.6])
    def test_none_on_stationary_series(self, memory):
        """White noise, and a series whose neighbours are alike: at α = 0.01 at most one of 40."""
        false_alarms = 0
        for seed in range(40):
            noise = np.random.default_rng(seed).normal(size=(300, 4))
            series = noise.copy()
            for t in range(1, 300):
                series[t] = memory * series[t - 1] + noise[t]
            false_alarms += bool(change_points(series, permutations=199))
        assert false_alarms <= 1

    def test_none_on_constant_or_short_series(self):
        assert change_points(np.full((300, 3), 0.2)) == []
        assert change_points(np.zeros((0, 3))) == []
        assert change_points(np.random.default_rng(0).normal(size=(12, 3))) == []

    def test_steps_are_found_where_they_are(self):
        series = np.random.default_rng(0).normal(size=(400, 3))
        series[150:, 0] += 4
        series[310:, 1] -= 4
        found = change_points(series)
        assert len(found) == 2
        assert abs(found[0] - 150) <= 4
        assert abs(found[1] - 310) <= 4

    def test_a_long_run_is_binned(self):
        series = np.random.default_rng(0).normal(size=(20_000, 2))
        series[12_000:] += 2
        (found,) = change_points(series)
        assert abs(found - 12_000) <= 200


class TestTopics:
    CATS = ("cat", "mouse", "kitten", "whiskers", "purr", "paw", "and")
    MATHS = ("integral", "function", "theorem", "proof", "lemma", "limit", "and")

    def test_finds_and_names_what_is_there(self):
        rng = np.random.default_rng(0)
        texts = [" ".join(rng.choice(self.CATS if i < 30 else self.MATHS, 9)) for i in range(50)]
        topics = find_topics(texts, 2)
        assert topics is not None
        assert len(set(topics.of[:30])) == len(set(topics.of[30:])) == 1
        assert topics.of[0] == 0  # the greatest first
        assert set(topics.names[0].split(", ")) < set(self.CATS) - {"and"}
        assert set(topics.names[1].split(", ")) < set(self.MATHS) - {"and"}
        assert topics.nearest[1] >= 30

    def test_takes_the_embeddings_it_is_given(self):
        texts = [f"word{'abc'[i % 3]} shared filler text" for i in range(30)]
        vectors = np.eye(2)[np.arange(30) // 15]
        topics = find_topics(texts, 2, lambda given: vectors[: len(given)])
        assert topics is not None
        assert topics.of.tolist() in ([0] * 15 + [1] * 15, [1] * 15 + [0] * 15)

    def test_equal_texts_give_equal_topics(self):
        """Also where the TF-IDF matrix has fewer directions than are asked for, as repeated texts give."""
        rng = np.random.default_rng(2)
        words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(60)]
        distinct = [" ".join(rng.choice(words, 3)) for _ in range(30)]
        texts = [distinct[i] for i in rng.integers(30, size=96)]
        first, *others = (find_topics(texts, 8) for _ in range(4))
        assert first is not None
        assert all(again.names == first.names and again.nearest == first.nearest for again in others)

    def test_none_without_text(self):
        assert find_topics(["a", "b"], 4) is None
        assert find_topics([""] * 100, 4) is None


class TestSelection:
    def test_means_against_brute_force(self, tmp_path):
        write_run(tmp_path, steps=9, effect=True)
        kept = read_windows(tmp_path)
        measures = kept.measures()
        found = select(tmp_path, kept, measures, np.arange(len(kept)) % 3, np.array([2, 5]))
        table = read_candidates(tmp_path).to_pylist()
        for i, step in enumerate(found.step):
            rows = [row for row in table if row["step"] == step]
            lengths = [measures["length"][kept.ids.tolist().index(row["window_id"])] for row in rows]
            weights = [row["weight"] for row in rows]
            assert found.per_step["offered/length"][i] == pytest.approx(np.mean(lengths))
            assert found.per_step["selected/length"][i] == pytest.approx(np.average(lengths, weights=weights))
            own = [row["loss"] for row in rows if row["source"] == "code"]
            if own:
                assert found.per_step["loss/code"][i] == pytest.approx(np.mean(own))
            assert found.per_step["offered/topic"][i].sum() == 8
            assert found.per_step["selected/topic"][i].sum() == pytest.approx(1)
            assert found.per_step["rank/effect"][i] == pytest.approx(1)  # the effect is an affine map of Q
        assert found.shown is not None
        assert sorted(set(found.shown.step.tolist())) == [2, 5]
        assert found.pairs[:, 1] == pytest.approx(1e-3 * found.pairs[:, 0], abs=1e-9)

    def test_works_without_effect_windows_or_candidates(self, tmp_path):
        bare = write_run(tmp_path / "bare", windows_mb=0)
        for part in (bare / "candidates").iterdir():
            part.unlink()
        for folder in (write_run(tmp_path / "kept"), write_run(tmp_path / "none", windows_mb=0), bare):
            run = load_run_log(folder, "run", Detail())
            assert np.isnan(run.selection.per_step.get("rank/effect", np.array([np.nan]))).all()
            build([folder]).page()


class TestReport:
    def test_answers_in_the_order_of_the_questions(self, tmp_path):
        write_run(tmp_path, shift=20, effect=True, tasks=True, steps=60)
        report = build([tmp_path])
        ((_, sections),) = report.runs
        assert [s.id for s in (*report.overview, *sections)] == [
            "did-it-help",
            "learned",
            "policy",
            "why",
            "ran",
        ]
        learned, policy = sections[0], sections[1]
        assert "changed at step" in learned.answer
        assert "prose" in learned.answer
        (mark,) = next(b for b in learned.blocks if isinstance(b, Chart) and b.id == "preference").marks
        assert abs(mark[0]["step"] - 20) <= 1
        assert "correlate by +1.00" in policy.answer
        drawn = {chart.id for section in (*report.overview, *sections) for chart in section.charts()}
        assert {"validation", "task-hellaswag-acc_norm", "topics", "calibration", "q", "clipped"} <= drawn

    def test_a_stationary_run_has_one_stage(self, tmp_path):
        report = build([write_run(tmp_path, steps=80)])
        learned = report.runs[0][1][0]
        assert "one stage" in learned.answer
        assert not any(chart.marks for chart in learned.charts())

    def test_chance_is_drawn(self, tmp_path):
        report = build([write_run(tmp_path, tasks=True)])
        (task,) = [chart for chart in report.overview[0].charts() if chart.id.startswith("task-")]
        assert task.levels == [(0.25, "chance level")]
        assert task.series[0].high[0] - task.series[0].y[0] == pytest.approx(1.96 * 0.02)

    def test_evaluated_checkpoints_are_listed(self, tmp_path):
        write_run(tmp_path)
        score = {
            "task": "mmlu",
            "measure": "acc",
            "value": 0.26,
            "stderr": 0.01,
            "chance_level": 0.25,
            "examples": 9,
        }
        sources = {"epoch": 0.0, "losses": {"prose": {"windows": 12, "loss": 1.0}}}
        (tmp_path / "eval").mkdir()
        content = json.dumps({"tasks": [score | {"stderr": None}], "sources": sources})
        (tmp_path / "eval" / "step-00000040.json").write_text(content)
        tasks, by_source = build([tmp_path]).overview[0].blocks[-2:]
        assert tasks.rows == [[tmp_path.name, "step-00000040", "mmlu", "acc", "0.2600", "–", "0.2500"]]
        assert by_source.rows == [[tmp_path.name, "step-00000040", "prose", "1.0000", "2.72", "12"]]

    def test_topics_by_an_encoder(self, tmp_path, capsys):
        assert main(["report", str(write_run(tmp_path)), "--no-figures", "--encoder", "hashing"]) == 0
        assert "Preference for each topic" in (tmp_path / "report.html").read_text()

    def test_figures_hold_the_same_charts(self, tmp_path):
        report = build([write_run(tmp_path, tasks=True, effect=True)])
        wanted = {"validation", "task-hellaswag-acc_norm", "weight-share", "calibration"}
        sections = [*report.overview, *report.runs[0][1]]
        few = [replace(s, blocks=[c for c in s.charts() if c.id in wanted]) for s in sections]
        written = save_figures(few, tmp_path / "figures", "tokens")
        assert {path.stem for path in written} == wanted
        svg = (tmp_path / "figures" / "task-hellaswag-acc_norm.svg").read_text()
        assert "chance" in svg
        assert "tokens" in svg

    def test_figures_of_runs_with_like_names_are_not_written_over(self, tmp_path):
        names = ("lr.1", "lr-1", "lr_1")
        report = build([write_run(tmp_path / name) for name in names])
        few = [
            (label, [replace(s, blocks=s.charts()[:1]) for s in sections]) for label, sections in report.runs
        ]
        written = replace(report, overview=[], runs=few).figures(tmp_path / "figures", "step")
        assert len(written) > 3
        assert len(set(written)) == len(written)

    def test_numbers_are_short_and_gaps_are_null(self):
        assert numbers(np.array([1 / 3, np.nan, 2.0, 1e-9 / 3])) == [0.33333, None, 2, 3.3333e-10]
        x = {"step": np.arange(3.0)}
        chart = Chart(
            id="a", title="", y="", series=[Series(label=str(i), x=x, y=np.ones(3)) for i in range(4)]
        )
        assert len(block_json(chart)["axes"]) == 1

    def test_the_table_of_charts_names_metrics_of_the_log_once(self):
        sections = tomllib.loads(asset("charts.toml")).values()
        named = [
            name for charts in sections for chart in charts.values() for name in chart.get("metrics", ())
        ]
        assert len(named) == len(set(named)) > 40
        assert all(schema.find(name).name == name for name in named)

    def test_a_metric_without_a_chart_is_drawn_at_the_end(self, tmp_path):
        log = write_run(tmp_path) / "metrics.jsonl"
        log.write_text("".join(line.replace('"step"', '"new/idea": 2, "step"') for line in log.open()))
        policy = build([tmp_path]).runs[0][1][1]
        assert policy.charts()[-1].id == "metric-new-idea"
        assert set(policy.charts()[-1].series[0].y) == {2}

    def test_no_torch(self, tmp_path):
        write_run(tmp_path, effect=True)
        code = (
            "import sys\nfrom curriq.cli import main\n"
            f"assert main(['report', {str(tmp_path)!r}, '--no-figures']) == 0\n"
            "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "report.html").exists()
        assert "MB" in done.stdout

    def test_what_is_no_run_is_refused(self, tmp_path, capsys):
        assert main(["report", str(tmp_path)]) == 2
        assert "neither the folder of a run" in capsys.readouterr().err
        run = write_run(tmp_path / "run")
        assert main(["report", str(run), str(run)]) == 2
        assert "given twice" in capsys.readouterr().err
        for command in ("report", "watch"):
            assert main([command, str(run), "--topics", "99"]) == 2
            assert "--topics = 99" in capsys.readouterr().err


class TestRetrieval:
    QUERIES = ("rain and harvest", "import parse", "old river")

    def test_diagnostics_and_answer(self, tmp_path):
        section = retrieval_of(build([write_run(tmp_path, queries=self.QUERIES)]))
        assert "changed 75% of the query tokens" in section.answer
        assert "3.0 standard deviations above that of random strings" in section.answer
        assert "0.12 nats per token below that of random windows" in section.answer
        charts = {chart.id: chart for chart in section.charts()}
        assert [line.label for line in charts["rag-q"].series] == ["hard Q", "random Q"]
        assert charts["rag-gain"].levels == [(0.0, "no gain")]
        assert [line.label for line in charts["rag-gain"].series] == [
            *("soft Q gain", "hard Q gain", "above random")
        ]
        phases = {layer.label: layer.y[0] for layer in charts["rag-time"].series}
        assert phases == pytest.approx(
            {"ingest": 0.002, "search": 0.004, "retrieve": 0.001, "diagnostics and the rest": 0.003}
        )

    def test_phases_are_counted_once_in_the_time_of_the_step(self, tmp_path):
        policy = build([write_run(tmp_path, queries=self.QUERIES)]).runs[0][1][1]
        (chart,) = [chart for chart in policy.charts() if chart.id == "time"]
        assert sum(layer.y[0] for layer in chart.series) == pytest.approx(0.1)  # `time/step`
        assert not any("langevin" in chart.id or "buffer" in chart.id for chart in policy.charts())

    def test_queries_beside_what_became_of_their_windows(self, tmp_path):
        write_run(tmp_path, steps=9, queries=self.QUERIES, effect=True)
        content = queries_of(build([tmp_path]))
        table = read_queries(tmp_path).to_pylist()
        offered = {(row["step"], row["row"]): row for row in read_candidates(tmp_path).to_pylist()}
        assert content["queries"] == [row["text"] for row in table]
        assert content["order"] == "q"
        for i, row in enumerate(table):
            assert (content["step"][i], content["number"][i]) == (row["step"], row["query"])
            assert content["columns"]["soft_q"][i] == row["soft_q"]
            if row["row"] is None:
                assert content["window"][i] is None
                assert content["source"][i] == -1
                assert {values[i] for values in content["became"].values()} == {None}
                continue
            became = offered[row["step"], row["row"]]
            assert content["ids"][content["window"][i]] == str(became["window_id"])
            assert content["sources"][content["source"][i]] == became["source"]
            for name in ("weight", "loss", "q", "effect"):
                assert content["became"][name][i] == pytest.approx(became[name], rel=1e-4)

    def test_shortlists_name_each_window_once(self, tmp_path):
        write_run(tmp_path, steps=9, queries=self.QUERIES)
        near = queries_of(build([tmp_path]))["shortlist"]
        table = read_queries(tmp_path).to_pylist()
        named = [[near["ids"][w] for w in windows] for windows in near["windows"]]
        assert named == [[str(window) for window in row["shortlist"]] for row in table]
        assert (
            len(near["ids"]) == len(set(near["ids"])) == len({i for row in table for i in row["shortlist"]})
        )
        for scores, row in zip(near["scores"], table, strict=True):
            assert scores == pytest.approx(row["shortlist_scores"], rel=1e-4)
        assert near["temperature"] == 0.1

    def test_a_text_stands_once_in_the_page(self, tmp_path):
        """In the explorer of windows where the run kept it, otherwise as far as the queries table has it."""
        kept = queries_of(build([write_run(tmp_path / "kept", queries=self.QUERIES)]))
        assert set(kept["texts"]) == {""}
        bare = write_run(tmp_path / "bare", queries=self.QUERIES, windows_mb=0)
        known = {row["window_text"] for row in read_queries(bare).to_pylist()} - {None}
        assert set(queries_of(build([bare]))["texts"]) == known

    def test_many_queries_keep_those_whose_windows_are_shown(self, tmp_path):
        run = load_run_log(write_run(tmp_path, steps=5, n=50, queries=self.QUERIES), "run", Detail(rows=6))
        (why,) = explorer(run).blocks
        content = query_content(run, shown_texts(explorer(run)))
        assert len(content["step"]) == 5 * 6
        for step in range(5):
            rows = [i for i, s in enumerate(content["step"]) if s == step]
            drawn = {content["ids"][w] for i in rows if (w := content["window"][i]) is not None}
            assert drawn <= set(why.content["ids"])

    def test_a_run_of_another_version_lacks_columns_at_first(self, tmp_path):
        write_run(tmp_path, steps=6, queries=self.QUERIES)
        table = read_queries(tmp_path)
        (path,) = (tmp_path / "queries").iterdir()
        path.unlink()
        pq.write_table(
            table.filter(pc.field("step") < 3).drop_columns(["soft_q", "shortlist", "shortlist_scores"]), path
        )
        pq.write_table(table.filter(pc.field("step") >= 3), path.with_name("part-00000003.parquet"))
        content = queries_of(build([tmp_path]))
        soft = content["columns"]["soft_q"]
        assert soft[0] is None
        assert soft[-8] == 2
        assert content["shortlist"]["windows"][0] == []
        assert len(content["shortlist"]["windows"][-1]) == 3
        assert read_queries(tmp_path).num_rows == 6 * 8

    def test_only_where_there_is_something_to_say(self, tmp_path):
        plain = build([write_run(tmp_path / "plain")])
        assert "retrieval" not in [section.id for section in plain.runs[0][1]]
        write_run(tmp_path / "bare", queries=self.QUERIES)
        for part in (tmp_path / "bare" / "queries").iterdir():
            part.unlink()
        section = retrieval_of(build([tmp_path / "bare"]))
        assert any("no table of queries yet" in block for block in section.blocks if isinstance(block, str))
        assert not any(isinstance(block, Explorer) for block in section.blocks)

    def test_a_damaged_part_is_named(self, tmp_path, capsys):
        write_run(tmp_path, queries=self.QUERIES)
        (path,) = (tmp_path / "queries").iterdir()
        path.write_bytes(b"PAR1")
        assert main(["report", str(tmp_path)]) == 2
        assert f"{path} is damaged" in capsys.readouterr().err


class TestPage:
    def test_nothing_of_a_run_becomes_markup(self, tmp_path):
        write_run(
            tmp_path,
            sources=(HOSTILE, "{script}{data}"),
            texts=(HOSTILE * 3, "\x00\ud800".replace("\ud800", "?") * 40),
        )
        page = build([tmp_path]).page()
        blocks = re.findall(r"<script[^>]*>(.*?)</script>", page, flags=re.DOTALL)
        assert len(blocks) == 3  # the overview, the run, the program
        assert "<img" not in page
        for block in blocks[:2]:
            json.loads(block)
        assert HOSTILE in {s for b in [json.loads(blocks[1])] for s in _strings(b)}

    def test_the_policy_allows_one_script_and_no_connection(self, tmp_path):
        page = build([write_run(tmp_path)]).page()
        (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
        script = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)[-1]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy
        assert "default-src 'none'" in policy
        assert "connect-src 'none'" in policy
        assert not re.findall(r"(?:src|href)=[\"']?https?:", page)

    def test_the_title_is_escaped(self):
        page = render("<b>{css}", [], [], "")
        assert "<title>&lt;b&gt;{css}</title>" in page


@pytest.mark.slow
def test_a_long_run_and_many_runs_stay_small(tmp_path: Path):
    """100,000 rows with queries, and 50 runs: a few megabytes and well under a minute."""
    log = write_run(tmp_path / "long", steps=400, queries=TestRetrieval.QUERIES) / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    with log.open("w") as file:
        for step in range(100_000):
            file.write(json.dumps(rows[step % 400] | {"step": step, "x/windows_proposed": 8 * step}) + "\n")
    for name in ("candidates", "queries"):
        (part,) = (tmp_path / "long" / name).iterdir()
        table = pq.read_table(part)
        place = table.schema.get_field_index("step")
        for start in range(400, 100_000, 400):
            moved = table.set_column(
                place, table.field(place), pc.add(table["step"], pa.scalar(start, "int32"))
            )
            pq.write_table(moved, part.with_name(f"part-{start:08d}.parquet"))
    report = build([tmp_path / "long"])
    assert len(report.page()) < 2e6
    assert "48 of 100,000 steps" in " ".join(b for b in retrieval_of(report).blocks if isinstance(b, str))
    assert len(queries_of(report)["step"]) == 48 * 8
    folders = [write_run(tmp_path / f"run-{i}", steps=60, seed=i) for i in range(50)]
    assert len(build(folders).page()) < 6e6


def retrieval_of(report: Report) -> Section:
    (section,) = [section for section in report.runs[0][1] if section.id == "retrieval"]
    return section


def queries_of(report: Report) -> dict[str, Any]:
    """What the explorer of queries shows."""
    (block,) = [block for block in retrieval_of(report).blocks if isinstance(block, Explorer)]
    return block.content


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def test_topics_of_few_texts_where_the_sparse_solver_gives_up(monkeypatch):
    """ARPACK fails on some small matrices; a finished run must not."""
    texts = [f"{word} {word} {other}" for word in ("apple", "pear", "plum") for other in ("red", "green") * 4]
    expected = find_topics(texts, 3)

    def fails(*args: object, **settings: object) -> None:
        raise ArpackError(3)

    monkeypatch.setattr("curriq.report.topics.svds", fails)
    assert find_topics(texts, 3).of.tolist() == expected.of.tolist()
