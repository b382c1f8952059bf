"""Every number has an upper bound, and what no file, parser or memory can hold is refused by name."""

import math
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import pytest

from curriq import parallel
from curriq.config import RunConfig, SourceConfig, flag, load_toml
from curriq.errors import CurriqError
from curriq.evaluate.plan import CompareConfig
from curriq.train.run import require_memory

NUMBERS = [
    (section, name, hint)
    for section in (*get_type_hints(RunConfig).values(), CompareConfig)
    for name, hint in get_type_hints(section, include_extras=True).items()
    if get_origin(hint) is Annotated or hint in (int, float)
]


@pytest.mark.parametrize(("section", "name", "hint"), NUMBERS, ids=[name for _, name, _ in NUMBERS])
def test_every_number_has_an_upper_bound(section: type, name: str, hint: Any) -> None:
    (bound,) = hint.__metadata__
    low, high = bound.ends
    assert -math.inf < low < high < 1e19
    integral = hint.__origin__ is int
    assert integral == float(high).is_integer() or high <= 1e9
    with pytest.raises(CurriqError) as error:
        bound.check(name, int(10 * high) if integral else 10 * high)
    message = str(error.value)
    assert f"{flag(name)} = " in message  # the value
    assert f"at most {high:g}" in message or f"{bound.interval}" in message  # the bound
    assert not (high > 1 and low >= 0) or bound.above in message  # and why, where it is no share
    assert high <= 1 or bound.above


def test_numbers_are_found() -> None:
    assert len(NUMBERS) > 80
    with pytest.raises(CurriqError, match=r"weight = 10000000000.0: it must lie in \[0, 1e\+09\]"):
        SourceConfig(name="a", path="b", weight=1e10)


@pytest.mark.parametrize("text", ["a\0b", "a\udc80b"])
def test_a_text_that_no_file_name_can_hold_is_refused_by_name(text: str) -> None:
    for name, value in (("run_dir", text), ("model", text), ("eval_tasks", ["x", text])):
        with pytest.raises(CurriqError, match=rf"{flag(name)} = .*a\\.*b.*must be UTF-8 and have no NUL"):
            RunConfig().override(**{name: value})
    with pytest.raises(CurriqError, match=r"source .a.: path = .*NUL"):
        SourceConfig(name="a", path=text)


@pytest.mark.parametrize(
    "content",
    ["a = " + "[" * 100_000, "a = " + "9" * 5000, "\x00", "[train]\nsteps = 1e400"],
)
def test_a_file_that_its_parser_gives_up_on_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(content)
    with pytest.raises(CurriqError, match=r"run\.toml"):
        load_toml(tmp_path / "run.toml")


def test_a_refused_value_is_shown_short(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f'[train]\nsteps = "{"x" * 100_000}"\n')
    with pytest.raises(CurriqError) as error:
        load_toml(tmp_path / "run.toml")
    assert len(str(error.value)) < 300


def test_stores_that_no_memory_holds_are_refused_before_they_are_filled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "memory_bytes", lambda: 1e9)
    fits = RunConfig().override(window=100, shuffle_buffer=2_000_000, buffer_size=10_000_000)
    require_memory(fits)
    for config, said in (
        (fits.override(shuffle_buffer=3_000_000), "--shuffle-buffer = 3000000: these windows of 100 tokens"),
        (fits.override(proposer="langevin"), "--buffer-size"),
    ):
        with pytest.raises(CurriqError, match=said):
            require_memory(config)
