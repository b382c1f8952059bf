"""Other programs' names of settings are answered with ours, everywhere, and never accepted."""

from pathlib import Path

import pytest

from curriq.cli import parse_run_config
from curriq.config import (
    FORMER,
    RunConfig,
    SourceConfig,
    field_owners,
    flag,
    from_dict,
    load_toml,
    other_name,
)
from curriq.config.synonyms import MEANINGS, OURS, SOURCE_KEYS
from curriq.errors import CurriqError
from curriq.evaluate.plan import load_plan


def test_the_names_of_others_are_none_of_ours():
    assert set(OURS.values()) == set(MEANINGS) <= set(field_owners())
    assert not set(OURS) & {*field_owners(), *FORMER}


@pytest.mark.parametrize("name", OURS)
def test_every_name_is_answered_with_ours(name: str):
    ours = OURS[name]
    with pytest.raises(CurriqError) as error:
        RunConfig().override(**{name: 8})
    assert str(error.value) == f"unknown setting {name!r}. Did you mean {ours} ({MEANINGS[ours]})?"
    options = [flag(setting) for setting in field_owners()]
    assert other_name(flag(name), options) == f" Did you mean {flag(ours)} ({MEANINGS[ours]})?"


@pytest.mark.parametrize("words", [["--batch-size", "8"], ["--batch_size=8"], ["--train-batch-size", "8"]])
def test_the_command_line_explains_it_in_one_line(words: list[str]):
    with pytest.raises(CurriqError) as error:
        parse_run_config(words)
    name = words[0].partition("=")[0]
    assert str(error.value).startswith(
        f"unknown argument {name!r}. Did you mean --num-candidates (windows per step"
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train": {"batch_size": 8}},
            "[train] unknown setting 'batch_size'. Did you mean num_candidates of [train]",
        ),
        (
            {"train": {"learning_rate": 1}},
            "[train] unknown setting 'learning_rate'. Did you mean lm_lr of [optim]",
        ),
        ({"output_dir": "x"}, "unknown setting 'output_dir'. Did you mean run_dir of [log]"),
        ({"train": {"lm_lr": 1e-3}}, "[train] lm_lr is a setting of [optim]: write it there."),
        ({"steps": 5}, "steps is a setting of [train]: write it there."),
    ],
)
def test_run_files_name_the_section_too(values: dict, message: str):
    with pytest.raises(CurriqError) as error:
        from_dict(values)
    assert str(error.value).startswith(message)


def test_files_are_named(tmp_path: Path):
    run, plan = tmp_path / "run.toml", tmp_path / "compare.toml"
    run.write_text("[data]\nmax_length = 512\n")
    with pytest.raises(
        CurriqError, match=r"run\.toml: \[data\] unknown setting 'max_length'. Did you mean w"
    ):
        load_toml(run)
    plan.write_text('[compare]\nseeds = [0]\nbaseline = "a"\n[arms.a]\n[arms.b]\nlearning_rate = 1e-3\n')
    with pytest.raises(CurriqError, match=r"\[arms\.b\] unknown setting 'learning_rate'. Did you mean lm_lr"):
        load_plan(plan)


@pytest.mark.parametrize("name", SOURCE_KEYS)
def test_keys_of_a_source(name: str):
    keys = SourceConfig.__dataclass_fields__
    assert SOURCE_KEYS[name] in keys
    assert name not in keys
    with pytest.raises(CurriqError) as error:
        parse_run_config(["--sources", f"name=a,path=b,{name}=x"])
    assert str(error.value) == f"unknown source key {name!r}. Did you mean {SOURCE_KEYS[name]!r}?"
