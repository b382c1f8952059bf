"""A comparison as people read it: charts and tables of each stream, for the page, a terminal and pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curriq.config import missing_extra
from curriq.report.chart import Chart, Forest, Interval, Series, Table, fixed
from curriq.report.figures import print_table, save_figure
from curriq.report.look import AXIS_LABELS

if TYPE_CHECKING:
    from rich.console import Console

Json = dict[str, Any]
RATIO_AXES = ("windows", "read", "FLOPs", "seconds")
"""Axes on which the cost to reach the baseline's loss is drawn; in comparison.json in small letters."""


def print_comparison(result: Json, console: "Console | None" = None) -> None:
    """Print two tables per stream of comparison.json, each within 80 columns, and what went wrong."""
    from rich.console import Console
    from rich.markup import escape

    console = console or Console(highlight=False)
    for stream in streams_of(result):
        console.print()
        print_table(console, stream.loss_table())
        print_table(console, stream.cost_table())
    for name, message in result["failed"].items():
        stream, _, run = name.partition("/")
        runs = [entry for arm in result["streams"][stream].values() for entry in arm["runs"]]
        (log,) = (e["log"] for e in runs if not e["finished"] and Path(e["folder"]).name == run)
        console.print(f"[red]failed[/red]  {escape(f'{name}: {message} See {log}')}", soft_wrap=True)
    for note in result["notes"]:
        console.print(f"[yellow]note[/yellow]    {escape(note)}", soft_wrap=True)


def save_curves(result: Json, folder: Path) -> list[str]:
    """Write curves-STREAM.png and .svg; returns one line per picture, or a note when matplotlib lacks."""
    lines = []
    for stream in streams_of(result):
        chart = stream.curves()
        if not chart:
            lines.append(f"curves   none for {stream.name}: no run finished.")
            continue
        try:
            path = save_figure(chart, folder / f"{chart.id}.png", "windows")
        except ImportError:
            missing = missing_extra("drawing them", "matplotlib", "report", "use the numbers")
            return [f"curves   none: {missing}"]
        lines.append(f"curves   {path} (and .svg)")
    return lines


def streams_of(result: Json) -> "list[Stream]":
    """The streams of a comparison.json."""
    several = len(result["streams"]) > 1
    return [
        Stream(name, arms, result["baseline"], f" ({name})" if several else "")
        for name, arms in result["streams"].items()
    ]


@dataclass(frozen=True)
class Stream:
    """What the arms reached on one stream.

    Attributes:
        arms: by name, as in comparison.json.
        suffix: of the titles, to tell streams apart.
    """

    name: str
    arms: Json
    baseline: str
    suffix: str

    def sentence(self) -> str:
        """The verdicts in a sentence."""
        parts = [
            f"{name} {fixed(difference['mean'], '+.4f')} nats of test loss against {self.baseline}, "
            f"p = {difference['p']:.3f}: {verdict(difference).replace(': ', ', ')}"
            for name, arm in self.arms.items()
            if (difference := arm["difference"]) is not None
        ]
        return ("; ".join(parts) or "No pair of runs has finished") + f"{self.suffix}."

    def curves(self) -> Chart:
        """Mean validation loss over the seeds with their range, and the baseline's final level."""
        series, levels = [], []
        for index, (name, arm) in enumerate(self.arms.items()):
            curves = [run["curve"] for run in arm["runs"] if run["finished"]]
            if not curves:
                continue
            x = {
                axis: np.mean([curve[axis.lower()] for curve in curves], axis=0)
                for axis in AXIS_LABELS
                if axis.lower() in curves[0]
            }
            losses = np.array([curve["validation_loss"] for curve in curves])  # [seeds, evaluations]
            mean, low, high = losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)
            series.append(Series(name, x, mean, low=low, high=high, style=index))
            if name == self.baseline:
                levels.append((float(mean[-1]), f"final loss of {name}"))
        seeds = max(map(_finished, self.arms.values()))
        plural = "s" if seeds != 1 else ""
        return Chart(
            f"curves-{self.name}",
            f"Held-out loss, mean and range of {seeds} seed{plural}{self.suffix}",
            "validation loss, nats per token",
            series,
            levels=levels,
        )

    def differences(self) -> Forest:
        """Test loss against the baseline."""
        found = {name: arm["difference"] for name, arm in self.arms.items() if arm["difference"] is not None}
        return Forest(
            f"difference-{self.name}",
            f"Test loss against {self.baseline}{self.suffix}",
            "difference, nats per token (less is better)",
            [self._interval(name, summary, summary["verdict"]) for name, summary in found.items()],
            neutral=0.0,
            note="Mean of the paired differences with its 95 % interval.",
        )

    def ratios(self) -> list[Forest]:
        """The cost to reach the baseline's final loss; in windows read only where an arm rejects some."""
        costs = [arm["to_target"] for arm in self.arms.values()]
        rejects = any("read" in cost and cost["read"] != cost["windows"] for cost in costs)
        return [self._ratio(axis) for axis in RATIO_AXES if axis != "read" or rejects]

    def _ratio(self, axis: str) -> Forest:
        costs = {name: arm["to_target"][axis.lower()] for name, arm in self.arms.items()}
        label = AXIS_LABELS[axis]
        read = " A stream filter reads windows that it rejects, without a forward pass." * (axis == "read")
        return Forest(
            f"ratio-{axis.lower()}-{self.name}",
            f"{label[0].upper()}{label[1:]} to reach {self.baseline}'s final loss{self.suffix}",
            f"over what {self.baseline} needed (less is better)",
            [
                self._interval(name, cost, f"{'> ' * bool(cost['censored'])}{cost['mean']:.2f}×")
                for name, cost in costs.items()
                if cost is not None and name != self.baseline
            ],
            neutral=1.0,
            note="Geometric mean over the seeds with its 95 % interval; an arrow is a lower bound, where a "
            f"seed never got there.{read}",
        )

    def _interval(self, name: str, summary: Json, note: str) -> Interval:
        bounds = {bound: summary[bound] for bound in ("mean", "low", "high")}
        style = list(self.arms).index(name)
        return Interval(label=name, note=note, censored=bool(summary.get("censored")), style=style, **bounds)

    def loss_table(self) -> Table:
        """Final test loss of each arm in nats per token, and the verdict on it."""
        rows = []
        for name, arm in self.arms.items():
            row = [name, str(_finished(arm)), fixed(arm["test_loss"], ".4f")]
            if (difference := arm["difference"]) is None:
                rows.append([*row, "–", "–", "–", "baseline" if name == self.baseline else "no pairs"])
                continue
            change, interval = fixed(difference["mean"], "+.4f"), _bounds(difference, "+.4f") or "–"
            rows.append([*row, change, interval, f"{difference['p']:.3f}", verdict(difference)])
        return Table(
            f"Test loss, mean of the seeds, and change against {self.baseline}{self.suffix}",
            ["arm", "seeds", "loss", "change", "95 % interval", "p", "verdict"],
            rows,
            "Paired by seed, exact sign-flip test; docs/compare.md says how to read it.",
        )

    def cost_table(self) -> Table:
        """Cost to reach the baseline's final validation loss, with 95 % intervals, and seeds that did."""
        axes = [axis for axis in RATIO_AXES if axis != "read"]
        rows = []
        for name, arm in self.arms.items():
            costs = arm["to_target"]
            windows = costs["windows"]
            seeds = "–" if windows is None else f"{windows['seeds'] - windows['censored']}/{windows['seeds']}"
            rows.append([name, *(_ratio(costs[axis.lower()]) for axis in axes), seeds])
        return Table(
            f"Cost to reach {self.baseline}'s final loss, over {self.baseline}'s own{self.suffix}",
            ["arm", *axes, "reached"],
            rows,
        )


def verdict(difference: Json) -> str:
    """`gain`, or `undetermined: 3 more seeds`."""
    more = difference["more_seeds"]
    return difference["verdict"] + (f": {more} more seed{'s' if more > 1 else ''}" if more else "")


def _finished(arm: Json) -> int:
    return sum(run["finished"] for run in arm["runs"])


def _ratio(summary: Json | None) -> str:
    """`0.72 [0.65, 0.80]`; a bound from below is `> 1.20 [> 1.10]`."""
    if summary is None:
        return "–"
    if summary["censored"]:
        low = "" if summary["low"] is None else f" [> {summary['low']:.2f}]"
        return f"> {summary['mean']:.2f}{low}"
    return f"{summary['mean']:.2f} {_bounds(summary, '.2f')}".rstrip()


def _bounds(summary: Json, form: str) -> str:
    if summary["low"] is None:
        return ""
    return f"[{fixed(summary['low'], form)}, {fixed(summary['high'], form)}]"
