"""The data that flows through a run, and the protocols at its seams.

Shape legend, used in every signature of the package:

| letter | meaning |
|---|---|
| N | candidate windows of one step, over all processes |
| n | windows of one micro-batch or of one process's shard |
| T | tokens per window |
| d | width of the features that the Q-network sees |
| V | vocabulary |
| M | windows of one reward subset |
| R | windows retrieved in one step of Langevin-RAG |
| K, L | its queries, and their tokens |

All losses are in nats per token. Sums are divided once, by the token count.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Metrics = dict[str, float]
"""Metric name to value; every name is documented in `docs/metrics.md`."""

State = dict[str, Any]
"""Plain containers, numbers, strings and tensors only, so that `torch.load(weights_only=True)` reads it."""


@dataclass(frozen=True, kw_only=True)
class Queries:
    """What Langevin-RAG went looking for in one step, and what it found.

    Attributes:
        text: the K queries, decoded.
        q: Q_φ of the hard query tokens, nats per token.
        soft_q: Q_φ of the relaxed strings that they were taken from; NaN where nothing is relaxed.
        start_q: Q_φ of the tokens that the search began with.
        changed: share of the tokens that the search changed.
        row: position in the proposal of the window that the query drew; −1 when it drew none.
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
class Candidates:
    """C_k: the windows offered to the model in one step.

    Attributes:
        tokens: token ids.
        window_ids: stable 63-bit ids; equal windows of one source have equal ids in every run.
        source: index into the run's source names.
        difficulty: difficulty label of each window (higher is harder), NaN where a window has none;
            None when no source has labels.
        rows: position of each window in the proposal of the step. A shard or a narrowed set keeps
            the positions of the full proposal, which is how the log joins them again.
        metrics: what the proposer measured (phase seconds, epoch, …).
        flops: operations of the language model that proposing them took.
        queries: what they were retrieved with; None when nobody searched.
        dsir_score: how like the target's n-grams each is, in standard deviations; None where nobody has asked.
        unfiltered: which were taken as they came, a fair sample, in a proposal that has others too; None
            where no proposal is selective.
        accept_prob: probability of being taken, for each, by the policy that steers the stream; None where none does.
        rejected: the windows that were read and not taken; None where none are.
    """

    tokens: Int[Tensor, "n T"]
    window_ids: Int[Tensor, "n"]
    source: Int[Tensor, "n"]
    difficulty: Float[Tensor, "n"] | None = None
    rows: Int[Tensor, "n"]
    metrics: Metrics = field(default_factory=dict)
    flops: int = 0
    queries: Queries | None = None
    dsir_score: Float[Tensor, "n"] | None = None
    unfiltered: Bool[Tensor, "n"] | None = None
    accept_prob: Float[Tensor, "n"] | None = None
    rejected: "Candidates | None" = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, index: Int[Tensor, "m"] | slice) -> "Candidates":
        """The windows at `index`, in that order."""
        columns = {name: getattr(self, name) for name in BY_WINDOW}
        return replace(self, **{name: x[index] for name, x in columns.items() if x is not None})

    def to(self, device: torch.device | str) -> "Candidates":
        """The same windows with their tokens on `device`; the labels stay on the CPU."""
        return replace(self, tokens=self.tokens.to(device, non_blocking=True))


BY_WINDOW = (
    "tokens",
    "window_ids",
    "source",
    "difficulty",
    "rows",
    "dsir_score",
    "unfiltered",
    "accept_prob",
)
"""Attributes of `Candidates` with one entry per window."""


def concatenate(parts: Sequence[Candidates]) -> Candidates:
    """Windows of several readings as one proposal, numbered anew, with the metrics of the last."""
    rows = torch.arange(sum(map(len, parts)))
    return replace(parts[-1], **(_joined(parts, BY_WINDOW) | {"rows": rows}))


def _joined(parts: Sequence[Any], names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors of all parts, one after another; those that the parts do not have are left out."""
    values = {name: [getattr(part, name) for part in parts] for name in names}
    return {name: torch.cat(pieces) for name, pieces in values.items() if pieces[0] is not None}


@dataclass(frozen=True, kw_only=True)
class Features:
    """H_k and what the forward pass yields beside it; everything is detached from θ.

    Attributes:
        hidden: last layer, last token of each window (Eq. 2), float32.
        pooled: last layer, mean over the tokens of each window, float32; None where nobody has pooled.
        loss: mean next-token loss of each window, nats per token.
        source: index into the run's source names, as in `Candidates`; None where it is not known.
        dsir_score: as in `Candidates`.
        entropy: mean predictive entropy of each window, nats per token; None unless a selector
            declares that it needs it, because it costs a pass over the logits.
    """

    hidden: Float[Tensor, "n d"]
    loss: Float[Tensor, "n"]
    entropy: Float[Tensor, "n"] | None = None
    pooled: Float[Tensor, "n d"] | None = None
    source: Int[Tensor, "n"] | None = None
    dsir_score: Float[Tensor, "n"] | None = None

    def __len__(self) -> int:
        return self.loss.shape[0]

    def take(self, index: Int[Tensor, "m"] | slice) -> "Features":
        """The windows at `index`, in that order."""
        return _map(self, lambda x: x[index])

    def to(self, device: torch.device | str) -> "Features":
        """The same, with all tensors on the device."""
        return _map(self, lambda x: x.to(device))

    def state_dict(self) -> State:
        return dict(vars(self))

    @staticmethod
    def from_state_dict(state: State, device: torch.device | str) -> "Features":
        return Features(**state).to(device)


def join_features(parts: Sequence[Features]) -> Features:
    """Features of several sets of windows, one after another; each part must have the same ones."""
    return replace(parts[0], **_joined(parts, vars(parts[0])))


def _map(features: Features, change: Callable[[Tensor], Tensor]) -> Features:
    """The same change to every tensor that is there."""
    return replace(features, **{name: change(x) for name, x in vars(features).items() if x is not None})


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What a step on one window alone would do to held-out text, for some or all windows of a step.

    First order in the learning rate: e_i = α ∇ℓ_i · P ∇ℓ_D, with AdamW's preconditioner P and the held-out
    gradient ∇ℓ_D. Positive is good: the held-out log-probability rises by e_i.

    Attributes:
        rows: indices into the trained windows of the step, ascending.
        effect: e_i of these, nats per token.
        mixture: Σ w_i e_i, the effect of the step that was taken; with a part of the windows it is
            estimated from these, their weights normalised.
    """

    rows: Int[Tensor, "m"]
    effect: Float[Tensor, "m"]
    mixture: float

    def state_dict(self) -> State:
        return dict(vars(self))

    @staticmethod
    def from_state_dict(state: State, device: torch.device | str) -> "Effects":
        return Effects(
            rows=state["rows"].to(device), effect=state["effect"].to(device), mixture=state["mixture"]
        )


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
class Transition:
    """What the TD update of the next step needs to know of this one (all N windows, gathered).

    Attributes:
        tokens: all candidates; TD-into-θ forwards the sampled one again.
        features: H_k at θ_k.
        policy: π_k, the Boltzmann policy over q_k; a_k was drawn from it.
        weights: what the mixture was trained with: π_k, or uniform (Eqs. 9–10, Q warm-up).
        action: index of the sampled candidate a_k.
        reward: r_k, nats per token.
        effects: measured effects of single windows at θ_k, where they were probed.
    """

    tokens: Int[Tensor, "N T"]
    features: Features
    policy: Float[Tensor, "N"]
    weights: Float[Tensor, "N"]
    action: int
    reward: float
    effects: Effects | None = None

    def state_dict(self) -> State:
        return {
            "tokens": self.tokens.cpu(),
            "features": self.features.state_dict(),
            "policy": self.policy,
            "weights": self.weights,
            "action": self.action,
            "reward": self.reward,
            "effects": None if self.effects is None else self.effects.state_dict(),
        }

    @staticmethod
    def from_state_dict(state: State, device: torch.device | str) -> "Transition":
        return Transition(
            tokens=state["tokens"].to(device),
            features=Features.from_state_dict(state["features"], device),
            policy=state["policy"].to(device),
            weights=state["weights"].to(device),
            action=state["action"],
            reward=state["reward"],
            effects=None if state["effects"] is None else Effects.from_state_dict(state["effects"], device),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished step, as selectors that learn from experience (a bandit) see it.

    Attributes:
        candidates: the windows that were trained on.
        features: measured at θ_k.
        weights: mixture weight of each of them; they sum to one.
        reward: r_k, or None when nobody asked for a reward.
        q: Q_φ of each of them at φ_k, before Q has learnt from this step; None without a critic.
        effects: measured effects of single windows, where they were probed.
    """

    candidates: Candidates
    features: Features
    weights: Float[Tensor, "n"]
    reward: float | None
    q: Float[Tensor, "n"] | None = None
    effects: Effects | None = None


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


class Stateful(Protocol):
    """Anything whose state a checkpoint must hold for a bitwise resume."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


@runtime_checkable
class Proposer(Stateful, Protocol):
    """Offers the candidate windows of a step (NEXTBATCH of Algorithm 1, or Langevin-RAG)."""

    def propose(self, step: int) -> Candidates: ...


@runtime_checkable
class Selector(Stateful, Protocol):
    """Turns candidates into mixture log-weights; the method and every baseline are selectors.

    Attributes:
        needs_entropy: whether `Features.entropy` must be filled in.
        needs_reward: whether `Outcome.reward` must be measured.
    """

    needs_entropy: bool
    needs_reward: bool

    def narrow(self, step: int, candidates: Candidates) -> Candidates:
        """The windows worth a forward pass; the others get weight zero and cost nothing."""
        ...

    def scores(self, step: int, candidates: Candidates, features: Features) -> Float[Tensor, "n"]:
        """Unnormalised log-weights of one micro-batch. Must not depend on the rest of the batch,
        because in the single-pass step the rest has not been seen yet."""
        ...

    def observe(self, step: int, outcome: Outcome) -> Metrics:
        """Learn from the finished step; the metrics go into the log."""
        ...


@runtime_checkable
class Critic(Stateful, Protocol):
    """Q_φ and its learning rule. `NoCritic` is the real implementation for methods without one.

    Attributes:
        needs_reward: whether the loop must measure r_k.
    """

    needs_reward: bool

    def values(self, features: Features) -> Float[Tensor, "n"] | None:
        """q = Q_φ(h) of each window, detached; None when there is no Q."""
        ...

    def policy(self, q: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """π = softmax(q/β), Eq. 6."""
        ...

    def learn(self, previous: Transition | None, features: Features) -> Metrics:
        """TD update for the previous transition, bootstrapped on H_k; no update without one."""
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
