"""The data that flows through a run, and the protocols at its seams.

Shape legend, used in every signature of the package:

| letter | meaning |
|---|---|
| N | candidate windows of one step, over all processes |
| n | windows of one micro-batch or of one process's shard |
| T | tokens per window |
| d | width of the hidden state that the Q-network sees |
| V | vocabulary |
| M | windows of one reward subset |
| R | windows retrieved in one step of Langevin-RAG |
| K, L | its queries, and their tokens |

All losses are in nats per token. Sums are divided once, by the token count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curriq.state import State, Stateful

Metrics = dict[str, float]
"""Metric name to value; every name is documented in `docs/metrics.md`."""

IGNORED = -100
"""Label of a token that is not learnt, as in PyTorch's cross-entropy."""


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; the host does not wait until it is there."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()  # from other memory the copy would be waited for
    return tensor.to(device, non_blocking=True)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass, mapping or tensor with `change` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _map(item, change) for name, item in value.items()}
    return value


def _cat(parts: Sequence[Any]) -> Any:
    """Tensors, or mappings of tensors, one after another; anything else is that of the last part."""
    first = parts[0]
    assert all((part is None) == (first is None) for part in parts), "some parts lack a column of others"
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {name: torch.cat([part[name] for part in parts]) for name in first}
    return parts[-1]


B = TypeVar("B", bound="Batch")


class Batch:
    """A dataclass whose tensors, and mappings of tensors, have one row per window."""

    def take(self: B, index: Int[Tensor, "m"] | slice) -> B:
        """The rows at `index`, in that order."""
        return self._mapped(lambda x: x[index])

    def to(self: B, device: torch.device | str) -> B:
        """The same rows with all tensors on the device."""
        return self._mapped(lambda x: sent(x, device))

    @classmethod
    def cat(cls: type[B], parts: Sequence[B]) -> B:
        """The rows of all parts, which must have the same columns, one after another."""
        names = [column.name for column in fields(parts[0])]  # ty: ignore[invalid-argument-type]
        return cls(**{name: _cat([getattr(part, name) for part in parts]) for name in names})

    def state_dict(self) -> State:
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls: type[B], state: State) -> B:
        return cls(**state)

    def _mapped(self: B, change: Callable[[Tensor], Tensor]) -> B:
        return type(self)(**{name: _map(value, change) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Windows(Batch):
    """A batch of text: the only one, wherever it comes from and wherever it goes.

    Attributes:
        tokens: token ids.
        ids: stable 63-bit ids; equal windows of one source have equal ids in every run.
        source: index into the run's source names.
        difficulty: difficulty label of each window (higher is harder), NaN where a window has none;
            None when no source has labels.
        labels: the tokens, −100 where one is not learnt; None where all are.
        document: 63-bit identity of the document that each window begins in; None where each is its own.
    """

    tokens: Int[Tensor, "n T"]
    ids: Int[Tensor, "n"]
    source: Int[Tensor, "n"]
    difficulty: Float[Tensor, "n"] | None = None
    labels: Int[Tensor, "n T"] | None = None
    document: Int[Tensor, "n"] | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str) -> "Windows":
        """The same windows with tokens and labels on the device; what describes them stays on the CPU."""
        labels = None if self.labels is None else sent(self.labels, device)
        return replace(self, tokens=sent(self.tokens, device), labels=labels)

    @classmethod
    def cat(cls, parts: Sequence["Windows"]) -> "Windows":
        """The windows of all parts, one after another; some may have labels and others none."""
        if len({part.labels is None for part in parts}) > 1:
            parts = [part if part.labels is not None else replace(part, labels=part.tokens) for part in parts]
        return super().cat(parts)

    @property
    def learnt(self) -> Bool[Tensor, "n T"] | None:
        """Which tokens are learnt; None where all are."""
        return None if self.labels is None else self.labels != IGNORED

    def state_dict(self) -> State:
        labels = None if self.labels is None else self.labels.to("cpu", torch.int32)
        return dict(vars(self)) | {"tokens": self.tokens.to("cpu", torch.int32), "labels": labels}

    @classmethod
    def from_state_dict(cls, state: State) -> "Windows":
        columns = state | {"tokens": state["tokens"].long()}
        if columns["labels"] is not None:
            columns["labels"] = columns["labels"].long()
        return cls(**columns)


@dataclass(frozen=True, kw_only=True)
class WindowLosses:
    """The loss of each of some windows, and their mean.

    Attributes:
        ids: of the windows, in their order.
        losses: mean over the learnt tokens of each, nats per token; 0 where none is learnt.
        tokens: learnt tokens of each.
        mean: over all learnt tokens, nats per token; 0 where no token is learnt.
    """

    ids: Int[Tensor, "n"]
    losses: Float[Tensor, "n"]
    tokens: Int[Tensor, "n"]
    mean: float


@dataclass(frozen=True)
class Cost:
    """What a part of a step took besides training on its windows. Costs are added up, never looked up.

    Attributes:
        windows_read: windows read from the stream.
        forwards: forward passes of one window through the language model; a backward pass counts as two.
        extra_flops: other operations of a language model.
    """

    windows_read: int = 0
    forwards: int = 0
    extra_flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __mul__(self, times: int) -> "Cost":
        return Cost(*(getattr(self, f.name) * times for f in fields(Cost)))


NO_COST = Cost()


@dataclass(frozen=True, kw_only=True)
class Queries:
    """What Langevin-RAG searched for in one step, and what it found.

    Attributes:
        text: the K queries, decoded.
        q: Q_φ of the hard query tokens, nats per token.
        soft_q: Q_φ of the relaxed strings that they were taken from; NaN where nothing is relaxed.
        start_q: Q_φ of the tokens that the search began with.
        changed: share of the tokens that the search changed.
        row: position in the offer of the window that the query drew; −1 when it drew none.
        score: its inner product with the query's embedding; NaN when there is none.
        window_text: its text; empty when there is none.
        shortlist: ids of the k windows nearest to the query, nearest first, that one was drawn from; −1 where
            there were fewer.
        shortlist_scores: inner products of these with its embedding; −∞ where there is none.
    """

    text: tuple[str, ...]
    q: Float[Tensor, "K"]
    soft_q: Float[Tensor, "K"]
    start_q: Float[Tensor, "K"]
    changed: Float[Tensor, "K"]
    row: Int[Tensor, "K"]
    score: Float[Tensor, "K"]
    window_text: tuple[str, ...]
    shortlist: Int[Tensor, "K k"]
    shortlist_scores: Float[Tensor, "K k"]


@dataclass(frozen=True, kw_only=True)
class Sampled(Batch):
    """How a stream filter came to the windows of an offer.

    Attributes:
        accept_prob: probability of being accepted, for each window.
    """

    accept_prob: Float[Tensor, "n"]


@dataclass(frozen=True, kw_only=True)
class Offer:
    """C_k: the windows that a proposer hands over, and what is known of them before the forward pass.

    Attributes:
        windows: the windows.
        rows: position of each window in the step's proposal. A shard or a narrowed offer keeps the positions
            of the full one, which is how the log joins them again.
        known: what can be said of each window without a forward pass, by name: `static_score`, how
            target-like it is, and `prior`, the probability in [0, 1] with which π₀ accepts it.
        sampled: how a stream filter sampled them; None where none did.
        rejected: the windows that a stream filter read and rejected; None where there is no filter.
        ingested: source of each window that a buffer took from the stream for this step; None without a
            buffer, where the windows judged are those that were read.
        queries: what they were retrieved with; None where nothing was searched.
        cost: what it took to propose them.
        epoch: times that the most often repeated source has run out; None where there is no stream.
        metrics: what the proposer measured.
        version: of the policy that proposed them: how often it had been updated.
    """

    windows: Windows
    rows: Int[Tensor, "n"]
    known: Mapping[str, Float[Tensor, "n"]] = field(default_factory=dict)
    sampled: Sampled | None = None
    rejected: "Offer | None" = None
    ingested: Int[Tensor, "r"] | None = None
    queries: Queries | None = None
    cost: Cost = NO_COST
    epoch: int | None = None
    metrics: Metrics = field(default_factory=dict)
    version: int = 0

    @staticmethod
    def of(windows: Windows, **attributes: Any) -> "Offer":
        """An offer of all these windows, in their order."""
        return Offer(windows=windows, rows=torch.arange(len(windows)), **attributes)

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def judged(self) -> list["Offer"]:
        """The windows that the policy chose among: those proposed and, behind a filter, those rejected."""
        return [self] if self.rejected is None else [self, self.rejected]

    @property
    def sources_read(self) -> Int[Tensor, "r"]:
        """Source of each window that was read from the stream for the step."""
        if self.ingested is not None:
            return self.ingested
        return torch.cat([part.windows.source for part in self.judged])

    def take(self, index: Int[Tensor, "m"] | slice) -> "Offer":
        """The windows at `index`, in that order; what describes the offer as a whole stays."""
        return replace(
            self,
            windows=self.windows.take(index),
            rows=self.rows[index],
            known={name: column[index] for name, column in self.known.items()},
            sampled=None if self.sampled is None else self.sampled.take(index),
        )

    def to(self, device: torch.device | str) -> "Offer":
        """The same offer with its tokens on the device."""
        return replace(self, windows=self.windows.to(device))

    @staticmethod
    def cat(parts: Sequence["Offer"]) -> "Offer":
        """Windows of several readings as one offer, their positions counted from 0 and their costs added."""
        sampled = [part.sampled for part in parts if part.sampled is not None]
        return Offer.of(
            Windows.cat([part.windows for part in parts]),
            known=_cat([part.known for part in parts]),
            sampled=Sampled.cat(sampled) if len(sampled) == len(parts) else None,
            cost=sum((part.cost for part in parts), NO_COST),
            epoch=parts[-1].epoch,
        )

    def state_dict(self) -> State:
        """Windows, what is known of them, how they were sampled, and what was rejected."""
        return {
            "windows": self.windows.state_dict(),
            "known": dict(self.known),
            "sampled": None if self.sampled is None else self.sampled.state_dict(),
            "rejected": None if self.rejected is None else self.rejected.state_dict(),
            "epoch": self.epoch,
        }

    @staticmethod
    def from_state_dict(state: State) -> "Offer":
        windows = Windows.from_state_dict(state["windows"])
        sampled = state["sampled"] and Sampled(accept_prob=state["sampled"]["accept_prob"])
        rejected = None if state["rejected"] is None else Offer.from_state_dict(state["rejected"])
        return Offer.of(
            windows, known=state["known"], sampled=sampled, rejected=rejected, epoch=state["epoch"]
        )


@dataclass(frozen=True, kw_only=True)
class Features(Batch):
    """H_k: what the critic and the selectors may see of windows; everything is detached from θ.

    Attributes:
        hidden: last layer, last token of each window (Eq. 2), float32.
        loss: mean next-token loss of each window, nats per token.
        entropy: mean predictive entropy of each window, nats per token; None unless a selector
            declares that it needs it, because it costs a pass over the logits.
        pooled: last layer, mean over the tokens of each window, float32; None where it was not measured.
        source: index into the run's source names; None where it is not known.
        known: as in `Offer`.
    """

    hidden: Float[Tensor, "n d"]
    loss: Float[Tensor, "n"]
    entropy: Float[Tensor, "n"] | None = None
    pooled: Float[Tensor, "n d"] | None = None
    source: Int[Tensor, "n"] | None = None
    known: Mapping[str, Float[Tensor, "n"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.loss.shape[0]

    @staticmethod
    def not_forwarded(
        n: int, source: Int[Tensor, "n"] | None, known: Mapping[str, Float[Tensor, "n"]]
    ) -> "Features":
        """Features of n windows without a forward pass: no hidden state [n, 0], and no loss (NaN)."""
        loss = torch.full((n,), torch.nan)
        return Features(hidden=torch.zeros(n, 0), loss=loss, source=source, known=dict(known))

    @staticmethod
    def before_forward(offer: Offer) -> "Features":
        """What is known of windows without a forward pass."""
        return Features.not_forwarded(len(offer), offer.windows.source, offer.known)


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What a step on one window alone would do to held-out text, for some or all windows of a step.

    First order in the learning rate: e_i = α ∇ℓ_i · P ∇ℓ_D, with the optimizer's preconditioner P and the
    held-out gradient ∇ℓ_D. Positive is good: the held-out log-probability rises by e_i.

    Attributes:
        rows: which windows, ascending: indices into the trained windows of the step followed by those that a
            filter rejected.
        effect: e_i of these, nats per token.
        mixture: Σ w_i e_i, the effect of the step that was taken; estimated from the probed windows that were
            trained on, their weights normalised, where only a part was probed.
        features: what the critic sees of the probed windows.
    """

    rows: Int[Tensor, "m"]
    effect: Float[Tensor, "m"]
    mixture: float
    features: Features


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What one pass over the candidates yields besides the gradient.

    Attributes:
        features: H_k of all candidates, in their order, gathered over ranks.
        scores: log-weights s.
        weights: π = softmax(s), float32, summing to one.
        loss: Σ π_i ℓ_i, nats per token.
    """

    features: Features
    scores: Float[Tensor, "n"]
    weights: Float[Tensor, "n"]
    loss: float


@dataclass(frozen=True, kw_only=True)
class Step(Mixture):
    """One step of the loop: what was offered, what the model made of it, and what came of it.

    The TD update of the next step, the selectors, the meter and the log all read this record.

    Attributes:
        index: k.
        offer: C_k, all N windows.
        trained: the windows that the selector admitted; features, scores and weights are of these.
        q: Q_φ of each trained window at φ_k, before Q has learnt from this step; None without a critic.
        action: a_k, index of a trained window, drawn from the Boltzmann policy over q; None without a critic.
        effects: measured effects of single windows at θ_k, where they were probed.
        reward: r_k, nats per token; None where it was not measured.
        cost: what the step took besides training.
        metrics: for the log.
    """

    index: int
    offer: Offer
    trained: Offer
    q: Float[Tensor, "n"] | None = None
    action: int | None = None
    effects: Effects | None = None
    reward: float | None = None
    cost: Cost = NO_COST
    metrics: Metrics = field(default_factory=dict)

    @property
    def policy(self) -> Float[Tensor, "n"]:
        """softmax(s) in float64 on the CPU: what a step draws from, where it trains on fewer than all."""
        return torch.softmax(self.scores.cpu().double(), 0)

    def state_dict(self) -> State:
        """What the TD update of the next step reads; the offer and the metrics are in the log."""
        names = ("index", "scores", "weights", "loss", "q", "action", "reward")
        return {name: getattr(self, name) for name in names} | {
            "trained": replace(self.trained, rejected=None).state_dict(),
            "features": self.features.state_dict(),
            "effects": None
            if self.effects is None
            else vars(self.effects) | {"features": self.effects.features.state_dict()},
        }

    @staticmethod
    def from_state_dict(state: State, device: torch.device | str) -> "Step":
        trained = Offer.from_state_dict(state["trained"]).to(device)
        moved = {name: _map(value, lambda x: x.to(device)) for name, value in state.items()}
        effects = moved["effects"]
        moved |= {"offer": trained, "trained": trained, "features": Features(**moved["features"])}
        if effects is not None:
            moved["effects"] = Effects(**effects | {"features": Features(**effects["features"])})
        return Step(**moved)


@dataclass(frozen=True)
class Score:
    """One measure of one task.

    Attributes:
        task: the harness's name of the task or group.
        measure: the harness's name of the measure, such as `acc_norm`.
        value: the score; not finite where a model is too bad for it (a perplexity that overflows).
        stderr: its standard error; None where the harness gives none.
        chance_level: what guessing scores; None for anything but the accuracy of a task with choices.
        examples: how many were scored.
    """

    task: str
    measure: str
    value: float
    stderr: float | None
    chance_level: float | None
    examples: int


@dataclass(frozen=True)
class Reading:
    """A number that a part of a run shows while the run goes on.

    Attributes:
        label: a word or two.
        metric: of the log; what a row lacks keeps its last value.
        form: of the value, for `str.format`.
        value: what is shown of the metric.
        per: another metric, where both are totals: the reading is the growth of the first per growth of this
            one over the last steps.
    """

    label: str
    metric: str
    form: str = "{:.3f}"
    value: Callable[[float], float] = float
    per: str = ""


def readings_of(part: object) -> tuple[Reading, ...]:
    """What a proposer, a selector or a retriever shows of itself, its attribute `readings`; none without it.

    A part shows what can change in its kind of run and nothing that is constant by construction."""
    return getattr(part, "readings", ())


def status_of(part: object) -> str:
    """The state that a part says it is in, its method `status`; empty without one."""
    status: Callable[[], str] | None = getattr(part, "status", None)
    return "" if status is None else status()


@runtime_checkable
class WindowSource(Stateful, Protocol):
    """Where windows are read from, one after another."""

    def read(self, n: int) -> Offer:
        """The next windows: at least one, at most n; none at the end of a stream that ends."""
        ...


@runtime_checkable
class Proposer(Stateful, Protocol):
    """Offers the candidate windows of a step (NEXTBATCH of Algorithm 1, or Langevin-RAG)."""

    def propose(self, step: int) -> Offer: ...


@runtime_checkable
class Meanwhile(Protocol):
    """What is done while the device computes the passes of a step, as `lm.beside.Beside`."""

    def __call__(self) -> None: ...

    measured: float
    proposed: float
    waited: float


@runtime_checkable
class Selector(Stateful, Protocol):
    """Turns an offer into mixture log-weights; the method and every baseline are selectors.

    Attributes:
        needs_entropy: whether `Features.entropy` must be filled in.
        needs_reward: whether `Step.reward` must be measured.
    """

    needs_entropy: bool
    needs_reward: bool

    def admit(self, step: int, offer: Offer) -> Offer:
        """The windows worth a forward pass; the others get weight zero and cost nothing."""
        ...

    def score(self, step: int, offer: Offer, features: Features) -> Float[Tensor, "n"]:
        """Unnormalised log-weights of one micro-batch. Must not depend on the rest of the batch,
        because in the single-pass step the rest has not been seen yet."""
        ...

    def observe(self, step: Step) -> Metrics:
        """Learn from the finished step; the metrics go into the log."""
        ...


@runtime_checkable
class Critic(Stateful, Protocol):
    """Q_φ and its learning rule. `NoCritic` is the real implementation for methods without one.

    Attributes:
        needs_reward: whether the loop must measure r_k.
        before_forward: (may lack) whether it judges windows before the forward pass alone; it learns then.
        reads_theta: (may lack) whether it reads more of θ than the features; else it learns during θ's step.
    """

    needs_reward: bool

    def values(self, features: Features) -> Float[Tensor, "n"] | None:
        """q = Q_φ(h) of each window, detached; None when there is no Q."""
        ...

    def policy(self, q: Float[Tensor, "N"], features: Features) -> Float[Tensor, "N"]:
        """π ∝ π₀ exp(q/β), Eq. 6, of candidates with these features."""
        ...

    def learn(self, previous: Step | None, features: Features) -> tuple[Metrics, Cost]:
        """TD update for the previous step, bootstrapped on H_k; no update without one."""
        ...


def merge(*parts: Mapping[str, float]) -> Metrics:
    """One dictionary of all metrics; a name that occurs twice is a bug and raises KeyError."""
    merged: Metrics = {}
    for part in parts:
        for name, value in part.items():
            if name in merged:
                raise KeyError(f"metric {name!r} is reported twice")
            merged[name] = value
    return merged
