"""Which files a path names: links, saved data sets, snapshots of the hub, splits, and what is left out."""

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from curriq.config import SourceConfig
from curriq.data.documents import read_epoch, short_hash
from curriq.data.files import find_files
from curriq.data.hub import locate
from curriq.data.sources import LocalSource, log_files
from curriq.data.survey import survey_source
from curriq.errors import CurriqError


def source(path: Path | str, **options: Any) -> SourceConfig:
    return SourceConfig(name="mine", path=str(path), **options)


def texts(path: Path | str, **options: Any) -> list[str]:
    return [document.text for document in read_epoch(LocalSource(source(path, **options)))]


def skipped(path: Path | str, **options: Any) -> dict[str, list[str]]:
    """Names of the files that are left out, by reason."""
    found = find_files(source(path, **options)).skipped
    return {reason: [file.name for file in files] for reason, files in found.items()}


def put(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


class TestLinks:
    def test_linked_folders_and_files_are_followed(self, tmp_path: Path) -> None:
        put(tmp_path / "data" / "a" / "x.jsonl", "x")
        put(tmp_path / "disk" / "deep" / "y.jsonl", "y")
        put(tmp_path / "z.jsonl", "z")
        (tmp_path / "data" / "b").symlink_to("../disk")
        (tmp_path / "data" / "c.jsonl").symlink_to("../z.jsonl")
        assert texts(tmp_path / "data") == ["x", "y", "z"]
        (tmp_path / "link").symlink_to("data")
        assert texts(tmp_path / "link") == ["x", "y", "z"]

    @pytest.mark.timeout(20)
    def test_loops_end_and_every_file_is_read_once(self, tmp_path: Path) -> None:
        put(tmp_path / "data" / "a" / "x.jsonl", "x")
        (tmp_path / "data" / "a" / "up").symlink_to("..")
        (tmp_path / "data" / "a" / "itself").symlink_to("itself")
        (tmp_path / "data" / "again").symlink_to("a")
        (tmp_path / "data" / "x2.jsonl").symlink_to("a/x.jsonl")
        assert texts(tmp_path / "data") == ["x"]
        assert skipped(tmp_path / "data")["another name of a file that is read"] == ["x2.jsonl"]
        assert texts(tmp_path / "data" / "**" / "*.jsonl") == ["x"]

    @pytest.mark.parametrize("name", ["data", "data/*.jsonl", "data/b.jsonl"])
    def test_link_to_nothing_is_an_error(self, tmp_path: Path, name: str) -> None:
        put(tmp_path / "data" / "a.jsonl", "a")
        (tmp_path / "data" / "b.jsonl").symlink_to("../blobs/gone")
        with pytest.raises(CurriqError, match=r"b\.jsonl is a link to nothing"):
            texts(tmp_path / name)

    @pytest.mark.parametrize("name", ["part-2", "v1.0", "x.bz2"])
    def test_a_link_to_a_missing_folder_is_an_error(self, tmp_path: Path, name: str) -> None:
        """A disk that is not mounted: its documents would be missing, whatever the link is called."""
        put(tmp_path / "data" / "a.jsonl", "a")
        (tmp_path / "data" / name).symlink_to("/mnt/not-mounted")
        with pytest.raises(CurriqError, match=rf"{name} is a link to nothing"):
            texts(tmp_path / "data")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
    def test_folder_that_cannot_be_read(self, tmp_path: Path) -> None:
        put(tmp_path / "a" / "x.jsonl", "x")
        (tmp_path / "a").chmod(0)
        with pytest.raises(CurriqError, match=r"the folder .* cannot be read"):
            texts(tmp_path)


class TestSavedDataSets:
    def save(self, folder: Path, *lines: str, shards: int = 2) -> None:
        datasets.Dataset.from_dict({"text": list(lines)}).save_to_disk(folder, num_shards=shards)

    def test_save_to_disk(self, tmp_path: Path) -> None:
        self.save(tmp_path, "a", "b", "c")
        assert texts(tmp_path) == ["a", "b", "c"]
        assert skipped(tmp_path) == {"about the data": ["dataset_info.json", "state.json"]}

    def test_only_what_its_list_names(self, tmp_path: Path) -> None:
        self.save(tmp_path, "a", "b", "c")
        other = tmp_path / "cache-1234.arrow"
        other.write_bytes((tmp_path / "data-00000-of-00002.arrow").read_bytes())
        assert texts(tmp_path) == ["a", "b", "c"]
        assert skipped(tmp_path)["not in the list of state.json"] == [other.name]
        for i in range(2):
            (tmp_path / f"data-0000{i}-of-00002.arrow").rename(tmp_path / f"{i}")
        with pytest.raises(CurriqError, match=r"data-00000-of-00002\.arrow is missing"):
            texts(tmp_path)
        (tmp_path / "0").rename(tmp_path / "data-00000-of-00002.arrow")
        with pytest.raises(CurriqError, match=r"data-00001-of-00002\.arrow is missing"):
            texts(tmp_path)

    def test_dict_of_splits(self, tmp_path: Path) -> None:
        splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test", "fold_b")}
        datasets.DatasetDict(splits).save_to_disk(tmp_path)
        assert texts(tmp_path) == ["train"]
        assert texts(tmp_path, hub_split="fold_b") == ["fold_b"]
        assert skipped(tmp_path)["split 'test', while hub_split=train"] == ["data-00000-of-00001.arrow"]
        with pytest.raises(CurriqError, match=r"holds the splits fold_b, test, train, but no file of 'dev'"):
            texts(tmp_path, hub_split="dev")

    def test_a_split_that_is_missing_is_not_replaced(self, tmp_path: Path) -> None:
        splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
        datasets.DatasetDict(splits).save_to_disk(tmp_path)
        for file in (tmp_path / "train").iterdir():
            file.unlink()
        (tmp_path / "train").rmdir()
        with pytest.raises(CurriqError, match="but no file of 'train'"):
            texts(tmp_path)

    def test_cut_stream(self, tmp_path: Path) -> None:
        self.save(tmp_path, *"abcdef", shards=1)
        file = tmp_path / "data-00000-of-00001.arrow"
        file.write_bytes(file.read_bytes()[:-8])  # Arrow itself takes a missing end mark for the end
        with pytest.raises(CurriqError, match=rf"{file.name} .*has been cut"):
            LocalSource(source(tmp_path))


class TestSnapshots:
    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        """A data set in the cache of the hub, whose files are links."""
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
        blobs.mkdir()
        for split in ("train", "test"):
            datasets.Dataset.from_dict({"text": [split]}).to_parquet(blobs / split)
            link = snapshot / "data" / f"{split}-00000-of-00001.parquet"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path("../../../blobs") / split)
        for name in (".gitattributes", "README.md", "dataset_infos.json"):
            (blobs / name).write_text("{}")
            (snapshot / name).symlink_to(Path("../../blobs") / name)
        return tmp_path

    def test_data_without_metadata(self, cache: Path) -> None:
        snapshot = cache / "snapshots" / "0123"
        assert texts(snapshot) == ["train"]
        assert texts(snapshot, hub_split="test") == ["test"]
        assert skipped(snapshot) == {
            "hidden": [".gitattributes"],
            "about the data": ["README.md", "dataset_infos.json"],
            "split 'test', while hub_split=train": ["test-00000-of-00001.parquet"],
        }

    def test_whole_cache_folder(self, cache: Path) -> None:
        assert texts(cache) == ["train"]

    def test_two_revisions_are_not_read_as_one(self, cache: Path) -> None:
        put(cache / "snapshots" / "4567" / "train.jsonl", "older")
        with pytest.raises(CurriqError, match=r"2 revisions of a data set \(0123, 4567\).*snapshots/0123"):
            texts(cache)
        assert texts(cache / "snapshots" / "4567") == ["older"]


class TestSplits:
    @pytest.mark.parametrize(
        ("train", "test"),
        [
            ("train.jsonl", "test.jsonl"),
            ("train/a.jsonl", "test/a.jsonl"),
            ("data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
            ("en.train.jsonl", "en.validation.jsonl"),
            ("c4-train.00000-of-01024.json", "c4-validation.00000-of-00008.json"),
            ("training/x.jsonl", "dev/x.jsonl"),
        ],
    )
    def test_one_split_is_read(self, tmp_path: Path, train: str, test: str) -> None:
        put(tmp_path / train, "train")
        put(tmp_path / test, "test")
        other = "validation" if "validation" in test or "dev" in test else "test"
        assert texts(tmp_path) == ["train"]
        assert texts(tmp_path, hub_split=other) == ["test"]
        assert list(skipped(tmp_path)) == [f"split '{other}', while hub_split=train"]

    @pytest.mark.parametrize(
        "names",
        [
            ["test.jsonl"],
            ["test-1.jsonl", "test-2.jsonl"],
            ["web.jsonl", "code.jsonl"],
            ["trainer.jsonl", "latest.jsonl"],
            ["web-00000-of-00002.jsonl", "code-00000-of-00002.jsonl"],
        ],
    )
    def test_one_split_or_none_is_read_whole(self, tmp_path: Path, names: list[str]) -> None:
        for name in names:
            put(tmp_path / name, name)
        assert texts(tmp_path) == sorted(names)

    def test_splits_of_several_kinds_need_a_name(self, tmp_path: Path) -> None:
        for name in ("train_sft", "train_gen", "test_sft"):
            put(tmp_path / f"{name}-00000-of-00001.jsonl", name)
        with pytest.raises(
            CurriqError, match=r"splits test_sft, train_gen, train_sft, but no file of 'train'"
        ):
            texts(tmp_path)
        assert texts(tmp_path, hub_split="train_sft") == ["train_sft"]


class TestNames:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def test_a_tilde_is_a_letter_or_the_home_folder(self, tmp_path: Path) -> None:
        put(tmp_path / "~a.jsonl", "its own name")
        put(tmp_path / "~" / "b.jsonl", "a folder of that name")
        put(tmp_path / "home" / "b.jsonl", "the other")
        put(tmp_path / "home" / "c.jsonl", "home")
        assert texts("~a.jsonl") == ["its own name"]
        assert texts("~/b.jsonl") == ["a folder of that name"]
        assert texts("~/c.jsonl") == ["home"]
        assert texts("~/*.jsonl") == ["the other", "home"]

    @pytest.mark.parametrize("name", ["~nobody/x.txt", "~", "~nobody.txt", "a" * 300, "b/" + "a" * 5000])
    def test_what_is_not_there(self, name: str) -> None:
        with pytest.raises(CurriqError, match="matches no file"):
            find_files(source(name))
        survey = survey_source(source(name))
        assert "matches no file" in survey.faults[0].problem
        with pytest.raises(CurriqError, match="is a path, and there is no such folder"):
            locate("--model", name if name.startswith("~") else f"./{name}")

    def test_a_name_that_is_not_utf_8(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "ok.txt").write_text("fine")
        valid = find_files(source("data")).fingerprint()
        assert valid == short_hash("ok.txt", hashlib.sha256(b"fine").hexdigest())  # as it always was
        Path(os.fsdecode(b"data/\xff.txt")).write_text("odd")
        assert find_files(source("data")).fingerprint() != valid
        assert texts("data") == ["fine", "odd"]


class TestWhatIsSaid:
    def test_what_is_read_and_what_is_not(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for i in range(5):
            put(tmp_path / f"{i}.jsonl", str(i))
        for name in ("notes.md", "README.txt", "script.py", ".hidden.jsonl"):
            (tmp_path / name).write_text("no data")
        (tmp_path / "empty.jsonl").touch()
        with caplog.at_level(logging.INFO, "curriq"):
            log_files(source(tmp_path))
            log_files(source("hub:owner/name"))
        (message,) = [record.getMessage() for record in caplog.records]
        assert message == (
            "source 'mine' reads 5 files (0.jsonl, 1.jsonl, 2.jsonl, …); skips 1 file (.hidden.jsonl): "
            "hidden; 1 file (README.txt): about the data; 2 files (notes.md, script.py): of no known format; "
            "1 file (empty.jsonl): empty."
        )
        assert texts(tmp_path) == list("01234")

    def test_a_file_or_glob_that_is_named_is_read(self, tmp_path: Path) -> None:
        put(tmp_path / "test.jsonl", "test")
        (tmp_path / "README.txt").write_text("read me")
        assert texts(tmp_path / "README.txt") == ["read me"]
        assert texts(tmp_path / "*.jsonl") == ["test"]

    def test_path_with_two_colons(self, tmp_path: Path) -> None:
        assert texts(put(tmp_path / "a::b" / "zip::x.jsonl", "x")) == ["x"]
        assert texts(tmp_path / "a::b") == ["x"]

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.parquet", "a.arrow", "a.json"])
    def test_file_cut_to_nothing(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(CurriqError, match=rf"{name} has no bytes, so it has been cut"):
            texts(tmp_path)

    def test_mixed_formats_advise_a_glob_that_works(self, tmp_path: Path) -> None:
        put(tmp_path / "deep" / "a.jsonl", "a")
        (tmp_path / "b.txt").write_text("b")
        with pytest.raises(CurriqError, match=r"such as path='(.*)'\.") as caught:
            texts(tmp_path)
        glob = str(caught.value).split("path='")[-1].removesuffix("'.")
        assert texts(glob) == ["a"]

    @pytest.mark.parametrize("pattern", ["part*", "part*.*", "part-?.*", "[p]art*", "*"])
    @pytest.mark.parametrize("ends", [[".jsonl"], [".jsonl.gz"], [".jsonl", ".jsonl.gz"]])
    def test_of_a_glob_the_advice_keeps_what_it_names(
        self, tmp_path: Path, pattern: str, ends: list[str]
    ) -> None:
        names = [f"part-{number}{end}" for number, end in enumerate(ends)]
        for name in (*names, "part-3.txt", "other.jsonl"):
            (tmp_path / name).write_text("not empty")
        with pytest.raises(CurriqError, match=r"such as path='(.*)'\.") as caught:
            texts(tmp_path / pattern)
        glob = str(caught.value).split("path='")[-1].removesuffix("'.")
        others = ["other.jsonl"] if pattern == "*" else []
        assert [path.name for path in find_files(source(glob)).paths] == others + names

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("a.ndjson", "to .jsonl"),
            ("a.pq", "to .parquet"),
            ("a.tsv", "as .csv"),
            ("a.jsnl", "mean .jsonl?"),
        ],
    )
    def test_extensions_of_other_programs(self, tmp_path: Path, name: str, says: str) -> None:
        (tmp_path / name).write_text("{}")
        with pytest.raises(CurriqError, match=re.escape(says)):
            texts(tmp_path / name)
