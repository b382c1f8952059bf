"""What a run is predicted to take: from costs that are known, by hand, and of a real run, from its steps."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import effects_of, random_offer
from tests.runs import tiny
from tests.steps import finished_step

from curriq.evaluate.forecast import (
    BACKWARD_SHARE,
    Costs,
    Memory,
    cores_text,
    disk_speed,
    engines_of,
    on_paper,
    shards_needed,
)
from curriq.presets import own_settings
from curriq.runlog.read import read_metrics
from curriq.train.calibrate import Calibration, Line, calibrate, for_calibration
from curriq.train.estimate import drop_read_ahead, past_the_start
from curriq.train.meter import PREDICTING_STEPS, Prediction
from curriq.train.record import in_one_transfer
from curriq.train.run import prepare, train
from curriq.types import Cost

MIXTRAL = (
    "random:mixtral:hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=2,"
    "num_key_value_heads=1,num_local_experts=2"
)


class TestLine:
    def test_fixed_and_growing_part(self):
        line = Line.through([(8, 1.8), (8, 1.9), (8, 9.0), (24, 3.5), (24, 3.5)])
        assert (line.fixed, line.slope) == (pytest.approx(1.1), pytest.approx(0.1))
        assert line.at(100) == pytest.approx(11.1)

    def test_one_amount_is_proportional(self):
        assert Line.through([(4, 2.0), (4, 4.0)]) == Line(fixed=0.0, slope=0.75)

    def test_nothing_is_negative(self):
        """Noise can make more windows cost less, or nothing cost less than nothing."""
        assert Line.through([(1, 5.0), (2, 4.0)]) == Line(fixed=4.0, slope=0.0)
        assert Line.through([(1, 1.0), (2, 3.0)]) == Line(fixed=0.0, slope=1.5)


def calibration(**changed: Any) -> Calibration:
    """64 windows of 10 ms each and 0.1 s beside, 320 windows read in 0.2 s, probes of 1.6 s."""
    settings: dict[str, Any] = {
        "windows": 64,
        "trained": 64,
        "scoring": 0.0,
        "read_per_step": 320.0,
        "propose": 0.2,
        "searches": False,
        "passes": Line(fixed=0.1, slope=0.01),
        "held_out": Line(fixed=0.5, slope=0.01),
        "held_out_forwards": 100.0,
        "reward_every": 16,
        "rest": Line(fixed=0.004, slope=0.0),
        "learning": 0.1,
        "reading_rate": 2000.0,
        "readers": 0,
    }
    return Calibration(**settings | changed)


class TestCalibration:
    def test_a_step_is_the_sum_of_its_parts(self):
        made = calibration()
        assert made.held_out_per_step == pytest.approx((0.5 + 1.0) / 16)
        assert made.rest_per_step == pytest.approx(0.004 + 0.1 / 16)
        assert made.seconds_per_step == pytest.approx(0.2 + 0.74 + 0.1 + 0.004)

    def test_plain_training_reads_what_it_trains_on_and_measures_nothing(self):
        """It reads 64 windows at 2,000 per second, whatever choosing or searching among them takes."""
        for choosing in (0.2, 20.0):
            made = calibration(propose=choosing)
            assert made.plain_seconds_per_step == pytest.approx(0.032 + 0.74)
            assert made.overhead == pytest.approx((choosing + 0.844) / 0.772)

    def test_what_is_read_ahead_is_not_waited_for(self):
        """Four processes read 64 windows in 8 ms, of which a step waits 1 ms."""
        made = calibration(readers=4, propose=0.001)
        assert made.plain_seconds_per_step == pytest.approx(0.001 + 0.74)
        assert calibration(readers=4).plain_seconds_per_step == pytest.approx(0.008 + 0.74)

    def test_plain_training_scores_nothing_in_a_pass_of_its_own(self):
        """Where all are forwarded before all are trained on, a quarter of what grows with them goes;
        where 8 of 64 are trained on, all of it, and what is left are their passes."""
        made = calibration(scoring=0.25)
        assert made.plain_seconds_per_step == pytest.approx(0.032 + 0.1 + 0.75 * 0.64)
        made = calibration(scoring=1.0, trained=8)
        assert made.plain_seconds_per_step == pytest.approx(0.004 + 0.1)

    def test_without_measurements(self):
        made = calibration(held_out_forwards=0.0)
        assert (made.held_out_per_step, made.rest_per_step) == (0, 0.004)

    @pytest.mark.parametrize(
        "settings", [{"selector": "uniform"}, {}, own_settings("weighted"), own_settings("recommended")]
    )
    def test_every_method_can_be_calibrated(self, settings):
        config = tiny(**settings | {"num_candidates": 32, "sources": tiny().data.sources})
        made, rows = calibrate(prepare(for_calibration(config)), config)
        assert made.windows == made.trained == 32
        assert made.read_per_step >= 32
        assert made.seconds_per_step > made.passes.at(32) > 0
        assert made.reward_every == config.train.reward_every
        assert bool(made.held_out_per_step) == any("time/reward" in row for row in rows)
        assert made.overhead >= 1
        assert made.reading_rate > 0

    @pytest.mark.parametrize(
        ("settings", "trained", "scoring"),
        [
            ({"train_subset_size": 6, "credit": "mixture"}, 6, 1.0),
            ({"train_on": "action", "credit": "sampled"}, 1, 1.0),
            ({"selector": "random-k", "random_k": 5}, 5, 0.0),
            ({"dropout": 0.1}, 40, 0.25),
        ],
    )
    def test_windows_that_are_trained_on(self, settings, trained, scoring):
        config = tiny(**settings | {"num_candidates": 40})
        made, _ = calibrate(prepare(for_calibration(config)), config)
        assert (made.trained, made.scoring) == (trained, scoring)
        (row,) = prepare(config).session.rehearse(1)
        assert row["x/windows_trained"] == trained

    def test_a_second_model_is_none_of_plain_training(self):
        """One of twice the size is two of the five forward passes that a window takes, a backward pass being
        two; under checkpointing the trunk's is repeated, also in plain training."""
        config = tiny()
        run = prepare(for_calibration(config))
        run.session.meter.cost_per_window = Cost(extra_flops=2 * run.session.meter.forward_flops)
        assert calibrate(run, config)[0].scoring == pytest.approx(2 / 5)
        config = tiny(gradient_checkpointing=True)
        assert calibrate(prepare(for_calibration(config)), config)[0].scoring == 0

    def test_a_search_is_none_of_plain_training(self):
        """The same windows are trained on without it for a fraction of the time."""
        settings = own_settings("langevin-rag") | {
            "num_candidates": 32,
            "buffer_size": 64,
            "buffer_initial": 64,
        }
        config = tiny(**settings)
        made, rows = calibrate(prepare(for_calibration(config)), config)
        assert made.searches
        searched = sorted(row["time/search"] for row in rows)[len(rows) // 2]
        assert made.seconds_per_step - made.plain_seconds_per_step > searched / 2

    def test_steps_are_smaller_than_those_of_the_run(self):
        config = tiny(num_candidates=100)
        run = prepare(for_calibration(config))
        _, rows = calibrate(run, config)
        trained = {b["x/windows_trained"] - a["x/windows_trained"] for a, b in pairwise(rows)}
        assert trained == {8, 24}

    def test_forwards_of_a_probe_that_the_small_steps_cannot_fill(self):
        """Of 30 probed windows a step of 24 has 24: the six others are one forward pass each."""
        config = tiny(**own_settings("weighted") | {"num_candidates": 40, "probe_windows": 30})
        config = config.override(reward_windows=4, reward_every=3)
        made, rows = calibrate(prepare(for_calibration(config)), config)
        largest = max(row["held_out/forwards"] for row in rows if "held_out/forwards" in row)
        run = prepare(config)
        actual = max(row.get("held_out/forwards", 0) for row in run.session.rehearse(7))
        assert largest < made.held_out_forwards == actual


class Counted:
    """A source of windows that counts those that are read."""

    def __init__(self, source: Any) -> None:
        self.source, self.count = source, 0

    def read(self, n: int) -> Any:
        offer = self.source.read(n)
        self.count += len(offer)
        return offer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


class TestUsualSteps:
    """What is timed is a step as most are: it reads its own windows, and not those of a start that passes."""

    @pytest.mark.parametrize("settings", [{}, {"stream_shards": 2}])
    def test_windows_read_ahead_are_dropped(self, settings):
        run = prepare(tiny(**own_settings("recommended") | settings))
        proposer: Any = run.session.components.proposer
        (before,) = run.session.rehearse(1)
        drop_read_ahead(run)
        streams = list(proposer.streams.values()) if settings else [proposer.stream]
        for stream in streams:
            stream._stream = Counted(stream._stream)
        (after,) = run.session.rehearse(1)
        read = sum(stream._stream.count for stream in streams)
        assert read >= after["x/windows_read"] - before["x/windows_read"] > 0

    def test_the_start_is_left_out_where_most_steps_come_after_it(self):
        config = tiny(**own_settings("recommended") | {"num_candidates": 10, "max_read_ratio": 8})
        config = config.override(sharp_start=4000)
        assert past_the_start(config.override(steps=99)).select.sharp_start == 4000
        assert past_the_start(config.override(steps=100)).select.sharp_start == 0
        assert for_calibration(config.override(steps=100)).select.sharp_start == 0


class TestOnPaper:
    memory = Memory(
        per_parameter=16, parameters=10**9, activations=8e9, fixed=0.0, device=80e9, buckets=4, gathered=3e8
    )
    costs = Costs(
        calibration=calibration(), micro_batch=4, window=1024, trained=10**9, weight_bytes=2, memory=memory
    )

    def test_replicated_weights(self):
        """8 windows each in 0.18 s, in two passes; 4 bytes per parameter go round, 7/8 of them twice: 7 GB in
        0.14 s, beside the backward pass of the last micro-batch."""
        made = on_paper(self.costs, 8, "ddp", 50e9)
        assert made["windows_per_gpu"] == 8
        assert made["sent_bytes_per_step"] == pytest.approx(7e9)
        waited = 0.14 - BACKWARD_SHARE * 0.09
        assert made["exposed_communication_seconds"] == pytest.approx(waited)
        expected = 0.2 / 8 + 0.18 + (1.5 / 16) / 8 + (0.1 / 16 + 0.004) + waited
        assert made["seconds_per_step"] == pytest.approx(expected)
        assert made["tokens_per_second"] == pytest.approx(64 * 1024 / expected)
        assert made["memory_bytes"] == 24e9 + 4e9  # buckets of the gradient

    def test_sharded_weights(self):
        """Two micro-batches: weights of 2 bytes come twice in each, gradients of 4 go once."""
        made = on_paper(self.costs, 8, "fsdp", 50e9)
        assert made["sent_bytes_per_step"] == pytest.approx(7 / 8 * 1e9 * (2 * 2 * 2 + 2 * 4))
        assert made["memory_bytes"] == 2e9 + 8e9 + 3e8  # a block is whole while it runs
        assert made["largest_model"] > on_paper(self.costs, 8, "ddp", 50e9)["largest_model"]

    def test_one_gpu_sends_nothing(self):
        made = on_paper(self.costs, 1, "ddp", 1e9)
        assert made["sent_bytes_per_step"] == 0
        assert made["efficiency"] == pytest.approx(1)

    def test_a_search_is_not_split(self):
        """320 windows are read in 0.16 of 1.2 s; the rest every process does."""
        costs = replace(self.costs, calibration=calibration(propose=1.2, searches=True))
        alone, of_eight = (on_paper(costs, count, "ddp", 1e15)["seconds_per_step"] for count in (1, 8))
        passes = 0.74 - 0.18
        assert alone - of_eight == pytest.approx((0.16 + 1.5 / 16) * 7 / 8 + passes)

    def test_only_gradients_are_summed(self):
        """Adapters are a few of the parameters."""
        made = on_paper(replace(self.costs, trained=10**6), 8, "ddp", 50e9)
        assert made["sent_bytes_per_step"] == pytest.approx(7e6)

    def test_windows_drawn_are_dealt_out(self):
        """Of 8 windows one each, which is what the fixed part of the passes is."""
        costs = replace(self.costs, calibration=calibration(trained=8, scoring=1.0))
        made = on_paper(costs, 8, "ddp", 1e15)
        expected = 0.2 / 8 + 0.1 / 8 + 0.08 + (1.5 / 16) / 8 + 0.1 / 16 + 0.004
        assert made["seconds_per_step"] == pytest.approx(expected)
        assert made["tokens_per_second"] == pytest.approx(8 * 1024 / expected)

    def test_slow_links_are_waited_for(self):
        fast, slow = (on_paper(self.costs, 8, "ddp", speed) for speed in (1e12, 1e9))
        assert fast["exposed_communication_seconds"] == 0
        assert slow["seconds_per_step"] > 7

    def test_the_largest_model_fills_the_memory(self):
        largest = self.memory.largest()
        activations = 8e9 * (largest / 1e9) ** (2 / 3)
        assert 16 * largest + activations == pytest.approx(80e9, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "engines"),
    [
        ({}, ["ddp", "fsdp"]),
        ({"lora_rank": 2}, ["ddp"]),
        ({"model": MIXTRAL}, ["ddp"]),
    ],
)
def test_engines_that_would_refuse_the_run_are_not_planned_for(settings, engines):
    config = tiny(**settings)
    assert engines_of(config, prepare(config)) == engines


def test_disk_speed_is_measured_where_the_run_will_be(tmp_path):
    written, hashed = disk_speed(tmp_path / "not" / "there")
    assert written > 0
    assert hashed > 0
    assert list(tmp_path.iterdir()) == []


class TestPrediction:
    def test_the_first_steps_predict_the_later_ones(self):
        prediction = Prediction()
        rows = [{"time/step": 9.0}, *({"time/step": 1.0 + 0.1 * (k % 2)} for k in range(PREDICTING_STEPS))]
        assert all(prediction.metrics(row) == {} for row in rows)
        assert prediction.metrics({"time/step": 7.0})["perf/predicted_seconds"] == pytest.approx(1.05)

    def test_steps_with_a_measurement_cost_more(self):
        prediction = Prediction()
        for k in range(2 * PREDICTING_STEPS):
            measured = {"time/reward": 0.5, "time/probe": 1.5} if k % 5 == 0 else {}
            prediction.metrics({"time/step": 3.0 if measured else 1.0} | measured)
        said = prediction.metrics({"time/step": 1.0, "time/reward": 0.0})
        assert said["perf/predicted_seconds"] == pytest.approx(3.0)

    def test_it_is_in_the_log(self, tmp_path):
        train(tiny(selector="uniform", steps=14, run_dir=str(tmp_path)))
        rows = read_metrics(tmp_path)
        assert [row["step"] for row in rows if "perf/predicted_seconds" in row] == [11, 12, 13]
        for row in rows:
            rate = row["perf/tokens_per_second"] * row["time/step"]
            assert rate == pytest.approx(8 * 32)
            assert "perf/mfu" not in row  # of a CPU no peak is known

    def test_the_share_of_a_peak_that_is_told(self, tmp_path):
        train(tiny(selector="uniform", steps=2, peak_tflops=0.001, run_dir=str(tmp_path)))
        first, second = read_metrics(tmp_path)
        flops = second["x/flops"] - first["x/flops"]
        assert second["perf/mfu"] == pytest.approx(flops / second["time/step"] / 1e9)


class TestReading:
    """320 windows per step, of which a core reads 2,000 per second, in steps of 0.05 s without reading."""

    def reading(self, processes: int, cores: int, windows: int = 64) -> str:
        made = calibration(propose=0.1, passes=Line(fixed=0.046, slope=0.0), held_out_forwards=0.0)
        config = tiny(num_candidates=windows)
        return cores_text(
            {
                "cores_needed": made.reading_cores(made.seconds_per_step),
                "cores": cores,
                "processes": processes,
                "shards_needed": shards_needed(made, config),
            }
        )

    def test_a_gpu_that_waits_is_told_how_many_can_read_for_it(self):
        assert self.reading(1, 16) == "the steps need 1.1 cores, and 1 reads: --stream-shards 4"
        assert self.reading(2, 16, windows=60).endswith("and 2 read: --stream-shards 4")
        assert self.reading(1, 16, windows=2).endswith("and 1 reads: --stream-shards 2")

    def test_nothing_is_advised_that_would_not_help(self):
        assert self.reading(4, 16) == "the steps need 1.1 cores"
        assert self.reading(3, 4) == "the steps need 1.1 cores", "there are no more cores"
        assert self.reading(0, 1) == "the steps need 1.1 cores; here are 1", "the process that trains reads"


def test_a_step_comes_to_the_host_as_it_is():
    offer = random_offer(3)
    step = finished_step(0, offer, loss=torch.tensor([1.5, 2.5, 0.1]), q=torch.tensor([0.3, 0.2, 0.7]))
    moved = in_one_transfer(step)
    for name in ("scores", "weights", "q"):
        assert torch.equal(getattr(moved, name), getattr(step, name))
        assert getattr(moved, name).dtype == getattr(step, name).dtype
    assert torch.equal(moved.features.loss, step.features.loss)
    effects = effects_of(torch.tensor([0, 2]), torch.tensor([0.1, 0.2]))
    assert torch.equal(
        in_one_transfer(finished_step(0, offer, effects=effects)).effects.effect, effects.effect
    )


@pytest.mark.long
def test_the_command(tmp_path):
    words = ["--preset", "smoke", "--threads", "1", "--gpus", "8", "16", "--bandwidth", "25", "--json"]
    command = [sys.executable, "-m", "curriq", "plan", *words, "--no-alternatives"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True, env=environment)
    plan = json.loads(done.stdout)
    assert plan["format"] == 1
    assert plan["alternatives"] == []
    assert plan["bandwidth"] == 25e9
    assert [(row["gpus"], row["engine"]) for row in plan["on_paper"]] == [
        (8, "ddp"), (8, "fsdp"), (16, "ddp"), (16, "fsdp")
    ]  # fmt: skip
    parts = sum(plan["step"][name] for name in ("reading", "passes", "held_out", "rest"))
    assert plan["step"]["seconds"] == pytest.approx(parts)
    assert plan["run"]["windows_trained"] == 12 * 8
    assert plan["run"]["break_even"] == pytest.approx(1 - 1 / plan["step"]["overhead"])
    assert list(tmp_path.iterdir()) == []  # nothing is written
