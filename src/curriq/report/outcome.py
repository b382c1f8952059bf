"""Did it help? Curves with seed bands, verdicts and ratios of a comparison; or the curves of some runs."""

import itertools
import math
from typing import Any

import numpy as np

from curriq.report.chart import Block, Chart, Section, Series, Table, fixed
from curriq.report.comparison import streams_of
from curriq.report.lines import metric_line
from curriq.report.runlog import RunLog
from curriq.runlog.read import read_document

TASK = "task/"
"""Prefix of the metrics of downstream tasks."""
Z = 1.96
"""Standard errors on either side of a 95 % interval."""


def comparison_helped(result: dict[str, Any], runs: list[RunLog]) -> Section:
    """Section 1 for the result of `curriq compare`."""
    streams = streams_of(result)
    blocks: list[Block] = []
    for stream in streams:
        blocks += [stream.curves(), stream.differences(), *stream.ratios(), stream.loss_table()]
    blocks += [*task_charts(runs), *evaluated(runs)]
    blocks += [f"Failed: {name}: {message}" for name, message in result["failed"].items()]
    return _section(" ".join(stream.sentence() for stream in streams), [*blocks, *result["notes"]])


def runs_helped(runs: list[RunLog]) -> Section:
    """Section 1 for one run, or some runs side by side."""
    lines = (metric_line(run, "validation/loss", run.label, style=i) for i, run in enumerate(runs))
    y, note = "validation loss, nats per token", "On the validation set of the target, without dropout."
    loss = Chart("validation", "Held-out loss", y, list(itertools.chain(*lines)), note)
    header = ["run", "method", "seed", "steps", "validation loss", "test loss", "test perplexity"]
    table = Table("Where each run stands", header, list(map(_standing, runs)))
    return _section(_unpaired_answer(runs), [loss, table, *task_charts(runs), *evaluated(runs)])


def _section(answer: str, blocks: list[Block]) -> Section:
    return Section("did-it-help", "Did it help?", answer, blocks)


def _standing(run: RunLog) -> list[str]:
    test = run.summary.get("test_loss")
    return [
        run.label,
        run.selector,
        str(run.setting("train", "seed", "?")),
        f"{run.columns.rows:,}",
        fixed(run.columns.last("validation/loss"), ".4f"),
        fixed(test, ".4f"),
        "–" if test is None else f"{math.exp(min(test, 700)):.2f}",
    ]


def _unpaired_answer(runs: list[RunLog]) -> str:
    advice = (
        "Whether the method helped needs the same run with another selector, and seeds: `curriq compare "
        "examples/compare.toml` runs and judges that."
    )
    if len(runs) > 1:
        return f"{len(runs)} runs side by side, without a test of their differences. {advice}"
    (run,) = runs
    _, losses = run.columns.raw("validation/loss")
    if not len(losses):
        return f"The run has not been evaluated yet. {advice}"
    if len(losses) == 1:
        return f"The validation loss was {losses[0]:.3f} nats per token at its first measurement. {advice}"
    test = run.summary.get("test_loss")
    end = "" if test is None else f" The test loss of the final model is {test:.4f} nats per token."
    return (
        f"The validation loss went from {losses[0]:.3f} to {losses[-1]:.3f} nats per token.{end} One run "
        f"alone cannot say whether its curriculum helped. {advice}"
    )


def task_charts(runs: list[RunLog]) -> list[Chart]:
    """One chart per task and measure that any of the runs has logged."""
    names = dict.fromkeys(name for run in runs for name in run.columns.names() if name.startswith(TASK))
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
    tables = [Table("Evaluated checkpoints", header, scores)]
    header = ["run", "checkpoint", "source", "loss", "perplexity", "windows"]
    note = "On the windows that the stream would have offered next."
    tables.append(Table("Perplexity by source", header, sources, note))
    return [table for table in tables if table.rows]


def _chart(name: str, runs: list[RunLog]) -> Chart:
    """`task/hellaswag/acc_norm` over the run, with 1.96 standard errors on either side.

    Beside the value a log may hold `task/TASK/MEASURE/stderr` and `task/TASK/MEASURE/chance_level`.
    """
    task, _, measure = name.removeprefix(TASK).rpartition("/")
    series = []
    for index, run in enumerate(runs):
        rows, y = run.columns.raw(name)
        if len(y):
            error = Z * np.nan_to_num(run.columns.full(f"{name}/stderr")[rows])
            x, low, high = run.columns.at(rows), y - error, y + error
            series.append(Series(run.label, x, y, low=low, high=high, style=index, dots=True))
    chances = [chance for run in runs if (chance := run.columns.last(f"{name}/chance_level")) is not None]
    return Chart(
        "task-" + name.removeprefix(TASK).replace("/", "-"),
        task,
        measure.replace("_", " "),
        series,
        levels=[(chance, "chance level") for chance in chances[:1]],
        note="The band is 1.96 standard errors on either side.",
    )
