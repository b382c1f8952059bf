"""Is the policy healthy? Entropy, temperature, Q, its learning, its calibration, gradients and time."""

import math

import numpy as np

from curriq.report.chart import Chart, Section, Series
from curriq.report.retrieval import PHASES, RETRIEVAL
from curriq.report.runlog import RunLog, line_charts, lines_of, other_charts, time_layers

LINES = lines_of("policy")
CLIPS = (("θ", "train/grad_norm", "grad_clip"), ("φ", "critic/grad_norm", "q_grad_clip"))
"""Parameters, norm of their gradient, and the setting that bounds it."""
SHOWN_ELSEWHERE = (
    *("critic/q_mean", "critic/q_std", "critic/q_min", "critic/q_max"),
    *("train/loss", "train/mean_loss", "policy/effective_batch_fraction", "data/epoch", "data/windows_read"),
    *("step", "x/", "validation/", "task/", "select/", "theta_reset", "time/"),
    *RETRIEVAL,
)
"""Beginnings of the names of metrics that are in a chart of their own here, or in another section."""
INSIDE = ("time/propose", "time/reward")
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
    charts = line_charts(run, LINES)
    after_beta = 1 + [chart.id for chart in charts].index("beta")
    charts.insert(after_beta, _q_chart(run))
    if run.accepted is not None:  # the charts of the weights within a batch would be flat
        charts = [_accepted_chart(run), *(chart for chart in charts if chart.id not in EVEN)]
    names = run.columns.names()
    times = [name for name in names if name.startswith("time/") and name not in NO_PART]
    others = [name for name in names if not name.startswith(SHOWN_ELSEWHERE)]
    layers = time_layers(run, times, "time/step", INSIDE, "model and critic")
    ranks = run.value_line("Spearman's ρ", *_ranks(run))
    title, y = "Does Q rank windows by their effect?", "rank correlation with the effect"
    blocks = [
        *charts,
        _clip_chart(run),
        Chart("time", "Time per step", "seconds per step", layers, kind="stack"),
        Chart("calibration-rank", title, y, [ranks], levels=[(0.0, "chance")]),
        _calibration_curve(run),
        *other_charts(run, others, LINES),
    ]
    return Section("policy", "Is the policy healthy?", _answer(run), blocks)


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
        beta = run.columns.last("policy/beta") or run.setting("beta", math.nan)
        median = f"{np.median(spread):.2g}"
        answer += f" Q spread over the candidates by {median} nats (median), with β = {beta:.3g}."
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


def _accepted_chart(run: RunLog) -> Chart:
    """How sharp the policy of a stream filter was."""
    share = float(run.setting("num_candidates", np.nan)) / run.columns.full("data/windows_read")
    line = run.value_line("accepted", share, points=SHARE_POINTS)
    title = "Share of the windows read that were accepted"
    note = "Low is a sharp policy. The others were rejected before a forward pass."
    return Chart("accepted", title, "share", [line], note, levels=[(1.0, "no filter")])


def _q_chart(run: RunLog) -> Chart:
    series = []
    if "critic/q_mean" in run.columns:
        (mean,), (spread,) = (run.metric_line(f"critic/q_{name}", "") for name in ("mean", "std"))
        low, high = mean.y - spread.y, mean.y + spread.y
        series = [
            Series("mean ± standard deviation", mean.x, mean.y, low=low, high=high),
            *run.metric_line("critic/q_min", "least and greatest", faint=True),
            *run.metric_line("critic/q_max", "", faint=True),
        ]
    return Chart("q", "Q over the candidates", "nats per token", series)


def _clip_chart(run: RunLog) -> Chart:
    """Share of the steps of each bucket whose gradient was clipped."""
    series = []
    for label, metric, setting in CLIPS:
        rows, values = run.columns.raw(metric)
        bound = run.setting(setting, math.nan)
        if len(values) and math.isfinite(bound):
            series.append(run.value_line(label, (values > bound).astype(float), rows, SHARE_POINTS))
    return Chart("clipped", "Clipped steps", "share of steps", series)


def _calibration_curve(run: RunLog) -> Chart:
    """Mean measured effect in bins of equal size of Q, both less their step's mean."""
    pairs = run.selection.pairs
    series = []
    if len(pairs) >= FEWEST_PAIRS:
        bins = np.array_split(pairs[np.argsort(pairs[:, 0], kind="stable")], BINS)
        x, y = (np.array([part[:, column].mean() for part in bins]) for column in (0, 1))
        error = np.array([1.96 * part[:, 1].std(ddof=1) / math.sqrt(len(part)) for part in bins])
        label = "mean effect, 95 % interval"
        series = [Series(label, {"q": x}, y, low=y - error, high=y + error, dots=True)]
    return Chart(
        "calibration",
        "Calibration of Q",
        "measured effect, less its step's mean",
        series,
        axis="Q, less its step's mean",
        levels=[(0.0, "average window")],
    )
