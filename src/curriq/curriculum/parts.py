"""What a curriculum does in a step: it filters a stream, or weighs the examples of each batch."""

import copy
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from curriq.config import RunConfig, require
from curriq.curriculum.stream import NOTHING_TO_LEARN, ExampleScore, Reader, Stream
from curriq.data.stream import Unreadable
from curriq.errors import CurriqError, StreamEnded
from curriq.lm.examples import Example, as_windows, numbered
from curriq.lm.held_out import build_probe, build_reward
from curriq.lm.user_model import UserModel
from curriq.rng import Generators
from curriq.select.base import NoCritic
from curriq.select.rules import RULES
from curriq.select.soft_q import SoftQ, build_weighting
from curriq.select.static import LOOK_AHEAD, DsirScore, ScoredStream
from curriq.select.stream_filter import build_filter, filtered
from curriq.softq.critic import TDCritic
from curriq.softq.equations import sample_action
from curriq.state import Saved, State
from curriq.types import Critic, Features, Metrics, Offer, Step, Windows, merge

MOST_OUTSTANDING = 64
"""Batches that may have been taken and not yet been observed; more means that `observe` is not called."""


@runtime_checkable
class AcceptPolicy(Protocol):
    """A stream filter of one's own: the acceptance probability of each example, before the forward pass.

    An offer's windows stand for examples: `offer.windows.ids` are their numbers, in the order in which they
    were read, and `offer.windows.source` the index of each one's source. They have no tokens.
    `offer.known["static_score"]` is how target-like each example is, in standard deviations, and
    `offer.known["prior"]` the probability with which a static filter accepts it.

    An object that has `observe(step)` as well gets the measured effects and may return metrics; one that has
    `state_dict` and `load_state_dict` is saved with the curriculum.
    """

    def accept_prob(self, offer: Offer) -> Float[Tensor, "n"]: ...


class Part(Saved):
    """What `select` and `weigh` share: the measurements, and the step that Q is to learn from."""

    SAVED: ClassVar[tuple[str, ...]] = ("_probe", "_step")

    def __init__(self, config: RunConfig, generators: Generators, model: UserModel) -> None:
        self._model = model
        target = numbered(torch.arange(-1, -len(model.target) - 1, -1))
        self._reward = build_reward(config, model, target, generators)
        self._probe = build_probe(config, model, self._reward, generators)
        self._step: Step | None = None

    def _rewarded(self, step: Step) -> Step:
        return replace(step, reward=self._reward.after(step.index)[0])

    def _learnt(self, step: Step, policy: Any) -> Metrics:
        """What was measured in a step, and what the policy learns from it."""
        measured: Metrics = {}
        if step.reward is not None:
            measured = {"reward": step.reward, "held_out/forwards": self._reward.forwards}
        return merge(measured, step.metrics, policy.observe(step) or {})

    def state_dict(self) -> State:
        # `curriq train` saves between steps; here the measurements of the next one have begun.
        reward, state = self._reward, super().state_dict()
        # Modules and optimizers give what they go on to change, and a state may be gone back to.
        state["critic"] = copy.deepcopy(state["critic"])
        return state | {
            "drawn": None if reward.drawn is None else reward.drawn.state_dict(),
            "loss_before": reward.loss_before,
            "forwards": reward.forwards,
        }

    def load_state_dict(self, state: State) -> None:
        own = dict(state)
        reward, drawn = self._reward, own.pop("drawn")
        reward.drawn = None if drawn is None else Windows.from_state_dict(drawn)
        reward.loss_before, reward.forwards = own.pop("loss_before"), own.pop("forwards")
        super().load_state_dict(own)
        self._step = None if own["step"] is None else Step.from_state_dict(own["step"], "cpu")


class Filter(Part):
    """`Curriculum.select`: the stream filter of `curriq train` over a stream of examples."""

    SAVED = ("_probe", "_step", "_proposer", "_saved", "_critic", "_batches", "_first", "_ended", "_passes")

    def __init__(
        self,
        config: RunConfig,
        sources: Sequence[str],
        generators: Generators,
        model: UserModel,
        policy: AcceptPolicy | None,
    ) -> None:
        super().__init__(config, generators, model)
        self.reader = reader = Reader(sources, model)
        target = as_windows(model.target)
        rule = RULES[config.select.static_rule](config.select, target.tokens.shape[1])
        if policy is None and not config.select.prior:
            rule = None
        scored = ScoredStream(reader, ExampleScore(model, DsirScore(target)), rule, target)
        self._critic: Critic = NoCritic()
        if policy is None:
            policy, self._critic = build_filter(config, len(sources), generators, target=scored.of_target)
        self._policy: Any = policy
        self._saved = policy if hasattr(policy, "load_state_dict") else None
        self.learns = hasattr(policy, "observe")
        self._every = config.train.reward_every
        stream = Unreadable(scored, look_ahead=LOOK_AHEAD)
        self._proposer = filtered(stream, config, policy.accept_prob, generators)
        self._batches: deque[Offer] = deque()  # taken or drawn, and not yet trained on
        self._first = 0  # step of the first of them
        self._taken = 0  # batches handed out
        self._lead: int | None = None  # of these, how many the loop takes before it needs them
        self._reading = 0  # times that anything was read anew
        self._ended = False  # whether all of the stream has been handed out
        self._passes = 0

    def examples(self, stream: Stream, skip: int | None) -> Iterator[Example]:
        require(
            torch.utils.data.get_worker_info() is None,
            "select runs in a worker of a DataLoader, where it cannot learn: use num_workers=0, and put "
            "what is slow (reading, tokenising) into a DataLoader of its own below select.",
        )
        if self._ended and self._batches:  # the last batches come first, and then the stream's end
            self._require_observed()
        else:
            self.reader.open(stream, skip)
            self._ended = False
        untaught = self.reader.untaught
        self._reading += 1
        reading, self._taken, self._lead = self._reading, self._first, None
        while (offer := self._batch(self._taken)) is not None:
            self._taken += 1
            for example in self._model.of(offer.windows):
                yield example
                require(
                    reading == self._reading,
                    "this selection is over: select was called again, or a state was loaded. Read on from "
                    "what the latest select returns.",
                )
        left_out = self.reader.untaught - untaught
        some = self._ended or self._taken > self._first or self.reader.in_stream > left_out
        require(some or not left_out, NOTHING_TO_LEARN.format("all examples"))
        require(
            some,
            "the stream gives no example: a generator is used up after one pass. Give select a list, or a "
            "function that opens the stream.",
        )
        self._passes += not self._ended
        self._ended, self.reader.in_stream = True, 0  # the next call begins the stream again

    def _require_observed(self) -> None:
        """The loop that has ended took its batches ahead, and no more of them: others would be trained on
        again and again. One that observed nothing took none ahead."""
        unobserved = self._taken - self._first
        require(
            unobserved <= (self._lead or 0),
            f"{unobserved} of the batches of a pass were not observed at its end: call observe after every "
            f"optimizer step, with batch_size={self._proposer.n} examples per step, and train on the last, "
            "smaller batch as well (drop_last=False).",
        )

    @property
    def passes(self) -> int:
        return self._passes - (self._ended and bool(self._batches))

    def _batch(self, step: int) -> Offer | None:
        """The examples of a step, drawn when they are first asked for; None at the end of the stream."""
        while len(self._batches) <= step - self._first:
            require(
                len(self._batches) <= MOST_OUTSTANDING,
                f"{len(self._batches)} batches were taken and not observed: call observe after every "
                f"optimizer step, with batch_size={self._proposer.n} examples per step.",
            )
            drawn = self._first + len(self._batches)
            try:
                offer = self._proposer.propose(drawn)
            except StreamEnded:
                return None
            if not (len(offer) and self.learns and drawn % self._every == 0):  # else they may be probed
                self._forget(offer.rejected)
                offer = replace(offer, rejected=None)
            if len(offer):
                self._batches.append(offer)
        return self._batches[step - self._first]

    def finish(self, step: int) -> Metrics:
        """The end of a step: its reward, and what the policy learns from it."""
        require(
            step < self._taken and bool(self._batches),
            f"observe is called for step {step}, but only {self._taken} batches were taken from select: "
            "batch_size must be the examples per optimizer step.",
        )
        done = self._batches.popleft()
        self._forget(done)
        self._forget(done.rejected)
        self._first += 1
        if self._lead is None:
            self._lead = self._taken - self._first
        if self._step is None:
            return {}
        self._step = self._rewarded(self._step)
        return self._learnt(self._step, self._policy)

    def begin(self, step: int) -> Metrics:
        """The beginning of the next step: measure its examples, then let Q learn from the step before."""
        previous, self._step = self._step, None
        due = self.learns and self._reward.draw(step) is not None
        if not (due or previous) or (offer := self._batch(step)) is None:
            return {}
        features, n = Features.before_forward(offer), len(offer)
        if due:
            self._step = Step(
                index=step,
                offer=offer,
                trained=offer,
                features=features,
                scores=torch.zeros(n),
                weights=torch.full((n,), 1 / n),
                loss=math.nan,
                effects=self._probe.effects(step, offer, torch.full((n,), 1 / n)),
            )
        return {} if previous is None else self._critic.learn(previous, features)[0]

    def _forget(self, offer: Offer | None) -> None:
        for number in [] if offer is None else offer.windows.ids.tolist():
            del self._model.examples[number]

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._reading += 1
        self._taken = self._first
        self._batches = deque(map(Offer.from_state_dict, state["batches"]))
        if self._step is not None:  # its windows are those of the next batch, the rejected ones included
            self._step = replace(self._step, offer=self._batches[0], trained=self._batches[0])


class Weights(Part):
    """`Curriculum.weigh`: the paper's policy over the examples of each step."""

    SAVED = ("_probe", "_step", "_width", "_critic", "_selector")

    def __init__(
        self, config: RunConfig, sources: Sequence[str], generators: Generators, model: UserModel
    ) -> None:
        super().__init__(config, generators, model)
        self._paired = config.train.reward == "paired"
        self._settings, self._sources, self._generators = config.critic, len(sources), generators
        self._width: int | None = None
        self._critic: TDCritic | None = None
        self._selector: SoftQ | None = None
        self._weighed: Step | None = None

    def _build(self, width: int) -> tuple[TDCritic, SoftQ]:
        """Q and its policy, once the width of what Q sees is known."""
        if self._critic is not None and self._selector is not None:
            return self._critic, self._selector
        self._width = width
        built = build_weighting(self._settings, width, self._sources, self._generators)
        self._selector, self._critic = built
        return self._critic, self._selector

    def weigh(self, step: int, features: Features, examples: Sequence[Example]) -> Float[Tensor, "n"]:
        """Algorithm 1, lines 13–26."""
        require(
            self._weighed is None,
            f"weigh is called twice in step {step}: weigh all examples of a step at once, and call observe "
            "after the optimizer's step.",
        )
        critic, selector = self._build(features.hidden.shape[1])
        offer = Offer.of(numbered(torch.arange(len(features)), features.source))
        q, scores = critic.values(features), selector.score(step, offer, features)
        weights = torch.softmax(scores.double(), 0).to(scores.dtype)
        metrics, _ = critic.learn(self._step, features)
        policy = critic.policy(q, features)
        self._model.examples = dict(enumerate(examples))
        self._weighed = Step(
            index=step,
            offer=offer,
            trained=offer,
            features=features,
            scores=scores,
            weights=weights,
            loss=(weights * features.loss).sum().item(),
            q=q,
            action=sample_action(policy, self._generators("action")),
            metrics=metrics,
        )
        return weights

    def finish(self, step: int) -> Metrics:
        """The end of a step: its reward, its effects, and what the temperature learns from them."""
        if self._weighed is None:
            raise CurriqError(f"observe is called for step {step} without weigh before it.")
        done, self._weighed = self._weighed, None
        if not self._paired:  # the reward needs no loss from before the step
            self._reward.draw(step)
        done = self._rewarded(done)
        if self._model.examples and done.reward is not None:
            effects = self._probe.effects(step, done.offer, done.weights)
            if effects is not None:  # Q reads what the user's forward pass has shown
                effects = replace(effects, features=done.features.take(effects.rows))
            done = replace(done, effects=effects)
        self._step = None if done.reward is None else done
        self._model.examples = {}
        return self._learnt(done, self._selector)

    def begin(self, step: int) -> Metrics:
        if self._paired:
            self._reward.begin(step)
            self._reward.before(step)
        return {}

    def load_state_dict(self, state: State) -> None:
        self._weighed = None
        if state["width"] is None:
            self._width = self._critic = self._selector = None
        else:
            self._build(state["width"])
        super().load_state_dict(state)
