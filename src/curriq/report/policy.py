"""Is the policy healthy? Entropy, temperature, Q, its learning, its calibration, gradients and time."""

import math

import numpy as np

from curriq.report.chart import Section, Series
from curriq.report.explore import PHASES, RETRIEVAL
from curriq.report.runlog import RunLog, charts_of, time_layers

CLIPS = (("θ", "train/grad_norm", "grad_clip"), ("φ", "critic/grad_norm", "q_grad_clip"))
"""Parameters, norm of their gradient, and the setting that bounds it."""
SHOWN_ELSEWHERE = (
    *("critic/q_mean", "critic/q_std", "critic/q_min", "critic/q_max"),
    *("critic/recovered_scale", "critic/effect_correlation"),
    *("train/loss", "train/mean_loss", "policy/effective_batch_fraction", "data/epoch", "data/windows_read"),
    *("step", "x/", "validation/", "task/", "select/", "theta_reset", "time/"),
    *RETRIEVAL,
)
"""Beginnings of the names of metrics that are in a chart of their own here, or in another section."""
INSIDE = ("time/propose", "time/train", "time/probe", "time/reward")
"""Parts of `time/step`."""
NO_PART = ("time/step", "time/windows_per_second", *PHASES)
EVEN = ("entropy", "effective-batch", "max-weight")
"""Charts of the weights within a batch, which are uniform where a stream filter is the policy."""
SHARE_POINTS = 50
"""Points of a line over shares of steps."""
BINS = 10
"""Bins of the reliability curve."""
FEWEST_PAIRS = 50


def policy_health(run: RunLog) -> Section:
    """Section 3 of the report. A metric that the run did not log is left out; one without a place of its own
    is drawn at the end, so that a new metric needs no change here."""
    names = run.columns.names()
    times = [name for name in names if name.startswith("time/") and name not in NO_PART]
    own = {
        "q": _q_lines(run),
        "credit-signal": _scale_line(run),
        "clipped": _clip_lines(run),
        "time": time_layers(run, times, "time/step", INSIDE, "rest of the step"),
        "calibration-rank": [run.value_line("Spearman's ρ", *_ranks(run))],
        "calibration": _calibration_curve(run),
    }
    if run.accepted is not None:
        share = float(run.setting("num_candidates", np.nan)) / run.columns.full("data/windows_read")
        own |= {id: [] for id in EVEN}
        own["accepted"] = [run.value_line("accepted", share, points=SHARE_POINTS)]
    others = [name for name in names if not name.startswith(SHOWN_ELSEWHERE)]
    charts = charts_of(run, "policy", own, others)
    return Section("policy", "Is the policy healthy?", _answer(run), charts)


def _answer(run: RunLog) -> str:
    _, fractions = run.columns.raw("policy/effective_batch_fraction")
    if not len(fractions):
        return "The run logged no policy."
    fraction = fractions.mean()
    judged = "nearly uniform" if fraction > 0.95 else "between uniform and greedy"
    if fraction < 0.1:
        judged = "on a few windows only"
    answer = f"The effective batch was {fraction:.0%} of N on average: {judged}."
    if run.accepted is not None:
        answer = (
            "The policy was applied before the forward pass: the stream filter accepted "
            f"{run.accepted:.0%} of the windows read. Accepted windows are weighed uniformly, so the "
            "effective batch is always N."
        )
    _, spread = run.columns.raw("critic/q_std")
    if len(spread):
        beta = run.columns.last("policy/beta")
        if beta is None:  # logged where it is finite
            beta = run.setting("beta", math.nan) if run.setting("temperature", "") == "fixed" else math.inf
        median = f"{np.median(spread):.2g}"
        had = "an infinite β: Q decided nothing" if beta == math.inf else f"β = {beta:.3g}"
        answer += f" Q spread over the candidates by {median} nats (median), with {had}."
    ranks, _ = _ranks(run)
    if len(ranks):
        answer += (
            f" Q and the measured effect of a window correlate by {ranks.mean():+.2f} (Spearman, mean over "
            f"{len(ranks)} steps; 0 is chance)."
        )
    return answer


def _ranks(run: RunLog) -> tuple[np.ndarray, np.ndarray]:
    """Rank correlation of Q with the measured effects where it was measured, and the rows of the log."""
    ranks = run.selection.per_step.get("rank/effect", np.empty(0))
    known = ~np.isnan(ranks)
    return ranks[known], run.columns.rows_of(run.selection.step[known])


def _q_lines(run: RunLog) -> list[Series]:
    if "critic/q_mean" not in run.columns:
        return []
    (mean,), (spread,) = (run.metric_line(f"critic/q_{name}", "") for name in ("mean", "std"))
    low, high = mean.y - spread.y, mean.y + spread.y
    return [
        Series("mean ± standard deviation", mean.x, mean.y, low=low, high=high),
        *run.metric_line("critic/q_min", "least and greatest", faint=True),
        *run.metric_line("critic/q_max", "", faint=True),
    ]


def _scale_line(run: RunLog) -> list[Series]:
    """The recovered scale with a band of two standard errors."""
    if "critic/recovered_scale" not in run.columns:
        return []
    (scale,), (error,) = (run.metric_line(f"critic/recovered_scale{end}", "") for end in ("", "_error"))
    low, high = scale.y - 2 * error.y, scale.y + 2 * error.y
    return [Series("slope ± 2 standard errors", scale.x, scale.y, low=low, high=high)]


def _clip_lines(run: RunLog) -> list[Series]:
    """Share of the steps of each bucket whose gradient was clipped."""
    series = []
    for label, metric, setting in CLIPS:
        rows, values = run.columns.raw(metric)
        bound = run.setting(setting, math.nan)
        if len(values) and math.isfinite(bound):
            series.append(run.value_line(label, (values > bound).astype(float), rows, SHARE_POINTS))
    return series


def _calibration_curve(run: RunLog) -> list[Series]:
    """Mean measured effect in bins of equal size of Q, both less their step's mean."""
    pairs = run.selection.pairs
    if len(pairs) < FEWEST_PAIRS:
        return []
    bins = np.array_split(pairs[np.argsort(pairs[:, 0], kind="stable")], BINS)
    x, y = (np.array([part[:, column].mean() for part in bins]) for column in (0, 1))
    error = np.array([1.96 * part[:, 1].std(ddof=1) / math.sqrt(len(part)) for part in bins])
    return [Series("mean effect, 95 % interval", {"q": x}, y, low=y - error, high=y + error, dots=True)]
