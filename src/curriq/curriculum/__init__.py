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

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from curriq import parallel
from curriq.config import CriticConfig, RunConfig, refuse_unknown, require
from curriq.curriculum.parts import MOST_OUTSTANDING as MOST_OUTSTANDING
from curriq.curriculum.parts import AcceptPolicy, Filter, Weights
from curriq.curriculum.stream import Selected, Stream, iterated, named_sources, source_index
from curriq.data.documents import short_hash
from curriq.errors import CurriqError
from curriq.lm.examples import (
    Example,
    LossFunction,
    as_windows,
    checked,
    example_losses,
    learnt_tokens,
    pad_examples,
)
from curriq.lm.user_model import UserModel
from curriq.presets import preset as preset_config
from curriq.rng import Generators
from curriq.state import Saved, State
from curriq.types import Features, Metrics

LOOP_ONLY = {"q_weighting", "dirichlet_concentration", "td_into_theta", "td_lambda", "shuffle_effects"}
SETTINGS = {setting.name for setting in fields(CriticConfig)} - LOOP_ONLY
SETTINGS |= {"prior", "static_rule", "static_share", "static_quantile", "static_sharpness"}
SETTINGS |= {"max_read_ratio", "micro_batch", "reward", "reward_every", "reward_windows"}
"""Settings of `curriq train` that a Curriculum has as well."""

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


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
        sources: names that an example's `source` may have. With one, examples need not name it.
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
        CurriqError: the target is empty, one of its examples has nothing to learn, or a setting is refused.
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
        examples = _target(target)
        self.sources = named_sources(sources)
        self.config = _settings(preset, batch_size, len(examples), seed, settings)
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
            policy is None or callable(getattr(policy, "accept_prob", None)),
            f"policy is a {type(policy).__name__}: it must have a method accept_prob(offer).",
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
        self._part = Filter(*parts, policy) if filters else Weights(*parts)
        self._learns = isinstance(self._part, Weights) or self._part.learns
        self._made_for = {
            "sources": list(self.sources),
            "batch_size": batch_size,
            "filters": filters,
            "policy": "" if policy is None else type(policy).__name__,
            "target": _fingerprint(examples),
            "target_labels": _fingerprint(examples, learnt=True),
            "settings": _structure(self.config),
        }

    @property
    def num_read(self) -> int:
        """Examples read from the streams so far, those that were left out included."""
        if not isinstance(self._part, Filter):
            return 0
        return self._part.reader.total + self._part.reader.untaught

    @property
    def num_passes(self) -> int:
        """Streams that were selected from to their end, and all of it observed."""
        return self._part.passes if isinstance(self._part, Filter) else 0

    def select(self, stream: Stream, *, skip: int | None = None) -> "Selected":
        """The examples of the stream that are worth training on, in its order, as long as it has any.

        Examples that were taken before a checkpoint and not trained on come first after a resume. Call it in
        the process that trains: with a `DataLoader` that means `num_workers=0`.

        Args:
            stream: examples; each names its `source` where there are several. Or a function that opens them
                from their beginning: it is called again at their end, so that the examples never end. The
                filter reads ahead: another stream's examples come behind those that were read of the last.
            skip: examples to pass over at its beginning; by default, after `load_state_dict`, those that were
                read before. Give 0 where the stream resumes by itself.

        Raises:
            CurriqError: an example has no row of token ids, or names no source or an unknown one; the stream
                is empty, or shorter than what was read of it; the batch size does not fit the calls of
                `observe`; this curriculum weighs; or a worker process calls it.
        """
        if not isinstance(self._part, Filter):
            raise CurriqError("this curriculum weighs examples: call weigh, or use preset='recommended'.")
        return Selected(self._part.examples(stream, skip))

    def weigh(
        self,
        losses: Float[Tensor, "n"],
        hidden: Float[Tensor, "n d"],
        *,
        source: Int[Tensor, "n"] | Sequence[int] | None = None,
        examples: Sequence[Example] | None = None,
    ) -> Float[Tensor, "n"]:
        """The policy over the examples of a step, π = softmax(Q/β) (Eq. 6); detached, sums to one.

        Train on `(weights * losses).sum()`, take the optimizer's step, and call `observe`. Q then learns from
        the step before, bootstrapped on this batch (Algorithm 1, lines 13–26).

        Args:
            losses: of each example, nats per token.
            hidden: what Q sees of each example: the last layer's hidden state at its last token (the paper),
                or a mean over its tokens.
            source: index of each example's source, where there are several and no `examples` that name it.
            examples: the batch, where credit is measured (`credit="counterfactual"`).

        Raises:
            CurriqError: this curriculum filters a stream, needs `examples`, or was not observed since; what
                it is given is not of one length; or a loss or a hidden state is not finite.
        """
        if not isinstance(self._part, Weights):
            raise CurriqError("this curriculum filters a stream: call select, or use preset='weighted'.")
        require(
            examples is not None or self.config.critic.credit != "counterfactual",
            "credit by measured effects needs the batch: weigh(…, examples=batch).",
        )
        seen, loss = hidden.detach().float().cpu(), losses.detach().float().cpu()
        n = len(loss) if loss.ndim == 1 else 0
        require(
            n > 0 and seen.ndim == 2 and len(seen) == n and (examples is None or len(examples) == n),
            f"weigh has losses of shape {list(loss.shape)}, hidden of shape {list(seen.shape)}"
            f"{'' if examples is None else f' and {len(examples)} examples'}: it needs a loss [n] and a row "
            "[n, d] for each example.",
        )
        features = Features(hidden=seen, pooled=seen, loss=loss, source=self._sources_of(n, source, examples))
        with _finite(self.step), torch.inference_mode(False), torch.enable_grad():
            for what, given in {"loss": loss, "hidden state": seen}.items():
                if not given.isfinite().all():
                    raise FloatingPointError(f"a {what} is not finite")
            return self._part.weigh(self.step, features, list(examples or ())).to(losses.device)

    def _sources_of(
        self, n: int, source: Int[Tensor, "n"] | Sequence[int] | None, examples: Sequence[Example] | None
    ) -> Int[Tensor, "n"]:
        if source is None and (len(self.sources) == 1 or "source" not in self.config.critic.q_features):
            return torch.zeros(n, dtype=torch.int64)
        if source is None:
            require(
                examples is not None,
                f"there are {len(self.sources)} sources: weigh(…, source=…), the index of each example's, or "
                "weigh(…, examples=batch) with examples that name theirs.",
            )
            source = [source_index(example, self.sources) for example in examples or ()]
        given = torch.as_tensor(source).long().cpu()
        require(
            given.shape == (n,) and bool(((given >= 0) & (given < len(self.sources))).all()),
            f"source = {given.tolist()}: it needs {n} numbers from 0 to {len(self.sources) - 1}.",
        )
        return given

    def observe(self, model: nn.Module | None = None, optimizer: Optimizers | None = None) -> Metrics:
        """Learn from the optimizer step that has just been taken.

        Call it outside of `torch.autocast`, as the optimizer's step is.

        Args:
            model: θ; may be left out, with the optimizer, where a policy of one's own does not learn.
            optimizer: of θ; a list where several train parts of it.

        Returns:
            What was measured, by the metric names of `curriq train`; empty between measurements.

        Raises:
            CurriqError: `observe` is called more often than batches are taken, in several processes, or
                without a model; the optimizer is another model's; or what it measures is not finite.
        """
        require(parallel.world_size() == 1, "a Curriculum learns in one process: train without torchrun.")
        require(
            not self._learns or (model is not None and optimizer is not None),
            "the policy learns from measured effects: call observe(model, optimizer).",
        )
        if model is not None and optimizer is not None:
            several = isinstance(optimizer, Sequence)
            self._model.show(model, optimizer if several else [optimizer])
        self._model.autocast = self.reduced_precision
        with _finite(self.step), torch.inference_mode(False), torch.enable_grad():
            metrics = self._part.finish(self.step)
            self.step += 1
            return metrics | self._part.begin(self.step)

    def load_state_dict(self, state: State) -> None:
        """Go on where the state was taken.

        Raises:
            CurriqError: it is not the state of a curriculum that was made with the same arguments.
        """
        require(
            isinstance(state, dict) and "made_for" in state,
            "this is not the state of a Curriculum: give what its state_dict returned.",
        )
        saved, own = dict(state["made_for"]), dict(self._made_for)
        before, now = _differences(saved, own)
        require(
            not before,
            f"the state was saved with {before}, this curriculum has {now}: make it with the same arguments.",
        )
        super().load_state_dict(state)
        self._made_for = own  # an earlier version saved less of it


def _target(target: Iterable[Example]) -> list[Example]:
    """The examples of the target, each with something to learn."""
    given = enumerate(iterated(target, "the target"))
    examples: list[Example] = [checked(example, f"example {i} of the target") for i, example in given]
    require(bool(examples), "target is empty: give examples of what the model is to get better at.")
    for i, example in enumerate(examples):
        require(
            learnt_tokens(example) > 0,
            f"example {i} of the target has no token to learn among its {len(example['input_ids'])} (the "
            "first has no loss, nor has one with the label −100): leave it out.",
        )
    return examples


def _settings(preset: str, batch_size: int, target: int, seed: int, settings: dict[str, Any]) -> RunConfig:
    """The settings of a curriculum over so many examples of the target; an error names its arguments."""
    require(
        isinstance(batch_size, int) and batch_size > 0,
        f"batch_size={batch_size!r}: it must be a whole number of examples, at least 1.",
    )
    refuse_unknown(settings, sorted(SETTINGS), kind="setting of a Curriculum")
    windows = settings.get("reward_windows", min(8, target))
    require(
        not isinstance(windows, int) or windows <= target,
        f"reward_windows={windows!r}, but the target has {target} examples: give at most as many.",
    )
    sizes = {"num_candidates": batch_size, "reward_set_size": target, "train_subset_size": 0}
    try:
        return preset_config(preset).override(**sizes, seed=seed, **{"reward_windows": windows} | settings)
    except CurriqError as error:
        raise CurriqError(*map(_as_arguments, error.faults)) from None


def _as_arguments(message: str) -> str:
    """An error of the command line in the words of a Curriculum."""
    named = re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), message)
    return named.replace("num_candidates", "batch_size")


def _structure(config: RunConfig) -> dict[str, str]:
    """The settings without which a state cannot be gone on from."""
    chosen = asdict(config.critic) | {"prior": config.select.prior, "static_rule": config.select.static_rule}
    chosen |= {"reward": config.train.reward, "max_read_ratio": config.train.max_read_ratio}
    return {name: repr(value) for name, value in chosen.items()}


def _fingerprint(examples: Sequence[Example], *, learnt: bool = False) -> str:
    """A short hash of the tokens of the target, or of those that have a loss."""
    rows = [as_windows([e]).labels if learnt else torch.as_tensor(e["input_ids"]) for e in examples]
    return short_hash(*(str(row.tolist()) for row in rows if row is not None))


def _differences(saved: dict[str, Any], own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What differs of two descriptions, in each; what an earlier version did not save does not."""
    flat = [
        {name: value for name, value in part.items() if name != "settings"} | part.get("settings", {})
        for part in (saved, own)
    ]
    names = [name for name in flat[0] if name in flat[1] and flat[0][name] != flat[1][name]]
    return {name: flat[0][name] for name in names}, {name: flat[1][name] for name in names}


@contextmanager
def _finite(step: int) -> Generator[None]:
    """A number that is not finite becomes an error for the user."""
    try:
        yield
    except ArithmeticError as error:
        raise CurriqError(
            f"step {step}: {error}. Go on from the last checkpoint with a smaller learning rate."
        ) from error
