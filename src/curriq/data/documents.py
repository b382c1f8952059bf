"""What a source of text hands out, and where curriq caches what it derives from text."""

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from curriq.errors import CurriqError
from curriq.rng import derive_seed
from curriq.types import State, Stateful


def document_key(text: str) -> str:
    """Stable identity of a text: 16 hex digits of BLAKE2b over the text with its white space
    normalised, so that copies which differ in line breaks or indentation alone have one key."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Document:
    """One text with its identity.

    Attributes:
        text: the text; never empty or only white space when it comes from a source.
        difficulty: label of the source (higher is harder), NaN where there is none.
        key: `document_key` of the text, filled in when left out. A spoiled copy keeps the key of the
            clean document, so that the split by key holds it back together with the clean one.
    """

    text: str
    difficulty: float = math.nan
    key: str = ""

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", document_key(self.text))


@runtime_checkable
class DocumentSource(Stateful, Protocol):
    """An endless, exactly resumable sequence of documents in epochs.

    Attributes:
        name: name of the source in logs and reports.
        epoch: number of times that the source has run out, from 0.
    """

    name: str

    @property
    def epoch(self) -> int: ...

    def next_document(self) -> Document | None:
        """The next document, or None once at the end of each epoch; the call after that begins the
        next epoch, so `epoch` has already gone up when None is returned."""
        ...

    def fingerprint(self) -> str:
        """Short hash of what the source holds; a resumed run must find the same one."""
        ...


def read_epoch(source: DocumentSource) -> Iterator[Document]:
    """The documents that are left of the source's current epoch."""
    while (document := source.next_document()) is not None:
        yield document


class MemorySource:
    """Documents held in memory, in a fresh permutation each epoch.

    The permutation is seeded from (seed, name, epoch), so the state is (epoch, position) alone.

    Args:
        name: name of the source.
        documents: what it holds, in an order that is the same in every process.
        seed: seed of the run.
        version: what else the fingerprint covers, such as the version of the corpus.

    Raises:
        CurriqError: there are no documents.
    """

    def __init__(self, name: str, documents: Sequence[Document], seed: int, version: str = "") -> None:
        if not documents:
            raise CurriqError(f"source {name!r} holds no document with text: give it some, or leave it out.")
        self.name = name
        self.epoch = 0
        self._documents = documents
        self._seed = seed
        self._version = version
        self._position = 0
        self._order = self._permutation()

    def next_document(self) -> Document | None:
        if self._position == len(self._documents):
            self.epoch += 1
            self._position = 0
            self._order = self._permutation()
            return None
        self._position += 1
        return self._documents[self._order[self._position - 1]]

    def fingerprint(self) -> str:
        return short_hash(self._version, *(document.text for document in self._documents))

    def state_dict(self) -> State:
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: State) -> None:
        self.epoch = state["epoch"]
        self._position = state["position"]
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        seed = derive_seed(self._seed, f"documents/{self.name}/{self.epoch}")
        return np.random.default_rng(seed).permutation(len(self._documents)).tolist()


def short_hash(*parts: str | bytes) -> str:
    """16 hex digits of BLAKE2b over the parts, each preceded by its length."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def cache_dir() -> Path:
    """Folder for derived data: $CURRIQ_CACHE, else $XDG_CACHE_HOME/curriq, else ~/.cache/curriq."""
    if folder := os.environ.get("CURRIQ_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder).expanduser() / "curriq"
    return Path("~/.cache/curriq").expanduser()


def write_cached(path: Path, content: bytes) -> bool:
    """Write a cache file atomically; False when the cache cannot be written, which is no error
    because everything in it can be computed again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    except OSError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        return False
    return True
