"""What did it learn from, and when? Sources, topics, kinds of windows, and stages where there are any."""

from dataclasses import dataclass, replace

import numpy as np

from curriq.report.chart import Block, Chart, Section, Series
from curriq.report.runlog import RunLog, charts_of
from curriq.report.steering import steering_of, what_was_kept
from curriq.report.summary import Shares, divergence, no_choice, share_table
from curriq.runlog.read import bucket_edges

MEASURES = ("difficulty", "length", "repetition")
MOST_POINTS = 60
"""Points of a line over shares and means, which are noisy: one step offers a few windows of each source."""


STAGE_BINS = 200
"""The series that are searched for stages are averaged into this many bins first."""
SHORTEST = 8
"""Fewest bins in a stage."""


@dataclass(frozen=True)
class Preferences:
    """What was offered and selected of each source or topic."""

    names: list[str]
    rows: np.ndarray  # [times], rows of the log
    offered: np.ndarray  # [times, groups], windows
    weight: np.ndarray  # [times, groups], shares of the weight

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

    def lines(self, run: RunLog, *, over_offered: bool, points: int = MOST_POINTS) -> list[Series]:
        """Share of the weight of each group over the run, or its ratio to the share offered."""
        rows, offered, values = self.in_buckets(points)
        if over_offered:
            with np.errstate(invalid="ignore", divide="ignore"):
                values = np.where(offered > 0, values / offered, np.nan)
        x = run.columns.at(rows)
        return [Series(name, x, y) for name, y in zip(self.names, values.T, strict=True)]


def learned_from(run: RunLog) -> Section:
    """Section 2 of the report."""
    sources, topics = source_preferences(run), _topic_shares(run)
    marks, staged = _stages(run, sources)
    own = _losses(run) | {
        "preference": sources.lines(run, over_offered=True),
        "weight-share": sources.lines(run, over_offered=False),
        "topics": [] if topics is None else topics.lines(run, over_offered=True),
    }
    charts = {chart.id: replace(chart, marks=marks) for chart in charts_of(run, "learned", own)}
    if denominator := _denominator(run):
        note = f"{charts['preference'].note} {denominator}"
        charts["preference"] = replace(charts["preference"], note=note)
    if run.buffered:
        charts |= {id: _against_retrieved(charts[id]) for id in ("topics", *MEASURES)}
    if run.accepted is not None:
        title, note = "Loss of the windows accepted", "Rejected windows have no loss: they are not forwarded."
        charts["loss"] = replace(charts["loss"], title=title, note=note)
    preference, weight, of_topics, *losses = charts.values()
    counts = _read_and_accepted(run, sources)
    table = share_table("Sources over the whole run", "source", sources.totals(), counts, note=denominator)
    blocks: list[Block] = [preference, weight, table, of_topics]
    if (kept := what_was_kept(run)) is not None:
        blocks.append(kept)
    if topics is not None and run.topics is not None:
        texts = run.windows.texts(np.array(run.topics.nearest), special=False)
        typical = {"its most typical window": [" ".join(text.split())[:110] for text in texts]}
        against = "retrieved" if run.buffered else "offered"
        title = "Topics over the whole run"
        blocks.append(share_table(title, "topic", topics.totals(), typical, against=against))
    blocks += losses
    what = "Topics, difficulty, length and repetition"
    if run.buffered:
        blocks.append(
            f"{what} compare the weight with the windows retrieved: of those that only went through the "
            "buffer, the log has the source alone."
        )
    if not run.kept:
        why = "the run kept no windows (--log-windows-mb 0, or an older version)"
        blocks.append(f"{what} are unknown: {why}.")
    elif run.kept > len(run.windows):
        some = f"{len(run.windows):,} of the {run.kept:,} windows that were kept"
        blocks.append(f"{what} are measured on {some}, drawn evenly.")
    title = "What did it learn from, and when?"
    answer = " ".join([_answer(run, sources), *steering_of(run), staged])
    return Section("learned", title, answer, blocks)


def _answer(run: RunLog, sources: Preferences) -> str:
    if not sources.names:
        return "The run logged no shares of sources."
    shares = sources.totals()
    _, kl = run.columns.raw("policy/kl_from_uniform")
    chosen_before = run.accepted is not None or run.buffered
    mean = float(kl.mean()) if len(kl) else 0.0
    if none := no_choice(run.selector, shares, mean, filtered=chosen_before):
        return none
    ratios = {name: weight / offered for name, offered, weight in shares if offered > 0}
    most, least = max(ratios, key=lambda n: ratios[n]), min(ratios, key=lambda n: ratios[n])
    start, what = "It gave", "offered"
    if run.accepted is not None:
        start = f"{run.accepted:.0%} of the windows read were accepted, the others rejected. Acceptance gave"
        what = "read"
    elif run.buffered:
        start, what = "Retrieval from the buffer gave", "read from the stream"
    return (
        f"{start} {most} {ratios[most]:.2f} times its share of the windows {what}, {least} "
        f"{ratios[least]:.2f} times (divergence {divergence(shares):.3f} nats)."
    )


def _stages(run: RunLog, sources: Preferences) -> tuple[list[tuple[dict[str, float], str]], str]:
    """Change points of the preference for sources, and a sentence on them."""
    if not sources.names or run.columns.rows < 16:
        return [], "The run is too short to speak of stages."
    with np.errstate(invalid="ignore"):
        offered = sources.offered / sources.offered.sum(axis=1, keepdims=True)
    found = change_points(sources.weight - np.nan_to_num(offered))
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


def change_points(
    series: np.ndarray, *, alpha: float = 0.01, permutations: int = 499, least_shift: float = 1.0
) -> list[int]:
    """Developmental stages: the indices at which the mean of the series changes for good, ascending.

    Binary segmentation with a Gaussian mean-shift statistic over several series at once. A split counts only
    when no more than a share α of permuted series has one as great. Neighbouring steps of a training run are
    alike, so blocks are permuted and not single points: permuting points would take slow drift for a stage.

    Args:
        series: [time, k], one column per quantity; a constant column is left out.
        alpha: greatest permutation p-value of a split, divided by the number of segments tested so far.
        permutations: of blocks of √n neighbouring bins, per tested segment.
        least_shift: least distance of the two means, in standard deviations within the segments, root mean
            square over the columns. A shift that is real but smaller is no stage.
    """
    edges = bucket_edges(len(series), STAGE_BINS)
    if len(edges) <= 2 * SHORTEST:
        return []
    binned = np.add.reduceat(series, edges[:-1], axis=0) / np.diff(edges)[:, None]
    spread = binned.std(axis=0)
    binned = binned[:, spread > 1e-9 * np.maximum(1.0, np.abs(binned).max(axis=0, initial=0.0))]
    rng = np.random.default_rng(0)
    found: list[int] = []
    waiting = [(0, len(binned))] if binned.shape[1] else []
    tested = 0
    while waiting:
        start, end = waiting.pop(0)
        part = binned[start:end]
        if len(part) < 2 * SHORTEST:
            continue
        tested += 1
        statistic, split, shift = _best_split(part)
        if shift < least_shift or _p_value(part, statistic, permutations, rng) > alpha / tested:
            continue
        found.append(start + split)
        waiting += [(start, start + split), (start + split, end)]
    return sorted(int(edges[index]) for index in found)


def _best_split(part: np.ndarray) -> tuple[float, int, float]:
    """Greatest share of the variance that one split explains, where it is, and its shift in standard
    deviations."""
    n = len(part)
    centred = part - part.mean(axis=0)
    scale = centred.std(axis=0)
    centred = centred[:, scale > 0] / scale[scale > 0]
    if centred.shape[1] == 0:
        return 0.0, n // 2, 0.0
    left = np.arange(SHORTEST, n - SHORTEST + 1)
    sums = np.cumsum(centred, axis=0)[left - 1]  # of a centred series, so the right side's is its negative
    between = (sums**2 * (n / (left * (n - left)))[:, None]).sum(axis=1)
    best = int(between.argmax())
    share = between[best] / (n * centred.shape[1])
    split = int(left[best])
    a, b = centred[:split], centred[split:]
    within = np.sqrt((a.var(axis=0) * split + b.var(axis=0) * (n - split)) / n)
    gaps = np.abs(a.mean(axis=0) - b.mean(axis=0)) / np.maximum(within, 1e-9)
    return float(share), split, float(np.sqrt(np.mean(np.minimum(gaps, 100.0) ** 2)))


def _p_value(part: np.ndarray, statistic: float, permutations: int, rng: np.random.Generator) -> float:
    n = len(part)
    length = max(2, round(np.sqrt(n)))
    hits = 0
    for _ in range(permutations):
        rolled = np.roll(part, rng.integers(length), axis=0)
        blocks = [rolled[i : i + length] for i in range(0, n, length)]
        mixed = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
        hits += _best_split(mixed)[0] >= statistic
    return (1 + hits) / (1 + permutations)


def _denominator(run: RunLog) -> str:
    """What the windows offered are, where more are read than proposed; empty elsewhere."""
    if run.buffered:
        return "Offered is what was read from the stream into the buffer, whenever it was retrieved."
    return "Offered is what was read, accepted or rejected." if run.accepted is not None else ""


def _against_retrieved(chart: Chart) -> Chart:
    """The same chart, saying that it compares with the windows retrieved and not with those offered."""
    fields = {name: getattr(chart, name).replace("offered", "retrieved") for name in ("title", "y", "note")}
    levels = [(height, label.replace("offered", "retrieved")) for height, label in chart.levels]
    series = [replace(one, label=one.label.replace("offered", "retrieved")) for one in chart.series]
    return replace(chart, levels=levels, series=series, **fields)


def source_preferences(run: RunLog) -> Preferences:
    """Of each source, the windows read from the stream and the weight, in every step."""
    shape = len(run.sources), run.columns.rows
    offered, weight = (
        np.array([run.columns.full(f"select/{kind}_share/{name}") for name in run.sources]).reshape(shape)
        for kind in ("offered", "weight")
    )
    read = np.nan_to_num(offered).T * run.windows_read[:, None]
    return Preferences(run.sources, np.arange(shape[1]), read, np.nan_to_num(weight).T)


def _read_and_accepted(run: RunLog, sources: Preferences) -> dict[str, list[str]]:
    """Of each source, the windows read from the stream and, behind a filter, those accepted; empty where all
    that is read is proposed."""
    counts = {}
    if run.accepted is not None:
        counts = {"accepted": sources.weight * float(run.setting("num_candidates", 0))}
    if run.buffered or counts:
        counts = {"read": sources.offered} | counts
    return {kind: [f"{total:,.0f}" for total in of.sum(axis=0)] for kind, of in counts.items()}


def _topic_shares(run: RunLog) -> Preferences | None:
    found = run.selection.per_step
    if run.topics is None or "offered/topic" not in found:
        return None
    rows = run.columns.rows_of(run.selection.step)
    return Preferences(run.topics.names, rows, found["offered/topic"], found["selected/topic"])


def _losses(run: RunLog) -> dict[str, list[Series]]:
    """Losses of the windows selected against those forwarded, measures against those offered, and each
    source's perplexity."""
    rows, found = run.columns.rows_of(run.selection.step), run.selection.per_step

    def line(label: str, name: str, style: int) -> list[Series]:
        """Of a value per step; empty where the run has none."""
        known = name in found
        return [run.value_line(label, found[name], rows, MOST_POINTS, style=style)] if known else []

    loss = run.metric_line("train/loss", "selected (mixture loss)", points=MOST_POINTS, style=1)
    if run.accepted is None:
        loss += run.metric_line("train/mean_loss", "forwarded (mean loss)", points=MOST_POINTS, style=0)
    measures = {
        name: line("selected", f"selected/{name}", 1) + line("offered", f"offered/{name}", 0)
        for name in MEASURES
    }
    by_source = [own for index, name in enumerate(run.sources) for own in line(name, f"loss/{name}", index)]
    perplexities = [replace(own, y=np.exp(np.minimum(own.y, 700))) for own in by_source]
    return {"loss": loss, **measures, "source-perplexity": perplexities}
