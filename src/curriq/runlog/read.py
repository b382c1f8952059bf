"""Readers of a run's folder. They never import torch, so that a report opens anywhere and at once."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curriq.errors import CurriqError

if TYPE_CHECKING:
    import pyarrow as pa


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`, one dict per step; docs/metrics.md defines the names.

    A line without its end is left out: the run is still writing it, or was killed in it.

    Raises:
        CurriqError: there is no log, or a line of it is damaged.
    """
    path = Path(run_dir) / "metrics.jsonl"
    rows = []
    for number, line in enumerate(existing(path).read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise CurriqError(f"{path}, line {number}, is damaged ({error}): delete the line.") from None
    return rows


def read_candidates(run_dir: str | Path) -> "pa.Table":
    """All parts of the candidates table, in the order of the steps; docs/metrics.md defines the columns.

    Raises:
        CurriqError: the run logged no candidates, or a part is damaged.
    """
    folder = Path(run_dir) / "candidates"
    return _read_parts(
        folder,
        f"{folder} holds no candidates: the run had --no-log-candidates, or has saved no checkpoint yet.",
    )


def read_queries(run_dir: str | Path) -> "pa.Table":
    """All parts of the queries table, in the order of the steps; docs/metrics.md defines the columns.

    Raises:
        CurriqError: the run logged no queries, or a part is damaged.
    """
    folder = Path(run_dir) / "queries"
    return _read_parts(
        folder,
        f"{folder} holds no queries: the run had no --proposer that makes any, had --no-log-candidates, or "
        "has saved no checkpoint yet.",
    )


def _read_parts(folder: Path, missing: str) -> "pa.Table":
    import pyarrow as pa

    parts = sorted(folder.glob("part-*.parquet"))
    if not parts:
        raise CurriqError(missing)
    # A run that another version resumed may have a column in its later parts only.
    tables = pa.concat_tables([read_part(part) for part in parts], promote_options="default")
    return tables.unify_dictionaries()


def read_part(path: Path, columns: list[str] | None = None) -> "pa.Table":
    """One part of a table; all columns when None are named.

    Raises:
        CurriqError: it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).read(columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise CurriqError(f"{path} is damaged ({error}): delete it to read the others.") from None


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """The fields of `summary.json`; docs/metrics.md defines them.

    Raises:
        CurriqError: the run has not ended, or the file is damaged.
    """
    path = Path(run_dir) / "summary.json"
    try:
        return json.loads(existing(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CurriqError(f"{path} is damaged ({error}): resume the run to write it again.") from None


def existing(path: Path) -> Path:
    """The path of a file that exists.

    Raises:
        CurriqError: it does not.
    """
    if not path.is_file():
        raise CurriqError(f"{path} does not exist: give the folder of a run that has written one.")
    return path
