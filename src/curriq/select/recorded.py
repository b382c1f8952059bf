"""The candidates of a step are those of a recorded curriculum, in its order."""

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.runlog.curriculum import Curriculum
from curriq.select.base import PlainSelector
from curriq.types import Candidates, Features, State


class CurriculumProposer:
    """Offers step by step what another run was offered. A step determines everything, so there is no state.

    Args:
        curriculum: the file.
        source_names: of this run; the curriculum's are among them.
    """

    def __init__(self, curriculum: Curriculum, source_names: Sequence[str]) -> None:
        self.curriculum = curriculum
        places = [source_names.index(name) for name in curriculum.sources]
        self._place = torch.tensor(places, dtype=torch.int64)

    def propose(self, step: int) -> Candidates:
        began = time.perf_counter()
        recorded = self.curriculum[step]
        n = len(recorded.window_ids)
        return Candidates(
            tokens=torch.from_numpy(recorded.tokens.astype("int64")),
            window_ids=torch.from_numpy(recorded.window_ids.astype("int64")),
            source=self._place[torch.from_numpy(recorded.source.astype("int64"))],
            rows=torch.arange(n),
            metrics={"time/propose": time.perf_counter() - began},
        )

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        assert not state, sorted(state)


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
