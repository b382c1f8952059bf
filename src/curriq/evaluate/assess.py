"""`comparison.json` from the logs of a comparison's runs; docs/compare.md lists its fields."""

import dataclasses
from typing import Any

import numpy as np

import curriq
from curriq.errors import CurriqError
from curriq.evaluate import statistics
from curriq.evaluate.plan import WORKER_LOG, Plan, PlannedRun
from curriq.runlog.read import read_metrics, read_summary

AXES = {
    "windows": "x/windows_proposed",
    "read": "x/windows_read",
    "tokens": "x/tokens",
    "flops": "x/flops",
    "seconds": "x/seconds",
}
"""x-axis of a curve → its name in the log."""

TOTALS = ("test_loss", "validation_loss", "windows_proposed", "tokens", "flops", "seconds", "threads")
COPIED = (*TOTALS, "data_fingerprint", "weight_share")
"""Fields of a run's summary that the comparison repeats."""

Json = dict[str, Any]
Pairs = list[tuple[Json, Json]]


def assess(plan: Plan, failed: dict[str, str]) -> Json:
    """All results of the finished runs.

    Args:
        plan: what was compared.
        failed: name of a run → its last message. Its seed is left out of the arm's pairs.

    Raises:
        CurriqError: two runs of one stream and seed read different data.
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
        "notes": _notes(measured),
    }


def _measure(run: PlannedRun, error: str | None) -> Json:
    """Results and curve of one run, or the error and the log of a failed one."""
    result: Json = {"seed": run.seed, "folder": str(run.folder), "finished": error is None}
    if error is not None:
        return result | {"error": error, "log": str(run.folder / WORKER_LOG)}
    summary = read_summary(run.folder)
    rows = [row for row in read_metrics(run.folder) if "validation/loss" in row]
    curve = {axis: [row[name] for row in rows] for axis, name in AXES.items()}
    curve["validation_loss"] = [row["validation/loss"] for row in rows]
    area = statistics.mean_height(*_curve(curve, "windows"))
    return result | {name: summary[name] for name in COPIED} | {"area": area, "curve": curve}


def _require_equal_data(plan: Plan, measured: dict[str, Json]) -> None:
    first: dict[tuple[str, int], PlannedRun] = {}
    for run in plan.runs:
        if not measured[run.name]["finished"]:
            continue
        other = first.setdefault((run.stream, run.seed), run)
        if measured[run.name]["data_fingerprint"] != measured[other.name]["data_fingerprint"]:
            raise CurriqError(
                f"{run.folder} and {other.folder} saw different data: files changed between the runs. "
                "Remove the folder of the older one, or of both, and compare again."
            )


def _assess_arm(runs: list[Json], baseline: list[Json]) -> Json:
    """One arm of one stream, over the seeds that finished in both it and the baseline."""
    pairs = [
        (ours, theirs)
        for ours, theirs in zip(runs, baseline, strict=True)
        if ours["finished"] and theirs["finished"]
    ]
    finished = [run for run in runs if run["finished"]]
    losses = [run["test_loss"] for run in finished]
    compared = [] if runs is baseline else pairs
    return {
        "test_loss": float(np.mean(losses)) if losses else None,
        "test_loss_sd": float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
        "area": float(np.mean([run["area"] for run in finished])) if finished else None,
        "difference": _difference(compared) if compared else None,
        "area_difference": _area_difference(compared) if compared else None,
        "to_target": {axis: _to_target(pairs, axis) if pairs else None for axis in AXES},
        "runs": runs,
    }


def _columns(pairs: Pairs, name: str) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = (np.array([pair[side][name] for pair in pairs], dtype=float) for side in (0, 1))
    return ours, theirs


def _difference(pairs: Pairs) -> Json:
    """Final test loss, with the verdict."""
    return dataclasses.asdict(statistics.summarise_differences(*_columns(pairs, "test_loss")))


def _area_difference(pairs: Pairs) -> Json:
    differences = np.subtract(*_columns(pairs, "area"))
    low, high = statistics.bootstrap_interval(differences)
    return {"mean": float(differences.mean()), "low": low, "high": high}


def _to_target(pairs: Pairs, axis: str) -> Json:
    """Ratios per seed and over them."""
    ratios = {
        str(ours["seed"]): statistics.ratio_to_target(
            *_curve(ours["curve"], axis), *_curve(theirs["curve"], axis)
        )
        for ours, theirs in pairs
    }
    by_seed = {seed: {"ratio": ratio.value, "censored": ratio.censored} for seed, ratio in ratios.items()}
    return dataclasses.asdict(statistics.summarise_ratios(list(ratios.values()))) | {"by_seed": by_seed}


def _curve(curve: dict[str, list[float]], axis: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array(curve[axis], dtype=float), np.array(curve["validation_loss"])


def _notes(measured: dict[str, Json]) -> list[str]:
    threads = sorted({run["threads"] for run in measured.values() if run["finished"]})
    note = f"Seconds do not compare: runs used {' and '.join(map(str, threads))} threads."
    return [note] if len(threads) > 1 else []
