"""Downstream tasks as a function of training, with their standard errors and the level of chance."""

import numpy as np

from curriq.report.chart import Chart, Series
from curriq.report.runlog import RunLog

PREFIX = "task/"
Z = 1.96
"""Standard errors on either side of a 95 % interval."""


def task_charts(runs: list[RunLog]) -> list[Chart]:
    """One chart per task and measure that any of the runs has logged."""
    measured: dict[str, None] = {}
    for run in runs:
        for name in run.columns.names():
            if name.startswith(PREFIX) and not name.endswith(("/stderr", "/chance")):
                measured.setdefault(name)
    return [_chart(name, runs) for name in measured]


def _chart(name: str, runs: list[RunLog]) -> Chart:
    """`task/hellaswag/acc_norm` over the run, with 1.96 standard errors on either side.

    Beside the value a log may hold `task/TASK/MEASURE/stderr` and `task/TASK/MEASURE/chance`.
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
    chances = [chance for run in runs if (chance := run.columns.last(f"{name}/chance")) is not None]
    return Chart(
        id="task-" + name.removeprefix(PREFIX).replace("/", "-"),
        title=task,
        y=measure.replace("_", " "),
        series=series,
        levels=[(chances[0], "chance")] if chances else [],
        note="The band is 1.96 standard errors on either side.",
    )
