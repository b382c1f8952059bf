"""Did it help? Curves with seed bands, verdicts and ratios of a comparison; or the curves of some runs."""

import math
from typing import Any

import numpy as np

from curriq.report.chart import Block, Chart, Forest, Interval, Section, Series, Table
from curriq.report.comparison import verdict
from curriq.report.runlog import RunLog
from curriq.report.tasks import evaluated, task_charts

Json = dict[str, Any]
CURVE_AXES = {
    "windows": "windows",
    "read": "read",
    "tokens": "tokens",
    "FLOPs": "flops",
    "seconds": "seconds",
}
"""x-axis of a chart → its name in comparison.json."""
READ_NOTE = " A steered stream reads windows that it passes over, without a pass through the model."
TARGET_AXES = {"windows": "Windows seen", "read": "Windows read", "flops": "FLOPs", "seconds": "Seconds"}


def comparison_helped(result: Json, runs: list[RunLog]) -> Section:
    """Section 1 for the result of `curriq compare`."""
    blocks: list[Block] = []
    sentences = []
    several = len(result["streams"]) > 1
    for stream, arms in result["streams"].items():
        suffix = f" ({stream})" if several else ""
        sentences.append(_verdict_sentence(arms, result["baseline"], suffix))
        blocks.append(_curves(stream, arms, result["baseline"], suffix))
        blocks.append(_differences(stream, arms, result["baseline"], suffix))
        blocks += [_ratios(stream, arms, result["baseline"], axis, suffix) for axis in _reported(arms)]
        blocks.append(_table(arms, result["baseline"], suffix))
    blocks += [*task_charts(runs), *evaluated(runs)]
    for name, said in result["failed"].items():
        blocks.append(f"Failed: {name}: {said}")
    blocks += list(result["notes"])
    return Section(id="did-it-help", title="Did it help?", answer=" ".join(sentences), blocks=blocks)


def runs_helped(runs: list[RunLog]) -> Section:
    """Section 1 for one run, or some runs side by side."""
    series = []
    for index, run in enumerate(runs):
        thin = run.columns.thinned("validation/loss", run.detail.points)
        series.append(Series(label=run.label, x=thin.x, y=thin.mean, style=index))
    loss = Chart(
        id="validation",
        title="Held-out loss",
        y="validation loss, nats per token",
        series=series,
        note="On the validation set of the target, without dropout.",
    )
    rows = []
    for run in runs:
        test, last = run.summary.get("test_loss"), run.columns.last("validation/loss")
        rows.append(
            [
                run.label,
                run.selector,
                str(run.setting("train", "seed", "?")),
                f"{run.columns.rows:,}",
                "–" if last is None else f"{last:.4f}",
                "–" if test is None else f"{test:.4f}",
                "–" if test is None else f"{math.exp(min(test, 700)):.2f}",
            ]
        )
    header = ["run", "method", "seed", "steps", "validation loss", "test loss", "test perplexity"]
    table = Table(title="Where each run stands", header=header, rows=rows)
    return Section(
        id="did-it-help",
        title="Did it help?",
        answer=_unpaired_answer(runs),
        blocks=[loss, table, *task_charts(runs), *evaluated(runs)],
    )


def _unpaired_answer(runs: list[RunLog]) -> str:
    advice = (
        "Whether the method helped needs the same run with another selector, and seeds: `curriq compare "
        "examples/compare.toml` runs and judges that."
    )
    if len(runs) > 1:
        return f"{len(runs)} runs side by side, without a test of their differences. {advice}"
    (run,) = runs
    _, losses = run.columns.raw("validation/loss")
    if not len(losses):
        return f"The run has not been evaluated yet. {advice}"
    test = run.summary.get("test_loss")
    end = "" if test is None else f" The test loss of the final model is {test:.4f} nats per token."
    if len(losses) == 1:
        return f"The validation loss was {losses[0]:.3f} nats per token at its first measurement. {advice}"
    return (
        f"The validation loss went from {losses[0]:.3f} to {losses[-1]:.3f} nats per token.{end} One run "
        f"alone cannot say whether its curriculum helped. {advice}"
    )


def _verdict_sentence(arms: Json, baseline: str, suffix: str) -> str:
    said = []
    for name, arm in arms.items():
        difference = arm["difference"]
        if difference is None:
            continue
        change = f"{difference['mean']:+.4f}".replace("-", "−")
        said.append(
            f"{name} {change} nats of test loss against {baseline}, p = {difference['p']:.3f}: "
            + verdict(difference).replace(": ", ", ")
        )
    return ("; ".join(said) or "No pair of runs has finished") + f"{suffix}."


def _curves(stream: str, arms: Json, baseline: str, suffix: str) -> Chart:
    series = []
    levels = []
    for index, (name, arm) in enumerate(arms.items()):
        curves = [run["curve"] for run in arm["runs"] if run["finished"]]
        if not curves:
            continue
        losses = np.array([curve["validation_loss"] for curve in curves])
        x = {
            axis: np.mean([curve[key] for curve in curves], axis=0)
            for axis, key in CURVE_AXES.items()
            if key in curves[0]
        }
        mean, low, high = losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)
        series.append(Series(label=name, x=x, y=mean, low=low, high=high, style=index))
        if name == baseline:
            levels.append((float(mean[-1]), f"final loss of {baseline}"))
    seeds = max(sum(run["finished"] for run in arm["runs"]) for arm in arms.values())
    return Chart(
        id=f"curves-{stream}",
        title=f"Held-out loss{suffix}",
        y="validation loss, nats per token",
        series=series,
        levels=levels,
        note=f"Mean over {seeds} seed{'s' if seeds != 1 else ''}; the band is the range of the seeds.",
    )


def _differences(stream: str, arms: Json, baseline: str, suffix: str) -> Forest:
    rows = []
    for index, (name, arm) in enumerate(arms.items()):
        if (difference := arm["difference"]) is not None:
            rows.append(
                Interval(
                    label=name,
                    mean=difference["mean"],
                    low=difference["low"],
                    high=difference["high"],
                    note=difference["verdict"],
                    style=index,
                )
            )
    return Forest(
        id=f"difference-{stream}",
        title=f"Test loss against {baseline}{suffix}",
        x="difference, nats per token (less is better)",
        rows=rows,
        neutral=0.0,
        note="Mean of the paired differences with its 95 % interval.",
    )


def _reported(arms: Json) -> list[str]:
    """The axes to draw ratios on; windows read only where some arm reads more than it sees."""
    costs = [arm["to_target"] for arm in arms.values()]
    reads = any("read" in cost and cost["read"] != cost["windows"] for cost in costs)
    return [axis for axis in TARGET_AXES if axis != "read" or reads]


def _ratios(stream: str, arms: Json, baseline: str, axis: str, suffix: str) -> Forest:
    rows = []
    for index, (name, arm) in enumerate(arms.items()):
        ratio = arm["to_target"][axis]
        if ratio is None or name == baseline:
            continue
        beyond = "> " if ratio["censored"] else ""
        rows.append(
            Interval(
                label=name,
                mean=ratio["mean"],
                low=ratio["low"],
                high=ratio["high"],
                censored=bool(ratio["censored"]),
                note=f"{beyond}{ratio['mean']:.2f}×",
                style=index,
            )
        )
    return Forest(
        id=f"ratio-{axis}-{stream}",
        title=f"{TARGET_AXES[axis]} to reach {baseline}'s final loss{suffix}",
        x=f"over what {baseline} needed (less is better)",
        rows=rows,
        neutral=1.0,
        note="Geometric mean over the seeds with its 95 % interval; an arrow is a bound from below, where "
        "some seed never got there." + READ_NOTE * (axis == "read"),
    )


def _table(arms: Json, baseline: str, suffix: str) -> Table:
    rows = []
    for name, arm in arms.items():
        difference = arm["difference"]
        finished = str(sum(run["finished"] for run in arm["runs"]))
        mean = "–" if arm["test_loss"] is None else f"{arm['test_loss']:.4f}"
        if difference is None:
            rows.append([name, finished, mean, "–", "–", "–", "baseline" if name == baseline else "no pairs"])
            continue
        low, high = difference["low"], difference["high"]
        interval = "–" if low is None else f"[{low:+.4f}, {high:+.4f}]".replace("-", "−")
        change = f"{difference['mean']:+.4f}".replace("-", "−")
        rows.append([name, finished, mean, change, interval, f"{difference['p']:.3f}", verdict(difference)])
    header = ["arm", "seeds", "test loss", "change", "95 % interval", "p", "verdict"]
    return Table(
        title=f"Verdict{suffix}",
        header=header,
        rows=rows,
        note="Paired by seed, exact sign-flip test; docs/compare.md says how to read it.",
    )
