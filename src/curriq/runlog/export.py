"""`curriq export`: the order and the weights that a run learned, as one Parquet file to replay."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curriq.config import load_run_config
from curriq.errors import CurriqError
from curriq.runlog.curriculum import COLUMNS, write_curriculum
from curriq.runlog.read import KeptWindows, existing, part_paths, read_windows

if TYPE_CHECKING:
    import pyarrow as pa

MOST_ROWS = 8192
"""Rows of a row group, at least one step's: what a replay holds in memory at once."""


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="curriq export",
        description="Write what a run was offered and how it weighed it, as one Parquet file. "
        "`curriq train --curriculum FILE` replays it with another seed, model or size.",
    )
    parser.add_argument("RUN", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, help="the file (default: curriculum.parquet in the run's folder)")
    options = parser.parse_args(list(arguments))
    out = options.out or options.RUN / "curriculum.parquet"
    steps, candidates = export(options.RUN, out)
    size = f"{steps} steps of {candidates} windows, {out.stat().st_size / 1e6:.1f} MB"
    print(f"curriculum  {out} ({size})")
    print(f"replay      curriq train --curriculum {out} --num-candidates {candidates} …")
    return 0


def export(run: Path, out: Path) -> tuple[int, int]:
    """Write the curriculum of a run, up to its last checkpoint.

    Returns:
        Its steps, and the windows of each.

    Raises:
        CurriqError: the run kept no candidates, or not the tokens of all of them; or the file cannot be
            written.
    """
    config = load_run_config(run)
    fingerprint = json.loads(existing(run / "environment.json").read_text(encoding="utf-8"))["fingerprint"]
    parts = part_paths(run, "candidates")
    kept = read_windows(run)
    if not parts or not len(kept):
        what = "candidates (--no-log-candidates)" if not parts else "windows (--log-windows-mb 0)"
        raise CurriqError(
            f"{run} kept no {what}, or has saved no checkpoint yet: an export needs both. Train again with "
            "them."
        )
    steps = _steps(parts)
    about = dict(
        tokenizer=fingerprint["tokenizer"],
        held_out=fingerprint["held_out"],
        window=kept.stored.shape[1],
        candidates=config.train.num_candidates,
        steps=steps,
        method=config.method,
        seed=config.train.seed,
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_curriculum(out, _tables(parts, kept, config.train.num_candidates), **about)
    except OSError as error:
        raise CurriqError(f"--out {out} cannot be written: {error.strerror}.") from None
    return steps, config.train.num_candidates


def _steps(parts: list[Path]) -> int:
    import pyarrow.parquet as pq

    return 1 + int(pq.ParquetFile(parts[-1]).read(columns=["step"])["step"].to_numpy().max())


def _tables(parts: list[Path], kept: KeptWindows, n: int) -> "Iterator[pa.Table]":
    """Whole steps with their tokens, at most `MOST_ROWS` rows at a time; without rejected windows."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for path in parts:
        table = pq.ParquetFile(path).read()
        if "accept_prob" in table.column_names:
            table = table.filter((pc.field("row") < n) | pc.field("accept_prob").is_null())
        steps = table["step"].to_numpy()
        borders = np.concatenate([[0], 1 + np.flatnonzero(np.diff(steps)), [len(steps)]])
        start = 0
        for end, following in zip(borders[1:], [*borders[2:], None], strict=True):
            if following is not None and following - start <= MOST_ROWS:
                continue
            chunk = table.slice(start, end - start)
            where = kept.find(chunk["window_id"].to_numpy())
            if (where < 0).any():
                raise CurriqError(
                    f"the run did not keep the tokens of {(where < 0).sum()} windows of steps {steps[start]} "
                    f"to {steps[end - 1]}: --log-windows-mb was used up. Train again with a greater one."
                )
            flat = pa.array(kept.stored[where].reshape(-1))
            tokens = pa.FixedSizeListArray.from_arrays(flat, kept.stored.shape[1])
            yield chunk.append_column("tokens", tokens).select(COLUMNS)
            start = end
