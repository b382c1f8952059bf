"""The cache, which gives what was written or nothing, and hashes of whole files."""

import hashlib
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from curriq.data.cache import (
    FileHash,
    cache_dir,
    changed_files,
    damaged_entries,
    file_hash,
    read_cached,
    write_cached,
)
from curriq.errors import CurriqError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CURRIQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class TestCache:
    def test_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CURRIQ_CACHE", "/one")
        monkeypatch.setenv("XDG_CACHE_HOME", "/two")
        assert cache_dir() == Path("/one")
        monkeypatch.delenv("CURRIQ_CACHE")
        assert cache_dir() == Path("/two/curriq")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_dir() == tmp_path / ".cache" / "curriq"

    def test_none_without_a_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("CURRIQ_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
        assert cache_dir() is None
        assert read_cached("a/b") is None
        assert not write_cached("a/b", b"1")
        assert list(damaged_entries()) == []

    def test_what_is_written_is_read(self, cache: Path) -> None:
        assert read_cached("a/b") is None
        assert write_cached("a/b", b"1")
        assert write_cached("a/b", b"22\n")
        assert read_cached("a/b") == b"22\n"
        assert len([path for path in cache.rglob("*") if path.is_file()]) == 1
        assert not write_cached("a/b.entry/c", b"3")

    def test_every_flipped_bit_is_noticed(self, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_cached("a/b", b"some content")
        (path,) = (path for path in cache.rglob("*") if path.is_file())
        whole = path.read_bytes()
        for position in range(8 * len(whole)):
            content = bytearray(whole)
            content[position // 8] ^= 1 << position % 8
            path.write_bytes(content)
            caplog.clear()
            assert read_cached("a/b") is None
            assert "is damaged, or of another entry of the cache" in caplog.text
            assert list(damaged_entries()) == [path]

    def test_entry_of_another_name_is_not_used(self, cache: Path) -> None:
        write_cached("tokenizers/one", b"1")
        write_cached("tokenizers/two", b"2")
        (one, two) = sorted(path for path in cache.rglob("*") if path.is_file())
        two.write_bytes(one.read_bytes())
        assert read_cached("tokenizers/two") is None
        assert read_cached("tokenizers/one") == b"1"


class TestFileHash:
    @pytest.fixture
    def path(self, tmp_path: Path, cache: Path) -> Path:
        path = tmp_path / "data.txt"
        path.write_bytes(b"abc" * 1000)
        os.utime(path, ns=(0, 0))
        return path

    def age(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A minute later: the file's times now tell every further change."""
        later = time.time_ns() + 60_000_000_000
        monkeypatch.setattr("curriq.data.cache.time.time_ns", lambda: later)

    def test_is_sha256_of_all_of_it(self, path: Path) -> None:
        assert file_hash(path) == FileHash(3000, hashlib.sha256(b"abc" * 1000).hexdigest())

    def test_is_taken_from_the_cache(self, path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.age(monkeypatch)
        first = file_hash(path)
        monkeypatch.setattr("curriq.data.cache._known", {})
        monkeypatch.setattr("curriq.data.cache.hash_bytes", lambda *_: pytest.fail("it was read again"))
        assert file_hash(path) == first

    def test_a_young_file_is_always_read(self, path: Path, cache: Path) -> None:
        """Within a tick of the file system's clock a change leaves size and times as they are."""
        file_hash(path)
        assert not list(cache.rglob("*.entry"))

    def test_a_change_that_keeps_size_and_time_is_noticed(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.age(monkeypatch)
        first = file_hash(path)
        time.sleep(0.02)
        content = bytearray(path.read_bytes())
        content[1500] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(0, 0))  # as rsync --times would
        assert file_hash(path) != first

    def test_changes_are_named(self, path: Path) -> None:
        def states() -> dict[str, FileHash]:
            return {str(path): file_hash(path)}

        before = {name: asdict(state) for name, state in states().items()}
        assert changed_files(before, states()) == []
        with path.open("ab") as file:
            file.write(b"more")
        assert changed_files(before, states()) == [
            f"{path} has grown by 4 bytes (what was there is unchanged)"
        ]
        path.write_bytes(b"xbc" * 1000 + b"more")
        assert changed_files(before, states()) == [f"{path} has changed"]

    def test_a_file_that_changes_while_it_is_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def grow(path: Path, size: int) -> str:
            with path.open("ab") as file:
                file.write(b"more")
            return "0" * 64

        monkeypatch.setattr("curriq.data.cache.hash_bytes", grow)
        with pytest.raises(CurriqError, match=r"data\.txt changes while it is read"):
            file_hash(path)

    def test_unreadable(self, tmp_path: Path) -> None:
        with pytest.raises(CurriqError, match="cannot be read: No such file"):
            file_hash(tmp_path / "gone")
