"""What is measured on held-out text around a step: the reward (Eq. 1), and effects of single windows.

To first order a step on window i alone raises the mean log-probability of held-out text by

    e_i = α ∇ℓ_i · P ∇ℓ_D,

with the optimizer's preconditioner P. The inner product is symmetric, so one held-out gradient serves all
windows: e_i is also what a step on the held-out text would do to window i, and that is one forward pass,

    e_i ≈ (α/h) [ℓ_i(θ) − ℓ_i(θ − h P ∇ℓ_D)],

whose first loss the mixture step has measured already.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from curriq import parallel
from curriq.config import RunConfig
from curriq.errors import Diverged
from curriq.lm.engine import local, placed_like, total_norm
from curriq.lm.model import token_counts
from curriq.rng import Generators
from curriq.state import Saved, State
from curriq.types import NO_COST, Cost, Effects, Features, Mixture, Offer, WindowLosses, Windows


@runtime_checkable
class MeasuredModel(Protocol):
    """A language model: `lm.model.LanguageModel`, or that of a loop of the user's own."""

    @property
    def parameters(self) -> list[nn.Parameter]: ...
    @property
    def reduced_precision(self) -> bool: ...
    def window_losses(self, windows: Windows) -> Tensor: ...


@runtime_checkable
class MeasuredLearner(Protocol):
    """A language model and its optimizer; `lm.learner.Learner` documents the methods."""

    @property
    def lm(self) -> MeasuredModel: ...
    def held_out_gradient(self, windows: Windows, weights: Tensor) -> tuple[Tensor, list[Tensor]]: ...
    def precondition(self, gradients: list[Tensor]) -> list[Tensor] | None: ...
    def rate(self, step: int) -> float: ...


def held_out_losses(lm: MeasuredModel, windows: Windows) -> WindowLosses:
    """The loss of each window and their mean, over all processes and without dropout."""
    local = lm.window_losses(windows.take(parallel.shard())).double()
    losses = parallel.gather_rows(local, len(windows))
    counts = token_counts(windows.tokens if windows.labels is None else windows.labels).to(losses.device)
    if windows.labels is None:
        mean = losses.sum().item() / len(windows)
    else:
        mean = (losses * counts).sum().item() / max(1, int(counts.sum()))
    return WindowLosses(ids=windows.ids, losses=losses, tokens=counts, mean=mean)


def held_out_loss(lm: MeasuredModel, windows: Windows) -> float:
    """Mean next-token loss over all learnt tokens of the windows, nats per token, without dropout.

    It is 0 where no token is learnt.
    """
    return held_out_losses(lm, windows).mean


@dataclass(eq=False)
class HeldOutReward(Saved):
    """r_k on M windows D̂_k drawn afresh from the reward set D without replacement, nats per token.

    The absolute reward is the mean log-likelihood under θ_{k+1} (Eq. 1). The paired reward is its gain over
    θ_k on the same windows: which windows were drawn then hardly matters, so its noise is far smaller.

    Args:
        reward_set: D.
        windows: M.
        every: steps between rewards; the steps between have none.
        paired: measure the gain instead of the level.

    Attributes:
        drawn: D̂_k of the step that is under way, None in a step without a reward.
        loss_before: mean loss of θ_k on `drawn`, where somebody has measured it.
        forwards: forward passes of a window that the step has cost so far; a backward pass counts as two.
    """

    SAVED = ("generator",)

    lm: MeasuredModel
    reward_set: Windows
    windows: int
    generator: torch.Generator
    _: KW_ONLY
    every: int = 1
    paired: bool = False
    drawn: Windows | None = field(default=None, init=False)
    loss_before: float | None = field(default=None, init=False)
    forwards: int = field(default=0, init=False)

    def draw(self, step: int) -> Windows | None:
        """Begin a step: D̂_k, or None where the step has no reward."""
        self.drawn, self.loss_before, self.forwards = None, None, 0
        if step % self.every == 0:
            order = torch.randperm(len(self.reward_set), generator=self.generator)
            self.drawn = self.reward_set.take(order[: self.windows])
        return self.drawn

    def begin(self, step: int, offer: Offer | None = None) -> None:
        self.draw(step)

    def before(self, step: int, offer: Offer | None = None, mixture: Mixture | None = None) -> None:
        """At θ_k, before the update."""
        if self.drawn is not None and self.paired:
            self.loss_before = self._loss()

    def after(self, step: int) -> tuple[float | None, Cost]:
        """At θ_{k+1}: r_k, nats per token, and what the step's measurements have cost; `Diverged` where it is
        not finite."""
        if self.drawn is None:
            return None, NO_COST
        level = -self._loss()
        reward = level + self.loss_before if self.paired and self.loss_before is not None else level
        if not math.isfinite(reward):
            raise Diverged(f"the reward after the update is {reward}")
        return reward, Cost(forwards=self.forwards)

    def _loss(self) -> float:
        assert self.drawn is not None
        self.forwards += self.windows
        return held_out_loss(self.lm, self.drawn)


RELATIVE_STEP = 3e-4
REDUCED_RELATIVE_STEP = 2e-3
"""‖h P ∇ℓ_D‖ over ‖θ‖, in float32 and in bfloat16. In float32 rounding and curvature are both far below the
effect. In bfloat16 the step is where both together do least harm to the order of the windows; passes in
float32 would cost several times as much on a GPU. `benchmarks/effects.py` has the numbers."""


class AveragedGradient(Saved):
    """Exponential average of held-out gradients, bias corrected.

    A single gradient is mostly sampling noise and fast modes, directions in which θ swings and whose gradient
    changes its sign within a few steps; what the average points to is still to be learnt later. Where other
    parameters are trained than before, it begins again.

    Args:
        decay: share of the old average that stays at each update; 0 takes each gradient alone.
        parameters: returns what the gradients are of.
    """

    SAVED = ("_average", "_updates")

    def __init__(self, decay: float, parameters: Callable[[], Sequence[Tensor]]) -> None:
        self._decay = decay
        self._parameters = parameters
        self._average: list[Tensor] = []
        self._averaged: list[Tensor] = []  # what the average is of; empty after a load
        self._updates = 0

    def state_dict(self) -> State:
        """A copy, of each rank's parts where ranks hold parts of it."""
        # Parts are copied when they are written.
        pieces = [p if isinstance(p, DTensor) else p.to("cpu", copy=True) for p in self._average]
        return {"average": pieces, "updates": self._updates}

    def load_state_dict(self, state: State) -> None:
        """An average that is whole, or stored in parts, into the parts that this rank holds."""
        average = [piece.clone() if isinstance(piece, Tensor) else piece for piece in state["average"]]
        parameters = self._parameters()
        # A loop of the user's own may load before it has shown its model: then `update` places it.
        known = len(average) == len(parameters)
        self._average = placed_like(average, parameters) if known else average
        self._averaged = []
        self._updates = state["updates"]

    def update(self, gradient: list[Tensor]) -> list[Tensor]:
        """The average with this gradient in it."""
        parameters = list(self._parameters())
        if not self._fits(parameters):
            self._average, self._updates = [torch.zeros_like(piece) for piece in gradient], 0
        self._averaged = parameters
        self._updates += 1
        self._average = placed_like(self._average, gradient)
        torch._foreach_lerp_(self._average, gradient, 1 - self._decay)
        return [piece / (1 - self._decay**self._updates) for piece in self._average]

    def _fits(self, parameters: list[Tensor]) -> bool:
        """Whether the average is of these parameters; after a load their shapes tell."""
        if self._averaged:
            return [*map(id, parameters)] == [*map(id, self._averaged)]
        return [p.shape for p in parameters] == [a.shape for a in self._average]


def displacement(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], relative_step: float = RELATIVE_STEP
) -> Float[Tensor, ""]:
    """h such that ‖h · direction‖ is `relative_step` · ‖θ‖; a float64 scalar, for which nobody has waited."""
    return relative_step * total_norm(parameters) / total_norm(direction).clamp(min=1e-30)


def weighted_mean(values: Float[Tensor, "m"], weights: Float[Tensor, "m"]) -> float:
    """Σ w_i x_i with the weights normalised over these windows; the plain mean where all weights are 0."""
    total = weights.sum()
    share = (weights / total) if total > 0 else torch.full_like(weights, 1 / len(weights))
    return (share * values).double().sum().item()


REJECTED_SHARE = 1 / 3
"""Share of the probed windows that a filter rejected. A forward pass shows their effect, no step is spent on
them; it is two passes, where a trained window has had its first."""


def probed_rows(
    trained: int, rejected: int, most: int, generator: torch.Generator
) -> tuple[Int[Tensor, "a"], Int[Tensor, "b"]]:
    """Which of so many windows that were trained on and rejected are probed: at most `most`, drawn at random,
    in ascending order."""
    few = min(rejected, round(most * REJECTED_SHARE))
    drawn = [_drawn(trained, most - few, generator), _drawn(rejected, few, generator)]
    return drawn[0], drawn[1]


def _drawn(n: int, most: int, generator: torch.Generator) -> Int[Tensor, "m"]:
    if n <= most:
        return torch.arange(n)
    return torch.randperm(n, generator=generator)[:most].sort().values


@dataclass(frozen=True)
class _Losses:
    """What effects are made of.

    Attributes:
        rows: the probed windows that are trained on.
        other_rows: those that a filter rejected, counted on behind all that are trained on.
        parts: the windows of both.
        before: losses at θ_k of those that the mixture does not forward; None where it forwards all.
        after: losses of all, with θ displaced.
        scale: α/h.
    """

    rows: Int[Tensor, "a"]
    other_rows: Int[Tensor, "b"]
    parts: list[Offer]
    before: Float[Tensor, "c"] | None
    after: Float[Tensor, "m"]
    scale: Float[Tensor, ""]


class _Queued(NamedTuple):
    """A measurement that the device may still be busy with: the mean held-out loss, and the probed windows;
    None before the optimizer's first step."""

    held_out: Float[Tensor, ""]
    probed: _Losses | None


@dataclass(eq=False)
class EffectProbe(Saved):
    """Measures effects of the windows of a step on the held-out windows of its reward.

    Behind a filter some of the probed windows are rejected ones: what is not trained on must be looked at
    too, or nothing would show that it was rejected wrongly.

    Args:
        reward: draws the held-out windows, and gets its loss before the update from the gradient's pass.
        windows: windows probed per probe, drawn at random; all of them where there are not more.
        decay: of the average of the held-out gradients.
        shuffle: ablation: permute the effects among the windows, so that they mean nothing.
    """

    SAVED = ("_average", "generator", "reward")

    learner: MeasuredLearner
    reward: HeldOutReward
    _: KW_ONLY
    windows: int
    decay: float
    generator: torch.Generator
    shuffle: bool = False

    def __post_init__(self) -> None:
        self._average = AveragedGradient(self.decay, lambda: self.learner.lm.parameters)
        self._queued: _Queued | None = None

    @property
    def sizes(self) -> frozenset[int]:
        """Windows of the passes that each measurement makes on this rank."""
        most = (self.reward.windows, self.windows, round(self.windows * REJECTED_SHARE))
        return frozenset(len(range(n)[parallel.shard()]) for n in most)

    def begin(self, step: int, offer: Offer) -> None:
        """Queue all that is measured at θ_k. Nothing of it is read, so that the host can go on."""
        self._queued = None if self.reward.draw(step) is None else self._queue(step, offer, forwarded=True)

    def before(self, step: int, offer: Offer, mixture: Mixture) -> Effects | None:
        """Effects at θ_k; None in steps without a reward, and before the optimizer's first step.

        The mixture's gradient on θ stays as it is.
        """
        queued, self._queued = self._queued, None
        return queued and self._effects(queued, mixture.weights, mixture.features)

    def effects(self, step: int, offer: Offer, weights: Float[Tensor, "n"]) -> Effects | None:
        """Effects on the windows that were drawn, of windows that nobody has forwarded; None before the
        optimizer's first step. `weights` are those of the trained windows in the mixture."""
        return self._effects(self._queue(step, offer, forwarded=False), weights, None)

    def _queue(self, step: int, offer: Offer, *, forwarded: bool) -> "_Queued":
        """Begin the measurement of a step; `forwarded` says that the mixture measures the trained windows'
        losses at θ_k."""
        drawn, learner = self.reward.drawn, self.learner
        assert drawn is not None
        loss, gradient = learner.held_out_gradient(drawn, _shares(drawn))
        self.reward.forwards += 3 * len(drawn)
        direction = learner.precondition(self._average.update(gradient))
        if direction is None:
            return _Queued(loss, None)
        n, others = len(offer), offer.rejected
        rows, other_rows = probed_rows(n, 0 if others is None else len(others), self.windows, self.generator)
        parts = [offer.take(rows)]
        if others is not None and len(other_rows):
            parts.append(others.take(other_rows))
        probed = Windows.cat([part.windows for part in parts])
        measured = len(rows) if forwarded else 0
        before = self._losses(probed.take(slice(measured, None))) if measured < len(probed) else None
        relative = REDUCED_RELATIVE_STEP if learner.lm.reduced_precision else RELATIVE_STEP
        size = displacement(learner.lm.parameters, direction, relative)
        with displaced(learner.lm.parameters, direction, -size):
            after = self._losses(probed)
        return _Queued(
            loss,
            _Losses(rows, n + other_rows, parts, before, after, learner.rate(step) / size.to(after.device)),
        )

    def _effects(
        self, queued: "_Queued", weights: Float[Tensor, "n"], features: Features | None
    ) -> Effects | None:
        """The effects, once they have been measured; `features` are those of the trained windows at θ_k, None
        where nobody has forwarded them."""
        self.reward.loss_before = queued.held_out.item()
        if (found := queued.probed) is None:
            return None
        rows, parts = found.rows, found.parts
        own = [] if features is None else [features.loss[rows.to(features.loss.device)]]
        before = torch.cat(own + ([] if found.before is None else [found.before]))
        effect = ((before - found.after).double() * found.scale).to(before.dtype)
        if self.shuffle:
            effect = effect[torch.randperm(len(effect), generator=self.generator).to(effect.device)]
        mixture = weighted_mean(effect[: len(rows)], weights[rows.to(weights.device)].to(effect.device))
        if features is None or len(parts) > 1:  # what a filter sees is known of all windows
            seen = Features.cat([Features.before_forward(part) for part in parts])
        else:
            seen = features.take(rows.to(features.loss.device))
        rows = torch.cat([rows, found.other_rows])
        return Effects(rows=rows.to(effect.device), effect=effect, mixture=mixture, features=seen)

    def after(self, step: int) -> tuple[float | None, Cost]:
        """The reward of the step."""
        return self.reward.after(step)

    def _losses(self, windows: Windows) -> Float[Tensor, "m"]:
        self.reward.forwards += len(windows)
        local = self.learner.lm.window_losses(windows.take(parallel.shard()))
        return parallel.gather_rows(local, len(windows))


def build_reward(
    config: RunConfig, lm: MeasuredModel, reward_set: Windows, generators: Generators
) -> HeldOutReward:
    """The reward that a configuration names."""
    train = config.train
    return HeldOutReward(
        lm,
        reward_set,
        min(train.reward_windows, len(reward_set)),  # a set that was fitted to the target may have fewer
        generators("reward"),
        every=train.reward_every,
        paired=train.reward == "paired",
    )


def build_probe(
    config: RunConfig, learner: MeasuredLearner, reward: HeldOutReward, generators: Generators
) -> EffectProbe:
    """The probe that a configuration asks for, on the windows of the reward."""
    critic = config.critic
    return EffectProbe(
        learner,
        reward,
        windows=critic.probe_windows,
        decay=critic.probe_decay,
        generator=generators("probe"),
        shuffle=critic.shuffle_effects,
    )


def _shares(windows: Windows) -> Float[Tensor, "M"]:
    """Each window's share of the learnt tokens."""
    if windows.labels is None:
        return torch.full((len(windows),), 1 / len(windows), dtype=torch.float64)
    counts = token_counts(windows.labels).double()
    return counts / counts.sum().clamp(min=1)


@contextmanager
def displaced(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], by: float | Float[Tensor, ""]
) -> Generator[None]:
    """θ + by · direction for a while; then θ again, to the bit."""
    with torch.no_grad():
        here, along = [[local(piece) for piece in pieces] for pieces in (parameters, direction)]
        kept = [parameter.clone() for parameter in here]
        if isinstance(by, Tensor) and by.is_cuda:  # to read it would wait for all that is queued
            torch._foreach_addcmul_(here, along, [by.to(piece.dtype) for piece in along])
        else:
            torch._foreach_add_(here, along, alpha=float(by))
        try:
            yield
        finally:
            torch._foreach_copy_(here, kept)
