"""`comparison.json` from the logs of a comparison's runs; docs/compare.md lists its fields."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np

import curriq
from curriq.config import require
from curriq.evaluate import statistics
from curriq.evaluate.plan import WORKER_LOG, Plan, PlannedRun
from curriq.evaluate.statistics import WindowChanges
from curriq.runlog import read

AXES = {axis.lower(): name for axis, name in read.AXES.items() if axis != "step"}
"""x-axis of a curve → its name in the log."""
SPENT = ("windows_read", "windows_trained", "flops", "seconds")
"""Totals of a run that tell who read how much."""
COPIED = (
    *("test_loss", "validation_loss", "windows_proposed", "tokens", "threads"),
    *(*SPENT, "data_fingerprint", "weight_share"),
)
"""Fields of a run's summary that the comparison repeats."""
COPIED_LATER = ("initial_validation_loss",)
"""Those that runs of earlier versions lack."""
WITH_SEED = ("seed",)
"""Entries of a run's data fingerprint that its training seed decides."""
UNIFORM = "uniform"
"""Selector that is meant to weigh all windows alike."""
HARDLY = 0.01
"""Share of the windows read up to which rejecting them is no selection: a filter that accepts all still holds
the first one or two of the next step."""
EVEN = 1 - 1e-6
"""Effective batch fraction from which weights count as equal; the weights are in float32."""

Json = dict[str, Any]


def assess(plan: Plan, failed: dict[str, str]) -> Json:
    """All results of the finished runs; CurriqError when two of one stream and seed read different data.

    Args:
        failed: name of a run → its last message. Its seed is left out of the arm's pairs.
    """
    measured = {run.name: _measure(run, failed.get(run.name)) for run in plan.runs}
    _require_equal_data(plan, measured)
    by_window = {run.name: read.read_test_losses(run.folder) for run in plan.runs if run.name not in failed}
    streams: Json = {}
    for stream in plan.streams:
        planned = {arm: _planned(plan, stream, arm) for arm in plan.arms}
        by_arm = {arm: [measured[run.name] for run in runs] for arm, runs in planned.items()}
        changes = {
            arm: _window_changes(runs, planned[plan.compare.baseline], by_window)
            for arm, runs in planned.items()
        }
        baseline = by_arm[plan.compare.baseline]
        streams[stream] = {arm: assess_arm(runs, baseline, changes[arm]) for arm, runs in by_arm.items()}
    return {
        "curriq": curriq.__version__,
        "file": str(plan.file),
        "baseline": plan.compare.baseline,
        "seeds": list(plan.compare.seeds),
        "confidence": statistics.CONFIDENCE,
        "alpha": statistics.ALPHA,
        "power": statistics.POWER,
        "margin_share": statistics.MARGIN_SHARE,
        "tail_margin": statistics.TAIL_MARGIN,
        "vary_split": plan.compare.vary_split,
        "arms": plan.arms,
        "streams": streams,
        "failed": {run.name: failed[run.name] for run in plan.runs if run.name in failed},
        "notes": list(_notes(plan, measured, by_window)),
    }


def _planned(plan: Plan, stream: str, arm: str) -> list[PlannedRun]:
    """The runs of an arm on a stream, one per seed."""
    return [run for run in plan.runs if (run.stream, run.arm) == (stream, arm)]


def _measure(run: PlannedRun, error: str | None) -> Json:
    """Results and curve of one run, or the error and the log of a failed one."""
    result: Json = {"seed": run.seed, "folder": str(run.folder), "finished": error is None}
    if error is not None:
        return result | {"error": error, "log": str(run.folder / WORKER_LOG)}
    summary = read.read_summary(run.folder)
    rows = read.read_metrics(run.folder)
    evaluated = [row for row in rows if "validation/loss" in row]
    names = AXES | {"validation_loss": "validation/loss"}
    curve = {axis: [row[name] for row in evaluated] for axis, name in names.items()}
    found = {
        "area": statistics.mean_height(*_curve(curve, "windows")),
        "never_selected": not _meant_to_be_uniform(run) and never_selected(rows),
        "curve": curve,
    }
    found |= {name: summary[name] for name in COPIED_LATER if name in summary}
    return result | {name: summary[name] for name in COPIED} | found


def _meant_to_be_uniform(run: PlannedRun) -> bool:
    """Whether the arm is meant to weigh all windows alike: it is uniform, or a replay, whose order counts."""
    return run.config.method == UNIFORM or bool(run.config.data.curriculum)


def never_selected(rows: list[dict[str, float]]) -> bool:
    """Whether a run with these rows rejected no window, or hardly any, and weighed all windows of every step
    alike."""
    read, proposed = rows[-1]["x/windows_read"], rows[-1]["x/windows_proposed"]
    return read - proposed <= HARDLY * read and all(
        row["policy/effective_batch_fraction"] > EVEN for row in rows
    )


def _require_equal_data(plan: Plan, measured: dict[str, Json]) -> None:
    """Refuse arms of one seed that saw different data, or, with training seeds of their own, other data than
    these decide: their sources, tokenizers and held-out sets must be equal too. And a file that was another
    one for another seed."""
    first: dict[tuple[str, int, int | None], PlannedRun] = {}
    files: dict[tuple[str, str], tuple[Any, PlannedRun]] = {}
    for run in plan.runs:
        if (ours := measured[run.name])["finished"]:
            for name, content in read.recorded(run.folder, "files").items():
                theirs, other = files.setdefault((run.stream, name), (content, run))
                require(
                    theirs == content,
                    f"{run.folder} and {other.folder} saw different data: {name} changed between the runs. "
                    "Remove the folders of those before or after, and compare again.",
                )
            other = first.setdefault((run.stream, run.seed, run.config.train.seed), run)
            if other is run:  # the first with its training seed
                other = first.setdefault((run.stream, run.seed, None), run)
            if run.config.train.seed == other.config.train.seed:
                equal = ours["data_fingerprint"] == measured[other.name]["data_fingerprint"]
            else:
                equal = _without_seed(run) == _without_seed(other)
            require(
                equal,
                f"{run.folder} and {other.folder} saw different data: files changed between the runs. "
                "Remove the folder of the older one, or of both, and compare again.",
            )


def _without_seed(run: PlannedRun) -> dict[str, str]:
    """The data fingerprint of a run but for what its training seed decides."""
    path = read.existing(run.folder / "environment.json")
    fingerprint = read.read_document(path, "remove the run's folder and run it again")["fingerprint"]
    return {name: value for name, value in fingerprint.items() if name not in WITH_SEED}


def _window_changes(
    runs: list[PlannedRun], baseline: list[PlannedRun], by_window: dict[str, read.LossByWindow | None]
) -> dict[int, WindowChanges] | None:
    """Seed → changes of the test windows, for those that finished in both; None where a run has no such
    losses, and for the baseline."""
    changes = {}
    for ours, theirs in zip(runs, baseline, strict=True):
        if ours is not theirs and ours.name in by_window and theirs.name in by_window:
            here, there = by_window[ours.name], by_window[theirs.name]
            if here is None or there is None:
                return None
            changes[ours.seed] = WindowChanges(here.losses - there.losses, here.tokens, here.ids)
    return changes or None


def _notes(
    plan: Plan, measured: dict[str, Json], by_window: dict[str, read.LossByWindow | None]
) -> Iterator[str]:
    """What limits the comparison."""
    threads = sorted({run["threads"] for run in measured.values() if run["finished"]})
    if len(threads) > 1:
        yield f"Seconds do not compare: runs used {' and '.join(map(str, threads))} threads."
    for what, found in _circumstances(plan, measured).items():
        if len(found) > 1:
            differing = "; ".join(sorted(found))
            yield f"The runs are of different {what}: {differing}. Last digits and seconds may differ."
    if lacking := [name for name, losses in by_window.items() if losses is None]:
        count, have = ("1 run", "has") if len(lacking) == 1 else (f"{len(lacking)} runs", "have")
        yield (
            f"{count} of an earlier version {have} no test_losses.parquet ({', '.join(lacking)}): where an "
            "arm or the baseline lacks one, the tail is not known, and with one test set for all seeds "
            "interval and p hold for this test set alone. Remove their folders to run them again."
        )
    for stream, arm in product(plan.streams, plan.arms):
        finished = [run for run in _planned(plan, stream, arm) if measured[run.name]["finished"]]
        idle = [run.seed for run in finished if measured[run.name]["never_selected"]]
        if idle:
            yield (
                f"{arm} on {stream} never selected: with {_seeds(idle, finished)} it rejected hardly any "
                "window and weighed all alike in every step, so its change there is no effect of a selection."
            )


def _circumstances(plan: Plan, measured: dict[str, Json]) -> dict[str, set[str]]:
    """Versions and hardware of the finished runs, as they wrote them down."""
    found: dict[str, set[str]] = {"versions": set(), "hardware": set()}
    for run in plan.runs:
        if measured[run.name]["finished"]:
            about = read.read_document(run.folder / "environment.json")
            versions = {"curriq": about.get("curriq"), **about.get("versions", {})}
            found["versions"].add(", ".join(f"{name} {value}" for name, value in versions.items()))
            found["hardware"].add(str(about.get("hardware")))
    return found


def _seeds(idle: list[int], finished: list[PlannedRun]) -> str:
    """`all 6 seeds`, or `2 of 6 seeds (1, 4)`."""
    if len(idle) == len(finished):
        return f"all {len(idle)} seeds" if len(idle) > 1 else f"seed {idle[0]}"
    return f"{len(idle)} of {len(finished)} seeds ({', '.join(map(str, idle))})"


def assess_arm(runs: list[Json], baseline: list[Json], windows: dict[int, WindowChanges] | None) -> Json:
    """One arm of one stream, over the seeds that finished in both it and the baseline.

    Args:
        runs: what `assess` found in each run of the arm, in the order of the baseline's; the very list
            `baseline` for the baseline itself, which has no difference.
        windows: seed → changes of its test windows; None where they are not known.
    """
    both = zip(runs, baseline, strict=True)
    pairs = [(ours, theirs) for ours, theirs in both if ours["finished"] and theirs["finished"]]

    def paired(name: str) -> list[np.ndarray]:
        return [np.array([run[name] for run in side], dtype=float) for side in zip(*pairs, strict=True)]

    difference = area_difference = None
    if pairs and runs is not baseline:
        changes = None if windows is None else list(windows.values())
        difference = asdict(statistics.summarise_differences(*paired("test_loss"), changes))
        areas = np.subtract(*paired("area"))
        low, high = statistics.interval(areas)
        area_difference = {"mean": float(areas.mean()), "low": low, "high": high}
    finished = [run for run in runs if run["finished"]]
    losses, heights = ([run[name] for run in finished] for name in ("test_loss", "area"))
    return {
        "test_loss": float(np.mean(losses)) if losses else None,
        "test_loss_sd": float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
        "area": float(np.mean(heights)) if heights else None,
        "difference": difference,
        "area_difference": area_difference,
        "tail": None if windows is None else _tail(windows),
        "spent": {name: float(np.mean([run[name] for run in finished])) for name in SPENT if finished},
        "to_target": {axis: _to_target(pairs, axis) if pairs else None for axis in AXES},
        "runs": runs,
    }


def _tail(windows: dict[int, WindowChanges]) -> Json:
    """Share of the test windows that end clearly worse than under the baseline, mean over seeds."""
    by_seed = {str(seed): changes.share_worse for seed, changes in windows.items()}
    shares = np.array(list(by_seed.values()))
    low, high = statistics.interval(shares)
    return {"mean": float(shares.mean()), "low": low, "high": high, "by_seed": by_seed}


def _to_target(pairs: list[tuple[Json, Json]], axis: str) -> Json:
    """Ratios per seed and over them."""
    ratios = {}
    for ours, theirs in pairs:
        curves = *_curve(ours["curve"], axis), *_curve(theirs["curve"], axis)
        ratios[str(ours["seed"])] = statistics.ratio_to_target(*curves)
    by_seed = {seed: {"ratio": ratio.value, "censored": ratio.censored} for seed, ratio in ratios.items()}
    return asdict(statistics.summarise_ratios(list(ratios.values()))) | {"by_seed": by_seed}


def _curve(curve: dict[str, list[float]], axis: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array(curve[axis], dtype=float), np.array(curve["validation_loss"])
