"""Retrieval in the space that Q reads: with a linear Q the best query retrieves the windows of greatest Q."""

import numpy as np
import pytest
import torch
from tests.helpers import VOCAB, random_offer, tiny_lm

from curriq.config import LangevinConfig, RetrievalConfig
from curriq.langevin.energy import Energy, hidden_state_vectors
from curriq.langevin.retrieval import QueryRetriever, draw_set
from curriq.langevin.ring_buffer import RingBuffer, TorchIndex
from curriq.langevin.samplers import IdentitySampler, Vocabulary
from curriq.langevin.search import StringSearch
from curriq.langevin.vectors import VectorSearch
from curriq.lm.embeddings import InputEmbeddings
from curriq.rng import Generators
from curriq.softq.critic import QInputs, QNetwork

WIDTH, WINDOWS, BEST = 16, 200, 12


def decode(tokens: torch.Tensor) -> list[str]:
    return [str(row) for row in tokens.tolist()]


def full_buffer(vectors: np.ndarray) -> RingBuffer:
    buffer = RingBuffer(len(vectors), TorchIndex(len(vectors)))
    windows = random_offer(len(vectors)).windows
    buffer.write(windows, vectors, 0)
    return buffer


def anisotropic(seed: int) -> np.ndarray:
    """Unit vectors around a common direction, as hidden states lie."""
    generator = np.random.default_rng(seed)
    vectors = 3 * generator.standard_normal(WIDTH) + generator.standard_normal((WINDOWS, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_direction_of_a_linear_q_retrieves_the_windows_of_greatest_q(
    architecture: str, seed: int
) -> None:
    """Through the model, the encoder, the index and Q as they are in a run."""
    lm = tiny_lm(architecture, seed=seed)
    inputs = QInputs(("mean",), lm.width, layer_norm=True)
    q = QNetwork(inputs.width, 0, generator=Generators(seed)("q"))
    energy = Energy(lm, InputEmbeddings(lm), lambda f: q(inputs(f)), list(q.parameters()), batch=64)
    windows = random_offer(WINDOWS, seed=seed).windows
    buffer = full_buffer(hidden_state_vectors(lm, inputs, 64, windows.tokens))
    direction = q.layer2.weight.detach().numpy()
    _, slots = buffer.search(direction / np.linalg.norm(direction), BEST)
    expected = energy.hard(windows.tokens).topk(BEST).indices
    assert set(slots[0].tolist()) == set(expected.tolist())


def found(vectors: np.ndarray, query: np.ndarray) -> set[int]:
    """Windows retrieved where every query is embedded as `query`, as after a search that has found it."""
    vocabulary = Vocabulary(torch.arange(VOCAB), "cpu")
    search = StringSearch(
        sampler=IdentitySampler(),
        energy=None,
        initial_sequences=lambda buffer: torch.zeros(BEST, 4, dtype=torch.long),
        vocabulary=vocabulary,
        decode=decode,
        encode=lambda tokens: np.tile(query, (len(tokens), 1)),
        baseline_generator=torch.Generator().manual_seed(1),
        flops=0,
    )
    retriever = QueryRetriever(
        search=search,
        decode=decode,
        config=RetrievalConfig(centre_queries=True, retrieval_top_k=BEST),
        generator=torch.Generator().manual_seed(0),
    )
    return set(retriever.retrieve(full_buffer(vectors)).slots.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_a_centred_query_orders_windows_as_centred_windows_would(seed: int) -> None:
    """(u − μ)·v and u·v differ by one number for all windows u, so that centring the queries is enough. The
    query is the centre moved along w."""
    vectors = anisotropic(seed)
    centre = vectors.mean(0)
    w = np.random.default_rng(100 + seed).standard_normal(WIDTH).astype(np.float32)
    q = vectors @ w
    query = centre + 0.5 * w
    expected = set(np.argsort(-((vectors - centre) @ (query - centre)))[:BEST].tolist())
    assert found(vectors, query.astype(np.float32)) == expected
    assert expected == set(np.argsort(-q)[:BEST].tolist())


# A search in the space of the rows ------------------------------------------------------------------


def vector_search(q, anchors: torch.Tensor | None = None, **settings) -> VectorSearch:
    defaults = {"langevin_step_size": 0.2, "langevin_noise_scale": 0.0, "langevin_steps": 200}
    pull = 0.0 if anchors is None else 1.0
    config = LangevinConfig(**(defaults | {"query_start": "buffer", "target_pull": pull} | settings))
    return VectorSearch(
        config=config,
        q=q,
        start=lambda buffer: buffer.vectors(torch.arange(6)),
        anchors=lambda: anchors,
        concentration=5.0,
        noise=lambda: torch.Generator().manual_seed(3),
        flops=0,
    )


@pytest.mark.parametrize("seed", range(3))
def test_chains_of_vectors_climb_a_linear_q_to_its_direction(seed: int) -> None:
    vectors = anisotropic(seed)
    w = torch.from_numpy(np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32))
    found = vector_search(lambda v: v @ w, langevin_gradient="clip").search(full_buffer(vectors))
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)
    assert (found.vectors @ (w / w.norm()).numpy() > 0.99).all()
    assert (found.q > found.start_q).all()
    best, rows = found.vectors @ vectors.T, vectors @ w.numpy()
    assert set(best[0].argsort()[-5:]) == set(rows.argsort()[-5:])


def test_without_q_chains_of_vectors_go_where_the_reward_windows_lie() -> None:
    vectors = anisotropic(0)
    anchors = torch.from_numpy(anisotropic(9)[:1])
    search = vector_search(lambda v: 0.0 * v.sum(1), anchors)
    found = search.search(full_buffer(vectors))
    assert (torch.from_numpy(found.vectors) @ anchors[0] > 0.99).all()


def test_the_prior_of_a_vector_search_is_a_von_mises_fisher_mixture() -> None:
    """Its gradient, by finite differences in float64 along the sphere."""
    vectors = torch.nn.functional.normalize(torch.from_numpy(anisotropic(1)[:3]).double())
    anchors = torch.from_numpy(anisotropic(2)[:4]).double()
    search = vector_search(lambda v: 2.0 * v[:, 0], anchors, energy_temperature=0.5)
    ours = search._gradient(vectors, anchors)
    assert torch.allclose((ours * vectors).sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-12)

    def energy(v: torch.Tensor) -> torch.Tensor:
        v = v / v.norm()
        return 2.0 * v[0] / 0.5 + torch.exp(5.0 * anchors @ v).sum().log()

    for row, vector in enumerate(vectors):
        for axis in torch.eye(WIDTH, dtype=torch.float64):
            difference = (energy(vector + 1e-6 * axis) - energy(vector - 1e-6 * axis)) / 2e-6
            assert difference.item() == pytest.approx((ours[row] @ axis).item(), abs=1e-6)


def test_the_noise_of_a_vector_search_has_the_length_of_its_scale() -> None:
    rule = {"langevin_step_size": 1e-4, "langevin_noise_scale": 10.0, "langevin_steps": 1}
    start = torch.nn.functional.normalize(torch.randn(500, 400, generator=torch.Generator().manual_seed(0)))
    search = vector_search(lambda v: 0.0 * v.sum(1), None, **rule)
    buffer = RingBuffer(500, TorchIndex(500))
    buffer.write(random_offer(500).windows, start.numpy(), 0)
    found = VectorSearch(**(vars(search) | {"start": lambda b: start})).search(buffer)
    angle = np.arccos(np.clip((found.vectors * start.numpy()).sum(1), -1, 1))
    assert np.tan(angle).mean() == pytest.approx(0.1, rel=0.02)  # √ε σ


# A set of windows -----------------------------------------------------------------------------------


def posterior_variance(queries: np.ndarray, rows: np.ndarray, noise: float) -> float:
    """Of a Gaussian process with the covariance v·u at the queries, after noisy values at the rows."""
    cross = queries @ rows.T
    inverse = np.linalg.inv(rows @ rows.T + noise * np.eye(len(rows)))
    return float(((queries * queries).sum(1) - np.einsum("qi,ij,qj->q", cross, inverse, cross)).sum())


def shortlists(queries: np.ndarray, rows: np.ndarray, k: int):
    products = torch.from_numpy(queries @ rows.T)
    scores, slots = products.topk(k, dim=1)
    return torch.from_numpy(queries), torch.from_numpy(rows)[slots], scores, slots


@pytest.mark.parametrize("noise", [0.01, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_a_set_is_drawn_by_what_each_window_adds(seed: int, noise: float) -> None:
    """Every draw is the one that brute force over the query's shortlist finds."""
    queries, rows = anisotropic(seed)[:5].astype(np.float64), anisotropic(seed + 50)[:40].astype(np.float64)
    query, candidates, scores, ids = shortlists(queries, rows, 8)
    drawn = draw_set(query, candidates, scores, ids, noise)
    assert drawn.query.tolist() == list(range(5))
    taken: list[int] = []
    for q, rank in zip(drawn.query.tolist(), drawn.rank.tolist(), strict=True):
        free = [window for window in ids[q].tolist() if window not in taken]
        variance = {w: posterior_variance(queries, rows[[*taken, w]], noise) for w in free}
        taken.append(int(ids[q, rank]))
        assert variance[taken[-1]] == pytest.approx(min(variance.values()), abs=1e-9)


def test_a_set_does_not_take_a_copy_where_something_else_is_left() -> None:
    """Two queries alike, and the two nearest windows copies of one another; the third is nearly as near."""
    query = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    copy, other = [0.9, 0.43589, 0.0], [0.88, 0.0, 0.47497]
    arguments = shortlists(query, np.array([copy, copy, other]), 3)
    drawn = draw_set(*arguments, 0.01)
    assert {int(arguments[3][q, r]) for q, r in zip(drawn.query, drawn.rank, strict=True)} in ({0, 2}, {1, 2})
    assert drawn.rank.unique().numel() == 2


def test_a_set_has_no_window_twice_and_none_that_is_not_there() -> None:
    query = torch.tensor([[1.0, 0.0]] * 3)
    rows = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]] * 3)
    scores = torch.tensor([[1.0, 1.0, -torch.inf]] * 3)
    drawn = draw_set(query, rows, scores, torch.tensor([[7, 7, -1]] * 3), 0.1)
    assert (drawn.query.tolist(), drawn.rank.tolist()) == ([0], [0])
