"""Ring buffer and encoder: fresh rows in place against a rebuild, search, texts per second.

    python benchmarks/retrieval.py                     # I = 50,000 rows of width 384
    python benchmarks/retrieval.py --encoder hashing   # or a sentence-transformer by name or folder

Times are medians; needs the extra [rag].
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch

from curriq.data.embedded import embedded_documents
from curriq.data.encoder import MINILM, load_encoder
from curriq.errors import CurriqError
from curriq.langevin.ring_buffer import FaissIndex, TorchIndex

WIDTH = 384


class RebuiltFaissIndex:
    """The reference: every write builds the whole index again."""

    def __init__(self) -> None:
        self._vectors: np.ndarray | None = None
        self._index: Any = None

    def write(self, slots: np.ndarray, vectors: np.ndarray) -> None:
        before = np.zeros((0, vectors.shape[1]), np.float32) if self._vectors is None else self._vectors
        size = max(len(before), int(slots.max()) + 1)
        self._vectors = np.concatenate([before, np.zeros((size - len(before), vectors.shape[1]), np.float32)])
        self._vectors[slots] = vectors
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(self._vectors)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self._index.search(np.ascontiguousarray(queries), k)


def unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, WIDTH), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def median_ms(work: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def index_table(rows: int, fresh: int, queries: int, rounds: int) -> None:
    """Write `fresh` rows into a full index, then search it."""
    everything, new, asked = unit(rows, 0), unit(fresh, 1), unit(queries, 2)
    slots = np.random.default_rng(3).choice(rows, fresh, replace=False)
    print(
        f"\nI = {rows}, width {WIDTH}: {fresh} fresh rows, {queries} queries, top 16; ms, median of {rounds}"
    )
    print(f"{'index':22} {'ingest':>8} {'search':>8} {'same windows':>13}")
    expected = None
    flat = FaissIndex()
    indexes = {"faiss, in place": flat, "faiss, rebuilt": RebuiltFaissIndex(), "torch": TorchIndex(rows)}
    for name, index in indexes.items():
        index.write(np.arange(rows), everything)
        ingest = median_ms(lambda index=index: index.write(slots, new), rounds)
        search = median_ms(lambda index=index: index.search(asked, 16), rounds)
        found = index.search(asked, 16)[1]
        expected = found if expected is None else expected
        print(f"{name:22} {ingest:8.2f} {search:8.1f} {(found == expected).mean():>13.2%}")
    cvar = faiss.cvar
    threshold, cvar.distance_compute_blas_threshold = cvar.distance_compute_blas_threshold, 2**31 - 1
    slow = median_ms(lambda: flat.search(asked, 16), 2)
    cvar.distance_compute_blas_threshold = threshold
    print(f"{'faiss, sequential path':22} {'':8} {slow:8.1f}")


def encoder_table(name: str, count: int, words: int) -> None:
    """Texts per second, unsorted lengths as in a stream."""
    everything = " ".join(document.text for document in embedded_documents("prose")[:400]).split()
    lengths = np.random.default_rng(4).integers(words // 2, words * 3 // 2, count)
    texts, start = [], 0
    for length in lengths:
        texts.append(" ".join(everything[start : start + length]))
        start += length
    print(f"\nencoder {name}: {count} texts of about {words} words")
    for precision in ("fp32", "bf16"):
        encoder = load_encoder(name, precision)
        encoder.encode(texts[:4])
        began = time.perf_counter()
        vectors = encoder.encode(texts)
        speed = count / (time.perf_counter() - began)
        exact = vectors if precision == "fp32" else exact
        cosine = float((exact * vectors).sum(1).min())
        print(f"{precision:6} {speed:8.1f} texts/s   smallest cosine with fp32 {cosine:.5f}")
        if name == "hashing":
            break


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000, help="I")
    parser.add_argument("--fresh", type=int, default=100, help="n_ingest")
    parser.add_argument("--queries", type=int, default=64, help="K")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--encoder", default=MINILM)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--words", type=int, default=45)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 for torch's default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{torch.get_num_threads()} threads")
    index_table(options.rows, options.fresh, options.queries, options.rounds)
    try:
        encoder_table(options.encoder, options.texts, options.words)
    except CurriqError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
