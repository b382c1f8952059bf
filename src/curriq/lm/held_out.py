"""The reward of a step: how well θ now predicts held-out text (Eq. 1), and other held-out losses."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq import parallel
from curriq.lm.learner import Learner
from curriq.lm.mixture import weighted_gradient
from curriq.lm.model import LanguageModel, window_losses
from curriq.types import Candidates, Effects, Metrics, Mixture, State


def held_out_loss(
    lm: LanguageModel, windows: Int[Tensor, "M T"], *, micro_batch: int, chunk_tokens: int
) -> float:
    """Mean next-token loss over all predicted tokens of the windows, nats per token, without dropout."""
    local = window_losses_of(
        lm, windows[parallel.shard()], micro_batch=micro_batch, chunk_tokens=chunk_tokens
    )
    return parallel.reduce_sum_(local.double().sum()).item() / windows.shape[0]


def window_losses_of(
    lm: LanguageModel, windows: Int[Tensor, "M T"], *, micro_batch: int, chunk_tokens: int
) -> Float[Tensor, "M"]:
    """Mean next-token loss of each window, nats per token, without gradient and dropout."""
    chunk = max(1, chunk_tokens // windows.shape[1])
    dtype = torch.promote_types(lm.parameters[0].dtype, torch.float32)
    losses = [torch.zeros(0, device=lm.device, dtype=dtype)]
    with lm.measuring():
        for start in range(0, len(windows), micro_batch):  # none where there are more ranks than windows
            tokens = windows[start : start + micro_batch].to(lm.device)
            for hidden, part in zip(lm.trunk(tokens).split(chunk), tokens.split(chunk), strict=True):
                losses.append(window_losses(lm, hidden, part, chunk_tokens)[0])
    return torch.cat(losses)


class NoReward:
    """For methods that need no reward: measures nothing."""

    def before(self, step: int, candidates: Candidates, mixture: Mixture) -> None:
        return None

    def after(self, step: int) -> tuple[None, Metrics]:
        return None, {}

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        assert not state, "this state belongs to a reward that is measured"


class HeldOutReward:
    """r_k on M windows D̂_k drawn afresh from the reward set D without replacement, nats per token.

    The absolute reward is the mean log-likelihood under θ_{k+1} (Eq. 1). The paired reward is its gain over
    θ_k on the same windows: which windows were drawn then hardly matters, so its noise is far smaller.

    Args:
        reward_set: D.
        windows: M.
        generator: CPU generator of the draws.
        every: steps between rewards; the steps between have none.
        paired: measure the gain instead of the level.

    Attributes:
        drawn: D̂_k of the step that is under way, None in a step without a reward.
        loss_before: mean loss of θ_k on `drawn`, where somebody has measured it.
        forwards: forward passes of a window that the step has cost so far; a backward pass counts as two.
    """

    def __init__(
        self,
        lm: LanguageModel,
        reward_set: Int[Tensor, "D T"],
        windows: int,
        generator: torch.Generator,
        *,
        micro_batch: int,
        chunk_tokens: int,
        every: int = 1,
        paired: bool = False,
    ) -> None:
        self._lm = lm
        self._reward_set = reward_set
        self._generator = generator
        self._sizes = {"micro_batch": micro_batch, "chunk_tokens": chunk_tokens}
        self._every = every
        self._paired = paired
        self.windows = windows
        self.drawn: Int[Tensor, "M T"] | None = None
        self.loss_before: float | None = None
        self.forwards = 0

    def draw(self, step: int) -> Int[Tensor, "M T"] | None:
        """Begin a step: D̂_k, or None where the step has no reward."""
        self.drawn, self.loss_before, self.forwards = None, None, 0
        if step % self._every == 0:
            order = torch.randperm(self._reward_set.shape[0], generator=self._generator)
            self.drawn = self._reward_set[order[: self.windows]]
        return self.drawn

    def before(self, step: int, candidates: Candidates, mixture: Mixture) -> None:
        """At θ_k, before the update."""
        if self.draw(step) is not None and self._paired:
            self.loss_before = self._loss()

    def after(self, step: int) -> tuple[float | None, Metrics]:
        """At θ_{k+1}: r_k, nats per token, and what the step's measurements have cost."""
        if self.drawn is None:
            return None, {}
        level = -self._loss()
        reward = level + self.loss_before if self._paired and self.loss_before is not None else level
        return reward, {"held_out/forwards": self.forwards}

    def _loss(self) -> float:
        assert self.drawn is not None
        self.forwards += self.windows
        return held_out_loss(self._lm, self.drawn, **self._sizes)

    def state_dict(self) -> State:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        self._generator.set_state(state["generator"])


RELATIVE_STEP = 3e-4
REDUCED_RELATIVE_STEP = 2e-3
"""‖h P ∇ℓ_D‖ over ‖θ‖, in float32 and in bfloat16. In float32 rounding and curvature are both far below the
effect. In bfloat16 the step is where both together do least harm to the order of the windows; passes in
float32 would cost several times as much on a GPU. `benchmarks/effects.py` has the numbers."""


class EffectProbe:
    """Measures effects of the candidates of a step on the held-out windows of its reward.

    The held-out gradient is averaged over the probes (exponentially, bias corrected). A single one is mostly
    sampling noise and fast modes, directions in which θ swings and whose gradient changes its sign within a
    few steps; what the average points to is still to be learnt later.

    Args:
        learner: θ and its optimiser.
        reward: draws the held-out windows, and gets its loss before the update from the gradient's pass.
        windows: candidates probed per probe, drawn at random; all of them where there are not more.
        decay: share of the old average that stays at each probe; 0 takes each gradient alone.
        generator: CPU generator of the draws of windows.
        shuffle: ablation: permute the effects among the windows, so that they mean nothing.
        micro_batch, chunk_tokens: pieces that fit memory, as in training.
    """

    def __init__(
        self,
        learner: Learner,
        reward: HeldOutReward,
        *,
        windows: int,
        decay: float,
        generator: torch.Generator,
        micro_batch: int,
        chunk_tokens: int,
        shuffle: bool = False,
    ) -> None:
        self._learner = learner
        self._lm = learner.lm
        self._reward = reward
        self._windows = windows
        self._decay = decay
        self._generator = generator
        self._sizes = {"micro_batch": micro_batch, "chunk_tokens": chunk_tokens}
        self._shuffle = shuffle
        self._average: list[Tensor] | None = None
        self._probes = 0

    def before(self, step: int, candidates: Candidates, mixture: Mixture) -> Effects | None:
        """Effects at θ_k; None in steps without a reward, and before the optimiser's first step.

        The mixture's gradient on θ stays as it is.
        """
        drawn = self._reward.draw(step)
        if drawn is None:
            return None
        gradient = self._held_out_gradient(drawn)
        direction = self._learner.precondition(self._averaged(gradient))
        if direction is None:
            return None
        rows = self._rows(candidates)
        probed = candidates.take(rows)
        relative = REDUCED_RELATIVE_STEP if self._lm.reduced_precision else RELATIVE_STEP
        size = relative * total_norm(self._lm.parameters) / max(1e-30, total_norm(direction))
        before = mixture.features.loss[rows.to(mixture.features.loss.device)]
        with displaced(self._lm.parameters, direction, -size):
            after = self._losses(probed.tokens)
        effect = ((before - after).double() * (self._learner.rate(step) / size)).to(before.dtype)
        if self._shuffle:
            effect = effect[torch.randperm(len(effect), generator=self._generator).to(effect.device)]
        weights = mixture.weights[rows.to(mixture.weights.device)]
        total = weights.sum()
        share = (weights / total) if total > 0 else torch.full_like(weights, 1 / len(weights))
        return Effects(
            rows=rows.to(effect.device), effect=effect, mixture=(share * effect).double().sum().item()
        )

    def after(self, step: int) -> tuple[float | None, Metrics]:
        """The reward of the step."""
        return self._reward.after(step)

    def _held_out_gradient(self, windows: Int[Tensor, "M T"]) -> list[Tensor]:
        """∇ℓ_D at θ_k, on every rank; leaves the loss with the reward and the gradients on θ as they were."""
        parameters = self._lm.parameters
        kept = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        weights = torch.full((len(windows),), 1 / len(windows), device=self._lm.device, dtype=torch.float64)
        with self._lm.without_dropout():
            loss = weighted_gradient(self._lm, windows, weights, **self._sizes)
        gradient = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad
        self._reward.loss_before = loss
        self._reward.forwards += 3 * len(windows)
        return gradient

    def _averaged(self, gradient: list[Tensor]) -> list[Tensor]:
        self._probes += 1
        if self._average is None:
            self._average = [torch.zeros_like(piece) for piece in gradient]
        torch._foreach_lerp_(self._average, gradient, 1 - self._decay)
        return [piece / (1 - self._decay**self._probes) for piece in self._average]

    def _rows(self, candidates: Candidates) -> Int[Tensor, "m"]:
        """Which candidates are probed, ascending; those of a fair sample first: Q is judged by them."""
        n = len(candidates)
        if n <= self._windows:
            return torch.arange(n)
        order = torch.randperm(n, generator=self._generator)
        if candidates.unfiltered is not None:
            order = order[candidates.unfiltered[order].sort(descending=True, stable=True).indices]
        return order[: self._windows].sort().values

    def _losses(self, tokens: Int[Tensor, "m T"]) -> Float[Tensor, "m"]:
        self._reward.forwards += len(tokens)
        local = window_losses_of(self._lm, tokens[parallel.shard()], **self._sizes)
        return parallel.gather_rows(local, len(tokens))

    def state_dict(self) -> State:
        average = self._average
        return {
            "average": None if average is None else [piece.clone() for piece in average],
            "probes": self._probes,
            "generator": self._generator.get_state(),
            "reward": self._reward.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        average = state["average"]
        self._average = (
            None if average is None else [piece.to(self._lm.device, copy=True) for piece in average]
        )
        self._probes = state["probes"]
        self._generator.set_state(state["generator"])
        self._reward.load_state_dict(state["reward"])


@contextmanager
def displaced(parameters: Sequence[Tensor], direction: list[Tensor], by: float) -> Generator[None]:
    """θ + by · direction for a while; then θ again, to the bit."""
    with torch.no_grad():
        kept = [parameter.clone() for parameter in parameters]
        for parameter, piece in zip(parameters, direction, strict=True):
            parameter.add_(piece, alpha=by)
        try:
            yield
        finally:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def total_norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm over all entries."""
    return torch.stack([tensor.detach().norm() for tensor in tensors]).double().norm().item()
