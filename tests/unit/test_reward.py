"""Held-out losses against brute force, and the fresh subsets of the reward."""

import pytest
import torch
import torch.nn.functional as F
from tests.helpers import VOCAB, in_pieces, random_offer, tiny_lm

from curriq.lm import held_out as held_out_module
from curriq.lm.held_out import HeldOutReward, held_out_loss
from curriq.types import Windows

SIZES = {"micro_batch": 4, "chunk_tokens": 64}


def windows(n: int = 13, length: int = 8) -> Windows:
    return random_offer(n, length, seed=5).windows


def brute_force(lm, held_out: Windows) -> float:
    """Every prediction on its own, in float64: −log p of each token that has a token before it."""
    double = tiny_lm()
    double.network.load_state_dict(lm.network.state_dict())
    double.network.double().eval()
    tokens = held_out.tokens
    with torch.no_grad():
        log_probs = F.log_softmax(double.network(input_ids=tokens).logits, dim=-1)
    picked = [log_probs[i, t, tokens[i, t + 1]].item() for i in range(len(tokens)) for t in range(7)]
    return -sum(picked) / len(picked)


def reward_of(seed: int = 0, m: int = 6, reward_set: Windows | None = None, lm=None) -> HeldOutReward:
    generator = torch.Generator().manual_seed(seed)
    reward_set = windows() if reward_set is None else reward_set
    return HeldOutReward(lm or tiny_lm(), reward_set, m, generator)


def measure(reward: HeldOutReward, step: int = 0) -> float | None:
    """The reward of a step that changes nothing."""
    reward.draw(step)
    return reward.after(step)[0]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Windows]:
    """The subsets whose loss was asked for, in order."""
    seen: list[Windows] = []

    def watch(lm, subset):
        seen.append(subset)
        return held_out_loss(lm, subset)

    monkeypatch.setattr(held_out_module, "held_out_loss", watch)
    return seen


def rows(drawn: Windows) -> list[tuple[int, ...]]:
    return [tuple(row) for row in drawn.tokens.tolist()]


class TestHeldOutLoss:
    def test_equals_brute_force(self) -> None:
        lm = tiny_lm()
        assert held_out_loss(in_pieces(lm, **SIZES), windows()) == pytest.approx(
            brute_force(lm, windows()), abs=1e-6
        )

    @pytest.mark.parametrize("micro_batch", [1, 2, 5, 13, 100])
    @pytest.mark.parametrize("chunk_tokens", [1, 9, 24, 10_000])
    def test_does_not_depend_on_how_it_is_cut(self, micro_batch: int, chunk_tokens: int) -> None:
        """13 windows: the last batch is smaller than the others, which a mean of means would feel."""
        lm = tiny_lm()
        cut = held_out_loss(in_pieces(lm, micro_batch, chunk_tokens), windows())
        whole = held_out_loss(in_pieces(lm, 13, 10_000), windows())
        assert cut == pytest.approx(whole, abs=1e-6)

    def test_is_measured_without_dropout_and_without_gradient(self) -> None:
        lm = tiny_lm(dropout=0.5)
        assert held_out_loss(in_pieces(lm, **SIZES), windows()) == held_out_loss(
            in_pieces(tiny_lm(), **SIZES), windows()
        )
        assert lm.network.training
        assert all(p.grad is None for p in lm.parameters)

    def test_of_a_model_that_knows_nothing(self) -> None:
        lm = tiny_lm()
        with torch.no_grad():
            lm.network.lm_head.weight.zero_()
        expected = torch.tensor(float(VOCAB)).log().item()
        assert held_out_loss(in_pieces(lm, **SIZES), windows()) == pytest.approx(expected, abs=1e-6)


class TestHeldOutReward:
    def test_is_the_mean_log_likelihood_of_its_subset(self, drawn: list[Windows]) -> None:
        lm = tiny_lm()
        measured = measure(reward_of(lm=lm))
        assert measured < 0
        assert measured == pytest.approx(-brute_force(lm, drawn[0]), abs=1e-6)

    def test_draws_without_replacement(self, drawn: list[Windows]) -> None:
        reward = reward_of()
        for _ in range(20):
            measure(reward)
        for subset in drawn:
            assert len(set(rows(subset))) == 6
            assert set(rows(subset)) <= set(rows(windows()))

    def test_subset_of_all_is_the_whole_set(self) -> None:
        lm = tiny_lm()
        everything = measure(reward_of(m=13, lm=lm))
        assert everything == pytest.approx(-held_out_loss(in_pieces(lm, **SIZES), windows()), abs=1e-6)

    def test_subsets_are_fresh_and_cover_the_set(self, drawn: list[Windows]) -> None:
        reward = reward_of()
        for _ in range(40):
            measure(reward)
        assert len({frozenset(rows(subset)) for subset in drawn}) > 35  # of 1716 possible ones
        counts = {row: 0 for row in rows(windows())}
        for subset in drawn:
            for row in rows(subset):
                counts[row] += 1
        # Each window is in a subset with probability 6/13: 18.5 of 40 times, standard deviation 3.2.
        assert 6 < min(counts.values()) <= max(counts.values()) < 31

    def test_has_a_generator_of_its_own(self, drawn: list[Windows]) -> None:
        state = torch.get_rng_state()
        one, two, other = reward_of(0), reward_of(0), reward_of(1)
        torch.manual_seed(123)
        first = [measure(one) for _ in range(3)]
        torch.manual_seed(321)
        assert [measure(two) for _ in range(3)] == first
        assert [measure(other) for _ in range(3)] != first
        torch.manual_seed(7)
        before = torch.get_rng_state()
        measure(one)
        assert torch.equal(torch.get_rng_state(), before)
        torch.set_rng_state(state)

    def test_better_model_earns_more(self) -> None:
        """After steps on the held-out text itself the reward must go up."""
        lm = tiny_lm()
        reward = reward_of(m=13, lm=lm)
        before = measure(reward)
        optimizer = torch.optim.AdamW(lm.parameters, lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            tokens = windows().tokens
            logits = lm.network(input_ids=tokens).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        assert measure(reward) > before + 0.1
