"""NEXTBATCH of Algorithm 1: an endless, mixed, shuffled and exactly resumable stream of windows.

Every window's source is drawn by weight, the source's next window goes into a shuffle buffer, and a
uniformly random element of the buffer comes out. The draws are made window by window, so the sequence of
windows does not depend on how it is cut into batches, and two arms with one seed see the same windows.
"""

import bisect
import hashlib
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from curriq.config import CorruptionName
from curriq.data.chat import encode_chat
from curriq.data.contamination import ContaminationFilter
from curriq.data.corruption import corrupt_text, corrupt_tokens, document_rng
from curriq.data.documents import Document, DocumentSource, read_epoch
from curriq.data.tokenizer import document_marks, ordinary_ids
from curriq.data.words import FastEncoder
from curriq.errors import CurriqError
from curriq.state import Saved, State
from curriq.types import IGNORED, NO_COST, Cost, Offer, Windows, WindowSource

if TYPE_CHECKING:
    import transformers


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One row of `Windows`, on its way from a packer to a batch.

    Attributes:
        tokens: token ids, int32, length T; read-only.
        id: `window_id` of the tokens.
        difficulty: mean label over the tokens that have one, NaN when none has.
        source: position of its source in the configuration.
        document: 63-bit identity of the document that it begins in.
        labels: the tokens, −100 where one is not learnt; None where all are.
    """

    tokens: np.ndarray
    id: int
    difficulty: float = math.nan
    source: int = 0
    document: int = 0
    labels: np.ndarray | None = None


def batch(rows: Sequence[Window], *, labelled: bool = True) -> Windows:
    """Windows of these rows, at least one; without difficulty unless `labelled`."""
    tokens = np.stack([row.tokens for row in rows]).astype(np.int64)
    labels = None
    if any(row.labels is not None for row in rows):
        labels = np.stack([row.tokens if row.labels is None else row.labels for row in rows])
        labels = torch.from_numpy(labels.astype(np.int64))
    return Windows(
        tokens=torch.from_numpy(tokens),
        ids=torch.tensor([row.id for row in rows], dtype=torch.int64),
        source=torch.tensor([row.source for row in rows], dtype=torch.int64),
        difficulty=torch.tensor([row.difficulty for row in rows], dtype=torch.float32) if labelled else None,
        labels=labels,
        document=torch.tensor([row.document for row in rows], dtype=torch.int64),
    )


class Rows(deque[Window]):
    """Windows that a checkpoint keeps, as one batch."""

    def state_dict(self) -> State:
        return batch(self).state_dict() if self else {}

    def load_state_dict(self, state: State) -> None:
        self.clear()
        columns = {name: value.numpy().copy() for name, value in state.items() if value is not None}
        if columns:
            names = ("tokens", "ids", "difficulty", "source", "document")
            labels = columns.get("labels", columns["tokens"])
            for tokens, *values, label in zip(*(columns[name] for name in names), labels, strict=True):
                known = [value.item() for value in values]
                self.append(Window(tokens, *known, None if (label == tokens).all() else label))


def window_id(source: str, tokens: np.ndarray) -> int:
    """63-bit identity of a window: the first 8 bytes of BLAKE2b over the source's name and the tokens
    (little-endian int32). Equal windows of one source have equal ids in every run and for every seed."""
    digest = hashlib.blake2b(source.encode() + b"\0", digest_size=8)
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").data)
    return int.from_bytes(digest.digest(), "big") >> 1


Marks = tuple[Sequence[int], Sequence[int]]


class Packer(Saved):
    """Cuts one source's documents into windows of T = `length` tokens; those left over wait for the next one.

    Documents are laid end to end, an EOS token after each, and cut every T tokens, so no token that has a
    loss is lost or padded, and a window may hold the end of one document and the beginning of the next. A
    window of which nothing is learnt, such as the middle of a long question, is left out.

    Attributes:
        untaught: windows left out since it was made.

    Args:
        marks: tokens before and after a text, the last one EOS, see `document_marks`; conversations have
            those of their template, and EOS.
    """

    SAVED = ("_tokens", "_difficulty", "_learnt", "_document")

    def __init__(self, source: str, length: int, marks: Marks, position: int = 0) -> None:
        self.source = source
        self.length = length
        self.marks = marks
        self.untaught = 0
        self._position = position
        self._tokens = np.empty(0, np.int32)
        self._difficulty = np.empty(0, np.float64)
        self._learnt = np.empty(0, bool)
        self._document = np.empty(0, np.int64)

    def add(
        self,
        tokens: Sequence[int] | np.ndarray,
        difficulty: float = math.nan,
        learnt: Sequence[bool] | None = None,
        document: int = 0,
    ) -> list[Window]:
        """The windows that this document completes; none for a document that is empty, or of which nothing is
        learnt: it is skipped, EOS and all. `learnt` says which tokens are; None for all, also EOS. `document`
        is its 63-bit identity."""
        if len(tokens) == 0 or (learnt is not None and not any(learnt)):
            return []
        before, after = self.marks
        if learnt is not None:
            before, after = (), (after or before)[-1:]
        ended = np.concatenate([np.asarray(part, np.int32) for part in (before, tokens, after)])
        mask = np.ones(len(ended), bool) if learnt is None else np.append(learnt, False)
        self._tokens = np.concatenate([self._tokens, ended])
        self._difficulty = np.concatenate([self._difficulty, np.full(len(ended), difficulty)])
        self._learnt = np.concatenate([self._learnt, mask])
        self._document = np.concatenate([self._document, np.full(len(ended), document, np.int64)])
        end, length = len(self._tokens) // self.length * self.length, self.length
        cuts = [slice(start, start + length) for start in range(0, end, length)]
        # Nothing predicts a window's first token.
        windows = [self._window(cut) for cut in cuts if self._learnt[cut][1:].any()]
        self.untaught += len(cuts) - len(windows)
        self._tokens = self._tokens[end:].copy()
        self._difficulty = self._difficulty[end:].copy()
        self._learnt = self._learnt[end:].copy()
        self._document = self._document[end:].copy()
        return windows

    def _window(self, where: slice) -> Window:
        tokens, learnt = self._tokens[where].copy(), self._learnt[where]
        tokens.flags.writeable = False
        known = self._difficulty[where][~np.isnan(self._difficulty[where])]
        difficulty = float(known.mean()) if len(known) else math.nan
        labels = None if learnt.all() else np.where(learnt, tokens, IGNORED).astype(np.int32)
        begins_in = int(self._document[where.start])
        number = window_id(self.source, tokens)
        return Window(tokens, number, difficulty, self._position, begins_in, labels)


_log = logging.getLogger("curriq")

_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 200_000
"""A source is read until either is reached: the tokenizer is fast on many texts at once, and what is read
ahead is part of every checkpoint."""


class Encoded:
    """Token ids of texts, remembered for the next epoch of a small corpus; tokenizing costs most of all that
    reading does.

    Args:
        encoder: of the tokenizer.
        most_bytes: of ids that are remembered. The first texts stay, so that a corpus that does not fit is
            remembered in part.
    """

    def __init__(self, encoder: FastEncoder, most_bytes: int = 32 * 2**20) -> None:
        self.tokenizer = encoder.tokenizer
        self._encoder = encoder
        self._left = most_bytes
        self._ids: dict[bytes, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32."""
        keys = [
            hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts
        ]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._ids}
        found = dict(zip(new, self._encoder(list(new.values())), strict=True))
        ids = [self._ids[key] if key in self._ids else found[key] for key in keys]
        for key, value in found.items():
            if value.nbytes <= self._left:
                self._ids[key] = value
                self._left -= value.nbytes
        return ids


TokenIds = np.ndarray | Sequence[int]


def encode_documents(
    encoded: Encoded, documents: Sequence[Document]
) -> list[tuple[TokenIds, list[bool] | None]]:
    """Token ids of each document and which of them are learnt: all (None), or the assistant's turns of a
    conversation."""
    tokenizer = encoded.tokenizer
    plain = iter(encoded([d.text for d in documents if d.messages is None]))
    return [
        (next(plain), None) if document.messages is None else encode_chat(tokenizer, document.messages)
        for document in documents
    ]


class DecontaminatedSource(Saved):
    """A source without its held-out documents; `of_target` when it holds the target's documents."""

    SAVED = ("_source",)

    def __init__(
        self, source: DocumentSource, contamination: ContaminationFilter, *, of_target: bool
    ) -> None:
        self.name = source.name
        self._source = source
        self._contamination = contamination
        self._of_target = of_target

    @property
    def epoch(self) -> int:
        return self._source.epoch

    @property
    def skipped(self) -> int:
        return self._source.skipped

    def next_document(self) -> Document | None:
        while (document := self._source.next_document()) is not None:
            if self._contamination.allows(document, of_target=self._of_target):
                return document
        return None

    def fingerprint(self) -> str:
        return self._source.fingerprint()


class SourceReader(Saved):
    """One source's windows in order: its documents, corrupted on request, tokenised and packed.

    Args:
        source: training documents, in endless epochs.
        corruption: how their text and tokens are corrupted, from `seed`.
        length: T, tokens per window.
        position: of the source in the configuration.
        encoder: of the tokenizer, which several readers may share; one of its own when None.
    """

    SAVED = ("source", "_packer", "_pending", "_epoch_tokens")

    def __init__(
        self,
        source: DocumentSource,
        corruption: CorruptionName,
        tokenizer: "transformers.PreTrainedTokenizerBase",
        length: int,
        seed: int,
        position: int = 0,
        encoder: FastEncoder | None = None,
    ) -> None:
        self.source = source
        self.corruption = corruption
        encoder = encoder or FastEncoder(tokenizer)
        # Errors of a scan are new in every epoch.
        self._encoded = Encoded(encoder) if corruption != "ocr" else Encoded(encoder, most_bytes=0)
        self._vocabulary = ordinary_ids(tokenizer)
        self._seed = seed
        self._packer = Packer(source.name, length, document_marks(tokenizer), position)
        self._pending = Rows()
        self._epoch_tokens = 0
        self._told = self._told_of_windows = False

    def next_window(self) -> Window:
        """The next window; CurriqError when a whole epoch had no document to train on."""
        began, untaught = self.source.epoch, self._packer.untaught
        while not self._pending:
            self._read()
            # A whole epoch gave windows, and none to learn from: nor will the next one.
            if not self._pending and self.source.epoch > began + 1 and self._packer.untaught > untaught:
                raise CurriqError(
                    f"source {self.source.name!r} has no window of which a token is learnt: give a longer "
                    "--window, or leave the source out."
                )
        return self._pending.popleft()

    def _read(self) -> None:
        epoch, characters = self.source.epoch, 0
        documents: list[Document] = []
        for document in read_epoch(self.source):
            documents.append(document)
            characters += len(document.text)
            if len(documents) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                break
        noisy = self.corruption not in ("none", "duplicates")
        encoded = self._noisy(documents, epoch) if noisy else encode_documents(self._encoded, documents)
        untaught = sum(learnt is not None and not any(learnt) for _, learnt in encoded)
        if untaught and not self._told:
            self._told = True
            _log.warning(
                f"source {self.source.name!r}: {untaught} of {len(documents)} documents have no assistant's "
                "turn, so nothing is learnt from them: they are left out, as such ones are from now on."
            )
        for document, (ids, learnt) in zip(documents, encoded, strict=True):
            self._epoch_tokens += len(ids) if learnt is None else sum(learnt)
            self._pending.extend(self._packer.add(ids, document.difficulty, learnt, document.number))
        if self._packer.untaught and not self._told_of_windows:
            self._told_of_windows = True
            _log.warning(
                f"source {self.source.name!r}: windows of which no token is learnt, as where a question is "
                f"longer than --window, are left out, {self._packer.untaught} so far."
            )
        if self.source.epoch > epoch:
            self._begin_epoch()

    def _noisy(self, documents: Sequence[Document], epoch: int) -> list[tuple[TokenIds, list[bool] | None]]:
        """The tokens of corrupted copies of documents, and which of them are learnt."""
        rngs = [document_rng(self._seed, self.source.name, document, epoch) for document in documents]
        copies = [self._corrupted(document, rng) for document, rng in zip(documents, rngs, strict=True)]
        return [
            (corrupt_tokens(self.corruption, clean, self._vocabulary, rng), learnt)
            for (clean, learnt), rng in zip(encode_documents(self._encoded, copies), rngs, strict=True)
        ]

    def _corrupted(self, document: Document, rng: np.random.Generator) -> Document:
        if document.messages is None:
            return replace(document, text=corrupt_text(self.corruption, document.text, rng))
        messages = tuple(
            {k: corrupt_text(self.corruption, v, rng) if k == "content" else v for k, v in message.items()}
            for message in document.messages
        )
        return replace(document, messages=messages)

    def _begin_epoch(self) -> None:
        name = self.source.name
        if self._epoch_tokens == 0:
            raise CurriqError(
                f"source {name!r} has no text to train on: it is empty, its conversations have no "
                "assistant's turn, or all of its documents are held out or near-duplicates of held-out ones. "
                "Give it more text, give it weight 0, lower --held-out-share, or raise "
                "--near-duplicate-threshold."
            )
        _log.log(
            logging.DEBUG if self.corruption == "duplicates" else logging.WARNING,
            f"source {name!r} is used up: epoch {self.source.epoch} begins, its training documents "
            f"({self._epoch_tokens} tokens) come again.",
        )
        self._epoch_tokens = 0


class WindowStream:
    """Windows of several sources, mixed by weight and shuffled.

    Args:
        readers: the sources, by position in the configuration; a source of weight 0 needs none.
        weights: relative share of the windows of each source.
        buffer_size: windows in the shuffle buffer; 1 keeps each source's order.
        generator: draws sources and buffer slots.
        fingerprint: what must be equal when a run is resumed, by name.
        labelled: whether any source has difficulty labels.
    """

    def __init__(
        self,
        readers: Mapping[int, SourceReader],
        weights: Sequence[float],
        buffer_size: int,
        generator: torch.Generator,
        fingerprint: Mapping[str, str],
        *,
        labelled: bool = False,
    ) -> None:
        self._readers = readers
        self._cumulative = list(accumulate(weights))
        self.buffer_size = buffer_size
        self._generator = generator
        self.fingerprint = dict(fingerprint)
        self._labelled = labelled
        self._buffer = Rows()

    def read(self, n: int) -> Offer:
        """The next n windows; CurriqError when a source has nothing to train on."""
        windows = batch([self._next() for _ in range(n)], labelled=self._labelled)
        return Offer.of(windows, cost=Cost(windows_read=n), epoch=self.epoch)

    @property
    def epoch(self) -> int:
        """Times that the most often repeated source has run out, sources of duplicates aside."""
        once = [reader for reader in self._readers.values() if reader.corruption != "duplicates"]
        return max((reader.source.epoch for reader in once), default=0)

    @property
    def skipped(self) -> dict[str, int]:
        """Rows left out of each source that has left out any, by its name."""
        sources = [reader.source for reader in self._readers.values()]
        return {source.name: source.skipped for source in sources if source.skipped}

    def state_dict(self) -> State:
        return {
            "fingerprint": self.fingerprint,
            "readers": {str(i): reader.state_dict() for i, reader in self._readers.items()},
            "buffer": self._buffer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue exactly where the state was taken; CurriqError when it is of a stream of other data."""
        check_fingerprint(state["fingerprint"], self.fingerprint)
        for i, reader in self._readers.items():
            reader.load_state_dict(state["readers"][str(i)])
        self._buffer.load_state_dict(state["buffer"])
        self._generator.set_state(state["generator"])

    def _next(self) -> Window:
        while len(self._buffer) < self.buffer_size:
            source = bisect.bisect_right(self._cumulative, self._uniform() * self._cumulative[-1])
            self._buffer.append(self._readers[source].next_window())
        slot = math.floor(self._uniform() * len(self._buffer))
        self._buffer[slot], self._buffer[-1] = self._buffer[-1], self._buffer[slot]
        return self._buffer.pop()

    def _uniform(self) -> float:
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()


class Unreadable(Saved):
    """A stream that takes windows back: what is unread is read before everything else, as it was.

    Args:
        look_ahead: windows that are read at once at the beginning, and unread, for a stream that compares
            windows with those before them.
    """

    def __init__(self, stream: WindowSource, *, look_ahead: int = 0) -> None:
        self._stream = stream
        self._look_ahead = look_ahead
        self._unread: Offer | None = None

    @property
    def inner(self) -> WindowSource:
        """The stream itself."""
        return self._stream

    def read(self, n: int) -> Offer:
        """At most n windows: those that were unread, or else the stream's. What looking ahead took is in the
        cost of the first ones."""
        spent = NO_COST
        if self._look_ahead:
            ahead, self._look_ahead = self._stream.read(self._look_ahead), 0
            self.unread(ahead)
            spent = replace(ahead.cost, windows_read=0)
        offer, self._unread = self._unread, None
        if offer is None:
            return self._stream.read(n)
        self.unread(offer.take(slice(n, None)))
        first = offer.take(slice(n))
        return replace(first, cost=replace(spent, windows_read=len(first)))

    def unread(self, offer: Offer) -> None:
        parts = [part for part in (offer, self._unread) if part is not None and len(part)]
        self._unread = Offer.cat(parts) if parts else None

    def drop_unread(self) -> None:
        """Lose what was unread: what comes next is the stream's own."""
        self._unread = None

    def state_dict(self) -> State:
        unread = None if self._unread is None else self._unread.state_dict()
        return {"stream": self._stream.state_dict(), "look_ahead": self._look_ahead, "unread": unread}

    def load_state_dict(self, state: State) -> None:
        self._stream.load_state_dict(state["stream"])
        self._look_ahead = state["look_ahead"]
        self._unread = None if state["unread"] is None else Offer.from_state_dict(state["unread"])


def check_fingerprint(
    saved: Mapping[str, str], current: Mapping[str, str], changed: Sequence[str] = ()
) -> None:
    """Refuse to resume on other data, with a CurriqError that names every entry that differs, after what has
    `changed` in single files."""
    differing = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
    if differing or changed:
        entries = (
            f"{name} was {saved.get(name, 'absent')}, is {current.get(name, 'absent')}" for name in differing
        )
        changes = "; ".join((*changed, *entries))
        raise CurriqError(
            f"the run cannot be resumed on other data: {changes}. Restore what it was trained on "
            "(files, --sources, tokenizer and settings), or start a new run in a new --run-dir."
        )
