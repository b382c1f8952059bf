"""Why this window? The highest and lowest scores of some steps, with the text of the windows."""

from typing import Any

import numpy as np

from curriq.report.chart import Explorer, Section, numbers
from curriq.report.runlog import RunLog
from curriq.report.selection import NUMBERS, Part, appearances
from curriq.runlog.kept_windows import read_windows

TITLES = {"q": "Q", "accept_prob": "acceptance probability"}


def explorer(run: RunLog) -> Section:
    """Section 4 of the report."""
    title = "Why this window?"
    shown = run.selection.shown
    if shown is None:
        return Section(
            id="why",
            title=title,
            answer="The run has no candidates table yet: it is written with each checkpoint, unless "
            "--no-log-candidates is set.",
        )
    order = ranked_by(shown)
    picked = _ends(shown, order, run.detail.rows)
    content = _content(run, picked, order)
    steps = len(np.unique(picked.step))
    total = len(run.selection.step)
    answer = (
        f"The windows with the highest and lowest {TITLES.get(order, order)} at {steps} of {total:,} steps: "
        "choose a step, search all texts shown here, or follow one window over the run."
    )
    if order == "accept_prob":
        answer += (
            " Those that the steered stream passed over were not forwarded: they have no Q and no loss here."
        )
    if not content["texts"]:
        answer += " The run kept no texts (--log-windows-mb 0), so only ids are shown."
    return Section(id="why", title=title, answer=answer, blocks=[Explorer(type="windows", content=content)])


def shown_texts(section: Section) -> dict[str, str]:
    """Id → text of the windows that a section's explorer shows; empty where no text was kept."""
    for block in section.blocks:
        if isinstance(block, Explorer):
            ids, texts = block.content["ids"], block.content["texts"]
            return dict(zip(ids, texts or [""] * len(ids), strict=True))
    return {}


def ranked_by(part: Part) -> str:
    """What the windows of a step are ordered by: the chance that a steered stream gave them, which also those
    have that it passed over; or Q, or what the method has instead."""
    for name in ("accept_prob", "q", "score", "loss"):
        values = part.columns.get(name)
        if values is not None and (~np.isnan(values)).any() and np.nanmax(values) > np.nanmin(values):
            return name
    return "loss"


def _ends(part: Part, order: str, rows: int) -> Part:
    """Of each step the `rows` windows with the highest and lowest values, highest first. Windows that were
    not forwarded come last."""
    kept = []
    for step in np.unique(part.step):
        where = np.flatnonzero(part.step == step)
        values, then = (-np.nan_to_num(part.columns[name][where], nan=-np.inf) for name in (order, "weight"))
        down = where[np.lexsort((then, values))]
        kept.append(down if len(down) <= rows else np.concatenate([down[: rows // 2], down[-(rows // 2) :]]))
    return part.take(np.concatenate(kept))


def _content(run: RunLog, part: Part, order: str) -> dict[str, Any]:
    ids = np.unique(part.window_id)
    kept = read_windows(run.folder)
    where = kept.find(ids)
    texts = [""] * len(ids)
    for place, text in zip(np.flatnonzero(where >= 0), kept.texts(where[where >= 0]), strict=True):
        texts[place] = cut(text, run.detail.characters)
    seen = appearances(run.folder, ids)
    topic = _topics(run, ids)
    columns = {name: numbers(part.columns[name]) for name in NUMBERS if name in part.columns}
    if len({value for value in columns["score"] if value is not None}) < 2:
        del columns["score"]  # all alike says nothing
    return {
        "order": order,
        "sources": part.names,
        "topics": [] if run.topics is None else run.topics.names,
        "step": part.step.tolist(),
        "window": np.searchsorted(ids, part.window_id).tolist(),
        "source": part.source.tolist(),
        "columns": {name: values for name, values in columns.items() if any(v is not None for v in values)},
        # A 63-bit id does not fit a JavaScript number.
        "ids": [str(i) for i in ids],
        "topic": topic,
        "texts": texts if any(texts) else [],
        "seen": [seen.get(int(i), []) for i in ids],
    }


def _topics(run: RunLog, ids: np.ndarray) -> list[int]:
    if run.topics is None:
        return []
    where = run.windows.find(ids)
    return np.where(where >= 0, run.topics.of[where], -1).tolist()


def cut(text: str, characters: int) -> str:
    """The beginning of a text, with a mark where something is missing."""
    return text if len(text) <= characters else text[:characters] + " …"
