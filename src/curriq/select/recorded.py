"""A recorded curriculum: its windows in its order, and its weights, whatever the model says now."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.config import RunConfig, require
from curriq.runlog.curriculum import RecordedCurriculum, open_curriculum
from curriq.select.base import POLICY_SPREAD, Context, Method, NoCritic, PlainSelector
from curriq.state import Saved
from curriq.types import IGNORED, Cost, Features, Offer, Windows


class RecordedProposer(Saved):
    """Offers step by step what another run was offered, whose sources are among `source_names`, this run's.

    A step determines everything, so there is no state.
    """

    def __init__(self, curriculum: RecordedCurriculum, source_names: Sequence[str]) -> None:
        self.curriculum = curriculum
        places = [source_names.index(name) for name in curriculum.sources]
        self._place = torch.tensor(places, dtype=torch.int64)

    def propose(self, step: int) -> Offer:
        recorded = self.curriculum[step]
        stored = torch.from_numpy(recorded.tokens.astype("int64"))
        windows = Windows(
            tokens=torch.where(stored < 0, ~stored, stored),
            labels=torch.where(stored < 0, IGNORED, stored) if (stored < 0).any() else None,
            ids=torch.from_numpy(recorded.window_ids.astype("int64")),
            source=self._place[torch.from_numpy(recorded.source.astype("int64"))],
        )
        return Offer.of(windows, cost=Cost(windows_read=len(windows)))


@dataclass(eq=False)
class RecordedWeights(PlainSelector):
    """Score of a window, identified by `Offer.rows`: its log-weight in the recorded run, to the bit."""

    readings = (POLICY_SPREAD,)

    curriculum: RecordedCurriculum

    def admit(self, step: int, offer: Offer) -> Offer:
        """Windows that the recorded run did not forward are not forwarded here either."""
        scores = self._scores(step)[offer.rows]
        return offer.take(torch.nonzero(~scores.isnan()).squeeze(1))

    def score(self, step: int, offer: Offer, features: Features) -> Float[Tensor, "n"]:
        return self._scores(step)[offer.rows].to(features.loss.device)

    def _scores(self, step: int) -> Float[Tensor, "N"]:
        return torch.from_numpy(self.curriculum[step].scores)


def build(config: RunConfig, context: Context) -> Method:
    """Windows and weights of `--curriculum`."""
    proposer = _proposer(config, context)
    return Method(proposer=proposer, selector=RecordedWeights(proposer.curriculum), critic=NoCritic())


def reorder(method: Method, config: RunConfig, context: Context) -> Method:
    """The same method on the windows of `--curriculum`, in its order."""
    return replace(method, proposer=_proposer(config, context))


def _proposer(config: RunConfig, context: Context) -> RecordedProposer:
    names = context.corpus.source_names
    curriculum = open_curriculum(config, context.corpus.fingerprint(), names)
    entries = 1 + max(context.corpus.tokenizer.get_vocab().values())
    require(
        curriculum.greatest_id < entries,
        f"--curriculum {config.data.curriculum} has the token {curriculum.greatest_id}, the tokenizer only "
        f"{entries} entries: the file is damaged; `curriq export RUN` writes it again.",
    )
    return RecordedProposer(curriculum, names)
