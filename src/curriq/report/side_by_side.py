"""What did the arms of a comparison learn from? Their sources side by side, means over the seeds."""

from statistics import fmean

import numpy as np

from curriq.report.chart import Block, Chart, Heading, Json, Section, Series, Table
from curriq.report.data_mix import source_preferences
from curriq.report.runlog import RunLog
from curriq.report.steering import Steering
from curriq.report.summary import Shares

MOST_SOURCES = 6
"""Sources with a chart of their own: those on which the arms differ most."""
POINTS = 20
"""Of a line of one arm beside others; a step trains on few windows of each source."""
LEAST_APART = 0.02
"""Difference of the arms' shares of the weight from which a source gets a chart."""

Arms = dict[str, list[RunLog]]


def comparison_learned(result: Json, runs: dict[tuple[str, str], list[RunLog]]) -> Section | None:
    """Section 2 for the result of `curriq compare`; None where no run logged its sources.

    Args:
        runs: (stream, arm) → its finished runs.
    """
    blocks: list[Block] = []
    answers = []
    several = len(result["streams"]) > 1
    for stream, arms in result["streams"].items():
        found = {arm: runs[stream, arm] for arm in arms if runs.get((stream, arm))}
        suffix = f" ({stream})" if several else ""
        shares = {arm: _mean_shares(of) for arm, of in found.items()}
        if not any(shares.values()):
            continue
        answers.append(_answer(shares, result["baseline"], suffix))
        if several:
            blocks.append(Heading(stream))
        blocks += [
            *_charts(found, shares, stream, suffix),
            _source_table(shares, suffix),
            _steering_table(found, suffix),
        ]
    if not blocks:
        return None
    note = (
        "Means over the seeds; in the charts, the range of the seeds is the band. Single runs follow below."
    )
    return Section("arms-learned", "What did each arm learn from?", " ".join(answers), [*blocks, note])


def _mean_shares(runs: list[RunLog]) -> Shares:
    """Name, share offered and share of the weight of each source, means over the runs."""
    totals = [source_preferences(run).totals() for run in runs]
    return [
        (of_source[0][0], fmean(offered for _, offered, _ in of_source), fmean(w for *_, w in of_source))
        for of_source in zip(*totals, strict=True)
    ]


def _answer(shares: dict[str, Shares], baseline: str, suffix: str) -> str:
    """Which source each arm preferred most, and which it avoided most."""
    parts = []
    for arm, of_arm in shares.items():
        ratios = {name: weight / offered for name, offered, weight in of_arm if offered > 0}
        if arm == baseline or not ratios:
            continue
        most, least = max(ratios, key=lambda name: ratios[name]), min(ratios, key=lambda name: ratios[name])
        spread = ratios[most] - ratios[least]
        chose = f"gave {most} {ratios[most]:.2f} times its share, {least} {ratios[least]:.2f} times"
        parts.append(f"{arm} {chose if spread > LEAST_APART else 'took the sources as they came'}")
    return ("; ".join(parts) or "Only the baseline has finished") + f"{suffix}."


def _source_table(shares: dict[str, Shares], suffix: str) -> Table:
    first = next(of_arm for of_arm in shares.values() if of_arm)
    rows = []
    for index, (name, offered, _) in enumerate(first):
        cells = []
        for of_arm in shares.values():
            _, read, weight = of_arm[index] if of_arm else (name, 0.0, 0.0)
            cells.append(f"{weight:.1%} (×{weight / read:.2f})" if read else "–")
        rows.append([name, f"{offered:.1%}", *cells])
    return Table(
        f"Share of the weight by source{suffix}",
        ["source", "offered", *shares],
        rows,
        "In brackets over the share offered, which is of what was read from the stream.",
    )


def _steering_table(arms: Arms, suffix: str) -> Table:
    rows = []
    for arm, runs in arms.items():
        steered = [Steering.of(run.columns) for run in runs]
        began = [one.q_from for one in steered if one.q_from is not None and one.last is not None]
        gated = sum(one.last is not None for one in steered)
        accepted = [1.0 if run.accepted is None else run.accepted for run in runs]
        start = "–"
        if gated:
            start = f"{np.median(began):.0f}" if began else "never"
            start += f" ({len(began)} of {gated} seeds)" if len(began) < gated else ""
        rejecting = [one.rejected_from for one in steered if one.rejected_from is not None]
        rows.append(
            [arm, f"{fmean(accepted):.0%}", f"{np.median(rejecting):.0f}" if rejecting else "–", start]
        )
    return Table(
        f"When each arm selected{suffix}",
        ["arm", "accepted", "rejects from step", "Q from step"],
        rows,
        "Share of the windows read that were accepted; first steps, medians over the seeds. Q has a say once "
        "its gate has opened; a dash where there is no filter, or no gate.",
    )


def _charts(arms: Arms, shares: dict[str, Shares], stream: str, suffix: str) -> list[Chart]:
    """Share of the weight over the run on the sources that tell the arms apart, a line for each arm."""
    weights = np.array([[weight for *_, weight in of_arm] for of_arm in shares.values() if of_arm])
    names = [name for name, *_ in next(of_arm for of_arm in shares.values() if of_arm)]
    apart = np.ptp(weights, axis=0)
    chosen = [i for i in np.argsort(-apart, kind="stable")[:MOST_SOURCES] if apart[i] >= LEAST_APART]
    lines = {
        arm: [source_preferences(run).lines(run, over_offered=False, points=POINTS) for run in runs]
        for arm, runs in arms.items()
    }
    charts = []
    for index in sorted(chosen):
        series = []
        for style, of_seeds in enumerate(lines.values()):
            of_source = [one[index] for one in of_seeds if len(one) > index]
            if of_source:
                series.append(_over_seeds(list(lines)[style], of_source, style))
        title, id = f"Weight on {names[index]}{suffix}", f"weight-{stream}-{index}"
        charts.append(Chart(id, title, "share of weight", series))
    return charts


def _over_seeds(arm: str, lines: list[Series], style: int) -> Series:
    """Mean line of the seeds with their range."""
    points = min(len(line.y) for line in lines)
    y = np.array([line.y[:points] for line in lines])
    x = {axis: np.mean([line.x[axis][:points] for line in lines], axis=0) for axis in lines[0].x}
    return Series(arm, x, y.mean(axis=0), low=y.min(axis=0), high=y.max(axis=0), style=style)
