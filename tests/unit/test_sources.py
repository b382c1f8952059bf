"""Sources: every format and compression, exact resume, epochs, and what users do wrong."""

import csv
import dataclasses
import gc
import gzip
import io
import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
import torch
import zstandard
from pyarrow import parquet

from curriq.config import SourceConfig
from curriq.data.documents import (
    Document,
    DocumentSource,
    MemorySource,
    read_epoch,
)
from curriq.data.sources import open_source, pin_revision
from curriq.errors import CurriqError

TEXTS = [f"document {i}: naïve 学習\nsecond line of {i}" for i in range(7)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PACK = {"": lambda content: content, ".gz": gzip.compress, ".zst": zstandard.compress}


def rows() -> list[dict[str, Any]]:
    return [{"text": text, "level": i / 2} for i, text in enumerate(TEXTS)]


def txt_bytes() -> bytes:
    return "\n\n".join(TEXTS).encode()


def jsonl_bytes() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows()).encode()


def json_bytes() -> bytes:
    return json.dumps(rows()).encode()


def csv_bytes() -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["text", "level"])
    writer.writeheader()
    writer.writerows(rows())
    return file.getvalue().encode()


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows()), file, row_group_size=2)
    return file.getvalue()


FORMATS: dict[str, Callable[[], bytes]] = {
    ".txt": txt_bytes,
    ".jsonl": jsonl_bytes,
    ".json": json_bytes,
    ".csv": csv_bytes,
    ".parquet": parquet_bytes,
}


def local(path: Path | str, **settings: Any) -> DocumentSource:
    return open_source(SourceConfig(name="mine", path=str(path), **settings), 0)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts_of(source: DocumentSource) -> list[str]:
    return [document.text for document in read_epoch(source)]


def through_disk(state: Any) -> Any:
    """The state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(params=[(e, c) for e in FORMATS for c in PACK], ids=lambda p: "".join(p))
def any_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    extension, compression = request.param
    return write(tmp_path / f"data{extension}{compression}", PACK[compression](FORMATS[extension]()))


class TestFormats:
    def test_hands_out_every_text_in_order(self, any_file: Path) -> None:
        assert texts_of(local(any_file)) == TEXTS

    def test_difficulty_column(self, any_file: Path) -> None:
        labelled = ".txt" not in any_file.name
        source = local(any_file, difficulty_field="level" if labelled else "")
        found = [document.difficulty for document in read_epoch(source)]
        assert found == [i / 2 for i in range(7)] if labelled else all(map(math.isnan, found))

    @pytest.mark.parametrize(
        ("documents", "expected"),
        [
            ("file", ["a\nb\n\n\n\nc", "d\n\n   "]),
            ("paragraph", ["a\nb", "c", "d"]),
            ("line", ["a", "b", "c", "d"]),
        ],
    )
    def test_what_a_document_of_a_text_file_is(self, tmp_path: Path, documents: Any, expected: Any) -> None:
        write(tmp_path / "1.txt", "a\nb\n\n\n\nc\n")
        write(tmp_path / "2.txt", "\r\nd\r\n\r\n   \r\n")
        assert texts_of(local(tmp_path, documents=documents)) == expected

    def test_text_of_a_table_is_never_a_number_or_a_null(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.csv", 'text,n\n007,1\nNone,\nNA,2.5\n"",3\n1e5,4\n')
        found = list(read_epoch(local(path, difficulty_field="n")))
        assert [document.text for document in found] == ["007", "None", "NA", "1e5"]
        assert [document.difficulty for document in found][::2] == [1.0, 2.5]
        assert math.isnan(found[1].difficulty)

    def test_other_columns_of_jsonl_may_change_their_type(self, tmp_path: Path) -> None:
        lines = ['{"text": "a", "meta": 1}', "", '{"meta": {"b": [1.5]}, "text": "b"}', '{"text": ""}']
        assert texts_of(local(write(tmp_path / "a.jsonl", "\n".join(lines)))) == ["a", "b"]

    def test_other_columns_of_csv_may_change_their_type(self, tmp_path: Path) -> None:
        # The reader guesses types in chunks of 10,000 rows.
        lines = [f"t{i},{i if i < 10_500 else 'x'},{i / (1 + i % 2)}" for i in range(11_000)]
        source = local(write(tmp_path / "a.csv", "text,n,f\n" + "\n".join(lines)), difficulty_field="f")
        assert texts_of(source) == [f"t{i}" for i in range(11_000)]

    def test_other_columns_of_parquet_may_differ_between_files(self, tmp_path: Path) -> None:
        for name, other in (("a", 1), ("b", "x")):
            table = pyarrow.Table.from_pylist([{"other": other, "text": name}])
            parquet.write_table(table, tmp_path / f"{name}.parquet")
        assert texts_of(local(tmp_path)) == ["a", "b"]

    def test_half_a_surrogate_pair_is_replaced(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", r'{"text": "cut \ud83d here, whole \ud83d\ude00 there"}')
        assert texts_of(local(path)) == ["cut ? here, whole 😀 there"]

    @pytest.mark.parametrize("extension", [".txt", ".jsonl", ".csv"])
    def test_byte_order_mark_is_no_text(self, tmp_path: Path, extension: str) -> None:
        path = write(tmp_path / f"a{extension}", b"\xef\xbb\xbf" + FORMATS[extension]())
        assert texts_of(local(path)) == TEXTS

    def test_no_network_is_touched(self, any_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
        assert len(texts_of(local(any_file))) == 7
        assert asked == []

    def test_nothing_is_written_but_scratch_that_goes_away(
        self, any_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path / "home", "a file, so that no folder can be made in it")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
        (tmp_path / "scratch").mkdir()
        source = local(any_file)
        assert len(texts_of(source)) == 7
        del source
        gc.collect()
        assert list((tmp_path / "scratch").iterdir()) == []

    def test_real_files(self, shared_data: Path) -> None:
        novels = texts_of(local(shared_data / "novels" / "*_18*.txt.gz", documents="file"))
        assert len(novels) >= 2
        assert min(map(len, novels)) > 100_000
        levels = local(shared_data / "onestop_english", difficulty_field="level")
        assert {document.difficulty for document in read_epoch(levels)} == {0.0, 1.0, 2.0}


class TestPaths:
    def test_file_folder_and_glob(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "data" / "b.txt", "b")
        write(tmp_path / "data" / "a.txt.gz", gzip.compress(b"a"))
        write(tmp_path / "data" / "deep" / "c.TXT", "c")
        write(tmp_path / "data" / "README.md", "not data")
        write(tmp_path / "data" / "empty.txt", "")
        write(tmp_path / "data" / ".git" / "h.txt", "hidden")
        monkeypatch.chdir(tmp_path)
        assert texts_of(local("data/b.txt")) == ["b"]
        assert texts_of(local("data")) == ["a", "b", "c"]
        assert texts_of(local("data/*.txt*")) == ["a", "b"]
        assert texts_of(local("**/*.[tT]*")) == ["a", "b", "c"]

    def test_name_with_glob_characters_is_that_file(self, tmp_path: Path) -> None:
        write(tmp_path / "a1.txt", "wrong")
        assert texts_of(local(write(tmp_path / "a[1].txt", "right"))) == ["right"]

    def test_fingerprint_follows_names_contents_and_columns(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", jsonl_bytes())
        first = local(path).fingerprint()
        assert local(tmp_path).fingerprint() == first
        assert local(path, text_field="level").fingerprint() != first
        write(path, jsonl_bytes().replace(b"document 6", b"Document 6"))
        changed = local(path).fingerprint()
        assert changed != first
        assert local(path.rename(tmp_path / "b.jsonl")).fingerprint() not in (first, changed)


class TestResume:
    @pytest.fixture(params=["embedded", "memory", *(e + c for e in FORMATS for c in PACK)])
    def reopen(self, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], DocumentSource]:
        """Opens one source of each kind again and again, at its beginning."""
        if request.param == "memory":
            return lambda: MemorySource("mine", [Document(text) for text in TEXTS], seed=3)
        if request.param == "embedded":
            return lambda: open_source(SourceConfig(name="mine", path="embedded:prose"), 3)
        extension = "." + request.param.split(".")[1]
        packed = PACK[request.param.removeprefix(extension)](FORMATS[extension]())
        write(tmp_path / f"2{request.param}", packed)
        write(tmp_path / f"1{extension}", FORMATS[extension]())
        return lambda: local(tmp_path)

    def test_continues_exactly_from_every_point(self, reopen: Callable[[], DocumentSource]) -> None:
        original = reopen()
        states, seen = [], []
        for _ in range(32):  # two epochs of the small sources and the beginning of a third
            states.append(through_disk(original.state_dict()))
            seen.append((original.next_document(), original.epoch))
        for point in (0, 1, 6, 7, 8, 13, 14, 15, 20, 31):
            resumed = reopen()
            resumed.load_state_dict(states[point])
            assert through_disk(resumed.state_dict()) == states[point]
            again = [(resumed.next_document(), resumed.epoch) for _ in range(point, 32)]
            assert [strip_nan(item) for item in again] == [strip_nan(item) for item in seen[point:]]
            assert resumed.state_dict() == original.state_dict()

    def test_used_source_can_be_taken_back(self, reopen: Callable[[], DocumentSource]) -> None:
        source = reopen()
        start = source.state_dict()
        first = [source.next_document().text for _ in range(5)]
        source.load_state_dict(start)
        assert [source.next_document().text for _ in range(5)] == first

    def test_large_file_of_many_chunks(self, tmp_path: Path) -> None:
        lines = [json.dumps({"text": f"{i} " + "x" * 2000}) for i in range(12_000)]  # 24 MB: three chunks
        path = write(tmp_path / "a.jsonl.zst", zstandard.compress("\n".join(lines).encode()))
        source = local(path)
        before = [source.next_document().text for _ in range(7_001)]
        resumed = local(path)
        resumed.load_state_dict(through_disk(source.state_dict()))
        numbers = [int(text.split()[0]) for text in before + texts_of(resumed)]
        assert numbers == list(range(12_000))


def strip_nan(item: tuple[Document | None, int]) -> tuple[str | None, int]:
    return (item[0] and item[0].text, item[1])


class TestMistakes:
    def fails(self, match: str, path: Path | str, **settings: Any) -> None:
        with pytest.raises(CurriqError, match=match):
            texts_of(local(path, **settings))

    def test_nothing_matches(self, tmp_path: Path) -> None:
        self.fails(
            r"'mine'.*nowhere/\*\.txt' matches no file.*Give a file, a folder or a glob", "nowhere/*.txt"
        )
        self.fails("matches no file", tmp_path)

    def test_unknown_extension(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsnl", jsonl_bytes())
        self.fails(r"a\.jsnl has the unknown format '\.jsnl'\. Did you mean \.jsonl\? Known: \.txt", path)
        self.fails(r"holds no file of a known format\. Known: \.txt", tmp_path)

    def test_mixed_formats(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt", "a")
        write(tmp_path / "b.jsonl", jsonl_bytes())
        self.fails(r"mixes the formats \.jsonl, \.txt \(a\.txt, b\.jsonl\)", tmp_path)

    @pytest.mark.parametrize("extension", [".jsonl", ".json", ".csv", ".parquet"])
    def test_missing_columns_list_what_there_is(self, tmp_path: Path, extension: str) -> None:
        path = write(tmp_path / f"a{extension}", FORMATS[extension]())
        self.fails(
            r"no column 'body' for the text\. Columns: text, level\. .*text_field=", path, text_field="body"
        )
        self.fails(
            r"no column 'hard' for the difficulty\. Columns: text, level", path, difficulty_field="hard"
        )

    @pytest.mark.parametrize("extension", [".jsonl", ".csv"])
    def test_difficulty_that_is_no_number(self, tmp_path: Path, extension: str) -> None:
        path = write(tmp_path / f"a{extension}", FORMATS[extension]())
        self.fails("column 'text' holds 'document 0.*must be a number", path, difficulty_field="text")

    @pytest.mark.parametrize("extension", [".jsonl", ".json", ".parquet"])
    def test_text_that_is_no_string(self, tmp_path: Path, extension: str) -> None:
        path = write(tmp_path / f"a{extension}", FORMATS[extension]())
        self.fails(
            r"column 'level' holds 0.0 \(float\), neither a text nor a.*text, level",
            path,
            text_field="level",
        )

    @pytest.mark.parametrize("extension", [".txt", ".jsonl", ".json", ".csv"])
    @pytest.mark.parametrize("compression", PACK)
    def test_not_utf8(self, tmp_path: Path, extension: str, compression: str) -> None:
        content = FORMATS[extension]()
        cut = content.index(b"document 5") + 4
        damaged = content[:cut] + b"\xe9" + content[cut:]
        write(tmp_path / f"1{extension}", content)
        path = write(tmp_path / f"2{extension}{compression}", PACK[compression](damaged))
        self.fails(rf" 6 of {path}: byte 0xe9 is not UTF-8\. Convert .*iconv", tmp_path)
        skipping = local(tmp_path, on_bad_row="skip")
        assert texts_of(skipping) == TEXTS + TEXTS[:5] + TEXTS[6:]

    @pytest.mark.parametrize("content", ["", " \n\n \n", "\n"])
    @pytest.mark.parametrize("extension", [".txt", ".jsonl"])
    def test_empty_corpus(self, tmp_path: Path, content: str, extension: str) -> None:
        self.fails("holds no document with text", write(tmp_path / f"a{extension}", content))

    def test_corpus_of_empty_texts(self, tmp_path: Path) -> None:
        self.fails("holds no document with text", write(tmp_path / "a.csv", 'text,n\n"",1\n" ",2\n'))

    def test_broken_json_line(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", jsonl_bytes() + b'{"text": oops\n')
        self.fails(r"no valid JSON.*oops.*one object", path)
        self.fails(r"\[1\] is not an object", write(tmp_path / "b.jsonl", "[1]\n"))

    @pytest.mark.parametrize("compression", PACK)
    @pytest.mark.parametrize("bad", ["oops", "[1]", '{"text": 5}', '{"body": "b"}'])
    def test_bad_line_is_named_by_its_file_and_number(
        self, tmp_path: Path, bad: str, compression: str
    ) -> None:
        write(tmp_path / "1.jsonl", '{"text": "a"}\n\n{"text": "b"}')  # three lines, no break at the end
        content = f'{{"text": "c"}}\n{{"text": ""}}\n\n{bad}\n{{"text": "d"}}\n'
        path = write(tmp_path / f"2.jsonl{compression}", PACK[compression](content.encode()))
        self.fails(rf"source 'mine', line 4 of {path}: ", tmp_path)

    @pytest.mark.parametrize("extension", [".csv", ".json", ".parquet"])
    def test_bad_row_is_named_by_its_number(self, tmp_path: Path, extension: str) -> None:
        table = pyarrow.Table.from_pylist(
            [{"text": "a", "n": "1"}, {"text": "", "n": ""}, {"text": "b", "n": "x"}]
        )
        path = tmp_path / f"a{extension}"
        if extension == ".parquet":
            parquet.write_table(table, path)
        elif extension == ".json":
            write(path, json.dumps(table.to_pylist()))
        else:
            write(path, "text,n\na,1\n,\nb,x\n")
        self.fails(rf"row 3 of .*a\{extension}: column 'n' holds 'x'", path, difficulty_field="n")
        source = local(path, difficulty_field="n")
        source.next_document()
        resumed = local(path, difficulty_field="n")
        resumed.load_state_dict(through_disk(source.state_dict()))
        with pytest.raises(CurriqError, match="row 3 of"):
            resumed.next_document()

    @pytest.mark.parametrize("extension", FORMATS)
    def test_damaged_archive(self, tmp_path: Path, extension: str) -> None:
        packed = gzip.compress(FORMATS[extension]() * 50)
        path = write(tmp_path / f"a{extension}.gz", packed[: len(packed) // 2])
        self.fails(r"cannot be read as .*Truncated compressed stream.*Check that the file is complete", path)

    def test_file_that_is_not_what_its_name_says(self, tmp_path: Path) -> None:
        self.fails("cannot be read as Parquet", write(tmp_path / "a.parquet", jsonl_bytes()))


class TestHub:
    """The library and the hub are replaced at their public entry points."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict]]:
        import datasets

        calls: list[tuple[tuple, dict]] = []

        def load_dataset(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return datasets.Dataset.from_list(rows()).to_iterable_dataset(num_shards=2)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        self.publish(monkeypatch, COMMIT)
        return calls

    def publish(self, monkeypatch: pytest.MonkeyPatch, commit: str) -> list[tuple[str, str | None]]:
        """Make `commit` the hub's answer; returns what it is asked for."""
        asked: list[tuple[str, str | None]] = []

        def dataset_info(self: Any, name: str, *, revision: str | None = None) -> SimpleNamespace:
            asked.append((name, revision))
            return SimpleNamespace(sha=commit)

        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
        return asked

    def test_revision_is_resolved_to_its_commit(self, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.publish(monkeypatch, COMMIT)
        source = SourceConfig(name="mine", path="hub:owner/name:subset", hub_revision="refs/convert/parquet")
        pinned = pin_revision(source)
        assert pinned == dataclasses.replace(source, hub_revision=COMMIT)
        assert asked == [("owner/name", "refs/convert/parquet")]
        opened = open_source(pinned, 0)
        assert pin_revision(pinned) == pinned
        assert len(asked) == 1, "a commit stands for itself"
        assert [options["revision"] for _, options in calls] == [COMMIT]
        assert opened.fingerprint() == open_source(source, 0).fingerprint()

    def test_other_sources_have_no_revision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = self.publish(monkeypatch, COMMIT)
        source = SourceConfig(name="mine", path="embedded:prose")
        assert pin_revision(source) == source
        assert asked == []

    def test_streams_and_pins_the_revision(self, calls: list) -> None:
        source = local("hub:owner/name:subset", hub_split="validation", difficulty_field="level")
        assert texts_of(source) == TEXTS
        assert texts_of(source) == TEXTS
        expected = {"name": "subset", "split": "validation", "revision": COMMIT, "streaming": True}
        assert calls == [(("owner/name",), expected)]

    def test_resumes_exactly(self, calls: list) -> None:
        source = local("hub:owner/name")
        head = [source.next_document().text for _ in range(3)]
        resumed = local("hub:owner/name")
        resumed.load_state_dict(through_disk(source.state_dict()))
        assert head + texts_of(resumed) == TEXTS

    def test_fingerprint(self, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
        first = local("hub:owner/name").fingerprint()
        assert local("hub:owner/name").fingerprint() == first
        assert local("hub:owner/name:subset").fingerprint() != first
        assert local("hub:owner/name", hub_split="test").fingerprint() != first
        self.publish(monkeypatch, "f" * 40)
        assert local("hub:owner/name").fingerprint() != first

    def test_no_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise ConnectionError("name resolution failed.")

        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
        match = (
            r"hub data set 'owner/name' .*'train', revision newest\) cannot be read: ConnectionError: "
            r"name resolution failed\. With a connection.*HF_HUB_OFFLINE.*files"
        )
        with pytest.raises(CurriqError, match=match):
            local("hub:owner/name")

    def test_connection_lost_on_the_way(self, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> Any:
            yield {"text": "one"}
            raise TimeoutError("read timed out")

        import datasets

        stream = datasets.IterableDataset.from_generator(broken)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
        source = local("hub:owner/name")
        assert source.next_document().text == "one"
        with pytest.raises(CurriqError, match="cannot be read: TimeoutError: read timed out"):
            source.next_document()
