"""Windows from a stream in shards, scored and filtered by one policy for all of them.

What compares windows with those read before (counts of n-grams, the latest scores and the rule fitted to
them, means by document, readings by window, Q, β) is of the whole stream, so that windows are judged as in a
stream that is not divided: statistics of one shard would be S times as noisy, and each shard would accept by
another threshold. During a step the policy stands still: each shard judges its windows by the policy as it
was when the step began, and what all of them have judged is taken in together when it ends. So neither the
order in which shards are read nor the process that reads them matters.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from curriq import parallel
from curriq.config import RunConfig
from curriq.data.shards import ShardedStream, from_all_shards, states_of_all, together
from curriq.data.stream import Unreadable
from curriq.rng import derive_seed
from curriq.select.base import Context, Foreseeable, StreamProposer, never
from curriq.select.static import LOOK_AHEAD, ScoredStream, WindowScorer
from curriq.select.stream_filter import ShardFilter, announce, filtered
from curriq.state import Saved, State, Stateful
from curriq.types import NO_COST, Cost, Offer, Proposer, Reading, Windows, WindowSource, readings_of

logger = logging.getLogger("curriq")


@dataclass(eq=False)
class _JudgedShard(Saved):
    """The windows of a shard with what is known of them by the scores as they stand."""

    SAVED = ("stream",)

    stream: WindowSource
    scorer: WindowScorer

    def read(self, n: int) -> Offer:
        offer = self.stream.read(n)
        known = self.scorer.judge(offer.windows)
        return replace(offer, known=known, cost=offer.cost + self.scorer.score.cost * len(offer))


@dataclass(eq=False)
class ShardedProposer:
    """Proposes N/S windows of each shard, put together in the shards' order, on every process.

    Rank 0's policy counts: at the beginning of a step it replaces that of the other ranks. Every offer says
    by which version of the policy it was made, and offers of different versions are not put together.

    Args:
        parts: propose the windows of this process's shards, by number.
        streams: what the parts read.
        policy: what accepts windows, where it learns.
        scorer: the scores that the windows come with; None without any.
        ahead: windows of each shard that are scored before the first step.
        most: windows read per window accepted, at most.
        foreseeable: as in `FilteredStream`.

    Attributes:
        version: updates of the policy so far.
    """

    parts: Mapping[int, Proposer]
    streams: Mapping[int, Unreadable]
    _: KW_ONLY
    policy: Stateful | None
    scorer: WindowScorer | None
    ahead: int
    most: int
    foreseeable: Foreseeable = never
    version: int = 0

    @property
    def readings(self) -> tuple[Reading, ...]:
        return readings_of(next(iter(self.parts.values())))

    def propose(self, step: int) -> Offer:
        """The N windows of a step, and those that were rejected.

        Raises:
            CurriqError: on all processes, where a source of any cannot be read on.
            RanksDiffer: a shard was read by another version of the policy.
        """
        self._adopt_policy()
        spent = self._look_ahead() if self.version == 0 else NO_COST
        version = self.version
        offer = together(
            lambda: {n: replace(part.propose(step), version=version) for n, part in self.parts.items()}
        )
        if self.scorer is not None:
            before = self.scorer.fitted_at
            offer = self.scorer.take_in(offer)
            self._adopt_fit(before)
        self.version += 1
        if step == 0 and offer.rejected is not None:
            announce(offer, self.most)
        return replace(offer, cost=offer.cost + spent)

    def _look_ahead(self) -> Cost:
        """Score the first windows of each shard, so that the first step has something to compare with; it
        reads them again. Returns what it took."""
        scorer = self.scorer
        if scorer is None:
            return NO_COST
        own: dict[int, Offer] = {}

        def read() -> dict[int, State]:
            own.update({number: shard.stream.read(self.ahead) for number, shard in self._judged.items()})
            return {number: offer.windows.state_dict() for number, offer in own.items()}

        windows = Windows.cat([Windows.from_state_dict(state) for state in from_all_shards(read)])
        score, before = scorer.shared_score, scorer.fitted_at
        score.learn(windows)
        raw = from_all_shards(lambda: {number: score.score(o.windows) for number, o in own.items()})
        known = scorer.begin(windows, torch.cat(raw).double())
        self._adopt_fit(before)
        for number, offer in own.items():
            rows = slice(number * self.ahead, (number + 1) * self.ahead)
            columns = {name: column[rows] for name, column in known.items()}
            self.streams[number].unread(replace(offer, known=columns))
        return scorer.score.cost * len(windows)

    def drop_read_ahead(self) -> None:
        """Lose the windows that have been read for later steps."""
        for stream in self.streams.values():
            stream.drop_unread()

    @property
    def _judged(self) -> dict[int, _JudgedShard]:
        inner = {number: stream.inner for number, stream in self.streams.items()}
        return {number: shard for number, shard in inner.items() if isinstance(shard, _JudgedShard)}

    def _adopt_policy(self) -> None:
        if self.policy is None or parallel.world_size() == 1:
            return
        state = parallel.from_rank_zero(self.policy.state_dict())
        if parallel.rank() > 0:
            self.policy.load_state_dict(state)

    def _adopt_fit(self, before: int) -> None:
        """Rank 0's fit of the rule, where there is a new one; everything else is sums of whole numbers, and
        scores that one process has measured for all."""
        if self.scorer is not None and self.scorer.fitted_at != before:
            self.scorer.fitted = parallel.from_rank_zero(self.scorer.fitted)

    def state_dict(self) -> State:
        """That of all shards, on rank 0; all processes must ask."""
        scorer = None if self.scorer is None else self.scorer.state_dict()
        own = {"version": self.version, "scorer": scorer}
        return {**own, "shards": states_of_all(self.parts)}

    def load_state_dict(self, state: State) -> None:
        """Continue exactly where the state was taken, on any number of processes."""
        self.version = state["version"]
        if self.scorer is not None:
            self.scorer.load_state_dict(state["scorer"])
        for number, part in self.parts.items():
            part.load_state_dict(state["shards"][str(number)])


def stream_proposer(
    config: RunConfig,
    context: Context,
    scorer: WindowScorer | None,
    accept_prob: Callable[[Offer], Float[Tensor, "n"]] | None = None,
    policy: Stateful | None = None,
    foreseeable: Foreseeable = never,
) -> Proposer:
    """The N windows of a step from the corpus's stream, in shards or not.

    Args:
        scorer: the scores that the windows come with, `references.window_scorer`; None without any.
        accept_prob: probability with which a window is accepted; None to take all as they come.
        policy: what learns it; None where nothing does.
        foreseeable: whether the probabilities of the next step are known during this one.
    """
    if scorer is not None and not getattr(scorer.score, "steady", False):
        foreseeable = never
    stream, n = context.corpus.stream, config.train.num_candidates
    if not isinstance(stream, ShardedStream):
        assert scorer is None or isinstance(scorer, ScoredStream)
        readable = Unreadable(scorer or stream, look_ahead=LOOK_AHEAD if scorer else 0)
        if accept_prob is None:
            return StreamProposer(readable, n, foreseeable)
        return filtered(readable, config, accept_prob, context.generators, foreseeable)
    each = n // stream.count
    streams = {
        number: Unreadable(shard if scorer is None else _JudgedShard(shard, scorer))
        for number, shard in stream.shards.items()
    }
    parts: dict[int, Proposer] = {number: StreamProposer(shard, each) for number, shard in streams.items()}
    if accept_prob is not None:
        parts = {
            number: ShardFilter(
                shard,
                each,
                max_read_ratio=config.train.max_read_ratio,
                accept_prob=accept_prob,
                generator=torch.Generator().manual_seed(derive_seed(config.train.seed, f"steer/{number}")),
            )
            for number, shard in streams.items()
        }
    return ShardedProposer(
        parts,
        streams,
        policy=policy,
        scorer=scorer,
        # Whole steps, so that none is shorter than the others.
        ahead=each * -(-LOOK_AHEAD // n),
        most=config.train.max_read_ratio,
        foreseeable=foreseeable,
    )
