"""Every arm of a comparison against any other one, from its comparison.json.

    python experiments/against.py experiments/published/recommended_ablations.json.gz --arm recommended
    curriq compare experiments/langevin_rag.toml
    python experiments/against.py runs/langevin_rag/comparison.json --arm filter

Printed per stream and arm: change of the test loss, nats per token, with its sign-flip interval, and in how
many pairs of one seed the arm ends below the other.
"""

import argparse
from pathlib import Path

from hindsight import between, changes, require_arms, streams_of

from curriq.evaluate.statistics import interval


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--arm", required=True, help="the one that the others are compared with")
    options = parser.parse_args()
    streams = streams_of(options.comparison)
    require_arms(parser, streams, options.arm)
    for stream, arms in streams.items():
        print(f"{stream}, against {options.arm}")
        for name, arm in arms.items():
            if name == options.arm:
                continue
            change = changes(arm, arms[options.arm])
            ends = between(*interval(change), form="+.3f")
            print(f"  {name:16} {change.mean():+.3f} {ends}  {(change < 0).sum()} of {len(change)}")


if __name__ == "__main__":
    main()
