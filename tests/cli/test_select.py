"""`curriq select` and `curriq score` as their users meet them."""

import csv
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tests.runs import tiny

import curriq
from curriq.cli import main
from curriq.curate import corpus as corpus_module
from curriq.curate import describe, scoring
from curriq.curate import inputs as inputs_module
from curriq.curate import output as output_module
from curriq.curate import rows as rows_module
from curriq.curate.build import Target, build_target, scorer_of_target
from curriq.curate.documents import Cutter
from curriq.curate.ranking import Documents, Keep, _within, choose
from curriq.data.documents import Document
from curriq.data.tokenizer import train_tokenizer
from curriq.runlog.storage import exclusive
from curriq.select.offline import _ReadingQ
from curriq.train.run import load_run, train
from curriq.types import IGNORED, Features, Windows

WANTED = tuple("the river crossed a green valley where farmers kept sheep and sold wool".split())  # noqa: SIM905
OTHER = tuple("int main void return printf static const struct typedef include define".split())  # noqa: SIM905


def texts(kind: tuple[str, ...], count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(kind, rng.integers(20, 120)).tolist()) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose rows are wanted text or program code, with columns of all kinds, and a target."""
    folder = tmp_path_factory.mktemp("corpus")
    mixed = [(text, "wanted") for text in texts(WANTED, 60, 0)] + [
        (text, "other") for text in texts(OTHER, 140, 1)
    ]
    order = np.random.default_rng(2).permutation(len(mixed)).tolist()
    with (folder / "crawl.jsonl").open("w") as file:
        for number in order:
            text, kind = mixed[number]
            # Spelled as no library would: big numbers, escapes, spaces.
            odd = '"big":12345678901234567890123,"é":"\\u00e9"'
            file.write(f'{{"text": {json.dumps(text)},  "kind":"{kind}",{odd}}}\n')
    with (folder / "news.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "date"])
        writer.writerows([text, "2020"] for text in texts(WANTED, 40, 3))
    return folder


def select(*arguments: str, capsys) -> dict[str, Any]:
    """The summary of a selection that must succeed."""
    capsys.readouterr()
    assert main(["select", *arguments, "--json", "--workers", "1"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (message,) = [line for line in err.splitlines() if line.startswith("curriq: ")]
    return message


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


class TestSelect:
    def test_keeps_what_is_like_the_target_and_every_column_as_it_was(self, data, tmp_path, capsys):
        out = tmp_path / "clean.jsonl"
        crawl, news = str(data / "crawl.jsonl"), str(data / "news.csv")
        summary = select("--target", news, crawl, "--keep", "0.3", "--out", str(out), capsys=capsys)
        lines = out.read_bytes().splitlines()
        given = {line[:-1] for line in (data / "crawl.jsonl").read_bytes().splitlines()}
        for line in lines:
            own, _, added = line.rpartition(b', "curriq_score"')
            assert own in given  # to the byte
            assert added
        rows = rows_of(out)
        assert {row["kind"] for row in rows if row["curriq_rank"] <= 50} == {"wanted"}
        assert sorted(row["curriq_rank"] for row in rows) == list(range(1, len(rows) + 1))
        assert summary["documents"] == 200
        assert summary["documents_kept"] == len(rows)
        assert summary["tokens_kept"] <= 0.3 * summary["tokens"] < summary["tokens_kept"] + 300
        assert summary["sources"][0]["weight"] == 1.0
        assert summary["words_kept"][0] in WANTED
        assert summary["words_dropped"][0] in OTHER

    def test_a_share_of_documents_a_threshold_or_no_share(self, data, tmp_path, capsys):
        base = ("--target", str(data / "news.csv"), str(data / "crawl.jsonl"))

        def kept(*how: str) -> list[dict]:
            out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
            select(*base, *how, "--out", str(out), capsys=capsys)
            return rows_of(out)

        assert len(kept("--keep", "0.1", "--keep-unit", "documents")) == 20
        assert {row["kind"] for row in kept()} == {"wanted"}  # no share was named
        assert len(kept()) == 60
        by_threshold = kept("--threshold", "0.05")
        assert min(row["curriq_score"] for row in by_threshold) >= 0.05
        assert len(kept("--keep", "1")) == 200

    def test_another_share_scores_nothing_again(self, data, tmp_path, capsys, caplog):
        base = ("--target", str(data / "news.csv"), str(data / "crawl.jsonl"))
        select(*base, "--keep", "0.5", "--out", str(tmp_path / "a.jsonl"), capsys=capsys)
        caplog.clear()
        select(*base, "--keep", "0.2", "--out", str(tmp_path / "b.jsonl"), capsys=capsys)
        assert "nothing has to be scored again" in caplog.text
        more, fewer = rows_of(tmp_path / "a.jsonl"), rows_of(tmp_path / "b.jsonl")
        assert [row for row in more if row["curriq_rank"] <= len(fewer)] == fewer

    def test_a_changed_file_is_scored_again(self, data, tmp_path, capsys, caplog):
        crawl = tmp_path / "crawl.jsonl"
        crawl.write_bytes((data / "crawl.jsonl").read_bytes())
        base = ("--target", str(data / "news.csv"), str(crawl), "--keep", "0.5")
        select(*base, "--out", str(tmp_path / "a.jsonl"), capsys=capsys)
        with crawl.open("a") as file:
            file.write('{"text": "sheep in the valley"}\n')
        caplog.clear()
        summary = select(*base, "--out", str(tmp_path / "b.jsonl"), capsys=capsys)
        assert "nothing has to be scored again" not in caplog.text
        assert summary["documents"] == 201

    def test_another_chat_template_scores_again(self, tmp_path, capsys, caplog):
        """The vocabulary is the same, and so are the tokens of a target without conversations."""
        tokenizer = train_tokenizer(texts(WANTED, 20, 0), 400, 1 << 20)
        question = {"role": "user", "content": "what is in the valley?"}
        rows = [
            {"text": [question, {"role": "assistant", "content": text}]}
            for kind, seed in ((WANTED, 1), (OTHER, 2))
            for text in texts(kind, 10, seed)
        ]
        (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "t.txt").write_text("\n\n".join(texts(WANTED, 20, 3)))
        base = ("--target", str(tmp_path / "t.txt"), str(tmp_path / "chats.jsonl"), "--keep", "0.5")
        base += ("--tokenizer", str(tmp_path / "tokenizer"))
        told = []
        for number, learns in enumerate((None, None, "assistant", "user", "user")):
            if learns:
                tokenizer.chat_template = (
                    "{% for m in messages %}{% if m.role == '"
                    + learns
                    + "' %}{% generation %}{{ m.content }}"
                    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
                )
            tokenizer.save_pretrained(tmp_path / "tokenizer")
            caplog.clear()
            select(*base, "--out", str(tmp_path / f"{number}.jsonl"), capsys=capsys)
            told.append("nothing has to be scored again" in caplog.text)
        assert told == [False, True, False, False, True]

    def test_another_mask_of_the_target_scores_again(self):
        cut = Cutter(tokenizer := train_tokenizer(texts(WANTED, 20, 0), 400, 1 << 20), 32)
        _, of_text = cut([Document(text) for text in texts(WANTED, 20, 0)])
        learnt = np.arange(len(of_text.tokens)) % 2 == 0
        masked = (of_text, replace(of_text, learnt=learnt), replace(of_text, learnt=~learnt))
        keys = {scorer_of_target(Target("t", cut), tokenizer, 32).key for cut in masked}
        assert len(keys) == 3

    @pytest.mark.parametrize("form", ["csv", "json", "parquet", "arrow", "txt", "jsonl.gz"])
    def test_formats_hold_the_same_documents(self, form, data, tmp_path, capsys):
        rows = [{"text": row["text"], "kind": row["kind"]} for row in rows_of(data / "crawl.jsonl")]
        path = tmp_path / f"crawl.{form}"
        table = pa.Table.from_pylist(rows)
        if form == "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["text", "kind"])
                writer.writeheader()
                writer.writerows(rows)
        elif form == "json":
            path.write_text(json.dumps(rows))
        elif form == "parquet":
            parquet.write_table(table, path, row_group_size=64)
        elif form == "arrow":
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=50)
        elif form == "txt":
            path.write_text("\n\n".join(row["text"] for row in rows))
        else:
            path.write_bytes(gzip.compress((data / "crawl.jsonl").read_bytes()))
        out = tmp_path / ("clean.jsonl" if form in ("csv", "jsonl.gz") else "clean.parquet")
        base = ("--target", str(data / "news.csv"), str(path), "--keep", "0.25")
        select(*base, "--out", str(out), capsys=capsys)
        select(
            *("--target", str(data / "news.csv"), str(data / "crawl.jsonl"), "--keep", "0.25"),
            *("--out", str(tmp_path / "expected.jsonl")),
            capsys=capsys,
        )
        found = rows_of(out) if out.suffix == ".jsonl" else parquet.read_table(out).to_pylist()
        expected = rows_of(tmp_path / "expected.jsonl")
        assert [row["text"].strip("\n") for row in found] == [row["text"] for row in expected]
        assert [row["curriq_rank"] for row in found] == [row["curriq_rank"] for row in expected]
        assert form == "txt" or [row["kind"] for row in found] == [row["kind"] for row in expected]

    def test_a_folder_is_a_data_set(self, data, tmp_path, capsys):
        import datasets

        out = tmp_path / "clean"
        (tmp_path / "plain.jsonl").write_text(
            "".join(json.dumps({"text": row["text"]}) + "\n" for row in rows_of(data / "crawl.jsonl"))
        )
        base = ("--target", str(data / "news.csv"), str(tmp_path / "plain.jsonl"), "--keep", "0.25")
        select(*base, "--out", f"{out}/", capsys=capsys)
        select(*base, "--out", str(tmp_path / "clean.jsonl.zst"), capsys=capsys)
        data_set = datasets.load_from_disk(str(out))
        assert data_set.column_names == ["text", "curriq_score", "curriq_rank"]
        assert len(data_set) > 20
        assert [name for name in os.listdir(tmp_path) if name.startswith(".tmp")] == []

    def test_columns_that_some_rows_lack_are_null_there(self, data, tmp_path, capsys):
        path = tmp_path / "two.jsonl"
        rows = [
            {"text": text, **({"a": 1} if i % 2 else {"b": "x"})}
            for i, text in enumerate(texts(WANTED, 20, 5))
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / "two.parquet"
        select("--target", str(data / "news.csv"), str(path), "--keep", "1", "--out", str(out), capsys=capsys)
        found = [
            {k: v for k, v in row.items() if v is not None} for row in parquet.read_table(out).to_pylist()
        ]
        assert [{k: v for k, v in row.items() if not k.startswith("curriq")} for row in found] == rows

    def test_bad_rows(self, data, tmp_path, capsys):
        path = tmp_path / "bad.jsonl"
        path.write_bytes((data / "crawl.jsonl").read_bytes() + b'{"text": 3}\nnonsense\n\n')
        base = ("--target", str(data / "news.csv"), str(path), "--out", str(tmp_path / "out.jsonl"))
        message = refused(capsys, "select", *base)
        assert "line 201" in message
        assert "--on-bad-row skip" in message
        summary = select(*base, "--on-bad-row", "skip", "--keep", "0.1", capsys=capsys)
        assert (summary["rows"], summary["rows_skipped"], summary["rows_without_text"]) == (203, 2, 1)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--keep", "1.5"), "--keep = 1.5"),
            (("--keep", "some"), "must be a share such as 0.3, or auto"),
            (("--keep", "0.5", "--threshold", "1"), "give one of them"),
            (("--by", "q"), "gives the scores dsir"),
            (("--workers", "-1"), "choose from 0"),
            (("--window", "1"), "--window = 1"),
            (("--text-field", "body"), "no column 'body' for the text. Columns: text, date"),
            (("--text-field", "body", "--target-text-field", "text"), "with --text-field COLUMN"),
            (("--target-text-field", "body"), "with --target-text-field COLUMN"),
        ],
    )
    def test_settings(self, arguments, says, data, tmp_path, capsys):
        base = (
            "--target",
            str(data / "news.csv"),
            str(data / "crawl.jsonl"),
            "--out",
            str(tmp_path / "o.jsonl"),
        )
        assert says in refused(capsys, "select", *base, *arguments)

    def test_outputs(self, data, tmp_path, capsys):
        base = ("select", "--target", str(data / "news.csv"), str(data / "crawl.jsonl"))
        assert "write .jsonl" in refused(capsys, *base, "--out", str(tmp_path / "o.csv"))
        assert "leave .gz out" in refused(capsys, *base, "--out", str(tmp_path / "o.parquet.gz"))
        assert "is one of the files" in refused(
            capsys, *base, "--out", str(data / "crawl.jsonl"), "--overwrite"
        )
        (tmp_path / "o.jsonl").write_text("mine")
        assert "--overwrite" in refused(capsys, *base, "--out", str(tmp_path / "o.jsonl"))
        assert (tmp_path / "o.jsonl").read_text() == "mine"

    def test_what_is_named(self, data, tmp_path, capsys):
        out = ("--out", str(tmp_path / "o.jsonl"))
        assert "name the folder of a run" in refused(capsys, "select", *out)
        assert "is no folder of a run" in refused(capsys, "select", str(data), *out)
        assert "no FILES" in refused(capsys, "select", "--target", "x.csv", *out)
        assert "matches no file" in refused(capsys, "select", "--target", "x", str(data / "no.jsonl"), *out)
        assert "hf download" in refused(capsys, "select", "--target", "x", "hub:some/data", *out)

    def test_columns_of_these_names(self, data, tmp_path, capsys):
        path = tmp_path / "again.jsonl"
        path.write_text('{"text": "the green valley", "curriq_rank": 1}\n')
        base = ("--target", str(data / "news.csv"), str(path), "--out", str(tmp_path / "o.jsonl"))
        assert "--prefix" in refused(capsys, "select", *base)
        select(*base, "--keep", "1", "--prefix", "new_", capsys=capsys)
        assert set(rows_of(tmp_path / "o.jsonl")[0]) == {"text", "curriq_rank", "new_score", "new_rank"}


def score_tables(folder: Path) -> dict[str, list]:
    parts = sorted(folder.rglob("part-*.parquet"))
    return pa.concat_tables(
        [parquet.read_table(part).replace_schema_metadata(None) for part in parts]
    ).to_pydict()


class TestResume:
    def test_a_stopped_call_goes_on_exactly(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr(inputs_module, "CHUNK_ROWS", 16)
        monkeypatch.setattr(scoring, "PART_CHARACTERS", 9000)
        base = ("score", "--target", str(data / "news.csv"), str(data / "crawl.jsonl"), "--workers", "1")
        assert main([*base, "--out", str(tmp_path / "whole" / "s.parquet")]) == 0
        read = scoring.read_chunks

        def interrupted(*arguments, **how):
            for number, chunk in enumerate(read(*arguments, **how)):
                if number == 3 and "every" not in how:
                    os.kill(os.getpid(), signal.SIGINT)
                yield chunk

        monkeypatch.setattr(scoring, "read_chunks", interrupted)
        cut = [*base, "--out", str(tmp_path / "cut" / "s.parquet")]
        statuses = [main(cut)]
        while statuses[-1] == 130:
            statuses.append(main(cut))
        assert statuses == [130, 130, 130, 0]
        assert score_tables(tmp_path / "whole") == score_tables(tmp_path / "cut")
        ours, theirs = (parquet.read_table(tmp_path / name / "s.parquet") for name in ("whole", "cut"))
        assert ours.to_pydict() == theirs.to_pydict()

    @pytest.mark.long
    def test_ctrl_c_of_the_program(self, data, tmp_path):
        big = tmp_path / "big.jsonl"
        big.write_bytes((data / "crawl.jsonl").read_bytes() * 20)
        base = ("score", "--target", str(data / "news.csv"), str(big), "--workers", "1", "--out")
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
        command = [sys.executable, "-m", "curriq", *base, str(tmp_path / "cut" / "s.parquet")]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while not list((tmp_path / "cut").rglob("about.json")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        assert process.returncode in (0, 130), err  # 0 where it was quicker
        assert process.returncode == 0 or "the same command goes on" in err
        assert main([*base, str(tmp_path / "cut" / "s.parquet"), "--overwrite"]) == 0
        assert main([*base, str(tmp_path / "whole" / "s.parquet")]) == 0
        assert score_tables(tmp_path / "whole") == score_tables(tmp_path / "cut")

    @pytest.mark.slow
    def test_the_result_does_not_depend_on_the_number_of_processes(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr(inputs_module, "CHUNK_ROWS", 16)
        base = ("score", "--target", str(data / "news.csv"), str(data / "crawl.jsonl"))
        for workers in ("1", "3"):
            out = tmp_path / workers / "s.parquet"
            assert main([*base, "--workers", workers, "--out", str(out)]) == 0
        assert score_tables(tmp_path / "1") == score_tables(tmp_path / "3")

    def test_another_process_that_scores_is_refused(self, data, tmp_path, capsys):
        base = ("--target", str(data / "news.csv"), str(data / "crawl.jsonl"))
        select(*base, "--keep", "0.5", "--out", str(tmp_path / "a.jsonl"), capsys=capsys)
        (folder,) = (tmp_path / ".curriq-scores").iterdir()
        with exclusive(folder, "held"):
            message = refused(
                capsys, "select", *base, "--tokenizer", "train", "--out", str(tmp_path / "b.jsonl")
            )
        assert "another process" in message


class TestScore:
    def test_windows_and_documents(self, data, tmp_path, capsys):
        out = tmp_path / "scores.parquet"
        base = ("score", "--target", str(data / "news.csv"), str(data / "crawl.jsonl"), "--window", "32")
        assert main([*base, "--out", str(out)]) == 0
        table = parquet.read_table(out)
        assert table.column_names == ["file", "row", "window", "tokens", "learnt", "dsir", "document_dsir"]
        columns = {name: np.array(values) for name, values in table.to_pydict().items()}
        assert set(columns["file"]) == {str(data / "crawl.jsonl")}
        for row in (0, 7, 199):
            at = columns["row"] == row
            assert columns["window"][at].tolist() == list(range(at.sum()))
            assert (columns["tokens"][at][:-1] == 32).all()
            mean = np.average(columns["dsir"][at].astype(float), weights=columns["tokens"][at])
            np.testing.assert_allclose(columns["document_dsir"][at], mean, rtol=1e-5)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs on the corpus: one whose Q needs no forward pass, one whose Q reads hidden states."""
    folder = tmp_path_factory.mktemp("runs")
    sources = (
        {"name": "crawl", "path": str(data / "crawl.jsonl")},
        {"name": "news", "path": str(data / "news.csv"), "weight": 0.0},
    )
    shared = {"sources": sources, "target": "news", "held_out_share": 0.9, "steps": 4}
    shared |= {"reward_set_size": 12, "validation_set_size": 6, "test_set_size": 6}
    filtered = {"prior": True, "max_read_ratio": 4, "q_features": ("static_score",), "reward_every": 2}
    filtered |= {"credit": "counterfactual", "probe_windows": 4, "reward": "paired", "temperature": "gated"}
    train(tiny(**shared, **filtered, q_standardise=True, run_dir=str(folder / "filter")))
    train(tiny(**shared, run_dir=str(folder / "hidden")))
    train(tiny(**shared, selector="uniform", run_dir=str(folder / "uniform")))
    return folder


class TestRuns:
    def test_options_that_would_do_nothing_are_refused(self, runs: Path, data: Path, capsys):
        run, target, corpus = str(runs / "filter"), str(data / "news.csv"), str(data / "crawl.jsonl")
        for words, message in (
            ([run, "--source", "crawl"], "--source crawl without FILES"),
            ([run, corpus, "--target-text-field", "text"], "--target-text-field: the run"),
            (["--target", target, corpus, "--source", "crawl"], "--source crawl with --target"),
        ):
            assert message in refused(capsys, "score", *words, "--out", "never.parquet")

    def test_scores_of_a_filter_are_those_that_it_would_act_on(self, runs, tmp_path):
        """Against the parts of the run itself, asked one document at a time."""
        out = tmp_path / "s.parquet"
        assert main(["score", str(runs / "filter"), "--out", str(out), "--workers", "1"]) == 0
        table = parquet.read_table(out).to_pydict()
        run = load_run(runs / "filter")
        scored = run.session.components.proposer.stream.inner
        recent = scored._recent.values
        dsir = torch.tensor(table["dsir"], dtype=torch.float64)
        of_document = torch.tensor(table["document_dsir"], dtype=torch.float64)
        pooled = (dsir + of_document) / 2
        static = ((pooled - recent.mean()) / recent.std(correction=0)).clamp(-3, 3).float()
        critic = run.session.components.critic
        source = torch.zeros(len(static), dtype=torch.int64)
        features = Features.not_forwarded(len(static), source, {"static_score": static})
        np.testing.assert_allclose(table["q"], critic.values(features).double(), rtol=1e-4, atol=1e-6)
        prior = np.exp(np.interp(pooled, *scored._curve[:2].numpy()))
        policy = np.array(table["policy"])
        assert (policy <= prior + 1e-3).all()
        assert ((policy >= 0) & (policy <= 1)).all()

    def test_a_run_selects_from_its_own_sources(self, runs, tmp_path, capsys):
        out = tmp_path / "clean.jsonl"
        assert main(["select", str(runs / "filter"), "--keep", "0.25", "--out", str(out), "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert [source["name"] for source in summary["sources"]] == [
            "crawl"
        ]  # the target is no part of the stream
        assert set(summary["agreement"]) == {"dsir and policy", "dsir and q", "policy and q"}
        kinds = [row["kind"] for row in rows_of(out)]
        assert kinds.count("wanted") > 0.9 * len(kinds)

    def test_a_q_that_reads_hidden_states_takes_forward_passes(self, runs, data, tmp_path):
        """Against the critic, asked one window at a time."""
        out, few = tmp_path / "s.parquet", tmp_path / "few.jsonl"
        few.write_text("".join((data / "crawl.jsonl").read_text().splitlines(keepends=True)[:5]))
        assert main(["score", str(runs / "hidden"), str(few), "--out", str(out)]) == 0
        table = parquet.read_table(out).to_pydict()
        run = load_run(runs / "hidden")
        found = []
        for line in few.read_text().splitlines():
            ids = run.corpus.tokenizer(json.loads(line)["text"])["input_ids"]
            for start in range(0, len(ids), 32):
                with run.lm.measuring():
                    hidden = run.lm.trunk(torch.tensor([ids[start : start + 32]]))[:, -1]
                features = Features(hidden=hidden, loss=torch.zeros(1))
                found.append(run.session.components.critic.values(features).item())
        np.testing.assert_allclose(table["q"], found, rtol=1e-3, atol=1e-5)

    def test_the_loss_that_q_reads_is_over_what_is_learnt(self, runs, monkeypatch):
        """Against the model's own loss of windows with labels, as in training."""
        run = load_run(runs / "hidden")
        critic = run.session.components.critic
        monkeypatch.setattr(critic, "values", lambda features: features.loss)
        _, cut = Cutter(run.corpus.tokenizer, 32)([Document(text) for text in texts(WANTED, 8, 5)])
        learnt = np.random.default_rng(0).random(len(cut.tokens)) < 0.4
        whole = np.flatnonzero(cut.windows == 32)
        at = (cut.windows.cumsum() - cut.windows)[whole][:, None] + np.arange(32)
        tokens = torch.from_numpy(cut.tokens[at].astype(np.int64))
        ids = torch.arange(len(whole))
        reading = _ReadingQ(critic, run.lm, None)
        for mask in (None, learnt):
            labels = None if mask is None else tokens.where(torch.from_numpy(mask[at]), IGNORED)
            expected = run.lm.window_losses(Windows(tokens=tokens, ids=ids, source=ids * 0, labels=labels))
            found = reading(replace(cut, learnt=mask), {}, torch.zeros(len(cut.windows), dtype=torch.int64))
            np.testing.assert_allclose(found["q"][whole], expected, rtol=1e-4)

    def test_a_run_without_a_score_is_refused(self, runs, tmp_path, capsys):
        message = refused(capsys, "select", str(runs / "uniform"), "--out", str(tmp_path / "o.jsonl"))
        assert "--target" in message
        message = refused(
            capsys, "select", str(runs / "hidden"), "--by", "dsir", "--out", str(tmp_path / "o.jsonl")
        )
        assert "gives the scores q" in message
        message = refused(
            capsys, "select", str(runs / "filter"), "--source", "web", "--out", str(tmp_path / "o.jsonl")
        )
        assert "crawl" in message


class TestHowFilesOfARunAreRead:
    """The run itself is stood in for: what matters are its sources."""

    @pytest.fixture
    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.chdir(tmp_path)
        Path("run").mkdir()
        Path("run/config.toml").touch()
        for name in ("lines.txt", "more.txt"):
            Path(name).write_text("\n".join(texts(WANTED, 6, 1)) + "\n\n" + "\n".join(texts(OTHER, 6, 2)))
        rows = [{"content": text} for text in texts(WANTED, 5, 1)]
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"content": 7}])))
        for split in ("train", "test"):
            Path("splits").mkdir(exist_ok=True)
            Path(f"splits/{split}.jsonl").write_text(
                json.dumps({"text": f"{split} " + texts(WANTED, 1, 1)[0]})
            )
        tokenizer = train_tokenizer(texts(WANTED, 20, 0), 400, 1 << 20)
        target = build_target("t", [Document(text) for text in texts(WANTED, 20, 3)], tokenizer, 32)
        self.scorer = scorer_of_target(target, tokenizer, 32)
        monkeypatch.setattr(corpus_module, "scorer_of_run", lambda run: (self.scorer, self.config))
        return "run"

    def sources(self, *sources: dict[str, Any]) -> None:
        self.config = curriq.RunConfig().override(sources=sources, target=sources[0]["name"])

    def count(self, *call: str, capsys) -> int:
        how = ("--keep", "1", "--out", "o.jsonl", "--overwrite")
        return select(*call, *how, capsys=capsys)["documents"]

    def test_documents(self, run: str, capsys):
        self.sources({"name": "lines", "path": "lines.txt", "documents": "line"})
        assert self.count(run, capsys=capsys) == 12
        assert self.count(run, "--documents", "paragraph", capsys=capsys) == 2
        assert self.count(run, "--documents", "file", capsys=capsys) == 1
        for name in ("lines.txt", "more.txt"):
            assert self.count(run, name, capsys=capsys) == 12
            assert self.count(run, name, "--documents", "paragraph", capsys=capsys) == 2

    def test_bad_rows_and_columns(self, run: str, capsys):
        own = {"name": "rows", "path": "rows.jsonl", "text_field": "content"}
        self.sources(own)
        call = ["select", run, "--keep", "1", "--out", "o.jsonl"]
        assert "add --on-bad-row skip" in refused(capsys, *call)
        assert self.count(run, "--on-bad-row", "skip", capsys=capsys) == 5
        self.sources(own | {"on_bad_row": "skip"})
        assert self.count(run, capsys=capsys) == 5
        assert self.count(run, "rows.jsonl", capsys=capsys) == 5
        assert "line 6 of rows.jsonl" in refused(capsys, *call, "--overwrite", "--on-bad-row", "error")
        assert "no row holds a text" in refused(capsys, *call, "--overwrite", "--text-field", "other")

    def test_splits(self, run: str, capsys):
        self.sources({"name": "test", "path": "splits", "hub_split": "test"})
        for files in ([], ["splits"]):
            assert self.count(run, *files, capsys=capsys) == 1
            assert [row["text"].split()[0] for row in rows_of(Path("o.jsonl"))] == ["test"]
        assert main(["select", run, "--keep", "1", "--out", "other.jsonl"]) == 0
        printed = capsys.readouterr().out
        (source,) = tomllib.loads(printed[printed.index("[[data.sources]]") :])["data"]["sources"]
        assert source["hub_split"] == "test"
        Path("splits/train.jsonl").rename("splits/validation.jsonl")
        message = refused(capsys, "select", run, "./splits", "--out", "third.jsonl")
        assert "splits test, validation, but no file of 'train': name the files of one." in message


class TestPython:
    def test_rows_of_a_data_set(self, data):
        import datasets

        rows = [{"text": row["text"], "kind": row["kind"]} for row in rows_of(data / "crawl.jsonl")]
        data_set = datasets.Dataset.from_list([*rows, {"text": " ", "kind": "empty"}])
        target = texts(WANTED, 40, 3)
        selection = curriq.select_documents(data_set, target=target, keep=0.25)
        kept = data_set.select(selection.indices)
        assert set(kept["kind"]) == {"wanted"}
        assert sorted(selection.ranks.tolist()) == list(range(1, len(selection) + 1))
        scores = curriq.score_documents(data_set, target=target)
        assert len(scores) == 200
        assert set(scores.scores) == {"dsir"}
        assert list(curriq.select_documents([row["text"] for row in rows], target=target, keep=0.25)) == list(
            selection
        )

    def test_no_share_and_a_run(self, data, runs):
        rows = rows_of(data / "crawl.jsonl")
        selection = curriq.select_documents(rows, target=texts(WANTED, 40, 3))
        assert {rows[i]["kind"] for i in selection} == {"wanted"}
        scores = curriq.score_documents(rows, run=runs / "filter")
        assert set(scores.scores) == {"dsir", "q", "policy"}

    def test_what_is_no_list_of_documents(self):
        """Python goes through columns, splits or letters, each of which looks like a document. Without the
        tests' own checks of types, in a process of its own."""
        code = """
import datasets, numpy, pandas, pyarrow
import curriq
columns = {"text": ["one text", "another"]}
tables = (
    pandas.DataFrame(columns), columns, pyarrow.table(columns), "a text", b"a text",
    datasets.DatasetDict(train=datasets.Dataset.from_dict(columns)),
)
both = ("documents", "target")
cases = [(name, table, f"{name}: ", "no list of documents") for table in tables for name in both]
for bad in (None, 3, b"bytes", float("nan")):
    cases.append(("documents", ["one text", bad], "document 1: ", "neither a text nor a row"))
cases.append(("keep", None, "--keep None", "share such as 0.3"))
for name, value, *says in cases:
    given = {"documents": ["one text"], "target": ["another"], name: value}
    documents = given.pop("documents")
    for function in (curriq.select_documents, curriq.score_documents)[: 2 - (name == "keep")]:
        try:
            function(documents, **given)
        except curriq.CurriqError as error:
            assert str(error).startswith(says[0]) and says[1] in str(error), error
        else:
            raise AssertionError((name, value))
print(len(cases), "refused")
"""
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout == "17 refused\n", done.stderr

    @pytest.mark.parametrize("form", ["Series", "Dataset", "array", "tuple"])
    def test_what_is_one(self, form: str):
        import pandas

        words = [" ".join(WANTED), " ".join(OTHER)] * 8
        forms = {
            "Series": pandas.Series(words), "Dataset": datasets.Dataset.from_dict({"text": words}),
            "array": np.array(words), "tuple": tuple(words),
        }  # fmt: skip
        for function in (curriq.select_documents, curriq.score_documents):
            found = function(forms[form], target=forms[form])
            assert found.indices.tolist() == function(words, target=words).indices.tolist()

    @pytest.mark.parametrize(
        ("how", "says"),
        [
            ({}, "either a target or a run"),
            ({"target": ["a"], "text_field": "body"}, "no text in text_field='body'; columns: text"),
            ({"target": ["a"], "keep": 0}, "--keep = 0"),
            ({"target": [" "]}, "holds no text"),
            ({"target": []}, "target: it holds no text"),
            ({"target": ["a"], "documents": ["", " "]}, "none of them holds a text"),
            ({"target": ["a"], "documents": iter(["one"])}, "documents: they are read twice"),
        ],
    )
    def test_refusals(self, how, says):
        with pytest.raises(curriq.CurriqError, match=says):
            curriq.select_documents(how.pop("documents", [{"text": "one"}]), **how)


class TestWhatIsReadStays:
    """`--overwrite` replaces an output, and nothing else."""

    @pytest.fixture
    def corpus(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "w"
        folder.mkdir()
        for name in ("a.jsonl", "other.jsonl"):
            rows = (json.dumps({"text": f"document {i} of some words {i * i} " * 8}) for i in range(40))
            (folder / name).write_text("\n".join(rows))
        (tmp_path / "t.txt").write_text("\n\n".join(f"a paragraph {i} of some words " * 8 for i in range(20)))
        monkeypatch.chdir(tmp_path)
        return folder

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["select", "w/a.jsonl", "--out", "w"], "--out w holds w/a.jsonl, which is read"),
            (["select", "w/a.jsonl", "--out", "."], "which is read"),
            (["select", "w/a.jsonl", "--out", "t.txt/"], "is one of the files that are read"),
            (["select", "w/a.jsonl", "--out", "w/a.jsonl"], "is one of the files that are read"),
            (["select", "w/*.jsonl", "--out", "w/other.jsonl"], "is one of the files that are read"),
            (["score", "w", "--out", "s.parquet"], ""),
            (["score", "s.parquet", "--out", "s.parquet"], "is one of the files that are read"),
        ],
    )
    def test_outputs_that_are_read(self, corpus: Path, capsys, words: list[str], message: str):
        parquet.write_table(pa.table({"text": [f"some words {i} " * 9 for i in range(40)]}), "s.parquet")
        before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
        call = [words[0], "--target", "t.txt", *words[1:], "--overwrite", "--workers", "1", "--window", "16"]
        if not message:
            assert main(call) == 0
            return
        assert message in refused(capsys, *call)
        assert all(path.read_bytes() == content for path, content in before.items())

    def test_the_target(self, corpus: Path, capsys):
        before = (corpus / "other.jsonl").read_bytes()
        for command in ("select", "score"):
            name = "w/other.jsonl" if command == "select" else "target.parquet"
            if command == "score":
                parquet.write_table(pa.table({"text": [f"some words {i} " * 9 for i in range(40)]}), name)
            call = [command, "--target", name, "w/a.jsonl", "--out", name, "--overwrite"]
            assert "is one of the files that are read" in refused(capsys, *call)
        assert (corpus / "other.jsonl").read_bytes() == before

    def test_a_folder_with_anything_but_a_data_set(self, corpus: Path, capsys):
        call = ["select", "--target", "t.txt", "w/a.jsonl", "--overwrite", "--workers", "1", "--window", "16"]
        (Path("mine") / "deep").mkdir(parents=True)
        (Path("mine") / "deep" / "notes.txt").write_text("kept")
        assert "mine is a folder with other files in it (deep)" in refused(capsys, *call, "--out", "mine")
        assert (Path("mine") / "deep" / "notes.txt").read_text() == "kept"
        assert main([*call, "--out", "clean", "--keep", "0.5"]) == 0
        first = sorted(path.name for path in Path("clean").iterdir())
        assert main([*call, "--out", "clean", "--keep", "0.2"]) == 0  # a data set is replaced
        assert sorted(path.name for path in Path("clean").iterdir()) == first
        assert len(datasets.load_from_disk("clean")) == 8
        assert not [path for path in Path().iterdir() if path.name.startswith(".tmp")]

    def test_a_threshold_that_is_no_number(self, corpus: Path, capsys):
        call = ["select", "--target", "t.txt", "w/a.jsonl", "--out", "o.jsonl", "--threshold", "nan"]
        assert "--threshold nan: it must be a score" in refused(capsys, *call)
        assert not Path(".curriq-scores").exists()

    def test_the_printed_sources_read_the_columns_that_were_named(self, corpus: Path, capsys):
        lines = (corpus / "a.jsonl").read_text().replace('"text"', '"content"')
        Path("b.jsonl").write_text(lines)
        call = ["select", "--target", "t.txt", "--target-text-field", "text", "b.jsonl", "--workers", "1"]
        call += ["--window", "16", "--keep", "0.5", "--text-field", "content", "--on-bad-row", "skip"]
        assert main([*call, "--out", "clean.jsonl"]) == 0
        printed = capsys.readouterr().out
        table = tomllib.loads(printed[printed.index("[[data.sources]]") :])
        (source,) = table["data"]["sources"]
        assert (source["text_field"], source["on_bad_row"]) == ("content", "skip")


class TestWhatAFormatCannotHold:
    """An error that names the column and the way out, or the exact value; no exit status 70."""

    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        paragraphs = (f"a paragraph {i} of some words " * 8 for i in range(20))
        (tmp_path / "t.txt").write_text("\n\n".join(paragraphs))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def call(self, corpus: str, out: str) -> list[str]:
        base = ["select", "--target", "t.txt", corpus, "--keep", "1", "--window", "16", "--workers", "1"]
        return [*base, "--out", out]

    def json_lines(self, **columns: Any) -> str:
        rows = ({"text": f"some words {i} " * 9, **columns} for i in range(8))
        Path("c.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return "c.jsonl"

    def table(self, values: list[Any], kind: pa.DataType) -> str:
        text = [f"some words {i} " * 9 for i in range(len(values))]
        parquet.write_table(pa.table({"text": text, "extra": pa.array(values, kind)}), "c.parquet")
        return "c.parquet"

    @pytest.mark.parametrize("out", ["o.parquet", "o"])
    @pytest.mark.parametrize("extra", [{}, "\ud800", 1 << 70])
    def test_rows_of_json_that_no_table_holds(self, extra: Any, out: str, here: Path, capsys):
        message = refused(capsys, *self.call(self.json_lines(extra=extra), out))
        assert "do not fit into one table" in message
        assert "--out NAME.jsonl" in message
        assert not [path.name for path in here.iterdir() if path.name.startswith((out, ".tmp"))]
        assert main(self.call("c.jsonl", "o.jsonl")) == 0
        assert [row["extra"] for row in rows_of(here / "o.jsonl")] == [extra] * 8

    @pytest.mark.parametrize("form", [".csv", ".parquet", ".arrow"])
    def test_columns_of_one_name_are_told_apart(
        self, form: str, here: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
    ):
        """No column is lost in JSON, whose rows have one value for each name, nor in a table."""
        names = ["text", "a", "a", "a.1", "a"]
        values = [[f"some words {i} " * 9, f"{i}", f"{i}0", f"{i}00", f"{i}000"] for i in range(8)]
        if form == ".csv":
            lines = [names, *values]
            Path("c.csv").write_text("\n".join(",".join(line) for line in lines))
        else:
            table = pa.Table.from_arrays([pa.array(column) for column in zip(*values, strict=True)], names)
            if form == ".parquet":
                parquet.write_table(table, "c.parquet")
            else:
                with pa.ipc.new_file("c.arrow", table.schema) as writer:
                    writer.write_table(table)
        told = ["text", "a", "a.1", "a.1.1", "a.2"]
        for out in ("o.jsonl", "o.parquet"):
            assert main(self.call(f"c{form}", out)) == 0
            rows = rows_of(here / out) if out == "o.jsonl" else parquet.read_table(out).to_pylist()
            assert [list(row)[:5] for row in rows] == [told] * 8
            assert sorted(list(row.values())[:5] for row in rows) == sorted(values)
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert (
            warned
            == [f"c{form}: columns have the same name; the later ones are 'a.1', 'a.1.1', 'a.2' now."] * 2
        )

    def test_maps_and_a_data_set(self, here: Path, capsys):
        corpus = self.table([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
        message = refused(capsys, *self.call(corpus, "o"))
        assert "do not fit into a data set" in message
        assert "--out o.parquet" in message
        assert main(self.call(corpus, "o.parquet")) == 0
        assert parquet.read_table("o.parquet").column("extra").to_pylist() == [[("a", 1)]]

    @pytest.mark.parametrize(
        ("value", "kind", "what"),
        [
            (10**18, pa.timestamp("us"), r"timestamp\[us\]"),
            (-(10**18), pa.timestamp("us", "Europe/Berlin"), r"timestamp\[us"),
            (2**60, pa.timestamp("ms"), r"timestamp\[ms\]"),
            (10**7, pa.date32(), "date32"),
            (2**62, pa.duration("s"), "duration"),
            (b"\x00\xff", pa.binary(), "bytes"),
            (float("-inf"), pa.float64(), "-inf"),
            ([float("inf")], pa.list_(pa.float64()), "inf"),
        ],
    )
    def test_values_that_json_cannot_spell(
        self, value: Any, kind: pa.DataType, what: str, here: Path, capsys
    ):
        number = pa.int32() if kind == pa.date32() else pa.int64()
        raw = pa.array([value], number).cast(kind) if isinstance(value, int) else pa.array([value], kind)
        text = pa.array(["some words and more " * 9])
        parquet.write_table(pa.table({"text": text, "extra": raw}), "c.parquet")
        message = refused(capsys, *self.call("c.parquet", "o.jsonl"))
        assert re.search(
            f"column 'extra' holds {what}.*which JSON cannot spell: write --out NAME.parquet", message
        )
        assert main(self.call("c.parquet", "o.parquet")) == 0  # and the summary's samples read the text alone
        assert parquet.read_table("o.parquet").column("extra").combine_chunks().equals(raw)

    @pytest.mark.parametrize(
        ("value", "kind", "spelled"),
        [
            (1_000_000_001, pa.time64("ns"), "00:00:01.000000001"),
            ([{"t": 1}], pa.list_(pa.struct({"t": pa.time64("ns")})), [{"t": "00:00:00.000000001"}]),
            ([2], pa.list_(pa.time64("ns"), 1), ["00:00:00.000000002"]),
            ([3], pa.large_list(pa.time64("ns")), ["00:00:00.000000003"]),
            ([1_001], pa.list_(pa.timestamp("ns")), ["1970-01-01T00:00:00.000001001"]),
            ([4], pa.list_view(pa.time64("ns")), ["00:00:00.000000004"]),
            ([5], pa.large_list_view(pa.time64("ns")), ["00:00:00.000000005"]),
            (1_001, pa.timestamp("ns"), "1970-01-01T00:00:00.000001001"),
            (float("nan"), pa.float64(), None),
            ({"a": [1.0, float("nan")]}, pa.struct({"a": pa.list_(pa.float64())}), {"a": [1.0, None]}),
        ],
    )
    def test_values_that_json_spells_exactly(self, value: Any, kind: pa.DataType, spelled: Any, here: Path):
        assert main(self.call(self.table([value], kind), "o.jsonl")) == 0
        (row,) = rows_of(here / "o.jsonl")
        assert row["extra"] == spelled
        assert "NaN" not in (here / "o.jsonl").read_text()

    @pytest.mark.parametrize("form", ["parquet", "arrow"])
    def test_a_column_of_the_new_names(self, form: str, here: Path, capsys):
        table = pa.table({"text": ["some words and more " * 9], "curriq_score": [7.0]})
        parquet.write_table(table, "c.parquet")
        with pa.OSFile("c.arrow", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        for out in ("o.jsonl", "o.parquet"):
            message = refused(capsys, *self.call(f"c.{form}", out))
            assert "column 'curriq_score' already: name the new ones otherwise with --prefix" in message

    @pytest.mark.parametrize(
        "column",
        [
            pa.array(["a", None, "c", "d" * 40], pa.string_view()),
            pa.array([b"a", None, b"c", b"d" * 40], pa.binary_view()),
            pa.RunEndEncodedArray.from_arrays([1, 4], pa.array(["a", "b"], pa.string_view())),
            pa.array([["a"], None, [], ["b", None]], pa.list_view(pa.string_view())),
            pa.array([{"a": "x"}, None, {"a": None}, {"a": "y"}], pa.struct({"a": pa.string_view()})),
            pa.array([[("a", "x")], None, [], [("b", None)]], pa.map_(pa.string_view(), pa.string_view())),
            pa.array([["a"], None, [None], ["b"]], pa.list_(pa.string_view(), 1)),
            pa.DictionaryArray.from_arrays([0, 1, None, 0], pa.array(["a", "b"], pa.string_view())),
            pa.ListArray.from_arrays([0, 1, 1, 2, 3], pa.RunEndEncodedArray.from_arrays([1, 3], ["a", "b"])),
        ],
        ids=lambda column: str(column.type),
    )
    def test_views_and_runs_of_arrow(self, column: pa.Array, here: Path):
        text = pa.array([f"some words {i} " * 9 for i in range(4)], pa.string_view())
        table = pa.table({"text": text, "extra": column})
        with pa.ipc.new_file("c.arrow", table.schema) as writer:
            writer.write_table(table)
        assert main(self.call("c.arrow", "o.parquet")) == 0
        rows = parquet.read_table("o.parquet").to_pylist()
        assert [row["extra"] for row in sorted(rows, key=lambda row: row["text"])] == column.to_pylist()

    def arrow(self, extra: pa.Array, name: str = "c.arrow") -> str:
        table = pa.table({"text": [f"some words {i} " * 9 for i in range(len(extra))], "extra": extra})
        with pa.ipc.new_file(name, table.schema) as writer:
            writer.write_table(table)
        return name

    @pytest.mark.parametrize("out", ["o.parquet", "o"])
    def test_dictionaries_of_numbers(self, out: str, here: Path):
        assert main(self.call(self.arrow(pa.array([5, 6, None, 5]).dictionary_encode()), out)) == 0
        found = parquet.read_table(out) if out != "o" else datasets.load_from_disk(out).data
        rows = sorted(found.to_pylist(), key=lambda row: row["text"])
        assert [row["extra"] for row in rows] == [5, 6, None, 5]

    def test_tensors(self, here: Path, capsys):
        tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12.0).reshape(3, 2, 2))
        Path("c").mkdir()
        self.arrow(tensors, "c/a.arrow")
        table = pa.table({"text": ["some other words " * 9]})
        with pa.ipc.new_file("c/b.arrow", table.schema) as writer:
            writer.write_table(table)
        assert main(self.call("c", "o.parquet")) == 0
        found = parquet.read_table("o.parquet").sort_by("text").column("extra")
        assert found.type == tensors.type
        assert found.to_pylist() == [None, *tensors.to_pylist()]

    @pytest.mark.parametrize("out", ["o.parquet", "o"])
    def test_features_of_a_data_set(self, out: str, here: Path, caplog: pytest.LogCaptureFixture):
        def data_set(names: list[str]) -> datasets.Dataset:
            kinds = {"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=names)}
            columns = {"text": [f"some words {i} " * 9 for i in range(4)], "kind": [0, 1, 1, 0]}
            return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))

        Path("c").mkdir()
        data_set(["code", "prose"]).to_parquet("c/a.parquet")
        data_set(["code", "prose"]).to_parquet("c/b.parquet")
        assert main(self.call("c", out)) == 0
        if out == "o":
            features = datasets.load_from_disk(out).features
        else:
            features = datasets.Features.from_arrow_schema(parquet.read_schema(out))
        assert features == datasets.Features(
            text=datasets.Value("string"),
            kind=datasets.ClassLabel(names=["code", "prose"]),
            curriq_score=datasets.Value("float64"),
            curriq_rank=datasets.Value("int64"),
        )
        assert "names of classes" not in caplog.text
        data_set(["prose", "code"]).to_parquet("c/b.parquet")
        assert main([*self.call("c", out), "--overwrite"]) == 0
        assert caplog.text.count("names of classes, is not written") == 1
        if out != "o":
            assert b"huggingface" not in (parquet.read_schema(out).metadata or {})

    def test_row_groups(self, here: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(rows_module, "BATCH", 4)
        corpus = self.table([*range(40)], pa.int64())
        sizes = []
        for rows, size in ((10, 1 << 30), (1 << 16, 1), (1 << 16, 1 << 30)):
            monkeypatch.setattr(output_module, "ROW_GROUP", rows)
            monkeypatch.setattr(output_module, "GROUP_BYTES", size)
            assert main([*self.call(corpus, "o.parquet"), "--overwrite"]) == 0
            meta = parquet.read_metadata("o.parquet")
            sizes.append([meta.row_group(i).num_rows for i in range(meta.num_row_groups)])
            assert sorted(parquet.read_table("o.parquet").column("extra").to_pylist()) == [*range(40)]
        assert sizes == [[12, 12, 12, 4], [4] * 10, [40]]

    def test_a_share_of_what(self, here: Path, capsys):
        call = ["select", "--target", "t.txt", self.json_lines(), "--out", "o.jsonl"]
        call += ["--keep-unit", "documents"]
        for more in ([], ["--threshold", "0.1"]):
            assert "--keep-unit documents says what --keep is a share of" in refused(capsys, *call, *more)


class TestNamesOfFiles:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        Path("home").mkdir()
        Path("c").mkdir()
        for name in ("c/b.txt", "~t.txt"):
            words = (f"a paragraph {i} of {name} " * 8 for i in range(20))
            Path(name).write_text("\n\n".join(words))

    def call(self, command: str, out: str, *more: str) -> list[str]:
        how = ["--window", "16", "--workers", "1", f"--out={out}"]
        return [command, "--target", "~t.txt", "c", *how, *more]

    def test_any_bytes_and_a_tilde(self, tmp_path: Path):
        Path(os.fsdecode(b"c/\xff.txt")).write_text("\n\n".join(f"a paragraph {i} " * 8 for i in range(20)))
        for call in (
            self.call("select", "~/o.jsonl", "--keep", "1"),
            self.call("score", "~/s.parquet", "--scores=~/.kept"),
        ):  # processes of their own: pytest's workers cannot send a log with such a name
            done = subprocess.run([sys.executable, "-m", "curriq", *call], capture_output=True, check=False)
            assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert len(rows_of(tmp_path / "home" / "o.jsonl")) == 40
        files = parquet.read_table(tmp_path / "home" / "s.parquet").column("file").to_pylist()
        assert set(files) == {"c/\\xff.txt", "c/b.txt"}
        assert list((tmp_path / "home" / ".kept").iterdir())
        assert not Path("~").exists()

    def test_an_output_that_is_a_folder_is_refused_at_once(self, capsys):
        Path("d.parquet").mkdir()
        for more in ([], ["--overwrite"]):
            assert "--out d.parquet is a folder" in refused(capsys, *self.call("score", "d.parquet", *more))
        assert not Path(".curriq-scores").exists()

    def test_text_in_place_of_a_name(self, capsys):
        text = "some words " * 500
        call = ["select", "--target", text, "c", "--out", "o.jsonl"]
        assert "matches no file" in refused(capsys, *call)
        assert "is no folder of a run" in refused(capsys, "select", text, "c", "--out", "o.jsonl")


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("kept", "dropped"), [(["sheep"], ["sheep"]), ([], ["sheep wool"]), (["."], ["."])])
def test_too_few_words_to_compare(kept: list[str], dropped: list[str]):
    assert describe._typical_words(kept, dropped) == ([], [])


def test_words_do_not_come_in_the_order_of_a_set():
    """That of strings is another one in each process; of equal words the alphabet decides."""
    names = [a + b for a in "bcdfg" for b in "aeiou"]
    kept, dropped = (
        [" ".join(f"lo{name}" for name in names)] * 9,
        [" ".join(f"mi{name}" for name in names)] * 9,
    )
    ours, theirs = describe._typical_words(kept, dropped)
    assert ours == [f"lo{name}" for name in names[: describe.WORDS]]
    assert theirs == [f"mi{name}" for name in names[: -describe.WORDS - 1 : -1]]


class TestShareOfTokens:
    """The best documents first: long ones that do not fit are passed over, and the budget is not exceeded."""

    @pytest.mark.parametrize(
        ("tokens", "share", "kept"),
        [
            ([10] * 10, 0.3, [0, 1, 2]),
            ([10, 900, 10, 10, 70], 0.05, [0, 2, 3]),  # the giant is passed over
            ([900, 50, 50], 0.1, [1, 2]),
            ([900, 800, 700], 0.1, [0]),  # at least one
            ([990, 8, 2, 1, 500], 0.666, [0, 1]),  # what is no longer than usual ends it
            ([10, 900, 10, 900, 10], 0.016, [0, 2]),
            ([100] * 60 + [20] * 3, 0.11, [0, 1, 2, 3, 4, 5]),  # none from the end of the ranking
            ([10, 20, 900, 30, 900, 35], 0.05, [0, 1, 3]),
            ([5, 5], 1.0, [0, 1]),
        ],
    )
    def test_which(self, tokens, share, kept):
        found = _within(np.array(tokens), Keep(share=share))
        assert np.flatnonzero(found).tolist() == kept

    def test_what_was_passed_over_and_missed_is_said(self, caplog):
        tokens = np.array([10, 900, 20])
        documents = Documents(np.zeros(3, int), np.arange(3), tokens, {"dsir": np.array([3.0, 2.0, 1.0])})
        choice = choose(documents, "dsir", Keep(share=0.5), None)
        assert choice.kept.tolist() == [True, False, True]
        assert choice.rule == "the best 50% of the tokens by dsir, but for 1 longer than what was left"
        (said,) = caplog.messages
        assert said.startswith("--keep 0.5: what is kept holds 3.23% of the tokens")
        caplog.clear()
        choose(documents, "dsir", Keep(share=1.0), None)
        assert not caplog.messages


class TestScoresAreNoText:
    def test_of_a_folder_the_second_call_reads_the_same(self, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "w").mkdir()
        for folder in ("w", "."):
            rows = (json.dumps({"text": f"document {i} of some words {i * i} " * 8}) for i in range(40))
            (tmp_path / folder / "a.jsonl").write_text("\n".join(rows))
        (tmp_path / "t.txt").write_text("\n\n".join(f"a paragraph {i} of words " * 8 for i in range(20)))
        call = ["select", "--target", "t.txt", "w", "--window", "16", "--workers", "1", "--json"]
        for share in ("0.5", "0.25"):
            assert main([*call, "--keep", share, "--out", "w/clean.parquet", "--prefix", f"p{share}_"]) == 0
            assert json.loads(capsys.readouterr().out)["documents"] == 40
            Path("w/clean.parquet").unlink()
        inside = [*call, "--keep", "0.5", "--out", "o.jsonl", "--scores"]
        message = refused(capsys, *inside, "w/deep/scores")
        assert "--scores w/deep/scores lies in w, which is read" in message
        assert not Path("w/deep").exists()
        assert main([*inside, "w/deep/.scores"]) == 0
