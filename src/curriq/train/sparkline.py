"""A number's course over the whole run in a few characters."""

import itertools
import math

BARS = "▁▂▃▄▅▆▇█"


class Trail:
    """The course of a number, as means over equal numbers of consecutive values.

    Memory is bounded: when there are twice as many buckets as characters, neighbours are joined.

    Args:
        width: characters.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._per_bucket = 1
        self._buckets: list[float] = []
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        self._sum += value
        self._count += 1
        if self._count < self._per_bucket:
            return
        self._buckets.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._buckets) == 2 * self._width:
            pairs = zip(self._buckets[::2], self._buckets[1::2], strict=True)
            self._buckets = [(left + right) / 2 for left, right in pairs]
            self._per_bucket *= 2

    def text(self) -> str:
        """The course so far, its least value as the lowest bar and its greatest as the highest."""
        values = self._buckets
        while len(values) > self._width:  # fewer than twice as many: join some neighbours
            step = len(values) / self._width
            edges = [round(i * step) for i in range(self._width + 1)]
            values = [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges) if b > a]
        return sparkline(values)


def sparkline(values: list[float]) -> str:
    """One bar per value: `sparkline([0, 1, 2]) == "▁▅█"`; a level course lies in the middle."""
    if not values:
        return ""
    low, high = min(values), max(values)
    if high == low:
        return BARS[3] * len(values)
    top = len(BARS) - 1
    return "".join(BARS[round((value - low) / (high - low) * top)] for value in values)
