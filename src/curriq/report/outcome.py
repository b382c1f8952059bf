"""Did it help? Curves, verdicts and ratios of a comparison, for the page, a terminal and pictures; or the
curves of some runs side by side."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curriq import terminal
from curriq.config import missing_extra
from curriq.report.chart import Block, Chart, Forest, Heading, Interval, Json, Section, Series, Table, fixed
from curriq.report.figures import print_table, save_figure
from curriq.report.look import AXIS_LABELS
from curriq.report.risen import of_arms, of_run
from curriq.report.runlog import RunLog
from curriq.runlog.read import read_document
from curriq.runlog.schema import perplexity

if TYPE_CHECKING:
    from rich.console import Console

RATIO_AXES = ("windows", "read", "FLOPs", "seconds")
"""Axes on which the cost to reach the baseline's loss is drawn; in comparison.json in small letters."""
INITIAL = "validation/initial_loss"
TASK = "task/"
"""Prefix of the metrics of downstream tasks."""


def comparison_helped(result: Json, runs: list[RunLog]) -> Section:
    """Section 1 for the result of `curriq compare`."""
    streams = streams_of(result)
    several = len(streams) > 1
    blocks: list[Block] = [_verdicts(streams)] if several else []
    for stream in streams:
        if several:
            blocks.append(Heading(stream.name))
        tables = (stream.loss_table(), stream.cost_table(), stream.spent_table())
        blocks += [stream.curves(), *stream.forests(), *tables, *of_arms(stream.arms)]
    blocks += [*_of_tasks(runs), *(f"Failed: {name}: {error}" for name, error in result["failed"].items())]
    answer = "\n".join(_over_streams(streams)) if several else streams[0].sentence()
    return Section("did-it-help", "Did it help?", answer, [*blocks, *result["notes"]])


def _arms_of(streams: "list[Stream]") -> list[str]:
    """The arms that were judged on some stream, in their order."""
    return list(dict.fromkeys(name for stream in streams for name in stream.verdicts()))


def _verdicts(streams: "list[Stream]") -> Table:
    """The change of the test loss of each arm, and the verdict on it, on each stream."""
    arms, rows = _arms_of(streams), []
    for stream in streams:
        verdicts = stream.verdicts()
        changes = {arm: fixed(stream.arms[arm]["difference"]["mean"], "+.3f") for arm in verdicts}
        rows.append(
            [stream.name, *(f"{changes[arm]} {verdicts[arm]}" if arm in verdicts else "–" for arm in arms)]
        )
    note = "Nats per token, less is better; intervals and tests stand below, stream by stream."
    return Table(f"Change of the test loss against {streams[0].baseline}", ["stream", *arms], rows, note)


def _over_streams(streams: "list[Stream]") -> list[str]:
    """A sentence for each arm: on how many streams it gains, and which verdict the others got."""
    sentences = []
    for arm in _arms_of(streams):
        names: dict[str, list[str]] = {}
        for stream in streams:
            names.setdefault(stream.verdicts().get(arm, "no pairs"), []).append(stream.name)
        gains = len(names.pop("gain", []))
        others = [f"{verdict} on {', '.join(found)}" for verdict, found in names.items()]
        against = f"gain over {streams[0].baseline} on {gains} of {len(streams)} streams"
        sentences.append(f"{arm}: {'; '.join([against, *others])}.")
    return sentences or ["No pair of runs has finished."]


def runs_helped(runs: list[RunLog]) -> Section:
    """Section 1 for one run, or some runs side by side."""
    lines, rows = [], []
    for index, run in enumerate(runs):
        lines += [
            _from_the_start(run, line) for line in run.metric_line("validation/loss", run.label, style=index)
        ]
        validation, test = run.columns.last("validation/loss"), run.summary.get("test_loss")
        facts = [run.label, run.selector, str(run.setting("seed", "?")), f"{run.columns.rows:,}"]
        rows.append([*facts, fixed(validation, ".4f"), fixed(test, ".4f"), _perplexity(test)])
    y, note = "validation loss, nats per token", "On the validation set of the target, without dropout."
    header = ["run", "method", "seed", "steps", "validation loss", "test loss", "test perplexity"]
    blocks = [
        Chart("validation", "Held-out loss", y, lines, note),
        Table("Where each run stands", header, rows),
        *_of_tasks(runs),
        *(f"{run.label}: {sentence}" for run in runs for sentence in of_run(run.columns) if len(runs) > 1),
    ]
    return Section("did-it-help", "Did it help?", _answer_on(runs), blocks)


def _from_the_start(run: RunLog, line: Series) -> Series:
    """A curve of the validation loss with that of θ_0 in front: no window had been read, and the step that
    would have led to it is −1, as step 0 leads to the first of the others."""
    initial = run.columns.last(INITIAL)
    if initial is None:
        return line
    x = {axis: np.insert(values, 0, -1.0 if axis == "step" else 0.0) for axis, values in line.x.items()}
    return replace(line, x=x, y=np.insert(line.y, 0, initial))


def _answer_on(runs: list[RunLog]) -> str:
    advice = (
        "Whether the method helped needs the same run with another selector, and seeds: `curriq compare "
        "examples/compare.toml` runs and judges that."
    )
    if len(runs) > 1:
        return f"{len(runs)} runs side by side, without a test of their differences. {advice}"
    _, losses = runs[0].columns.raw("validation/loss")
    if (initial := runs[0].columns.last(INITIAL)) is not None:
        losses = np.array([initial, *losses])
    if not len(losses):
        return f"The run has not been evaluated yet. {advice}"
    if len(losses) == 1:
        return f"The validation loss was {losses[0]:.3f} nats per token at its first measurement. {advice}"
    test = runs[0].summary.get("test_loss")
    end = "" if test is None else f" The test loss of the final model is {test:.4f} nats per token."
    rise = "".join(f" {sentence}" for sentence in of_run(runs[0].columns))
    return (
        f"The validation loss went from {losses[0]:.3f} to {losses[-1]:.3f} nats per token.{end}{rise} "
        f"One run alone cannot say whether its curriculum helped. {advice}"
    )


def _of_tasks(runs: list[RunLog]) -> list[Block]:
    """One chart per task and measure that any of the runs has logged, and what `curriq eval` has kept in
    RUN/eval/: the scores of checkpoints, and perplexity by source."""
    names = dict.fromkeys(name for run in runs for name in run.columns.names() if name.startswith(TASK))
    charts = [_task_chart(name, runs) for name in names if not name.endswith(("/stderr", "/chance_level"))]
    scores, sources = [], []
    for run in runs:
        for path in sorted((run.folder / "eval").glob("*.json")):
            result, of = read_document(path), [run.label, path.stem]
            for score in result.get("tasks", ()):
                values = [fixed(score.get(name), ".4f") for name in ("value", "stderr", "chance_level")]
                scores.append([*of, score["task"], score["measure"], *values])
            for name, found in result.get("sources", {}).get("losses", {}).items():
                loss = found["loss"]
                sources.append([*of, name, f"{loss:.4f}", _perplexity(loss), f"{found['windows']:,}"])
    measured = ["task", "measure", "score", "standard error", "chance level"]
    note = "On the windows that the stream would have offered next."
    by_source = ["source", "loss", "perplexity", "windows"]
    tables = (
        Table("Evaluated checkpoints", ["run", "checkpoint", *measured], scores),
        Table("Perplexity by source", ["run", "checkpoint", *by_source], sources, note),
    )
    return [*charts, *(table for table in tables if table.rows)]


def _perplexity(loss: float | None) -> str:
    return "–" if loss is None else f"{perplexity(loss):.2f}"


def _task_chart(name: str, runs: list[RunLog]) -> Chart:
    """`task/hellaswag/acc_norm` over the run, with 1.96 standard errors on either side.

    Beside the value a log may hold `task/TASK/MEASURE/stderr` and `task/TASK/MEASURE/chance_level`.
    """
    task, _, measure = name.removeprefix(TASK).rpartition("/")
    series = []
    for index, run in enumerate(runs):
        rows, y = run.columns.raw(name)
        if len(y):
            error = 1.96 * np.nan_to_num(run.columns.full(f"{name}/stderr")[rows])
            x, low, high = run.columns.at(rows), y - error, y + error
            series.append(Series(run.label, x, y, low=low, high=high, style=index, dots=True))
    chances = [chance for run in runs if (chance := run.columns.last(f"{name}/chance_level")) is not None]
    levels = [(chance, "chance level") for chance in chances[:1]]
    id, note = f"task-{task}-{measure}".replace("/", "-"), "The band is 1.96 standard errors on either side."
    return Chart(id, task, measure.replace("_", " "), series, note, levels=levels)


def print_comparison(result: Json, console: "Console | None" = None) -> None:
    """Print three tables per stream of comparison.json, each within 80 columns, what they come to, and what
    went wrong."""
    from rich.text import Text

    console, streams = console or terminal.console(), streams_of(result)
    for stream in streams:
        console.print()
        for table in (stream.loss_table(), stream.cost_table(), stream.spent_table()):
            print_table(console, table)
        for sentence in of_arms(stream.arms):
            console.print(sentence, markup=False, highlight=False)
    if len(streams) > 1:
        console.print("", *_over_streams(streams), sep="\n", markup=False, highlight=False)
    runs = [run for arms in result["streams"].values() for arm in arms.values() for run in arm["runs"]]
    logs = {"/".join(Path(run["folder"]).parts[-2:]): run["log"] for run in runs if not run["finished"]}
    for name, message in result["failed"].items():
        failed = terminal.visible(f"  {name}: {message} See {logs[name]}")
        console.print(Text.assemble(("failed", "red"), failed), soft_wrap=True)
    for note in result["notes"]:
        console.print(Text.assemble(("note", "yellow"), terminal.visible(f"    {note}")), soft_wrap=True)


def save_curves(result: Json, folder: Path) -> list[str]:
    """Write curves-STREAM.png and .svg; returns one line per picture, or a note when matplotlib lacks."""
    lines = []
    try:
        for stream in streams_of(result):
            chart = stream.curves()
            made = f"none for {stream.name}: no run finished."
            if chart:
                made = f"{save_figure(chart, folder / f'{chart.id}.png', 'windows')} (and .svg)"
            lines.append(f"curves   {made}")
    except ImportError:
        return [f"curves   none: {missing_extra('drawing them', 'matplotlib', 'report', 'use the numbers')}"]
    return lines


def streams_of(result: Json) -> "list[Stream]":
    """The streams of a comparison.json."""
    several = len(result["streams"]) > 1
    return [
        Stream(
            name,
            arms,
            result["baseline"],
            f" ({name})" if several else "",
            result.get("tail_margin"),
            result.get("alpha", 0.05),
        )
        for name, arms in result["streams"].items()
    ]


@dataclass(frozen=True)
class Stream:
    """What the arms reached on one stream."""

    name: str
    arms: Json  # by name, as in comparison.json
    baseline: str
    suffix: str  # of the titles, to tell streams apart
    tail_margin: float | None = None  # nats per token; None in a comparison of an earlier version
    alpha: float = 0.05

    def verdicts(self) -> dict[str, str]:
        """Arm → `gain`, `worse`, `no gain`, `undetermined` or `too few seeds`, where it was compared."""
        found = {name: arm["difference"] for name, arm in self.arms.items()}
        return {name: self._verdict_word(one) for name, one in found.items() if one is not None}

    def sentence(self) -> str:
        """The verdicts in a sentence."""
        parts = [
            f"{name} {fixed(found['mean'], '+.4f')} nats of test loss against {self.baseline}"
            f"{self._tested(found)}: {self._verdict(found).replace(': ', ', ')}"
            for name, arm in self.arms.items()
            if (found := arm["difference"]) is not None
        ]
        return ("; ".join(parts) or "No pair of runs has finished") + f"{self.suffix}."

    def curves(self) -> Chart:
        """Mean validation loss over the seeds with their range, and the baseline's final level."""
        series, levels = [], []
        for index, (name, arm) in enumerate(self.arms.items()):
            curves = [run["curve"] for run in arm["runs"] if run["finished"]]
            if not curves:
                continue
            axes = [axis for axis in AXIS_LABELS if axis.lower() in curves[0]]
            x = {axis: np.mean([curve[axis.lower()] for curve in curves], axis=0) for axis in axes}
            losses = np.array([curve["validation_loss"] for curve in curves])  # [seeds, evaluations]
            mean, low, high = losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)
            series.append(Series(name, x, mean, low=low, high=high, style=index))
            if name == self.baseline:
                levels.append((float(mean[-1]), f"final loss of {name}"))
        seeds = max(map(_finished, self.arms.values()))
        title = f"Held-out loss, mean and range of {_count(seeds, 'seed')}{self.suffix}"
        return Chart(f"curves-{self.name}", title, "validation loss, nats per token", series, levels=levels)

    def forests(self) -> list[Forest]:
        """Test loss against the baseline, and the cost to reach its final loss; in windows read only where
        an arm rejects some."""
        costs = [arm["to_target"] for arm in self.arms.values()]
        rejects = any("read" in cost and cost["read"] != cost["windows"] for cost in costs)
        found = {
            name: arm["difference"] and _with_interval(arm["difference"]) for name, arm in self.arms.items()
        }
        difference = Forest(
            f"difference-{self.name}",
            f"Test loss against {self.baseline}{self.suffix}",
            "difference, nats per token (less is better)",
            self._intervals(found, self._verdict_word),
            neutral=0.0,
            note=f"Mean of the paired differences, a small dot for each seed. {self._explained()}",
        )
        return [difference, *(self._ratio(axis) for axis in RATIO_AXES if axis != "read" or rejects)]

    def _ratio(self, axis: str) -> Forest:
        label = AXIS_LABELS[axis]
        costs = {name: arm["to_target"][axis.lower()] for name, arm in self.arms.items()}
        read = " A stream filter reads windows that it rejects, without a forward pass." * (axis == "read")
        bound = ""
        if any(cost is not None and cost["censored"] for cost in costs.values()):
            bound = (
                " An arrow is a bound from below: a seed never got there, and counts with all that it spent."
            )
        return Forest(
            f"ratio-{axis.lower()}-{self.name}",
            f"{label[0].upper()}{label[1:]} to reach {self.baseline}'s final loss{self.suffix}",
            f"over what {self.baseline} needed (less is better)",
            self._intervals(costs, lambda cost: f"{'> ' * bool(cost['censored'])}{cost['mean']:.2f}×"),
            neutral=1.0,
            note=f"Geometric mean over the seeds, a small dot for each.{bound}{read}",
        )

    def _intervals(self, summaries: Json, note: Callable[[Json], str]) -> list[Interval]:
        """One for each arm that was measured against the baseline."""
        return [
            Interval(
                name,
                *(summary[bound] for bound in ("mean", "low", "high")),
                note=note(summary),
                censored=bool(summary.get("censored")),
                style=style,
                points=_by_seed(summary),
            )
            for style, (name, summary) in enumerate(summaries.items())
            if summary is not None and name != self.baseline
        ]

    def loss_table(self) -> Table:
        """Final test loss of each arm in nats per token, and the verdict on it."""
        rows = []
        for name, arm in self.arms.items():
            judged = ["–", "–", "–", "baseline" if name == self.baseline else "no pairs"]
            if (found := arm["difference"]) is not None:
                interval = _interval(_with_interval(found), "+.4f")
                p = f"{found['p']:.3f}" if self._can_decide(found) else "–"
                judged = [fixed(found["mean"], "+.4f"), interval, p, self._verdict(found)]
            rows.append([name, str(_finished(arm)), fixed(arm["test_loss"], ".4f"), *judged])
        return Table(
            f"Test loss, mean of the seeds, and change against {self.baseline}{self.suffix}",
            ["arm", "seeds", "loss", "change", "95 % interval", "p", "verdict"],
            rows,
            f"Nats per token, less is better. {self._explained()}",
        )

    def _explained(self) -> str:
        """How to read the interval, p and verdict of the test loss."""
        found = [arm["difference"] for arm in self.arms.values() if arm["difference"] is not None]
        sentences = []
        if any(map(_of_earlier_version, found)):
            sentences.append(
                "The intervals are those of an earlier version, which can leave out 0 where p is above 0.05: "
                "compare again, finished runs are kept."
            )
        elif any(map(self._can_decide, found)):
            over = "seeds and test windows" if any(one["test"] == "two-way" for one in found) else "seeds"
            sentences.append(
                f"Interval and p are of one test over {over}: the interval leaves out 0 exactly when p is "
                f"below {self.alpha:g}."
            )
        if few := sorted({one["seeds"] for one in found if not self._can_decide(one)}):
            noun = "seed" if few == [1] else "seeds"
            sentences.append(
                f"{' or '.join(map(str, few))} {noun} cannot decide: the smallest p of n seeds is 2/2ⁿ, and "
                f"only from {self._fewest()} on below {self.alpha:g}, so there is no interval either."
            )
        return " ".join(sentences)

    def _fewest(self) -> int:
        """Seeds from which a sign-flip test can reject."""
        return next(n for n in range(1, 64) if 2 / 2**n < self.alpha)

    def _can_decide(self, difference: Json) -> bool:
        return difference["seeds"] >= self._fewest()

    def _tested(self, difference: Json) -> str:
        return f", p = {difference['p']:.3f}" if self._can_decide(difference) else ""

    def _verdict_word(self, difference: Json) -> str:
        """The verdict without the number of missing seeds."""
        return self._verdict(difference).partition(":")[0]

    def _verdict(self, difference: Json) -> str:
        """`gain`, `undetermined: 3 more seeds`, or `too few seeds: 3 more`."""
        more = difference["more_seeds"]
        if not self._can_decide(difference):
            return f"too few seeds: {more} more"
        return difference["verdict"] + (f": {_count(more, 'more seed')}" if more else "")

    def spent_table(self) -> Table:
        """What a run of each arm read and spent, and its share of test windows that ended clearly worse."""
        rows = []
        for name, arm in self.arms.items():
            spent, tail = arm.get("spent") or {}, arm.get("tail")
            counts = [fixed(spent.get(total), ",.0f") for total in ("windows_read", "windows_trained")]
            others = [fixed(spent.get("flops"), ".2e"), fixed(spent.get("seconds"), ",.1f")]
            share = ["–", "–"]
            if tail is not None:
                percent = {bound: tail[bound] and 100 * tail[bound] for bound in ("mean", "low", "high")}
                share = [fixed(percent["mean"], ".1f"), _interval(percent, ".1f")]
            rows.append([name, *counts, *others, *share])
        margin = fixed(self.tail_margin, "g")
        return Table(
            f"Totals of a run, and tail: % of test windows over {margin} nats worse{self.suffix}",
            ["arm", "read", "trained", "FLOPs", "seconds", "tail", "95 % interval"],
            rows,
            f"Means over the seeds. A window is in the tail when it ends more than {margin} nats per token "
            f"worse than under {self.baseline} with the same seed.",
        )

    def cost_table(self) -> Table:
        """Cost to reach the baseline's final validation loss, with 95 % intervals, and seeds that did."""
        axes = [axis for axis in RATIO_AXES if axis != "read"]
        rows = []
        for name, arm in self.arms.items():
            costs = arm["to_target"]
            windows = costs["windows"]
            seeds = "–" if windows is None else f"{windows['seeds'] - windows['censored']}/{windows['seeds']}"
            rows.append([name, *(_ratio(costs[axis.lower()]) for axis in axes), seeds])
        title = f"Cost to reach {self.baseline}'s final loss, over {self.baseline}'s own{self.suffix}"
        costs = [cost for arm in self.arms.values() for cost in arm["to_target"].values() if cost is not None]
        interval = " and its 95 % interval" if any(cost["low"] is not None for cost in costs) else ""
        notes = [f"Geometric mean over the seeds{interval}; below 1 is cheaper."]
        if any(cell.startswith(">") for row in rows for cell in row):
            notes.append(
                "'> 1.20 [> 1.10]' are bounds from below: some seed never got there and counts with all that "
                "it spent, so the mean is above 1.20, the lower end of its interval above 1.10, and there is "
                "no upper end."
            )
        return Table(title, ["arm", *axes, "reached"], rows, " ".join(notes))


def _of_earlier_version(difference: Json) -> bool:
    """Whether its interval is not that of its test."""
    return "test" not in difference


def _with_interval(difference: Json) -> Json:
    """The difference with the interval to show; an earlier version kept it under other names."""
    low, high = (difference.get(f"{end}_with_text") for end in ("low", "high"))
    return difference if low is None else difference | {"low": low, "high": high}


def _by_seed(summary: Json) -> list[float]:
    """The differences or ratios of the seeds; none in a comparison of an earlier version."""
    found = summary.get("by_seed", [])
    return [ratio["ratio"] for ratio in found.values()] if isinstance(found, dict) else found


def _interval(summary: Json, form: str) -> str:
    """`[low, high]`; a dash without one."""
    low, high = (fixed(summary[bound], form) for bound in ("low", "high"))
    return "–" if summary["low"] is None else f"[{low}, {high}]"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _finished(arm: Json) -> int:
    return sum(run["finished"] for run in arm["runs"])


def _ratio(summary: Json | None) -> str:
    """`0.72 [0.65, 0.80]`; a bound from below is `> 1.20 [> 1.10]`."""
    if summary is None:
        return "–"
    low, high = summary["low"], summary["high"]
    if summary["censored"]:
        return f"> {summary['mean']:.2f}" + ("" if low is None else f" [> {low:.2f}]")
    return f"{summary['mean']:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")
