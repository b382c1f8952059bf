"""A curriculum as a file: the candidates of each step of a run, in their order, and their weights.

`curriq export` writes it, `--curriculum` reads it. The tokens travel with it, so that a replay needs neither
the sources nor their order: only the tokenizer and the length of a window must be the same.
"""

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from curriq.config import RunConfig, load_run_config, require, validated
from curriq.errors import CurriqError
from curriq.parser import Parser
from curriq.runlog import read
from curriq.runlog.promise import listed_parts, of_part
from curriq.runlog.storage import replacing
from curriq.runlog.writers import token_column

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("step", "row", "window_id", "source", "score", "weight", "tokens")
KEY = b"curriq"
"""Entry of the Parquet metadata that holds `CurriculumAbout` as JSON."""
MOST_ROWS = 8192
"""Rows of a row group, at least one step's: what a replay holds in memory at once."""


@dataclass(frozen=True, kw_only=True)
class CurriculumAbout:
    """What a replay must agree with, and where the file comes from.

    `tokenizer` and `held_out` are entries of the run's data fingerprint, `window` is T, `candidates` N. A
    file from before `split_seed` is of split 0.
    """

    tokenizer: str
    held_out: str
    window: int
    candidates: int
    steps: int
    method: str
    seed: int
    split_seed: int = 0


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


class RecordedCurriculum:
    """Reads a file that `curriq export` wrote, step by step; one row group is in memory at a time.

    Raises:
        CurriqError: there is no such file, it is no curriculum, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        import pyarrow.parquet as pq

        self._path = path
        self.greatest_id = 0  # of all tokens
        with self._reading():
            # The checksums are those that `export` writes; a file without them is read all the same.
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            about = json.loads((self._file.schema_arrow.metadata or {})[KEY])
            self.about = validated(CurriculumAbout, about, str)
            if tuple(self._file.schema_arrow.names) != COLUMNS:
                raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
            self._first_steps, self.sources = self._check_all()
        self._loaded: tuple[int, dict[str, np.ndarray]] = (-1, {})

    def __getitem__(self, step: int) -> CurriculumStep:
        """One step; the caller has compared it with `about.steps`."""
        columns = self._columns(int(np.searchsorted(self._first_steps, step, side="right")) - 1)
        rows = np.flatnonzero(columns["step"] == step)
        rows = rows[np.argsort(columns["row"][rows], kind="stable")]
        return CurriculumStep(*(columns[name][rows] for name in ("tokens", "window_id", "source", "score")))

    def _check_all(self) -> tuple[list[int], list[str]]:
        """First step of each row group, and the names of all sources; ValueError for a file of another kind.

        It is read whole, because a replay takes hours and would meet a damaged group in their middle.
        """
        first, steps, names = [], 0, dict[str, None]()
        for group in range(self._file.num_row_groups):
            columns, sources = self._read_group(group)
            first.append(steps)
            steps += _check_steps(columns, steps, self.about)
            self.greatest_id = max(self.greatest_id, int(read.token_ids(columns["tokens"]).max()))
            names |= dict.fromkeys(sources)
        if steps != self.about.steps:
            raise ValueError(f"it has {steps} steps, not {self.about.steps}")
        return first, list(names)

    def _columns(self, group: int) -> dict[str, np.ndarray]:
        if self._loaded[0] != group:
            with self._reading():
                columns, sources = self._read_group(group)
                places = np.array([self.sources.index(name) for name in sources])
                self._loaded = group, columns | {"source": places[columns["source"]]}
        return self._loaded[1]

    def _read_group(self, group: int) -> tuple[dict[str, np.ndarray], list[str]]:
        """Columns of a row group, and the names that its column `source` indexes."""
        table = self._file.read_row_group(group)
        if any(table[name].null_count for name in COLUMNS if name != "score"):
            raise ValueError("it has empty cells")
        weight = read.floats(table["weight"])
        if not np.isfinite(weight).all() or (weight < 0).any():
            raise ValueError("it has weights that are negative or not finite")
        columns = {name: table[name].to_numpy().astype(np.int64) for name in ("step", "row", "window_id")}
        columns["tokens"] = read.token_rows(table["tokens"])
        source = table["source"].combine_chunks()
        columns["source"] = source.indices.to_numpy()
        columns["score"] = read.floats(table["score"]).astype(np.float32)
        return columns, list(map(str, source.dictionary.to_pylist()))

    @contextmanager
    def _reading(self) -> Generator[None]:
        """Turns what a missing, foreign or damaged file makes the readers raise into a CurriqError."""
        try:
            yield
        except FileNotFoundError:
            why = "there is no such file"
        except Exception as error:  # of a damaged file pyarrow raises whatever its bytes lead it to
            why = f"it is no curriculum, or damaged ({type(error).__name__}: {error})"
        else:
            return
        raise CurriqError(
            f"--curriculum {self._path} cannot be read ({why}): `curriq export RUN` writes one."
        )


def _check_steps(columns: dict[str, np.ndarray], first: int, about: CurriculumAbout) -> int:
    """Number of steps in a row group that begins with step `first`; ValueError unless each has rows 0, 1, …,
    at most N, of T tokens, and one or more finite scores (NaN where a window was not forwarded)."""
    order = np.lexsort((columns["row"], columns["step"]))
    step, row, score = (columns[name][order] for name in ("step", "row", "score"))
    starts = np.flatnonzero(np.diff(step, prepend=-1))
    steps = len(starts)
    where = f"in the row group that should begin with step {first}"
    if not steps or not np.array_equal(step[starts], first + np.arange(steps)):
        raise ValueError(f"a step is missing {where}")
    if not np.array_equal(row, np.arange(len(row)) - np.searchsorted(step, step)):
        raise ValueError(f"a window is missing {where}")
    if row.max() >= about.candidates or columns["tokens"].shape[1] != about.window:
        raise ValueError(f"a step is no {about.candidates} windows of {about.window} tokens {where}")
    if (columns["window_id"] < 0).any() or columns["tokens"].dtype.kind != "i":
        raise ValueError(f"a window is none of a run {where}")
    if np.isinf(score).any() or not np.logical_or.reduceat(~np.isnan(score), starts).all():
        raise ValueError(f"a step has no finite weights {where}")
    return steps


def open_curriculum(
    config: RunConfig, fingerprint: Mapping[str, str], source_names: Sequence[str]
) -> RecordedCurriculum:
    """The curriculum that a run replays; `fingerprint` and `source_names` are those of its data.

    Raises:
        CurriqError: the file was made with another split, tokenizer, window length, N or held-out text; it is
            shorter than the run; or it has a source that the run does not know.
    """
    curriculum = RecordedCurriculum(config.data.curriculum)
    about, n, steps = curriculum.about, config.train.num_candidates, config.train.steps
    name = f"--curriculum {config.data.curriculum}"
    held_out = "its windows may be test text here: use that run's --target, --held-out-share and set sizes"
    split = f"its windows may be test text here: use --split-seed {about.split_seed}"
    for what, theirs, ours, fix in (
        # First, because another split trains another tokenizer too.
        ("split seed", about.split_seed, config.data.split_seed, split),
        ("tokenizer", about.tokenizer, fingerprint["tokenizer"], "use that run's --tokenizer and sources"),
        ("window", about.window, config.data.window, f"use --window {about.window}"),
        ("number of candidates", about.candidates, n, f"use --num-candidates {about.candidates}"),
        ("held-out text", about.held_out, fingerprint["held_out"], held_out),
    ):
        require(theirs == ours, f"{name}: its {what} is {theirs}, this run's is {ours}: {fix}.")
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


def main(arguments: Sequence[str], export_model: Callable[[Path], Path]) -> int:
    """The command `curriq export`; returns the exit status.

    `export_model` returns the Hugging Face folder of a run, written first where it has to be.
    """
    parser = Parser(
        prog="curriq export",
        description="Write the candidates of a run and their weights, as one Parquet file. "
        "`curriq train --curriculum FILE` replays it with another seed, model or size.",
    )
    parser.add_argument("RUN", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, help="the file (default: curriculum.parquet in the run's folder)")
    model_help = (
        "write the model as a Hugging Face folder instead, where it was saved in parts (--engine fsdp)"
    )
    parser.add_argument("--model", action="store_true", help=model_help)
    options = parser.parse_args(list(arguments))
    if options.model:
        require(options.out is None, "--model with --out: the model is written into the run's checkpoint.")
        print(f"model       {export_model(options.RUN)}")
        return 0
    out = options.out or options.RUN / "curriculum.parquet"
    about = export(options.RUN, out)
    size = f"{about.steps} steps of {about.candidates} windows, {out.stat().st_size / 1e6:.1f} MB"
    print(f"curriculum  {out} ({size})")
    print(f"replay      curriq train --curriculum {out} --num-candidates {about.candidates} …")
    return 0


def export(run: Path, out: Path) -> CurriculumAbout:
    """Write the curriculum of a run, up to its last checkpoint; the run must have kept all its windows."""
    with read.explained(run):
        return _export(run, out)


def _export(run: Path, out: Path) -> CurriculumAbout:
    config = load_run_config(run)
    environment = read.read_document(
        read.existing(run / "environment.json"), "restore it from a copy of the run"
    )
    listed = listed_parts(run, "candidates", "windows")
    if defect := next(filter(None, (of_part(run, part) for part in listed)), ""):
        raise CurriqError(
            f"{run}: {defect}, and a curriculum must have every step: restore the file from a copy of the "
            "run."
        )
    parts = read.part_paths(run, "candidates")
    kept = read.read_windows(run)
    if not parts or not len(kept):
        what = "candidates (--no-log-candidates)" if not parts else "windows (--log-windows-mb 0)"
        raise CurriqError(
            f"{run} kept no {what}, or has saved no checkpoint yet: an export needs both. Train again with "
            "them."
        )
    about = CurriculumAbout(
        tokenizer=environment["fingerprint"]["tokenizer"],
        held_out=environment["fingerprint"]["held_out"],
        window=kept.stored.shape[1],
        candidates=config.train.num_candidates,
        steps=1 + int(read.read_part(parts[-1], ["step"])["step"].to_numpy().max()),
        method=config.method,
        seed=config.train.seed,
        split_seed=config.data.split_seed,
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(out, _tables(parts, kept, about.candidates), about)
    except OSError as error:
        raise CurriqError(f"--out {out} cannot be written: {error.strerror}.") from None
    return about


def _write(path: Path, tables: "Iterator[pa.Table]", about: CurriculumAbout) -> None:
    """Tables with `COLUMNS`, in the order of the steps, each as one row group; a step lies in one table."""
    import pyarrow.parquet as pq

    first = next(tables)
    schema = first.schema.with_metadata({KEY: json.dumps(asdict(about))})
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, **options) as writer:
        for table in chain([first], tables):
            writer.write_table(table, row_group_size=len(table))


def _tables(parts: list[Path], kept: read.KeptWindows, n: int) -> "Iterator[pa.Table]":
    """Whole steps with their tokens, at most `MOST_ROWS` rows at a time; without rejected windows."""
    import pyarrow.compute as pc

    for path in parts:
        table = read.read_part(path)
        if "accept_prob" in table.column_names:
            table = table.filter((pc.field("row") < n) | pc.field("accept_prob").is_null())
        steps = table["step"].to_numpy()
        starts = np.flatnonzero(np.diff(steps, prepend=-1))[:: max(1, MOST_ROWS // n)]
        for start, end in pairwise([*starts.tolist(), len(steps)]):
            rows = table.slice(start, end - start)
            where = kept.find(rows["window_id"].to_numpy())
            if (where < 0).any():
                raise CurriqError(
                    f"the run did not keep the tokens of {(where < 0).sum()} windows of steps {steps[start]} "
                    f"to {steps[end - 1]}: --log-windows-mb was used up. Train again with a greater one."
                )
            yield rows.append_column("tokens", token_column(kept.stored[where])).select(COLUMNS)
