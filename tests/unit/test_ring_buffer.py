"""The ring buffer against brute force and an index that is rebuilt; Eq. 16 against its frequencies."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks.retrieval import RebuiltFaissIndex
from tests.runs import assert_same_state

from curriq.errors import CurriqError
from curriq.langevin.retrieval import draw_windows, retrieval_probs, uniform_slots
from curriq.langevin.ring_buffer import FaissIndex, RingBuffer, TorchIndex, VectorIndex
from curriq.types import IGNORED, Windows

CAPACITY, WIDTH, T = 20, 6, 4
INDEXES: dict[str, Callable[[], VectorIndex]] = {
    "torch": lambda: TorchIndex(CAPACITY),
    "faiss": FaissIndex,
    "faiss, rebuilt": RebuiltFaissIndex,
}
every_index = pytest.mark.parametrize("make", INDEXES.values(), ids=INDEXES.keys())


def unit(n: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def windows(ids: list[int], labelled: bool = False) -> Windows:
    """Windows whose tokens repeat their id."""
    n = torch.tensor(ids)
    return Windows(
        tokens=n[:, None].repeat(1, T), ids=n, source=n % 3, difficulty=n.float() if labelled else None
    )


def write(buffer: RingBuffer, ids: list[int], step: int = 0, seed: int | None = None) -> np.ndarray:
    vectors = unit(len(ids), ids[0] if seed is None else seed)
    buffer.write(windows(ids), vectors, step)
    return vectors


class BruteForce:
    """What the buffer should hold: the newest CAPACITY windows that have not been used."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, np.ndarray]] = []
        self.used: set[int] = set()

    def write(self, ids: list[int], vectors: np.ndarray) -> None:
        self.used -= set(ids)  # a fresh copy may be found again
        self.rows = [*self.rows, *zip(ids, vectors, strict=True)][-CAPACITY:]

    def search(self, query: np.ndarray, k: int) -> list[tuple[int, float]]:
        hits = [(i, float(v @ query)) for i, v in self.rows if i not in self.used]
        return sorted(hits, key=lambda hit: -hit[1])[:k]


@every_index
def test_rows_overwritten_in_place_equal_brute_force_through_several_rounds(make) -> None:
    """Writes of all sizes, round the ring several times, with retirement between them."""
    buffer, truth = RingBuffer(CAPACITY, make()), BruteForce()
    rng, fresh = np.random.default_rng(0), 0
    for step in range(40):
        ids = list(range(fresh, fresh + int(rng.integers(1, 8))))
        fresh += len(ids)
        truth.write(ids, write(buffer, ids, step))
        assert len(buffer) == min(fresh, CAPACITY)
        k = int(rng.integers(1, 6))
        queries = unit(3, 1000 + step)
        scores, slots = buffer.search(queries, k)
        for query, row, numbers in zip(queries, scores, slots, strict=True):
            expected = truth.search(query, k)
            found = numbers[numbers >= 0]
            assert buffer.window_ids(found).tolist() == [i for i, _ in expected]
            assert row[: len(expected)].tolist() == pytest.approx([s for _, s in expected], abs=1e-6)
            assert (row[len(expected) :] == -torch.inf).all()
        retired = buffer.window_ids(slots[0][slots[0] >= 0])
        buffer.mark_used(retired)
        truth.used |= set(retired.tolist())


def test_all_backends_find_the_same_windows() -> None:
    buffers = [RingBuffer(CAPACITY, make()) for make in INDEXES.values()]
    for step, start in enumerate(range(0, 60, 5)):
        found = []
        for buffer in buffers:
            write(buffer, list(range(start, start + 5)), step)
            scores, slots = buffer.search(unit(4, 77), min(5, len(buffer)))
            found.append((scores, slots))
            buffer.mark_used(torch.tensor([start]))
        for scores, slots in found[1:]:
            assert torch.equal(slots, found[0][1])
            torch.testing.assert_close(scores, found[0][0], rtol=0, atol=1e-6)


def test_oldest_windows_go_first_and_everything_lies_beside_them() -> None:
    buffer = RingBuffer(CAPACITY, TorchIndex(CAPACITY))
    write(buffer, list(range(CAPACITY)), step=3)
    write(buffer, [100, 101], step=4)
    taken = buffer.take(torch.arange(CAPACITY))
    assert taken.ids.tolist() == [100, 101, *range(2, CAPACITY)]
    assert torch.equal(taken.tokens, taken.ids[:, None].repeat(1, T))
    assert torch.equal(taken.source, taken.ids % 3)
    assert taken.difficulty is None
    assert taken.labels is None
    assert buffer.written_at(torch.tensor([0, 2])).tolist() == [4, 3]


def test_difficulty_labels_come_back() -> None:
    buffer = RingBuffer(CAPACITY, TorchIndex(CAPACITY))
    buffer.write(windows([4, 9], labelled=True), unit(2, 0), 0)
    assert buffer.take(torch.tensor([1, 0])).difficulty.tolist() == [9.0, 4.0]


def test_tokens_that_are_not_learnt_come_back_so_also_after_a_resume() -> None:
    """Windows without labels, before and after, are learnt in full."""
    buffer, resumed = (RingBuffer(CAPACITY, TorchIndex(CAPACITY)) for _ in range(2))
    write(buffer, [1, 2])
    partly = windows([3, 4])
    labels = partly.tokens.clone()
    labels[:, 1:] = IGNORED
    buffer.write(replace(partly, labels=labels), unit(2, 0), 0)
    write(buffer, [5])
    resumed.load_state_dict(buffer.state_dict())
    for ring in (buffer, resumed):
        taken = ring.take(torch.tensor([0, 2, 3, 4]))
        rows = [[1] * T, [3, *[IGNORED] * (T - 1)], [4, *[IGNORED] * (T - 1)], [5] * T]
        assert taken.labels.tolist() == rows
    for ring in (buffer, resumed):
        write(ring, [6, 7])
    assert_same_state(buffer.state_dict(), resumed.state_dict())


def test_all_copies_of_a_used_window_are_retired_but_not_a_later_one() -> None:
    buffer = RingBuffer(CAPACITY, TorchIndex(CAPACITY))
    write(buffer, [7, 8, 7, 9])
    buffer.mark_used(torch.tensor([7]))
    assert buffer.live.tolist() == [False, True, False, True]
    write(buffer, [7])
    assert buffer.live.tolist() == [False, True, False, True, True]


def test_embedding_of_a_window_is_known_as_long_as_a_copy_is_there() -> None:
    buffer = RingBuffer(3, TorchIndex(3))
    assert buffer.vectors_of(torch.tensor([1])) == {}
    vectors = write(buffer, [1, 2, 1])
    ids = torch.tensor([1, 3])

    def known() -> dict[int, list[float]]:
        return {window: vector.tolist() for window, vector in buffer.vectors_of(ids).items()}

    assert known() == {1: vectors[2].tolist()}  # of the newest copy
    buffer.mark_used(torch.tensor([1]))
    assert known() == {1: vectors[2].tolist()}  # used, but its embedding is still right
    write(buffer, [4, 5])
    assert known() == {1: vectors[2].tolist()}
    write(buffer, [1])
    newest = write(buffer, [6, 1])  # in the slot before that of the older copy
    assert known() == {1: newest[1].tolist()}
    write(buffer, [7, 8, 9])
    assert known() == {}


@every_index
def test_a_resumed_buffer_is_the_uninterrupted_one(make, tmp_path) -> None:
    whole, resumed = RingBuffer(CAPACITY, make()), RingBuffer(CAPACITY, make())
    for start in range(0, 33, 3):
        write(whole, [start, start + 1, start // 2], start)
        whole.mark_used(torch.tensor([start + 1]))
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for start in range(40, 70, 3):
        results = []
        for buffer in (whole, resumed):
            write(buffer, [start, start // 2, start + 1], start)
            results.append(
                (*buffer.search(unit(2, 5), 4), *buffer.vectors_of(torch.tensor([start // 2])).values())
            )
        assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
        assert_same_state(whole.state_dict(), resumed.state_dict())


def test_a_missing_faiss_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(CurriqError, match=r"--index faiss needs faiss-cpu.*curriq\[rag\].*--index torch"):
        FaissIndex()


def test_uniform_slots_are_uniform_live_and_distinct() -> None:
    buffer = RingBuffer(CAPACITY, TorchIndex(CAPACITY))
    write(buffer, [*range(10), 3, 4])
    buffer.mark_used(torch.tensor([0]))
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(10)
    for _ in range(3000):
        ids = buffer.window_ids(uniform_slots(buffer, 2, generator)).tolist()
        assert len(set(ids)) == 2
        counts[torch.tensor(ids)] += 1
    assert counts[0] == 0
    single = counts[[1, 2, 5, 6, 7, 8, 9]]
    assert (single - single.mean()).abs().max() < 5 * math.sqrt(single.mean())
    assert (counts[3:5] / single.mean() > 1.7).all()  # two slots each
    assert len(uniform_slots(buffer, 99, generator)) == 9


# Eq. 16 ---------------------------------------------------------------------------------------------


def test_retrieval_probabilities_by_hand() -> None:
    p = retrieval_probs(torch.tensor([0.3, 0.2, -torch.inf]), 0.1)
    assert p.tolist() == pytest.approx([math.e / (math.e + 1), 1 / (math.e + 1), 0.0])


def test_draws_have_the_frequencies_of_equation_16() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.75, 0.5]])
    generator, counts, draws = torch.Generator().manual_seed(0), torch.zeros(4), 4000
    for _ in range(draws):
        drawn = draw_windows(scores, torch.arange(4)[None], 0.1, generator)
        counts[drawn.rank] += 1
    expected = retrieval_probs(scores[0], 0.1) * draws
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_a_second_draw_follows_equation_16_among_what_is_left() -> None:
    """Two queries with the same window first: given that the second collides, its window must be drawn from
    the others by their own probabilities."""
    scores = torch.tensor([[1.0, -9.0, -9.0, -9.0], [0.9, 0.8, 0.7, 0.6]])
    ids = torch.tensor([[0, 4, 5, 6], [0, 1, 2, 3]])
    generator, counts, draws = torch.Generator().manual_seed(1), torch.zeros(4), 6000
    for _ in range(draws):
        drawn = draw_windows(scores, ids, 0.2, generator)
        counts[drawn.rank[1]] += 1
    rest = torch.softmax(scores[1, 1:].double() / 0.2, 0) * draws
    assert counts[0] == 0
    assert ((counts[1:] - rest).abs() < 5 * rest.sqrt()).all()


@pytest.mark.parametrize("draw", ["softmax", "top-1"])
def test_dropped_duplicates_leave_fewer_windows_than_queries(draw: str) -> None:
    scores, ids = torch.tensor([[1.0], [1.0], [0.5]]), torch.tensor([[8], [8], [9]])
    drawn = draw_windows(scores, ids, 0.1, torch.Generator(), draw=draw, duplicates="drop")
    assert drawn.query.tolist() == [0, 2]
    assert drawn.collisions == 1


def test_top_1_takes_the_nearest_that_is_left() -> None:
    scores = torch.tensor([[0.9, 0.5], [0.9, 0.5], [0.9, 0.5]])
    ids = torch.tensor([[1, 2], [1, 2], [1, 2]])
    drawn = draw_windows(scores, ids, 0.1, torch.Generator(), draw="top-1")
    assert drawn.query.tolist() == [0, 1]  # the third finds both taken
    assert drawn.rank.tolist() == [0, 1]
    assert drawn.collisions == 2


def test_copies_of_one_window_count_as_one() -> None:
    drawn = draw_windows(torch.tensor([[0.9, 0.9]] * 2), torch.tensor([[5, 5]] * 2), 0.1, torch.Generator())
    assert len(drawn.query) == 1


def test_absent_windows_are_never_drawn() -> None:
    scores = torch.tensor([[0.1, -torch.inf], [-torch.inf, -torch.inf]])
    for _ in range(50):
        drawn = draw_windows(scores, torch.tensor([[1, 0], [0, 0]]), 1e3, torch.Generator())
        assert (drawn.query.tolist(), drawn.rank.tolist()) == ([0], [0])
