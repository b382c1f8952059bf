"""The model of a user's own training loop, as `lm.held_out` measures it."""

import copy
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from curriq.config import require
from curriq.errors import CurriqError
from curriq.lm.examples import Example, LossFunction, portable, restored
from curriq.lm.learner import gradients_set_aside, preconditioned
from curriq.state import Saved, State
from curriq.types import Windows


@dataclass(kw_only=True, eq=False)
class UserModel(Saved):
    """The user's model and optimizers, as `lm.held_out` measures them; windows stand for examples by number.

    Attributes:
        target: D; its examples have the numbers −1, −2, …
        loss, collate: as in `Curriculum`.
        micro_batch: examples per forward pass.
        autocast: whether passes run in reduced precision.
        examples: those that are yet to be trained on, by number.
    """

    target: list[Example]
    loss: LossFunction
    collate: Callable[[list[Example]], Any]
    micro_batch: int
    autocast: bool = False
    examples: dict[int, Example] = field(default_factory=dict)
    model: nn.Module | None = None
    optimizers: tuple[torch.optim.Optimizer, ...] = ()

    def show(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """What is measured from now on.

        Raises:
            CurriqError: an optimizer trains nothing of the model.
        """
        optimizers = tuple(optimizers)
        if model is self.model and optimizers == self.optimizers:
            return
        own = {id(parameter) for parameter in model.parameters()}
        for optimizer in optimizers:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            require(
                not own.isdisjoint(map(id, trained)),
                f"observe(model, optimizer): the {type(optimizer).__name__} trains no parameter of this "
                f"{type(model).__name__}. Give the model that it was made for, as it is now.",
            )
        self.model, self.optimizers = model, optimizers

    @property
    def lm(self) -> "UserModel":
        return self

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter, _ in self._rates()]

    @property
    def reduced_precision(self) -> bool:
        return self.autocast or any(p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters)

    def of(self, windows: Windows) -> list[Example]:
        return [self.examples[i] if i >= 0 else self.target[-1 - i] for i in windows.ids.tolist()]

    def window_losses(self, windows: Windows) -> Float[Tensor, "n"]:
        with torch.no_grad(), self._evaluating() as model:
            return torch.cat(list(self._losses(model, windows))).cpu()

    def held_out_gradient(
        self, windows: Windows, weights: Float[Tensor, "M"]
    ) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """By backward passes, as a wrapped model needs them."""
        total, parameters = [], self.parameters
        require(bool(parameters), "no parameter that the optimizer trains requires a gradient.")
        with torch.enable_grad(), self._evaluating() as model, gradients_set_aside([*model.parameters()]):
            _require_no_steps(parameters)
            pieces = self._losses(model, windows)
            for losses, weight in zip(pieces, weights.split(self.micro_batch), strict=True):
                loss = (weight.to(losses) * losses).sum()
                loss.backward()
                total.append(loss.detach())
            loss = torch.tensor(sum(torch.stack(total).tolist()), dtype=torch.float64)
            return loss, [_dense_gradient(parameter) for parameter in parameters]

    def precondition(self, gradients: list[Tensor]) -> list[Tensor] | None:
        """Relative to the greatest learning rate, where groups of parameters have different ones; None where
        all are 0, as at the start of a warm-up, or before an optimizer's first step."""
        rated, greatest = self._rates(), self.rate(0)
        if not greatest:
            return None
        index = {id(parameter): i for i, (parameter, _) in enumerate(rated)}
        scaled = list(gradients)
        for optimizer in self.optimizers:
            own = [
                index[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in index
            ]
            # accelerate wraps the optimizer that has the state.
            inner: Any = getattr(optimizer, "optimizer", optimizer)
            pieces = preconditioned(inner, [rated[i][0] for i in own], [gradients[i] for i in own])
            if pieces is None:
                return None
            for i, piece in zip(own, pieces, strict=True):
                scaled[i] = piece * (rated[i][1] / greatest)
        return scaled

    def rate(self, step: int) -> float:
        return max(rate for _, rate in self._rates())

    def state_dict(self) -> State:
        return {
            "examples": {
                number: {
                    name: portable(value, f"the field {name!r} of an example")
                    for name, value in example.items()
                }
                for number, example in self.examples.items()
            }
        }

    def load_state_dict(self, state: State) -> None:
        self.examples = {
            number: {name: restored(value) for name, value in example.items()}
            for number, example in state["examples"].items()
        }

    def _rates(self) -> list[tuple[nn.Parameter, float]]:
        """What the optimizers train, with its learning rates."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:
            require(
                group["lr"] is not None,
                "the optimizer has lr=None and finds its own step: effects are measured at a learning rate, "
                "so give it one.",
            )
        return [(p, float(group["lr"])) for group in groups for p in group["params"] if p.requires_grad]

    def _losses(self, model: nn.Module, windows: Windows) -> Iterator[Float[Tensor, "n"]]:
        device, examples = next(model.parameters()).device, self.of(windows)
        for start in range(0, len(examples), self.micro_batch):
            chunk = examples[start : start + self.micro_batch]
            # A collator may change what it is given, and these are trained on afterwards.
            try:
                losses = self.loss(model, _moved(self.collate(copy.deepcopy(chunk)), device))
            except IndexError as error:
                raise CurriqError(_index_error(chunk, error)) from error
            require(
                losses.shape == (len(chunk),),
                f"per_example_loss gave shape {list(losses.shape)} for {len(chunk)} examples: it must give "
                "one loss for each.",
            )
            finite = losses.detach().isfinite()
            if not finite.all() and finite.any():  # else the model has diverged
                raise CurriqError(_not_finite(chunk, losses))
            yield losses

    @contextmanager
    def _evaluating(self) -> Generator[nn.Module]:
        """Evaluation mode, because a measurement must not be noise; then modes and random state as before."""
        model = self.model
        if model is None:
            raise CurriqError("the policy learns from measured effects: call observe(model, optimizer).")
        modes = {module: module.training for module in model.modules()}
        device = next(model.parameters()).device
        python, numpy, cached = random.getstate(), np.random.get_state(), torch.is_autocast_cache_enabled()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.eval()
            # Autocast would keep the weights in bfloat16 as they are, and not see that they are displaced.
            torch.set_autocast_cache_enabled(False)
            try:
                yield model
            finally:
                torch.set_autocast_cache_enabled(cached)
                random.setstate(python)
                np.random.set_state(numpy)
                for module, mode in modes.items():
                    module.training = mode


def _moved(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device, whatever a collator puts them into."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if type(value) in (list, tuple) else value


def _dense_gradient(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    if grad is None:
        return torch.zeros_like(parameter)
    return grad.to_dense() if grad.is_sparse else grad


def _require_no_steps(parameters: Iterable[nn.Parameter]) -> None:
    require(
        not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters),
        "a parameter has a hook that runs when its gradient is there (register_post_accumulate_grad_hook), "
        "and a measurement would train through it: take the optimizer's steps in the loop.",
    )


def _index_error(examples: list[Example], error: IndexError) -> str:
    """What is said where a model looks up what it has not: as a rule, the embedding of a token."""
    largest = [max(map(int, example["input_ids"]), default=0) for example in examples]
    i = largest.index(max(largest))
    return (
        f"the model ended a pass over examples with IndexError: {error}. Their largest token id is "
        f"{largest[i]}, source {examples[i].get('source')!r}. If the model has no embedding for it, tokenize "
        "target and stream with the model's own tokenizer, or call model.resize_token_embeddings."
    )


def _not_finite(examples: list[Example], losses: Float[Tensor, "n"]) -> str:
    """What is said of the first example whose loss is NaN or infinite."""
    i = int((~losses.detach().isfinite()).nonzero()[0])
    tokens = [int(token) for token in examples[i]["input_ids"][:8]]
    return (
        f"the loss of an example is {losses[i].item()}, where others are finite: source "
        f"{examples[i].get('source')!r}, input_ids {tokens}… Leave it out of the stream, or let "
        "per_example_loss give 0 where nothing is learnt."
    )
