"""Whole tiny runs: every selector and every extra, deterministic, resumable to the bit, and accounted for."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from tests.conformance.compositions import COMPOSITIONS, FILTERING, RETRIEVING, otherwise
from tests.runs import SETTINGS, Finished, InterruptAt, assert_same_run, tiny
from transformers import AutoModelForCausalLM

from curriq.config import RunConfig
from curriq.data import open_corpus
from curriq.errors import CurriqError
from curriq.runlog.read import read_metrics, read_summary
from curriq.runlog.schema import GROUPS, SUMMARY, find
from curriq.train.run import Own, load_run, prepare, resume, train

N, T, STEPS = SETTINGS["num_candidates"], SETTINGS["window"], SETTINGS["steps"]
STOP = STEPS // 2
WIDTH, VOCAB = 32, SETTINGS["vocab_size"]

OTHER_WINDOWS = {"topic-coherent", "competence by label"} | FILTERING | RETRIEVING
"""Compositions that change the data, and so the windows."""


@pytest.fixture(scope="session")
def runs(tmp_path_factory, configure):
    """Name of a composition → the finished, uninterrupted run; each is made once."""
    made: dict[str, Finished] = {}

    def get(name: str) -> Finished:
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            train(configure(name).override(run_dir=str(folder)))
            made[name] = Finished(folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", COMPOSITIONS)
class TestEveryComposition:
    def test_interrupted_and_resumed_equals_uninterrupted(self, name, runs, configure, tmp_path):
        """Both halves come from fresh objects, so this is determinism under one seed as well; and what the
        run is said not to read (`config.effect.unread`) has other values in them."""
        run = prepare(otherwise(configure(name)).override(run_dir=str(tmp_path)))
        run.session.probes.append(InterruptAt(STOP - 1))
        halfway = run.session.train()
        assert not halfway.finished
        assert halfway.summary["steps"] == STOP
        assert Finished(tmp_path).rows == runs(name).rows[:STOP]
        torch.manual_seed(STOP)  # what the caller does to the global generator must not matter
        assert resume(tmp_path).finished
        assert_same_run(tmp_path, runs(name).folder)

    def test_every_row_adds_up(self, name, runs, configure):
        run = runs(name)
        offered, table = run.candidates["step"], run.candidates
        trained_so_far, effective_so_far = 0, 0.0
        for k, row in enumerate(run.rows):
            weights = [w for w, step in zip(table["weight"], offered, strict=True) if step == k]
            losses = [x for x, step in zip(table["loss"], offered, strict=True) if step == k]
            scored = sum(x is not None for x in losses)
            trained = min(scored, configure(name).drawn or N)
            trained_so_far += trained
            effective = 1 / sum(w * w for w in weights)
            effective_so_far += effective
            assert row["step"] == k
            rows = [r for r, step in zip(table["row"], offered, strict=True) if step == k]
            assert rows == list(range(len(rows)))  # from N on those that a steered stream passed over
            assert len(rows) == (row["data/windows_read"] if table["accept_prob"][0] is not None else N)
            assert not any(weights[N:])
            assert sum(weights) == pytest.approx(1, abs=1e-6)
            assert all(w == 0 for w, x in zip(weights, losses, strict=True) if x is None)
            assert row["x/windows_proposed"] == N * (k + 1)
            assert row["x/windows_trained"] == trained_so_far
            assert row["x/tokens"] == T * trained_so_far
            assert row["x/effective_windows"] == pytest.approx(effective_so_far, rel=1e-5)
            assert row["policy/effective_batch_size"] == pytest.approx(effective, rel=1e-5)
            assert 1 - 1e-6 <= effective <= trained + 1e-4
            assert row["policy/effective_batch_fraction"] == pytest.approx(effective / N, rel=1e-5)
            assert row["policy/max_weight"] == pytest.approx(max(weights))
            mixture = sum(w * x for w, x in zip(weights, losses, strict=True) if x is not None)
            assert row["train/loss"] == pytest.approx(mixture, rel=1e-5)
            for family in ("weight_share", "offered_share"):
                shares = [v for key, v in row.items() if key.startswith(f"select/{family}/")]
                assert sum(shares) == pytest.approx(1, abs=1e-6)
            sources = [s for s, step in zip(table["source"], offered, strict=True) if step == k]
            for source in set(sources):
                theirs = [s == source for s in sources]
                if "buffer/windows" not in row:  # or offered is what went into the buffer
                    assert row[f"select/offered_share/{source}"] == pytest.approx(sum(theirs) / len(sources))
                weight = sum(w for w, there in zip(weights, theirs, strict=True) if there)
                assert row[f"select/weight_share/{source}"] == pytest.approx(weight, abs=1e-6)

    def test_axes_grow_and_the_summary_repeats_the_last_row(self, name, runs):
        rows, summary = read_metrics(runs(name).folder), read_summary(runs(name).folder)
        axes = (
            "windows_read",
            "windows_proposed",
            "windows_trained",
            "effective_windows",
            "tokens",
            "flops",
            "seconds",
        )
        for axis in axes:
            values = [row[f"x/{axis}"] for row in rows]
            assert values == sorted(set(values)), axis
            assert summary[axis] == values[-1], axis
        assert summary.get("epoch") == rows[-1].get("data/epoch")
        assert summary["validation_loss"] == rows[-1]["validation/loss"]
        assert summary["finished"] is True
        assert summary["steps"] == STEPS
        for shares in (summary["weight_share"], summary["offered_share"]):
            assert sum(shares.values()) == pytest.approx(1)

    def test_generators_are_saved_once_or_alike(self, name, runs):
        """Components save their generator, and `generators` saves all: the two must never disagree."""
        state = runs(name).state
        owners = {
            "random-k": ("selector", "generator"),
            "bandit": ("selector", "generator"),
            "jitter": ("selector", "generator"),
            "steer": ("proposer", "generator"),
            "probe": ("held_out", "generator"),
            "critic/replay": ("critic", "replay", "generator"),
        }
        if "fresh" in state["proposer"]:  # the filter reads into the buffer
            owners["steer"] = ("proposer", "fresh", "stream", "generator")
        for purpose, generator_state in state["generators"].items():
            own: Any = state
            for key in owners.get(purpose, ("generators", purpose)):
                own = own[key] if key in own else own["inner"][key]  # the part may be wrapped
            assert torch.equal(own, generator_state), purpose


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if name not in OTHER_WINDOWS])
def test_windows_do_not_depend_on_the_method(name, runs):
    ours, uniform = runs(name).candidates, runs("uniform").candidates
    for column in ("step", "row", "window_id", "source"):
        assert ours[column] == uniform[column]


def test_a_run_that_is_under_way_is_not_trained_by_another_process_too(tmp_path):
    """Nor does the other one touch the folder before it is refused."""
    refused = []

    def contents() -> dict[str, bytes]:
        files = (path for path in tmp_path.rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files}

    @dataclass
    class Intruder:
        def measure(self, step) -> dict[str, float]:
            begun = tmp_path / "checkpoints" / ".tmp-step-00000009"  # a checkpoint that is being written
            begun.mkdir(exist_ok=True)
            before = contents()
            with pytest.raises(CurriqError, match="another process is training this run"):
                resume(tmp_path, steps=9)
            assert contents() == before
            assert begun.exists()
            refused.append(step.index)
            return {}

    run = prepare(tiny(steps=2, run_dir=str(tmp_path)))
    run.session.probes.append(Intruder())
    assert run.session.train().finished
    assert refused == [0, 1]
    assert resume(tmp_path, steps=3).finished


def test_a_folder_that_is_moved_while_the_run_is_at_work(tmp_path):
    """Its next checkpoint is refused, in place of a second folder without settings and log."""

    @dataclass
    class Mover:
        def measure(self, step) -> dict[str, float]:
            if step.index == 1:
                (tmp_path / "old").rename(tmp_path / "new")
            return {}

    run = prepare(tiny(steps=4, checkpoint_every=1, run_dir=str(tmp_path / "old")))
    run.session.probes.append(Mover())
    with pytest.raises(CurriqError, match="old is gone: it was moved or removed while its run was at work"):
        run.session.train()
    assert not (tmp_path / "old" / "checkpoints").exists()
    assert resume(tmp_path / "new").finished


def test_the_number_of_candidates_is_one_run_s(tmp_path):
    """The log, its export and the report count by it."""
    train(tiny(steps=2, run_dir=str(tmp_path)))
    with pytest.raises(CurriqError, match=r"--num-candidates = 4: .*a resume cannot change it"):
        resume(tmp_path, steps=4, num_candidates=4)


def test_a_checkpoint_that_gives_way_while_it_is_read(tmp_path, monkeypatch):
    train(tiny(steps=2, run_dir=str(tmp_path)))

    def replaced(config, checkpoint, own):
        shutil.rmtree(checkpoint.path)
        raise FileNotFoundError(checkpoint.path / "lm")

    monkeypatch.setattr("curriq.train.run.prepare", replaced)
    with pytest.raises(CurriqError, match="its checkpoint of step 2 gave way to a newer one"):
        load_run(tmp_path)


TRUNK = T * (2 * WIDTH * (3 * WIDTH + WIDTH + 4 * WIDTH + 4 * WIDTH) + 2 * 2 * T * WIDTH)
"""One layer, by hand: qkv, output, the MLP's two; scores and values of attention."""
FORWARD = TRUNK + T * 2 * WIDTH * VOCAB
M = tiny().train.reward_windows


def flops(run: Finished) -> list[float]:
    return [row["x/flops"] for row in run.rows]


def test_flops_of_the_uniform_mixture_by_hand(runs):
    assert flops(runs("uniform")) == [3 * FORWARD * N * (k + 1) for k in range(STEPS)]


def test_flops_count_scoring_twice_with_dropout_and_the_reward(runs):
    assert flops(runs("soft-q"))[-1] == STEPS * (3 * N + M) * FORWARD
    assert flops(runs("dropout"))[-1] == STEPS * (4 * N + M) * FORWARD


def test_flops_count_the_reference_model(runs):
    """Of the same shape as the model; rho needs no reward."""
    assert flops(runs("rho"))[-1] == STEPS * 4 * N * FORWARD


def test_flops_count_the_trunk_again_under_gradient_checkpointing(runs):
    expected = STEPS * ((3 * N + M) * FORWARD + N * TRUNK)
    assert flops(runs("gradient checkpointing"))[-1] == expected


def test_flops_count_td_into_theta_from_the_second_step_on(runs):
    """The first step has no previous transition. The TD loss does not pass through the head."""
    expected = [(k + 1) * (3 * N + M) * FORWARD + k * 3 * TRUNK for k in range(STEPS)]
    assert flops(runs("td into theta")) == expected


def test_a_buffer_that_is_filled_in_pieces_counts_every_window_that_it_read(tmp_path):
    """Pieces of 256, 256 and 88 before the first step, which ingests none, and 8 in each later step."""
    buffer = {"proposer": "uniform-buffer", "encoder": "hashing", "buffer_size": 600, "ingest": 8}
    train(tiny(selector="uniform", steps=3, run_dir=str(tmp_path), **buffer))
    rows = read_metrics(tmp_path)
    assert [row["x/windows_read"] for row in rows] == [600, 608, 616]
    assert [row["data/windows_read"] for row in rows] == [600, 8, 8]
    assert read_summary(tmp_path)["windows_read"] == 616


def test_gradient_checkpointing_changes_no_number_but_its_cost(runs):
    def rows(name: str) -> list[dict[str, float]]:
        return [row | {"x/flops": 0} for row in runs(name).rows]

    assert rows("gradient checkpointing") == rows("soft-q")


def test_the_meters_state_does_not_follow_it(tmp_path):
    run = prepare(tiny(run_dir=str(tmp_path)))
    state = run.session.meter.state_dict()
    run.session.train()
    assert state["windows_proposed"] == 0
    assert state["weight_by_source"].tolist() == [0.0] * 3
    assert state["read_by_source"].tolist() == [0] * 3


def test_dropout_scores_without_dropout(runs):
    """The first step's losses are measured at the same θ_0, so dropout must not be seen in them."""
    plain, dropout = runs("soft-q").candidates, runs("dropout").candidates
    assert dropout["loss"][:N] == pytest.approx(plain["loss"][:N], rel=1e-6)
    assert dropout["loss"][N:] != plain["loss"][N:]


def weights_of_every_step(config: RunConfig) -> list[bytes]:
    """θ before the first step and after each."""
    run = prepare(config)

    def weights() -> bytes:
        return b"".join(p.numpy().tobytes() for p in run.lm.network.state_dict().values())

    @dataclass
    class Camera:
        def measure(self, step) -> dict[str, float]:
            pictures.append(weights())
            return {}

    pictures = [weights()]
    run.session.probes.append(Camera())
    run.session.train()
    return pictures


def test_reset_theta_puts_it_back_after_every_step(tmp_path):
    pictures = weights_of_every_step(tiny(reset_theta=True, run_dir=str(tmp_path)))
    assert set(pictures) == {pictures[0]}


def test_alternating_periods_reset_and_train_in_turn(tmp_path):
    """Period 2: steps 0 and 1 reset, 2 and 3 train, 4 and 5 reset."""
    start, *after = weights_of_every_step(tiny(alternating_period=2, run_dir=str(tmp_path)))
    assert after[0] == after[1] == start
    assert len({start, after[2], after[3]}) == 3
    assert after[4] == after[5] == after[3]


def test_warm_up_is_uniform_and_resets(runs):
    rows = runs("q warm-up").rows
    assert [row["theta_reset"] for row in rows] == [1, 1, 0, 0, 0, 0]
    assert [row["policy/effective_batch_size"] == pytest.approx(N) for row in rows[:2]] == [True, True]
    assert rows[-1]["policy/effective_batch_size"] < N - 1e-3
    assert "critic/td_loss" in rows[1]  # Q learns meanwhile


def test_no_q_weighting_is_uniform_while_q_learns(runs):
    uniform, ours = runs("uniform"), runs("no q-weighting")
    assert ours.weights == uniform.weights
    assert all("critic/td_loss" in row for row in ours.rows[1:])


def test_every_documented_name_is_logged(runs):
    """A definition that nothing logs would be a promise that nobody keeps."""
    rows = [row for name in COMPOSITIONS for row in read_metrics(runs(name).folder)]
    logged = {find(name).name for row in rows for name in row}
    documented = {metric.name for group in GROUPS for metric in group.metrics}
    # These need the harness (tests/unit/test_tasks.py).
    elsewhere = {name for name in documented if name.startswith("task/") or name == "time/tasks"}
    # These need a known GPU, ten steps, and a model in shards (tests/conformance/test_parts.py).
    elsewhere |= {"perf/mfu", "perf/predicted_seconds", "time/checkpoint_written"}
    assert documented - logged == elsewhere
    fields = {field for name in COMPOSITIONS for field in read_summary(runs(name).folder)}
    assert {field.name for field in SUMMARY} == fields


def test_the_loss_of_every_test_window_is_kept(tmp_path: Path):
    """As transformers measures it on the saved model; a run that goes on has none until its next end."""
    config = tiny(run_dir=str(tmp_path / "run"), steps=2, lr_schedule="constant")
    result = train(config)
    table = parquet.read_table(tmp_path / "run" / "test_losses.parquet")
    test = open_corpus(config).held_out.test
    network = AutoModelForCausalLM.from_pretrained(result.model_dir)
    with torch.no_grad():
        losses = [network(input_ids=row[None], labels=row[None]).loss.item() for row in test.tokens]
    assert table["window_id"].to_pylist() == test.ids.tolist()
    assert table["loss"].to_pylist() == pytest.approx(losses, abs=1e-4)
    assert set(table["tokens"].to_pylist()) == {config.data.window - 1}
    assert result.summary["test_loss"] == pytest.approx(np.mean(table["loss"].to_numpy()), abs=1e-12)

    class Stop:
        def measure(self, step):
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        resume(tmp_path / "run", own=Own(probes=(Stop(),)), steps=4)
    assert not (tmp_path / "run" / "test_losses.parquet").exists()
