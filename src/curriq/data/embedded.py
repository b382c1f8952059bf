"""The corpus that needs no download: the documentation and the source code that ship with Python.

- `prose`: the topics of `pydoc_data` (the language reference) and the docstrings of the standard library.
- `code`: the sources of the standard library, without docstrings, so that no prose leaks into it.

It is read at run time and differs between Python versions, which the fingerprint of a source shows.
"""

import ast
import functools
import gzip
import importlib
import itertools
import json
import platform
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from curriq.data.cache import read_cached, write_cached
from curriq.data.documents import Document, document_key
from curriq.errors import CurriqError

KINDS = ("prose", "code")
FORMAT = 1
"""Goes up when the extraction changes, so that caches of an older one are not read."""
MIN_CHARS = 200
MAX_CODE_CHARS = 4000
MAX_PROSE_CHARS = 8000
SKIPPED_FOLDERS = {
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"),
    *("pydoc_data", "encodings", "__pycache__"),
}
"""Tests and applications, installed packages, the prose itself, and tables of character codes."""

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@functools.cache
def embedded_documents(kind: str) -> tuple[Document, ...]:
    """All documents of one kind of `KINDS`, without repeats, in a fixed order.

    Raises:
        CurriqError: this Python ships neither topics nor the sources of its standard library.
    """
    name = f"corpus/{corpus_version()}"
    if (kept := read_cached(name)) is None:
        texts = _extract_texts()
        write_cached(name, gzip.compress(json.dumps(texts).encode(), compresslevel=6, mtime=0))
    else:
        texts = json.loads(gzip.decompress(kept))
    unique = {document_key(text): text for text in reversed(texts[kind])}
    documents = tuple(Document(text, key=key) for key, text in reversed(unique.items()))
    if not documents:
        raise CurriqError(
            f"embedded:{kind} is empty: this Python has no .py files in {sysconfig.get_path('stdlib')}. "
            "Use a full Python installation, or text of your own: --sources name=web,path=FILE."
        )
    return documents


def corpus_version() -> str:
    """Names the Python whose documentation and sources make up the corpus."""
    return f"{sys.implementation.name}-{platform.python_version()}-{FORMAT}"


def _extract_texts() -> dict[str, list[str]]:
    """Both kinds, in one pass over the standard library."""
    texts: dict[str, list[str]] = {"prose": list(topic_texts()), "code": []}
    for path in library_files(Path(sysconfig.get_path("stdlib"))):
        try:
            with tokenize.open(path) as file:  # honours the coding line, makes every line end in \n
                source = file.read()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in the library are no concern of the user
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue
        texts["prose"].extend(docstrings(tree))
        texts["code"].extend(code_documents(source, tree))
    return texts


def library_files(folder: Path) -> list[Path]:
    """The .py files of a standard library that are worth reading, sorted by path."""
    return [
        path
        for path in sorted(folder.rglob("*.py"))
        # _sysconfigdata lists the paths and compiler flags of the machine that built this Python.
        if not path.name.startswith("_sysconfigdata")
        and not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts[:-1])
    ]


def topic_texts() -> Iterator[str]:
    """The topics of the language reference, sorted by name, long ones in parts."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return  # some distributions leave it out
    for name in sorted(topics):
        if isinstance(topics[name], str):
            yield from long_parts(topics[name], MAX_PROSE_CHARS)


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of the module, its classes and its functions, in the order of the file, dedented."""
    owners = [node for node, _ in _statement_blocks(tree) if isinstance(node, ast.Module | _Definition)]
    for node in sorted(owners, key=lambda node: getattr(node, "lineno", 0)):
        yield from long_parts(ast.get_docstring(node) or "", MAX_PROSE_CHARS)


def code_documents(source: str, tree: ast.Module) -> Iterator[str]:
    """The top-level functions and classes of a module, and the code between them, without
    docstrings. `tree` is the parsed source."""
    lines = without_docstrings(source, tree)
    cuts = {0, len(lines)}
    for node in tree.body:
        if isinstance(node, _Definition):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            while first > 0 and (lines[first - 1] or "").startswith("#"):
                first -= 1  # a comment right above belongs to the definition
            cuts |= {first, node.end_lineno or node.lineno}
    for start, end in itertools.pairwise(sorted(cuts)):
        kept = (line for line in lines[start:end] if line is not None)
        yield from long_parts("\n".join(kept), MAX_CODE_CHARS)


def without_docstrings(source: str, tree: ast.Module) -> list[str | None]:
    """The lines of the source without the statements that are a bare string, otherwise unchanged.

    A removed line is None, so that the line numbers of `tree` stay valid. A block of nothing but strings gets
    a `pass`, so that the remaining lines are still valid Python.
    """
    found: list[tuple[ast.Expr, bytes]] = []
    for owner, block in _statement_blocks(tree):
        # Among the nodes that have a value of their own, only a constant can hold a string.
        bare = [s for s in block if isinstance(s, ast.Expr) and isinstance(getattr(s.value, "value", 0), str)]
        filler = b"pass" if len(bare) == len(block) and owner is not tree else b""
        found += [(statement, b"" if i else filler) for i, statement in enumerate(bare)]
    found.sort(key=lambda item: (item[0].lineno, item[0].col_offset), reverse=True)
    lines: list[bytes | None] = [line.encode() for line in source.split("\n")]  # ast counts columns in bytes
    for statement, replacement in found:
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        before = (lines[first] or b"")[: statement.col_offset]
        after = (lines[last] or b"")[statement.end_col_offset :]
        if before.strip() or after.strip():  # shares its line with a statement or a comment
            replacement = b"pass"
        kept = before + replacement + after
        lines[first : last + 1] = [kept if kept.strip() else None] + [None] * (last - first)
    return [None if line is None else line.decode() for line in lines]


def _statement_blocks(tree: ast.Module) -> Iterator[tuple[ast.AST, list]]:
    """Every node that owns blocks of statements, with each block."""
    stack: list[ast.AST] = [tree]  # no expressions, which hold nine tenths of the nodes
    while stack:
        node = stack.pop()
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            block = getattr(node, field, None)
            if block and isinstance(block, list):
                stack.extend(block)
                yield node, block


def parts(text: str, limit: int) -> Iterator[str]:
    """The text in parts of at most `limit` characters, cut at blank lines where there are any, else
    between lines; a single longer line stays whole."""
    part = ""
    for paragraph in re.findall(r".+?(?:\n\s*\n|\Z)", text, flags=re.DOTALL):  # with the blank lines after it
        for block in [paragraph] if len(paragraph) <= limit else paragraph.splitlines(keepends=True):
            if part and len(part) + len(block) > limit:
                yield part
                part = ""
            part += block
    yield part


def long_parts(text: str, limit: int) -> Iterator[str]:
    """Its `parts` of at least MIN_CHARS characters, without the line breaks around them."""
    stripped = (part.strip("\n").rstrip() for part in parts(text, limit))
    return (part for part in stripped if len(part) >= MIN_CHARS)
