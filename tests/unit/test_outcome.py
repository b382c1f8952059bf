"""The verdict's tables in words: what an interval, a bound and too few seeds mean stands beside them."""

from dataclasses import asdict

import numpy as np
import pytest

from curriq.evaluate.statistics import Ratio, summarise_differences, summarise_ratios
from curriq.report.chart import Table
from curriq.report.outcome import comparison_helped, print_comparison, streams_of
from curriq.terminal import console


def result(seeds: int, *, gain: float = 0.1, censored: int = 0) -> dict:
    """A comparison of a baseline and one arm, as `assess` writes it."""
    rng = np.random.default_rng(0)
    base = 5 + 0.02 * rng.normal(size=seeds)
    ours = base - gain + 0.01 * rng.normal(size=seeds)
    ratios = [Ratio(0.5 + 0.01 * i, i < censored) for i in range(seeds)]
    by_seed = {str(i): {"ratio": ratio.value, "censored": ratio.censored} for i, ratio in enumerate(ratios)}
    cost = asdict(summarise_ratios(ratios)) | {"by_seed": by_seed}
    even = asdict(summarise_ratios([Ratio(1.0, False)] * seeds)) | {"by_seed": {}}
    axes, curve = ("windows", "read", "tokens", "flops", "seconds"), {"validation_loss": [6.0, 5.0]}
    runs = [
        {"seed": s, "folder": f"a-{s}", "finished": True, "curve": curve | {axis: [1, 2] for axis in axes}}
        for s in range(seeds)
    ]
    common = {"tail": None, "spent": {}, "runs": runs}
    arms = {
        "plain": {"test_loss": 5.0, "difference": None, "to_target": dict.fromkeys(axes, even), **common},
        "ours": {
            "test_loss": 4.9,
            "difference": asdict(summarise_differences(ours, base)),
            "to_target": dict.fromkeys(axes, cost),
            **common,
        },
    }
    streams = {"default": arms}
    return {
        "baseline": "plain",
        "streams": streams,
        "failed": {},
        "notes": [],
        "alpha": 0.05,
        "tail_margin": 0.1,
    }


def printed(comparison: dict) -> str:
    out = console(record=True, width=80)
    print_comparison(comparison, out)
    text = out.export_text()
    assert "…" not in text
    assert max(map(len, (line.rstrip() for line in text.splitlines()))) <= 80
    return " ".join(text.split())


def test_enough_seeds_have_p_interval_and_a_word_on_both():
    said = printed(result(6))
    assert "0.031 gain" in said
    assert "1.00 [1.00, 1.00]" in said
    assert "the interval leaves out 0 exactly when p is below 0.05" in said
    assert "cannot decide" not in said


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_too_few_seeds_have_neither_and_say_why(seeds: int):
    said = printed(result(seeds))
    assert f"too few seeds: {6 - seeds} more" in said
    assert f"{seeds} seed{'s' * (seeds > 1)} cannot decide: the smallest p of n seeds is 2/2ⁿ" in said
    assert "only from 6 on" in said
    assert "p = " not in streams_of(result(seeds))[0].sentence()


def test_several_streams_come_to_a_sentence_for_each_arm_and_a_table():
    comparison = result(6)
    others = {"flat": result(6, gain=0.0), "bad": result(6, gain=-0.2), "new": result(2), "good": result(6)}
    comparison["streams"] |= {name: other["streams"]["default"] for name, other in others.items()}
    answer = "ours: gain over plain on 2 of 5 streams; no gain on flat; worse on bad; too few seeds on new."
    assert answer in printed(comparison)
    section = comparison_helped(comparison, [])
    assert section.answer == answer
    table = section.blocks[0]
    assert isinstance(table, Table)
    assert table.header == ["stream", "ours"]
    assert [row[0] for row in table.rows] == ["default", "flat", "bad", "new", "good"]
    assert [row[1].split(" ")[0] for row in table.rows[:3:2]] == [
        f"{comparison['streams'][name]['ours']['difference']['mean']:+.3f}".replace("-", "−")
        for name in ("default", "bad")
    ]
    assert [row[1].split(" ", 1)[1] for row in table.rows] == [
        "gain",
        "no gain",
        "worse",
        "too few seeds",
        "gain",
    ]
    alone = comparison_helped(result(6), [])
    assert "against plain, p = 0.031: gain" in alone.answer
    assert not isinstance(alone.blocks[0], Table)


def test_an_arm_that_a_stream_lacks_is_no_gap_in_silence():
    comparison = result(6)
    comparison["streams"]["other"] = {"plain": comparison["streams"]["default"]["plain"]}
    assert "ours: gain over plain on 1 of 2 streams; no pairs on other." in printed(comparison)


def test_bounds_are_explained_where_they_stand():
    assert "bounds from below" not in printed(result(6))
    said = printed(result(6, censored=1))
    assert "> 0.52 [> 0.50]" in said
    assert "bounds from below: some seed never got there" in said


def test_every_seed_is_a_dot_of_the_forest():
    difference, windows, *_ = streams_of(result(3))[0].forests()
    assert len(difference.rows[0].points) == 3
    assert list(windows.rows[0].points) == [0.5, 0.51, 0.52]
    assert difference.rows[0].low is None


def test_a_comparison_of_an_earlier_version_opens_and_says_what_its_intervals_are():
    old = result(6)
    difference = old["streams"]["default"]["ours"]["difference"]
    for new in ("test", "by_seed"):
        del difference[new]
    difference |= {"low": -0.11, "high": -0.09, "low_with_text": -0.2, "high_with_text": -0.01}
    said = printed(old)
    assert "[−0.2000, −0.0100]" in said
    assert "those of an earlier version" in said
    assert streams_of(old)[0].forests()[0].rows[0].points == []
