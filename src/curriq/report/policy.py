"""Is the policy healthy? Entropy, temperature, Q, its learning, its calibration, gradients and time."""

import math

import numpy as np

from curriq.report.chart import Block, Chart, Section, Series
from curriq.report.lines import Lines, line_charts, other_charts
from curriq.report.retrieval import PHASES, RETRIEVAL
from curriq.report.runlog import RunLog

LINES = (
    Lines("entropy", "Entropy of the policy", ("policy/entropy",), "log N"),
    Lines("effective-batch", "Effective batch", ("policy/effective_batch_size",), "N"),
    Lines("max-weight", "Greatest weight", ("policy/max_weight",), "1/N"),
    Lines("beta", "Temperature β", ("policy/beta",), log=True),
    Lines("soft-value", "Soft value", ("critic/soft_value",)),
    Lines("reward", "Reward", ("reward",)),
    Lines("td-loss", "TD loss", ("critic/td_loss", "critic/replay_loss"), log=True),
    Lines("td-target", "TD target and prediction", ("critic/td_target", "critic/q_pred")),
    Lines("grad-norm", "Gradient norm of θ", ("train/grad_norm",), "--grad-clip", log=True),
    Lines("q-grad-norm", "Gradient norm of φ", ("critic/grad_norm",), "--q-grad-clip", log=True),
    Lines("lr", "Learning rate", ("train/lr",)),
    Lines(
        "governor-rank",
        "What the governor knows of Q",
        ("gate/rank_correlation", "gate/calibration", "gate/calibration_error"),
        "chance",
        y="Spearman's ρ",
        note="Rank correlation of Q with the measured effects at each probe, its running mean, and the "
        "standard error of that.",
    ),
    Lines(
        "governor-target",
        "What the governor asks for",
        ("gate/confidence", "gate/target_fraction"),
        y="share",
        note="Without evidence that Q ranks windows the target stays at 1, which is plain training.",
    ),
    Lines("held-out-forwards", "Cost of rewards and probes", ("held_out/forwards",)),
)
CLIPS = {"--grad-clip": ("optim", "grad_clip"), "--q-grad-clip": ("critic", "q_grad_clip")}
"""Bound of a gradient norm → section and name of its setting."""
COVERED = (
    *(f"critic/q_{name}" for name in ("mean", "std", "min", "max")),
    *("train/loss", "train/mean_loss", "policy/effective_batch_fraction", "data/epoch", "data/windows_read"),
)
"""Metrics of a chart that is none of `LINES`, or of another section."""
SHOWN_ELSEWHERE = (
    "step",
    "x/",
    "validation/",
    "task/",
    "select/",
    "theta_reset",
    "time/",
    *RETRIEVAL,
)
"""Metrics of the other sections."""
EVEN = ("entropy", "effective-batch", "max-weight")
"""Charts of the weights within a batch, which are even where the stream is steered."""
SHARE_POINTS = 50
"""Points of a line over shares of steps."""
BINS = 10
"""Bins of the reliability curve."""
FEWEST_PAIRS = 50


def policy_health(run: RunLog) -> Section:
    """Section 3 of the report. A metric that the run did not log is left out; one that nobody has placed
    is drawn at the end, so that a new metric needs no change here."""
    charts, drawn = _placed(run)
    blocks: list[Block] = [*charts, _calibration_rank(run), _calibration_curve(run), *_others(run, drawn)]
    return Section(id="policy", title="Is the policy healthy?", answer=_answer(run), blocks=blocks)


def _answer(run: RunLog) -> str:
    _, fractions = run.columns.raw("policy/effective_batch_fraction")
    if not len(fractions):
        return "The run logged no policy."
    fraction = fractions.mean()
    judged = (
        "nearly uniform"
        if fraction > 0.95
        else "on a few windows only"
        if fraction < 0.1
        else "between uniform and greedy"
    )
    parts = [f"The effective batch was {fraction:.0%} of N on average: {judged}."]
    if run.taken is not None:
        parts = [
            f"The policy was spent on the stream, before the forward pass: it took {run.taken:.0%} of the "
            "windows read. What it took is weighed evenly, so the effective batch is N and says nothing."
        ]
    _, spread = run.columns.raw("critic/q_std")
    if len(spread):
        beta = run.columns.last("policy/beta") or run.setting("critic", "beta", math.nan)
        parts.append(
            f"Q spread over the candidates by {np.median(spread):.2g} nats (median), with β = {beta:.3g}."
        )
    ranks = run.selection.per_step.get("rank/effect")
    known = ranks[~np.isnan(ranks)] if ranks is not None else np.empty(0)
    if len(known):
        parts.append(
            f"Q and the measured effect of a window correlate by {known.mean():+.2f} (Spearman, mean over "
            f"{len(known)} steps; 0 is chance)."
        )
    return " ".join(parts)


def _placed(run: RunLog) -> tuple[list[Chart], set[str]]:
    """The charts with a place of their own, and the metrics that are shown by them or belong elsewhere."""
    n = run.setting("train", "num_candidates")
    bounds = {"N": n, "log N": n and math.log(n), "1/N": n and 1 / n} | {
        name: run.setting(*where) for name, where in CLIPS.items()
    }
    charts = line_charts(run, LINES, bounds | {"chance": 0.0})
    charts.insert(1 + [lines.id for lines in LINES].index("beta"), _q_chart(run))
    if run.taken is not None:
        charts = [_taken_chart(run), *(chart for chart in charts if chart.id not in EVEN)]
    clipped = _clip_chart(run, *(run.setting(*where, math.nan) for where in CLIPS.values()))
    drawn = {*COVERED, *(metric for lines in LINES for metric in lines.metrics)}
    return [*charts, clipped, _time_chart(run)], drawn


def _taken_chart(run: RunLog) -> Chart:
    """How sharp the policy of a steered stream was."""
    read = run.columns.full("data/windows_read")
    steps = run.columns.full("step").astype(int)
    x, share = run.thin_steps(
        float(run.setting("train", "num_candidates", np.nan)) / read, steps, SHARE_POINTS
    )
    return Chart(
        id="taken",
        title="Windows taken out of those read",
        y="share",
        series=[Series(label="taken", x=x, y=share)],
        levels=[(1.0, "plain stream")],
        note="Low is a sharp policy. The rest was passed over without a pass through the model.",
    )


def _q_chart(run: RunLog) -> Chart:
    series = []
    if "critic/q_mean" in run.columns:
        mean, spread = (
            run.columns.thinned(f"critic/q_{name}", run.detail.points) for name in ("mean", "std")
        )
        low, high = (run.columns.thinned(f"critic/q_{name}", run.detail.points) for name in ("min", "max"))
        series = [
            Series(
                label="mean ± standard deviation",
                x=mean.x,
                y=mean.mean,
                low=mean.mean - spread.mean,
                high=mean.mean + spread.mean,
            ),
            Series(label="least and greatest", x=low.x, y=low.mean, faint=True),
            Series(label="", x=high.x, y=high.mean, faint=True),
        ]
    return Chart(id="q", title="Q over the candidates", y="nats per token", series=series)


def _clip_chart(run: RunLog, clip: float, q_clip: float) -> Chart:
    """Share of the steps of each bucket whose gradient was clipped."""
    series = []
    for label, metric, bound in (("θ", "train/grad_norm", clip), ("φ", "critic/grad_norm", q_clip)):
        where, values = run.columns.raw(metric)
        if len(values) and math.isfinite(bound):
            steps = run.columns.full("step")[where].astype(int)
            x, share = run.thin_steps((values > bound).astype(float), steps, SHARE_POINTS)
            series.append(Series(label=label, x=x, y=share))
    return Chart(id="clipped", title="Clipped steps", y="share of steps", series=series)


def _time_chart(run: RunLog) -> Chart:
    """Seconds per step, by what they went to."""
    names = [
        n
        for n in run.columns.names()
        if n.startswith("time/") and not n.endswith("per_second") and n not in PHASES
    ]
    inside = [n for n in ("time/propose", "time/reward") if n in names]
    steps = run.columns.full("step").astype(int)
    parts = {n.removeprefix("time/"): np.nan_to_num(run.columns.full(n)) for n in names}
    if "step" in parts:
        rest = parts.pop("step") - sum(parts[n.removeprefix("time/")] for n in inside)
        parts = {"model and critic": np.maximum(rest, 0), **parts}
    series = []
    for label, values in parts.items():
        x, mean = run.thin_steps(values, steps)
        series.append(Series(label=label, x=x, y=mean))
    return Chart(id="time", title="Time per step", y="seconds", series=series, kind="stack")


def _calibration_rank(run: RunLog) -> Chart:
    ranks = run.selection.per_step.get("rank/effect")
    series = []
    if ranks is not None and (~np.isnan(ranks)).any():
        known = ~np.isnan(ranks)
        x, mean = run.thin_steps(ranks[known], run.selection.step[known])
        series = [Series(label="Spearman's ρ", x=x, y=mean)]
    return Chart(
        id="calibration-rank",
        title="Does Q rank windows by their effect?",
        y="rank correlation with the effect",
        series=series,
        levels=[(0.0, "chance")],
    )


def _calibration_curve(run: RunLog) -> Chart:
    """Mean measured effect in bins of equal size of Q, both less their step's mean."""
    pairs = run.selection.pairs
    series = []
    if len(pairs) >= FEWEST_PAIRS:
        bins = np.array_split(pairs[np.argsort(pairs[:, 0], kind="stable")], BINS)
        x = np.array([part[:, 0].mean() for part in bins])
        y = np.array([part[:, 1].mean() for part in bins])
        error = np.array([1.96 * part[:, 1].std(ddof=1) / math.sqrt(len(part)) for part in bins])
        series = [
            Series(
                label="mean effect, 95 % interval", x={"q": x}, y=y, low=y - error, high=y + error, dots=True
            )
        ]
    return Chart(
        id="calibration",
        title="Calibration of Q",
        y="measured effect, less its step's mean",
        axis="Q, less its step's mean",
        series=series,
        levels=[(0.0, "average window")],
    )


def _others(run: RunLog, drawn: set[str]) -> list[Block]:
    """What is placed nowhere, in the order of the log."""
    rest = [
        name for name in run.columns.names() if name not in drawn and not name.startswith(SHOWN_ELSEWHERE)
    ]
    return [*other_charts(run, rest)]
