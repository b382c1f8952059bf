"""`RUN/windows/`: the tokens of every window that was offered, once each, so that a choice can be read.

The candidates table names windows by id; here an id becomes text again. Tokens are kept and not text:
they cost nothing to write, replay exactly (`curriq export`), and `windows/tokenizer.json` beside them
turns them into text without torch.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curriq.runlog.storage import write_atomically
from curriq.runlog.writers import drop_candidates, write_part
from curriq.types import Candidates

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("curriq")

BYTES_PER_TOKEN = 4
"""Before compression; on the disk a token of a vocabulary below 65,536 takes about half of it."""


class WindowLog:
    """`RUN/windows/part-<first step>.parquet`: id and tokens of each window at its first appearance.

    Steps are collected in memory and written as one part at each `flush`.

    Args:
        run_dir: folder of the run.
        start_step: first step that will be appended; windows first seen from there on are dropped.
        megabytes: bound on the tokens kept, uncompressed; windows that come after it are not kept. 0 keeps
            none and makes no folder.
        tokenizer: content of the tokenizer's `tokenizer.json`; empty when it has none.
    """

    def __init__(self, run_dir: Path, start_step: int, megabytes: float, tokenizer: str) -> None:
        self.folder = run_dir / "windows"
        self._budget = int(megabytes * 1e6)
        self._reserve = self._budget // 2
        self._known: set[int] = set()
        self._new: dict[str, list[np.ndarray]] = {"window_id": [], "step": [], "tokens": []}
        self._said = False
        if self._budget == 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        drop_candidates(self.folder, start_step)
        for ids, length in _kept(self.folder):
            self._known.update(ids)
            self._budget -= len(ids) * length * BYTES_PER_TOKEN
        if tokenizer:
            write_atomically(self.folder / "tokenizer.json", tokenizer.encode())

    def append(self, step: int, proposed: Candidates) -> None:
        """Collect the windows of a step that have not been seen before, then those that it passed over."""
        self._keep(step, proposed, self._budget > 0)
        if proposed.rejected is not None:
            # An export needs all that was taken, so what was passed over gets half of the room at most.
            self._keep(step, proposed.rejected, self._budget > self._reserve)

    def _keep(self, step: int, proposed: Candidates, room: bool) -> None:
        if not room:
            return
        ids = proposed.window_ids.tolist()
        fresh = []
        for row, window in enumerate(ids):
            if window not in self._known:
                self._known.add(window)
                fresh.append(row)
        if not fresh:
            return
        tokens = proposed.tokens.cpu().numpy()[fresh].astype(np.int32)
        self._new["window_id"].append(np.array([ids[row] for row in fresh], dtype=np.int64))
        self._new["step"].append(np.full(len(fresh), step, dtype=np.int32))
        self._new["tokens"].append(tokens)
        self._budget -= tokens.size * BYTES_PER_TOKEN
        if self._budget <= 0 and not self._said:
            self._said = True
            log.info(
                f"--log-windows-mb is used up at step {step}: the texts of later windows are not kept; the "
                "candidates table goes on."
            )

    def flush(self) -> None:
        """Write the collected windows as one part; on a full disk they stay in memory, with a warning."""
        if not self._new["step"]:
            return
        path = self.folder / f"part-{self._new['step'][0][0]:08d}.parquet"
        try:
            write_part(path, self._table())
        except OSError as error:
            log.warning(f"{path}: {error.strerror}. The windows wait in memory until the disk takes them.")
            return
        for column in self._new.values():
            column.clear()

    def _table(self) -> "pa.Table":
        import pyarrow as pa

        columns = {name: np.concatenate(parts) for name, parts in self._new.items()}
        tokens = columns.pop("tokens")
        flat = pa.array(tokens.reshape(-1))
        return pa.table(
            {name: pa.array(values) for name, values in columns.items()}
            | {"tokens": pa.FixedSizeListArray.from_arrays(flat, tokens.shape[1])}
        )


def _kept(folder: Path) -> list[tuple[list[int], int]]:
    """(window ids, tokens per window) of every part."""
    import pyarrow.parquet as pq

    parts = (pq.ParquetFile(path) for path in sorted(folder.glob("part-*.parquet")))
    return [
        (
            part.read(columns=["window_id"])["window_id"].to_pylist(),
            part.schema_arrow.field("tokens").type.list_size,
        )
        for part in parts
    ]
