"""How often the text of a window has been trained on: what a static score cannot see.

A discount on such windows was part of `recommended` once. It brought nothing on streams of near copies, and
took the truth from one on which true sentences recur and false ones do not (`LOG.md`), so the package has it
no more; `headroom.py` counts with this.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.select.base import PASSAGE, passages
from curriq.types import Windows

REPEATED = 0.3
"""A window has been trained on as often as this share of its passages has, at the least."""
PER_WINDOW = 16
"""Passages that are counted of a longer window, about."""
SLOTS = 2**24
"""Of the table of counts; where two passages share one, their counts add up."""
MOST = 512
"""More than any count."""


class Repetitions:
    """Counts the text that is trained on.

    A window is its passages of `PASSAGE` tokens, wherever they begin, so that copies cut at other places and
    near copies with an edit here and there count, too. Passages are sampled by their hash, the same ones in
    every copy.

    Args:
        window: tokens of a window, about, which sets how many passages are sampled.
    """

    def __init__(self, window: int) -> None:
        self._every = max(1, (window - PASSAGE + 1) // PER_WINDOW)
        self._counts = torch.zeros(SLOTS, dtype=torch.uint8)

    def count(self, windows: Windows) -> Float[Tensor, "n"]:
        """Times that the text of each window has been trained on, 0 for one that is too short to tell."""
        window, slots = self._passages(windows)
        # The passages window by window, and within each the most repeated first.
        in_order = (window * MOST + (MOST - 1 - self._counts[slots].long())).sort().values
        passages = torch.bincount(window, minlength=len(windows))
        at = passages.cumsum(0) - passages + (REPEATED * passages).long()
        found = torch.zeros(len(windows), dtype=torch.float64)
        known = passages > 0
        found[known] = (MOST - 1 - in_order[at[known]] % MOST).double()
        return found

    def add(self, windows: Windows) -> None:
        """These windows are trained on."""
        _, used = self._passages(windows)
        places, times = used.unique(return_counts=True)
        self._counts[places] = (self._counts[places].int() + times).clamp(max=255).to(torch.uint8)

    def _passages(self, windows: Windows) -> tuple[Int[Tensor, "p"], Int[Tensor, "p"]]:
        """Of the passages that are counted, window by window: the row of each one's window, and its slot."""
        window, key = passages(windows, self._every)
        return window, key & SLOTS - 1
