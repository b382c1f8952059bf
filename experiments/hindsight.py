"""`recommended` against the best static filter of each stream, chosen in hindsight, from a comparison.

    python experiments/hindsight.py                                 # the published numbers, in a second
    python experiments/hindsight.py --without oracle                # filters of text alone
    curriq compare experiments/static.toml                          # the same from new runs, in two hours
    python experiments/hindsight.py runs/static/comparison.json

Windows are those to uniform training's final validation loss, over uniform training's own: geometric means
over the seeds, and the mean of their ratio between the two arms with its sign-flip interval. The best filter
is the one with the fewest windows; being chosen after the fact, it has luck on its side.

A second table asks the same of the filter that ends lowest: the share of its windows that take `recommended`
to the final validation loss of that filter. Where a seed never gets there it counts with all of its windows,
and the mean is a lower bound, `>`.
"""

import argparse
import math
from itertools import product
from pathlib import Path

import numpy as np

from curriq.evaluate.statistics import interval, ratio_to_target, summarise_ratios
from curriq.runlog.read import read_document

PUBLISHED = Path(__file__).parent / "published"
"""What experiments/results.py --publish keeps: NAME.json.gz is the comparison of NAME.toml."""
NOT_FILTERS = ("uniform", "uniform-again", "recommended", "unlabelled")


def streams_of(comparison: Path) -> dict[str, dict]:
    """Arms by name, by stream, of a comparison.json; a line says where published numbers were made."""
    found = read_document(comparison, "compare again, finished runs are kept")
    if not found:
        raise SystemExit(f"{comparison} does not exist: give the comparison.json that `curriq compare` wrote")
    if "origin" in found:
        print("made at {commit}, {hardware}, threads per run: {threads}, {date}".format_map(found["origin"]))
    return found["streams"]


def require_arms(parser: argparse.ArgumentParser, streams: dict[str, dict], *names: str) -> None:
    """End the program with a message where a stream lacks one of these arms."""
    for stream, arms in streams.items():
        for name in names:
            if name not in arms:
                parser.error(f"no arm {name!r} on {stream}: the comparison has {', '.join(arms)}")


def ratios(arm: dict) -> dict[str, float]:
    """Windows to the target over uniform's, by seed; a lower bound where it was not reached."""
    return {seed: found["ratio"] for seed, found in arm["to_target"]["windows"]["by_seed"].items()}


def mean_ratio(arm: dict, seeds: list[str]) -> str:
    """The geometric mean of the ratios, behind > where any is a lower bound."""
    found = arm["to_target"]["windows"]["by_seed"]
    over = ">" if any(found[seed]["censored"] for seed in seeds) else ""
    return f"{over}{geometric_mean([found[seed]['ratio'] for seed in seeds]):.2f}"


def losses(arm: dict) -> dict[int, float]:
    """Test loss by seed, of the runs that are finished."""
    return {run["seed"]: run["test_loss"] for run in arm["runs"] if run["finished"]}


def changes(arm: dict, other: dict) -> np.ndarray:
    """Test loss less that of another arm, one per seed that both have."""
    ours, theirs = losses(arm), losses(other)
    return np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def between(low: float | None, high: float | None, form: str, over: str = "") -> str:
    """An interval in brackets, without an upper end where there is none; a dash for fewer than six seeds."""
    ends = [over + format(low, form)] if low is not None else []
    ends += [format(high, form)] if high is not None else []
    return f"[{', '.join(ends)}]" if ends else "–"


def curves(arm: dict) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Windows trained and validation losses by seed, of the runs that are finished."""
    return {
        run["seed"]: (np.array(run["curve"]["windows"], float), np.array(run["curve"]["validation_loss"]))
        for run in arm["runs"]
        if run["finished"]
    }


def filters(arms: dict) -> dict[str, dict]:
    return {name: arm for name, arm in arms.items() if name not in NOT_FILTERS}


def best_filter(arms: dict) -> str:
    """The static filter with the fewest windows to uniform training's final validation loss."""
    spent = {name: geometric_mean(list(ratios(arm).values())) for name, arm in filters(arms).items()}
    return min(spent, key=spent.__getitem__)


def lowest_filter(arms: dict) -> str:
    """The static filter with the lowest test loss, mean of the seeds."""
    ends = {name: float(np.mean(list(losses(arm).values()))) for name, arm in filters(arms).items()}
    return min(ends, key=ends.__getitem__)


def row_of_the_lowest(stream: str, arms: dict, ours: str) -> str:
    lowest = lowest_filter(arms)
    mine, theirs = curves(arms[ours]), curves(arms[lowest])
    seeds = sorted(mine.keys() & theirs.keys())
    found = summarise_ratios([ratio_to_target(*mine[seed], *theirs[seed]) for seed in seeds])
    change = changes(arms[ours], arms[lowest])
    over = "> " if found.censored else ""
    of_loss = f"{change.mean():+.3f} {between(*interval(change), form='+.3f')}"
    return (
        f"{stream:<11} {lowest:<10} {of_loss:<26} {over + format(found.mean, '.2f'):<7} "
        f"{between(found.low, found.high, '.2f', over):<13} {found.seeds - found.censored}/{found.seeds}"
    )


def row(stream: str, arms: dict, ours: str) -> str:
    best = best_filter(arms)
    mine, theirs = ratios(arms[ours]), ratios(arms[best])
    seeds = sorted(mine.keys() & theirs.keys())
    logs = np.array([math.log(mine[seed] / theirs[seed]) for seed in seeds])
    of_theirs = (None if end is None else math.exp(end) for end in interval(logs))
    difference = arms[ours]["difference"]
    over_plain = changes(arms[ours], arms["uniform"])
    worse = f"{(over_plain > 0).sum()}/{len(over_plain)}"
    # A comparison of an earlier version has the interval of its table under other names.
    ends = (difference.get(f"{end}_with_text", difference[end]) for end in ("low", "high"))
    change = f"{difference['mean']:+.3f} {between(*ends, form='+.3f')}"
    spent = [mean_ratio(arms[name], seeds) for name in (ours, best)]
    of_theirs = f"{math.exp(logs.mean()):.2f} {between(*of_theirs, form='.2f')}"
    if ">" in "".join(spent):  # a bound over a bound is none
        of_theirs = "–"
    best_change = f"{best} {arms[best]['difference']['mean']:+.3f}"
    return f"{stream:<11} {change:<25} {worse}    {best_change:<19} {' '.join(spent):<10} {of_theirs}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, nargs="?", default=PUBLISHED / "static.json.gz")
    parser.add_argument("--arm", default="recommended")
    parser.add_argument("--without", nargs="+", default=[], metavar="ARM", help="no filter to compare with")
    options = parser.parse_args()
    streams = streams_of(options.comparison)
    require_arms(parser, streams, options.arm, *options.without)
    for arms, name in product(streams.values(), options.without):
        del arms[name]
    require_arms(parser, streams, options.arm, "uniform")
    title = f"{options.arm}: change of loss"
    print(f"{'':<11} {title:<25} worse  best filter         windows    of the filter's")
    for stream, arms in streams.items():
        print(row(stream, arms, options.arm))
    print(f"{'':<11} {'lowest':<10} {'less its test loss':<26} windows to its final loss, reached")
    for stream, arms in streams.items():
        print(row_of_the_lowest(stream, arms, options.arm))


if __name__ == "__main__":
    main()
