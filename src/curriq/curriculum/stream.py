"""A user's stream of examples as a source of windows, and what is handed out of it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from curriq.config import require
from curriq.errors import CurriqError
from curriq.lm.examples import Example, as_windows, checked, learnt_tokens, numbered, portable
from curriq.lm.user_model import UserModel
from curriq.select.static import DsirScore
from curriq.state import Saved, State
from curriq.types import NO_COST, Cost, Offer, Windows

MOST_UNTAUGHT = 100_000
"""Examples without a token to learn, one after another, after which the stream is given up."""
NOTHING_TO_LEARN = (
    "{} of the stream have no token to learn: are their labels all −100, as where a chat template marks no "
    "turn as the assistant's?"
)

Stream = Iterable[Example] | Dataset | Callable[[], Iterable[Example] | Dataset]


class Selected(IterableDataset):
    """What `select` hands out, once: an iterator that a `DataLoader` takes."""

    def __init__(self, examples: Iterator[Example]) -> None:
        self._examples = examples
        self._asked = 0
        self._over = False

    def __iter__(self) -> Iterator[Example]:
        # A `for` statement and a DataLoader ask once per pass, and another pass would be empty; `islice` asks
        # for every batch, and may find the end.
        require(
            not (self._over and self._asked == 1),
            "this selection has been read to its end: call select again for each pass.",
        )
        self._asked += 1
        return self

    def __next__(self) -> Example:
        try:
            return next(self._examples)
        except StopIteration:
            self._over = True
            raise


class Reader(Saved):
    """The user's stream as a source of windows.

    Attributes:
        total: examples read from all streams, those without a token to learn left out.
        untaught: of all streams, these.
        in_stream: examples read from the present one.
    """

    SAVED = ("total", "untaught", "in_stream")

    def __init__(self, sources: Sequence[str], model: UserModel) -> None:
        self._sources = tuple(sources)
        self._model = model
        self._iterator: Iterator[Any] = iter(())
        self._opens: Callable[[], Any] | None = None
        self._skip = 0
        self._row = 0  # examples without a token to learn, one after another
        self.total = 0
        self.untaught = 0
        self.in_stream = 0

    def open(self, stream: Stream, skip: int | None) -> None:
        """Begin a stream behind what was read before; one that a function opens goes on where it is."""
        if hasattr(stream, "__iter__") or not callable(stream):
            self._opens, self._iterator = None, iterated(stream)
        elif stream == self._opens:
            return
        else:
            self._opens, self._iterator = stream, iterated(stream())
        behind = self._skip if skip is None else skip
        self.in_stream = sum(1 for _ in islice(self._iterator, behind))
        require(
            self.in_stream == behind,
            f"the stream has only {self.in_stream} examples, and {behind} of it were read before: give "
            "select the same stream, from its beginning, or skip=0 where it resumes by itself.",
        )
        self._skip = 0

    def read(self, n: int) -> Offer:
        examples = self._next(n)
        if not examples and self._opens is not None:
            self._iterator, self.in_stream = iterated(self._opens()), 0
            examples = self._next(n)
            require(bool(examples) or not self.in_stream, NOTHING_TO_LEARN.format("all examples"))
            require(bool(examples), "the stream is empty: the function that opens it gives no example.")
        if examples and not self.total:
            _warn_of_what_is_not_saved(examples[0])
        numbers = torch.arange(self.total, self.total + len(examples))
        self.total += len(examples)
        self._model.examples.update(zip(numbers.tolist(), examples, strict=True))
        source = torch.tensor(
            [source_index(example, self._sources) for example in examples], dtype=torch.int64
        )
        return Offer.of(numbered(numbers, source), cost=Cost(windows_read=len(examples)))

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict({"untaught": 0, **state})  # which an earlier version took all the same
        self._opens, self._iterator, self._skip = None, iter(()), self.in_stream

    def _next(self, n: int) -> list[Example]:
        """The next n examples from which something can be learnt, or all that are left of them."""
        examples: list[Example] = []
        for given in islice(self._iterator, None if n else 0):
            example = checked(given, f"example {self.in_stream} of the stream")
            self.in_stream += 1
            if learnt_tokens(example):
                examples.append(example)
                self._row = 0
            else:
                self._leave_out(example)
            if len(examples) == n:
                break
        return examples

    def _leave_out(self, example: Example) -> None:
        """Count an example from which nothing can be learnt; CurriqError where all are such for long."""
        self.untaught += 1
        self._row += 1
        require(
            self._row < MOST_UNTAUGHT, NOTHING_TO_LEARN.format(f"{self._row:,} examples one after another")
        )
        if self.untaught == 1:
            warnings.warn(
                f"curriq: example {self.in_stream - 1} of the stream has no token to learn among its "
                f"{len(example['input_ids'])} (the first has no loss, nor has one with the label −100): it "
                "is left out, as such ones are from now on.",
                stacklevel=2,
            )


def source_index(example: Example, sources: Sequence[str]) -> int:
    """Index of an example's source; 0 where there is only one and the example does not name it.

    Raises:
        CurriqError: it names an unknown source, or none where there are several.
    """
    if "source" not in example and len(sources) == 1:
        return 0
    require(
        "source" in example,
        f"an example names no source: give each its 'source', one of {', '.join(map(repr, sources))}.",
    )
    name = example["source"]
    require(
        name in sources,
        f"an example has the source {name!r}: give Curriculum(sources={(*sources, name)!r}).",
    )
    return sources.index(name)


def iterated(stream: Any, what: str = "the stream") -> Iterator[Any]:
    """The examples of an iterable, or of a data set that is read by index."""
    if hasattr(stream, "__iter__"):
        return iter(stream)
    if hasattr(stream, "__getitem__") and hasattr(stream, "__len__"):
        return (stream[i] for i in range(len(stream)))
    raise CurriqError(
        f"{what} is a {type(stream).__name__}: give examples to iterate over, or a data set with __len__ and "
        "__getitem__; as a stream also a function that opens one of these."
    )


def _warn_of_what_is_not_saved(example: Example) -> None:
    """Say at the beginning what `state_dict` would refuse."""
    for name, value in example.items():
        try:
            portable(value, f"the field {name!r} of an example")
        except CurriqError as error:
            warnings.warn(f"{error} Until then state_dict refuses to save this curriculum.", stacklevel=2)


TOKENS_AT_ONCE = 2**18
"""Tokens, padding included, whose n-grams are looked up at once: one long example must not pad all others."""


class ExampleScore(Saved):
    """The DSIR score of examples, of which the windows have the numbers alone."""

    SAVED = ("_score",)
    cost = NO_COST

    def __init__(self, model: UserModel, score: DsirScore) -> None:
        self._model = model
        self._score = score

    def __call__(self, windows: Windows) -> Float[Tensor, "n"]:
        parts = self._by_length(windows)
        if len(parts) == 1:
            return self._score(parts[0][1])
        for _, part in parts:
            self._score.learn(part)
        scores = torch.zeros(len(windows), dtype=torch.float64)
        for rows, part in parts:
            scores[rows] = self._score.score(part)
        return scores

    def of_target(self) -> Float[Tensor, "D"]:
        return self._score.of_target()

    def _by_length(self, windows: Windows) -> list[tuple[Tensor, Windows]]:
        """The examples of the windows, with their rows: all at once, or in parts of similar length."""
        examples = self._model.of(windows)
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        if len(examples) * int(lengths.max() if len(lengths) else 0) <= TOKENS_AT_ONCE:
            parts = [torch.arange(len(examples))]
        else:
            parts, start = [], 0
            order = lengths.argsort(stable=True)
            padded = lengths[order].tolist()
            for end in range(1, len(padded) + 1):
                if end == len(padded) or (end + 1 - start) * padded[end] > TOKENS_AT_ONCE:
                    parts.append(order[start:end])
                    start = end
        return [
            (rows, replace(as_windows([examples[i] for i in rows.tolist()]), ids=windows.ids[rows]))
            for rows in parts
        ]


def named_sources(sources: Sequence[str]) -> tuple[str, ...]:
    """The names of the sources.

    Raises:
        CurriqError: they are no sequence of different names.
    """
    require(
        isinstance(sources, Sequence) and not isinstance(sources, str) and len(sources) > 0,
        f"sources={sources!r}: give a tuple of names, such as sources=('web', 'forum').",
    )
    names = tuple(sources)
    require(
        all(isinstance(name, str) for name in names) and len(set(names)) == len(names),
        f"sources={names!r}: each must be a name, and only once.",
    )
    return names
