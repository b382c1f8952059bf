"""Eqs. 11–15 against autograd in float64, hand calculation and known stationary distributions."""

import itertools
import math

import pytest
import torch
from experiments.control_samplers import embedding_step_, nearest_tokens

from curriq.langevin.dynamics import (
    StepRule,
    anneal,
    bridge_gradient,
    extract,
    langevin_step_,
    one_hot_logits,
    soft_embed,
    soft_one_hot,
    soft_statistics,
)

K, L, V, E = 3, 4, 29, 5


def token_probs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Eq. 11 as it is written."""
    return torch.softmax(logits / temperature, dim=-1)


def draw(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def energy(embeddings: torch.Tensor) -> torch.Tensor:
    """Any smooth function that mixes the positions of a chain, but not the chains."""
    mixed = torch.tanh(embeddings.cumsum(1) * torch.linspace(0.3, 1.2, embeddings.shape[-1]).double())
    return (mixed.prod(-1) + mixed.square().sum(-1)).sum(1)


def autograd_gradient(logits: torch.Tensor, temperature: float, weight: torch.Tensor) -> torch.Tensor:
    leaf = logits.clone().requires_grad_()
    energy(token_probs(leaf, temperature) @ weight).sum().backward()
    return leaf.grad


def gradient_at(embeddings: torch.Tensor) -> torch.Tensor:
    leaf = embeddings.clone().requires_grad_()
    energy(leaf).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("chunk", [1, 7, V, 100])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_online_softmax_equals_the_softmax(chunk: int, temperature: float) -> None:
    logits, weight = draw(K, L, V, scale=6), draw(V, E, seed=1)
    soft = soft_embed(logits, temperature, weight, chunk)
    torch.testing.assert_close(
        soft.embeddings, token_probs(logits, temperature) @ weight, rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(soft.log_normaliser, (logits / temperature).logsumexp(-1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_analytic_bridge_equals_autograd(temperature: float) -> None:
    logits, weight = draw(K, L, V, scale=2), draw(V, E, seed=1)
    soft = soft_embed(logits, temperature, weight)
    ours = bridge_gradient(logits, temperature, weight, soft, gradient_at(soft.embeddings))
    torch.testing.assert_close(ours, autograd_gradient(logits, temperature, weight), rtol=1e-10, atol=1e-13)


def test_gradient_is_blind_to_a_shift_of_the_logits() -> None:
    """Adding a constant to all logits of a position changes no p, so the gradient has no such component."""
    logits, weight = draw(K, L, V), draw(V, E, seed=1)
    soft = soft_embed(logits, 1.0, weight)
    gradient = bridge_gradient(logits, 1.0, weight, soft, gradient_at(soft.embeddings))
    assert gradient.sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("block", [1, L * V, 2 * L * V, 10**6])
@pytest.mark.parametrize("rule", ["clip", "chain", "position"])
def test_one_step_by_hand(rule: str, block: int) -> None:
    """Chains of very different gradient norms, some above the limit and some below."""
    logits, weight = draw(K, L, V), draw(V, E, seed=1)
    scales = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)[:, None, None]
    soft = soft_embed(logits, 0.7, weight)
    gradient = gradient_at(soft.embeddings) * scales
    full = autograd_gradient(logits, 0.7, weight) * scales
    limit, step_size = full[1].norm().item() * 2, 0.3
    chain_norm = full.flatten(1).norm(dim=1)
    factor = {
        "clip": (limit / chain_norm).clamp(max=1)[:, None, None],
        "chain": (limit / chain_norm)[:, None, None],
        "position": limit / full.norm(dim=2, keepdim=True),
    }[rule]
    expected = logits + step_size / 2 * full * factor
    ours = logits.clone()
    norms = langevin_step_(
        ours, 0.7, weight, soft, gradient, StepRule(step_size, limit, rule, 0.0), generator(), block
    )
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(norms, chain_norm, rtol=1e-10, atol=0)
    if rule == "clip":
        moved = (ours - logits).flatten(1).norm(dim=1)
        assert moved[2].item() == pytest.approx(step_size / 2 * limit)
        assert moved[0] < 1e-2 * moved[1]


def test_a_gradient_of_zero_moves_nothing() -> None:
    logits, weight = draw(K, L, V), draw(V, E, seed=1)
    for rule in ("clip", "chain", "position"):
        ours = logits.clone()
        soft = soft_embed(ours, 1.0, weight)
        norms = langevin_step_(
            ours, 1.0, weight, soft, torch.zeros(K, L, E).double(), StepRule(1.0, 1.0, rule, 0.0), generator()
        )
        assert torch.equal(ours, logits)
        assert torch.equal(norms, torch.zeros(K).double())


def test_noise_has_the_variance_of_equation_13() -> None:
    """√ε η with η ~ N(0, σ²): variance ε σ², independent over entries and chains."""
    logits, weight = torch.zeros(50, 20, 400), draw(400, 3, dtype=torch.float32)
    soft = soft_embed(logits, 1.0, weight)
    rule = StepRule(0.25, 1.0, "clip", 3.0)
    langevin_step_(logits, 1.0, weight, soft, torch.zeros(50, 20, 3), rule, generator(), 20 * 400 * 7)
    assert logits.std().item() == pytest.approx(0.5 * 3.0, rel=0.01)
    assert logits.mean().abs().item() < 5 * 1.5 / math.sqrt(logits.numel())
    flat = logits.flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(50)).abs().max() < 6 / math.sqrt(flat.shape[1])


def test_the_same_generator_gives_the_same_step_and_leaves_the_global_one_alone() -> None:
    weight = draw(V, E, seed=1)
    results = []
    for seed in (1, 1, 2):
        logits = draw(K, L, V)
        soft = soft_embed(logits, 1.0, weight)
        torch.manual_seed(5)
        langevin_step_(
            logits, 1.0, weight, soft, soft.embeddings, StepRule(1.0, 1.0, "clip", 1.0), generator(seed)
        )
        results.append(logits)
        assert torch.rand(1).item() == torch.rand(1, generator=generator(5)).item()
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("alpha", [[2.0, 2.0], [1.5, 3.0, 2.5]])
def test_stationary_distribution_of_the_softmax_bridge_is_the_dirichlet(alpha: list[float]) -> None:
    """With W = I and E = Σ α_v log p_v, exp(E) over λ is, as a distribution over p, Dirichlet(α): the change
    of variables from λ to p = softmax(λ/τ) has the Jacobian Π p_v, up to a constant."""
    a = torch.tensor(alpha, dtype=torch.float64)
    logits = torch.zeros(4000, 1, len(alpha), dtype=torch.float64)
    weight, temperature, rule = torch.eye(len(alpha)).double(), 0.8, StepRule(0.02, 1e9, "clip", 1.0)
    noise = generator(3)
    for _ in range(500):
        soft = soft_embed(logits, temperature, weight)
        langevin_step_(logits, temperature, weight, soft, a / soft.embeddings, rule, noise)
    p = token_probs(logits, temperature)[:, 0]
    total = a.sum()
    mean = a / total
    variance = mean * (1 - mean) / (total + 1)
    # Error of 4000 draws, and of the finite step.
    torch.testing.assert_close(p.mean(0), mean, rtol=0, atol=0.015)
    torch.testing.assert_close(p.var(0), variance, rtol=0.08, atol=0)


def test_stationary_distribution_of_the_embedding_sampler_is_the_gaussian() -> None:
    """E = −x²/(2s²): an autoregression of known variance s²/(1 − ε/(4s²)), the discretisation included."""
    s2, step_size = 0.5, 0.3
    x = torch.zeros(20_000, 1, 2, dtype=torch.float64)
    noise = generator(4)
    for _ in range(120):
        embedding_step_(x, -x / s2, StepRule(step_size, 1e9, "clip", 1.0), noise)
    assert x.var().item() == pytest.approx(s2 / (1 - step_size / (4 * s2)), rel=0.03)


def test_ascent_without_noise_climbs() -> None:
    logits, weight = draw(K, L, V), draw(V, E, seed=1)
    values = []
    for _ in range(30):
        soft = soft_embed(logits, 1.0, weight)
        values.append(energy(soft.embeddings).sum().item())
        langevin_step_(
            logits,
            1.0,
            weight,
            soft,
            gradient_at(soft.embeddings),
            StepRule(0.5, 1.0, "chain", 0.0),
            generator(),
        )
    assert all(after > before for before, after in itertools.pairwise(values))


def test_annealing_is_linear_between_its_endpoints() -> None:
    assert [anneal(2.0, 0.5, t, 4) for t in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert anneal(2.0, 0.5, 0, 1) == 0.5
    assert anneal(0.5, 2.0, 39, 40) == 2.0


@pytest.mark.parametrize(("margin", "temperature"), [(6.0, 0.5), (10.0, 2.0), (800.0, 0.5)])
def test_soft_one_hot_is_the_soft_embedding_of_one_hot_logits(margin: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, E, generator=generator, dtype=torch.float64)
    tokens = torch.randint(V, (K, L), generator=generator)
    logits = one_hot_logits(tokens, V, margin, torch.float64)
    expected = torch.softmax(logits / temperature, -1) @ weight
    torch.testing.assert_close(soft_one_hot(tokens, margin, temperature, weight), expected)


def test_one_hot_logits_and_their_tokens() -> None:
    tokens = torch.tensor([[3, 0], [28, 3]])
    logits = one_hot_logits(tokens, V, 10.0)
    assert logits.sum().item() == 40.0
    assert torch.equal(extract(logits), tokens)
    published = token_probs(one_hot_logits(torch.tensor([[0]]), 50257, 10.0), 2.0)[0, 0, 0]
    assert published.item() == pytest.approx(
        math.exp(5) / (math.exp(5) + 50256), rel=1e-4
    )  # 0.3 %: hardly one-hot


def test_nearest_tokens_by_brute_force() -> None:
    vectors, weight = draw(2, 3, E), draw(V, E, seed=1)
    cosine = torch.nn.functional.cosine_similarity(vectors[..., None, :], weight, dim=-1)
    for chunk in (4, V):
        index, best = nearest_tokens(vectors, weight, chunk)
        torch.testing.assert_close(best, cosine.amax(-1))
        assert torch.equal(index, cosine.argmax(-1))


@pytest.mark.parametrize("chunk", [5, 100])
def test_soft_statistics_against_their_definitions(chunk: int) -> None:
    logits = draw(K, L, V, scale=3)
    p = token_probs(logits, 0.6)
    entropy, greatest = soft_statistics(logits, 0.6, (logits / 0.6).logsumexp(-1), chunk)
    assert entropy == pytest.approx(-(p * p.log()).sum(-1).mean().item())
    assert greatest == pytest.approx(p.amax(-1).mean().item())


def test_bfloat16_bridge_is_near_the_exact_one() -> None:
    """Relative error of the gradient of one step: bfloat16 keeps eight bits."""
    logits, weight = draw(8, 8, 500, dtype=torch.float32), draw(500, 64, seed=1, dtype=torch.float32)
    g = draw(8, 8, 64, seed=2, dtype=torch.float32)
    exact = bridge_gradient(logits, 1.0, weight, soft_embed(logits, 1.0, weight), g)
    half = weight.bfloat16()
    ours = bridge_gradient(logits, 1.0, half, soft_embed(logits, 1.0, half), g)
    assert ours.dtype == torch.float32
    assert 1e-5 < ((ours - exact).norm() / exact.norm()).item() < 1e-2
