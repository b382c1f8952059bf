"""A stream steered by Q: what is taken is Boltzmann, and even probabilities change nothing."""

import io
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from curriq.errors import CurriqError
from curriq.presets import preset
from curriq.select.stream_filter import FilteredStream, StreamFilter, pre_forward_features
from curriq.softq.critic import NoCritic
from curriq.softq.temperature import Acceptance, FixedBeta, FixedFraction, SolvedBeta, Temperature
from curriq.train.run import prepare
from curriq.types import Candidates, Effects, Features, Outcome, Proposer, Selector, concatenate

SHARES = torch.tensor([0.5, 0.3, 0.2])
Q = torch.tensor([0.0, 1.0, 2.0])


class Numbered:
    """Windows of three sources in fixed proportions; the window's number is its id."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.read = 0

    def next_batch(self, n: int) -> Candidates:
        ids = torch.arange(self.read, self.read + n)
        self.read += n
        return Candidates(
            tokens=ids[:, None].repeat(1, 4),
            window_ids=ids,
            source=torch.multinomial(SHARES, n, replacement=True, generator=self.generator),
            rows=torch.arange(n),
            metrics={"data/epoch": 0.0, "data/windows_read": float(n)},
        )

    def state_dict(self):
        return {"generator": self.generator.get_state(), "read": self.read}

    def load_state_dict(self, state) -> None:
        self.generator.set_state(state["generator"])
        self.read = state["read"]


def steered(
    probability: Callable[[Candidates], Tensor], *, n: int = 32, most: int = 100, opened: int = 0
) -> FilteredStream:
    return FilteredStream(
        Numbered(),
        n,
        most=most,
        probability=probability,
        num_unfiltered=lambda step: opened,
        generator=torch.Generator().manual_seed(1),
    )


def by_source(beta: float) -> Callable[[Candidates], Tensor]:
    return lambda candidates: ((Q[candidates.source] - Q.max()) / beta).exp()


def test_what_is_taken_is_the_stream_tilted_by_the_policy():
    """π_s ∝ share_s · exp(Q_s/β), within four standard errors; its normaliser says how many are read."""
    proposer, beta = steered(by_source(1.5)), 1.5
    taken = [proposer.propose(k) for k in range(400)]
    share = torch.bincount(torch.cat([c.source for c in taken])).double() / (400 * 32)
    expected = SHARES.double() * (Q.double() / beta).exp()
    accepted = (SHARES * ((Q - Q.max()) / beta).exp()).sum().item()
    assert torch.allclose(share, expected / expected.sum(), atol=4 * 0.5 / math.sqrt(400 * 32))
    read = sum(c.metrics["data/windows_read"] for c in taken)
    assert 400 * 32 / read == pytest.approx(accepted, rel=0.02)


def test_even_probabilities_are_nextbatch():
    """No window is read in vain, so the windows are those of plain training."""
    proposer, plain = steered(lambda c: torch.ones(len(c))), Numbered()
    for k in range(5):
        ours, theirs = proposer.propose(k), plain.next_batch(32)
        assert torch.equal(ours.window_ids, theirs.window_ids)
        assert ours.metrics["data/windows_read"] == 32
        assert len(ours.rejected) == 0


def test_windows_keep_their_order_and_no_window_comes_twice():
    proposer = steered(by_source(0.5))
    ids = torch.cat([proposer.propose(k).window_ids for k in range(20)])
    assert torch.equal(ids, ids.sort().values)
    assert len(ids.unique()) == len(ids) == 20 * 32


def test_what_was_read_too_far_is_looked_at_in_the_next_step():
    """Each window is looked at once, in its turn: a step ends at the last window that it takes."""
    proposer, looked_at = steered(by_source(1.0), n=8), 0
    for k in range(30):
        candidates = proposer.propose(k)
        looked_at += int(candidates.metrics["data/windows_read"])
        assert candidates.window_ids[-1] == looked_at - 1
        assert len(candidates.rejected) == candidates.metrics["data/windows_read"] - 8
    assert proposer.stream.read > looked_at  # or nothing would have been read ahead


def test_open_windows_are_taken_as_they_come():
    proposer = steered(lambda c: (c.source == 2).float(), opened=16)
    candidates = proposer.propose(0)
    assert candidates.unfiltered.sum() == 16
    assert torch.equal(candidates.window_ids[:16], torch.arange(16))
    assert set(candidates.source[16:].tolist()) == {2}
    assert len(candidates.rejected) + 32 == candidates.metrics["data/windows_read"]
    assert set(candidates.rejected.source.tolist()) == {0, 1}
    assert torch.equal(
        candidates.accept_prob, (candidates.source == 2).double()
    )  # the policy's, taken or not
    assert candidates.rejected.accept_prob.max() == 0
    read = torch.cat([candidates.window_ids, candidates.rejected.window_ids])
    assert torch.equal(read.sort().values, torch.arange(len(read)))


def test_the_limit_fills_up_with_those_that_came_nearest():
    """All are refused, so the best of what may be read are taken."""
    odds = [1e-6, 1e-3, 1e-2]
    proposer = steered(lambda c: torch.tensor(odds, dtype=torch.float64)[c.source] * 1e-9, n=8, most=4)
    candidates = proposer.propose(0)
    assert candidates.metrics["data/windows_read"] == 32
    assert len(candidates) == 8
    assert (candidates.source == 0).sum() <= 1  # a thousandth of the odds


def test_probability_zero_is_never_taken_before_the_limit():
    proposer = steered(lambda c: (c.source == 1).double(), most=50)
    assert all(set(proposer.propose(k).source.tolist()) == {1} for k in range(20))


def test_a_steered_stream_continues_bitwise_from_its_state():
    one, other = steered(by_source(1.0)), steered(by_source(1.0))
    assert isinstance(one, Proposer)
    for k in range(3):
        one.propose(k)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    ours, theirs = one.propose(3), other.propose(3)
    assert torch.equal(ours.window_ids, theirs.window_ids)
    assert torch.equal(ours.rejected.window_ids, theirs.rejected.window_ids)


class SourceCritic(NoCritic):
    """Q of a window is that of its source, and its dsir_score; a level that drifts is added."""

    level = 0.0

    def values(self, features: Features) -> Tensor:
        assert features.source is not None
        q = Q[features.source] + self.level
        return q if features.dsir_score is None else q + features.dsir_score


def played(
    temperature: Temperature, probes: int = 3, acceptance: Acceptance | None = None, **settings
) -> tuple[StreamFilter, SourceCritic]:
    critic = SourceCritic()
    selector = StreamFilter(critic, temperature, acceptance or Acceptance(), **settings)
    proposer = steered(selector.probability, opened=16)
    for k in range(probes):
        critic.level += 5.0
        candidates = proposer.propose(k)
        q = critic.values(Features(hidden=torch.zeros(32, 0), loss=torch.zeros(32), source=candidates.source))
        selector.observe(
            k,
            Outcome(
                candidates=candidates,
                features=Features(hidden=torch.zeros(32, 1), loss=torch.zeros(32)),
                weights=torch.full((32,), 1 / 32),
                reward=0.0,
                q=q,
                effects=Effects(rows=torch.arange(32), effect=q.clone(), mixture=0.0),
            ),
        )
    return selector, critic


class TestSteered:
    def test_takes_everything_before_the_first_probe(self):
        selector = StreamFilter(SourceCritic(), FixedBeta(1.0), Acceptance())
        assert isinstance(selector, Selector)
        assert selector.probability(Numbered().next_batch(9)).tolist() == [1.0] * 9

    def test_probability_is_boltzmann_below_the_greatest_q_of_fair_windows(self):
        """Also when the level of Q has moved since the probe."""
        selector, critic = played(FixedBeta(0.7))
        critic.level += 100.0
        candidates = Numbered(5).next_batch(50)
        expected = ((Q[candidates.source] - Q.max()) / 0.7).exp()
        assert torch.allclose(selector.probability(candidates), expected, atol=1e-4)

    def test_the_sure_share_is_taken_at_any_temperature(self):
        """A fifth of the windows are of the best source, three tenths of the second: c is the second's Q."""
        selector, _ = played(FixedBeta(1e-3), probes=8, acceptance=Acceptance(0.35))
        candidates = Numbered(5).next_batch(50)
        assert selector.probability(candidates).tolist() == (candidates.source > 0).float().tolist()

    @pytest.mark.parametrize(("fraction", "sure"), [(0.5, 0.1), (0.05, 0.05)])
    def test_a_run_takes_its_best_tenth_for_sure_or_all_that_it_takes_where_that_is_less(
        self, fraction, sure, tmp_path
    ):
        settings = STEERED | {
            "max_read_ratio": 20,
            "target_fraction": fraction,
            "run_dir": str(tmp_path / "run"),
        }
        selector = prepare(preset("smoke").override(**settings)).session.components.selector
        assert isinstance(selector, StreamFilter)
        assert selector.acceptance.sure == sure

    def test_takes_the_share_that_is_asked_for(self):
        """Of fair windows, so up to the noise of the three probes' 48."""
        selector, _ = played(SolvedBeta(FixedFraction(0.4), share=Acceptance(), memory=1))
        candidates = Numbered(5).next_batch(4000)
        assert selector.probability(candidates).mean().item() == pytest.approx(0.4, abs=0.12)

    def test_takes_everything_where_no_sharpness_is_asked_for(self):
        selector, _ = played(SolvedBeta(FixedFraction(1.0), share=Acceptance(), memory=1))
        assert selector.probability(Numbered(5).next_batch(20)).tolist() == [1.0] * 20

    def test_the_temperature_sees_fair_windows_only(self):
        seen = []

        class Watching(FixedBeta):
            def observe(self, q, effects):
                seen.append((len(q), effects))
                return {}

        played(Watching(0.1))
        lengths, effects = zip(*seen, strict=True)
        assert lengths == (16, 32, 48)  # fair windows of all probes so far
        assert [e.rows.tolist() for e in effects] == [list(range(n - 16, n)) for n in lengths]
        assert all(len(e.effect) == 16 for e in effects)

    @pytest.mark.parametrize("keep", [0.0, 7 / 12])
    def test_keeps_the_targets_own_windows(self, keep):
        """Those of the best source have Q = c, c − 1 and c − 2, and are taken with chances 1, x and x² for
        x = exp(−1/β): at x = 1/2 the mean is 7/12."""
        target = {"target": lambda: torch.tensor([-2.0, 0.0, -1.0]), "keep": keep}
        least = 1 / math.log(2) if keep else 0.0
        for beta in (0.1, 1.4, 1.5, 30.0):
            selector, _ = played(FixedBeta(beta), **target)
            assert selector.beta == pytest.approx(max(beta, least), rel=1e-5)
            candidates = Numbered(5).next_batch(50)
            expected = ((Q[candidates.source] - Q.max()) / selector.beta).exp()
            assert torch.allclose(selector.probability(candidates), expected, atol=1e-4)

    def test_says_how_much_of_the_target_is_kept(self):
        selector, critic = played(FixedBeta(0.1), target=lambda: torch.tensor([-2.0, 0.0, -1.0]))
        candidates = replace(Numbered(5).next_batch(32), unfiltered=torch.ones(32, dtype=torch.bool))
        q = critic.values(pre_forward_features(candidates))
        effects = Effects(rows=torch.arange(32), effect=q, mixture=0.0)
        features = Features(hidden=torch.zeros(32, 1), loss=torch.zeros(32))
        weights = torch.full((32,), 1 / 32)
        outcome = Outcome(
            candidates=candidates, features=features, weights=weights, reward=0.0, q=q, effects=effects
        )
        kept = (1 + math.exp(-10) + math.exp(-20)) / 3
        assert selector.observe(9, outcome)["policy/target_accept_rate"] == pytest.approx(kept, rel=1e-4)

    def test_a_uniform_policy_keeps_everything(self):
        sharpness = SolvedBeta(FixedFraction(1.0), share=Acceptance(), memory=1)
        selector, _ = played(sharpness, target=lambda: torch.tensor([-2.0, 0.0, -1.0]), keep=0.5)
        assert selector.beta == math.inf

    def test_continues_from_its_state(self):
        target = {"target": lambda: torch.tensor([-2.0, 0.0, -1.0]), "keep": 0.9}
        one, critic = played(SolvedBeta(FixedFraction(0.4), share=Acceptance(), memory=1), **target)
        temperature = SolvedBeta(FixedFraction(0.4), share=Acceptance(), memory=1)
        other = StreamFilter(critic, temperature, Acceptance(), **target)
        buffer = io.BytesIO()
        torch.save(one.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        candidates = Numbered(7).next_batch(20)
        assert torch.equal(one.probability(candidates), other.probability(candidates))


STEERED = {
    "selector": "soft-q",
    "credit": "counterfactual",
    "max_read_ratio": 4,
    "q_features": ("source",),
    "target_fraction": 0.5,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_features": ("source", "loss")}, "loss of a window is not known before its forward pass"),
        ({"credit": "sampled"}, "use --credit counterfactual"),
        ({"target_fraction": 0.2}, "must be at least 1/4"),
        ({"weight_jitter": 1.0}, "--weight-jitter 1.0"),
        ({"uniform_share": 0.1}, "--uniform-share 0.1"),
        ({"q_weighting": False}, "--no-q-weighting"),
        ({"train_subset": 4}, "--train-subset 4"),
        ({"proposer": "uniform-buffer"}, "--proposer uniform-buffer"),
        ({"curriculum": "a.parquet", "curriculum_weights": False}, "--curriculum a.parquet"),
        ({"max_read_ratio": 0}, "--max-read-ratio = 0"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(CurriqError, match=message):
        preset("smoke").override(**(STEERED | changes))


def test_a_baseline_takes_the_settings_and_ignores_them():
    assert preset("smoke").override(**(STEERED | {"selector": "uniform"})).train.max_read_ratio == 4


def test_likeness_needs_a_stream():
    for changes in (
        {"proposer": "uniform-buffer"},
        {"curriculum": "a.parquet", "curriculum_weights": False},
    ):
        with pytest.raises(CurriqError, match="name other --q-features"):
            preset("smoke").override(selector="soft-q", q_features=("dsir_score",), **changes)


def test_candidates_of_several_readings_are_one_proposal():
    stream = Numbered()
    first, second = stream.next_batch(3), stream.next_batch(2)
    labelled = [replace(part, difficulty=part.window_ids.float()) for part in (first, second)]
    joined = concatenate(labelled)
    assert joined.window_ids.tolist() == joined.rows.tolist() == joined.difficulty.tolist() == [0, 1, 2, 3, 4]
    assert joined.dsir_score is None
