"""What did it learn from, and when? Sources, topics, kinds of windows, and stages where there are any."""

import numpy as np

from curriq.report.chart import Block, Chart, Section, Series, Table
from curriq.report.columns import bucket_edges
from curriq.report.runlog import RunLog
from curriq.report.stages import change_points
from curriq.report.summary import divergence

MEASURES = {
    "difficulty": ("Difficulty", "rarity of the tokens, nats per token"),
    "length": ("Length", "characters per window"),
    "repetition": ("Repetition", "share of repeated 4-grams"),
}
MOST_POINTS = 60
"""Points of a line over shares and means, which are noisy: one step offers a few windows of each source."""


def learned_from(run: RunLog) -> Section:
    """Section 2 of the report."""
    marks, staged = _stages(run)
    blocks: list[Block] = [_ratio_chart(run, marks), _share_chart(run, marks), _source_table(run)]
    if run.topics is not None:
        blocks += [_topic_chart(run, marks), _topic_table(run)]
    blocks += [_loss_chart(run, marks), *_measure_charts(run, marks), _source_losses(run, marks)]
    if not run.kept:
        blocks.append(
            "The run kept no windows (--log-windows-mb 0, or an older version), so topics, difficulty, "
            "length and repetition cannot be told."
        )
    elif run.kept > len(run.windows):
        blocks.append(
            f"Topics, difficulty, length and repetition are measured on {len(run.windows):,} of the "
            f"{run.kept:,} windows that were kept, drawn evenly."
        )
    return Section(
        id="learned",
        title="What did it learn from, and when?",
        answer=f"{_answer(run)} {staged}",
        blocks=blocks,
    )


def _answer(run: RunLog) -> str:
    offered, weight = _totals(run)
    if not offered:
        return "The run logged no shares of sources."
    moved = divergence(weight, offered)
    if run.selector == "uniform":
        return "The uniform baseline weighs every window alike, so it learned from what it was offered."
    if run.summary.get("selector") == "replay":
        return f"A replay: the run that was exported has chosen, up to the {moved:.3f} nats of its weights."
    if moved < 1e-3:
        return f"From what it was offered: the weight stayed within {moved:.1e} nats of the offered shares."
    ratios = {name: weight[name] / offered[name] for name in offered if offered[name] > 0}
    most, least = max(ratios, key=lambda n: ratios[n]), min(ratios, key=lambda n: ratios[n])
    if run.taken is not None:
        return (
            f"{run.taken:.0%} of the windows read were taken, the rest was passed over. {most} makes up "
            f"{ratios[most]:.2f} times its share of those read, {least} {ratios[least]:.2f} times; what was "
            f"taken lies {moved:.3f} nats from what was read."
        )
    return (
        f"It took {ratios[most]:.2f} times its share from {most} and {ratios[least]:.2f} times from {least}; "
        f"the weight over sources lies {moved:.3f} nats from what was offered."
    )


def _totals(run: RunLog) -> tuple[dict[str, float], dict[str, float]]:
    """Mean share offered and mean share of the weight, by source."""
    offered, weight = {}, {}
    for name in run.sources:
        offered[name] = float(run.columns.raw(f"select/offered_share/{name}")[1].mean())
        weight[name] = float(run.columns.raw(f"select/weight_share/{name}")[1].mean())
    return offered, weight


def _stages(run: RunLog) -> tuple[list[tuple[dict[str, float], str]], str]:
    """Change points of the preference for sources, and a sentence on them."""
    excess = [
        run.columns.full(f"select/weight_share/{name}") - run.columns.full(f"select/offered_share/{name}")
        for name in run.sources
    ]
    if not excess or run.columns.rows < 16:
        return [], "The run is too short to speak of stages."
    found = change_points(np.nan_to_num(np.column_stack(excess)))
    if not found:
        return [], "Its preferences show no change point: one stage (block permutation test, α = 0.01)."
    marks = []
    for number, row in enumerate(found, 2):
        at = {axis: float(x[0]) for axis, x in run.columns.at(np.array([row])).items()}
        marks.append((at, f"stage {number}"))
    steps = ", ".join(f"{at['step']:.0f}" for at, _ in marks)
    plural = "s" if len(marks) > 1 else ""
    return marks, (
        f"Its preferences changed at step{plural} {steps}: {len(marks) + 1} stages (block permutation test, "
        "α = 0.01)."
    )


def _ratio_chart(run: RunLog, marks: list) -> Chart:
    series = []
    for index, name in enumerate(run.sources):
        weight = run.columns.thinned(f"select/weight_share/{name}", MOST_POINTS)
        offered = run.columns.thinned(f"select/offered_share/{name}", MOST_POINTS)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(offered.mean > 0, weight.mean / offered.mean, np.nan)
        series.append(Series(label=name, x=weight.x, y=ratio, style=index))
    return Chart(
        id="preference",
        title="Preference for each source",
        y="share of weight ÷ share offered",
        series=series,
        levels=[(1.0, "as offered")],
        marks=marks,
        note="Above 1 the source was selected more than it was offered."
        + (" Offered are all windows read, also those passed over." if run.taken is not None else ""),
    )


def _share_chart(run: RunLog, marks: list) -> Chart:
    series = [
        Series(label=name, x=thin.x, y=thin.mean, style=index)
        for index, name in enumerate(run.sources)
        for thin in [run.columns.thinned(f"select/weight_share/{name}", MOST_POINTS)]
    ]
    return Chart(
        id="weight-share",
        title="Share of weight by source",
        y="share of weight",
        series=series,
        kind="stack",
        marks=marks,
    )


def _source_table(run: RunLog) -> Table:
    offered, weight = _totals(run)
    rows = [
        [
            name,
            f"{offered[name]:.1%}",
            f"{weight[name]:.1%}",
            f"{weight[name] / offered[name]:.3f}" if offered[name] else "–",
        ]
        for name in offered
    ]
    header = ["source", "offered", "weight", "ratio"]
    if run.taken is not None:
        header += ["read", "taken"]
        for row, (read, taken) in zip(rows, _counts(run), strict=True):
            row += [f"{read:,.0f}", f"{taken:,.0f}"]
    return Table(title="Sources over the whole run", header=header, rows=rows)


def _counts(run: RunLog) -> list[tuple[float, float]]:
    """Of each source, the windows that a steered stream has read and those that it has taken."""
    read = run.columns.full("data/windows_read")
    n = float(run.setting("train", "num_candidates", 0))
    return [
        (
            float(np.nansum(run.columns.full(f"select/offered_share/{name}") * read)),
            float(np.nansum(run.columns.full(f"select/weight_share/{name}") * n)),
        )
        for name in run.sources
    ]


def _topic_chart(run: RunLog, marks: list) -> Chart:
    assert run.topics is not None
    offered, selected = (run.selection.labels.get(f"{kind}/topic") for kind in ("offered", "selected"))
    series = []
    if offered is not None and selected is not None:
        edges = bucket_edges(len(offered), MOST_POINTS)
        x = run.step_axes(run.selection.step[edges[1:] - 1])
        share, given = (_shares(counts, edges) for counts in (selected, offered))
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(given > 0, share / given, np.nan)
        series = [
            Series(label=name, x=x, y=ratio[:, index], style=index)
            for index, name in enumerate(run.topics.names)
        ]
    return Chart(
        id="topics",
        title="Preference for each topic",
        y="share of weight ÷ share offered",
        series=series,
        levels=[(1.0, "as offered")],
        marks=marks,
        note="Clusters of the windows' text (k-means); a topic is named by the words that tell it from the "
        "others (c-TF-IDF).",
    )


def _shares(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Rows of [buckets, labels] that sum to one."""
    summed = np.add.reduceat(counts, edges[:-1], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return summed / summed.sum(axis=1, keepdims=True)


def _topic_table(run: RunLog) -> Table:
    assert run.topics is not None
    offered, selected = (run.selection.labels.get(f"{kind}/topic") for kind in ("offered", "selected"))
    examples = run.windows.texts(np.array(run.topics.nearest), special=False)
    rows = []
    if offered is not None and selected is not None:
        given, share = (counts.sum(axis=0) / max(1e-12, counts.sum()) for counts in (offered, selected))
        for index, name in enumerate(run.topics.names):
            text = " ".join(examples[index].split())
            ratio = f"{share[index] / given[index]:.3f}" if given[index] else "–"
            rows.append([name, f"{given[index]:.1%}", f"{share[index]:.1%}", ratio, text[:110]])
    return Table(
        title="Topics over the whole run",
        header=["topic", "offered", "weight", "ratio", "its most typical window"],
        rows=rows,
    )


def _loss_chart(run: RunLog, marks: list) -> Chart:
    selected = run.columns.thinned("train/loss", MOST_POINTS)
    offered = run.columns.thinned("train/mean_loss", MOST_POINTS)
    series = [Series(label="selected (mixture loss)", x=selected.x, y=selected.mean, style=1)]
    if run.taken is not None:
        title, note = (
            "Loss of the windows taken",
            "Those passed over were not forwarded: their loss is not known.",
        )
    else:
        title, note = "Loss: selected against offered", ""
        series.append(Series(label="offered (mean loss)", x=offered.x, y=offered.mean, style=0))
    return Chart(id="loss", title=title, y="nats per token", series=series, marks=marks, note=note)


def _measure_charts(run: RunLog, marks: list) -> list[Chart]:
    charts = []
    for name, (title, unit) in MEASURES.items():
        series = []
        for kind, style in (("selected", 1), ("offered", 0)):
            values = run.selection.per_step.get(f"{kind}/{name}")
            if values is not None:
                x, mean = run.thin_steps(values, run.selection.step, MOST_POINTS)
                series.append(Series(label=kind, x=x, y=mean, style=style))
        charts.append(
            Chart(id=name, title=f"{title}: selected against offered", y=unit, series=series, marks=marks)
        )
    return charts


def _source_losses(run: RunLog, marks: list) -> Chart:
    series = []
    for index, name in enumerate(run.sources):
        values = run.selection.per_step.get(f"loss/{name}")
        if values is not None:
            x, mean = run.thin_steps(values, run.selection.step, MOST_POINTS)
            series.append(Series(label=name, x=x, y=np.exp(np.minimum(mean, 700)), style=index))
    return Chart(
        id="source-perplexity",
        title="Perplexity by source, before training on it",
        y="perplexity per token",
        series=series,
        marks=marks,
        log=True,
        note="Of the windows that were forwarded, measured before the update: in the first epoch all of them "
        "are new to the model.",
    )
