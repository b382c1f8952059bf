"""The queries of some steps, beside the windows that they drew and what became of those."""

from typing import TYPE_CHECKING

import numpy as np

from curriq.report.chart import Json, numbers
from curriq.report.explore import cut
from curriq.report.runlog import RunLog
from curriq.runlog.read import CandidateRows, floats, read_queries_of

if TYPE_CHECKING:
    import pyarrow as pa

ASKED = ("q", "soft_q", "start_q", "changed", "score")
"""Columns of the queries table that the page shows."""
BECAME = ("weight", "loss", "q", "effect")
"""Columns of the candidates table that are shown of the window that a query drew."""


def query_content(run: RunLog, shown: dict[str, str]) -> Json | None:
    """What the explorer of queries shows; None without queries.

    Args:
        run: the run; the steps are those of its explorer of windows.
        shown: id → text of the windows that the explorer of windows shows. Queries that drew one of them come
            first where a step has more than `detail.rows`, and the text of such a window stays there.
    """
    candidates = run.selection.shown
    table = None if candidates is None else read_queries_of(run.folder, np.unique(candidates.step))
    if candidates is None or table is None:
        return None
    table = table.take(_chosen(table, shown, run.detail.rows))
    characters = run.detail.characters
    # A 63-bit id does not fit a JavaScript number.
    windows = [None if window is None else str(window) for window in table["window_id"].to_pylist()]
    texts = {
        window: "" if shown.get(window) else cut(text or "", characters)
        for window, text in zip(windows, table["window_text"].to_pylist(), strict=True)
        if window is not None
    }
    place = {window: index for index, window in enumerate(texts)}
    rows = _rows_in(candidates, table)
    asked = _numbers({name: floats(table[name]) for name in ASKED if name in table.column_names})
    became = {name: candidates.columns[name][rows] for name in BECAME if name in candidates.columns}
    return {
        "order": "q" if "q" in asked else "score",
        "step": table["step"].to_pylist(),
        "number": table["query"].to_pylist(),
        "queries": [cut(text, characters) for text in table["text"].to_pylist()],
        "columns": asked,
        "window": [None if window is None else place[window] for window in windows],
        "source": np.where(rows >= 0, candidates.source[rows], -1).tolist(),
        "sources": candidates.names,
        "became": _numbers({name: np.where(rows >= 0, values, np.nan) for name, values in became.items()}),
        "ids": list(texts),
        "texts": list(texts.values()),
        "shortlist": _shortlists(run, table),
    }


def _numbers(columns: dict[str, np.ndarray]) -> Json:
    """The columns that have a number."""
    return {name: numbers(values) for name, values in columns.items() if not np.isnan(values).all()}


def _shortlists(run: RunLog, table: "pa.Table") -> Json | None:
    """The nearest windows of each query; an id stands once, because queries of a step share many.

    None for the log of a version that did not keep them.
    """
    if "shortlist" not in table.column_names:
        return None
    near = [ids or [] for ids in table["shortlist"].to_pylist()]
    place = {window: index for index, window in enumerate(dict.fromkeys(i for ids in near for i in ids))}
    softmax = run.setting("retrieval", "retrieval_draw") == "softmax"
    return {
        "ids": [str(window) for window in place],
        "windows": [[place[window] for window in ids] for ids in near],
        "scores": [numbers(np.array(scores or [])) for scores in table["shortlist_scores"].to_pylist()],
        "temperature": run.setting("retrieval", "retrieval_temperature") if softmax else None,
    }


def _chosen(table: "pa.Table", shown: dict[str, str], rows: int) -> np.ndarray:
    """At most `rows` queries of each step in the order of the table."""
    step = table["step"].to_numpy()
    met = np.array([str(window) in shown for window in table["window_id"].to_pylist()])
    order = np.lexsort((~met, step))
    place = np.arange(len(order)) - np.searchsorted(step[order], step[order])  # in its step
    return np.sort(order[place < rows])


def _rows_in(candidates: CandidateRows, table: "pa.Table") -> np.ndarray:
    """Place of each query's window among the candidates, −1 where it drew none."""
    keys = zip(candidates.step.tolist(), candidates.row.tolist(), strict=True)
    where = {key: place for place, key in enumerate(keys)}
    drawn = zip(table["step"].to_pylist(), table["row"].to_pylist(), strict=True)
    return np.array([where.get(key, -1) for key in drawn], dtype=np.int64)
