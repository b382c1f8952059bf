"""How often the text of a window has been trained on: what a static score cannot see."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curriq.config import RunConfig
from curriq.select.base import PASSAGE, History, passages
from curriq.select.static import FRESH
from curriq.state import Saved, State
from curriq.types import Metrics, Offer, Windows

REPEATED = 0.3
"""A window has been trained on as often as this share of its passages has, at the least."""
PER_WINDOW = 16
"""Passages that are counted of a longer window, about."""
SLOTS = 2**24
FULL = 1 / 16
"""Of the table of counts, and the share of them in use at which it begins afresh; the one before it is kept
beside it. So a text is remembered for 65,536 windows at the least, and of a new window's passages hardly one
in eight falls on a slot that others use."""
MOST = 512
"""More than two counts add up to."""
RECENT = 512
"""Windows over which the least repeated tenth is measured."""
LEAST_REPEATED = 0.1
LIKELY = 0.5
"""Windows that are accepted at least with this probability, but for repetitions, set the level."""


class Repetitions(Saved):
    """Counts the text that is trained on, and discounts what would repeat it.

    A window is its passages of `PASSAGE` tokens, wherever they begin, so that copies cut at other places and
    near copies with an edit here and there count, too. Passages are sampled by their hash, the same ones in
    every copy.

    Args:
        discount: factor on a window's probability for each time, beyond the first `FRESH`, that its text has
            been trained on more often than that of the least repeated tenth of its kind. Where all text is
            repeated alike, as in a later epoch, nothing is discounted; nor are the phrases that recur in
            every target, and should be learnt.
        window: tokens of a window, about, which sets how many passages are sampled.
        device: where passages are counted.
    """

    SAVED = ("_recent",)

    def __init__(self, discount: float, window: int, device: torch.device | str = "cpu") -> None:
        assert 0 < discount < 1, discount
        self.discount = discount
        self._every = max(1, (window - PASSAGE + 1) // PER_WINDOW)
        self._recent = History(RECENT)
        # Of the time before, and of now. Integers: the same on every device.
        self._counts = torch.zeros(2, SLOTS, dtype=torch.uint8, device=device)
        self._in_use = 0
        self._level = 0.0

    def count(self, windows: Windows) -> Float[Tensor, "n"]:
        """Times that the text of each window has been trained on, 0 for one that is too short to tell. On the
        CPU."""
        window, slots = self._passages(windows)
        counts = self._counts[0, slots].long() + self._counts[1, slots]
        # The passages window by window, and within each the most repeated first.
        in_order = (window * MOST + (MOST - 1 - counts)).sort().values
        passages = torch.bincount(window, minlength=len(windows))
        at = passages.cumsum(0) - passages + (REPEATED * passages).long()
        found = torch.zeros(len(windows), dtype=torch.float64, device=slots.device)
        known = passages > 0
        found[known] = (MOST - 1 - in_order[at[known]] % MOST).double()
        return found.cpu()

    def count_likely(
        self, windows: Windows, prob: Float[Tensor, "n"], draws: Float[Tensor, "n"]
    ) -> Float[Tensor, "n"]:
        """`count` where it matters, NaN elsewhere: a window that its draw rejects anyway, and that does not
        set the level, needs none.

        Args:
            prob: of being accepted, but for repetitions.
            draws: a window is accepted where its probability is not below this number.
        """
        counts = torch.full((len(windows),), torch.nan, dtype=torch.float64)
        likely = ((prob >= LIKELY) | (prob >= draws)).nonzero().squeeze(1)
        if len(likely):
            counts[likely] = self.count(windows.take(likely))
        return counts

    def take_in(self, offer: Offer) -> Metrics:
        """What was accepted is trained on now; of all that was judged, the windows that would rather have
        been accepted than not, but for repetitions, set the level. The metric is how often the text of what
        was accepted had been trained on before."""
        judged = [_judged(part) for part in offer.judged]
        # All by the level that their probabilities had, before it moves on.
        likely = [counts[prob >= LIKELY * self.factor(counts)] for prob, counts in judged]
        self._recent.extend(torch.cat(likely))
        self._set_level()
        self.add(offer.windows)
        _, trained = judged[0]
        return {"policy/repetitions": trained.mean().item()}

    def factor(self, counts: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        """Factor in (0, 1] on the acceptance probability of windows with these counts, by the level as it
        stands; 1 where a count is NaN."""
        return self.discount ** (counts - self._level - FRESH).clamp(min=0).nan_to_num(0.0)

    def _set_level(self) -> None:
        known = self._recent.values
        self._level = known.quantile(LEAST_REPEATED).item() if len(known) else 0.0

    def add(self, windows: Windows) -> None:
        """These windows are trained on."""
        _, used = self._passages(windows)
        if self._in_use + len(used) > FULL * SLOTS:
            self._counts = torch.stack([self._counts[1], torch.zeros_like(self._counts[1])])
            self._in_use = 0
        self._in_use += len(used)
        places, times = used.unique(return_counts=True)
        self._counts[1, places] = (self._counts[1, places].int() + times).clamp(max=255).to(torch.uint8)

    def _passages(self, windows: Windows) -> tuple[Int[Tensor, "p"], Int[Tensor, "p"]]:
        """Of the passages that are counted, window by window: the row of each one's window, and its slot."""
        window, key = passages(windows, self._every, self._counts.device)
        return window, key & SLOTS - 1

    def state_dict(self) -> State:
        """Only what is counted: a short run has a small state."""
        counts = self._counts.cpu()
        where = counts.nonzero()
        return super().state_dict() | {
            "in_use": self._in_use,
            "where": where.int(),
            "counts": counts[where[:, 0], where[:, 1]],
        }

    def load_state_dict(self, state: State) -> None:
        where = state["where"].long().to(self._counts.device)
        self._counts.zero_()
        self._counts[where[:, 0], where[:, 1]] = state["counts"].to(self._counts.device)
        self._in_use = state["in_use"]
        super().load_state_dict({"recent": state["recent"]})
        self._set_level()


def _judged(offer: Offer) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """The windows' acceptance probabilities and counts."""
    assert offer.sampled is not None
    assert offer.sampled.repetitions is not None
    return offer.sampled.accept_prob, offer.sampled.repetitions


def build_repetitions(config: RunConfig, device: torch.device | str = "cpu") -> Repetitions | None:
    """The count of repetitions that `--repeat-discount` asks for, on `device`; None without one."""
    discount = config.select.repeat_discount
    return Repetitions(discount, config.data.window, device) if discount < 1 else None
