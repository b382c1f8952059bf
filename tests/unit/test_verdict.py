"""What a run says of itself: the policy over windows and sources, and whether Q predicts effects."""

import math

import pytest

from curriq.report.summary import verdict

EVEN = [("a", 0.5, 0.5), ("b", 0.5, 0.5)]
ONE = [("a", 1.0, 1.0)]
MEASURED = {
    "effect_correlation": 0.31,
    "effect_correlation_error": 0.05,
    "recovered_scale": 0.24,
    "recovered_scale_error": 0.02,
}


def summary(selector: str = "soft-q", kl: float = 0.0, read: int = 100, **more):
    counts = {"windows_read": read, "windows_proposed": 100, "windows_trained": 100}
    return {"selector": selector, "kl_from_uniform": kl} | counts | more


@pytest.mark.parametrize("shares", [EVEN, ONE])
def test_a_policy_on_one_window_has_selected_whatever_the_sources(shares):
    """All weight on one of 16 windows: log 16 nats, also where all windows are of one source."""
    said = " ".join(verdict(summary(kl=math.log(16)), shares))
    assert "2.773 nats from uniform" in said
    assert "6%" in said
    assert "selected nothing" not in said


def test_a_uniform_policy_selected_nothing():
    first, second = verdict(summary(kl=1e-5), EVEN)
    assert "soft-q selected nothing" in first
    assert "KL 1.0e-05" in first
    assert "--measure-effects" in second


def test_a_filter_with_even_weights_has_selected():
    said = " ".join(verdict(summary(read=800), ONE))
    assert "selected nothing" not in said
    assert "12%" in said


@pytest.mark.parametrize(("error", "judged"), [(0.05, "ranked windows"), (0.2, "did not rank")])
def test_q_is_judged_by_measured_effects_where_there_are_some(error, judged):
    measured = MEASURED | {"effect_correlation_error": error}
    said = verdict(summary(kl=0.5, **measured), EVEN)[-1]
    assert judged in said
    assert f"+0.31 ± {error:.2f}" in said
    assert "0.24 ± 0.02" in said


def test_a_flat_q_has_ranked_nothing():
    said = verdict(summary(kl=0.5, probes=2), EVEN)[-1]
    assert "2 probes" in said
    assert "--measure-effects" not in said


def test_baselines_are_not_asked_what_q_predicts():
    assert verdict(summary("uniform"), EVEN) == ["The uniform baseline weighs every window alike."]
    assert len(verdict(summary("low-loss", kl=0.2), EVEN)) == 2


def test_a_summary_of_an_older_version_opens():
    old = {name: value for name, value in summary().items() if name != "kl_from_uniform"}
    assert verdict(old, [("a", 0.5, 0.7), ("b", 0.5, 0.3)])
