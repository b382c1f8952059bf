"""The needle is found by the selectors that should find it, and by those alone (see experiments/LOG.md)."""

import statistics
from typing import Any

import pytest
from experiments.needle import PARTS, recipe
from tests.runs import SETTINGS

import curriq
from curriq.runlog.read import read_metrics

N, STEPS, LAST = 8, 60, 20
SMALL: dict[str, Any] = {
    **{name: SETTINGS[name] for name in ("sources", "vocab_size", "tokenizer_sample_bytes", "threads")},
    "model": "random:gpt2:hidden_size=32,num_hidden_layers=1,num_attention_heads=2",
    "window": 32,
    "num_candidates": N,
    "steps": STEPS,
    "eval_every": STEPS,
    "checkpoint_every": STEPS,
    "seed": 0,
    "tensorboard": False,
    "progress": "none",
}
FAST = {"lm_lr": 3e-3}
"""For selectors that find the needle only once it has been learnt."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> str:
    """A model that has been trained on the needle alone."""
    folder = tmp_path_factory.mktemp("reference")
    alone = {"selector": "uniform", "num_candidates": 1, "run_dir": str(folder)}
    return str(curriq.run(recipe().override(**(SMALL | FAST | alone)), **PARTS).model_dir)


def needle_weights(folder, **overrides: Any) -> list[float]:
    """Mixture weight of the needle in the last steps of a run."""
    curriq.run(recipe().override(**(SMALL | overrides), run_dir=str(folder)), **PARTS)
    return [row["own/needle_weight"] for row in read_metrics(folder)[-LAST:]]


def test_excess_loss_over_a_reference_finds_it(reference, tmp_path):
    weights = needle_weights(tmp_path, selector="rho", reference_model=reference)
    assert statistics.mean(weights) > 0.8


def test_low_loss_finds_it(tmp_path):
    assert statistics.mean(needle_weights(tmp_path, selector="low-loss", **FAST)) > 0.65


def test_the_bandit_finds_its_source(tmp_path):
    assert statistics.mean(needle_weights(tmp_path, selector="bandit", bandit_lr=0.2, **FAST)) > 0.65


def test_uniform_gives_it_its_share(tmp_path):
    assert needle_weights(tmp_path, selector="uniform") == [1 / N] * LAST


def test_the_published_rule_stays_at_the_uniform_share(tmp_path):
    """At β = 1 the gaps between values, hundredths of a nat, hardly move the weights."""
    weights = needle_weights(tmp_path, selector="soft-q", beta=1.0)
    assert statistics.mean(weights) == pytest.approx(1 / N, rel=0.08)
