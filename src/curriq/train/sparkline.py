"""The history of a number over the whole run, drawn in a few characters."""

from statistics import fmean

import numpy as np

BARS = "▁▂▃▄▅▆▇█"


class History:
    """Means over equal numbers of consecutive values, at most two for each of `width` characters."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._per_mean = 1
        self._means: list[float] = []
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        self._pending.append(value)
        if len(self._pending) == self._per_mean:
            self._means.append(fmean(self._pending))
            self._pending.clear()
        if len(self._means) == 2 * self._width:
            self._means = [fmean(pair) for pair in zip(self._means[::2], self._means[1::2], strict=True)]
            self._per_mean *= 2

    def sparkline(self) -> str:
        """The history so far, its smallest mean as the lowest bar and its largest as the highest."""
        means = self._means
        if len(means) > self._width:
            means = [float(part.mean()) for part in np.array_split(means, self._width)]
        return sparkline(means)


def sparkline(values: list[float]) -> str:
    """One bar per value: `sparkline([0, 1, 2]) == "▁▅█"`; equal values lie in the middle."""
    if not values:
        return ""
    low, high = min(values), max(values)
    if high == low:
        return BARS[3] * len(values)
    return "".join(BARS[round((value - low) / (high - low) * 7)] for value in values)
