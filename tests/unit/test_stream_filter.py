"""The stream filter: what it accepts is Boltzmann, and even probabilities change nothing."""

import io
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.helpers import effects_of, finished_step
from torch import Tensor

from curriq.data.stream import Unreadable
from curriq.errors import CurriqError
from curriq.presets import preset
from curriq.select.base import NoCritic
from curriq.select.stream_filter import FilteredStream, StreamFilter
from curriq.softq.temperature import (
    Acceptance,
    FixedBeta,
    FixedFraction,
    PriorTrust,
    SolvedBeta,
    Temperature,
)
from curriq.train.run import prepare
from curriq.types import Cost, Features, Offer, Proposer, Selector, Step, Windows

SHARES = torch.tensor([0.5, 0.3, 0.2])
Q = torch.tensor([0.0, 1.0, 2.0])


class Numbered:
    """Windows of three sources in fixed proportions; the window's number is its id.

    Args:
        known: gives what is known of windows before the forward pass.
    """

    def __init__(self, seed: int = 0, known: Callable[[Windows], dict[str, Tensor]] | None = None) -> None:
        self.known = known or (lambda windows: {})
        self.generator = torch.Generator().manual_seed(seed)
        self.position = 0

    def read(self, n: int) -> Offer:
        ids = torch.arange(self.position, self.position + n)
        self.position += n
        windows = Windows(
            tokens=ids[:, None].repeat(1, 4),
            ids=ids,
            source=torch.multinomial(SHARES, n, replacement=True, generator=self.generator),
        )
        return Offer.of(windows, known=self.known(windows), cost=Cost(windows_read=n), epoch=0)

    def state_dict(self):
        return {"generator": self.generator.get_state(), "position": self.position}

    def load_state_dict(self, state) -> None:
        self.generator.set_state(state["generator"])
        self.position = state["position"]


def filtered(
    accept_prob: Callable[[Offer], Tensor],
    *,
    n: int = 32,
    max_read_ratio: int = 100,
    stream: Numbered | None = None,
) -> FilteredStream:
    return FilteredStream(
        Unreadable(stream or Numbered()),
        n,
        max_read_ratio=max_read_ratio,
        accept_prob=accept_prob,
        generator=torch.Generator().manual_seed(1),
    )


def by_source(beta: float) -> Callable[[Offer], Tensor]:
    return lambda offer: ((Q[offer.windows.source] - Q.max()) / beta).exp()


def test_what_is_accepted_is_the_stream_tilted_by_the_policy():
    """π_s ∝ share_s · exp(Q_s/β), within four standard errors; its normaliser says how many are read."""
    proposer, beta = filtered(by_source(1.5)), 1.5
    offers = [proposer.propose(k) for k in range(400)]
    share = torch.bincount(torch.cat([offer.windows.source for offer in offers])).double() / (400 * 32)
    expected = SHARES.double() * (Q.double() / beta).exp()
    accepted = (SHARES * ((Q - Q.max()) / beta).exp()).sum().item()
    assert torch.allclose(share, expected / expected.sum(), atol=4 * 0.5 / math.sqrt(400 * 32))
    read = sum(offer.cost.windows_read for offer in offers)
    assert 400 * 32 / read == pytest.approx(accepted, rel=0.02)


def test_even_probabilities_are_nextbatch():
    """No window is read in vain, so the windows are those of plain training."""
    proposer, plain = filtered(lambda offer: torch.ones(len(offer))), Numbered()
    for k in range(5):
        ours, theirs = proposer.propose(k), plain.read(32)
        assert torch.equal(ours.windows.ids, theirs.windows.ids)
        assert ours.cost == Cost(windows_read=32)
        assert len(ours.rejected) == 0


def test_windows_keep_their_order_and_no_window_comes_twice():
    proposer = filtered(by_source(0.5))
    ids = torch.cat([proposer.propose(k).windows.ids for k in range(20)])
    assert torch.equal(ids, ids.sort().values)
    assert len(ids.unique()) == len(ids) == 20 * 32


def test_what_was_read_too_far_is_judged_in_the_next_step():
    """Each window is judged once, in its turn: a step ends at the last window that it accepts."""
    stream, judged = Numbered(), 0
    proposer = filtered(by_source(1.0), n=8, stream=stream)
    for k in range(30):
        offer = proposer.propose(k)
        judged += offer.cost.windows_read
        assert offer.windows.ids[-1] == judged - 1
        assert len(offer.rejected) == offer.cost.windows_read - 8
    assert stream.position > judged  # or nothing would have been read ahead


def test_rejected_windows_are_kept_with_their_probability():
    proposer = filtered(lambda offer: (offer.windows.source == 2).float())
    offer = proposer.propose(0)
    windows, rejected = offer.windows, offer.rejected.windows
    assert set(windows.source.tolist()) == {2}
    assert set(rejected.source.tolist()) == {0, 1}
    assert len(rejected) + 32 == offer.cost.windows_read
    assert offer.sampled.accept_prob.tolist() == [1.0] * 32
    assert offer.rejected.sampled.accept_prob.max() == 0
    read = torch.cat([windows.ids, rejected.ids])
    assert torch.equal(read.sort().values, torch.arange(len(read)))


def test_the_limit_fills_up_with_those_that_came_nearest():
    """All are rejected, so the best of what may be read are accepted."""
    odds = torch.tensor([1e-6, 1e-3, 1e-2], dtype=torch.float64)
    proposer = filtered(lambda offer: odds[offer.windows.source] * 1e-9, n=8, max_read_ratio=4)
    offer = proposer.propose(0)
    assert offer.cost.windows_read == 32
    assert len(offer) == 8
    assert (offer.windows.source == 0).sum() <= 1  # a thousandth of the odds


def test_probability_zero_is_never_accepted_before_the_limit():
    proposer = filtered(lambda offer: (offer.windows.source == 1).double(), max_read_ratio=50)
    assert all(set(proposer.propose(k).windows.source.tolist()) == {1} for k in range(20))


def test_a_filtered_stream_continues_bitwise_from_its_state():
    one, other = filtered(by_source(1.0)), filtered(by_source(1.0))
    assert isinstance(one, Proposer)
    for k in range(3):
        one.propose(k)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    ours, theirs = one.propose(3), other.propose(3)
    assert torch.equal(ours.windows.ids, theirs.windows.ids)
    assert torch.equal(ours.rejected.windows.ids, theirs.rejected.windows.ids)


def test_a_state_of_a_version_that_counted_repetitions_is_read():
    one, other = filtered(by_source(1.0)), filtered(by_source(1.0))
    offer = one.propose(0)
    other.load_state_dict({**one.state_dict(), "repetitions": None})
    assert torch.equal(one.propose(1).windows.ids, other.propose(1).windows.ids)
    state = offer.state_dict()
    former = Offer.from_state_dict({**state, "sampled": {**state["sampled"], "repetitions": None}})
    assert torch.equal(former.sampled.accept_prob, offer.sampled.accept_prob)


class SourceCritic(NoCritic):
    """Q of a window is that of its source, and its static score; a level that drifts is added."""

    level = 0.0

    def values(self, features: Features) -> Tensor:
        assert features.source is not None
        q = Q[features.source] + self.level
        return q + features.known["static_score"] if "static_score" in features.known else q


def stream_filter(
    critic: NoCritic, temperature: Temperature, acceptance: Acceptance | None = None, **settings
) -> StreamFilter:
    return StreamFilter(critic, temperature, acceptance or Acceptance(), **{"trust": PriorTrust()} | settings)


def played(
    temperature: Temperature, probes: int = 3, acceptance: Acceptance | None = None, **settings
) -> tuple[StreamFilter, SourceCritic]:
    """A filter that has read 48 windows in each of some steps, half of which it trained on."""
    critic = SourceCritic()
    selector = stream_filter(critic, temperature, acceptance, **settings)
    stream = Numbered()
    for k in range(probes):
        critic.level += 5.0
        selector.observe(probed(split(stream.read(48), 24), critic, index=k))
    return selector, critic


def split(offer: Offer, n: int) -> Offer:
    """The first n windows as those that were accepted, the others as rejected."""
    return replace(offer.take(slice(n)), rejected=offer.take(slice(n, None)))


def probed(offer: Offer, critic: SourceCritic, index: int = 0, sign: float = 1.0) -> Step:
    """A step in which the effect of every window turned out to be its Q, or minus that."""
    n = len(offer)
    seen = Features.cat([Features.before_forward(part) for part in offer.judged])
    effects = effects_of(torch.arange(len(seen)), sign * critic.values(seen), features=seen)
    features = Features(hidden=torch.zeros(n, 1), loss=torch.zeros(n))
    q = critic.values(Features.before_forward(offer))
    return finished_step(features, offer=offer, index=index, reward=0.0, q=q, effects=effects)


class TestStreamFilter:
    def test_accepts_everything_before_the_first_probe(self):
        selector = stream_filter(SourceCritic(), FixedBeta(1.0))
        assert isinstance(selector, Selector)
        assert selector.accept_prob(Numbered().read(9)).tolist() == [1.0] * 9

    def test_probability_is_boltzmann_below_the_greatest_q_of_what_was_read(self):
        """Also when the level of Q has moved since the probe."""
        selector, critic = played(FixedBeta(0.7))
        critic.level += 100.0
        offer = Numbered(5).read(50)
        expected = ((Q[offer.windows.source] - Q.max()) / 0.7).exp()
        assert torch.allclose(selector.accept_prob(offer).float(), expected, atol=1e-4)

    def test_the_best_share_is_accepted_at_any_temperature(self):
        """A fifth of the windows are of the best source, three tenths of the second: c is the second's Q."""
        selector, _ = played(FixedBeta(1e-3), probes=8, acceptance=Acceptance(0.35))
        offer = Numbered(5).read(50)
        assert selector.accept_prob(offer).tolist() == (offer.windows.source > 0).double().tolist()

    @pytest.mark.parametrize(("fraction", "always"), [(0.5, 0.1), (0.05, 0.05)])
    def test_a_run_always_accepts_its_best_tenth_or_all_that_it_accepts_where_that_is_less(
        self, fraction, always, tmp_path
    ):
        settings = FILTERED | {
            "max_read_ratio": 20,
            "accept_fraction": fraction,
            "run_dir": str(tmp_path / "run"),
        }
        selector = prepare(preset("smoke").override(**settings)).session.components.selector
        assert isinstance(selector, StreamFilter)
        assert selector.acceptance.always_accept == always

    @pytest.mark.parametrize(("ratio", "least"), [(4, 0.25), (20, 0.125)])
    def test_the_share_of_a_q_that_ranks_perfectly_is_the_lowest_that_can_be_read(
        self, ratio, least, tmp_path
    ):
        settings = FILTERED | {
            "temperature": "gated",
            "max_read_ratio": ratio,
            "min_accept_fraction": 0.125,
            "run_dir": str(tmp_path / "run"),
        }
        selector = prepare(preset("smoke").override(**settings)).session.components.selector
        assert isinstance(selector, StreamFilter)
        assert isinstance(selector.temperature, SolvedBeta)
        for k in range(8):
            q = torch.rand(8, generator=torch.Generator().manual_seed(k))
            selector.temperature.observe(q, effects_of(torch.arange(8), q))
        assert selector.temperature._sharpness.fraction == least

    def test_accepts_the_share_that_is_asked_for(self):
        """Of the stream, up to the noise of the 144 windows that were read."""
        selector, _ = played(SolvedBeta(FixedFraction(0.4), share=Acceptance(), memory=1))
        assert selector.accept_prob(Numbered(5).read(4000)).mean().item() == pytest.approx(0.4, abs=0.12)

    def test_accepts_everything_where_no_sharpness_is_asked_for(self):
        selector, _ = played(SolvedBeta(FixedFraction(1.0), share=Acceptance(), memory=1))
        assert selector.accept_prob(Numbered(5).read(20)).tolist() == [1.0] * 20

    def test_the_temperature_sees_the_stream_and_the_effects_of_trained_windows(self):
        """A rejected window is no sample of what the prior accepts, which Q has to rank."""
        seen = []

        class Watching(FixedBeta):
            def observe(self, q, effects):
                seen.append((q, effects))
                return {}

        played(Watching(0.1))
        for k, (q, effects) in enumerate(seen):
            assert (
                len(q) == 48 * (k + 1) + 24
            )  # all windows read so far, and the trained ones that were probed
            assert effects.rows.tolist() == list(range(48 * (k + 1), len(q)))
            assert torch.equal(effects.effect, q[effects.rows])

    @pytest.mark.parametrize("rate", [0.0, 7 / 12])
    def test_accepts_the_targets_own_windows(self, rate):
        """Those of the best source have Q = c, c − 1 and c − 2, so they are accepted with probability 1, x
        and x² for x = exp(−1/β): at x = 1/2 the mean is 7/12."""
        target = {"target": lambda: torch.tensor([-2.0, 0.0, -1.0]), "min_target_accept_rate": rate}
        least = 1 / math.log(2) if rate else 0.0
        for beta in (0.1, 1.4, 1.5, 30.0):
            selector, _ = played(FixedBeta(beta), **target)
            assert selector.beta == pytest.approx(max(beta, least), rel=1e-5)
            offer = Numbered(5).read(50)
            expected = ((Q[offer.windows.source] - Q.max()) / selector.beta).exp()
            assert torch.allclose(selector.accept_prob(offer).float(), expected, atol=1e-4)

    def test_reports_how_much_of_the_target_it_accepts(self):
        selector, critic = played(FixedBeta(0.1), target=lambda: torch.tensor([-2.0, 0.0, -1.0]))
        step = probed(split(Numbered(5).read(32), 16), critic, index=9)
        rate = (1 + math.exp(-10) + math.exp(-20)) / 3
        assert selector.observe(step)["policy/target_accept_rate"] == pytest.approx(rate, rel=1e-4)

    def test_a_uniform_policy_accepts_everything(self):
        sharpness = SolvedBeta(FixedFraction(1.0), share=Acceptance(), memory=1)
        selector, _ = played(
            sharpness, target=lambda: torch.tensor([-2.0, 0.0, -1.0]), min_target_accept_rate=0.5
        )
        assert selector.beta == math.inf

    def test_a_step_whose_windows_were_all_accepted_may_bring_the_features_of_its_forward_pass(self):
        """These have hidden states and a loss, which the policy does not see."""
        critic = SourceCritic()
        selector = stream_filter(critic, FixedBeta(0.5))
        offer = Numbered().read(12)
        seen = Features.before_forward(offer)
        forwarded = replace(seen, hidden=torch.ones(12, 3), pooled=torch.ones(12, 3), loss=torch.ones(12))
        effects = effects_of(torch.arange(12), critic.values(seen), features=forwarded)
        step = finished_step(forwarded, offer=replace(offer, rejected=offer.take(slice(0))), effects=effects)
        selector.observe(step)
        expected = ((Q[offer.windows.source] - Q.max()) / 0.5).exp()
        assert torch.allclose(selector.accept_prob(offer).float(), expected, atol=1e-5)

    def test_continues_from_its_state(self):
        target = {"target": lambda: torch.tensor([-2.0, 0.0, -1.0]), "min_target_accept_rate": 0.9}
        one, critic = played(SolvedBeta(FixedFraction(0.4), share=Acceptance(), memory=1), **target)
        temperature = SolvedBeta(FixedFraction(0.4), share=Acceptance(), memory=1)
        other = stream_filter(critic, temperature, **target)
        buffer = io.BytesIO()
        torch.save(one.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        offer = Numbered(7).read(20)
        assert torch.equal(one.accept_prob(offer), other.accept_prob(offer))


PRIOR = torch.tensor([1.0, 0.8, 0.25], dtype=torch.float64)


def with_prior(seed: int = 0) -> Numbered:
    """Windows that the prior accepts by their source, the best of Q least."""
    return Numbered(seed, lambda windows: {"prior": PRIOR[windows.source]})


class TestPrior:
    def test_is_the_policy_before_there_is_evidence(self):
        selector = stream_filter(SourceCritic(), FixedBeta(0.5))
        offer = with_prior().read(20)
        assert torch.equal(selector.accept_prob(offer), PRIOR[offer.windows.source])

    def test_the_accepted_windows_are_the_boltzmann_policy_with_prior_over_the_stream(self):
        """π_s ∝ share_s · π₀_s · exp(Q_s/β), within four standard errors."""
        beta = 1.3
        critic = SourceCritic()
        selector = stream_filter(critic, FixedBeta(beta))
        # The sample's best source must be among what the prior rather accepts: give it all three once.
        selector.observe(probed(split(Numbered().read(48), 24), critic))
        proposer = filtered(selector.accept_prob, stream=with_prior(3))
        offers = [proposer.propose(k) for k in range(400)]
        found = torch.bincount(torch.cat([offer.windows.source for offer in offers])).double() / (400 * 32)
        expected = SHARES.double() * PRIOR * (Q.double() / beta).exp()
        assert torch.allclose(found, expected / expected.sum(), atol=4 * 0.5 / math.sqrt(400 * 32))

    def test_level_and_temperature_are_those_of_what_the_prior_accepts(self):
        """The third source has the greatest Q and a prior below one half: c is the second's Q."""
        critic = SourceCritic()
        selector = stream_filter(critic, FixedBeta(0.7))
        selector.observe(probed(split(with_prior().read(48), 24), critic))
        offer = with_prior(4).read(60)
        tilt = ((Q[offer.windows.source].double() - 1.0) / 0.7).exp().clamp(max=1)
        assert torch.allclose(selector.accept_prob(offer), PRIOR[offer.windows.source] * tilt, atol=1e-5)

    def test_a_prior_that_accepts_nothing_leaves_no_sample_and_is_still_doubted(self):
        """A stream that has nothing like the target."""
        unlikely = {2: 0.4, 1: 0.2, 0: 0.1}
        stream = Numbered(
            0,
            lambda windows: {
                "prior": torch.tensor([unlikely[s] for s in windows.source.tolist()], dtype=torch.float64),
                "static_score": torch.zeros(len(windows)),
            },
        )
        critic = SourceCritic()
        selector = stream_filter(
            critic, FixedBeta(0.7), target=lambda: torch.zeros(3), min_target_accept_rate=0.8
        )
        metrics = [selector.observe(probed(split(stream.read(48), 24), critic, index=k)) for k in range(2)]
        assert [row["prior/rank_correlation"] for row in metrics] == pytest.approx([1.0, 1.0])
        offer = stream.read(9)
        assert torch.equal(selector.accept_prob(offer), offer.known["prior"])

    def test_is_no_longer_followed_once_effects_speak_against_it(self):
        """Effects fall with the prior: after some probes everything is accepted."""
        critic = SourceCritic()
        selector = stream_filter(critic, FixedBeta(math.inf))
        stream = with_prior()
        for k in range(10):
            row = selector.observe(probed(split(stream.read(48), 24), critic, index=k))
        assert row["prior/rank_correlation"] == pytest.approx(-1)
        assert row["prior/trust"] == selector.trust.exponent == 0
        assert selector.accept_prob(stream.read(20)).tolist() == [1.0] * 20

    def test_without_one_nothing_is_reported_of_it(self):
        selector, critic = played(FixedBeta(0.5))
        assert not any(
            name.startswith("prior/")
            for name in selector.observe(probed(split(Numbered().read(8), 4), critic))
        )


FILTERED = {
    "selector": "soft-q",
    "credit": "counterfactual",
    "max_read_ratio": 4,
    "q_features": ("source",),
    "accept_fraction": 0.5,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_features": ("source", "loss")}, "loss of a window is not known before its forward pass"),
        ({"credit": "sampled"}, "use --credit counterfactual"),
        ({"accept_fraction": 0.2}, "must be at least 1/4"),
        ({"dirichlet_concentration": 1.0}, "--dirichlet-concentration 1.0"),
        ({"uniform_share": 0.1}, "--uniform-share 0.1"),
        ({"q_weighting": False}, "--no-q-weighting"),
        ({"train_subset_size": 4}, "--train-subset-size 4"),
        ({"proposer": "uniform-buffer"}, "--proposer uniform-buffer"),
        ({"curriculum": "a.parquet", "curriculum_weights": False}, "--curriculum a.parquet"),
        ({"max_read_ratio": 0}, "--max-read-ratio = 0"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(CurriqError, match=message):
        preset("smoke").override(**(FILTERED | changes))


def test_a_baseline_accepts_the_settings_and_ignores_them():
    assert preset("smoke").override(**(FILTERED | {"selector": "uniform"})).train.max_read_ratio == 4


def test_static_scores_need_a_stream():
    changes = {"curriculum": "a.parquet", "curriculum_weights": False}
    with pytest.raises(CurriqError, match="use other --q-features"):
        preset("smoke").override(selector="soft-q", q_features=("static_score",), **changes)
    with pytest.raises(CurriqError, match=r"--prior with .*drop either"):
        preset("smoke").override(selector="soft-q", prior=True, **changes)
    with pytest.raises(CurriqError, match=r"--max-read-ratio 8 with .*needs a stream to read"):
        preset("smoke").override(selector="filter", max_read_ratio=8, **changes)


def test_a_buffer_takes_a_prior_and_no_static_score():
    with pytest.raises(CurriqError, match="use other --q-features"):
        preset("smoke").override(selector="soft-q", q_features=("static_score",), proposer="uniform-buffer")
    assert preset("langevin-rag").select.prior
    static = preset("smoke").override(selector="filter", max_read_ratio=8, proposer="uniform-buffer")
    assert not static.filters_by_q


@pytest.mark.parametrize("selector", ["uniform", "filter", "high-loss"])
def test_only_soft_q_has_a_prior(selector):
    with pytest.raises(CurriqError, match=f"--prior with --selector {selector}: only soft-q has a prior"):
        preset("smoke").override(selector=selector, prior=True, max_read_ratio=8)


def test_a_static_filter_needs_windows_to_choose_from():
    with pytest.raises(CurriqError, match=r"--selector filter with --max-read-ratio 1: .*--max-read-ratio 8"):
        preset("smoke").override(selector="filter")


@pytest.mark.parametrize("score", ["perplexity", "rho"])
@pytest.mark.parametrize("use", [{"selector": "filter", "max_read_ratio": 4}, {"prior": True}])
def test_scores_by_a_reference_model_need_one(score, use):
    with pytest.raises(
        CurriqError, match=f"--static-score {score} needs --reference-model.*preset reference"
    ):
        preset("smoke").override(static_score=score, **use)
    assert preset("smoke").override(static_score=score).select.static_score == score  # which nothing reads


def test_windows_of_several_readings_are_one_offer():
    stream = Numbered()
    first, second = stream.read(3), stream.read(2)
    labelled = [
        replace(part, windows=replace(part.windows, difficulty=part.windows.ids.float()))
        for part in (first, second)
    ]
    joined = Offer.cat(labelled)
    windows = joined.windows
    assert windows.ids.tolist() == joined.rows.tolist() == windows.difficulty.tolist() == [0, 1, 2, 3, 4]
    assert joined.known == {}
    assert joined.cost == Cost(windows_read=5)


def test_an_offer_of_which_only_a_part_was_sampled_has_no_probabilities():
    """Those of one part would be taken for those of other windows."""
    judged, unjudged = filtered(by_source(1.0), n=4).propose(0), Numbered().read(2)
    assert Offer.cat([judged, unjudged]).sampled is None
    assert Offer.cat([unjudged, judged]).sampled is None
    assert Offer.cat([judged, judged]).sampled.accept_prob.shape == (8,)
