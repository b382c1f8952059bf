"""What `curriq compare` found, for Python and for notebooks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curriq.report.outcome import Stream, streams_of
from curriq.runlog.notebook import Sparkline, table_html
from curriq.runlog.read import existing, explained, read_document


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison: its folder, and the content of `comparison.json` (docs/compare.md defines
    the fields)."""

    folder: Path
    result: dict[str, Any]

    def _repr_html_(self) -> str:
        with explained(self.folder):
            return "".join(map(_stream_html, streams_of(self.result)))


def read_comparison(folder: str | Path) -> Comparison:
    """The result that `curriq compare` has left in a folder; CurriqError where there is none, or a damaged
    one."""
    path = existing(Path(folder) / "comparison.json")
    return Comparison(Path(folder), read_document(path, "compare again, finished runs are kept"))


def _stream_html(stream: Stream) -> str:
    table = stream.loss_table()
    rows = [
        [*row, Sparkline(_curve(stream.arms[row[0]]), f"validation loss of {row[0]}")] for row in table.rows
    ]
    return table_html(table.title, [*table.header, "validation loss"], rows, table.note)


def _curve(arm: dict[str, Any]) -> list[float]:
    """Mean validation loss over the finished seeds."""
    curves = [run["curve"]["validation_loss"] for run in arm["runs"] if run["finished"]]
    return np.mean(curves, axis=0).tolist() if curves else []
