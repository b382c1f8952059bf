"""Reads the tokens that a run kept of its windows: their text, and what can be measured on them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curriq.errors import CurriqError
from curriq.runlog.read import read_part

if TYPE_CHECKING:
    import tokenizers

SAMPLED = 8_000
"""Windows that averages over windows are taken from; a greater number changes no picture."""
NGRAM = 4


@dataclass(frozen=True)
class KeptWindows:
    """Windows by ascending id.

    Attributes:
        ids: window ids.
        tokens: [windows, T].
        tokenizer: turns them into text; None when the run has no fast tokenizer.
    """

    ids: np.ndarray
    tokens: np.ndarray
    tokenizer: "tokenizers.Tokenizer | None"

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Position of each id, −1 where the window was not kept."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        where = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return np.where(self.ids[where] == ids, where, -1)

    def texts(self, positions: np.ndarray, *, special: bool = True) -> list[str]:
        """The text of some windows, with the names of special tokens or without; empty strings without a
        tokenizer."""
        if self.tokenizer is None:
            return [""] * len(positions)
        return self.tokenizer.decode_batch(self.tokens[positions].tolist(), skip_special_tokens=not special)

    @cached_property
    def sample(self) -> np.ndarray:
        """Positions of at most `SAMPLED` windows, drawn evenly (an id is a hash)."""
        return np.linspace(0, len(self) - 1, min(len(self), SAMPLED)).round().astype(np.int64)

    def measures(self) -> dict[str, np.ndarray]:
        """Per window of `sample`: difficulty, length and repetition.

        - difficulty: mean negative log relative frequency of the tokens among the sampled windows, nats
          per token (as in the competence baseline by rarity).
        - length: characters of the window's text.
        - repetition: share of its 4-grams of tokens that occurred earlier in the window.
        """
        tokens = self.tokens[self.sample]
        counts = np.bincount(tokens.ravel())
        with np.errstate(divide="ignore"):
            rarity = -np.log(counts / max(1, counts.sum()))
        measured = {"difficulty": rarity[tokens].mean(axis=1), "repetition": repetition(tokens)}
        if self.tokenizer is not None:
            measured["length"] = self._characters(len(counts))[tokens].sum(axis=1).astype(float)
        return measured

    def _characters(self, vocabulary: int) -> np.ndarray:
        assert self.tokenizer is not None
        pieces = self.tokenizer.decode_batch([[i] for i in range(vocabulary)], skip_special_tokens=False)
        return np.array([len(piece) for piece in pieces])


def repetition(tokens: np.ndarray) -> np.ndarray:
    """Share of each row's n-grams that occurred earlier in the row: 0 for no repeat, near 1 for one token
    over and over."""
    if tokens.shape[1] < NGRAM:
        return np.zeros(len(tokens))
    grams = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), NGRAM, axis=1)
    mixed = np.zeros(grams.shape[:2], np.uint64)
    for position in range(NGRAM):  # a polynomial hash modulo 2^64; tokens + 1 so that id 0 counts
        mixed = mixed * np.uint64(1_000_003) + grams[:, :, position] + np.uint64(1)
    ordered = np.sort(mixed, axis=1)
    distinct = 1 + (np.diff(ordered, axis=1) != 0).sum(axis=1)
    return 1 - distinct / grams.shape[1]


def read_windows(run_dir: str | Path) -> KeptWindows:
    """All windows that the run kept; none when it kept none.

    Raises:
        CurriqError: a part or the tokenizer is damaged.
    """
    folder = Path(run_dir) / "windows"
    ids, tokens = [], []
    for path in sorted(folder.glob("part-*.parquet")):
        table = read_part(path, ["window_id", "tokens"])
        length = table.schema.field("tokens").type.list_size
        ids.append(table["window_id"].to_numpy())
        flat = table["tokens"].combine_chunks().flatten().to_numpy()
        tokens.append(flat.reshape(-1, length))
    if not ids:
        return KeptWindows(np.empty(0, np.int64), np.empty((0, 0), np.int32), None)
    all_ids = np.concatenate(ids)
    order = np.argsort(all_ids)
    return KeptWindows(all_ids[order], np.concatenate(tokens)[order], _tokenizer(folder / "tokenizer.json"))


def _tokenizer(path: Path) -> Any:
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise CurriqError(
            f"{path} is damaged ({error}): copy tokenizer.json from a checkpoint's lm folder."
        ) from None
