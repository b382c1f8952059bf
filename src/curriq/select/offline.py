"""What a finished run says of documents outside its stream, as it stands: nothing is remembered."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config.sections import PRE_FORWARD_FEATURES
from curriq.data.ngrams import Cut, document_means
from curriq.data.stream import Unreadable
from curriq.errors import CurriqError
from curriq.lm.mixture import window_features
from curriq.lm.model import LanguageModel, window_losses
from curriq.select.base import StreamProposer
from curriq.select.documents import NgramScorer
from curriq.select.sharded import ShardedProposer
from curriq.select.static import DsirScore, ScoredStream, WindowScorer
from curriq.select.stream_filter import FilteredStream
from curriq.softq.critic import TDCritic
from curriq.types import IGNORED, Critic, Features, Offer, Proposer, Windows

Columns = dict[str, Float[np.ndarray, "w"]]
"""Name of a score → its value for each window."""


@dataclass(frozen=True)
class OfflinePolicy:
    """The scores that a finished run gives to windows.

    Attributes:
        columns: names of the scores: `dsir`, nats per n-gram; `q`, nats per token; `policy`, the probability
            in [0, 1] with which its stream filter would accept the window. Only those that the run has.
        dsir: the score by the n-grams that the run has counted; None where it has none.
        reads_text: whether Q takes a forward pass of the language model.
    """

    columns: tuple[str, ...]
    dsir: NgramScorer | None
    reads_text: bool
    _judge: Callable[[Cut, Columns, Int[Tensor, "w"]], Columns]

    def __call__(self, cut: Cut, dsir: Float[np.ndarray, "w"] | None, source: int) -> Columns:
        """The scores of the windows of some documents.

        Args:
            dsir: what `self.dsir` gives; None without it.
            source: position of the documents' source in the run.
        """
        if not len(cut.windows):
            return {name: np.zeros(0) for name in self.columns}
        given: Columns = {} if dsir is None else {"dsir": dsir}
        return given | self._judge(cut, given, torch.full((len(cut.windows),), source))


def offline_policy(
    proposer: Proposer, critic: Critic, lm: LanguageModel, features: tuple[str, ...]
) -> OfflinePolicy:
    """The scores of a run with these parts, whose Q reads these `features`.

    Raises:
        CurriqError: the run has no score by which documents could be ranked.
    """
    scored, stream_filter = _scorer_of(proposer), _filter_of(proposer)
    score = None if scored is None else scored.score
    ngrams = NgramScorer(score.counts()) if isinstance(score, DsirScore) else None
    if score is not None and ngrams is None:
        raise CurriqError(
            f"the static score of this run, {type(score).__name__}, is of the windows of its own "
            "stream alone. Rank the files by n-grams instead: curriq select --target TARGET FILES."
        )
    needs_no_pass = set(features) <= set(PRE_FORWARD_FEATURES)
    has_q = isinstance(critic, TDCritic)
    dsir = ("dsir",) if ngrams is not None else ()
    if stream_filter is not None and (needs_no_pass or not has_q):
        names = (*dsir, *(("q",) if has_q else ()), "policy")
        return OfflinePolicy(names, ngrams, False, _Filter(stream_filter, critic, scored))
    if has_q:
        return OfflinePolicy((*dsir, "q"), ngrams, True, _ReadingQ(critic, lm, scored))
    raise CurriqError(
        "this run has neither a Q nor a static score, so it ranks no documents. Rank them by n-grams: curriq "
        "select --target TARGET FILES; or train a run with --preset recommended."
    )


def _filter_of(proposer: Proposer) -> FilteredStream | None:
    """The filter of a proposer; of one in shards that of any, because one policy filters all of them."""
    part = next(iter(proposer.parts.values())) if isinstance(proposer, ShardedProposer) else proposer
    return part if isinstance(part, FilteredStream) else None


def _scorer_of(proposer: Proposer) -> WindowScorer | None:
    if isinstance(proposer, ShardedProposer):
        return proposer.scorer
    stream = proposer.stream if isinstance(proposer, FilteredStream | StreamProposer) else None
    stream = stream.inner if isinstance(stream, Unreadable) else stream
    return stream if isinstance(stream, ScoredStream) else None


def known_of(scored: WindowScorer | None, cut: Cut, given: Columns, source: Tensor) -> dict[str, Tensor]:
    """What is known of windows before a forward pass, by name."""
    if scored is None:
        return {}
    dsir = torch.from_numpy(given["dsir"])
    of_document = torch.from_numpy(document_means(given["dsir"], cut.taught, cut.per_document))
    return scored.describe(dsir, of_document[torch.from_numpy(cut.document)], source)


@dataclass(frozen=True)
class _Filter:
    """Q and acceptance of a stream filter, whose inputs are known before the forward pass."""

    proposer: FilteredStream
    critic: Critic
    scored: WindowScorer | None

    def __call__(self, cut: Cut, given: Columns, source: Int[Tensor, "w"]) -> Columns:
        n = len(source)
        known = known_of(self.scored, cut, given, source)
        no_text = torch.zeros(n, 0, dtype=torch.int64)
        offer = Offer.of(Windows(tokens=no_text, ids=torch.arange(n), source=source), known=known)
        found = {"policy": self.proposer.accept_prob(offer).numpy()}
        q = self.critic.values(Features.before_forward(offer))
        return found if q is None else found | {"q": q.cpu().double().numpy()}


@dataclass(frozen=True)
class _ReadingQ:
    """Q of windows that the language model reads, a forward pass each; windows of one length at a time."""

    critic: Critic
    lm: LanguageModel
    scored: WindowScorer | None

    def __call__(self, cut: Cut, given: Columns, source: Int[Tensor, "w"]) -> Columns:
        known = known_of(self.scored, cut, given, source)
        q = np.zeros(len(source))
        starts = cut.windows.cumsum() - cut.windows
        for length in np.unique(cut.windows).tolist():
            rows = np.flatnonzero(cut.windows == length)
            for part in np.array_split(rows, -(-len(rows) // self.lm.pieces.micro_batch)):
                places = starts[part][:, None] + np.arange(length)
                tokens = torch.from_numpy(cut.tokens[places].astype(np.int64))
                labels = None  # the loss is over what a run would learn, as in training
                if cut.learnt is not None:
                    labels = tokens.where(torch.from_numpy(cut.learnt[places]), IGNORED)
                at = torch.from_numpy(part)
                windows = Windows(tokens=tokens, ids=torch.arange(len(at)), source=source[at], labels=labels)
                q[part] = self._values(windows, {name: column[at] for name, column in known.items()})
        return {"q": q}

    def _values(self, windows: Windows, known: dict[str, Tensor]) -> np.ndarray:
        offer = Offer.of(windows, known=known).to(self.lm.device)
        with self.lm.measuring():
            hidden = self.lm.trunk(offer.windows.tokens)
            losses = hidden.new_zeros(len(windows), dtype=torch.float32)
            if windows.tokens.shape[1] > 1:  # a single token predicts none
                losses = window_losses(self.lm, hidden, offer.windows)[0]
            q = self.critic.values(window_features(hidden, offer, losses))
        assert q is not None
        return q.cpu().double().numpy()
