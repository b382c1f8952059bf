"""Is the policy healthy? Entropy, temperature, Q, its learning, its calibration, gradients and time."""

import math

import numpy as np

from curriq.report.chart import Chart, Section, Series
from curriq.report.retrieval import PHASES, RETRIEVAL
from curriq.report.runlog import Lines, RunLog, line_charts, other_charts, time_layers

LINES = (
    Lines("entropy", "Entropy of the policy", "policy/entropy", level="log N"),
    Lines("effective-batch", "Effective batch", "policy/effective_batch_size", level="N"),
    Lines("max-weight", "Greatest weight", "policy/max_weight", level="1/N"),
    Lines("beta", "Temperature β", "policy/beta", log=True),
    Lines("soft-value", "Soft value", "critic/soft_value"),
    Lines("reward", "Reward", "reward"),
    Lines("td-loss", "TD loss", "critic/td_loss replay_loss", log=True),
    Lines("td-target", "TD target and prediction", "critic/td_target q_pred"),
    Lines("grad-norm", "Gradient norm of θ", "train/grad_norm", level="--grad-clip", log=True),
    Lines("q-grad-norm", "Gradient norm of φ", "critic/grad_norm", level="--q-grad-clip", log=True),
    Lines("lr", "Learning rate", "train/lr"),
    Lines(
        "gate-calibration",
        "Calibration gate: rank correlation of Q with the effects",
        "gate/rank_correlation calibration calibration_error",
        "Spearman's ρ",
        "chance",
    ),
    Lines("gate-confidence", "Calibration gate: confidence", "gate/confidence target_fraction", "share"),
    Lines(
        "target-accept-rate",
        "Windows of the target that the filter accepts",
        "policy/target_accept_rate",
        "share",
        "--min-target-accept-rate",
    ),
    Lines("held-out-forwards", "Cost of rewards and probes", "held_out/forwards"),
)
NOTES = {
    "gate-calibration": "At each probe, its running mean, and the standard error of that mean.",
    "gate-confidence": "Without evidence that Q ranks windows the target fraction stays 1: plain training.",
}
AFTER_BETA = 1 + [lines.id for lines in LINES].index("beta")
CLIPS = (("θ", "train/grad_norm", "optim", "grad_clip"), ("φ", "critic/grad_norm", "critic", "q_grad_clip"))
"""Parameters, norm of their gradient, and section and name of the setting that bounds it."""
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
    n = run.setting("train", "num_candidates")
    bounds = {"--" + name.replace("_", "-"): run.setting(section, name) for *_, section, name in CLIPS}
    levels = bounds | {
        "N": n,
        "log N": n and math.log(n),
        "1/N": n and 1 / n,
        "chance": 0.0,
        "--min-target-accept-rate": run.setting("critic", "min_target_accept_rate"),
    }
    charts = line_charts(run, LINES, levels, NOTES)
    charts.insert(AFTER_BETA, _q_chart(run))
    if run.accepted is not None:
        charts = [_accepted_chart(run), *(chart for chart in charts if chart.id not in EVEN)]
    names = run.columns.names()
    times = [name for name in names if name.startswith("time/") and name not in NO_PART]
    others = [name for name in names if not name.startswith(SHOWN_ELSEWHERE)]
    layers = time_layers(run, times, "time/step", INSIDE, "model and critic")
    blocks = [
        *charts,
        _clip_chart(run),
        Chart("time", "Time per step", "seconds per step", layers, kind="stack"),
        _calibration_rank(run),
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
        beta = run.columns.last("policy/beta") or run.setting("critic", "beta", math.nan)
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
    share = float(run.setting("train", "num_candidates", np.nan)) / run.columns.full("data/windows_read")
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
    for label, metric, *setting in CLIPS:
        rows, values = run.columns.raw(metric)
        bound = run.setting(*setting, math.nan)
        if len(values) and math.isfinite(bound):
            series.append(run.value_line(label, (values > bound).astype(float), rows, SHARE_POINTS))
    return Chart("clipped", "Clipped steps", "share of steps", series)


def _calibration_rank(run: RunLog) -> Chart:
    line, title = run.value_line("Spearman's ρ", *_ranks(run)), "Does Q rank windows by their effect?"
    y = "rank correlation with the effect"
    return Chart("calibration-rank", title, y, [line], levels=[(0.0, "chance")])


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
