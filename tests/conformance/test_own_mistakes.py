"""Mistakes in components of the user's own: refused by name, not trained on, not called ours."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.runs import tiny

from curriq.cli import main
from curriq.errors import CurriqError
from curriq.select.base import Context, Method, PlainSelector, Uniform, plain
from curriq.select.stream_filter import probabilities
from curriq.train.run import Own, resume, train
from curriq.types import Offer, Windows


class Mine(PlainSelector):
    """Gives back what the test says."""

    def __init__(self, score: Callable[[torch.Tensor], Any], observed: Any) -> None:
        self._score, self._observed = score, observed

    def score(self, step, offer, features):
        return self._score(features.loss)

    def observe(self, step):
        return self._observed


def building(score: Callable[[torch.Tensor], Any] = torch.zeros_like, observed: Any = None):
    def mine(config, context: Context) -> Method:
        return plain(Mine(score, {} if observed is None else observed), config, context)

    return mine


SCORES = {
    "column": (lambda loss: -20 * loss[:, None], r"gave torch.float32 \[8, 1\] for 8 windows"),
    "one number": (lambda loss: loss.sum(), r"gave torch.float32 \[\] for 8 windows"),
    "nothing": (lambda loss: None, "gave None for 8 windows"),
    "list": (lambda loss: loss.tolist(), r"gave \["),
    "array": (lambda loss: loss.numpy(), "gave array"),
    "booleans": (lambda loss: loss > 4, r"gave torch.bool \[8\]"),
}


@pytest.mark.parametrize("case", SCORES)
def test_scores_that_are_no_log_weights(case: str, tmp_path: Path):
    score, message = SCORES[case]
    with pytest.raises(CurriqError, match=f"score of Mine {message}.*one log-weight each"):
        train(tiny(run_dir=str(tmp_path)), method=building(score))


def test_scores_with_a_graph_of_their_own_change_no_gradient(tmp_path: Path):
    layer = torch.nn.Linear(1, 1)

    def judged(detached: bool):
        def score(loss):
            found = layer(loss[:, None]).squeeze(1)
            return found.detach() if detached else found

        name = "detached" if detached else "attached"
        return train(tiny(run_dir=str(tmp_path / name)), method=building(score)).summary["test_loss"]

    assert judged(True) == judged(False)
    assert layer.weight.grad is None


def test_scores_that_are_not_finite_are_those_of_the_method(tmp_path: Path):
    with pytest.raises(CurriqError, match=r"those of mine: look at its score\. Start again with") as caught:
        train(tiny(run_dir=str(tmp_path)), method=building(lambda loss: loss * math.nan))
    assert "--beta" not in str(caught.value)


@pytest.mark.parametrize(
    ("observed", "message"),
    [
        ([1.0], r"observe of Mine gave \[1.0\]: it must give a dictionary"),
        ({"own/x": torch.ones(1)}, "observe of Mine gave 'own/x' as a Tensor"),
        ({"own/x": math.nan}, "own/x = nan at step 0.*your own selector or probe"),
    ],
)
def test_what_is_no_metric(observed: Any, message: str, tmp_path: Path):
    with pytest.raises(CurriqError, match=message):
        train(tiny(run_dir=str(tmp_path)), method=building(observed=observed))


def test_a_probe_that_measures_nothing_sayable(tmp_path: Path):
    class Probe:
        def measure(self, step):
            return None

    with pytest.raises(CurriqError, match="measure of Probe gave None"):
        train(tiny(run_dir=str(tmp_path)), probes=(Probe(),))


@pytest.mark.parametrize("found", [None, PlainSelector()])
def test_a_function_that_returns_no_method(found: object, tmp_path: Path):
    def mine(config, context):
        return found

    with pytest.raises(CurriqError, match=r"method=mine gave .*: the function must return a Method"):
        train(tiny(run_dir=str(tmp_path)), method=mine)


def test_a_selector_that_lacks_a_part_is_told_which(tmp_path: Path):
    class Half:
        def score(self, step, offer, features):
            return features.loss

    def halved(config, context):
        method = plain(Uniform(), config, context)
        object.__setattr__(method, "selector", Half())  # its type is checked in tests alone
        return method

    message = "selector of method=halved, Half, lacks admit, load_state_dict, needs_entropy, needs_reward,"
    with pytest.raises(CurriqError, match=message):
        train(tiny(run_dir=str(tmp_path)), method=halved)


def offer(n: int) -> Offer:
    rows = torch.arange(n)
    windows = Windows(tokens=torch.zeros(n, 4, dtype=torch.int32), ids=rows, source=rows)
    return Offer(windows=windows, rows=rows)


PROBABILITIES = {
    "above and below": ([2, 0.5, -0.5, -2], r"gave \[2.0\]: .* torch.sigmoid"),
    "not a number": ([math.nan] * 4, r"gave \[nan\]"),
    "too few": ([0.5], r"gave shape \[1\] for 4 windows"),
    "one for all": (0.5, r"gave shape \[\] for 4 windows"),
    "none": (None, "gave None for 4 windows"),
    "text": ("half", "gave 'half' for 4 windows"),
}


@pytest.mark.parametrize("case", PROBABILITIES)
def test_what_is_no_probability_is_not_drawn_by(case: str):
    given, message = PROBABILITIES[case]
    with pytest.raises(CurriqError, match=f"accept_prob {message}"):
        probabilities(lambda offer: given, offer(4))


def test_lists_are_probabilities_too():
    assert probabilities(lambda offer: [0, 1, 0.5, 1], offer(4)).tolist() == [0, 1, 0.5, 1]
    owner = SimpleNamespace(of=lambda offer: 3)
    with pytest.raises(CurriqError, match=r"accept_prob gave shape \[\]"):
        probabilities(owner.of, offer(4))


class TestTheMethodOfARun:
    """What a resume goes on with is what the run was begun with."""

    @pytest.fixture
    def half(self, tmp_path: Path) -> Path:
        train(tiny(run_dir=str(tmp_path), steps=3), method=building())
        return tmp_path

    def test_is_brought_again_by_name_or_as_parts(self, half: Path):
        resume(half, steps=4, method=building())
        assert resume(half, own=Own(method=building()), steps=5).summary["selector"] == "mine"

    def test_is_not_replaced_by_that_of_the_settings(self, half: Path, capsys):
        with pytest.raises(CurriqError, match=r"method mine, and would go on with soft-q.*method=mine"):
            resume(half, steps=5)
        assert main(["resume", str(half), "--steps", "5"]) == 2
        assert "method mine, and would go on with soft-q" in capsys.readouterr().err

    def test_does_not_replace_that_of_the_settings(self, tmp_path: Path):
        train(tiny(run_dir=str(tmp_path), steps=3, selector="uniform"))
        with pytest.raises(CurriqError, match="method uniform, and would go on with mine"):
            resume(tmp_path, steps=5, method=building())


def test_settings_are_no_parts():
    with pytest.raises(CurriqError, match=r"run\(config, steps=…\): .* config.override\(steps=…\)"):
        train(tiny(), steps=3)
    with pytest.raises(CurriqError, match=r"run: unknown part 'metod'\. Did you mean 'method'"):
        train(tiny(), metod=building())


def test_an_error_in_a_file_of_ones_own_names_its_line(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def build(config, context):\n    return {}['no such key']\n")
    assert main(["train", "--preset", "smoke", "--selector", "mine.py:build"]) == 2
    said = capsys.readouterr().err
    assert f"curriq: {tmp_path / 'mine.py'}, line 2: KeyError: 'no such key'" in said
    assert "fault of curriq" not in said


def test_a_file_that_returns_nothing_is_named(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def build(config, context):\n    pass\n")
    assert main(["train", "--preset", "smoke", "--selector", "mine.py:build"]) == 2
    assert "--selector mine.py:build gave None: the function must return a Method" in capsys.readouterr().err


COMPARED = """
[compare]
base = "smoke"
seeds = [0]
baseline = "uniform"
[arms.uniform]
selector = "uniform"
[arms.mine]
selector = "NAME"
"""
BUILD = """
from curriq.select.base import Uniform, plain
def build(config, context):
    return plain(Uniform(), config, context)
"""


class TestAnArmOfOnesOwn:
    @pytest.fixture
    def compare(self, tmp_path: Path, monkeypatch, capsys):
        """Compares with an arm of this selector and this text after it; returns status and message."""
        monkeypatch.chdir(tmp_path)
        Path("mine.py").write_text(BUILD)

        def run(name: str, more: str = "") -> tuple[int, str]:
            Path("c.toml").write_text(COMPARED.replace("NAME", name) + more)
            return main(["compare", "c.toml"]), capsys.readouterr().err

        return run

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("mien.py:build", "--selector 'mien.py:build': there is no file mien.py"),
            ("mine.py:bild", "--selector 'mine.py:bild': mine.py has no 'bild'"),
            ("no_such_module:build", "--selector 'no_such_module:build': there is no module"),
        ],
    )
    def test_is_found_before_anything_starts(self, compare, name: str, message: str):
        status, said = compare(name)
        assert status == 2
        assert message in said
        assert not list(Path("runs").rglob("metrics.jsonl"))

    def test_that_is_no_python_is_named_by_line(self, compare):
        Path("mine.py").write_text("def build(config, context)\n    pass\n")
        status, said = compare("mine.py:build")
        assert status == 2
        assert "line 1: expected ':'" in said

    def test_under_two_names_is_one(self, compare):
        status, said = compare("mine.py:build", '[arms.again]\nselector = "./mine.py:build"\n')
        assert status == 2
        assert "[arms.mine] and [arms.again] have the same settings" in said

    def test_has_no_settings(self, compare):
        status, said = compare("mine.py:build", "level = 4.0\n")
        assert status == 2
        assert "unknown setting 'level'" in said
        assert "name one function per value" in said

    def test_that_was_edited_is_another_arm(self, compare):
        assert compare("mine.py:build")[0] == 0
        assert compare("mine.py:build")[0] == 0  # the same code, the same runs
        Path("mine.py").write_text(BUILD + "# edited\n")
        status, said = compare("mine.py:build")
        assert status == 2
        assert "mine-0 was trained by other code: the file of --selector mine.py:build has changed" in said

    def test_that_was_edited_is_named_by_a_resume(self, compare, tmp_path: Path, caplog):
        train(tiny(run_dir=str(tmp_path / "run"), steps=2, selector="mine.py:build"))
        Path("mine.py").write_text(BUILD + "# edited\n")
        resume(tmp_path / "run", steps=3)
        assert (
            "the file of --selector mine.py:build has changed since this run was trained by it" in caplog.text
        )
