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

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from curriq import parallel
from curriq.config import RunConfig, require
from curriq.data.stream import Unreadable
from curriq.errors import CurriqError
from curriq.lm.held_out import (
    REDUCED_RELATIVE_STEP,
    RELATIVE_STEP,
    AveragedGradient,
    first_order_effects,
    probed_rows,
    weighted_mean,
)
from curriq.lm.learner import preconditioned
from curriq.presets import preset as preset_config
from curriq.rng import Generators
from curriq.select.base import NoCritic
from curriq.select.soft_q import SoftQ
from curriq.select.stream_filter import DsirScore, StreamEnded, build_filter, filtered, uniform_step
from curriq.softq.critic import TDCritic
from curriq.softq.equations import sample_action
from curriq.softq.features import QInputs
from curriq.softq.temperature import build_temperature, effective_batch_fraction
from curriq.state import Saved, State
from curriq.types import IGNORED, Cost, Critic, Effects, Features, Metrics, Offer, Step, Windows, merge

Example = Mapping[str, Any]
"""One training example: `input_ids`, and where they differ from these `labels`, −100 where a token is not
learnt; `source`, a name, where there are several; and whatever else the collator wants."""
Batch = Mapping[str, Any]
LossFunction = Callable[[nn.Module, Any], Float[Tensor, "n"]]

MOST_OUTSTANDING = 64
"""Batches that may have been taken and not yet been observed; more means that `observe` is not called."""


@runtime_checkable
class AcceptPolicy(Protocol):
    """A stream filter of one's own: the acceptance probability of each window, before the forward pass.

    `offer.known["dsir_score"]` is how target-like each example is, in standard deviations, and
    `offer.windows.source` the index of its source. An object that has `observe(step)` as well gets the
    measured effects; one that has `state_dict` and `load_state_dict` is saved with the curriculum.
    """

    def accept_prob(self, offer: Offer) -> Float[Tensor, "n"]: ...


def example_losses(model: nn.Module, batch: Batch) -> Float[Tensor, "n"]:
    """Mean next-token loss of each example over its learnt tokens, nats per token; 0 where it has none.

    Args:
        model: anything whose `forward` takes `input_ids` and gives `logits`.
        batch: `input_ids`, `labels`, and `attention_mask` or `position_ids` where there are any.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    logits, targets = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return loss.view(targets.shape).sum(1) / (targets != IGNORED).sum(1).clamp(min=1)


def pad_examples(examples: Sequence[Example], pad_id: int = 0) -> dict[str, Tensor]:
    """`input_ids`, `labels` (−100 in the padding) and `attention_mask` [n, T] of examples of any length."""
    length = max(len(example["input_ids"]) for example in examples)

    def filled(values: Any, value: int) -> Int[Tensor, "T"]:
        row = torch.as_tensor(values)
        return F.pad(row, (0, length - len(row)), value=value)

    return {
        "input_ids": torch.stack([filled(e["input_ids"], pad_id) for e in examples]),
        "labels": torch.stack([filled(_labels(e), IGNORED) for e in examples]),
        "attention_mask": torch.stack([filled(torch.ones(len(e["input_ids"])).long(), 0) for e in examples]),
    }


def as_windows(examples: Sequence[Example]) -> Windows:
    """Examples of any length as one batch; padding is not learnt."""
    batch, n = pad_examples(examples), len(examples)
    source = torch.zeros(n, dtype=torch.int64)
    tokens, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    return Windows(tokens=tokens, ids=torch.arange(n), source=source, labels=labels)


def _labels(example: Example) -> Any:
    labels = example.get("labels")
    return example["input_ids"] if labels is None else labels


class Curriculum:
    """A learned curriculum for a training loop of one's own.

    Either `select` filters a stream of examples before the forward pass (preset `recommended`, the default),
    or `weigh` gives the examples of each batch their weights in the loss (`weighted`, or the paper's rule,
    `paper`). `observe` follows each optimizer step. Every few steps it measures, on examples of the target,
    what single examples do to the model; it leaves weights, gradients, modes and random numbers as they were.

    Args:
        target: examples of the text or the task that the model is to get better at; they are measured, never
            trained on. A few dozen will do.
        sources: names that an example's `source` may have.
        batch_size: examples per optimizer step, over all micro-batches of gradient accumulation.
        per_example_loss: mean loss of each example of a batch under the model, nats per token.
        collate: examples → batch; tensors in it are moved to the model's device.
        preset: where the settings come from.
        policy: a stream filter of one's own, in place of the learned one.
        micro_batch: examples per forward pass when something is measured.
        seed: of every draw.
        settings: settings of `curriq train` by name, such as `reward_every=4` (steps between measurements),
            `reward_windows=16` (target examples per measurement) or `max_read_ratio=4`.

    Raises:
        CurriqError: the target is empty, or a setting is refused.
    """

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
        micro_batch: int = 8,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.target = list(target)
        require(bool(self.target), "target is empty: give examples of what the model is to get better at.")
        settings = {"reward_windows": min(8, len(self.target)), **settings}
        base = preset_config(preset).override(num_candidates=batch_size, seed=seed, train_subset_size=0)
        self.config = base.override(**settings)
        self.sources = tuple(sources)
        self.batch_size = batch_size
        self.step = 0
        self._generators = Generators(seed)
        self._measure = Measurement(
            self.config, per_example_loss, collate, micro_batch, self.target, self._generators("reward")
        )
        self._filter: _Filter | None = None
        self._weights: _Weights | None = None
        if self.config.train.max_read_ratio > 1:
            self._filter = _Filter(self.config, self.target, self.sources, policy, self._generators)
        else:
            require(
                policy is None, f"preset {preset!r} weighs: a policy of your own needs max_read_ratio > 1."
            )
            self._weights = _Weights(self.config, self.sources, self._generators)

    @property
    def num_read(self) -> int:
        """Examples read from the streams so far."""
        return 0 if self._filter is None else self._filter.reader.total

    def select(self, stream: Iterable[Example], *, skip: int | None = None) -> Iterator[Example]:
        """The examples of the stream that are worth training on, in its order, as long as it has any.

        Examples that were taken before a checkpoint and not trained on come first after a resume. Call it in
        the process that trains: with a `DataLoader` that means `num_workers=0`.

        Args:
            stream: examples; each names its `source` where there are several.
            skip: examples to pass over at its beginning; by default, after `load_state_dict`, those that were
                read before. Give 0 where the stream resumes by itself.

        Raises:
            CurriqError: an example names an unknown source; the batch size does not fit the calls of
                `observe`; this curriculum weighs; or a worker process calls it.
        """
        if self._filter is None:
            raise CurriqError("this curriculum weighs examples: call weigh, or use preset='recommended'.")
        if torch.utils.data.get_worker_info() is not None:
            raise CurriqError(
                "select runs in a worker of a DataLoader, where it cannot learn: use num_workers=0, and put "
                "what is slow (reading, tokenising) into a DataLoader of its own below select."
            )
        require(parallel.world_size() == 1, "a Curriculum trains in one process; use one per run.")
        return self._filter.examples(stream, skip)

    def weigh(
        self,
        losses: Float[Tensor, "n"],
        hidden: Float[Tensor, "n d"],
        *,
        source: Int[Tensor, "n"] | None = None,
        examples: Sequence[Example] | None = None,
    ) -> Float[Tensor, "n"]:
        """The policy over the examples of a batch, π = softmax(Q/β) (Eq. 6); detached, sums to one.

        Train on `(weights * losses).sum()`, take the optimizer's step, and call `observe`. Q then learns from
        the step before, bootstrapped on this batch (Algorithm 1, lines 4–8).

        Args:
            losses: of each example, nats per token.
            hidden: what Q sees of each example: the last layer's hidden state at its last token (the paper),
                or a mean over its tokens.
            source: index of each example's source.
            examples: the batch, where credit is measured (`credit="counterfactual"`).

        Raises:
            CurriqError: this curriculum filters a stream, or needs `examples`.
        """
        if self._weights is None:
            raise CurriqError("this curriculum filters a stream: call select, or use preset='weighted'.")
        counterfactual = self.config.critic.credit == "counterfactual"
        if counterfactual and examples is None:
            raise CurriqError("credit by measured effects needs the batch: weigh(…, examples=batch).")
        features = Features(
            hidden=hidden.detach().float(),
            pooled=hidden.detach().float(),
            loss=losses.detach().float(),
            source=torch.zeros(len(losses), dtype=torch.int64) if source is None else source,
        )
        return self._weights(self.step, features, list(examples or ()))

    def observe(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Metrics:
        """Learn from the optimizer step that has just been taken.

        Returns:
            What was measured, by the metric names of `curriq train`; empty between measurements.

        Raises:
            CurriqError: `observe` is called more often than batches are taken.
        """
        metrics = self._part.finish(self.step, self._measure, model, optimizer)
        self.step += 1
        return metrics | self._part.begin(self.step, self._measure, model, optimizer)

    @property
    def _part(self) -> "_Filter | _Weights":
        return self._filter or self._weights  # ty: ignore[invalid-return-type]

    def state_dict(self) -> State:
        """Everything that a bitwise resume needs, examples included that were taken and not trained on."""
        return {
            "step": self.step,
            "measure": self._measure.state_dict(),
            "policy": self._part.state_dict(),
            "generators": self._generators.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        self.step = state["step"]
        self._measure.load_state_dict(state["measure"])
        self._part.load_state_dict(state["policy"])
        self._generators.load_state_dict(state["generators"])


class Measurement(Saved):
    """Rewards, and effects of single examples, under the model of a loop of the user's own.

    Args:
        config: M, how often, what is measured, and how held-out gradients are averaged.
        per_example_loss, collate, micro_batch: as in `Curriculum`.
        target: D.
        generator: draws D̂_k.
    """

    SAVED = ("_average", "_drawn", "_loss_before")

    def __init__(
        self,
        config: RunConfig,
        per_example_loss: LossFunction,
        collate: Callable[[list[Example]], Any],
        micro_batch: int,
        target: list[Example],
        generator: torch.Generator,
    ) -> None:
        self.config = config
        self._loss = per_example_loss
        self._collate = collate
        self._micro_batch = micro_batch
        self._target = target
        self._generator = generator
        self._average = AveragedGradient(config.critic.probe_decay)
        self._drawn: list[int] | None = None
        self._loss_before: float | None = None

    def due(self, step: int) -> bool:
        """Whether a step has a reward."""
        return step % self.config.train.reward_every == 0

    def begin(self, step: int, model: nn.Module) -> None:
        """Draw D̂_k, and measure its loss at θ_k where the reward is a gain."""
        self._drawn = self._loss_before = None
        if self.due(step):
            order = torch.randperm(len(self._target), generator=self._generator)
            self._drawn = order[: self.config.train.reward_windows].tolist()
            if self.config.train.reward == "paired":
                self._loss_before = self._held_out_loss(model)

    def reward(self, step: int, model: nn.Module) -> float | None:
        """r_k at θ_{k+1}, nats per token; None where the step has none."""
        if self._drawn is None:
            return None
        loss = self._held_out_loss(model)
        return -loss if self._loss_before is None else self._loss_before - loss

    def effects(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, examples: list[Example]
    ) -> Float[Tensor, "m"] | None:
        """Effects of single examples on D̂_k, nats per token; None before the first step of an optimizer that
        has a preconditioner."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        low = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in parameters)
        with _measuring(model):
            gradient = self._average.update(self._gradient(model, parameters))
            direction = preconditioned(getattr(optimizer, "optimizer", optimizer), parameters, gradient)
            if direction is None:
                return None
            return first_order_effects(
                self._losses(model, examples),
                lambda: self._losses(model, examples),
                parameters,
                direction,
                rate=max(float(group["lr"]) for group in optimizer.param_groups),
                relative_step=REDUCED_RELATIVE_STEP if low else RELATIVE_STEP,
            ).cpu()

    def _batches(self, model: nn.Module, examples: list[Example]) -> Iterator[Any]:
        device = next(model.parameters()).device
        for start in range(0, len(examples), self._micro_batch):
            batch = self._collate(examples[start : start + self._micro_batch])
            yield {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _losses(self, model: nn.Module, examples: list[Example]) -> Float[Tensor, "m"]:
        with torch.no_grad():
            return torch.cat([self._loss(model, batch).float() for batch in self._batches(model, examples)])

    def _held_out_loss(self, model: nn.Module) -> float:
        assert self._drawn is not None
        with _measuring(model):
            return self._losses(model, [self._target[i] for i in self._drawn]).double().mean().item()

    def _gradient(self, model: nn.Module, parameters: list[nn.Parameter]) -> list[Tensor]:
        """∇ℓ_D by a backward pass, as a wrapped model needs it; gradients on θ stay as they were."""
        assert self._drawn is not None
        kept = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        with torch.enable_grad():
            for batch in self._batches(model, [self._target[i] for i in self._drawn]):
                (self._loss(model, batch).float().sum() / len(self._drawn)).backward()
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad
        return gradient


@contextmanager
def _measuring(model: nn.Module) -> Generator[None]:
    """Evaluation mode, because a measurement must not be noise; then every submodule's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Reader(Saved):
    """The user's stream as a source of windows; the examples themselves wait by their number."""

    SAVED = ("examples", "total", "in_stream", "_score")

    def __init__(self, sources: Sequence[str], score: DsirScore) -> None:
        self._sources = list(sources)
        self._score = score
        self._iterator: Iterator[Example] = iter(())
        self.examples: dict[int, Example] = {}
        self.total = 0
        self.in_stream = 0

    def open(self, stream: Iterable[Example], skip: int) -> None:
        self._iterator = iter(stream)
        self.in_stream = sum(1 for _ in islice(self._iterator, skip))

    def read(self, n: int) -> Offer:
        examples = list(islice(self._iterator, n))
        numbers = torch.arange(self.total, self.total + len(examples))
        self.total += len(examples)
        self.in_stream += len(examples)
        self.examples.update(zip(numbers.tolist(), examples, strict=True))
        source = torch.tensor([self._source(example) for example in examples], dtype=torch.int64)
        windows = Windows(tokens=numbers[:, None], ids=numbers, source=source)
        known = {"dsir_score": self._score(as_windows(examples))} if examples else {}
        return Offer.of(windows, known=known, cost=Cost(windows_read=len(examples)))

    def of(self, offer: Offer) -> list[Example]:
        return [self.examples[number] for number in offer.windows.ids.tolist()]

    def forget(self, offer: Offer) -> None:
        for number in offer.windows.ids.tolist():
            del self.examples[number]

    def _source(self, example: Example) -> int:
        name = example.get("source", self._sources[0])
        if name not in self._sources:
            raise CurriqError(
                f"an example has the source {name!r}: give Curriculum(sources={(*self._sources, name)!r})."
            )
        return self._sources.index(name)


class _Filter:
    """`Curriculum.select`: the stream filter of `curriq train` over a stream of examples."""

    def __init__(
        self,
        config: RunConfig,
        target: list[Example],
        sources: Sequence[str],
        policy: AcceptPolicy | None,
        generators: Generators,
    ) -> None:
        score = DsirScore(as_windows(target))
        self.reader = _Reader(sources, score)
        self._critic: Critic = NoCritic()
        if policy is None:
            policy, self._critic = build_filter(config, len(sources), generators, target=score.of_target)
        self._policy: Any = policy
        self._learns = hasattr(policy, "observe")
        self._proposer = filtered(Unreadable(self.reader), config, policy.accept_prob, generators)
        self._probe_windows = config.critic.probe_windows
        self._generator = generators("probe")
        self._batches: deque[Offer] = deque()  # taken or drawn, and not yet trained on
        self._first = 0  # step of the first of them
        self._taken = 0  # batches handed out
        self._step: Step | None = None
        self._skip = 0

    def examples(self, stream: Iterable[Example], skip: int | None) -> Iterator[Example]:
        self.reader.open(stream, self._skip if skip is None else skip)
        self._skip, self._taken = 0, self._first
        while (offer := self._batch(self._taken)) is not None:
            self._taken += 1
            yield from self.reader.of(offer)

    def _batch(self, step: int) -> Offer | None:
        """The examples of a step, drawn when they are first asked for; None at the end of the stream."""
        while len(self._batches) <= step - self._first:
            if len(self._batches) > MOST_OUTSTANDING:
                raise CurriqError(
                    f"{len(self._batches)} batches were taken and not observed: call observe after every "
                    f"optimizer step, with batch_size={self._proposer.n} examples per step."
                )
            try:
                offer = self._proposer.propose(self._first + len(self._batches))
            except StreamEnded:
                return None
            assert offer.rejected is not None
            self.reader.forget(offer.rejected)
            if len(offer):
                self._batches.append(replace(offer, rejected=None))
        return self._batches[step - self._first]

    def finish(
        self, step: int, measure: Measurement, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Metrics:
        """The end of a step: its reward, and what the policy learns from it."""
        if step >= self._taken or not self._batches:
            raise CurriqError(
                f"observe is called for step {step}, but only {self._taken} batches were taken from select: "
                "batch_size must be the examples per optimizer step."
            )
        self.reader.forget(self._batches.popleft())
        self._first += 1
        if self._step is None:
            return {}
        reward = measure.reward(step, model)
        self._step = replace(self._step, reward=reward)
        return merge({} if reward is None else {"reward": reward}, self._policy.observe(self._step))

    def begin(
        self, step: int, measure: Measurement, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Metrics:
        """The beginning of the next step: measure its examples, then let Q learn from the step before."""
        previous, self._step = self._step, None
        due = self._learns and measure.due(step)
        if not (due or previous) or (offer := self._batch(step)) is None:
            return {}
        features = Features.before_forward(offer)
        if due:
            measure.begin(step, model)
            rows = probed_rows(offer, self._probe_windows, self._generator)
            effect = measure.effects(model, optimizer, self.reader.of(offer.take(rows)))
            self._step = uniform_step(step, offer, features, rows, effect)
        return self._critic.learn(previous, features)[0]

    def state_dict(self) -> State:
        return {
            "proposer": self._proposer.state_dict(),
            "policy": self._policy.state_dict() if hasattr(self._policy, "state_dict") else {},
            "critic": self._critic.state_dict(),
            "batches": [offer.state_dict() for offer in self._batches],
            "first": self._first,
            "step": None if self._step is None else self._step.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        self._proposer.load_state_dict(state["proposer"])
        if hasattr(self._policy, "load_state_dict"):
            self._policy.load_state_dict(state["policy"])
        self._critic.load_state_dict(state["critic"])
        self._batches = deque(map(Offer.from_state_dict, state["batches"]))
        self._first = self._taken = state["first"]
        self._step = None if state["step"] is None else Step.from_state_dict(state["step"], "cpu")
        self._skip = self.reader.in_stream


class _Weights:
    """`Curriculum.weigh`: the paper's policy over the examples of each batch."""

    def __init__(self, config: RunConfig, sources: Sequence[str], generators: Generators) -> None:
        self._config = config
        self._sources = len(sources)
        self._generators = generators
        fraction = config.critic.effective_batch_fraction
        self._temperature = build_temperature(config.critic, fraction, share=effective_batch_fraction)
        self._critic: TDCritic | None = None
        self._step: Step | None = None
        self._previous: Step | None = None
        self._examples: list[Example] = []

    def _build(self, width: int) -> TDCritic:
        """Q, once the width of what it sees is known."""
        settings = self._config.critic
        inputs = QInputs(settings.q_features, width, self._sources, layer_norm=settings.q_layer_norm)
        self._critic = TDCritic(settings, inputs, self._temperature, "cpu", self._generators)
        self._selector = SoftQ(self._critic, self._temperature, settings.uniform_share)
        return self._critic

    def __call__(self, step: int, features: Features, examples: list[Example]) -> Float[Tensor, "n"]:
        features, device, n = features.to("cpu"), features.loss.device, len(features)
        assert features.source is not None
        critic = self._critic or self._build(features.hidden.shape[1])
        q = critic.values(features)
        offer = Offer.of(
            Windows(tokens=torch.arange(n)[:, None], ids=torch.arange(n), source=features.source)
        )
        scores = self._selector.score(step, offer, features)
        weights = torch.softmax(scores.double(), 0).to(features.loss.dtype)
        critic.learn(self._previous, features)
        policy = critic.policy(q)
        self._examples = examples
        self._step = Step(
            index=step,
            offer=offer,
            trained=offer,
            features=features,
            scores=scores,
            weights=weights,
            loss=(weights * features.loss).sum().item(),
            q=q,
            policy=policy,
            action=sample_action(policy, self._generators("action")),
        )
        return weights.to(device)

    def finish(
        self, step: int, measure: Measurement, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Metrics:
        """The end of a step: its reward, its effects, and what the temperature learns from them."""
        if self._step is None:
            raise CurriqError(f"observe is called for step {step} without weigh before it.")
        done, self._step = self._step, None
        reward = measure.reward(step, model)
        if self._examples and reward is not None:
            rows = torch.arange(len(self._examples))
            effect = measure.effects(model, optimizer, self._examples)
            if effect is not None:
                mixture = weighted_mean(effect, done.weights)
                done = replace(done, effects=Effects(rows=rows, effect=effect, mixture=mixture))
        done = replace(done, reward=reward)
        self._previous = None if reward is None else done
        return merge({} if reward is None else {"reward": reward}, self._selector.observe(done))

    def begin(
        self, step: int, measure: Measurement, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Metrics:
        measure.begin(step, model)
        return {}

    def state_dict(self) -> State:
        critic = self._critic
        return {
            "width": None if critic is None else critic.inputs.hidden,
            "critic": None if critic is None else critic.state_dict(),
            "selector": None if critic is None else self._selector.state_dict(),
            "previous": None if self._previous is None else self._previous.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        if state["width"] is not None:
            self._build(state["width"]).load_state_dict(state["critic"])
            self._selector.load_state_dict(state["selector"])
        self._previous = None if state["previous"] is None else Step.from_state_dict(state["previous"], "cpu")
