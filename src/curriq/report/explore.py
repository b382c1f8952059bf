"""Why this window? The highest and lowest scores of some steps, with the text of the windows."""

import numpy as np

from curriq.report.chart import Explorer, Json, Section, numbers
from curriq.report.runlog import RunLog
from curriq.runlog.read import CANDIDATE_NUMBERS, CandidateRows, read_windows
from curriq.runlog.selection import appearances

MOST_SEEN = 40
"""Appearances of one window that the page lists."""

WRITTEN = "it is written with each checkpoint, unless --no-log-candidates is set"
TITLES = {"q": "Q", "accept_prob": "acceptance probability"}


def explorer(run: RunLog) -> Section:
    """Section 4 of the report."""
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
    return Section("why", title, answer, [Explorer(type="windows", content=content)])


def shown_texts(section: Section) -> dict[str, str]:
    """Id → text of the windows that a section's explorer shows; empty where no text was kept."""
    for block in section.blocks:
        if isinstance(block, Explorer):
            ids, texts = block.content["ids"], block.content["texts"]
            return dict(zip(ids, texts or [""] * len(ids), strict=True))
    return {}


def ranked_by(rows: CandidateRows) -> str:
    """The column that the windows of a step are ordered by: the acceptance probability, which rejected
    windows have too; or Q, or what the method has instead."""
    for name in ("accept_prob", "q", "score", "loss"):
        values = rows.columns.get(name)
        if values is not None and (~np.isnan(values)).any() and np.nanmax(values) > np.nanmin(values):
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
    texts = [""] * len(ids)
    for place, text in zip(np.flatnonzero(where >= 0), kept.texts(where[where >= 0]), strict=True):
        texts[place] = cut(text, run.detail.characters)
    seen = appearances(run.folder, ids, MOST_SEEN)
    columns = {name: numbers(rows.columns[name]) for name in CANDIDATE_NUMBERS if name in rows.columns}
    if len({value for value in columns["score"] if value is not None}) < 2:
        del columns["score"]  # all alike says nothing
    measured = run.windows.find(ids)
    return {
        "order": order,
        "sources": rows.names,
        "topics": [] if run.topics is None else run.topics.names,
        "step": rows.step.tolist(),
        "window": np.searchsorted(ids, rows.window_id).tolist(),
        "source": rows.source.tolist(),
        "columns": {name: values for name, values in columns.items() if any(v is not None for v in values)},
        # A 63-bit id does not fit a JavaScript number.
        "ids": [str(i) for i in ids],
        "topic": [] if run.topics is None else np.where(measured >= 0, run.topics.of[measured], -1).tolist(),
        "texts": texts if any(texts) else [],
        "seen": [list(map(numbers, seen.get(int(i), []))) for i in ids],
    }


def cut(text: str, characters: int) -> str:
    """The beginning of a text, with a mark where something is missing."""
    return text if len(text) <= characters else text[:characters] + " …"
