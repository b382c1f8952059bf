"""Developmental stages: change points in what a run selected, or none where there are none.

Binary segmentation with a Gaussian mean-shift statistic over several series at once. A split counts only
when no more than a share α of permuted series has one as great. Neighbouring steps of a training run are
alike, so blocks are permuted and not single points: permuting points would take slow drift for a stage.
"""

import numpy as np

from curriq.runlog.read import bucket_edges

POINTS = 200
"""The series are averaged into this many bins first."""
SHORTEST = 8
"""Fewest bins in a stage."""


def change_points(
    series: np.ndarray, *, alpha: float = 0.01, permutations: int = 499, least_shift: float = 1.0
) -> list[int]:
    """Indices at which the mean of the series changes for good, ascending; empty when it does not.

    Args:
        series: [time, k], one column per quantity; a constant column is left out.
        alpha: greatest permutation p-value of a split, divided by the number of segments tested so far.
        permutations: of blocks of √n neighbouring bins, per tested segment.
        least_shift: least distance of the two means, in standard deviations within the segments, root mean
            square over the columns. A shift that is real but smaller is no stage.
    """
    edges = bucket_edges(len(series), POINTS)
    if len(edges) <= 2 * SHORTEST:
        return []
    binned = np.add.reduceat(series, edges[:-1], axis=0) / np.diff(edges)[:, None]
    spread = binned.std(axis=0)
    binned = binned[:, spread > 1e-9 * np.maximum(1.0, np.abs(binned).max(axis=0, initial=0.0))]
    rng = np.random.default_rng(0)
    found: list[int] = []
    waiting = [(0, len(binned))] if binned.shape[1] else []
    tested = 0
    while waiting:
        start, end = waiting.pop(0)
        part = binned[start:end]
        if len(part) < 2 * SHORTEST:
            continue
        tested += 1
        statistic, split, shift = _best_split(part)
        if shift < least_shift or _p_value(part, statistic, permutations, rng) > alpha / tested:
            continue
        found.append(start + split)
        waiting += [(start, start + split), (start + split, end)]
    return sorted(int(edges[index]) for index in found)


def _best_split(part: np.ndarray) -> tuple[float, int, float]:
    """Greatest share of the variance that one split explains, where it is, and its shift in standard
    deviations."""
    n = len(part)
    centred = part - part.mean(axis=0)
    scale = centred.std(axis=0)
    centred = centred[:, scale > 0] / scale[scale > 0]
    if centred.shape[1] == 0:
        return 0.0, n // 2, 0.0
    left = np.arange(SHORTEST, n - SHORTEST + 1)
    sums = np.cumsum(centred, axis=0)[left - 1]  # of a centred series, so the right side's is its negative
    between = (sums**2 * (n / (left * (n - left)))[:, None]).sum(axis=1)
    best = int(between.argmax())
    share = between[best] / (n * centred.shape[1])
    split = int(left[best])
    a, b = centred[:split], centred[split:]
    within = np.sqrt((a.var(axis=0) * split + b.var(axis=0) * (n - split)) / n)
    gaps = np.abs(a.mean(axis=0) - b.mean(axis=0)) / np.maximum(within, 1e-9)
    return float(share), split, float(np.sqrt(np.mean(np.minimum(gaps, 100.0) ** 2)))


def _p_value(part: np.ndarray, statistic: float, permutations: int, rng: np.random.Generator) -> float:
    n = len(part)
    length = max(2, round(np.sqrt(n)))
    hits = 0
    for _ in range(permutations):
        rolled = np.roll(part, rng.integers(length), axis=0)
        blocks = [rolled[i : i + length] for i in range(0, n, length)]
        mixed = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
        hits += _best_split(mixed)[0] >= statistic
    return (1 + hits) / (1 + permutations)
