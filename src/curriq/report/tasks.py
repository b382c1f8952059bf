"""Downstream tasks as a function of training, with their standard errors and the level of chance."""

import math

import numpy as np

from curriq.report.chart import Chart, Series, Table, fixed
from curriq.report.runlog import RunLog
from curriq.runlog.read import read_document

PREFIX = "task/"
Z = 1.96
"""Standard errors on either side of a 95 % interval."""


def task_charts(runs: list[RunLog]) -> list[Chart]:
    """One chart per task and measure that any of the runs has logged."""
    names = dict.fromkeys(name for run in runs for name in run.columns.names() if name.startswith(PREFIX))
    return [_chart(name, runs) for name in names if not name.endswith(("/stderr", "/chance_level"))]


def evaluated(runs: list[RunLog]) -> list[Table]:
    """What `curriq eval` has kept in RUN/eval/: the scores of checkpoints, and perplexity by source."""
    scores, sources = [], []
    for run in runs:
        for path in sorted((run.folder / "eval").glob("*.json")):
            result = read_document(path)
            for score in result.get("tasks", ()):
                values = [fixed(score[name], ".4f") for name in ("value", "stderr", "chance_level")]
                scores.append([run.label, path.stem, score["task"], score["measure"], *values])
            for name, found in result.get("sources", {}).get("losses", {}).items():
                loss, perplexity = found["loss"], math.exp(min(found["loss"], 700.0))
                values = [f"{loss:.4f}", f"{perplexity:.2f}", f"{found['windows']:,}"]
                sources.append([run.label, path.stem, name, *values])
    header = ["run", "checkpoint", "task", "measure", "score", "standard error", "chance level"]
    tables = [Table(title="Evaluated checkpoints", header=header, rows=scores)]
    header = ["run", "checkpoint", "source", "loss", "perplexity", "windows"]
    note = "On the windows that the stream would have offered next."
    tables.append(Table(title="Perplexity by source", header=header, rows=sources, note=note))
    return [table for table in tables if table.rows]


def _chart(name: str, runs: list[RunLog]) -> Chart:
    """`task/hellaswag/acc_norm` over the run, with 1.96 standard errors on either side.

    Beside the value a log may hold `task/TASK/MEASURE/stderr` and `task/TASK/MEASURE/chance_level`.
    """
    task, _, measure = name.removeprefix(PREFIX).rpartition("/")
    series = []
    for index, run in enumerate(runs):
        rows, y = run.columns.raw(name)
        if len(y):
            error = Z * np.nan_to_num(run.columns.full(f"{name}/stderr")[rows])
            x, low, high = run.columns.at(rows), y - error, y + error
            series.append(Series(label=run.label, x=x, y=y, low=low, high=high, style=index, dots=True))
    chances = [chance for run in runs if (chance := run.columns.last(f"{name}/chance_level")) is not None]
    return Chart(
        id="task-" + name.removeprefix(PREFIX).replace("/", "-"),
        title=task,
        y=measure.replace("_", " "),
        series=series,
        levels=[(chance, "chance level") for chance in chances[:1]],
        note="The band is 1.96 standard errors on either side.",
    )
