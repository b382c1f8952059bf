"""The queries of some steps, beside the windows that they drew and what became of those."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curriq.report.chart import numbers
from curriq.report.explore import cut
from curriq.report.runlog import RunLog
from curriq.report.selection import Part, floats
from curriq.runlog.read import read_part

if TYPE_CHECKING:
    import pyarrow as pa

Json = dict[str, Any]
ASKED = ("q", "soft_q", "start_q", "changed", "score")
"""Columns of the queries table that the page shows."""
BECAME = ("weight", "loss", "q", "effect")
"""Columns of the candidates table that are shown of the window that a query drew."""


def read_steps(run_dir: str | Path, steps: np.ndarray) -> "pa.Table | None":
    """The queries of some steps; None when there are none.

    Only the parts that hold such a step are read whole: the texts of a long run do not fit into memory.

    Raises:
        CurriqError: a part is damaged.
    """
    import pyarrow as pa

    found = []
    for path in sorted((Path(run_dir) / "queries").glob("part-*.parquet")):
        wanted = np.isin(read_part(path, ["step"])["step"].to_numpy(), steps)
        if wanted.any():
            found.append(read_part(path).filter(pa.array(wanted)))
    return pa.concat_tables(found, promote_options="default") if found else None


def query_content(run: RunLog, shown: dict[str, str]) -> Json | None:
    """What the explorer of queries shows; None without queries.

    Args:
        run: the run; the steps are those of its explorer of windows.
        shown: id → text of the windows that the explorer of windows shows. Queries that drew one of them come
            first where a step has more than `detail.rows`, and the text of such a window stays there.
    """
    candidates = run.selection.shown
    table = None if candidates is None else read_steps(run.folder, np.unique(candidates.step))
    if candidates is None or table is None:
        return None
    table = table.take(_chosen(table, shown, run.detail.rows))
    window_ids = table["window_id"].to_pylist()
    texts: dict[str, str] = {}
    for window, text in zip(window_ids, table["window_text"].to_pylist(), strict=True):
        if window is not None:
            texts[str(window)] = "" if shown.get(str(window)) else cut(text or "", run.detail.characters)
    place = {window: index for index, window in enumerate(texts)}
    rows = _rows_in(candidates, table)
    asked = {name: floats(table[name]) for name in ASKED if name in table.column_names}
    became = {
        name: np.where(rows >= 0, candidates.columns[name][rows], np.nan)
        for name in BECAME
        if name in candidates.columns
    }
    known = {name: values for name, values in asked.items() if not np.isnan(values).all()}
    return {
        "order": "q" if "q" in known else "score",
        "step": table["step"].to_pylist(),
        "number": table["query"].to_pylist(),
        "queries": [cut(text, run.detail.characters) for text in table["text"].to_pylist()],
        "columns": {name: numbers(values) for name, values in known.items()},
        "window": [None if window is None else place[str(window)] for window in window_ids],
        "source": [-1 if row < 0 else int(candidates.source[row]) for row in rows],
        "sources": candidates.names,
        "became": {name: numbers(values) for name, values in became.items() if not np.isnan(values).all()},
        # A 63-bit id does not fit a JavaScript number.
        "ids": list(texts),
        "texts": list(texts.values()),
        "shortlist": _shortlists(run, table),
    }


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
    kept = []
    for one in np.unique(step):
        where = np.flatnonzero(step == one)
        kept.append(np.sort(where[np.argsort(~met[where], kind="stable")][:rows]))
    return np.concatenate(kept)


def _rows_in(candidates: Part, table: "pa.Table") -> np.ndarray:
    """Place of each query's window among the candidates, −1 where it drew none."""
    keys = zip(candidates.step.tolist(), candidates.row.tolist(), strict=True)
    where = {key: place for place, key in enumerate(keys)}
    drawn = zip(table["step"].to_pylist(), table["row"].to_pylist(), strict=True)
    return np.array([where.get(key, -1) for key in drawn], dtype=np.int64)
