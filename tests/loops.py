"""A training loop of one's own with a `Curriculum`: a small model, a stream of two sources, and resumes."""

import copy
import io
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from curriq.curriculum import Curriculum
from curriq.lm.examples import example_losses, pad_examples

VOCAB, BATCH = 40, 8


class Bigram(nn.Module):
    """A small model with dropout and a part that is not trained."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 16)
        self.dropout = nn.Dropout(dropout)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids, attention_mask=None):
        hidden = torch.tanh(self.frozen(self.dropout(self.embed(input_ids))))
        return SimpleNamespace(logits=self.head(hidden), hidden=hidden)


def example(draw: random.Random, source: str) -> dict[str, Any]:
    """Tokens that count upwards behind a prompt that is not learnt, or noise; of any length."""
    start, length = draw.randrange(2, 20), draw.randint(3, 9)
    tokens = range(start, start + length) if source == "good" else draw.choices(range(2, VOCAB), k=length)
    return {"input_ids": [1, *tokens], "labels": [-100, *tokens], "source": source}


def stream(seed: int = 0) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    while True:
        yield example(draw, "good" if draw.random() < 0.3 else "bad")


def target(n: int = 16) -> list[dict[str, Any]]:
    draw = random.Random(99)
    return [example(draw, "good") for _ in range(n)]


def curriculum(**options: Any) -> Curriculum:
    defaults = {"sources": ("good", "bad"), "batch_size": BATCH, "reward_every": 2}
    return Curriculum(target(), **defaults | options)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


class Loop:
    """A training loop over one or more passes through a stream, which can be saved and resumed.

    Args:
        ahead: batches that are taken before they are needed, as accelerate takes one.
    """

    def __init__(
        self, curriculum: Curriculum, *, ahead: int = 0, wrap: Callable = lambda model: model
    ) -> None:
        self.curriculum = curriculum
        self.model = Bigram()
        self.wrapped = wrap(self.model)
        self.optimizer = adamw(self.model)
        self.ahead = ahead
        self.trained: list[list[list[int]]] = []

    def batches(self, source: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """As a `DataLoader` makes them, some of them early."""
        examples, waiting = iter(self.curriculum.select(source)), []
        while batch := list(islice(examples, BATCH)):
            waiting.append(batch)
            if len(waiting) > self.ahead:
                yield waiting.pop(0)
        yield from waiting

    def run(self, source: Callable[[], Iterable[dict[str, Any]]], steps: int, passes: int = 1) -> "Loop":
        while self.curriculum.num_passes < passes:
            for batch in self.batches(source()):
                self.step(batch)
                if self.curriculum.step == steps:
                    return self
        return self

    def step(self, batch: list[dict[str, Any]]) -> dict[str, float]:
        self.trained.append([e["input_ids"] for e in batch])
        example_losses(self.wrapped, pad_examples(batch)).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.curriculum.observe(self.wrapped, self.optimizer)

    def resumed(self, curriculum: Curriculum) -> "Loop":
        """Another loop in the state of this one, by way of plain data."""
        other = Loop(curriculum, ahead=self.ahead)
        for mine, theirs in ((self.model, other.model), (self.optimizer, other.optimizer)):
            theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
        other.curriculum.load_state_dict(plain(self.curriculum.state_dict()))
        other.trained = list(self.trained)
        return other

    def equals(self, other: "Loop") -> bool:
        same = zip(self.model.parameters(), other.model.parameters(), strict=True)
        return self.trained == other.trained and all(torch.equal(a, b) for a, b in same)


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """The state as `torch.load` reads it back, without code of ours."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Everything:
    def accept_prob(self, offer):
        return torch.ones(len(offer))
