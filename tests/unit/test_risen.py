"""A run is told that its validation loss was lower before, and a comparison that an arm's was."""

import copy
import json

import numpy as np
import pytest
from tests.reports import write_run
from tests.unit.test_outcome import printed, result
from tests.unit.test_steering import FIELDS, columns

from curriq.report.outcome import runs_helped
from curriq.report.risen import of_run, risen
from curriq.report.runlog import Detail, load_run_log
from curriq.report.summary import print_summary

FALLS, RISES = [5.0, 4.5, 4.2, 4.1, 4.08, 4.09], [5.0, 4.2, 4.0, 4.3, 4.6, 4.8]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        (FALLS, None),
        (RISES, (2, 4.0, 4.6)),
        ([5.0, 4.0, 4.0, 4.01, 9.0], None),  # the last one alone
        ([5.0, 4.2, 4.0, 4.3], None),  # the lowest is among the last
        ([4.0, 4.1], None),  # too few to tell
        ([], None),
    ],
)
def test_the_end_is_the_median_of_the_last_evaluations(losses, found):
    assert risen(losses) == found


def test_a_run_is_told_after_which_step():
    rows = [{"step": k} | ({"validation/loss": RISES[k // 10]} if k % 10 == 9 else {}) for k in range(60)]
    (sentence,) = of_run(columns(rows))
    assert "lowest after step 30 (4.000) and has risen to 4.600" in sentence
    assert of_run(columns(rows[:40])) == []  # the lowest may be followed by a lower one


@pytest.mark.parametrize("losses", [FALLS, RISES])
def test_the_end_of_a_run_and_its_page_say_so(tmp_path, capsys, losses):
    folder = write_run(tmp_path, steps=len(losses))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"validation/loss": loss} for row, loss in zip(rows, losses, strict=True)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print_summary(folder, FIELDS | {"finished": True, "test_loss": 3.0, "test_perplexity": 20.0})
    run = load_run_log(folder, "run", Detail(steps=0))
    side_by_side = [block for block in runs_helped([run, run]).blocks if isinstance(block, str)]
    told = "has risen to 4.600"
    for text in (capsys.readouterr().out, runs_helped([run]).answer, " ".join(side_by_side)):
        assert (told in " ".join(text.split())) == (losses is RISES)


def test_a_comparison_says_of_which_arm():
    comparison = copy.deepcopy(result(6))
    arms = comparison["streams"]["default"]
    for name, losses in {"plain": FALLS, "ours": RISES}.items():
        curve = {"validation_loss": losses} | {
            axis: list(np.arange(6)) for axis in ("windows", "read", "tokens", "flops", "seconds")
        }
        arms[name]["runs"] = [run | {"curve": curve} for run in arms[name]["runs"]]
    said = printed(comparison)
    assert "ours: in 6 of 6 runs the validation loss was lowest after 50% of the run" in said
    assert "has risen by 0.600 since" in said
    assert "plain: in" not in said
