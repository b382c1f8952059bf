"""The policy in any training loop: it selects or weighs examples, and learns from what they do to the model.

    curriculum = curriq.Curriculum(target=clean_examples, sources=("web", "forum"), batch_size=16)
    for batch in DataLoader(curriculum.select(stream), batch_size=16, collate_fn=curriq.pad_examples):
        loss = curriq.example_losses(model, batch).mean()
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        curriculum.observe(model, optimizer)

It is made of the parts that `curriq train` is made of: the stream filter, the critic, the temperature and the
measured effects. What differs is who calls them: here the loop is the user's, examples may have any length,
and the model is any `nn.Module`, called through its `forward`.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import islice
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from curriq import parallel
from curriq.config import CriticConfig, RunConfig, refuse_unknown, require
from curriq.data.stream import Unreadable
from curriq.errors import CurriqError, StreamEnded
from curriq.lm.held_out import build_probe, build_reward
from curriq.lm.user_model import (
    Example,
    LossFunction,
    UserModel,
    as_windows,
    example_losses,
    numbered,
    pad_examples,
)
from curriq.presets import preset as preset_config
from curriq.rng import Generators
from curriq.select.base import NoCritic
from curriq.select.rules import RULES
from curriq.select.soft_q import SoftQ, build_weighting
from curriq.select.static import LOOK_AHEAD, DsirScore, ScoredStream
from curriq.select.stream_filter import build_filter, filtered
from curriq.softq.critic import TDCritic
from curriq.softq.equations import sample_action
from curriq.state import Saved, State
from curriq.types import NO_COST, Cost, Critic, Features, Metrics, Offer, Step, Windows, merge

Stream = Iterable[Example] | Callable[[], Iterable[Example]]

MOST_OUTSTANDING = 64
"""Batches that may have been taken and not yet been observed; more means that `observe` is not called."""
LOOP_ONLY = {"q_weighting", "dirichlet_concentration", "td_into_theta", "td_lambda", "shuffle_effects"}
SETTINGS = {setting.name for setting in fields(CriticConfig)} - LOOP_ONLY
SETTINGS |= {"prior", "static_rule", "static_share", "static_quantile", "static_sharpness"}
SETTINGS |= {"max_read_ratio", "micro_batch", "reward", "reward_every", "reward_windows"}
"""Settings of `curriq train` that a Curriculum has as well."""


@runtime_checkable
class AcceptPolicy(Protocol):
    """A stream filter of one's own: the acceptance probability of each window, before the forward pass.

    `offer.known["static_score"]` is how target-like each example is, in standard deviations,
    `offer.known["prior"]` the probability with which a static filter accepts it, and `offer.windows.source`
    the index of its source. An object that has `observe(step)` as well gets the measured effects and may
    return metrics; one that has `state_dict` and `load_state_dict` is saved with the curriculum.
    """

    def accept_prob(self, offer: Offer) -> Float[Tensor, "n"]: ...


class Curriculum(Saved):
    """A learned curriculum for a training loop of one's own.

    Either `select` filters a stream of examples before the forward pass (preset `recommended`, the default),
    or `weigh` gives the examples of each batch their weights in the loss (`weighted`, or the paper's rule,
    `paper`). `observe` follows each optimizer step. Every few steps it measures, on examples of the target,
    what single examples do to the model; it leaves weights, gradients, modes and random numbers as they were.

    Its `state_dict` has everything that a bitwise resume needs, examples included that were taken and not
    trained on. Take it after `observe`.

    Args:
        target: examples of the text or the task that the model is to get better at; they are measured, never
            trained on. A few dozen will do.
        sources: names that an example's `source` may have.
        batch_size: examples per optimizer step, over all micro-batches of gradient accumulation.
        per_example_loss: mean loss of each example of a batch under the model, nats per token.
        collate: examples → batch; tensors in it are moved to the model's device.
        preset: where the settings come from.
        policy: a stream filter of one's own, in place of the learned one.
        reduced_precision: forward passes run in bfloat16 or float16 although the weights are in float32, as
            under autocast.
        seed: of every draw.
        settings: settings of `curriq train` by name, such as `reward_every=4` (steps between measurements),
            `reward_windows=16` (target examples per measurement), `micro_batch=4` (examples per forward pass
            of a measurement) or `max_read_ratio=4`.

    Raises:
        CurriqError: the target is empty, or a setting is refused.
    """

    SAVED = ("step", "_made_for", "_model", "_part", "_generators")

    def __init__(
        self,
        target: Iterable[Example],
        *,
        sources: Sequence[str] = ("all",),
        batch_size: int = 32,
        per_example_loss: LossFunction = example_losses,
        collate: Callable[[list[Example]], Any] = pad_examples,
        preset: str = "recommended",
        policy: AcceptPolicy | None = None,
        reduced_precision: bool = False,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        examples = list(target)
        require(bool(examples), "target is empty: give examples of what the model is to get better at.")
        refuse_unknown(settings, sorted(SETTINGS), kind="setting of a Curriculum")
        sizes = {"num_candidates": batch_size, "reward_set_size": len(examples), "train_subset_size": 0}
        settings = {"reward_windows": min(8, len(examples))} | settings
        self.config = preset_config(preset).override(**sizes, seed=seed, **settings)
        self.sources = tuple(sources)
        self.batch_size = batch_size
        self.step = 0
        self._generators = Generators(seed)
        self.reduced_precision = reduced_precision
        self._model = UserModel(
            target=examples,
            loss=per_example_loss,
            collate=collate,
            micro_batch=self.config.optim.windows_at_once,
        )
        parts = (self.config, self.sources, self._generators, self._model)
        filters = self.config.train.max_read_ratio > 1
        require(
            filters or policy is None,
            f"preset {preset!r} weighs: a policy of your own needs max_read_ratio > 1.",
        )
        require(
            self.config.method == "soft-q"
            and self.config.langevin.proposer == "stream"
            and (
                filters or not (self.config.select.prior or "static_score" in self.config.critic.q_features)
            ),
            f"preset {preset!r} with these settings needs the loop of `curriq train`: use 'recommended', "
            "'weighted' or 'paper'.",
        )
        self._part = _Filter(*parts, policy) if filters else _Weights(*parts)
        self._made_for = {"sources": list(sources), "batch_size": batch_size, "filters": filters}

    @property
    def num_read(self) -> int:
        """Examples read from the streams so far."""
        return self._part.reader.total if isinstance(self._part, _Filter) else 0

    @property
    def num_passes(self) -> int:
        """Streams that were selected from to their end, and all of it observed."""
        return self._part.passes if isinstance(self._part, _Filter) else 0

    def select(self, stream: Stream, *, skip: int | None = None) -> "Selected":
        """The examples of the stream that are worth training on, in its order, as long as it has any.

        Examples that were taken before a checkpoint and not trained on come first after a resume. Call it in
        the process that trains: with a `DataLoader` that means `num_workers=0`.

        Args:
            stream: examples; each names its `source` where there are several. Or a function that opens them
                from their beginning: it is called again at their end, so that the examples never end.
            skip: examples to pass over at its beginning; by default, after `load_state_dict`, those that were
                read before. Give 0 where the stream resumes by itself.

        Raises:
            CurriqError: an example names an unknown source; the batch size does not fit the calls of
                `observe`; this curriculum weighs; or a worker process calls it.
        """
        if not isinstance(self._part, _Filter):
            raise CurriqError("this curriculum weighs examples: call weigh, or use preset='recommended'.")
        return Selected(self._part.examples(stream, skip))

    def weigh(
        self,
        losses: Float[Tensor, "n"],
        hidden: Float[Tensor, "n d"],
        *,
        source: Int[Tensor, "n"] | None = None,
        examples: Sequence[Example] | None = None,
    ) -> Float[Tensor, "n"]:
        """The policy over the examples of a step, π = softmax(Q/β) (Eq. 6); detached, sums to one.

        Train on `(weights * losses).sum()`, take the optimizer's step, and call `observe`. Q then learns from
        the step before, bootstrapped on this batch (Algorithm 1, lines 13–26).

        Args:
            losses: of each example, nats per token.
            hidden: what Q sees of each example: the last layer's hidden state at its last token (the paper),
                or a mean over its tokens.
            source: index of each example's source.
            examples: the batch, where credit is measured (`credit="counterfactual"`).

        Raises:
            CurriqError: this curriculum filters a stream, needs `examples`, or was not observed since; or a
                loss is not finite.
        """
        if not isinstance(self._part, _Weights):
            raise CurriqError("this curriculum filters a stream: call select, or use preset='weighted'.")
        require(
            examples is not None or self.config.critic.credit != "counterfactual",
            "credit by measured effects needs the batch: weigh(…, examples=batch).",
        )
        seen, loss = hidden.detach().float().cpu(), losses.detach().float().cpu()
        source = torch.zeros(len(loss), dtype=torch.int64) if source is None else source.cpu()
        features = Features(hidden=seen, pooled=seen, loss=loss, source=source)
        with _finite(self.step):
            return self._part.weigh(self.step, features, list(examples or ())).to(losses.device)

    def observe(
        self, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> Metrics:
        """Learn from the optimizer step that has just been taken.

        Args:
            model: θ; may be left out, with the optimizer, where a policy of one's own does not learn.
            optimizer: of θ.

        Returns:
            What was measured, by the metric names of `curriq train`; empty between measurements.

        Raises:
            CurriqError: `observe` is called more often than batches are taken, or in several processes; or
                what it measures is not finite.
        """
        require(parallel.world_size() == 1, "a Curriculum learns in one process: train without torchrun.")
        self._model.model, self._model.optimizer = model, optimizer
        self._model.autocast = self.reduced_precision
        with _finite(self.step):
            metrics = self._part.finish(self.step)
            self.step += 1
            return metrics | self._part.begin(self.step)

    def load_state_dict(self, state: State) -> None:
        """Go on where the state was taken.

        Raises:
            CurriqError: it is the state of a curriculum with other sources, or another batch size.
        """
        require(
            state["made_for"] == self._made_for,
            f"the state was saved with {state['made_for']}, this curriculum has {self._made_for}: make it "
            "with the same arguments.",
        )
        super().load_state_dict(state)


@contextmanager
def _finite(step: int) -> Generator[None]:
    """A number that is not finite becomes an error for the user."""
    try:
        yield
    except ArithmeticError as error:
        raise CurriqError(
            f"step {step}: {error}. Go on from the last checkpoint with a smaller learning rate."
        ) from error


class Selected(IterableDataset):
    """What `select` hands out, once: an iterator that a `DataLoader` takes."""

    def __init__(self, examples: Iterator[Example]) -> None:
        self._examples = examples

    def __iter__(self) -> Iterator[Example]:
        return self._examples

    def __next__(self) -> Example:
        return next(self._examples)


class _Part(Saved):
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
        reward = self._reward
        return super().state_dict() | {
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


class _Reader(Saved):
    """The user's stream as a source of windows."""

    SAVED = ("total", "in_stream")

    def __init__(self, sources: Sequence[str], model: UserModel) -> None:
        self._sources = list(sources)
        self._model = model
        self._iterator: Iterator[Example] = iter(())
        self._opens: Callable[[], Iterable[Example]] | None = None
        self._skip = 0
        self.total = 0
        self.in_stream = 0

    def open(self, stream: Stream, skip: int | None) -> None:
        """Begin a stream behind what was read before; one that a function opens goes on where it is."""
        if isinstance(stream, Iterable):
            self._opens, self._iterator = None, iter(stream)
        elif stream == self._opens:
            return
        else:
            self._opens, self._iterator = stream, iter(stream())
        self.in_stream = sum(1 for _ in islice(self._iterator, self._skip if skip is None else skip))
        self._skip = 0

    def read(self, n: int) -> Offer:
        examples = self._next(n)
        if not examples and self._opens is not None:
            self._iterator, self.in_stream = iter(self._opens()), 0
            examples = self._next(n)
            require(bool(examples), "the stream is empty: the function that opens it gives no example.")
        numbers = torch.arange(self.total, self.total + len(examples))
        self.total += len(examples)
        self._model.examples.update(zip(numbers.tolist(), examples, strict=True))
        source = torch.tensor([self._source(example) for example in examples], dtype=torch.int64)
        return Offer.of(numbered(numbers, source), cost=Cost(windows_read=len(examples)))

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._opens, self._iterator, self._skip = None, iter(()), self.in_stream

    def _next(self, n: int) -> list[Example]:
        examples: list[Example] = [dict(example) for example in islice(self._iterator, n)]
        self.in_stream += len(examples)
        return examples

    def _source(self, example: Example) -> int:
        name = example.get("source", self._sources[0])
        require(
            name in self._sources,
            f"an example has the source {name!r}: give Curriculum(sources={(*self._sources, name)!r}).",
        )
        return self._sources.index(name)


class _ExampleScore(Saved):
    """The DSIR score of examples, of which the windows have the numbers alone."""

    SAVED = ("_score",)
    cost = NO_COST

    def __init__(self, model: UserModel, score: DsirScore) -> None:
        self._model = model
        self._score = score

    def __call__(self, windows: Windows) -> Float[Tensor, "n"]:
        return self._score(replace(as_windows(self._model.of(windows)), ids=windows.ids))

    def of_target(self) -> Float[Tensor, "D"]:
        return self._score.of_target()


class _Filter(_Part):
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
        self.reader = reader = _Reader(sources, model)
        target = as_windows(model.target)
        rule = RULES[config.select.static_rule](config.select, target.tokens.shape[1])
        if policy is None and not config.select.prior:
            rule = None
        scored = ScoredStream(reader, _ExampleScore(model, DsirScore(target)), rule, target)
        self._critic: Critic = NoCritic()
        if policy is None:
            policy, self._critic = build_filter(config, len(sources), generators, target=scored.of_target)
        self._policy: Any = policy
        self._saved = policy if hasattr(policy, "load_state_dict") else None
        self._learns = hasattr(policy, "observe")
        self._every = config.train.reward_every
        stream = Unreadable(scored, look_ahead=LOOK_AHEAD)
        self._proposer = filtered(stream, config, policy.accept_prob, generators)
        self._batches: deque[Offer] = deque()  # taken or drawn, and not yet trained on
        self._first = 0  # step of the first of them
        self._taken = 0  # batches handed out
        self._ended = False  # whether all of the stream has been handed out
        self._passes = 0

    def examples(self, stream: Stream, skip: int | None) -> Iterator[Example]:
        require(
            torch.utils.data.get_worker_info() is None,
            "select runs in a worker of a DataLoader, where it cannot learn: use num_workers=0, and put "
            "what is slow (reading, tokenising) into a DataLoader of its own below select.",
        )
        if not (self._ended and self._batches):  # else the last batches come first, and then the stream's end
            self.reader.open(stream, skip)
            self._ended = False
        self._taken = self._first
        while (offer := self._batch(self._taken)) is not None:
            self._taken += 1
            yield from self._model.of(offer.windows)
        self._passes += not self._ended
        self._ended, self.reader.in_stream = True, 0  # the next call begins the stream again

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
            if not (len(offer) and self._learns and drawn % self._every == 0):  # else they may be probed
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
        if self._step is None:
            return {}
        self._step = self._rewarded(self._step)
        return self._learnt(self._step, self._policy)

    def begin(self, step: int) -> Metrics:
        """The beginning of the next step: measure its examples, then let Q learn from the step before."""
        previous, self._step = self._step, None
        due = self._learns and self._reward.draw(step) is not None
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
        self._batches = deque(map(Offer.from_state_dict, state["batches"]))
        if self._step is not None:  # its windows are those of the next batch, the rejected ones included
            self._step = replace(self._step, offer=self._batches[0], trained=self._batches[0])


class _Weights(_Part):
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
        if state["width"] is not None:
            self._build(state["width"])
        super().load_state_dict(state)
