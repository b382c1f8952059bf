"""Documents' tokens → fixed windows of T tokens, with an EOS token after every document.

A source's documents are laid end to end and cut every T tokens, so no token is lost or padded and a
window may hold the end of one document and the beginning of the next. A window comes from one source.

Characters per window are not kept: a window begins and ends inside words, so counting them means
decoding, and only the competence baseline by length asks for them. It decodes what it is offered.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from curriq.types import State


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
