"""Every selector through one suite: the protocol, determinism, micro-batches, resume."""

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.helpers import effects_of

from curriq.config import CriticConfig
from curriq.rng import Generators
from curriq.select.bandit import SourceBandit
from curriq.select.base import RandomK, Uniform, UniformUntil
from curriq.select.competence import (
    Competence,
    LabelDifficulty,
    LabelOrRarity,
    LengthDifficulty,
    RarityDifficulty,
)
from curriq.select.loss import ByLoss, ExcessLoss, Uncertainty
from curriq.select.soft_q import DirichletNoise, SoftQ
from curriq.softq.critic import QInputs, TDCritic
from curriq.softq.temperature import CalibrationGate, FixedBeta, FixedFraction, LearnedBeta, SolvedBeta
from curriq.types import Features, Offer, Selector, Step, Windows

VOCAB, WINDOW, WIDTH, N = 50, 12, 6, 16
SOURCES = ("prose", "code", "noise")


def q_critic() -> TDCritic:
    return TDCritic(CriticConfig(), QInputs(("last",), WIDTH), FixedBeta(0.5), "cpu", Generators(3))


def soft_q(seed: int) -> Selector:
    return SoftQ(q_critic(), FixedBeta(0.5))


def bandit(seed: int) -> Selector:
    return SourceBandit(SOURCES, 0.1, 0.05, Generators(seed)("bandit"))


def excess_loss(seed: int) -> Selector:
    return ExcessLoss(lambda windows: windows.tokens.float().mean(1) / VOCAB, temperature=0.5)


SELECTORS: dict[str, Callable[[int], Selector]] = {
    "soft-q": soft_q,
    "uniform": lambda seed: Uniform(),
    "random-single": lambda seed: RandomK(1, Generators(seed)("random-k")),
    "random-k": lambda seed: RandomK(5, Generators(seed)("random-k")),
    "random-k of fewer": lambda seed: RandomK(99, Generators(seed)("random-k")),
    "high-loss": lambda seed: ByLoss(0.5, sign=1),
    "low-loss": lambda seed: ByLoss(0.5, sign=-1),
    "uncertainty": lambda seed: Uncertainty(0.5),
    "competence by label": lambda seed: Competence(LabelDifficulty(), 30, 0.1, history=40),
    "competence by rarity": lambda seed: Competence(RarityDifficulty(VOCAB), 30, 0.1, history=40),
    "competence by length": lambda seed: Competence(LengthDifficulty(torch.arange(VOCAB) % 7), 30, 0.1),
    "competence by either": lambda seed: Competence(LabelOrRarity(VOCAB), 30, 0.1),
    "rho": excess_loss,
    "bandit": bandit,
    "soft-q, governed": lambda seed: SoftQ(q_critic(), SolvedBeta(CalibrationGate(0.3))),
    "soft-q, learned": lambda seed: SoftQ(q_critic(), LearnedBeta(FixedFraction(0.5), 1.0, 0.1)),
    "soft-q, part uniform": lambda seed: SoftQ(q_critic(), SolvedBeta(FixedFraction(0.4)), 0.2),
    "soft-q, jittered": lambda seed: DirichletNoise(soft_q(seed), 2.0, Generators(seed)("jitter")),
    "soft-q after warm-up": lambda seed: UniformUntil(soft_q(seed), 3),
    "bandit after warm-up": lambda seed: UniformUntil(bandit(seed), 3),
}
every_selector = pytest.mark.parametrize("make", SELECTORS.values(), ids=SELECTORS.keys())


def proposal(step: int) -> Offer:
    generator = torch.Generator().manual_seed(1000 + step)
    windows = Windows(
        tokens=torch.randint(VOCAB, (N, WINDOW), generator=generator),
        ids=torch.randint(2**62, (N,), generator=generator),
        source=torch.randint(len(SOURCES), (N,), generator=generator),
        difficulty=torch.randn(N, generator=generator),
    )
    return Offer.of(windows)


def measure(offer: Offer) -> Features:
    """Stands for the forward pass: a function of each window alone."""
    per_window = [torch.Generator().manual_seed(int(i) % 2**31) for i in offer.windows.ids]
    return Features(
        hidden=torch.stack([torch.randn(WIDTH, generator=g) for g in per_window]),
        loss=torch.stack([3 + torch.rand((), generator=g) for g in per_window]),
        entropy=torch.stack([2 + torch.rand((), generator=g) for g in per_window]),
    )


def play(selector: Selector, steps: range) -> list:
    """The part of the loop that a selector sees; returns all it said."""
    said = []
    for step in steps:
        offered = proposal(step)
        kept = selector.admit(step, offered)
        seen = measure(kept)
        scores = selector.score(step, kept, seen)
        reward = -3.0 + torch.rand((), generator=torch.Generator().manual_seed(step)).item()
        rows = torch.arange(0, len(kept), 2)
        finished = Step(
            index=step,
            offer=offered,
            trained=kept,
            features=seen,
            scores=scores,
            weights=scores.softmax(0),
            loss=3.0,
            reward=reward,
            q=seen.hidden.sum(1),
            effects=effects_of(rows, seen.hidden.sum(1)[rows] + seen.loss[rows], 0.1),
        )
        said.append((kept.rows.tolist(), scores.tolist(), selector.observe(finished)))
    return said


@every_selector
def test_conforms_to_the_protocol(make):
    selector = make(0)
    assert isinstance(selector, Selector)
    assert isinstance(selector.needs_entropy, bool)
    assert isinstance(selector.needs_reward, bool)


@every_selector
def test_scores_are_finite_and_one_per_window(make):
    selector = make(0)
    for step in range(6):
        kept = selector.admit(step, proposal(step))
        seen = measure(kept)
        if not selector.needs_entropy:
            seen = replace(seen, entropy=None)
        scores = selector.score(step, kept, seen)
        assert scores.shape == (len(kept),)
        assert scores.is_floating_point()
        assert scores.isfinite().all()
        assert not scores.requires_grad


@every_selector
def test_admits_whole_windows_of_the_proposal_and_at_least_one(make):
    selector = make(0)
    for step in range(6):
        offered = proposal(step)
        kept = selector.admit(step, offered)
        rows = kept.rows
        assert 1 <= len(kept) <= N
        assert rows.tolist() == sorted(set(rows.tolist()))
        for name in ("tokens", "ids", "source", "difficulty"):
            assert torch.equal(getattr(kept.windows, name), getattr(offered.windows, name)[rows])


@every_selector
@pytest.mark.parametrize("size", [1, 3])
def test_scores_of_the_parts_are_the_parts_of_the_scores(make, size):
    """The single-pass step asks per micro-batch, before it has seen the rest."""
    selector = make(0)
    for step in range(5):
        kept = selector.admit(step, proposal(step))
        seen = measure(kept)
        whole = selector.score(step, kept, seen)
        parts = []
        for start in range(0, len(kept), size):
            part = slice(start, start + size)
            features = Features(hidden=seen.hidden[part], loss=seen.loss[part], entropy=seen.entropy[part])
            parts.append(selector.score(step, kept.take(part), features))
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


@every_selector
def test_one_seed_gives_one_behaviour_and_leaves_the_global_generator_alone(make):
    before = torch.get_rng_state()
    assert play(make(0), range(8)) == play(make(0), range(8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["random-single", "random-k", "bandit"])
def test_another_seed_gives_another_draw(name):
    assert play(SELECTORS[name](0), range(8)) != play(SELECTORS[name](1), range(8))


@every_selector
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_state_survives_a_checkpoint(make, stop):
    original, restored = make(0), make(1)
    play(original, range(stop))
    play(restored, range(20, 23))  # whatever it was, the state replaces it
    buffer = io.BytesIO()
    torch.save(original.state_dict(), buffer)
    buffer.seek(0)
    continued = play(original, range(stop, stop + 6))
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert play(restored, range(stop, stop + 6)) == continued


@every_selector
def test_a_state_is_a_snapshot_that_later_steps_do_not_touch(make):
    selector = make(0)
    play(selector, range(3))
    state = selector.state_dict()
    continued = play(selector, range(3, 8))
    selector.load_state_dict(state)
    assert play(selector, range(3, 8)) == continued


@every_selector
def test_observe_returns_floats_by_namespaced_name(make):
    for _, _, metrics in play(make(0), range(5)):
        assert all("/" in name and type(value) is float for name, value in metrics.items())
