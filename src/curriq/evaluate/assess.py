"""`comparison.json` from the logs of a comparison's runs; docs/compare.md lists its fields."""

from dataclasses import asdict
from typing import Any

import numpy as np

import curriq
from curriq.config import require
from curriq.evaluate import statistics
from curriq.evaluate.plan import WORKER_LOG, Plan, PlannedRun
from curriq.runlog import read

AXES = {axis.lower(): name for axis, name in read.AXES.items() if axis != "step"}
"""x-axis of a curve → its name in the log."""
TOTALS = ("test_loss", "validation_loss", "windows_proposed", "tokens", "flops", "seconds", "threads")
COPIED = (*TOTALS, "data_fingerprint", "weight_share")
"""Fields of a run's summary that the comparison repeats."""

Json = dict[str, Any]


def assess(plan: Plan, failed: dict[str, str]) -> Json:
    """All results of the finished runs; CurriqError when two of one stream and seed read different data.

    Args:
        failed: name of a run → its last message. Its seed is left out of the arm's pairs.
    """
    measured = {run.name: _measure(run, failed.get(run.name)) for run in plan.runs}
    _require_equal_data(plan, measured)
    streams: Json = {}
    for stream in plan.streams:
        by_arm = {
            arm: [measured[run.name] for run in plan.runs if (run.stream, run.arm) == (stream, arm)]
            for arm in plan.arms
        }
        baseline = by_arm[plan.compare.baseline]
        streams[stream] = {arm: _assess_arm(runs, baseline) for arm, runs in by_arm.items()}
    threads = sorted({run["threads"] for run in measured.values() if run["finished"]})
    note = f"Seconds do not compare: runs used {' and '.join(map(str, threads))} threads."
    return {
        "curriq": curriq.__version__,
        "file": str(plan.file),
        "baseline": plan.compare.baseline,
        "seeds": list(plan.compare.seeds),
        "confidence": statistics.CONFIDENCE,
        "alpha": statistics.ALPHA,
        "power": statistics.POWER,
        "margin_share": statistics.MARGIN_SHARE,
        "arms": plan.arms,
        "streams": streams,
        "failed": {run.name: failed[run.name] for run in plan.runs if run.name in failed},
        "notes": [note] if len(threads) > 1 else [],
    }


def _measure(run: PlannedRun, error: str | None) -> Json:
    """Results and curve of one run, or the error and the log of a failed one."""
    result: Json = {"seed": run.seed, "folder": str(run.folder), "finished": error is None}
    if error is not None:
        return result | {"error": error, "log": str(run.folder / WORKER_LOG)}
    summary = read.read_summary(run.folder)
    rows = [row for row in read.read_metrics(run.folder) if "validation/loss" in row]
    names = AXES | {"validation_loss": "validation/loss"}
    curve = {axis: [row[name] for row in rows] for axis, name in names.items()}
    area = statistics.mean_height(*_curve(curve, "windows"))
    return result | {name: summary[name] for name in COPIED} | {"area": area, "curve": curve}


def _require_equal_data(plan: Plan, measured: dict[str, Json]) -> None:
    first: dict[tuple[str, int], PlannedRun] = {}
    for run in plan.runs:
        if (ours := measured[run.name])["finished"]:
            other = first.setdefault((run.stream, run.seed), run)
            require(
                ours["data_fingerprint"] == measured[other.name]["data_fingerprint"],
                f"{run.folder} and {other.folder} saw different data: files changed between the runs. "
                "Remove the folder of the older one, or of both, and compare again.",
            )


def _assess_arm(runs: list[Json], baseline: list[Json]) -> Json:
    """One arm of one stream, over the seeds that finished in both it and the baseline."""
    both = zip(runs, baseline, strict=True)
    pairs = [(ours, theirs) for ours, theirs in both if ours["finished"] and theirs["finished"]]

    def paired(name: str) -> list[np.ndarray]:
        return [np.array([run[name] for run in side], dtype=float) for side in zip(*pairs, strict=True)]

    difference = area_difference = None
    if pairs and runs is not baseline:
        difference = asdict(statistics.summarise_differences(*paired("test_loss")))
        areas = np.subtract(*paired("area"))
        low, high = statistics.bootstrap_interval(areas)
        area_difference = {"mean": float(areas.mean()), "low": low, "high": high}
    losses, heights = ([run[name] for run in runs if run["finished"]] for name in ("test_loss", "area"))
    return {
        "test_loss": float(np.mean(losses)) if losses else None,
        "test_loss_sd": float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
        "area": float(np.mean(heights)) if heights else None,
        "difference": difference,
        "area_difference": area_difference,
        "to_target": {axis: _to_target(pairs, axis) if pairs else None for axis in AXES},
        "runs": runs,
    }


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
