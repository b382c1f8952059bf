"""The history of a number in a few characters."""

import io

import pytest
from rich.console import Console

from curriq.train.progress import BARS, Bar, History, sparkline


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
    bar = Bar(console, 50, 0)
    for step in range(50):
        row = {"step": step, "train/loss": 9.0 - step / 10, "reward": -1.0, "policy/entropy": 2.0}
        row |= {"validation/loss": 3.0, "time/windows_per_second": 1000.0}
        bar.update(row | {"policy/effective_batch_size": 8.0, "policy/effective_batch_fraction": 1.0})
    with console.capture() as captured:
        console.print(bar.frame())
    text = captured.get()
    assert "█▇" in text
    assert text.count("▄" * 10) == 5
