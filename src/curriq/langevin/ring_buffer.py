"""The ring buffer of Algorithm 2: I real windows, their embeddings, and the index that searches them.

A new window overwrites the oldest row in place, in the table and in the index. Nothing is rebuilt.
"""

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curriq.config import missing_extra
from curriq.state import State
from curriq.types import Windows

Hits = tuple[Float[np.ndarray, "m k"], Int[np.ndarray, "m k"]]
"""Scores and numbers of each query's k best rows, best first."""


@runtime_checkable
class VectorIndex(Protocol):
    """Search by inner product over numbered rows."""

    def write(self, slots: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n e"]) -> None:
        """Overwrite rows, or add them: a new row's number is the number of rows before it."""
        ...

    def search(self, queries: Float[np.ndarray, "m e"], k: int) -> Hits:
        """The k best rows of each query; k is at most the number of rows."""
        ...


class TorchIndex:
    """A matrix product and top-k over at most `capacity` rows, which lie on the device."""

    def __init__(self, capacity: int, device: torch.device | str = "cpu") -> None:
        self._capacity = capacity
        self._device = device
        self._rows = torch.empty(0)
        self._count = 0

    def write(self, slots: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n e"]) -> None:
        if not self._count:
            self._rows = torch.zeros(self._capacity, vectors.shape[1], device=self._device)
        self._rows[torch.from_numpy(slots)] = torch.from_numpy(vectors).to(self._device)
        self._count = max(self._count, int(slots.max()) + 1)

    def search(self, queries: Float[np.ndarray, "m e"], k: int) -> Hits:
        products = torch.from_numpy(queries).to(self._device) @ self._rows[: self._count].T
        scores, slots = products.topk(k, dim=1)
        return scores.cpu().numpy(), slots.cpu().numpy()


class FaissIndex:
    """FAISS IndexFlatIP whose rows are overwritten through the memory that it searches.

    Raises:
        CurriqError: FAISS is not installed.
    """

    def __init__(self) -> None:
        try:
            import faiss
        except ImportError as error:
            instead = "use --index torch, which finds the same windows"
            raise missing_extra("--index faiss", f"faiss-cpu ({error})", "rag", instead) from None
        self._faiss: Any = faiss
        self._index: Any = None
        # The default sends a few queries against many rows down a path that is several times slower.
        self._faiss.cvar.distance_compute_blas_threshold = 20

    def write(self, slots: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n e"]) -> None:
        if self._index is None:
            self._index = self._faiss.IndexFlatIP(vectors.shape[1])
        new = slots >= self._index.ntotal
        if not new.all():
            self._memory()[slots[~new]] = vectors[~new]
        if new.any():
            assert (slots[new] == self._index.ntotal + np.arange(new.sum())).all(), "rows are added in order"
            self._index.add(np.ascontiguousarray(vectors[new]))

    def search(self, queries: Float[np.ndarray, "m e"], k: int) -> Hits:
        return self._index.search(np.ascontiguousarray(queries), k)

    def _memory(self) -> Float[np.ndarray, "n e"]:
        """The rows themselves, looked up each time because `add` moves them."""
        count, width = self._index.ntotal, self._index.d
        return self._faiss.rev_swig_ptr(self._index.get_xb(), count * width).reshape(count, width)


class RingBuffer:
    """At most `capacity` windows (I) and their embeddings by slot. The write head goes round.

    A used window keeps its slot until the head comes by, but no search finds it.
    """

    def __init__(self, capacity: int, index: VectorIndex) -> None:
        self.capacity = capacity
        self._index = index
        self._head = 0
        self._count = 0
        self._table: dict[str, Tensor] = {}

    def __len__(self) -> int:
        """Slots that hold a window, live or used."""
        return self._count

    @property
    def live(self) -> Bool[Tensor, "n"]:
        """Which slots a search may find."""
        return self._table["live"][: len(self)]

    def write(self, windows: Windows, vectors: Float[np.ndarray, "n e"], step: int) -> None:
        """Put the windows of a step, at most I, with their embeddings into free slots or over the oldest."""
        count = len(windows)
        assert 0 < count <= self.capacity
        nan = torch.full((count,), math.nan)
        rows = {
            "tokens": windows.tokens.int(),
            "window_ids": windows.ids,
            "source": windows.source,
            "difficulty": nan if windows.difficulty is None else windows.difficulty,
            "step": torch.full((count,), step),
            "live": torch.ones(count, dtype=torch.bool),
            "vectors": torch.from_numpy(vectors),
        }
        if not self._table:
            self._allocate(rows)
        if windows.labels is not None and "labels" not in self._table:
            self._table["labels"] = self._table["tokens"].clone()
        if "labels" in self._table:
            rows["labels"] = (windows.tokens if windows.labels is None else windows.labels).int()
        slots = (self._head + torch.arange(count)) % self.capacity
        for name, column in rows.items():
            self._table[name][slots] = column
        order = np.argsort(slots.numpy())  # slots that wrap round: the index adds rows in order
        self._index.write(slots.numpy()[order], vectors[order])
        self._head = (self._head + count) % self.capacity
        self._count = min(self._count + count, self.capacity)

    def reembed(self, slots: Int[Tensor, "n"], vectors: Float[np.ndarray, "n e"]) -> None:
        """Overwrite the embeddings of live slots, each slot once."""
        assert self.live[slots].all()
        self._table["vectors"][slots] = torch.from_numpy(vectors)
        self._index.write(slots.numpy(), vectors)

    def mark_used(self, window_ids: Int[Tensor, "n"]) -> None:
        """No search finds these windows again, nor copies of them that the buffer holds now."""
        slots = self._slots_of(window_ids)
        if not len(slots):
            return
        self.live[slots] = False
        # A row of zeros has the score 0, below that of almost any window, so that searches rarely meet it.
        self._index.write(slots.numpy(), np.zeros((len(slots), self._table["vectors"].shape[1]), np.float32))

    def search(
        self, queries: Float[np.ndarray, "m e"], k: int
    ) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """Scores and slots of the k live windows of greatest inner product with each query, best first.

        Where there are fewer than k, the rest has the slot −1 and the score −∞. Exact: as long as used rows
        among the hits leave a query short, more are asked for.
        """
        asked = min(k, len(self))
        enough = min(k, int(self.live.sum()))
        while True:
            found, rows = (torch.from_numpy(part) for part in self._index.search(queries, asked))
            alive = self.live[rows]
            if (alive.sum(1) >= enough).all():
                break
            asked = min(2 * asked, len(self))
        order = (~alive).int().argsort(dim=1, stable=True)[:, :enough]
        scores = torch.full((len(queries), k), -torch.inf)
        slots = torch.full((len(queries), k), -1)
        scores[:, :enough] = found.gather(1, order)
        slots[:, :enough] = rows.gather(1, order)
        return scores, slots

    def take(self, slots: Int[Tensor, "n"]) -> Windows:
        """The windows of these slots."""
        table = self._table
        unlabelled = table["difficulty"][: len(self)].isnan().all()
        return Windows(
            tokens=table["tokens"][slots].long(),
            ids=table["window_ids"][slots],
            source=table["source"][slots],
            difficulty=None if unlabelled else table["difficulty"][slots],
            labels=table["labels"][slots].long() if "labels" in table else None,
        )

    def window_ids(self, slots: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        return self._table["window_ids"][slots]

    def written_at(self, slots: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """Step in which each window came."""
        return self._table["step"][slots]

    def vectors(self, slots: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch e"]:
        """Embeddings as they were last written."""
        return self._table["vectors"][slots]

    def centre(self) -> Float[np.ndarray, "e"]:
        """Mean embedding of the live windows."""
        return self.vectors(self.live.nonzero().flatten()).mean(0).numpy()

    def vectors_of(self, window_ids: Int[Tensor, "n"]) -> dict[int, np.ndarray]:
        """Embeddings [e] of those windows that the buffer holds, live or used, by their ids."""
        if not len(self):
            return {}
        slots = self._slots_of(window_ids)
        slots = slots[
            ((slots - self._head) % self.capacity).argsort()
        ]  # the newest copy's is the one that stays
        return dict(zip(self.window_ids(slots).tolist(), self.vectors(slots).numpy(), strict=True))

    def state_dict(self) -> State:
        table = {name: column[: len(self)].clone() for name, column in self._table.items()}
        return {"head": self._head, "table": table}

    def load_state_dict(self, state: State) -> None:
        table = state["table"]
        if not table:
            return
        count = len(table["window_ids"])
        assert count <= self.capacity, "the state comes from a greater buffer"
        self._allocate(table)
        for name, column in table.items():
            self._table[name][:count] = column
        self._head, self._count = state["head"], count
        searched = torch.where(table["live"][:, None], table["vectors"], 0.0)
        self._index.write(np.arange(count), searched.numpy())

    def _slots_of(self, window_ids: Int[Tensor, "n"]) -> Int[Tensor, "m"]:
        """Slots that hold one of these windows."""
        return torch.isin(self._table["window_ids"][: len(self)], window_ids).nonzero().flatten()

    def _allocate(self, columns: dict[str, Tensor]) -> None:
        self._table = {
            name: column.new_zeros(self.capacity, *column.shape[1:]) for name, column in columns.items()
        }
