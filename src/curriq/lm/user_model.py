"""The model of a user's own training loop, as `lm.held_out` measures it, and examples of any length."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from curriq.errors import CurriqError
from curriq.lm.learner import gradients_set_aside, preconditioned
from curriq.state import Saved
from curriq.types import IGNORED, Windows

Example = Mapping[str, Any]
"""One training example: `input_ids`, and where they differ from these `labels`, −100 where a token is not
learnt; `source`, a name, where there are several; and whatever else the collator wants."""
LossFunction = Callable[[nn.Module, Any], Float[Tensor, "n"]]


def example_losses(model: nn.Module, batch: Mapping[str, Any]) -> Float[Tensor, "n"]:
    """Mean next-token loss of each example over its learnt tokens, nats per token; 0 where it has none.

    Args:
        model: anything whose `forward` takes `input_ids` and gives `logits`.
        batch: `input_ids`, `labels`, and `attention_mask` or `position_ids` where there are any.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    logits, targets = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return loss.view(targets.shape).sum(1) / (targets != IGNORED).sum(1).clamp(min=1)


def pad_examples(examples: Sequence[Example], pad_id: int = 0) -> dict[str, Tensor]:
    """`input_ids`, `labels` (−100 in the padding) and `attention_mask` [n, T] of examples of any length."""
    tokens = [example["input_ids"] for example in examples]
    labels = [example.get("labels") for example in examples]

    def padded(rows: list[Any], value: int) -> Int[Tensor, "n T"]:
        tensors = [torch.as_tensor(row).long() for row in rows]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    return {
        "input_ids": padded(tokens, pad_id),
        "labels": padded([t if y is None else y for t, y in zip(tokens, labels, strict=True)], IGNORED),
        "attention_mask": padded([[1] * len(row) for row in tokens], 0),
    }


def as_windows(examples: Sequence[Example]) -> Windows:
    """Examples of any length as one batch; padding is not learnt."""
    batch = {name: column.cpu() for name, column in pad_examples(examples).items()}
    return replace(numbered(torch.arange(len(examples))), tokens=batch["input_ids"], labels=batch["labels"])


def numbered(numbers: Int[Tensor, "n"], source: Int[Tensor, "n"] | None = None) -> Windows:
    """Windows that stand for the examples with these numbers."""
    source = torch.zeros_like(numbers) if source is None else source
    return Windows(tokens=numbers[:, None], ids=numbers, source=source)


@dataclass(kw_only=True, eq=False)
class UserModel(Saved):
    """The user's model and optimizer, as `lm.held_out` measures them; windows stand for examples by number.

    Attributes:
        target: D; its examples have the numbers −1, −2, …
        loss, collate: as in `Curriculum`.
        micro_batch: examples per forward pass.
        autocast: whether passes run in reduced precision.
        examples: those that are yet to be trained on, by number.
    """

    SAVED = ("examples",)

    target: list[Example]
    loss: LossFunction
    collate: Callable[[list[Example]], Any]
    micro_batch: int
    autocast: bool = False
    examples: dict[int, Example] = field(default_factory=dict)
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None

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
        with torch.enable_grad(), self._evaluating() as model, gradients_set_aside(parameters):
            pieces = self._losses(model, windows)
            for losses, weight in zip(pieces, weights.split(self.micro_batch), strict=True):
                loss = (weight.to(losses) * losses).sum()
                loss.backward()
                total.append(loss.detach())
            loss = torch.tensor(sum(torch.stack(total).tolist()), dtype=torch.float64)
            return loss, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def precondition(self, gradients: list[Tensor]) -> list[Tensor] | None:
        """Relative to the greatest learning rate, where groups of parameters have different ones."""
        optimizer: Any = self.optimizer
        # accelerate wraps the optimizer that has the state.
        scaled = preconditioned(getattr(optimizer, "optimizer", optimizer), self.parameters, gradients)
        greatest = self.rate(0) or 1.0
        rates = [rate / greatest for _, rate in self._rates()]
        return scaled and [piece * rate for piece, rate in zip(scaled, rates, strict=True)]

    def rate(self, step: int) -> float:
        return max(rate for _, rate in self._rates())

    def _rates(self) -> list[tuple[nn.Parameter, float]]:
        """What the optimizer trains, with its learning rates."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        rated = [(group["params"], float(group["lr"])) for group in groups]
        return [(p, rate) for parameters, rate in rated for p in parameters if p.requires_grad]

    def _losses(self, model: nn.Module, windows: Windows) -> Iterator[Float[Tensor, "n"]]:
        device, examples = next(model.parameters()).device, self.of(windows)
        for start in range(0, len(examples), self.micro_batch):
            batch = self.collate(examples[start : start + self.micro_batch])
            batch = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
            yield self.loss(model, batch)

    @contextmanager
    def _evaluating(self) -> Generator[nn.Module]:
        """Evaluation mode, because a measurement must not be noise; then modes and random state as before."""
        model = self.model
        if model is None or self.optimizer is None:
            raise CurriqError("the policy learns from measured effects: call observe(model, optimizer).")
        modes = {module: module.training for module in model.modules()}
        device = next(model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.eval()
            try:
                yield model
            finally:
                for module, mode in modes.items():
                    module.training = mode
