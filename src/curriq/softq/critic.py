"""Q_φ, its target network, the TD learning rule of Algorithm 1, and credit assignment.

The reward r_k follows from the whole mixture Σ w_i ℓ_i. A credit rule turns a finished step into a
regression: some windows, how their Q-values combine into predictions q̂, and what is added to the
Bellman target y (Eq. 3) for each of them. The critic then descends the mean of ½ (q̂ − (y + offset))².
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from curriq.config import CriticConfig, FeatureName
from curriq.rng import Generators
from curriq.softq.equations import boltzmann, polyak_, soft_value, td_target
from curriq.softq.temperature import Temperature
from curriq.state import Saved
from curriq.types import NO_COST, Cost, Features, Metrics, Step


@dataclass(frozen=True, kw_only=True)
class Regression:
    """What one transition asks of Q.

    Attributes:
        features: of the windows of the transition whose Q-values enter.
        combine: q̂ = combine @ Q(rows); None for the identity, one prediction per window.
        offsets: added to y, one per prediction, nats per token.
    """

    features: Features
    combine: Float[Tensor, "r m"] | None
    offsets: Float[Tensor, "r"]


def sampled_credit(previous: Step) -> Regression:
    """The paper's rule: the sampled candidate answers for the step, q̂ = Q(h_a).

    Given that candidate a was drawn from a nearly uniform policy, the mixture's reward moves by only
    π_a of its own value, so Q recovers about 1/N of the true scale.
    """
    assert previous.action is not None, "a critic that has values draws an action"
    weights = previous.weights
    acted = previous.features.take(slice(previous.action, previous.action + 1))
    return Regression(features=acted, combine=None, offsets=weights.new_zeros(1))


def mixture_credit(previous: Step) -> Regression:
    """The mixture answers for the step, q̂ = Σ w_i Q(h_i): what was trained on is what is rewarded.

    Recovers the full scale where rewards are linear in the mixture weights, as long as the weights vary
    (`--dirichlet-concentration`). Reads the stored features of all candidates; the action plays no part.
    """
    weights = previous.weights
    return Regression(features=previous.features, combine=weights[None], offsets=weights.new_zeros(1))


def counterfactual_credit(previous: Step) -> Regression | None:
    """Every probed window answers for itself: y_i = y + e_i − Σ w_j e_j.

    Had the step been taken on window i alone, its reward would have been r_k plus the window's own effect
    minus the mixture's, to first order (`lm/held_out.py`). The effect on the *level* of the held-out
    log-probability lasts, so it reaches the normalised return in full: its share (1 − γ) now, and γ through
    every later level, sum to 1. Steps without measured effects teach nothing.
    """
    effects = previous.effects
    if effects is None:
        return None
    offsets = effects.effect - effects.mixture
    return Regression(features=effects.features, combine=None, offsets=offsets)


CREDIT_RULES: dict[str, Callable[[Step], Regression | None]] = {
    "sampled": sampled_credit,
    "mixture": mixture_credit,
    "counterfactual": counterfactual_credit,
}
"""The values of `CriticConfig.credit`; None where a step teaches nothing under the rule."""


class QReplay(Saved):
    """The last `capacity` pairs of Q's input and its target, sampled uniformly.

    A pair keeps the target that was computed when it was stored; later changes of Q̄ do not reach it.
    """

    SAVED = ("_hidden", "_targets", "_added", "_generator")

    def __init__(
        self, capacity: int, width: int, device: torch.device | str, generator: torch.Generator
    ) -> None:
        assert capacity > 0
        self.capacity = capacity
        self._hidden = torch.zeros(capacity, width, device=device)
        self._targets = torch.zeros(capacity, device=device)
        self._added = 0
        self._generator = generator

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    def add(self, inputs: Float[Tensor, "m d"], targets: Float[Tensor, "m"]) -> None:
        """Store pairs, detached, in their order."""
        slots = (self._added + torch.arange(len(targets))) % self.capacity
        kept = slice(max(0, len(targets) - self.capacity), None)
        slots = slots[kept].to(self._hidden.device)
        self._hidden[slots] = inputs.detach()[kept].to(self._hidden.dtype)
        self._targets[slots] = targets.detach()[kept].to(self._targets.dtype)
        self._added += len(targets)

    def sample(self, batch: int) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b"]]:
        """`batch` pairs drawn uniformly with replacement; the ring must not be empty."""
        index = torch.randint(len(self), (batch,), generator=self._generator).to(self._hidden.device)
        return self._hidden[index], self._targets[index]


LOSS_SCALE = 2.0
STATIC_SCALE = 2.0
SOURCE_SCALE = 4.0
STATE_SCALE = 0.2
"""Sizes of the entries, and so how fast Q learns from them. A normalised hidden state has many entries, which
can explain much of what is chance in a few measured effects; the loss and the source have few, and what they
explain lasts. experiments/LOG.md has the comparison."""
LOSS_MEMORY = 0.95
"""Share of the loss's running mean and spread that stays per step."""


class QInputs(Saved):
    """Builds φ's input [n, width] from the features of some windows; each row from one window alone.

    The paper's input is the hidden state of the last token. The other inputs are remedies: the mean over the
    tokens says more about a window than its last token, its loss says how well it is known, its source, where
    a run has several, is what generalises fastest from few measured effects, and its static score, how
    target-like it is, is known of every window, labelled or not. The last two need no forward pass.

    Args:
        names: which features, concatenated in this order.
        hidden: d, width of a hidden state.
        sources: number of the run's sources.
        layer_norm: give each hidden state mean 0 and standard deviation `STATE_SCALE` first, so that its own
            scale, which grows in training, does not matter.

    Attributes:
        width: entries of an input.
    """

    SAVED = ("_loss_mean", "_loss_spread")

    def __init__(
        self, names: Sequence[FeatureName], hidden: int, sources: int = 1, *, layer_norm: bool = False
    ) -> None:
        assert names
        self._names = tuple(names)
        self._sources = sources
        self._layer_norm = layer_norm
        # Entries of an input, and what fills them.
        parts: dict[str, tuple[int, Callable[[Features], Tensor]]] = {
            "last": (hidden, lambda features: self._state(features.hidden)),
            "mean": (hidden, lambda features: self._state(_present(features.pooled, "pooled"))),
            "loss": (1, self._loss),
            "source": (sources, self._source),
            "static_score": (1, self._static_score),
        }
        self._parts = [parts[name][1] for name in self._names]
        self.width = sum(parts[name][0] for name in self._names)
        self._loss_mean: float | None = None
        self._loss_spread = 0.0

    def __call__(self, features: Features) -> Float[Tensor, "n w"]:
        parts = [part(features) for part in self._parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def observe(self, features: Features) -> None:
        """Let the scale of the loss follow the windows of a step (all of them)."""
        if "loss" not in self._names:
            return
        loss = features.loss.double()
        mean, spread = loss.mean().item(), loss.std(correction=0).item()
        if self._loss_mean is None:
            self._loss_mean, self._loss_spread = mean, spread
        self._loss_mean += (1 - LOSS_MEMORY) * (mean - self._loss_mean)
        self._loss_spread += (1 - LOSS_MEMORY) * (spread - self._loss_spread)

    @property
    def length(self) -> float | None:
        """The length that all inputs have; None where it differs, as that of unnormalised hidden states."""
        states = all(name in ("last", "mean") for name in self._names)
        return STATE_SCALE * self.width**0.5 if states and self._layer_norm else None

    def _state(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return STATE_SCALE * F.layer_norm(hidden, hidden.shape[-1:]) if self._layer_norm else hidden

    def _loss(self, features: Features) -> Float[Tensor, "n 1"]:
        """Distance from the running mean in running standard deviations; 0 before the first step."""
        if self._loss_mean is None or self._loss_spread <= 0:
            return torch.zeros_like(features.loss)[:, None]
        return LOSS_SCALE * (features.loss[:, None] - self._loss_mean) / self._loss_spread

    def _source(self, features: Features) -> Float[Tensor, "n S"]:
        one_hot = F.one_hot(_present(features.source, "source"), self._sources)
        return SOURCE_SCALE * one_hot.to(features.loss.dtype)

    def _static_score(self, features: Features) -> Float[Tensor, "n 1"]:
        return STATIC_SCALE * _present(features.known.get("static_score"), "static_score")[:, None]


def _present(value: Tensor | None, name: str) -> Tensor:
    assert value is not None, f"Q reads features.{name}, but the forward pass has not filled it in"
    return value


class QNetwork(nn.Module):
    """Eq. 2, Q_φ(s, x) = W2·ReLU(W1·h_x + b1) + b2; without hidden units Q_φ(s, x) = w·h_x + b.

    Args:
        width: d, width of the hidden state h_x, or of whatever input `QInputs` makes.
        hidden: hidden units; 0 makes Q linear.
        generator: CPU generator of the initial weights; the global one is left alone.
        zero_output: start with Q = 0 everywhere.
    """

    def __init__(
        self, width: int, hidden: int = 32, *, generator: torch.Generator, zero_output: bool = False
    ) -> None:
        super().__init__()
        self.layer1 = _linear(width, hidden, generator) if hidden else nn.Identity()
        self.layer2 = _linear(hidden or width, 1, generator)
        if zero_output:
            nn.init.zeros_(self.layer2.weight)
            nn.init.zeros_(self.layer2.bias)

    def forward(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
        # Gaps in Q of 0.001 nats decide the policy and would not survive a caller's bfloat16 autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.layer2.weight.dtype)
            if isinstance(self.layer1, nn.Linear):
                hidden = torch.relu(self.layer1(hidden))
            return self.layer2(hidden).squeeze(-1)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """nn.Linear with its standard range U(−1/√inputs, 1/√inputs), drawn from `generator`."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


class Scale(Saved):
    """Running mean and scale of Q, so that φ learns numbers of size 1: Q = loc + scale · f(x).

    Rewards are a few nats, or a thousandth of one when they are gains; the effects that tell windows apart
    shrink with the learning rate. Old values of f are not rescaled when the scale moves: when all effects
    shrink alike, all differences of Q shrink with them, and their ranks stay.

    Args:
        fixed: keep Q = f(x), the paper's Q.
        memory: share of the running means that stays at each update.
    """

    SAVED = ("loc", "scale", "_updates")

    def __init__(self, fixed: bool, memory: float = 0.9) -> None:
        self._fixed = fixed
        self._memory = memory
        self.loc = 0.0
        self.scale = 1.0
        self._updates = 0

    def observe(self, reward: float, targets: Float[Tensor, "r"]) -> None:
        """Follow the mean of the rewards and the spread of a step's targets, both in nats per token."""
        if self._fixed:
            return
        around = targets.mean().item() if len(targets) > 1 else self.loc
        square = (targets.double() - around).square().mean().item()
        keep = self._memory if self._updates else 0.0
        self.loc = keep * self.loc + (1 - keep) * reward
        self.scale = max(1e-12, math.sqrt(keep * self.scale**2 + (1 - keep) * square))
        self._updates += 1


@runtime_checkable
class PreviousAction(Protocol):
    """The previous action under the present θ; `lm.learner` has the implementations.

    Attributes:
        cost: of one TD update, in operations of the language model.
    """

    @property
    def cost(self) -> Cost: ...
    def features(self, previous: Step) -> Features:
        """Features of a_{k−1} at θ_k, one row."""
        ...

    def backward(self) -> Metrics:
        """Takes the gradient on to θ once the TD loss has been backpropagated into the features."""
        ...


class TDCritic(Saved):
    """Soft Q-learning with a target network (Algorithm 1).

    Args:
        config: γ, τ, learning rate, clipping, credit rule, scale and replay.
        inputs: what Q sees of a window.
        temperature: gives β.
        device: where φ lies.
        generators: gives the purposes `critic/init` and `critic/replay` a generator each.
        previous_action: forwards the previous action again (Algorithm 1, line 19); None for its stored
            features.
        weighs_by_prior: whether candidates come as the stream has them and π₀ is a factor of their weights; a
            filter has applied it already.
        before_forward: whether Q judges windows before the forward pass alone.
    """

    needs_reward = True
    SAVED = ("online", "target", "optimizer", "scale", "inputs", "replay")

    def __init__(
        self,
        config: CriticConfig,
        inputs: QInputs,
        temperature: Temperature,
        device: torch.device | str,
        generators: Generators,
        previous_action: PreviousAction | None = None,
        *,
        weighs_by_prior: bool = False,
        before_forward: bool = False,
    ) -> None:
        self.config = config
        self.before_forward = before_forward
        self.reads_theta = previous_action is not None
        self.weighs_by_prior = weighs_by_prior
        self._device = device
        self.inputs = inputs
        self.temperature = temperature
        self.online = QNetwork(
            inputs.width,
            config.q_hidden,
            generator=generators("critic/init"),
            zero_output=config.q_standardise,
        ).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.online.parameters(),
            lr=config.q_lr,
            weight_decay=config.q_weight_decay,
            fused=torch.device(device).type == "cuda",  # where the time goes to starting kernels
        )
        self.scale = Scale(fixed=not config.q_standardise)
        self.previous_action = previous_action
        self.credit = CREDIT_RULES[config.credit]
        self.replay: QReplay | None = None
        if config.q_replay_size:
            self.replay = QReplay(config.q_replay_size, inputs.width, device, generators("critic/replay"))

    @torch.no_grad()
    def values(self, features: Features) -> Float[Tensor, "n"]:
        """q = Q_φ(h) of each window, nats per token, on φ's device, wherever the features lie."""
        return self.differentiable(features)

    def differentiable(self, features: Features) -> Float[Tensor, "n"]:
        """The same, with a gradient into φ and into the features."""
        return self.of_inputs(self._inputs(features))

    def _inputs(self, features: Features) -> Float[Tensor, "n w"]:
        """What φ reads, where φ lies: a few numbers of each window, in one transfer."""
        return self.inputs(features).to(self._device)

    def of_inputs(self, inputs: Float[Tensor, "n w"]) -> Float[Tensor, "n"]:
        """The same for rows of `inputs`, without the features that they are made of."""
        return self._in_nats(self.online(inputs))

    def policy(self, q: Float[Tensor, "N"], features: Features) -> Float[Tensor, "N"]:
        """π ∝ π₀ exp(q/β), Eq. 6; π₀ is uniform where the prior has decided on the candidates already."""
        return boltzmann(q, self.temperature.beta, self._prior(features))

    def _prior(self, features: Features) -> Float[Tensor, "N"] | None:
        if not self.weighs_by_prior:
            return None
        prior = features.known["prior"].to(self._device, torch.float64)
        return (prior / prior.sum()).float()

    def learn(self, previous: Step | None, features: Features) -> tuple[Metrics, Cost]:
        """One TD update for the previous transition, bootstrapped on H_k.

        Order: V_k from φ̄ on H_k (Eq. 4) → y (Eq. 3) → TD step of φ on the mean of ½(q̂ − y − offset)² → the
        pairs (x, target) go into replay → replay steps of φ → Polyak (Eq. 5). φ̄ moves once per update, after
        all steps of φ; with the sampled rule and without replay this is Algorithm 1 to the letter.

        Args:
            previous: the finished transition k − 1; None in the first step, which updates nothing.
            features: H_k of all N candidates, at θ_k.

        Returns:
            Metrics under `critic/`, and what the update cost. `q_*` describe Q_φ on H_k before the update.
            The TD entries are absent where there was no update.

        Raises:
            FloatingPointError: the TD loss or its gradient is not finite; φ has not been updated.
        """
        with torch.no_grad():
            seen = self._inputs(features)
            q, q_target = self.of_inputs(seen), self._in_nats(self.target(seen))
            value = soft_value(q_target, self.temperature.beta, self._prior(features))
        measured = {
            "critic/q_mean": q.mean(),
            "critic/q_std": q.std(correction=0),
            "critic/q_min": q.min(),
            "critic/q_max": q.max(),
            "critic/soft_value": value,
        }
        task = None if previous is None else self.credit(previous)
        if previous is None or previous.reward is None or task is None:
            self.inputs.observe(features)
            return _to_metrics(measured), NO_COST

        reward, gamma = (previous.reward, self.config.gamma) if self.config.bellman else (0.0, 0.0)
        y = td_target(reward, value, gamma)
        targets = y + task.offsets.to(self._device)
        self.scale.observe(reward, targets)
        goal = (targets - self.scale.loc) / self.scale.scale
        if self.previous_action is None:
            responsible = task.features
        else:
            responsible = self.previous_action.features(previous)
        inputs = self._inputs(responsible)
        predicted = self.online(inputs)
        if task.combine is not None:
            predicted = task.combine.to(predicted) @ predicted
        loss = 0.5 * (predicted - goal).square().mean()
        measured |= {
            "critic/td_loss": loss,
            "critic/td_target": targets.mean(),
            "critic/q_pred": self._in_nats(predicted).mean(),
            "critic/grad_norm": self._backward(loss),
        }
        metrics = _to_metrics(measured)  # without replay the only wait for the device
        _require_finite(metrics, previous.reward)
        cost = NO_COST
        if self.previous_action is not None:
            metrics |= self.previous_action.backward()
            cost = self.previous_action.cost
        self.optimizer.step()
        if self.replay is not None:
            self.replay.add(inputs, goal)
            metrics["critic/replay_loss"] = self._replay_updates(self.replay)
        polyak_(self.target.parameters(), self.online.parameters(), self.config.polyak_tau)
        self.inputs.observe(features)
        return metrics, cost

    def _in_nats(self, f: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        loc, scale = self.scale.loc, self.scale.scale
        return f if scale == 1.0 and loc == 0.0 else loc + scale * f

    def _backward(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Fresh gradient of φ, clipped; returns its norm before clipping."""
        self.optimizer.zero_grad()
        loss.backward()
        return nn.utils.clip_grad_norm_(self.online.parameters(), self.config.q_grad_clip)

    def _replay_updates(self, replay: QReplay) -> float:
        """Adam steps on past pairs; returns the mean of their losses before each step."""
        losses = []
        for _ in range(self.config.q_replay_updates):
            inputs, targets = replay.sample(self.config.q_replay_batch)
            loss = 0.5 * (self.online(inputs) - targets).square().mean()
            self._backward(loss)
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()


def _to_metrics(measured: dict[str, Float[Tensor, ""]]) -> Metrics:
    """All scalars in one transfer from the device."""
    values = torch.stack([value.detach() for value in measured.values()]).tolist()
    return dict(zip(measured, values, strict=True))


def _require_finite(metrics: Metrics, reward: float) -> None:
    if not (math.isfinite(metrics["critic/td_loss"]) and math.isfinite(metrics["critic/grad_norm"])):
        names = ("td_loss", "grad_norm", "q_pred", "td_target", "soft_value")
        context = ", ".join(f"{name} = {metrics['critic/' + name]:.4g}" for name in names)
        raise FloatingPointError(f"the TD update of Q is not finite: {context}, reward = {reward:.4g}")
