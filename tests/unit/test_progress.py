"""The display: time left from recent steps, one line per share of the run, messages above the bar."""

import io
import itertools
import logging
import math

import pytest
import torch
from rich.console import Console

from curriq.langevin.search import SEARCHED
from curriq.select.base import POLICY_SPREAD, RandomK, Uniform, UniformUntil
from curriq.select.loss import ByLoss
from curriq.select.stream_filter import FilteredStream
from curriq.terminal import console as make_console
from curriq.train.progress import ESTIMATE_SECONDS, RECENT, Bar, Display, Lines, make_progress
from curriq.types import Reading, readings_of, status_of


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def console(terminal: bool = False, width: int = 80) -> Console:
    return make_console(file=io.StringIO(), force_terminal=terminal, width=width)


def text(of: Console) -> str:
    return of.file.getvalue()


def row(step: int) -> dict[str, float]:
    return {
        "step": step,
        "train/loss": 3.14159,
        "reward": -2.71828,
        "policy/entropy": 3.4657,  # as in every filtered run: a number that no part shows
        "policy/kl_from_uniform": math.log(2),
        "x/windows_proposed": 32 * (step + 1),
        "x/windows_read": 128 * (step + 1),
        "x/tokens": 2048 * (step + 1),
        "x/seconds": 0.5 * (step + 1),
    }


ACCEPTED = FilteredStream.readings
SPREAD = (Reading("reward", "reward"), POLICY_SPREAD)


class TestTimeLeft:
    def shown(self, display: Display) -> str:
        return f"{display.left.render(display.task)} {display.task.description}"

    def test_unknown_before_the_first_step(self):
        assert self.shown(Display(console(), 10, 4, Clock())) == "--:-- left"

    def test_steady(self):
        clock = Clock()
        display = Display(console(), 10, 0, clock)
        for step in range(4):
            clock.now += 2
            display.update(row(step))
        assert self.shown(display) == "00:12 left"

    def test_after_a_resume_the_earlier_steps_do_not_count_as_done_in_no_time(self):
        clock = Clock()
        display = Display(console(), 1000, 900, clock)
        clock.now = 3
        display.update(row(900))
        assert self.shown(display) == "04:57 left"

    def test_only_the_last_steps_count(self):
        clock = Clock()
        display = Display(console(), 10_000, 0, clock)
        for step in range(50 + ESTIMATE_SECONDS):
            clock.now += 50 if step < 50 else 1
            display.update(row(step))
        assert self.shown(display) == "1:45:50 left"

    def test_at_the_end_the_time_of_this_process(self):
        clock = Clock()
        display = Display(console(), 1000, 998, clock)
        for step in (998, 999):
            clock.now += 1900
            display.update(row(step))
        clock.now += 5
        assert self.shown(display) == "1:03:20 in total"


class TestReadings:
    def values(self, readings, rows, start: int = 0) -> dict[str, str]:
        display = Display(console(), 1000, start, readings=readings)
        for each in rows:
            display.update(each)
        return display.values

    def test_formats(self):
        assert self.values((*SPREAD, *ACCEPTED), [row(0)]) == {
            "loss": "3.142",
            "reward": "−2.718",
            "policy spread": "50%",
            "accepted": "25%",
            "tokens/s": "4,096",
        }

    def test_absent_numbers_are_not_shown(self):
        assert self.values((), [{"step": 0, "validation/loss": 4.0}]) == {"validation": "4.000"}

    def test_a_rate_is_that_of_the_last_steps(self):
        """All is accepted for 30 steps, one in four afterwards."""
        rows = [row(step) | {"x/windows_read": 32 * (step + 1)} for step in range(30)]
        rows += [row(step) | {"x/windows_read": 32 * 30 + 128 * (step - 29)} for step in range(30, 60)]
        assert self.values(ACCEPTED, rows[:30])["accepted"] == "100%"
        assert self.values(ACCEPTED, rows)["accepted"] == "25%"
        half = self.values(ACCEPTED, rows[: 30 + RECENT // 2])["accepted"]
        assert half == f"{2 / 5:.0%}"  # 2 x windows accepted, x + 4 x read

    def test_after_a_resume_a_rate_needs_two_steps(self):
        assert "accepted" not in self.values(ACCEPTED, [row(500)], start=500)
        assert self.values(ACCEPTED, [row(500), row(501)], start=500)["accepted"] == "25%"

    def test_parts_show_what_can_change_in_them(self):
        generator = torch.Generator()
        assert readings_of(Uniform()) == readings_of(RandomK(2, generator)) == ()
        assert readings_of(ByLoss(1.0, 1)) == (POLICY_SPREAD,)
        assert readings_of(UniformUntil(ByLoss(1.0, 1), 3)) == (POLICY_SPREAD,)

    def test_a_part_of_the_users_own_need_not_say_anything(self):
        assert (readings_of(object()), status_of(object())) == ((), "")


class TestLines:
    def run(self, total: int, seconds_per_step: float, start: int = 0) -> list[str]:
        clock, out = Clock(), console()
        progress = Lines(out, total, start, clock, readings=(*SPREAD, *ACCEPTED))
        for step in range(start, total):
            clock.now += seconds_per_step
            progress.update(row(step), "prior only: confidence 0.0 of 1, 8 probes")
        return text(out).splitlines()

    def test_fast_run_has_a_line_for_each_twentieth(self):
        lines = self.run(1000, 0.001)
        assert [line.split()[1] for line in lines] == [
            "1/1000",
            *(f"{step}/1000" for step in range(50, 1001, 50)),
        ]

    def test_slow_run_has_a_line_every_ten_seconds(self):
        lines = self.run(1000, 1.0)
        steps = [int(line.split()[1].split("/")[0]) for line in lines]
        assert steps[0] == 1
        assert steps[-1] == 1000
        assert max(b - a for a, b in itertools.pairwise(steps)) == 10

    def test_content(self):
        first = self.run(40, 30.0)[0]
        assert first == (
            "step 1/40  loss 3.142  reward −2.718  policy spread 50%  accepted 25%  tokens/s 4,096  "
            "prior only: confidence 0.0 of 1, 8 probes  19:30 left"
        )

    def test_ends_with_the_time_it_took(self):
        assert self.run(40, 30.0, start=38)[-1].endswith("  01:00 in total")

    def test_a_number_that_was_not_measured_keeps_its_last_value(self):
        out = console()
        progress = Lines(out, 2, 0, readings=SPREAD)
        progress.update(row(0) | {"validation/loss": 4.5})
        progress.update(row(1))
        assert text(out).splitlines()[-1].startswith("step 2/2  loss 3.142  validation 4.500  reward")


class TestModes:
    @pytest.mark.parametrize(
        ("mode", "terminal", "kind"),
        [
            ("auto", True, Bar),
            ("auto", False, Lines),
            ("bar", False, Bar),
            ("lines", True, Lines),
            ("none", True, Display),
        ],
    )
    def test_choice(self, mode, terminal, kind):
        with make_progress(mode, 10, 0, console(terminal)) as display:
            assert type(display) is kind

    @pytest.mark.parametrize("width", [60, 80, 120])
    @pytest.mark.parametrize("readings", [SPREAD, ACCEPTED, SEARCHED], ids=["weights", "filter", "langevin"])
    def test_bar_fits_the_terminal(self, width, readings):
        out = console(terminal=False, width=width)
        searched = {"langevin/tokens_changed": 0.77, "langevin/above_random_sd": -5.0}
        status = "prior only: confidence 0.0 of 1, 8 probes"
        with make_progress("bar", 300, 0, out, readings=readings) as progress:
            progress.update(row(136) | searched | {"validation/loss": 4.5}, status)
        lines = text(out).splitlines()
        assert max(map(len, lines)) <= width
        assert "step 137/300" in lines[-5]
        assert "46 %" in lines[-5]
        assert lines[-1].strip() == status
        if width >= 80:
            labels = ["loss", "validation", *(reading.label for reading in readings), "tokens/s"]
            assert " ".join(lines[-4].split()) == " ".join(labels)
            assert all(value != "…" for value in lines[-3].split())
            assert lines[-2].split() == ["▄"] * len(labels)  # the history of a single step

    def test_none_shows_no_numbers(self):
        out = console()
        with make_progress("none", 10, 0, out) as progress:
            progress.update(row(0))
            logging.getLogger("curriq").warning("epoch 2")
        assert text(out) == "warning: epoch 2\n"


class TestMessages:
    @pytest.mark.parametrize("mode", ["bar", "lines", "none"])
    def test_warnings_of_the_package_go_through_the_display(self, mode):
        out = console()
        logger = logging.getLogger("curriq")
        with make_progress(mode, 10, 0, out):
            logger.warning("the disk [nearly] full")
        logger.warning("after the end")
        assert "warning: the disk [nearly] full" in text(out)
        assert "after the end" not in text(out)

    @pytest.mark.parametrize("mode", ["auto", "bar", "lines", "none"])
    @pytest.mark.parametrize("terminal", [False, True])
    def test_a_message_appears_once_beside_the_handler_of_the_command_line(self, mode, terminal):
        """The root handler of `logging.basicConfig` and the display may well write to one terminal."""
        out = console(terminal)
        root = logging.StreamHandler(out.file)
        logging.getLogger().addHandler(root)
        try:
            with make_progress(mode, 10, 0, out):
                logging.getLogger("curriq").warning("disk nearly full")
            assert text(out).count("disk nearly full") == 1
            logging.getLogger("curriq").warning("after the end")
            assert text(out).count("after the end") == 1
        finally:
            logging.getLogger().removeHandler(root)

    @pytest.mark.parametrize("before", [True, False])
    def test_propagation_is_as_it_was_before(self, before, monkeypatch):
        logger = logging.getLogger("curriq")
        monkeypatch.setattr(logger, "propagate", before)
        with make_progress("lines", 10, 0, console()):
            assert not logger.propagate
        assert logger.propagate is before

    def test_handler_goes_when_the_run_fails(self):
        before = list(logging.getLogger("curriq").handlers)

        def fail() -> None:
            with make_progress("bar", 10, 0, console()):
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert logging.getLogger("curriq").handlers == before

    def test_markup_in_a_message_is_text(self):
        out = console()
        with make_progress("lines", 10, 0, out):
            logging.getLogger("curriq").warning("[red]no colour[/red]")
        assert text(out) == "warning: [red]no colour[/red]\n"
