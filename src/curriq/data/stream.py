"""NEXTBATCH of Algorithm 1: an endless, mixed, shuffled and exactly resumable stream of windows.

Every window's source is drawn by weight, the source's next window goes into a shuffle buffer, and a
uniformly random element of the buffer comes out. The draws are made window by window, so the sequence of
windows does not depend on how it is cut into batches, and two arms with one seed see the same windows.
"""

import bisect
import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch

from curriq.config import CorruptionName
from curriq.data.contamination import ContaminationFilter
from curriq.data.corruption import corrupt_text, corrupt_tokens, document_rng
from curriq.data.documents import Document, DocumentSource
from curriq.data.tokenizer import encode, eos_id, ordinary_ids
from curriq.errors import CurriqError
from curriq.types import Candidates, State, Stateful

if TYPE_CHECKING:
    import transformers


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """T consecutive tokens of one source.

    Attributes:
        tokens: token ids, int32, length T; read-only.
        window_id: `window_id` of the tokens.
        difficulty: mean label over the tokens that have one, NaN when none has.
    """

    tokens: np.ndarray
    window_id: int
    difficulty: float


def window_id(source: str, tokens: np.ndarray) -> int:
    """63-bit identity of a window: the first 8 bytes of BLAKE2b over the source's name and the tokens
    (little-endian int32). Equal windows of one source have equal ids in every run and for every seed."""
    digest = hashlib.blake2b(source.encode() + b"\0", digest_size=8)
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").data)
    return int.from_bytes(digest.digest(), "big") >> 1


class Packer:
    """Cuts one source's documents into windows; the tokens left over wait for the next document.

    Args:
        source: name of the source, part of every window id.
        length: T, tokens per window.
        eos: id of the token that ends every document.
    """

    def __init__(self, source: str, length: int, eos: int) -> None:
        self.source = source
        self.length = length
        self.eos = eos
        self._tokens = np.empty(0, np.int32)
        self._labels = np.empty(0, np.float64)

    def add(self, tokens: Sequence[int] | np.ndarray, difficulty: float = math.nan) -> list[Window]:
        """The windows that this document completes; an empty document is skipped, EOS and all."""
        if len(tokens) == 0:
            return []
        ended = np.append(np.asarray(tokens, np.int32), np.int32(self.eos))
        self._tokens = np.concatenate([self._tokens, ended])
        self._labels = np.concatenate([self._labels, np.full(len(ended), difficulty)])
        count, length = len(self._tokens) // self.length, self.length
        windows = [self._window(slice(start, start + length)) for start in range(0, count * length, length)]
        self._tokens = self._tokens[count * length :].copy()
        self._labels = self._labels[count * length :].copy()
        return windows

    def _window(self, where: slice) -> Window:
        tokens, labels = self._tokens[where].copy(), self._labels[where]
        tokens.flags.writeable = False
        known = labels[~np.isnan(labels)]
        difficulty = float(known.mean()) if len(known) else math.nan
        return Window(tokens, window_id(self.source, tokens), difficulty)

    def state_dict(self) -> State:
        return {
            "tokens": torch.from_numpy(self._tokens.copy()),
            "labels": torch.from_numpy(self._labels.copy()),
        }

    def load_state_dict(self, state: State) -> None:
        self._tokens = state["tokens"].numpy().copy()
        self._labels = state["labels"].numpy().copy()


def windows_to_state(windows: Iterable[Window], length: int) -> State:
    """A list of windows as three tensors, for a checkpoint."""
    windows = list(windows)
    tokens = np.stack([w.tokens for w in windows]) if windows else np.empty((0, length), np.int32)
    return {
        "tokens": torch.from_numpy(tokens),
        "ids": torch.tensor([w.window_id for w in windows], dtype=torch.int64),
        "difficulty": torch.tensor([w.difficulty for w in windows], dtype=torch.float64),
    }


def windows_from_state(state: State) -> list[Window]:
    """Inverse of `windows_to_state`."""
    rows = zip(
        state["tokens"].numpy().copy(), state["ids"].tolist(), state["difficulty"].tolist(), strict=True
    )
    return [Window(*row) for row in rows]


_log = logging.getLogger("curriq")

_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 200_000
"""A source is read until either is reached: the tokenizer is fast on many texts at once, and what is read
ahead is part of every checkpoint."""


class DecontaminatedSource:
    """A source without its held-out documents.

    Args:
        source: all documents.
        guard: refuses the held-out ones.
        of_target: the source holds the target's documents.
    """

    def __init__(self, source: DocumentSource, guard: ContaminationFilter, *, of_target: bool) -> None:
        self.name = source.name
        self._source = source
        self._guard = guard
        self._of_target = of_target

    @property
    def epoch(self) -> int:
        return self._source.epoch

    def next_document(self) -> Document | None:
        while (document := self._source.next_document()) is not None:
            if self._guard.allows(document, of_target=self._of_target):
                return document
        return None

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def state_dict(self) -> State:
        return self._source.state_dict()

    def load_state_dict(self, state: State) -> None:
        self._source.load_state_dict(state)


class SourceReader:
    """One source's windows in order: its documents, spoiled if they are to be, tokenised and packed.

    Args:
        source: training documents, in endless epochs.
        corruption: how their text and tokens are spoiled.
        tokenizer: turns them into tokens.
        length: T, tokens per window.
        seed: seed of the corruption.
    """

    def __init__(
        self,
        source: DocumentSource,
        corruption: CorruptionName,
        tokenizer: "transformers.PreTrainedTokenizerBase",
        length: int,
        seed: int,
    ) -> None:
        self.source = source
        self.corruption = corruption
        self.length = length
        self._tokenizer = tokenizer
        self._vocabulary = ordinary_ids(tokenizer)
        self._seed = seed
        self._packer = Packer(source.name, length, eos_id(tokenizer))
        self._pending: deque[Window] = deque()
        self._epoch_tokens = 0

    def next_window(self) -> Window:
        """The next window.

        Raises:
            CurriqError: a whole epoch had no document to train on.
        """
        while not self._pending:
            self._read()
        return self._pending.popleft()

    def _read(self) -> None:
        epoch = self.source.epoch
        documents, ended = self._next_documents()
        rngs = [document_rng(self._seed, self.source.name, document, epoch) for document in documents]
        texts = [corrupt_text(self.corruption, d.text, rng) for d, rng in zip(documents, rngs, strict=True)]
        for document, clean, rng in zip(documents, encode(self._tokenizer, texts), rngs, strict=True):
            ids = corrupt_tokens(self.corruption, clean, self._vocabulary, rng)
            self._epoch_tokens += len(ids)
            self._pending.extend(self._packer.add(ids, document.difficulty))
        if ended:
            self._begin_epoch()

    def _next_documents(self) -> tuple[list[Document], bool]:
        """Some documents of one epoch, and whether it ended after them."""
        documents: list[Document] = []
        characters = 0
        while len(documents) < _BATCH_DOCUMENTS and characters < _BATCH_CHARACTERS:
            document = self.source.next_document()
            if document is None:
                return documents, True
            documents.append(document)
            characters += len(document.text)
        return documents, False

    def _begin_epoch(self) -> None:
        name = self.source.name
        if self._epoch_tokens == 0:
            raise CurriqError(
                f"source {name!r} has no text to train on: it is empty, or all of its documents are held "
                "out or near-duplicates of held-out ones. Give it more text, give it weight 0, lower "
                "--held-out-share, or raise --near-duplicate-threshold."
            )
        _log.log(
            logging.DEBUG if self.repeats_on_purpose else logging.WARNING,
            "source %r is used up: epoch %d begins, its training documents (%d tokens) come again.",
            name,
            self.source.epoch,
            self._epoch_tokens,
        )
        self._epoch_tokens = 0

    @property
    def repeats_on_purpose(self) -> bool:
        """Whether new epochs of this source are no news."""
        return self.corruption == "duplicates"

    def state_dict(self) -> State:
        return {
            "source": self.source.state_dict(),
            "packer": self._packer.state_dict(),
            "pending": windows_to_state(self._pending, self.length),
            "epoch_tokens": self._epoch_tokens,
        }

    def load_state_dict(self, state: State) -> None:
        self.source.load_state_dict(state["source"])
        self._packer.load_state_dict(state["packer"])
        self._pending = deque(windows_from_state(state["pending"]))
        self._epoch_tokens = state["epoch_tokens"]


@dataclass(frozen=True, kw_only=True)
class SourceMix:
    """The sources of a stream, in the order of the configuration.

    Attributes:
        readers: by position in the configuration; a source of weight 0 needs none.
        weights: relative share of the windows of each source.
        labelled: whether any source has difficulty labels.
    """

    readers: Mapping[int, SourceReader]
    weights: Sequence[float]
    labelled: bool = False


@runtime_checkable
class Windows(Stateful, Protocol):
    """Something to read windows from, one after another."""

    def next_batch(self, n: int) -> Candidates: ...


class WindowStream:
    """Windows of several sources, mixed by weight and shuffled.

    Args:
        mix: the sources.
        buffer_size: windows in the shuffle buffer; 1 keeps each source's order.
        generator: draws sources and buffer slots.
        fingerprint: what must be equal when a run is resumed, by name.
    """

    def __init__(
        self, mix: SourceMix, buffer_size: int, generator: torch.Generator, fingerprint: Mapping[str, str]
    ) -> None:
        self._mix = mix
        self._cumulative = list(accumulate(mix.weights))
        self._buffer_size = buffer_size
        self._generator = generator
        self._fingerprint = dict(fingerprint)
        self._buffer: list[tuple[int, Window]] = []
        self._ready: deque[tuple[int, Window]] = deque()  # put back

    def next_batch(self, n: int) -> Candidates:
        """The next n windows.

        Raises:
            CurriqError: a source has nothing to train on.
        """
        batch = [self._next() for _ in range(n)]
        windows = [window for _, window in batch]
        labels = torch.tensor([window.difficulty for window in windows], dtype=torch.float32)
        return Candidates(
            tokens=torch.from_numpy(np.stack([window.tokens for window in windows]).astype(np.int64)),
            window_ids=torch.tensor([window.window_id for window in windows], dtype=torch.int64),
            source=torch.tensor([source for source, _ in batch], dtype=torch.int64),
            difficulty=labels if self._mix.labelled else None,
            rows=torch.arange(n),
            metrics={"data/epoch": float(self.epoch), "data/windows_read": float(n)},
        )

    def put_back(self, windows: Candidates) -> None:
        """Hand these, which have been read, out again before all others."""
        labels = torch.full((len(windows),), math.nan) if windows.difficulty is None else windows.difficulty
        columns = {"tokens": windows.tokens.int(), "ids": windows.window_ids, "difficulty": labels.double()}
        self._ready.extendleft(reversed(_from_state(columns | {"source": windows.source})))

    @property
    def epoch(self) -> int:
        """Times that the most often repeated source has run out, sources of duplicates aside."""
        readers = self._mix.readers.values()
        return max((reader.source.epoch for reader in readers if not reader.repeats_on_purpose), default=0)

    def fingerprint(self) -> dict[str, str]:
        """What must be equal when a run is resumed, by name."""
        return dict(self._fingerprint)

    def state_dict(self) -> State:
        return {
            "fingerprint": self.fingerprint(),
            "readers": {str(i): reader.state_dict() for i, reader in self._mix.readers.items()},
            "buffer": _to_state(self._buffer, self._length),
            "ready": _to_state(self._ready, self._length),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue exactly where the state was taken.

        Raises:
            CurriqError: the state is of a stream of other data.
        """
        check_fingerprint(state["fingerprint"], self._fingerprint)
        for i, reader in self._mix.readers.items():
            reader.load_state_dict(state["readers"][str(i)])
        self._buffer = _from_state(state["buffer"])
        self._ready = deque(_from_state(state["ready"]) if "ready" in state else ())
        self._generator.set_state(state["generator"])

    def _next(self) -> tuple[int, Window]:
        if self._ready:
            return self._ready.popleft()
        while len(self._buffer) < self._buffer_size:
            source = bisect.bisect_right(self._cumulative, self._uniform() * self._cumulative[-1])
            self._buffer.append((source, self._mix.readers[source].next_window()))
        slot = math.floor(self._uniform() * len(self._buffer))
        self._buffer[slot], self._buffer[-1] = self._buffer[-1], self._buffer[slot]
        return self._buffer.pop()

    def _uniform(self) -> float:
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    @property
    def _length(self) -> int:
        return next(iter(self._mix.readers.values())).length


def _to_state(windows: Iterable[tuple[int, Window]], length: int) -> State:
    windows = list(windows)
    state = windows_to_state([window for _, window in windows], length)
    return state | {"source": torch.tensor([source for source, _ in windows], dtype=torch.int64)}


def _from_state(state: State) -> list[tuple[int, Window]]:
    return list(zip(state["source"].tolist(), windows_from_state(state), strict=True))


def check_fingerprint(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Refuse to resume on other data.

    Raises:
        CurriqError: names every entry that differs, and the way out.
    """
    differing = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
    if differing:
        changes = "; ".join(
            f"{name} was {saved.get(name, 'absent')}, is {current.get(name, 'absent')}" for name in differing
        )
        raise CurriqError(
            f"the run cannot be resumed on other data: {changes}. Restore what it was trained on "
            "(files, --sources, tokenizer and settings), or start a new run in a new --run-dir."
        )


class StreamProposer:
    """C_k = NEXTBATCH (Algorithm 1, line 3).

    Args:
        stream: where the windows come from.
        n: N, windows per step.
    """

    def __init__(self, stream: Windows, n: int) -> None:
        self.stream = stream
        self.n = n

    def propose(self, step: int) -> Candidates:
        began = time.perf_counter()
        candidates = self.stream.next_batch(self.n)
        seconds = time.perf_counter() - began
        return replace(candidates, metrics=candidates.metrics | {"time/propose": seconds})

    def state_dict(self) -> State:
        return self.stream.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.stream.load_state_dict(state)
