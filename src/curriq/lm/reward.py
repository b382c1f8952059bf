"""The reward of a step: how well θ now predicts held-out text (Eq. 1), and other held-out losses."""

import torch
from jaxtyping import Int
from torch import Tensor

from curriq import parallel
from curriq.lm.loss import window_losses
from curriq.lm.model import LanguageModel


def held_out_loss(
    lm: LanguageModel, windows: Int[Tensor, "M T"], *, micro_batch: int, chunk_tokens: int
) -> float:
    """Mean next-token loss over all predicted tokens of the windows, nats per token, without dropout."""
    size = max(1, min(micro_batch, chunk_tokens // windows.shape[1]))
    total = torch.zeros((), dtype=torch.float64, device=lm.device)
    with lm.measuring():
        local = windows[parallel.shard()]
        for start in range(0, len(local), size):  # none where there are more ranks than windows
            tokens = local[start : start + size].to(lm.device)
            losses, _ = window_losses(lm, lm.trunk(tokens), tokens, chunk_tokens)
            total += losses.double().sum()
    return parallel.reduce_sum_(total).item() / windows.shape[0]


class HeldOutReward:
    """r_k = mean log-likelihood of M windows drawn afresh from the reward set D (Eq. 1), nats per token."""

    def __init__(
        self,
        lm: LanguageModel,
        reward_set: Int[Tensor, "D T"],
        windows: int,
        generator: torch.Generator,
        *,
        micro_batch: int,
        chunk_tokens: int,
    ) -> None:
        self._lm = lm
        self._reward_set = reward_set
        self._generator = generator
        self._sizes = {"micro_batch": micro_batch, "chunk_tokens": chunk_tokens}
        self.windows = windows

    def measure(self) -> float:
        """Reward of θ as it is now, on a subset without replacement."""
        order = torch.randperm(self._reward_set.shape[0], generator=self._generator)
        return -held_out_loss(self._lm, self._reward_set[order[: self.windows]], **self._sizes)
