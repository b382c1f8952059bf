"""Which threads and precision `curriq plan` names as the fastest: from known clocks, and for real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.runs import tiny
from tests.unit.test_plan import calibration

from curriq.evaluate.forecast import faster_text
from curriq.lm import hardware
from curriq.train import alternatives
from curriq.train.alternatives import (
    MOST_ROUNDS,
    ROUNDS,
    TRIES,
    Alternative,
    Setting,
    compare,
    settings_to_try,
    step_share,
    timed_alternatives,
)
from curriq.train.calibrate import Line
from curriq.train.run import prepare

FP32 = {threads: Setting(threads=threads, precision="fp32") for threads in (1, 2, 4, 8, 16, 32, 64)}
BF16 = {threads: Setting(threads=threads, precision="bf16") for threads in FP32}


class TestSettings:
    def test_one_half_and_all_cores_with_and_without_hyperthreads(self):
        tried = settings_to_try(FP32[16], cores=16, physical=8, bf16=False)
        assert tried == [FP32[8], FP32[4], FP32[1]]

    def test_both_precisions_where_the_processor_has_bfloat16_products(self):
        tried = settings_to_try(FP32[2], cores=2, physical=None, bf16=True)
        assert tried == [FP32[1], BF16[2], BF16[1]]

    def test_only_those_that_differ(self):
        assert settings_to_try(FP32[1], cores=1, physical=1, bf16=False) == []

    def test_a_share_of_the_cores_of_a_machine(self):
        """A process that has two of sixteen cores is not told to take eight."""
        assert settings_to_try(FP32[2], cores=2, physical=16, bf16=False) == [FP32[1]]

    def test_bfloat16_without_products_is_compared_with_float32(self):
        assert settings_to_try(BF16[2], cores=2, physical=2, bf16=False) == [FP32[2], FP32[1]]

    def test_flags_are_those_that_change_something(self):
        assert FP32[1].flags(FP32[2]) == "--threads 1"
        assert BF16[2].flags(FP32[2]) == "--precision bf16"
        assert BF16[1].flags(FP32[2]) == "--threads 1 --precision bf16"


class Clock:
    """Seconds of a pass by setting, a tenth for one window; the machine's pace changes in every round."""

    def __init__(self, seconds: dict[Setting, float]) -> None:
        self.seconds = seconds
        self.calls: list[tuple[Setting, bool]] = []

    def __call__(self, setting: Setting, whole: bool) -> float:
        self.calls.append((setting, whole))
        rounds = sum(w for s, w in self.calls if s == setting)
        return self.seconds[setting] * (1 + rounds if whole else 0.1)

    def count(self, setting: Setting, whole: bool) -> int:
        return self.calls.count((setting, whole))


class TestCompare:
    def test_ratios_within_a_round_cancel_the_pace_of_the_machine(self):
        clock = Clock({FP32[8]: 10.0, FP32[4]: 8.0, BF16[8]: 5.0})
        assert compare(FP32[8], [FP32[4], BF16[8]], clock) == pytest.approx({FP32[4]: 0.8, BF16[8]: 0.5})
        assert clock.count(FP32[4], True) == ROUNDS  # slow passes are not repeated

    def test_hopeless_settings_cost_a_few_windows_and_no_fewer_threads_are_tried(self):
        clock = Clock({FP32[64]: 1.0, FP32[32]: 2.5, FP32[1]: 60.0, BF16[64]: 0.5, BF16[1]: 30.0})
        ratios = compare(FP32[64], [FP32[32], FP32[1], BF16[64], BF16[1]], clock)
        assert ratios == pytest.approx({FP32[32]: 2.5, BF16[64]: 0.5, BF16[1]: 30.0})
        assert clock.count(FP32[1], False) == 0
        assert clock.count(BF16[1], False) == TRIES
        assert clock.count(BF16[1], True) == clock.count(FP32[32], True) == 0

    def test_a_program_that_disturbs_the_first_tries_decides_nothing(self):
        clock = Clock({FP32[2]: 1.0, FP32[1]: 0.8})
        held_up = iter([9.0, 7.0])

        def disturbed(setting: Setting, whole: bool) -> float:
            took = clock(setting, whole)
            return took * next(held_up, 1.0) if setting == FP32[1] else took

        assert compare(FP32[2], [FP32[1]], disturbed)[FP32[1]] == pytest.approx(0.8)

    def test_too_many_threads_say_nothing_of_fewer(self):
        clock = Clock({FP32[4]: 1.0, FP32[8]: 3.0, FP32[2]: 0.7})
        assert compare(FP32[4], [FP32[8], FP32[2]], clock)[FP32[2]] == pytest.approx(0.7)

    def test_short_passes_are_repeated_up_to_a_limit(self):
        clock = Clock({FP32[2]: 1e-6, FP32[1]: 1e-6})
        compare(FP32[2], [FP32[1]], clock)
        assert clock.count(FP32[1], True) == MOST_ROUNDS


class TestStep:
    def test_what_is_no_pass_over_windows_stays(self):
        """Of 1.044 s the windows are 0.64; half of their time is 0.32 s less."""
        assert step_share(calibration(), 0.5) == pytest.approx((1.044 - 0.32) / 1.044)
        fixed = calibration(passes=Line(fixed=0.74, slope=0.0))
        assert step_share(fixed, 0.5) == 1

    def test_a_little_less_time_is_noise(self):
        settings = {"flags": "--threads 1", "threads": 1, "precision": "fp32", "passes": 0.9}
        assert not Alternative(**settings, step=0.96).faster
        assert Alternative(**settings, step=0.8).faster


SLOW = {"flags": "--threads 1", "step": 1.3, "faster": False}
FAST = {"flags": "--precision bf16", "step": 0.814, "faster": True}


class TestLine:
    def test_the_fastest_is_named(self):
        (line,) = faster_text([FAST, SLOW])
        assert line.startswith("faster here --precision bf16: 0.81 of the time")

    def test_what_was_tried_is_named_where_nothing_is_faster(self):
        (line,) = faster_text([SLOW])
        assert line == "faster here nothing that was tried (of the time: --threads 1 1.30)"

    def test_what_was_given_up_has_no_exact_share(self):
        (line,) = faster_text([SLOW, SLOW | {"flags": "--threads 8", "step": 46.03}])
        assert line.endswith("--threads 1 1.30, --threads 8 over 2)")

    def test_none_where_nothing_was_tried(self):
        assert faster_text([]) == []


class TestMeasured:
    @pytest.fixture
    def machine(self, monkeypatch):
        """Two cores, and bfloat16 products or none; few tries: a busy machine takes seconds."""

        def set_to(bf16: bool) -> None:
            monkeypatch.setattr(alternatives.parallel, "cores", lambda: 2)
            monkeypatch.setattr(alternatives, "physical_cores", lambda: 2)
            monkeypatch.setattr(alternatives, "cpu_has_bf16", lambda: bf16)
            for name, least in {"PATIENCE": 0.0, "ENOUGH_SECONDS": 0.0, "TRIES": 1, "ROUNDS": 1}.items():
                monkeypatch.setattr(alternatives, name, least)

        return set_to

    def test_a_run_is_left_as_it_was(self, machine):
        machine(bf16=True)
        run = prepare(tiny(threads=1, num_candidates=2))
        before = [p.detach().clone() for p in run.lm.parameters]
        found = timed_alternatives(run, calibration(windows=2))
        assert {(f.threads, f.precision) for f in found} == {(2, "fp32"), (1, "bf16"), (2, "bf16")}
        assert [f.step for f in found] == sorted(f.step for f in found)
        assert all(f.passes > 0 for f in found)
        assert torch.get_num_threads() == 1
        assert not run.lm.reduced_precision
        assert all(torch.equal(a, b) for a, b in zip(before, run.lm.parameters, strict=True))
        assert all(p.grad is None for p in run.lm.parameters)

    def test_nothing_of_bfloat16_on_other_processors(self, machine):
        machine(bf16=False)
        run = prepare(tiny(threads=1, num_candidates=2))
        (found,) = timed_alternatives(run, calibration(windows=2))
        assert found.flags == "--threads 2"

    def test_compiled_blocks_are_not_compiled_again(self, machine):
        machine(bf16=True)
        run = prepare(tiny(threads=1, compile="on"))
        assert timed_alternatives(run, calibration()) == []


class TestProcessor:
    @pytest.mark.parametrize(
        ("capabilities", "expected"),
        [
            ({"avx512_f": True}, False),
            ({"avx512_bf16": True, "amx_bf16": False}, True),
            ({"amx_bf16": True}, True),
            ({"neon": True, "bf16": True}, True),
            ({}, False),
        ],
    )
    def test_bfloat16_products(self, monkeypatch, capabilities, expected):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        assert hardware.cpu_has_bf16() is expected

    def test_of_this_machine_as_the_system_reports_them(self):
        cpuinfo = Path("/proc/cpuinfo")
        if not cpuinfo.exists() or not hasattr(torch.cpu, "get_capabilities"):
            pytest.skip("no such system, or an older torch")
        flags = set(cpuinfo.read_text(encoding="utf-8").split())
        assert hardware.cpu_has_bf16() == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
        assert 1 <= (hardware.physical_cores() or 1) <= (os.cpu_count() or 1)

    def test_an_older_torch_cannot_tell(self, monkeypatch):
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        assert not hardware.cpu_has_bf16()
        assert hardware.physical_cores() is None


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) == 1 and not hardware.cpu_has_bf16(), reason="nothing to compare")
def test_the_command_names_the_fastest_settings(tmp_path):
    command = [sys.executable, "-m", "curriq", "plan", "--preset", "smoke", "--threads", "1", "--gpus"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("faster here ")]
    assert len(lines) == 1
    assert "--threads" in lines[0] or "--precision" in lines[0]
