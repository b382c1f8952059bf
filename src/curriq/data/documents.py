"""Documents, and the protocol of their sources."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from curriq.errors import CurriqError
from curriq.rng import derive_seed
from curriq.state import State, Stateful

Message = dict[str, Any]
"""One turn of a conversation: its `role`, its `content`, and whatever else a chat template reads."""


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
        key: `document_key` of the text, filled in when left out. A corrupted copy keeps the key of the
            clean document, so that both are on the same side of the split.
        messages: the conversation that `text` renders; None for plain text.
    """

    text: str
    difficulty: float = math.nan
    key: str = ""
    messages: tuple[Message, ...] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", document_key(self.text))

    @property
    def number(self) -> int:
        """A 63-bit identity: equal for equal keys."""
        return int(document_key(self.key), 16) >> 1


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a source: the documents are dealt out, each to one part."""

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.number < self.count, self

    def first(self, row: int, offset: int = 0) -> int:
        """The first row from this one on that is the shard's; rows are dealt out in turn, row 0 to the shard
        of number `offset` (modulo the count)."""
        return row + (self.number - offset - row) % self.count


WHOLE = Shard()


@runtime_checkable
class DocumentSource(Stateful, Protocol):
    """An endless, exactly resumable sequence of documents in epochs.

    Attributes:
        name: name of the source in logs and reports.
        epoch: number of times that the source has run out, from 0.
        skipped: rows that did not fit and were left out, all epochs together.
    """

    name: str

    @property
    def skipped(self) -> int: ...

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
    return iter(source.next_document, None)


class MemorySource:
    """Documents held in memory, in a new permutation each epoch; CurriqError when there are none.

    The permutation is seeded from (seed, name, purpose, epoch), so the state is (epoch, position) alone.

    Args:
        documents: in an order that is the same in every process.
        version: what else the fingerprint covers, such as the version of the corpus.
        shard: the part of them that is read; the fingerprint is that of all.
    """

    skipped = 0

    def __init__(
        self,
        name: str,
        documents: Sequence[Document],
        seed: int,
        version: str = "",
        purpose: str = "",
        shard: Shard = WHOLE,
    ) -> None:
        if not documents:
            raise CurriqError(f"source {name!r} holds no document with text: give it some, or leave it out.")
        self.name = name
        self._whole = documents
        self._documents = documents[shard.number :: shard.count]
        if not self._documents:
            raise too_few_documents(name, shard)
        self._seed = seed
        self._version = version
        self._purpose = f"documents/{name}{purpose}" + (f"/{shard.number}" if shard != WHOLE else "")
        self.load_state_dict({"epoch": 0, "position": 0})

    def next_document(self) -> Document | None:
        if self._position == len(self._documents):
            self.load_state_dict({"epoch": self.epoch + 1, "position": 0})
            return None
        self._position += 1
        return self._documents[self._order[self._position - 1]]

    def fingerprint(self) -> str:
        return short_hash(self._version, *(document.text for document in self._whole))

    def state_dict(self) -> State:
        return {"epoch": self.epoch, "position": self._position}

    def load_state_dict(self, state: State) -> None:
        self.epoch: int = state["epoch"]
        self._position: int = state["position"]
        rng = np.random.default_rng(derive_seed(self._seed, f"{self._purpose}/{self.epoch}"))
        self._order = rng.permutation(len(self._documents)).tolist()


def too_few_documents(name: str, shard: Shard) -> CurriqError:
    """The error of a shard to which no document of a source with text was dealt."""
    return CurriqError(
        f"source {name!r} has no document with text for shard {shard.number} of {shard.count}: lower "
        "--stream-shards (a new run can, a resumed one cannot), or give the source more documents."
    )


def short_hash(*parts: str | bytes) -> str:
    """16 hex digits of BLAKE2b over the parts, each preceded by its length."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def valid_text(text: str) -> str:
    """The text with "?" for half a surrogate pair, which JSON can spell ("\\ud83d", an emoji cut in two)."""
    return text.encode(errors="replace").decode()


def shorten(value: object) -> str:
    """The value as Python writes it, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
