"""Algorithm 1, the one loop. Every method, baseline and ablation is this loop with other components."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from curriq.softq.equations import sample_action
from curriq.state import Saved, State
from curriq.types import (
    NO_COST,
    Cost,
    Critic,
    Effects,
    Features,
    Meanwhile,
    Metrics,
    Mixture,
    Offer,
    Proposer,
    Selector,
    Stateful,
    Step,
    merge,
)


@runtime_checkable
class Learner(Protocol):
    """θ and its optimizer; `lm.learner.Learner` documents the methods."""

    def accumulate(
        self, offer: Offer, score: Callable, with_entropy: bool, meanwhile: Meanwhile | None = None
    ) -> Mixture: ...
    def update(self, step: int, meanwhile: Callable[[], object]) -> Metrics: ...
    def snapshot(self) -> None: ...
    def restore(self) -> None: ...
    def release(self) -> None: ...


@runtime_checkable
class HeldOut(Stateful, Protocol):
    """What is measured on held-out text around the update of a step: rewards, and effects of single windows.

    `lm.held_out` has the implementations.
    """

    def begin(self, step: int, offer: Offer) -> None:
        """Begin a step. What can be measured at θ_k without its mixture may be queued now, behind the passes
        that make the mixture, and is not read."""
        ...

    def before(self, step: int, offer: Offer, mixture: Mixture) -> Effects | None:
        """Effects at θ_k; the gradient on θ stays as it is."""
        ...

    def after(self, step: int) -> tuple[float | None, Cost]:
        """r_k at θ_{k+1}, None where the step has none; and what the step's measurements cost."""
        ...


class NoHeldOut(Saved):
    """For methods that need no reward: measures nothing."""

    def begin(self, step: int, offer: Offer) -> None:
        pass

    def before(self, step: int, offer: Offer, mixture: Mixture) -> None:
        return None

    def after(self, step: int) -> tuple[None, Cost]:
        return None, NO_COST


@dataclass(frozen=True, kw_only=True)
class Components:
    """What varies between methods.

    Attributes:
        held_out: measures r_k, and effects where a method asks for them.
        theta_resets: whether θ is put back after this step (Q warm-up, reset-θ, alternating periods).
        act: a_k, an index of the mixture's windows, given q_k.
        beside: `lm.beside.Beside` on the learner's device: what the host does while that computes.
        proposes_early: whether the windows of the next step may be proposed then.
    """

    proposer: Proposer
    selector: Selector
    critic: Critic
    learner: Learner
    held_out: HeldOut
    theta_resets: Callable[[int], bool]
    act: Callable[[Tensor, Mixture], int]
    beside: Callable[..., Meanwhile]
    proposes_early: bool = False


@dataclass(kw_only=True)
class LoopState:
    """What one step hands to the next.

    Attributes:
        step: k, the step that comes next.
        previous: the step whose TD update is pending; None before the bootstrap step.
        proposed: the latest offer, so that the message about a failed step can name its windows.
        early: the offer of the step that comes next, or why there is none, where it was proposed during the
            step before. No checkpoint can be taken then: the proposer is a step ahead.
    """

    step: int = 0
    previous: Step | None = None
    proposed: Offer | None = None
    early: Offer | Exception | None = None

    def state_dict(self) -> State:
        previous = None if self.previous is None else self.previous.state_dict()
        return {"step": self.step, "previous": previous}

    @staticmethod
    def from_state_dict(state: State, device: torch.device | str) -> "LoopState":
        previous = state["previous"]
        previous = None if previous is None else Step.from_state_dict(previous, device)
        return LoopState(step=state["step"], previous=previous)


def theta_reset_schedule(*, always: bool, warmup: int, period: int) -> Callable[[int], bool]:
    """Whether θ is put back after a step, so that only Q learns in it.

    `always` is the reset-θ ablation, `warmup` the steps of Q warm-up; with a positive `period`, every other
    period of so many steps is one of Q alone, the first included.
    """
    return lambda step: always or step < warmup or (period > 0 and step // period % 2 == 0)


class ScoresNotFinite(ArithmeticError):
    """The losses or Q are finite, the scores or the policy made of them are not."""


def train_step(
    c: Components, state: LoopState, go_on: bool = False, meanwhile: Callable[[], object] | None = None
) -> Step:
    """One step k of Algorithm 1; advances `state`. Line numbers of the algorithm are at the right.

    Args:
        go_on: whether step k + 1 will follow as this one leaves the components. Then its windows are proposed
            while the device computes this one, where nothing that they depend on changes by then.
        meanwhile: what else is done then.

    Raises:
        ArithmeticError: a number is not finite: `Diverged` after the update of θ, `ScoresNotFinite` in the
            scores. The components are then in the middle of the step: go on from a checkpoint.
    """
    k = state.step
    if c.theta_resets(k):
        c.learner.snapshot()
    else:
        c.learner.release()
    began = time.perf_counter()
    state.proposed = offer = _proposed(c, state)  #                               12: C_k
    propose_seconds = time.perf_counter() - began
    trained = c.selector.admit(k, offer)
    early = go_on and c.proposes_early and foreseeable(c.proposer, k, learns=state.previous is not None)
    learning = _Learning(c.critic, state.previous)
    beside = c.beside(
        partial(c.held_out.begin, k, trained),
        partial(_propose_early, c, state) if early else None,
        partial(learning.begin, trained),
        meanwhile,
    )
    mixture = _accumulate(c, k, trained, beside)  #                               13–14, 24: H_k, q_k, π_k
    propose_seconds += beside.proposed
    began = time.perf_counter()
    effects = c.held_out.before(k, trained, mixture)
    probe_seconds = beside.measured + time.perf_counter() - began
    if getattr(c.critic, "reads_theta", True):
        learning.end(mixture.features)
    # Else φ learns while the device takes the step on θ.
    update_metrics = c.learner.update(k, partial(learning.end, mixture.features))  # 28: clip, AdamW
    q, td_metrics, td_cost = learning.end(mixture.features)  #                    16–22: V_k, TD step, Polyak
    action = None if q is None else c.act(q, mixture)  #                          25–26: a_k ~ π_k
    began = time.perf_counter()
    reward, held_out_cost = c.held_out.after(k)  #                                29: r_k
    reward_seconds = time.perf_counter() - began
    own = {
        "train/loss": mixture.loss,
        "theta_reset": float(c.theta_resets(k)),
        "time/propose": propose_seconds,
    }
    if action is not None:
        own["policy/action"] = float(trained.rows[action])
    if reward is not None:
        own |= {"reward": reward, "held_out/forwards": held_out_cost.forwards}
        own |= {"time/probe": probe_seconds, "time/reward": reward_seconds}
    step = Step(
        **vars(mixture),
        index=k,
        offer=offer,
        trained=trained,
        q=q,
        action=action,
        effects=effects,
        reward=reward,
        cost=offer.cost + td_cost + held_out_cost,
        metrics=merge(offer.metrics, own, td_metrics, update_metrics),
    )
    step = replace(step, metrics=merge(step.metrics, c.selector.observe(step)))
    if c.theta_resets(k):
        c.learner.restore()
    state.previous = step if q is not None and reward is not None else None
    state.step = k + 1
    return step


class _Learning:
    """q_k of the windows of a step by φ as it is, and the TD update of φ, with what that says of itself.

    A Q that judges windows before the forward pass waits for none: it learns while the device computes.
    """

    def __init__(self, critic: Critic, previous: Step | None) -> None:
        self._critic = critic
        self._previous = previous
        self._found: tuple[Tensor | None, Metrics, Cost] | ArithmeticError | None = None

    def begin(self, trained: Offer) -> None:
        if getattr(self._critic, "before_forward", False):
            try:
                self._learn(Features.before_forward(trained))
            except ArithmeticError as error:  # is none of the passes'
                self._found = error

    def end(self, features: Features) -> tuple[Tensor | None, Metrics, Cost]:
        if self._found is None:
            self._learn(features)
        if isinstance(self._found, ArithmeticError):
            raise self._found
        assert self._found is not None
        return self._found

    def _learn(self, features: Features) -> None:
        q = self._critic.values(features)
        self._found = (q, *self._critic.learn(self._previous, features))


def _proposed(c: Components, state: LoopState) -> Offer:
    """C_k: what was proposed during the step before, or is now."""
    early, state.early = state.early, None
    if isinstance(early, Exception):
        raise early
    return c.proposer.propose(state.step) if early is None else early


def _propose_early(c: Components, state: LoopState) -> None:
    """C_{k+1}. An error belongs to the step that it keeps from being taken, and not to the one under way."""
    try:
        state.early = c.proposer.propose(state.step + 1)
    except Exception as error:
        state.early = error


def foreseeable(proposer: Proposer, step: int, *, learns: bool) -> bool:
    """Whether nothing that the windows of the step after this one depend on changes in this one once its own
    are admitted: the answer of the proposer's method `foreseeable`, no without one.

    Args:
        learns: whether Q learns in the step.
    """
    answer: Callable[[int, bool], bool] = getattr(proposer, "foreseeable", lambda step, learns: False)
    return answer(step, learns)


def _accumulate(c: Components, k: int, trained: Offer, meanwhile: Meanwhile) -> Mixture:
    """The mixture of the offer's windows; leaves its gradient on θ."""
    losses: list[Tensor] = []

    def score(part: Offer, features: Features) -> Tensor:
        losses.append(features.loss)
        return c.selector.score(k, part, features)

    try:
        return c.learner.accumulate(trained, score, c.selector.needs_entropy, meanwhile)
    except ArithmeticError as error:
        if all(loss.isfinite().all() for loss in losses):
            raise ScoresNotFinite("the losses of the candidates are finite, their scores are not") from error
        raise


@dataclass(frozen=True)
class SampledAction:
    """a_k ~ π_k: with the mixture the draw decides what the TD update credits, and nothing else."""

    critic: Critic
    generator: torch.Generator

    def __call__(self, q: Tensor, mixture: Mixture) -> int:
        try:
            return sample_action(self.critic.policy(q, mixture.features), self.generator)
        except FloatingPointError as error:
            if q.isfinite().all():
                message = "the values Q of the candidates are finite, their policy is not"
                raise ScoresNotFinite(message) from error
            raise


def trained_action(q: Tensor, mixture: Mixture) -> int:
    """The one window that is trained on, in the single-action formulation."""
    return int(mixture.weights.argmax())
