"""The optimizer of θ around the mixture step."""

import copy
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.config import OptimConfig
from curriq.lm.mixture import ScoreFunction, last_and_pooled, single_pass, two_pass, weighted_gradient
from curriq.lm.model import LanguageModel, Pieces
from curriq.state import Saved, State
from curriq.types import Features, Metrics, Mixture, Offer, Step, Windows


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
    scaled = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            scaled.append(gradient)
            continue
        group = groups[id(parameter)]
        beta2 = group["betas"][1]
        second = beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient.square()
        bias = 1 - beta2 ** (float(state["step"]) + 1)
        scaled.append(gradient / ((second / bias).sqrt() + group["eps"]))
    return scaled


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
    """θ and AdamW: accumulates the mixture gradient, then takes one clipped step on it.

    The schedule is `steps` long; `mixture_pass` is by default the single pass where the model has no dropout.
    """

    SAVED = ("optimizer",)
    # Not the snapshot: between steps θ is equal to it, so the next step takes it again.

    def __init__(
        self,
        lm: LanguageModel,
        config: OptimConfig,
        steps: int,
        *,
        mixture_pass: Callable[..., Mixture] | None = None,
    ) -> None:
        self.lm = lm
        lm.pieces = Pieces(config.micro_batch, config.head_chunk_tokens)
        self.config = config
        self._steps = steps
        self._pass = mixture_pass or (two_pass if lm.has_dropout else single_pass)
        self.optimizer = torch.optim.AdamW(
            lm.parameters,
            lr=config.lm_lr,
            betas=(0.9, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._snapshot: State | None = None

    @property
    def passes(self) -> int:
        """Forward passes per candidate: 1, or 2 where scoring has its own (by default with dropout)."""
        return 2 if self._pass is two_pass else 1

    def accumulate(self, offer: Offer, score: ScoreFunction, with_entropy: bool) -> Mixture:
        """Leave ∇θ Σ π_i ℓ_i (Eq. 7) on θ, scoring the candidates on the way.

        Raises:
            NonFiniteError: the mixture loss is NaN or infinite.
        """
        mixture = self._pass(self.lm, offer.to(self.lm.device), score, with_entropy)
        if not math.isfinite(mixture.loss):
            raise NonFiniteError(f"the mixture loss is {mixture.loss}")
        return mixture

    def update(self, step: int) -> Metrics:
        """Clip the gradient on θ and take one AdamW step.

        Raises:
            NonFiniteError: the gradient norm is NaN or infinite; θ is as before.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.lm.parameters, self.config.grad_clip).item()
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradient norm is {norm}")
        lr = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return {"train/grad_norm": norm, "train/lr": lr}

    def rate(self, step: int) -> float:
        """α_k, the learning rate of a step."""
        return learning_rate(self.config, step, self._steps)

    def held_out_gradient(self, windows: Windows, weights: Float[Tensor, "M"]) -> tuple[float, list[Tensor]]:
        """Σ w_i ℓ_i at θ_k and its gradient, on every rank; gradients on θ stay as they were."""
        parameters = self.lm.parameters
        with gradients_set_aside(parameters), self.lm.without_dropout():
            loss = weighted_gradient(self.lm, windows, weights.to(self.lm.device))
            # An expert that no token was routed to has none.
            return loss, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def precondition(self, gradients: list[Tensor]) -> list[Tensor] | None:
        """P g; None before the optimizer's first step."""
        return preconditioned(self.optimizer, self.lm.parameters, gradients)

    def snapshot(self) -> None:
        """Keep a copy of θ and of the optimizer's moments for `restore`, unless there is one already."""
        if self._snapshot is None:
            self._snapshot = {
                "lm": {name: value.clone() for name, value in self.lm.network.state_dict().items()},
                "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            }

    def restore(self) -> None:
        """Put θ and its optimizer back to the snapshot, as if the steps since had not been taken."""
        assert self._snapshot is not None, "restore needs a snapshot first"
        self.lm.network.load_state_dict(self._snapshot["lm"])
        self.optimizer.load_state_dict(copy.deepcopy(self._snapshot["optimizer"]))

    def release(self) -> None:
        """Forget the snapshot."""
        self._snapshot = None


@dataclass(frozen=True)
class ReforwardedAction:
    """Features of the previous action under the present θ, with gradient: TD-into-θ (Section 2.7).

    The gradient that the TD loss sends into θ is scaled by λ; it lands on top of the mixture gradient, so
    that both are clipped together and take one AdamW step.
    """

    lm: LanguageModel
    td_lambda: float

    def __call__(self, previous: Step) -> Features:
        assert previous.action is not None
        action = slice(previous.action, previous.action + 1)
        stored = previous.features.take(action)
        tokens = previous.trained.windows.tokens[action].to(self.lm.device)
        with self.lm.without_dropout():
            hidden = self.lm.trunk(tokens)
        hidden.register_hook(lambda gradient: gradient * self.td_lambda)
        last, pooled = last_and_pooled(hidden)
        return replace(stored, hidden=last, pooled=pooled)
