"""What a method is made of, and the trivial parts of one: no selection, no Q."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import RunConfig
from curriq.data.corpus import Corpus
from curriq.data.stream import Unreadable
from curriq.errors import StreamEnded
from curriq.lm.model import LanguageModel
from curriq.rng import Generators
from curriq.softq.equations import uniform_policy
from curriq.state import Saved
from curriq.types import (
    NO_COST,
    Cost,
    Critic,
    Features,
    Metrics,
    Offer,
    Proposer,
    Reading,
    Selector,
    Step,
    Windows,
    WindowSource,
    readings_of,
    status_of,
)

PASSAGE = 8
"""Tokens of a passage, a power of two. Long enough that ordinary phrases are not repetitions, short enough
that a copy with one word in twenty changed still has most of its passages."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may be built from. Frozen: a builder returns what it makes.

    Attributes:
        corpus: the stream of windows, the held-out sets and the tokenizer.
        lm: θ.
        generators: one per purpose.
    """

    corpus: Corpus
    lm: LanguageModel
    generators: Generators


@dataclass(frozen=True, kw_only=True)
class Method:
    """What decides which data a run learns from.

    Attributes:
        proposer: offers the windows of a step.
        selector: admits and scores them.
        critic: Q.
        cost: what each forwarded window costs beside training, such as a reference model's forward pass.
        shared: φ; in a distributed run every rank updates it, and rank 0's counts.
    """

    proposer: Proposer
    selector: Selector
    critic: Critic
    cost: Cost = NO_COST
    shared: Sequence[Tensor] = ()


class NoCritic(Saved):
    """For methods without a Q-function: no values, a uniform policy, nothing to learn."""

    needs_reward = False

    def values(self, features: Features) -> None:
        return None

    def policy(self, q: Float[Tensor, "N"], features: Features) -> Float[Tensor, "N"]:
        return uniform_policy(q)

    def learn(self, previous: Step | None, features: Features) -> tuple[Metrics, Cost]:
        return {}, NO_COST


Foreseeable = Callable[[int, bool], bool]
"""Whether nothing that the windows of the step after this one depend on changes in this one once its own are
admitted, given the step and whether Q learns in it: the method `foreseeable` of a proposer."""


def never(step: int, learns: bool) -> bool:
    return False


def always(step: int, learns: bool) -> bool:
    return True


@dataclass(eq=False)
class StreamProposer(Saved):
    """C_k = NEXTBATCH (Algorithm 1, line 3): the next n windows of the stream."""

    SAVED = ("stream",)

    stream: WindowSource
    n: int
    foreseeable: Foreseeable = never

    def propose(self, step: int) -> Offer:
        offer = self.stream.read(self.n)
        if not len(offer):
            raise StreamEnded
        return offer

    def drop_read_ahead(self) -> None:
        """Lose the windows that have been read for later steps."""
        if isinstance(self.stream, Unreadable):
            self.stream.drop_unread()


POLICY_SPREAD = Reading("policy spread", "policy/kl_from_uniform", "{:.0%}", lambda kl: math.exp(-kl))
"""As if the weight lay evenly on this share of the windows; of the policy, where a step draws from it."""


class PlainSelector(Saved):
    """Admits all windows, learns nothing and has no state; a subclass adds `score`."""

    needs_entropy: bool = False
    needs_reward: bool = False

    def admit(self, step: int, offer: Offer) -> Offer:
        return offer

    def observe(self, step: Step) -> Metrics:
        return {}


class Uniform(PlainSelector):
    """π_i = 1/N (Eqs. 9–10)."""

    def score(self, step: int, offer: Offer, features: Features) -> Float[Tensor, "n"]:
        return torch.zeros_like(features.loss)


@dataclass(eq=False)
class RandomK(Uniform):
    """Trains uniformly on k random candidates of each step, on all where there are fewer."""

    SAVED = ("generator",)

    k: int
    generator: torch.Generator

    def admit(self, step: int, offer: Offer) -> Offer:
        shuffled = torch.randperm(len(offer), generator=self.generator)
        return offer.take(shuffled[: self.k].sort().values)


class History(Saved):
    """The last `capacity` values, oldest first, in float64 on the CPU: for ranks and quantiles."""

    SAVED = ("values",)

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._capacity = capacity
        self.values = torch.zeros(0, dtype=torch.float64)

    def extend(self, new: Float[Tensor, "n"]) -> None:
        self.values = torch.cat([self.values, new.detach().cpu().double()])[-self._capacity :].clone()


def passages(windows: Windows, every: int) -> tuple[Int[Tensor, "p"], Int[Tensor, "p"]]:
    """The row of the window and the hash of about one passage in `every`, window by window, on the CPU.

    They are chosen by their hash, so that copies of a text show the same ones, wherever their windows begin.
    """
    tokens = windows.tokens.cpu()
    key, factor, width = tokens[:, : 0 if tokens.shape[1] < PASSAGE else None], 1_000_003, 1
    while width < PASSAGE:  # the polynomial of twice as many tokens, from two neighbours
        key = key[:, :-width] * factor + key[:, width:]
        factor, width = (factor * factor) % 2**62, 2 * width
    mixed = (key ^ key >> 29) * 0x5851F42D4C957F2D  # the high bits of a product depend on all of the key
    sampled = (mixed >> 40 & 0xFFFF) % every == 0
    if (learnt := windows.learnt) is not None:  # padding, and what others wrote, is no text that is repeated
        learnt = learnt.cpu()
        sampled &= learnt[:, : key.shape[1]] & learnt[:, PASSAGE - 1 :]
    window, place = sampled.nonzero(as_tuple=True)
    return window, mixed[window, place] >> 20


class RecentTotals(Saved):
    """Running totals by identity, of documents or windows.

    A table of fixed size by the identity; where two share a slot, the later one begins afresh, so that memory
    and checkpoints stay small however long the stream is.

    Args:
        slots: of the table.
        columns: totals of each identity.
    """

    SAVED = ("_identity", "_totals")

    def __init__(self, slots: int, columns: int) -> None:
        self._identity = torch.full((slots,), -1, dtype=torch.int64)
        self._totals = torch.zeros(slots, columns, dtype=torch.float64)

    def add(
        self, identity: Int[Tensor, "n"], values: Float[Tensor, "n c"]
    ) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
        """The totals of each row's identity before this batch, and with it."""
        names, slots, place, before, after = self._with(identity, values)
        self._identity[slots], self._totals[slots] = names, after
        return before[place], after[place]

    def preview(
        self, identity: Int[Tensor, "n"], values: Float[Tensor, "n c"]
    ) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
        """What `add` would return; nothing is remembered."""
        *_, place, before, after = self._with(identity, values)
        return before[place], after[place]

    def _with(
        self, identity: Int[Tensor, "n"], values: Float[Tensor, "n c"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Distinct identities, their slots, the place of each row's, and their totals before and after."""
        names, place = identity.unique(return_inverse=True)
        slots = names.remainder(len(self._identity))
        before = self._totals[slots]
        # Two identities of a batch may share a slot.
        before[torch.isin(slots, slots[self._identity[slots] != names])] = 0
        after = before + torch.zeros_like(before).index_add_(0, place, values.double())
        return names, slots, place, before, after


class UniformUntil(Saved):
    """Uniform over all candidates before `step`, then `inner`; the mixture of Q warm-up.

    Until then `inner` is not asked and does not learn.
    """

    SAVED = ("_inner",)

    def __init__(self, inner: Selector, step: int) -> None:
        self._inner = inner
        self._start = step
        self._warm_up = Uniform()
        self.needs_entropy = inner.needs_entropy
        self.needs_reward = inner.needs_reward
        self.readings = readings_of(inner)

    def status(self) -> str:
        return status_of(self._inner)

    def _active(self, step: int) -> Selector:
        return self._warm_up if step < self._start else self._inner

    def admit(self, step: int, offer: Offer) -> Offer:
        return self._active(step).admit(step, offer)

    def score(self, step: int, offer: Offer, features: Features) -> Float[Tensor, "n"]:
        return self._active(step).score(step, offer, features)

    def observe(self, step: Step) -> Metrics:
        return self._active(step.index).observe(step)


def plain(
    selector: Selector,
    config: RunConfig,
    context: Context,
    *,
    stream: WindowSource | None = None,
    cost: Cost = NO_COST,
) -> Method:
    """The method that scores the windows of a stream, the corpus's own by default, and has no Q."""
    n = config.train.num_candidates
    proposer = StreamProposer(stream or context.corpus.stream, n, never if stream else always)
    return Method(proposer=proposer, selector=selector, critic=NoCritic(), cost=cost)
