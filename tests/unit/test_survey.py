"""What is said of sources before torch is loaded: every fault at once, each with a way to fix it."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from curriq.config import RunConfig
from curriq.data.survey import SAMPLE_DOCUMENTS, require_usable, survey, survey_source
from curriq.errors import CurriqError
from curriq.train.run import train

LONG = "a text of some length, as a page of a crawl has one"


def rows(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def config(*sources: dict[str, Any], **settings: Any) -> RunConfig:
    return RunConfig().override(sources=list(sources), target=sources[0]["name"], **settings)


def faults(path: str, **keys: Any) -> list[tuple[str, str]]:
    """Problem and fix of each fault of a source."""
    source = config({"name": "web", "path": path, **keys}).data.sources[0]
    return [(fault.problem, fault.fix) for fault in survey_source(source).faults]


class TestSources:
    def test_a_missing_column_is_guessed_by_the_longest_text(self, tmp_path: Path):
        row = {"url": "https://a.org/b", "title": "short", "content": LONG, "id": 7}
        ((problem, fix),) = faults(rows(tmp_path / "a.jsonl", row, row))
        assert "no column 'text'" in problem
        assert "url, title, content, id" in problem
        assert fix == "text_field=content"

    def test_conversations_are_a_text_too(self, tmp_path: Path):
        row = {"id": "of nine letters", "chat": [{"role": "user", "content": LONG}]}
        assert faults(rows(tmp_path / "a.jsonl", row))[0][1] == "text_field=chat"

    def test_numbers_are_no_text(self, tmp_path: Path):
        path = rows(tmp_path / "a.jsonl", {"text": 1, "n": 2})
        ((problem, fix),) = faults(path)
        assert "holds no text" in problem
        assert fix == ""

    def test_csv_and_parquet(self, tmp_path: Path):
        import pyarrow as pa
        from pyarrow import parquet

        (tmp_path / "a.csv").write_text(f'id,body\n1,"{LONG}"\n')
        parquet.write_table(pa.table({"body": [LONG], "id": [1]}), tmp_path / "a.parquet")
        for name in ("a.csv", "a.parquet"):
            assert faults(str(tmp_path / name))[0][1] == "text_field=body"
            assert faults(str(tmp_path / name), text_field="body") == []

    def test_another_delimiter_is_named(self, tmp_path: Path):
        (tmp_path / "a.csv").write_text(f'id;text\n1;"{LONG}"\n')
        assert "separated by ';'" in faults(str(tmp_path / "a.csv"))[0][0]

    def test_a_name_with_spaces_around_it_shows_them(self, tmp_path: Path):
        (tmp_path / "a.csv").write_text(f'id, text\n1,"{LONG}"\n')
        ((problem, fix),) = faults(str(tmp_path / "a.csv"))
        assert "Columns: id, ' text'. Take the spaces out of the name ' text' in the file." in problem
        assert not fix

    def test_what_is_wrong_beyond_the_column_shows_too(self, tmp_path: Path):
        """The rest is read with the column that is proposed."""
        path = tmp_path / "a.jsonl"
        path.write_bytes(json.dumps({"content": LONG}).encode() + b'\n{"content": "caf\xe9"}\n')
        first, second = faults(str(path), difficulty_field="level")[::2]
        assert first[1] == "text_field=content"
        assert "line 2" in second[0]
        assert "not UTF-8" in second[0]

    def test_both_columns_may_be_missing(self, tmp_path: Path):
        found = faults(rows(tmp_path / "a.jsonl", {"content": LONG, "level": 1}), difficulty_field="levle")
        assert [fix for _, fix in found] == ["text_field=content", "difficulty_field=level"]

    def test_a_fault_of_many_files_is_named_once(self, tmp_path: Path):
        for number in range(3):
            rows(tmp_path / f"{number}.jsonl", {"content": LONG})
        ((problem, _),) = faults(str(tmp_path))
        assert problem.endswith("(3 files have this.)")

    def test_files_without_a_document_beside_others_are_no_fault(self, tmp_path: Path):
        rows(tmp_path / "a.jsonl", {"text": " "})
        rows(tmp_path / "b.jsonl", {"text": LONG})
        assert faults(str(tmp_path)) == []
        ((problem, _),) = faults(str(tmp_path / "a.jsonl"))
        assert "no document with text" in problem

    @pytest.mark.parametrize(("name", "content", "words"), [
        ("a.doc", "text", "unknown format"),
        ("a.jsonl", "", "no document with text"),
        ("a.jsonl", "{no json\n", "no valid JSON"),
    ])  # fmt: skip
    def test_what_cannot_be_read(self, tmp_path: Path, name: str, content: str, words: str):
        (tmp_path / name).write_text(content)
        ((problem, _),) = faults(str(tmp_path / name))
        assert words in problem

    def test_the_nearest_name_of_a_missing_file(self, tmp_path: Path):
        path = rows(tmp_path / "news.jsonl", {"text": LONG})
        assert faults(str(tmp_path / "nws.jsonl"))[0][1] == f"path={path}"
        (tmp_path / "nws.jsonl").symlink_to("gone.jsonl")
        assert faults(str(tmp_path / "nws.jsonl"))[0][1] == f"path={path}"  # not the link itself

    def test_rows_that_are_skipped_are_counted(self, tmp_path: Path):
        path = rows(tmp_path / "a.jsonl", {"text": LONG}, {"text": 3}, {"text": LONG})
        source = config({"name": "web", "path": path, "on_bad_row": "skip"}).data.sources[0]
        found = survey_source(source)
        assert (len(found.texts), found.skipped, found.whole, found.faults) == (2, 1, True, ())

    def test_of_a_large_source_a_sample_is_read(self, tmp_path: Path):
        with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": f"{LONG} {i}"}) + "\n" for i in range(SAMPLE_DOCUMENTS * 3))
        found = survey_source(config({"name": "a", "path": str(tmp_path / "a.jsonl.gz")}).data.sources[0])
        assert SAMPLE_DOCUMENTS <= len(found.texts) <= SAMPLE_DOCUMENTS + 1
        assert not found.whole
        assert found.bytes == (tmp_path / "a.jsonl.gz").stat().st_size


class TestAllAtOnce:
    def test_of_all_sources_and_the_model(self, tmp_path: Path):
        one, two = (rows(tmp_path / f"{name}.jsonl", {"content": LONG}) for name in "ab")
        run = config({"name": "a", "path": one}, {"name": "b", "path": two}, model=str(tmp_path / "none"))
        found = survey(run).faults
        assert [fault.where for fault in found] == ["source 'a'", "source 'b'", "--model"]
        with pytest.raises(CurriqError) as caught:
            require_usable(run)
        assert len(caught.value.faults) == 3

    def test_a_run_from_python_refuses_the_same(self, tmp_path: Path):
        one, two = (rows(tmp_path / f"{name}.jsonl", {"content": LONG}) for name in "ab")
        with pytest.raises(CurriqError) as caught:
            train(config({"name": "a", "path": one}, {"name": "b", "path": two}, run_dir=str(tmp_path / "r")))
        assert len(caught.value.faults) == 2
        assert not (tmp_path / "r").exists()

    def test_nothing_heavy_is_loaded(self, tmp_path: Path):
        path = rows(tmp_path / "a.jsonl", {"content": LONG})
        code = (
            "import sys; from curriq.cli import main\n"
            f"status = main(['train', '--sources', 'name=a,path={path}', '--model', './none'])\n"
            "print(status, *({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
        )
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.stdout.split() == ["2"], done.stderr
        assert "text_field=content" in done.stderr
        assert "there is no such folder" in done.stderr

    def test_a_name_that_the_hub_may_have_passes(self):
        assert survey(RunConfig().override(model="gpt2")).faults == ()

    def test_the_default_corpus_has_no_fault(self):
        found = survey(RunConfig())
        assert found.faults == ()
        assert all(len(source.texts) == SAMPLE_DOCUMENTS for source in found.sources)


class TestSettings:
    def test_all_of_them(self):
        with pytest.raises(CurriqError) as caught:
            RunConfig().override(window=0, beta=-1, steps="many", temperature="gated")
        assert len(caught.value.faults) == 3  # pairs are looked at once each setting is legal
        assert str(caught.value).count("\n") == 2

    def test_all_pairs(self):
        with pytest.raises(CurriqError) as caught:
            RunConfig().override(temperature="gated", shuffle_effects=True, bellman=False)
        assert len(caught.value.faults) == 3

    def test_the_only_source_is_the_target(self):
        run = RunConfig().override(sources=[{"name": "mine", "path": "a.txt"}])
        assert run.data.target == "mine"

    def test_of_several_one_must_be_named(self):
        both = [{"name": name, "path": "a.txt"} for name in ("a", "b")]
        with pytest.raises(CurriqError, match=r"--target is missing: .* one of \['a', 'b'\]"):
            RunConfig().override(sources=both)
        assert RunConfig().override(sources=both, target="b").data.target == "b"

    def test_sizes_of_ones_own_are_exact(self):
        assert RunConfig().data.held_out_sizes == "fit"
        assert RunConfig().override(test_set_size=64).data.held_out_sizes == "exact"
        assert RunConfig().override(test_set_size=64, held_out_sizes="fit").data.held_out_sizes == "fit"
