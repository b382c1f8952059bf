"""What did Langevin-RAG ask for? The diagnostics of Section 3.6, and the queries beside what they found."""

import math

from curriq.report.chart import Block, Chart, Explorer, Section
from curriq.report.explore import WRITTEN, query_content
from curriq.report.runlog import RunLog, line_charts, lines_of, other_charts, time_layers

RETRIEVAL = ("langevin/", "retrieval/", "buffer/")
"""Prefixes of the metrics of this section."""
PHASES = ("time/ingest", "time/search", "time/retrieve")
"""Parts of `time/propose`."""
LEAST_CHANGED = 0.05
"""Share of tokens changed below which nothing has been searched; as in `langevin/diagnostics.py`."""
BEST_OF_40 = 2.16
"""Expected greatest of 40 independent standard normal numbers; also a level in `assets/lines.toml`."""
LINES = lines_of("retrieval")


def retrieval(run: RunLog, shown: dict[str, str]) -> Section | None:
    """Section 5 of the report; None for a run that takes its windows from the stream.

    Args:
        run: the run.
        shown: id → text of the windows that the explorer of windows shows; such texts are not repeated.
    """
    names = [name for name in run.columns.names() if name.startswith(RETRIEVAL)]
    if not names:
        return None
    charts = line_charts(run, LINES)
    layers = time_layers(run, PHASES, "time/propose", PHASES, "diagnostics and the rest")
    note = "Ingest reads and encodes fresh windows; retrieve encodes the queries and draws."
    time = Chart("rag-time", "Time of proposing, by phase", "seconds per step", layers, note, kind="stack")
    blocks: list[Block] = [*charts, time, *other_charts(run, names, LINES)]
    content = query_content(run, shown)
    searched = "langevin/tokens_changed" in run.columns
    if content is not None:
        blocks += [_explained(run, content["step"]), Explorer("queries", content)]
    elif searched:
        blocks.append(f"The run has no table of queries yet: {WRITTEN}.")
    return Section("retrieval", "What did Langevin-RAG ask for?", _answer(run, searched), blocks)


def _answer(run: RunLog, searched: bool) -> str:
    if searched:
        changed, deviations = (_mean(run, f"langevin/{of}") for of in ("tokens_changed", "above_random_sd"))
        answer = f"The search changed {changed:.0%} of the query tokens."
        if changed < LEAST_CHANGED:
            answer += " So the queries are the initial strings, and what follows is about those."
        answer += (
            f" Q of the hard queries lies {_beside(deviations, '.1f', 'standard deviations')} that of random "
            f"strings (mean over the steps; the best of 40 such strings lies about {BEST_OF_40:.1f} above)."
        )
    else:
        proposer = run.setting("proposer", "?")
        answer = f"The windows came out of the ring buffer by `--proposer {proposer}`, without a search."
    advantage = _mean(run, "retrieval/q_advantage")
    if not math.isnan(advantage):
        answer += (
            f" Q of the windows retrieved lies {_beside(advantage, '.2g', 'nats per token')} that of random "
            "windows of the same buffer."
        )
    return answer


def _beside(difference: float, form: str, unit: str) -> str:
    return f"{abs(difference):{form}} {unit} {'below' if difference < 0 else 'above'}"


def _mean(run: RunLog, name: str) -> float:
    """Over the whole run; NaN for a metric that it has not logged."""
    _, values = run.columns.raw(name)
    return float(values.mean()) if len(values) else math.nan


def _explained(run: RunLog, steps: list[int]) -> str:
    count, total = len(set(steps)), len(run.selection.step)
    return (
        f"The queries of {count} of {total:,} steps, at most {run.detail.rows} of each, beside the window "
        "that each has drawn: choose a step, search the texts of both, or follow one query to what became of "
        "its window. Q is that of a query's hard tokens, soft Q that of the relaxed string behind them, "
        "start Q that of the initial string."
    )
