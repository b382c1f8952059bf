"""Gumbel top-k against the exact probabilities; encoders against their definitions."""

import builtins
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curriq.data.encoder import HashingEncoder, load_encoder
from curriq.data.split import draw_topic, gumbel_top_k
from curriq.errors import CurriqError


def probability_of_subset(weights, subset):
    """Sum over all orders of sequential draws without replacement, by definition."""
    total = 0.0
    for order in itertools.permutations(subset):
        left, chance = sum(weights), 1.0
        for item in order:
            chance *= weights[item] / left
            left -= weights[item]
        total += chance
    return total


def test_gumbel_top_k_draws_without_replacement_with_the_stated_probabilities():
    log_weights = torch.tensor([0.0, 1.0, -0.5, 0.3])
    weights = log_weights.exp().tolist()
    generator = torch.Generator().manual_seed(1)
    draws, counts = 20_000, {}
    for _ in range(draws):
        subset = tuple(sorted(gumbel_top_k(log_weights, 2, generator).tolist()))
        counts[subset] = counts.get(subset, 0) + 1
    for subset in itertools.combinations(range(4), 2):
        p = probability_of_subset(weights, subset)
        assert counts[subset] / draws == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / draws))


def test_topic_sets_are_nearer_to_each_other_than_the_pool():
    generator = np.random.default_rng(0)
    pools = {}
    for name, size in {"reward": 200, "validation": 100, "test": 200}.items():
        vectors = generator.normal(size=(size, 8)).astype(np.float32)
        pools[name] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    sizes = {"reward": 20, "validation": 10, "test": 20}
    drawn = draw_topic(pools, sizes, temperature=0.05)
    assert {name: len(set(rows)) for name, rows in drawn.items()} == sizes

    centre = np.concatenate([pools[name][rows] for name, rows in drawn.items()]).mean(axis=0)
    for name, rows in drawn.items():
        assert (pools[name][rows] @ centre).mean() > (pools[name] @ centre).mean() + 0.3
    assert drawn == draw_topic(pools, sizes, temperature=0.05)
    assert drawn != draw_topic(pools, sizes, temperature=0.05, seed=1), "another split, another topic"


def test_high_temperature_draws_uniformly_and_low_temperature_takes_the_nearest():
    pool = np.eye(50, dtype=np.float32)
    assert draw_topic({"reward": pool}, {"reward": 50}, 1e6)["reward"] != list(range(50))
    angles = np.linspace(0, math.pi / 2, 50)
    fan = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    nearest = sorted(draw_topic({"reward": fan}, {"reward": 5}, 1e-7)["reward"])
    assert nearest == list(range(nearest[0], nearest[0] + 5)), "five neighbours on the circle"


@settings(deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_hashing_encoder_returns_unit_rows_that_depend_on_the_text_alone(texts):
    encoder = HashingEncoder(64)
    vectors = encoder.encode(texts)
    assert vectors.shape == (len(texts), 64)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(vectors[-1:], encoder.encode(texts[-1:]))


def test_hashing_encoder_ranks_shared_words_first():
    query, near, far = load_encoder("hashing").encode(
        ["the parser reads a token", "a parser reads the next token", "rain fell on empty streets"]
    )
    assert query @ near > 0.5 > 0.2 > query @ far


def test_a_missing_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.startswith("sentence_transformers"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(CurriqError, match=r'curriq\[rag\]".*install -e "\.\[rag\]".*hashing'):
        load_encoder("sentence-transformers/all-MiniLM-L6-v2")
