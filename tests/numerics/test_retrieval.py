"""Retrieval in the space that Q reads: with a linear Q the best query retrieves the windows of greatest Q."""

import numpy as np
import pytest
import torch
from tests.helpers import VOCAB, random_offer, tiny_lm

from curriq.config import RetrievalConfig
from curriq.langevin.energy import Energy, hidden_state_vectors
from curriq.langevin.retrieval import QueryRetriever
from curriq.langevin.ring_buffer import RingBuffer, TorchIndex
from curriq.langevin.samplers import IdentitySampler, Vocabulary
from curriq.langevin.search import StringSearch
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
