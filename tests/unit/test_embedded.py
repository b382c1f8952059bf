"""The embedded corpus and its cache: what is in it, what is not, and when the cache fails."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from curriq.config import SourceConfig
from curriq.data import embedded
from curriq.data.cache import cache_dir
from curriq.data.sources import open_source
from curriq.errors import CurriqError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


class TestEmbedded:
    def test_both_kinds_are_rich_clean_and_distinct(self) -> None:
        prose, code = (embedded.embedded_documents(kind) for kind in embedded.KINDS)
        assert sum(len(document.text) for document in prose) > 500_000
        assert sum(len(document.text) for document in code) > 1_000_000
        keys = [document.key for document in (*prose, *code)]
        assert len(set(keys)) == len(keys)
        assert min(len(document.text) for document in (*prose, *code)) >= 200
        prose_text = "\n".join(document.text for document in prose)
        assert "The standard type hierarchy" in prose_text  # a topic
        assert json.decoder.__doc__.strip() in prose_text or "Simple JSON" in prose_text  # a docstring

    def test_code_holds_no_docstring(self) -> None:
        whole = 0
        for document in embedded.embedded_documents("code"):
            try:
                tree = ast.parse(document.text)
            except SyntaxError:
                continue  # part of a long class
            whole += 1
            owners = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)]
            assert not any(ast.get_docstring(owner) for owner in owners), document.text
        assert whole > 1000

    def test_only_bare_strings_are_taken_out(self) -> None:
        source = '''"""Module."""
import os  # kept
x = """a value"""
class A:
    """Only a docstring."""
class B:
    "one"; y = 1
    """Attribute docs,
    two lines: ü."""  # a comment
    def f(self): "inline"
    async def g(self):
        """Docs."""

        return f"{x}"
if x:
    "bare"
else:
    "ü"; "two"
'''
        lines = embedded.without_docstrings(source, ast.parse(source))
        assert len(lines) == len(source.split("\n"))
        left = "\n".join(line for line in lines if line is not None)
        for lost in ("Module", "Only", "one", "Attribute", "inline", "Docs", "bare", "two"):
            assert lost not in left
        for kept in ("# kept", '"""a value"""', "y = 1", "# a comment", 'f"{x}"', "class A", "else:"):
            assert kept in left
        names = [n.name for n in ast.walk(ast.parse(left)) if hasattr(n, "name")]
        assert names.count("f") == names.count("g") == 1

    def test_parts_lose_nothing_and_keep_the_limit(self) -> None:
        text = "".join(f"line {i}\n" + "\n" * (i % 7 == 0) + " \n" * (i % 11 == 0) for i in range(500))
        for limit in (50, 333, 10_000):
            found = list(embedded.parts(text, limit))
            assert "".join(found) == text
            assert max(map(len, found)) <= limit
        assert list(embedded.parts("x" * 99, 10)) == ["x" * 99]

    def test_definitions_keep_decorators_and_comments(self) -> None:
        filler = "".join(f"    x = {i} + 1\n" for i in range(30))
        one = f"# About f.\n@decorator\ndef f():\n{filler}    return x"
        two = f"class A:\n{filler}"
        source = f'"""Docs."""\nimport os\n\n{one}\n\n\n{two}'
        assert list(embedded.code_documents(source, ast.parse(source))) == [one, two.rstrip()]

    @pytest.fixture
    def library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A standard library of three files, one of them broken, and an empty cache."""
        folder = tmp_path / "lib"
        write(folder / "a.py", f'"""{"A docstring. " * 30}"""\n' + "value = [1, 2, 3]\n" * 20)
        write(folder / "broken.py", "def (:\n")
        write(folder / "latin.py", b"# -*- coding: latin-1 -*-\n" + b"x = 'caf\xe9'\n" * 30)
        write(folder / "test" / "b.py", "skipped = 1\n" * 50)
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(folder))
        monkeypatch.setattr(embedded, "topic_texts", lambda: iter(()))
        monkeypatch.setenv("CURRIQ_CACHE", str(tmp_path / "cache"))
        embedded.embedded_documents.cache_clear()
        yield folder
        embedded.embedded_documents.cache_clear()

    def read(self) -> list[str]:
        embedded.embedded_documents.cache_clear()
        return [d.text for kind in embedded.KINDS for d in embedded.embedded_documents(kind)]

    def test_cache_gives_the_same_and_survives_damage(self, library: Path) -> None:
        fresh = self.read()
        assert len(fresh) == 3
        assert "café" in fresh[2]
        (cache,) = (cache_dir() / "corpus").iterdir()
        write(library / "latin.py", "x = 'changed'\n" * 30)
        assert self.read() == fresh
        cache.write_bytes(cache.read_bytes()[:-9])
        assert self.read()[:2] == fresh[:2]
        assert "changed" in self.read()[2]

    def test_works_without_a_writable_cache(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CURRIQ_CACHE", str(write(library.parent / "a file", "") / "cache"))
        assert len(self.read()) == 3

    def test_python_without_sources(self, library: Path) -> None:
        for path in library.glob("*.py"):
            path.unlink()
        with pytest.raises(CurriqError, match=r"embedded:prose is empty.*full Python installation"):
            self.read()

    def test_unknown_kind(self) -> None:
        with pytest.raises(CurriqError, match=r"no embedded:proze\. Did you mean embedded:prose\?"):
            open_source(SourceConfig(name="mine", path="embedded:proze"), 0)
