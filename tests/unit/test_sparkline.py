"""The history of a number in a few characters."""

import io

import pytest
from rich.console import Console

from curriq.select.base import POLICY_SPREAD
from curriq.train.progress import BARS, Bar, History, sparkline
from curriq.types import Reading


def test_sparkline_by_hand():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BARS
    assert sparkline([2.0, 2.0]) == "▄▄"
    assert sparkline([]) == ""


@pytest.mark.parametrize("count", [1, 7, 10, 11, 19, 20, 21, 999, 1024])
def test_a_history_has_bounded_width_and_keeps_the_order(count: int):
    history = History(10)
    for value in range(count):
        history.add(float(value))
    text = history.sparkline()
    assert len(text) == min(count, 10)
    assert list(text) == sorted(text)
    assert len(history._means) < 20


def test_the_bar_shows_sparklines_within_80_columns():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    bar = Bar(console, 50, 0, readings=(Reading("reward", "reward"), POLICY_SPREAD))
    for step in range(50):
        row = {"step": step, "train/loss": 9.0 - step / 10, "reward": -1.0, "policy/kl_from_uniform": 0.5}
        row |= {"validation/loss": 3.0, "x/tokens": 512 * (step + 1), "x/seconds": 0.5 * (step + 1)}
        bar.update(row)
    with console.capture() as captured:
        console.print(bar.frame())
    text = captured.get()
    assert "█▇" in text
    assert text.count("▄" * 10) == 4
