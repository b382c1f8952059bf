"""A validation loss that was lower before the end of a run."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from curriq.report.chart import Json
from curriq.runlog.read import Columns

RISEN = 0.05
"""Nats per token that the last losses must lie above the lowest one, more than chance moves them."""
LAST = 3
"""Evaluations whose median is the loss at the end; the lowest must lie before them."""
WHY = "The text has been learnt by heart (take fewer steps, or more text), or the learning rate is too high."


class Risen(NamedTuple):
    """Where the losses were lowest, that loss, and the one at the end, nats per token."""

    lowest_at: int
    lowest: float
    last: float


def risen(losses: Sequence[float] | np.ndarray) -> Risen | None:
    """None where the losses end near their lowest."""
    if not len(losses) or (at := int(np.argmin(losses))) >= len(losses) - LAST:
        return None
    last = float(np.median(losses[-LAST:]))
    return Risen(at, float(losses[at]), last) if last - losses[at] > RISEN else None


def of_run(columns: Columns) -> list[str]:
    """A sentence on a run whose validation loss has risen; none otherwise."""
    rows, losses = columns.raw("validation/loss")
    if (found := risen(losses)) is None:
        return []
    step = int(columns.at(rows)["step"][found.lowest_at]) + 1
    return [
        f"The validation loss was lowest after step {step:,} ({found.lowest:.3f}) and has risen to "
        f"{found.last:.3f}. {WHY}"
    ]


def of_arms(arms: Json) -> list[str]:
    """A sentence on each arm of a comparison in some of whose finished runs the validation loss has risen."""
    sentences = []
    for name, arm in arms.items():
        curves = [run["curve"]["validation_loss"] for run in arm["runs"] if run["finished"]]
        found = [(one, len(curve)) for curve in curves if (one := risen(curve)) is not None]
        if found:
            share = np.mean([(one.lowest_at + 1) / count for one, count in found])
            rise = np.mean([one.last - one.lowest for one, _ in found])
            sentences.append(
                f"{name}: in {len(found)} of {len(curves)} runs the validation loss was lowest after "
                f"{share:.0%} of the run and has risen by {rise:.3f} since (means). {WHY}"
            )
    return sentences
