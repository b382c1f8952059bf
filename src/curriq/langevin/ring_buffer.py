"""The ring buffer of Algorithm 2: I real windows, their text and their embeddings, and who searches them.

A fresh window overwrites the oldest row in place: the row of the table, and the row of the index. Nothing
is rebuilt; `RebuiltFaissIndex` is the reference that does.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curriq.config import missing_extra
from curriq.state import State
from curriq.types import Windows


@runtime_checkable
class VectorIndex(Protocol):
    """Search by inner product over numbered rows."""

    def write(self, slots: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n e"]) -> None:
        """Overwrite rows, or add them: a new row's number is the number of rows before it."""
        ...

    def search(
        self, queries: Float[np.ndarray, "m e"], k: int
    ) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, "m k"]]:
        """Scores and numbers of each query's k best rows, best first; k is at most the number of rows."""
        ...


class TorchIndex:
    """A matrix product and top-k.

    Args:
        capacity: rows at most.
        device: where the rows lie.
    """

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

    def search(
        self, queries: Float[np.ndarray, "m e"], k: int
    ) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, "m k"]]:
        products = torch.from_numpy(queries).to(self._device) @ self._rows[: self._count].T
        scores, slots = products.topk(k, dim=1)
        return scores.cpu().numpy(), slots.cpu().numpy()


class FaissIndex:
    """FAISS IndexFlatIP whose rows are overwritten through the memory that it searches.

    Raises:
        CurriqError: FAISS is not installed.
    """

    def __init__(self) -> None:
        self._faiss = import_faiss()
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

    def search(
        self, queries: Float[np.ndarray, "m e"], k: int
    ) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, "m k"]]:
        return self._index.search(np.ascontiguousarray(queries), k)

    def _memory(self) -> Float[np.ndarray, "n e"]:
        """The rows themselves; fetched anew each time, because `add` moves them."""
        count, width = self._index.ntotal, self._index.d
        return self._faiss.rev_swig_ptr(self._index.get_xb(), count * width).reshape(count, width)


class RebuiltFaissIndex:
    """The reference: every write builds the whole index anew."""

    def __init__(self) -> None:
        self._faiss = import_faiss()
        self._vectors: np.ndarray | None = None
        self._index: Any = None

    def write(self, slots: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n e"]) -> None:
        before = np.zeros((0, vectors.shape[1]), np.float32) if self._vectors is None else self._vectors
        size = max(len(before), int(slots.max()) + 1)
        self._vectors = np.concatenate([before, np.zeros((size - len(before), vectors.shape[1]), np.float32)])
        self._vectors[slots] = vectors
        self._index = self._index or self._faiss.IndexFlatIP(vectors.shape[1])
        self._index.reset()
        self._index.add(self._vectors)

    def search(
        self, queries: Float[np.ndarray, "m e"], k: int
    ) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, "m k"]]:
        return self._index.search(np.ascontiguousarray(queries), k)


def import_faiss() -> Any:
    """The module faiss.

    Raises:
        CurriqError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise missing_extra(
            "--index faiss", f"faiss-cpu ({error})", "rag", "use --index torch, which finds the same windows"
        ) from None
    return faiss


class RingBuffer:
    """I windows: tokens, ids, sources, text and embeddings by slot. The write head goes round.

    A window that has been used is retired: its slot stays in its place until the head comes by, but no
    search finds it.

    Args:
        capacity: I.
        index: searches the embeddings.
    """

    def __init__(self, capacity: int, index: VectorIndex) -> None:
        self.capacity = capacity
        self._index = index
        self._head = 0
        self._table: dict[str, Tensor] = {}
        self._texts: list[str] = []
        self._slot_of: dict[int, int] = {}

    def __len__(self) -> int:
        """Slots that hold a window, live or retired."""
        return len(self._texts)

    @property
    def live(self) -> Bool[Tensor, "n"]:
        """Which slots a search may find."""
        return self._table["live"][: len(self)]

    def write(
        self, windows: Windows, texts: Sequence[str], vectors: Float[np.ndarray, "n e"], step: int
    ) -> None:
        """Overwrite the oldest slots, or fill free ones, with fresh windows; at most I of them.

        Args:
            windows: the fresh windows.
            texts: their text.
            vectors: their unit embeddings.
            step: when.
        """
        count = len(windows)
        assert 0 < count <= self.capacity
        if not self._table:
            self._allocate(windows.tokens.shape[1], vectors.shape[1])
        if windows.labels is not None and "labels" not in self._table:
            self._table["labels"] = self._table["tokens"].clone()
        slots = (self._head + torch.arange(count)) % self.capacity
        table = self._table
        for slot, old in zip(slots.tolist(), table["window_ids"][slots].tolist(), strict=True):
            if slot < len(self) and self._slot_of.get(old) == slot:
                del self._slot_of[old]
        table["tokens"][slots] = windows.tokens.int()
        if "labels" in table:
            table["labels"][slots] = (windows.tokens if windows.labels is None else windows.labels).int()
        table["window_ids"][slots] = windows.ids
        table["source"][slots] = windows.source
        nan = torch.full((count,), math.nan)
        table["difficulty"][slots] = nan if windows.difficulty is None else windows.difficulty
        table["step"][slots] = step
        table["live"][slots] = True
        table["vectors"][slots] = torch.from_numpy(vectors)
        for slot, window, text in zip(slots.tolist(), windows.ids.tolist(), texts, strict=True):
            self._texts[slot : slot + 1] = [text]
            self._slot_of[window] = slot
        order = np.argsort(slots.numpy())  # slots that wrap round: the index adds rows in order
        self._index.write(slots.numpy()[order], vectors[order])
        self._head = (self._head + count) % self.capacity

    def reembed(self, slots: Int[Tensor, "n"], vectors: Float[np.ndarray, "n e"]) -> None:
        """Overwrite the embeddings of live slots, each slot once."""
        assert self.live[slots].all()
        self._table["vectors"][slots] = torch.from_numpy(vectors)
        self._index.write(slots.numpy(), vectors)

    def mark_used(self, window_ids: Int[Tensor, "n"]) -> None:
        """No search finds these windows again, nor copies of them that the buffer holds now."""
        used = torch.isin(self._table["window_ids"][: len(self)], window_ids)
        slots = used.nonzero().flatten()
        if not len(slots):
            return
        self.live[slots] = False
        # A row of zeros has the score 0, below that of almost any window, so that searches rarely meet it.
        self._index.write(slots.numpy(), np.zeros((len(slots), self._table["vectors"].shape[1]), np.float32))

    def search(
        self, queries: Float[np.ndarray, "m e"], k: int
    ) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
        """The k live windows of the greatest inner product with each query, best first.

        Where there are fewer than k, the rest has the slot −1 and the score −∞. Exact: as long as
        retired rows among the hits leave a query short, more are asked for.
        """
        asked = min(k, len(self))
        enough = min(k, int(self.live.sum()))
        while True:
            found, slots = (torch.from_numpy(part) for part in self._index.search(queries, asked))
            alive = self.live[slots]
            if (alive.sum(1) >= enough).all():
                break
            asked = min(2 * asked, len(self))
        order = (~alive).int().argsort(dim=1, stable=True)[:, :enough]
        scores = torch.full((len(queries), k), -torch.inf)
        numbers = torch.full((len(queries), k), -1)
        scores[:, :enough] = found.gather(1, order)
        numbers[:, :enough] = slots.gather(1, order)
        return scores, numbers

    def take(self, slots: Int[Tensor, "n"]) -> Windows:
        """The windows of these slots."""
        table = self._table
        return Windows(
            tokens=table["tokens"][slots].long(),
            ids=table["window_ids"][slots],
            source=table["source"][slots],
            difficulty=None if table["difficulty"].isnan().all() else table["difficulty"][slots],
            labels=table["labels"][slots].long() if "labels" in table else None,
        )

    def text(self, slot: int) -> str:
        return self._texts[slot]

    def window_ids(self, slots: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        return self._table["window_ids"][slots]

    def written_at(self, slots: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """Step in which each window came."""
        return self._table["step"][slots]

    def vectors(self, slots: Int[Tensor, "n"]) -> Float[Tensor, "n e"]:
        """Embeddings as they were last written."""
        return self._table["vectors"][slots]

    def centre(self) -> Float[np.ndarray, "e"]:
        """Mean embedding of the live windows."""
        return self.vectors(self.live.nonzero().flatten()).mean(0).numpy()

    def vector_of(self, window_id: int) -> Float[np.ndarray, "e"] | None:
        """Embedding of a window that the buffer holds, live or retired; None when it does not."""
        slot = self._slot_of.get(window_id)
        return None if slot is None else self._table["vectors"][slot].numpy()

    def state_dict(self) -> State:
        return {
            "head": self._head,
            "table": {name: column[: len(self)].clone() for name, column in self._table.items()},
            "texts": list(self._texts),
        }

    def load_state_dict(self, state: State) -> None:
        saved, count = state["table"], len(state["texts"])
        assert count <= self.capacity, "the state comes from a greater buffer"
        if not count:
            return
        self._allocate(saved["tokens"].shape[1], saved["vectors"].shape[1])
        if "labels" in saved:
            self._table["labels"] = self._table["tokens"].clone()
        for name, column in saved.items():
            self._table[name][:count] = column
        self._head, self._texts = state["head"], list(state["texts"])
        self._slot_of = {
            window: slot
            for window, slot in sorted(
                zip(saved["window_ids"].tolist(), range(count), strict=True),
                key=lambda pair: self._age(pair[1]),
            )
        }
        searched = torch.where(saved["live"][:, None], saved["vectors"], 0.0)
        self._index.write(np.arange(count), searched.numpy())

    def _age(self, slot: int) -> int:
        """Order in which the slots were written, oldest first."""
        return (slot - self._head) % self.capacity if len(self) == self.capacity else slot

    def _allocate(self, length: int, width: int) -> None:
        n = self.capacity
        self._table = {
            "tokens": torch.zeros(n, length, dtype=torch.int32),
            "window_ids": torch.zeros(n, dtype=torch.int64),
            "source": torch.zeros(n, dtype=torch.int64),
            "difficulty": torch.full((n,), math.nan),
            "step": torch.zeros(n, dtype=torch.int64),
            "live": torch.zeros(n, dtype=torch.bool),
            "vectors": torch.zeros(n, width),
        }
