"""The optimizer of θ around the mixture step."""

import copy
import logging
import math
import operator
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq import parallel
from curriq.config import OptimConfig
from curriq.lm.engine import local, placed_like
from curriq.lm.mixture import (
    Draw,
    Reference,
    ScoreFunction,
    last_and_pooled,
    narrowed,
    score_pass,
    single_pass,
    weighted_gradient,
)
from curriq.lm.model import LanguageModel, Pieces
from curriq.lm.sizing import backing_off, fitting_micro_batch
from curriq.state import Saved, State
from curriq.types import NO_COST, Cost, Features, Meanwhile, Metrics, Mixture, Offer, Step, Windows, sent

logger = logging.getLogger("curriq")


class NonFiniteError(ArithmeticError):
    """The loss or its gradient is NaN or infinite; θ has not been changed."""


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of a step of so many: linear warm-up, then constant or decay to zero."""
    peak, warmup = config.lm_lr, config.lr_warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.lr_schedule]
    return peak * decay


AT_ONCE = 16
"""Parameters that one kernel of a GPU takes together; all at once would need several times θ in memory."""


def preconditioned(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor] | None:
    """P g with the optimizer's own preconditioner; the identity where it has none.

    For the Adam family P = 1/(√v̂ + ε), with the second moment as this gradient would leave it: a gradient g
    in one step moves θ by α P g in all, over this step and those in which its momentum lasts. Where there has
    been no gradient yet (the embedding of a token not seen so far), the old v̂ is 0 and would make P as large
    as 1/ε.

    Returns:
        None before the first step of an optimizer that has a preconditioner.
    """
    if not optimizer.state and any("betas" in group for group in optimizer.param_groups):
        return None
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    # Some optimizers count their steps by the group.
    states = [groups[id(parameter)] | optimizer.state.get(parameter, {}) for parameter in parameters]
    scaled = list(gradients)
    adapted = [i for i, state in enumerate(states) if {"exp_avg_sq", "betas", "eps", "step"} <= state.keys()]
    for start in range(0, len(adapted), AT_ONCE):
        rows = adapted[start : start + AT_ONCE]
        beta2 = [states[i]["betas"][1] for i in rows]
        gradient = [gradients[i] for i in rows]
        second = torch._foreach_mul([states[i]["exp_avg_sq"] for i in rows], beta2)
        square = torch._foreach_mul(gradient, gradient)
        torch._foreach_mul_(square, [1 - b for b in beta2])
        torch._foreach_add_(second, square)
        torch._foreach_div_(second, _corrections([states[i]["step"] for i in rows], beta2))
        torch._foreach_sqrt_(second)
        torch._foreach_add_(second, [states[i]["eps"] for i in rows])
        for i, piece in zip(rows, torch._foreach_div(gradient, second), strict=True):
            scaled[i] = piece
    return scaled


def _corrections(steps: Sequence[Tensor | float], beta2: Sequence[float]) -> list[float] | list[Tensor]:
    """1 − β₂ⁿ of each parameter, n updates counted with the coming one. A fused optimizer counts on the
    device, and there the numbers stay: to read them would wait for all that is queued."""
    done = torch.stack([local(torch.as_tensor(step, dtype=torch.float64)) for step in steps])
    if done.is_cuda:
        base = sent(torch.tensor(beta2, dtype=torch.float64), done.device)
        return list((1 - base ** (done + 1)).float().unbind())
    return [1 - b ** (n + 1) for n, b in zip(done.tolist(), beta2, strict=True)]


@contextmanager
def gradients_set_aside(parameters: Sequence[Tensor]) -> Generator[None]:
    """No gradients on θ for a while; then those that were there before."""
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad


class Learner(Saved):
    """θ and AdamW: scores the candidates, then takes one clipped step on the mixture's gradient.

    Where nothing stands against it, one pass does both. Scoring has a pass of its own, and the gradient one
    more in `update`, where the model has dropout, since a score must not be noise; where not all windows that
    are scored are trained on; and where θ moves in between.

    Args:
        steps: length of the learning rate's schedule.
        draw: which of the scored windows are trained on, with equal weights; None for all, by the policy.
        own_td_step: whether the gradient that a TD update leaves on θ between scoring and `update` gets a
            clipped optimizer step of its own (Algorithm 1, line 21), instead of joining the mixture's.
        two_passes: whether to score in a pass of its own where nothing else asks for it.
        engine: how the model's passes run on the processes of the run.

    Attributes:
        reference: c of the single pass.
        passes: forward passes per candidate that is trained on.
    """

    SAVED = ("optimizer", "reference")
    # Not the snapshot: between steps θ is equal to it, so the next step takes it again.

    def __init__(
        self,
        lm: LanguageModel,
        config: OptimConfig,
        steps: int,
        *,
        draw: Draw | None = None,
        own_td_step: bool = False,
        two_passes: bool = False,
        engine: str = "auto",
    ) -> None:
        self.lm = lm
        lm.distribute(engine)
        self.reference = Reference()
        lm.pieces = Pieces(config.windows_at_once, config.head_chunk_tokens or lm.head_chunk())
        # A CPU gains no time by larger passes, and does not report that its memory is used up.
        self._sized = config.micro_batch > 0 or lm.device.type != "cuda"
        self._fitting = partial(backing_off, lm) if lm.device.type == "cuda" else operator.call
        self.config = config
        self._steps = steps
        self._draw = draw
        self._own_td_step = own_td_step
        self.passes = 2 if two_passes or own_td_step or draw is not None or lm.has_dropout else 1
        self._scored: tuple[Windows, Tensor] | None = None
        self._seconds = 0.0
        self.optimizer = torch.optim.AdamW(
            lm.parameters,
            lr=config.lm_lr,
            betas=(0.9, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._snapshot: State | None = None

    def accumulate(
        self, offer: Offer, score: ScoreFunction, with_entropy: bool, meanwhile: Meanwhile | None = None
    ) -> Mixture:
        """The candidates, scored and weighed at θ_k; in a single pass ∇θ Σ π_i ℓ_i (Eq. 7) is then on θ.

        Args:
            meanwhile: done while the device computes; the seconds that it waits for it are not training's.

        Raises:
            NonFiniteError: the mixture loss is NaN or infinite.
            RanksDiffer: the processes of a run were offered different windows.
        """
        began = time.perf_counter()
        # Before the pass: ranks with different numbers of windows would wait for each other for ever.
        parallel.require_same_rows(
            torch.cat([part.windows.ids for part in offer.judged]), "windows to train on"
        )
        offer = offer.to(self.lm.device)
        self._size(offer.windows)
        self._scored = None
        beside = meanwhile or (lambda: None)
        if self.passes == 1:
            work = partial(single_pass, self.lm, offer, score, with_entropy, self.reference, beside)
            mixture = self._fitting(work)
        else:
            self.lm.zero_grad()
            mixture = self._fitting(partial(score_pass, self.lm, offer, score, with_entropy, beside))
            mixture = mixture if self._draw is None else narrowed(mixture, self._draw)
            self._scored = offer.windows, mixture.weights
        self._seconds = time.perf_counter() - began - (meanwhile.waited if meanwhile else 0.0)
        if not math.isfinite(mixture.loss):
            raise NonFiniteError(f"the mixture loss is {mixture.loss}")
        return mixture

    def _size(self, windows: Windows) -> None:
        """Choose how many windows are run at once, before the first pass."""
        if self._sized:
            return
        self._sized = True
        before = self.lm.pieces

        def passes(some: Windows) -> None:
            # Never full, so that nothing is compiled.
            self.lm.pieces = before._replace(micro_batch=sys.maxsize)
            weights = torch.full((len(some),), 1 / len(some))
            self.held_out_gradient(some, weights)

        micro_batch = fitting_micro_batch(self.lm, windows, passes)
        self.lm.pieces = before._replace(micro_batch=micro_batch)
        logger.info(f"--micro-batch auto: {micro_batch} windows per pass")

    def update(self, step: int, meanwhile: Callable[[], object] = lambda: None) -> Metrics:
        """Clip the gradient on θ and take one AdamW step.

        Args:
            meanwhile: done while the device takes the step; its seconds are not training's.

        Raises:
            NonFiniteError: the gradient norm is NaN or infinite; θ is as before this gradient.
        """
        began, lr = time.perf_counter(), self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._own_td_step and any(parameter.grad is not None for parameter in self.lm.parameters):
            _require_finite(self._clipped_step())
            self.lm.zero_grad()
        if self._scored is not None:
            weighted_gradient(self.lm, *self._scored)
        norm = self._clipped_step()
        queued = time.perf_counter()
        meanwhile()
        waited = time.perf_counter() - queued
        metrics = {"train/grad_norm": _require_finite(norm), "train/lr": lr}
        self.reference.advance()
        return metrics | {"time/train": self._seconds + time.perf_counter() - began - waited}

    def _clipped_step(self) -> Float[Tensor, ""]:
        """The norm of the gradient before it was clipped, which nobody has waited for."""
        engine, optimizer = self.lm.engine, self.optimizer
        norm = engine.clip(self.config.grad_clip)
        if engine.sharded:  # the norm has been read already, to add it up over the ranks
            _require_finite(norm)
            optimizer.step()
            return norm
        # The device decides whether the step is taken, and the host reads the norm while it is under way.
        setattr(optimizer, "found_inf", (~norm.isfinite()).float())  # noqa: B010 (torch declares no such field)
        try:
            optimizer.step()
        finally:
            delattr(optimizer, "found_inf")
        return norm

    def rate(self, step: int) -> float:
        """α_k, the learning rate of a step."""
        return learning_rate(self.config, step, self._steps)

    def held_out_gradient(
        self, windows: Windows, weights: Float[Tensor, "M"]
    ) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """Σ w_i ℓ_i at θ_k and its gradient, on every rank; gradients on θ stay as they were."""
        parameters = self.lm.parameters
        with gradients_set_aside(parameters), self.lm.without_dropout():
            loss = weighted_gradient(self.lm, windows, weights)
            # An expert that no token was routed to has none.
            return loss, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def precondition(self, gradients: list[Tensor]) -> list[Tensor] | None:
        """P g; None before the optimizer's first step."""
        return preconditioned(self.optimizer, self.lm.parameters, gradients)

    def state_dict(self) -> State:
        # Another number of windows per pass would round differently.
        return super().state_dict() | {"micro_batch": self.lm.pieces.micro_batch if self._sized else 0}

    def load_state_dict(self, state: State) -> None:
        """Moments that are whole, or stored in parts, into the parts that this rank holds, so that any number
        of ranks and any engine can go on."""
        moments, parameters = state["optimizer"]["state"], self.lm.parameters
        # The number of steps is no moment.
        keys = [
            (i, name)
            for i, entry in moments.items()
            for name, x in entry.items()
            if not isinstance(x, Tensor) or x.dim()
        ]
        values = placed_like([moments[i][name] for i, name in keys], [parameters[i] for i, _ in keys])
        placed = {i: dict(entry) for i, entry in moments.items()}
        for (i, name), value in zip(keys, values, strict=True):
            placed[i][name] = value
        # A checkpoint of an earlier version has neither.
        state = {"reference": Reference().state_dict(), "micro_batch": 0, **state}
        micro_batch = state.pop("micro_batch")
        if not self._sized and micro_batch:
            self.lm.pieces, self._sized = self.lm.pieces._replace(micro_batch=micro_batch), True
        super().load_state_dict(state | {"optimizer": state["optimizer"] | {"state": placed}})

    def snapshot(self) -> None:
        """Keep a copy of θ and of the optimizer's moments for `restore`, unless there is one already."""
        if self._snapshot is None:
            self._snapshot = {
                "lm": {name: value.clone() for name, value in self.lm.network.state_dict().items()},
                "optimizer": copy.deepcopy(self.optimizer.state_dict()),
                "reference": self.reference.state_dict(),
            }

    def restore(self) -> None:
        """Put θ and its optimizer back to the snapshot, as if the steps since had not been taken."""
        assert self._snapshot is not None, "restore needs a snapshot first"
        self.lm.network.load_state_dict(self._snapshot["lm"])
        self.optimizer.load_state_dict(copy.deepcopy(self._snapshot["optimizer"]))
        self.reference.load_state_dict(self._snapshot["reference"])

    def release(self) -> None:
        """Forget the snapshot."""
        self._snapshot = None


def _require_finite(norm: Tensor) -> float:
    if not math.isfinite(read := norm.item()):
        raise NonFiniteError(f"the gradient norm is {read}")
    return read


@dataclass(frozen=True)
class ReforwardedAction:
    """The previous action at the present θ: h_prev ← Hidden(θ_k, a_{k−1}) (Algorithm 1, line 19)."""

    lm: LanguageModel
    cost: Cost = NO_COST

    def features(self, previous: Step) -> Features:
        tokens = _tokens_of_action(previous, self.lm)
        with self.lm.measuring():
            return _features_of_action(previous, self.lm.engine.inside(partial(self.lm.trunk, tokens)))

    def backward(self) -> Metrics:
        return {}


@dataclass
class TDIntoTheta:
    """The previous action at the present θ, through which the TD loss reaches θ (Section 2.7).

    λ times its gradient goes onto θ, on top of what is there; the learner's next step takes it.
    """

    lm: LanguageModel
    td_lambda: float
    cost: Cost = NO_COST
    _cut: tuple[Tensor, Tensor] | None = None

    def features(self, previous: Step) -> Features:
        with self.lm.without_dropout():
            hidden = self.lm.trunk(_tokens_of_action(previous, self.lm))
        leaf = hidden.detach().requires_grad_()
        self._cut = hidden, leaf
        return _features_of_action(previous, leaf)

    def backward(self) -> Metrics:
        """The norm of ∇θ of the TD loss before it is scaled by λ."""
        assert self._cut is not None, "backward follows the backward pass of the TD loss"
        (hidden, leaf), self._cut = self._cut, None
        parameters = self.lm.parameters
        with gradients_set_aside(parameters):
            hidden.backward(leaf.grad)
            reached = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, gradient in reached:
            scaled = gradient * self.td_lambda
            parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled
        norm = torch.nn.utils.get_total_norm([gradient for _, gradient in reached])
        return {"critic/theta_grad_norm": norm.item()}


def _tokens_of_action(previous: Step, lm: LanguageModel) -> Int[Tensor, "1 T"]:
    assert previous.action is not None
    return previous.trained.windows.tokens[previous.action : previous.action + 1].to(lm.device)


def _features_of_action(previous: Step, hidden: Float[Tensor, "1 T d"]) -> Features:
    """The stored features of a_{k−1}, with new hidden states."""
    assert previous.action is not None
    stored = previous.features.take(slice(previous.action, previous.action + 1))
    last, pooled = last_and_pooled(hidden)
    return replace(stored, hidden=last, pooled=pooled)
