"""Every number that a run logs: its name, its unit and what it means, as data.

A row of the log with any other name is refused, and `docs/metrics.md` is printed from here, so a metric
without a definition cannot exist. Imports nothing heavy: reports read the definitions without torch.
"""

from collections.abc import Iterable
from functools import cache

from curriq.config import did_you_mean
from curriq.train.definitions import CANDIDATES, GROUPS, LOSS, QUERIES, SUMMARY, WINDOWS, Group, Metric

__all__ = [
    "CANDIDATES",
    "GROUPS",
    "LOSS",
    "QUERIES",
    "SUMMARY",
    "WINDOWS",
    "Group",
    "Metric",
    "find",
    "metrics",
    "page",
    "table",
    "without_times",
]


def metrics() -> list[Metric]:
    """All metrics, in the order of the page."""
    return [metric for group in GROUPS for metric in group.metrics]


@cache
def find(name: str) -> Metric:
    """The definition of a metric; a member of a family finds the family's.

    Raises:
        KeyError: nobody has defined the name; the message offers the nearest one.
    """
    for metric in metrics():
        prefix, is_family, _ = metric.name.partition("<")
        if name == metric.name or (is_family and name.startswith(prefix) and len(name) > len(prefix)):
            return metric
    hint = did_you_mean(name, (metric.name for metric in metrics()))
    raise KeyError(f"unknown metric {name!r}.{hint} Define new ones in curriq/train/registry.py.")


def without_times(row: dict[str, float]) -> dict[str, float]:
    """The part of a row that two runs with one seed must agree on bit by bit."""
    return {name: value for name, value in row.items() if find(name).deterministic}


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def page() -> str:
    """The text of `docs/metrics.md`."""
    parts = [PREFACE]
    for group in GROUPS:
        rows = (
            (f"`{m.name}`", m.unit, m.doc + ("" if m.deterministic else " *Differs between runs.*"))
            for m in group.metrics
        )
        parts += [f"## {group.title}", group.prose, table(("name", "unit", "meaning"), rows)]
    columns = ((f"`{name}`", kind, doc) for name, kind, doc in CANDIDATES)
    parts += [CANDIDATES_PROSE, table(("column", "type", "meaning"), columns)]
    columns = ((f"`{name}`", kind, doc) for name, kind, doc in QUERIES)
    parts += [QUERIES_PROSE, table(("column", "type", "meaning"), columns)]
    columns = ((f"`{name}`", kind, doc) for name, kind, doc in WINDOWS)
    parts += [WINDOWS_PROSE, table(("column", "type", "meaning"), columns)]
    fields = ((f"`{m.name}`", m.unit, m.doc) for m in SUMMARY)
    parts += [SUMMARY_PROSE, table(("field", "unit", "meaning"), fields)]
    return "\n\n".join(parts) + "\n"


PREFACE = """# What a run logs

<!-- Printed from src/curriq/train/registry.py by: python -m curriq.train.metrics > docs/metrics.md -->

A run's folder holds `metrics.jsonl` (one JSON object per step, the numbers below), `candidates/` (every
window that was offered, as Parquet), `windows/` (their tokens), `summary.json` (the result),
`config.toml` (the settings), `checkpoints/` and, unless switched off, `tensorboard/` with the same names.
`curriq report RUN` makes one page of it all ([report.md](report.md)). The JSON rows are the truth:
numbers are written so that reading gives back the same bits, and a number that is not finite stops the
run instead of entering the log. Two runs with one seed, one thread count and one machine have equal
rows, except for the numbers marked *Differs between runs*; a resumed run has the rows of a run that was
never interrupted. A name is absent from a row when it was not measured in that step.

Read them without torch:

```python
from curriq.report.read import read_candidates, read_metrics, read_summary

rows = read_metrics("runs/soft-q-0")  # list of dicts
table = read_candidates("runs/soft-q-0")  # pyarrow.Table; .to_pandas() when pandas is there
```

All losses are in nats per token. `–` is a pure number."""

CANDIDATES_PROSE = """## The candidates table

`candidates/part-<first step>.parquet`, zstd-compressed, one part per checkpoint; one line per candidate
and step, so that every choice can be audited. A selector that narrows the proposal leaves windows that
are never forwarded: they have no score and no loss, and weight 0. The weights of a step sum to 1."""

QUERIES_PROSE = """## The queries table

`queries/part-<first step>.parquet`, where candidates are retrieved by queries (Langevin-RAG): one line per
query and step, with its text and the window that it drew, so that a person can read what the model went
looking for."""

WINDOWS_PROSE = """## The windows

`windows/part-<first step>.parquet`, zstd-compressed: what the ids of the candidates table stand for. At most
`--log-windows-mb` megabytes of tokens are kept, counted uncompressed; 0 keeps none."""

SUMMARY_PROSE = """## The summary

`summary.json`, written when a run ends or is interrupted. A field that was not measured is absent."""
