"""Files as anybody may hand them over: each is read, or refused with one error. No traceback, no hang."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomlkit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.reports import write_run
from tests.runs import tiny

from curriq.config import RunConfig, field_owners, from_dict, load_toml, to_dict, to_toml
from curriq.errors import CurriqError
from curriq.evaluate.compare import is_finished, steps_logged
from curriq.evaluate.plan import PlannedRun, load_plan
from curriq.report.command import build
from curriq.report.watch import LivePage
from curriq.runlog.curriculum import RecordedCurriculum, export
from curriq.train.run import train

FUZZED = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # the same cases in every run of CI; `--hypothesis-seed` and more examples find others
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SLOW = settings(FUZZED, max_examples=1500, derandomize=False)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["a\0b", "../..", "~", "${HOME}", "${NOPE}", "random:gpt2", "x" * 5000, "\x1b[31m", "1e400"]
    ),
)
TOML_VALUES = st.recursive(
    SCALARS.filter(lambda value: value is not None) | st.dates() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "delete", "repeat"]), st.floats(0, 1), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, mutations: list[tuple[str, float, int]]) -> bytes:
    """The bytes after some changes at places between the beginning (0) and the end (1)."""
    for kind, place, value in mutations:
        at = int(place * max(0, len(content) - 1))
        match kind:
            case "flip":
                content = (
                    content[:at] + bytes([content[at] ^ (value or 1)]) + content[at + 1 :] if content else b""
                )
            case "cut":
                content = content[:at]
            case "insert":
                content = content[:at] + bytes([value]) * (1 + value % 7) + content[at:]
            case "delete":
                content = content[:at] + content[at + 1 + value :]
            case "repeat":
                content = content[:at] + content[at : at + value] * 2 + content[at + value :]
    return content


def accepted(read: Callable[[], object]) -> bool:
    """Whether the reader takes it; False when it refuses it with the one error that users see."""
    try:
        read()
    except (CurriqError, OSError):
        return False
    return True


class TestToml:
    @FUZZED
    @given(st.sampled_from(sorted(field_owners())), TOML_VALUES)
    def test_any_value_of_any_setting(self, name: str, value: Any) -> None:
        def read() -> None:
            config = from_dict({field_owners()[name]: {name: value}})
            assert from_dict(to_dict(config)) == config

        accepted(read)

    @FUZZED
    @given(st.dictionaries(st.sampled_from([*RunConfig.__dataclass_fields__, "x"]), TOML_VALUES, max_size=3))
    def test_any_tables(self, tables: dict[str, Any]) -> None:
        accepted(lambda: from_dict(tables))

    @FUZZED
    @given(MUTATIONS)
    def test_a_mutated_run_file(self, tmp_path: Path, mutations: Any) -> None:
        file = tmp_path / "run.toml"
        file.write_bytes(mutated(to_toml(RunConfig()).encode(), mutations))
        if accepted(lambda: load_toml(file)):
            file.write_text(to_toml(config := load_toml(file)), encoding="utf-8")
            assert load_toml(file) == config

    @FUZZED
    @given(st.binary(max_size=200))
    def test_any_bytes(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "run.toml").write_bytes(content)
        accepted(lambda: load_toml(tmp_path / "run.toml"))

    @FUZZED
    @given(MUTATIONS)
    def test_a_mutated_comparison(self, tmp_path: Path, mutations: Any) -> None:
        plan = (Path(__file__).resolve().parents[2] / "examples" / "compare.toml").read_bytes()
        (tmp_path / "plan.toml").write_bytes(mutated(plan, mutations))
        accepted(lambda: load_plan(tmp_path / "plan.toml"))

    @FUZZED
    @given(
        st.dictionaries(
            st.sampled_from(["seeds", "baseline", "workers", "base", "config", "vary_split"]), TOML_VALUES
        ),
        st.dictionaries(
            st.sampled_from(["a", "b", "c[/d]", "x/y"]),
            TOML_VALUES
            | st.dictionaries(st.sampled_from(["preset", "file", "seed_offset", "selector"]), TOML_VALUES),
            max_size=3,
        ),
        TOML_VALUES,
    )
    def test_any_comparison(self, tmp_path: Path, compare: Any, arms: Any, streams: Any) -> None:
        tables = {
            "compare": {"seeds": [0], "baseline": "a"} | compare,
            "arms": {"a": {}} | arms,
            "streams": streams,
        }
        try:
            (tmp_path / "plan.toml").write_text(tomlkit.dumps(tables), encoding="utf-8")
        except Exception:  # tomlkit writes not all that TOML can say
            return
        accepted(lambda: load_plan(tmp_path / "plan.toml"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, with everything that a run may write."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(tiny(steps=4, checkpoint_every=2, run_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def curriculum(run: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("curriculum") / "c.parquet"
    export(run, out)
    return out.read_bytes()


def read_curriculum(file: Path) -> list[Any]:
    recorded = RecordedCurriculum(file)
    return [recorded[step] for step in range(recorded.about.steps)]


def same(a: list[Any], b: list[Any]) -> bool:
    """To the bit."""
    return [[v.tobytes() for v in vars(s).values()] for s in a] == [
        [v.tobytes() for v in vars(s).values()] for s in b
    ]


class TestCurriculum:
    def mutate(self, curriculum: bytes, folder: Path, mutations: Any) -> None:
        (folder / "whole.parquet").write_bytes(curriculum)
        (folder / "c.parquet").write_bytes(mutated(curriculum, mutations))
        if accepted(lambda: read_curriculum(folder / "c.parquet")):  # a change that changes no value
            assert same(read_curriculum(folder / "c.parquet"), read_curriculum(folder / "whole.parquet"))

    @FUZZED
    @given(MUTATIONS)
    def test_mutations_are_refused_or_change_nothing(self, curriculum, tmp_path, mutations) -> None:
        self.mutate(curriculum, tmp_path, mutations)

    @pytest.mark.slow
    @SLOW
    @given(MUTATIONS)
    def test_many_mutations(self, curriculum, tmp_path, mutations) -> None:
        self.mutate(curriculum, tmp_path, mutations)

    CHANGES: ClassVar[dict[str, Callable[[pa.Table], pa.Table]]] = {
        "a column is missing": lambda t: t.drop_columns(["weight"]),
        "a column is another": lambda t: t.rename_columns(["step", "row", "id", *t.column_names[3:]]),
        "no rows": lambda t: t.slice(0, 0),
        "a step is missing": lambda t: t.filter(pa.compute.field("step") != 1),
        "a row is missing": lambda t: pa.concat_tables([t.slice(0, 3), t.slice(4)]),
        "a row is there twice": lambda t: pa.concat_tables([t.slice(0, 1), t]),
        "a negative step": lambda t: replaced(t, "step", lambda v: [-1, *v[1:]]),
        "a negative row": lambda t: replaced(t, "row", lambda v: [-1, *v[1:]]),
        "a negative window": lambda t: replaced(t, "window_id", lambda v: [-1, *v[1:]]),
        "an empty cell": lambda t: replaced(t, "window_id", lambda v: [None, *v[1:]]),
        "an infinite score": lambda t: replaced(t, "score", lambda v: [float("inf"), *v[1:]]),
        "a weight that is no number": lambda t: replaced(t, "weight", lambda v: [float("nan"), *v[1:]]),
        "a negative weight": lambda t: replaced(t, "weight", lambda v: [-1.0, *v[1:]]),
        "no scores": lambda t: replaced(t, "score", lambda v: [None] * len(v)),
        "texts as steps": lambda t: typed(t, "step", pa.array(["x"] * len(t))),
        "texts as scores": lambda t: typed(t, "score", pa.array(["x"] * len(t))),
        "plain sources": lambda t: typed(t, "source", pa.array([1] * len(t))),
        "lists of other lengths": lambda t: typed(
            t, "tokens", pa.array([[1]] * len(t), pa.list_(pa.int32()))
        ),
        "windows of another length": lambda t: typed(
            t, "tokens", pa.array([[1, 2]] * len(t), pa.list_(pa.int32(), 2))
        ),
        "half a token": lambda t: typed(
            t, "tokens", pa.array([[0.5] * 32] * len(t), pa.list_(pa.float32(), 32))
        ),
    }

    @pytest.mark.parametrize("change", CHANGES)
    def test_tables_that_are_no_curriculum_are_refused(self, change: str, curriculum, tmp_path) -> None:
        table = pq.read_table(io.BytesIO(curriculum))
        file = tmp_path / "c.parquet"
        made = self.CHANGES[change](table)
        pq.write_table(made.replace_schema_metadata(table.schema.metadata), file)
        with pytest.raises(
            CurriqError, match=r"--curriculum .*c\.parquet cannot be read \(it is no curriculum"
        ):
            read_curriculum(file)

    @FUZZED
    @given(
        st.dictionaries(st.sampled_from(["window", "steps", "candidates", "tokenizer", "x"]), JSON_VALUES)
        | JSON_VALUES
    )
    def test_any_metadata(self, curriculum, tmp_path, about) -> None:
        table = pq.read_table(io.BytesIO(curriculum))
        if isinstance(about, dict):
            about = json.loads(table.schema.metadata[b"curriq"]) | about
        pq.write_table(table.replace_schema_metadata({b"curriq": json.dumps(about)}), tmp_path / "c.parquet")
        accepted(lambda: read_curriculum(tmp_path / "c.parquet"))


def replaced(table: pa.Table, name: str, change: Callable[[list], list]) -> pa.Table:
    column = table[name]
    return typed(table, name, pa.array(change(column.to_pylist()), column.type))


def typed(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


class TestRunFolder:
    FILES = (
        *("metrics.jsonl", "summary.json", "environment.json", "config.toml"),
        *("candidates", "windows", "windows/tokenizer.json"),
    )

    def spoil(self, run: Path, folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
        """Change one file and read the folder in every way that needs no training."""
        shutil.rmtree(folder / "run", ignore_errors=True)
        copy = Path(
            shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("checkpoints", ".lock"))
        )
        file = copy / name
        if file.is_dir():
            file = min(file.glob("*.parquet"))
        file.write_bytes(change(file.read_bytes()))
        accepted(lambda: build([copy], topics=2).page())
        assert LivePage([copy], 1.0, topics=2).get()[0] in (200, 503)
        accepted(lambda: export(copy, folder / "c.parquet"))
        config = tiny(steps=4, checkpoint_every=2, run_dir=str(copy))
        planned = PlannedRun(stream="default", arm="a", seed=0, config=config)
        accepted(lambda: is_finished(planned))
        assert steps_logged(copy) >= 0

    @settings(FUZZED, max_examples=30)
    @given(st.sampled_from(FILES), MUTATIONS)
    def test_a_mutated_file(self, run, tmp_path, name, mutations) -> None:
        self.spoil(run, tmp_path, name, lambda content: mutated(content, mutations))

    @settings(FUZZED, max_examples=25)
    @given(st.sampled_from(["summary.json", "environment.json"]), JSON_VALUES)
    def test_any_json(self, run, tmp_path, name, value) -> None:
        def change(content: bytes) -> bytes:
            fields = json.loads(content)
            values = fields | dict.fromkeys([*fields][:: max(1, len(str(value)) % 5)], value)
            return json.dumps(values if len(str(value)) % 2 else value).encode()

        self.spoil(run, tmp_path, name, change)

    @settings(FUZZED, max_examples=25)
    @given(JSON_VALUES | st.dictionaries(st.sampled_from(["step", "reward", "train/loss"]), JSON_VALUES))
    def test_any_row(self, run, tmp_path, row) -> None:
        self.spoil(run, tmp_path, "metrics.jsonl", lambda log: log + json.dumps(row).encode() + b"\n")

    @pytest.mark.slow
    @settings(SLOW, max_examples=400)
    @given(st.sampled_from(FILES), MUTATIONS)
    def test_many_mutated_files(self, run, tmp_path, name, mutations) -> None:
        self.spoil(run, tmp_path, name, lambda content: mutated(content, mutations))

    @settings(FUZZED, max_examples=30)
    @given(JSON_VALUES, st.sampled_from(["", "streams", "baseline", "notes", "failed"]))
    def test_any_comparison(self, tmp_path, value, place) -> None:
        if not (tmp_path / "metrics.jsonl").exists():
            write_run(tmp_path, steps=4)
        whole = {"streams": {"default": {}}, "baseline": "a", "notes": [], "failed": {}}
        (tmp_path / "comparison.json").write_text(json.dumps(whole | {place: value} if place else value))
        accepted(lambda: build([tmp_path], topics=0).page())
