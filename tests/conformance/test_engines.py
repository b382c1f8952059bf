"""Replicated and sharded weights on several processes: the runs of one process, whatever the engine."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import in_pieces, open_lm, random_offer, tiny_lm
from tests.ranks import in_processes
from tests.runs import Finished, InterruptAt, assert_same_run, tiny
from torch.distributed.tensor import DTensor

from curriq import parallel
from curriq.config import RunConfig
from curriq.errors import CurriqError
from curriq.lm.engine import local, total_norm
from curriq.lm.held_out import held_out_loss
from curriq.lm.mixture import Reference, single_pass, two_pass, weighted_gradient
from curriq.presets import own_settings
from curriq.train.checkpoint import latest_checkpoint
from curriq.train.run import load_run, prepare, resume, train
from curriq.types import IGNORED

ENGINES = ("ddp", "fsdp")
LLAMA = "random:llama:hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2"
PROBED: dict[str, Any] = {"probe_windows": 5, "reward_every": 2, "q_replay_size": 64}
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"selector": "uniform"},
    "soft-q": {"reforward_action": True},  # the paper's rule
    "weighted": own_settings("weighted") | PROBED,
    # With the Bellman target: what Q learns without it are differences of losses of a few windows, of which
    # rounding alone makes a hundredth in so small a run.
    "recommended": own_settings("recommended") | PROBED | {"sources": tiny().data.sources, "bellman": True},
    "without-target": own_settings("recommended") | PROBED | {"sources": tiny().data.sources},
}
UNEVEN: dict[str, Any] = {"num_candidates": 7, "micro_batch": 2, "model": LLAMA}


# One step, in float64 ---------------------------------------------------------------------------------


def scored(part, features):
    """Log-weights that spread over many nats and grow, so that the reference matters."""
    return 3 * features.loss + 5 * part.rows.double()


def passes(engine: str | None) -> dict[str, Any]:
    """Gradients, mixtures and held-out losses of even, uneven and nearly empty batches."""
    results: dict[str, Any] = {}
    for architecture in ("gpt2", "llama"):  # with tied embeddings and without
        lm = in_pieces(tiny_lm(architecture), 2, 8)
        lm.network.double()
        if engine is not None:
            lm.distribute(engine)
        for n in (8, 7, 1):
            offer = random_offer(n)
            for name, c in {"running maximum": None, "reference": 10.0, "reference too far": 900.0}.items():
                reference = Reference()
                reference.c = c
                mixture = single_pass(lm, offer, scored, True, reference)
                results[f"{architecture}, {n} windows, {name}"] = measured(lm), mixture
            mixture = two_pass(lm, offer, scored, True)
            results[f"{architecture}, {n} windows, two passes"] = measured(lm), mixture
            lm.zero_grad()
            weights = torch.where(torch.arange(n) < 2, mixture.weights, 0.0)
            total = weighted_gradient(lm, offer.windows, weights)
            results[f"{architecture}, {n} windows, few of weight"] = measured(lm), total.item()
            results[f"{architecture}, {n} windows, held out"] = held_out_loss(lm, offer.windows)
            tokens = offer.windows.tokens
            labelled = replace(offer.windows, labels=tokens.masked_fill(tokens % 3 == 0, IGNORED))
            results[f"{architecture}, {n} windows, labels"] = held_out_loss(lm, labelled)
    return results


def measured(lm) -> list[torch.Tensor]:
    """The gradient, whole, and its norm."""
    gradients = [p.grad for p in lm.parameters]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in gradients]
    return [*whole, total_norm(gradients)]


def save_passes(folder: Path, engines: tuple[str, ...] = ENGINES) -> None:
    for engine in engines:
        results = {
            name: (result[0], plain(result[1])) if isinstance(result, tuple) else result
            for name, result in passes(engine).items()
        }
        torch.save(results, folder / f"{engine}-{parallel.rank()}.pt")


def plain(result: Any) -> Any:
    if isinstance(result, float):
        return result
    own = {"scores": result.scores, "weights": result.weights, "loss": result.loss}
    return result.features.state_dict() | own


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_and_losses_of_one_process(world, tmp_path):
    in_processes(world, save_passes, tmp_path)
    saved = [torch.load(tmp_path / f"{e}-{r}.pt", weights_only=True) for e in ENGINES for r in range(world)]
    for name, result in passes(None).items():
        expected = (result[0], plain(result[1])) if isinstance(result, tuple) else result
        for ours in saved:
            # Llama-like models normalise in float32 inside.
            torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_shards_on_each_of_two_machines(tmp_path):
    """Gradients, and a run that one process then resumes."""
    settings = UNEVEN | METHODS["recommended"]
    in_processes(4, shards_on_machines, tmp_path, tiny(**settings, run_dir=str(tmp_path / "run")), machines=2)
    saved = [torch.load(tmp_path / f"hsdp-{rank}.pt", weights_only=True) for rank in range(4)]
    for name, result in passes(None).items():
        expected = (result[0], plain(result[1])) if isinstance(result, tuple) else result
        for ours in saved:
            torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-8)
    assert resume(tmp_path / "run", steps=8).finished
    train(tiny(**settings, run_dir=str(tmp_path / "alone")))
    assert resume(tmp_path / "alone", steps=8).finished
    assert_close_runs(tmp_path / "run", tmp_path / "alone")


def shards_on_machines(folder: Path, config: RunConfig) -> None:
    save_passes(folder, ("hsdp",))
    run = prepare(config.override(engine="hsdp"))
    count = sum(p.numel() for p in run.lm.parameters)
    assert sum(local(p).numel() for p in run.lm.parameters) == pytest.approx(count / 2, rel=0.1)
    assert run.session.train().finished


def shares() -> None:
    """A shard is a half of θ."""
    lm = tiny_lm("gpt2")
    count = sum(p.numel() for p in lm.network.parameters())
    lm.distribute("fsdp")
    held = sum(local(p).numel() for p in lm.parameters)
    assert held <= 0.6 * count


def test_each_rank_holds_its_share():
    in_processes(2, shares)


# Whole runs -------------------------------------------------------------------------------------------


def train_all(folder: Path, engines: tuple[str, ...], methods: dict[str, dict[str, Any]]) -> None:
    for engine in engines:
        for name, settings in methods.items():
            config = tiny(**UNEVEN | settings, engine=engine, run_dir=str(folder / engine / name))
            assert train(config).finished


def assert_same_training(ours: Path, theirs: Path) -> None:
    """The same windows, and losses equal to 1e-6."""
    a, b = Finished(ours), Finished(theirs)
    assert a.candidates["window_id"] == b.candidates["window_id"]
    for row, expected in zip(a.rows, b.rows, strict=True):
        for name in ("train/loss", "train/mean_loss", "reward", "validation/loss"):
            assert row.get(name, 0.0) == pytest.approx(expected.get(name, 0.0), rel=1e-6, abs=1e-6)
    assert a.summary["test_loss"] == pytest.approx(b.summary["test_loss"], rel=1e-6)


def assert_close_runs(ours: Path, theirs: Path) -> None:
    """The same training, and all else in the log the same but for rounding of small differences."""
    assert_same_training(ours, theirs)
    for row, expected in zip(Finished(ours).rows, Finished(theirs).rows, strict=True):
        steady = [name for name in expected if "recovered_scale" not in name]  # quotients of tiny differences
        assert {name: row[name] for name in steady} == pytest.approx(
            {name: expected[name] for name in steady}, rel=1e-2, abs=1e-4
        )


EVERY = list(METHODS)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("world", "methods"),
    [
        (2, ["uniform", "recommended", "without-target"]),
        pytest.param(2, EVERY, marks=SLOW),
        pytest.param(4, ["soft-q", "recommended"], marks=SLOW),
    ],
)
def test_runs_of_one_process(world, methods, tmp_path):
    chosen = {name: METHODS[name] for name in methods}
    in_processes(world, train_all, tmp_path, ENGINES, chosen)
    for name in methods:
        train(tiny(**UNEVEN | METHODS[name], run_dir=str(tmp_path / "alone" / name)))
        agree = assert_same_training if name == "without-target" else assert_close_runs
        for engine in ENGINES:
            agree(tmp_path / engine / name, tmp_path / "alone" / name)


def until_killed(config: RunConfig, phase: str) -> None:
    """Train until rank 1 ends at once, as by a fault of its machine: before the update of step 3, in the
    probe of step 2, or before it has given its shards for the checkpoint of step 4."""
    run = prepare(config)
    session, parts = run.session, run.session.components
    places = {"step": (parts.learner, "update", 3), "probe": (parts.learner, "held_out_gradient", 2)}
    places["checkpoint"] = (session, "_collected_state", 4)
    owner, name, at = places[phase]
    work = getattr(owner, name)

    def fatal(*arguments):
        if parallel.rank() == 1 and session.state.step == at:
            while latest_checkpoint(session.run_dir).step < 2:  # it is written beside the steps
                time.sleep(0.01)
            os._exit(0)
        return work(*arguments)

    setattr(owner, name, fatal)
    with pytest.raises(RuntimeError):  # of the collective that rank 1 does not join
        session.train()
    os._exit(0)


def go_on(run_dir: Path, settings: dict[str, Any]) -> None:
    assert resume(run_dir, **settings).finished


@pytest.mark.parametrize(
    ("first", "phase"),
    [
        ("fsdp", "step"),
        pytest.param("fsdp", "probe", marks=SLOW),
        pytest.param("fsdp", "checkpoint", marks=SLOW),
        pytest.param("ddp", "step", marks=SLOW),
    ],
)
def test_a_killed_rank_and_a_resume_on_other_numbers_and_engines(first, phase, tmp_path):
    """Two ranks until one is killed, then one process, then two ranks with the other engine: one run."""
    settings = UNEVEN | METHODS["recommended"] | {"checkpoint_every": 2, "steps": 9}
    run_dir = tmp_path / "run"
    in_processes(2, until_killed, tiny(**settings, engine=first, run_dir=str(run_dir)), phase)
    assert latest_checkpoint(run_dir).step == 2
    run = load_run(run_dir)
    run.session.probes.append(InterruptAt(4))
    assert not run.session.train().finished
    assert latest_checkpoint(run_dir).step == 5
    in_processes(2, go_on, run_dir, {"engine": "ddp" if first == "fsdp" else "fsdp"})
    train(tiny(**settings, run_dir=str(tmp_path / "alone")))
    assert_close_runs(run_dir, tmp_path / "alone")


# With the model's other settings -----------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "gradient checkpointing": {"gradient_checkpointing": True},
    "alternating": {"alternating_period": 2},
    "subset": {"train_subset_size": 3, "credit": "counterfactual", "probe_windows": 4},
    "gpt2": {"model": "random:gpt2:hidden_size=32,num_hidden_layers=2,num_attention_heads=2"},
    "one window": {"selector": "random-single"},
    "fused loss": {"cross_entropy": "fused"},
}


def train_options(folder: Path) -> None:
    train_all(folder, ENGINES, OPTIONS)
    for engine in ENGINES:  # ranks draw dropout masks of their own, and bfloat16 rounds
        for name, settings in {"dropout": {"dropout": 0.1}, "bf16": {"precision": "bf16"}}.items():
            run_dir = str(folder / engine / name)
            assert train(
                tiny(**UNEVEN | METHODS["weighted"] | settings, engine=engine, run_dir=run_dir)
            ).finished


@pytest.mark.slow
def test_options_of_the_model(tmp_path):
    in_processes(2, train_options, tmp_path)
    for name, settings in OPTIONS.items():
        train(tiny(**UNEVEN | settings, run_dir=str(tmp_path / "alone" / name)))
        for engine in ENGINES:
            assert_close_runs(tmp_path / engine / name, tmp_path / "alone" / name)
    train(tiny(**UNEVEN | METHODS["weighted"], precision="bf16", run_dir=str(tmp_path / "alone" / "bf16")))
    expected = Finished(tmp_path / "alone" / "bf16").summary["test_loss"]
    for engine in ENGINES:
        assert Finished(tmp_path / engine / "bf16").summary["test_loss"] == pytest.approx(expected, rel=0.01)


def refused_experts() -> None:
    model = "random:mixtral:hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=2,"
    lm = open_lm(model + "num_key_value_heads=1,num_local_experts=2")
    with pytest.raises(CurriqError, match="--engine fsdp: an expert"):
        lm.distribute("fsdp")
    lm.distribute("ddp")
    single_pass(in_pieces(lm, 2, 8), random_offer(3), scored)


def test_experts_are_replicated_only():
    in_processes(2, refused_experts)


def test_one_process_shares_nothing(tmp_path):
    train(tiny(steps=2, engine="fsdp", run_dir=str(tmp_path / "a")))
    train(tiny(steps=2, run_dir=str(tmp_path / "b")))
    assert_same_run(tmp_path / "a", tmp_path / "b")
