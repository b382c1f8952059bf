"""The single-pass gradient against two passes and against plain autograd, in float64."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import TINY, in_pieces, random_offer, tiny_lm

from curriq.config import CriticConfig
from curriq.lm import mixture as mixture_module
from curriq.lm.mixture import IN_RANGE, Reference, single_pass, two_pass
from curriq.rng import Generators
from curriq.select.bandit import SourceBandit
from curriq.select.base import RandomK, Uniform
from curriq.select.competence import Competence, RarityDifficulty
from curriq.select.loss import ByLoss, ExcessLoss, Uncertainty
from curriq.select.soft_q import SoftQ
from curriq.softq.critic import QInputs, TDCritic
from curriq.softq.temperature import FixedBeta

N, T = 11, 8


def double_lm(architecture="gpt2"):
    lm = tiny_lm(architecture)
    lm.network.double()
    return lm


def gradients(lm):
    return torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in lm.parameters]
    )


def plain_autograd(lm, offer, scores):
    """Σ softmax(s)_i ℓ_i by the model's own logits and one backward pass; nothing of curriq in it."""
    tokens = offer.windows.tokens
    lm.network.zero_grad(set_to_none=True)
    logits = lm.network(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    (torch.softmax(scores.double(), 0) @ losses).backward()
    return gradients(lm), losses.detach()


def critic_with(lm, beta):
    temperature = FixedBeta(beta)
    critic = TDCritic(CriticConfig(), QInputs(("last",), lm.width), temperature, "cpu", Generators(3))
    critic.online.double()
    return SoftQ(critic, temperature)


SELECTORS = {
    "uniform": lambda lm: Uniform(),
    "soft-q": lambda lm: critic_with(lm, 1.0),
    "soft-q, sharp": lambda lm: critic_with(lm, 1e-3),
    "high-loss": lambda lm: ByLoss(0.01, +1),
    "low-loss": lambda lm: ByLoss(0.5, -1),
    "uncertainty": lambda lm: Uncertainty(0.01),
    "random-k": lambda lm: RandomK(4, torch.Generator().manual_seed(0)),
    "competence": lambda lm: Competence(RarityDifficulty(lm.vocab_size), 10, 0.5),
    "rho": lambda lm: ExcessLoss(lambda windows: windows.tokens.double().mean(1) / 10, 0.1),
    "bandit": lambda lm: SourceBandit(("a", "b", "c"), 0.1, 0.1, torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 11, 64])
def test_single_pass_equals_two_pass_and_autograd(name, micro_batch):
    lm = double_lm()
    selector = SELECTORS[name](lm)
    offer = selector.admit(0, random_offer(N, T))

    def score(part, features):
        return selector.score(0, part, features)

    lm = in_pieces(lm, micro_batch, 2 * T)
    one = single_pass(lm, offer, score, selector.needs_entropy)
    gradient = gradients(lm)
    two = two_pass(lm, offer, score, selector.needs_entropy)
    torch.testing.assert_close(gradients(lm), gradient, rtol=0, atol=1e-13)
    expected, losses = plain_autograd(lm, offer, one.scores)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(one.features.loss, losses, rtol=0, atol=1e-12)
    torch.testing.assert_close(one.weights, two.weights, rtol=0, atol=1e-13)
    assert one.weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert one.loss == pytest.approx((one.weights @ losses).item(), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    scores=st.lists(st.floats(-600, 600), min_size=1, max_size=9),
    micro_batch=st.integers(1, 10),
    chunk=st.integers(1, 40),
)
def test_any_scores_and_any_cut(scores, micro_batch, chunk):
    """Running maxima that grow late, by hundreds of nats, in any order and any chunking."""
    lm = double_lm()
    table = torch.tensor(scores, dtype=torch.float64)
    offer = random_offer(len(scores), T)

    def score(part, features):
        return table[part.rows]

    single_pass(in_pieces(lm, micro_batch, chunk), offer, score)
    gradient = gradients(lm)
    expected, _ = plain_autograd(lm, offer, table)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)


def test_maximum_that_grows_at_the_last_window():
    lm = double_lm()
    table = torch.cat([torch.linspace(-5, 0, N - 1), torch.tensor([40.0])]).double()
    offer = random_offer(N, T)
    result = single_pass(in_pieces(lm, 2, T), offer, lambda part, f: table[part.rows])
    gradient = gradients(lm)
    last, _ = plain_autograd(lm, offer.take(slice(N - 1, N)), torch.zeros(1))
    assert result.weights[-1].item() == pytest.approx(1, abs=1e-15)
    torch.testing.assert_close(gradient, last, rtol=0, atol=1e-12)


def test_windows_of_weight_zero_leave_no_trace():
    lm = double_lm()
    table = torch.zeros(N).double()
    table[:4] = -torch.inf
    offer = random_offer(N, T)
    result = single_pass(in_pieces(lm, 3, T), offer, lambda part, f: table[part.rows])
    gradient = gradients(lm)
    expected, _ = plain_autograd(lm, offer.take(slice(4, N)), torch.zeros(N - 4))
    assert result.weights[:4].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)


def test_scores_that_leave_no_window_say_so():
    with pytest.raises(FloatingPointError, match="not finite"):
        single_pass(
            in_pieces(tiny_lm(), 2, 64), random_offer(2, T), lambda part, f: torch.full((2,), -torch.inf)
        )


@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture(architecture):
    """Llama-like models normalise in float32 inside, hence the wider margin."""
    lm = double_lm(architecture)
    offer = random_offer(N, T)
    result = single_pass(in_pieces(lm, 4, 2 * T), offer, lambda part, f: 5 * f.loss)
    gradient = gradients(lm)
    expected, _ = plain_autograd(lm, offer, result.scores)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-6)


def test_logits_of_a_whole_batch_never_exist(monkeypatch):
    """The head sees at most the stated number of tokens at once (one window at least)."""
    lm = tiny_lm()
    largest = 0
    head = lm.head

    def watched(hidden):
        nonlocal largest
        largest = max(largest, hidden.shape[:-1].numel())
        return head(hidden)

    monkeypatch.setattr(lm, "head", watched)
    single_pass(in_pieces(lm, N, 3 * T), random_offer(N, T), lambda p, f: f.loss)
    assert 0 < largest <= 3 * T
    largest = 0
    single_pass(in_pieces(lm, N, 3), random_offer(N, T), lambda p, f: f.loss)
    assert largest <= 3  # a window longer than the chunk is cut within


def test_dropout_scores_without_noise_and_trains_with_it():
    lm = tiny_lm(dropout=0.5)
    offer = random_offer(N, T)
    sizes = {"micro_batch": 4, "chunk_tokens": 64}
    first = two_pass(in_pieces(lm, **sizes), offer, lambda p, f: f.loss)
    one = gradients(lm)
    second = two_pass(in_pieces(lm, **sizes), offer, lambda p, f: f.loss)
    torch.testing.assert_close(first.scores, second.scores, rtol=0, atol=0)
    assert not torch.equal(one, gradients(lm))
    assert lm.network.training


def test_gradient_scaling_is_the_online_softmax(monkeypatch):
    """Without the rescaling the late maximum would give a wrong gradient: the test above can fail."""
    monkeypatch.setattr(mixture_module, "_scale", lambda gradients, log_factor: None)
    lm = double_lm()
    table = torch.linspace(-3, 3, N).double()
    offer = random_offer(N, T)
    single_pass(in_pieces(lm, 2, T), offer, lambda part, f: table[part.rows])
    wrong = gradients(lm)
    expected, _ = plain_autograd(lm, offer, table)
    assert (wrong - expected).abs().max() > 1e-3


def reference_at(c):
    """The maximum of two steps before was c, so it is the next step's reference."""
    reference = Reference()
    for _ in range(2):
        reference.peak = c
        reference.advance()
    assert reference.c == c
    return reference


@settings(max_examples=30, deadline=None)
@given(
    scores=st.lists(st.floats(-600, 600), min_size=1, max_size=9),
    c=st.floats(-700, 700),
    micro_batch=st.integers(1, 10),
    chunk=st.integers(1, 40),
)
def test_any_reference_gives_the_gradient(scores, c, micro_batch, chunk):
    """exp(s − c) ℓ is a loss for any c; far from the scores it overflows or vanishes, and is taken again."""
    lm = double_lm()
    table = torch.tensor(scores, dtype=torch.float64)
    offer = random_offer(len(scores), T)
    reference = reference_at(c)
    result = single_pass(
        in_pieces(lm, micro_batch, chunk), offer, lambda part, features: table[part.rows], reference=reference
    )
    gradient = gradients(lm)
    expected, losses = plain_autograd(lm, offer, table)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(result.weights, torch.softmax(table, 0), rtol=0, atol=1e-13)
    assert result.loss == pytest.approx((torch.softmax(table, 0) @ losses).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("away", "passes"), [(0, 1), (-IN_RANGE, 1), (IN_RANGE, 1), (IN_RANGE + 1, 2), (-200, 2)]
)
def test_a_reference_out_of_range_costs_a_second_pass_in_float32(away, passes):
    lm = tiny_lm()
    table = torch.linspace(-3, 0, N)
    offer = random_offer(N, T)
    scored = 0

    def score(part, features):
        nonlocal scored
        scored += len(part)
        return table[part.rows]

    single_pass(in_pieces(lm, 2, T), offer, score, reference=reference_at(-float(away)))
    assert scored == passes * N
    gradient = gradients(lm)
    single_pass(lm, offer, score)
    torch.testing.assert_close(gradient, gradients(lm), rtol=1e-4, atol=1e-7)


def test_the_reference_follows_a_maximum_that_moves_little():
    reference = Reference()
    seen = []
    for peak in (5.0, 6.0, 7.0, 40.0, 39.0, -3.0):
        reference.peak = peak
        assert reference.c == ([None, *seen])[-1]
        reference.advance()
        seen.append(reference.c)
    assert seen == [None, 6.0, 7.0, None, 39.0, None]
    other = Reference()
    other.load_state_dict(reference.state_dict())
    other.peak = -4.0
    other.advance()
    other.advance()  # a step that scored nothing changes nothing
    assert other.c == -4.0


def test_scores_that_are_not_finite_say_so_with_a_reference_too():
    for wrong in (-torch.inf, torch.inf, torch.nan):
        with pytest.raises(FloatingPointError, match="not finite"):
            single_pass(
                in_pieces(tiny_lm(), 2, 64),
                random_offer(2, T),
                lambda part, f, wrong=wrong: torch.full((2,), wrong),
                reference=reference_at(0.0),
            )


def test_the_host_waits_for_the_device_once_per_step(monkeypatch):
    """With a reference no score is read while the passes run; numbers are read together, at the end."""
    lm = tiny_lm()
    offer = random_offer(N, T)
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        read = getattr(torch.Tensor, name)

        def counted(self, *arguments, read=read, name=name):
            if inspect.stack()[1].frame.f_globals["__name__"].startswith("curriq."):
                reads.append(name)
            return read(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    score = SELECTORS["high-loss"](lm).score
    single_pass(in_pieces(lm, 2, T), offer, lambda part, f: score(0, part, f), reference=reference_at(400.0))
    assert reads == ["tolist"]
