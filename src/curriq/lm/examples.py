"""Training examples of any length, in a loop of the user's own: what one is, how they are batched, and how a
checkpoint keeps them."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from curriq.config import require
from curriq.errors import CurriqError
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
    """`input_ids`, `labels` (−100 in the padding) and `attention_mask` [n, T] of examples of any length.

    An example's own `attention_mask` is kept. Without `labels`, the tokens that it hides are not learnt, nor
    is the first one behind such.
    """
    rows = [(_row(example["input_ids"]), _mask(example), example.get("labels")) for example in examples]

    def padded(tensors: list[Tensor], value: int) -> Int[Tensor, "n T"]:
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    return {
        "input_ids": padded([tokens for tokens, _, _ in rows], pad_id),
        "labels": padded([_labels(*row) for row in rows], IGNORED),
        "attention_mask": padded([mask for _, mask, _ in rows], 0),
    }


def _row(values: Any) -> Int[Tensor, "T"]:
    return torch.as_tensor(values).long()


def _mask(example: Example) -> Int[Tensor, "T"]:
    mask, count = example.get("attention_mask"), len(example["input_ids"])
    if mask is None:
        return torch.ones(count, dtype=torch.int64)
    require(
        np.shape(mask) == (count,),
        f"an example has {count} input_ids and an attention_mask of shape {list(np.shape(mask))}: it needs "
        "one entry per token, or a collator of your own (collate=…).",
    )
    return _row(mask)


def _labels(tokens: Int[Tensor, "T"], mask: Int[Tensor, "T"], labels: Any) -> Int[Tensor, "T"]:
    """The labels, or else those of the tokens that are seen and stand behind one that is."""
    if labels is not None:
        return _row(labels)
    hidden = mask == 0
    hidden[1:] |= mask[:-1] == 0  # what predicts the first token behind padding is padding
    return tokens.masked_fill(hidden, IGNORED)


def as_windows(examples: Sequence[Example]) -> Windows:
    """Examples of any length as one batch of at least one column; padding is not learnt."""
    batch = {name: column.cpu() for name, column in pad_examples([*map(_read, examples)]).items()}
    missing = (0, 1 - min(1, batch["input_ids"].shape[1]))
    tokens, labels = F.pad(batch["input_ids"], missing), F.pad(batch["labels"], missing, value=IGNORED)
    return replace(numbered(torch.arange(len(examples))), tokens=tokens, labels=labels)


def _read(example: Example) -> dict[str, Any]:
    """What says which tokens an example has, and which of them are learnt."""
    columns = {name: example[name] for name in ("input_ids", "labels") if example.get(name) is not None}
    mask = example.get("attention_mask")
    # One of two dimensions is for the user's own collator.
    return columns if mask is None or np.ndim(mask) > 1 else columns | {"attention_mask": mask}


def numbered(numbers: Int[Tensor, "n"], source: Int[Tensor, "n"] | None = None) -> Windows:
    """Windows that stand for the examples with these numbers."""
    source = torch.zeros_like(numbers) if source is None else source
    return Windows(tokens=numbers[:, None], ids=numbers, source=source)


def checked(example: Any, where: str) -> dict[str, Any]:
    """A shallow copy of an example that has what every part of a curriculum reads.

    Args:
        where: what the error calls it.

    Raises:
        CurriqError: it is no mapping, has no `input_ids`, these are no list of token ids, or its labels have
            another length.
    """
    if not isinstance(example, Mapping):
        raise CurriqError(
            f"{where} is a {type(example).__name__}: an example is a mapping, {{'input_ids': [token ids]}}."
        )
    require(
        "input_ids" in example,
        f"{where} has no input_ids, but {', '.join(map(str, example))}: tokenize the stream first.",
    )
    count = _count(example["input_ids"], f"{where}: input_ids")
    if example.get("labels") is not None:
        labels = _count(example["labels"], f"{where}: labels")
        require(
            labels == count,
            f"{where} has {count} input_ids and {labels} labels: give each token its label, −100 where it is "
            "not learnt.",
        )
    return dict(example)


def _count(row: Any, what: str) -> int:
    """Number of tokens of a row of token ids."""
    if isinstance(row, list | tuple | range):
        first = torch.as_tensor(row[0]) if row and not isinstance(row[0], str | Mapping) else None
        fits = not row or (first is not None and first.ndim == 0 and not first.is_floating_point())
        found = f"a {type(row).__name__} of {type(row[0]).__name__}" if row else ""
    elif isinstance(row, Tensor | np.ndarray):
        fits = row.ndim == 1 and not torch.as_tensor(row[:0]).is_floating_point()
        found = f"of shape {list(row.shape)} and type {row.dtype}"
    else:
        fits, found = False, f"a {type(row).__name__}"
    hint = ": take the examples out of the batch" if getattr(row, "ndim", 1) > 1 else ""
    require(fits, f"{what} is {found}: an example has one row of whole numbers{hint}.")
    return len(row)


def learnt_tokens(example: Example) -> int:
    """Tokens of an example that have a loss: those with a label, but for the first, which none precedes."""
    labels = as_windows([example]).labels
    assert labels is not None
    return int((labels[:, 1:] != IGNORED).sum())


AS_THEY_ARE = (type(None), bool, int, float, str, bytes)
TAG = ""
"""Key of a dictionary that stands for a value that `torch.load(weights_only=True)` does not read."""
TIMES: dict[str, Any] = {"datetime": datetime.datetime, "date": datetime.date, "time": datetime.time}


def portable(value: Any, where: str) -> Any:
    """A copy of a value of plain containers, numbers, strings and tensors only; `restored` undoes it.

    Scalars of numpy become Python's, times of pandas those of `datetime`.

    Raises:
        CurriqError: it, or what it holds, is of another type.
    """
    if type(value) in AS_THEY_ARE:
        return value
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, list | tuple):
        items = [portable(item, where) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        content = [[portable(name, where), portable(item, where)] for name, item in value.items()]
        return {TAG: "dict", "of": content} if TAG in value else {name: item for name, item in content}
    if isinstance(value, range):
        return {TAG: "range", "of": [value.start, value.stop, value.step]}
    if isinstance(value, PurePath):
        return str(value)
    for name, kind in TIMES.items():
        if isinstance(value, kind):  # pandas writes one that is missing as a time that is not itself
            return {TAG: name, "of": value.isoformat()} if value == value else None
    if isinstance(value, np.generic) and value.dtype.kind in "biufSU":
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype != np.longdouble:
        return {TAG: "ndarray", "of": torch.from_numpy(np.ascontiguousarray(value).copy())}
    if isinstance(value, np.ndarray) and (
        value.dtype.kind in "SU" or (value.dtype.kind == "O" and value.ndim == 1)
    ):
        return {TAG: "objects", "of": portable(value.tolist(), where), "dtype": value.dtype.str}
    raise CurriqError(
        f"{where} holds a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot "
        "keep: leave it out of the examples, or give it as numbers, text, a tensor or an array."
    )


def restored(value: Any) -> Any:
    """What `portable` was given; a copy."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(map(restored, value))
    if not isinstance(value, Mapping):
        return value
    if TAG not in value:
        return {name: restored(item) for name, item in value.items()}
    kind, content = value[TAG], value["of"]
    if kind in TIMES:
        return TIMES[kind].fromisoformat(content)
    return {
        "dict": lambda: {name: restored(item) for name, item in content},
        "range": lambda: range(*content),
        "ndarray": lambda: content.numpy().copy(),
        "objects": lambda: _objects(restored(content), np.dtype(value["dtype"])),
    }[kind]()


def _objects(items: list[Any], dtype: np.dtype) -> np.ndarray:
    if dtype.kind != "O":
        return np.array(items, dtype=dtype)
    array = np.empty(len(items), dtype=object)
    array[:] = items  # or numpy would make lists of one length a matrix
    return array
