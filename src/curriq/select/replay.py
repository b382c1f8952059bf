"""Weights of a recorded curriculum, whatever the model says now."""

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.data.curriculum import Curriculum
from curriq.select.base import PlainSelector
from curriq.types import Candidates, Features


class Replay(PlainSelector):
    """Score of a window: the log-weight that it had in the recorded run, to the bit.

    Args:
        curriculum: the file; the candidates are its own, told by `Candidates.rows`.
    """

    def __init__(self, curriculum: Curriculum) -> None:
        self._curriculum = curriculum

    def narrow(self, step: int, candidates: Candidates) -> Candidates:
        """Windows that the recorded run did not forward are not forwarded here either."""
        scores = self._scores(step)[candidates.rows]
        return candidates.take(torch.nonzero(~scores.isnan()).squeeze(1))

    def scores(self, step: int, candidates: Candidates, features: Features) -> Float[Tensor, "n"]:
        return self._scores(step)[candidates.rows].to(features.loss.device)

    def _scores(self, step: int) -> Float[Tensor, "N"]:
        return torch.from_numpy(self._curriculum[step].scores)
