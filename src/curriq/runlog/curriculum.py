"""A curriculum as a file: which windows were offered in each step, and how they were weighed.

`curriq export` writes it, `--curriculum` reads it. The tokens travel with it, so that a replay needs neither
the sources nor their order: only the tokenizer and the length of a window must be the same.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from curriq.config import RunConfig, require
from curriq.errors import CurriqError

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("step", "row", "window_id", "source", "score", "weight", "tokens")
KEY = b"curriq"
"""Entry of the Parquet metadata that holds `CurriculumAbout` as JSON."""


@dataclass(frozen=True, kw_only=True)
class CurriculumAbout:
    """What a replay must agree with, and where the file comes from.

    Attributes:
        tokenizer, held_out: entries of the run's data fingerprint.
        window: T, tokens per window.
        candidates: N, windows per step.
        steps: steps 0 … steps − 1 are in the file.
        method, seed: of the run.
    """

    tokenizer: str
    held_out: str
    window: int
    candidates: int
    steps: int
    method: str
    seed: int


@dataclass(frozen=True)
class CurriculumStep:
    """One step of the file, in the order of the proposal.

    Attributes:
        tokens: token ids, −1 − id where one is not learnt.
        window_ids: stable ids.
        source: index into `RecordedCurriculum.sources`.
        scores: log-weights, unnormalised; NaN where a window was not forwarded.
    """

    tokens: Int[np.ndarray, "N T"]
    window_ids: Int[np.ndarray, "N"]
    source: Int[np.ndarray, "N"]
    scores: Float[np.ndarray, "N"]


def write_curriculum(path: Path, parts: "Iterable[pa.Table]", **about: Any) -> None:
    """Write tables with `COLUMNS` in the order of the steps; a step lies in one table.

    Args:
        path: the file.
        parts: the tables.
        about: fields of `CurriculumAbout`.

    Raises:
        OSError: the disk refused it; no half file is left.
    """
    import pyarrow.parquet as pq

    checked = CurriculumAbout(**about)
    temporary = path.with_name(f".tmp-{path.name}")
    writer = None
    try:
        for part in parts:
            part = part.replace_schema_metadata({KEY: json.dumps(asdict(checked))})
            writer = writer or pq.ParquetWriter(temporary, part.schema, compression="zstd")
            writer.write_table(part, row_group_size=max(1, len(part)))
        assert writer is not None, "no part"
        writer.close()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class RecordedCurriculum:
    """Reads a file step by step; one row group is in memory at a time.

    Args:
        path: what `curriq export` wrote.

    Raises:
        CurriqError: there is no such file, or it is no curriculum.
    """

    def __init__(self, path: str | Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = Path(path)
        try:
            self._file = pq.ParquetFile(self.path)
            self.about = CurriculumAbout(**json.loads(self._file.schema_arrow.metadata[KEY]))
            if tuple(self._file.schema_arrow.names) != COLUMNS:
                raise KeyError("columns")
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            why = "there is no such file" if isinstance(error, FileNotFoundError) else "it is no curriculum"
            raise CurriqError(
                f"--curriculum {path} cannot be read ({why}): `curriq export RUN` writes one."
            ) from None
        self._groups = [self._file.metadata.row_group(i) for i in range(self._file.num_row_groups)]
        first = self._file.read_row_group(0, columns=["source"]) if self._groups else None
        self.sources: list[str] = (
            [] if first is None else first["source"].combine_chunks().dictionary.to_pylist()
        )
        self._first = [group.column(0).statistics.min for group in self._groups]
        self._loaded: tuple[int, dict[str, Any]] | None = None

    def __getitem__(self, step: int) -> CurriculumStep:
        """One step; the caller has compared it with `about.steps`."""
        group = int(np.searchsorted(self._first, step, side="right")) - 1
        columns = self._columns(group)
        rows = np.flatnonzero(columns["step"] == step)
        rows = rows[np.argsort(columns["row"][rows], kind="stable")]
        return CurriculumStep(*(columns[name][rows] for name in ("tokens", "window_id", "source", "score")))

    def _columns(self, group: int) -> dict[str, Any]:
        if self._loaded is None or self._loaded[0] != group:
            table = self._file.read_row_group(group)
            tokens = table["tokens"].combine_chunks()
            columns = {
                name: table[name].to_numpy(zero_copy_only=False) for name in ("step", "row", "window_id")
            }
            columns["tokens"] = tokens.flatten().to_numpy().reshape(len(tokens), self.about.window)
            columns["source"] = table["source"].combine_chunks().indices.to_numpy()
            columns["score"] = table["score"].to_numpy(zero_copy_only=False).astype(np.float32)
            self._loaded = group, columns
        return self._loaded[1]


def open_curriculum(
    config: RunConfig, fingerprint: Mapping[str, str], source_names: Sequence[str]
) -> RecordedCurriculum:
    """The curriculum that a run replays.

    Args:
        config: of the run.
        fingerprint: of its data.
        source_names: of its stream.

    Raises:
        CurriqError: the file was made with another tokenizer, window length, N or held-out text; it is
            shorter than the run; or it has a source that the run does not know.
    """
    curriculum = RecordedCurriculum(config.data.curriculum)
    about, n = curriculum.about, config.train.num_candidates
    name = f"--curriculum {config.data.curriculum}"
    for what, theirs, ours, way_out in (
        ("tokenizer", about.tokenizer, fingerprint["tokenizer"], "use that run's --tokenizer and sources"),
        ("window", about.window, config.data.window, f"use --window {about.window}"),
        ("number of candidates", about.candidates, n, f"use --num-candidates {about.candidates}"),
        (
            "held-out text",
            about.held_out,
            fingerprint["held_out"],
            "its windows may be test text here: use that run's --target, --held-out-share and set sizes",
        ),
    ):
        require(theirs == ours, f"{name}: its {what} is {theirs}, this run's is {ours}: {way_out}.")
    steps = config.train.steps
    require(
        steps <= about.steps,
        f"{name} has {about.steps} steps, this run {steps}: use --steps {about.steps} or fewer.",
    )
    unknown = [source for source in curriculum.sources if source not in source_names]
    require(
        not unknown,
        f"{name} has windows of {unknown}: name these sources with --sources; weight=0 will do.",
    )
    return curriculum
