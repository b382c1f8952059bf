"""Samplers of queries: one suite for all, and what each claims for itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from experiments.control_samplers import EmbeddingLangevin, GuidedSwaps
from tests.helpers import VOCAB, open_lm, tiny_lm

from curriq.config import LangevinConfig
from curriq.langevin.dynamics import bridge_gradient, one_hot_logits, soft_embed
from curriq.langevin.energy import Energy
from curriq.langevin.samplers import (
    BASELINE_STRINGS,
    BestOfRandom,
    IdentitySampler,
    QuerySampler,
    SoftmaxLangevin,
    Vocabulary,
    random_strings,
)
from curriq.lm.embeddings import InputEmbeddings
from curriq.lm.model import LanguageModel
from curriq.presets import preset
from curriq.rng import Generators
from curriq.softq.critic import QNetwork
from curriq.types import NO_COST

K, L = 6, 5
ORDINARY = torch.arange(3, VOCAB)  # three special tokens


def setting(**changes: Any) -> LangevinConfig:
    return LangevinConfig(**({"query_tokens": L} | changes))


class World:
    """A tiny model with a random Q of a sensible scale."""

    def __init__(self, lm: LanguageModel, seed: int = 0) -> None:
        self.lm = lm
        self.inputs = InputEmbeddings(lm)
        self.vocabulary = Vocabulary(ORDINARY, "cpu")
        q = QNetwork(lm.width, 8, generator=Generators(seed)("q"))
        self.energy = Energy(lm, self.inputs, lambda f: q(f.hidden), list(q.parameters()), 4)
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self) -> torch.Generator:
        seed = torch.randint(2**62, (), generator=self.generator).item()
        return torch.Generator().manual_seed(int(seed))

    def start(self) -> torch.Tensor:
        return random_strings(K, L, self.vocabulary, torch.Generator().manual_seed(7))

    def langevin(self, config: LangevinConfig) -> SoftmaxLangevin:
        return SoftmaxLangevin(
            config, self.energy, self.vocabulary, self.noise, torch.Generator().manual_seed(5)
        )


SAMPLERS: dict[str, Callable[[World], QuerySampler]] = {
    "langevin": lambda w: w.langevin(setting()),
    "langevin, per position": lambda w: w.langevin(setting(langevin_gradient="position")),
    "langevin, fluency": lambda w: w.langevin(setting(fluency=0.1)),
    "langevin, bf16": lambda w: w.langevin(setting(bridge_precision="bf16")),
    "embedding-langevin": lambda w: EmbeddingLangevin(
        NO_COST, setting(langevin_step_size=0.01), w.energy, w.inputs, w.vocabulary, w.noise
    ),
    "swaps": lambda w: GuidedSwaps(NO_COST, 20, 32, 64, w.energy, w.inputs, w.vocabulary, w.generator),
    "best-of-random": lambda w: BestOfRandom(9, w.energy, w.vocabulary, w.generator),
    "no search": lambda w: IdentitySampler(),
}


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS.keys())
class TestEverySampler:
    def test_strings_are_ordinary_tokens_and_the_start_is_left_alone(self, make) -> None:
        world = World(tiny_lm("gpt2"))
        start = world.start()
        sampler = make(world)
        assert isinstance(sampler, QuerySampler)
        sample = sampler.sample(start)
        assert torch.equal(start, world.start())
        assert sample.tokens.shape == (K, L)
        assert torch.isin(sample.tokens, ORDINARY).all()
        assert all(type(value) is float for value in sample.metrics.values())

    def test_one_seed_gives_one_result(self, make) -> None:
        first, second = (make(World(tiny_lm("gpt2"))).sample(World(tiny_lm("gpt2")).start()) for _ in "12")
        assert torch.equal(first.tokens, second.tokens)
        assert first.metrics == second.metrics

    def test_chains_do_not_depend_on_the_global_generator(self, make) -> None:
        results = []
        for seed in (0, 1):
            world = World(tiny_lm("gpt2"))
            torch.manual_seed(seed)
            results.append(make(world).sample(world.start()).tokens)
        assert torch.equal(*results)


def test_published_defaults_change_no_token() -> None:
    """Forty steps of noise have a deviation of 0.63, the clipped drift is smaller, the margin is 10."""
    world = World(tiny_lm("gpt2"))
    published = preset("paper-langevin").override(query_tokens=L).langevin
    sample = world.langevin(published).sample(world.start())
    assert torch.equal(sample.tokens, world.start())


@pytest.mark.parametrize("seed", range(3))
def test_recommended_settings_change_most_tokens_and_climb(seed: int) -> None:
    world = World(tiny_lm("gpt2"), seed)
    sample = world.langevin(setting()).sample(world.start())
    changed = (sample.tokens != world.start()).float().mean()
    before, after = world.energy.hard(world.start()), world.energy.hard(sample.tokens)
    strings = random_strings(200, L, world.vocabulary, torch.Generator().manual_seed(9))
    others = world.energy.hard(strings)
    assert changed > 0.5
    assert after.mean() > before.mean()
    assert after.mean() > others.mean() + others.std()
    assert sample.metrics["langevin/soft_q_gain"] > 0


def test_scaled_gradients_make_the_search_blind_to_the_scale_of_q() -> None:
    """Powers of two scale every number exactly, so that rounding cannot part the chains."""
    world = World(tiny_lm("gpt2"))
    results = [
        World(world.lm).langevin(setting(energy_temperature=t)).sample(world.start()) for t in (2**-6, 2.0**6)
    ]
    assert torch.equal(results[0].tokens, results[1].tokens)


def test_clip_fraction_counts_chains_and_steps() -> None:
    world = World(tiny_lm("gpt2"))
    for limit, fraction in ((1e9, 0.0), (1e-12, 1.0)):
        config = setting(langevin_gradient="clip", langevin_limit=limit)
        assert world.langevin(config).sample(world.start()).metrics["langevin/clip_fraction"] == fraction


def test_soft_diagnostics_from_the_whole_logits() -> None:
    """Soft Q of fresh random logits, diversity and the annealed gain of a search that moves nothing."""
    world, config = World(tiny_lm("gpt2")), setting(langevin_noise_scale=0.0, langevin_step_size=1e-9)
    start = world.start()
    metrics = world.langevin(config).sample(start).metrics
    weight = world.vocabulary.rows(world.inputs.weight)

    def soft(strings: torch.Tensor, temperature: float) -> torch.Tensor:
        logits = one_hot_logits(world.vocabulary.position(strings), len(weight), config.langevin_margin)
        return torch.softmax(logits / temperature, -1) @ weight

    end, begin = config.bridge_temperature_end, config.bridge_temperature_start
    q_end, q_begin = (world.energy.soft(soft(start, t)).mean().item() for t in (end, begin))
    assert metrics["langevin/annealed_q_gain"] == pytest.approx(q_end - q_begin, abs=1e-6)
    assert abs(q_end - q_begin) > 1e-4 > abs(metrics["langevin/soft_q_gain"])
    others = random_strings(BASELINE_STRINGS, L, world.vocabulary, torch.Generator().manual_seed(5))
    expected = world.energy.soft(soft(others, end)).mean().item()
    assert metrics["langevin/random_soft_q"] == pytest.approx(expected, abs=1e-6)
    flat = soft(start, end).flatten(1)
    cosines = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    off_diagonal = cosines[~torch.eye(K, dtype=torch.bool)].mean().item()
    assert metrics["langevin/soft_cosine"] == pytest.approx(off_diagonal, abs=1e-6)


def test_swaps_never_lower_q_and_change_one_token_per_step() -> None:
    world = World(tiny_lm("gpt2"))
    start, q = world.start(), world.energy.hard(world.start())
    sampler = GuidedSwaps(NO_COST, 1, 32, 64, world.energy, world.inputs, world.vocabulary, world.generator)
    for _ in range(5):
        sample = sampler.sample(start)
        now = world.energy.hard(sample.tokens)
        assert (now >= q - 1e-6).all()
        assert ((sample.tokens != start).sum(1) <= 1).all()
        start, q = sample.tokens, now
    assert (q > world.energy.hard(world.start())).all()


def test_best_of_random_is_the_best() -> None:
    world = World(tiny_lm("gpt2"))
    sample = BestOfRandom(9, world.energy, world.vocabulary, torch.Generator().manual_seed(3)).sample(
        world.start()
    )
    others = random_strings(K * 8, L, world.vocabulary, torch.Generator().manual_seed(3)).view(K, 8, L)
    strings = torch.cat([world.start()[:, None], others], 1)
    q = world.energy.hard(strings.view(-1, L)).view(K, 9)
    torch.testing.assert_close(world.energy.hard(sample.tokens), q.amax(1))


@pytest.mark.parametrize("tied", [True, False])
def test_fluency_prior_is_the_gradient_of_the_expected_log_likelihood(tied: bool) -> None:
    """∂/∂λ of Σ_i Σ_v p_{i,v} log p_θ(v | ẽ_<i), the prediction held fixed, by autograd."""
    lm = open_lm(
        "random:gpt2:hidden_size=16,num_hidden_layers=1,num_attention_heads=2,"
        f"tie_word_embeddings={str(tied).lower()}"
    )
    world = World(lm)
    assert world.inputs.is_tied == tied
    weight, temperature, amount = world.vocabulary.rows(world.inputs.weight), 0.8, 0.3
    logits = torch.randn(K, L, len(ORDINARY), generator=torch.Generator().manual_seed(2))
    sampler = world.langevin(setting(fluency=amount, energy_temperature=1e9))  # the prior alone
    wide = sampler._weight()
    soft = soft_embed(logits, temperature, wide)
    drift = sampler._drift(world.energy.point(soft.embeddings[..., : world.inputs.width]))
    ours = bridge_gradient(logits, temperature, wide, soft, drift)

    leaf = logits.clone().requires_grad_()
    p = torch.softmax(leaf / temperature, -1)
    with torch.no_grad():
        predicted = lm.head(world.inputs.trunk(p @ weight))[..., ORDINARY].log_softmax(-1)
    (p[:, 1:] * predicted[:, :-1]).sum().mul(amount).backward()
    torch.testing.assert_close(ours, leaf.grad, rtol=1e-3, atol=1e-6)


def test_vocabulary_with_a_gap_takes_the_right_rows() -> None:
    ids = torch.tensor([1, 2, 5, 9])
    vocabulary = Vocabulary(ids, "cpu")
    weight = torch.arange(20.0).view(10, 2)
    assert torch.equal(vocabulary.rows(weight), weight[ids])
    assert torch.equal(vocabulary.position(torch.tensor([[9, 1], [5, 5]])), torch.tensor([[3, 0], [2, 2]]))
    solid = Vocabulary(torch.arange(2, 6), "cpu")
    assert solid.rows(weight).data_ptr() == weight[2:].data_ptr()
