"""The credit's signal: slope of Q on measured effects, against numpy's regression and planted scales."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tests.helpers import finished_step, random_offer

from curriq.softq.signal import CreditSignal
from curriq.types import Effects, Features

N = 12


def probe(seed: int, slope: float, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and effects of the windows of a step; the level of either means nothing."""
    generator = torch.Generator().manual_seed(seed)
    effect = torch.randn(N, generator=generator) * 1e-3 + seed
    return slope * effect + noise * torch.randn(N, generator=generator) - 5 * seed, effect


def test_one_probe_is_an_ordinary_regression():
    q, effect = probe(1, 0.3, 1e-3)
    metrics = CreditSignal().observe(q, effect)
    x, y = (v.double().numpy() - v.double().numpy().mean() for v in (effect, q))
    (slope,), (squares,), *_ = np.linalg.lstsq(x[:, None], y, rcond=None)
    assert metrics["critic/recovered_scale"] == pytest.approx(slope, rel=1e-9)
    error = np.sqrt(squares / (N - 2) / (x @ x))
    assert metrics["critic/recovered_scale_error"] == pytest.approx(error, rel=1e-9)
    assert metrics["critic/effect_correlation"] == pytest.approx(spearmanr(q, effect)[0], abs=1e-12)


@pytest.mark.parametrize("slope", [1.0, 1 / 16, 0.0])
def test_the_planted_scale_is_within_three_standard_errors(slope):
    signal = CreditSignal()
    for seed in range(30):
        metrics = signal.observe(*probe(seed, slope, 1e-3))
    error = metrics["critic/recovered_scale_error"]
    assert abs(metrics["critic/recovered_scale"] - slope) < 3 * error < 0.3
    summary = signal.summary()
    assert summary["recovered_scale"] == metrics["critic/recovered_scale"]
    lower = summary["effect_correlation"] - 3 * summary["effect_correlation_error"]
    assert (lower > 0) == (slope == 1.0)


def test_only_windows_trained_on_count_and_a_flat_q_says_nothing():
    q, effect = probe(2, 1.0, 0.0)
    step = finished_step(
        Features(hidden=torch.zeros(N, 2), loss=torch.ones(N)),
        offer=random_offer(N),
        q=q,
        effects=Effects(
            rows=torch.tensor([3, 5, 8, N + 1]),
            effect=torch.cat([effect[[3, 5, 8]], torch.tensor([100.0])]),
            mixture=0.0,
            features=Features(hidden=torch.zeros(4, 2), loss=torch.ones(4)),
        ),
    )
    assert CreditSignal().measure(step)["critic/recovered_scale"] == pytest.approx(1.0, rel=1e-3)
    assert CreditSignal().observe(torch.ones(N), effect) == {}
    assert CreditSignal().summary() == {"probes": 0}


def test_the_state_carries_on():
    one, other = CreditSignal(), CreditSignal()
    one.observe(*probe(0, 0.5, 1e-3))
    other.load_state_dict(one.state_dict())
    assert other.observe(*probe(1, 0.5, 1e-3)) == one.observe(*probe(1, 0.5, 1e-3))
