"""The reward of a step: how well θ now predicts held-out text (Eq. 1), and other held-out losses."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq import parallel
from curriq.lm.loss import window_losses
from curriq.lm.model import LanguageModel
from curriq.types import Candidates, Metrics, Mixture, State


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
