"""What did it learn from, and when? Sources, topics, kinds of windows, and stages where there are any."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from curriq.report.chart import Block, Chart, Section, Series
from curriq.report.lines import metric_line, value_line
from curriq.report.runlog import RunLog
from curriq.report.stages import change_points
from curriq.report.summary import LEAST_MOVED, divergence, share_table, verdict
from curriq.runlog.read import bucket_edges

MEASURES = {
    "difficulty": ("Difficulty", "rarity of the tokens, nats per token"),
    "length": ("Length", "characters per window"),
    "repetition": ("Repetition", "share of repeated 4-grams"),
}
MOST_POINTS = 60
"""Points of a line over shares and means, which are noisy: one step offers a few windows of each source."""

Marks = list[tuple[dict[str, float], str]]


@dataclass(frozen=True)
class Shares:
    """What was offered and selected of each source or topic.

    Attributes:
        names: of the groups.
        rows: [times], rows of the log.
        offered, weight: [times, groups], shares or counts.
    """

    names: list[str]
    rows: np.ndarray
    offered: np.ndarray
    weight: np.ndarray

    def in_buckets(self, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Last row, share offered and share of the weight [buckets, groups] in at most so many buckets."""
        edges = bucket_edges(len(self.rows), most)
        sums = (np.add.reduceat(kind, edges[:-1], axis=0) for kind in (self.offered, self.weight))
        with np.errstate(invalid="ignore", divide="ignore"):
            offered, weight = (kind / kind.sum(axis=1, keepdims=True) for kind in sums)
        return self.rows[edges[1:] - 1], offered, weight

    def totals(self) -> list[list[float]]:
        """Share offered and share of the weight of each group, over the whole run."""
        return [kind.ravel().tolist() for kind in self.in_buckets(1)[1:]]


def learned_from(run: RunLog) -> Section:
    """Section 2 of the report."""
    sources = _source_shares(run)
    marks, staged = _stages(run, sources)
    also = " Offered are all windows read, accepted or rejected." * (run.accepted is not None)
    note = f"Above 1 the source was selected more than it was offered.{also}"
    blocks: list[Block] = [
        _preference(run, sources, marks, "preference", "Preference for each source", note),
        _share_chart(run, sources, marks),
        share_table(
            "Sources over the whole run", "source", run.sources, *sources.totals(), _read_and_accepted(run)
        ),
        *_topics(run, marks),
        _loss_chart(run, marks),
        *_measure_charts(run, marks),
        _source_losses(run, marks),
    ]
    if not run.kept:
        blocks.append(
            "The run kept no windows (--log-windows-mb 0, or an older version), so topics, difficulty, length "
            "and repetition are unknown."
        )
    elif run.kept > len(run.windows):
        blocks.append(
            f"Topics, difficulty, length and repetition are measured on {len(run.windows):,} of the "
            f"{run.kept:,} windows that were kept, drawn evenly."
        )
    title = "What did it learn from, and when?"
    return Section(id="learned", title=title, answer=f"{_answer(run, sources)} {staged}", blocks=blocks)


def _answer(run: RunLog, sources: Shares) -> str:
    if not sources.names:
        return "The run logged no shares of sources."
    offered, weight = (dict(zip(sources.names, totals, strict=True)) for totals in sources.totals())
    selector = str(run.summary.get("selector", run.selector))
    moved = divergence(weight, offered)
    if selector in ("uniform", "replay") or moved < LEAST_MOVED:
        return verdict(selector, weight, offered)
    ratios = {name: weight[name] / offered[name] for name in offered if offered[name] > 0}
    most, least = max(ratios, key=lambda n: ratios[n]), min(ratios, key=lambda n: ratios[n])
    times = f"{{}} {most} {ratios[most]:.2f} times its share of the windows {{}}, {least} {ratios[least]:.2f} times"
    if run.accepted is None:
        return f"{times.format('It gave', 'offered')} (divergence {moved:.3f} nats)."
    return (
        f"{run.accepted:.0%} of the windows read were accepted, the others rejected. "
        f"{times.format('Acceptance gave', 'read')} (divergence {moved:.3f} nats)."
    )


def _stages(run: RunLog, sources: Shares) -> tuple[Marks, str]:
    """Change points of the preference for sources, and a sentence on them."""
    if not sources.names or run.columns.rows < 16:
        return [], "The run is too short to speak of stages."
    found = change_points(sources.weight - sources.offered)
    if not found:
        return [], "Its preferences show no change point: one stage (block permutation test, α = 0.01)."
    marks = [
        ({axis: float(x[0]) for axis, x in run.columns.at(np.array([row])).items()}, f"stage {number}")
        for number, row in enumerate(found, 2)
    ]
    steps = ", ".join(f"{at['step']:.0f}" for at, _ in marks)
    plural = "s" if len(marks) > 1 else ""
    return marks, (
        f"Its preferences changed at step{plural} {steps}: {len(marks) + 1} stages (block permutation test, "
        "α = 0.01)."
    )


def _source_shares(run: RunLog) -> Shares:
    rows = np.arange(run.columns.rows)
    offered, weight = (
        np.array([np.nan_to_num(run.columns.full(f"select/{kind}_share/{name}")) for name in run.sources])
        for kind in ("offered", "weight")
    )
    shape = len(run.sources), len(rows)
    return Shares(run.sources, rows, offered.reshape(shape).T, weight.reshape(shape).T)


def _topics(run: RunLog, marks: Marks) -> list[Block]:
    counts = [run.selection.per_step.get(f"{kind}/topic") for kind in ("offered", "selected")]
    if run.topics is None or counts[0] is None or counts[1] is None:
        return []
    shares = Shares(run.topics.names, run.columns.rows_of(run.selection.step), counts[0], counts[1])
    note = "Clusters of the windows' text (k-means), each named by its most distinctive words (c-TF-IDF)."
    texts = run.windows.texts(np.array(run.topics.nearest), special=False)
    typical = {"its most typical window": [" ".join(text.split())[:110] for text in texts]}
    return [
        _preference(run, shares, marks, "topics", "Preference for each topic", note),
        share_table("Topics over the whole run", "topic", shares.names, *shares.totals(), typical),
    ]


def _preference(run: RunLog, shares: Shares, marks: Marks, id: str, title: str, note: str) -> Chart:
    rows, offered, weight = shares.in_buckets(MOST_POINTS)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(offered > 0, weight / offered, np.nan)
    return Chart(
        id=id,
        title=title,
        y="share of weight ÷ share offered",
        series=_columns(run, shares, rows, ratios),
        levels=[(1.0, "as offered")],
        marks=marks,
        note=note,
    )


def _share_chart(run: RunLog, sources: Shares, marks: Marks) -> Chart:
    rows, _, weight = sources.in_buckets(MOST_POINTS)
    series = _columns(run, sources, rows, weight)
    title, y = "Share of weight by source", "share of weight"
    return Chart(id="weight-share", title=title, y=y, series=series, kind="stack", marks=marks)


def _columns(run: RunLog, shares: Shares, rows: np.ndarray, values: np.ndarray) -> list[Series]:
    """One line per column of values [rows, groups]."""
    x = run.columns.at(rows)
    return [Series(label=name, x=x, y=y) for name, y in zip(shares.names, values.T, strict=True)]


def _read_and_accepted(run: RunLog) -> dict[str, list[str]]:
    """Of each source, the windows that a stream filter has read and those that it has accepted."""
    if run.accepted is None:
        return {}

    def total(kind: str, windows: Any) -> list[str]:
        counts = (
            np.nansum(run.columns.full(f"select/{kind}_share/{name}") * windows) for name in run.sources
        )
        return [f"{count:,.0f}" for count in counts]

    n = float(run.setting("train", "num_candidates", 0))
    return {"read": total("offered", run.columns.full("data/windows_read")), "accepted": total("weight", n)}


def _loss_chart(run: RunLog, marks: Marks) -> Chart:
    series = metric_line(run, "train/loss", "selected (mixture loss)", MOST_POINTS, style=1)
    title, note = (
        "Loss of the windows accepted",
        "Rejected windows were not forwarded: their loss is unknown.",
    )
    if run.accepted is None:
        title, note = "Loss: selected against offered", ""
        series += metric_line(run, "train/mean_loss", "offered (mean loss)", MOST_POINTS, style=0)
    return Chart(id="loss", title=title, y="nats per token", series=series, marks=marks, note=note)


def _step_lines(run: RunLog, names: Iterable[tuple[str, str, int]]) -> list[Series]:
    """Those of (label, name in `run.selection.per_step`, style) that the run has."""
    rows, found = run.columns.rows_of(run.selection.step), run.selection.per_step
    return [
        value_line(run, label, found[name], rows, MOST_POINTS, style=style)
        for label, name, style in names
        if name in found
    ]


def _measure_charts(run: RunLog, marks: Marks) -> list[Chart]:
    return [
        Chart(
            id=name,
            title=f"{title}: selected against offered",
            y=unit,
            series=_step_lines(run, [("selected", f"selected/{name}", 1), ("offered", f"offered/{name}", 0)]),
            marks=marks,
        )
        for name, (title, unit) in MEASURES.items()
    ]


def _source_losses(run: RunLog, marks: Marks) -> Chart:
    losses = _step_lines(run, [(name, f"loss/{name}", index) for index, name in enumerate(run.sources)])
    return Chart(
        id="source-perplexity",
        title="Perplexity by source, before training on it",
        y="perplexity per token",
        series=[dataclasses.replace(line, y=np.exp(np.minimum(line.y, 700))) for line in losses],
        marks=marks,
        log=True,
        note="Of the windows that were forwarded, measured before the update: in the first epoch all of them "
        "are new to the model.",
    )
