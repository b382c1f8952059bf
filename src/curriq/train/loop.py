"""Algorithm 1, the one loop. Every method, baseline and ablation is this loop with other components."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.config import TrainConfig
from curriq.softq.equations import sample_action
from curriq.types import (
    Candidates,
    Critic,
    Effects,
    Features,
    Metrics,
    Mixture,
    Outcome,
    Proposer,
    Selector,
    State,
    Stateful,
    Transition,
    merge,
)

Resets = Callable[[int], bool]


def never(step: int) -> bool:
    return False


def always(step: int) -> bool:
    """The reset-θ ablation."""
    return True


def until(last: int) -> Resets:
    """Q warm-up: the first `last` steps."""
    return lambda step: step < last


def alternating(period: int) -> Resets:
    """Reset for `period` steps, train for `period` steps, and so on."""
    return lambda step: (step // period) % 2 == 0


def resets(config: TrainConfig) -> Resets:
    """θ is put back in a step in which any of the configured phases says so."""
    phases: list[Resets] = []
    if config.reset_theta:
        phases.append(always)
    if config.q_warmup_steps:
        phases.append(until(config.q_warmup_steps))
    if config.alternating_period:
        phases.append(alternating(config.alternating_period))
    return (lambda step: any(phase(step) for phase in phases)) if phases else never


@runtime_checkable
class Learner(Protocol):
    """θ and its optimiser; `lm.learner.Learner` documents the methods."""

    def accumulate(self, candidates: Candidates, score: Callable, with_entropy: bool) -> Mixture: ...
    def update(self, step: int) -> Metrics: ...
    def snapshot(self) -> None: ...
    def restore(self) -> None: ...
    def release(self) -> None: ...


@runtime_checkable
class HeldOut(Stateful, Protocol):
    """What is measured on held-out text around the update of a step: rewards, and effects of single windows.

    `lm.reward` and `lm.effects` have the implementations.
    """

    def before(self, step: int, candidates: Candidates, mixture: Mixture) -> Effects | None:
        """At θ_k; the gradient on θ stays as it is."""
        ...

    def after(self, step: int) -> tuple[float | None, Metrics]:
        """At θ_{k+1}: r_k, or None where the step has none; and what the measurements cost."""
        ...


@dataclass(frozen=True, kw_only=True)
class Components:
    """What varies between methods.

    Attributes:
        held_out: measures r_k, and effects where a method asks for them.
        resets: whether θ is put back after this step (Q warm-up, reset-θ, alternating periods).
        action_generator: draws a_k.
    """

    proposer: Proposer
    selector: Selector
    critic: Critic
    learner: Learner
    held_out: HeldOut
    resets: Callable[[int], bool]
    action_generator: torch.Generator


@dataclass(kw_only=True)
class LoopState:
    """What one step hands to the next.

    Attributes:
        step: k, the step that comes next.
        previous: the transition whose TD update is pending; None before the bootstrap step.
        proposed: the latest candidates, so that the message about a failed step can name them.
    """

    step: int = 0
    previous: Transition | None = None
    proposed: Candidates | None = None

    def state_dict(self) -> State:
        return {
            "step": self.step,
            "previous": None if self.previous is None else self.previous.state_dict(),
        }

    @staticmethod
    def from_state_dict(state: State, device: torch.device | str) -> "LoopState":
        previous = state["previous"]
        return LoopState(
            step=state["step"],
            previous=None if previous is None else Transition.from_state_dict(previous, device),
        )


class Diverged(ArithmeticError):
    """θ gives no finite loss any more after its update; a smaller update could have."""


class ScoresNotFinite(ArithmeticError):
    """The selector or the policy makes something not finite of finite losses and values."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Everything a log may want to know of one step.

    Attributes:
        proposed: C_k, all N windows.
        trained: the windows that the selector let through; the mixture is over these.
        q: q_k of the trained windows at φ_k, or None without a critic.
        effects: measured effects of single windows, where they were probed.
    """

    step: int
    proposed: Candidates
    trained: Candidates
    mixture: Mixture
    q: Float[Tensor, "n"] | None
    effects: Effects | None
    reward: float | None
    metrics: Metrics


def train_step(c: Components, state: LoopState) -> StepRecord:
    """One step k of Algorithm 1; advances `state`. Line numbers of the algorithm stand at the right.

    Raises:
        ArithmeticError: a number is not finite. The components are then in the middle of the step: go on
            from a checkpoint. It is `Diverged` when the update of θ is to blame, `ScoresNotFinite` when
            the scores are.
    """
    k = state.step
    if c.resets(k):
        c.learner.snapshot()
    else:
        c.learner.release()
    state.proposed = proposed = c.proposer.propose(k)  #                          3: C_k
    trained = c.selector.narrow(k, proposed)
    mixture = _accumulate(c, k, trained)  #                                       4, 9: H_k, q_k, ∇θ Σ π_i ℓ_i
    q = c.critic.values(mixture.features)
    effects = c.held_out.before(k, trained, mixture)
    td_metrics = c.critic.learn(state.previous, mixture.features)  #              5–7: V_k, TD step, Polyak
    transition = _act(c, trained, mixture, q, effects)  #                         8: a_k ~ π_k
    update_metrics = c.learner.update(k)  #                                       9: clip, AdamW
    reward, held_out_metrics = c.held_out.after(k)  #                             10: r_k
    _require_finite(reward)
    outcome = _outcome(trained, mixture, q, effects, reward)
    selector_metrics = c.selector.observe(k, outcome)
    if c.resets(k):
        c.learner.restore()
    state.previous = transition(reward) if transition is not None and reward is not None else None
    state.step = k + 1
    own = {"train/loss": mixture.loss, "theta_reset": float(c.resets(k))}
    if reward is not None:
        own["reward"] = reward
    return StepRecord(
        step=k,
        proposed=proposed,
        trained=trained,
        mixture=mixture,
        q=q,
        effects=effects,
        reward=reward,
        metrics=merge(proposed.metrics, own, td_metrics, update_metrics, held_out_metrics, selector_metrics),
    )


def _accumulate(c: Components, k: int, trained: Candidates) -> Mixture:
    """Score the candidates and leave the mixture's gradient on θ."""
    losses: list[Tensor] = []

    def score(part: Candidates, features: Features) -> Tensor:
        losses.append(features.loss)
        return c.selector.scores(k, part, features)

    try:
        return c.learner.accumulate(trained, score, c.selector.needs_entropy)
    except ArithmeticError as error:
        if all(loss.isfinite().all() for loss in losses):
            raise ScoresNotFinite("the losses of the candidates are finite, their scores are not") from error
        raise


def _act(
    c: Components, trained: Candidates, mixture: Mixture, q: Tensor | None, effects: Effects | None
) -> Callable[[float], Transition] | None:
    """Draw a_k from π_k; the transition is complete once its reward is known."""
    if q is None:
        return None
    policy = c.critic.policy(q)
    try:
        action = sample_action(policy, c.action_generator)
    except FloatingPointError as error:
        if q.isfinite().all():
            raise ScoresNotFinite("the values Q of the candidates are finite, their policy is not") from error
        raise
    return lambda reward: Transition(
        tokens=trained.tokens,
        features=mixture.features,
        policy=policy,
        weights=mixture.weights,
        action=action,
        reward=reward,
        effects=effects,
    )


def _outcome(
    trained: Candidates,
    mixture: Mixture,
    q: Tensor | None,
    effects: Effects | None,
    reward: float | None,
) -> Outcome:
    return Outcome(
        candidates=trained,
        features=mixture.features,
        weights=mixture.weights,
        reward=reward,
        q=q,
        effects=effects,
    )


def _require_finite(reward: float | None) -> None:
    if reward is not None and not math.isfinite(reward):
        raise Diverged(f"the reward after the update is {reward}")
