"""What did it learn from, and when? Sources, topics, kinds of windows, and stages where there are any."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from curriq.report.chart import Block, Chart, Section, Series
from curriq.report.runlog import RunLog
from curriq.report.stages import change_points
from curriq.report.summary import Shares, divergence, no_choice, share_table
from curriq.runlog.read import bucket_edges

MEASURES = {
    "difficulty": ("Difficulty", "rarity of the tokens, nats per token"),
    "length": ("Length", "characters per window"),
    "repetition": ("Repetition", "share of repeated 4-grams"),
}
MOST_POINTS = 60
"""Points of a line over shares and means, which are noisy: one step offers a few windows of each source."""


@dataclass(frozen=True)
class Preferences:
    """What was offered and selected of each source or topic."""

    names: list[str]
    rows: np.ndarray  # [times], rows of the log
    offered: np.ndarray  # [times, groups], shares or counts
    weight: np.ndarray  # likewise

    def in_buckets(self, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Last row, share offered and share of the weight [buckets, groups] in at most so many buckets."""
        edges = bucket_edges(len(self.rows), most)
        sums = (np.add.reduceat(kind, edges[:-1], axis=0) for kind in (self.offered, self.weight))
        with np.errstate(invalid="ignore", divide="ignore"):
            offered, weight = (kind / kind.sum(axis=1, keepdims=True) for kind in sums)
        return self.rows[edges[1:] - 1], offered, weight

    def totals(self) -> Shares:
        """Share offered and share of the weight of each group, over the whole run."""
        offered, weight = (kind.ravel().tolist() for kind in self.in_buckets(1)[1:])
        return list(zip(self.names, offered, weight, strict=True))

    def lines(self, run: RunLog, *, over_offered: bool) -> list[Series]:
        """Share of the weight of each group over the run, or its ratio to the share offered."""
        rows, offered, values = self.in_buckets(MOST_POINTS)
        if over_offered:
            with np.errstate(invalid="ignore", divide="ignore"):
                values = np.where(offered > 0, values / offered, np.nan)
        x = run.columns.at(rows)
        return [Series(name, x, y) for name, y in zip(self.names, values.T, strict=True)]

    def preference(self, run: RunLog, id: str, title: str, note: str) -> Chart:
        y, series = "share of weight ÷ share offered", self.lines(run, over_offered=True)
        return Chart(id, title, y, series, note, levels=[(1.0, "as offered")])


def learned_from(run: RunLog) -> Section:
    """Section 2 of the report."""
    sources = _source_shares(run)
    marks, staged = _stages(run, sources)
    note = "Above 1 the source was selected more than it was offered."
    note += " Offered are all windows read, accepted or rejected." * (run.accepted is not None)
    more = _read_and_accepted(run, sources)
    layers = sources.lines(run, over_offered=False)
    blocks: list[Block] = [
        sources.preference(run, "preference", "Preference for each source", note),
        Chart("weight-share", "Share of weight by source", "share of weight", layers, kind="stack"),
        share_table("Sources over the whole run", "source", sources.totals(), **more),
        *_topics(run),
        *_loss_charts(run),
    ]
    blocks = [dataclasses.replace(b, marks=marks) if isinstance(b, Chart) else b for b in blocks]
    what = "Topics, difficulty, length and repetition"
    if not run.kept:
        why = "the run kept no windows (--log-windows-mb 0, or an older version)"
        blocks.append(f"{what} are unknown: {why}.")
    elif run.kept > len(run.windows):
        some = f"{len(run.windows):,} of the {run.kept:,} windows that were kept"
        blocks.append(f"{what} are measured on {some}, drawn evenly.")
    title = "What did it learn from, and when?"
    return Section("learned", title, f"{_answer(run, sources)} {staged}", blocks)


def _answer(run: RunLog, sources: Preferences) -> str:
    if not sources.names:
        return "The run logged no shares of sources."
    shares = sources.totals()
    if none := no_choice(str(run.summary.get("selector", run.selector)), shares):
        return none
    ratios = {name: weight / offered for name, offered, weight in shares if offered > 0}
    most, least = max(ratios, key=lambda n: ratios[n]), min(ratios, key=lambda n: ratios[n])
    start, what = "It gave", "offered"
    if run.accepted is not None:
        start = f"{run.accepted:.0%} of the windows read were accepted, the others rejected. Acceptance gave"
        what = "read"
    return (
        f"{start} {most} {ratios[most]:.2f} times its share of the windows {what}, {least} "
        f"{ratios[least]:.2f} times (divergence {divergence(shares):.3f} nats)."
    )


def _stages(run: RunLog, sources: Preferences) -> tuple[list[tuple[dict[str, float], str]], str]:
    """Change points of the preference for sources, and a sentence on them."""
    if not sources.names or run.columns.rows < 16:
        return [], "The run is too short to speak of stages."
    found = change_points(sources.weight - sources.offered)
    test = "(block permutation test, α = 0.01)"
    if not found:
        return [], f"Its preferences show no change point: one stage {test}."
    places = run.columns.at(np.array(found))
    marks = [
        ({axis: float(x[index]) for axis, x in places.items()}, f"stage {index + 2}")
        for index in range(len(found))
    ]
    steps = ("steps " if len(marks) > 1 else "step ") + ", ".join(f"{at['step']:.0f}" for at, _ in marks)
    return marks, f"Its preferences changed at {steps}: {len(marks) + 1} stages {test}."


def _source_shares(run: RunLog) -> Preferences:
    shape = len(run.sources), run.columns.rows
    offered, weight = (
        np.array([run.columns.full(f"select/{kind}_share/{name}") for name in run.sources]).reshape(shape)
        for kind in ("offered", "weight")
    )
    return Preferences(run.sources, np.arange(shape[1]), np.nan_to_num(offered).T, np.nan_to_num(weight).T)


def _read_and_accepted(run: RunLog, sources: Preferences) -> dict[str, list[str]]:
    """Of each source, the windows that a stream filter has read and those that it has accepted."""
    if run.accepted is None:
        return {}
    read, n = run.columns.full("data/windows_read")[:, None], float(run.setting("num_candidates", 0))
    counts = {"read": sources.offered * read, "accepted": sources.weight * n}
    return {kind: [f"{total:,.0f}" for total in np.nansum(of, axis=0)] for kind, of in counts.items()}


def _topics(run: RunLog) -> list[Block]:
    found, topics = run.selection.per_step, run.topics
    if topics is None or "offered/topic" not in found:
        return []
    rows = run.columns.rows_of(run.selection.step)
    shares = Preferences(topics.names, rows, found["offered/topic"], found["selected/topic"])
    note = "Clusters of the windows' text (k-means), each named by its most distinctive words (c-TF-IDF)."
    texts = run.windows.texts(np.array(topics.nearest), special=False)
    typical = {"its most typical window": [" ".join(text.split())[:110] for text in texts]}
    return [
        shares.preference(run, "topics", "Preference for each topic", note),
        share_table("Topics over the whole run", "topic", shares.totals(), **typical),
    ]


def _loss_charts(run: RunLog) -> list[Chart]:
    """Losses and measures of the windows selected against those offered, and each source's perplexity."""
    rows, found = run.columns.rows_of(run.selection.step), run.selection.per_step

    def line(label: str, name: str, style: int) -> list[Series]:
        """Of a value per step; empty where the run has none."""
        known = name in found
        return [run.value_line(label, found[name], rows, MOST_POINTS, style=style)] if known else []

    loss = run.metric_line("train/loss", "selected (mixture loss)", points=MOST_POINTS, style=1)
    title, note = "Loss of the windows accepted", "Rejected windows have no loss: they are not forwarded."
    if run.accepted is None:
        title, note = "Loss: selected against offered", ""
        loss += run.metric_line("train/mean_loss", "offered (mean loss)", points=MOST_POINTS, style=0)
    charts = [Chart("loss", title, "nats per token", loss, note)]
    for name, (title, unit) in MEASURES.items():
        series = line("selected", f"selected/{name}", 1) + line("offered", f"offered/{name}", 0)
        charts.append(Chart(name, f"{title}: selected against offered", unit, series))
    losses = [own for index, name in enumerate(run.sources) for own in line(name, f"loss/{name}", index)]
    perplexities = [dataclasses.replace(own, y=np.exp(np.minimum(own.y, 700))) for own in losses]
    title, y = "Perplexity by source, before training on it", "perplexity per token"
    note = (
        "Of the windows that were forwarded, measured before the update: in the first epoch all of them are "
        "new to the model."
    )
    return [*charts, Chart("source-perplexity", title, y, perplexities, note, log=True)]
