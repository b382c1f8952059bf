"""Whole steps of Algorithm 2 against the paper's lines written out in float64, with autograd for the search.

The reference has its own softmax bridge, ring buffer, Eq. 16, critic, AdamW and model calls. It shares the
model's weights at the start, the stream's windows and the random numbers.
"""

import copy
import math
import zlib
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from curriq.data.tokenizer import ordinary_ids
from curriq.presets import preset
from curriq.rng import Generators
from curriq.train.loop import train_step
from curriq.train.run import prepare

K, L, T_MAX, SIZE, INGEST, TOP, STEPS = 5, 6, 6, 40, 7, 5, 4
RANDOM_STRINGS = 64
TIGHT = {"rtol": 0, "atol": 1e-9}


@cache
def gram_vector(gram: int) -> np.ndarray:
    return np.random.default_rng(gram).standard_normal(48)


class DenseEncoder:
    """Unit vectors of the text's byte trigrams, without ties."""

    def encode(self, texts: list[str]) -> np.ndarray:
        rows = []
        for text in texts:
            data = text.encode()
            grams = [zlib.crc32(data[i : i + 3]) for i in range(max(1, len(data) - 2))]
            rows.append(sum(map(gram_vector, grams)))
        vectors = np.array(rows)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class AdamW:
    """Loshchilov and Hutter's, with the settings of one parameter group."""

    def __init__(self, parameters: list[torch.Tensor], lr: float, decay: float, beta2: float) -> None:
        self.parameters, self.lr, self.decay, self.beta2, self.t = parameters, lr, decay, beta2, 0
        self.first, self.second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    @torch.no_grad()
    def step(self, gradients: tuple[torch.Tensor, ...], limit: float) -> None:
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        factor = min(1.0, limit / (norm + 1e-6))
        self.t += 1
        for p, g, m, v in zip(self.parameters, gradients, self.first, self.second, strict=True):
            p.mul_(1 - self.lr * self.decay)
            m.mul_(0.9).add_(0.1 * factor * g)
            v.mul_(self.beta2).add_((1 - self.beta2) * (factor * g) ** 2)
            v_hat = v / (1 - self.beta2**self.t)
            p.sub_(self.lr * m / (1 - 0.9**self.t) / (v_hat.sqrt() + 1e-8))


def window_losses(network, tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([F.cross_entropy(network(input_ids=t[None]).logits[0, :-1], t[1:]) for t in tokens])


def last_hidden(network, **inputs: torch.Tensor) -> torch.Tensor:
    return network.transformer(**inputs).last_hidden_state[:, -1]


def q_of(phi: list[torch.Tensor], h: torch.Tensor) -> torch.Tensor:
    w1, b1, w2, b2 = phi
    return (torch.relu(h @ w1.T + b1) @ w2.T + b2).squeeze(-1)


class Reference:
    """Algorithm 2, lines 1–28, on the components of a run before its first step."""

    precision = torch.float64
    """Of the noise, whose random numbers depend on it."""

    def __init__(self, run, stream, config) -> None:
        self.config, self.stream = config, stream
        components = run.session.components
        self.network = copy.deepcopy(run.lm.network).eval()
        online = components.critic.online
        layers = (online.layer1, online.layer2)
        self.phi = [
            p.detach().clone().requires_grad_() for layer in layers for p in (layer.weight, layer.bias)
        ]
        self.slow = [p.detach().clone() for p in self.phi]
        self.theta = list(self.network.parameters())
        optim, critic = config.optim, config.critic
        self.theta_steps = AdamW(self.theta, optim.lm_lr, optim.weight_decay, optim.adam_beta2)
        self.phi_steps = AdamW(self.phi, critic.q_lr, 0.0, 0.999)
        self.draws = Generators(config.train.seed)
        self.tokenizer = run.corpus.tokenizer
        self.vocabulary = torch.from_numpy(ordinary_ids(self.tokenizer))
        self.ring: list[tuple[torch.Tensor, np.ndarray, int]] = []
        self.head, self.used, self.previous = 0, set(), None
        self.ingest(SIZE)  #                                                                   line 2

    def ingest(self, count: int) -> None:
        windows = self.stream.read(count).windows
        vectors = DenseEncoder().encode(self.tokenizer.batch_decode(windows.tokens.tolist()))
        for row in zip(windows.tokens, vectors, windows.ids.tolist(), strict=True):
            if len(self.ring) < SIZE:
                self.ring.append(row)
            else:
                self.used.discard(self.head)
                self.ring[self.head] = row
            self.head = (self.head + 1) % SIZE

    def soft(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        weight = self.network.transformer.wte.weight.detach()[self.vocabulary]
        return torch.softmax(logits / temperature, -1) @ weight

    def soft_q(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        return q_of(self.phi, last_hidden(self.network, inputs_embeds=self.soft(logits, temperature)))

    def one_hot(self, index: torch.Tensor) -> torch.Tensor:
        return F.one_hot(index, len(self.vocabulary)).double() * self.config.langevin.langevin_margin

    def search(self) -> tuple[torch.Tensor, dict[str, float]]:
        """Lines 5–14, and the diagnostics of Section 3.6."""
        c = self.config.langevin
        first, last = c.bridge_temperature_start, c.bridge_temperature_end
        shape = chains, length = c.chains, c.query_tokens
        index = torch.randint(len(self.vocabulary), shape, generator=self.draws("langevin/start"))
        logits = self.one_hot(index)
        seed = int(torch.randint(2**62, (), generator=self.draws("langevin/noise")))
        noise = torch.Generator().manual_seed(seed)
        q_first, q_before = (self.soft_q(logits, t).mean().item() for t in (first, last))
        norms = []
        for t in range(c.langevin_steps):
            temperature = first + t / (c.langevin_steps - 1) * (last - first)
            logits = logits.detach().requires_grad_()
            energy = self.soft_q(logits, temperature).sum() / c.energy_temperature
            (gradient,) = torch.autograd.grad(energy, logits)
            norm = gradient.flatten(1).norm(dim=1)
            norms.append(norm)
            drift = gradient * torch.clamp(c.langevin_limit / norm, max=1.0)[:, None, None]
            standard = torch.empty_like(drift, dtype=self.precision).normal_(generator=noise)
            eta = standard.double() * c.langevin_noise_scale
            logits = (
                logits.detach() + c.langevin_step_size / 2 * drift + math.sqrt(c.langevin_step_size) * eta
            )
        found = logits.argmax(-1)
        probs = torch.softmax(logits / last, -1)
        others = torch.randint(
            len(self.vocabulary), (RANDOM_STRINGS, length), generator=self.draws("langevin/random-logits")
        )
        flat = F.normalize(self.soft(logits, last).flatten(1), dim=1)
        sets = [set(row) for row in found.tolist()]
        pairs = [(i, j) for i in range(chains) for j in range(i)]
        q_after = self.soft_q(logits, last).mean().item()
        return self.vocabulary[found], {
            "langevin/soft_q_gain": q_after - q_before,
            "langevin/annealed_q_gain": q_after - q_first,
            "langevin/random_soft_q": self.soft_q(self.one_hot(others), last).mean().item(),
            "langevin/entropy": -(probs * probs.clamp_min(1e-300).log()).sum(-1).mean().item(),
            "langevin/max_prob": probs.max(-1).values.mean().item(),
            "langevin/soft_cosine": np.mean([(flat[i] @ flat[j]).item() for i, j in pairs]),
            "langevin/jaccard": np.mean([len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in pairs]),
            "langevin/tokens_changed": (found != index).double().mean().item(),
            "langevin/grad_norm": torch.stack(norms).mean().item(),
            "langevin/clip_fraction": (torch.stack(norms) > c.langevin_limit).double().mean().item(),
        }

    def retrieve(self, queries: torch.Tensor) -> list[int]:
        """Lines 16–17: one draw per query from its top k (Eq. 16); a window that another drew is dropped."""
        vectors = DenseEncoder().encode(self.tokenizer.batch_decode(queries.tolist()))
        uniform = torch.rand(2, K, generator=self.draws("retrieval/draw"), dtype=torch.float64)[0]
        slots, drawn = [], set()
        for vector, u in zip(vectors, uniform.tolist(), strict=True):
            scores = [(float(vector @ row[1]), slot) for slot, row in enumerate(self.ring)]
            best = sorted((s for s in scores if s[1] not in self.used), reverse=True)[:TOP]
            mass = np.exp(np.array([s for s, _ in best]) / self.config.retrieval.retrieval_temperature)
            slot = best[int(np.searchsorted(np.cumsum(mass / mass.sum()), u, side="right"))][1]
            if self.ring[slot][2] not in drawn:
                drawn.add(self.ring[slot][2])
                slots.append(slot)
        if self.config.retrieval.mark_used:
            self.used |= {slot for slot, row in enumerate(self.ring) if row[2] in drawn}
        return slots

    def step(self, held_out: torch.Tensor) -> dict[str, Any]:
        """One iteration of the outer loop; `held_out` is D̂_k."""
        config = self.config
        critic = config.critic
        queries, measured = self.search()
        tokens = torch.stack([self.ring[slot][0] for slot in self.retrieve(queries)])
        self.ingest(INGEST)  #                                                                 line 18
        with torch.no_grad():
            h = torch.cat([last_hidden(self.network, input_ids=t[None]) for t in tokens])
            losses = window_losses(self.network, tokens)
        q = q_of(self.phi, h).detach()
        if self.previous is not None:
            action, reward = self.previous
            with torch.no_grad():  # lines 20–23, and Algorithm 1's lines 19 and 21
                slow = q_of(self.slow, h) / critic.beta
                value = critic.beta * (torch.logsumexp(slow, 0) - math.log(len(tokens)))
            h_previous = last_hidden(self.network, input_ids=action[None])
            target = (1 - critic.gamma) * reward + critic.gamma * value
            loss = 0.5 * (q_of(self.phi, h_previous)[0] - target) ** 2
            both = torch.autograd.grad(loss, [*self.phi, *self.theta])
            self.phi_steps.step(both[: len(self.phi)], critic.q_grad_clip)
            if critic.td_into_theta:
                of_theta = both[len(self.phi) :]
                norm = math.sqrt(sum(g.square().sum().item() for g in of_theta))
                measured["critic/theta_grad_norm"] = norm
                scaled = tuple(critic.td_lambda * g for g in of_theta)
                self.theta_steps.step(scaled, config.optim.grad_clip)
            for slow, fast in zip(self.slow, self.phi, strict=True):
                slow.copy_(critic.polyak_tau * fast.detach() + (1 - critic.polyak_tau) * slow)
            measured |= {"critic/td_loss": loss.item(), "critic/soft_value": value.item()}
        policy = torch.softmax(q / critic.beta, 0)
        u = torch.rand((), generator=self.draws("action"), dtype=torch.float64)
        chosen = int((policy.cumsum(0) <= u).sum())
        weights = policy if critic.q_weighting else torch.full_like(policy, 1 / len(policy))
        mixture = (weights * window_losses(self.network, tokens)).sum()  # line 25
        self.theta_steps.step(torch.autograd.grad(mixture, self.theta), config.optim.grad_clip)
        with torch.no_grad():
            reward = -window_losses(self.network, held_out).mean().item()  # line 27
        self.previous = tokens[chosen], reward
        measured |= {"policy/action": chosen, "train/loss": (weights @ losses).item(), "reward": reward}
        return {"tokens": tokens, "q": q, "weights": weights, "metrics": measured}


MOVING = {
    "energy_temperature": 1e-6,
    "langevin_step_size": 30.0,
    "langevin_noise_scale": 0.1,
    "langevin_margin": 3.0,
    "bridge_temperature_start": 1.0,
}


TD = {"td_into_theta": True, "td_lambda": 0.3, "grad_clip": 0.05}


@pytest.mark.parametrize(
    "settings",
    [{}, MOVING | TD, {"q_weighting": False}, MOVING | {"mark_used": True}],
    ids=["published constants", "tokens move, TD into θ", "w = 1/R", "used windows retired"],
)
def test_four_steps_agree(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("curriq.langevin.build"), "load_encoder", lambda *names: DenseEncoder())
    smoke = preset("smoke")
    tiny = {
        name: smoke.value(name)
        for name in ("sources", "target", "tokenizer_sample_bytes", "vocab_size", "shuffle_buffer", "window")
    }
    sizes = {"reward_set_size": 16, "validation_set_size": 8, "test_set_size": 8, "reward_windows": 4}
    chains = {"chains": K, "query_tokens": L, "langevin_steps": T_MAX, "num_candidates": K}
    buffer = {"buffer_size": SIZE, "ingest": INGEST, "retrieval_top_k": TOP, "encode_ahead": False}
    model = "random:gpt2:hidden_size=32,num_hidden_layers=2,num_attention_heads=2"
    config = preset("paper-langevin").override(
        **tiny, **sizes, **chains, **buffer, model=model, run_dir=str(tmp_path), threads=1,
        held_out_share=0.25, lm_lr=3e-3, micro_batch=4, beta=0.05, steps=STEPS,
        **settings,
    )  # fmt: skip
    run, twin = prepare(config), prepare(config)  # two: the streams must not disturb each other
    components, critic = run.session.components, run.session.components.critic
    for module in (run.lm.network, critic.online, critic.target):
        module.double()
    reference = Reference(run, twin.corpus.stream, config)
    changed = []
    for _ in range(STEPS):
        step = train_step(components, run.session.state)
        expected = reference.step(components.held_out.drawn.tokens)
        torch.testing.assert_close(step.offer.windows.tokens, expected["tokens"], rtol=0, atol=0)
        torch.testing.assert_close(step.q, expected["q"], **TIGHT)
        torch.testing.assert_close(step.weights, expected["weights"], **TIGHT)
        for name, value in expected["metrics"].items():
            assert step.metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
        changed.append(step.metrics["langevin/tokens_changed"])
    for ours, theirs in zip(run.lm.network.parameters(), reference.theta, strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)
    ours = [p for layer in (critic.online.layer1, critic.online.layer2) for p in (layer.weight, layer.bias)]
    for a, b in zip(ours, reference.phi, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    assert (max(changed) > 0) == ("energy_temperature" in settings)
