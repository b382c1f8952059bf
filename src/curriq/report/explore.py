"""Why this window, and what did Langevin-RAG ask for? Windows of some steps, and queries that drew them."""

import math
from collections.abc import Mapping
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import numpy as np

from curriq.report.chart import Block, Explorer, Json, Section, numbers
from curriq.report.runlog import RunLog, charts_of, time_layers
from curriq.runlog.read import CandidateRows, read_queries_of, read_windows
from curriq.runlog.selection import appearances

if TYPE_CHECKING:
    import pyarrow as pa

MOST_SEEN = 40
"""Appearances of one window that the page lists."""
ASKED = ("q", "soft_q", "start_q", "changed", "score")
"""Columns of the queries table that the page shows."""
BECAME = ("weight", "loss", "q", "effect")
"""Columns of the candidates table that are shown of the window that a query drew."""
WRITTEN = "it is written with each checkpoint, unless --no-log-candidates is set"
RETRIEVAL = ("langevin/", "retrieval/", "buffer/")
"""Prefixes of the metrics of this section."""
PHASES = ("time/ingest", "time/search", "time/retrieve")
"""Parts of `time/propose`."""
LEAST_CHANGED = 0.05
"""Share of tokens changed below which nothing has been searched; as in `langevin/samplers.py`."""
BEST_OF_40 = 2.16
"""Expected greatest of 40 independent standard normal numbers; also a level in `assets/charts.toml`."""
TITLES = {"q": "Q", "accept_prob": "acceptance probability"}


def explorer(run: RunLog) -> Section:
    """Section 4 of the report: the highest and lowest scores of some steps, with the texts."""
    title = "Why this window?"
    shown = run.selection.shown
    if shown is None:
        return Section("why", title, f"The run has no candidates table yet: {WRITTEN}.")
    order = ranked_by(shown)
    picked = _ends(shown, order, run.detail.rows)
    content = _content(run, picked, order)
    steps = f"{len(np.unique(picked.step))} of {len(run.selection.step):,} steps"
    answer = (
        f"The windows with the highest and lowest {TITLES.get(order, order)} at {steps}: choose a step, "
        "search all texts shown here, or follow one window over the run."
    )
    if order == "accept_prob":
        answer += " Windows that the stream filter rejected have no Q and no loss: they were not forwarded."
    if not content["texts"]:
        answer += " The run kept no texts (--log-windows-mb 0), so only ids are shown."
    return Section("why", title, answer, [Explorer("windows", content)])


def shown_texts(section: Section) -> dict[str, str]:
    """Id → text of the windows that a section's explorer shows; empty where no text was kept."""
    contents = [block.content for block in section.blocks if isinstance(block, Explorer)]
    pairs = (zip_longest(content["ids"], content["texts"], fillvalue="") for content in contents)
    return dict(chain.from_iterable(pairs))


def ranked_by(rows: CandidateRows) -> str:
    """The column that the windows of a step are ordered by: the acceptance probability, which rejected
    windows have too; or Q, or what the method has instead."""
    for name in ("accept_prob", "q", "score"):
        values = rows.columns.get(name, np.empty(0))
        if len(np.unique(values[~np.isnan(values)])) > 1:
            return name
    return "loss"


def _ends(candidates: CandidateRows, order: str, rows: int) -> CandidateRows:
    """Of each step the `rows` windows with the highest and lowest values, highest first. Windows that were
    not forwarded come last."""
    keys = (-np.nan_to_num(candidates.columns[name], nan=-np.inf) for name in ("weight", order))
    down = np.lexsort((*keys, candidates.step))
    steps = candidates.step[down]
    first, end = (np.searchsorted(steps, steps, side) for side in ("left", "right"))
    place = np.arange(len(down))
    from_either_end = np.minimum(place - first, end - 1 - place)
    return candidates.take(down[(from_either_end < rows // 2) | (end - first <= rows)])


def _content(run: RunLog, rows: CandidateRows, order: str) -> Json:
    ids = np.unique(rows.window_id)
    kept = read_windows(run.folder)
    where = kept.find(ids)
    known = where >= 0
    whole = iter(kept.texts(where[known]))
    texts = [_cut(next(whole), run.detail.characters) if there else "" for there in known]
    seen = appearances(run.folder, ids, MOST_SEEN)
    columns = _numbers(rows.columns)
    if len(set(columns.get("score", ())) - {None}) < 2:
        columns.pop("score", None)  # all alike says nothing
    measured = run.windows.find(ids)
    return {
        "order": order,
        "sources": rows.names,
        "topics": [] if run.topics is None else run.topics.names,
        "step": rows.step.tolist(),
        "window": np.searchsorted(ids, rows.window_id).tolist(),
        "source": rows.source.tolist(),
        "columns": columns,
        # A 63-bit id does not fit a JavaScript number.
        "ids": [str(i) for i in ids],
        "topic": [] if run.topics is None else np.where(measured >= 0, run.topics.of[measured], -1).tolist(),
        "texts": texts if any(texts) else [],
        # A step keeps all its digits.
        "seen": [[[int(step), *numbers(rest)] for step, *rest in seen.get(int(i), [])] for i in ids],
    }


def retrieval(run: RunLog, shown: dict[str, str]) -> Section | None:
    """Section 5 of the report: the diagnostics of Section 3.6, and the queries beside what they found; None
    for a run that takes its windows from the stream. `shown` is as in `query_content`."""
    names = [name for name in run.columns.names() if name.startswith(RETRIEVAL)]
    if not names:
        return None
    phases = time_layers(run, PHASES, "time/propose", PHASES, "diagnostics and the rest")
    blocks: list[Block] = [*charts_of(run, "retrieval", {"rag-time": phases}, names)]
    content = query_content(run, shown)
    searched = "langevin/tokens_changed" in run.columns
    if content is not None:
        steps = f"{len(set(content['step']))} of {len(run.selection.step):,} steps"
        how = (
            f"The queries of {steps}, at most {run.detail.rows} of each, beside the window that each drew: "
            "choose a step, search the texts of both, or follow one query to what became of its window. Q is "
            "that of a query's hard tokens, soft Q that of the relaxed string behind them, start Q that of "
            "the initial string."
        )
        blocks += [how, Explorer("queries", content)]
    elif searched:
        blocks.append(f"The run has no table of queries yet: {WRITTEN}.")
    return Section("retrieval", "What did Langevin-RAG ask for?", _retrieval_answer(run, searched), blocks)


def _retrieval_answer(run: RunLog, searched: bool) -> str:
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


def query_content(run: RunLog, shown: dict[str, str]) -> Json | None:
    """What the explorer of queries shows; None without queries.

    Args:
        run: its steps are those of its explorer of windows.
        shown: id → text of the windows in that explorer. Queries that drew one of them come first where a
            step has more than `detail.rows`, and the text of such a window is not repeated.
    """
    candidates = run.selection.shown
    table = None if candidates is None else read_queries_of(run.folder, np.unique(candidates.step))
    if candidates is None or table is None:
        return None
    queries = table.take(_chosen(table, shown, run.detail.rows)).to_pydict()
    characters = run.detail.characters
    drawn = [None if window is None else str(window) for window in queries["window_id"]]
    texts = {
        window: "" if shown.get(window) else _cut(text or "", characters)
        for window, text in zip(drawn, queries["window_text"], strict=True)
        if window is not None
    }
    place = {window: index for index, window in enumerate(texts)}
    rows = _rows_in(candidates, queries)
    columns = _numbers({name: queries[name] for name in ASKED if name in queries})
    became = {name: candidates.columns[name][rows] for name in BECAME if name in candidates.columns}
    return {
        "order": "q" if "q" in columns else "score",
        "step": queries["step"],
        "number": queries["query"],
        "queries": [_cut(text, characters) for text in queries["text"]],
        "columns": columns,
        "window": [None if window is None else place[window] for window in drawn],
        "source": np.where(rows >= 0, candidates.source[rows], -1).tolist(),
        "sources": candidates.names,
        "became": _numbers({name: np.where(rows >= 0, values, np.nan) for name, values in became.items()}),
        "ids": list(texts),
        "texts": list(texts.values()),
        "shortlist": _shortlists(run, queries),
    }


def _chosen(table: "pa.Table", shown: dict[str, str], rows: int) -> np.ndarray:
    """At most `rows` queries of each step in the order of the table."""
    step = table["step"].to_numpy()
    met = np.array([str(window) in shown for window in table["window_id"].to_pylist()])
    order = np.lexsort((~met, step))
    place = np.arange(len(order)) - np.searchsorted(step[order], step[order])  # in its step
    return np.sort(order[place < rows])


def _rows_in(candidates: CandidateRows, queries: dict[str, list]) -> np.ndarray:
    """Place of each query's window among the candidates, −1 where it drew none."""
    keys = zip(candidates.step.tolist(), candidates.row.tolist(), strict=True)
    where = {key: place for place, key in enumerate(keys)}
    drawn = zip(queries["step"], queries["row"], strict=True)
    return np.array([where.get(key, -1) for key in drawn], dtype=np.int64)


def _shortlists(run: RunLog, queries: dict[str, list]) -> Json | None:
    """The nearest windows of each query; an id stands once, because queries of a step share many.

    None for the log of a version that did not keep them.
    """
    if "shortlist" not in queries:
        return None
    near = [ids or [] for ids in queries["shortlist"]]
    place = {window: index for index, window in enumerate(dict.fromkeys(i for ids in near for i in ids))}
    softmax = run.setting("retrieval_draw") == "softmax"
    return {
        "ids": [str(window) for window in place],
        "windows": [[place[window] for window in ids] for ids in near],
        "scores": [numbers(scores or []) for scores in queries["shortlist_scores"]],
        "temperature": run.setting("retrieval_temperature") if softmax else None,
    }


def _numbers(columns: Mapping[str, np.ndarray | list]) -> Json:
    """The columns that have a number."""
    lists = {name: numbers(values) for name, values in columns.items()}
    return {name: values for name, values in lists.items() if any(value is not None for value in values)}


def _cut(text: str, characters: int) -> str:
    """The beginning of a text, with a mark where something is missing."""
    return text if len(text) <= characters else text[:characters] + " …"
