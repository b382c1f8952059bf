"""A comparison as people read it: tables on the terminal, learning curves as pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curriq.config import missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Palette of Okabe and Ito (2008), told apart with any colour vision; its yellow is too pale for lines."""
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)))
"""Line styles, one per round through the colours."""


def print_comparison(result: dict[str, Any], console: "Console | None" = None) -> None:
    """Two tables per stream, each within 80 columns, and what went wrong.

    Args:
        result: content of comparison.json.
        console: where to print; standard output when None.
    """
    from rich.console import Console
    from rich.markup import escape

    console = console or Console(highlight=False)
    baseline = escape(result["baseline"])
    for stream, arms in result["streams"].items():
        console.print(
            f"\n[bold]{escape(stream)}: test loss, mean of n seeds, and change against {baseline}[/bold]"
        )
        console.print(loss_table(arms, result["baseline"]))
        console.print(
            f"[bold]{escape(stream)}: cost to reach {baseline}'s final loss, over {baseline}'s own[/bold]"
        )
        console.print(cost_table(arms))
    for name, said in result["failed"].items():
        stream, _, run = name.partition("/")
        log = next(
            entry["log"]
            for arm in result["streams"][stream].values()
            for entry in arm["runs"]
            if not entry["finished"] and Path(entry["folder"]).name == run
        )
        console.print(f"[red]failed[/red]  {escape(name)}: {escape(said)} See {escape(log)}", soft_wrap=True)
    for note in result["notes"]:
        console.print(f"[yellow]note[/yellow]    {escape(note)}", soft_wrap=True)


def loss_table(arms: dict[str, Any], baseline: str) -> "Table":
    """Final test loss of each arm in nats per token, and the verdict on it."""
    table = _table("n", "loss", "change", "95 % interval", "p")
    table.add_column("verdict", min_width=len("undetermined:"))
    for name, arm in arms.items():
        difference = arm["difference"]
        finished = str(sum(run["finished"] for run in arm["runs"]))
        mean = "–" if arm["test_loss"] is None else f"{arm['test_loss']:.4f}"
        if difference is None:
            reason = "baseline" if name == baseline else "no pairs"
            table.add_row(name, finished, mean, "–", "–", "–", reason)
            continue
        table.add_row(
            name,
            finished,
            mean,
            _minus(f"{difference['mean']:+.4f}"),
            _minus(_interval(difference, "+.4f") or "–"),
            f"{difference['p']:.3f}",
            verdict(difference),
        )
    return table


def cost_table(arms: dict[str, Any]) -> "Table":
    """What each arm needed to reach the baseline's final validation loss, with 95 % intervals, and in how
    many seeds it did."""
    axes = {"windows": "windows", "FLOPs": "flops", "seconds": "seconds"}
    table = _table(*axes, "reached")
    for name, arm in arms.items():
        windows = arm["to_target"]["windows"]
        reached = "–" if windows is None else f"{windows['seeds'] - windows['censored']}/{windows['seeds']}"
        table.add_row(name, *(_ratio(arm["to_target"][axis]) for axis in axes.values()), reached)
    return table


def verdict(difference: dict[str, Any]) -> str:
    """`gain`, or `undetermined: 3 more seeds`."""
    more = difference["more_seeds"]
    return difference["verdict"] + (f": {more} more seed{'s' if more > 1 else ''}" if more else "")


def save_curves(result: dict[str, Any], folder: Path) -> list[str]:
    """Write curves-STREAM.png and .svg; returns one line per picture, or a note when matplotlib lacks."""
    try:
        import matplotlib
    except ImportError:
        return [f"curves   none: {missing_extra('drawing them', 'matplotlib', 'report', 'use the numbers')}"]
    from matplotlib.figure import Figure

    lines = []
    for stream, arms in result["streams"].items():
        figure = Figure(figsize=(8, 5), layout="constrained")
        if not draw_curves(figure.add_subplot(), stream, arms, result["baseline"]):
            lines.append(f"curves   none for {stream}: no run finished.")
            continue
        path = folder / f"curves-{stream}.png"
        figure.savefig(path, dpi=150)
        with matplotlib.rc_context({"svg.hashsalt": "curriq", "svg.fonttype": "none"}):
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})  # equal data, equal file
        lines.append(f"curves   {path} (and .svg)")
    return lines


def draw_curves(axes: "Axes", stream: str, arms: dict[str, Any], baseline: str) -> bool:
    """Mean validation loss over seeds with the range of the seeds, and the baseline's final level.

    Returns:
        Whether there was anything to draw.
    """
    drawn = False
    for index, (name, arm) in enumerate(arms.items()):
        runs = [run["curve"] for run in arm["runs"] if run["finished"]]
        if not runs:
            continue
        x = np.array(runs[0]["windows"])
        losses = np.array([curve["validation_loss"] for curve in runs])  # [seeds, evaluations]
        colour = COLOURS[index % len(COLOURS)]
        dash = DASHES[index // len(COLOURS) % len(DASHES)]
        marker = "o" if len(x) <= 20 else None
        axes.plot(x, losses.mean(axis=0), color=colour, linestyle=dash, marker=marker, ms=3.5, label=name)
        axes.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        if name == baseline:
            level = losses[:, -1].mean()
            axes.axhline(level, color="0.4", linewidth=1, linestyle=(0, (2, 2)), zorder=0)
            axes.annotate(
                f"final loss of {baseline}",
                xy=(0, level),
                xycoords=("axes fraction", "data"),
                xytext=(4, 3),
                textcoords="offset points",
                color="0.35",
                fontsize="small",
            )
        drawn = True
    seeds = max(sum(run["finished"] for run in arm["runs"]) for arm in arms.values())
    axes.set_title(f"{stream}: mean and range of {seeds} seed{'s' if seeds > 1 else ''}", loc="left")
    axes.set_xlabel("windows seen")
    axes.set_ylabel("validation loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    if drawn:
        axes.legend(frameon=False)
    return drawn


def _table(*headings: str) -> "Table":
    """A table whose first column holds the arms; the headings are of columns of numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _ratio(summary: dict[str, Any] | None) -> str:
    """`0.72 [0.65, 0.80]`; a bound from below is `> 1.20 [> 1.10]`."""
    if summary is None:
        return "–"
    if summary["censored"]:
        low = "" if summary["low"] is None else f" [> {summary['low']:.2f}]"
        return f"> {summary['mean']:.2f}{low}"
    return f"{summary['mean']:.2f} {_interval(summary, '.2f')}".rstrip()


def _interval(summary: dict[str, Any], form: str) -> str:
    if summary["low"] is None:
        return ""
    return f"[{summary['low']:{form}}, {summary['high']:{form}}]"


def _minus(number: str) -> str:
    """The typographic minus, as wide as the plus."""
    return number.replace("-", "−")
