"""Did it help? Curves with seed bands, verdicts and ratios of a comparison; or the curves of some runs."""

import math
from typing import Any

from curriq.report.chart import Block, Chart, Section, Table, fixed
from curriq.report.comparison import streams_of
from curriq.report.lines import metric_line
from curriq.report.runlog import RunLog
from curriq.report.tasks import evaluated, task_charts


def comparison_helped(result: dict[str, Any], runs: list[RunLog]) -> Section:
    """Section 1 for the result of `curriq compare`."""
    streams = streams_of(result)
    blocks: list[Block] = []
    for stream in streams:
        blocks += [stream.curves(), stream.differences(), *stream.ratios(), stream.loss_table()]
    blocks += [*task_charts(runs), *evaluated(runs)]
    blocks += [f"Failed: {name}: {message}" for name, message in result["failed"].items()]
    return _section(" ".join(stream.verdict() for stream in streams), [*blocks, *result["notes"]])


def runs_helped(runs: list[RunLog]) -> Section:
    """Section 1 for one run, or some runs side by side."""
    loss = Chart(
        id="validation",
        title="Held-out loss",
        y="validation loss, nats per token",
        series=[
            line
            for index, run in enumerate(runs)
            for line in metric_line(run, "validation/loss", run.label, style=index)
        ],
        note="On the validation set of the target, without dropout.",
    )
    header = ["run", "method", "seed", "steps", "validation loss", "test loss", "test perplexity"]
    table = Table(title="Where each run stands", header=header, rows=list(map(_standing, runs)))
    return _section(_unpaired_answer(runs), [loss, table, *task_charts(runs), *evaluated(runs)])


def _section(answer: str, blocks: list[Block]) -> Section:
    return Section(id="did-it-help", title="Did it help?", answer=answer, blocks=blocks)


def _standing(run: RunLog) -> list[str]:
    test = run.summary.get("test_loss")
    return [
        run.label,
        run.selector,
        str(run.setting("train", "seed", "?")),
        f"{run.columns.rows:,}",
        fixed(run.columns.last("validation/loss"), ".4f"),
        fixed(test, ".4f"),
        fixed(test and math.exp(min(test, 700)), ".2f"),
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
