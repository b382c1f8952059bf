"""Downstream tasks as a function of training, with their standard errors and the level of chance."""

import math

import numpy as np

from curriq.report.chart import Chart, Series, Table
from curriq.report.runlog import RunLog, read_json

PREFIX = "task/"
NUMBERS = ("value", "stderr", "chance_level")
Z = 1.96
"""Standard errors on either side of a 95 % interval."""


def task_charts(runs: list[RunLog]) -> list[Chart]:
    """One chart per task and measure that any of the runs has logged."""
    measured: dict[str, None] = {}
    for run in runs:
        for name in run.columns.names():
            if name.startswith(PREFIX) and not name.endswith(("/stderr", "/chance_level")):
                measured.setdefault(name)
    return [_chart(name, runs) for name in measured]


def evaluated(runs: list[RunLog]) -> list[Table]:
    """What `curriq eval` has kept in RUN/eval/: the scores of checkpoints, and perplexity by source."""
    scores, sources = [], []
    for run in runs:
        for path in sorted((run.folder / "eval").glob("*.json")):
            result = read_json(path)
            for score in result.get("tasks", ()):
                shown = [f"{score[key]:.4f}" if score[key] is not None else "–" for key in NUMBERS]
                scores.append([run.label, path.stem, score["task"], score["measure"], *shown])
            for name, found in result.get("sources", {}).get("losses", {}).items():
                loss = found["loss"]
                numbers = [f"{loss:.4f}", f"{math.exp(min(loss, 700.0)):.2f}", f"{found['windows']:,}"]
                sources.append([run.label, path.stem, name, *numbers])
    tables = []
    if scores:
        header = ["run", "checkpoint", "task", "measure", "score", "standard error", "chance"]
        tables.append(Table(title="Evaluated checkpoints", header=header, rows=scores))
    if sources:
        header = ["run", "checkpoint", "source", "loss", "perplexity", "windows"]
        note = "On the windows that the stream would have offered next."
        tables.append(Table(title="Perplexity by source", header=header, rows=sources, note=note))
    return tables


def _chart(name: str, runs: list[RunLog]) -> Chart:
    """`task/hellaswag/acc_norm` over the run, with 1.96 standard errors on either side.

    Beside the value a log may hold `task/TASK/MEASURE/stderr` and `task/TASK/MEASURE/chance_level`.
    """
    task, _, measure = name.removeprefix(PREFIX).rpartition("/")
    series = []
    for index, run in enumerate(runs):
        where, values = run.columns.raw(name)
        if not len(values):
            continue
        error = run.columns.full(f"{name}/stderr")[where]
        series.append(
            Series(
                label=run.label,
                x=run.columns.at(where),
                y=values,
                low=values - Z * np.nan_to_num(error),
                high=values + Z * np.nan_to_num(error),
                style=index,
                dots=True,
            )
        )
    chances = [chance for run in runs if (chance := run.columns.last(f"{name}/chance_level")) is not None]
    return Chart(
        id="task-" + name.removeprefix(PREFIX).replace("/", "-"),
        title=task,
        y=measure.replace("_", " "),
        series=series,
        levels=[(chances[0], "chance")] if chances else [],
        note="The band is 1.96 standard errors on either side.",
    )
