"""`RUN/queries/part-<first step>.parquet`: what Langevin-RAG went looking for, and what it found."""

import logging
import math
from pathlib import Path
from typing import Any

from curriq.runlog.writers import drop_candidates, write_part
from curriq.types import Candidates

log = logging.getLogger("curriq")

WINDOW_CHARACTERS = 300
"""Beginning of a retrieved window's text that is kept; the window is found again by its id."""


class QueryLog:
    """Collects the queries of each step and writes them as one part at each `flush`, beside the candidates.

    The folder is made with the first part: a run without queries has none.

    Args:
        run_dir: folder of the run.
        start_step: first step that will be appended; what the parts hold from there on is dropped.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self.folder = run_dir / "queries"
        self._rows: list[dict[str, Any]] = []
        if self.folder.exists():
            drop_candidates(self.folder, start_step)

    def append(self, step: int, proposed: Candidates) -> None:
        """Collect one step; nothing when the candidates were not retrieved by queries."""
        queries = proposed.queries
        if queries is None:
            return
        ids = proposed.window_ids.tolist()
        columns = zip(
            queries.text,
            queries.q.tolist(),
            queries.soft_q.tolist(),
            queries.start_q.tolist(),
            queries.changed.tolist(),
            queries.row.tolist(),
            queries.score.tolist(),
            queries.window_text,
            queries.shortlist.tolist(),
            queries.shortlist_scores.tolist(),
            strict=True,
        )
        for number, (text, q, soft_q, start_q, changed, row, score, window_text, near, scores) in enumerate(
            columns
        ):
            drew = row >= 0
            there = sum(window >= 0 for window in near)  # those that are missing come last
            self._rows.append(
                {
                    "step": step,
                    "query": number,
                    "text": text,
                    "q": _known(q),
                    "soft_q": _known(soft_q),
                    "start_q": _known(start_q),
                    "changed": changed,
                    "row": row if drew else None,
                    "window_id": ids[row] if drew else None,
                    "score": score if drew else None,
                    "window_text": window_text[:WINDOW_CHARACTERS] if drew else None,
                    "shortlist": near[:there],
                    "shortlist_scores": scores[:there],
                }
            )

    def flush(self) -> None:
        """Write the collected steps as one part; on a full disk they stay in memory, with a warning."""
        if not self._rows:
            return
        import pyarrow as pa

        path = self.folder / f"part-{self._rows[0]['step']:08d}.parquet"
        types = {
            "step": pa.int32(),
            "query": pa.int32(),
            "text": pa.string(),
            "q": pa.float32(),
            "soft_q": pa.float32(),
            "start_q": pa.float32(),
            "changed": pa.float32(),
            "row": pa.int32(),
            "window_id": pa.int64(),
            "score": pa.float32(),
            "window_text": pa.string(),
            "shortlist": pa.list_(pa.int64()),
            "shortlist_scores": pa.list_(pa.float32()),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_part(path, pa.Table.from_pylist(self._rows, schema=pa.schema(types)))
        except OSError as error:
            log.warning(f"{path}: {error.strerror}. The queries wait in memory until the disk takes them.")
            return
        self._rows.clear()


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
