"""Every arm of a comparison against any other one, from its comparison.json.

    curriq compare experiments/langevin_rag.toml
    python experiments/against.py runs/langevin_rag/comparison.json --arm filter

Printed per stream and arm: change of the test loss, nats per token, with its sign-flip interval, and in how
many pairs of one seed the arm ends below the other.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hindsight import losses

from curriq.evaluate.statistics import interval


def rows(arms: dict[str, Any], other: str) -> Iterator[tuple[str, np.ndarray]]:
    """Each arm with its changes against the other, one per seed that both have."""
    theirs = losses(arms[other])
    for name, arm in arms.items():
        if name != other:
            ours = losses(arm)
            yield name, np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--arm", required=True, help="the one that the others are compared with")
    options = parser.parse_args()
    streams = json.loads(options.comparison.read_text(encoding="utf-8"))["streams"]
    for stream, arms in streams.items():
        if options.arm not in arms:
            parser.error(f"--arm {options.arm}: the comparison has {', '.join(arms)}")
        print(f"{stream}, against {options.arm}")
        for name, changes in rows(arms, options.arm):
            low, high = interval(changes)
            ends = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
            print(f"  {name:16} {changes.mean():+.3f}{ends}  {(changes < 0).sum()} of {len(changes)}")


if __name__ == "__main__":
    main()
